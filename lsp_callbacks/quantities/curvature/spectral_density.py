"""Distribution of the Hessian's eigenvalues, and how it changes along training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from lsp_callbacks._validation import choice, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.spectral_density import Spectrum, spectral_density
from lsp_callbacks.operators.cost import forward_cost, lanczos_cost
from lsp_callbacks.operators.curvature.hessian import Method, hessian, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.plots.density import axis_unit, draw_densities_over_training, draw_density
from lsp_callbacks.plots.figure import load
from lsp_callbacks.quantities.base import Quantity, are_measurements
from lsp_callbacks.quantities.key import CURVATURE, Key, standard_error
from lsp_callbacks.step.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Densities that are kept for the picture; when they are full, every other one is dropped.
KEPT = 200


class SpectralDensity(Quantity):
    """Distribution of the eigenvalues of the Hessian of a step's loss: bulk, outliers, share below zero.

    ``tr f(H) / n = E[v^T f(H) v]`` over random unit vectors v, each by Lanczos quadrature. Eigenvalues that Lanczos has
    resolved one by one are removed from the estimates, see `lsp_callbacks.functional.curvature.spectral_density`, so
    that few vectors are enough. Most eigenvalues of a network's Hessian are so near 0 that no affordable number of
    steps determines their sign: the share that is certainly negative and the share that is undecided are two numbers.

    The largest eigenvalue is `Sharpness`. The number of outliers is not the number of classes: it grows as the bulk
    shrinks. The distance of the bulk to a Marchenko-Pastur law is that of distributions, 0 to 1, see
    `lsp_callbacks.functional.MarchenkoPastur`; the numbers of the law are reported where it is at most 0.1.

    Args:
        probes: random vectors.
        steps: Lanczos steps of each.
        method: of the Hessian products, see `lsp_callbacks.operators.hessian`.

    Raises:
        ValueError: for fewer than 2 probes or 3 steps, or an unknown method.

    Cost: ``probes * steps`` Hessian products, each orthogonalised against up to ``steps`` vectors: 200 gradients at the
    defaults, or 300 with kinks.

    Source: Ghorbani, Krishnan & Xiao 2019; Ubaru, Chen & Saad 2017.
    """

    name = "spectral_density"
    KEYS: ClassVar = {
        "hessian_trace": Key("Sum of the Hessian's eigenvalues.", CURVATURE),
        "hessian_trace_error": standard_error("hessian_trace", CURVATURE),
        "hessian_negative_mass": Key("Share of the eigenvalues that are certainly below 0, up to its error."),
        "hessian_negative_mass_error": standard_error("hessian_negative_mass"),
        "hessian_zero_mass": Key("Share of the eigenvalues whose sign is undecided, or within 0.1 % of the largest."),
        "hessian_min": Key(
            "Upper bound of the smallest eigenvalue.",
            CURVATURE,
            "Below 0 by more than its residual, the weights are at a saddle and no critical rate of a quadratic model "
            "holds along it: train on, or warm up for longer.",
        ),
        "hessian_min_residual": Key("An eigenvalue lies within this distance of hessian_min.", CURVATURE),
        "hessian_effective_rank": Key("tr(H)^2 / tr(H^2); absent where H is 0.", optional=True),
        "hessian_effective_rank_error": standard_error("hessian_effective_rank", optional=True),
        "hessian_outliers": Key(
            "Number of single eigenvalues beyond a gap on either side of the bulk.",
            "eigenvalues",
            "A few far above hessian_bulk_edge alone limit the learning rate: a preconditioner or a normalisation that "
            "reduces them allows a larger one.",
            optional=True,
        ),
        "hessian_bulk_edge": Key("Lower bound of the largest eigenvalue of the bulk.", CURVATURE, optional=True),
        "hessian_mp_distance": Key("Distance of the bulk from a Marchenko-Pastur law, 0 to 1.", optional=True),
        "hessian_mp_ratio": Key("Rows by columns of the random matrix of that law.", optional=True),
        "hessian_mp_scale": Key("Mean of that law without its zeros.", CURVATURE, optional=True),
        "hessian_mp_zero_mass": Key("Share of zeros in that law.", optional=True),
    }
    picture = "spectrum"

    def __init__(self, probes: int = 2, steps: int = 40, method: Method = "auto"):
        super().__init__()
        self.probes, self.steps = whole("probes", probes, 2), whole("steps", steps, 3)
        self.method: Method = choice("method", method, *get_args(Method))
        self._forget()

    def _forget(self) -> None:
        self.latest: Spectrum | None = None
        self.history: list[tuple[int, Spectrum]] = []
        self._stride, self._count = 1, 0

    def check(self, snapshot: Snapshot) -> None:
        if snapshot.unsupported:  # its gradient may be that of other batches, too
            raise Unmeasurable(snapshot.unsupported)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        n = sum(p.numel() for p in snapshot.parameters.values())
        runs, steps = (self.probes, self.steps) if self.steps < n else (1, n)
        density = lanczos_cost(snapshot, resolved(snapshot, self.method), steps, runs)
        return {"forward": forward_cost(snapshot), "density": density}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        """Return the bytes of a Lanczos basis and of the random starts."""
        return product_memory(snapshot, self.method, self.steps + self.probes)

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step."""
        self.complete = False
        spectrum = spectral_density(
            hessian(snapshot, method=self.method),
            probes=self.probes,
            steps=self.steps,
            generator=snapshot.generator(self.name),
        )
        if not math.isfinite(spectrum.square):
            raise Unmeasurable("the Hessian's products are not finite: the weights or the loss have overflowed")
        if self._count % self._stride == 0:
            if len(self.history) == KEPT:
                self.history, self._stride = self.history[::2], 2 * self._stride
            self.history = [*self.history, (snapshot.step, spectrum)]
        self._count += 1
        self.latest = spectrum
        self.finish(_values(spectrum))

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Figure, Any]:
        """Draw the last density with its outliers and fit and, below, all densities so far over training.

        Densities from before a resume are missing: checkpoints do not hold them.

        Args:
            val: a density to be drawn alone; None takes the last one; measurements are drawn as by `Quantity.plot`.
            ax: to draw the density into, alone; None makes a figure without a window.

        Returns:
            The figure, and its axes or a list of them.

        Raises:
            ValueError: before a measurement, where no density is given.
            ImportError: without matplotlib.
        """
        if are_measurements(val):
            return super().plot(val, ax)
        spectrum = self.latest if val is None else val
        if spectrum is None:
            raise ValueError("nothing has been measured yet: call update first, or pass a Spectrum")
        history = self.history if val is None and ax is None else []
        if len(history) > 1:
            figure = load("matplotlib.figure").Figure(figsize=(7.2, 6.4), layout="constrained")
            axes = list(figure.subplots(2, sharex=True))
            draw_density(spectrum, axes[0], unit=axis_unit([past for _, past in history]))
            draw_densities_over_training(history, axes[1])  # its limits and ticks hold for both
            return figure, axes
        if ax is None:
            ax = load("matplotlib.figure").Figure(figsize=(7.2, 3.6), layout="constrained").subplots()
        draw_density(spectrum, ax)
        ax.set_xlabel("eigenvalue of the Hessian")
        return ax.get_figure(), ax

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        """Do nothing: a measurement remembers nothing for the next one, and the picture keeps its densities."""

    def reset(self) -> None:
        super().reset()
        self._forget()


def _values(spectrum: Spectrum) -> dict[str, float]:
    """Return the numbers by name; NaN where one is not defined."""
    fit = spectrum.fit
    values = {
        "trace": spectrum.trace,
        "trace_error": spectrum.trace_error,
        "negative_mass": spectrum.negative,
        "negative_mass_error": spectrum.negative_error,
        "zero_mass": spectrum.zero,
        "min": spectrum.least,
        "min_residual": spectrum.least_residual,
        "effective_rank": spectrum.effective_rank,
        "effective_rank_error": spectrum.effective_rank_error,
    }
    if spectrum.outliers is not None:
        values["outliers"] = float(len(spectrum.outliers))
    if spectrum.bulk is not None:
        values["bulk_edge"] = spectrum.bulk[1]
    if fit is not None:
        values["mp_distance"] = fit.distance
        if fit.alike:
            values |= {"mp_ratio": fit.ratio, "mp_scale": fit.scale, "mp_zero_mass": fit.zero_mass}
    return {f"hessian_{name}": value for name, value in values.items()}
