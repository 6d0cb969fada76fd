"""The sharp-mode exponent: how fast the real update map stretches the direction that the data feel most."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, push, spectral_radius


def sharp_plane(mode: Tensor, root: Tensor | float, *, kick: Tensor | float | None = None, size: int) -> Tensor:
    """The directions to push: ``(v, 0)`` without momentum; with it also ``(0, m)``, the buffer that displaces by v.

    On a quadratic with a fixed preconditioner the plane is invariant whatever the rates. What else the optimizer
    remembers (second moments) starts at 0 and is pushed along.

    Args:
        mode: unit eigenvector of ``R^1/2 H' R^1/2``, ``(P,)``.
        root: ``sqrt(R)``, a number or ``(P,)``; ``v = root * mode``.
        kick: ``m = kick * mode``, see `lsp_callbacks.functional.Edge`; None without momentum.
        size: of the whole state, parameters and momentum first.

    Returns:
        ``(1, size)`` or ``(2, size)``.
    """
    n = len(mode)
    frame = mode.new_zeros(1 if kick is None else 2, size)
    frame[0, :n] = root * mode
    if kick is not None:
        frame[1, n : 2 * n] = kick * mode
    return frame


def plane_exponent(
    frame: Tensor,
    log_scale: float,
    mode: Tensor,
    root: Tensor | float,
    steps: int,
    *,
    kick: Tensor | float | None = None,
) -> float:
    """The exponent of a pushed plane, in nats a step.

    Without momentum ``log(||v_w / root|| / ||v_0 / root||) / w``. With momentum the growth of a norm over a short
    window is a transient, positive over half of the *stable* range; so the plane is compressed onto itself, ``P = V0^T
    A_w ... A_1 V0`` (2 x 2), and ``log rho(P) / w`` is taken. Both are exact on a quadratic with a fixed preconditioner
    for every ``w`` if ``mode`` is the top eigenvector.

    Args:
        frame: `sharp_plane` after the pushes, divided by ``exp(log_scale)``.
        log_scale: see ``frame``.
        mode: as given to `sharp_plane`.
        root: as given to `sharp_plane`.
        steps: ``w``.
        kick: as given to `sharp_plane`.
    """
    n = len(mode)
    v = _inverse(root) * frame[:, :n]
    if kick is None:
        growth = torch.linalg.vector_norm(v[0].double())
    else:
        halves = torch.stack([v, _inverse(kick) * frame[:, n : 2 * n]], dim=1)
        growth = spectral_radius((halves * mode).double().sum(-1))
    return (float(growth.log()) + log_scale) / steps


def _inverse(root: Tensor | float) -> Tensor | float:
    return torch.where(root > 0, 1 / root, 0.0) if isinstance(root, Tensor) else 1 / root


def rescale(frame: Tensor) -> tuple[Tensor, float]:
    """The frame divided by its largest entry, and the log of that, so that no window can overflow."""
    scale = frame.abs().max()
    if not bool(torch.isfinite(scale)) or float(scale) == 0.0:
        return frame, 0.0
    return frame / scale, float(scale.double().log())


def sharp_mode_exponent(
    jacobians: Iterable[LinearOperator], mode: Tensor, *, root: Tensor | float = 1.0, kick: Tensor | float | None = None
) -> float:
    """The exponent of the update map along its sharpest mode over a window.

    It is negative below the edge of stability and positive beyond it, where the exponent over all parameters sits at
    0. It sees the mean curvature and its change; with momentum it does *not* see batch noise, and below the edge it
    stays at ``log(beta) / 2`` until the edge is reached: read the Courant number for a margin.

    Args:
        jacobians: ``A_1 ... A_w``, of ``P`` dimensions or, with further state, more.
        mode: unit top eigenvector of ``R^1/2 H' R^1/2`` just before the window, ``(P,)``.
        root: ``sqrt(R)``, by parameter where rates differ.
        kick: see `sharp_plane`; None without momentum.

    Returns:
        Nats a step; ``1 / exponent`` is the e-folding time in steps. ``-inf`` where a step annihilates the mode.

    Raises:
        ValueError: if there is no step.

    Cost: one product a step, with momentum two. Source: MATH section 1.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix
        >>> from lsp_callbacks.functional import sharp_mode_exponent
        >>> A = from_matrix(torch.diag(torch.tensor([1.0, 1.0]) - 0.5 * torch.tensor([5.0, 1.0])))
        >>> round(sharp_mode_exponent([A] * 4, torch.tensor([1.0, 0.0])), 4)  # log|1 - 0.5 * 5|
        0.4055
    """
    steps, log_scale = 0, 0.0
    frame: Tensor | None = None
    for jacobian in jacobians:
        if frame is None:
            frame = sharp_plane(mode, root, kick=kick, size=jacobian.shape[1])
        frame, log = rescale(push(jacobian, frame))
        log_scale += log
        steps += 1
    if frame is None:
        raise ValueError("no step was given: a window needs at least one Jacobian")
    return plane_exponent(frame, log_scale, mode, root, steps, kick=kick)
