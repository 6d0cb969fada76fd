"""Scalars of every optimizer step: what quantities of a time series look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.arguments import whole
from lsp_callbacks.ranks import Ranks

#: A function of the parameters, cheap and without side effects, called at every step.
Energy = Callable[[nn.Module], Tensor]


class Trace:
    """The loss, the learning rate and named energies of the last ``length`` consecutive optimizer steps.

    All are those before the update: ``E_t`` is the energy of the parameters at which the loss and the gradient of step
    t were taken. They stay on their device until `read`, so that no step waits for it. Where a step is missing the
    record begins anew.

    Args:
        length: how many steps are kept.
        energies: by name, called with the module under ``no_grad``; they must draw no random number and change nothing.

    Attributes:
        rate_sum: of the learning rates of all recorded steps, also of those that are not kept.
        rate_squares: of their squares.
        sparse: whether two steps in a row came alone: then no series comes about.
        failed: energies that raised, and what; they are NaN from then on.

    Raises:
        ValueError: for a length below 1, or an energy called "loss" or "lr".

    Example:
        >>> import torch
        >>> from lsp_callbacks import Trace
        >>> trace = Trace(length=2)
        >>> for step in range(3):
        ...     trace.record(step, torch.tensor(0.5**step), lr=0.1)
        >>> trace.read()["loss"].tolist()
        [0.5, 0.25]
    """

    def __init__(self, length: int, energies: Mapping[str, Energy] | None = None):
        whole("length", length, 1, instead=" of steps")
        self.length, self.energies = length, dict(energies or {})
        if taken := {"loss", "lr"} & self.energies.keys():
            raise ValueError(f"energies={sorted(taken)}: these are recorded anyway, give another name")
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.rate_sum = self.rate_squares = 0.0
        self.failed: dict[str, str] = {}
        self.cut()

    def cut(self) -> None:
        """Forgets the series; the sums of the rates stay."""
        self._rings: dict[str, Tensor] = {}
        self._count = 0
        self._next: int | None = None
        self.sparse = False

    def __len__(self) -> int:
        return min(self._count, self.length)

    def record(self, step: int, loss: Tensor | None, *, lr: float = math.nan, module: nn.Module | None = None) -> None:
        """One more step, before its update; a step that is recorded already is passed over.

        Args:
            step: number of the optimizer step.
            loss: of the whole step; None where nobody saw it.
            lr: the rate that the step uses.
            module: for the energies.

        Raises:
            ValueError: if the loss or an energy is not one number.

        Cost: one copy of a number for each, and the energies.
        """
        if self._next is not None and step == self._next - 1:
            return
        with torch.no_grad():
            found: dict[str, Any] = {"loss": math.nan if loss is None else loss, "lr": lr}
            for name, energy in self.energies.items():
                found[name] = self._energy(name, energy, module)
        values = {
            name: value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
            for name, value in found.items()
        }
        for name, value in values.items():
            if value.numel() != 1:
                raise ValueError(f"{name} of step {step} has shape {tuple(value.shape)}: give one number")
        if step != self._next:
            self.sparse, self._count = self._count == 1, 0
        for name, value in values.items():
            self._ring(name, value)[self._count % self.length] = value.reshape(())
        self._next, self._count = step + 1, self._count + 1
        if self._count == 2:
            self.sparse = False
        if math.isfinite(lr):
            self.rate_sum, self.rate_squares = self.rate_sum + lr, self.rate_squares + lr * lr

    def _energy(self, name: str, energy: Energy, module: nn.Module | None) -> Any:
        """NaN once it has raised: it is not asked again, and the other series go on."""
        if name in self.failed:
            return math.nan
        try:
            return energy(module)  # type: ignore[arg-type]
        except Exception as error:  # whatever the user's function raises
            self.failed[name] = f"{type(error).__name__}: {error}"
            return math.nan

    def _ring(self, name: str, like: Tensor) -> Tensor:
        ring = self._rings.get(name)
        if ring is None or ring.device != like.device:  # of a checkpoint: the first copy would wait for the device
            dtype = torch.promote_types(like.dtype, torch.float32)
            kept = torch.full((self.length,), math.nan, dtype=dtype) if ring is None else ring
            ring = self._rings[name] = kept.to(like.device, dtype)
        return ring

    def read(self, ranks: Ranks | None = None) -> dict[str, Tensor]:
        """The recorded series by name, oldest first, in float64 on the CPU: "loss", "lr" and the energies.

        Args:
            ranks: the processes that took the steps together: the means of theirs, by one all-reduce. All come here.
        """
        series = {name: self._ordered(ring) for name, ring in self._rings.items()}
        if ranks is None or ranks.world == 1 or not series:
            return series
        (mean,) = ranks.mean(lambda: (torch.stack(list(series.values())).to(ranks.device),), "the trace")
        return dict(zip(series, mean.cpu()))

    def _ordered(self, ring: Tensor) -> Tensor:
        start = self._count % self.length if self._count > self.length else 0
        return ring.roll(-start)[: len(self)].double().cpu()

    def state_dict(self, *, series: bool = True) -> dict[str, Any]:
        """Numbers only; without ``series`` no more than the sums of the rates."""
        return {
            "next": self._next,
            "series": self.read() if series else {},
            "rate_sum": self.rate_sum,
            "rate_squares": self.rate_squares,
            "sparse": self.sparse,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; a series of other energies begins anew."""
        self.reset()
        self.rate_sum, self.rate_squares = state["rate_sum"], state["rate_squares"]
        if state["series"].keys() != {"loss", "lr", *self.energies}:
            return
        self._next, self.sparse = state["next"], state["sparse"]
        for name, series in state["series"].items():
            kept = series[-self.length :]
            self._count = len(kept)
            ring = self._rings[name] = torch.full((self.length,), math.nan, dtype=torch.float64)
            ring[: len(kept)] = kept
