"""Generalized sensitivity of each layer to the input, where the slopes near a kink are free."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from lsp_callbacks._validation import number, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.network.clarke import GeneralizedNorm, generalized_norm
from lsp_callbacks.operators.cost import beside, forward_cost, sample_passes
from lsp_callbacks.operators.curvature.hessian import label
from lsp_callbacks.operators.curvature.kink_mode import KinkMode
from lsp_callbacks.operators.curvature.kink_relaxation import KinkRelaxation
from lsp_callbacks.operators.footprint import footprint
from lsp_callbacks.operators.network.depth import depth
from lsp_callbacks.quantities.base import ROOT, Quantity, scalar
from lsp_callbacks.quantities.key import PREFIX, Key
from lsp_callbacks.step.replay_checks import verify
from lsp_callbacks.step.snapshot import Snapshot

#: Largest shorter side of the Jacobian of an inner layer that is computed as a whole matrix.
INNER = 256
#: Cost model of a layer whose Jacobian is larger: passes, and nanoseconds of Lanczos beside them.
WIDE, LANCZOS = 90, 1e8


class ClarkeProfile(Quantity):
    """Generalized ``sigma^x`` of networks with kinks: ``sup ||dX_k / dX_0||`` over the slopes near them, by depth.

    Each unit of a piecewise linear activation whose preactivation is within ``eps`` (of the root mean square of its
    call's) of a kink may have the slope of either side, and any between. The sup is over the whole *product* of the
    network's layers, not over the norms of single layers; it is exact where at most ``vertices`` units of a sample are
    near a kink, else between a certified upper bound and a lower one: see `lsp_callbacks.functional.generalized_norm`.
    It is an upper bound of Clarke's, whose set the product set contains. The largest of a few samples of the batch, in
    eval mode, is reported. Where no unit is near a kink, and so in every smooth network, it is the ordinary
    ``sigma^x``. The global numbers are those of the output; the state of a layer is defined by
    `lsp_callbacks.operators.network.depth`, and the units are those before it.

    Where both a state and the input have more than ``most`` numbers (256 inside of the network), the norms are those on
    a subspace of the inputs: ``clarke_lower`` and ``clarke_ordinary`` are lower bounds, ``clarke_upper`` holds with
    probability 0.999 for each layer and sample, and nothing is exact.

    Args:
        samples: number of samples, the first of the batch; with several ranks, of the first rank's.
        eps: relative distance to a kink, above 0 and at most 1.
        vertices: largest number of units near a kink whose slopes are enumerated.
        most: largest size of a sample's output (or input, if that is smaller) whose Jacobian is computed as a whole
            matrix, and largest number of units near a kink; layers behind more of these are skipped, see `absent`.

    Raises:
        Unmeasurable: if more than ``most`` units near a kink come before the first layer's state.

    Cost: ``2/3 samples / batch`` gradients for each unit near a kink, and for each number in a layer (half of it, on
    average over the depth) or, where these are too many, for 90 products and two for each unit: 14 gradients, and 20 to
    100 on networks of less than 100,000 parameters.

    Source: Katende 2025, Def. 6.1 and Sec. 6.6; Clarke 1983; docs/theory.md, sections What does not hold as printed;
    The law of SGD, energies, kinks.
    """

    name = "clarke_profile"
    KEYS: ClassVar = {
        "clarke_lower": Key("Generalized sensitivity of the output to the input, lower bound.", "output / input"),
        "clarke_ordinary": Key("The same with the slopes as they are.", "output / input"),
        "clarke_near": Key("Most units near a kink in a sample.", "units"),
        "clarke_exact": Key("Share of samples whose lower bound is the exact supremum."),
        "clarke_upper": Key(
            "Generalized sensitivity of the output to the input, upper bound. Absent with other kinds of kinks.",
            "output / input",
            "Far above clarke_ordinary, input gradients jump within rounding: do not rely on them, and lower the norms "
            "of the weights (weight decay, spectral normalisation) or use a smoother activation.",
            optional=True,
        ),
        "clarke_sigma_lower/<layer>": Key("Generalized sensitivity of a layer to the input, lower bound."),
        "clarke_sigma_upper/<layer>": Key("Generalized sensitivity of a layer to the input, upper bound."),
    }

    def __init__(self, samples: int = 2, eps: float = 1e-3, vertices: int = 12, most: int = 512):
        super().__init__()
        whole("samples", samples, 1), whole("vertices", vertices, 0), whole("most", most, 1)
        number("eps", eps, above=0, most=1)
        self.samples, self.eps, self.vertices, self.most = samples, eps, vertices, most
        #: Reason why a layer has no numbers, by its name.
        self.absent: dict[str, str] = {}
        self._layers: dict[str, dict[str, float]] = {}

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        states = depth(snapshot, samples=self.samples)
        received, number = states.start.numel() / states.samples, len(states.layers)
        passes, wide = 1.0, 0
        for k, layer in enumerate(states.layers, start=1):
            sent, most = layer.state.numel() / states.samples, self.most if k == number else min(self.most, INNER)
            rows = next((size for size in (sent, received) if size <= most), None)
            wide += rows is None
            passes += (WIDE if rows is None else rows) * k / number
        slopes = sample_passes(snapshot, self.samples, passes * 2 / 3) + beside(snapshot, time=wide * LANCZOS)
        return {"forward": forward_cost(snapshot), "slopes": slopes}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        training = footprint(snapshot)
        shapes = [shape for call in snapshot.calls.values() for shape in (call.input_shape, call.output_shape)]
        widest = max((math.prod(shape[1:]) for shape in shapes if shape), default=1)
        # Rows of the units by the input, and as many columns of the widest state; half of the most, as units are rare.
        rows = 8.0 * self.samples * self.most * widest
        return {"activations": 2 * training.activations, "copies": 2 * training.buffers, "rows": rows}

    def path(self, snapshot: Snapshot) -> str:
        return label("exact", snapshot, next(iter(snapshot.parameters.values())).dtype)

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step."""
        self.complete = False
        verify(snapshot)
        numbers, self._layers, self.absent = snapshot.run.ranks.first(lambda: self._measure(snapshot), self.name)
        self.finish(numbers)

    def _measure(self, snapshot: Snapshot) -> tuple[dict[str, float], dict[str, dict[str, float]], dict[str, str]]:
        """Return the numbers of the output, the bounds by layer, and the reasons why layers have none."""
        with KinkMode(self.eps) as freed:
            states = depth(replace(snapshot), samples=self.samples)  # whose graph is ours alone
        way = KinkRelaxation(freed, states.start, axis=states.axis, most=self.most)
        norms: dict[str, list[GeneralizedNorm]] = {}
        absent: dict[str, str] = {}
        for layer in states.layers:
            most = self.most if layer is states.layers[-1] else min(self.most, INNER)
            try:
                free = way.slopes(layer.state, axis=layer.axis, most=most)
            except Unmeasurable as error:
                absent[layer.name] = str(error)
                continue
            norms[layer.name] = [generalized_norm(slopes, vertices=self.vertices) for slopes in free]
        if not norms:
            raise Unmeasurable(next(iter(absent.values())))
        by_layer = {
            "lower": {name: max(float(norm.lower) for norm in samples) for name, samples in norms.items()},
            "upper": {name: _upper(samples) for name, samples in norms.items()},
        }
        last = norms.get(states.layers[-1].name)
        if last is None:
            return {}, by_layer, absent
        numbers = {
            "clarke_lower": max(float(norm.lower) for norm in last),
            "clarke_ordinary": max(float(norm.ordinary) for norm in last),
            "clarke_near": float(max(norm.near for norm in last)),
            "clarke_exact": sum(norm.exact for norm in last) / len(last),
            "clarke_upper": _upper(last),
        }
        return numbers, by_layer, absent

    def compute(self) -> dict[str, Tensor]:
        """Return the last measurement, with the bounds of the layers."""
        values = super().compute()
        for bound, layers in self._layers.items():
            names = {f"{PREFIX}clarke_sigma_{bound}/{name or ROOT}": value for name, value in layers.items()}
            values |= {key: scalar(value) for key, value in names.items() if not math.isnan(value)}
        return values

    def reset(self) -> None:
        super().reset()
        self._layers, self.absent = {}, {}


def _upper(samples: list[GeneralizedNorm]) -> float:
    """Return the largest upper bound; NaN where a sample has none."""
    bounds = [norm.upper for norm in samples if norm.upper is not None]
    return max(map(float, bounds)) if len(bounds) == len(samples) else math.nan
