"""The law of SGD: curvature against the noise of the gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.sgd.gradient_noise import GradientNoise, batch_variance, gradient_noise
from lsp_callbacks.functional.sgd.robbins_monro import rate_decay, robbins_monro
from lsp_callbacks.functional.sgd.sgd_law import contraction_factor, fit_noise, noise_gain, noise_lipschitz, sgd_law
from lsp_callbacks.linalg import Ritz, Sketch, lanczos
from lsp_callbacks.operators.cost import beside, forward_cost, lanczos_cost
from lsp_callbacks.operators.curvature.hessian import Method, resolved
from lsp_callbacks.operators.memory import footprint, product_memory
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.operators.trajectory.frozen_preconditioner import FrozenRule, decayed_hessian, frozen_rule
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.quantities.sgd.sgd_stability import RECORDED
from lsp_callbacks.quantities.trajectory.reference_point import (
    NOWHERE,
    existing_file,
    position,
    position_in,
    squared_distance,
)
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot

#: Measurements that the noise is regressed on, the last ones.
MOST = 100
#: The curvatures of no batch.
UNSEEN = torch.tensor([math.inf, 0.0, 0.0], dtype=torch.float64)
#: On both ends of the spectrum, relative to the larger one.
TOLERANCE = 0.01


class SGDLaw(Quantity):
    """Whether the hypotheses of SGD's law hold here, and the rate, contraction and noise floor that follow.

    ``L`` (smoothness) is the largest absolute and ``mu`` (strong convexity) the smallest eigenvalue of the Hessian of
    the step's loss, coupled weight decay included, by one Lanczos run. The run finds L from below and *mu from above*.
    A mini-batch's Hessian at one point stands for the objective everywhere, so all that follows is a reading at these
    weights, and optimistic. ``sigma_0^2 + sigma_1^2 ||theta - theta_ref||^2`` is fitted to the variance of the
    mini-batch gradient over the measurements of the run; theta_ref ought to be the minimum, which nobody knows.

    In ordinary training mu is not positive. Then ``sgd_law_violated`` is 1, ``sgd_law_q`` at least 1, and there is
    no rate and no floor: do not plan by this theorem, look at ``courant_sgd``. Where it is 0 and ``sgd_law_q`` is
    above 1, the rate is above ``sgd_law_eta_max``: that is cautious by L / mu or less, and no alarm by itself. A
    floor that is too high comes down with the rate or with larger batches. For what q means and what it does not,
    see `functional.sgd_law`: the exponent is at most ``log(q) / 2``, and the sensitivity is not bounded by it.
    Where the *gradient noise scale* is far above your batch size, larger batches make more of each step; far below
    it, they are wasted.

    Args:
        probes: how many training samples to take gradients of; the first that the loader gives. In eval mode.
        reference: path of a checkpoint to measure distances from, best that of a finished run; None takes the
            parameters at the first measurement. They are remembered by a random sketch, to 6 %, also in checkpoints.
        products: of the Hessian, at most.
        method: of the products, see `lsp_callbacks.operators.hessian`.
        most_rows: see `SGDStability`.

    Keys: ``stability/smoothness`` and ``strong_convexity``, each with ``_residual`` (units of the loss /
    parameter^2); ``gradient_variance``, ``E ||g_B - G||^2`` of the run's batch size, with ``_error``. Where they
    are known: ``sgd_law_violated`` (0 only where the lowest eigenpair has converged above 0; absent where it has
    not), ``sigma_0_squared`` and ``sigma_1_squared`` with ``_error`` (from the third measurement on), ``sgd_law_q``
    with them, ``sgd_law_eta_max`` and ``sgd_law_floor`` only where mu is positive (all three of plain SGD with one
    rate), ``gradient_noise_scale`` in samples with its one-sided 90 % bounds (absent where the probes cannot tell
    the gradient from its noise). ``robbins_monro`` is 1 or 0 by the form of the schedulers, where the loop shows
    them and the form is known (`functional.robbins_monro` gives the reason). Where it is not known, and from 64
    steps on, ``rate_decay`` is p of rates that fall like ``t^-p``, read off partial sums over the last octaves of
    steps, and ``robbins_monro_so_far`` 1 where it is, and was half-way, in (1/2, 1], otherwise 0
    (`functional.rate_decay`): a reading of the steps so far, no verdict. ``rate_sum`` and ``rate_square_sum`` are
    the partial sums themselves. The constants of (5.2) and Thm 5.2 (3): ``gradient_lipschitz``, L_G, the largest
    ``|eigenvalue|`` over the batches and weights measured so far, a lower bound; ``noise_lipschitz``, L_u at these
    weights, where u are the weights of samples in a batch, of the probes alone a lower bound, too; ``noise_gain``, C_u
    of plain SGD at this rate, of the batches measured so far and thus a lower bound of the constant, absent where one
    of them does not contract. As printed, with mu of the mean gradient, (3) is false, see `functional.noise_gain`.

    Raises:
        ValueError: for bad arguments.

    Cost: ``products`` Hessian products at most, and three passes over the probes: 75 gradients, or 70 with kinks.
    Source: Katende 2025, Assumption 1, (5.3), Thm 5.2, 5.3; McCandlish et al. 2018; MATH sections 4 and 7.
    """

    name = "sgd_law"
    keys = (
        "stability/smoothness", "stability/smoothness_residual", "stability/strong_convexity",
        "stability/strong_convexity_residual", "stability/gradient_variance", "stability/gradient_variance_error",
    )  # fmt: skip
    optional = (
        "stability/sgd_law_violated", "stability/sgd_law_q", "stability/sgd_law_eta_max", "stability/sgd_law_floor",
        "stability/sigma_0_squared", "stability/sigma_0_squared_error", "stability/sigma_1_squared",
        "stability/sigma_1_squared_error", "stability/gradient_noise_scale", "stability/gradient_noise_scale_lower",
        "stability/gradient_noise_scale_upper", "stability/robbins_monro", "stability/rate_sum",
        "stability/rate_square_sum", "stability/rate_decay", "stability/robbins_monro_so_far",
        "stability/gradient_lipschitz", "stability/noise_lipschitz", "stability/noise_gain",
    )  # fmt: skip
    needs_update = True
    recorded = 1
    values: Tensor
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
        unknown = torch.full((len(self.keys) + len(self.optional),), math.nan, dtype=torch.float64)
        self.add_state("values", default=unknown, persistent=True)
        #: Squared distance, variance, its error.
        self.add_state("pairs", default=torch.empty(0, 3, dtype=torch.float64), persistent=True)
        self.add_state("origin", default=NOWHERE, persistent=True)
        #: Over the batches so far: the least curvature less its residual, L_G, and L_G with its residual.
        self.add_state("curvatures", default=UNSEEN, persistent=True)

    def check(self, snapshot: Snapshot) -> None:
        frozen_rule(snapshot)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        share = 0.0 if snapshot.probes is None else self._share(snapshot, snapshot.probes)
        ends = lanczos_cost(snapshot, resolved(snapshot, self.method), self.products)
        gradients = (3 + 2 * 2 / 3) * share + beside(snapshot, vectors=100)
        return {"forward": forward_cost(snapshot), "both ends": ends, "gradients of the probes": gradients}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        if snapshot.probes is None:
            return {}
        found, share = footprint(snapshot), self._share(snapshot, snapshot.probes)
        own = {"activations of the probes": RECORDED * share * found.activations, "gradients": 3 * found.parameters}
        return own | product_memory(snapshot, self.method, self.products)

    def _share(self, snapshot: Snapshot, probes: ProbeSet) -> float:
        """All probes, in batches of one rank."""
        return self.probes * snapshot.run.ranks.world / max(probes.batch_size, 1)

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step; waits while its probes are being collected."""
        self.complete = False
        probes = snapshot.probes
        if probes is None:
            raise Unmeasurable("the noise is that of single samples: pass Snapshot(probes=ProbeSet(...))")
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
        found = self._found(ends, noise, pairs, rule, snapshot)
        curvatures = _extended(self.curvatures, ends)
        found |= {"stability/gradient_lipschitz": curvatures[1], "stability/noise_lipschitz": lipschitz}
        if _plain(rule) and snapshot.run.prox is None:
            found["stability/noise_gain"] = _gain(rule.lr, curvatures, _rounding(snapshot, self.path(snapshot)))
        self.values = torch.stack([scalar(found.get(key, math.nan)) for key in (*self.keys, *self.optional)])
        self.origin, self.pairs, self.curvatures, self.complete = origin, pairs, curvatures, True

    def restart(self) -> None:
        super().restart()
        self.curvatures, self.pairs = UNSEEN.clone(), self.pairs[:0]  # of the parameters that were trained before

    def _ends(self, snapshot: Snapshot) -> Ritz:
        operator = decayed_hessian(snapshot, method=self.method)
        n = operator.shape[1]
        start = torch.randn(n, generator=snapshot.generator(self.name), dtype=operator.dtype).to(operator.device)
        return lanczos(operator, start, steps=self.products, tol=TOLERANCE, ends=(0, -1))

    def _noise(self, probes: ProbeSet, population: int | None, snapshot: Snapshot) -> tuple[GradientNoise, Tensor]:
        generator = snapshot.generator("noise")
        kernel = tangent_kernel(probes, outputs="loss", generator=generator, most_rows=self.most_rows)
        return gradient_noise(kernel.gram, population=population), noise_lipschitz(kernel.gram)

    def _found(
        self, ends: Ritz, noise: GradientNoise, pairs: Tensor, rule: FrozenRule, snapshot: Snapshot
    ) -> dict[str, float | Tensor]:
        mu, mu_residual = float(ends.values[0]), float(ends.residuals[0])
        top = int(ends.values.abs().argmax())
        L, L_residual = float(ends.values[top].abs()), float(ends.residuals[top])
        fit = fit_noise(*pairs.unbind(1))
        found: dict[str, float | Tensor] = {
            "stability/smoothness": L,
            "stability/smoothness_residual": L_residual,
            "stability/strong_convexity": mu,
            "stability/strong_convexity_residual": mu_residual,
            "stability/gradient_variance": pairs[-1, 1],
            "stability/gradient_variance_error": pairs[-1, 2],
            "stability/gradient_noise_scale": noise.scale,
            "stability/gradient_noise_scale_lower": noise.lower,
            "stability/gradient_noise_scale_upper": noise.upper,
            "stability/sigma_0_squared": fit.sigma_0_squared,
            "stability/sigma_0_squared_error": fit.sigma_0_squared_error,
            "stability/sigma_1_squared": fit.sigma_1_squared,
            "stability/sigma_1_squared_error": fit.sigma_1_squared_error,
        }
        if bool(noise.upper.isnan()):  # no number without its error
            del found["stability/gradient_noise_scale"]
        positive = mu > _rounding(snapshot, self.path(snapshot)) * L
        if not positive or mu > mu_residual:
            found["stability/sgd_law_violated"] = float(not positive)
        plain = _plain(rule) and snapshot.run.prox is None
        if plain and bool(fit.sigma_0_squared.isfinite()):
            squares = {"smoothness": L, "sigma_1_squared": float(fit.sigma_1_squared)}
            # Where the lowest eigenpair has not converged, by what its residual leaves of mu: q must not be flattered.
            lowest = mu if positive and mu > mu_residual else min(mu, mu - mu_residual)
            found["stability/sgd_law_q"] = contraction_factor(rule.lr, convexity=lowest, **squares)
            if positive and mu > mu_residual:
                law = sgd_law(rule.lr, convexity=mu, sigma_0_squared=float(fit.sigma_0_squared), **squares)
                found |= {"stability/sgd_law_eta_max": law.eta_max, "stability/sgd_law_floor": law.floor}
        form = None if snapshot.run.schedulers is None else robbins_monro(*snapshot.run.schedulers).holds
        if form is not None:
            found["stability/robbins_monro"] = float(form)
        if snapshot.run.series is not None and len(snapshot.run.series):
            rates = snapshot.run.series.rates
            found["stability/rate_sum"], found["stability/rate_square_sum"] = rates.total, rates.squares
            decay = rate_decay(rates.marks, gap=rates.gap)
            if form is None and decay.holds is not None:
                found["stability/rate_decay"] = decay.exponent
                found["stability/robbins_monro_so_far"] = float(decay.holds)
        return found

    def compute(self) -> dict[str, Tensor]:
        """The last measurement; what is not known is left out."""
        found = dict(zip((*self.keys, *self.optional), self.values))
        return {key: value for key, value in found.items() if key in self.keys or not bool(value.isnan())}


def _extended(curvatures: Tensor, ends: Ritz) -> Tensor:
    """The least and the largest curvatures with those of one more batch."""
    values, residuals = ends.values.double().cpu(), ends.residuals.double().cpu()
    top = values.abs().argmax()
    least = values[0] - residuals[0]
    largest = torch.stack([values[top].abs(), values[top].abs() + residuals[top]])
    return torch.cat([torch.minimum(curvatures[:1], least[None]), torch.maximum(curvatures[1:], largest)])


def _gain(lr: float, curvatures: Tensor, rounding: float) -> float:
    """C_u; NaN where some batch's step does not contract."""
    least, _, largest = curvatures.tolist()
    if not (rounding * largest < least and lr * largest < 2):
        return math.nan
    return noise_gain(lr, convexity=least, smoothness=largest)


def _plain(rule: FrozenRule) -> bool:
    """Whether the step is ``theta - lr G``, all parameters at one rate and nothing clipped."""
    one = all(isinstance(scale, float) and scale == 1.0 for scale in rule.scale.values())
    decays = any(rule.decoupled_decay.values())
    return one and not (rule.momentum or rule.frozen or decays or rule.sign < 0) and rule.lr > 0


def _rounding(snapshot: Snapshot, path: str) -> float:
    """Of an eigenvalue, relative to L: products that come out of it cannot tell it from 0."""
    if snapshot.graph.dtype.itemsize <= 2:
        return 2e-2
    full = snapshot.graph.dtype == torch.float64
    if path.startswith("finite"):
        return 1e-6 if full else 2e-3
    return 1e-10 if full else 1e-5
