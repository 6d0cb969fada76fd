"""How signals and gradients pass through the network: gains, units, kurtosis, conditions, BatchNorm, Lipschitz."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import choice, whole
from lsp_callbacks.autograd._torch_internals import BatchNorm
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.condition import loss_condition_lower
from lsp_callbacks.functional.network.lipschitz import lipschitz_lower
from lsp_callbacks.operators.cost import lanczos_cost
from lsp_callbacks.operators.curvature.hessian import Method, hessian, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.network.depth import depth
from lsp_callbacks.operators.network.lipschitz import Uncertified, lipschitz_upper
from lsp_callbacks.operators.network.norms_cost import norms_cost
from lsp_callbacks.operators.network.signal_sizes import signal_sizes
from lsp_callbacks.quantities.base import ROOT, Quantity, scalar
from lsp_callbacks.quantities.key import PREFIX, Key
from lsp_callbacks.quantities.network.signal_parts import (
    conditions_of,
    drift_of,
    gains_of,
    kurtosis_of,
    output_change_of,
    units_of,
)
from lsp_callbacks.step.module_modes import evaluating
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.snapshot import Snapshot

#: Hessian products for the condition number of the loss.
PRODUCTS = 5
#: Global keys that are extremes over the layers: of which kind, and which extreme.
EXTREMES: dict[str, tuple[str, Callable[[list[Tensor]], Tensor]]] = {
    "forward_gain_min": ("forward_gain", min),
    "forward_gain_max": ("forward_gain", max),
    "backward_gain_min": ("backward_gain", min),
    "backward_gain_max": ("backward_gain", max),
    "kurtosis_max": ("kurtosis", max),
    "condition_max": ("condition", max),
    "condition_lower_max": ("condition_lower", max),
    "batch_norm_drift_max": ("batch_norm_mean_drift", max),
    "batch_norm_excess_max": ("batch_norm_excess", max),
}
GAIN_ADVICE = (
    "Below 1/2 or above 2 in several layers: another initialisation (He for ReLU, Glorot for tanh), a normalisation "
    "layer, or residual connections."
)
UNIT_ADVICE = "Above about a tenth: a lower learning rate, a smaller initialisation, or LeakyReLU."
CONDITION_ADVICE = "Above 1e3 some directions are lost: orthogonal initialisation, weight decay, or fewer units."
BATCH_NORM_ADVICE = (
    "Large together with batch_norm_output_change: a larger momentum of the running statistics, real and generated "
    "samples in one batch, or GroupNorm."
)


class SignalPropagation(Quantity):
    """How signals, gradients and statistics pass through the network at one step.

    The step is replayed as it was, in training mode, with its backward pass. With several ranks the first one measures,
    on its own batch. Parts that do not exist (no activation, no BatchNorm) or cannot be measured are left out;
    ``absent`` gives the reasons.

    - *Gains* (`functional.gains`): rms out over rms in of each layer, and the same for gradients, backwards. 1 is
      healthy, for a residual block slightly more.
    - *Units* (`functional.inactive_units`): dead ones pass no gradient for any sample of the batch,
      saturated ones less than 1/20. 0 is healthy.
    - *Kurtosis* (`functional.excess_kurtosis`, whose error is ``sqrt(24 / n)`` for n numbers) of each weight with more
      than one axis, now, and the largest of the weights before the first update, absent in a resumed run.
    - *Condition* (`functional.condition`) of each layer as it is applied: exact where its shorter side has at most 256
      numbers, a lower bound by Lanczos otherwise; 1 is orthogonal. The *loss*'s (`functional.loss_condition_lower`) is
      a lower bound: half of it is about the number of steps that the gradient's direction takes at the largest stable
      rate.
    - *BatchNorm* (`functional.batch_norm_drift`): batch against running statistics, and how much of it sampling
      explains. A batch that is drawn from a moving distribution, as in a GAN, makes both numbers large.
    - *Lipschitz* (`functional.lipschitz_lower`, `lsp_callbacks.operators.network.lipschitz`) from the first
      floating-point tensor (or the embedding) to the last layer, per sample, in eval mode. The upper one holds for
      every input, but can be far above the true constant; attention and gates have none.

    Args:
        samples: number of samples at whose inputs the lower Lipschitz bound is taken.
        method: of the Hessian products, see `lsp_callbacks.operators.hessian`.

    Raises:
        ValueError: for fewer than 1 sample, or an unknown method.

    Cost: 2 gradients for the step and its weights, 1.2 for the two outputs where there is BatchNorm, bounds and
    condition numbers of all layers, and five Hessian products: 28 gradients, twice that on small networks.

    Source: Glorot & Bengio 2010; He et al. 2015; Schoenholz et al. 2017; Pennington et al. 2017; Ioffe & Szegedy 2015;
    Szegedy et al. 2014.
    """

    name = "signal_propagation"
    KEYS: ClassVar = {
        "forward_gain_min": Key("Smallest rms out / rms in of a layer; 1 is healthy.", "", GAIN_ADVICE),
        "forward_gain_max": Key("Largest rms out / rms in of a layer; 1 is healthy.", "", GAIN_ADVICE),
        "forward_log_gain": Key("Log gain of the signal from input to output.", "nats", optional=True),
        "backward_gain_min": Key(
            "Smallest gain of the gradient in a layer; 1 is healthy.", "", GAIN_ADVICE, optional=True
        ),
        "backward_gain_max": Key(
            "Largest gain of the gradient in a layer; 1 is healthy.", "", GAIN_ADVICE, optional=True
        ),
        "backward_log_gain": Key("Log gain of the gradient from the last layer to the first.", "nats", optional=True),
        "dead_share": Key("Share of units that pass no gradient.", "", UNIT_ADVICE, optional=True),
        "saturated_share": Key("Share of units that pass less than 1/20.", "", UNIT_ADVICE, optional=True),
        "kurtosis_max": Key(
            "Largest excess kurtosis of a weight; 0 is that of a normal distribution.",
            "",
            "If it grows in training, a few weights dominate their layer.",
            optional=True,
        ),
        "kurtosis_initial_max": Key(
            "The same before the first update.",
            "",
            "Far above 0 with large flat_slopes behind a tanh: initialise from a normal or uniform distribution.",
            optional=True,
        ),
        "condition_max": Key("Largest condition number of a small layer, exact.", "", CONDITION_ADVICE, optional=True),
        "condition_lower_max": Key(
            "Largest lower bound of the condition number of a large layer.", "", CONDITION_ADVICE, optional=True
        ),
        "loss_condition_lower": Key(
            "Largest curvature divided by that along the gradient.",
            "",
            "If large: a preconditioner (Adam), or normalised inputs.",
            optional=True,
        ),
        "batch_norm_drift_max": Key(
            "Largest distance of a batch mean from the running one.",
            "running standard deviations",
            BATCH_NORM_ADVICE,
            optional=True,
        ),
        "batch_norm_excess_max": Key(
            "Drift divided by what sampling explains; 1 is healthy.", "", BATCH_NORM_ADVICE, optional=True
        ),
        "batch_norm_output_change": Key(
            "Relative change of the output when running statistics replace those of the batch.",
            "",
            BATCH_NORM_ADVICE,
            optional=True,
        ),
        "lipschitz_lower": Key(
            "Largest norm of the input Jacobian at the samples.",
            "output / input",
            "If large: weight decay, or spectral normalisation.",
            optional=True,
        ),
        "lipschitz_upper": Key("Lipschitz constant for every input, upper bound.", "output / input", optional=True),
        "forward_gain/<layer>": Key("rms out / rms in of a layer."),
        "backward_gain/<layer>": Key("Gain of the gradient in a layer."),
        "dead_units/<layer>": Key("Share of units of an activation that pass no gradient."),
        "saturated_units/<layer>": Key("Share of units of an activation that pass less than 1/20."),
        "flat_slopes/<layer>": Key("Share of single slopes of an activation below 1/20."),
        "kurtosis/<parameter>": Key("Excess kurtosis of a weight."),
        "condition/<layer>": Key("Condition number of a layer, exact."),
        "condition_lower/<layer>": Key("Lower bound of the condition number of a layer."),
        "batch_norm_mean_drift/<layer>": Key("Distance of the batch mean from the running one."),
        "batch_norm_mean_error/<layer>": Key("Part of that distance which sampling explains."),
        "batch_norm_variance_drift/<layer>": Key("Distance of the batch variance from the running one."),
        "batch_norm_variance_error/<layer>": Key("Part of that distance which sampling explains."),
        "batch_norm_excess/<layer>": Key("Drift of a layer divided by what sampling explains."),
    }
    initial: Tensor

    def __init__(self, samples: int = 4, method: Method = "auto"):
        super().__init__()
        whole("samples", samples, 1)
        self.samples = samples
        self.method: Method = choice("method", method, *get_args(Method))
        self.absent: dict[str, str] = {}
        self._numbers: dict[str, Tensor] = {}
        self.add_state("initial", default=torch.empty(0, dtype=torch.float64), persistent=True)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        norms = any(isinstance(m, BatchNorm) for m in snapshot.module.modules())
        return {
            "signals": 2.0,
            "bounds": norms_cost(snapshot),
            "curvature along the gradient": lanczos_cost(snapshot, resolved(snapshot, self.method), PRODUCTS),
            **({"outputs by batch statistics": 1.2} if norms else {}),
        }

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        products = product_memory(snapshot, self.method, PRODUCTS)
        # The inputs of each module are kept until its slopes are computed.
        return {**products, "signals": products.get("activations", 0.0) or products["graph"] / 4}

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step."""
        self.complete = False
        numbers, absent = snapshot.run.ranks.first(lambda: self._measure(snapshot), self.name)
        ranks = snapshot.run.ranks
        ratio = _attempt("loss_condition_lower", absent, lambda: ranks.apart(lambda: self._loss_condition(snapshot)))
        if ratio is not None:
            numbers["loss_condition_lower"] = scalar(ratio)
        elif ranks.world > 1:  # products that one rank has computed, and another has not
            snapshot.forget()
        if snapshot.step == 0:  # in a loop that does not call it
            self.begin(snapshot.module)
        self._numbers, self.absent = _finite(numbers), absent
        self.finish(self._global())

    def begin(self, module: nn.Module) -> None:
        """Remember the kurtosis of the weights that the run begins with."""
        self.initial = torch.tensor(list(kurtosis_of(module).values()), dtype=torch.float64)

    def _measure(self, snapshot: Snapshot) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the numbers of one rank, and the reasons why parts are absent."""
        absent: dict[str, str] = {}
        step = signal_sizes(snapshot)
        numbers = gains_of(step)
        if not any(key.startswith("forward_gain/") for key in numbers):
            raise Unmeasurable(
                "no module with a weight matrix, or residual block, passes a signal on to the loss: there is no gain"
            )
        numbers |= units_of(step, absent)
        numbers |= kurtosis_of(snapshot.module)
        for norm in step.norms:
            numbers |= _attempt(norm.name, absent, partial(drift_of, norm)) or {}
        if step.norms:
            change = _attempt("batch_norm_output_change", absent, lambda: output_change_of(snapshot))
            numbers |= {} if change is None else {"batch_norm_output_change": change}
        states = _attempt("lipschitz", absent, lambda: depth(snapshot, samples=self.samples))
        if snapshot.sample is not None:  # restores the buffers of before the step
            snapshot.sample(1)
        with evaluating(snapshot.module), torch.no_grad():
            numbers |= conditions_of(snapshot.module, step)
        if states is not None:
            lower = _attempt("lipschitz_lower", absent, lambda: lipschitz_lower(states.jacobian(len(states.layers))))
            upper = _attempt("lipschitz_upper", absent, lambda: lipschitz_upper(states))
            numbers |= {} if lower is None else {"lipschitz_lower": scalar(lower)}
            numbers |= {} if upper is None else {"lipschitz_upper": scalar(upper)}
        return numbers, absent

    def _loss_condition(self, snapshot: Snapshot) -> Tensor:
        H = hessian(snapshot, method=self.method)
        g = snapshot.flat_gradient
        g = replayed_gradient(snapshot)[1] if g is None else g
        condition = loss_condition_lower(H, g.to(H.dtype), steps=PRODUCTS)
        if condition is None:
            raise Unmeasurable("the gradient vanishes, or points along negative curvature")
        return condition

    def _global(self) -> dict[str, Tensor]:
        """Return the numbers of the whole network: those measured as such, and the extremes over the layers."""
        values = {name: value for name, value in self._numbers.items() if "/" not in name}
        for name, (kind, extreme) in EXTREMES.items():
            if of_layers := [value for key, value in self._numbers.items() if key.startswith(f"{kind}/")]:
                values[name] = extreme(of_layers)
        initial = self.initial[self.initial.isfinite()]
        if len(initial):
            values["kurtosis_initial_max"] = initial.max()
        return values

    def compute(self) -> dict[str, Tensor]:
        """Return the numbers of the last measurement, with those of the layers; NaN before one."""
        names = {name + ROOT if name.endswith("/") else name: value for name, value in self._numbers.items()}
        layers = {f"{PREFIX}{name}": value for name, value in names.items() if "/" in name}
        return super().compute() | layers

    def reset(self) -> None:
        super().reset()
        self._numbers, self.absent = {}, {}


def _attempt(what: str, absent: dict[str, str], measure: Callable[[], Any]) -> Any | None:
    """Return what one part measures; where it cannot be measured, note the reason and return None."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        raise
    except (Unmeasurable, Uncertified, RuntimeError) as error:  # RuntimeError: no second derivative is implemented
        absent[what] = str(error)
        return None


def _finite(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in numbers.items() if math.isfinite(value)}
