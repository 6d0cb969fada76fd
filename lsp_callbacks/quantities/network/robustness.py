"""Sensitivity of a prediction and its explanation to the input and to the parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lsp_callbacks._validation import number, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.network.robustness import sensitivity
from lsp_callbacks.linalg import LinearOperator, norm
from lsp_callbacks.operators.cost import beside, forward_cost, sample_passes
from lsp_callbacks.operators.curvature.hessian import label
from lsp_callbacks.operators.footprint import TWICE, footprint
from lsp_callbacks.operators.memory import WORK
from lsp_callbacks.operators.network.lipschitz import Uncertified, lipschitz_upper
from lsp_callbacks.operators.network.norms_cost import norms_cost
from lsp_callbacks.operators.network.saliency import Explanation, change_by_input, change_by_parameters, explain
from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.quantities.key import Key, relative_residual
from lsp_callbacks.step.flat import displaced
from lsp_callbacks.step.replay_checks import verify
from lsp_callbacks.step.snapshot import Snapshot

#: Rounding error of a number that went through a network, in units in the last place.
ROUNDING = 16.0
STEPS = 20
_UNITS = {
    "prediction": "output / input",
    "prediction_theta": "output / parameter",
    "explanation": "output / input^2",
    "explanation_theta": "output / (input x parameter)",
}


def _bounds(name: str) -> dict[str, Key]:
    return {
        f"robustness_{name}_lower": Key("The same, reached by a real displacement.", _UNITS[name], optional=True),
        f"robustness_{name}_upper": Key("The same, upper bound to first order.", _UNITS[name], optional=True),
    }


class Robustness(Quantity):
    """Sensitivity of predictions f and their explanations g to displacements of the input and of the parameters.

    f is what the network's last module returns for a sample (logits), in eval mode, and g the gradient of its largest
    entry, the predicted class's, with respect to the input. ``||df/dx||`` and ``||dg/dx||`` are operator norms, the
    largest over the samples, in units of f and g per unit of input; ``||df/dtheta||`` and ``||dg/dtheta||`` are those
    of all samples together by ``sqrt(samples)``: the root mean square over the samples of their change, per unit of
    parameters. They are Lanczos values, lower bounds up to ``robustness_residual``; ``_upper`` beside them is an upper
    bound, exact for few outputs, otherwise true with probability 0.999. They can be multiplied by the sensitivity of
    the parameters: the displacement that training began with times ``sigma_theta_bound`` of `StabilityProfile` times
    ``robustness_prediction_theta_upper`` bounds the change of these predictions, to first order. The product of two
    *lower* bounds is no bound: the response of the predictions to the initial parameters is measured by
    `StabilityProfile` as ``sigma_output`` and ``sigma_explanation``.

    Two numbers need no linearisation. ``_lower``: the change at a real displacement along the direction that the
    derivative stretches most, ``size`` times as long as the input (the parameters), per unit of it.
    ``robustness_prediction_certified``: a Lipschitz constant of the network in its input, which no displacement of any
    length exceeds; see `lsp_callbacks.operators.network.lipschitz`. It is far above the measured values, and does not
    exist for attention. The theory's claim (Sec. 7.4) that negative exponents make explanations robust needs a further
    assumption: exponents bound first derivatives, and an explanation changes with second ones, ``dg/dx``.

    Where the network has kinks (ReLU, max-pooling), its explanations jump across them and are constant between them:
    ``dg/dx`` of a piecewise linear network is 0 almost everywhere. Then ``robustness_kinked`` is 1, both first-order
    numbers of the explanation are left out, and the lower bounds are those along the prediction's direction. They are
    left out, too, with a custom ``autograd.Function``, whose second derivative is not known. In half precision there
    are no bounds: rounding would hide the displacements, and the products are too coarse.

    The input is the first floating-point tensor that enters a module, otherwise the output of the first module that
    receives integers; it is held fixed where the parameters move.

    Args:
        samples: largest number of samples, the first of the batch; with several ranks, of the first rank's.
        size: length of the displacements, relative to the norm of a sample's input and of the parameters.

    Raises:
        ValueError: for fewer than 1 sample, or a size outside (0, 1].

    Cost: some 80 passes over the samples, and the norms of all layers: 37 gradients, or 23 with kinks.

    Source: Katende 2025, Sec. 7.4; Simonyan et al. 2014.
    """

    name = "robustness"
    KEYS: ClassVar = {
        "robustness_prediction": Key(
            "Change of the outputs per unit of the input, to first order.",
            _UNITS["prediction"],
            "If it grows and the loss does not fall: normalise the layers or decay the weights.",
        ),
        "robustness_prediction_theta": Key(
            "Change of the outputs per unit of the parameters, to first order.", _UNITS["prediction_theta"]
        ),
        "robustness_residual": relative_residual(
            "robustness_prediction", "Largest residual of Lanczos, relative to its value."
        ),
        "robustness_kinked": Key("1 where the network has kinks: explanations jump, read the lower bounds."),
        "robustness_explanation": Key(
            "Change of the input gradient per unit of the input, to first order.",
            _UNITS["explanation"],
            "If its lower bound times the noise of the inputs is as large as the explanation: do not trust saliency "
            "maps; average them over noisy inputs, or take a smooth activation.",
            optional=True,
        ),
        "robustness_explanation_theta": Key(
            "Change of the input gradient per unit of the parameters, to first order.",
            _UNITS["explanation_theta"],
            optional=True,
        ),
        **_bounds("prediction"),
        **_bounds("prediction_theta"),
        **_bounds("explanation"),
        **_bounds("explanation_theta"),
        "robustness_prediction_certified": Key(
            "Lipschitz constant of the outputs in the input, for every input and any displacement.",
            _UNITS["prediction"],
            optional=True,
        ),
    }

    def __init__(self, samples: int = 4, size: float = 1e-2):
        super().__init__()
        whole("samples", samples, 1), number("size", size, above=0, most=1.0)
        self.samples, self.size = samples, size

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        # Measured: passes over the samples, and vectors over all parameters.
        passes, vectors = (60, 110) if snapshot.kinked else (80, 400)
        spent = sample_passes(snapshot, self.samples, passes) + beside(snapshot, vectors=vectors)
        return {"forward": forward_cost(snapshot), "robustness": spent, "norms of layers": norms_cost(snapshot)}

    def path(self, snapshot: Snapshot) -> str:
        return label("exact", snapshot)

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        training = footprint(snapshot)
        return {
            "graph": 2 * TWICE * training.activations,
            "vectors": (WORK + STEPS) * training.parameters,
            "copies": 2 * training.buffers,
        }

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step."""
        self.complete = False
        verify(snapshot)
        values = snapshot.run.ranks.first(lambda: self._measure(snapshot), self.name)
        self.finish({f"robustness_{name}": value for name, value in values.items()})

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


def _changes(
    operators: tuple[LinearOperator, LinearOperator],
    change: Callable[[Tensor], tuple[Tensor, Tensor]],
    distance: float,
    at: Explanation,
    smooth: bool,
) -> dict[str, float]:
    """Return the sensitivities of prediction and explanation to one kind of displacement, the largest over the samples.

    Args:
        operators: the derivatives of both.
        change: the change of both for a displacement.
        distance: the length of the displacement.
        at: prediction and explanation at the samples.
        smooth: whether the explanation has a derivative.
    """
    generator = at.snapshot.generator("robustness")
    rounding = [_rounding(value, operators[0].batch) for value in (at.prediction, at.explanation)]
    prediction = sensitivity(
        operators[0], lambda v: change(v)[0], distance, rounding=rounding[0], steps=STEPS, generator=generator
    )
    results = {"prediction": prediction}
    if smooth:
        results["explanation"] = sensitivity(
            operators[1], lambda v: change(v)[1], distance, rounding=rounding[1], steps=STEPS, generator=generator
        )
    values = {name: float(result.value.max()) for name, result in results.items()}
    values |= {f"{name}_lower": float(result.lower.max()) for name, result in results.items()}
    values |= {f"{name}_upper": float(result.upper.max()) for name, result in results.items()}
    if not smooth:
        jump = change(distance * prediction.direction)[1]
        size = norm(jump, -1).cpu() - rounding[1]
        values["explanation_lower"] = float(size.clamp_min(0).max()) / distance
    tiny = torch.finfo(torch.float64).tiny
    residuals = (float((each.residual / each.value.clamp_min(tiny)).max()) for each in results.values())
    return values | {"residual": max(residuals)}


def _renamed(name: str) -> str:
    first, _, bound = name.partition("_")
    return f"{first}_theta_{bound}".rstrip("_")


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def _rounding(rows: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Return the error of the norm of a difference of two evaluations, for each sample or for all together."""
    size = norm(rows if batch else rows.flatten(), -1).cpu()
    return ROUNDING * torch.finfo(rows.dtype).eps * size
