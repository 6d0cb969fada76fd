"""The sharp-mode exponent: how fast the real update map stretches the direction that the data feel most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, push, unit

#: Curvatures within the error bars at which `exponent_bounds` looks.
_POINTS = 17


def sharp_plane(mode: Tensor, root: Tensor | float, *, buffer_scale: Tensor | float | None = None, size: int) -> Tensor:
    """Return the directions to push: ``(v, 0)``, and with momentum ``(0, m)``, the buffer that displaces by v.

    On a quadratic with a fixed preconditioner the plane is invariant whatever the rates. What else the optimizer
    remembers (second moments) is 0 in it.

    Args:
        mode: unit eigenvector of ``R^1/2 H' R^1/2``, ``(P,)``.
        root: ``sqrt(R)``, a number or ``(P,)``; ``v = root * mode``.
        buffer_scale: ``m = buffer_scale * mode``, see `StabilityThreshold`; None without momentum.
        size: of the whole state, parameters and momentum first.

    Returns:
        ``(1, size)`` or ``(2, size)``.
    """
    n = len(mode)
    frame = mode.new_zeros(1 if buffer_scale is None else 2, size)
    frame[0, :n] = root * mode
    if buffer_scale is not None:
        frame[1, n : 2 * n] = buffer_scale * mode
    return frame


def plane_map(
    jacobian: LinearOperator,
    mode: Tensor,
    root: Tensor | float = 1.0,
    *,
    buffer_scale: Tensor | float | None = None,
    rest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return one step compressed onto the plane of its sharp mode, ``P = V^+ A V``.

    V is `sharp_plane` and ``V^+ V = 1``: ``v`` is read as ``mode . (v / root)``, the buffer as ``mode . (m /
    buffer_scale)``. For SGD ``P`` is the companion matrix at ``x = eta mode . H' mode``, a Rayleigh quotient: a mode
    that is wrong by an angle ``phi`` changes x by ``phi^2``, and nothing else. What else the optimizer remembers gets
    one more direction, that into which a displacement along v moves it: for Adam ``g * H v`` in the second moments.
    Begun at 0 in each step it would count twice, as the next step does not take it back.

    Args:
        jacobian: of the step, square.
        mode: as given to `sharp_plane`.
        root: as given to `sharp_plane`.
        buffer_scale: as given to `sharp_plane`.
        rest: of the steps before in the same window; None finds it.

    Returns:
        ``(k, k)``, in float64 on the CPU: parameters, buffer, rest, of which the last two need not exist. And ``rest``,
        the blocks of the state behind the buffer, flat; empty or 0 where there is nothing.

    Cost: one product; buffer and rest alone feel no curvature.
    """
    n, size = len(mode), len(mode) * (1 if buffer_scale is None else 2)
    moved = push(jacobian, sharp_plane(mode, root, buffer_scale=buffer_scale, size=jacobian.shape[1]))
    if rest is None:
        rest = moved[0, size:].clone()
        rest = unit(rest)
    remembers = bool(rest.any())
    if remembers:
        moved = torch.cat([moved, (jacobian @ torch.cat([rest.new_zeros(size), rest]))[None]])
    rows = [(_inverse(root) * moved[:, :n]).double() @ mode.double()]
    if buffer_scale is not None:
        rows.append((_inverse(buffer_scale) * moved[:, n : 2 * n]).double() @ mode.double())
    if remembers:
        rows.append(moved[:, size:].double() @ rest.double())
    return torch.stack(rows).cpu(), rest


def _inverse(root: Tensor | float) -> Tensor | float:
    return torch.where(root > 0, 1 / root, 0.0) if isinstance(root, Tensor) else 1 / root


def window_exponent(maps: Sequence[Tensor], *, rest: bool = False) -> float:
    """Return ``log rho(P_w ... P_1) / w``, in nats a step, of the steps' `plane_map`.

    The growth of a norm would be another number: with momentum a transient, positive over half of the *stable* range,
    and without it, below the edge, that of whatever else is in a mode that is not exact. Where ``|1 - eta lambda|`` is
    small, a contamination ``phi`` that stays as it is exceeds ``phi |1 - eta lambda|^w`` in a few steps, also in the
    compressed product of all steps. Compressed one by one the steps leave nothing of it.

    Args:
        maps: P of each step, in their order.
        rest: whether their last direction is what else the optimizer remembers. Its own decay, ``beta2`` for Adam, is
            no growth of the mode: the eigenvalue nearest to it is left out.

    Raises:
        ValueError: if there is no step.
    """
    if not len(maps):
        raise ValueError("no step was given: a window needs at least one Jacobian")
    return float(_exponents(list(maps), rest))


def _exponents(maps: Sequence[Tensor], rest: bool) -> Tensor:
    """Return `window_exponent` of each window in a batch: each map is ``(*batch, k, k)``."""
    product = torch.eye(maps[0].shape[-1], dtype=torch.float64).expand(maps[0].shape)
    scale = decay = torch.zeros(product.shape[:-2], dtype=torch.float64)
    for step in maps:
        product = step @ product
        size = product.abs().amax((-2, -1))
        size = torch.where((size > 0) & size.isfinite(), size, 1.0)
        product, scale = product / size[..., None, None], scale + size.log()
    finite = product.isfinite().all((-2, -1))
    values = torch.linalg.eigvals(torch.where(finite[..., None, None], product, 0.0))
    if rest:
        logs = torch.stack([step[..., -1, -1].to(values.dtype).log() for step in maps]).sum(0)
        decay = (logs - scale).exp()
        nearest = (values - decay[..., None]).abs().argmin(-1, keepdim=True)
        values = values.scatter(-1, nearest, 0.0)
    radius = torch.where(finite, values.abs().amax(-1), torch.nan)
    return (radius.log() + scale) / len(maps)


def exponent_bounds(
    maps: Sequence[Tensor], curvatures: Sequence[Tensor], below: float, above: float, *, rest: bool = False
) -> tuple[float, float]:
    """Return bounds of `window_exponent` where the curvature along the true mode is not that along the given one.

    The largest eigenvalue lies between ``(1 - below)`` and ``(1 + above)`` times the curvature that was found; a step
    is linear in it, ``P + d C`` with ``-below <= d <= above``. The exponent is not monotone in d, so it is looked at
    all along. One number that passes 0 in between can be anything down to ``-inf``.

    Args:
        maps: P of each step.
        curvatures: C of each step: the part of P that is due to the curvature, as ``P - P(fixed gradient)``.
        below: relative error of the curvature, downwards.
        above: relative error upwards, `StabilityThreshold.beyond`.
        rest: as in `window_exponent`.

    Returns:
        The least and the largest exponent; NaN where an error bar is.

    Example:
        >>> import torch
        >>> P, C = torch.tensor([[-0.5]]), torch.tensor([[-1.5]])  # eta lambda = 1.5, or 10 % more
        >>> low, high = exponent_bounds([P.double()] * 4, [C.double()] * 4, 0.0, 0.1)
        >>> round(low, 3), round(high, 3)  # log 0.5, log 0.65
        (-0.693, -0.431)
    """
    if math.isnan(below + above):
        return math.nan, math.nan
    shifts = torch.linspace(-below, min(above, 1e30), _POINTS, dtype=torch.float64)[:, None, None]
    windows = [P + shifts * C for P, C in zip(maps, curvatures)]
    exponents = _exponents(windows, rest)
    changes_sign = any(step[0].numel() == 1 and bool(step[0] * step[-1] <= 0) for step in windows)
    return -math.inf if changes_sign else float(exponents.min()), float(exponents.max())


def sharp_mode_exponent(
    jacobians: Iterable[LinearOperator],
    mode: Tensor,
    *,
    root: Tensor | float = 1.0,
    buffer_scale: Tensor | float | None = None,
) -> float:
    """Return the exponent of the update map along its sharpest mode over a window.

    Each step is compressed onto the plane of the mode, see `plane_map`, and the small matrices are multiplied: exact on
    a quadratic with a fixed preconditioner for every window, if ``mode`` is the top eigenvector; otherwise the exponent
    of a curvature that is too small by the square of the angle between them. It is negative below the edge of stability
    and positive beyond it, where the exponent over all parameters sits at 0. It sees the mean curvature and its change,
    *not* batch noise, and with momentum it stays at ``log(beta) / 2`` until the edge is reached: read the Courant
    number for a margin.

    Args:
        jacobians: ``A_1 ... A_w``, of ``P`` dimensions or, with further state, more.
        mode: unit top eigenvector of ``R^1/2 H' R^1/2`` just before the window, ``(P,)``.
        root: ``sqrt(R)``, by parameter where rates differ.
        buffer_scale: see `sharp_plane`; None without momentum.

    Returns:
        Nats a step; ``1 / exponent`` is the e-folding time in steps. ``-inf`` where a step annihilates the mode.

    Raises:
        ValueError: if there is no step.

    Cost: one product a step. Source: docs/theory.md, section The exponent along the trajectory.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix
        >>> from lsp_callbacks.functional import sharp_mode_exponent
        >>> A = from_matrix(torch.diag(torch.tensor([1.0, 1.0]) - 0.5 * torch.tensor([5.0, 1.0])))
        >>> round(sharp_mode_exponent([A] * 4, torch.tensor([1.0, 0.0])), 4)  # log|1 - 0.5 * 5|
        0.4055
    """
    maps: list[Tensor] = []
    rest: Tensor | None = None
    for jacobian in jacobians:
        step, rest = plane_map(jacobian, mode, root, buffer_scale=buffer_scale, rest=rest)
        maps.append(step)
    return window_exponent(maps, rest=rest is not None and bool(rest.any()))
