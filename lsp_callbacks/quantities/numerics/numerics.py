"""How far a run is from overflow, underflow and lost updates, and what made its first NaN or Inf."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.functional.numerics.numeric_range import NumericRange, lost_share, numeric_range
from lsp_callbacks.operators.cost import beside, work
from lsp_callbacks.operators.memory import footprint
from lsp_callbacks.operators.trajectory.step_jacobian import blocks_of
from lsp_callbacks.operators.trajectory.step_size import displacement
from lsp_callbacks.operators.trajectory.update_rules import formula_of
from lsp_callbacks.quantities.base import ROOT, Quantity, scalar
from lsp_callbacks.step.flat import split
from lsp_callbacks.step.replay_checks import check_loss
from lsp_callbacks.step.snapshot import Snapshot

#: Vectors in float64 that the trial of a step holds, and those for each of the optimizer's states; copies in float64 of
#: the widest call: measured in ``benchmarks/memory_is_predicted.py``.
COPY, STATE, WIDE = 6.0, 1.5, 2.5


class Numerics(Quantity):
    """Head-room to overflow, underflow of gradients, updates lost to rounding; and the first fault of the run.

    *At the cadence* one replay of the step is looked at, operation by operation, in the types in which its numbers
    really are (`lsp_callbacks.functional.numeric_range`):

    - ``stability/overflow_headroom``: the smallest of the three below; in bits, ``log2(max / largest number)``. It is
      the number of doublings that are left. Below 2 or 3 in float16: lower the loss scale, normalise, or take bfloat16.
    - ``stability/activation_headroom_min``, ``stability/gradient_headroom_min`` (of the scaled gradients under a
      gradient scaler), ``stability/weight_headroom_min``; by module or parameter ``activation_headroom/<name>``,
      ``gradient_headroom/<name>`` and ``weight_headroom/<name>``; ``(root)`` is outside of all submodules.
    - ``stability/gradient_underflow``: share of the numbers in the backward pass that are below the smallest normal
      number of their type, and so lose digits or become zero. Above some per cent: scale the loss, or take bfloat16.
    - ``stability/update_lost``: share of the parameters that the exact update would move and the rounded one does not:
      ``theta + d == theta``. It is the optimizer's own step on a float64 copy, rounded once. Near 1, as with small
      rates in pure bfloat16: keep weights in float32, or round stochastically.

    The last two are absent where they cannot be had (no kernels in float64; no optimizer, one that cannot be copied, or
    a step that is not its own).

    *At every step* of the loops that support it, `lsp_callbacks.monitor.nan_finder.NanFinder` looks at loss and
    gradient: ``fault`` says what made the first NaN or Inf, ``stability/nonfinite_step`` when.

    Cost: 4 gradients, up to 10 on small networks, as every operation is looked at.
    Source: Micikevicius et al. 2018, Sec. 3.

    Example:
        >>> import torch
        >>> from lsp_callbacks import Numerics, Snapshot
        >>> net, x = torch.nn.Linear(1, 1, bias=False).half(), torch.ones(1, 1, dtype=torch.float16)
        >>> _ = torch.nn.init.constant_(net.weight, 65504 / 16)
        >>> metric = Numerics()
        >>> metric.update(Snapshot(step=0, module=net, replay=lambda: net(x).sum()))
        >>> float(metric.compute()["stability/overflow_headroom"])
        4.0
    """

    name = "numerics"
    keys = (
        "stability/overflow_headroom", "stability/activation_headroom_min", "stability/gradient_headroom_min",
        "stability/weight_headroom_min",
    )  # fmt: skip
    optional = ("stability/gradient_underflow", "stability/update_lost", "stability/nonfinite_step")
    activations: Tensor
    gradients: Tensor
    weights: Tensor
    underflow: Tensor
    lost: Tensor
    nonfinite_step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fault: Fault | None = None
        #: Whether loss and gradient were finite again at the last step.
        self.recovered = False
        self._found: list[NumericRange] = []
        for state in ("activations", "gradients", "weights", "underflow", "lost", "nonfinite_step"):
            self.add_state(state, default=scalar(torch.nan), persistent=True)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        return {"numerics": 3.4 + beside(snapshot, calls=50 * work(snapshot).calls)}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        found = footprint(snapshot)
        shapes = ((call.input_shape or (), call.output_shape or ()) for call in snapshot.calls.values())
        widest = max((math.prod(received) + math.prod(sent) for received, sent in shapes), default=0)
        numbers = sum(p.numel() for p in snapshot.parameters.values())
        step = 0.0
        if snapshot.optimizer is not None:
            known = formula_of(snapshot.optimizer) is not None
            blocks = len(blocks_of(snapshot.optimizer)) if known else 2  # of an unknown optimizer, as of Adam
            step = 8.0 * (COPY + STATE * blocks) * numbers
        # One after the other: the replay, of which an operation at a time is repeated, and the optimizer's step.
        extra = max(0.0, step - found.activations, 8.0 * WIDE * widest)
        return {"activations": found.activations, "copies": 2 * found.buffers, "in float64": extra}

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        found = snapshot.run.ranks.gather(lambda: range_of_step(snapshot), self.name)
        lost = snapshot.run.ranks.first(lambda: _lost(snapshot), "the update")
        least = (min(min(getattr(own, of).values(), default=torch.nan) for own in found) for of in _PARTS)
        self.activations, self.gradients, self.weights = map(scalar, least)
        nonzero = sum(own.nonzero for own in found)
        self.underflow = scalar(sum(own.small for own in found) / nonzero if nonzero else torch.nan)
        self.lost, self._found, self.complete = scalar(lost), found, True

    def blame(self, fault: Fault) -> None:
        """Takes in the first fault of the run."""
        self.fault, self.nonfinite_step, self._computed = fault, scalar(float(fault.step)), None

    def compute(self) -> dict[str, Tensor]:
        """The last measurement. The step of the fault is no part of it: the loop says it once, at that step."""
        three = torch.stack([self.activations, self.gradients, self.weights])
        values = dict(zip(self.keys, (three.nan_to_num(nan=torch.inf).min(), *three)))
        if torch.isnan(three).all():
            values[self.keys[0]] = scalar(torch.nan)
        rest = zip(self.optional, (self.underflow, self.lost))
        values |= {key: value for key, value in rest if not bool(value.isnan())}
        for of, kind in _PARTS.items():
            names = sorted({name for own in self._found for name in getattr(own, of)})
            for name in names:
                bits = min(getattr(own, of)[name] for own in self._found if name in getattr(own, of))
                values[f"stability/{kind}/{name or ROOT}"] = scalar(bits)
        return values

    def reset(self) -> None:
        super().reset()
        self.fault, self.recovered, self._found = None, False, []


_PARTS = {"activations": "activation_headroom", "gradients": "gradient_headroom", "weights": "weight_headroom"}


def _lost(snapshot: Snapshot) -> float:
    """The share of updates that rounding loses; NaN where there is none, or it cannot be told."""
    if snapshot.gradient is None:  # a replay's would be the mean over the ranks
        return torch.nan
    parameters = list(snapshot.parameters.values())
    try:
        moves = split(displacement(snapshot), parameters)
        pairs = [lost_share(p.detach(), p.detach().double() + d) for p, d in zip(parameters, moves)]
    except (Unmeasurable, TypeError, RuntimeError):  # not every device has float64
        return torch.nan
    moved = sum(moves for _, moves in pairs)
    return sum(lost for lost, _ in pairs) / moved if moved else 0.0


def range_of_step(snapshot: Snapshot) -> NumericRange:
    """Return the `numeric_range` of one step, under the scale of its gradient scaler.

    Args:
        snapshot: a step; of several ranks each looks at its own part of it.

    Raises:
        Unmeasurable: if the replayed loss is not the step's.
    """
    return numeric_range(
        snapshot.replay,
        snapshot.module,
        parameters=snapshot.parameters,
        scale=snapshot.scale,
        check=lambda loss: check_loss(snapshot, loss, tolerance=1e-4 if snapshot.compiled else 0.0),
    )
