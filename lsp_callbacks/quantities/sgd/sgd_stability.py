"""Stability of SGD itself: its exponent at the current weights, and the largest stable learning rates."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lsp_callbacks._validation import whole
from lsp_callbacks.functional.sgd.sgd_stability import Sampling
from lsp_callbacks.functional.sgd.stability_diagram import StabilityDiagram, stability_diagram
from lsp_callbacks.operators.sgd.frozen_sgd import FrozenSGD, critical_rule, frozen_sgd, require_curvature
from lsp_callbacks.operators.trajectory.coming_preconditioner import gradients_missing
from lsp_callbacks.plots.figure import load
from lsp_callbacks.plots.stability_diagram import draw_stability_diagram
from lsp_callbacks.quantities.base import Quantity, are_measurements
from lsp_callbacks.quantities.key import NATS, PREFIX, Key, standard_error
from lsp_callbacks.quantities.sgd.diagram_around_step import diagram_around_step
from lsp_callbacks.quantities.sgd.frozen_exponents import RandomProduct, details, exponents, moment
from lsp_callbacks.quantities.sgd.probe_cost import kernel_cost, kernel_memory
from lsp_callbacks.step.replay_checks import verify, verify_gradient
from lsp_callbacks.step.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Outputs of a sample that the memory model assumes before the first measurement.
OUTPUTS = 10
#: Numbers that only come with a horizon, and those of each moment that is asked for.
DETAILS = {
    "sgd_lyapunov_least": Key(
        "Lower bound of sgd_lyapunov for plain SGD: the mean of all exponents.", NATS, optional=True
    ),
    "sgd_lyapunov_most": Key("Upper bound of sgd_lyapunov: half the second moment's exponent.", NATS, optional=True),
    "sgd_lyapunov_finite": Key("Mean exponent of runs of so many steps as the horizon.", NATS, optional=True),
    "sgd_lyapunov_finite_spread": Key("Standard deviation of that exponent between runs.", NATS, optional=True),
    "kernel_margin": Key(
        "min |1 - lr k_ii| of the Gram matrix; at 0 the point is not regular (Chemnitz & Engel, definition 2.2).",
        optional=True,
    ),
    "kernel_components": Key(
        "Connected components of the Gram matrix; with more than one the point is not regular.", optional=True
    ),
}
MOMENTS = {
    2: Key("Growth of E ||A_n ... A_1||^2 (definition A.2), exact for these probes.", NATS, optional=True),
    4: Key(
        "Growth of E ||A_n ... A_1||^4, exact for these probes.",
        NATS,
        "Above 0 while sgd_lyapunov is negative, rare runs explode: lower the learning rate.",
        optional=True,
    ),
}


class SGDStability(Quantity):
    """Learning rate relative to the critical one, at which SGD itself loses linear stability.

    From the Gram matrix K of per-sample output gradients at a probe set, the optimizer's momentum and the loader's
    batch size: the top exponent ``lambda`` of the random product of steps frozen at the current weights, the smallest
    rate at which it turns positive, and the largest at which the second moment is bounded. Unlike sharpness it takes
    batch noise into account, with momentum too. Adam, AdamW, RMSprop and Adagrad are measured with their preconditioner
    frozen. It is a statement of *linear* stability, of the Gauss-Newton matrix, without dropout. Theorem B of Chemnitz
    & Engel, by which the sign of lambda decides, is proved for one output, batches of one and plain SGD; elsewhere it
    is linear stability.

    Under BatchNorm the probes are divided into batches of the size that training normalises, each differentiated
    through its own statistics, and steps draw whole batches (`lsp_callbacks.operators.sgd.frozen_sgd`);
    frozen BatchNorm (in eval mode during training) uses its running statistics, as the step does. A hand-written
    normalisation over the batch is recognised by its buffers ``running_mean`` and ``running_var``.

    Args:
        probes: number of training samples to look at; the first that the loader gives.
        outputs: "top" takes one row a sample, of the outputs' combination that moves most; "all" takes every output.
        sampling: how batches are drawn; "reshuffle" needs all training samples as probes.
        replacement: whether samples are drawn with replacement within a batch.
        chains: number of simulated random products.
        steps: length of each of them.
        horizon: also report exponents over so many steps, bounds of the exponent, and the regularity of the point; None
            leaves them out.
        moments: p of the moment exponents to report, 2 or 4 or both; 4 is left out with a warning where K has more than
            24 modes, 8 with momentum (`functional.moment_exponent`): take few probes.
        most_rows: weights that are used outside of their own layer, and all under BatchNorm, take a backward pass for
            each row of K; where that would be more than so many, the quantity is skipped.

    Raises:
        ValueError: for an argument out of its range; for moments of steps that are not independent.

    Cost: three passes over the probes and some 50 ms: 6 gradients, several times that on a small network. With a
    preconditioner every two probes are multiplied for each weight: 33 gradients. Layers that are no plain linear map of
    their input (attention) are run sample by sample, which costs more. Under BatchNorm two thirds of a gradient for
    each probe: 85 gradients for 128, fewer where batches are larger than the probes.

    Source: Chemnitz & Engel 2025, (2.18), (2.19), App. A; Mulayoff & Michaeli 2024 (second moment); docs/theory.md,
    section The exponent of SGD, frozen at the weights.
    """

    name = "sgd_stability"
    KEYS: ClassVar = {
        "courant_sgd": Key(
            "Learning rate divided by the largest one at which SGD is linearly stable; near 1 is normal.",
            "",
            "If it stays above 1 and the loss does not fall: lower the learning rate, or take larger batches; "
            "`SGDStability.diagram` shows the largest rate of each batch size.",
            threshold=1.0,
        ),
        "critical_lr": Key("Largest learning rate at which SGD is linearly stable here.", "learning rate"),
        "sgd_lyapunov": Key("Exponent of SGD frozen at these weights; above 0 it is unstable.", NATS),
        "critical_lr_error": standard_error("critical_lr", "learning rate", optional=True),
        "sgd_lyapunov_error": standard_error("sgd_lyapunov", NATS, optional=True),
        "kernel_rank": Key("Rank of the Gram matrix of the output gradients.", optional=True),
        "kernel_trace": Key("Trace of the mean Gauss-Newton matrix.", "1 / learning rate", optional=True),
        "gd_lyapunov": Key("Exponent of full-batch steps, for comparison.", NATS, optional=True),
        **DETAILS,
        **{f"sgd_moment_{p}": key for p, key in MOMENTS.items()},
    }
    needs_update = True
    picture = "diagram"

    def __init__(
        self,
        probes: int = 128,
        *,
        outputs: Literal["top", "all"] = "top",
        sampling: Sampling = "iid",
        replacement: bool = False,
        chains: int = 8,
        steps: int = 100,
        horizon: int | None = None,
        moments: Collection[int] = (),
        most_rows: int = 256,
    ):
        super().__init__()
        for argument, value in (("probes", probes), ("chains", chains), ("steps", steps)):
            whole(argument, value, 2)
        whole("most_rows", most_rows, 0)
        if outputs not in ("top", "all"):
            raise ValueError(f"outputs={outputs!r}: give 'top' or 'all'")
        self.probes, self.outputs, self.sampling, self.replacement = probes, outputs, sampling, replacement
        if horizon is not None:
            whole("horizon", horizon, 1, instead=" of steps, or None")
        self.chains, self.steps, self.horizon, self.most_rows = chains, steps, horizon, most_rows
        if sampling not in ("iid", "reshuffle"):
            raise ValueError(f"sampling={sampling!r}: give 'iid' or 'reshuffle'")
        if not isinstance(moments, Collection) or isinstance(moments, str) or not set(moments) <= {*MOMENTS}:
            raise ValueError(f"moments={moments!r}: give 2, 4 or both; other moments are not exact")
        if moments and sampling != "iid":
            raise ValueError(f"moments={moments!r}: only those of independent steps are exact, give sampling='iid'")
        self.moments = tuple(p for p in MOMENTS if p in moments)
        #: Reason why a moment was left out; empty before that.
        self.without = ""
        self.latest: FrozenSGD | None = None
        self._shown: FrozenSGD | None = None
        self._mode: Tensor | None = None

    def check(self, snapshot: Snapshot) -> None:
        critical_rule(snapshot)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        if snapshot.probes is None:
            return {}
        return kernel_cost(snapshot, snapshot.probes, self.probes, None if self.latest is None else self.latest.kernel)

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        if snapshot.probes is None:
            return {}
        assumed = 1 if self.outputs == "top" else OUTPUTS
        rows = self.probes * (assumed if self.latest is None else self.latest.kernel.rows)
        return kernel_memory(snapshot, snapshot.probes, self.probes, rows)

    def warm_up(self, snapshot: Snapshot) -> int:
        """Return how many gradients the preconditioner still lacks: that of one batch says nothing of the next."""
        return gradients_missing(snapshot)

    def path(self, snapshot: Snapshot) -> str:
        """Return by which rules per-sample gradients were computed, see `TangentKernel`."""
        kernel = None if self.latest is None else self.latest.kernel
        return "exact" if kernel is None else " and ".join(sorted(set(kernel.path.values())))

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step; do nothing while its probes are being collected."""
        self.complete = False
        if snapshot.probes is not None and not snapshot.probes.full:
            return
        if snapshot.gradient is not None:
            verify_gradient(snapshot)  # and with it the loss, where there is one
        elif snapshot.loss is not None:
            verify(snapshot)
        draws = snapshot.run.generator(snapshot.step, self.name)
        generator = torch.Generator().manual_seed(snapshot.run.seed)  # the same outputs at each step
        sgd = frozen_sgd(
            snapshot, outputs=self.outputs, generator=generator, start=self._mode, most_rows=self.most_rows
        )
        if self.latest is None:
            require_curvature(snapshot, sgd.kernel)
        product = RandomProduct(self.sampling, self.replacement, self.chains, self.steps)
        values = exponents(sgd, product, draws)
        if self.horizon is not None:
            values |= details(sgd, product, self.horizon, draws)
        for p in self.moments:
            values[f"sgd_moment_{p}"] = self._moment(sgd, product, p, snapshot)
        self.latest, self._shown, self._mode = sgd, sgd, sgd.kernel.mode
        self.finish(values)

    def _moment(self, sgd: FrozenSGD, product: RandomProduct, p: int, snapshot: Snapshot) -> float:
        """Return NaN with one warning where a moment is refused: the headline number does not depend on it."""
        value, reason = moment(sgd, product, p)
        if reason and not self.without and snapshot.run.ranks.rank == 0:
            warnings.warn(f"sgd_stability leaves out {PREFIX}sgd_moment_{p}: {reason}", stacklevel=2)
        self.without = reason or self.without
        return value

    def compute(self) -> dict[str, Tensor]:
        """Return the last measurement, without infinite rates, where nothing can become unstable."""
        values = {key: getattr(self, key) for key in (*self.keys, *self.optional)}
        on_request = {f"{PREFIX}{name}" for name in (*DETAILS, *(f"sgd_moment_{p}" for p in MOMENTS))}
        return {
            key: value
            for key, value in values.items()
            if not ((bool(value.isinf()) and "courant" not in key) or (key in on_request and bool(value.isnan())))
        }

    def diagram(self, **settings: Any) -> StabilityDiagram:
        """Return the stability diagram over rate and batch size at the last measured weights.

        Args:
            settings: of `functional.stability_diagram`.

        Raises:
            ValueError: before a measurement.
        """
        if self.latest is None:
            raise ValueError("nothing has been measured yet: call update first")
        sgd = self.latest
        draws = {"sampling": self.sampling, "replacement": self.replacement, "population": sgd.population}
        return stability_diagram(sgd.modes, rule=sgd.rule, **(draws | settings))

    def plot(self, val: Any = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the stability diagram, in the manner of torchmetrics.

        Args:
            val: a `StabilityDiagram`; None takes that at the last measured weights, with a star at the step's own rate
                and batch size; measurements are drawn as by `Quantity.plot`.
            ax: to draw into; None makes a figure without a window.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: before a measurement, where no diagram is given.
            ImportError: without matplotlib.
        """
        if are_measurements(val):
            return super().plot(val, ax)
        run: dict[str, Any] = {}
        if val is None:
            sgd = self.latest or self._shown
            if sgd is None:
                raise ValueError("nothing has been measured yet: call update first, or pass a StabilityDiagram")
            draws: dict[str, Any] = {"sampling": self.sampling, "replacement": self.replacement}
            val = diagram_around_step(sgd, chains=self.chains, steps=self.steps, **draws)
            run = {"lr": sgd.lr, "batch_size": sgd.batch_size}
        if ax is None:
            ax = load("matplotlib.figure").Figure(figsize=(7.2, 4.2), layout="constrained").subplots()
        assert ax is not None
        draw_stability_diagram(val, ax, **run)
        figure: Any = ax.get_figure()
        return figure, ax

    def vectors(self) -> dict[str, Any]:
        return {} if self._mode is None else {"mode": self._mode}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self.latest, self._mode = None, vectors.get("mode")

    def reset(self) -> None:
        super().reset()
        self._shown = None
