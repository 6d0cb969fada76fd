"""The first samples that the loader gives, kept as probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lsp_callbacks.callbacks.adapter import Pending, arguments, batch_size
from lsp_callbacks.probes import HOW, Criteria, evaluating, evaluation
from lsp_callbacks.replay import copied
from lsp_callbacks.snapshot import Evaluation, ProbeSet, Unmodelled

ForwardFn = Callable[[nn.Module, Any], Tensor]
Criterion = Callable[[Tensor, Any], Tensor]


class Probes:
    """Collects samples from the batches of training, and evaluates the module at them.

    The data set is left alone: reading from it could move what it remembers. A shuffled loader gives a random sample.

    Args:
        wanted: how many samples.
        forward_fn: ``(module, batch) -> outputs``; None takes them from the criterion that ``training_step`` calls.
        criterion: ``(outputs, batch) -> loss``.
    """

    def __init__(self, wanted: int, forward_fn: ForwardFn | None, criterion: Criterion | None):
        self.wanted, self.forward_fn, self.criterion = wanted, forward_fn, criterion
        self.drop()

    def drop(self, population: int | None = None) -> None:
        """Starts to collect anew; of a smaller population, all."""
        self.population = population
        self.needed = self.wanted if population is None else min(self.wanted, population)
        self._batches: list[Any] = []
        self._sizes: list[int] = []
        self._failure: Exception | None = None
        self.batch_size = 0

    @property
    def full(self) -> bool:
        return sum(self._sizes) >= self.needed or self._failure is not None

    def add(self, batch: Any) -> None:
        """Takes in a batch, on the device, as ``training_step`` will receive it."""
        if self.full:
            return
        size = batch_size(batch)
        if not size:
            self._failure = Unmodelled("the batch holds no tensor whose first axis could be the samples")
            return
        self.batch_size = self.batch_size or size
        try:
            self._batches.append(copied(batch))
        except Exception as error:  # whatever the user's objects raise
            self._failure = Unmodelled(f"the batch cannot be copied ({type(error).__name__}: {error})")
        self._sizes.append(size)
        if self.full and self._failure is None:
            self._join()

    def _join(self) -> None:
        """One batch of exactly the wanted samples, where all leaves are tensors with the samples first."""
        flat = [tree_flatten(batch) for batch in self._batches]
        leaves, spec = [f[0] for f in flat], flat[0][1]
        alike = all(
            isinstance(t, Tensor) and t.ndim and len(t) == size and t.shape[1:] == first.shape[1:]
            for own, size in zip(leaves, self._sizes)
            for t, first in zip(own, leaves[0])
            if isinstance(first, Tensor)
        ) and all(isinstance(t, Tensor) for own in leaves for t in own)
        if alike and all(f[1] == spec for f in flat):
            joined = [torch.cat(column)[: self.needed] for column in zip(*leaves)]
            self._batches, self._sizes = [tree_unflatten(joined, spec)], [self.needed]

    def probe_set(self, pending: Pending) -> ProbeSet:
        """The probes at one step."""
        parts = tuple(
            self._part(pending, batch, size) for batch, size in zip(self._batches, self._sizes) if self._failure is None
        )
        if self._failure is not None:
            parts = (_failing(self._failure),)
        module = pending.module if pending.shadow is None else pending.shadow.module
        return ProbeSet(module, parts, sum(self._sizes), max(self.batch_size, 1), self.population, self.full)

    def _part(self, pending: Pending, batch: Any, size: int) -> Callable[[], Evaluation]:
        def part() -> Evaluation:
            assert pending.shadow is not None
            module = pending.shadow.reset()
            pending.random_state.restore()
            own = copied(batch)
            device = next(module.parameters()).device
            context = pending.trainer.precision_plugin.train_step_context()
            # In full precision, also where training rounds to bfloat16.
            with context, torch.autocast(device.type, enabled=False), evaluating(module):
                if self.forward_fn is not None and self.criterion is not None:
                    criterion = self.criterion
                    return evaluation(self.forward_fn(module, own), lambda f: criterion(f, own), samples=size)
                if not getattr(module, "automatic_optimization", True):  # it would step the optimizer
                    raise Unmodelled(f"automatic_optimization=False: training_step cannot be asked for outputs; {HOW}")
                with Criteria() as criteria:
                    step: Any = module.training_step
                    outputs = step(*arguments(step, own, 0))
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            return criteria.of(loss, samples=size)

        return part


def _failing(error: Exception) -> Callable[[], Evaluation]:
    def part() -> Evaluation:
        raise Unmodelled(str(error))  # the other one is kept: its traceback would keep the step's tensors

    return part


def population(trainer: Any) -> int | None:
    """How many samples an epoch draws from; None where nobody knows."""
    loader = trainer.train_dataloader
    for holder in (getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        try:
            return len(holder)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            continue
    return None
