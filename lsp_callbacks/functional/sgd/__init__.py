"""Stochastic gradient descent near a minimum: exponents, critical rates, noise."""

from lsp_callbacks.functional.sgd.finite_products import finite_time_exponents, sum_of_exponents
from lsp_callbacks.functional.sgd.gradient_noise import GradientNoise, batch_variance, gradient_noise
from lsp_callbacks.functional.sgd.gram_rate import gram_mean_square_lr
from lsp_callbacks.functional.sgd.mean_square import (
    gd_critical_lr,
    mean_square_lr,
    second_moment,
    second_moment_exponent,
)
from lsp_callbacks.functional.sgd.modes import Modes, UpdateRule, reduced_modes, regularity
from lsp_callbacks.functional.sgd.moment_exponent import moment_exponent
from lsp_callbacks.functional.sgd.positions import design_effect
from lsp_callbacks.functional.sgd.rate_decay import RateDecay, rate_decay
from lsp_callbacks.functional.sgd.robbins_monro import PowerLaw, RobbinsMonro, robbins_monro
from lsp_callbacks.functional.sgd.sgd_law import NoiseFit, SGDLawResult, fit_noise, noise_gain, noise_lipschitz, sgd_law
from lsp_callbacks.functional.sgd.sgd_stability import (
    CriticalRateResult,
    Exponent,
    critical_lr,
    gd_exponent,
    sgd_exponent,
)
from lsp_callbacks.functional.sgd.stability_diagram import StabilityDiagram, stability_diagram
from lsp_callbacks.functional.sgd.useful_batch import UsefulBatch, useful_batch

__all__ = [
    "CriticalRateResult",
    "Exponent",
    "GradientNoise",
    "Modes",
    "NoiseFit",
    "PowerLaw",
    "RateDecay",
    "RobbinsMonro",
    "SGDLawResult",
    "StabilityDiagram",
    "UpdateRule",
    "UsefulBatch",
    "batch_variance",
    "critical_lr",
    "design_effect",
    "finite_time_exponents",
    "fit_noise",
    "gd_critical_lr",
    "gd_exponent",
    "gradient_noise",
    "gram_mean_square_lr",
    "mean_square_lr",
    "moment_exponent",
    "noise_gain",
    "noise_lipschitz",
    "rate_decay",
    "reduced_modes",
    "regularity",
    "robbins_monro",
    "second_moment",
    "second_moment_exponent",
    "sgd_exponent",
    "sgd_law",
    "stability_diagram",
    "sum_of_exponents",
    "useful_batch",
]
