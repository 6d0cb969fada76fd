"""Response of training to the removal of one sample, propagated along the real steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.leave_one_out import leave_one_out, responded
from lsp_callbacks.linalg import push
from lsp_callbacks.operators.cost import products
from lsp_callbacks.operators.curvature.hessian import Method, decided, label, path_taken, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.sgd.sample_contributions import SampleContributions, sample_contributions
from lsp_callbacks.operators.trajectory.formula_tangent import state_blocks
from lsp_callbacks.operators.trajectory.proximal import update_jacobian, update_response
from lsp_callbacks.operators.trajectory.step_jacobian import tangent_path
from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.quantities.key import Key, standard_error
from lsp_callbacks.step.replay_checks import replayed_gradient, verify, verify_gradient, without_step_values
from lsp_callbacks.step.snapshot import Snapshot


class LeaveOneOut(Quantity):
    """Algorithmic stability: how far training moves when one sample loses its weight, to first order.

    The first samples of a window's first batch lose a weight ``w`` in it. The derivative of the run with respect to w
    is propagated through ``window`` real updates, ``r' = A_t r - R_t s_t``: ``A_t`` the Jacobian of the optimizer's
    step, ``R_t`` its response to the gradient, ``s_t`` the gradient of the sample's part of the batch's loss, 0 in the
    later batches. The results are ``||d theta||``, the rise of the sample's own loss (in the first batch, with its
    masks), and the change of the next batch's loss. All are per unit of weight: 1 removes the sample once. They are
    derivatives: removing a sample completely from a small data set is no small change, and across the kinks of a ReLU
    network they need not hold; ``benchmarks/leave_one_out.py`` compares with real runs.

    With ``full_batch`` the samples lose their weight in each of the window's steps.

    Args:
        samples: number of samples, the first of the batch; with several ranks, of the first rank's.
        window: number of updates.
        full_batch: whether all batches hold the same samples in the same order; this is checked.
        method: of the Hessian products.

    Raises:
        ValueError: for fewer than 1 sample or 1 update, or an unknown method.

    Cost: in each step ``samples`` products with its Jacobian: 140 gradients, or 210 with kinks.

    Source: Katende 2025, Sec. 7.4; Bousquet & Elisseeff 2002; Hardt, Recht & Singer 2016.
    """

    name = "leave_one_out"
    KEYS: ClassVar = {
        "leave_one_out_parameters": Key(
            "Displacement of the parameters when a sample is removed, mean over the samples.",
            "parameter",
            "If it grows with the window, training amplifies the influence of one sample: lower the learning rate.",
        ),
        "leave_one_out_parameters_max": Key(
            "The largest over the samples, a lower bound of uniform stability.", "parameter"
        ),
        "leave_one_out_loss": Key(
            "Rise of the removed sample's own loss, mean over the samples.",
            "loss",
            "Far above the loss itself, single samples are memorised: more data, weight decay or a shorter run.",
        ),
        "leave_one_out_loss_max": Key("Largest absolute change over the samples.", "loss"),
        "leave_one_out_next_loss": Key("Largest absolute change of the next batch's loss.", "loss"),
        "leave_one_out_parameters_error": standard_error("leave_one_out_parameters", "parameter", optional=True),
        "leave_one_out_loss_error": standard_error("leave_one_out_loss", "loss", optional=True),
    }
    prepare = 1
    needs_update = True

    def __init__(self, samples: int = 4, window: int = 20, *, full_batch: bool = False, method: Method = "auto"):
        super().__init__()
        whole("samples", samples, 1), whole("window", window, 1)
        self.samples, self.window, self.full_batch = samples, window, full_batch
        self.method: Method = choice("method", method, *get_args(Method))
        self._frame: dict[str, Any] = {}
        self._path = ""

    def check(self, snapshot: Snapshot) -> None:
        tangent_path(snapshot)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        contributions = 3 + self.samples * 2 / 3
        shares = (1 + self.full_batch * (self.window - 1) + 1) * contributions
        pushes = 1 / 3 + products(snapshot, resolved(snapshot, self.method), self.samples, tangent=True)
        return {"gradient": 1.0, "shares": shares, "leave one out": self.window * pushes}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        blocks = 1 + (len(state_blocks(snapshot)) if tangent_path(snapshot) == "exact" else 2)
        return product_memory(snapshot, self.method, self.samples * (3 * blocks + 2))

    def path(self, snapshot: Snapshot) -> str:
        return self._path or label("exact", snapshot)

    def update(self, snapshot: Snapshot) -> None:
        """Remove samples, push the responses through one more step, or read them; a gap in the steps starts again."""
        self.complete = False
        frame = self._frame
        if not frame or not snapshot.follows(frame["step"]):
            self._frame = self._begin(snapshot)
            return
        if frame["count"] == self.window:
            values = self._read(snapshot, frame)
            self._frame = {}
            self.finish(values)
            return
        forced = self._forced(snapshot, self._again(snapshot, frame["shares"])) if self.full_batch else None
        jacobian = update_jacobian(snapshot, method=frame["method"])
        state = responded(frame["state"], jacobian, forced)
        by_differences = ", finite difference of step" if tangent_path(snapshot) != "exact" else ""
        self._path = path_taken(snapshot, frame["method"]) + by_differences
        self._frame = frame | {"state": state, "count": frame["count"] + 1, "step": snapshot.step}

    def _begin(self, snapshot: Snapshot) -> dict[str, Any]:
        tangent_path(snapshot)
        verify_gradient(snapshot)
        method = decided(snapshot, self.method)
        contributions = self._shares(snapshot)
        # The batch is needed again at the end, other results of the step are not.
        first = without_step_values(snapshot)
        return {
            "state": self._forced(snapshot, contributions), "shares": contributions, "first": first, "count": 1,
            "step": snapshot.step, "method": method,
        }  # fmt: skip

    def _shares(self, snapshot: Snapshot) -> SampleContributions:
        def of_first_rank() -> SampleContributions:
            parts = sample_contributions(snapshot, self.samples)
            return replace(parts, gradients=parts.gradients.cpu(), inputs=parts.inputs.cpu())

        verify(snapshot)  # on all ranks
        return snapshot.run.ranks.first(of_first_rank, "the shares")

    def _forced(self, snapshot: Snapshot, parts: SampleContributions) -> Tensor:
        """Return the response to the samples' parts of the loss of all ranks, which is the mean of their losses."""
        response = update_response(snapshot)
        return -push(response, parts.gradients.to(response.device) / snapshot.run.ranks.world)

    def _again(self, snapshot: Snapshot, before: SampleContributions) -> SampleContributions:
        now = self._shares(snapshot)
        if not torch.equal(now.inputs, before.inputs):
            raise Unmeasurable(
                "full_batch=True, but the inputs of the batch's first samples are not those of the step before: "
                "train on the same batch without shuffling or augmentation, or give full_batch=False"
            )
        return now

    def _read(self, snapshot: Snapshot, frame: dict[str, Any]) -> dict[str, Tensor]:
        parts = self._shares(frame["first"])
        gradient = snapshot.flat_gradient
        if gradient is None:
            _, gradient = replayed_gradient(snapshot)
        moved = frame["state"][:, : len(gradient)].cpu()
        if not bool(torch.isfinite(moved).all()):
            raise Unmeasurable("the response is not finite: the weights or the loss have overflowed")
        numbers = leave_one_out(moved, parts.batch * parts.gradients)
        following = (moved.double() @ gradient.double().cpu()).abs().max()
        return {
            "leave_one_out_parameters": numbers.parameters,
            "leave_one_out_parameters_max": numbers.parameters_max,
            "leave_one_out_loss": numbers.loss,
            "leave_one_out_loss_max": numbers.loss_max,
            "leave_one_out_next_loss": following,
            "leave_one_out_parameters_error": numbers.parameters_error,
            "leave_one_out_loss_error": numbers.loss_error,
        }

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        """Start the window again: one under way holds a batch, and is not saved."""
        self._frame = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_frame": {}}
