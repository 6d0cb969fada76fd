"""Parts of `SignalPropagation`: functions of one replayed step that return named scalars."""

from __future__ import annotations

from torch import Tensor, nn

from lsp_callbacks import linalg
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.condition import SMALL, condition, condition_lower
from lsp_callbacks.functional.network.adapted_layers import parts_of_adapted
from lsp_callbacks.functional.network.batch_norm import batch_norm_drift
from lsp_callbacks.functional.network.gains import gains
from lsp_callbacks.functional.network.inactive_units import LEAST_ROWS, inactive_units
from lsp_callbacks.functional.network.kurtosis import excess_kurtosis
from lsp_callbacks.functional.network.layer_operators import weight_operators
from lsp_callbacks.operators.network.batch_statistics import outputs
from lsp_callbacks.operators.network.signal_sizes import NormInput, SignalSizes
from lsp_callbacks.quantities.base import scalar
from lsp_callbacks.step.snapshot import Snapshot


def gains_of(step: SignalSizes) -> dict[str, Tensor]:
    """Return forward and backward gains, and their logs along the path."""
    ratios = gains(step.layers, step.path)
    logs = {"forward_log_gain": ratios.forward_log, "backward_log_gain": ratios.backward_log}
    return {
        **{key: scalar(value) for key, value in logs.items() if value is not None},
        **{f"forward_gain/{name}": scalar(gain) for name, gain in ratios.forward.items()},
        **{f"backward_gain/{name}": scalar(gain) for name, gain in ratios.backward.items()},
    }


def units_of(step: SignalSizes, absent: dict[str, str]) -> dict[str, Tensor]:
    """Return shares of dead and saturated units, by activation and of all; note in ``absent`` what has none."""
    shares: dict[str, Tensor] = {}
    dead = saturated = total = 0.0
    for activation in step.activations:
        rows, width = activation.values.shape
        if rows < LEAST_ROWS or not width:
            absent[f"units/{activation.name}"] = f"{rows} rows are too few to find dead units: at least {LEAST_ROWS}"
            continue
        counts = inactive_units(activation.values, activation.largest)
        shares |= {
            f"dead_units/{activation.name}": scalar(counts.dead.double().mean()),
            f"saturated_units/{activation.name}": scalar(counts.saturated.double().mean()),
            f"flat_slopes/{activation.name}": scalar(counts.flat),
        }
        dead, saturated = dead + float(counts.dead.sum()), saturated + float(counts.saturated.sum())
        total += width
    if total:
        shares |= {"dead_share": scalar(dead / total), "saturated_share": scalar(saturated / total)}
    return shares


def kurtosis_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the excess kurtosis of each parameter with more than one axis."""
    matrices = ((name, p) for name, p in module.named_parameters() if p.ndim > 1)
    return {f"kurtosis/{name}": scalar(excess_kurtosis(p)[0]) for name, p in matrices}


def drift_of(norm: NormInput) -> dict[str, Tensor]:
    """Return the drift of one BatchNorm layer's running statistics."""
    momentum = norm.module.momentum
    memory = 1 / max(norm.batches, 1) if momentum is None else momentum / (2 - momentum)
    try:
        drift = batch_norm_drift(norm.x, norm.mean, norm.var, eps=norm.module.eps, memory=memory)
    except ValueError as error:
        raise Unmeasurable(str(error)) from error
    return {
        f"batch_norm_mean_drift/{norm.name}": scalar(drift.mean),
        f"batch_norm_mean_error/{norm.name}": scalar(drift.mean_error),
        f"batch_norm_variance_drift/{norm.name}": scalar(drift.variance),
        f"batch_norm_variance_error/{norm.name}": scalar(drift.variance_error),
        f"batch_norm_excess/{norm.name}": scalar(drift.excess),
    }


def output_change_of(snapshot: Snapshot) -> Tensor:
    """Return the relative change of the output when running statistics replace those of the batch."""
    running, batch = outputs(snapshot), outputs(snapshot, batch_statistics=True)
    return scalar(linalg.norm(batch - running) / linalg.norm(batch))


def conditions_of(module: nn.Module, step: SignalSizes) -> dict[str, Tensor]:
    """Return the condition number of each layer's weight as it is applied: exact, or a lower bound."""
    conditions: dict[str, Tensor] = {}
    seen: set[int] = set()
    inside = {id(part) for part in parts_of_adapted(module)}
    for name, layer in module.named_modules():
        call = None if id(layer) in inside else step.calls.get(name)
        weight = next((p for key, p in layer.named_parameters() if "bias" not in key), None)
        if call is None or weight is None or id(weight) in seen:
            continue
        for part, operator in weight_operators(layer, call.input_shape, call.output_shape).items():
            seen.add(id(weight))
            key = f"{name}.{part}" if part else name
            if min(operator.shape) <= SMALL:
                conditions[f"condition/{key}"] = scalar(condition(operator, precision=weight.dtype)[0])
            else:
                conditions[f"condition_lower/{key}"] = scalar(condition_lower(operator))
    return conditions
