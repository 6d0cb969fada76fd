"""The parts of `signal_propagation`, each as named scalars."""

from __future__ import annotations

from torch import Tensor, nn

from lsp_callbacks import linalg
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.condition import SMALL, condition, condition_lower
from lsp_callbacks.functional.network.batch_norm import batch_norm_drift
from lsp_callbacks.functional.network.gains import gains
from lsp_callbacks.functional.network.kurtosis import excess_kurtosis
from lsp_callbacks.functional.network.layer_operators import weight_operators
from lsp_callbacks.functional.network.units import LEAST_ROWS, units
from lsp_callbacks.operators.network.batch_statistics import outputs
from lsp_callbacks.operators.network.signal_sizes import NormInput, SignalSizes
from lsp_callbacks.quantities.base import scalar
from lsp_callbacks.step.snapshot import Snapshot


def gains_of(step: SignalSizes) -> dict[str, Tensor]:
    """Forward and backward gains, and their logs along the path."""
    ratios = gains(step.layers, step.path)
    logs = {"forward_log_gain": ratios.forward_log, "backward_log_gain": ratios.backward_log}
    return {
        **{key: scalar(value) for key, value in logs.items() if value is not None},
        **{f"forward_gain/{name}": scalar(gain) for name, gain in ratios.forward.items()},
        **{f"backward_gain/{name}": scalar(gain) for name, gain in ratios.backward.items()},
    }


def units_of(step: SignalSizes, absent: dict[str, str]) -> dict[str, Tensor]:
    """Shares of dead and saturated units, of each activation and of all together; ``absent`` takes up why not."""
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


def kurtosis_of(module: nn.Module) -> dict[str, Tensor]:
    """Of each parameter with more than one axis."""
    matrices = ((name, p) for name, p in module.named_parameters() if p.ndim > 1)
    return {f"kurtosis/{name}": scalar(excess_kurtosis(p)[0]) for name, p in matrices}


def drift_of(norm: NormInput) -> dict[str, Tensor]:
    """Of one BatchNorm layer."""
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


def output_change_of(snapshot: Snapshot) -> Tensor:
    """By batch statistics in the place of running ones, relative to the output with those of the batch."""
    running, batch = outputs(snapshot), outputs(snapshot, batch_statistics=True)
    return scalar(linalg.norm(batch - running) / linalg.norm(batch))


def conditions_of(module: nn.Module, step: SignalSizes) -> dict[str, Tensor]:
    """Of each layer's weight as it is applied: exact, or from below."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, layer in module.named_modules():
        call = step.calls.get(name)
        own = next((p for key, p in layer.named_parameters() if "bias" not in key), None)
        if call is None or own is None or id(own) in seen:
            continue
        for part, operator in weight_operators(layer, call.input_shape, call.output_shape).items():
            seen.add(id(own))
            key = f"{name}.{part}" if part else name
            if min(operator.shape) <= SMALL:
                found[f"condition/{key}"] = scalar(condition(operator, precision=own.dtype)[0])
            else:
                found[f"condition_lower/{key}"] = scalar(condition_lower(operator))
    return found
