"""The generalized sensitivity of each layer to the input, where slopes near a kink are free."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lsp_callbacks._validation import number, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.network.clarke import GeneralizedNorm, generalized_norm
from lsp_callbacks.operators.cost import beside, forward_cost, sample_passes
from lsp_callbacks.operators.curvature.hessian import label
from lsp_callbacks.operators.curvature.kink_mode import KinkMode
from lsp_callbacks.operators.curvature.kink_relaxation import KinkRelaxation
from lsp_callbacks.operators.memory import footprint
from lsp_callbacks.operators.network.depth import depth
from lsp_callbacks.quantities.base import ROOT, Quantity, scalar
from lsp_callbacks.step.replay_checks import verify
from lsp_callbacks.step.snapshot import Snapshot

#: Numbers of the shorter side of the Jacobian of a layer before the last, up to which it is taken whole.
INNER = 256
#: Of the cost model: passes of a state that is not, and nanoseconds of Lanczos beside them.
WIDE, LANCZOS = 90, 1e8


class ClarkeProfile(Quantity):
    """The generalized ``sigma^x`` of networks with kinks: ``sup ||dX_k / dX_0||`` over the slopes near them, by depth.

    Each unit of a piecewise linear activation whose preactivation is within ``eps`` (of the root mean square of its
    call's) of a kink may have the slope of either side, and any between. The sup is over the whole *product* of the
    network's layers, not over one-step norms, which let ``X -> 2 X`` pass at each layer; it is exact where at most
    ``vertices`` units of a sample are near-active, else between a certified upper bound and a lower one: see
    `lsp_callbacks.functional.generalized_norm`. It is an upper bound of Clarke's, whose set the product set contains.
    The largest of a few samples of the batch, in eval mode, is reported. Where no unit is near a kink, and so in every
    smooth network, it is the ordinary ``sigma^x``. The global numbers are those of the output; by layer, a state is
    what `lsp_callbacks.operators.network.depth` says, and the units are those before it.

    Where both a state and the input have more than ``most`` numbers (256 inside of the network), the norms are those on
    a subspace of the inputs: ``clarke_lower`` and ``clarke_ordinary`` are from below, ``clarke_upper`` holds with
    probability 0.999 for each layer and sample, and nothing is exact.

    ``clarke_upper`` far above ``clarke_ordinary``: the sensitivity to the input jumps within the data's own rounding;
    do not rely on gradients with respect to the input there, and lower the weights' norms (weight decay, spectral
    normalisation) or use a smoother activation.

    Args:
        samples: of the batch; of several ranks, that of the first.
        eps: relative distance to a kink, above 0 and at most 1.
        vertices: near-active units of a sample that are enumerated.
        most: numbers in a sample's output (or input, if those are fewer) whose Jacobian is taken whole, and near-active
            units; layers behind more of these are left out, and `absent` says so.

    Keys: ``stability/clarke_lower``, ``stability/clarke_ordinary``, ``stability/clarke_near`` (the most near-active
    units of a sample), ``stability/clarke_exact`` (the share of samples whose lower number is the sup);
    ``stability/clarke_upper``, absent where the network has kinks of another kind, which are left as they are. Of each
    layer ``clarke_sigma_lower/<layer>`` and ``clarke_sigma_upper/<layer>``.

    Raises:
        Unmeasurable: if more than ``most`` near-active units stand before the first layer's state.

    Cost: ``2/3 samples / batch`` gradients for each near-active unit, and for each number in a layer (half of it, on
    average over the depth) or, where these are too many, for 90 products and two for each unit: 14 gradients, and 20 to
    100 on networks of less than 100,000 parameters.

    Source: Katende, Def. 6.1 and Sec. 6.6; Clarke 1983; MATH sections 4 (claim 5) and 7.
    """

    name = "clarke_profile"
    keys = (
        "stability/clarke_lower",
        "stability/clarke_ordinary",
        "stability/clarke_near",
        "stability/clarke_exact",
    )
    optional = ("stability/clarke_upper",)
    numbers: Tensor

    def __init__(self, samples: int = 2, eps: float = 1e-3, vertices: int = 12, most: int = 512):
        super().__init__()
        whole("samples", samples, 1), whole("vertices", vertices, 0), whole("most", most, 1)
        number("eps", eps, above=0, most=1)
        self.samples, self.eps, self.vertices, self.most = samples, eps, vertices, most
        #: Why a layer has no numbers, by its name.
        self.absent: dict[str, str] = {}
        self._layers: dict[str, dict[str, float]] = {}
        self.add_state("numbers", default=torch.full((5,), math.nan, dtype=torch.float64), persistent=True)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        states = depth(snapshot, samples=self.samples)
        received, number = states.start.numel() / states.samples, len(states.layers)
        passes, wide = 1.0, 0
        for k, layer in enumerate(states.layers, start=1):
            sent, most = layer.state.numel() / states.samples, self.most if k == number else min(self.most, INNER)
            rows = next((one for one in (sent, received) if one <= most), None)
            wide += rows is None
            passes += (WIDE if rows is None else rows) * k / number
        slopes = sample_passes(snapshot, self.samples, passes * 2 / 3) + beside(snapshot, time=wide * LANCZOS)
        return {"forward": forward_cost(snapshot), "slopes": slopes}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        found = footprint(snapshot)
        shapes = [shape for call in snapshot.calls.values() for shape in (call.input_shape, call.output_shape)]
        widest = max((math.prod(shape[1:]) for shape in shapes if shape), default=1)
        # The units' rows by the input, and as many columns of the widest state; half of the most, as units are rare.
        rows = 8.0 * self.samples * self.most * widest
        return {"activations": 2 * found.activations, "copies": 2 * found.buffers, "rows": rows}

    def path(self, snapshot: Snapshot) -> str:
        return label("exact", snapshot, next(iter(snapshot.parameters.values())).dtype)

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        verify(snapshot)
        numbers, self._layers, self.absent = snapshot.run.ranks.first(lambda: self._measure(snapshot), self.name)
        self.numbers, self.complete = torch.tensor(numbers, dtype=torch.float64), True

    def _measure(self, snapshot: Snapshot) -> tuple[list[float], dict[str, dict[str, float]], dict[str, str]]:
        """Numbers of the output, bounds by layer, and why which layers have none."""
        with KinkMode(self.eps) as freed:
            states = depth(replace(snapshot), samples=self.samples)  # whose graph is ours alone
        way = KinkRelaxation(freed, states.start, axis=states.axis, most=self.most)
        found: dict[str, list[GeneralizedNorm]] = {}
        absent: dict[str, str] = {}
        for layer in states.layers:
            most = self.most if layer is states.layers[-1] else min(self.most, INNER)
            try:
                free = way.slopes(layer.state, axis=layer.axis, most=most)
            except Unmeasurable as error:
                absent[layer.name] = str(error)
                continue
            found[layer.name] = [generalized_norm(one, vertices=self.vertices) for one in free]
        if not found:
            raise Unmeasurable(next(iter(absent.values())))
        of_layers = {
            "lower": {name: max(float(one.lower) for one in own) for name, own in found.items()},
            "upper": {name: _upper(own) for name, own in found.items()},
        }
        last = found.get(states.layers[-1].name)
        if last is None:
            return [math.nan] * 5, of_layers, absent
        return (
            [
                max(float(one.lower) for one in last),
                max(float(one.ordinary) for one in last),
                float(max(one.near for one in last)),
                sum(one.exact for one in last) / len(last),
                _upper(last),
            ],
            of_layers,
            absent,
        )

    def compute(self) -> dict[str, Tensor]:
        """The last measurement."""
        values = dict(zip((*self.keys, *self.optional), map(scalar, self.numbers)))
        for bound, layers in self._layers.items():
            values |= {
                f"stability/clarke_sigma_{bound}/{name or ROOT}": scalar(value) for name, value in layers.items()
            }
        return {key: value for key, value in values.items() if key in self.keys or not bool(value.isnan())}

    def reset(self) -> None:
        super().reset()
        self._layers, self.absent = {}, {}


def _upper(samples: list[GeneralizedNorm]) -> float:
    """Of all; NaN where one has none."""
    bounds = [one.upper for one in samples if one.upper is not None]
    return max(map(float, bounds)) if len(bounds) == len(samples) else math.nan
