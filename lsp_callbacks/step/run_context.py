"""The facts of a training run that every one of its steps shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.step.known_scale import KnownScales
from lsp_callbacks.step.module_copy import StandingCopy
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.replay_checks import KnownGraph, captures_nothing
from lsp_callbacks.step.series import Trace
from lsp_callbacks.step.shards import Shards

#: From the name of a parameter, its value and its learning rate to its new value.
Prox = Callable[[str, Tensor, float], Tensor]


@dataclass(frozen=True, eq=False)
class RunContext:
    """What does not change from step to step of a run; built once by the training loop, and held by each `Snapshot`.

    Args:
        ranks: the processes that take each step together, each with a batch, a loss and a replay of its own.
        seed: seed of all random choices made while measuring.
        prox: map applied to each parameter after the optimizer's step, ``(name, tensor, lr) -> tensor``, in operations
            that autograd can differentiate almost everywhere; see `lsp_callbacks.functional.trajectory.proximal`.
        schedulers: the schedulers of ``torch.optim.lr_scheduler`` that set the optimizer's learning rate; None if they
            are not known.
        loss_name: name of the user's function that computes the loss of a replay; None if the step's own code does.
        captures_inputs: whether `Snapshot.calls` keeps a module's inputs in full, from its name and the module.
        series: loss, learning rate and energies of the steps so far; `Monitor.observe` sets its own.
        unsupported: why the parameters do not move by the optimizer's step on the step's loss; None if they do.
        updates_elsewhere: whether updates are made where no optimizer is seen, so that a step is a batch, which is
            looked at when its update is over.
        invalidated: why the update of an earlier step turned out to be another one than the optimizer's; None if it did
            not. `Monitor.observe` sets its own.
        unknown_loss: why the loss of a step is not known as a function of module and batch, so that no step is kept for
            a replay; None if it is.
        sharded: why nothing can be measured of shards that the strategy gives to each process; None if it can be.
        shards: how the parameters lie on the processes, where each has a shard of them; None where each has all.
        known_graph: what verified replays of earlier steps have shown; one object for a whole run.
        known_scales: of differences of gradients at earlier steps; likewise.
        standing_copy: of the module, which the measured steps use one after the other; likewise.

    Example:
        >>> import torch
        >>> from lsp_callbacks import RunContext, Snapshot
        >>> net = torch.nn.Linear(1, 1)
        >>> run = RunContext(seed=1)
        >>> Snapshot(step=0, module=net, replay=lambda: net.bias.sum(), run=run).run.seed
        1
    """

    ranks: Ranks = field(default_factory=Ranks)
    seed: int = 0
    prox: Prox | None = None
    schedulers: tuple[Any, ...] | None = None
    loss_name: str | None = None
    captures_inputs: Callable[[str, nn.Module], bool] = captures_nothing
    series: Trace | None = None
    unsupported: str | None = None
    updates_elsewhere: bool = False
    invalidated: str | None = None
    unknown_loss: str | None = None
    sharded: str | None = None
    shards: Shards | None = None
    known_graph: KnownGraph = field(default_factory=KnownGraph, repr=False)
    known_scales: KnownScales = field(default_factory=KnownScales, repr=False)
    standing_copy: StandingCopy = field(default_factory=StandingCopy, repr=False)

    def generator(self, step: int, key: str) -> torch.Generator:
        """Return a private random source for ``(seed, step, key)``, the same on every rank."""
        value = self.seed
        for number in (step, *key.encode()):
            value = (value * 1_000_003 + number + 1) % (2**63)
        return torch.Generator().manual_seed(value)

    def completed(self, series: Trace | None, invalidated: str | None) -> RunContext:
        """Return the facts with what a `Monitor` knows of the run; None leaves them as they are."""
        return replace(
            self, series=self.series if series is None else series, invalidated=invalidated or self.invalidated
        )
