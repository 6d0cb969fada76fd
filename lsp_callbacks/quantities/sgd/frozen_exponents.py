"""Numbers of SGD frozen at one step: exponents, critical rates, moments, and the details of a finite horizon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.sgd.finite_products import finite_time_exponents, sum_of_exponents
from lsp_callbacks.functional.sgd.mean_square import second_moment_exponent
from lsp_callbacks.functional.sgd.modes import UpdateRule, regularity
from lsp_callbacks.functional.sgd.moment_exponent import moment_exponent
from lsp_callbacks.functional.sgd.sgd_stability import Sampling, critical_lr, gd_exponent, sgd_exponent
from lsp_callbacks.operators.sgd.frozen_sgd import FrozenSGD


@dataclass(frozen=True)
class RandomProduct:
    """How the random product of steps is simulated.

    Attributes:
        sampling: how batches are drawn.
        replacement: whether within a batch.
        chains: number of products.
        steps: in each of them.
    """

    sampling: Sampling
    replacement: bool
    chains: int
    steps: int


def batches_of(sgd: FrozenSGD, *, replacement: bool) -> dict[str, Any]:
    """Return how the batches of a frozen step are drawn, as the functions of `lsp_callbacks.functional` take it."""
    size = min(sgd.batch_size, sgd.population)
    return {"batch_size": size, "rule": sgd.rule, "replacement": replacement, "population": sgd.population}


def exponents(sgd: FrozenSGD, product: RandomProduct, generator: torch.Generator) -> dict[str, float]:
    """Return the critical rates, the Courant numbers and the exponents of a frozen step, by name.

    Raises:
        Unmeasurable: if the Gram matrix is not finite.
    """
    settings = batches_of(sgd, replacement=product.replacement)
    settings |= {"sampling": product.sampling, "chains": product.chains, "generator": generator}
    modes, half = sgd.modes, product.steps // 2
    critical = critical_lr(modes, steps=product.steps, tol=1e-4, **settings)
    exponent = sgd_exponent(modes, sgd.lr, steps=half, burn_in=half, **settings)
    full_batch = gd_exponent(modes, sgd.lr, rule=sgd.rule)
    if math.isnan(critical.value):
        raise Unmeasurable("the Gram matrix is not finite: the weights or the outputs have overflowed")
    return {
        "courant_sgd": courant_of(sgd.lr, critical.value),
        "critical_lr": critical.value,
        "critical_lr_error": critical.error,
        "sgd_lyapunov": float(exponent.value),
        "sgd_lyapunov_error": float(exponent.error),
        "kernel_rank": float(modes.rank),
        "kernel_trace": float(modes.trace),
        "gd_lyapunov": float(full_batch),
    }


def details(sgd: FrozenSGD, product: RandomProduct, horizon: int, generator: torch.Generator) -> dict[str, float]:
    """Return the exponents over ``horizon`` steps, the bounds of the exponent, and the regularity of the point."""
    batches = batches_of(sgd, replacement=product.replacement)
    finite = finite_time_exponents(
        sgd.modes, sgd.lr, horizon=horizon, sampling=product.sampling, generator=generator, **batches
    )
    least = math.nan
    if sgd.rule == UpdateRule() and sgd.population == sgd.modes.samples and sgd.modes.together == 1:
        logs = sum_of_exponents(sgd.modes, sgd.lr, batch_size=batches["batch_size"], generator=generator)
        least = float(logs.value) / max(sgd.modes.rank, 1)
    margin, components = regularity(sgd.kernel.gram, sgd.lr, sgd.kernel.rows)
    return {
        "sgd_lyapunov_least": least,
        "sgd_lyapunov_most": second_moment_exponent(sgd.modes, sgd.lr, tol=1e-4, **batches),
        "sgd_lyapunov_finite": float(finite.mean()),
        "sgd_lyapunov_finite_spread": float(finite.std()),
        "kernel_margin": margin,
        "kernel_components": float(components),
    }


def moment(sgd: FrozenSGD, product: RandomProduct, p: int) -> tuple[float, str]:
    """Return the exponent of the p-th moment, or NaN and the reason why it is not computed."""
    try:
        value = moment_exponent(sgd.modes, sgd.lr, p=p, **batches_of(sgd, replacement=product.replacement))
    except ValueError as error:
        return math.nan, str(error)
    return value, "its iteration did not converge" if math.isnan(value) and sgd.modes.rank else ""


def courant_of(lr: float, critical: float) -> float:
    """Return a Courant number; 0 at an infinite critical rate, infinite at one that cannot be told from 0."""
    return lr / critical if critical else math.inf
