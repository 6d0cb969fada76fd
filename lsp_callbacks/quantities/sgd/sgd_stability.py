"""The stability of SGD itself: its exponent at the current weights, and the largest stable learning rates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lsp_callbacks._validation import whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.sgd.mean_square import second_moment_exponent
from lsp_callbacks.functional.sgd.modes import UpdateRule, regularity
from lsp_callbacks.functional.sgd.moment_exponent import moment_exponent
from lsp_callbacks.functional.sgd.sgd_stability import (
    Sampling,
    finite_time_exponents,
    gd_exponent,
    sgd_exponent,
    sum_of_exponents,
)
from lsp_callbacks.functional.sgd.stability_diagram import StabilityDiagram, critical_lr, stability_diagram
from lsp_callbacks.operators.cost import MULTIPLICATION, beside, forward_cost, sample_passes, work
from lsp_callbacks.operators.memory import footprint, unfolded
from lsp_callbacks.operators.sgd.frozen_sgd import FrozenSGD, critical_rule, frozen_sgd
from lsp_callbacks.operators.sgd.gram_matrix import HELD
from lsp_callbacks.operators.trajectory.coming_preconditioner import DRAWS, gradients_missing
from lsp_callbacks.operators.trajectory.frozen_preconditioner import frozen_rule
from lsp_callbacks.plots.stability_diagram import diagram_around, draw, matplotlib
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.step.replay_checks import verify, verify_gradient
from lsp_callbacks.step.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Nanoseconds of the random products of one measurement, on 128 rows.
NUMERICS = 5e7
#: Memory that recording takes, in activations, and random products, in matrices of the size of the Gram matrix:
#: measured in ``benchmarks/memory_is_predicted.py``.
RECORDED, PRODUCTS = 1.7, 40
#: Outputs of a sample before the first measurement.
UNKNOWN = 10
#: What only comes with a horizon.
DETAILS = (
    "stability/sgd_lyapunov_least", "stability/sgd_lyapunov_most", "stability/sgd_lyapunov_finite",
    "stability/sgd_lyapunov_finite_spread", "stability/kernel_margin", "stability/kernel_components",
)  # fmt: skip
#: And these for each of the moments asked for.
MOMENTS = {p: f"stability/sgd_moment_{p}" for p in (2, 4)}
UNSURE = (*DETAILS, *MOMENTS.values())
#: A network has collapsed when its probes were alike in so many readings in a row, over so many steps at least: a few
#: samples beside the probes may bring it back.
READINGS, STEPS = 3, 50


class SGDStability(Quantity):
    """``lr / critical_lr``: how far a step is from the learning rate at which SGD itself loses linear stability.

    From the Gram matrix K of per-sample output gradients at a probe set, the optimizer's momentum and the loader's
    batch size: the top exponent ``lambda`` of the random product of steps frozen at the current weights, the smallest
    rate at which it turns positive, and the largest at which the second moment is bounded. Unlike sharpness it sees
    batch noise, with momentum too. Adam, AdamW, RMSprop and Adagrad are taken with their preconditioner frozen. It is a
    statement of *linear* stability, of the Gauss-Newton matrix, without dropout.

    Under BatchNorm the probes are cut into batches of the size that training normalises, each differentiated through
    its own statistics, and steps draw whole batches (`functional.frozen_sgd`); frozen BatchNorm (in eval mode inside of
    training) takes its running statistics, as the step does. A normalisation over the batch that is written by hand is
    seen where it keeps buffers ``running_mean`` and ``running_var``.

    Near 1 is where good training often lives. When it stays above 1 and the loss does not fall: lower the learning
    rate, or take larger batches; `diagram` says which rate each batch size can bear.

    Args:
        probes: how many training samples to look at; the first that the loader gives.
        outputs: "top" takes one row a sample, the top eigenpair of its output Hessian; "all" takes every output.
        sampling: how batches are drawn; "reshuffle" needs all training samples as probes.
        replacement: within a batch.
        chains: of the random product.
        steps: of each chain.
        horizon: report details beside the exponent, too: exponents over ``horizon`` steps, the bounds around it, and
            the regularity of the point. None leaves them out.
        moments: p of the moment exponents to report, of 2 and 4; others are refused, and 4 is left out with a warning
            where K has more than 24 modes, 8 with momentum (`functional.moment_exponent`): take few probes.
        most_rows: weights that are used outside of their own layer, and all under BatchNorm, take a backward pass for
            each row of K; where that would be more than so many, the quantity is left out.

    Keys: ``stability/courant_sgd``, ``critical_lr``, ``courant_mean_square``, ``mean_square_lr``, ``sgd_lyapunov``
    and ``gd_lyapunov`` (lambda and mu, nats per step); ``_error`` beside those by Monte Carlo; ``kernel_rank`` and
    ``kernel_trace`` of K; ``collapsed``, above 0 where the outputs have ceased to depend on the inputs: nine of ten
    probes, of different inputs, have the same outputs to the last digits and the same gradient (dead ReLUs, saturated
    units), though their targets want others, and no lower a loss than a constant has. It is 1 where it was so in three
    readings in a row and for 50 steps; before that 0.5, which proves nothing alone. A last layer that begins with zeros
    has another gradient for each input: 0. So has a network that is bad but still moves: outputs that exploded have a
    saturated softmax and a low rank, too, and may come back. With ``horizon``: ``sgd_lyapunov_least`` (of plain SGD:
    the mean of all exponents) and ``sgd_lyapunov_most`` (half the second moment's exponent), between which lambda lies;
    ``sgd_lyapunov_finite`` with its ``_spread`` over runs of so many steps; ``kernel_margin``, ``min |1 - lr k_ii|``,
    and ``kernel_components`` of K (Chemnitz & Engel, definition 2.2: at margin 0, or with more than one component, the
    point is not regular). With ``moments``: ``sgd_moment_2`` and ``sgd_moment_4``, ``Lambda(p) = lim (1/n) log E ||A_n
    ... A_1||^p`` (there definition A.2), exact for these probes; where lambda is negative and ``Lambda(p)`` positive,
    rare runs explode. Theorem B, by which the sign of lambda decides, is proved there for one output, batches of one
    and plain SGD; elsewhere it is linear stability.

    Raises:
        ValueError: for bad arguments.

    Cost: three passes over the probes and some 50 ms: 6 gradients, several times that on a small network. Behind a
    preconditioner each two probes meet in each weight: 33 gradients. Layers that are no plain linear map of their
    input (attention) are run sample by sample, which costs more. Under BatchNorm two thirds of a gradient for each
    probe, 85 gradients of 128 (of batches larger than the probes fewer).

    Source: Chemnitz & Engel 2025, (2.18), (2.19), App. A; Mulayoff & Michaeli 2024 (second moment); MATH section 2.
    """

    name = "sgd_stability"
    keys = (
        "stability/courant_sgd", "stability/critical_lr", "stability/courant_mean_square", "stability/mean_square_lr",
        "stability/sgd_lyapunov",
    )  # fmt: skip
    optional = (
        "stability/critical_lr_error", "stability/sgd_lyapunov_error", "stability/kernel_rank",
        "stability/kernel_trace", "stability/collapsed", "stability/gd_lyapunov", *DETAILS,
        *MOMENTS.values(),
    )  # fmt: skip
    needs_update = True
    patient = True
    picture = "diagram"
    values: Tensor
    alike: Tensor
    alike_since: Tensor

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
        if not isinstance(moments, Collection) or not all(p in tuple(MOMENTS) for p in moments):
            raise ValueError(f"moments={moments!r}: give some of 2 and 4, the others are not exact")
        if moments and sampling != "iid":
            raise ValueError(f"moments={moments!r}: those of independent steps are exact only, take sampling='iid'")
        self.moments = tuple(p for p in MOMENTS if p in moments)
        #: Why a moment is not known, once that is so.
        self.without = ""
        self.latest: FrozenSGD | None = None
        self._shown: FrozenSGD | None = None
        self._mode: Tensor | None = None
        left_out = {*(() if horizon else DETAILS), *(key for p, key in MOMENTS.items() if p not in self.moments)}
        self._names = tuple(name for name in (*self.keys, *self.optional) if name not in left_out)
        self.add_state(
            "values", default=torch.full((len(self._names),), math.nan, dtype=torch.float64), persistent=True
        )
        self.add_state("alike", default=scalar(0.0), persistent=True)
        self.add_state("alike_since", default=scalar(math.nan), persistent=True)

    def check(self, snapshot: Snapshot) -> None:
        critical_rule(snapshot)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        """Passes over the probes, and the random products, in the gradients of one step."""
        if snapshot.probes is None:
            return {}
        # Each rank looks at all probes, and has its part of the batch only.
        share = self.probes * snapshot.run.ranks.world / max(snapshot.probes.batch_size, 1)
        # What the first measurement has shown: rows of a sample, and how they had to be found.
        kernel = None if self.latest is None else self.latest.kernel
        rows, passes = (1, 0.0) if kernel is None else (kernel.rows, float(kernel.passes))
        alone = self.probes * rows if kernel is not None and "layer" in kernel.path.values() else 0.0
        # Behind a preconditioner each pair of samples meets in each weight.
        pairs = MULTIPLICATION * self.probes**2 * work(snapshot).parameters * frozen_rule(snapshot).frozen
        gram = sample_passes(snapshot, 1, alone) + beside(snapshot, vectors=100, time=pairs)
        probes = snapshot.probes
        if probes.batches:  # a pass over the sample's batch for each row
            passes = rows * probes.together * len(probes.batches) * probes.together / max(probes.samples, 1)
        device = next(iter(snapshot.parameters.values())).device
        numerics = beside(snapshot, time=NUMERICS * (self.probes * rows / 128) ** 2)
        return {
            "forward": forward_cost(snapshot),
            "gradient": 1.0,
            "kernel": (3 + 2 / 3 * (rows + passes)) * share + gram,
            "products": max(numerics, 0.0 if device.type == "cpu" else 2.0),
        } | ({"signs of the probes": (3 + 2 * DRAWS) / 3 * share} if frozen_rule(snapshot).frozen else {})

    def wait(self, snapshot: Snapshot) -> int:
        """A preconditioner that has met one batch only is that of none: one step."""
        return gradients_missing(snapshot)

    def path(self, snapshot: Snapshot) -> str:
        """Which rules gave per-sample gradients, see `TangentKernel`."""
        kernel = None if self.latest is None else self.latest.kernel
        return "exact" if kernel is None else " and ".join(sorted(set(kernel.path.values())))

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        """Activations and per-layer gradients of the probes, and the random products on their Gram matrix."""
        if snapshot.probes is None:
            return {}
        found = footprint(snapshot)
        share = self.probes * snapshot.run.ranks.world / max(snapshot.probes.batch_size, 1)
        unknown = 1 if self.outputs == "top" else UNKNOWN
        rows = self.probes * (unknown if self.latest is None else self.latest.kernel.rows)
        common = {"gradients": 3 * found.parameters, "products": PRODUCTS * 8 * rows**2, "copies": 2 * found.buffers}
        probes = snapshot.probes
        if probes.batches:  # one batch at a time, and the rows of all
            at_once = probes.together / max(probes.batch_size, 1)
            stored = min(rows * found.parameters, 4.0 * HELD)
            return {"activations of the probes": at_once * found.activations, "rows": 2 * stored} | common
        return common | {
            "activations of the probes": RECORDED * share * found.activations,
            "patches of a convolution": 2 * unfolded(snapshot, self.probes),
        }

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step; waits while its probes are being collected."""
        self.complete = False
        if snapshot.probes is not None and not snapshot.probes.full:
            return
        if snapshot.loss is not None:
            verify(snapshot)
        if snapshot.gradient is not None:
            verify_gradient(snapshot)
        generator = torch.Generator().manual_seed(snapshot.run.seed)  # the same outputs at each step
        found = frozen_sgd(
            snapshot, outputs=self.outputs, generator=generator, start=self._mode, most_rows=self.most_rows
        )
        values = self._measure(found, snapshot)
        assert snapshot.probes is not None
        alike = self.alike + 1 if found.kernel.alike else scalar(0.0)
        since = self.alike_since if float(alike) > 1 else scalar(float(snapshot.step))
        gone = float(alike) >= READINGS and snapshot.step - float(since) >= STEPS
        values["collapsed"] = 0.0 if not alike else 1.0 if gone else 0.5
        self.values = torch.tensor([values[name.split("/")[1]] for name in self._names], dtype=torch.float64)
        self.alike, self.alike_since = alike, since
        self.latest, self.complete = found, True
        self._shown, self._mode = found, found.kernel.mode

    def _batches(self, found: FrozenSGD) -> dict[str, Any]:
        size = min(found.batch_size, found.population)
        return {
            "batch_size": size, "rule": found.rule, "replacement": self.replacement, "population": found.population
        }  # fmt: skip

    def _measure(self, found: FrozenSGD, snapshot: Snapshot) -> dict[str, float]:
        generator = snapshot.generator(self.name)
        settings = self._batches(found)
        settings |= {"sampling": self.sampling, "chains": self.chains, "generator": generator}
        critical = critical_lr(found.modes, steps=self.steps, tol=1e-4, **settings)
        exponent = sgd_exponent(found.modes, found.lr, steps=self.steps // 2, burn_in=self.steps // 2, **settings)
        if math.isnan(critical.value):
            raise Unmeasurable("the Gram matrix is not finite: the weights or the outputs have overflowed")
        return {
            "courant_sgd": _ratio(found.lr, critical.value),
            "critical_lr": critical.value,
            "critical_lr_error": critical.error,
            "courant_mean_square": _ratio(found.lr, critical.mean_square),
            "mean_square_lr": critical.mean_square,
            "sgd_lyapunov": float(exponent.value),
            "sgd_lyapunov_error": float(exponent.error),
            "kernel_rank": float(found.modes.rank),
            "kernel_trace": float(found.modes.trace),
            "gd_lyapunov": float(gd_exponent(found.modes, found.lr, rule=found.rule)),
            **({} if self.horizon is None else self._details(found, self.horizon, generator)),
            **{MOMENTS[p].split("/")[1]: self._moment(found, p, snapshot) for p in self.moments},
        }

    def _moment(self, found: FrozenSGD, p: int, snapshot: Snapshot) -> float:
        """NaN with one warning where it is refused: the dial does not depend on it."""
        batches = self._batches(found)
        try:
            value = moment_exponent(found.modes, found.lr, p=p, **batches)
            reason = "its iteration did not converge" if math.isnan(value) and found.modes.rank else ""
        except ValueError as error:
            value, reason = math.nan, str(error)
        if reason and not self.without and snapshot.run.ranks.rank == 0:
            warnings.warn(f"sgd_stability leaves out {MOMENTS[p]}: {reason}", stacklevel=2)
        self.without = reason or self.without
        return value

    def _details(self, found: FrozenSGD, horizon: int, generator: torch.Generator) -> dict[str, float]:
        batches = self._batches(found)
        finite = finite_time_exponents(
            found.modes, found.lr, horizon=horizon, sampling=self.sampling, generator=generator, **batches
        )
        least = math.nan
        if found.rule == UpdateRule() and found.population == found.modes.samples and found.modes.together == 1:
            logs = sum_of_exponents(found.modes, found.lr, batch_size=batches["batch_size"], generator=generator)
            least = float(logs.value) / max(found.modes.rank, 1)
        margin, components = regularity(found.kernel.gram, found.lr, found.kernel.rows)
        return {
            "sgd_lyapunov_least": least,
            "sgd_lyapunov_most": second_moment_exponent(found.modes, found.lr, tol=1e-4, **batches),
            "sgd_lyapunov_finite": float(finite.mean()),
            "sgd_lyapunov_finite_spread": float(finite.std()),
            "kernel_margin": margin,
            "kernel_components": float(components),
        }

    def restart(self) -> None:
        super().restart()
        self.alike, self.alike_since = scalar(0.0), scalar(math.nan)

    def compute(self) -> dict[str, Tensor]:
        """The last measurement; a rate that is infinite, as nothing can become unstable, is left out."""
        found = dict(zip(self._names, self.values))
        return {
            key: value
            for key, value in found.items()
            if not ((bool(value.isinf()) and "courant" not in key) or (key in UNSURE and bool(value.isnan())))
        }

    def diagram(self, **settings: Any) -> StabilityDiagram:
        """The (rate, batch size) diagram at the last measured weights, by `functional.stability_diagram`.

        Raises:
            ValueError: before a measurement.
        """
        if self.latest is None:
            raise ValueError("nothing has been measured yet: call update first")
        found = self.latest
        own = {"sampling": self.sampling, "replacement": self.replacement, "population": found.population}
        return stability_diagram(found.modes, rule=found.rule, **(own | settings))

    def plot(self, val: StabilityDiagram | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:  # type: ignore[override]
        """Draws the stability diagram, in the manner of torchmetrics.

        Args:
            val: None takes the diagram at the last measured weights, with a star where the step stands.
            ax: to draw into; None makes a figure without a window.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: before a measurement, where no diagram is given.
            ImportError: without matplotlib.
        """
        run: dict[str, Any] = {}
        if val is None:
            found = self.latest or self._shown
            if found is None:
                raise ValueError("nothing has been measured yet: call update first, or pass a StabilityDiagram")
            draws: dict[str, Any] = {"sampling": self.sampling, "replacement": self.replacement}
            val = diagram_around(found, chains=self.chains, steps=self.steps, **draws)
            run = {"lr": found.lr, "batch_size": found.batch_size}
        if ax is None:
            ax = matplotlib("matplotlib.figure").Figure(figsize=(7.2, 4.2), layout="constrained").subplots()
        assert ax is not None
        draw(val, ax, **run)
        figure: Any = ax.get_figure()
        return figure, ax

    def vectors(self) -> dict[str, Any]:
        return {} if self._mode is None else {"mode": self._mode}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self.latest, self._mode = None, vectors.get("mode")

    def reset(self) -> None:
        super().reset()
        self._shown = None


def _ratio(lr: float, critical: float) -> float:
    """A Courant number; 0 at an infinite critical rate, infinite at one that is too small to be told from 0."""
    return lr / critical if critical else math.inf
