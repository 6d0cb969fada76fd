"""The generalized sensitivity of the output to the input, where slopes near a kink are free."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lsp_callbacks.arguments import number, whole
from lsp_callbacks.functional.clarke import GeneralizedNorm, generalized_norm
from lsp_callbacks.operators.curvature import label
from lsp_callbacks.operators.depth import depth
from lsp_callbacks.operators.footprint import footprint
from lsp_callbacks.operators.free_slopes import Freed
from lsp_callbacks.operators.work import forward_cost, sample_passes
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.snapshot import Snapshot


class ClarkeProfile(Quantity):
    """The generalized ``sigma^x`` of networks with kinks: ``sup ||dX_L / dX_0||`` over the slopes near them.

    Each unit of a piecewise linear activation whose preactivation is within ``eps`` (of the root mean square of its
    call's) of a kink may have the slope of either side, and any between. The sup is over the whole *product* of the
    network's layers, not over one-step norms, which let ``X -> 2 X`` pass at each layer; it is exact where at most
    ``vertices`` units of a sample are near-active, else between a certified upper bound and a lower one: see
    `lsp_callbacks.functional.generalized_norm`. It is an upper bound of Clarke's, whose set the product set contains.
    The largest of a few samples of the batch, in eval mode, is reported. Where no unit is near a kink, and so in every
    smooth network, it is the ordinary ``sigma^x``.

    ``clarke_upper`` far above ``clarke_ordinary``: the sensitivity to the input jumps within the data's own rounding;
    do not rely on gradients with respect to the input there, and lower the weights' norms (weight decay, spectral
    normalisation) or use a smoother activation.

    Args:
        samples: of the batch; of several ranks, that of the first.
        eps: relative distance to a kink, above 0 and at most 1.
        vertices: near-active units of a sample that are enumerated.
        most: numbers in the outputs and near-active units, a backward pass each; more are refused.

    Keys: ``stability/clarke_lower``, ``stability/clarke_ordinary``, ``stability/clarke_near`` (the most near-active
    units of a sample), ``stability/clarke_exact`` (the share of samples whose lower number is the sup);
    ``stability/clarke_upper``, absent where the network has kinks of another kind, which are left as they are.

    Cost: ``2/3 samples / batch`` gradients for each row: one for each number in the outputs and each near-active unit.

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
        self.add_state("numbers", default=torch.full((5,), math.nan, dtype=torch.float64), persistent=True)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        calls = [call for call in snapshot.calls.values() if len(call.output_shape or ()) > 1]  # no criterion
        if not calls:
            return {"forward": forward_cost(snapshot)}
        rows = self.samples * math.prod((calls[-1].output_shape or (1,))[1:])
        slopes = 0.6 + sample_passes(snapshot, self.samples, min(1.5 * rows, self.most) / 2)
        return {"forward": forward_cost(snapshot), "slopes": slopes}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        found = footprint(snapshot)
        inputs = max((math.prod((call.input_shape or (1,))[1:]) for call in snapshot.calls.values()), default=1)
        rows = 8.0 * self.samples * self.most * inputs
        return {"activations": 2 * found.activations, "copies": 2 * found.buffers, "rows": rows}

    def path(self, snapshot: Snapshot) -> str:
        return label("exact", snapshot, next(iter(snapshot.parameters.values())).dtype)

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        _ = snapshot.faithful
        found = snapshot.ranks.first(lambda: self._measure(snapshot), self.name)
        self.numbers, self.complete = torch.tensor(found, dtype=torch.float64), True

    def _measure(self, snapshot: Snapshot) -> list[float]:
        with Freed(self.eps) as freed:
            states = depth(replace(snapshot, memo={}), samples=self.samples)  # whose graph is ours alone
        last = states.layers[-1]
        free = freed.slopes(last.state, states.start, most=self.most, axes=(last.axis, states.axis))
        found: list[GeneralizedNorm] = [generalized_norm(one, vertices=self.vertices) for one in free]
        bounds = [math.nan if one.upper is None else float(one.upper) for one in found]
        return [
            max(float(one.lower) for one in found),
            max(float(one.ordinary) for one in found),
            float(max(one.near for one in found)),
            sum(one.exact for one in found) / len(found),
            math.nan if any(map(math.isnan, bounds)) else max(bounds),
        ]

    def compute(self) -> dict[str, Tensor]:
        """The last measurement."""
        values = dict(zip((*self.keys, *self.optional), map(scalar, self.numbers)))
        if bool(self.numbers[-1].isnan()):
            del values["stability/clarke_upper"]
        return values
