"""A table of what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.report.curves import latest, load, readings

if TYPE_CHECKING:
    from rich.table import Table

#: In the order of the rows; what is not here comes after these.
MEANINGS = {
    "courant": "rate / largest stable rate: 1 is the edge",
    "courant_sgd": "the same, by the exponent of SGD",
    "courant_mean_square": "the same, by its second moment",
    "courant_gd": "the same, by the curvature of one batch",
    "critical_lr": "where SGD loses linear stability",
    "mean_square_lr": "where its second moment does",
    "steps_to_edge": "until the schedule crosses the edge",
    "sgd_lyapunov": "SGD frozen at the weights, nats a step",
    "sgd_moment_2": "growth of E |v|^2, nats a step",
    "sgd_moment_4": "of E |v|^4: above 0 rare runs explode",
    "kernel_rank": "of the Gram matrix of output gradients",
    "kernel_trace": "of the mean Gauss-Newton matrix",
    "collapsed": "1: outputs do not depend on inputs, for good",
    "batch_sharpness": "curvature along the batch's gradient",
    "batch_sharpness_of_means": "ratio of means of the same",
    "robustness_prediction": "outputs, per unit of the input, first order",
    "robustness_prediction_upper": "and at most, first order",
    "robustness_prediction_lower": "the same, reached by a real displacement",
    "robustness_prediction_certified": "for every input, and any displacement",
    "robustness_prediction_theta": "outputs, per unit of the parameters",
    "robustness_prediction_theta_upper": "and at most, first order",
    "robustness_prediction_theta_lower": "the same, reached",
    "robustness_explanation": "input gradient, per unit of the input",
    "robustness_explanation_upper": "and at most, first order",
    "robustness_explanation_lower": "the same, reached",
    "robustness_explanation_theta": "input gradient, per unit of the parameters",
    "robustness_explanation_theta_upper": "and at most, first order",
    "robustness_explanation_theta_lower": "the same, reached",
    "robustness_kinked": "1: explanations jump, read what is reached",
    "leave_one_out_parameters": "their response to a sample's removal",
    "leave_one_out_parameters_max": "the largest of the samples looked at",
    "leave_one_out_loss": "rise of the removed sample's own loss",
    "leave_one_out_loss_max": "the largest of the samples looked at",
    "leave_one_out_next_loss": "largest change of another batch's loss",
    "alpha_x": "log growth a layer of the input's perturbation",
    "alpha_x_median": "the same of the median sample",
    "alpha_x_jacobian_bound": "its bound by the layers' Jacobians",
    "alpha_x_jacobian_gap": "that bound less alpha_x",
    "alpha_x_norm_bound": "its bound by weights and activations",
    "alpha_x_norm_gap": "that bound less alpha_x",
    "sigma_x_max": "largest input sensitivity at any depth",
    "sigma_x_converged": "1: all these norms have converged",
    "depth": "layers that alpha_x is divided by",
    "alpha_theta": "log growth a step, lower bound over T steps",
    "alpha_theta_bound": "and at most",
    "alpha_theta_gap": "that bound less alpha_theta",
    "alpha_theta_mean_square": "of random directions, nats a step",
    "alpha_u": "growth of gradient noise, nats a step",
    "alpha_u_bound": "and at most",
    "alpha_u_gap": "that bound less alpha_u",
    "alpha_output": "growth in function space, nats a step",
    "sigma_theta": "d theta_T / d theta_0, a lower bound",
    "sigma_theta_bound": "and at most",
    "sigma_theta_mean_square": "of random directions, squared",
    "sigma_u": "parameters' displacement by unit noise",
    "sigma_u_lower": "at least",
    "sigma_u_bound": "and at most",
    "sigma_output": "d outputs / d theta_0, a lower bound",
    "sigma_output_bound": "and at most",
    "sigma_explanation": "d input gradients / d theta_0, a lower bound",
    "sigma_explanation_bound": "and at most",
    "horizon": "steps T that alpha_theta is divided by",
    "lyapunov": "sharp-mode growth, nats a step; > 0 amplifies",
    "lyapunov_lower": "its one-sided 90 % bound",
    "lyapunov_upper": "its one-sided 90 % bound",
    "lyapunov_trajectory": "over all parameters, nats a step",
    "lyapunov_trajectory_error": "its standard error",
    "sharpness": "largest Hessian eigenvalue",
    "sharpness_limit": "the sharpness that this rate can bear",
    "hessian_trace": "sum of the Hessian's eigenvalues",
    "hessian_effective_rank": "trace^2 / trace of the square",
    "hessian_negative_mass": "share of eigenvalues surely below 0",
    "hessian_zero_mass": "share that cannot be told from 0",
    "hessian_min": "least Ritz value: a saddle below 0",
    "hessian_min_residual": "an eigenvalue lies within it of that",
    "hessian_outliers": "eigenvalues apart from the bulk",
    "hessian_bulk_edge": "largest eigenvalue of the bulk, or below",
    "hessian_mp_distance": "of the bulk from a Marchenko-Pastur law",
    "hessian_mp_ratio": "of that law: rows / columns",
    "hessian_mp_scale": "its mean without the zeros",
    "hessian_mp_zero_mass": "its share of zeros",
    "secant_ratio": "gradient's change over the Hessian's",
    "secant_unexplained": "share of it that the Hessian misses",
    "secant": "gradient's change by the step's length",
    "secant_curvature": "the Hessian's along the step",
    "clarke_lower": "output by input, kinks free: at least",
    "clarke_upper": "and at most",
    "clarke_ordinary": "the same with the slopes as they are",
    "clarke_near": "units near a kink, of a sample",
    "clarke_exact": "share of samples where the sup is exact",
    "clarke_theta_lower": "d theta_T / d theta_0, kinks free: at least",
    "clarke_theta_upper": "and at most",
    "clarke_theta_ordinary": "the same with the slopes as they are",
    "clarke_u_lower": "d theta_T / d noise, kinks free: at least",
    "clarke_u_upper": "and at most",
    "clarke_u_ordinary": "the same with the slopes as they are",
    "clarke_alpha_theta_lower": "growth a step, kinks free: at least",
    "clarke_alpha_theta_upper": "and at most",
    "clarke_alpha_u_lower": "growth of noise, kinks free: at least",
    "clarke_alpha_u_upper": "and at most",
    "clarke_training_near": "units of loss and prox near a kink",
    "clarke_training_exact": "1: the sups are exact",
    "prox_gain": "one step's stretch, prox included: at least",
    "prox_gain_bound": "and at most, where that is promised",
    "prox_descent": "objective's fall by the step's square",
    "prox_descent_promised": "the least that is promised of it",
    "residual_gain_max": "log of a block's largest stretch: expands above 0",
    "residual_gain_bound_max": "and at most",
    "residual_stiffness_max": "above 1 a block expands; below proves nothing",
    "residual_cfl_max": "below 1 a block contracts; above proves nothing",
    "residual_dissipative": "share of blocks that a small h would make contract",
    "dissipation": "share of its height that the loss loses a step",
    "dissipation_lower": "its one-sided 90 % bound",
    "dissipation_upper": "its one-sided 90 % bound",
    "dissipation_floor": "where the loss comes to rest",
    "energy_increases": "share of steps in which the loss rose",
    "smoothness": "L: largest |eigenvalue| of the Hessian",
    "strong_convexity": "mu: its smallest eigenvalue, from above",
    "sgd_law_violated": "1: mu is not positive, SGD's law is silent",
    "sgd_law_q": "contraction of ||theta - theta*||^2 a step",
    "sgd_law_eta_max": "rates below it contract; cautious",
    "sgd_law_floor": "of ||theta - theta*||^2, held up by noise",
    "gradient_lipschitz": "L_G, of the batches so far: at least",
    "noise_lipschitz": "L_u, by the samples' weights: at least",
    "noise_gain": "C_u: displacement by noise over rate x L_u",
    "gradient_variance": "of the mini-batch gradient",
    "sigma_0_squared": "of it at the reference",
    "sigma_1_squared": "its growth with squared distance",
    "gradient_noise_scale": "batch size at which noise equals signal",
    "gradient_noise_scale_lower": "its one-sided 90 % bound",
    "gradient_noise_scale_upper": "its one-sided 90 % bound",
    "robbins_monro": "1: the schedule fades as it should, by form",
    "rate_sum": "of the learning rates, so far",
    "rate_square_sum": "of their squares, so far",
    "overflow_headroom": "bits to overflow, the least of the next three",
    "activation_headroom_min": "of what the forward pass computes",
    "gradient_headroom_min": "of what the backward pass computes",
    "weight_headroom_min": "of the parameters",
    "gradient_underflow": "share of the backward pass below its range",
    "update_lost": "share of updates that rounding swallows",
    "nonfinite_step": "the first with NaN or Inf",
    "spectral_norm_max": "largest operator norm of a layer",
    "spectral_log_sum": "sum of the layers' log norms, nats",
    "forward_gain_min": "least rms out / rms in of a layer: 1 is healthy",
    "forward_gain_max": "largest of the same",
    "forward_log_gain": "of the whole network, nats",
    "backward_gain_min": "least gain of the gradient in a layer: 1 is healthy",
    "backward_gain_max": "largest of the same",
    "backward_log_gain": "of the gradient, from the last layer to the first, nats",
    "dead_share": "of units that pass no gradient",
    "saturated_share": "of units that pass less than 1/20",
    "kurtosis_max": "largest excess kurtosis of a weight: 0 is normal",
    "kurtosis_initial_max": "the same before the first update",
    "condition_max": "largest condition number of a small layer",
    "condition_lower_max": "lower bound of that of a large one",
    "loss_condition_lower": "sharpest curvature / that along the gradient",
    "batch_norm_drift_max": "batch mean off the running one, standard deviations",
    "batch_norm_excess_max": "drift / what sampling explains: 1 is healthy",
    "batch_norm_output_change": "of the output by batch statistics, relative",
    "lipschitz_lower": "largest norm of the input Jacobian at samples",
    "lipschitz_upper": "for every input",
}
_EDGES = {
    "courant": 1.0, "courant_sgd": 1.0, "courant_mean_square": 1.0, "courant_gd": 1.0, "collapsed": 0.5,
    "lyapunov": 0.0, "lyapunov_lower": 0.0, "residual_stiffness_max": 1.0,
}  # fmt: skip
#: Errors are shown beside what they belong to.
_ERRORS = {
    "critical_lr": "critical_lr_error",
    "sgd_lyapunov": "sgd_lyapunov_error",
    "alpha_theta_mean_square": "alpha_theta_mean_square_error",
    "alpha_u": "alpha_u_error",
    "alpha_output": "alpha_output_error",
    "sigma_theta_mean_square": "sigma_theta_mean_square_error",
    "sigma_u": "sigma_u_error",
    "sigma_x_max": "sigma_x_residual",
    "batch_sharpness": "batch_sharpness_error",
    "batch_sharpness_of_means": "batch_sharpness_of_means_error",
    "secant": "secant_error",
    "sharpness": "sharpness_residual",
    "courant_gd": "courant_gd_residual",
    "dissipation_floor": "dissipation_floor_error",
    "gradient_variance": "gradient_variance_error",
    "sigma_0_squared": "sigma_0_squared_error",
    "sigma_1_squared": "sigma_1_squared_error",
    "hessian_trace": "hessian_trace_error",
    "hessian_effective_rank": "hessian_effective_rank_error",
    "hessian_negative_mass": "hessian_negative_mass_error",
    "prox_gain": "prox_gain_residual",
    "prox_descent": "prox_descent_error",
    "residual_gain_max": "residual_lanczos_error",
    "robustness_prediction": "robustness_residual",
    "leave_one_out_parameters": "leave_one_out_parameters_error",
    "leave_one_out_loss": "leave_one_out_loss_error",
    "spectral_norm_max": "spectral_norm_residual",
}


def table(history: Mapping[str, Curve]) -> Table:
    """One row a quantity: its last reading, its range over the run, the step of the last measurement, its meaning.

    What is measured by layer has one row a kind, with the range over the layers at their last reading and the three
    largest.

    Args:
        history: of the `StabilityMonitor`.

    Raises:
        ImportError: without rich.
    """
    curves = {key.removeprefix("stability/"): curve for key, curve in history.items()}
    curves.pop("courant_source", None)
    for name in ("courant_sgd", "courant_gd"):  # what is shown as "courant" already
        if curves.get("courant") == curves.get(name):
            curves.pop(name, None)
    errors = {of: latest(curves.pop(name, None)) for of, name in _ERRORS.items()}
    rows = load("rich.table").Table(
        title="Stability", title_justify="left", title_style="bold", box=load("rich.box").SIMPLE_HEAD
    )
    rows.add_column("quantity", no_wrap=True)
    for column in ("last", "min", "max", "step"):
        rows.add_column(column, justify="right", no_wrap=True)
    rows.add_column("meaning")

    names = [*(name for name in MEANINGS if name in curves), *(n for n in curves if n not in MEANINGS and "/" not in n)]
    for name in names:
        known = readings(curves[name]) or [math.nan]
        meaning = MEANINGS.get(name, "")
        if not math.isnan(error := errors.get(name, math.nan)):
            if name in ("sharpness", "courant_gd"):  # one-sided
                meaning += f" (at most {error:.1%} more)"
            else:
                meaning += f" (± {error:.2g})" if _ERRORS[name].endswith("_error") else f" (residual {error:.1%})"
        if failed := sum(map(math.isnan, curves[name].values)):
            meaning += f" [yellow]({failed} NaN)[/]"
        style = "red" if known[-1] > _EDGES.get(name, math.inf) else "bold"
        cells = (f"[{style}]{known[-1]:.3g}[/]", f"{min(known):.3g}", f"{max(known):.3g}", str(curves[name].steps[-1]))
        rows.add_row(name, *cells, meaning)

    kinds: dict[str, list[tuple[float, str, int]]] = {}
    for name, curve in curves.items():
        kind, _, layer = name.partition("/")
        if layer and readings(curve):
            kinds.setdefault(kind, []).append((latest(curve), layer, curve.steps[-1]))
    for kind, layers in kinds.items():
        layers.sort(reverse=True)
        meaning = ", ".join(f"{layer} {value:.3g}" for value, layer, _ in layers[:3])
        meaning += f" (of {len(layers)})" if len(layers) > 3 else ""
        step = str(max(step for *_, step in layers))
        rows.add_row(f"{kind}/*", "", f"{layers[-1][0]:.3g}", f"{layers[0][0]:.3g}", step, meaning, style="dim")
    return rows


def show(*parts: Table | str) -> None:
    """Prints tables and sentences, above a progress bar that is on its way.

    Args:
        parts: strings are printed as they are.
    """
    console = load("rich.console").Console()
    if not console.is_terminal:  # nothing to fit into: as wide as it likes
        console.width = 130
    console.print()  # a bar leaves the cursor at its end
    for part in parts:
        plain = isinstance(part, str)
        console.print(part, soft_wrap=plain, markup=not plain, highlight=False)
