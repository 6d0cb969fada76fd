"""The largest eigenvalue of a Hessian, followed from one measured step to the next by two products or a few more."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, TopNode, norm, top_node
from lsp_callbacks.operators.curvature.hessian import products_so_far
from lsp_callbacks.operators.curvature.top_eigenvalue import Top, accuracy_of
from lsp_callbacks.step.snapshot import Snapshot

#: Products: with an earlier vector, without one, and at most. So many parameters are measured to the end.
WARM, COLD, MOST, FEW = 2, 4, 4, 12
#: Norm of the noise in a start, in units of that of the earlier vector, or of the gradient.
NOISE = 0.1
#: The error bar: multiples of the gain, of what is hidden behind an overlap, of the turn and of the fall, and a least
#: number. Chosen, as the next is, on seeds of ``benchmarks/sharpness_error_bars.py`` that no table is of.
GAIN, HIDDEN, OVERLAP, TURN, FALL, LEAST = 1.5, 0.33, 0.05, 0.1, 0.5, 0.02
#: Error bar from which on a further product is taken.
WIDE = 0.65
#: How many earlier values are compared.
RECENT = 3
#: Random numbers that are repeated, with random signs, to form noise.
_BLOCK = 4093


def followed_top(operator: LinearOperator, snapshot: Snapshot, start: Tensor | None, recent: Sequence[float]) -> Top:
    """Return an estimate of the largest eigenvalue of a step's operator, and of the error bar that holds for it.

    Two products from a start of the earlier vector, as much of the step's gradient (which leans towards sharp
    directions, Gur-Ari et al. 2018) and a little noise; `lsp_callbacks.linalg.top_node` makes of them as much as there
    is. The next start is its vector, which holds a third direction that cost no product: a power iteration that goes on
    from step to step and also finds modes that have newly become sharp.

    The error bar is an estimate, too: ``1.5 gain + 33 % of hidden + 10 % of turn + 50 % of fall + 2 %``. Gain is by how
    much the rule exceeds the Ritz value, relatively. Hidden is how far above the value an eigenvalue may be whose
    eigenvector has an overlap of 5 % with the start (`lsp_callbacks.linalg.TopNode`). Turn is how far the quotient of
    the start lies below the value, relatively: another mode than the earlier one has become the sharpest, and there may
    be a third. Fall is the logarithm of how far the value lies below the highest of the last three: from one mini-batch
    to the next sharpness often halves or doubles, and a low reading may also have missed the mode that is still there.
    While the bar exceeds 65 %, a third and a fourth product are taken.

    The form follows from what can go wrong; its numbers were chosen such that it holds along ten runs, see
    ``benchmarks/sharpness_error_bars.md``. Nothing follows for a single step: a bound that does is that of
    `top_eigenvalue`, at three times the cost.

    Args:
        operator: symmetric: the Hessian of the step's loss, or that behind a preconditioner.
        snapshot: the step.
        start: the vector of an earlier step. Without one, or where it does not fit, there are four products.
        recent: values of the last steps.

    Cost: see `products_taken`.
    """
    n = operator.shape[1]
    fits = start is not None and len(start) == n and bool(norm(start).isfinite())
    start = start if fits else None
    steps = n if n <= FEW else WARM if fits else COLD

    early: list[Tensor] = []  # values of fewer products are lower: only those of as many are told to the next step

    def enough(node: TopNode) -> bool:
        early.append(node.value)
        return node.products >= steps and _bar(node, recent) <= WIDE

    products = products_so_far(snapshot)
    before = products.taken
    node = top_node(
        operator, _mixed(snapshot, operator, start), steps=min(WARM, n), most=max(steps, MOST), enough=enough
    )
    first = early[0] if early else node.value
    accuracy = accuracy_of(snapshot, operator.dtype, products.taken > before) * node.scale
    error = accuracy
    if not node.complete:
        error = torch.maximum(accuracy, _bar(node, recent) * node.value.abs())
    return Top(node.value, node.vector, error, accuracy, error + node.value - node.least, node.products, first)


def products_taken(n: int, warm: bool) -> int:
    """Return how many products `followed_top` takes on n parameters, where the error bar is not wide."""
    return n if n <= FEW else WARM if warm else COLD


def _bar(node: TopNode, recent: Sequence[float]) -> float:
    """Return the relative error bar of an estimate."""
    size = node.value.abs().clamp_min(torch.finfo(torch.float64).tiny)
    turn = (node.value - node.recurrence[0, 0]).clamp_min(0.0)
    beside = (HIDDEN * node.hidden(OVERLAP) + TURN * turn) / size
    return float(GAIN * node.gain + beside + FALL * _fall(node.value, recent) + LEAST)


def _fall(value: Tensor, recent: Sequence[float]) -> float:
    """Return the logarithm of how far an estimate lies below the highest of the last values; 0 if it does not."""
    highest = max(recent[-RECENT:], default=0.0)
    if not (highest > 0 and float(value) > 0):
        return 0.0
    return max(0.0, math.log(highest / float(value)))


def _mixed(snapshot: Snapshot, operator: LinearOperator, start: Tensor | None) -> Tensor:
    """Return a start of earlier vector, gradient and noise."""
    mixed = _noise(snapshot, operator)
    gradient = snapshot.flat_gradient
    size = float(norm(gradient)) if gradient is not None else 0.0
    if gradient is not None and 0 < size < math.inf:
        gradient = gradient.to(mixed)
        mixed.add_(gradient, alpha=1 / size)
        if start is not None and float(torch.dot(gradient, start.to(mixed))) < 0:
            return mixed.sub_(start.to(mixed))
    return mixed if start is None else mixed.add_(start.to(mixed))


def _noise(snapshot: Snapshot, operator: LinearOperator) -> Tensor:
    """Return a random vector: a block of Gaussian numbers again and again, each time with a random sign.

    Its overlap with a unit vector has mean 0 and variance ``1 / n``, as that of n independent numbers has, which take
    longer than a product on some processors.
    """
    n = operator.shape[1]
    generator = snapshot.generator("lanczos")
    block = torch.randn(min(n, _BLOCK), generator=generator, dtype=operator.dtype)
    signs = torch.randint(0, 2, (-(-n // len(block)), 1), generator=generator) * 2 - 1
    noise = (signs.to(block) * block).reshape(-1)[:n].to(operator.device)
    return noise.mul_(NOISE / n**0.5)
