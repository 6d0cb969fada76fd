"""Gain, stiffness and CFL margin of every residual block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import number, whole
from lsp_callbacks.autograd.module_calls import is_residual_block
from lsp_callbacks.errors import NotApplicable, Unmeasurable
from lsp_callbacks.functional.network.residual import ResidualStability, followed_stability, twice
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.cost import beside, calls_cost, sample_passes
from lsp_callbacks.operators.curvature.hessian import label
from lsp_callbacks.operators.memory import forward_memory
from lsp_callbacks.operators.network.residual_block import residual_block
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.quantities.key import PREFIX, Key, relative_residual
from lsp_callbacks.quantities.module_filter import Selection, selected, validate
from lsp_callbacks.step.replay_checks import Call, calls_with_inputs
from lsp_callbacks.step.snapshot import Snapshot

#: Lanczos products from nothing, and from the vectors of the last measurement.
COLD, WARM = 10, 6
#: Gradients of as many samples that a pair of products with all blocks and their transposes takes.
PAIR = 1.3
NO_BLOCK = "no residual block x + g(x) was recognised in this network: name yours with blocks=... if it has any"


class ResidualCFL(Quantity):
    """Gain of each residual block ``x + h g(x)``, and its step size h relative to the largest stable one.

    Blocks are found by two rules together: the class name reads like a block's (``...Block``, ``...Layer``,
    ``Residual...``, ``Bottleneck``, ``BasicBlock``, ``InvertedResidual``; so torchvision's, timm's, transformers' and
    ``nn.TransformerEncoderLayer``), and the autograd graph shows that the input reaches the output through additions
    alone, up to layers that are applied to their sum. The same shape in and out is not enough. Of nested blocks the
    innermost is taken. Or name them with ``blocks``.

    Most blocks of healthy networks stretch some differences, and few are dissipative: a gain above 0 is a fact about
    the network, no alarm. Over depth, gains add up to at most their sum.

    Args:
        blocks: class, glob, predicate, import path, or several; None finds them.
        samples: number of samples, the first of the batch, at whose inputs the Jacobians are taken; with several ranks,
            of the first rank's.
        h: the step size of the user's ``x + h g(x)``; the Courant numbers do not depend on it.

    Raises:
        ValueError: for fewer than 1 sample, or a step size that is not positive.

    Cost: six products with each block and six with its transpose on each sample twice, the two iterations side by side,
    from the vectors of the last measurement; ten at first. 2.6 gradients on a small transformer, and 3.5.

    Source: Katende 2025, Thm 4.3 and Cor. 4.4.
    """

    weight = 0.1
    name = "residual_cfl"
    supports_multiple_optimizers = True
    KEYS: ClassVar = {
        "residual_gain_max": Key(
            "Largest log ||I + h G|| of a residual block; above 0 it stretches some difference.",
            "nats",
            "If one block is far above the others, or grows: scale its branch down (smaller h, zero-initialised last "
            "layer), or normalise it.",
        ),
        "residual_stiffness_max": Key(
            "Largest stiffness of a block; above 1 proves that it expands, at most 1 proves nothing.",
            "",
            "Above 1 together with a large gain, the branch overshoots: scale it down.",
            threshold=1.0,
        ),
        "residual_dissipative": Key("Share of blocks that a small enough step h makes contract (m > 0)."),
        "residual_gain_bound_max": Key(
            "Upper bound of residual_gain_max; it fails with probability 1e-3 a block.", "nats", optional=True
        ),
        "residual_cfl_max": Key(
            "Largest h / h_max of a dissipative block; below 1 proves that it contracts, above 1 proves nothing.",
            optional=True,
        ),
        "residual_lanczos_error": relative_residual(
            "residual_gain_max", "Largest residual of Lanczos, relative to its value.", optional=True
        ),
        "residual_gain/<block>": Key("log ||I + h G|| of a block, lower bound up to the residual.", "nats"),
        "residual_gain_bound/<block>": Key("Upper bound of the gain; it fails with probability 1e-3.", "nats"),
        "residual_stiffness/<block>": Key("Stiffness of a block; above 1 proves that it expands."),
        "residual_cfl/<block>": Key("h / h_max of a dissipative block; below 1 proves that it contracts."),
        "residual_m/<block>": Key("-lambda_max((G + G^T) / 2), the least over samples; below 0 the block expands."),
        "residual_M/<block>": Key("||G||, the largest over the samples, of a dissipative block."),
        "residual_h_max/<block>": Key("Largest step size that is proved to contract, of a dissipative block."),
        "residual_h_exact/<block>": Key("Largest step size that contracts, of a dissipative block."),
    }

    def __init__(self, blocks: Selection = None, samples: int = 4, h: float = 1.0):
        super().__init__()
        whole("samples", samples, 1), number("h", h, above=0)
        self.blocks, self.samples, self.h = blocks, samples, h
        self._blocks: dict[str, ResidualStability] = {}
        self._starts: dict[str, Tensor] = {}

    def captures_inputs(self, name: str, module: nn.Module) -> bool:
        return bool(name) and (
            is_residual_block(module) if self.blocks is None else selected(self.blocks, name, module)
        )

    def check(self, snapshot: Snapshot) -> None:
        validate(self.blocks, snapshot.module, "blocks")
        if not any(self.captures_inputs(name, module) for name, module in snapshot.module.named_modules()):
            raise NotApplicable(NO_BLOCK)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        modules = dict(snapshot.module.named_modules())
        blocks = [name for name in snapshot.calls if self.captures_inputs(name, modules[name])]
        if self._starts:  # those that turned out to be blocks
            blocks = [name for name in blocks if name in self._starts]
        steps = WARM if self._starts else COLD
        passes = sample_passes(snapshot, 2 * self.samples, PAIR * steps + 1)
        vector_work = beside(snapshot, calls=len(blocks) * (40 * steps + 100))
        return {**calls_cost(snapshot), "residual blocks": passes + vector_work}

    def limit_cost(self, snapshot: Snapshot, gradients: float) -> str | None:
        """Take fewer samples, down to one."""
        lowered = self._lower("samples", snapshot, gradients)
        return None if lowered is None else f"{lowered} samples"

    def path(self, snapshot: Snapshot) -> str:
        # Blocks run at the precision of their parameters, without autocast.
        return label("exact", snapshot, next(iter(snapshot.parameters.values())).dtype)

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        return forward_memory(snapshot)

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step."""
        self.complete = False
        calls = calls_with_inputs(snapshot, self.captures_inputs)
        generator = snapshot.generator(self.name)
        starts: dict[str, Tensor] = {}
        blocks = snapshot.run.ranks.first(lambda: self._measure(snapshot.module, calls, generator, starts), self.name)
        if not blocks:
            raise NotApplicable(NO_BLOCK)
        self._blocks, self._starts = blocks, starts
        dissipative = {name: block for name, block in blocks.items() if block.cfl is not None}
        self.finish({
            "residual_gain_max": _largest("gain", blocks),
            "residual_gain_bound_max": _largest("gain_bound", blocks),
            "residual_stiffness_max": _largest("stiffness", blocks),
            "residual_dissipative": sum(block.dissipative for block in blocks.values()) / len(blocks),
            "residual_lanczos_error": _largest("residual", blocks),
            "residual_cfl_max": _largest("cfl", dissipative) if dissipative else torch.nan,
        })  # fmt: skip

    def _measure(
        self, module: nn.Module, calls: dict[str, Call], generator: torch.Generator, starts: dict[str, Tensor]
    ) -> dict[str, ResidualStability]:
        """Return the numbers of every block, on the CPU; fill ``starts`` with the vectors for the next measurement."""
        measured: dict[str, ResidualStability] = {}
        # Children come after their parents: backwards, the innermost come first.
        for name, child in reversed(list(module.named_modules())):
            if name not in calls or not self.captures_inputs(name, child):
                continue
            if self.blocks is None and any(inner.startswith(name + ".") for inner in measured):
                continue
            try:
                block = residual_block(child, calls[name], samples=self.samples, twice=True)
            except Unmeasurable as error:
                if self.blocks is None:
                    continue
                raise Unmeasurable(f"block {name!r}: {error}") from error
            if self.blocks is None and not block.skip:
                continue
            block.check(name)
            numbers, starts[name] = self._followed(block.jacobian, name, generator)
            del block  # with its graph, before the next one is made
            tensors: dict[str, Any] = {
                key: scalar(value) for key, value in vars(numbers).items() if isinstance(value, Tensor)
            }
            measured[name] = replace(numbers, **tensors)
        return dict(reversed(measured.items()))

    def _followed(
        self, jacobian: LinearOperator, name: str, generator: torch.Generator
    ) -> tuple[ResidualStability, Tensor]:
        if len(jacobian.batch) < 2:  # its arguments could not be cut, or repeated
            jacobian = twice(jacobian)
        start = self._starts.get(name)
        steps = COLD if start is None or start.shape[1:] != (jacobian.batch[1], jacobian.shape[1]) else WARM
        return followed_stability(jacobian, start, h=self.h, steps=steps, generator=generator)

    def vectors(self) -> dict[str, Any]:
        return {"starts": self._starts} if self._starts else {}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self._starts = vectors.get("starts", {})

    def reset(self) -> None:
        super().reset()
        self._blocks = {}

    def compute(self) -> dict[str, Tensor]:
        """Return the numbers of the last measurement, with those of the blocks; nothing before one."""
        if not self._blocks:
            return {}
        values = super().compute()
        for field in ("gain", "gain_bound", "stiffness", "cfl", "m", "M", "h_max", "h_exact"):
            for name, block in self._blocks.items():
                number = getattr(block, field)
                if number is not None:
                    values[f"{PREFIX}residual_{field}/{name}"] = scalar(number)
        return values


def _largest(field: str, blocks: dict[str, ResidualStability]) -> Tensor:
    """Return the largest over the blocks; NaN where one of them is."""
    return torch.stack([scalar(getattr(block, field)) for block in blocks.values()]).max()
