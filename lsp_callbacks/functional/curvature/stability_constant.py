"""The edge of stability of an optimizer, in units of one over the learning rate."""

from __future__ import annotations

from lsp_callbacks.errors import Unmeasurable


def stability_constant(
    momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False, *, direct: float = 0.0
) -> float:
    """Return c, where full-batch steps are linearly stable while ``lr * lambda < c``.

    Plain gradient descent has 2; heavy ball ``2 + 2 beta``; Nesterov ``(2 + 2 beta) / (1 + 2 beta)``; dampening tau
    ``(2 + 2 beta) / (1 - tau)``. With ``m+ = beta m + (1 - tau) g`` and a step ``m+ + a g``, as that of NAdam (a is
    ``direct``), it is ``(2 + 2 beta) / (1 - tau + a (1 + beta))``. Source: Cohen et al. 2021, appendix B;
    docs/theory.md, section Edges of stability.

    Example:
        >>> from lsp_callbacks.functional import stability_constant
        >>> stability_constant(), stability_constant(0.9), stability_constant(0.9, dampening=0.9)
        (2.0, 3.8, 38.0...)
    """
    if not momentum:
        return 2.0 / (1 + direct)
    if nesterov:
        return (2 + 2 * momentum) / (1 + 2 * momentum)
    if dampening >= 1 and not direct:
        raise Unmeasurable(f"dampening={dampening} never lets a gradient in: there is no edge")
    return (2 + 2 * momentum) / (1 - dampening + direct * (1 + momentum))
