"""Test of the Hessian against the gradient's real change along the step that training takes."""

from __future__ import annotations

import math
from typing import ClassVar, get_args

import torch

from lsp_callbacks._validation import choice
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.secant import Secant, secant
from lsp_callbacks.operators.cost import beside, forward_cost, products
from lsp_callbacks.operators.curvature.hessian import Method, hessian, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.trajectory.proximal import flat_parameters, update
from lsp_callbacks.operators.trajectory.step_jacobian import tangent_path
from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.quantities.key import CURVATURE, Key
from lsp_callbacks.step.flat import displaced
from lsp_callbacks.step.replay_checks import replayed_gradient, verify
from lsp_callbacks.step.snapshot import Snapshot

#: The largest error that is accepted, as a share of the secant or the curvature.
CLEAR = 0.5


class SecantRatio(Quantity):
    """Ratio of the gradient's real change along the coming step to the change that the Hessian predicts.

    ``secant_ratio = ||g(theta + d) - g(theta)|| / ||H d||`` with d the whole update (prox included), and both gradients
    of the step's own batch with the same random masks. About 1: the Hessian can be trusted at this rate. Far above 1,
    with ``secant_unexplained`` near 1: the gradient jumps on the way (kinks of ReLU, max-pooling), or the curvature
    grows within one step; ``sharpness`` and the Courant numbers then understate the curvature along the step, and a
    learning rate derived from them is too large.

    Args:
        method: of the Hessian product.

    Cost: one gradient, two Hessian products, and an optimizer step on a copy: 4 gradients, or 6 with kinks.

    Source: Katende 2025b; docs/theory.md, section The law of SGD, energies, kinks.
    """

    name = "secant_ratio"
    KEYS: ClassVar = {
        "secant": Key("Change of the gradient along the step, divided by the step's length.", CURVATURE),
        "secant_curvature": Key("Change of the gradient that the Hessian predicts, divided likewise.", CURVATURE),
        "secant_unexplained": Key(
            "Share of the gradient's change that the Hessian does not predict.",
            "",
            "Near 1 the gradient jumps along the step (kinks): judge the rate by the loss, not by curvature.",
        ),
        "secant_error": Key("Error of secant by rounding.", CURVATURE, error_of="secant"),
        "secant_ratio": Key(
            "Gradient's change along the step by that which the Hessian predicts; near 1 the Hessian can be trusted. "
            "Absent where the curvature is 0.",
            "",
            "Far above 1, sharpness and Courant numbers are too small: lower the rate until it is near 1.",
            optional=True,
        ),
    }
    needs_update = True

    def __init__(self, method: Method = "auto"):
        super().__init__()
        self.method: Method = choice("method", method, *get_args(Method))

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        # A gradient, and an optimizer step on copies in double precision.
        step = 1 + beside(snapshot, calls=150, vectors=40)
        product = products(snapshot, resolved(snapshot, self.method), 2)
        return {"forward": forward_cost(snapshot), "secant": step + product}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        return product_memory(snapshot, self.method, 6)

    def check(self, snapshot: Snapshot) -> None:
        tangent_path(snapshot)

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step."""
        self.complete = False
        tangent_path(snapshot)
        result = measured_secant(snapshot, method=self.method)
        self.finish({
            "secant": result.secant,
            "secant_curvature": result.curvature,
            "secant_unexplained": result.unexplained,
            "secant_error": result.error,
            "secant_ratio": math.nan if result.ratio is None else result.ratio,
        })  # fmt: skip


def measured_secant(snapshot: Snapshot, *, method: Method = "auto") -> Secant:
    """Return the `Secant` of the step that the optimizer is about to take.

    Raises:
        Unmeasurable: for a step that moves nothing, that is not supported, or whose change of the gradient is lost in
            rounding.
    """
    H = hessian(snapshot, method=method)
    verify(snapshot)
    step = update(snapshot)
    if not bool(step.any()):
        raise Unmeasurable("the step moves no parameter: there is no direction to measure along")
    before = snapshot.flat_gradient
    if before is None:
        before = replayed_gradient(snapshot)[1]
    theta = flat_parameters(snapshot)
    with displaced(list(snapshot.parameters.values()), step, 1.0):
        taken = flat_parameters(snapshot) - theta  # rounded, as the weights are
        _, after = replayed_gradient(snapshot)
    if not bool(taken.any()):
        raise Unmeasurable("the step is lost in the rounding of the parameters: see update_lost of Numerics")
    result = secant(before, after, taken, H, theta=theta)
    if not all(bool(number.isfinite()) for number in (result.secant, result.curvature, result.error)):
        raise Unmeasurable("the gradients or their change overflow the number type of the parameters")
    size = torch.maximum(result.secant, result.curvature)  # both are 0 where the gradient is constant
    if bool(size > 0) and not bool(result.error <= CLEAR * size):
        raise Unmeasurable(
            f"the gradient changes so little along this step that rounding hides it: a secant of {result.secant:.3g} "
            f"with an error of {result.error:.3g}; measure at a larger rate, or in float64"
        )
    return result
