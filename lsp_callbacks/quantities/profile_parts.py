"""What `StabilityProfile` looks at when its window ends: the depth, the outputs and the explanations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from lsp_callbacks.functional.depth_profile import depth_profile
from lsp_callbacks.functional.norm_bound import norm_bound
from lsp_callbacks.functional.training_profile import Tangents
from lsp_callbacks.linalg import LinearOperator, norm_upper, push
from lsp_callbacks.operators.curvature import double_backward
from lsp_callbacks.operators.depth import depth
from lsp_callbacks.operators.explanation import explain
from lsp_callbacks.operators.outputs import output_jacobian
from lsp_callbacks.snapshot import Call, Snapshot, Unmeasurable, evaluating

#: Probability with which a bound of a measurement may fail.
FAILURE = 1e-3


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
    """See `lsp_callbacks.functional.depth_profile`; of this rank's first samples."""
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


@dataclass(frozen=True)
class Moved:
    """What pushed directions do to something that depends on the parameters.

    Attributes:
        gram: ``(r, r)``, of their images.
        norm: of its Jacobian, from above; NaN where nobody asked.
    """

    gram: torch.Tensor
    norm: float

    def sensitivity(self, now: Tangents, log_theta: float | None) -> tuple[float, float]:
        """``||J A_T ... A_1||`` on the frame, a lower bound, and ``||J|| prod ||A_t||``, one from above."""
        lower = float(torch.linalg.eigvalsh(self.gram)[-1].clamp_min(0).sqrt()) * math.exp(now.frame_log)
        return lower, math.nan if log_theta is None or log_theta > 709 else self.norm * math.exp(log_theta)


def outputs_moved(snapshot: Snapshot, now: Tangents, *, samples: int, steps: int = 0) -> Moved | None:
    """The outputs of the probes; None where they are not told from the loss."""
    probes = snapshot.probes
    if probes is None or not probes.full:
        return None

    def found() -> Moved | None:
        try:
            return _moved(output_jacobian(probes, samples=samples), snapshot, now, steps)
        except Unmeasurable:  # the rest of the profile does without
            return None

    return snapshot.ranks.first(found, "the outputs")


def explanations_moved(snapshot: Snapshot, now: Tangents, *, samples: int, steps: int = 0) -> Moved | None:
    """The input gradients of the first samples, see `explain`; None where they have no derivative, or no depth."""

    def found() -> Moved | None:
        try:
            at = explain(snapshot, samples=samples)
            if at.graph.kinked or at.graph.custom:
                return None
            _, J = at.by_parameters()
            return _moved(at.states.samples**-0.5 * J, snapshot, now, steps)
        except Unmeasurable:
            return None

    return snapshot.ranks.first(found, "the explanations")


def _moved(J: LinearOperator, snapshot: Snapshot, now: Tangents, steps: int) -> Moved:
    images = push(J, now.frame[:, : now.size].to(J.dtype)).double()
    norm = math.nan
    if steps:
        norm = float(norm_upper(J, steps=steps, failure=FAILURE, generator=snapshot.generator("sensitivity bound")))
    return Moved((images @ images.mT).cpu(), norm)
