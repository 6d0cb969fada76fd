"""The generalized sensitivity of a network with kinks: the largest norm of its Jacobian over the slopes near them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Of ``2^k d^3``, d the shorter side of the Jacobian, up to which vertices are enumerated.
MOST_WORK = 2e8


@dataclass(frozen=True)
class RelaxedJacobian:
    """``J(e) = J + B E (I - T E)^-1 C``, E the diagonal of the k near-active units' slopes less their centres.

    Attributes:
        jacobian: J, ``(m, n)``, with the slopes of all near-active units at their centre.
        into: C, ``(k, n)``: derivatives of the units' preactivations by the input.
        out: B, ``(m, k)``: derivatives of the output by the units' values.
        between: T, ``(k, k)``, strictly lower triangular in the order of the calls: derivatives of preactivations by
            earlier values.
        radius: ``(k,)``: half of the jump of each unit's slope; ``|e| <= radius``.
        real: ``(k,)``: e of the slopes that the network really has.
        layer: ``(k,)``: the number of the call that each unit belongs to.
        units: how many units there are in all.
        fixed: further kinks in the network, whose slopes were left as they are.
        centre: None, or an upper bound of ``||J||`` where J and C are restricted to a subspace of the inputs, which
            holds the rows of C: so ``||C||`` is complete, and ``||J(e)||`` bounded from below.
    """

    jacobian: Tensor
    into: Tensor
    out: Tensor
    between: Tensor
    radius: Tensor
    real: Tensor
    layer: Tensor
    units: int
    fixed: tuple[str, ...] = ()
    centre: Tensor | None = None


@dataclass(frozen=True)
class GeneralizedNorm:
    """``sup ||J(e)||_2`` over the slopes of the near-active units, at one sample.

    Attributes:
        lower: the largest norm found at a vertex; the sup itself where ``exact``.
        upper: certified; None where kinks of other kinds were left as they are.
        exact: whether all vertices were tried.
        ordinary: ``||J||_2`` at the slopes that the network has; from below where J is known on a subspace only.
        near: how many near-active units stand between input and output.
        share: of all units.
    """

    lower: Tensor
    upper: Tensor | None
    exact: bool
    ordinary: Tensor
    near: int
    share: float


def generalized_norm(free: RelaxedJacobian, *, vertices: int = 12) -> GeneralizedNorm:
    """Return the generalized ``sigma^x``, the largest norm over the product set of the chain rule.

    ``J(e)`` is affine in each slope, so its norm is convex in each, and the sup is at a vertex of the box
    ``|e_i| <= r_i``. For up to ``vertices`` near-active units that reach the output (and where the matrices are small)
    all are tried. Otherwise:

    - from below by ascent: J is affine in the slopes of one call together, so the vertex of that call that its gradient
      points to cannot lower the norm; the calls in turn, from the slopes that the network has and from the largest
      ones, then single flips, until none raises it;
    - from above by ``||J(0)|| + min(sum_l ||B_l r_l^1/2|| p_l, || |B| R (I - |T| R)^-1 |C| ||)`` with
      ``p_l = ||r_l^1/2 C_l|| + sum_{k<l} ||r_l^1/2 T_lk r_k^1/2|| p_k``. Both follow from the triangle inequality on
      ``J(e) = J(0) + B E (I - T E)^-1 C``, whose series ends, as T is nilpotent: the first term by term in blocks, the
      second entry by entry. For one hidden ReLU layer the first is
      ``||W_2 D_c W_1|| + 0.5 ||W_2[:, A]|| ||W_1[A, :]||``.

    Where J is known on a subspace of the inputs only (`RelaxedJacobian.centre`), so is the norm from below, the bound
    of ``||J(0)||`` is that one, and nothing is exact.

    The product set contains Clarke's generalized Jacobian of the network, and may be larger: ``relu(x) - relu(-x)`` is
    x, and has 2 here where the truth is 1. So ``upper`` (and ``lower`` where ``exact``) is a bound of Clarke's sup from
    above; ``lower`` otherwise bounds the sup over the product set from below, not Clarke's.

    Args:
        free: from `lsp_callbacks.operators.curvature.kink_relaxation.relax_kinks`.
        vertices: at most so many units are enumerated.

    Cost: no gradient. Source: Katende 2025, Def. 6.1 and Sec. 6.6, with products in place of one-step norms; Clarke
    1983, 2.6; docs/theory.md, section The law of SGD, energies, kinks.

    Example:
        >>> import torch
        >>> from lsp_callbacks.operators.curvature.kink_relaxation import relax_kinks
        >>> x = torch.zeros(1, 1, dtype=torch.float64)
        >>> result = generalized_norm(relax_kinks(lambda x: x.relu() - (-x).relu(), x)[0])
        >>> float(result.lower), result.exact, result.near
        (2.0, True, 2)
    """
    near = len(free.radius)
    small = _reduced(free)
    ordinary = _norms(small, small.real[None])[0]
    k, d = len(small.radius), min(small.jacobian.shape)
    certified = None if free.fixed else _upper(small)
    exact = not k or (k <= vertices and 2**k * d**3 <= MOST_WORK)
    if exact:
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=k)), dtype=torch.float64).view(2**k, k)
        lower = torch.cat([_norms(small, part.to(small.radius) * small.radius) for part in signs.split(256)]).max()
        certified = certified if free.fixed or free.centre is not None else lower
    else:
        lower = max(_ascended(small, start) for start in (small.real, small.radius))
    lower = torch.maximum(lower, ordinary)
    return GeneralizedNorm(
        lower=lower,
        upper=None if certified is None else torch.maximum(certified, lower),
        exact=exact and not free.fixed and free.centre is None,
        ordinary=ordinary,
        near=near,
        share=near / max(free.units, 1),
    )


def _reduced(free: RelaxedJacobian) -> RelaxedJacobian:
    """Return an equivalent of fewer columns and rows, by rotating the spaces of the input and of the output."""
    m, n = free.jacobian.shape
    rows = torch.cat([free.jacobian, free.into])
    if n > len(rows):
        rows = torch.linalg.qr(rows.T, mode="r")[1].T
        n = rows.shape[1]
    columns = torch.cat([rows[:m], free.out], dim=1)
    if m > columns.shape[1]:
        columns = torch.linalg.qr(columns, mode="r")[1]
    return replace(free, jacobian=columns[:, :n], into=rows[m:], out=columns[:, n:])


def _resolvent(free: RelaxedJacobian, e: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(I - T E)^-1 C`` and ``B (I - E T)^-1`` for each row of e."""
    eye = torch.eye(len(free.radius)).to(e)
    into = torch.linalg.solve_triangular(eye - free.between * e[:, None, :], free.into, upper=False)
    out = torch.linalg.solve_triangular(eye - e[:, :, None] * free.between, free.out, upper=False, left=False)
    return into, out


def _norms(free: RelaxedJacobian, e: Tensor) -> Tensor:
    """Return ``||J(e)||_2`` for each row of e."""
    into, _ = _resolvent(free, e)
    J = free.jacobian + free.out @ (e[:, :, None] * into)
    J = J.mT if J.shape[1] < J.shape[2] else J
    return torch.linalg.eigvalsh(J.mT @ J)[:, -1].clamp_min(0).sqrt()


def _ascended(free: RelaxedJacobian, start: Tensor) -> Tensor:
    e, calls = start.clone(), free.layer.unique().tolist()
    best = _norms(free, e[None])[0]
    for _ in range(100):
        before = best
        for call in calls:
            into, out = (part[0] for part in _resolvent(free, e[None]))
            u, _, v = torch.linalg.svd(free.jacobian + free.out @ (e[:, None] * into), full_matrices=False)
            gradient = (u[:, 0] @ out) * (into @ v[0])
            e = torch.where(free.layer == call, torch.where(gradient < 0, -1.0, 1.0) * free.radius, e)
        best = _norms(free, e[None])[0]
        if not bool(best > before * (1 + 1e-12)):
            flips = e * (1 - 2 * torch.eye(len(e)).to(e))
            values = torch.cat([_norms(free, part) for part in flips.split(64)])
            if not bool(values.max() > best * (1 + 1e-12)):
                break
            e, best = flips[values.argmax()], values.max()
    return best


def _upper(free: RelaxedJacobian) -> Tensor:
    norm = torch.linalg.matrix_norm
    centre = norm(free.jacobian, 2) if free.centre is None else free.centre.to(free.jacobian)
    calls = [(free.layer == call).nonzero()[:, 0] for call in free.layer.unique().tolist()]
    root = free.radius.sqrt()
    into, out = root[:, None] * free.into, free.out * root
    between = root[:, None] * free.between * root
    reach: list[Tensor] = []
    for i, units in enumerate(calls):
        earlier = (norm(between[units][:, other], 2) * p for other, p in zip(calls[:i], reach))
        reach.append(norm(into[units], 2) + sum(earlier, centre.new_zeros(())))
    blocks = sum((norm(out[:, units], 2) * p for units, p in zip(calls, reach)), centre.new_zeros(()))
    eye = torch.eye(len(root)).to(root)
    entries = torch.linalg.solve_triangular(eye - between.abs(), into.abs(), upper=False)
    return centre + torch.minimum(blocks, norm(out.abs() @ entries, 2))
