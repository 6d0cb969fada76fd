"""A table of what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lsp_callbacks.monitor import Curve
from lsp_callbacks.report.series import latest, load, readings

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
    "kernel_rank": "of the Gram matrix of output gradients",
    "kernel_trace": "of the mean Gauss-Newton matrix",
    "collapsed": "1: outputs do not depend on inputs",
    "batch_sharpness": "curvature along the batch's gradient",
    "batch_sharpness_of_means": "ratio of means of the same",
    "lyapunov": "sharp-mode growth, nats a step; > 0 amplifies",
    "lyapunov_lower": "its one-sided 90 % bound",
    "lyapunov_upper": "its one-sided 90 % bound",
    "lyapunov_trajectory": "over all parameters, nats a step",
    "lyapunov_trajectory_error": "its standard error",
    "sharpness": "largest Hessian eigenvalue",
    "sharpness_limit": "the sharpness that this rate can bear",
    "secant_ratio": "gradient's change over the Hessian's",
    "secant_unexplained": "share of it that the Hessian misses",
    "secant": "gradient's change by the step's length",
    "secant_curvature": "the Hessian's along the step",
    "clarke_lower": "output by input, kinks free: at least",
    "clarke_upper": "and at most",
    "clarke_ordinary": "the same with the slopes as they are",
    "clarke_near": "units near a kink, of a sample",
    "clarke_exact": "share of samples where the sup is exact",
    "prox_gain": "one step's stretch, prox included: at least",
    "prox_gain_bound": "and at most, where that is promised",
    "prox_descent": "objective's fall by the step's square",
    "prox_descent_promised": "the least that is promised of it",
    "residual_stiffness_max": "above 1 a residual block expands",
    "residual_cfl_max": "largest h / h_max of the dissipative blocks",
    "residual_dissipative": "share of such blocks",
    "spectral_norm_max": "largest operator norm of a layer",
    "spectral_log_sum": "sum of the layers' log norms, nats",
}
_EDGES = {
    "courant": 1.0, "courant_sgd": 1.0, "courant_mean_square": 1.0, "courant_gd": 1.0, "collapsed": 0.5,
    "lyapunov": 0.0, "lyapunov_lower": 0.0, "residual_stiffness_max": 1.0,
}  # fmt: skip
#: Errors are shown beside what they belong to.
_ERRORS = {
    "critical_lr": "critical_lr_error",
    "sgd_lyapunov": "sgd_lyapunov_error",
    "batch_sharpness": "batch_sharpness_error",
    "batch_sharpness_of_means": "batch_sharpness_of_means_error",
    "secant": "secant_error",
    "sharpness": "sharpness_residual",
    "prox_gain": "prox_gain_residual",
    "prox_descent": "prox_descent_error",
    "residual_stiffness_max": "residual_residual",
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
