"""Law of SGD near a minimum: curvature against the noise of the gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.sgd.gradient_noise import GradientNoise, batch_variance, gradient_noise
from lsp_callbacks.functional.sgd.rate_decay import rate_decay
from lsp_callbacks.functional.sgd.robbins_monro import robbins_monro
from lsp_callbacks.functional.sgd.sgd_law import (
    NoiseFit,
    contraction_factor,
    fit_noise,
    noise_gain,
    noise_lipschitz,
    sgd_law,
)
from lsp_callbacks.linalg import Ritz, Sketch, lanczos
from lsp_callbacks.operators.cost import beside, forward_cost, lanczos_cost
from lsp_callbacks.operators.curvature.hessian import Method, resolved
from lsp_callbacks.operators.footprint import footprint
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.operators.trajectory.frozen_preconditioner import FrozenRule, decayed_hessian, frozen_rule
from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.quantities.key import CURVATURE, Key, standard_error
from lsp_callbacks.quantities.sgd.probe_cost import RECORDED, probe_share
from lsp_callbacks.quantities.trajectory.reference_point import (
    NOWHERE,
    existing_file,
    position,
    position_in,
    squared_distance,
)
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot

#: Unit of the gradient's variance.
GRADIENT_SQUARED = "loss^2 / parameter^2"
#: Number of last measurements that the noise is fitted to.
MOST = 100
#: Extremes of the curvature before any batch was measured.
UNMEASURED = torch.tensor([math.inf, 0.0, 0.0], dtype=torch.float64)
#: Of both ends of the spectrum, relative to the larger one.
TOLERANCE = 0.01


class SGDLaw(Quantity):
    """Hypotheses of SGD's law at these weights, and the rate, contraction and noise floor that follow.

    ``L`` (smoothness) is the largest absolute and ``mu`` (strong convexity) the smallest eigenvalue of the Hessian of
    the step's loss, coupled weight decay included, by one Lanczos run, which bounds L from below and *mu from above*.
    A mini-batch's Hessian at one point is used for the objective everywhere, so the consequences are an optimistic
    estimate at these weights. ``sigma_0^2 + sigma_1^2 ||theta - theta_ref||^2`` is fitted to the variance of the
    mini-batch gradient over the measurements of the run; theta_ref should be the minimum, which is not known.

    In ordinary training mu is not positive. Then ``sgd_law_violated`` is 1, ``sgd_law_q`` at least 1, and there is
    no rate and no floor. For what q means and what it does not, see `functional.sgd_law`: the exponent is at most
    ``log(q) / 2``, and the sensitivity is not bounded by it. q, rate and floor are those of plain SGD with one rate;
    the noise is fitted from the third measurement on.

    ``robbins_monro`` follows from the form of the schedulers, where the loop gives them and the form is one of those
    that `functional.robbins_monro` knows. Otherwise, from 64 steps on, ``rate_decay`` is p of rates that fall like
    ``t^-p``, estimated from partial sums over the last octaves of steps (`functional.rate_decay`); it describes the
    past only. The constants of (5.2) and Thm 5.2 (3) are ``gradient_lipschitz``, L_G, over the batches and weights
    measured so far; ``noise_lipschitz``, L_u at these weights, where u are the weights of samples in a batch, from the
    probes alone; and ``noise_gain``, C_u of plain SGD at this rate. All three are lower bounds. As printed, with mu of
    the mean gradient, (3) is false, see `functional.noise_gain`.

    Args:
        probes: number of training samples to take gradients of, in eval mode; the first that the loader gives.
        reference: path of a checkpoint to measure distances from, best that of a finished run; None takes the
            parameters at the first measurement. They are remembered by a random sketch, to 6 %, also in checkpoints.
        products: largest number of Hessian products.
        method: of the products, see `lsp_callbacks.operators.hessian`.
        most_rows: see `SGDStability`.

    Raises:
        ValueError: for an argument out of its range, or a reference that is no file.

    Cost: ``products`` Hessian products at most, and three passes over the probes: 75 gradients, or 70 with kinks.

    Source: Katende 2025, Assumption 1, (5.3), Thm 5.2, 5.3; McCandlish et al. 2018; docs/theory.md, sections The
    Learning Stability Profile; The law of SGD, energies, kinks.
    """

    name = "sgd_law"
    KEYS: ClassVar = {
        "smoothness": Key("L, the largest |eigenvalue| of the Hessian.", CURVATURE),
        "smoothness_residual": Key("Residual of that eigenvalue.", CURVATURE, error_of="smoothness"),
        "strong_convexity": Key("mu, the smallest eigenvalue of the Hessian, upper bound.", CURVATURE),
        "strong_convexity_residual": Key("Residual of that eigenvalue.", CURVATURE, error_of="strong_convexity"),
        "gradient_variance": Key("E ||g_B - G||^2 of the mini-batch gradient.", GRADIENT_SQUARED),
        "gradient_variance_error": standard_error("gradient_variance", GRADIENT_SQUARED),
        "sgd_law_violated": Key(
            "1 where mu is not positive, 0 where it is; absent where the eigenvalue has not converged.",
            "",
            "At 1, as in most training, the law does not apply: look at courant_sgd instead.",
            optional=True,
        ),
        "sgd_law_q": Key(
            "Factor by which E ||theta - theta*||^2 contracts in a step, above the floor.",
            "",
            "Above 1 with sgd_law_violated 0, the rate is above sgd_law_eta_max: no alarm by itself.",
            optional=True,
        ),
        "sgd_law_eta_max": Key(
            "Learning rate below which q is below 1; too small by a factor of up to L / mu.",
            "learning rate",
            optional=True,
        ),
        "sgd_law_floor": Key(
            "E ||theta - theta*||^2 that the noise sustains.",
            "parameter^2",
            "If too high: a lower learning rate, or larger batches.",
            optional=True,
        ),
        "sigma_0_squared": Key("Gradient variance at the reference point.", GRADIENT_SQUARED, optional=True),
        "sigma_0_squared_error": standard_error("sigma_0_squared", GRADIENT_SQUARED, optional=True),
        "sigma_1_squared": Key(
            "Growth of the gradient variance with the squared distance.", "loss^2 / parameter^4", optional=True
        ),
        "sigma_1_squared_error": standard_error("sigma_1_squared", "loss^2 / parameter^4", optional=True),
        "gradient_noise_scale": Key(
            "Batch size at which the noise of the gradient equals its mean.",
            "samples",
            "Far above the batch size, larger batches make each step more useful; far below, they are wasted.",
            optional=True,
        ),
        "gradient_noise_scale_lower": Key("Its one-sided 90 % lower bound.", "samples", optional=True),
        "gradient_noise_scale_upper": Key("Its one-sided 90 % upper bound.", "samples", optional=True),
        "robbins_monro": Key(
            "1 where the schedule's form meets the Robbins-Monro conditions, 0 where it does not.", optional=True
        ),
        "rate_sum": Key("Sum of the learning rates so far.", "learning rate", optional=True),
        "rate_square_sum": Key("Sum of their squares so far.", "learning rate^2", optional=True),
        "rate_decay": Key("p of rates that fall like t^-p, estimated from the steps so far.", optional=True),
        "robbins_monro_so_far": Key(
            "1 if the estimated p lies in (1/2, 1], now and at half the steps, else 0; it describes the past only.",
            optional=True,
        ),
        "gradient_lipschitz": Key("L_G over the batches so far, lower bound.", CURVATURE, optional=True),
        "noise_lipschitz": Key(
            "L_u, change of the gradient by the samples' weights, lower bound.", "loss / parameter", optional=True
        ),
        "noise_gain": Key(
            "C_u, displacement by noise divided by rate times L_u; absent where a batch's step does not contract.",
            optional=True,
        ),
    }
    needs_update = True
    recorded = 1
    pairs: Tensor
    origin: Tensor
    curvatures: Tensor

    def __init__(
        self,
        probes: int = 128,
        *,
        reference: str | Path | None = None,
        products: int = 30,
        method: Method = "auto",
        most_rows: int = 256,
    ):
        super().__init__()
        self.probes, self.products = whole("probes", probes, 2), whole("products", products, 2)
        self.method: Method = choice("method", method, *get_args(Method))
        self.most_rows = whole("most_rows", most_rows, 0)
        self.reference = None if reference is None else existing_file("reference", reference)
        #: By measurement: squared distance, variance, its error.
        self.add_state("pairs", default=torch.empty(0, 3, dtype=torch.float64), persistent=True)
        self.add_state("origin", default=NOWHERE, persistent=True)
        #: Over the batches so far: the least curvature less its residual, L_G, and L_G with its residual.
        self.add_state("curvatures", default=UNMEASURED, persistent=True)

    def check(self, snapshot: Snapshot) -> None:
        frozen_rule(snapshot)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        share = 0.0 if snapshot.probes is None else probe_share(snapshot, snapshot.probes, self.probes)
        ends = lanczos_cost(snapshot, resolved(snapshot, self.method), self.products)
        gradients = (3 + 2 * 2 / 3) * share + beside(snapshot, vectors=100)
        return {"forward": forward_cost(snapshot), "both ends": ends, "gradients of the probes": gradients}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        if snapshot.probes is None:
            return {}
        training, share = footprint(snapshot), probe_share(snapshot, snapshot.probes, self.probes)
        activations = RECORDED * share * training.activations
        probes = {"activations of the probes": activations, "gradients": 3 * training.parameters}
        return probes | product_memory(snapshot, self.method, self.products)

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step; do nothing while its probes are being collected."""
        self.complete = False
        probes = snapshot.probes
        if probes is None:
            raise Unmeasurable("the noise is estimated from single samples: pass Snapshot(probes=ProbeSet(...))")
        if not probes.full:
            return
        rule = frozen_rule(snapshot)
        ends = self._ends(snapshot)
        population = None if probes.population is None else max(probes.population, probes.samples)
        noise, lipschitz = snapshot.run.ranks.first(
            lambda: self._noise(probes, population, snapshot), "the noise of the gradient"
        )
        share = batch_variance(1.0, probes.batch_size, population)

        sketch = Sketch()
        here = position(snapshot.module, sketch).cpu()
        origin = self.origin
        if bool(origin.isnan().any()):
            origin = here if self.reference is None else position_in(self.reference, snapshot.module, sketch).cpu()
        pair = torch.stack([squared_distance(here, origin), share * noise.variance, share * noise.variance_error])
        pairs = torch.cat([self.pairs, pair[None]])[-MOST:]
        rounding = _rounding(snapshot, self.path(snapshot))
        plain = _plain(rule) and snapshot.run.prox is None
        fit = fit_noise(*pairs.unbind(1))
        values = _curvature_and_noise(ends, noise, fit, pair)
        values |= _law(ends, fit, rule.lr if plain else None, rounding) | _rates(snapshot)
        curvatures = _extended(self.curvatures, ends)
        values |= {"gradient_lipschitz": curvatures[1], "noise_lipschitz": lipschitz}
        if plain:
            values["noise_gain"] = _gain(rule.lr, curvatures, rounding)
        self.origin, self.pairs, self.curvatures = origin, pairs, curvatures
        self.finish(values)

    def restart(self) -> None:
        super().restart()
        # The old ones are those of other parameters.
        self.curvatures, self.pairs = UNMEASURED.clone(), self.pairs[:0]

    def _ends(self, snapshot: Snapshot) -> Ritz:
        operator = decayed_hessian(snapshot, method=self.method)
        n = operator.shape[1]
        start = torch.randn(n, generator=snapshot.generator(self.name), dtype=operator.dtype).to(operator.device)
        return lanczos(operator, start, steps=self.products, tol=TOLERANCE, ends=(0, -1))

    def _noise(self, probes: ProbeSet, population: int | None, snapshot: Snapshot) -> tuple[GradientNoise, Tensor]:
        generator = snapshot.generator("noise")
        kernel = tangent_kernel(probes, outputs="loss", generator=generator, most_rows=self.most_rows)
        return gradient_noise(kernel.gram, population=population), noise_lipschitz(kernel.gram)


def _curvature_and_noise(ends: Ritz, noise: GradientNoise, fit: NoiseFit, last: Tensor) -> dict[str, float | Tensor]:
    top = int(ends.values.abs().argmax())
    values: dict[str, float | Tensor] = {
        "smoothness": ends.values[top].abs(),
        "smoothness_residual": ends.residuals[top],
        "strong_convexity": ends.values[0],
        "strong_convexity_residual": ends.residuals[0],
        "gradient_variance": last[1],
        "gradient_variance_error": last[2],
        "gradient_noise_scale_lower": noise.lower,
        "gradient_noise_scale_upper": noise.upper,
        "sigma_0_squared": fit.sigma_0_squared,
        "sigma_0_squared_error": fit.sigma_0_squared_error,
        "sigma_1_squared": fit.sigma_1_squared,
        "sigma_1_squared_error": fit.sigma_1_squared_error,
    }
    if not bool(noise.upper.isnan()):  # no number without its error
        values["gradient_noise_scale"] = noise.scale
    return values


def _law(ends: Ritz, fit: NoiseFit, lr: float | None, rounding: float) -> dict[str, float | Tensor]:
    """Return what the law says; ``lr`` is None for a step that is not plain SGD's."""
    mu, residual, L = float(ends.values[0]), float(ends.residuals[0]), float(ends.values.abs().max())
    values: dict[str, float | Tensor] = {}
    positive = mu > rounding * L
    certain = positive and mu > residual
    if not positive or certain:
        values["sgd_law_violated"] = float(not positive)
    if lr is None or not bool(fit.sigma_0_squared.isfinite()):
        return values
    squares = {"smoothness": L, "sigma_1_squared": float(fit.sigma_1_squared)}
    # Where the lowest eigenpair has not converged, q is that of the smallest mu within its residual.
    lowest = mu if certain else min(mu, mu - residual)
    values["sgd_law_q"] = contraction_factor(lr, convexity=lowest, **squares)
    if certain:
        law = sgd_law(lr, convexity=mu, sigma_0_squared=float(fit.sigma_0_squared), **squares)
        values |= {"sgd_law_eta_max": law.eta_max, "sgd_law_floor": law.floor}
    return values


def _rates(snapshot: Snapshot) -> dict[str, float | Tensor]:
    """Return the form of the schedule, or the decay of the rates so far, and their sums."""
    values: dict[str, float | Tensor] = {}
    form = None if snapshot.run.schedulers is None else robbins_monro(*snapshot.run.schedulers).holds
    if form is not None:
        values["robbins_monro"] = float(form)
    if snapshot.run.series is not None and len(snapshot.run.series):
        rates = snapshot.run.series.rates
        values |= {"rate_sum": rates.total, "rate_square_sum": rates.squares}
        decay = rate_decay(rates.marks, gap=rates.gap)
        if form is None and decay.holds is not None:
            values |= {"rate_decay": decay.exponent, "robbins_monro_so_far": float(decay.holds)}
    return values


def _extended(curvatures: Tensor, ends: Ritz) -> Tensor:
    """Return the smallest and the largest curvatures with those of one more batch."""
    values, residuals = ends.values.double().cpu(), ends.residuals.double().cpu()
    top = values.abs().argmax()
    least = values[0] - residuals[0]
    largest = torch.stack([values[top].abs(), values[top].abs() + residuals[top]])
    return torch.cat([torch.minimum(curvatures[:1], least[None]), torch.maximum(curvatures[1:], largest)])


def _gain(lr: float, curvatures: Tensor, rounding: float) -> float:
    """Return C_u; NaN where the step of some batch does not contract."""
    least, _, largest = curvatures.tolist()
    if not (rounding * largest < least and lr * largest < 2):
        return math.nan
    return noise_gain(lr, convexity=least, smoothness=largest)


def _plain(rule: FrozenRule) -> bool:
    """Return whether the step is ``theta - lr G``, all parameters at one rate and nothing clipped."""
    unscaled = all(isinstance(scale, float) and scale == 1.0 for scale in rule.scale.values())
    decays = any(rule.decoupled_decay.values())
    return unscaled and not (rule.momentum or rule.frozen or decays or rule.sign < 0) and rule.lr > 0


def _rounding(snapshot: Snapshot, path: str) -> float:
    """Return the rounding error of an eigenvalue relative to L, below which it cannot be told from 0."""
    if snapshot.graph.dtype.itemsize <= 2:
        return 2e-2
    full = snapshot.graph.dtype == torch.float64
    if path.startswith("finite"):
        return 1e-6 if full else 2e-3
    return 1e-10 if full else 1e-5
