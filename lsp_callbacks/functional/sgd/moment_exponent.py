"""Moment exponents of SGD frozen at one point: how fast the mean of a power of the distance grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.functional.sgd.mean_square import second_moment_exponent
from lsp_callbacks.functional.sgd.modes import PLAIN, Modes, UpdateRule, drawn_from
from lsp_callbacks.functional.sgd.sgd_stability import gd_exponent

#: Coordinates of a fourth moment, at most, without and with momentum, which takes more products;
MODES, COORDINATES = 24, 16
#: and ``N outputs^2 d^4``, a sixth of the multiplications of a product.
WORK = 2**28
#: Entries of what is held of some samples at a time.
CHUNK = 2**22
#: Vectors of a Krylov space.
BASIS = 128


def moment_exponent(
    modes: Modes,
    lr: float,
    *,
    p: int,
    batch_size: int,
    rule: UpdateRule = PLAIN,
    replacement: bool = False,
    population: int | None = None,
    tol: float = 1e-9,
    iterations: int = 1024,
) -> float:
    """Return ``Lambda(p) = lim (1/n) log E ||A_n ... A_1||^p``, nats per step; exact, for p = 2 and 4.

    Of independent steps ``E ||A_n ... A_1 v||^p`` with even p is linear in ``v (x) ... (x) v``, so that ``Lambda(p) =
    log rho(E[A (x) ... (x) A])`` on symmetric tensors of order p. The fourth moments of a batch's mean are known from
    those of single samples, so no batch is enumerated. The p-th moment is stable where ``Lambda(p) < 0``.

    Lambda is convex with ``Lambda(0) = 0`` and slope lambda there: ``lambda <= Lambda(2) / 2 <= Lambda(4) / 4``. Those
    two say how far apart runs are: where lambda is negative and ``Lambda(4)`` positive, rare runs explode.

    Other p are refused. Odd and fractional ones belong to no linear map, and a Monte Carlo mean of a product's power
    is carried by runs that are too rare to be drawn: it is too low, with an error that does not show it. By convexity
    ``Lambda(2) / 2`` bounds ``Lambda(1)`` from above, and ``Lambda(3)`` lies between ``1.5 Lambda(2)`` and the mean of
    ``Lambda(2)`` and ``Lambda(4)``.

    Args:
        modes: of `reduced_modes`.
        lr: one rate.
        p: 2 or 4. 4 takes d coordinates, the modes of a component, of which there may be 24, or twice the modes with
            momentum, of which there may be 8.
        batch_size: samples of a batch.
        rule: of the optimizer.
        replacement: within a batch.
        population: as in `sgd_exponent`; here exact for any ``population``.
        tol: relative residual.
        iterations: products at most, for p = 4.

    Returns:
        -inf where every product vanishes in the end, NaN at rank 0 or where the iteration did not converge.

    Raises:
        ValueError: for another p; a batch larger than what it is drawn from; and for p = 4 where the modes are too
            many, or batch statistics tie samples together.

    Cost: ``O(N outputs^2 d^4)`` a product for p = 4, 20 to 100 products, with momentum more near a critical rate; see
    `second_moment_exponent` for p = 2. Source: Chemnitz & Engel 2025, Definition A.2, Propositions A.3 and A.4.

    Example:
        >>> import math, torch
        >>> from lsp_callbacks.functional import moment_exponent, reduced_modes
        >>> root = torch.tensor([1.0, 3.0]).sqrt()
        >>> modes = reduced_modes(root.outer(root))
        >>> result = moment_exponent(modes, 0.9, p=4, batch_size=1)  # curvatures 1 and 3
        >>> abs(result - math.log((0.1**4 + 1.7**4) / 2)) < 1e-9
        True
    """
    if p not in (2, 4):
        raise ValueError(
            f"p={p!r}: only the moments 2 and 4 are exact. Others follow from no linear map (odd, fractional) or from "
            "one that is too large, and their Monte Carlo means are carried by runs too rare to be drawn"
        )
    total = drawn_from(modes.samples, batch_size, population)
    if not modes.rank:
        return math.nan
    if batch_size == total and not replacement and modes.together == 1:  # no noise: all moments are powers
        return p * float(gd_exponent(modes, lr, rule=rule))
    if p == 2:
        draw: dict[str, Any] = {"batch_size": batch_size, "replacement": replacement, "population": population}
        return 2 * second_moment_exponent(modes, lr, rule=rule, tol=tol, **draw)
    if modes.together > 1:
        raise ValueError("p=4: fourth moments of samples that batch statistics tie together are not known: take p=2")
    mix = _Mix.of(batch_size, math.inf if replacement else total)
    parts = [_part(modes, label) for label in modes.owner.unique()]
    for part in parts:
        d = part.rank * (2 if rule.momentum else 1)
        most = COORDINATES if rule.momentum else MODES
        if d > most or len(part.factor) * part.factor.shape[1] ** 2 * d**4 > WORK:
            raise ValueError(
                f"p=4: a fourth moment of {d} coordinates and {len(part.factor)} samples is too large "
                f"({most} coordinates at most): take fewer probes, or p=2"
            )
    return max(_fourth_exponent(part, lr, rule, modes.samples, mix, tol, iterations) for part in parts)


@dataclass(frozen=True)
class _Mix:
    """Central moments of a batch's mean from those of a sample, ``S2 = E[w (x) w]`` and so on.

    ``E[W^2] = two S2``, ``E[W^3] = three S3``, ``E[W^4] = four S4 + pairs (three pairings of S2 (x) S2)``.
    """

    two: float
    three: float
    four: float
    pairs: float

    @classmethod
    def of(cls, size: int, total: float) -> _Mix:
        """Return the mix of a batch, by inclusion and exclusion over which draws coincide; inf: with replacement."""
        q, once = [1.0], 1 / total
        for k in range(4):  # n^k size (size - 1) ... / (n (n - 1) ...), 0 where a batch has no so many different ones
            q.append(0.0 if k >= size else q[-1] * (size - k) / (1 - k * once))
        return cls(
            (q[1] - once * q[2]) / size**2,
            (q[1] - 3 * once * q[2] + 2 * once**2 * q[3]) / size**3,
            (q[1] - 7 * once * q[2] + 12 * once**2 * q[3] - 6 * once**3 * q[4]) / size**4,
            (q[2] - 2 * once * q[3] + once**2 * q[4]) / size**4,
        )


def _part(modes: Modes, label: Tensor) -> Modes:
    """Return one component's modes and the samples that it has."""
    keep = modes.owner == label
    factor = modes.factor[..., keep]
    return replace(
        modes, factor=factor[factor.flatten(1).any(1)], curvatures=modes.curvatures[keep], owner=modes.owner[keep]
    )


def _fourth_exponent(
    part: Modes, lr: float, rule: UpdateRule, samples: int, mix: _Mix, tol: float, iterations: int
) -> float:
    # With one sample i as its batch a step is A_i = C + U_i V_i, on v or on (v, lr m).
    delta, _, beta, b1, b2 = (float(c) for c in rule.coefficients(torch.tensor(lr, dtype=torch.float64)))
    phi = float(rule.coefficients(torch.ones((), dtype=torch.float64))[1])
    eye, rows = torch.eye(part.rank, dtype=part.factor.dtype), part.factor
    push = torch.tensor([[b1], [lr * b2]], dtype=rows.dtype)
    without = torch.tensor([[delta, phi], [0.0, beta]], dtype=rows.dtype)
    if not beta:
        push, without = push[:1], without[:1, :1]
    aim = torch.zeros(1, len(without), dtype=rows.dtype)
    aim[0, 0] = 1.0
    fixed = torch.kron(without + rule.weight_decay * push @ aim, eye)
    mean = torch.kron(push @ aim, torch.diag(part.curvatures))
    u, v = torch.stack([torch.kron(push, y.mT) for y in rows]), torch.stack([torch.kron(aim, y) for y in rows])
    size = float(fixed.norm() + (u.flatten(1).norm(dim=1) * v.flatten(1).norm(dim=1)).max())  # no power overflows
    operator = _fourth_moment((fixed + mean) / size, mean / size, u / size, v, samples, mix)
    operator, start = _on_symmetric(operator, len(fixed))
    return 4 * math.log(size) + _log_radius(operator, start, tol, iterations)


def _fourth_moment(a: Tensor, g: Tensor, u: Tensor, v: Tensor, samples: int, mix: _Mix) -> Callable[[Tensor], Tensor]:
    """Return the map ``E[A (x) A (x) A (x) A] X`` for symmetric X, up to the order of axes; ``a = E A``, ``g = E U V``.

    ``A = a + W``: ``a^4 + 6 a^2 E W^2 + 4 a E W^3 + E W^4``, symmetrised, where ``w_i = U_i V_i - g`` and the products
    of ``U V`` are expanded: what remains without a sum over samples, and what has 2, 3 and 4 of them.
    """
    d = len(a)
    third, whole = 4 * (mix.three * a - mix.four * g), 3 * (mix.pairs - mix.four)

    def chunks() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        step = max(1, CHUNK // (u.shape[-1] ** 2 * d**2))
        for some_u, some_v in zip(u.split(step), v.split(step)):
            into = torch.einsum("nia,njb->nabij", some_u, some_u).reshape(-1, d * d)
            onto = torch.einsum("nai,nbj->nabij", some_v, some_v).reshape(-1, d * d)
            yield some_u, some_v, into, onto

    square = sum(into.mT @ onto for _, _, into, onto in chunks()) / samples
    pair = 6 * mix.two * torch.kron(a, a) - 12 * mix.three * torch.kron(g, a)
    pair = pair + 6 * (mix.four - mix.pairs) * torch.kron(g, g) + 3 * mix.pairs * square

    def on_pair(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
        """Apply ``left (x) right`` to the first two axes, which then come last."""
        half = (left @ x.reshape(d, -1)).view(d, d, -1)
        return (right @ half).view(d * d, -1).mT

    def apply(x: Tensor) -> Tensor:
        pushed = on_pair(g, g, x)
        out = on_pair(a, a, on_pair(a, a, x)) - 6 * mix.two * on_pair(a, a, pushed)
        out = out + 8 * mix.three * on_pair(g, a, pushed) + whole * on_pair(g, g, pushed)
        flat = x.reshape(d * d, d * d)
        for some_u, some_v, into, onto in chunks():
            n, outputs = some_v.shape[:2]
            two = onto @ flat
            three = some_v[:, None] @ two.view(n, outputs**2, d, d)
            four = three @ some_v.transpose(1, 2)[:, None]
            inner = three @ third.mT + mix.four * four @ some_u.transpose(1, 2)[:, None]
            two = (two @ pair.mT).view(n, outputs**2, d, d) + some_u[:, None] @ inner
            out = out.addmm(into.mT, two.view(-1, d * d), alpha=1 / samples)
        return out

    return apply


def _on_symmetric(operator: Callable[[Tensor], Tensor], d: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a map of order 4 on the symmetric tensors, in orthonormal coordinates, and ``1 (x) 1``.

    A 24th of the numbers; and no rounding error can leave the symmetric tensors.
    """
    axes = torch.arange(d).expand(d, d, d, d)
    order = torch.stack([axes.movedim(3, k).flatten() for k in range(4)], 1).sort(1).values
    names, index = (order @ d ** torch.arange(4)).unique(return_inverse=True)
    root = index.bincount().to(torch.float64).rsqrt()

    def compressed(x: Tensor) -> Tensor:
        return root * root.new_zeros(len(names)).index_add_(0, index, x.reshape(-1))

    def apply(x: Tensor) -> Tensor:
        return compressed(operator((root * x)[index].view(d, d, d, d)))

    eye = torch.eye(d, dtype=torch.float64)
    return apply, compressed(eye[:, :, None, None] * eye)


def _log_radius(operator: Callable[[Tensor], Tensor], start: Tensor, tol: float, iterations: int) -> float:
    """Return ``log rho`` of a map that keeps a cone, from inside of it, by restarted Arnoldi.

    rho is an eigenvalue, and of all eigenvalues the one with the largest real part.
    """
    most, condition, vector = min(BASIS, len(start)), 1.0, start
    basis = start.new_empty(most + 1, len(start))
    while iterations > 0:
        projected = start.new_zeros(most + 1, most)
        basis[0] = vector / vector.norm()
        for k in range(1, most + 1):
            w = operator(basis[k - 1])
            for _ in range(2):
                part = basis[:k] @ w
                projected[:k, k - 1] += part
                w = w - part @ basis[:k]
            projected[k, k - 1] = rest = w.norm()
            if not bool(rest.isfinite()):
                return math.nan
            exhausted = bool(rest <= 1e-15 * projected.abs().max()) or k == len(start)
            if exhausted or k == most or not k & (k - 1):  # a look at powers of two
                values, vectors = torch.linalg.eig(projected[:k, :k])
                top = values.real.argmax()
                radius, y = float(values[top].real), vectors[:, top]
                if exhausted:
                    return math.log(radius) if radius > 0 else -math.inf
                # A residual moves an eigenvalue by itself times the condition, which a large projection shows.
                inverse, singular = torch.linalg.inv_ex(vectors)
                condition = max(condition, math.inf if singular else float(inverse[top].norm()))
                if float(rest * y[-1].abs()) * condition <= tol * radius:
                    return math.log(radius)
                condition = condition if math.isfinite(condition) else 1.0
            basis[k] = w / rest
        iterations -= most
        vector = y.real @ basis[:most]
    return math.nan
