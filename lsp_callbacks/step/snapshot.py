"""One frozen training step: all that a quantity may look at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import is_compiled, trained_parameters
from lsp_callbacks.autograd.graph import Graph
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.graph_reader import GraphReader
from lsp_callbacks.step.players import Player
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.replay_checks import Call, Verified, verified_calls, verified_graph
from lsp_callbacks.step.room import Room
from lsp_callbacks.step.run_context import RunContext

P = ParamSpec("P")
T = TypeVar("T")
#: A loss of a module that is not the step's own, or batches of which it is.
OtherLoss = Callable[[nn.Module], Tensor] | Sequence[Any]


class BeforeStep(NamedTuple):
    """What a step began with whose backward pass has moved the parameters.

    Attributes:
        weights: copies of the trainable parameters, by name.
        loss: that the step has differentiated, at these weights; None where it is not known.
    """

    weights: dict[str, Tensor]
    loss: Tensor | None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A training step between its backward pass and its update.

    Args:
        step: number of the optimizer step, counted from 0.
        module: the module that ``replay`` runs. Its parameters are the real ones, shared; its buffers and
            Python attributes should be a copy (see `lsp_callbacks.step.module_copy.ModuleCopy`), as replays move them.
        replay: computes the loss of the step again, at the current values of the parameters: the same batch,
            the same random masks, the same buffers, however often it is called.
        optimizer: holds the groups and the state *before* the update.
        run: what all steps of the run share: ranks, seed, prox, schedulers.
        sample: from n to the loss of the first n samples of the step's batch, in eval mode, and how many there are;
            None where there is only the whole batch.
        loss: the step's own loss, against which replays are checked; None takes the first replay's.
        gradient: the step's own gradients by parameter name, unclipped, the mean over the ranks; None where the step
            had none.
        clipping: how the gradient is clipped before the optimizer sees it; None leaves it as it is.
        mismatch: why this step's gradient was found not to be that of its loss; None if it was not.
        tolerance: relative difference allowed between ``loss`` and its replay; 0 is to the last bit, for the same path.
        probes: training samples for the quantities that look at outputs; None where there are none.
        samples_of_step: from a function of the batch size, how many, to the first samples of the step's own batch, as
            probes; None where outputs and targets are to be found in ``replay``.
        scale: the factor that a gradient scaler puts on the loss before its backward pass; ``gradient`` is without it.
        previous: number of the last step before this one that moved anything: batches between them may have been
            skipped. None is ``step - 1``.
        player: whose turn it is where several optimizers take turns on losses of their own; None is one optimizer.
        own_graph: properties of the autograd graph that the step itself has differentiated; None if they were not seen.
        own_calls: the first call of each module in the step itself, where there is no replay that shows them.
        readers: what quantities have read from that graph, by their names.
        can_replay: whether ``replay`` does what it says; otherwise nothing was kept for it.
        room: returns how many bytes a measurement may take beside training.
        other_loss: from a loss of the module, or from batches of which the step's own loss is taken, to its replay with
            the buffers and the first random state of the step; None where there is none.
        held: the parameters of which ``replay`` computes the loss, by name, where they are not those of the module: its
            shards on this process, as plain tensors. ``gradient`` is of them.
        before: what the step began with, where its update is over already. Then there is neither ``gradient`` nor
            ``loss``, and the replay is that of the step only where the parameters are put back.
        whole_step: of a module with shards, returns the same step on a plain copy with the whole parameters, which all
            ranks make together; None where there are no shards.

    Attributes:
        shared: results of functions that are `computed_once`; ``dataclasses.replace`` begins without them.
        verified: what replays of the step have shown, see `lsp_callbacks.step.replay_checks`; likewise.
    """

    step: int
    module: nn.Module
    replay: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    run: RunContext = field(default_factory=RunContext)
    sample: Callable[[int], tuple[Tensor, int]] | None = None
    loss: Tensor | None = None
    gradient: dict[str, Tensor | None] | None = None
    clipping: Clipping | None = None
    mismatch: str | None = None
    tolerance: float = 0.0
    probes: ProbeSet | None = None
    samples_of_step: Callable[[Callable[[int], int]], ProbeSet] | None = None
    scale: float = 1.0
    previous: int | None = None
    player: Player | None = None
    own_graph: Graph | None = None
    own_calls: dict[str, Call] | None = None
    readers: Mapping[str, GraphReader] = field(default_factory=dict)
    can_replay: bool = True
    room: Callable[[], Room] = field(default=Room, repr=False)
    other_loss: Callable[[OtherLoss], Callable[[], Tensor]] | None = field(default=None, repr=False)
    held: Mapping[str, nn.Parameter] | None = field(default=None, repr=False)
    before: BeforeStep | None = field(default=None, repr=False)
    whole_step: Callable[[], Snapshot] | None = field(default=None, repr=False)
    shared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    verified: Verified = field(default_factory=Verified, init=False, repr=False)

    @cached_property
    def unsupported(self) -> str | None:
        """Why the update is not the optimizer's step on this loss, by the run or by this step; None if it is."""
        return self.run.unsupported or self.mismatch

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, each once, by name; in a game the player's own, or those of all, see `Player`."""
        if self.held is not None:
            return {**self.held}
        trained = trained_parameters(self.module)
        if self.player is None:
            return trained
        return {name: p for name, p in trained.items() if self.player.holds(p)}

    @property
    def size(self) -> int:
        """How many numbers the trainable parameters have, on all processes together."""
        return sum(p.numel() for p in self.unsplit.parameters.values())

    @property
    def unsplit(self) -> Snapshot:
        """The same step with the parameters that the optimizer holds, where they are spread; otherwise itself."""
        return self if self.held is None else _unsplit(self)

    def require_optimizer(self) -> torch.optim.Optimizer:
        """Return the step's optimizer.

        Raises:
            Unmeasurable: if there is none, or the step is not that of the optimizer on the step's loss.
        """
        if self.optimizer is None:
            raise Unmeasurable("the snapshot has no optimizer: pass optimizer=... to the Snapshot")
        if why := self.unsupported or self.run.invalidated:
            raise Unmeasurable(why)
        return self.optimizer

    @cached_property
    def groups(self) -> dict[str, dict[str, Any] | None]:
        """The options of each trainable parameter in this step; None if the optimizer does not hold it.

        Raises:
            Unmeasurable: see `require_optimizer`.
        """
        groups = {id(p): group for group in self.require_optimizer().param_groups for p in group["params"]}
        return {name: groups.get(id(p)) for name, p in self.unsplit.parameters.items()}

    @cached_property
    def flat_gradient(self) -> Tensor | None:
        """The step's own gradient as one flat vector; zeros where a parameter had none."""
        if self.gradient is None:
            return None
        parts = [self.gradient[name] for name in self.parameters]
        return flatten(parts, list(self.parameters.values())).detach()

    @cached_property
    def graph(self) -> Graph:
        """What the autograd graph of the loss shows, from a replay that was found to be the step.

        Raises:
            Unmeasurable: if the replayed loss is not the step's.
        """
        return verified_graph(self)

    @cached_property
    def calls(self) -> dict[str, Call]:
        """The first call of every module, from a replay that was found to be the step, or from the step itself.

        Raises:
            Unmeasurable: if the replayed loss is not the step's.

        Cost: one forward pass, about 1/3 gradient.
        """
        return verified_calls(self) if self.own_calls is None else self.own_calls

    @property
    def kinked(self) -> bool:
        """Whether the loss is only piecewise smooth in the parameters: ReLU, max-pooling and their like."""
        return self.graph.kinked

    @cached_property
    def compiled(self) -> bool:
        """Whether ``torch.compile`` was used on any module."""
        return is_compiled(self.module)

    @property
    def joint(self) -> Snapshot:
        """The same step, looking at the parameters of all players; without a game itself."""
        return self if self.player is None or self.player.joint else _joint(self, self.player)

    @property
    def whole(self) -> Snapshot:
        """The same step with the whole parameters; itself where there are no shards. All ranks ask together.

        Raises:
            Unsupported: where there is no room for them, on all ranks alike.
        """
        return self if self.whole_step is None else _whole(self)

    def follows(self, step: int) -> bool:
        """Return whether this step begins where another one has ended."""
        return step == (self.step - 1 if self.previous is None else self.previous)

    def generator(self, key: str) -> torch.Generator:
        """Return a private random source for ``(seed, step, key)``, the same on every rank."""
        return self.run.generator(self.step, key)

    def forget(self) -> None:
        """Let go of all shared results, such as autograd graphs that further products would use."""
        self.shared.clear()


def computed_once(compute: Callable[Concatenate[Snapshot, P], T]) -> Callable[Concatenate[Snapshot, P], T]:
    """Return a function of a step whose result is shared: computed at the first call, then the same object.

    Args:
        compute: a function of a snapshot and of arguments that can be hashed, by which results are kept apart.
    """

    @functools.wraps(compute)
    def once(snapshot: Snapshot, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (compute, args, *kwargs.items())
        if key not in snapshot.shared:
            snapshot.shared[key] = compute(snapshot, *args, **kwargs)
        return snapshot.shared[key]

    return once


@computed_once
def _joint(snapshot: Snapshot, player: Player) -> Snapshot:
    return replace(snapshot, player=replace(player, joint=True))


@computed_once
def _unsplit(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, held=None)


@computed_once
def _whole(snapshot: Snapshot) -> Snapshot:
    assert snapshot.whole_step is not None
    step = snapshot.run.ranks.apart(snapshot.whole_step)
    return replace(step, run=replace(snapshot.run, shards=None))  # with what a monitor has completed
