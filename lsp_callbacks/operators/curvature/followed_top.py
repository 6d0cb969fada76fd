"""The largest eigenvalue of a Hessian, followed from one measured step to the next by two products or a few more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, TopNode, top_node
from lsp_callbacks.operators.curvature.hessian import products_so_far
from lsp_callbacks.operators.curvature.top_eigenvalue import Top, accuracy_of, gradient_behind
from lsp_callbacks.step.snapshot import Snapshot

#: Products: with an earlier vector, without one, and at most. So many parameters are measured to the end.
WARM, COLD, MOST, FEW = 2, 3, 4, 12
#: Products that readings take in the mean, with an earlier vector and without: ``benchmarks/sharpness_error_bars.py``.
USUAL = (2.35, 3.1)
#: Norm of the noise in a start, in units of that of the earlier vector, or of the gradient.
NOISE = 0.1
#: How much of the gain the value is raised by, of a gain of at most so much.
RAISED, MOST_GAIN = 0.5, 0.3
#: The error bar: multiples of what is hidden behind an overlap, and a least number; multiples of the gain, of the fall
#: and of what has turned, and the part of these that is left after the first products, and each further one. Chosen on
#: seeds 0, 1, 5 and 6 of ``benchmarks/sharpness_error_bars.py``.
HIDDEN, OVERLAP, LEAST, GAIN, FALL, TURNED, LEFT = 0.36, 0.05, 0.15, 0.2, 0.66, 0.17, (1.0, 0.35, 0.16)
#: Error bar from which on a further product is taken.
WIDE = 0.8
#: How many earlier values are compared.
RECENT = 3
#: Random numbers that are repeated, with random signs, to form noise.
_BLOCK = 4093
_TINY = torch.finfo(torch.float64).tiny


def followed_top(
    operator: LinearOperator,
    snapshot: Snapshot,
    start: Tensor | None,
    recent: Sequence[float],
    root: Tensor | float = 1.0,
) -> Top:
    """Return an estimate of the largest eigenvalue of a step's operator, and of the error bar that holds for it.

    Two products from a start of the earlier vector, as much of the step's gradient (which leans towards sharp
    directions, Gur-Ari et al. 2018) and a little noise; `lsp_callbacks.linalg.top_node` makes of them as much as there
    is. The next start is its vector, which holds a third direction that cost no product: a power iteration that goes on
    from step to step and also finds modes that have newly become sharp.

    Such a value is low rather than high: it is raised by half of the gain, which is by how much the rule exceeds the
    Ritz value, relatively. The error bar is an estimate, too: ``15 % + 36 % of hidden + 20 % of gain + 66 % of fall +
    17 % of turned``. Hidden is how far above the value an eigenvalue may be whose eigenvector overlaps by 5 % with the
    start (`lsp_callbacks.linalg.TopNode`). Fall is the logarithm of how far the value lies below the highest of the
    last three: from one mini-batch to the next sharpness often halves or doubles, and a low reading may also have
    missed the mode that is still there. Turned is 1 less the overlap of the vector with the earlier one: another mode
    has become the sharpest, and there may be a third. While the bar exceeds 80 %, a third product is taken, which
    leaves less to be hidden and 35 % of the last three, and a fourth, which leaves 16 % of them. Without an earlier
    vector three products come first, and a fourth where the bar exceeds 80 % after them.

    The form follows from what can go wrong; its numbers were chosen such that it holds along ten runs, see
    ``benchmarks/sharpness_error_bars.md``. The 15 % are for what no product tells of: the mini-batch has a mode that is
    half as sharp again, and that neither the gradient nor the earlier vector knows. Nothing follows for a single step:
    a bound that does is that of `top_eigenvalue`, at three times the cost.

    Args:
        operator: symmetric: the Hessian of the step's loss, or that behind a preconditioner.
        snapshot: the step.
        start: the vector of an earlier step; without one, or where it does not fit, there is more to be hidden.
        recent: values of the last steps.
        root: ``R^1/2`` of an operator ``R^1/2 H R^1/2``, see `gradient_behind`.

    Cost: see `products_taken`.
    """
    n = operator.shape[1]
    products, generator = products_so_far(snapshot), snapshot.generator("lanczos")
    held = n if operator.parts is None else operator.parts.size
    length = float(operator.norm(start)) if start is not None and len(start) == held else 0.0
    fits = 0 < length < math.inf
    start = start.to(operator.dtype) if start is not None and fits else None
    steps = n if n <= FEW else WARM if fits else COLD

    early: list[Tensor] = []  # values of fewer products are lower: only those of as many are told to the next step
    bars: list[float] = []
    overlaps: list[float] = []  # of Lanczos' vectors with the earlier one

    def enough(node: TopNode) -> bool:
        early.append(node.value)
        turned = 1.0
        if start is not None:
            if new := node.basis[len(overlaps) :]:
                overlaps.extend(operator.dots(new, start).tolist())
            turned -= min(1.0, abs(sum(map(mul, node.weights.tolist(), overlaps))) / length)
        value, gain, hidden = float(node.value), float(node.gain), float(node.hidden(OVERLAP))
        left = LEFT[min(max(node.products - steps, 0), len(LEFT) - 1)]
        rest = GAIN * gain + FALL * _fall(value, recent) + TURNED * turned
        bars.append(LEAST + HIDDEN * hidden / max(abs(value), _TINY) + left * rest)
        return node.products >= steps and bars[-1] <= WIDE

    before = products.taken
    node = top_node(
        operator,
        _mixed(operator, start, gradient_behind(snapshot, root), generator),  # which nobody else holds
        steps=min(WARM, n),
        most=max(steps, MOST),
        enough=enough,
    )
    products.end_run()
    first = early[0] if early else node.value
    vector, gain = node.vector, node.gain.clamp_max(MOST_GAIN)
    accuracy = accuracy_of(snapshot, operator.dtype, products.taken > before) * node.scale
    value, error = node.value, accuracy
    if not node.complete:
        value = node.value * (1 + RAISED * gain)
        error = torch.maximum(accuracy, bars[-1] * value.abs())
    return Top(value, vector, error, accuracy, error + value - node.least, node.products, first)


def products_taken(n: int, warm: bool) -> float:
    """Return how many products `followed_top` usually takes on n parameters."""
    return n if n <= FEW else USUAL[not warm]


def _fall(value: float, recent: Sequence[float]) -> float:
    """Return the logarithm of how far an estimate lies below the highest of the last values; 0 if it does not."""
    highest = max(recent[-RECENT:], default=0.0)
    return max(0.0, math.log(highest / value)) if highest > 0 and value > 0 else 0.0


def _mixed(
    operator: LinearOperator, start: Tensor | None, gradient: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Return a start of earlier vector, gradient and noise."""
    mixed = _noise(operator, generator)
    size = float(operator.norm(gradient)) if gradient is not None else 0.0
    sign = 1
    if gradient is not None and 0 < size < math.inf:
        gradient = gradient.to(mixed)
        mixed.add_(gradient, alpha=1 / size)
        sign = -1 if start is not None and float(operator.dots([gradient], start)) < 0 else 1
    return mixed if start is None else mixed.add_(start, alpha=sign)


def _noise(operator: LinearOperator, generator: torch.Generator) -> Tensor:
    """Return a random vector: a block of Gaussian numbers again and again, each time with a random sign.

    Its overlap with a unit vector has mean 0 and variance ``1 / n``, as that of n independent numbers has, which take
    longer than a product on some processors.
    """
    n = operator.shape[1]
    block = torch.randn(min(n, _BLOCK), generator=generator, dtype=operator.dtype)
    signs = torch.randint(0, 2, (-(-n // len(block)), 1), generator=generator) * 2 - 1
    block *= NOISE / n**0.5

    def between(start: int, stop: int) -> Tensor:
        rows = slice(start // len(block), -(-stop // len(block)))
        return (signs[rows].to(block) * block).reshape(-1)[start - rows.start * len(block) :][: stop - start]

    noise = between(0, n) if operator.parts is None else operator.parts.part(between)
    return noise.to(operator.device)
