"""Profile in depth of `StabilityProfile`: how a perturbation of the input propagates through the layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lsp_callbacks.autograd.double_backward import double_backward
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.network.depth_profile import depth_profile
from lsp_callbacks.functional.trajectory.training_profile import FAILURE
from lsp_callbacks.operators.network.depth import depth
from lsp_callbacks.operators.network.norm_bound import norm_bound
from lsp_callbacks.quantities.key import Key, relative_residual
from lsp_callbacks.step.module_modes import evaluating
from lsp_callbacks.step.replay_checks import Call
from lsp_callbacks.step.snapshot import Snapshot

NATS = "nats per layer"
#: Numbers of every network with a depth.
ALWAYS = {
    "alpha_x": Key(
        "Growth of a perturbation of the input from layer to layer, the largest over the samples.",
        NATS,
        "If large: normalise the layers, scale the initialisation down, or decay the weights.",
        optional=True,
    ),
    "alpha_x_median": Key("The same of the median sample.", NATS, optional=True),
    "alpha_x_jacobian_bound": Key("Bound of alpha_x by the norms of the layers' Jacobians.", NATS, optional=True),
    "alpha_x_jacobian_gap": Key("That bound less alpha_x.", NATS, optional=True),
    "sigma_x_max": Key("Largest sensitivity to the input at any depth.", optional=True),
    "sigma_x_residual": relative_residual(
        "sigma_x_max", "Largest residual of these norms, which are lower bounds up to it.", optional=True
    ),
    "depth": Key("Number of layers that alpha_x is divided by.", "layers", optional=True),
}
KEYS = ALWAYS | {
    "alpha_x_norm_bound": Key(
        "Bound of alpha_x by the norms of weights and slopes of activations (Thm 4.1).",
        NATS,
        "Far above alpha_x it is no reason to change anything.",
        optional=True,
    ),
    "alpha_x_norm_gap": Key("That bound less alpha_x.", NATS, optional=True),
    "sigma_x_converged": Key("1 where all norms in depth have converged.", optional=True),
    "sigma_x/<layer>": Key("Sensitivity of a layer to the input."),
}


@dataclass(frozen=True)
class InDepth:
    """Profile in depth of one network at one step.

    Attributes:
        values: numbers by name; empty where there is no depth.
        sigma: sensitivity by layer.
        undefined: reason why there is no depth; empty where there is one.
        unbounded: reason why the norms of the weights give no bound; empty where they do.
    """

    values: dict[str, float] = field(default_factory=dict)
    sigma: dict[str, float] = field(default_factory=dict)
    undefined: str = ""
    unbounded: str = ""


def in_depth(snapshot: Snapshot, calls: dict[str, Call], *, samples: int) -> InDepth:
    """Return the profile of this rank's first samples, see `lsp_callbacks.functional.network.depth_profile`."""
    generator = snapshot.generator("depth profile")
    try:
        states = depth(snapshot, samples=samples)
    except Unmeasurable as error:
        return InDepth(undefined=str(error), unbounded=str(error))
    profile = depth_profile(states.between, len(states.layers), failure=FAILURE, generator=generator)
    sigma = profile.sigma.max(1).values
    values: dict[str, Any] = {
        "alpha_x": profile.exponent,
        "alpha_x_median": profile.median,
        "alpha_x_jacobian_bound": profile.bound,
        "alpha_x_jacobian_gap": profile.bound - profile.exponent,
        "sigma_x_max": sigma.max(),
        "sigma_x_residual": profile.residual,
        "sigma_x_converged": profile.converged,
        "depth": profile.depth,
    }
    reason = ""
    try:
        with evaluating(snapshot.module), double_backward(snapshot.module):
            shapes = {name: call.input_shape for name, call in calls.items()}
            modules = dict(snapshot.module.named_modules())
            bound = norm_bound(states, modules, shapes, generator=generator) / profile.depth
        values |= {"alpha_x_norm_bound": bound, "alpha_x_norm_gap": bound - profile.exponent}
    except Unmeasurable as error:
        reason = str(error)
    names = (layer.name for layer in states.layers)
    return InDepth({name: float(v) for name, v in values.items()}, dict(zip(names, sigma.tolist())), "", reason)
