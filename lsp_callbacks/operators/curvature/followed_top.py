"""The largest eigenvalue of a Hessian, followed from one measured step to the next by two products or a few more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsp_callbacks.linalg import Images, LinearOperator, TopNode
from lsp_callbacks.operators.curvature.hessian import products_so_far
from lsp_callbacks.operators.curvature.top_eigenvalue import Top, accuracy_of, bounded_top, gradient_behind
from lsp_callbacks.step.snapshot import Snapshot

#: Products of one metric with an earlier vector, without one, and at most; each further metric takes one more (two
#: without an earlier vector, and at most). So many parameters are measured to the end.
WARM, COLD, MOST, FEW = 2, 3, 4, 12
#: Products that readings take in the mean, with an earlier vector and without, of one metric and of two:
#: ``benchmarks/sharpness_error_bars.py``.
USUAL = {1: (2.5, 3.1), 2: (3.4, 5.5)}
#: Norm of the noise in a start, in units of that of the earlier vector, or of the gradient.
NOISE = 0.1
#: Weight of the earlier vectors in what is carried on to the next step, beside one vector, where they agree with it.
CARRIED = 4.0
#: How much of the gain the value is raised by, after the first products and each further one, of a gain of at most so
#: much.
RAISED, MOST_GAIN = (0.5, 0.25, 0.25), 0.3
#: The error bar: a least number, and multiples of what is hidden behind an overlap; multiples of the gain, of the fall
#: and of what has turned, after the first products and each further one. ``UNKNOWN`` is there without an earlier
#: vector. Chosen on seeds 0 and 1 of
#: ``benchmarks/sharpness_error_bars.py``.
LEAST, HIDDEN, OVERLAP = 0.06, 0.85, 0.15
UNKNOWN = 0.25
GAIN, FALL, TURNED = (0.2, 0.9, 0.6), (0.4, 0.4, 0.1), (0.2, 0.0, 0.0)
#: Error bar from which on a further product is taken.
WIDE = 0.55
#: How many earlier values are compared.
RECENT = 3
#: Random numbers that are repeated, with random signs, to form noise.
_BLOCK = 4093
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Earlier:
    """What earlier steps have shown of the top of ``R^1/2 H R^1/2``.

    Attributes:
        vector: that was carried on; without one, or where it does not fit, there is more to be hidden.
        values: of the last steps.
        root: ``R^1/2`` above 0, where the products are those of H; None where they are the operator's own.
    """

    vector: Tensor | None
    values: Sequence[float]
    root: Tensor | None = None


def followed_top(
    operator: LinearOperator,
    snapshot: Snapshot,
    start: Tensor | None,
    recent: Sequence[float],
    root: Tensor | float = 1.0,
) -> Top:
    """Return an estimate of the largest eigenvalue of one operator, see `followed_tops`.

    With at most 12 parameters it is measured to the end.

    Args:
        operator: symmetric: the Hessian of the step's loss, or that behind a preconditioner.
        snapshot: the step.
        start: the vector that an earlier step has carried on.
        recent: values of the last steps.
        root: ``R^1/2`` of an operator ``R^1/2 H R^1/2``, see `gradient_behind`.

    Cost: see `products_taken`.
    """
    if operator.shape[1] <= FEW:
        exact = bounded_top(operator, snapshot, start, steps=operator.shape[1], tol=0.0, root=root)
        return replace(exact, error=exact.accuracy, beyond=exact.accuracy)
    return followed_tops(operator, snapshot, [Earlier(start, recent)], gradient_behind(snapshot, root))[0]


def followed_tops(
    operator: LinearOperator, snapshot: Snapshot, metrics: Sequence[Earlier], gradient: Tensor | None
) -> list[Top]:
    """Return estimates of the largest eigenvalues of a step's operator in several metrics, with error bars that hold.

    The first product is that of a start of the earlier vectors, as much of the step's gradient (which leans towards
    sharp directions, Gur-Ari et al. 2018) and a little noise. Each further one is that of what is new in the vector of
    the estimate in one of the metrics; all products tell of all metrics, see `lsp_callbacks.linalg.Images`. The vector
    of an estimate holds a direction that cost no product: a power iteration that goes on from step to step and also
    finds modes that have newly become sharp. What is carried on is a running mean of such vectors: single batches turn
    them.

    Such a value is low rather than high: it is raised by half of the gain, which is by how much the rule exceeds the
    Ritz value, relatively. The error bar is an estimate, too: a least number, and multiples of hidden, gain, fall and
    turned. Hidden is how far above the value an eigenvalue may be whose eigenvector overlaps by 15 % with the start
    (`lsp_callbacks.linalg.TopNode`). Fall is the logarithm of how far the value lies below the highest of the last
    three: from one mini-batch to the next sharpness often halves or doubles, and a low reading may also have missed the
    mode that is still there. Turned is 1 less the overlap of the vector with the earlier ones: another mode has become
    the sharpest, and there may be a third. While a bar exceeds `WIDE`, a further product is taken in its metric, which
    leaves less to be hidden. Without an earlier vector there is one more for each metric.

    The form follows from what can go wrong; its numbers were chosen such that it holds along ten runs, see
    ``benchmarks/sharpness_error_bars.md``. The least number is for what no product tells of: the mini-batch has a mode
    that is half as sharp again, and that neither the gradient nor the earlier vector knows. Nothing follows for a
    single step: a bound that does is that of `top_eigenvalue`, at three times the cost.

    Args:
        operator: symmetric, of more than 12 parameters.
        snapshot: the step.
        metrics: what is known of each.
        gradient: in the coordinates of the operator.

    Cost: see `products_taken`.
    """
    products, generator = products_so_far(snapshot), snapshot.generator("lanczos")
    before, lengths = products.taken, [_length(operator, metric.vector) for metric in metrics]
    images = Images(operator, [None if metric.root is None else metric.root.square() for metric in metrics])
    direction: Tensor | None = _mixed(operator, metrics, lengths, gradient, generator)
    estimates = [_Estimate(images, k, *pair) for k, pair in enumerate(zip(metrics, lengths))]
    steps = len(estimates) + (WARM if all(lengths) else COLD) - 1 + (len(estimates) > 1 and not all(lengths))
    taken, most = 0, MOST + 2 * (len(estimates) - 1)
    for taken in range(1, most + 1):
        assert direction is not None
        images.add(direction)
        # Before all have had their turn, one is looked at.
        for estimate in estimates if taken >= steps else [min(estimates, key=_Estimate.turn)]:
            estimate.judge(steps)
        open_ones = [estimate for estimate in estimates if not estimate.is_complete]
        if taken >= steps:
            open_ones = [estimate for estimate in open_ones if estimate.bar > WIDE]
        # First each in its turn; then the one that is known worst.
        while open_ones:
            nearest = max(open_ones, key=lambda e: (e.bar, 0) if taken >= steps else tuple(-x for x in e.turn()))
            if (direction := nearest.next()) is not None:
                break
            open_ones.remove(nearest)
        if not open_ones or not math.isfinite(nearest.node.value):
            break
    for estimate in estimates:
        if estimate.node is None or estimate.node.products < taken:
            estimate.judge(steps)
    products.end_run()
    accuracy = accuracy_of(snapshot, operator.dtype, products.taken > before)
    return [estimate.top(accuracy, taken) for estimate in estimates]


class _Estimate:
    """What the products so far say of one metric."""

    def __init__(self, images: Images, metric: int, earlier: Earlier, length: float):
        self.images, self.metric, self.earlier, self.length = images, metric, earlier, length
        self.node: TopNode = None  # type: ignore[assignment]
        self._vector: Tensor | None = None
        self.bar, self.early, self.turns, self.further, self.is_complete = math.inf, math.nan, 0, 0, False

    def turn(self) -> tuple[int, int]:
        """Return what is least for the one whose turn it is: each in its turn, the last one first."""
        return self.turns, -self.metric

    def judge(self, steps: int) -> None:
        """Look at the products after one more; ``steps`` come in any case."""
        self.node = node = self.images.top(self.metric)
        if node.products <= steps:
            self.early = node.value  # values of fewer products are lower: those of as many are told to the next step
        self._vector = None
        if node.products >= steps:
            self.further = min(node.products - steps, len(RAISED) - 1)
            self.bar = error_bar(node, _fall(node.value, self.earlier.values), self._turned(), self.further)

    def _turned(self) -> float | None:
        """Return 1 less the overlap of the vector with the earlier ones; None without any."""
        if not self.length or not math.isfinite(self.node.value):
            return None
        if not TURNED[self.further]:
            return 0.0
        start = self.earlier.vector
        assert start is not None
        return 1.0 - min(1.0, abs(float(self.images.operator.dots([self.vector], start.to(self.vector)))) / self.length)

    @property
    def vector(self) -> Tensor:
        """The unit vector of the estimate."""
        if self._vector is None:
            self._vector = self.images.vector(self.node, self.metric)
        return self._vector

    def next(self) -> Tensor | None:
        """Return the direction whose product tells most; None if none tells more."""
        self.turns += 1
        direction = self.images.next(self.node, self.metric)
        self.is_complete = direction is None
        return direction

    def top(self, relative: float, products: int) -> Top:
        """Return the estimate, with the relative accuracy of products."""
        node, vector = self.node, self.vector
        value = node.value * (1 + RAISED[self.further] * min(node.gain, MOST_GAIN))
        accuracy = relative * node.scale
        error = accuracy if self.is_complete else max(accuracy, self.bar * abs(value))
        numbers = (value, error, accuracy, error + value - node.least, node.value if self.is_complete else self.early)
        raised, bar, rounding, beyond, early = torch.tensor(numbers, dtype=torch.float64).unbind()
        return Top(raised, vector, bar, rounding, beyond, products, early, self._carried(vector))

    def _carried(self, vector: Tensor) -> Tensor:
        """Return a running mean of the vectors, of which little is left where this one is another."""
        start = self.earlier.vector
        if not self.length or start is None:
            return vector
        start = start.to(vector)
        overlap = float(self.images.operator.dots([vector], start)) / self.length
        return torch.add(vector, start, alpha=CARRIED * overlap * abs(overlap) / self.length)


def error_bar(node: TopNode, fall: float, turned: float | None, further: int) -> float:
    """Return the relative error bar of an estimate.

    Args:
        node: the estimate.
        fall: logarithm of how far it lies below earlier ones.
        turned: 1 less the overlap with the earlier vector; None without any.
        further: products beyond those that come in any case.
    """
    hidden = HIDDEN * node.hidden(OVERLAP) / max(abs(node.value), _TINY)
    new = UNKNOWN if turned is None else TURNED[further] * turned
    return LEAST + hidden + GAIN[further] * node.gain + FALL[further] * fall + new


def products_taken(n: int, warm: bool, metrics: int = 1) -> float:
    """Return how many products `followed_tops` usually takes on n parameters."""
    return n * metrics if n <= FEW else USUAL[metrics][not warm]


def _fall(value: float, recent: Sequence[float]) -> float:
    """Return the logarithm of how far an estimate lies below the highest of the last values; 0 if it does not."""
    highest = max(recent[-RECENT:], default=0.0)
    return max(0.0, math.log(highest / value)) if highest > 0 and value > 0 else 0.0


def _length(operator: LinearOperator, start: Tensor | None) -> float:
    """Return the norm of an earlier vector; 0 where it does not fit."""
    held = operator.shape[1] if operator.parts is None else operator.parts.size
    length = float(operator.norm(start)) if start is not None and len(start) == held else 0.0
    return length if length < math.inf else 0.0


def _mixed(
    operator: LinearOperator,
    metrics: Sequence[Earlier],
    lengths: Sequence[float],
    gradient: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Return a start of earlier vectors, gradient and noise, as much of each metric; a unit vector."""
    total = _noise(operator, generator)
    for metric, length in zip(metrics, lengths):
        root, start = metric.root, metric.vector if length else None
        behind = gradient if gradient is None or root is None else root * gradient
        size, sign = float(operator.norm(behind)) if behind is not None else 0.0, 1
        mixed = total if root is None else torch.zeros_like(total)
        if behind is not None and 0 < size < math.inf:
            mixed.add_(behind.to(mixed), alpha=1 / size)
            sign = -1 if start is not None and float(operator.dots([behind.to(start)], start)) < 0 else 1
        if start is not None:
            mixed.add_(start.to(mixed), alpha=sign / length)
        if root is not None:
            mixed.mul_(root)
            length = float(operator.norm(mixed))
            if 0 < length < math.inf:
                total.add_(mixed, alpha=float(operator.norm(total)) / length)
    return total.div_(operator.norm(total).to(total.dtype))


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
