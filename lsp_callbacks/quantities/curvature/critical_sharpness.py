"""Critical sharpness of the steps as they were taken, by a few forward passes after an update."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import number, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.critical_step import CriticalStep, critical_step
from lsp_callbacks.operators.cost import beside
from lsp_callbacks.operators.footprint import footprint
from lsp_callbacks.quantities.base import scalar
from lsp_callbacks.quantities.curvature.along_update import AlongUpdate
from lsp_callbacks.quantities.key import PREFIX, Key, relative_bar
from lsp_callbacks.step.snapshot import Snapshot
from lsp_callbacks.step.taken_step import Along, TakenStep

#: Forward passes of a search: of the first, and of one that starts from the last.
COLD, WARM = 5, 3


class CriticalSharpness(AlongUpdate):
    """Critical sharpness: 2 over the learning rate at which the step's update raises the loss of its own batch.

    The update u is what the optimizer did to the parameters, whatever it is. With s the least multiple of it at which
    the loss of the step's own batch, with the same random masks and statistics, is above that before the step::

        critical_sharpness = 2 / (lr s),    critical_multiple = s

    see `lsp_callbacks.functional.critical_sharpness`. Nothing but forward passes at shifted parameters is needed: no
    formula of the optimizer, no second derivative. For gradient descent on a quadratic it is the curvature along the
    gradient, at most the sharpness; for an optimizer with a preconditioner that of the preconditioned Hessian.

    The rate is the largest of the parameter groups; an optimizer without one counts as one of rate 1.

    Each search starts from the rate that was found last. The number is NaN where the update does not lower the loss of
    its batch, as in many steps of a heavy ball, and where rounding of the losses hides the crossing. So it says what a
    step could have been, and is no reason to stop by itself: steps of healthy runs are at the edge, too.

    The **relative** critical sharpness of a second loss is that along the same update: how fast it goes up while the
    first is trained, as that of the pre-training data while a network is fine-tuned.

    Args:
        second_loss: ``(module) -> loss``, of a copy of the module with the step's buffers; or batches, such as a
            loader, of which the step's own loss is taken. None measures no relative critical sharpness.
        batches: how many of those batches, the first ones, are used; they are read once, and kept.
        tolerance: of the critical sharpness, relative; rounding may add to it.
        check_every: of so many updates of the metric, the first checks that the loss at the same parameters is the same
            after the update.

    Raises:
        ValueError: for a second loss that is neither a function nor batches, less than one batch, a tolerance outside
            (0, 1].

    Cost: 2 to 3 forward passes, at first some more (``benchmarks/critical_sharpness_is_cheap.py``). As many, and one
    more, for a second loss.

    Source: Kalra et al. 2026.

    Example:
        >>> import torch
        >>> from lsp_callbacks import CriticalSharpness, Snapshot
        >>> theta = torch.nn.Linear(1, 1, bias=False).double()
        >>> sgd, x = torch.optim.SGD(theta.parameters(), lr=0.1), torch.full((1, 1), 2.0, dtype=torch.float64)
        >>> loss = lambda: theta(x).square().sum() / 2  # its curvature is 4
        >>> metric = CriticalSharpness()
        >>> for step in range(2):  # the second update looks back at the first step
        ...     metric.update(Snapshot(step=step, module=theta, replay=loss, optimizer=sgd))
        ...     sgd.zero_grad(); loss().backward(); _ = sgd.step()
        >>> round(float(metric.compute()["stability/critical_sharpness"]), 6)
        4.0
    """

    name = "critical_sharpness"
    needs_whole = False
    KEYS: ClassVar = {
        "critical_sharpness": Key(
            "2 over the rate at which the step's update raises the loss of its batch.",
            "1 / learning rate",
            "Above 2 over the rate the step has raised the loss of its batch: lower the rate if that lasts.",
            may_stop=False,
        ),
        "critical_sharpness_error": relative_bar("critical_sharpness"),
        "critical_multiple": Key(
            "Least multiple of the step's update at which the loss of its batch goes up.", may_stop=False
        ),
        "relative_critical_sharpness": Key(
            "2 over the rate at which the step's update raises the second loss.",
            "1 / learning rate",
            "Above 2 over the rate the step has raised the second loss: mix its data in, or lower the rate.",
            optional=True,
            may_stop=False,
        ),
        "relative_critical_sharpness_error": relative_bar("relative_critical_sharpness", optional=True),
    }
    rate: Tensor
    relative_rate: Tensor

    def __init__(
        self,
        second_loss: Callable[[nn.Module], Tensor] | Iterable[Any] | None = None,
        *,
        batches: int = 1,
        tolerance: float = 0.05,
        check_every: int = 16,
    ):
        super().__init__(check_every)
        if second_loss is not None and not callable(second_loss) and not _is_loader(second_loss):
            raise ValueError(
                f"second_loss={second_loss!r}: give a function (module) -> loss, or batches, such as a loader"
            )
        self.second_loss, self.batches = second_loss, whole("batches", batches, 1)
        self.tolerance = number("tolerance", tolerance, above=0, most=1)
        self._kept: list[Any] = []
        self._has_warned = False
        #: The critical rates that were found last, from which the next searches start.
        for state in ("rate", "relative_rate"):
            self.add_state(state, default=scalar(torch.nan), persistent=True)

    @property
    def is_first(self) -> bool:
        return bool(self.rate.isnan())

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        replays_before = 1.0 if snapshot.tolerance or snapshot.loss is None else self.checks
        passes = {"the step's loss": replays_before + (COLD if self.is_first else WARM)}
        if self.second_loss is not None:
            passes["the second loss"] = 1 + (COLD if bool(self.relative_rate.isnan()) else WARM)
        return {
            name: count / 3 + beside(snapshot, calls=60 * count, vectors=4 * count) for name, count in passes.items()
        }

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        held = footprint(snapshot)
        return {"activations": held.activations, "copies": 2 * held.buffers, "vectors": 4 * held.parameters}

    def measure(self, taken: TakenStep) -> None:
        slope = taken.slope()
        lr = taken.lr if taken.lr > 0 else 1.0
        with taken.along(replays_before=not taken.is_exact) as along:
            result = self._search(along, self.rate / lr, None if slope is None else float(slope))
        values = {
            "critical_sharpness": 2 / (lr * result.multiple),
            "critical_sharpness_error": result.error,
            "critical_multiple": result.multiple,
        }
        rates = {"rate": lr * result.multiple}
        if self.second_loss is not None:
            other = self._relative(taken, self.relative_rate / lr, result.multiple)
            if other is not None:
                rates["relative_rate"] = lr * other.multiple
                values["relative_critical_sharpness"] = 2 / rates["relative_rate"]
                values["relative_critical_sharpness_error"] = other.error
        for name, rate in rates.items():
            setattr(self, name, scalar(rate))
        self.finish(values)

    def _search(self, along: Along, start: Tensor, slope: float | None, otherwise: float = 1.0) -> CriticalStep:
        def change(multiple: float) -> tuple[float, float]:
            latest = along(multiple)
            return float(latest.change), float(latest.rounding)

        first = float(start) if bool(start.isfinite()) else otherwise
        return critical_step(change, slope=slope, start=first, tolerance=self.tolerance)

    def _relative(self, taken: TakenStep, start: Tensor, otherwise: float) -> CriticalStep | None:
        """Return where the second loss goes up; None, with one warning, where that cannot be seen."""

        def search() -> CriticalStep:
            with taken.along(taken.other_loss(self._second())) as along:
                return self._search(along, start, None, otherwise)

        try:
            return taken.run.ranks.apart(search)
        except Exception as error:  # the second loss is the user's; the first has been measured
            kind = "" if isinstance(error, Unmeasurable) else f"{type(error).__name__}: "
            if not self._has_warned and taken.run.ranks.rank == 0:
                warnings.warn(f"no {PREFIX}relative_critical_sharpness: second_loss: {kind}{error}", stacklevel=2)
            self._has_warned = True
            return None

    def _second(self) -> Any:
        if callable(self.second_loss):
            return self.second_loss
        if not self._kept and self.second_loss is not None:
            self._kept = list(itertools.islice(self.second_loss, self.batches))
            if not self._kept:
                raise Unmeasurable("it gives no batch")
        return self._kept

    def restart(self) -> None:
        super().restart()
        self.rate, self.relative_rate = scalar(torch.nan), scalar(torch.nan)


def _is_loader(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | Tensor)
