"""The derivative of the step of Muon, whose orthogonalisation is a polynomial of the momentum, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

from lsp_callbacks.operators.trajectory.update_rules import (
    Coupled,
    Formula,
    Group,
    Linear,
    State,
    combined,
    itself,
    register,
)

NO_EDGE = (
    "a step of Muon is as long for a small gradient as for a large one, so no learning rate is its edge of stability: "
    "courant_step tells whether the steps raise the loss, and lyapunov_trajectory whether two runs drift apart"
)


def orthogonalised(u: Tensor, group: Group) -> tuple[Tensor, Coupled]:
    """Return the Newton-Schulz iterates' end at a matrix u, and its derivative there.

    With ``X_0 = U / |U|``, ``A = X X^T`` it is ``X+ = a X + (b A + c A^2) X``, so that singular vectors stay and each
    singular value is mapped by a polynomial. Torch rounds the iterates to bfloat16; the derivative is that of the
    polynomial itself, which changes of the momentum below that rounding do not follow.

    Args:
        u: ``(m, n)``.
        group: with ``ns_coefficients``, ``ns_steps`` and ``eps``.

    Returns:
        ``(m, n)``; and the derivative, of flat vectors.

    Cost: four products of matrices for each iteration and direction. Source: Jordan et al. 2024.
    """
    a, b, c = map(float, group["ns_coefficients"])
    size, least = torch.linalg.vector_norm(u), float(group["eps"])
    wide = u.mT if u.shape[0] > u.shape[1] else u
    start = wide / size.clamp_min(least)
    iterates, x = [], start
    for _ in range(int(group["ns_steps"])):
        gram = x @ x.mT
        gain = b * gram + c * gram @ gram
        iterates.append((x, gram, gain))
        x = a * x + gain @ x

    def along(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def flat(vector: Tensor) -> Tensor:
            matrix = vector.view(u.shape)
            image = function(matrix.mT if wide is not u else matrix)
            return (image.mT if wide is not u else image).reshape(-1)

        return flat

    def normalised(dx: Tensor) -> Tensor:
        if not bool(size > least):
            return dx / least
        return (dx - start * (start * dx).sum()) / size

    def push(dx: Tensor) -> Tensor:
        dx = normalised(dx)
        for x, gram, gain in iterates:
            turned = dx @ x.mT
            turned = turned + turned.mT
            dx = a * dx + gain @ dx + (b * turned + c * (turned @ gram + gram @ turned)) @ x
        return dx

    def pull(w: Tensor) -> Tensor:
        for x, gram, gain in reversed(iterates):
            turned = w @ x.mT
            turned = b * turned + c * (turned @ gram + gram @ turned)
            w = a * w + gain @ w + (turned + turned.mT) @ x
        return normalised(w)

    reach = float(torch.linalg.vector_norm(x) / size.clamp_min(least))
    end = x.mT if wide is not u else x
    return end, Coupled(along(push), along(pull), reach)


def adjusted_rate(group: Group, shape: torch.Size) -> float:
    """Return the learning rate of a matrix of some shape, by the option ``adjust_lr_fn``."""
    rows, columns = shape
    kind, lr = group["adjust_lr_fn"], float(group["lr"])
    if kind is None or kind == "original":
        return lr * math.sqrt(max(1.0, rows / columns))
    return lr * 0.2 * math.sqrt(max(rows, columns)) if kind == "match_rms_adamw" else lr


def _muon(at: State, group: Group, t: float) -> dict[str, Linear]:
    share = float(group["momentum"])
    by_mean = combined((share, itself("momentum_buffer")), (1 - share, itself("g")))
    by_u = combined((1 - share, itself("g")), (share, by_mean)) if group["nesterov"] else by_mean
    g = at["g"]
    before = at["momentum_buffer"] if "momentum_buffer" in at else torch.zeros_like(g)
    mean = torch.lerp(before, g, 1 - share)
    _, derivative = orthogonalised(torch.lerp(g, mean, share) if group["nesterov"] else mean, group)
    rate = adjusted_rate(group, g.shape)
    theta = combined(
        (1 - float(group["lr"]) * float(group["weight_decay"]), itself("theta")),
        (-rate, {name: factor * derivative for name, factor in by_u.items()}),
    )
    return {"theta": theta, "momentum_buffer": by_mean}


register(
    torch.optim.Muon,
    Formula(
        blocks=lambda group: ("momentum_buffer",),
        momentum=itemgetter("momentum"),
        derivatives=_muon,
        couples=True,
        rounding=0.05,  # bfloat16, where an iterate stretches small singular values: 0.007 was seen
        no_edge=NO_EDGE,
    ),
)
