"""The first training samples, kept as probes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import (
    trained_parameters,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from lsp_callbacks.autograd.side_effects import muted
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.step.batch import batch_size, samples_between
from lsp_callbacks.step.carried_state import Carried, belongs, carried, give_back, kept
from lsp_callbacks.step.criterion import HOW, Criteria, Evaluation, evaluation
from lsp_callbacks.step.criterion_check import SUMS, CriterionCheck, is_sum, why_other
from lsp_callbacks.step.module_modes import as_trained, batch_norms
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.replay import copied
from lsp_callbacks.step.step_loss import loss_of

ForwardFn = Callable[[nn.Module, Any], Tensor]
Criterion = Callable[[Tensor, Any], Tensor]
#: From a function of the batch size, how many, to the first samples of the step's own batch.
SamplesOfStep = Callable[[Callable[[int], int]], ProbeSet]


def check_pair(forward_fn: ForwardFn | None, criterion: Criterion | None) -> None:
    """Raise ValueError where only one of the two is given."""
    if (forward_fn is None) != (criterion is None):
        raise ValueError("forward_fn and criterion belong together: pass both, or neither")


class Probes:
    """Collects samples from the batches of training, and evaluates the module at them.

    The data set itself is not read, as that could change its state. A shuffled loader gives a random sample. Several
    ranks hold the same probes: those that one process would have, if it took their batches joined.

    What the module carries from batch to batch for each sample (a hidden state) is kept with the samples: each is
    evaluated with the state that it was trained with, and no gradient flows into that.

    Args:
        wanted: how many samples.
        forward_fn: ``(module, batch) -> outputs``; None takes them from the criterion that ``training_step`` calls.
        criterion: ``(outputs, batch) -> loss``.

    Attributes:
        full: whether nothing more is collected: there are enough, or they cannot be collected.
    """

    def __init__(self, wanted: int, forward_fn: ForwardFn | None, criterion: Criterion | None):
        check_pair(forward_fn, criterion)
        self.wanted, self.forward_fn, self.criterion = wanted, forward_fn, criterion
        self.ranks = Ranks()
        self.drop()

    def drop(self, population: int | None = None) -> None:
        """Start to collect anew; a population that is smaller than what is wanted is taken as a whole."""
        self.population = population
        self.needed = self.wanted if population is None else min(self.wanted, population)
        self._batches: list[Any] = []
        self._sizes: list[int] = []
        self._carried: list[tuple[Carried, int]] = []  # and of how many samples
        self._failure: Exception | None = None
        self._check = CriterionCheck()
        self.batch_size = self.forward_size = 0
        self.full = not self.needed

    def add(self, batch: Any, module: nn.Module | None = None) -> None:
        """Add a batch, on the device, as ``training_step`` of the module will receive it."""
        if self.full:
            return
        try:
            self.ranks.together(lambda: self._take(batch, {} if module is None else carried(module)))
        except Exception as error:
            self._failure = error.with_traceback(None)  # which would keep the step's tensors
            self.full = True

    def _take(self, batch: Any, state: Carried) -> None:
        parts = self.ranks.gather(lambda: self._cut(batch), "the probes")
        self.batch_size = self.batch_size or sum(size for size, _, _ in parts)
        self.forward_size = self.forward_size or parts[0][0]  # of one rank, which normalises by itself
        for size, held, part in parts:
            if self.ranks.world > 1 and belongs(state, size):
                raise Unsupported("the module carries a state from batch to batch: measure that in one process")
            self._sizes.append(held)
            self._carried.append((kept(state, size), size))
            self._batches.append(part if self.ranks.world == 1 else _to(part, self.ranks.device))
        self.full = sum(self._sizes) >= self.needed
        if self.full:
            self._join()

    def _cut(self, batch: Any) -> tuple[int, int, Any]:
        """Return the size of the rank's batch, how many samples are kept, and a copy of those.

        Several processes exchange no more samples than can be needed.
        """
        size = batch_size(batch)
        if not size:
            raise Unsupported("the batch holds no tensor whose first axis could be the samples")
        try:
            if self.ranks.world == 1:
                return size, size, copied(batch)
        except Exception as error:  # whatever the user's objects raise
            raise Unsupported(f"the batch cannot be copied ({type(error).__name__}: {error})") from error
        leaves = tree_leaves(batch)
        if not all(type(t) is Tensor or isinstance(t, str | int | float | None) for t in leaves):
            raise Unsupported("the batch holds other things than plain tensors, which cannot be sent between processes")
        wanted = self.needed - sum(self._sizes)
        if wanted < size and all(isinstance(t, Tensor) and t.ndim and len(t) == size for t in leaves):
            return size, wanted, _to(tree_map(lambda t: t[:wanted].clone(), batch), "cpu")
        return size, size, _to(batch, "cpu")

    def _join(self) -> None:
        """Join the batches to one of exactly the wanted samples, if all leaves are tensors with the samples first."""
        flat = [tree_flatten(batch) for batch in self._batches]
        leaves, spec = [f[0] for f in flat], flat[0][1]
        if any(belongs(state, size) for state, size in self._carried):
            return  # each batch has a state of its own
        alike = all(
            isinstance(t, Tensor) and t.ndim and len(t) == size and t.shape[1:] == first.shape[1:]
            for of_batch, size in zip(leaves, self._sizes)
            for t, first in zip(of_batch, leaves[0])
            if isinstance(first, Tensor)
        ) and all(isinstance(t, Tensor) for of_batch in leaves for t in of_batch)
        if alike and all(f[1] == spec for f in flat):
            joined = [torch.cat(column)[: self.needed] for column in zip(*leaves)]
            self._batches, self._sizes, self._carried = [tree_unflatten(joined, spec)], [self.needed], self._carried[:1]

    def probe_set(
        self,
        pending: PendingStep,
        loss: Callable[[nn.Module, Any], Any],
        *,
        context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> ProbeSet:
        """Return the probes at one step.

        Args:
            pending: the step, with its micro-batches.
            loss: ``(module, batch) -> loss``, or a mapping with one; its criterion separates outputs from targets if
                the user has not given them.
            context: in which the module is run, of the loop's precision.
        """
        module = pending.module if pending.module_copy is None else pending.module_copy.module
        parts, batches, together = [], [], 1
        if self._failure is not None:
            parts = [_failing(self._failure)]
        else:
            parts = [
                self._part(pending, loss, context, *held) for held in zip(self._batches, self._sizes, self._carried)
            ]
        if self._failure is None and self._sizes and batch_norms(module):
            cut = self._forward_passes()
            batches, together = [self._part(pending, loss, context, *held, together=True) for held in cut], cut[0][1]
        batch = pending.micro_batches * max(self.batch_size, 1)
        return ProbeSet(
            module, tuple(parts), sum(self._sizes), batch, self.population, self.full, tuple(batches), together
        )

    def samples_of_step(
        self,
        pending: PendingStep,
        loss: Callable[[nn.Module, Any], Any],
        rows: Callable[[int], int],
        *,
        context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> ProbeSet:
        """Return the first samples of the step's own batch; nothing has to be collected.

        Where the module carries a state for each sample, they are those of a whole forward pass. Each rank has its own.

        Args:
            pending, loss, context: see `probe_set`.
            rows: from the size B of the batch to how many are wanted.
        """
        if pending.failure is not None or pending.module_copy is None or not pending.parts:
            raise pending.failure or AssertionError
        module = pending.module_copy.reset()
        sizes = [batch_size(part.batch) or 0 for part in pending.parts]
        if not sizes[0]:
            raise Unsupported("the batch holds no tensor whose first axis could be the samples")
        tied, whole = bool(batch_norms(module)), belongs(carried(module), sizes[0])
        parts: list[Callable[[], Evaluation]] = []
        taken, count = 0, rows(sum(sizes))
        for micro, size in zip(pending.parts, sizes):
            held = size if whole else min(size, count - taken)
            if held < 1 or ((whole or tied) and taken):
                break
            batch = micro.batch if held == size else samples_between(micro.batch, 0, held)
            parts.append(self._part(pending, loss, context, batch, held, None, together=tied))
            taken += held
        total = sum(sizes) * max(1, round(pending.micro_batches / len(sizes))) * self.ranks.world
        is_given = self.forward_fn is not None
        of_step = ProbeSet(module, tuple(parts), taken, total, self.population, is_given=is_given)
        return replace(of_step, batches=of_step.parts, together=taken) if tied else of_step

    def _forward_passes(self) -> list[tuple[Any, int, tuple[Carried, int]]]:
        """Return batches of equal size, close to that of a training step's forward pass, with size and state."""
        if len(self._batches) > 1:  # of a kind that could not be joined: as they came
            held = zip(self._batches, self._sizes, self._carried)
            return [batch for batch in held if batch[1] == self._sizes[0]]
        total, size, state = self._sizes[0], max(self.forward_size, 1), self._carried[0]
        count = total // size if 2 * size <= total else max(1, round(total / size))
        size = min(size, total // count)
        leaves, spec = tree_flatten(self._batches[0])
        if not all(isinstance(t, Tensor) and t.ndim and len(t) == total for t in leaves):  # a single batch of any kind
            return [(self._batches[0], total, state)]
        cut = [[t[k * size : (k + 1) * size] for t in leaves] for k in range(count)]
        return [(tree_unflatten(part, spec), size, state) for part in cut]

    def _part(
        self,
        pending: PendingStep,
        loss: Any,
        context: Any,
        batch: Any,
        size: int,
        state: tuple[Carried, int] | None,
        *,
        together: bool = False,
    ) -> Callable[[], Evaluation]:
        def part() -> Evaluation:
            if self.forward_fn is not None and self.criterion is not None:
                forward_fn, criterion = self.forward_fn, self.criterion
                self._check.require(pending, lambda: self._why_other(pending, loss, context, forward_fn, criterion))
                with self._running(pending, context, batch, size, state, together=together) as (module, probes):
                    return evaluation(forward_fn(module, probes), lambda f: criterion(f, probes), samples=size)
            running = self._running(pending, context, batch, size, state, together=together)
            with running as (module, probes), Criteria() as criteria:
                outputs = loss(module, probes)
            return criteria.of(loss_of(outputs), samples=size)

        ranks = pending.run.ranks
        return part if ranks.world == 1 else ranks.private(part)

    @contextlib.contextmanager
    def _running(
        self,
        pending: PendingStep,
        context: Any,
        batch: Any,
        size: int = 0,
        state: tuple[Carried, int] | None = None,
        *,
        together: bool,
    ) -> Iterator[tuple[nn.Module, Any]]:
        """Yield the module of a step as it began, and a copy of a batch, to be run in full precision."""
        if pending.module_copy is None or not pending.parts:
            raise pending.failure or AssertionError
        module = pending.module_copy.reset()
        names = [] if state is None else give_back(module, *state)
        pending.parts[0].random_state.restore()
        probes = copied(batch)
        device = next(module.parameters()).device
        # In full precision, also where training rounds to bfloat16.
        with (
            muted(),
            _naming_states(names) if names else contextlib.nullcontext(),
            context(),
            torch.autocast(device.type, enabled=False),
            as_trained(module, together=together),
        ):
            yield module, probes

    def _why_other(
        self,
        pending: PendingStep,
        loss: Callable[[nn.Module, Any], Any],
        context: Any,
        forward_fn: ForwardFn,
        criterion: Criterion,
    ) -> str:
        """Return why the user's criterion is not the loss of the step's own batch, see `why_other`."""
        if pending.module_copy is None or not pending.parts:
            raise pending.failure or AssertionError
        module, batch = pending.module_copy.module, pending.parts[0].batch
        together = bool(batch_norms(module))
        kept: list[Tensor] = []

        def loss_of_step() -> Tensor:
            with self._running(pending, context, batch, together=together) as (copy, of_step):
                return loss_of(loss(copy, of_step))

        def outputs() -> Tensor:
            with self._running(pending, context, batch, together=together) as (copy, of_step):
                kept.append(forward_fn(copy, of_step))
                return kept[0]

        with torch.enable_grad(), torch.autocast(next(module.parameters()).device.type, enabled=False):
            parameters = [*trained_parameters(module).values()]
            reason = why_other(loss_of_step, outputs, lambda f: criterion(f, copied(batch)), parameters)
            return reason or (SUMS if kept and is_sum(criterion, kept[0].detach(), copied(batch)) else "")


@contextlib.contextmanager
def _naming_states(names: list[str]) -> Iterator[None]:
    """Turn an error of a module that carries states into one that names them."""
    try:
        yield
    except Unmeasurable:
        raise
    except Exception as error:
        raise Unsupported(
            f"{' and '.join(names)}, which the module carries from batch to batch, does not fit the probes "
            f"({type(error).__name__}: {error}): {HOW}"
        ) from error


def _to(batch: Any, device: Any) -> Any:
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)


def _failing(error: Exception) -> Callable[[], Evaluation]:
    def part() -> Evaluation:
        raise Unsupported(str(error))  # the other one is kept: its traceback would keep the step's tensors

    return part


def population(loader: Any, world: int = 1) -> int | None:
    """Return how many samples an epoch draws from, on all ranks together; None if that is not known.

    Args:
        loader: of one rank.
        world: how many ranks there are.
    """
    if getattr(loader, "batch_sampler", ...) is None:  # of ready-made batches, not of samples
        return None
    sampler = getattr(loader, "sampler", None)
    if world > 1:  # a distributed sampler's own length is one rank's share
        sampler = getattr(sampler, "dataset", None)
    for holder in (sampler, getattr(loader, "dataset", None)):
        try:
            return len(holder)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            continue
    return None
