"""A step that will be measured, from before its forward passes to its `Snapshot`; knows of no particular loop."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import is_compiled, trained_parameters
from lsp_callbacks.autograd.graph import Graph, joined, read
from lsp_callbacks.autograd.spread_tensors import local_gradients
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.step.batch import MicroBatch, batch_size, samples_between
from lsp_callbacks.step.fingerprint import fingerprint, identical
from lsp_callbacks.step.graph_reader import GraphReader
from lsp_callbacks.step.module_copy import ModuleCopy
from lsp_callbacks.step.module_in_place import ModuleInPlace
from lsp_callbacks.step.module_modes import evaluating
from lsp_callbacks.step.moving_parameters import moved_together
from lsp_callbacks.step.replay import DividedReplay, copied
from lsp_callbacks.step.replay_checks import OwnCalls, replayed_gradient, verify
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.sharded_replay import ShardedReplay, raising
from lsp_callbacks.step.shards import local_parameters
from lsp_callbacks.step.snapshot import BeforeStep, OtherLoss, Snapshot
from lsp_callbacks.step.step_loss import summed
from lsp_callbacks.step.verified_step import named_gradient
from lsp_callbacks.step.whole_copy import WholeCopy, require_room, require_same_precision

LossFn = Callable[[nn.Module, Any], Tensor]
#: Relative difference of a loss with gathered weights: kernels may be others where these lie elsewhere in memory.
WHOLE = 1e-5
NOT_KEPT = Unmeasurable("the step was not kept for a replay, as nothing that was due needs one")


class PendingStep:
    """What must be kept from before the forward passes of a step that will be measured.

    It is made before the first forward pass of an optimizer step. Each micro-batch is added before its own forward
    pass, and the `Snapshot` is taken after the last backward pass, before the update.

    Args:
        module: whose parameters are trained.
        shared: objects of the module that its copy shares, see `ModuleCopy`.
        prepare: applied once to the copy, see `ModuleCopy`.
        tolerance: relative difference between a replayed loss and the step's own; compiled modules have 1e-4 at least.
        sub_batch: how many samples to use; None takes all.
        run: what all steps of the run share; None is a run of this process alone.
        takes_buffers: whether all ranks' forward passes begin with the buffers of the first, as under DDP.
        readers: what quantities read from the graphs of the step, by their names.
        can_replay: whether the step is kept for replays; otherwise it is only read.
        micro_batches: how many make a step, as far as that is known before it.
        keeps_weights: whether the parameters are copied, as the step's backward pass moves them.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        shared: Iterable[Any] = (),
        prepare: Callable[[nn.Module], None] = lambda copy: None,
        tolerance: float = 0.0,
        sub_batch: int | None = None,
        run: RunContext | None = None,
        takes_buffers: bool = False,
        readers: Mapping[str, GraphReader] | None = None,
        can_replay: bool = True,
        micro_batches: int = 1,
        keeps_weights: bool = False,
    ):
        self.module, self.tolerance, self.sub_batch, self.micro_batches = module, tolerance, sub_batch, micro_batches
        self.run = run or RunContext()
        self.parts: list[MicroBatch] = []
        self._graphs: list[Graph] = []
        self.module_copy: ModuleCopy | ModuleInPlace | WholeCopy | None = None
        self._parameters: list[Any] = []
        self._before: dict[str, Tensor] | None = None
        self.failure: Exception | None = None
        self.readers, self.can_replay = readers or {}, can_replay
        self._size: int | None = None
        self.own_calls = None if self.run.unknown_loss is None else OwnCalls(module)
        if not can_replay:
            return
        try:
            if self.run.shards is not None:
                self.module_copy = ModuleInPlace(module, shared=shared, prepare=prepare)
            else:
                standing = self.run.standing_copy
                self.module_copy = ModuleCopy(module, shared=shared, prepare=prepare, standing=standing)
            self._parameters = [*self.module_copy.parameters]
            self._fingerprint = fingerprint(self._parameters)
            if keeps_weights:
                self._before = {name: p.detach().clone() for name, p in trained_parameters(module).items()}
        except Exception as error:  # whatever the user's attributes raise when they are copied
            self._fail(error)
        if takes_buffers:
            self._take_buffers()

    def _take_buffers(self) -> None:
        """Give the buffers of the first rank to all."""

        def buffers() -> list[Tensor | None]:
            if not isinstance(self.module_copy, ModuleCopy):
                raise self.failure or AssertionError
            return self.module_copy.buffers()

        ranks = self.run.ranks
        try:
            of_first = ranks.together(lambda: ranks.first(buffers, "the buffers"))
            if isinstance(self.module_copy, ModuleCopy):
                self.module_copy.load_buffers(of_first)
        except Exception as error:  # of this rank alone, too: it has to join the next exchange
            self.failure = error.with_traceback(None)

    def _fail(self, error: Exception) -> None:
        self.failure = Unmeasurable(
            f"batch or module cannot be copied for a replay ({type(error).__name__}: {error}): keep what cannot be "
            "copied outside the module"
        )

    def add(self, batch: Any, loss: Callable[[nn.Module, Any], Tensor | None]) -> None:
        """Add a micro-batch whose forward pass comes next.

        Args:
            batch: on the device, as the step will receive it.
            loss: what the step will differentiate, as a function of module and batch.
        """
        self._size = batch_size(batch) if self.readers else None
        if not self.can_replay:
            return
        try:
            self.parts.append(MicroBatch(copied(batch), loss))
        except Exception as error:  # whatever the user's objects raise
            self._fail(error)

    def saw_loss(self, loss: Tensor, *, scale: float = 1.0) -> None:
        """Read the graph of a micro-batch's loss, which is differentiated next.

        Args:
            loss: divided by the number of micro-batches already.
            scale: the factor that it holds by mixed precision.
        """
        for reader in self.readers.values():
            factor = scale / self.micro_batches
            reader.saw_loss(loss, samples=self._size, factor=factor, micro_batches=self.micro_batches)
        if not self.can_replay:
            return
        with contextlib.suppress(Exception):  # in the middle of the user's step: then the graph is not known
            self._graphs.append(read(loss))

    @property
    def samples(self) -> int | None:
        """How many samples of the rank's micro-batches are used; None where all are."""
        if self.sub_batch is None:
            return None
        return min(self.sub_batch, sum(batch_size(part.batch) or self.sub_batch for part in self.parts))

    def snapshot(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        *,
        gradient_scale: Any = None,
        own_loss: Tensor | None = None,
        **settings: Any,
    ) -> Snapshot:
        """Return the step, after its backward passes and before its update.

        Args:
            step: number of the optimizer step.
            optimizer: that makes the update.
            gradient_scale: the factor of mixed precision that the gradients still hold; None if they hold none.
            own_loss: that the step has differentiated, where its backward pass has moved the parameters.
            settings: further fields of the `Snapshot`.
        """
        failure = self.failure or (self._moved(optimizer) if self.can_replay else NOT_KEPT)
        held = self._held()
        module = self.module if failure or self.module_copy is None else self.module_copy.module
        replay = self._replay(self.parts, failure, held)
        read = next((reader.parameters for reader in self.readers.values() if reader.parameters), None)
        trained = {**read} if read else trained_parameters(self.module)
        # Compiled code rounds in other places than the step. Copies are not compiled.
        tolerance = max(self.tolerance, 1e-4 if self.can_replay and is_compiled(self.module) else 0.0)
        # Properties of the graph that the step has differentiated, if a replay to the last bit can be compared with it.
        is_seen = tolerance == 0 and self.run.ranks.world == 1 and 0 < len(self._graphs) == len(self.parts)
        own_graph = None if not is_seen else self._graphs[0] if len(self._graphs) == 1 else joined(self._graphs)
        gradient = None
        if self._before is None:  # the hooks that have made the update have cleared it
            gradient = dict(zip(trained, local_gradients(trained.values())))
        if gradient is not None and gradient_scale is not None:
            gradient = {name: g if g is None else g / gradient_scale for name, g in gradient.items()}
        snapshot = Snapshot(
            step=step,
            module=module,
            replay=replay,
            optimizer=optimizer,
            run=self.run,
            sample=None if failure else self._sample,
            gradient=gradient,
            own_graph=own_graph,
            tolerance=tolerance,
            readers=self.readers,
            can_replay=self.can_replay,
            before=None if self._before is None else BeforeStep(self._before, own_loss),
            held=held,
            own_calls=None if self.own_calls is None else self.own_calls.taken(),
            **settings,
        )
        if held is None and snapshot.player is None:  # a copy shares them
            vars(snapshot)["parameters"] = trained
        if self.sub_batch is None:
            return snapshot
        count = self.sub_batch
        try:
            return self.run.ranks.together(lambda: self._sub_batch(snapshot, count))
        except Exception as error:
            return replace(snapshot, replay=_raising(error))

    def _held(self) -> dict[str, nn.Parameter] | None:
        """Return the shards of this process, by name; None where it holds all of each parameter."""
        return None if self.run.shards is None else local_parameters(self.module)

    def _replay(
        self, parts: Sequence[MicroBatch], failure: Exception | None, held: Mapping[str, nn.Parameter] | None
    ) -> Callable[[], Tensor]:
        """Return the replay of some micro-batches, together with the other ranks where the module has shards."""
        ranks = self.run.ranks
        if failure is not None or self.module_copy is None:
            error = failure or AssertionError()
            return _raising(error) if held is None else raising(ranks, error)
        if held is not None:
            assert isinstance(self.module_copy, ModuleInPlace)
            return ShardedReplay(self.module_copy, parts, ranks, list(held.values()))
        replay = DividedReplay(self.module_copy, parts)
        return replay if ranks.world == 1 else ranks.private(replay)

    def whole(self, optimizer: torch.optim.Optimizer, room: float) -> tuple[PendingStep, torch.optim.Optimizer]:
        """Return the step of a module with shards on a plain copy with the whole parameters, and its optimizer.

        All ranks make it together, after the backward pass.

        Args:
            optimizer: of the run.
            room: bytes that the copy may take.

        Raises:
            Unmeasurable: where the step was not kept.
            Unsupported: above ``room``.
        """
        if self.failure is not None or not isinstance(self.module_copy, ModuleInPlace):
            raise self.failure or NOT_KEPT
        place = self.module_copy
        require_same_precision(self.module)
        require_room(self.module, optimizer, room)
        with self.run.ranks.checked():
            gathered = place.whole()
            twin = gathered.optimizer(optimizer)
        step = copy.copy(self)
        step.look_at(gathered)
        return step, twin

    def look_at(self, gathered: WholeCopy) -> None:
        """Look at a plain copy with the whole parameters from now on, after the step's passes."""
        self.run, self.module, self.module_copy = replace(self.run, shards=None), gathered.module, gathered
        self._graphs, self._parameters, self._fingerprint, self.readers = [], [], [], {}
        self.tolerance = max(self.tolerance, WHOLE)

    def _sample(self, count: int) -> tuple[Tensor, int]:
        """Return the loss of the first samples of the first micro-batch, in eval mode, and how many there are."""
        if self.module_copy is None:
            raise self.failure or AssertionError
        part = _shortened(self.parts[0], count)
        size = batch_size(part.batch)
        if size is None:
            raise Unmeasurable("the batch holds no tensor whose first axis could be the samples")

        def loss(module: nn.Module, batch: Any) -> Tensor | None:
            with evaluating(module):
                return part.loss(module, batch)

        return self._replay([replace(part, loss=loss)], None, self._held())(), size

    def other_loss(self, source: OtherLoss, on_device: Callable[[Any], Any]) -> Callable[[], Tensor]:
        """Return the replay of another loss of the module, with the buffers and the first random state of the step.

        Args:
            source: ``(module) -> loss``, or batches, of which the mean of the step's own loss is taken.
            on_device: what the loop does with a batch before the step receives it.
        """
        if self.failure is not None or self.module_copy is None or not self.parts:
            return _raising(self.failure or NOT_KEPT)
        first = self.parts[0]

        def mean(module: nn.Module, batches: Any) -> Tensor | None:
            total = summed(first.loss(module, on_device(batch)) for batch in batches)
            return None if total is None else total / len(batches)

        if callable(source):
            part = replace(first, batch=None, loss=lambda module, batch: source(module))
        else:
            part = replace(first, batch=source, loss=mean)
        return self._replay([part], None, self._held())

    def _moved(self, optimizer: torch.optim.Optimizer) -> Exception | None:
        """Return an error if the step itself has moved the parameters: a replay, which shares them, would do so too.

        Those of a momentum encoder, which no gradient moves, are copied at the next measured steps.
        """
        now = fingerprint(self._parameters)
        if self.failure is None and not identical(self._fingerprint, now):
            pairs = zip(self._parameters, self._fingerprint, now)
            moved = [p for p, old, new in pairs if not identical([old], [new])]
            trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
            if self.run.shards is None and not any(p.requires_grad or id(p) in trained for p in moved):
                moved = moved_together(self.module, moved)
                self.run.standing_copy.move(moved)
                return Unmeasurable(
                    f"the step changes {len(moved)} frozen parameters before its update (a momentum encoder): they are "
                    "copied from the next measurement on"
                )
            return Unmeasurable(
                "the step changes parameters before its update (a moving average or a clamp in training_step), and a "
                "replay would do so again: do it after the update, or pass loss_fn=..."
            )
        return None

    def settle(self, players: Iterable[nn.Parameter]) -> bool:
        """Take the parameters as they are now for those of the step, and return whether any of the given has moved.

        For a player of a game, whose step begins where the step before has ended.
        """
        if self.failure is not None or not self.can_replay:
            return False
        before, self._fingerprint = self._fingerprint, fingerprint(self._parameters)
        watched = {id(p) for p in players}
        sums = [pair for p, *pair in zip(self._parameters, before, self._fingerprint) if id(p) in watched]
        return not identical([old for old, _ in sums], [new for _, new in sums])

    def _sub_batch(self, full: Snapshot, count: int) -> Snapshot:
        """Return the same step on the first samples of its batches; the whole step's replay is checked first."""
        verify(full)
        count = math.ceil(count / len(self.parts))
        whole = any((batch_size(part.batch) or 0) <= count for part in self.parts)
        if not self.run.ranks.any_true(not whole, "a sub-batch") or self.module_copy is None:
            return full
        part = replace(full, replay=self._replay([_shortened(part, count) for part in self.parts], None, full.held))
        loss, mean = replayed_gradient(part)
        sub = replace(part, loss=loss, gradient=named_gradient(mean, full))
        if full.clipping is None or full.clipping.kind == "value" or full.flat_gradient is None:
            return sub
        # The step is shortened by the norm of its own gradient, not by that of the sub-batch.
        ratio = float(torch.linalg.vector_norm(mean) / torch.linalg.vector_norm(full.flat_gradient))
        return replace(sub, clipping=replace(full.clipping, limit=full.clipping.limit * ratio)) if ratio > 0 else sub


def never() -> Tensor:
    """Raise an error: the replay of a step that has not been taken."""
    raise AssertionError("no step is replayed before training")


def _shortened(part: MicroBatch, count: int) -> MicroBatch:
    return replace(part, batch=samples_between(part.batch, 0, count))


def _raising(error: Exception | None) -> Callable[[], Tensor]:
    def replay() -> Tensor:
        raise error or AssertionError

    return replay
