"""The Learning Stability Profile: how perturbations propagate through depth, training steps, and both."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsp_callbacks.arguments import whole
from lsp_callbacks.functional.sharpness import edge_constant
from lsp_callbacks.functional.training_profile import (
    NormBounds,
    Tangents,
    function_growth,
    pushed,
    tangents,
    training_profile,
)
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.curvature import Method, path_taken, resolved
from lsp_callbacks.operators.footprint import TWICE, footprint, product_memory
from lsp_callbacks.operators.frozen import frozen_rule
from lsp_callbacks.operators.proximal import update_jacobian, update_response
from lsp_callbacks.operators.step_norm import basis_size, response_size, state_scale, step_norm
from lsp_callbacks.operators.training import state_blocks, tangent_path
from lsp_callbacks.operators.work import forward_cost, products, sample_passes
from lsp_callbacks.quantities.base import ROOT, scalar
from lsp_callbacks.quantities.depth_map import draw
from lsp_callbacks.quantities.lyapunov import Windowed
from lsp_callbacks.quantities.profile_parts import FAILURE, explanations_moved, in_depth, outputs_moved
from lsp_callbacks.quantities.sgd_diagram import matplotlib
from lsp_callbacks.quantities.sharpness import edge_cost, measured_edge
from lsp_callbacks.snapshot import Snapshot, Unmeasurable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Profiles that `StabilityProfile.plot` remembers.
REMEMBERED = 300
#: Of the cost model: layers before the first measurement, and passes that the norms of a layer take.
LAYERS, NORMS = 10, 25.0
#: What a network without a depth does not have.
IN_DEPTH = (
    "stability/alpha_x", "stability/alpha_x_median", "stability/alpha_x_jacobian_bound",
    "stability/alpha_x_jacobian_gap", "stability/sigma_x_max", "stability/sigma_x_residual", "stability/depth",
)  # fmt: skip


class StabilityProfile(Windowed):
    """The sensitivities sigma^x, sigma^theta, sigma^u and their finite exponents, in nats a layer and nats a step.

    *Depth*, at the end of the window: ``sigma^x_k = ||dX_k/dX_0||_2`` at each layer, by Lanczos, the largest over the
    samples; ``alpha_x = (1/L) log sigma^x_L``, and two bounds of it, from the norms of the layers' Jacobians and from
    those of their weights times the slopes of their activations (Thm 4.1). *Training*, over ``horizon`` real steps:
    ``sigma_theta``, the norm of ``d theta_T/d theta_0`` on a frame of random directions and the sharp one, a lower
    bound; its mean square over random directions; ``sigma_u``, the displacement by noise in the gradients. *Both*:
    ``sigma_output`` and ``sigma_explanation``, how the initial parameters move the predictions and their input
    gradients at the end, ``||J_T A_T ... A_1||`` on the frame, and the growth in function space.

    Bounds from one-step norms: ``sigma_theta_bound = prod_t ||A_t||``, ``sigma_u_bound = (sum_s (prod_(t > s)
    ||A_t||)^2 ||B_s||_F^2 / P)^(1/2)``, and ``||J_T||`` times the first. Over the starts of Lanczos those of training
    fail with probability 1e-3 at most, all together, ``||J_T||`` of outputs and of explanations with 1e-3 each, and
    ``alpha_x_jacobian_bound`` with another: all of these hold with probability 0.996. ``alpha_x_norm_bound`` fails with
    1e-3 at most for each run of affine modules. That is for the products as they are taken (differences err by 0.1 %).
    With momentum or a preconditioner norms are those of parameters and state in the weights of
    `operators.step_norm.state_scale` at the window's start; they are 1 on the parameters, so that the bounds are
    Euclidean there. Under momentum a product of norms is loose (up to 1.6 a step at beta = 0.9), under Adam in its
    first steps it says nothing. A real displacement of the start, ``d``, moves the outputs by at most
    ``d sigma_output_bound``, to first order in d.

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
        bounds: Hessian products a step for its norm; 0 leaves out the bounds of training.
        method: of the Hessian products.

    Keys: ``stability/alpha_x`` with ``_median`` (of the samples), ``_jacobian_bound``, ``_jacobian_gap`` (bound less
    truth) and, where all layers have one, ``_norm_bound`` and ``_norm_gap``; ``sigma_x/<layer>``, ``sigma_x_max``,
    ``sigma_x_residual`` (relative; the norms are lower bounds up to it), ``sigma_x_converged`` (1 or 0); ``depth``; all
    these where the network has a depth, otherwise `undefined` says why; ``alpha_theta``, ``sigma_theta``;
    ``alpha_theta_mean_square`` and ``sigma_theta_mean_square``, ``alpha_u`` (over (T - 1) / 2 steps) and ``sigma_u``,
    each with ``_error``; ``horizon``; where outputs are told from the loss, ``sigma_output`` and ``alpha_output`` with
    ``_error``; where the network is smooth ``sigma_explanation``. ``sigma_theta_bound``, ``sigma_u_bound``,
    ``sigma_output_bound``, ``sigma_explanation_bound``, ``alpha_theta_bound`` and ``alpha_u_bound`` with ``_gap``
    (bound less truth): where the optimizer has a formula, else `unbounded_training` says why.

    Raises:
        ValueError: for a horizon or directions below 2, samples or probes below 1.

    Cost: ``2 directions + 1 + bounds`` Hessian products a step, the alignment shared with sharpness, and some 20 passes
    of a few samples through half of the network for each layer: 510 gradients, or 570 with kinks; without the bounds
    170 and 230.

    Source: Katende, Secs. 2 to 4; MATH section 4.
    """

    name = "stability_profile"
    keys = (
        "stability/alpha_theta", "stability/sigma_theta", "stability/alpha_theta_mean_square",
        "stability/alpha_theta_mean_square_error", "stability/sigma_theta_mean_square",
        "stability/sigma_theta_mean_square_error", "stability/alpha_u", "stability/alpha_u_error", "stability/sigma_u",
        "stability/sigma_u_error", "stability/horizon",
    )  # fmt: skip
    optional = (
        *IN_DEPTH, "stability/alpha_x_norm_bound", "stability/alpha_x_norm_gap", "stability/sigma_output",
        "stability/alpha_output", "stability/alpha_output_error", "stability/sigma_x_converged",
        "stability/sigma_theta_bound", "stability/alpha_theta_bound", "stability/alpha_theta_gap",
        "stability/sigma_u_bound", "stability/alpha_u_bound", "stability/alpha_u_gap",
        "stability/sigma_output_bound", "stability/sigma_explanation", "stability/sigma_explanation_bound",
    )  # fmt: skip
    #: In the order of the state: what is new comes last, so that states of before still fit.
    stored = (*IN_DEPTH, *keys, *optional[len(IN_DEPTH) :])
    picture = "profile"
    values: Tensor

    def __init__(
        self,
        horizon: int = 8,
        directions: int = 4,
        samples: int = 4,
        probes: int = 16,
        bounds: int = 16,
        method: Method = "auto",
    ):
        super().__init__(method)
        whole("horizon", horizon, 2), whole("directions", directions, 2), whole("samples", samples, 1)
        whole("probes", probes, 1), whole("bounds", bounds, 0)
        self.horizon, self.directions, self.samples, self.probes = horizon, directions, samples, probes
        self.bounds = bounds
        self.window = horizon + 1
        #: Why there is no ``alpha_x_norm_bound``; empty where there is one.
        self.unbounded = ""
        #: Why there is no profile in depth; empty where there is one.
        self.undefined = ""
        #: Why ``sigma_theta`` and ``sigma_u`` have no bounds; empty where they have.
        self.unbounded_training = ""
        self._sigma: dict[str, float] = {}
        self._map: list[tuple[int, tuple[float, ...]]] = []
        self._way = "exact"
        self.add_state(
            "values", default=torch.full((len(self.stored),), math.nan, dtype=torch.float64), persistent=True
        )

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        """Products over the window, the norms in depth, and passes over the probes."""
        method = resolved(snapshot, self.method)
        known = edge_cost(snapshot, self.method) if _has_edge(snapshot) else {"forward": forward_cost(snapshot)}
        rows, adjoint = 2 * self.directions + 1, self.bounds if tangent_path(snapshot) == "exact" else 0
        # By what a checkpoint holds, so that the cadence is the same after it.
        layers = float(dict(zip(self.stored, self.values))["stability/depth"])
        norms = NORMS * (LAYERS if math.isnan(layers) else layers)
        seen = 2 * (3 + rows + 2 * self.bounds)
        return {
            **known,
            "profile in time": self.horizon * (1 / 3 + products(snapshot, method, rows + adjoint, tangent=True)),
            "profile in depth": sample_passes(snapshot, self.samples, norms),
            "outputs": 0.0 if snapshot.probes is None else sample_passes(snapshot, self.probes, seen),
        }

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        known = tangent_path(snapshot) == "exact"
        blocks = 1 + (len(state_blocks(snapshot)) if known else 2)  # of an unknown optimizer, as of Adam
        vectors = 2 * (2 * self.directions + 1) * blocks
        if known:  # the diagonals of the step, the weights of its norm and the basis for that: more than an edge takes
            vectors += basis_size(snapshot, self.bounds) + (1 + blocks) * blocks + blocks
        parts = product_memory(snapshot, self.method, vectors)
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
            sharp, mode, top = self._sharp(snapshot)
            places: dict[str, Any] = {"dtype": A.dtype, "device": A.device, "generator": generator}
            now = tangents(A.shape[1], B.shape[1], vectors=self.directions, sharp=sharp, **places)
            seen = outputs_moved(snapshot, now, samples=self.probes)
            before = None if seen is None else seen.gram.diagonal()[: now.random].clone()
        bounds = self._bounded(snapshot, A, going)
        now = pushed(now, A, B, generator)
        if not math.isfinite(float(now.frame.sum() + now.noise.sum())):  # no entry is above 1
            raise Unmeasurable("the pushed directions are not finite: the weights or the loss have overflowed")
        tangent = "" if tangent_path(snapshot) == "exact" else ", finite difference of step"
        self._frame = {"tangents": vars(now), "before": before, "step": snapshot.step, "method": method} | bounds
        self._mode, self._top, self._way = mode, top, path_taken(snapshot, method) + tangent

    def _sharp(self, snapshot: Snapshot) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The displacement along the sharpest mode, where the optimizer has an edge, and where the next one starts."""
        if not _has_edge(snapshot):
            return None, None, None
        found = measured_edge(snapshot, self._mode, self._top, self.method)  # as sharpness asks for it
        return found.root * found.mode, found.mode, found.top

    def _bounded(self, snapshot: Snapshot, A: LinearOperator, going: bool) -> dict[str, Any]:
        """Of the frame: the bounds so far, and the weights of their norm; nothing where there are none, and why."""
        if going:
            scale, before = self._frame.get("scale"), NormBounds(**self._frame.get("bounds", {}))
        else:
            scale, before, self.unbounded_training = None, NormBounds(), "" if self.bounds else "bounds=0"
            try:
                scale = state_scale(snapshot) if self.bounds else None
            except Unmeasurable as error:
                self.unbounded_training = str(error)
        if scale is None:
            return {}
        failure, generator = FAILURE / self.horizon / 2, snapshot.generator(f"{self.name} bounds")
        norm = step_norm(snapshot, A, scale, products=self.bounds, failure=failure, generator=generator)
        after = before.after(norm, response_size(snapshot, scale, failure=failure))
        return {"scale": scale, "bounds": vars(after)}

    def _finish(self, snapshot: Snapshot, now: Tangents) -> None:
        calls = snapshot.calls
        deep = snapshot.ranks.first(lambda: in_depth(snapshot, calls, samples=self.samples), self.name)
        if deep.undefined and not self.undefined and snapshot.ranks.rank == 0:
            warnings.warn(f"stability_profile has no numbers in depth: {deep.undefined}", stacklevel=2)
        values, sigma, self.undefined, self.unbounded = deep.values, deep.sigma, deep.undefined, deep.unbounded
        found = training_profile(now)
        own: dict[str, Any] = vars(found) | {"horizon": float(found.steps)}
        for name in ("mean_square", "mean_square_error"):
            own[f"sigma_theta_{name}"], own[f"alpha_theta_{name}"] = own[name], own[f"alpha_{name}"]
        bounds = NormBounds(**self._frame["bounds"]) if "bounds" in self._frame else None
        own |= {} if bounds is None else bounds.beside(found)
        if bounds is not None and (math.isnan(bounds.log_theta) or math.isnan(bounds.log_noise)):
            self.unbounded_training = "the norm of a step is not a number"
        log_theta, steps = (None, 0) if bounds is None else (bounds.log_theta, self.bounds)
        seen = outputs_moved(snapshot, now, samples=self.probes, steps=steps)
        if seen is not None:
            own["sigma_output"], own["sigma_output_bound"] = seen.sensitivity(now, log_theta)
            if self._frame["before"] is not None:
                own["alpha_output"], own["alpha_output_error"] = function_growth(
                    self._frame["before"], seen.gram.diagonal()[: now.random], now.frame_log, now.steps
                )
        explained = explanations_moved(snapshot, now, samples=self.samples, steps=steps)
        if explained is not None:
            own["sigma_explanation"], own["sigma_explanation_bound"] = explained.sensitivity(now, log_theta)
        values |= {name: float(value) for name, value in own.items()}
        names = [key.split("/")[1] for key in self.stored]
        known = [values.get(name, math.nan) for name in names]
        self.values = torch.tensor([v if math.isfinite(v) else math.nan for v in known], dtype=torch.float64)
        if sigma.keys() != self._sigma.keys():
            self._map = []
        self._map = [*self._map, (snapshot.step, tuple(sigma.values()))][-REMEMBERED:]
        self._sigma, self._frame, self.complete = sigma, {}, True

    def compute(self) -> dict[str, Tensor]:
        """The numbers of the last window; NaN before one."""
        named = dict(zip(self.stored, self.values))
        always = self.keys if bool(named["stability/depth"].isnan()) else (*self.keys, *IN_DEPTH)
        found = {key: value for key, value in named.items() if key in always or not bool(value.isnan())}
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
        self._sigma, self._map, self._way = {}, [], "exact"
        self.unbounded = self.undefined = self.unbounded_training = ""


def _has_edge(snapshot: Snapshot) -> bool:
    try:
        edge_constant(frozen_rule(snapshot))
    except Unmeasurable:
        return False
    return True
