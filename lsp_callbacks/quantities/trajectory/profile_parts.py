"""What `StabilityProfile` looks at when its window ends: the depth, the outputs and the explanations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lsp_callbacks.autograd.double_backward import double_backward
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.network.depth_profile import depth_profile
from lsp_callbacks.functional.trajectory.norm_intervals import norm_by_random_rows
from lsp_callbacks.functional.trajectory.training_profile import FAILURE, NoiseSeen, Tangents
from lsp_callbacks.linalg import LinearOperator, push, top_between
from lsp_callbacks.linalg.logs import log
from lsp_callbacks.operators.network.depth import depth
from lsp_callbacks.operators.network.norm_bound import norm_bound
from lsp_callbacks.operators.network.outputs import output_jacobian
from lsp_callbacks.operators.network.saliency import explain
from lsp_callbacks.operators.trajectory.window import Window, squares
from lsp_callbacks.step.module_modes import evaluating
from lsp_callbacks.step.replay_checks import Call
from lsp_callbacks.step.snapshot import Snapshot

#: Of the ends of an interval, within which no further product is asked for.
RATIO = 1.2


@dataclass(frozen=True)
class InDepth:
    """The profile in depth.

    Attributes:
        values: its numbers by name; none where there is no depth.
        sigma: by layer.
        undefined: why there is no depth; empty where there is one.
        unbounded: why the norms of the weights give no bound; empty where they do.
    """

    values: dict[str, float] = field(default_factory=dict)
    sigma: dict[str, float] = field(default_factory=dict)
    undefined: str = ""
    unbounded: str = ""


def in_depth(snapshot: Snapshot, calls: dict[str, Call], *, samples: int) -> InDepth:
    """See `lsp_callbacks.functional.network.depth_profile`; of this rank's first samples."""
    generator = snapshot.generator("depth profile")
    try:
        states = depth(snapshot, samples=samples)
    except Unmeasurable as error:
        return InDepth(undefined=str(error), unbounded=str(error))
    found = depth_profile(states.between, len(states.layers), failure=FAILURE, generator=generator)
    sigma = found.sigma.max(1).values
    values: dict[str, Any] = {
        "alpha_x": found.exponent,
        "alpha_x_median": found.median,
        "alpha_x_jacobian_bound": found.bound,
        "alpha_x_jacobian_gap": found.bound - found.exponent,
        "sigma_x_max": sigma.max(),
        "sigma_x_residual": found.residual,
        "sigma_x_converged": found.converged,
        "depth": found.depth,
    }
    reason = ""
    try:
        with evaluating(snapshot.module), double_backward(snapshot.module):
            shapes = {name: call.input_shape for name, call in calls.items()}
            modules = dict(snapshot.module.named_modules())
            bound = norm_bound(states, modules, shapes, generator=generator) / found.depth
        values |= {"alpha_x_norm_bound": bound, "alpha_x_norm_gap": bound - found.exponent}
    except Unmeasurable as error:
        reason = str(error)
    names = (layer.name for layer in states.layers)
    return InDepth({name: float(v) for name, v in values.items()}, dict(zip(names, sigma.tolist())), "", reason)


def output_reader(snapshot: Snapshot, *, samples: int) -> LinearOperator | None:
    """`output_jacobian` of the probes, the same on all ranks; None where outputs are not told from the loss."""
    probes = snapshot.probes
    if probes is None or not probes.full:
        return None
    return _of_first(snapshot, lambda: output_jacobian(probes, samples=samples), "the outputs")


def explanation_reader(snapshot: Snapshot, *, samples: int) -> LinearOperator | None:
    """``N^(-1/2) d explanations / d theta`` of the first samples; None where they have no derivative, or no depth."""

    def build() -> LinearOperator | None:
        at = explain(snapshot, samples=samples)
        return None if at.graph.kinked or at.graph.custom else at.states.samples**-0.5 * at.by_parameters()[1]

    return _of_first(snapshot, build, "the explanations")


def _of_first(snapshot: Snapshot, build: Callable[[], LinearOperator | None], what: str) -> LinearOperator | None:
    """An operator of the first rank, whose products all ranks get."""
    held: list[LinearOperator] = []

    def own() -> tuple[tuple[int, int], torch.dtype] | None:
        try:
            built = build()
        except Unmeasurable:  # the rest of the profile does without
            return None
        if built is None:
            return None
        held.append(built)
        return built.shape, built.dtype

    ranks = snapshot.run.ranks
    told = ranks.first(own, what)
    if told is None or ranks.world == 1:
        return held[0] if told else None
    device = next(iter(snapshot.parameters.values())).device

    def product(vector: torch.Tensor) -> torch.Tensor:
        return ranks.first(lambda: (held[0] @ vector).cpu(), what).to(device)

    def adjoint(vector: torch.Tensor) -> torch.Tensor:
        return ranks.first(lambda: (held[0].T @ vector).cpu(), what).to(device)

    return LinearOperator(told[0], product, adjoint, dtype=told[1], device=device)


def seen_by(J: LinearOperator, now: Tangents) -> torch.Tensor:
    """``(r, r)``: the Gram matrix of what J makes of the pushed directions."""
    images = push(J, now.frame[:, : now.size].to(J.dtype)).double()
    return (images @ images.mT).cpu()


def log_sensitivity(gram: torch.Tensor, now: Tangents) -> tuple[float, float]:
    """Logs of ends of ``||J A_T ... A_1||``, by the frame from below, and by its random directions from above: wide."""
    lower, seen = (
        float(torch.linalg.eigvalsh(g)[-1].clamp_min(0).sqrt()) for g in (gram, gram[: now.random, : now.random])
    )
    upper = norm_by_random_rows(seen, now.random, now.size, failure=FAILURE)
    return log(lower) + now.frame_log, log(upper) + now.frame_log


@dataclass(frozen=True)
class Ends:
    """What products in both directions tell of a window.

    Attributes:
        log_norms: logs of the ends of ``||A_T ... A_1||``, and of that times each reader of the parameters.
        noise: of the noise.
    """

    log_norms: list[tuple[float, float]]
    noise: NoiseSeen


def window_ends(
    snapshot: Snapshot, window: Window, now: Tangents, readers: Sequence[LinearOperator], *, pairs: int
) -> Ends:
    """Norms of a window, of how its readers see it, and of its noise, by one block Lanczos of `squares`.

    Each upper end fails with probability `FAILURE` at most, that of the noise with half of it.

    Args:
        snapshot: of the step after the window.
        window: the steps.
        now: what was pushed through it.
        readers: of the parameters at its end.
        pairs: of passes, at most; fewer where the ends are within `RATIO` of each other.

    Raises:
        Unmeasurable: steps that cannot be replayed as they were.

    Cost: two passes through the window a pair.
    """
    generator = snapshot.generator("window ends")
    ritz, upper = top_between(
        squares(window, readers), steps=pairs, ratio=RATIO**2, failure=FAILURE / 2, generator=generator
    )
    values = ritz.values[..., -1].clamp_min(0)
    if not bool(torch.isfinite(upper).all()):
        raise Unmeasurable("products with the window are not finite")
    for rows, high in ((now.frame, upper[0]), (now.noise, upper[-1])):
        if bool(rows[:, : now.size].any()) and not float(high) > 0:
            raise Unmeasurable("products with the window and back are too small for the type of the parameters")
    ends = zip(values.tolist(), upper.clamp_min(0).tolist())
    norms = [(log(low) / 2 + now.frame_log, log(high) / 2 + now.frame_log) for low, high in ends]
    noise = NoiseSeen(ritz.basis[:, -1], float(ritz.values[-1].sum()), float(upper[-1]))
    return Ends(norms[:-1], noise)


def check_replays(window: Window, start: torch.Tensor, now: Tangents) -> None:
    """The first direction of the frame must become what it became when the steps were taken.

    Raises:
        Unmeasurable: if it does not, to 1 %.

    Cost: a pass.
    """
    again, first = window.forward(start[None])[0], now.frame[0, : now.size]
    if not bool(torch.linalg.vector_norm(again - first) <= 1e-2 * torch.linalg.vector_norm(first)):
        raise Unmeasurable("the steps of the window, replayed at its end, are not what they were")
