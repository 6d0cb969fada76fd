"""Whether signals and gradients pass through the network: gains, dead units, tails, conditions, norms, Lipschitz."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

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
    - *Kurtosis* (`functional.excess_kurtosis`, whose error is ``sqrt(24 / n)`` of n numbers) of each weight with more
      than one axis, now; of the weights before the first update the largest, absent where a resumed run did not see it.
      Far above 0 at the start, next to a large ``flat_slopes`` behind a tanh: initialise from a normal or uniform
      distribution. When it grows in training, few weights take over.
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
    - *Lipschitz* (`functional.lipschitz_lower`, `lsp_callbacks.operators.network.lipschitz`) from the first
      floating-point tensor
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
    ``condition``, ``condition_lower``, ``batch_norm_mean_drift``,
    ``batch_norm_mean_error``, ``batch_norm_variance_drift``, ``batch_norm_variance_error``.

    Cost: 2 gradients for the step and its weights, 1.2 for the two outputs where there is BatchNorm, bounds and
    condition numbers of all layers, and five Hessian products: 28 gradients, twice that on small networks.

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
        self.samples = samples
        self.method: Method = choice("method", method, *get_args(Method))
        self.absent: dict[str, str] = {}
        self._found: dict[str, Tensor] = {}
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
        found = product_memory(snapshot, self.method, PRODUCTS)
        # What each module was called with stays until its slopes are known.
        return {**found, "signals": found.get("activations", 0.0) or found["graph"] / 4}

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        found, absent = snapshot.run.ranks.first(lambda: self._measure(snapshot), self.name)
        ranks = snapshot.run.ranks
        ratio = _attempt("loss_condition_lower", absent, lambda: ranks.apart(lambda: self._loss_condition(snapshot)))
        if ratio is not None:
            found["loss_condition_lower"] = scalar(ratio)
        elif ranks.world > 1:  # products that one rank has made, and another has not
            snapshot.forget()
        if snapshot.step == 0:  # where nobody has called it
            self.begin(snapshot.module)
        self._found, self.absent, self.complete = _finite(found), absent, True

    def begin(self, module: nn.Module) -> None:
        """Notes the kurtosis of the weights that the run begins with."""
        self.initial = torch.tensor(list(kurtosis_of(module).values()), dtype=torch.float64)

    def _measure(self, snapshot: Snapshot) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What one rank finds, and why which parts are absent."""
        absent: dict[str, str] = {}
        step = signal_sizes(snapshot)
        found = gains_of(step)
        if not any(key.startswith("forward_gain/") for key in found):
            raise Unmeasurable(
                "no module with a weight matrix, or residual block, passes a signal on to the loss: there is no gain"
            )
        found |= units_of(step, absent)
        found |= kurtosis_of(snapshot.module)
        for norm in step.norms:
            found |= _attempt(norm.name, absent, partial(drift_of, norm)) or {}
        if step.norms:
            change = _attempt("batch_norm_output_change", absent, lambda: output_change_of(snapshot))
            found |= {} if change is None else {"batch_norm_output_change": change}
        states = _attempt("lipschitz", absent, lambda: depth(snapshot, samples=self.samples))
        if snapshot.sample is not None:  # puts the buffers back to where they were before the step
            snapshot.sample(1)
        with evaluating(snapshot.module), torch.no_grad():
            found |= conditions_of(snapshot.module, step)
        if states is not None:
            lower = _attempt("lipschitz_lower", absent, lambda: lipschitz_lower(states.jacobian(len(states.layers))))
            upper = _attempt("lipschitz_upper", absent, lambda: lipschitz_upper(states))
            found |= {} if lower is None else {"lipschitz_lower": scalar(lower)}
            found |= {} if upper is None else {"lipschitz_upper": scalar(upper)}
        return found, absent

    def _loss_condition(self, snapshot: Snapshot) -> Tensor:
        H = hessian(snapshot, method=self.method)
        g = snapshot.flat_gradient
        g = replayed_gradient(snapshot)[1] if g is None else g
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
            "kurtosis_max": ("kurtosis", max), "condition_max": ("condition", max),
            "condition_lower_max": ("condition_lower", max),
            "batch_norm_drift_max": ("batch_norm_mean_drift", max), "batch_norm_excess_max": ("batch_norm_excess", max),
        }  # fmt: skip
        values = {key: scalar(torch.nan) for key in self.keys}
        for key, (kind, extreme) in extremes.items():
            if of := [value for name, value in found.items() if name.startswith(f"{kind}/")]:
                values[f"stability/{key}"] = extreme(of)
        initial = self.initial[self.initial.isfinite()]
        if found and len(initial):
            values["stability/kurtosis_initial_max"] = initial.max()
        rooted = {name + ROOT if name.endswith("/") else name: value for name, value in found.items()}
        return values | {f"stability/{name}": value for name, value in rooted.items()}

    def reset(self) -> None:
        super().reset()
        self._found, self.absent = {}, {}


def _attempt(what: str, absent: dict[str, str], measure: Callable[[], Any]) -> Any | None:
    """What one part gives; where it does not exist, why."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        raise
    except (Unmeasurable, Uncertified, RuntimeError) as error:  # of the last kind: no second derivative is implemented
        absent[what] = str(error)
        return None


def _finite(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in found.items() if math.isfinite(value)}
