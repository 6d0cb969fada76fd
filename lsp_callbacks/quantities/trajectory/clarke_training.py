"""Generalized sensitivity of the parameters to their start and to noise, where the training map has kinks."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

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
from lsp_callbacks.operators.trajectory.optimizer_input import clipped_gradient
from lsp_callbacks.operators.trajectory.proximal import proximal_jacobian
from lsp_callbacks.operators.trajectory.step_jacobian import step_jacobian, step_response
from lsp_callbacks.quantities.key import NATS, Key
from lsp_callbacks.quantities.trajectory.windowed import Windowed
from lsp_callbacks.step.snapshot import Snapshot


def _keys() -> dict[str, Key]:
    ends = {
        "lower": "lower bound over the slopes near kinks",
        "upper": "upper bound over them",
        "ordinary": "with the slopes as they are",
    }
    advice = (
        "Far above clarke_theta_ordinary, residuals are at the bend of the loss and stability changes with their "
        "slopes: lower the rate, or move the bend (delta) away from the typical residual."
    )
    keys = {
        f"clarke_theta_{end}": Key(f"||d theta_T / d theta_0||, {text}.", "", advice * (end == "upper"))
        for end, text in ends.items()
    }
    keys |= {
        f"clarke_u_{end}": Key(f"||d theta_T / d (u_1, ..., u_T)||, u added to each gradient, {text}.", "learning rate")
        for end, text in ends.items()
    }
    for end in ("lower", "upper"):
        keys[f"clarke_alpha_theta_{end}"] = Key(f"Growth of clarke_theta, {ends[end]}.", NATS)
    for end in ("lower", "upper"):
        keys[f"clarke_alpha_u_{end}"] = Key(f"Growth of noise beyond noise that does not travel, {ends[end]}.", NATS)
    return keys | {
        "clarke_training_near": Key("Units of loss and prox near a kink.", "units"),
        "clarke_training_exact": Key("1 where the lower bounds are the exact suprema."),
    }


class ClarkeTraining(Windowed):
    """Generalized ``sigma^theta`` and ``sigma^u`` of a window of training steps, with their exponents.

    Where the gradient is Lipschitz but bends (``huber_loss``, ``smooth_l1_loss``, ``elu``, ``celu``), or a prox does
    (`SoftThreshold`, `Box`), the training map ``theta -> prox(theta - lr grad L(theta))`` has a derivative only almost
    everywhere. Each unit within ``eps`` of a kink may have the slope of either side, and any between; the sup is over
    the product of the steps' sets, which contains Clarke's generalized Jacobian of the whole map: the upper ends bound
    his sup. It is exact, over that product, where at most ``vertices`` units are near a kink. Where none is, it is the
    ordinary norm. Momentum and Adam's moments are part of the map.

    Losses whose gradient jumps are *refused*, such as those of every network with ReLU, max-pooling or an L1 loss:
    there ``theta -> theta - lr grad L`` is not continuous, and Clarke's calculus does not apply; the forward pass is
    covered by `ClarkeProfile`.

    Args:
        horizon: T, number of steps in a window.
        eps: relative distance to a kink, above 0 and at most 1; see `lsp_callbacks.operators.curvature.gradient_kinks`.
        vertices: largest number of units near a kink whose slopes are enumerated.
        most: largest number of trained parameters, as derivatives are computed as whole matrices.

    Raises:
        ValueError: for an argument out of its range.
        Unmeasurable: for a gradient or a prox that jumps or is not supported; too many parameters; a gradient at the
            kink of its own clipping; amsgrad; half precision; several processes.

    Cost: in each step a Hessian product for each parameter (with momentum and moments nearly the same) and a backward
    pass for each unit near a kink.

    Source: Katende 2025, Defs. 6.1 and 6.2 and Sec. 6.6; Clarke 1983; docs/theory.md, section What does not hold as
    printed.
    """

    name = "clarke_training"
    KEYS: ClassVar = _keys()
    by_name_only = True

    def __init__(self, horizon: int = 8, eps: float = 1e-3, vertices: int = 12, most: int = 512):
        super().__init__("exact")
        whole("horizon", horizon, 1), whole("vertices", vertices, 0), whole("most", most, 1)
        number("eps", eps, above=0, most=1)
        self.horizon, self.eps, self.vertices, self.most = horizon, eps, vertices, most
        self.window = horizon

    def check(self, snapshot: Snapshot) -> None:
        P = sum(p.numel() for p in snapshot.parameters.values())
        if self.most < P:
            raise Unsupported(
                f"{P:,} parameters are trained, more than most={self.most}, and derivatives are computed as whole "
                "matrices: allow more, or train fewer"
            )
        if "max_exp_avg_sq" in state_blocks(snapshot):
            raise Unsupported("amsgrad takes a maximum, whose kinks are not supported: use amsgrad=False")

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        P = sum(p.numel() for p in snapshot.parameters.values())
        step = 2 * forward_cost(snapshot) + products(snapshot, "exact", P, tangent=True)
        return {"forward": forward_cost(snapshot), "whole derivatives": self.horizon * step}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        n = (1 + len(state_blocks(snapshot))) * sum(p.numel() for p in snapshot.parameters.values())
        return {**product_memory(snapshot, "exact", 4.0), "derivatives": 8.0 * n * n * (3 + 2 * self.horizon)}

    def update(self, snapshot: Snapshot) -> None:
        """Add one more step to the window."""
        self.complete = False
        self.check(snapshot)
        if not snapshot.graph.full:
            raise Unmeasurable("products in half precision are too coarse for a bound: train some steps in float32")
        self._require_no_kink_of_clipping(snapshot)
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
        if len(now.responses) < self.horizon:
            self._frame = {"steps": vars(now), "step": snapshot.step}
            return
        norms = generalized_training(now, vertices=self.vertices)
        values: dict[str, Any] = {}
        for name, norm in (("theta", norms.theta), ("u", norms.noise)):
            values |= {f"clarke_{name}_{end}": getattr(norm, end) for end in ("lower", "upper", "ordinary")}
        values["clarke_alpha_theta_lower"], values["clarke_alpha_theta_upper"] = norms.alpha_theta[:2]
        values["clarke_alpha_u_lower"], values["clarke_alpha_u_upper"] = norms.alpha_u[:2]
        values["clarke_training_near"] = norms.theta.near
        values["clarke_training_exact"] = norms.theta.exact and norms.noise.exact
        self._frame = {}
        self.finish({name: math.nan if value is None else float(value) for name, value in values.items()})

    def _require_no_kink_of_clipping(self, snapshot: Snapshot) -> None:
        """Raise `Unmeasurable` where the gradient is at the limit of its clipping, which is a kink, too."""
        if snapshot.clipping is None:
            return
        snapshot.require_optimizer()
        size = snapshot.flat_gradient if snapshot.flat_gradient is not None else clipped_gradient(snapshot)
        size = torch.linalg.vector_norm(size) if snapshot.clipping.kind == "norm" else size.abs()
        if bool(((size / snapshot.clipping.limit - 1).abs() <= self.eps).any()):
            raise Unmeasurable("the gradient is at the limit of its clipping, a kink that is not supported")
