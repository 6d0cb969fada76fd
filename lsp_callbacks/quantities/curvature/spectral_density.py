"""The distribution of the Hessian's eigenvalues, and its course along training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.spectral_density import Spectrum, spectral_density
from lsp_callbacks.operators.cost import forward_cost, lanczos_cost
from lsp_callbacks.operators.curvature.hessian import Method, hessian, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.plots.density import axis_unit, draw_course, draw_density
from lsp_callbacks.plots.stability_diagram import matplotlib
from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.step.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Densities that are kept for the picture; when they are full, every other one is dropped.
KEPT = 200


class SpectralDensity(Quantity):
    """How the eigenvalues of the Hessian of a step's loss are distributed: bulk, outliers, share below zero.

    ``tr f(H) / n = E[v^T f(H) v]`` over random unit vectors v, each by Lanczos quadrature. What the runs have resolved
    one by one is taken out of the estimates, see `lsp_callbacks.functional.curvature.spectral_density`, so that few
    vectors do. Most eigenvalues of a network's Hessian are so near 0 that no affordable number of steps tells their
    sign: the share that is surely negative and the share that is undecided are two numbers.

    ``hessian_min`` well below 0, beyond its residual, is a direction in which the loss curves down: the step is near
    no minimum, and a critical rate from a quadratic model with a minimum does not bound anything along it; train on, or
    warm up for longer, before you trust one. When a few outliers stand far above ``hessian_bulk_edge``, the learning
    rate is limited by them alone: a preconditioner or normalisation that takes them down allows a larger one.

    Args:
        probes: random vectors.
        steps: Lanczos steps of each.
        method: of the Hessian products, see `lsp_callbacks.operators.hessian`.

    Keys, under ``stability/``: ``hessian_trace``, ``hessian_effective_rank`` (``tr(H)^2 / tr(H^2)``, absent for H = 0)
    and ``hessian_negative_mass`` (a lower bound of the share below 0, up to its error), each with its standard
    ``_error``; ``hessian_zero_mass`` (undecided, or within a thousandth of the largest); ``hessian_min``, an upper
    bound of the smallest eigenvalue, and ``hessian_min_residual``, within which some eigenvalue lies, in the units of
    H. Where a bulk can be told: ``hessian_outliers``, how many single eigenvalues were resolved beyond a gap on either
    side of it (not the number of classes: it grows as the bulk shrinks); ``hessian_bulk_edge``, a lower bound of its
    largest eigenvalue; ``hessian_mp_distance`` between it and a Marchenko-Pastur law with its first moments, 0 to 1
    (see `lsp_callbacks.functional.MarchenkoPastur`); and, where that is at most 0.1, ``hessian_mp_ratio``,
    ``hessian_mp_scale`` and ``hessian_mp_zero_mass`` of the law. The largest eigenvalue is `Sharpness`.

    Raises:
        ValueError: for bad arguments.

    Cost: ``probes * steps`` Hessian products, and ``steps`` vectors over all parameters that each new one is compared
    with: 200 gradients at the defaults, or 300 with kinks.

    Source: Ghorbani, Krishnan & Xiao 2019; Ubaru, Chen & Saad 2017.
    """

    name = "spectral_density"
    keys = (
        "stability/hessian_trace", "stability/hessian_trace_error", "stability/hessian_negative_mass",
        "stability/hessian_negative_mass_error", "stability/hessian_zero_mass", "stability/hessian_min",
        "stability/hessian_min_residual",
    )  # fmt: skip
    optional = (
        "stability/hessian_effective_rank", "stability/hessian_effective_rank_error", "stability/hessian_outliers",
        "stability/hessian_bulk_edge", "stability/hessian_mp_distance", "stability/hessian_mp_ratio",
        "stability/hessian_mp_scale", "stability/hessian_mp_zero_mass",
    )  # fmt: skip
    picture = "spectrum"
    values: Tensor

    def __init__(self, probes: int = 2, steps: int = 40, method: Method = "auto"):
        super().__init__()
        self.probes, self.steps = whole("probes", probes, 2), whole("steps", steps, 3)
        self.method: Method = choice("method", method, *get_args(Method))
        nothing = torch.full((len(self.keys) + len(self.optional),), math.nan, dtype=torch.float64)
        self.add_state("values", default=nothing, persistent=True)
        self._forget()

    def _forget(self) -> None:
        self.latest: Spectrum | None = None
        self.course: list[tuple[int, Spectrum]] = []
        self._stride, self._seen = 1, 0

    def check(self, snapshot: Snapshot) -> None:
        if snapshot.unsupported:  # its gradient may be that of other batches, too
            raise Unmeasurable(snapshot.unsupported)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        n = sum(p.numel() for p in snapshot.parameters.values())
        runs, steps = (self.probes, self.steps) if self.steps < n else (1, n)
        density = lanczos_cost(snapshot, resolved(snapshot, self.method), steps, runs)
        return {"forward": forward_cost(snapshot), "density": density}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        """A basis, and the starts."""
        return product_memory(snapshot, self.method, self.steps + self.probes)

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        found = spectral_density(
            hessian(snapshot, method=self.method),
            probes=self.probes,
            steps=self.steps,
            generator=snapshot.generator(self.name),
        )
        if not math.isfinite(found.square):
            raise Unmeasurable("the Hessian's products are not finite: the weights or the loss have overflowed")
        self.values = torch.tensor(_values(found), dtype=torch.float64)
        if self._seen % self._stride == 0:
            if len(self.course) == KEPT:
                self.course, self._stride = self.course[::2], 2 * self._stride
            self.course = [*self.course, (snapshot.step, found)]
        self._seen += 1
        self.latest, self.complete = found, True

    def compute(self) -> dict[str, Tensor]:
        """The last measurement; what it does not define is left out."""
        found = dict(zip((*self.keys, *self.optional), self.values))
        return {key: value for key, value in found.items() if key in self.keys or not bool(value.isnan())}

    def plot(self, val: Spectrum | None = None, ax: Any = None) -> tuple[Figure, Any]:  # type: ignore[override]
        """Draws the last density with its outliers and fit and, below, all densities so far over training.

        Those before a resume are not among them: they are in no checkpoint.

        Args:
            val: a density of its own, alone; None takes the last one.
            ax: to draw the density into, alone; None makes a figure without a window.

        Returns:
            The figure, and its axes or a list of them.

        Raises:
            ValueError: before a measurement, where no density is given.
            ImportError: without matplotlib.
        """
        found = self.latest if val is None else val
        if found is None:
            raise ValueError("nothing has been measured yet: call update first, or pass a Spectrum")
        course = self.course if val is None and ax is None else []
        if len(course) > 1:
            new = matplotlib("matplotlib.figure").Figure(figsize=(7.2, 6.4), layout="constrained")
            axes = list(new.subplots(2, sharex=True))
            draw_density(found, axes[0], unit=axis_unit([each for _, each in course]))
            draw_course(course, axes[1])  # its limits and ticks hold for both
            return new, axes
        if ax is None:
            ax = matplotlib("matplotlib.figure").Figure(figsize=(7.2, 3.6), layout="constrained").subplots()
        draw_density(found, ax)
        ax.set_xlabel("eigenvalue of the Hessian")
        return ax.get_figure(), ax

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        """There are none: a measurement remembers nothing for the next one, and a picture forgets nothing."""

    def reset(self) -> None:
        super().reset()
        self._forget()


def _values(found: Spectrum) -> list[float]:
    """In the order of the keys; NaN where there is none."""
    fit, nan = found.fit, math.nan
    return [
        found.trace, found.trace_error, found.negative, found.negative_error, found.zero, found.least,
        found.least_residual, found.effective_rank, found.effective_rank_error,
        nan if found.outliers is None else float(len(found.outliers)), nan if found.bulk is None else found.bulk[1],
        nan if fit is None else fit.distance,
        *((fit.ratio, fit.scale, fit.zero_mass) if fit is not None and fit.alike else (nan, nan, nan)),
    ]  # fmt: skip
