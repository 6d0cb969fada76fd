"""The Learning Stability Profile: how perturbations propagate through depth, training steps, and both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsp_callbacks.arguments import whole
from lsp_callbacks.functional.depth_profile import depth_profile
from lsp_callbacks.functional.norm_bound import norm_bound
from lsp_callbacks.functional.sharpness import edge_constant
from lsp_callbacks.functional.training_profile import (
    Tangents,
    function_growth,
    pushed,
    tangents,
    training_profile,
)
from lsp_callbacks.linalg import push
from lsp_callbacks.operators.curvature import Method, double_backward, path_taken, resolved
from lsp_callbacks.operators.depth import depth
from lsp_callbacks.operators.footprint import TWICE, footprint, product_memory
from lsp_callbacks.operators.frozen import frozen_rule
from lsp_callbacks.operators.outputs import output_jacobian
from lsp_callbacks.operators.proximal import update_jacobian, update_response
from lsp_callbacks.operators.training import state_blocks, tangent_path
from lsp_callbacks.operators.work import forward_cost, products, sample_passes
from lsp_callbacks.quantities.base import ROOT, scalar
from lsp_callbacks.quantities.depth_map import draw
from lsp_callbacks.quantities.lyapunov import Windowed
from lsp_callbacks.quantities.sgd_diagram import matplotlib
from lsp_callbacks.quantities.sharpness import edge_cost, measured_edge
from lsp_callbacks.snapshot import Call, Snapshot, Unmeasurable, evaluating

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Profiles that `StabilityProfile.plot` remembers.
REMEMBERED = 300
#: Of the cost model: layers before the first measurement, and passes that the norms of a layer take.
LAYERS, NORMS = 10, 25.0


class StabilityProfile(Windowed):
    """The sensitivities sigma^x, sigma^theta, sigma^u and their finite exponents, in nats a layer and nats a step.

    *Depth*, at the end of the window: ``sigma^x_k = ||dX_k/dX_0||_2`` at each layer, by Lanczos, the largest over the
    samples; ``alpha_x = (1/L) log sigma^x_L``, and two bounds of it, from the norms of the layers' Jacobians and from
    those of their weights times the slopes of their activations (Thm 4.1). *Training*, over ``horizon`` real steps:
    ``sigma_theta``, the norm of ``d theta_T/d theta_0`` on a frame of random directions and the sharp one, a lower
    bound; its mean square over random directions; ``sigma_u``, the displacement by noise in the gradients. *Both*:
    ``sigma_output``, how the initial parameters move the predictions at the end, ``||J_T A_T ... A_1||`` on the frame,
    and the growth in function space.

    All are numbers of one finite network and window: the limsup of the theory does not exist for them. Exponents are
    divided by the layers L or the steps T that were travelled, the endpoint is taken, and an exponent of 0 does not
    mean bounded; see `lsp_callbacks.functional.depth_profile` and `training_profile` for what the printed claims get
    wrong. An exponent is NaN where its sensitivity is 0.

    A large alpha_x: normalise, scale the initialisation down, or decay the weights; where a bound is far above it, that
    bound is no reason to. A positive ``alpha_output`` while the loss does not fall: lower the learning rate.

    Args:
        horizon: T, steps that are pushed; one more step ends the measurement.
        directions: random ones, and as many rows of noise; an error from k of them is itself uncertain by the share
            ``1 / sqrt(2 (k - 1))``.
        samples: of the step's batch, for sigma^x.
        probes: training samples for the joint form; at least so many are taken where they are known.
        method: of the Hessian products.

    Keys: ``stability/alpha_x`` with ``_median`` (of the samples), ``_jacobian_bound``, ``_jacobian_gap`` (bound less
    truth) and, where all layers have one, ``_norm_bound`` and ``_norm_gap``; ``sigma_x/<layer>``, ``sigma_x_max``,
    ``sigma_x_residual`` (relative; the norms are lower bounds up to it); ``depth``; ``alpha_theta``, ``sigma_theta``;
    ``alpha_theta_mean_square`` and ``sigma_theta_mean_square``, ``alpha_u`` (over (T - 1) / 2 steps) and ``sigma_u``,
    each with ``_error``; ``horizon``; where outputs are told from the loss, ``sigma_output`` and ``alpha_output`` with
    ``_error``.

    Raises:
        ValueError: for a horizon or directions below 2, samples or probes below 1.

    Cost: ``2 directions + 1`` Hessian products a step, the alignment shared with sharpness, and some 20 passes of a few
    samples through half of the network for each layer.

    Source: Katende, Secs. 2 to 4; MATH section 4.
    """

    name = "stability_profile"
    keys = (
        "stability/alpha_x", "stability/alpha_x_median", "stability/alpha_x_jacobian_bound",
        "stability/alpha_x_jacobian_gap", "stability/sigma_x_max", "stability/sigma_x_residual", "stability/depth",
        "stability/alpha_theta", "stability/sigma_theta", "stability/alpha_theta_mean_square",
        "stability/alpha_theta_mean_square_error", "stability/sigma_theta_mean_square",
        "stability/sigma_theta_mean_square_error", "stability/alpha_u", "stability/alpha_u_error", "stability/sigma_u",
        "stability/sigma_u_error", "stability/horizon",
    )  # fmt: skip
    optional = (
        "stability/alpha_x_norm_bound", "stability/alpha_x_norm_gap", "stability/sigma_output",
        "stability/alpha_output", "stability/alpha_output_error",
    )  # fmt: skip
    picture = "profile"
    values: Tensor

    def __init__(
        self, horizon: int = 8, directions: int = 4, samples: int = 4, probes: int = 16, method: Method = "auto"
    ):
        super().__init__(method)
        whole("horizon", horizon, 2), whole("directions", directions, 2), whole("samples", samples, 1)
        whole("probes", probes, 1)
        self.horizon, self.directions, self.samples, self.probes = horizon, directions, samples, probes
        self.window = horizon + 1
        #: Why there is no ``alpha_x_norm_bound``; empty where there is one.
        self.unbounded = ""
        self._sigma: dict[str, float] = {}
        self._map: list[tuple[int, tuple[float, ...]]] = []
        self._way = "exact"
        names = (*self.keys, *self.optional)
        self.add_state("values", default=torch.full((len(names),), math.nan, dtype=torch.float64), persistent=True)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        """Products over the window, the norms in depth, and passes over the probes."""
        method = resolved(snapshot, self.method)
        known = edge_cost(snapshot, self.method) if _has_edge(snapshot) else {"forward": forward_cost(snapshot)}
        rows = 2 * self.directions + 1
        return {
            **known,
            "profile in time": self.horizon * (1 / 3 + products(snapshot, method, rows, tangent=True)),
            "profile in depth": sample_passes(snapshot, self.samples, NORMS * (len(self._sigma) or LAYERS)),
            "outputs": 0.0 if snapshot.probes is None else sample_passes(snapshot, self.probes, 2 * (3 + rows)),
        }

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        known = tangent_path(snapshot) == "exact"
        blocks = 1 + (len(state_blocks(snapshot)) if known else 2)  # of an unknown optimizer, as of Adam
        parts = product_memory(snapshot, self.method, 2 * (2 * self.directions + 1) * blocks)
        return {**parts, "graph of the outputs": TWICE * footprint(snapshot).activations}

    def path(self, snapshot: Snapshot) -> str:
        return self._way

    def update(self, snapshot: Snapshot) -> None:
        """Pushes the directions through one step; the one after the last looks at the network."""
        self.complete = False
        going = self._continues(snapshot)
        if going and self._frame["tangents"]["steps"] == self.horizon:
            self._finish(snapshot, Tangents(**self._frame["tangents"]))
            return
        method = self._frame["method"] if going else resolved(snapshot, self.method)
        A, B = update_jacobian(snapshot, method=method), update_response(snapshot)
        generator = snapshot.generator(self.name)
        if going:
            now, before, mode, top = Tangents(**self._frame["tangents"]), self._frame["before"], self._mode, self._top
        else:
            # What has no depth is refused now, not after all the steps.
            snapshot.ranks.first(lambda: len(depth(snapshot, samples=self.samples).layers), "the depth")
            sharp, mode, top = self._sharp(snapshot)
            places: dict[str, Any] = {"dtype": A.dtype, "device": A.device, "generator": generator}
            now = tangents(A.shape[1], B.shape[1], vectors=self.directions, sharp=sharp, **places)
            seen = self._outputs(snapshot, now)
            before = None if seen is None else seen.diagonal()[: now.random].clone()
        now = pushed(now, A, B, generator)
        if not math.isfinite(float(now.frame.sum() + now.noise.sum())):  # no entry is above 1
            raise Unmeasurable("the pushed directions are not finite: the weights or the loss have overflowed")
        tangent = "" if tangent_path(snapshot) == "exact" else ", finite difference of step"
        self._frame = {"tangents": vars(now), "before": before, "step": snapshot.step, "method": method}
        self._mode, self._top, self._way = mode, top, path_taken(snapshot, method) + tangent

    def _sharp(self, snapshot: Snapshot) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The displacement along the sharpest mode, where the optimizer has an edge, and where the next one starts."""
        if not _has_edge(snapshot):
            return None, None, None
        found = measured_edge(snapshot, self._mode, self._top, self.method)  # as sharpness asks for it
        return found.root * found.mode, found.mode, found.top

    def _outputs(self, snapshot: Snapshot, now: Tangents) -> Tensor | None:
        """The Gram matrix of what the frame does to the outputs; None where they are not told from the loss."""
        probes = snapshot.probes
        if probes is None or not probes.full:
            return None

        def gram() -> Tensor | None:
            try:
                moved = push(output_jacobian(probes, samples=self.probes), now.frame[:, : now.size]).double()
            except Unmeasurable:  # the rest of the profile does without
                return None
            return (moved @ moved.mT).cpu()

        return snapshot.ranks.first(gram, "the outputs")

    def _finish(self, snapshot: Snapshot, now: Tangents) -> None:
        calls = snapshot.calls
        values, sigma, self.unbounded = snapshot.ranks.first(lambda: self._in_depth(snapshot, calls), self.name)
        found = training_profile(now)
        own: dict[str, Any] = vars(found) | {"horizon": float(found.steps)}
        for name in ("mean_square", "mean_square_error"):
            own[f"sigma_theta_{name}"], own[f"alpha_theta_{name}"] = own[name], own[f"alpha_{name}"]
        seen = self._outputs(snapshot, now)
        if seen is not None:
            own["sigma_output"] = torch.linalg.eigvalsh(seen)[-1].clamp_min(0).sqrt() * math.exp(now.frame_log)
            if self._frame["before"] is not None:
                own["alpha_output"], own["alpha_output_error"] = function_growth(
                    self._frame["before"], seen.diagonal()[: now.random], now.frame_log, now.steps
                )
        values |= {name: float(value) for name, value in own.items()}
        names = [key.split("/")[1] for key in (*self.keys, *self.optional)]
        known = [values.get(name, math.nan) for name in names]
        self.values = torch.tensor([v if math.isfinite(v) else math.nan for v in known], dtype=torch.float64)
        if sigma.keys() != self._sigma.keys():
            self._map = []
        self._map = [*self._map, (snapshot.step, tuple(sigma.values()))][-REMEMBERED:]
        self._sigma, self._frame, self.complete = sigma, {}, True

    def _in_depth(self, snapshot: Snapshot, calls: dict[str, Call]) -> tuple[dict[str, float], dict[str, float], str]:
        """Numbers of the profile in depth, sigma^x by layer, and why the norms of the weights give no bound."""
        states = depth(snapshot, samples=self.samples)
        found = depth_profile(states.between, len(states.layers))
        sigma = found.sigma.max(1).values
        values: dict[str, Any] = {
            "alpha_x": found.exponent,
            "alpha_x_median": found.median,
            "alpha_x_jacobian_bound": found.bound,
            "alpha_x_jacobian_gap": found.bound - found.exponent,
            "sigma_x_max": sigma.max(),
            "sigma_x_residual": found.residual,
            "depth": found.depth,
        }
        reason = ""
        try:
            with evaluating(snapshot.module), double_backward(snapshot.module):
                shapes = {name: call.input_shape for name, call in calls.items()}
                bound = norm_bound(states, dict(snapshot.module.named_modules()), shapes) / found.depth
            values |= {"alpha_x_norm_bound": bound, "alpha_x_norm_gap": bound - found.exponent}
        except Unmeasurable as error:
            reason = str(error)
        names = (layer.name for layer in states.layers)
        return {name: float(v) for name, v in values.items()}, dict(zip(names, sigma.tolist())), reason

    def compute(self) -> dict[str, Tensor]:
        """The numbers of the last window; NaN before one."""
        named = dict(zip((*self.keys, *self.optional), self.values))
        found = {key: value for key, value in named.items() if key in self.keys or not bool(value.isnan())}
        return found | {f"stability/sigma_x/{name or ROOT}": scalar(value) for name, value in self._sigma.items()}

    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:  # type: ignore[override]
        """Draws sigma^x over depth and training time, of the last measurements since the run began or was resumed.

        Args:
            val: ``(measurements, L)``; None takes those that were measured.
            ax: to draw into; None makes a figure without a window.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: before a measurement, where no values are given.
            ImportError: without matplotlib.
        """
        steps, names = [step for step, _ in self._map], list(self._sigma)
        if val is None:
            if not self._map:
                raise ValueError("nothing has been measured yet: call update first, or pass a matrix of sigma^x")
            val = torch.tensor([row for _, row in self._map], dtype=torch.float64)
        elif val.shape != (len(steps), len(names)):
            steps, names = list(range(len(val))), [str(k + 1) for k in range(val.shape[1])]
        if ax is None:
            ax = matplotlib("matplotlib.figure").Figure(figsize=(7.2, 4.2), layout="constrained").subplots()
        assert ax is not None
        draw(val, steps, names, ax)
        figure: Any = ax.get_figure()
        return figure, ax

    def reset(self) -> None:
        super().reset()
        self._sigma, self._map, self.unbounded, self._way = {}, [], "", "exact"


def _has_edge(snapshot: Snapshot) -> bool:
    try:
        edge_constant(frozen_rule(snapshot))
    except Unmeasurable:
        return False
    return True
