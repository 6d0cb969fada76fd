"""The step's own gradient beside that of its replayed loss: they must be the same."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import norm

if TYPE_CHECKING:
    from lsp_callbacks.step.snapshot import Snapshot


def check_gradient(snapshot: Snapshot, replayed: Tensor | Sequence[Tensor], *, tolerance: float = 1e-2) -> None:
    """Refuse a step whose gradient is not that of its replayed loss.

    Args:
        snapshot: the step; without a gradient of its own nothing is checked.
        replayed: the gradient of the replayed loss, flat or by parameter.
        tolerance: relative, in norm.

    Raises:
        Unmeasurable: if they differ, or the step's gradient is not finite or below the normal range.
    """
    if snapshot.gradient is None:
        return
    if isinstance(replayed, Tensor):
        assert snapshot.flat_gradient is not None
        gradient: Sequence[Tensor] = [snapshot.flat_gradient]
        replayed = [replayed]
    else:
        parts = zip(snapshot.parameters, replayed, strict=True)
        gradient = [dense(snapshot.gradient[name], other) for name, other in parts]
    size = _norm(gradient)
    if not bool(size.isfinite()):
        raise Unmeasurable(f"the gradient of step {snapshot.step} is not finite")
    dtype = functools.reduce(torch.promote_types, (g.dtype for g in gradient))
    if 0 < float(size) < torch.finfo(dtype).tiny:  # numbers that have lost their digits
        raise Unmeasurable(f"the gradient of step {snapshot.step} is below the range of {dtype}: scale the loss")
    if not bool(_norm(g - other for g, other in zip(gradient, replayed)) <= tolerance * size):
        ours, theirs = (torch.cat([part.reshape(-1).double() for part in parts]) for parts in (gradient, replayed))
        raise Unmeasurable(_difference(ours, theirs, snapshot.run.loss_name))


def dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return a step's gradient of one parameter; None stands for zeros, which take no memory."""
    return like.new_zeros(()).expand_as(like) if gradient is None else gradient.detach().to_dense()


def _norm(parts: Iterable[Tensor]) -> Tensor:
    """Return the norm of all parts together."""
    norms = [norm(part) for part in parts]
    return norms[0] if len(norms) == 1 else norm(torch.stack(norms))


def _difference(gradient: Tensor, replayed: Tensor, name: str | None) -> str:
    if name is None:
        return "the step's gradient is not that of its loss: a hook changed it, or several backward passes were summed"
    norms = torch.linalg.vector_norm(gradient), torch.linalg.vector_norm(replayed)
    cosine = float((gradient @ replayed) / (norms[0] * norms[1]))
    return (
        f"the step's gradient is not that of its loss: its norm is {float(norms[0]):.4g}, that of the gradient of "
        f"{name} {float(norms[1]):.4g}, their cosine {cosine:.4f}"
        f"{factor(norms[0] / norms[1]) if cosine > 0.9999 else ''}. {name} must return what the step "
        "differentiates, the sum where there are several backward passes; or the gradient was changed after them"
    )


def factor(ratio: Tensor) -> str:
    """Return advice where a ratio is one over a whole number, otherwise nothing."""
    whole = round(1 / float(ratio)) if 1e-4 < float(ratio) < 0.9 else 0
    if whole < 2 or abs(whole * float(ratio) - 1) > 1e-3:
        return ""
    return f", {whole} times less: if the loss is divided by the number of batches in a step, pass accumulate={whole}"
