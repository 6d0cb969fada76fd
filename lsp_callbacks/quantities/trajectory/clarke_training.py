"""The generalized sensitivity of the parameters to their start and to noise, where the training map has kinks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks._validation import number, whole
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.functional.trajectory.clarke_training import (
    GeneralizedSteps,
    generalized_training,
    no_steps,
    one_more,
)
from lsp_callbacks.operators.cost import forward_cost, products
from lsp_callbacks.operators.curvature.gradient_kinks import loss_kinks, prox_kinks
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.trajectory.formula_tangent import state_blocks
from lsp_callbacks.operators.trajectory.optimizer_input import clipped_gradient, require_optimizer
from lsp_callbacks.operators.trajectory.proximal import proximal_jacobian
from lsp_callbacks.operators.trajectory.step_jacobian import step_jacobian, step_response
from lsp_callbacks.quantities.base import scalar
from lsp_callbacks.quantities.trajectory.lyapunov import Windowed
from lsp_callbacks.step.snapshot import Snapshot

#: Of the numbers that a state holds, in its order.
_NAMES = (
    "clarke_theta_lower", "clarke_theta_upper", "clarke_theta_ordinary", "clarke_u_lower", "clarke_u_upper",
    "clarke_u_ordinary", "clarke_alpha_theta_lower", "clarke_alpha_theta_upper", "clarke_alpha_u_lower",
    "clarke_alpha_u_upper", "clarke_training_near", "clarke_training_exact",
)  # fmt: skip


class ClarkeTraining(Windowed):
    """The generalized ``sigma^theta`` and ``sigma^u`` of a window of training steps, with their exponents.

    Where the gradient is Lipschitz but bends (``huber_loss``, ``smooth_l1_loss``, ``elu``, ``celu``), or a prox does
    (`SoftThreshold`, `Box`), the training map ``theta -> prox(theta - lr grad L(theta))`` has a derivative only almost
    everywhere. Each unit within ``eps`` of a kink may have the slope of either side, and any between; the sup is over
    the product of the steps' sets, which contains Clarke's generalized Jacobian of the whole map: the upper ends bound
    his sup. It is exact, over that product, where at most ``vertices`` units are near. Where none is, it is the
    ordinary norm. Momentum and Adam's moments are part of the map.

    *Refused* are losses whose gradient jumps, as that of every network with ReLU, max-pooling or an L1 loss does: there
    ``theta -> theta - lr grad L`` is not continuous, and Clarke's calculus does not apply; it covers the path forward
    (`ClarkeProfile`).

    ``clarke_theta_upper`` far above ``clarke_theta_ordinary``: the residuals stand at the bend of the loss, and the
    stability that is measured at their slopes of now is not that of slopes of a moment later; lower the rate, or move
    the bend (delta) away from the typical residual.

    Args:
        horizon: T, steps in a window.
        eps: relative distance to a kink, above 0 and at most 1; see `lsp_callbacks.operators.curvature.gradient_kinks`.
        vertices: near-active units that are enumerated.
        most: parameters that may be trained; derivatives are taken whole.

    Keys: ``stability/clarke_theta_lower``, ``_upper`` and ``_ordinary``: ``||d theta_T / d theta_0||``;
    ``stability/clarke_u_lower``, ``_upper`` and ``_ordinary``: ``||d theta_T / d (u_1, ..., u_T)||``, u a change of
    each step's gradient; ``stability/clarke_alpha_theta_lower`` and ``_upper``, nats a step;
    ``stability/clarke_alpha_u_lower`` and ``_upper``, growth beyond kicks that do not travel;
    ``stability/clarke_training_near``, the units near a kink; ``stability/clarke_training_exact``, 1 where the lower
    ends are the sup.

    Raises:
        ValueError: for bad arguments.
        Unmeasurable: a gradient or a prox that jumps or is not known; too many parameters; a gradient at the kink of
            its own clipping; amsgrad; half precision; several processes.

    Cost: a Hessian product for each parameter (with momentum and moments nearly the same) and a backward pass for each
    near unit, a step.

    Source: Katende, Defs. 6.1 and 6.2 and Sec. 6.6; Clarke 1983; MATH section 4 (claims 5 and 9).
    """

    name = "clarke_training"
    keys = tuple(f"stability/{name}" for name in _NAMES)
    optional = ()
    numbers: Tensor

    def __init__(self, horizon: int = 8, eps: float = 1e-3, vertices: int = 12, most: int = 512):
        super().__init__("exact")
        whole("horizon", horizon, 1), whole("vertices", vertices, 0), whole("most", most, 1)
        number("eps", eps, above=0, most=1)
        self.horizon, self.eps, self.vertices, self.most = horizon, eps, vertices, most
        self.window = horizon
        self.add_state("numbers", default=torch.full((len(_NAMES),), math.nan, dtype=torch.float64), persistent=True)

    def check(self, snapshot: Snapshot) -> None:
        P = sum(p.numel() for p in snapshot.parameters.values())
        if self.most < P:
            raise Unsupported(f"{P:,} parameters are trained, and most={self.most} derivatives are taken whole")
        if "max_exp_avg_sq" in state_blocks(snapshot):
            raise Unsupported("amsgrad takes a maximum, whose kinks are not modelled")

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        P = sum(p.numel() for p in snapshot.parameters.values())
        step = 2 * forward_cost(snapshot) + products(snapshot, "exact", P, tangent=True)
        return {"forward": forward_cost(snapshot), "whole derivatives": self.horizon * step}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        n = (1 + len(state_blocks(snapshot))) * sum(p.numel() for p in snapshot.parameters.values())
        return {**product_memory(snapshot, "exact", 4.0), "derivatives": 8.0 * n * n * (3 + 2 * self.horizon)}

    def update(self, snapshot: Snapshot) -> None:
        """Takes one more step into the window."""
        self.complete = False
        self.check(snapshot)
        if not snapshot.graph.full:
            raise Unmeasurable("products in half precision are too coarse for a bound: train some steps in float32")
        self._away_from_its_clipping(snapshot)
        loss, after = loss_kinks(snapshot, eps=self.eps), prox_kinks(snapshot, eps=self.eps)
        A = step_jacobian(snapshot, method="exact").dense().double().cpu()
        B = step_response(snapshot).dense().double().cpu()
        P = B.shape[1]
        D = torch.eye(P, dtype=torch.float64)
        if snapshot.run.prox is not None:
            D = proximal_jacobian(snapshot).dense().double().cpu()
        now = GeneralizedSteps(**self._frame["steps"]) if self._continues(snapshot) else no_steps(len(A), P)
        now = one_more(now, A, B, D, loss, after)
        if not bool(torch.isfinite(now.theta).all()):
            raise Unmeasurable("the derivative of the steps is not finite: the weights or the loss have overflowed")
        if len(now.kicks) < self.horizon:
            self._frame = {"steps": vars(now), "step": snapshot.step}
            return
        found = generalized_training(now, vertices=self.vertices)
        numbers: list[Any] = [
            *(getattr(norm, end) for norm in (found.theta, found.noise) for end in ("lower", "upper", "ordinary")),
            *found.alpha_theta[:2],
            *found.alpha_u[:2],
            found.theta.near,
            found.theta.exact and found.noise.exact,
        ]
        self.numbers = torch.tensor([math.nan if one is None else float(one) for one in numbers], dtype=torch.float64)
        self._frame, self.complete = {}, True

    def _away_from_its_clipping(self, snapshot: Snapshot) -> None:
        """Clipping bends, too, where it begins."""
        if snapshot.clipping is None:
            return
        require_optimizer(snapshot)
        size = snapshot.flat_gradient if snapshot.flat_gradient is not None else clipped_gradient(snapshot)
        size = torch.linalg.vector_norm(size) if snapshot.clipping.kind == "norm" else size.abs()
        if bool(((size / snapshot.clipping.limit - 1).abs() <= self.eps).any()):
            raise Unmeasurable("the gradient stands where its clipping begins, a kink that is not modelled")

    def compute(self) -> dict[str, Tensor]:
        """The numbers of the last window; NaN before one."""
        return dict(zip(self.keys, map(scalar, self.numbers)))
