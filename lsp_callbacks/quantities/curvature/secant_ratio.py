"""The secant-against-Hessian test along the step that training takes."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.secant import Secant, secant
from lsp_callbacks.operators.cost import beside, forward_cost, products
from lsp_callbacks.operators.curvature.hessian import Method, hessian, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.trajectory.proximal import flat_parameters, update
from lsp_callbacks.operators.trajectory.step_jacobian import tangent_path
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.step.flat import displaced
from lsp_callbacks.step.replay_checks import replayed_gradient, verify
from lsp_callbacks.step.snapshot import Snapshot

#: Of the secant or the curvature, the most that its error may be.
CLEAR = 0.5


class SecantRatio(Quantity):
    """Whether the curvature at the weights says what the gradient does along the step that is about to be taken.

    ``secant_ratio = ||g(theta + d) - g(theta)|| / ||H d||`` with d the whole update (prox included), and both gradients
    of the step's own batch with the same random masks. About 1: the Hessian can be trusted at this rate. Far above 1,
    with ``secant_unexplained`` near 1: the gradient jumps on the way (kinks of ReLU, max-pooling), or curvature comes
    up within one step; ``sharpness`` and the Courant numbers then understate what the step meets, and a learning rate
    derived from them is too large: judge it by the loss, or lower it until the ratio is near 1.

    Args:
        method: of the Hessian product.

    Keys: ``stability/secant`` (units of loss / parameter^2), ``stability/secant_curvature``,
    ``stability/secant_unexplained``, ``stability/secant_error`` (of the secant, by rounding);
    ``stability/secant_ratio``, absent where the curvature is 0, as on ``|theta|``: look at ``secant_unexplained``.

    Cost: one gradient, two Hessian products, and an optimizer step on a copy: 4 gradients, or 6 with kinks.

    Source: Katende, arXiv 2512.22055; MATH section 7.
    """

    name = "secant_ratio"
    keys = (
        "stability/secant",
        "stability/secant_curvature",
        "stability/secant_unexplained",
        "stability/secant_error",
    )
    optional = ("stability/secant_ratio",)
    needs_update = True
    numbers: Tensor

    def __init__(self, method: Method = "auto"):
        super().__init__()
        self.method: Method = choice("method", method, *get_args(Method))
        self.add_state("numbers", default=torch.full((5,), math.nan, dtype=torch.float64), persistent=True)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        # A gradient, and an optimizer step on copies in double precision.
        own = 1 + beside(snapshot, calls=150, vectors=40)
        product = products(snapshot, resolved(snapshot, self.method), 2)
        return {"forward": forward_cost(snapshot), "secant": own + product}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        return product_memory(snapshot, self.method, 6)

    def check(self, snapshot: Snapshot) -> None:
        tangent_path(snapshot)

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        tangent_path(snapshot)
        found = measured_secant(snapshot, method=self.method)
        ratio = math.nan if found.ratio is None else found.ratio
        numbers = (found.secant, found.curvature, found.unexplained, found.error, ratio)
        self.numbers, self.complete = torch.stack([scalar(one) for one in numbers]), True

    def compute(self) -> dict[str, Tensor]:
        """The last measurement."""
        values = dict(zip((*self.keys, *self.optional), map(scalar, self.numbers)))
        if bool(self.numbers[-1].isnan()):
            del values["stability/secant_ratio"]
        return values


def measured_secant(snapshot: Snapshot, *, method: Method = "auto") -> Secant:
    """The `Secant` of the step that the optimizer is about to take.

    Raises:
        Unmeasurable: a step that moves nothing, that is not modelled, or whose change of the gradient is lost in
            rounding.
    """
    H = hessian(snapshot, method=method)
    verify(snapshot)
    step = update(snapshot)
    if not bool(step.any()):
        raise Unmeasurable("the step moves no parameter: there is no direction to measure along")
    own = snapshot.flat_gradient
    before = own if own is not None else replayed_gradient(snapshot)[1]
    theta = flat_parameters(snapshot)
    with displaced(list(snapshot.parameters.values()), step, 1.0):
        taken = flat_parameters(snapshot) - theta  # rounded, as the weights are
        _, after = replayed_gradient(snapshot)
    if not bool(taken.any()):
        raise Unmeasurable("the step is lost in the rounding of the parameters: see update_lost of Numerics")
    found = secant(before, after, taken, H, theta=theta)
    if not all(bool(number.isfinite()) for number in (found.secant, found.curvature, found.error)):
        raise Unmeasurable("the gradients or their change leave the range of the parameters' numbers")
    seen = torch.maximum(found.secant, found.curvature)  # both 0: the gradient is constant, and says so
    if bool(seen > 0) and not bool(found.error <= CLEAR * seen):
        raise Unmeasurable(
            f"the gradient changes so little along this step that rounding hides it: a secant of {found.secant:.3g} "
            f"with an error of {found.error:.3g}; look again at a larger rate, or in float64"
        )
    return found
