"""Laws of scaling: what each number of each quantity does when the units of a run change, stated once, as data.

A run has units: of its loss, of its parameters, of its outputs and of the weights as they are applied. Change them, and
with them the optimizer's settings so that it is the same run, and a number must change by the power that its own unit
says. ``UNITS`` says it for every key; `factors` says what each law does to the units.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from problems import Regression, freeze, random, seeded, take
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lsp_callbacks import ProbeSet, Trace, Unmeasurable
from lsp_callbacks.quantities import REGISTRY, Quantity
from lsp_callbacks.step.criterion import evaluation

# -- units ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """``loss^a parameter^b output^c weight^d rate^e passed^f``.

    Attributes:
        weight: a weight matrix as it is applied.
        rate: the optimizer's.
        passed: all weights on the way to the layer that the key names.
        logs: where it is not 0, the number is so many logarithms of the rest.
        beside: the key whose size deviations are measured by, for errors and residuals that are themselves rounding;
            "1" for what has no unit.
        least: the number is the least of those whose key contains this, which may have different units.
        most: likewise the largest.
        around: the number is the far end of an interval whose other end is that key. How far it is away follows from
            rounding and from where its search stops: in float32 deviations count beyond the interval's width.
        free: why no law holds, where none does.
    """

    loss: float = 0
    parameter: float = 0
    output: float = 0
    weight: float = 0
    rate: float = 0
    passed: float = 0
    logs: float = 0
    beside: str = ""
    least: str = ""
    most: str = ""
    around: str = ""
    free: str = ""

    def expected(self, value: float, factor: dict[str, float]) -> float:
        """The number in the new units."""
        log = sum(power * math.log(factor[name]) for name in factor if (power := getattr(self, name)))
        return value + self.logs * log if self.logs else value * math.exp(log)


#: A number without a unit.
ONE = Unit()
CURVATURE = Unit(loss=1, parameter=-2)
GRADIENT_SQUARED = Unit(loss=2, parameter=-2)


def error(unit: Unit, key: str) -> Unit:
    return replace(unit, beside=key)


def _with_errors(unit: Unit, *keys: str, ends: tuple[str, ...] = ("_error",)) -> dict[str, Unit]:
    found = {}
    for key in keys:
        found |= {key: unit} | {key + end: error(unit, key) for end in ends}
    return found


#: By quantity and key; "/*" at the end stands for the name of a layer.
UNITS: dict[str, dict[str, Unit]] = {
    "spectral_norm": {
        "spectral_norm_max": Unit(weight=1),
        "spectral_log_sum": Unit(output=1, logs=1),
        "spectral_norm_residual": error(ONE, "1"),
        "spectral_norm/*": Unit(weight=1),
    },
    "residual_cfl": {
        "residual_stiffness_max": ONE,
        "residual_dissipative": ONE,
        "residual_cfl_max": ONE,
        "residual_lanczos_error": error(ONE, "1"),
        "residual_gain_max": ONE,
        "residual_gain_bound_max": ONE,
        "residual_gain_bound/*": ONE,
        "residual_stiffness/*": ONE,
        "residual_cfl/*": ONE,
        "residual_gain/*": ONE,
        "residual_m/*": ONE,
        "residual_M/*": ONE,
        "residual_h_max/*": ONE,
        "residual_h_exact/*": ONE,
    },
    "sharpness": {
        "sharpness": CURVATURE,
        "sharpness_limit": CURVATURE,
        "courant_gd": ONE,
        "sharpness_residual": error(ONE, "1"),
        "courant_gd_residual": error(ONE, "1"),
    },
    "mean_square_stability": {
        "courant_mean_square": ONE,
        "mean_square_lr": Unit(rate=1),
        "collapsed": ONE,
        "mean_square_rows": ONE,
    },
    "sgd_stability": {
        **_with_errors(Unit(rate=1), "critical_lr"),
        **_with_errors(ONE, "sgd_lyapunov"),
        "courant_sgd": ONE,
        "kernel_rank": ONE,
        "kernel_trace": Unit(rate=-1),
        "gd_lyapunov": ONE,
        "sgd_lyapunov_least": ONE,
        "sgd_lyapunov_most": ONE,
        "sgd_moment_2": ONE,
        "sgd_moment_4": ONE,
        "sgd_lyapunov_finite": ONE,
        "sgd_lyapunov_finite_spread": ONE,
        "kernel_margin": ONE,
        "kernel_components": ONE,
    },
    "lyapunov": {
        "lyapunov": ONE,
        "lyapunov_lower": error(ONE, "lyapunov"),
        "lyapunov_upper": error(ONE, "lyapunov_lower"),  # near 0 where the interval is not: its size is the scale
    },
    "lyapunov_trajectory": {
        **_with_errors(ONE, "lyapunov_trajectory"),
        "lyapunov_spectrum/*": ONE,
    },
    "batch_sharpness": {
        **_with_errors(CURVATURE, "batch_sharpness", "batch_sharpness_of_means"),
        "batch_sharpness_batches": ONE,
    },
    "dissipation": {
        "dissipation": ONE,
        "dissipation_lower": ONE,
        "dissipation_upper": ONE,
        "energy_increases": ONE,
        **_with_errors(Unit(loss=1), "dissipation_floor"),
        **{f"{key}_of/*": ONE for key in ("dissipation", "dissipation_lower", "dissipation_upper", "energy_increases")},
        **{f"dissipation_floor{end}_of/*": Unit(parameter=2) for end in ("", "_error")},  # of the distance
    },
    "sgd_law": {
        **_with_errors(CURVATURE, "smoothness", ends=("_residual",)),
        **{f"strong_convexity{end}": error(CURVATURE, "smoothness") for end in ("", "_residual")},
        **_with_errors(GRADIENT_SQUARED, "gradient_variance", "sigma_0_squared"),
        **_with_errors(Unit(loss=2, parameter=-4), "sigma_1_squared"),
        "sgd_law_violated": ONE,
        "sgd_law_q": ONE,
        "sgd_law_eta_max": Unit(loss=-1, parameter=2),
        "sgd_law_floor": Unit(parameter=2),
        "gradient_noise_scale": ONE,
        "gradient_noise_scale_lower": ONE,
        "gradient_noise_scale_upper": ONE,
        "robbins_monro": ONE,
        "rate_sum": Unit(rate=1),
        "rate_square_sum": Unit(rate=2),
        "rate_decay": ONE,
        "robbins_monro_so_far": ONE,
        "gradient_lipschitz": CURVATURE,
        "noise_lipschitz": Unit(loss=1, parameter=-1),
        "noise_gain": ONE,
    },
    "spectral_density": {
        **_with_errors(CURVATURE, "hessian_trace"),
        "hessian_min": error(CURVATURE, "hessian_trace"),
        "hessian_min_residual": error(CURVATURE, "hessian_trace"),
        **_with_errors(ONE, "hessian_negative_mass", "hessian_effective_rank"),
        "hessian_zero_mass": ONE,
        "hessian_outliers": ONE,
        "hessian_bulk_edge": CURVATURE,
        "hessian_mp_distance": ONE,
        "hessian_mp_ratio": ONE,
        "hessian_mp_scale": CURVATURE,
        "hessian_mp_zero_mass": ONE,
    },
    "signal_propagation": {
        **{f"{way}_gain_{end}": Unit(weight=1) for way in ("forward", "backward") for end in ("min", "max")},
        "forward_log_gain": Unit(output=1, logs=1),
        "backward_log_gain": Unit(weight=1, logs=1),  # from the output to the first of two layers
        "dead_share": ONE,
        "saturated_share": ONE,
        "kurtosis_max": ONE,
        "kurtosis_initial_max": ONE,
        "condition_max": ONE,
        "condition_lower_max": ONE,
        "loss_condition_lower": ONE,
        "batch_norm_drift_max": ONE,
        "batch_norm_excess_max": ONE,
        "batch_norm_output_change": ONE,
        "lipschitz_lower": Unit(output=1),
        "lipschitz_upper": Unit(output=1),
        "forward_gain/*": Unit(weight=1),
        "backward_gain/*": Unit(weight=1),
        **{
            f"{key}/*": ONE
            for key in (
                "dead_units", "saturated_units", "flat_slopes", "kurtosis", "condition", "condition_lower",
                "batch_norm_mean_drift", "batch_norm_mean_error", "batch_norm_variance_drift",
                "batch_norm_variance_error",
            )
        },
    },
    "numerics": {
        "overflow_headroom": Unit(least="_headroom_min"),
        "activation_headroom_min": Unit(least="activation_headroom/"),
        "gradient_headroom_min": Unit(least="gradient_headroom/"),
        "weight_headroom_min": Unit(parameter=1, logs=-1 / math.log(2)),
        "gradient_underflow": Unit(free="the smallest normal number is a constant of the type"),
        "update_lost": ONE,
        "nonfinite_step": ONE,
        "activation_headroom/*": Unit(passed=1, logs=-1 / math.log(2)),
        "activation_headroom/(root)": Unit(free="outputs, errors and the loss have no unit in common"),
        "gradient_headroom/*": Unit(loss=1, weight=-1, logs=-1 / math.log(2)),  # of what enters
        "gradient_headroom/*.weight": Unit(loss=1, parameter=-1, logs=-1 / math.log(2)),
        "gradient_headroom/*.bias": Unit(loss=1, parameter=-1, logs=-1 / math.log(2)),
        "gradient_headroom/(root)": Unit(free="gradients of outputs, errors and the loss have no unit in common"),
        "weight_headroom/*": Unit(parameter=1, logs=-1 / math.log(2)),
    },
    "robustness": {
        **{
            f"robustness_{of}{by}{end}": Unit(output=1, parameter=-1 if by else 0)
            for of in ("prediction", "explanation")
            for by in ("", "_theta")
            for end in ("", "_lower", "_upper")
        },
        "robustness_residual": error(ONE, "1"),
        "robustness_kinked": ONE,
        "robustness_prediction_certified": Unit(output=1),
    },
    "leave_one_out": {
        **_with_errors(Unit(parameter=1), "leave_one_out_parameters", ends=("_error", "_max")),
        **_with_errors(Unit(loss=1), "leave_one_out_loss", ends=("_error", "_max")),
        "leave_one_out_next_loss": Unit(loss=1),
    },
    "stability_profile": {
        **{f"alpha_x{end}": Unit(weight=1, logs=1) for end in ("", "_median", "_jacobian_bound", "_norm_bound")},
        "alpha_x_jacobian_gap": error(ONE, "1"),
        "alpha_x_norm_gap": error(ONE, "1"),
        "sigma_x_max": Unit(most="sigma_x/"),
        "sigma_x_residual": error(ONE, "1"),
        "sigma_x_converged": ONE,
        "sigma_x/*": Unit(passed=1),
        "depth": ONE,
        "horizon": ONE,
        "alpha_theta": ONE,
        "sigma_theta": ONE,
        **_with_errors(ONE, "alpha_theta_mean_square", "sigma_theta_mean_square", "alpha_u", "alpha_output"),
        **_with_errors(Unit(loss=-1, parameter=2), "sigma_u"),
        "sigma_theta_bound": Unit(around="sigma_theta"),
        "alpha_theta_bound": error(ONE, "1"),  # the logarithm of a bound, whose slack is rounding
        "alpha_theta_gap": error(ONE, "1"),
        "sigma_u_bound": Unit(loss=-1, parameter=2),
        "sigma_u_lower": Unit(loss=-1, parameter=2),
        "alpha_u_bound": ONE,
        "alpha_u_gap": error(ONE, "1"),
        **{
            f"sigma_{of}{end}": Unit(output=1, parameter=-1)
            for of in ("output", "explanation")
            for end in ("", "_bound")
        },
    },
    "clarke_profile": {
        "clarke_lower": Unit(output=1),
        "clarke_ordinary": Unit(output=1),
        "clarke_upper": Unit(output=1),
        "clarke_near": ONE,
        "clarke_exact": ONE,
        "clarke_sigma_lower/*": Unit(passed=1),
        "clarke_sigma_upper/*": Unit(passed=1),
    },
    "clarke_training": {
        **{f"clarke_theta_{end}": ONE for end in ("lower", "upper", "ordinary")},
        **{f"clarke_u_{end}": Unit(loss=-1, parameter=2) for end in ("lower", "upper", "ordinary")},
        **{f"clarke_alpha_{of}_{end}": ONE for of in ("theta", "u") for end in ("lower", "upper")},
        "clarke_training_near": ONE,
        "clarke_training_exact": ONE,
    },
    "courant_step": {"courant_step": ONE, "courant_step_error": error(ONE, "1")},
    "critical_sharpness": {
        "critical_sharpness": Unit(rate=-1),
        "critical_sharpness_error": error(ONE, "1"),
        "critical_multiple": ONE,
        "relative_critical_sharpness": Unit(rate=-1),
        "relative_critical_sharpness_error": error(ONE, "1"),
    },
    "secant_ratio": {
        "secant": CURVATURE,
        "secant_curvature": CURVATURE,
        "secant_unexplained": error(ONE, "1"),
        "secant_error": error(CURVATURE, "secant"),
        "secant_ratio": ONE,
    },
    "proximal_step": {
        "prox_gain": ONE,
        "prox_gain_residual": error(ONE, "prox_gain"),
        "prox_gain_bound": ONE,
        "prox_descent": CURVATURE,
        "prox_descent_promised": CURVATURE,
        "prox_descent_error": error(CURVATURE, "prox_descent"),
    },
}  # fmt: skip


def unit_of(name: str, key: str) -> Unit:
    """Raise KeyError where no law is stated."""
    short = key.removeprefix("stability/")
    family, _, layer = short.partition("/")
    last = layer.rpartition(".")[2]
    for known in (short, f"{family}/*.{last}", f"{family}/*"):
        if known in UNITS[name]:
            return UNITS[name][known]
    raise KeyError(f"{key} of {name} has no unit: state in UNITS how it scales")


# -- laws ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """A change of units by ``scale``.

    Attributes:
        name: "loss": the loss is multiplied. "inside": the module multiplies its parameters. "homogeneous": the weights
            of a network that is positively homogeneous in them are multiplied, and the targets so that they stay in
            reach. "targets": a network that is linear in its parameters learns other targets.
        scale: by how much.
    """

    name: str
    scale: float


#: Which networks have each law.
LAWS = {"loss": ("tanh", "relu", "linear"), "inside": ("tanh", "relu", "linear"), "homogeneous": ("relu", "linear")}
#: Degree of homogeneity in the parameters.
DEGREE = {"relu": 2, "linear": 1}


def factors(law: Law, model: str, optimizer: str) -> dict[str, float]:
    """By what each unit is multiplied."""
    s = law.scale
    if law.name == "loss":
        found = {"loss": s, "parameter": 1.0, "output": 1.0, "weight": 1.0}
    elif law.name == "inside":
        found = {"loss": 1.0, "parameter": 1 / s, "output": 1.0, "weight": 1.0}
    else:
        k = DEGREE[model]
        found = {"loss": s ** (2 * k), "parameter": s, "output": s**k, "weight": s}
    adaptive = optimizer in ("adam", "adamw")
    found["rate"] = found["parameter"] if adaptive else found["parameter"] ** 2 / found["loss"]
    return found


# -- runs ----------------------------------------------------------------------------------------------------------


class Times(nn.Module):
    """A parametrisation: what is applied is ``s`` times the parameter."""

    def __init__(self, s: float):
        super().__init__()
        self.s = s

    def forward(self, w: Tensor) -> Tensor:
        return self.s * w

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / self.s


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Loss(Regression):
    """``c`` times half the mean square."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, c: float = 1.0):
        super().__init__(net, x, y)
        self.c = c

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * self.c * (outputs - targets).square().sum(-1).mean()

    def forward(self, rows: slice = slice(None)) -> Tensor:
        return self.criterion(self.net(self.x[rows]), self.y[rows])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tanh": lambda: nn.Sequential(nn.Linear(2, 4), Block(), nn.Linear(4, 2)),
    "relu": lambda: nn.Sequential(nn.Linear(2, 6, bias=False), nn.ReLU(), nn.Linear(6, 1, bias=False)),
    "linear": lambda: nn.Sequential(nn.Linear(2, 3)),
}
#: Of the outputs.
WIDTH = {"tanh": 2, "relu": 1, "linear": 3}
SAMPLES, BATCH = 6, 2


def task_of(model: str, law: Law, dtype: torch.dtype) -> Loss:
    net = seeded(MODELS[model](), seed=3)
    x, y = random(SAMPLES, 2, seed=1), random(SAMPLES, WIDTH[model], seed=2)
    if law.name == "homogeneous":
        y = y * law.scale ** DEGREE[model]
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(law.scale)
    if law.name == "inside":
        for layer in [layer for layer in net.modules() if isinstance(layer, nn.Linear)]:
            for name in [name for name, _ in layer.named_parameters(recurse=False)]:
                parametrize.register_parametrization(layer, name, Times(law.scale))
    return Loss(net, x, y, law.scale if law.name == "loss" else 1.0).to(dtype)


def optimizer_of(kind: str, task: nn.Module, factor: dict[str, float]) -> torch.optim.Optimizer:
    """The same optimizer in other units: rates, coupled decay and Adam's eps have units of their own."""
    gradient = factor["loss"] / factor["parameter"]
    coupled = gradient / factor["parameter"]  # what is added to the gradient for a unit of the parameters
    rate, parameters = factor["rate"], list(task.parameters())
    if kind == "momentum":
        return torch.optim.SGD(parameters, lr=0.1 * rate, momentum=0.5, weight_decay=1e-2 * coupled)
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.2 * rate, weight_decay=1e-2 * coupled)
    adam: dict[str, Any] = {"lr": 0.02 * rate, "betas": (0.8, 0.9), "eps": 1e-3 * gradient}
    if kind == "adam":
        return torch.optim.Adam(parameters, weight_decay=1e-2 * coupled, **adam)
    return torch.optim.AdamW(parameters, weight_decay=0.1 / rate, **adam)


#: Steps before the first measurement.
BURN_IN = {"dissipation": 70, "sgd_law": 70}
MEASUREMENTS = {"sgd_law": 3, "lyapunov": 3}


def settings_of(name: str, method: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    plain = type(optimizer) is torch.optim.SGD and not optimizer.defaults["momentum"]
    found: dict[str, Any] = {
        "batch_sharpness": {"rtol": 1e9, "most": 8},
        "lyapunov": {"window": 2},
        # The second moment of momentum takes long.
        "sgd_stability": {
            "probes": SAMPLES,
            "chains": 4,
            "steps": 40,
            "horizon": 20 if plain else None,
            "moments": (2, 4) if plain else (),
        },
        "lyapunov_trajectory": {"k": 2, "transient": 1, "window": 40},
        "sgd_law": {"probes": SAMPLES, "products": 8},
        "leave_one_out": {"samples": 2, "window": 2},
        "clarke_training": {"horizon": 3},
        "stability_profile": {"horizon": 3, "directions": 3, "samples": 2, "probes": SAMPLES},
        "dissipation": {"reference": "initial"},
    }.get(name, {})
    if "method" in REGISTRY[name].__init__.__code__.co_varnames:
        found["method"] = method
    return found


def probes_of(task: Loss) -> ProbeSet:
    part = lambda: evaluation(task.net(task.x), lambda f: task.criterion(f, task.y), samples=SAMPLES)  # noqa: E731
    return ProbeSet(module=task, parts=(part,), samples=SAMPLES, batch_size=BATCH, population=SAMPLES)


def measured(
    name: str, law: Law, *, model: str, optimizer: str, dtype: torch.dtype, method: str, before: int | None = None
) -> dict[str, float]:
    """What the quantity says at the end of a short run, its batches in turn; ``before``: see `read`."""
    task = task_of(model, law, dtype)
    descent = optimizer_of(optimizer, task, factors(law, model, optimizer))
    return read(name, task, descent, method=method, before=BURN_IN.get(name, 4) if before is None else before)


def read(
    name: str,
    task: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    method: str = "auto",
    before: int = 0,
    **settings: Any,
) -> dict[str, float]:
    """What the quantity says of a run that goes on from here.

    Args:
        name: of the quantity.
        task: that is trained.
        optimizer: that trains it.
        method: of the Hessian products.
        before: steps before the first measurement.
        settings: of the quantity, beside `settings_of`.
    """
    metric: Quantity = REGISTRY[name](**settings_of(name, method, optimizer) | settings)
    trace = Trace(length=200, energies=getattr(metric, "energies", None))
    metric.begin(task)
    steps = before + MEASUREMENTS.get(name, 1) * (metric.prepare + metric.window)
    for step, rows in zip(range(steps), batches()):
        replay = lambda rows=rows: task(rows)  # noqa: E731
        trace.record(step, replay().detach(), lr=optimizer.param_groups[0]["lr"], module=task)
        if step >= before:
            metric.update(
                freeze(
                    task,
                    optimizer,
                    replay,
                    step=step,
                    captures_inputs=metric.captures_inputs,
                    probes=probes_of(task),
                    series=trace,
                )
            )
        take(optimizer, replay())
    return {key: float(value) for key, value in metric.compute().items()}


def copied(
    task: Loss, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None = None
) -> tuple[Loss, torch.optim.Optimizer]:
    """The same state of the same run, in another type where one is given."""
    twin = copy.deepcopy(task).to(dtype)
    other = type(optimizer)(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # with its settings, in the parameters' type
    return twin, other


def batches() -> Iterator[slice]:
    while True:
        for begin in range(0, SAMPLES, BATCH):
            yield slice(begin, begin + BATCH)


# -- deviations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deviation:
    """Of one number from its law, relative to the size of what it should be; NaN where it is not there."""

    key: str
    expected: float
    actual: float
    size: float

    @property
    def relative(self) -> float:
        if not math.isfinite(self.expected):  # not measured in the old units, either
            return 0.0 if not math.isfinite(self.actual) else math.nan
        return abs(self.actual - self.expected) / self.size if self.size else abs(self.actual)


def deviations(
    name: str,
    old: dict[str, float],
    new: dict[str, float],
    law: Law,
    model: str,
    kind: str,
    dtype: torch.dtype = torch.float64,
) -> list[Deviation]:
    """Of each key of the old numbers that has a law.

    Args:
        name: of the quantity.
        old: its numbers in the old units.
        new: those in the new ones.
        law: the change.
        model: of `MODELS`.
        kind: of the optimizer.
        dtype: of the run.
    """
    factor = factors(law, model, kind)
    here = {_plain(key): value for key, value in new.items() if not re.search(r"parametrizations\.\w+\.\d", key)}
    found = []
    for key, value in old.items():
        unit = unit_of(name, key)
        if unit.free:
            continue
        passed = factor["weight"] ** PASSED.get((model, key.rpartition("/")[2]), 1)
        if unit.least or unit.most:
            same = [number for other, number in new.items() if (unit.least or unit.most) in other and other != key]
            expected = (min if unit.least else max)(same, default=value)
        else:
            expected = unit.expected(value, factor | {"passed": passed})
        size = abs(expected)
        if unit.beside == "1" or unit.logs:
            size = max(size, 1.0)
        elif unit.beside:
            beside = unit_of(name, unit.beside).expected(old["stability/" + unit.beside], factor)
            size = max(size, abs(beside))
        actual = here.get(key, math.nan)
        if unit.around and dtype == torch.float32 and not _is_power_of_two(law.scale):
            other = unit_of(name, unit.around).expected(old["stability/" + unit.around], factor)
            beyond = abs(actual - expected) - abs(expected - other)
            actual = expected + max(beyond, 0.0)  # of a NaN and 0 that is the NaN
        found.append(Deviation(key, expected, actual, size))
    found += [Deviation(key, math.nan, here[key], 1.0) for key in sorted(here.keys() - old.keys())]
    return found


def _is_power_of_two(scale: float) -> bool:
    return math.frexp(scale)[0] == 0.5


#: Weights on the way to a layer, where there are more than one.
PASSED = {("relu", "net.2"): 2}


def _plain(key: str) -> str:
    """The name that a parameter has without parametrisations."""
    return key.replace(".parametrizations", "").replace(".original", "")


# -- tables --------------------------------------------------------------------------------------------------------

SCALES = (1e-6, 1e-3, 1e3, 1e6)
#: Scales that change no digit of any float: what is left is a number in the code that has no unit. Squares of gradients
#: go with the sixth power where a network is homogeneous of degree 2, and stay in float32's range: at 2^-20 Adam's
#: second moments are 1e-40, of which float32 holds four digits, and the run is another one.
POWERS_OF_TWO = (2.0**-16, 2.0**16)
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
#: In float32 products and differences are rounded, and what has converged in one run may go on in another.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 2e-2}
#: By quantity, in float32: which eigenvalues count as resolved is decided by rounding.
LOOSE = {"spectral_density": 0.1}


@dataclass
class Row:
    """Of one quantity, law and type: what became of its numbers.

    Attributes:
        numbers: how many there were.
        worst: the largest relative deviation, and where.
        missing: numbers that were there in the old units and not in the new ones.
        reasons: why, where a measurement was refused.
    """

    numbers: int = 0
    worst: tuple[float, str] = (0.0, "")
    missing: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, found: list[Deviation], where: str) -> None:
        for one in found:
            self.numbers += 1
            if math.isnan(one.relative):
                self.missing += 1
                self.reasons[f"{one.key} {where}"] = 1
            else:
                self.worst = max(self.worst, (one.relative, f"{one.key} {where}"))


def compared(
    name: str,
    *,
    dtype: torch.dtype,
    laws: tuple[str, ...] = tuple(LAWS),
    scales: tuple[float, ...] = SCALES,
    optimizers: tuple[str, ...] = OPTIMIZERS,
    models: tuple[str, ...] = tuple(MODELS),
    method: str = "auto",
    before: int | None = None,
) -> dict[str, Row]:
    """By law, what a quantity's numbers became in other units, over models, optimizers and scales."""
    rows = {law: Row() for law in laws}
    for model in models:
        for kind in optimizers:
            how: dict[str, Any] = {"model": model, "optimizer": kind, "dtype": dtype}
            how |= {"method": method, "before": before}
            try:
                old = measured(name, Law("loss", 1.0), **how)
            except Unmeasurable:
                continue  # nothing to compare with
            for law in (Law(one, scale) for one in laws for scale in scales if model in LAWS[one]):
                where = f"{model} {kind} {law.scale:g}"
                try:
                    new = measured(name, law, **how)
                except Unmeasurable as error:
                    new = {}
                    rows[law.name].reasons[f"{where}: {error}"] = 1
                rows[law.name].add(deviations(name, old, new, law, model, kind, dtype), where)
    return rows
