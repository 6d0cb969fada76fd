"""Hessian products by differences of gradients: their distances, and checks of which of them can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import base, version
from lsp_callbacks.linalg import inner, norm
from lsp_callbacks.operators.curvature.gradient_difference import Difference, LastProduct, Untrusted
from lsp_callbacks.operators.curvature.parameter_lengths import lengths, sizes_of
from lsp_callbacks.step.flat import displaced_gradient, split
from lsp_callbacks.step.known_scale import Scale
from lsp_callbacks.step.snapshot import Snapshot

#: Distances relative to the displaced tensors, in square roots of the machine epsilon: the smallest, the first (before
#: the curvature is known), and the largest; and up to which they are lengthened so that the rounding of the parameters
#: need not be looked at, which takes as long as a quarter of a product.
NEAR, FIRST, FAR, CLEAR = 0.25, 3.0, 15.0, 1.0
#: The same where the loss is rounded: up to which they are lengthened so that its check can tell a third derivative
#: from rounding. Further away the third derivative itself is the larger error.
BACK = 1.5
#: Accepted error, relative to the largest ``||H u||`` seen in the step, in the same units: 1 % in float32.
TOLERANCE = 29.0
#: Accepted error of ``u^T H u``, by the trapezoidal rule, in tolerances.
ACCEPTED = 2.0
#: Accepted error where products are added to a unit vector, as in an update's Jacobian: 1e-4 in float32.
LEAST = 0.3
#: What is left from one product to the next of how far the loss was found to be rounded.
FADED = 0.9
#: Bounds on the rounding of a gradient are this many times the rounding observed on networks of several kinds.
SAFETY = 3.0
#: The least part of such a bound that is believed where rounding was seen to be less.
LEAST_PART = 1 / 30


class Differences:
    """Differences of one step's gradients, which are checked against each other and against the loss.

    *Distance.* A vector u moves tensor k by ``r_k = ||u_k|| / l_k`` of its length per unit, where ``l_k`` is the norm
    of an average row (for vectors ``max |u_k|`` over the root mean square), at least a tenth of the median: a tensor of
    (nearly) zeros has no length of its own. Distances are multiples of ``sqrt(eps) / sqrt(sum r_k^2)``: they scale with
    the parameters, so that ``theta = s phi`` changes nothing, and a tensor of another size does not affect the others.
    The multiple is 3 at first; once the curvature is known it makes rounding, see below, 0.3 % of the change (in
    float32), between 1/4 and 15, so that the third derivative contributes as little as possible; up to 1 it is no
    shorter than where the rounding of the parameters, at its worst, is nothing beside it.

    *Rounding.* The error of a gradient is ``b = eps (2 ||g|| + sqrt(2 lambda |L|))``: the second term bounds what has
    cancelled in g, ``||J^T r||^2 <= lambda ||r||^2`` for a sum of squares; both scale with the loss and the parameters.
    The parameters themselves are rounded when they are moved, which is checked where their size is large enough to
    matter. Neither covers residuals that cancel (``p - 1`` of a softmax, targets far above the network's outputs), but
    those affect the loss as well: by the trapezoidal rule ``6 |defect| / e^2`` is the error of ``u^T H u`` by the third
    derivative, by rounding, or by a kink that was crossed. Where it is too large, a second difference, twice as far,
    distinguishes the rounding of the loss from the rest.

    *Memory.* `Scale`, of earlier steps, chooses the first distance of a step; no check knows of it.

    *Weights.* Where products are multiplied by the rates of an optimizer, rounding is multiplied, too: for the bias of
    attention's keys, whose gradient is 0, Adam divides rounding by rounding. So all norms are those of the product as
    it is used, and rounding is counted in each number that is not exactly 0.

    Args:
        snapshot: a step.
        gradient: at its parameters, flat.
        weight: what products are multiplied by, one number or one for each parameter.
        relative: False where ``weight * H u`` is added to the unit vector u: then an error that is small against 1 is
            accepted.
        both: whether products are also used without the weight: then both have to be accurate.

    Cost: one gradient for each product, on the path that training took, uncompiled; one more in a step whose curvature
    is larger than the first distance can resolve, and one where the loss is not resolved.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        gradient: Tensor,
        weight: Tensor | float = 1.0,
        *,
        relative: bool = True,
        both: bool = False,
    ):
        self.snapshot, self.centre = snapshot, gradient
        self.parameters = list(snapshot.parameters.values())
        self.eps = float(torch.finfo(gradient.dtype).eps)
        size, *sizes = self._norms([gradient, *(p.detach() for p in self.parameters)])
        self.gradient, self.theta = size, math.hypot(*sizes)
        self.lengths = lengths(self._whole(), sizes)
        self.rows = [k for k, p in enumerate(self.parameters) if p.ndim <= 1]
        self.tolerance = min(TOLERANCE * self.eps**0.5, 0.01)
        #: The distance below which the rounding of the parameters, at its worst, may change a product.
        self.coarse = 0.5 * self.eps * self.theta / self.tolerance
        self.weight, self.least = weight, LEAST * self.eps**0.5 if not relative else 0.0
        self.amplified = self._norm(weight) / self._count() ** 0.5 if isinstance(weight, Tensor) else abs(weight)
        self.both, self.seen, self.used, self.loss, self.rounding = both, 0.0, 0.0, 0.0, 0.0
        self.nearest, self.referred = NEAR, False
        self.safety = self.plain_safety = SAFETY  # of products as they are used, and without the weight
        self.last: LastProduct | None = None
        self._noted: tuple[float, ...] = ()
        self.key = (None if snapshot.player is None else snapshot.player.name, self._uneven, relative, both)
        self.known = snapshot.run.known_scales.before(snapshot.step, self.key)

    def product(self, v: Tensor) -> Tensor:
        """Return ``H v``.

        Raises:
            Untrusted: where rounding may have changed it, or the loss is not smooth between the two points.
        """
        size, reach = self._extent(v)
        if size == 0:
            return torch.zeros_like(v)
        if self.snapshot.loss is None and not math.isfinite(self.gradient):
            return torch.full_like(v, math.nan)
        if self.least and reach is not None:
            hopeless = SAFETY * self.eps * self.gradient * self._amplified_where(self.centre != 0)
            if hopeless > 10 * self.least * FAR * reach:
                raise Untrusted("the optimizer's step amplifies the rounding of the gradient")
        if reach is None:
            raise Untrusted("all parameters are 0: the distance of a difference has no scale")
        difference = self._resolved(v, size, reach)
        if not self.coarse <= difference.distance and not self._moves(v, difference.distance / size):
            raise Untrusted("the displacement is lost in the rounding of the parameters")
        if not self._consistent(difference) and difference.distance < 0.5 * BACK * reach:
            self.nearest = BACK  # the loss's own rounding is larger than thought
            difference = self.difference(v, size, BACK * reach)
        if not self._consistent(difference):
            self._compare(v, size, difference)
        product = difference.change.mul_(size / difference.distance)
        self._require_symmetry(v, size, product)
        shown = (self.seen, self.used, self.loss, max(self.rounding, FADED * self.known.rounding))
        if shown != self._noted:
            self.snapshot.run.known_scales.note(self.snapshot.step, self.key, Scale(*shown))
            self._noted = shown
        return product

    def _require_symmetry(self, v: Tensor, size: float, product: Tensor) -> None:
        if self.last is not None and self.last.unchanged:
            other = self.last
            there, here = self._dots((other.v, product), (v, other.image))
            defect = abs(float(there) - float(here))
            if not defect <= self.tolerance * self.seen * size * other.size:
                raise Untrusted("two products are not symmetric: the third derivative is too large")
        # A view may be overwritten with its base.
        kept = v if base(v) is None else v.clone()
        self.last = LastProduct(kept, size, product, (version(kept), version(product)))

    def searched(self, v: Tensor) -> Tensor:
        """Return ``H v`` where exact products are impossible: from the first distance at which one twice as far agrees.

        Raises:
            Untrusted: where none does.

        Cost: two to eight gradients.
        """
        size, reach = self._extent(v)
        start = FIRST * self.eps**0.5 if reach is None else self._distance(reach)
        for factor in (1.0, 8.0, 1 / 8, 64.0):
            near, far = (self.difference(v, size, start * factor * times) for times in (1.0, 2.0))
            self.seen = max(self.seen, min(near.slope, far.slope))
            self.used = max(self.used, self.amplified * self.seen)
            if self._gap(near, far) <= 2 * self._accepted and 10 * self.bound() <= near.distance * self.seen:
                if not (self._consistent(near) or self._rounded(near, far)):
                    raise Untrusted("its gradient is not that of a smooth function")
                return near.change * (size / near.distance)
        raise Untrusted("its curvature is smaller than the rounding of its gradients")

    def reach(self, v: Tensor) -> float | None:
        """Return the distance along ``v / ||v||`` that moves the tensors by ``sqrt(eps)`` of their lengths.

        None where all parameters are 0, or v is.
        """
        return self._extent(v)[1]

    def _extent(self, v: Tensor) -> tuple[float, float | None]:
        """Return the norm of a vector, and its `reach`."""
        parts = v.split([p.numel() for p in self.parameters])
        moves = self._norms(parts)
        size = math.hypot(*moves)
        if self.lengths is None or not size:
            return size, None
        largest = dict(zip(self.rows, self._norms([parts[k] for k in self.rows] or parts[:1], math.inf)))
        moved = math.hypot(*(largest.get(k, x) / length for k, (x, length) in enumerate(zip(moves, self.lengths))))
        return size, self.eps**0.5 * size / moved

    def difference(self, v: Tensor, size: float, distance: float) -> Difference:
        """Return the difference along ``v / size``, ``size`` being the norm of v."""
        rise, loss, moved = self._moved(v, distance / size)
        change = moved.sub_(self.centre)
        of_centre, of_change = self._dots((self.centre, v), (change, v))
        slope = 2 * of_centre + of_change
        rose, loss, slope = torch.stack([t.double() for t in (rise, loss, slope)]).tolist()
        (length,) = self._norms([change])
        defect = rose - 0.5 * distance * slope / size
        self.loss = loss
        return Difference(change, distance, length / distance, defect)

    def bound(self) -> float:
        """Return a bound on the norm of a gradient's rounding."""
        return self.eps * (2 * self.gradient + (2 * self.seen * self.loss) ** 0.5)

    def _resolved(self, v: Tensor, size: float, reach: float) -> Difference:
        """Return a difference whose rounding is small."""
        before, difference = (self.seen, self.used), self._seen(v, size, self._distance(reach))
        better, near = self._distance(reach), None
        if better < difference.distance / 12 or (better > difference.distance and not self._clear(difference)):
            self.seen, self.used = before  # too far for such a curvature, or too near for such a rounding
            near = difference if 2 * difference.distance < better else None
            difference = self._seen(v, size, better)
        is_clear = self._clear(difference) or self._agree(v, size, near, difference)
        if not is_clear and not self.referred:
            # Along most directions of a large network nothing changes: what counts is the largest curvature.
            self.referred, far = True, self.reach(self.centre) if self.gradient else None
            if far:
                self._seen(self.centre, self.gradient, FIRST * far)
            is_clear = self._clear(difference)
        if not is_clear:
            raise Untrusted("the change of the gradient is no larger than its rounding")
        return difference

    def _agree(self, v: Tensor, size: float, near: Difference | None, far: Difference) -> bool:
        """Return whether a nearer difference shows that rounding is less than its bound, and small.

        Rounding makes the two differ by what it is in the nearer one, a third derivative by what it is in the other.
        Cost: one gradient where there is no nearer one.
        """
        if near is None:
            near = self.difference(v, size, far.distance / 4)
        moved = near.change != 0
        touched, numbers = self._number((self.centre != 0) | moved), self._number(moved)
        uneven = self._amplified_where(moved) if self._uneven else self.amplified
        gap, plain = self._gap(near, far), self._gap(near, far, 1.0) if self.both else 0.0
        if not (numbers and gap <= self._accepted and plain <= self.tolerance * self.seen):
            return False
        # What the bound is of the numbers that have changed.
        among = self.bound() * (numbers / touched) ** 0.5 / (2 * near.distance)
        self.safety = min(self.safety, max(gap / (among * uneven), LEAST_PART * SAFETY))
        self.plain_safety = min(self.plain_safety, max(plain / among, LEAST_PART * SAFETY))
        return self._clear(far)

    def _seen(self, v: Tensor, size: float, distance: float) -> Difference:
        difference = self.difference(v, size, distance)
        self.seen = max(self.seen, difference.slope)
        uniform = self.amplified * difference.slope
        used = self._norm(self.weight * difference.change) / difference.distance if self._uneven else uniform
        self.used = max(self.used, used)
        return difference

    @property
    def _uneven(self) -> bool:
        return isinstance(self.weight, Tensor)

    @property
    def _accepted(self) -> float:
        """Return the accepted error of ``weight * H u``."""
        return max(self.tolerance * self.used, self.least)

    def _distance(self, reach: float) -> float:
        """Return the distance at which rounding is 0.3 % of the largest curvature seen so far, or at earlier steps."""
        if not (self.seen or self.known.seen):
            needed = self.safety * self.bound() * self.amplified / (0.3 * self.least) if self.least else 0.0
            return min(FAR, max(FIRST, needed / reach)) * reach
        scale = self if self.seen else self.known
        accepted = max(self.tolerance * scale.used, self.least)
        bound = self.eps * (2 * self.gradient + (2 * scale.seen * scale.loss) ** 0.5)
        rounded = self.safety * bound * self.amplified / (0.3 * accepted) if self.amplified else 0.0
        loss_rounded = (6 * self.known.rounding / (ACCEPTED * self.tolerance * scale.seen)) ** 0.5
        unresolved = min(loss_rounded, BACK * reach)
        if self.both and scale.seen:
            rounded = max(rounded, self.plain_safety * bound / (0.3 * self.tolerance * scale.seen))
        fine = min(1.001 * self.coarse, CLEAR * reach)
        return min(FAR * reach, max(self.nearest * reach, fine, 5 * self.eps * self.theta, rounded, unresolved))

    def _clear(self, difference: Difference) -> bool:
        if not difference.distance * self.seen < math.inf:
            return False
        if self.both and self.plain_safety * self.bound() > difference.distance * self.tolerance * self.seen:
            return False
        accepted = difference.distance * self._accepted / (self.safety * self.bound()) if self.bound() else math.inf
        if self.amplified <= accepted or not self._uneven:
            return self.amplified <= accepted
        return self._amplified_where((self.centre != 0) | (difference.change != 0)) <= accepted

    @cached_property
    def _touched(self) -> float:
        """How many numbers of the gradient are not exactly 0."""
        return self._number(self.centre)

    def _amplified_where(self, touched: Tensor) -> float:
        """Return the root mean square of the weight where a gradient is not exactly 0."""
        if not self._uneven or self._touched == self._count():
            return self.amplified
        return self._norm(self.weight * touched) / max(1.0, self._number(touched)) ** 0.5

    def _moves(self, v: Tensor, scale: float) -> bool:
        """Return whether the parameters move as they should, except for random rounding up or down."""
        lost = []
        for p, part in zip(self.parameters, split(v, self.parameters)):
            wanted = part.to(p.dtype) * scale
            missing = (p.detach() + wanted).sub_(p.detach()).sub_(wanted)
            lost.append(inner(missing.reshape(-1), part.reshape(-1)))
        sizes = self._norms(split(v, self.parameters))
        along = [x / max(size, torch.finfo(torch.float64).tiny) for x, size in zip(self._sums(lost), sizes)]
        return math.hypot(*along) <= self.tolerance * scale * self._norm(v)

    def _consistent(self, difference: Difference) -> bool:
        """Return whether rounding of the loss explains the defect, or it is small against the curvature."""
        rounding = max(self.rounding, 4 * self.eps * self.loss) + 2 * self.eps * difference.distance * self.gradient
        accepted = max(self.tolerance * self.seen, self.least / self.amplified if self.amplified else 0.0)
        return abs(difference.defect) <= rounding + ACCEPTED * accepted / 6 * difference.distance**2

    def _compare(self, v: Tensor, size: float, near: Difference) -> None:
        """Raise an error unless a difference twice as far agrees: then only the loss is rounded."""
        far = self.difference(v, size, 2 * near.distance)
        is_near = self._gap(near, far) <= self._accepted
        if self.both and is_near:
            is_near = self._gap(near, far, 1.0) <= self.tolerance * self.seen
        if not (is_near and self._rounded(near, far)):
            raise Untrusted("the change of the loss is not that of its gradient")
        self.rounding = 2 * max(abs(near.defect), abs(far.defect))

    def _rounded(self, near: Difference, far: Difference) -> bool:
        """Return whether the defects look like rounding: those of a wrong gradient grow with the distance."""
        if self._consistent(far):
            return True
        small = max(abs(near.defect), abs(far.defect)) <= self.eps**0.5 * self.loss
        grows = abs(far.defect) > 4 * abs(near.defect)
        return small and not grows and abs(far.defect - 2 * near.defect) > 0.3 * abs(near.defect)

    def _gap(self, near: Difference, far: Difference, weight: Tensor | float | None = None) -> float:
        return self._norm(
            (self.weight if weight is None else weight) * (near.change / near.distance - far.change / far.distance)
        )

    # What a process that holds a part of each vector computes together with the others, see `ShardDifferences`.

    def _whole(self) -> Sequence[Tensor]:
        return self.parameters

    def _count(self) -> float:
        return len(self.centre)

    def _sums(self, values: list[float]) -> list[float]:
        return values

    def _dots(self, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [torch.dot(a, b) for a, b in pairs]

    def _norms(self, parts: Sequence[Tensor], order: float = 2.0) -> list[float]:
        return sizes_of([*parts], order)

    def _norm(self, v: Tensor) -> float:
        return float(norm(v))

    def _number(self, mask: Tensor) -> float:
        return self._sums([float(torch.count_nonzero(mask))])[0]

    @cached_property
    def start(self) -> list[Tensor]:
        """Copies of the parameters before any product has moved them, to put every bit back."""
        return [p.detach().clone() for p in self.parameters]

    def release(self) -> None:
        """Forget the vectors that are kept from one product to the next: they are made again."""
        self.last = None
        self.__dict__.pop("start", None)

    def _moved(self, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """At the parameters moved by ``scale * v``: the rise of the loss, its size before, and the gradient."""
        snapshot = self.snapshot
        compute = partial(displaced_gradient, snapshot.replay, self.parameters, self.start, v, scale, snapshot.loss)
        if snapshot.run.ranks.world == 1:
            return compute()
        return snapshot.run.ranks.mean(compute, "the displaced gradient")  # type: ignore[return-value]
