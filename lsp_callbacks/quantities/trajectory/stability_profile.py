"""The Learning Stability Profile: how perturbations propagate through depth, training steps, and both."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsp_callbacks._validation import whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.training_profile import (
    Tangents,
    TrainingProfile,
    function_growth,
    pushed,
    tangents,
    training_profile,
)
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.linalg.logs import exp
from lsp_callbacks.operators.cost import forward_cost, products, sample_passes
from lsp_callbacks.operators.curvature.hessian import Method, path_taken, resolved
from lsp_callbacks.operators.curvature.stability_threshold import threshold_constant
from lsp_callbacks.operators.memory import TWICE, footprint, product_memory
from lsp_callbacks.operators.trajectory.formula_tangent import state_blocks
from lsp_callbacks.operators.trajectory.frozen_preconditioner import frozen_rule
from lsp_callbacks.operators.trajectory.proximal import update_jacobian, update_response
from lsp_callbacks.operators.trajectory.step_jacobian import tangent_path
from lsp_callbacks.operators.trajectory.window import KeptStep, Window, keep
from lsp_callbacks.plots.depth_map import draw
from lsp_callbacks.plots.stability_diagram import matplotlib
from lsp_callbacks.quantities.base import ROOT, scalar
from lsp_callbacks.quantities.curvature.sharpness import edge_cost, measured_edge
from lsp_callbacks.quantities.trajectory.lyapunov import Windowed
from lsp_callbacks.quantities.trajectory.profile_parts import (
    Ends,
    check_replays,
    explanation_reader,
    in_depth,
    log_sensitivity,
    output_reader,
    seen_by,
    window_ends,
)
from lsp_callbacks.step.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Profiles that `StabilityProfile.plot` remembers.
REMEMBERED = 300
#: Of the cost model: layers before the first measurement, and passes that the norms of a layer take.
LAYERS, NORMS = 10, 25.0
#: Pairs of passes through the window that its ends take, of at most ``bounds / 2``; and what is pushed by each.
PAIRS, ENDS = 5, 4
#: Of a window, what only this process can use.
WHILE_RUNNING = ("kept", "logs", "start")
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
    ``sigma_theta = ||d theta_T/d theta_0||``, and its mean square over random directions; ``sigma_u``, the root mean
    square displacement by noise in the gradients. *Both*: ``sigma_output`` and ``sigma_explanation``, how the initial
    parameters move the predictions and their input gradients at the end, ``||J_T A_T ... A_1||``, and the growth in
    function space.

    Each of these four is an interval. ``sigma_theta``, ``sigma_output`` and ``sigma_explanation`` are its lower ends,
    ``_bound`` the upper ones; ``sigma_u`` is an estimate with ``_error``, ``_lower`` and ``_bound``. They come from
    Lanczos on the whole product, its adjoint included: the steps of the window are kept, and replayed at its end, each
    at its own parameters, until the ends are within a factor 1.2. A random start bounds a norm from above whatever the
    spectrum is; of the noise, a subspace is known exactly, and random rows tell the rest. Each interval fails with
    probability 1e-3 at most, and so does ``alpha_x_jacobian_bound``: all hold with probability 0.995;
    ``alpha_x_norm_bound`` fails with 1e-3 at most for each run of affine modules. That is for the products as they are
    taken (differences err by 0.1 %). A real displacement of the start, ``d``, moves the outputs by at most
    ``d sigma_output_bound``, to first order in d.

    Where the steps cannot be kept (`wide` says why: an optimizer without a formula, half precision, a window that is
    resumed from a checkpoint) or not be replayed later (a loss that depends on the step's number, say), the ends are by
    random directions alone, with the same probability. They are honest and far apart, about ``sqrt(P)``.

    All are numbers of one finite network and window: the limsup of the theory does not exist for them. Exponents are
    divided by the layers L or the steps T that were travelled, the endpoint is taken, and an exponent of 0 does not
    mean bounded; see `lsp_callbacks.functional.network.depth_profile` and `training_profile` for what the printed
    claims get wrong. An exponent is NaN where its sensitivity is 0.

    A large alpha_x: normalise, scale the initialisation down, or decay the weights; where a bound is far above it, that
    bound is no reason to. A positive ``alpha_output`` while the loss does not fall: lower the learning rate.

    Args:
        horizon: T, steps that are pushed; one more step ends the measurement.
        directions: random ones; an error from k of them is itself uncertain by the share ``1 / sqrt(2 (k - 1))``.
        noise: rows of noise.
        samples: of the step's batch, for sigma^x.
        probes: training samples for the joint form; at least so many are taken where they are known.
        bounds: Hessian products a step for each interval, at most; 0 keeps no steps, and the ends are wide.
        method: of the Hessian products.

    Keys: ``stability/alpha_x`` with ``_median`` (of the samples), ``_jacobian_bound``, ``_jacobian_gap`` (bound less
    truth) and, where all layers have one, ``_norm_bound`` and ``_norm_gap``; ``sigma_x/<layer>``, ``sigma_x_max``,
    ``sigma_x_residual`` (relative; the norms are lower bounds up to it), ``sigma_x_converged`` (1 or 0); ``depth``; all
    these where the network has a depth, otherwise `undefined` says why; ``alpha_theta``, ``sigma_theta``;
    ``alpha_theta_mean_square`` and ``sigma_theta_mean_square``, ``alpha_u`` (over (T - 1) / 2 steps) and ``sigma_u``,
    each with ``_error``; ``horizon``; where outputs are told from the loss, ``sigma_output`` and ``alpha_output`` with
    ``_error``; where the network is smooth ``sigma_explanation``. ``sigma_theta_bound``, ``sigma_u_lower``,
    ``sigma_u_bound``, ``sigma_output_bound``, ``sigma_explanation_bound``, ``alpha_theta_bound`` and ``alpha_u_bound``;
    ``alpha_theta_gap`` and ``alpha_u_gap``, bound less value.

    Raises:
        ValueError: for a horizon, directions or noise below 2, samples or probes below 1.

    Cost: ``directions + noise + 1`` Hessian products a step, the alignment shared with sharpness, and some 20 passes of
    a few samples through half of the network for each layer; for the intervals, from ``4 x 4`` to ``4 bounds`` Hessian
    products a step. Memory: for each step of the window a copy of parameters, gradient, optimizer's state, buffers and
    batch.

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
        "stability/sigma_u_lower",
    )  # fmt: skip
    #: In the order of the state: what is new comes last, so that states of before still fit.
    stored = (*IN_DEPTH, *keys, *optional[len(IN_DEPTH) :])
    picture = "profile"
    values: Tensor

    def __init__(
        self,
        horizon: int = 8,
        directions: int = 4,
        noise: int = 16,
        samples: int = 4,
        probes: int = 16,
        bounds: int = 16,
        method: Method = "auto",
    ):
        super().__init__(method)
        whole("horizon", horizon, 2), whole("directions", directions, 2), whole("noise", noise, 2)
        whole("samples", samples, 1), whole("probes", probes, 1), whole("bounds", bounds, 0)
        self.horizon, self.directions, self.samples, self.probes = horizon, directions, samples, probes
        self.noise, self.bounds = noise, bounds
        self.window = horizon + 1
        #: Why there is no ``alpha_x_norm_bound``; empty where there is one.
        self.unbounded = ""
        #: Why there is no profile in depth; empty where there is one.
        self.undefined = ""
        #: Why the intervals of training are by random directions alone, and wide; empty where they are not.
        self.wide = ""
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
        rows, passes = self.directions + self.noise + 1, 0
        if self.bounds and tangent_path(snapshot) == "exact":
            passes = 1 + 2 * min(PAIRS, max(1, self.bounds // 2))
        # By what a checkpoint holds, so that the cadence is the same after it.
        layers = float(dict(zip(self.stored, self.values))["stability/depth"])
        norms = NORMS * (LAYERS if math.isnan(layers) else layers)
        return {
            **known,
            "profile in time": self.horizon * (1 / 3 + products(snapshot, method, rows, tangent=True)),
            "window": passes * self.horizon * (1 / 3 + products(snapshot, method, ENDS, tangent=True)),
            "profile in depth": sample_passes(snapshot, self.samples, norms),
            "outputs": 0.0
            if snapshot.probes is None
            else sample_passes(snapshot, self.probes, 2 * (3 + rows + passes)),
        }

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        known = tangent_path(snapshot) == "exact"
        blocks = 1 + (len(state_blocks(snapshot)) if known else 2)  # of an unknown optimizer, as of Adam
        vectors = 2 * (self.directions + self.noise + 1) * blocks
        if known:  # the diagonals of the step
            vectors += (1 + blocks) * blocks
        if known and self.bounds:  # parameters, gradient, state and noise of each step; bases, and what is on its way
            vectors += self.horizon * (2 + blocks) + ENDS * (max(1, self.bounds // 2) + 3 * blocks) + 2
        parts = product_memory(snapshot, self.method, vectors)
        parts["copies"] *= 1 + self.horizon  # each step that is kept has buffers of its own
        return {**parts, "graph of the outputs": TWICE * footprint(snapshot).activations}

    def path(self, snapshot: Snapshot) -> str:
        return self._way

    def vectors(self) -> dict[str, Any]:
        """As of every window; its steps cannot be saved, so that one that is resumed has wide intervals."""
        return {name: value for name, value in super().vectors().items() if name not in WHILE_RUNNING}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {"_frame": {k: v for k, v in self._frame.items() if k not in WHILE_RUNNING}}

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
            now = tangents(A.shape[1], B.shape[1], vectors=self.directions, noise=self.noise, sharp=sharp, **places)
            J = output_reader(snapshot, samples=self.probes)
            before = None if J is None else seen_by(J, now).diagonal()[: now.random].clone()
        kept = self._kept(snapshot, method, going)
        start = self._frame.get("start") if going else now.frame[0, : now.size].clone()
        logs = self._frame.get("logs", []) if going else []
        log = now.frame_log
        now = pushed(now, A, B, generator)
        if not (bool(now.frame.isfinite().all()) and bool(now.noise.isfinite().all())):
            raise Unmeasurable("the pushed directions are not finite: the weights or the loss have overflowed")
        tangent = "" if tangent_path(snapshot) == "exact" else ", finite difference of step"
        self._frame = {"tangents": vars(now), "before": before, "step": snapshot.step, "method": method}
        if kept is not None:
            self._frame |= {"kept": kept, "logs": [*logs, now.frame_log - log], "start": start}
        self._mode, self._top, self._way = mode, top, path_taken(snapshot, method) + tangent

    def _sharp(self, snapshot: Snapshot) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The displacement along the sharpest mode, where the optimizer has an edge, and where the next one starts."""
        if not _has_edge(snapshot):
            return None, None, None
        found = measured_edge(snapshot, self._mode, self._top, self.method)  # as sharpness asks for it
        return found.root * found.mode, found.mode, found.top

    def _kept(self, snapshot: Snapshot, method: Method, going: bool) -> list[KeptStep] | None:
        """The steps of the window so far, for products at its end; None where there will be none, and why."""
        if not going:
            self.wide = "" if self.bounds else "bounds=0"
        elif "kept" not in self._frame and not self.wide:
            self.wide = "the window was resumed from a checkpoint, which does not hold its steps"
        if self.wide:
            return None
        try:
            step = snapshot.run.ranks.apart(lambda: keep(snapshot, method))
        except Unmeasurable as error:
            self.wide = str(error)
            return None
        return [*(self._frame["kept"] if going else []), step]

    def _finish(self, snapshot: Snapshot, now: Tangents) -> None:
        calls = snapshot.calls
        deep = snapshot.run.ranks.first(lambda: in_depth(snapshot, calls, samples=self.samples), self.name)
        if deep.undefined and not self.undefined and snapshot.run.ranks.rank == 0:
            warnings.warn(f"stability_profile has no numbers in depth: {deep.undefined}", stacklevel=2)
        values, sigma, self.undefined, self.unbounded = deep.values, deep.sigma, deep.undefined, deep.unbounded
        readers = {
            "output": output_reader(snapshot, samples=self.probes),
            "explanation": explanation_reader(snapshot, samples=self.samples),
        }
        known = {name: J for name, J in readers.items() if J is not None}
        grams = {name: seen_by(J, now) for name, J in known.items()}
        ends = self._ends(snapshot, now, list(known.values()))
        found = training_profile(now, None if ends is None else ends.noise)
        own: dict[str, Any] = vars(found) | {"horizon": float(found.steps)}
        for name in ("mean_square", "mean_square_error"):
            own[f"sigma_theta_{name}"], own[f"alpha_theta_{name}"] = own[name], own[f"alpha_{name}"]
        steps = found.steps  # logs, as a window that explodes has exponents where its norms have overflowed
        logs = {"theta": (steps * float(found.alpha_theta), steps * float(found.alpha_theta_bound))}
        logs |= {name: log_sensitivity(gram, now) for name, gram in grams.items()}
        for i, (name, (lower, upper)) in enumerate(logs.items()):
            low, high = (-math.inf, upper) if ends is None else ends.log_norms[i]
            logs[name] = lower, upper = max(lower, low), max(lower, low, high)
            own[f"sigma_{name}"], own[f"sigma_{name}_bound"] = exp(lower), exp(upper)
        own |= _exponents(*logs["theta"], found)
        if "output" in grams and self._frame["before"] is not None:
            own["alpha_output"], own["alpha_output_error"] = function_growth(
                self._frame["before"], grams["output"].diagonal()[: now.random], now.frame_log, now.steps
            )
        values |= {name: float(value) for name, value in own.items()}
        names = [key.split("/")[1] for key in self.stored]
        numbers = [values.get(name, math.nan) for name in names]
        self.values = torch.tensor([v if math.isfinite(v) else math.nan for v in numbers], dtype=torch.float64)
        if sigma.keys() != self._sigma.keys():
            self._map = []
        self._map = [*self._map, (snapshot.step, tuple(sigma.values()))][-REMEMBERED:]
        self._sigma, self._frame, self.complete = sigma, {}, True

    def _ends(self, snapshot: Snapshot, now: Tangents, readers: list[LinearOperator]) -> Ends | None:
        """By products with the whole window, where its steps were kept and can be replayed; otherwise why not."""
        if self.wide:
            return None
        window = Window(self._frame["kept"], self._frame["logs"], now.noise_log)
        pairs = max(1, self.bounds // 2)

        def found() -> Ends:
            check_replays(window, self._frame["start"], now)
            return window_ends(snapshot, window, now, readers, pairs=pairs)

        try:
            return snapshot.run.ranks.apart(found)
        except Unmeasurable as error:
            self.wide = str(error)
            return None

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
        self.unbounded = self.undefined = self.wide = ""


def _has_edge(snapshot: Snapshot) -> bool:
    try:
        threshold_constant(frozen_rule(snapshot))
    except Unmeasurable:
        return False
    return True


def _exponents(lower: float, upper: float, found: TrainingProfile) -> dict[str, float]:
    """Return the exponents of the ends of log sigma_theta, the upper one of sigma_u, and their gaps, bound less value.

    The noise that was driven is known from random rows: up to the error of alpha_u.
    """
    lower, upper = lower / found.steps, upper / found.steps
    return {
        "alpha_theta": lower,
        "alpha_theta_bound": upper,
        "alpha_theta_gap": upper - lower if math.isfinite(lower) else math.nan,
        "alpha_u_gap": float(found.alpha_u_bound - found.alpha_u),
    }
