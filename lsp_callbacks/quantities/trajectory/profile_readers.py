"""Operators at the end of a window that read outputs and explanations off the parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.training_profile import Tangents
from lsp_callbacks.linalg import LinearOperator, push
from lsp_callbacks.operators.network.outputs import output_jacobian
from lsp_callbacks.operators.network.saliency import explain
from lsp_callbacks.step.snapshot import Snapshot


def output_reader(snapshot: Snapshot, *, samples: int) -> LinearOperator | None:
    """Return `output_jacobian` of the probes, the same on all ranks; None where the outputs are not known."""
    probes = snapshot.probes
    if probes is None or not probes.full:
        return None
    return _of_first(snapshot, lambda: output_jacobian(probes, samples=samples), "the outputs")


def explanation_reader(snapshot: Snapshot, *, samples: int) -> LinearOperator | None:
    """Return ``N^(-1/2) d explanations / d theta`` of the first samples; None where it does not exist."""

    def build() -> LinearOperator | None:
        at = explain(snapshot, samples=samples)
        return None if at.graph.kinked or at.graph.custom else at.states.samples**-0.5 * at.by_parameters()[1]

    return _of_first(snapshot, build, "the explanations")


def _of_first(snapshot: Snapshot, build: Callable[[], LinearOperator | None], what: str) -> LinearOperator | None:
    """Return an operator of the first rank, whose products are sent to all ranks."""
    of_first_rank: list[LinearOperator] = []

    def shape_and_type() -> tuple[tuple[int, int], torch.dtype] | None:
        try:
            built = build()
        except Unmeasurable:  # the rest of the profile does not need it
            return None
        if built is None:
            return None
        of_first_rank.append(built)
        return built.shape, built.dtype

    ranks = snapshot.run.ranks
    form = ranks.first(shape_and_type, what)
    if form is None or ranks.world == 1:
        return of_first_rank[0] if form else None
    device = next(iter(snapshot.parameters.values())).device

    def product(vector: torch.Tensor) -> torch.Tensor:
        return ranks.first(lambda: (of_first_rank[0] @ vector).cpu(), what).to(device)

    def adjoint(vector: torch.Tensor) -> torch.Tensor:
        return ranks.first(lambda: (of_first_rank[0].T @ vector).cpu(), what).to(device)

    return LinearOperator(form[0], product, adjoint, dtype=form[1], device=device)


def seen_by(J: LinearOperator, now: Tangents) -> torch.Tensor:
    """Return the Gram matrix ``(r, r)`` of the images of the pushed directions under J."""
    images = push(J, now.frame[:, : now.size].to(J.dtype)).double()
    return (images @ images.mT).cpu()
