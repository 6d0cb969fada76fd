"""How much a prediction and its explanation change with the input and with the parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lsp_callbacks._validation import number, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.network.robustness import sensitivity
from lsp_callbacks.linalg import LinearOperator, norm
from lsp_callbacks.operators.cost import beside, forward_cost, sample_passes
from lsp_callbacks.operators.curvature.hessian import label
from lsp_callbacks.operators.memory import TWICE, WORK, footprint
from lsp_callbacks.operators.network.lipschitz import Uncertified, lipschitz_upper
from lsp_callbacks.operators.network.norms_cost import norms_cost
from lsp_callbacks.operators.network.saliency import Explanation, change_by_input, change_by_parameters, explain
from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.step.flat import displaced
from lsp_callbacks.step.replay_checks import verify
from lsp_callbacks.step.snapshot import Snapshot

#: Of the units in the last place of a number that went through a network.
ROUNDING = 16.0
STEPS = 20
FIRST = ("prediction", "prediction_theta", "explanation", "explanation_theta")


class Robustness(Quantity):
    """The sensitivity of predictions f and of their explanations g to displacements of the input and the parameters.

    f is what the network's last module returns for a sample (logits), in eval mode, and g the gradient of its largest
    entry, the predicted class's, with respect to the input. ``||df/dx||`` and ``||dg/dx||`` are operator norms, the
    largest over the samples, in units of f and g per unit of input; ``||df/dtheta||`` and ``||dg/dtheta||`` are those
    of all samples together by ``sqrt(samples)``: the root mean square over the samples of their change, per unit of
    parameters. They are Lanczos values, from below up to ``robustness_residual``; ``_upper`` beside them is from above,
    exact for few outputs, otherwise true with probability 0.999. They chain with what moves the parameters: the
    displacement that training began with times ``sigma_theta_bound`` of `StabilityProfile` times
    ``robustness_prediction_theta_upper`` is the most that it can change these predictions, to first order. It is
    first-order in both factors, and the chain of two *lower* bounds is none: the response of the predictions to the
    initial parameters, from below and above, is measured by `StabilityProfile`: ``sigma_output``,
    ``sigma_explanation``.

    Two numbers do without linearisation. ``_lower``: the change at a real displacement along the direction that the
    derivative stretches most, ``size`` times as long as the input (the parameters), per unit of it.
    ``robustness_prediction_certified``: a Lipschitz constant of the network in its input, which no displacement of any
    length exceeds; see `lsp_callbacks.operators.network.lipschitz`. It is far above what is seen, and not there for
    attention. The theory's claim (Sec. 7.4) that negative exponents make explanations robust needs more than it says:
    exponents bound first derivatives, and an explanation changes with second ones, ``dg/dx``, which they leave free.

    Where the network has kinks (ReLU, max-pooling) its explanations jump across them and are blind to what lies
    between: ``dg/dx`` of a piecewise linear network is 0 almost everywhere. Then ``robustness_kinked`` is 1, both
    first-order numbers of the explanation are left out, and the lower bounds are those along the prediction's
    direction. They are left out, too, behind a custom ``autograd.Function``, whose second derivative nobody knows. In
    half precision there are no bounds: a displacement would drown in rounding, and products are too coarse.

    When ``robustness_prediction`` grows and the loss does not fall: normalise or decay the weights. When the
    explanation's lower bound times the noise of your inputs is as large as the explanation itself, do not trust
    saliency maps: average them over noisy inputs, or take a smooth activation.

    Args:
        samples: of the batch, at most; of several ranks, of the first.
        size: of the displacements, relative to the norm of a sample's input and of the parameters.

    Keys: ``stability/robustness_prediction``, ``_prediction_theta``, ``_explanation``, ``_explanation_theta``, each
    with ``_upper`` and ``_lower``; ``stability/robustness_prediction_certified`` where there is one;
    ``stability/robustness_residual``, the largest of Lanczos relative to its value;
    ``stability/robustness_kinked``. The input is the first floating-point tensor that enters a module, otherwise what
    its first module makes of integers; it is held fixed where the parameters move.

    Raises:
        ValueError: for bad arguments.

    Cost: some 80 passes over the samples, and the norms of all layers: 37 gradients, or 23 with kinks.

    Source: Katende, Sec. 7.4; Simonyan et al. 2014.
    """

    name = "robustness"
    keys = (
        "stability/robustness_prediction", "stability/robustness_prediction_theta", "stability/robustness_residual",
        "stability/robustness_kinked",
    )  # fmt: skip
    optional = (
        "stability/robustness_explanation", "stability/robustness_explanation_theta",
        *(f"stability/robustness_{name}_lower" for name in FIRST),
        *(f"stability/robustness_{name}_upper" for name in FIRST), "stability/robustness_prediction_certified",
    )  # fmt: skip
    values: Tensor

    def __init__(self, samples: int = 4, size: float = 1e-2):
        super().__init__()
        whole("samples", samples, 1), number("size", size, above=0, most=1.0)
        self.samples, self.size = samples, size
        length = len(self.keys) + len(self.optional)
        self.add_state("values", default=torch.full((length,), torch.nan, dtype=torch.float64), persistent=True)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        # Measured: passes over the samples, and vectors over all parameters.
        passes, vectors = (60, 110) if snapshot.kinked else (80, 400)
        spent = sample_passes(snapshot, self.samples, passes) + beside(snapshot, vectors=vectors)
        return {"forward": forward_cost(snapshot), "robustness": spent, "norms of layers": norms_cost(snapshot)}

    def path(self, snapshot: Snapshot) -> str:
        return label("exact", snapshot)

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        found = footprint(snapshot)
        return {
            "graph": 2 * TWICE * found.activations,
            "vectors": (WORK + STEPS) * found.parameters,
            "copies": 2 * found.buffers,
        }

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        verify(snapshot)
        found = snapshot.run.ranks.first(lambda: self._measure(snapshot), self.name)
        names = (key.removeprefix("stability/robustness_") for key in (*self.keys, *self.optional))
        self.values = torch.tensor([found.get(name, math.nan) for name in names], dtype=torch.float64)
        self.complete = True

    def _measure(self, snapshot: Snapshot) -> dict[str, float]:
        at = explain(snapshot, samples=self.samples)
        if not bool(torch.isfinite(at.prediction).all()):
            raise Unmeasurable("the network's outputs are not finite: the weights have overflowed")
        parameters = list(snapshot.parameters.values())

        def by_parameters(delta: Tensor) -> tuple[Tensor, Tensor]:
            with displaced(parameters, delta, 1.0):
                return change_by_parameters(at)

        root, graph = at.states.samples**0.5, at.graph
        smooth = not (graph.kinked or graph.custom)
        lengths = _norm([at.states.start]) / root, _norm(parameters)
        distances = [self.size * (length or 1.0) for length in lengths]
        by_input = _changes(at.by_input(), partial(change_by_input, at), distances[0], at, smooth)
        shared = _changes(at.by_parameters(), by_parameters, distances[1], at, smooth)
        residual = max(by_input.pop("residual"), shared.pop("residual"))
        values = by_input | {_renamed(name): value / root for name, value in shared.items()}
        if graph.full:
            with contextlib.suppress(Uncertified):
                values["prediction_certified"] = lipschitz_upper(at.states)
        else:
            values = {name: value for name, value in values.items() if not name.endswith(("_lower", "_upper"))}
        return values | {"residual": residual, "kinked": float(graph.kinked)}

    def compute(self) -> dict[str, Tensor]:
        """The last measurement; what is not defined is left out."""
        found = dict(zip((*self.keys, *self.optional), self.values))
        return {key: value for key, value in found.items() if key in self.keys or not bool(value.isnan())}


def _changes(
    operators: tuple[LinearOperator, LinearOperator],
    change: Callable[[Tensor], tuple[Tensor, Tensor]],
    distance: float,
    at: Explanation,
    smooth: bool,
) -> dict[str, float]:
    """Of prediction and explanation by one kind of displacement; the largest over the samples, where each has its own.

    Args:
        operators: the derivatives of both.
        change: of both, for a displacement.
        distance: of the displacement.
        at: where.
        smooth: whether the explanation has a derivative.
    """
    generator = at.snapshot.generator("robustness")
    rounding = [_rounding(value, operators[0].batch) for value in (at.prediction, at.explanation)]
    prediction = sensitivity(
        operators[0], lambda v: change(v)[0], distance, rounding=rounding[0], steps=STEPS, generator=generator
    )
    found = {"prediction": prediction}
    if smooth:
        found["explanation"] = sensitivity(
            operators[1], lambda v: change(v)[1], distance, rounding=rounding[1], steps=STEPS, generator=generator
        )
    values = {name: float(one.value.max()) for name, one in found.items()}
    values |= {f"{name}_lower": float(one.lower.max()) for name, one in found.items()}
    values |= {f"{name}_upper": float(one.upper.max()) for name, one in found.items()}
    if not smooth:
        jump = change(distance * prediction.direction)[1]
        size = norm(jump, -1).cpu() - rounding[1]
        values["explanation_lower"] = float(size.clamp_min(0).max()) / distance
    tiny = torch.finfo(torch.float64).tiny
    return values | {"residual": max(float((one.residual / one.value.clamp_min(tiny)).max()) for one in found.values())}


def _renamed(name: str) -> str:
    first, _, bound = name.partition("_")
    return f"{first}_theta_{bound}".rstrip("_")


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def _rounding(rows: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Of the norm of a difference between two evaluations, for each sample or for all together."""
    size = norm(rows if batch else rows.flatten(), -1).cpu()
    return ROUNDING * torch.finfo(rows.dtype).eps * size
