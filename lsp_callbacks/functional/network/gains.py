"""How signals and gradients grow or fade from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of the signals at one layer, on the path that leads to the last layer.

    Attributes:
        name: of the module that begins it.
        received: root mean square of the state that it received.
        sent: of the state that it made of it.
        back: of the gradient of the loss by what it sent.
        returned: of the gradient by what it received; NaN of the first layer.
    """

    name: str
    received: float
    sent: float
    back: float
    returned: float = math.nan


@dataclass(frozen=True)
class Gains:
    """Ratios of root mean squares; layers whose ratio is not defined (nothing came) are left out.

    Attributes:
        forward: ``rms(X_k) / rms(X_(k-1))`` by layer.
        backward: ``rms(dL/dX_(k-1)) / rms(dL/dX_k)`` by layer, but for the first.
        forward_log: sum of the logs of the forward gains along the path, ``log rms(X_L) / rms(X_0)``; None where a
            signal vanishes.
        backward_log: likewise, ``log rms(dL/dX_1) / rms(dL/dX_L)``.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    forward_log: float | None
    backward_log: float | None


def gains(layers: Sequence[LayerSizes], path: Sequence[LayerSizes] | None = None) -> Gains:
    """Return forward and backward gain of each layer, and of the way through all of them.

    A gain of 1 keeps the size. Over L layers a gain of g makes ``g^L``: beyond a factor of 1e3 or so, signals vanish
    or explode. What one number a layer hides is how unequally directions are treated (Pennington et al. 2017): see
    the condition numbers.

    Args:
        layers: their sizes, see `lsp_callbacks.operators.network.signal_sizes.signal_sizes`.
        path: those on one chain from input to output; None takes all.

    Source: Glorot & Bengio 2010, (5) and (6): forward ``n_in Var W = 1``, backward ``n_out Var W = 1``; He et al. 2015,
    (10) and (14): half of that for ReLU; Schoenholz et al. 2017: the backward gain squared is ``chi``, at the edge of
    chaos 1.

    Example:
        >>> from lsp_callbacks.functional import LayerSizes, gains
        >>> result = gains([LayerSizes("a", 1.0, 2.0, 0.3), LayerSizes("b", 2.0, 1.0, 0.1, 0.3)])
        >>> result.forward["a"], round(result.backward["b"], 6), result.forward_log
        (2.0, 3.0, 0.0)
    """
    path = layers if path is None else path
    forward = {layer.name: layer.sent / layer.received for layer in layers if layer.received > 0}
    backward = {
        layer.name: layer.returned / layer.back for layer in layers if layer.back > 0 and not math.isnan(layer.returned)
    }
    return Gains(
        {name: gain for name, gain in forward.items() if math.isfinite(gain)},
        {name: gain for name, gain in backward.items() if math.isfinite(gain)},
        _log_sum([layer.sent / layer.received if layer.received > 0 else 0.0 for layer in path]),
        _log_sum([layer.returned / layer.back if layer.back > 0 else 0.0 for layer in path[1:]]),
    )


def _log_sum(ratios: list[float]) -> float | None:
    if not ratios or not all(ratio > 0 and math.isfinite(ratio) for ratio in ratios):
        return None
    return sum(map(math.log, ratios))
