"""Profile in training time of `StabilityProfile`: the numbers of a window of steps, each as an interval."""

from __future__ import annotations

import math
from typing import Any

import torch

from lsp_callbacks.functional.trajectory.norm_intervals import norm_by_random_rows
from lsp_callbacks.functional.trajectory.training_profile import (
    FAILURE,
    Tangents,
    TrainingProfile,
    function_growth,
    training_profile,
)
from lsp_callbacks.linalg.logs import exp, log
from lsp_callbacks.quantities.key import NATS, Key, standard_error
from lsp_callbacks.quantities.trajectory.window_ends import Ends

RATE, OUTPUT = "learning rate", "output / parameter"
KEYS = {
    "alpha_theta": Key("Growth of a perturbation of the initial parameters, lower bound.", NATS),
    "sigma_theta": Key("||d theta_T / d theta_0|| over the window's T steps, lower bound.", ""),
    "alpha_theta_mean_square": Key("Growth of random perturbations in the mean square.", NATS),
    "alpha_theta_mean_square_error": standard_error("alpha_theta_mean_square", NATS),
    "sigma_theta_mean_square": Key("Squared growth factor of random perturbations, in the mean.", ""),
    "sigma_theta_mean_square_error": standard_error("sigma_theta_mean_square"),
    "alpha_u": Key("Growth of gradient noise, over the (T - 1) / 2 steps that it travels on average.", NATS),
    "alpha_u_error": standard_error("alpha_u", NATS),
    "sigma_u": Key("Root mean square displacement of the parameters by unit noise in each gradient.", RATE),
    "sigma_u_error": standard_error("sigma_u", RATE),
    "horizon": Key("Number of steps T that alpha_theta is divided by.", "steps"),
    "sigma_output": Key("||d outputs / d theta_0||, lower bound.", OUTPUT, optional=True),
    "alpha_output": Key(
        "Growth of random perturbations as the outputs show them.",
        NATS,
        "If above 0 while the loss does not fall: lower the learning rate.",
        optional=True,
    ),
    "alpha_output_error": standard_error("alpha_output", NATS, optional=True),
    "sigma_theta_bound": Key("Upper bound of sigma_theta.", optional=True),
    "alpha_theta_bound": Key("Upper bound of alpha_theta.", NATS, optional=True),
    "alpha_theta_gap": Key("That bound less alpha_theta.", NATS, optional=True),
    "sigma_u_bound": Key("Upper bound of sigma_u.", RATE, optional=True),
    "alpha_u_bound": Key("Upper bound of alpha_u.", NATS, optional=True),
    "alpha_u_gap": Key("That bound less alpha_u.", NATS, optional=True),
    "sigma_output_bound": Key("Upper bound of sigma_output.", OUTPUT, optional=True),
    "sigma_explanation": Key("||d input gradients / d theta_0||, lower bound.", optional=True),
    "sigma_explanation_bound": Key("Upper bound of sigma_explanation.", optional=True),
    "sigma_u_lower": Key("Lower bound of sigma_u.", RATE, optional=True),
}


def log_sensitivity(gram: torch.Tensor, now: Tangents) -> tuple[float, float]:
    """Return logs of wide ends of ``||J A_T ... A_1||``: lower by the frame, upper by its random directions."""
    lower, seen = (
        float(torch.linalg.eigvalsh(g)[-1].clamp_min(0).sqrt()) for g in (gram, gram[: now.random, : now.random])
    )
    upper = norm_by_random_rows(seen, now.random, now.size, failure=FAILURE)
    return log(lower) + now.frame_log, log(upper) + now.frame_log


def in_training(
    now: Tangents, grams: dict[str, torch.Tensor], ends: Ends | None, before: torch.Tensor | None
) -> dict[str, float]:
    """Return the numbers of a window by name; the ends of intervals are by random directions alone without ``ends``.

    Args:
        now: directions that were pushed through the window.
        grams: Gram matrices of their images at its end, by reader: "output", "explanation".
        ends: of the norms, in the order theta and ``grams``.
        before: squared sizes of the images of the random directions at the begin of the window.
    """
    profile = training_profile(now, None if ends is None else ends.noise)
    numbers: dict[str, Any] = vars(profile) | {"horizon": float(profile.steps)}
    for name in ("mean_square", "mean_square_error"):
        numbers[f"sigma_theta_{name}"], numbers[f"alpha_theta_{name}"] = numbers[name], numbers[f"alpha_{name}"]
    steps = profile.steps  # logs, as a window that explodes has exponents where its norms have overflowed
    logs = {"theta": (steps * float(profile.alpha_theta), steps * float(profile.alpha_theta_bound))}
    logs |= {name: log_sensitivity(gram, now) for name, gram in grams.items()}
    for i, (name, (lower, upper)) in enumerate(logs.items()):
        low, high = (-math.inf, upper) if ends is None else ends.log_norms[i]
        logs[name] = lower, upper = max(lower, low), max(lower, low, high)
        numbers[f"sigma_{name}"], numbers[f"sigma_{name}_bound"] = exp(lower), exp(upper)
    numbers |= _exponents(*logs["theta"], profile) | _mean_square_errors(logs["theta"][0], profile, now)
    if "output" in grams and before is not None:
        after = grams["output"].diagonal()[: now.random]
        growth = function_growth(before, after, now.frame_log, now.steps)
        numbers["alpha_output"], numbers["alpha_output_error"] = growth
    return {name: float(numbers[name]) for name in KEYS if name in numbers}


def _mean_square_errors(lower: float, profile: TrainingProfile, now: Tangents) -> dict[str, float]:
    """Return the standard errors of the mean square, by its scatter, but not below what the largest direction causes.

    Few random directions may all miss the one that grows most, and then agree: ``||M q||^2 / P`` of a Gaussian q has
    the variance ``2 tr (M^T M)^2 / P^2``, at least ``2 sigma_theta^4 / P^2``. All P orthogonal ones miss nothing.

    Args:
        lower: log of the lower end of sigma_theta.
        profile: of the window.
        now: its directions.
    """
    growth = 2 * profile.steps * float(profile.alpha_mean_square)  # log of the mean square
    scatter = 2 * profile.steps * float(profile.alpha_mean_square_error)
    missed = 2 * max(1 / now.random - 1 / now.size, 0.0)
    error = max(scatter, math.sqrt(missed) * exp(2 * lower - growth) / now.size)
    return {
        "sigma_theta_mean_square_error": exp(growth) * error,
        "alpha_theta_mean_square_error": error / (2 * profile.steps),
    }


def _exponents(lower: float, upper: float, profile: TrainingProfile) -> dict[str, float]:
    """Return the exponents of the ends of log sigma_theta, and the gaps of both exponents.

    The noise that was injected is known from random rows, up to the error of alpha_u.
    """
    lower, upper = lower / profile.steps, upper / profile.steps
    return {
        "alpha_theta": lower,
        "alpha_theta_bound": upper,
        "alpha_theta_gap": upper - lower if math.isfinite(lower) else math.nan,
        "alpha_u_gap": float(profile.alpha_u_bound - profile.alpha_u),
    }
