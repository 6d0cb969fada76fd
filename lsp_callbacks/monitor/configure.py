"""A `Monitor` from the settings of a callback."""

from __future__ import annotations

from collections.abc import Sequence

from lsp_callbacks._validation import number
from lsp_callbacks.monitor.cadence import MODELLED, EveryNSteps
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.quantities import Quantity, build
from lsp_callbacks.quantities.module_filter import Selection


def configured(
    quantities: str | Sequence[str | Quantity] = "default",
    *,
    every_n_steps: EveryNSteps = None,
    budget: float = 0.05,
    window: int | None = None,
    average: int | None = None,
    layers: Selection = None,
    blocks: Selection = None,
    strict: bool = False,
    max_memory: float | str | None = None,
    time_limit: float | None = None,
) -> Monitor:
    """Return a `Monitor` with the meaning that these settings have in `StabilityMonitor`.

    Raises:
        ValueError: for bad arguments.
    """
    number("budget", budget, above=0, most=1, instead=": a share of the training cost")
    exponent = {"window": window, "average": average}
    built, named = build(
        quantities,
        lyapunov={name: value for name, value in exponent.items() if value is not None},
        spectral_norm={"layers": layers},
        residual_cfl={"blocks": blocks},
    )
    return Monitor(
        *built, every_n_steps=every_n_steps, budget=MODELLED * budget, named=named, strict=strict,
        max_memory=max_memory, time_limit=time_limit,
    )  # fmt: skip
