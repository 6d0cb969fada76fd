"""The response of training to the loss of one sample, carried along the real steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.leave_one_out import leave_one_out, responded
from lsp_callbacks.linalg import push
from lsp_callbacks.operators.cost import products
from lsp_callbacks.operators.curvature.hessian import Method, label, path_taken, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.sgd.sample_contributions import SampleContributions, sample_contributions
from lsp_callbacks.operators.trajectory.formula_tangent import state_blocks
from lsp_callbacks.operators.trajectory.proximal import update_jacobian, update_response
from lsp_callbacks.operators.trajectory.step_jacobian import tangent_path
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.step.replay_checks import replayed_gradient, verify, verify_gradient, without_step_values
from lsp_callbacks.step.snapshot import Snapshot


class LeaveOneOut(Quantity):
    """Algorithmic stability: how far training moves when one sample loses its weight, to first order.

    The first samples of a window's first batch lose a weight ``w`` in it. The derivative of the run with respect to w
    is carried through ``window`` real updates, ``r' = A_t r - R_t s_t``: ``A_t`` the Jacobian of the optimizer's step,
    ``R_t`` its response to the gradient, ``s_t`` the gradient of the sample's share in the batch's loss, 0 in the later
    batches. At the end stand ``||d theta||``, the rise of the sample's own loss (in the first batch, with its masks),
    and the change of the loss of the batch that comes next. All are per unit of weight: 1 removes the sample once. They
    are derivatives: removing a sample altogether from a small data set is no small change, and across the kinks of a
    ReLU network nothing is promised; ``benchmarks/leave_one_out.py`` compares with real runs.

    With ``full_batch`` the samples lose their weight in each of the window's steps.

    When ``leave_one_out_loss`` is far above the loss itself, single samples are being memorised: more data, weight
    decay or a shorter run. When ``leave_one_out_parameters`` grows with the window, training amplifies what one sample
    does: lower the learning rate.

    Args:
        samples: how many, the first of the batch; of several ranks, of the first.
        window: updates.
        full_batch: all batches hold the same samples in the same order; it is checked.
        method: of the Hessian products.

    Keys: ``stability/leave_one_out_parameters`` and ``stability/leave_one_out_loss``, means over the samples with
    ``_error`` and ``_max`` (of absolute values; a lower bound of uniform stability), and
    ``stability/leave_one_out_next_loss``, the largest absolute change of the next batch's loss.

    Raises:
        ValueError: for bad arguments.

    Cost: ``samples`` products with the Jacobian of the step a step: 140 gradients, or 210 with kinks.

    Source: Katende, Sec. 7.4; Bousquet & Elisseeff 2002; Hardt, Recht & Singer 2016.
    """

    name = "leave_one_out"
    keys = (
        "stability/leave_one_out_parameters", "stability/leave_one_out_parameters_max",
        "stability/leave_one_out_loss", "stability/leave_one_out_loss_max", "stability/leave_one_out_next_loss",
    )  # fmt: skip
    optional = ("stability/leave_one_out_parameters_error", "stability/leave_one_out_loss_error")
    prepare = 1
    needs_update = True
    values: Tensor

    def __init__(self, samples: int = 4, window: int = 20, *, full_batch: bool = False, method: Method = "auto"):
        super().__init__()
        whole("samples", samples, 1), whole("window", window, 1)
        self.samples, self.window, self.full_batch = samples, window, full_batch
        self.method: Method = choice("method", method, *get_args(Method))
        self._frame: dict[str, Any] = {}
        self._path = ""
        size = len(self.keys) + len(self.optional)
        self.add_state("values", default=torch.full((size,), torch.nan, dtype=torch.float64), persistent=True)

    def check(self, snapshot: Snapshot) -> None:
        tangent_path(snapshot)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        known = 3 + self.samples * 2 / 3
        shared = (1 + self.full_batch * (self.window - 1) + 1) * known
        pushes = 1 / 3 + products(snapshot, resolved(snapshot, self.method), self.samples, tangent=True)
        return {"gradient": 1.0, "shares": shared, "leave one out": self.window * pushes}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        blocks = 1 + (len(state_blocks(snapshot)) if tangent_path(snapshot) == "exact" else 2)
        return product_memory(snapshot, self.method, self.samples * (3 * blocks + 2))

    def path(self, snapshot: Snapshot) -> str:
        return self._path or label("exact", snapshot)

    def update(self, snapshot: Snapshot) -> None:
        """Takes samples out, pushes the responses through one more step, or reads them; a gap starts again."""
        self.complete = False
        frame = self._frame
        if not frame or not snapshot.follows(frame["step"]):
            self._frame = self._begin(snapshot)
            return
        if frame["count"] == self.window:
            self.values = self._read(snapshot, frame)
            self._frame, self.complete = {}, True
            return
        forced = self._forced(snapshot, self._again(snapshot, frame["known"])) if self.full_batch else None
        jacobian = update_jacobian(snapshot, method=frame["method"])
        state = responded(frame["state"], jacobian, forced)
        own = ", finite difference of step" if tangent_path(snapshot) != "exact" else ""
        self._path = path_taken(snapshot, frame["method"]) + own
        self._frame = frame | {"state": state, "count": frame["count"] + 1, "step": snapshot.step}

    def _begin(self, snapshot: Snapshot) -> dict[str, Any]:
        tangent_path(snapshot)
        verify_gradient(snapshot)
        method = resolved(snapshot, self.method)
        known = self._shares(snapshot)
        # The batch is needed again at the end; what was computed for the step is not.
        first = without_step_values(snapshot)
        state = self._forced(snapshot, known)
        return {"state": state, "known": known, "first": first, "count": 1, "step": snapshot.step, "method": method}

    def _shares(self, snapshot: Snapshot) -> SampleContributions:
        def own() -> SampleContributions:
            found = sample_contributions(snapshot, self.samples)
            return replace(found, gradients=found.gradients.cpu(), inputs=found.inputs.cpu())

        verify(snapshot)  # on all ranks
        return snapshot.run.ranks.first(own, "the shares")

    def _forced(self, snapshot: Snapshot, found: SampleContributions) -> Tensor:
        """By the shares in the loss of all ranks, which is the mean of their losses."""
        response = update_response(snapshot)
        return -push(response, found.gradients.to(response.device) / snapshot.run.ranks.world)

    def _again(self, snapshot: Snapshot, known: SampleContributions) -> SampleContributions:
        found = self._shares(snapshot)
        if not torch.equal(found.inputs, known.inputs):
            raise Unmeasurable(
                "full_batch=True, but the inputs of the batch's first samples are not those of the step before: "
                "train on the same batch without shuffling or augmentation, or leave full_batch out"
            )
        return found

    def _read(self, snapshot: Snapshot, frame: dict[str, Any]) -> Tensor:
        found = self._shares(frame["first"])
        gradient = snapshot.flat_gradient
        if gradient is None:
            _, gradient = replayed_gradient(snapshot)
        moved = frame["state"][:, : len(gradient)].cpu()
        if not bool(torch.isfinite(moved).all()):
            raise Unmeasurable("the response is not finite: the weights or the loss have overflowed")
        numbers = leave_one_out(moved, found.batch * found.gradients)
        following = (moved.double() @ gradient.double().cpu()).abs().max()
        return torch.stack([
            scalar(value) for value in (
                numbers.parameters, numbers.parameters_max, numbers.loss, numbers.loss_max, following,
                numbers.parameters_error, numbers.loss_error,
            )
        ])  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        """The last window's numbers; errors where there are two samples."""
        found = dict(zip((*self.keys, *self.optional), self.values))
        return {key: value for key, value in found.items() if key in self.keys or not bool(value.isnan())}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        """A window under way holds a batch, and is not saved: it starts again."""
        self._frame = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_frame": {}}
