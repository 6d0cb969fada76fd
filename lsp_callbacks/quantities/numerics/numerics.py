"""How far a run is from overflow, underflow and lost updates, and what caused its first NaN or Inf."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.functional.numerics.numeric_range import NumericRange, lost_share, numeric_range
from lsp_callbacks.operators.cost import beside, work
from lsp_callbacks.operators.footprint import footprint
from lsp_callbacks.operators.trajectory.formula_tangent import blocks_of
from lsp_callbacks.operators.trajectory.step_size import displacement
from lsp_callbacks.operators.trajectory.update_rules import formula_of
from lsp_callbacks.quantities.base import ROOT, Quantity, scalar
from lsp_callbacks.quantities.key import PREFIX, Key
from lsp_callbacks.step.flat import split
from lsp_callbacks.step.replay_checks import check_loss
from lsp_callbacks.step.snapshot import Snapshot

#: Vectors in float64 that the trial of a step holds, and those for each of the optimizer's states; copies in float64 of
#: the widest call; measured in ``benchmarks/memory_is_predicted.py``.
COPY, STATE, WIDE = 6.0, 1.5, 2.5


class Numerics(Quantity):
    """Headroom to overflow, underflow of gradients, updates lost to rounding; and the first fault of the run.

    *At the cadence* one replay of the step is inspected, operation by operation, in the number types that they really
    use (`lsp_callbacks.functional.numeric_range`). Headroom is ``log2(max / largest number)``, in bits: the number of
    doublings that are left. Under a gradient scaler, gradients are the scaled ones. A lost update is a parameter that
    the exact update would move and the rounded one does not, ``theta + d == theta``; it is taken from the optimizer's
    own step on a float64 copy, rounded once. ``(root)`` in a key is what is outside of all submodules.

    Underflow and lost updates are absent where they cannot be measured (no kernels in float64; no optimizer, or one
    that cannot be copied; a step that is not the optimizer's own).

    *At every step* of the loops that support it, `lsp_callbacks.monitor.nan_finder.NanFinder` looks at loss and
    gradient: ``fault`` says which operation made the first NaN or Inf.

    Cost: 4 gradients, up to 10 on small networks, as every operation is inspected.

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
    KEYS: ClassVar = {
        "overflow_headroom": Key(
            "Doublings left before overflow, the least of activations, gradients and weights.",
            "bits",
            "Below 2 or 3 in float16: lower the loss scale, normalise, or use bfloat16.",
        ),
        "activation_headroom_min": Key("Doublings left in the forward pass.", "bits"),
        "gradient_headroom_min": Key("Doublings left in the backward pass.", "bits"),
        "weight_headroom_min": Key("Doublings left in the parameters.", "bits"),
        "gradient_underflow": Key(
            "Share of the backward pass's numbers below the smallest normal number of their type.",
            "",
            "Above a few per cent: scale the loss, or use bfloat16.",
            optional=True,
        ),
        "update_lost": Key(
            "Share of the parameters' updates that rounding removes.",
            "",
            "Near 1, as with small rates in pure bfloat16: keep weights in float32, or round stochastically.",
            optional=True,
        ),
        "nonfinite_step": Key(
            "Step of the first NaN or Inf.",
            "step",
            "Read `fault`, which names the module and the operation.",
            optional=True,
        ),
        "activation_headroom/<module>": Key("Doublings left in the outputs of a module.", "bits"),
        "gradient_headroom/<module or parameter>": Key("Doublings left in the gradients of a module.", "bits"),
        "weight_headroom/<parameter>": Key("Doublings left in a parameter.", "bits"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.fault: Fault | None = None
        #: Whether loss and gradient were finite again at the last step.
        self.recovered = False
        self._ranges: list[NumericRange] = []

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        return {"numerics": 3.4 + beside(snapshot, calls=50 * work(snapshot).calls)}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        training = footprint(snapshot)
        shapes = ((call.input_shape or (), call.output_shape or ()) for call in snapshot.calls.values())
        widest = max((math.prod(received) + math.prod(sent) for received, sent in shapes), default=0)
        numbers = sum(p.numel() for p in snapshot.parameters.values())
        step = 0.0
        if snapshot.optimizer is not None:
            supported = formula_of(snapshot.optimizer) is not None
            blocks = len(blocks_of(snapshot.optimizer)) if supported else 2  # an unknown optimizer counts as Adam
            step = 8.0 * (COPY + STATE * blocks) * numbers
        # One after the other: the replay, which repeats one operation at a time, and the optimizer's step.
        extra = max(0.0, step - training.activations, 8.0 * WIDE * widest)
        return {"activations": training.activations, "copies": 2 * training.buffers, "in float64": extra}

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step."""
        self.complete = False
        ranges = snapshot.run.ranks.gather(lambda: range_of_step(snapshot), self.name)
        lost = snapshot.run.ranks.first(lambda: _lost(snapshot), "the update")
        least = {
            f"{kind}_min": scalar(min(min(getattr(each, part).values(), default=torch.nan) for each in ranges))
            for part, kind in _PARTS.items()
        }
        three = torch.stack(list(least.values()))
        nonzero = sum(each.nonzero for each in ranges)
        self._ranges = ranges
        self.finish({
            "overflow_headroom": torch.nan if torch.isnan(three).all() else three.nan_to_num(nan=torch.inf).min(),
            **least,
            "gradient_underflow": sum(each.small for each in ranges) / nonzero if nonzero else torch.nan,
            "update_lost": lost,
            "nonfinite_step": self.nonfinite_step,
        })  # fmt: skip

    @property
    def nonfinite_step(self) -> Tensor:
        """Step of the first fault of the run; NaN before it."""
        return getattr(self, f"{PREFIX}nonfinite_step")

    def blame(self, fault: Fault) -> None:
        """Record the first fault of the run."""
        self.fault, self._computed = fault, None
        setattr(self, f"{PREFIX}nonfinite_step", scalar(float(fault.step)))

    def compute(self) -> dict[str, Tensor]:
        """Return the last measurement, without the step of the fault: the loop reports that once, at that step."""
        values = super().compute()
        values.pop(f"{PREFIX}nonfinite_step", None)
        for part, kind in _PARTS.items():
            for name in sorted({name for each in self._ranges for name in getattr(each, part)}):
                bits = min(getattr(each, part)[name] for each in self._ranges if name in getattr(each, part))
                values[f"{PREFIX}{kind}/{name or ROOT}"] = scalar(bits)
        return values

    def reset(self) -> None:
        super().reset()
        self.fault, self.recovered, self._ranges = None, False, []


_PARTS = {"activations": "activation_headroom", "gradients": "gradient_headroom", "weights": "weight_headroom"}


def _lost(snapshot: Snapshot) -> float:
    """Return the share of updates that rounding removes; NaN where there are none, or they cannot be computed."""
    if snapshot.gradient is None:  # that of a replay would be the mean over the ranks
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
        check=lambda loss: check_loss(snapshot, loss),
    )
