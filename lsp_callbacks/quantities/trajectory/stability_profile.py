"""Learning Stability Profile: how perturbations propagate through depth, training steps, and both."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lsp_callbacks._validation import whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.training_profile import Tangents, push_tangents, random_tangents
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.cost import forward_cost, products, sample_passes
from lsp_callbacks.operators.curvature.hessian import Method, decided, path_taken, resolved
from lsp_callbacks.operators.curvature.stability_threshold import threshold_constant
from lsp_callbacks.operators.footprint import TWICE, footprint
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.trajectory.formula_tangent import state_blocks
from lsp_callbacks.operators.trajectory.frozen_preconditioner import step_constants
from lsp_callbacks.operators.trajectory.proximal import update_jacobian, update_response
from lsp_callbacks.operators.trajectory.step_jacobian import tangent_path
from lsp_callbacks.operators.trajectory.update_rules import formula
from lsp_callbacks.operators.trajectory.window import KeptStep, Window, keep
from lsp_callbacks.plots.depth_map import draw_depth_map
from lsp_callbacks.plots.figure import load
from lsp_callbacks.quantities.base import ROOT, are_measurements, scalar
from lsp_callbacks.quantities.curvature.sharpness import alignment_cost, measured_threshold
from lsp_callbacks.quantities.key import PREFIX
from lsp_callbacks.quantities.trajectory import profile_in_depth, profile_in_training
from lsp_callbacks.quantities.trajectory.profile_in_depth import in_depth
from lsp_callbacks.quantities.trajectory.profile_in_training import in_training
from lsp_callbacks.quantities.trajectory.profile_readers import explanation_reader, output_reader, seen_by
from lsp_callbacks.quantities.trajectory.window_ends import Ends, check_replays, window_ends
from lsp_callbacks.quantities.trajectory.windowed import Windowed
from lsp_callbacks.step.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Profiles that `StabilityProfile.plot` remembers.
REMEMBERED = 300
#: Cost model: layers before the first measurement, and passes that the norms of a layer take.
LAYERS, NORMS = 10, 25.0
#: Cost model: pairs of passes through the window, at most ``bounds / 2``, and vectors pushed by each.
PAIRS, ENDS = 5, 4
#: Parts of a window that only this process can use.
WHILE_RUNNING = ("kept", "logs", "start")


class StabilityProfile(Windowed):
    """Sensitivities sigma^x, sigma^theta, sigma^u and their finite exponents, in nats per layer and per step.

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
    at its own parameters, until the ends are within a factor 1.2. A random start gives an upper bound of a norm for
    every spectrum; of the noise, a subspace is computed exactly, and the rest estimated from random rows. Each interval
    fails with probability 1e-3 at most, and so does ``alpha_x_jacobian_bound``: all hold with probability 0.995;
    ``alpha_x_norm_bound`` fails with 1e-3 at most for each sequence of affine modules. These bounds apply to the
    computed products; finite differences add about 0.1 %. A real displacement of the start, ``d``, moves the outputs by
    at most ``d sigma_output_bound``, to first order in d.

    Where the steps cannot be kept (an optimizer without a formula, half precision, a window that is resumed from a
    checkpoint; `wide` gives the reason) or not be replayed later (such as a loss that depends on the step's number),
    the ends are by random directions alone, with the same probability. They hold and are far apart, about ``sqrt(P)``.

    All are numbers of one finite network and window: the limsup of the theory does not exist for them. Exponents are
    divided by the layers L or the steps T actually traversed, the endpoint is taken, and an exponent of 0 does not mean
    bounded; see `lsp_callbacks.functional.network.depth_profile` and `training_profile` for the printed claims that do
    not hold. An exponent is NaN where its sensitivity is 0.

    Args:
        horizon: T, number of steps that are pushed; one more step ends the measurement.
        directions: number of random directions; the relative standard error of an error bar from k of them is
            ``1 / sqrt(2 (k - 1))``.
        noise: number of noise rows.
        samples: number of samples of the step's batch, for sigma^x.
        probes: smallest number of training samples for sensitivities of the outputs, where the outputs are known.
        bounds: largest number of Hessian products a step for each interval; 0 keeps no steps, and the ends are wide.
        method: of the Hessian products.

    Raises:
        ValueError: for a horizon, directions or noise below 2, samples or probes below 1.

    Cost: ``directions + noise + 1`` Hessian products a step, the alignment shared with sharpness, and some 20 passes of
    a few samples through half of the network for each layer; for the intervals, from ``4 x 4`` to ``4 bounds`` Hessian
    products a step: 900 to 2,700 gradients on small networks, far fewer with ``bounds=0``. Memory: for each step of the
    window a copy of parameters, gradient, optimizer's state, buffers and batch.

    Source: Katende 2025, Secs. 2 to 4; docs/theory.md, section The Learning Stability Profile.
    """

    name = "stability_profile"
    KEYS: ClassVar = profile_in_training.KEYS | profile_in_depth.KEYS
    picture = "profile"

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
        #: Reason why there is no ``alpha_x_norm_bound``; empty where there is one.
        self.unbounded = ""
        #: Reason why there is no profile in depth; empty where there is one.
        self.undefined = ""
        #: Reason why the intervals of training are by random directions alone, and wide; empty where they are not.
        self.wide = ""
        self._sigma: dict[str, float] = {}
        self._map: list[tuple[int, tuple[float, ...]]] = []
        self._path = "exact"

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        """Return the cost of products over the window, of the norms in depth, and of passes over the probes."""
        method = resolved(snapshot, self.method)
        alignment = (
            alignment_cost(snapshot, self.method) if _has_threshold(snapshot) else {"forward": forward_cost(snapshot)}
        )
        rows, passes = self.directions + self.noise + 1, 0
        if self.bounds and tangent_path(snapshot) == "exact":
            passes = 1 + 2 * min(PAIRS, max(1, self.bounds // 2))
        # From a state that checkpoints hold, so that the cadence is the same after a resume.
        layers = float(getattr(self, f"{PREFIX}depth"))
        norms = NORMS * (LAYERS if math.isnan(layers) else layers)
        return {
            **alignment,
            "profile in time": self.horizon * (1 / 3 + products(snapshot, method, rows, tangent=True)),
            "window": passes * self.horizon * (1 / 3 + products(snapshot, method, ENDS, tangent=True)),
            "profile in depth": sample_passes(snapshot, self.samples, norms),
            "outputs": 0.0
            if snapshot.probes is None
            else sample_passes(snapshot, self.probes, 2 * (3 + rows + passes)),
        }

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        supported = tangent_path(snapshot) == "exact"
        blocks = 1 + (len(state_blocks(snapshot)) if supported else 2)  # an unknown optimizer counts as Adam
        vectors = 2 * (self.directions + self.noise + 1) * blocks
        if supported:  # the diagonals of the step
            vectors += (1 + blocks) * blocks
        if supported and self.bounds:  # parameters, gradient, state and noise of each step; bases and pushed vectors
            differences = 3 if formula(snapshot.require_optimizer()).second_moment is None else 0  # see `KeptStep.maps`
            vectors += self.horizon * (2 + blocks + differences) + ENDS * (max(1, self.bounds // 2) + 3 * blocks) + 2
        parts = product_memory(snapshot, self.method, vectors)
        parts["copies"] *= 1 + self.horizon  # each step that is kept has buffers of its own
        return {**parts, "graph of the outputs": TWICE * footprint(snapshot).activations}

    def path(self, snapshot: Snapshot) -> str:
        return self._path

    def vectors(self) -> dict[str, Any]:
        """Return the frame of the window without its steps: one that is resumed has wide intervals."""
        return {name: value for name, value in super().vectors().items() if name not in WHILE_RUNNING}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {"_frame": {k: v for k, v in self._frame.items() if k not in WHILE_RUNNING}}

    def update(self, snapshot: Snapshot) -> None:
        """Push the directions through one step; the step after the last one measures the network."""
        self.complete = False
        continues = self._continues(snapshot)
        if continues and self._frame["tangents"]["steps"] == self.horizon:
            self._finish(snapshot, Tangents(**self._frame["tangents"]))
            return
        method = self._frame["method"] if continues else decided(snapshot, self.method)
        A, B = update_jacobian(snapshot, method=method), update_response(snapshot)
        generator = snapshot.generator(self.name)
        if continues:
            now, before, mode, top = Tangents(**self._frame["tangents"]), self._frame["before"], self._mode, self._top
        else:
            sharp, mode, top = self._sharp(snapshot)
            places: dict[str, Any] = {"dtype": A.dtype, "device": A.device, "generator": generator}
            now = random_tangents(
                A.shape[1], B.shape[1], vectors=self.directions, noise=self.noise, sharp=sharp, **places
            )
            J = output_reader(snapshot, samples=self.probes)
            before = None if J is None else seen_by(J, now).diagonal()[: now.random].clone()
        kept = self._kept(snapshot, method, continues)
        start = self._frame.get("start") if continues else now.frame[0, : now.size].clone()
        logs = self._frame.get("logs", []) if continues else []
        log = now.frame_log
        now = push_tangents(now, A, B, generator)
        if not (bool(now.frame.isfinite().all()) and bool(now.noise.isfinite().all())):
            raise Unmeasurable("the pushed directions are not finite: the weights or the loss have overflowed")
        tangent = "" if tangent_path(snapshot) == "exact" else ", finite difference of step"
        self._frame = {"tangents": vars(now), "before": before, "step": snapshot.step, "method": method}
        if kept is not None:
            self._frame |= {"kept": kept, "logs": [*logs, now.frame_log - log], "start": start}
        self._mode, self._top, self._path = mode, top, path_taken(snapshot, method) + tangent

    def _sharp(self, snapshot: Snapshot) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the displacement along the sharpest mode, where there is an edge, and the next alignment's start."""
        if not _has_threshold(snapshot):
            return None, None, None
        threshold = measured_threshold(snapshot, self._mode, self._top, self.method)  # shared with sharpness
        return threshold.root * threshold.mode, threshold.mode, threshold.top

    def _kept(self, snapshot: Snapshot, method: Method, continues: bool) -> list[KeptStep] | None:
        """Return the steps of the window so far, for products at its end; None without these, with the reason."""
        if not continues:
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
        return [*(self._frame["kept"] if continues else []), step]

    def _finish(self, snapshot: Snapshot, now: Tangents) -> None:
        calls = snapshot.calls
        deep = snapshot.run.ranks.first(lambda: in_depth(snapshot, calls, samples=self.samples), self.name)
        if deep.undefined and not self.undefined and snapshot.run.ranks.rank == 0:
            warnings.warn(f"stability_profile has no numbers in depth: {deep.undefined}", stacklevel=2)
        self.undefined, self.unbounded = deep.undefined, deep.unbounded
        readers = {
            "output": output_reader(snapshot, samples=self.probes),
            "explanation": explanation_reader(snapshot, samples=self.samples),
        }
        available = {name: J for name, J in readers.items() if J is not None}
        grams = {name: seen_by(J, now) for name, J in available.items()}
        ends = self._ends(snapshot, now, list(available.values()))
        values = deep.values | in_training(now, grams, ends, self._frame["before"])
        if deep.sigma.keys() != self._sigma.keys():
            self._map = []
        self._map = [*self._map, (snapshot.step, tuple(deep.sigma.values()))][-REMEMBERED:]
        self._sigma, self._frame = deep.sigma, {}
        self.finish({name: value for name, value in values.items() if math.isfinite(value)})

    def _ends(self, snapshot: Snapshot, now: Tangents, readers: list[LinearOperator]) -> Ends | None:
        """Return intervals by products with the whole window; None where its steps cannot be replayed."""
        if self.wide:
            return None
        window = Window(self._frame["kept"], self._frame["logs"], now.noise_log)
        pairs = max(1, self.bounds // 2)

        def replayed() -> Ends:
            check_replays(window, self._frame["start"], now)
            return window_ends(snapshot, window, now, readers, pairs=pairs)

        try:
            return snapshot.run.ranks.apart(replayed)
        except Unmeasurable as error:
            self.wide = str(error)
            return None

    def compute(self) -> dict[str, Tensor]:
        """Return the numbers of the last window; NaN before one."""
        values = super().compute()
        if not bool(getattr(self, f"{PREFIX}depth").isnan()):
            values = {f"{PREFIX}{name}": getattr(self, f"{PREFIX}{name}") for name in profile_in_depth.ALWAYS} | values
        return values | {f"{PREFIX}sigma_x/{name or ROOT}": scalar(value) for name, value in self._sigma.items()}

    def plot(self, val: Any = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw sigma^x over depth and training time, of the measurements since the run began or was resumed.

        Args:
            val: ``(measurements, L)``; None takes the measured ones; measurements are drawn as by `Quantity.plot`.
            ax: to draw into; None makes a figure without a window.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: before a measurement, where no values are given.
            ImportError: without matplotlib.
        """
        if are_measurements(val):
            return super().plot(val, ax)
        steps, names = [step for step, _ in self._map], list(self._sigma)
        if val is None:
            if not self._map:
                raise ValueError("nothing has been measured yet: call update first, or pass a matrix of sigma^x")
            val = torch.tensor([row for _, row in self._map], dtype=torch.float64)
        elif val.shape != (len(steps), len(names)):
            steps, names = list(range(len(val))), [str(k + 1) for k in range(val.shape[1])]
        if ax is None:
            ax = load("matplotlib.figure").Figure(figsize=(7.2, 4.2), layout="constrained").subplots()
        assert ax is not None
        draw_depth_map(val, steps, names, ax)
        figure: Any = ax.get_figure()
        return figure, ax

    def reset(self) -> None:
        super().reset()
        self._sigma, self._map, self._path = {}, [], "exact"
        self.unbounded = self.undefined = self.wide = ""


def _has_threshold(snapshot: Snapshot) -> bool:
    try:
        threshold_constant(step_constants(snapshot))
    except Unmeasurable:
        return False
    return True
