"""Gain, stiffness and CFL margin of every residual block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import number, whole
from lsp_callbacks.autograd.module_calls import is_residual_block
from lsp_callbacks.errors import NotApplicable, Unmeasurable
from lsp_callbacks.functional.network.residual import ResidualStability, residual_stability
from lsp_callbacks.operators.cost import forward_cost, sample_passes
from lsp_callbacks.operators.curvature.hessian import label
from lsp_callbacks.operators.memory import footprint
from lsp_callbacks.operators.network.residual_block import residual_block
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.quantities.module_filter import Selection, selected, validate
from lsp_callbacks.step.replay_checks import Call
from lsp_callbacks.step.snapshot import Snapshot

STEPS = 10
NO_BLOCK = "no residual block x + g(x) was recognised in this network: name yours with blocks=... if there are any"


class ResidualCFL(Quantity):
    """How much each residual block ``x + h g(x)`` stretches, and how its step h stands to the largest stable one.

    Blocks are found by two rules together: the class name reads like a block's (``...Block``, ``...Layer``,
    ``Residual...``, ``Bottleneck``, ``BasicBlock``, ``InvertedResidual``; so torchvision's, timm's, transformers' and
    ``nn.TransformerEncoderLayer``), and the autograd graph shows that the input reaches the output through additions
    alone, up to what is applied to their sum. The same shape in and out is not enough. Of nested blocks the innermost
    is taken. Or name them with ``blocks``.

    Args:
        blocks: class, glob, predicate, import path, or several; None finds them.
        samples: of the batch, at whose inputs the Jacobians are taken; of several ranks, that of the first.
        h: the step size of the user's ``x + h g(x)``; the Courant numbers do not depend on it.

    Keys, for a block and as ``_max``: ``stability/residual_gain``, ``log ||I + hG||`` in nats, the thing itself (above
    0 the block stretches some small difference; from below, up to the residual), with ``stability/residual_gain_bound``
    (at most, except with probability 1e-3 a block); ``stability/residual_stiffness`` (above 1 proves that the block
    expands; at most 1 proves nothing); ``stability/residual_cfl`` (``h / h_max``, only for dissipative blocks: below 1
    proves that the block contracts; above 1 proves nothing). By block ``residual_m`` (below 0 proves that it expands,
    whatever h is) and, where dissipative, ``residual_M``, ``residual_h_max``, ``residual_h_exact``. Global:
    ``stability/residual_dissipative``, the share of blocks with ``m > 0``, and ``stability/residual_lanczos_error``.

    Most blocks of healthy networks stretch some differences, and few are dissipative: a gain above 0 is a fact about
    the network, no alarm. Gains add up over depth at most.

    Cost: some 25 passes over the samples, as if all blocks were one network: 5 gradients on a small transformer.

    Source: Katende, Thm 4.3 and Cor. 4.4.

    A gain that is far above those of the other blocks, or grows: scale that branch down (a smaller h, zero-initialised
    last layer), or normalise it; where its stiffness is above 1, too, the branch overshoots.
    """

    name = "residual_cfl"
    plays = True
    keys = ("stability/residual_gain_max", "stability/residual_stiffness_max", "stability/residual_dissipative")
    optional = ("stability/residual_gain_bound_max", "stability/residual_cfl_max", "stability/residual_lanczos_error")

    def __init__(self, blocks: Selection = None, samples: int = 4, h: float = 1.0):
        super().__init__()
        whole("samples", samples, 1), number("h", h, above=0)
        self.blocks, self.samples, self.h = blocks, samples, h
        self.add_state("stiffness", default=scalar(torch.nan))
        self.add_state("share", default=scalar(torch.nan))
        self.add_state("gain", default=scalar(torch.nan))
        self._found: dict[str, ResidualStability] = {}

    def keeps(self, name: str, module: nn.Module) -> bool:
        return bool(name) and (
            is_residual_block(module) if self.blocks is None else selected(self.blocks, name, module)
        )

    def check(self, snapshot: Snapshot) -> None:
        validate(self.blocks, snapshot.module, "blocks")
        if not any(self.keeps(name, module) for name, module in snapshot.module.named_modules()):
            raise NotApplicable(NO_BLOCK)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        return {"forward": forward_cost(snapshot), "residual blocks": sample_passes(snapshot, self.samples, 25)}

    def path(self, snapshot: Snapshot) -> str:
        # Blocks run at the precision of their parameters, without autocast.
        return label("exact", snapshot, next(iter(snapshot.parameters.values())).dtype)

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        found = footprint(snapshot)
        return {"activations": found.activations, "copies": 2 * found.buffers}

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        calls = snapshot.calls
        found = snapshot.run.ranks.first(lambda: self._measure(snapshot.module, calls), self.name)
        if not found:
            raise NotApplicable(NO_BLOCK)
        self._found = found
        self.gain, self.stiffness = (_largest(name, found) for name in ("gain", "stiffness"))
        self.share = scalar(sum(b.dissipative for b in found.values()) / len(found))
        self.complete = True

    def _measure(self, module: nn.Module, calls: dict[str, Call]) -> dict[str, ResidualStability]:
        """Every block, on the CPU."""
        found: dict[str, ResidualStability] = {}
        # Children come after their parents: walking backwards meets the innermost first.
        for name, child in reversed(list(module.named_modules())):
            if name not in calls or not self.keeps(name, child):
                continue
            if self.blocks is None and any(inner.startswith(name + ".") for inner in found):
                continue
            try:
                block = residual_block(child, calls[name], samples=self.samples)
            except Unmeasurable as error:
                if self.blocks is None:
                    continue
                raise Unmeasurable(f"block {name!r}: {error}") from error
            if self.blocks is None and not block.skip:
                continue
            block.check(name)
            numbers = residual_stability(block.jacobian, h=self.h, steps=STEPS)
            own: dict[str, Any] = {
                key: scalar(value) for key, value in vars(numbers).items() if isinstance(value, Tensor)
            }
            found[name] = replace(numbers, **own)
        return dict(reversed(found.items()))

    def reset(self) -> None:
        super().reset()
        self._found = {}

    def compute(self) -> dict[str, Tensor]:
        """Return the numbers of the last measurement, nothing before it."""
        if not self._found:
            return {}
        values = {
            "stability/residual_gain_max": self.gain,
            "stability/residual_gain_bound_max": _largest("gain_bound", self._found),
            "stability/residual_stiffness_max": self.stiffness,
            "stability/residual_dissipative": self.share,
            "stability/residual_lanczos_error": _largest("residual", self._found),
        }
        dissipative = {name: block for name, block in self._found.items() if block.cfl is not None}
        if dissipative:
            values["stability/residual_cfl_max"] = _largest("cfl", dissipative)
        for field in ("gain", "gain_bound", "stiffness", "cfl", "m", "M", "h_max", "h_exact"):
            for name, block in self._found.items():
                number = getattr(block, field)
                if number is not None:
                    values[f"stability/residual_{field}/{name}"] = scalar(number)
        return values


def _largest(field: str, blocks: dict[str, ResidualStability]) -> Tensor:
    """Over the blocks; NaN where one of them is."""
    return torch.stack([scalar(getattr(block, field)) for block in blocks.values()]).max()
