"""Whether signals and gradients pass through the network: gains, dead units, tails, conditions, norms, Lipschitz."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.arguments import whole
from lsp_callbacks.functional.batch_norm import batch_norm_drift
from lsp_callbacks.functional.condition import SMALL, condition, condition_lower, loss_condition_lower
from lsp_callbacks.functional.gains import gains
from lsp_callbacks.functional.kurtosis import excess_kurtosis
from lsp_callbacks.functional.lipschitz import Uncertified, lipschitz_lower, lipschitz_upper
from lsp_callbacks.functional.units import LEAST_ROWS, units
from lsp_callbacks.operators.batch_statistics import outputs
from lsp_callbacks.operators.curvature import Method, hessian, product_cost, resolved
from lsp_callbacks.operators.depth import depth
from lsp_callbacks.operators.footprint import product_memory
from lsp_callbacks.operators.signals import Signals, signals
from lsp_callbacks.operators.weights import weight_operators
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.snapshot import Snapshot, Unmeasurable, evaluating

PRODUCTS = 5


class SignalPropagation(Quantity):
    """How signals, gradients and statistics pass through the network at one step.

    The step is replayed as it was, in training mode, with its backward pass. Of several ranks the first one measures,
    on its own batch. Parts that do not exist (no activation, no BatchNorm) or cannot be measured are left out;
    ``absent`` says why.

    - *Gains* (`functional.gains`): rms out over rms in of each layer, and the same for gradients, backwards. Healthy is
      1, for a residual block slightly above. Below 1/2 or above 2 in several layers: another initialisation (He for
      ReLU, Glorot for tanh), a normalisation layer, or residual connections.
    - *Units* (`functional.units`): dead ones pass no gradient for any sample of the batch, saturated ones less than
      1/20. Healthy is 0; above a tenth or so: a lower rate, a smaller initialisation, or LeakyReLU.
    - *Kurtosis* (`functional.excess_kurtosis`) of each weight with more than one axis, now and at the first
      measurement. Far above 0 at the start, next to a large ``flat_slopes`` behind a tanh: initialise from a normal or
      uniform distribution. When it grows in training, few weights take over.
    - *Condition* (`functional.condition`) of each layer as it is applied: exact where its shorter side has at most 256
      numbers, a lower bound from Lanczos otherwise. 1 is orthogonal; above 1e3 some directions are lost: orthogonal
      initialisation, weight decay, fewer units. The *loss*'s (`functional.loss_condition_lower`) is a lower bound: its
      value over two is about how many steps at the largest stable rate the gradient's own direction takes. Large: a
      preconditioner (Adam), or normalised inputs.
    - *BatchNorm* (`functional.batch_norm_drift`): batch against running statistics, with what sampling explains;
      ``batch_norm_excess`` is healthy near 1. ``batch_norm_output_change`` is the relative change of the network's
      output when batch statistics take the place of running ones. When both are large (the trap of GANs, whose
      batches are drawn from a moving distribution): a larger momentum of the running statistics, real and generated
      samples in one batch, or GroupNorm.
    - *Lipschitz* (`functional.lipschitz_lower`, `functional.lipschitz_upper`) from the first floating-point tensor
      (or the embedding) to the last layer, per sample, in eval mode. The upper one holds for every input, but can be
      far above the truth; attention and gates have none. Large: weight decay, spectral normalisation.

    Args:
        samples: at whose inputs the lower Lipschitz bound is taken.
        method: of the Hessian products, see `lsp_callbacks.operators.hessian`.

    Keys: ``stability/forward_gain_min``, ``stability/forward_gain_max`` and, where they exist, ``forward_log_gain``
    (nats, from input to output), ``backward_gain_min``, ``backward_gain_max``, ``backward_log_gain``, ``dead_share``,
    ``saturated_share``, ``kurtosis_max``, ``kurtosis_initial_max``, ``condition_max`` (of the exact ones),
    ``condition_lower_max`` (of the others), ``loss_condition_lower``, ``batch_norm_drift_max`` (running standard
    deviations), ``batch_norm_excess_max``, ``batch_norm_output_change``, ``lipschitz_lower``, ``lipschitz_upper``. By
    layer: ``forward_gain``, ``backward_gain``, ``dead_units``, ``saturated_units``, ``flat_slopes``, ``kurtosis``,
    ``kurtosis_initial``, ``kurtosis_error``, ``condition``, ``condition_lower``, ``batch_norm_mean_drift``,
    ``batch_norm_mean_error``, ``batch_norm_variance_drift``, ``batch_norm_variance_error``.

    Cost: 1.2 gradients for the step and its weights, 2/3 for the two outputs where there is BatchNorm, some 2 for the
    bounds at batch size 64, and five Hessian products.

    Source: Glorot & Bengio 2010; He et al. 2015; Schoenholz et al. 2017; Pennington et al. 2017; Ioffe & Szegedy 2015;
    Szegedy et al. 2014.
    """

    name = "signal_propagation"
    keys = ("stability/forward_gain_min", "stability/forward_gain_max")
    optional = (
        "stability/forward_log_gain", "stability/backward_gain_min", "stability/backward_gain_max",
        "stability/backward_log_gain", "stability/dead_share", "stability/saturated_share", "stability/kurtosis_max",
        "stability/kurtosis_initial_max", "stability/condition_max", "stability/condition_lower_max",
        "stability/loss_condition_lower", "stability/batch_norm_drift_max", "stability/batch_norm_excess_max",
        "stability/batch_norm_output_change", "stability/lipschitz_lower", "stability/lipschitz_upper",
    )  # fmt: skip
    initial: Tensor

    def __init__(self, samples: int = 4, method: Method = "auto"):
        super().__init__()
        whole("samples", samples, 1)
        self.samples, self.method = samples, method
        self.absent: dict[str, str] = {}
        self._found: dict[str, Tensor] = {}
        self.add_state("initial", default=torch.empty(0, dtype=torch.float64), persistent=True)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in snapshot.module.modules())
        return {
            "signals": 1.2,
            "bounds": 2.0,
            "curvature along the gradient": product_cost(resolved(snapshot, self.method), PRODUCTS),
            **({"outputs by batch statistics": 2 / 3} if norms else {}),
        }

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        found = product_memory(snapshot, self.method, PRODUCTS)
        # What each module was called with stays until its slopes are known.
        return {**found, "signals": found.get("activations", 0.0) or found["graph"] / 4}

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        absent: dict[str, str] = {}
        found = snapshot.ranks.first(lambda: self._measure(snapshot, absent), self.name)
        ratio = _attempt("loss_condition_lower", absent, lambda: self._loss_condition(snapshot))
        if ratio is not None:
            found["loss_condition_lower"] = scalar(ratio)
        kurtosis = torch.stack([v for k, v in found.items() if k.startswith("kurtosis/")] or [scalar(torch.nan)])
        first = self.initial if len(self.initial) == len(kurtosis) else kurtosis
        names = [k.removeprefix("kurtosis/") for k in found if k.startswith("kurtosis/")]
        found |= {f"kurtosis_initial/{name}": value for name, value in zip(names, first)}
        self._found, self.absent, self.initial, self.complete = _finite(found), absent, first, True

    def _measure(self, snapshot: Snapshot, absent: dict[str, str]) -> dict[str, Tensor]:
        step = signals(snapshot)
        found = _gains(step)
        if not any(key.startswith("forward_gain/") for key in found):
            raise Unmeasurable(
                "no module with a weight matrix, or residual block, passes a signal on to the loss: there is no gain"
            )
        found |= _units(step, absent)
        for name, p in snapshot.module.named_parameters():
            if p.ndim > 1:
                value, error = excess_kurtosis(p)
                found |= {f"kurtosis/{name}": scalar(value), f"kurtosis_error/{name}": scalar(error)}
        for norm in step.norms:
            found |= _attempt(norm.name, absent, partial(_drift, norm)) or {}
        if step.norms:
            change = _attempt("batch_norm_output_change", absent, lambda: _output_change(snapshot))
            found |= {} if change is None else {"batch_norm_output_change": change}
        states = _attempt("lipschitz", absent, lambda: depth(snapshot, samples=self.samples))
        if snapshot.sample is not None:  # puts the buffers back to where they were before the step
            snapshot.sample(1)
        with evaluating(snapshot.module), torch.no_grad():
            found |= _conditions(snapshot.module, step)
        if states is not None:
            lower = _attempt("lipschitz_lower", absent, lambda: lipschitz_lower(states))
            upper = _attempt("lipschitz_upper", absent, lambda: lipschitz_upper(states))
            found |= {} if lower is None else {"lipschitz_lower": scalar(lower)}
            found |= {} if upper is None else {"lipschitz_upper": scalar(upper)}
        return found

    def _loss_condition(self, snapshot: Snapshot) -> Tensor:
        H = hessian(snapshot, method=self.method)
        g = snapshot.flat_gradient
        g = snapshot.replayed_gradient()[1] if g is None else g
        found = loss_condition_lower(H, g.to(H.dtype), steps=PRODUCTS)
        if found is None:
            raise Unmeasurable("the gradient vanishes, or points along negative curvature")
        return found

    def compute(self) -> dict[str, Tensor]:
        """The numbers of the last measurement; NaN before one."""
        found = self._found
        extremes = {
            "forward_gain_min": ("forward_gain", min), "forward_gain_max": ("forward_gain", max),
            "backward_gain_min": ("backward_gain", min), "backward_gain_max": ("backward_gain", max),
            "kurtosis_max": ("kurtosis", max), "kurtosis_initial_max": ("kurtosis_initial", max),
            "condition_max": ("condition", max), "condition_lower_max": ("condition_lower", max),
            "batch_norm_drift_max": ("batch_norm_mean_drift", max), "batch_norm_excess_max": ("batch_norm_excess", max),
        }  # fmt: skip
        values = {key: scalar(torch.nan) for key in self.keys}
        for key, (kind, extreme) in extremes.items():
            if of := [value for name, value in found.items() if name.startswith(f"{kind}/")]:
                values[f"stability/{key}"] = extreme(of)
        return values | {f"stability/{name}": value for name, value in found.items()}

    def reset(self) -> None:
        super().reset()
        self._found, self.absent = {}, {}


def _attempt(what: str, absent: dict[str, str], measure: Callable[[], Any]) -> Any | None:
    """What one part gives; where it does not exist, why."""
    try:
        return measure()
    except (Unmeasurable, Uncertified) as error:
        absent[what] = str(error)
        return None


def _finite(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _gains(step: Signals) -> dict[str, Tensor]:
    ratios = gains(step.layers, step.path)
    logs = {"forward_log_gain": ratios.forward_log, "backward_log_gain": ratios.backward_log}
    return {
        **{key: scalar(value) for key, value in logs.items() if value is not None},
        **{f"forward_gain/{name}": scalar(gain) for name, gain in ratios.forward.items()},
        **{f"backward_gain/{name}": scalar(gain) for name, gain in ratios.backward.items()},
    }


def _units(step: Signals, absent: dict[str, str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    dead = saturated = total = 0.0
    for one in step.activations:
        rows, width = one.values.shape
        if rows < LEAST_ROWS or not width:
            absent[f"units/{one.name}"] = f"{rows} rows do not tell dead units from silent ones"
            continue
        own = units(one.values, one.largest)
        found |= {
            f"dead_units/{one.name}": scalar(own.dead.double().mean()),
            f"saturated_units/{one.name}": scalar(own.saturated.double().mean()),
            f"flat_slopes/{one.name}": scalar(own.flat),
        }
        dead, saturated, total = dead + float(own.dead.sum()), saturated + float(own.saturated.sum()), total + width
    if total:
        found |= {"dead_share": scalar(dead / total), "saturated_share": scalar(saturated / total)}
    return found


def _drift(norm: Any) -> dict[str, Tensor]:
    momentum = norm.module.momentum
    memory = 1 / max(norm.batches, 1) if momentum is None else momentum / (2 - momentum)
    try:
        own = batch_norm_drift(norm.x, norm.mean, norm.var, eps=norm.module.eps, memory=memory)
    except ValueError as error:
        raise Unmeasurable(str(error)) from error
    return {
        f"batch_norm_mean_drift/{norm.name}": scalar(own.mean),
        f"batch_norm_mean_error/{norm.name}": scalar(own.mean_error),
        f"batch_norm_variance_drift/{norm.name}": scalar(own.variance),
        f"batch_norm_variance_error/{norm.name}": scalar(own.variance_error),
        f"batch_norm_excess/{norm.name}": scalar(own.excess),
    }


def _output_change(snapshot: Snapshot) -> Tensor:
    running, batch = outputs(snapshot), outputs(snapshot, batch_statistics=True)
    return scalar(torch.linalg.vector_norm(batch - running) / torch.linalg.vector_norm(batch))


def _conditions(module: nn.Module, step: Signals) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, layer in module.named_modules():
        call = step.calls.get(name)
        own = next((p for key, p in layer.named_parameters() if "bias" not in key), None)
        if call is None or own is None or id(own) in seen:
            continue
        for part, operator in weight_operators(layer, call).items():
            seen.add(id(own))
            key = f"{name}.{part}" if part else name
            if min(operator.shape) <= SMALL:
                found[f"condition/{key}"] = scalar(condition(operator, precision=own.dtype)[0])
            else:
                found[f"condition_lower/{key}"] = scalar(condition_lower(operator))
    return found
