"""The Hessian by differences of gradients, with exact products where they cannot be trusted."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature.finite_differences import Differences
from lsp_callbacks.operators.curvature.gradient_difference import Products, Untrusted


def difference_hessian(
    differences: Differences, products: Products, exact: Callable[[Tensor], Tensor] | None
) -> LinearOperator:
    """Return the Hessian by differences of gradients.

    Args:
        differences: of the step's gradients.
        products: the record of the step's products.
        exact: exact products, which take over where a difference fails its checks; None if they are wrong.
    """
    gradient = differences.centre

    def product(v: Tensor) -> Tensor:
        if products.untrusted and exact is not None:
            return exact(v)
        try:
            image = differences.product(v)
            products.note(differences)
            return image
        except Untrusted:
            if exact is not None:
                # Exact products are right at any scale; they also tell a kink from a replay that is not the step.
                products.untrusted = True
                return exact(v)
        try:
            image = differences.searched(v)
            products.note(differences)
            return image
        except Untrusted as error:
            raise Unmeasurable(
                f"the loss cannot be differentiated twice, and {error}: write the backward of your function as the "
                "derivative of its forward, in operations that can be differentiated, or leave this quantity out"
            ) from None

    return LinearOperator((len(gradient),) * 2, product, product, dtype=gradient.dtype, device=gradient.device)
