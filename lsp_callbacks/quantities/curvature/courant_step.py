"""The Courant number of the steps as they were taken, by one forward pass after an update."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lsp_callbacks._validation import whole
from lsp_callbacks.autograd.shifted_parameters import put_back
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.courant_step import courant_step
from lsp_callbacks.operators.cost import beside
from lsp_callbacks.operators.footprint import footprint
from lsp_callbacks.operators.trajectory.step_by_differences import require_gradient_at_weights
from lsp_callbacks.quantities.base import scalar
from lsp_callbacks.quantities.curvature.along_update import AlongUpdate
from lsp_callbacks.quantities.key import Key
from lsp_callbacks.step.flat import split
from lsp_callbacks.step.replay_checks import replayed_gradient, verify_gradient
from lsp_callbacks.step.snapshot import BeforeStep, Snapshot
from lsp_callbacks.step.taken_step import TakenStep

#: The largest error by rounding that is accepted.
CLEAR = 0.1


class CourantStep(AlongUpdate):
    """Courant number of the last steps that were looked at: curvature along the update, over that of the edge.

    The loss of a step's own batch is computed again after its update, with the same random masks and statistics:
    ``courant_step = 1 + (L(after) - L(before)) / (-g . update)``, a ratio of sums over a window of readings, see
    `lsp_callbacks.functional.courant_step`. Above 1 these steps have raised the losses of their own batches. It needs
    no formula of the optimizer, and sees everything that moves the parameters: clipping, decay, a prox, a line search.

    It looks at one direction, so that it may be calm while others are unstable, and above 1 in single steps of a stable
    heavy ball: it tells what the steps did, not what the rate may be.

    A step that moves nothing (left out by a gradient scaler, at a rate of 0) gives no reading. The number is NaN where
    rounding of the losses hides their change (its error would exceed 0.1), where the loss did not fall along the
    updates of the window, and where a loss is not finite.

    Args:
        readings: in the sums.
        check_every: of so many updates of the metric, the first checks that the step's gradient is that of its loss,
            and that the loss at the same parameters is the same after the update.

    Raises:
        ValueError: for less than one reading.

    Cost: one forward pass and copies: 0.4 gradients; 1.7 more in the first and each 16th measurement.

    Source: Roulet et al. 2024 (their edge along the update); docs/theory.md, section The law of SGD, energies, kinks.

    Example:
        >>> import torch
        >>> from lsp_callbacks import CourantStep, Snapshot
        >>> theta = torch.nn.Linear(1, 1, bias=False).double()
        >>> sgd, x = torch.optim.SGD(theta.parameters(), lr=0.5), torch.ones(1, 1, dtype=torch.float64)
        >>> metric = CourantStep()
        >>> for step in range(2):  # of theta^2 / 2; the second update looks back at the first step
        ...     metric.update(Snapshot(step=step, module=theta, replay=lambda: theta(x).square().sum() / 2))
        ...     sgd.zero_grad(); (theta(x).square().sum() / 2).backward(); _ = sgd.step()
        >>> round(float(metric.compute()["stability/courant_step"]), 6)
        0.25
    """

    name = "courant_step"
    needs_whole = False
    KEYS: ClassVar = {
        "courant_step": Key(
            "Curvature along the last updates over that at which their losses stop falling.",
            "",
            "Above 1 the steps raise the loss of their own batches: lower the rate, unless momentum makes it swing.",
            threshold=1.0,
        ),
        "courant_step_error": Key("Error of courant_step by rounding.", error_of="courant_step"),
    }
    changes: Tensor

    def __init__(self, readings: int = 8, check_every: int = 16):
        super().__init__(check_every)
        whole("readings", readings, 1)
        none = torch.full((readings, 3), torch.nan, dtype=torch.float64)
        self.add_state("changes", default=none, persistent=True)

    @property
    def is_first(self) -> bool:
        return bool(self.changes.isnan().all())

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        gradients = 1.0 if snapshot.run.updates_elsewhere else 5 / 3 * self.checks
        return {"the step's loss": 1 / 3 + gradients + beside(snapshot, calls=200, vectors=10)}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        held = footprint(snapshot)
        return {"activations": held.activations, "copies": 2 * held.buffers, "vectors": 2 * held.parameters}

    def check(self, snapshot: Snapshot) -> None:
        super().check(snapshot)
        if snapshot.optimizer is not None and not snapshot.run.updates_elsewhere:
            require_gradient_at_weights(snapshot.optimizer)

    def begun(self, snapshot: Snapshot, *, is_checked: bool) -> TakenStep:
        before, parameters = snapshot.before, snapshot.parameters
        if is_checked and before is None:
            verify_gradient(snapshot)
        if snapshot.loss is None or snapshot.gradient is None:
            weights = None if before is None else [before.weights[name] for name in parameters]
            with put_back([*parameters.values()], weights):
                loss, flat = replayed_gradient(snapshot)
            gradient: dict[str, Tensor | None] = {**dict(zip(parameters, split(flat, [*parameters.values()])))}
            if before is not None and before.loss is None:
                before = BeforeStep(before.weights, loss)
            snapshot = replace(snapshot, loss=loss, gradient=gradient, before=before)
        return TakenStep(snapshot, check=is_checked)

    def measure(self, taken: TakenStep) -> None:
        slope = taken.slope()
        assert slope is not None
        with taken.along() as along:
            latest = slope, *along(1.0)
        if not all(bool(number.isfinite()) for number in latest):
            raise Unmeasurable("the loss of the step's batch is not finite after its update")
        self.changes = torch.cat([self.changes[1:], torch.stack([*map(scalar, latest)])[None]])
        slopes, changes, roundings = self.changes[~self.changes[:, 0].isnan()].T
        courant, error = courant_step(slopes, changes), roundings.sum() / slopes.sum().abs()
        if bool(courant.isnan()):
            raise Unmeasurable(
                f"to first order the last {len(slopes)} updates that were seen change the loss by {slopes.sum():.3g}: "
                "the learning rate is 0, momentum takes them uphill, or the optimizer does not follow the gradient"
            )
        if not bool(error <= CLEAR):
            raise Unmeasurable(
                f"the updates change the loss of their batch so little that rounding hides it: courant_step = "
                f"{courant:.3g} with an error of {error:.2g}; measure in float32 or float64"
            )
        self.finish({"courant_step": courant, "courant_step_error": error})

    def restart(self) -> None:
        super().restart()
        self.changes = torch.full_like(self.changes, torch.nan)
