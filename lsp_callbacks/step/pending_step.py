"""From what a training loop does to a `Snapshot`; knows of no particular loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import is_compiled
from lsp_callbacks.step.replay import MicroBatch, ModuleCopy, copied, replayer, summed
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.snapshot import Snapshot, Unmeasurable, evaluating, flatten, split

LossFn = Callable[[nn.Module, Any], Tensor]

#: Relative difference of a player's gradient from its replay's: rounding, but not what another player's update does.
_PLAYED = {torch.float32: 1e-4, torch.float64: 1e-8}


class PendingStep:
    """A step that will be measured: what must be kept from before its forward passes.

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
    ):
        self.module, self.tolerance, self.sub_batch = module, tolerance, sub_batch
        self.run = run or RunContext()
        self.parts: list[MicroBatch] = []
        self.module_copy: ModuleCopy | None = None
        self._several = False  # backward passes of a batch: only their gradients tell which losses count
        self.failure: Exception | None = None
        try:
            self._sums = _sums(module)
            self.module_copy = ModuleCopy(module, shared=shared, prepare=prepare)
        except Exception as error:  # whatever the user's attributes raise when they are copied
            self._fail(error)
        if takes_buffers:
            self._take_buffers()

    def _take_buffers(self) -> None:
        """The buffers of the first rank, for all."""

        def buffers() -> list[Tensor | None]:
            if self.module_copy is None:
                raise self.failure or AssertionError
            return self.module_copy.buffers()

        try:
            found = self.run.ranks.together(lambda: self.run.ranks.first(buffers, "the buffers"))
            if self.module_copy is not None:
                self.module_copy.load_buffers(found)
        except Exception as error:  # of this rank alone, too: it has to come to the next meeting
            self.failure = error.with_traceback(None)

    def _fail(self, error: Exception) -> None:
        self.failure = Unmeasurable(
            f"batch or module cannot be copied for a replay ({type(error).__name__}: {error}): keep what cannot be "
            "copied outside the module"
        )

    def add(self, batch: Any, loss: Callable[[nn.Module, Any], Tensor | None]) -> None:
        """A micro-batch whose forward pass comes next.

        Args:
            batch: on the device, as the step will receive it.
            loss: what the step will differentiate, as a function of module and batch.
        """
        try:
            self.parts.append(MicroBatch(copied(batch), loss))
        except Exception as error:  # whatever the user's objects raise
            self._fail(error)

    def saw_loss(self, loss: Tensor) -> None:
        """The loss of the last micro-batch, as it is differentiated; where it is seen at all, it is for all of them."""
        if self.parts:
            self._several |= self.parts[-1].own is not None
            self.parts[-1].own = loss.detach().clone().reshape(() if loss.numel() == 1 else loss.shape)

    def snapshot(self, step: int, optimizer: torch.optim.Optimizer, **settings: Any) -> Snapshot:
        """The step, after its backward passes and before its update."""
        failure = self.failure or self._moved()
        if failure or self.module_copy is None:
            module, replay = self.module, _raising(failure)
        else:
            module, replay = self.module_copy.module, self.run.ranks.private(replayer(self.module_copy, self.parts))
        snapshot = Snapshot(
            step=step,
            module=module,
            replay=replay,
            optimizer=optimizer,
            sample=None if failure else self._sample,
            loss=None if self._several else summed(part.own for part in self.parts),
            gradient={name: p.grad for name, p in self.module.named_parameters() if p.requires_grad},
            # Compiled code rounds in other places than the step.
            tolerance=max(self.tolerance, 1e-4 if _compiled(self.module) else 0.0),
            run=self.run,
            **settings,
        )
        if self.sub_batch is None:
            return snapshot
        count = self.sub_batch
        try:
            return self.run.ranks.together(lambda: self._sub_batch(snapshot, count))
        except Exception as error:
            return replace(snapshot, replay=_raising(error))

    def _sample(self, count: int) -> tuple[Tensor, int]:
        """The loss of the first samples of the first micro-batch, in eval mode, and how many there are."""
        if self.module_copy is None:
            raise self.failure or AssertionError
        part = _cut(self.parts[0], count)
        size = batch_size(part.batch)
        if size is None:
            raise Unmeasurable("the batch holds no tensor whose first axis could be the samples")

        def loss(module: nn.Module, batch: Any) -> Tensor | None:
            with evaluating(module):
                return part.loss(module, batch)

        return self.run.ranks.private(replayer(self.module_copy, [replace(part, loss=loss)]))(), size

    def _moved(self) -> Exception | None:
        """The step itself must leave the parameters alone: a replay, which shares them, would move them again."""
        if self.failure is None and not all(map(identical, self._sums, _sums(self.module))):
            return Unmeasurable(
                "the step changes parameters before its update (a moving average or a clamp in training_step), and a "
                "replay would do so again: do it after the update, or pass loss_fn=..."
            )
        return None

    def settle(self, players: Iterable[nn.Parameter]) -> bool:
        """Whether somebody has moved these parameters since; from now on the step is where they are, moved or not.

        For a player of a game, whose step begins where the step before has ended.
        """
        if self.failure is not None:
            return False
        before, self._sums, own = self._sums, _sums(self.module), {id(p) for p in players}
        found = zip(self.module.parameters(), before, self._sums)
        return any(id(p) in own and not identical(old, new) for p, old, new in found)

    def _sub_batch(self, full: Snapshot, count: int) -> Snapshot:
        """The same step on the first samples of its batches; the whole step's replay is checked first."""
        _ = full.faithful
        count = math.ceil(count / len(self.parts))
        whole = any((batch_size(part.batch) or 0) <= count for part in self.parts)
        if not self.run.ranks.any(lambda: not whole, "a sub-batch") or self.module_copy is None:
            return full
        part = replace(full, replay=replayer(self.module_copy, [_cut(part, count) for part in self.parts]), memo={})
        loss, mean = part.replayed_gradient()
        sub = replace(part, loss=loss, gradient=_named(mean, full), memo={})
        if full.clipping is None or full.clipping.kind == "value" or full.flat_gradient is None:
            return sub
        # The step is shortened by the norm of its own gradient, not by that of the sub-batch.
        ratio = float(torch.linalg.vector_norm(mean) / torch.linalg.vector_norm(full.flat_gradient))
        return replace(sub, clipping=replace(full.clipping, limit=full.clipping.limit * ratio)) if ratio > 0 else sub


def verified(snapshot: Snapshot) -> Snapshot:
    """A step whose loss nobody saw, checked against its gradient instead; then the replay's loss is its loss.

    With a ``clipping`` the gradient may be clipped already: then the replay's takes its place. Where it is another one
    (the loop clips in another way, or differentiates another loss), what needs the update is not modelled. Failures to
    replay are left to the quantities. Cost: one gradient.
    """
    try:
        loss, gradient = snapshot.run.ranks.together(snapshot.replayed_gradient)
    except Exception:
        return snapshot
    seen = replace(snapshot, loss=loss, memo={})
    try:
        seen.check_gradient(gradient)
    except Unmeasurable as error:
        if snapshot.clipping is None or snapshot.gradient is None or snapshot.unsupported:
            return replace(seen, mismatch=snapshot.mismatch or str(error))
        clipping = snapshot.clipping
        groups = [] if snapshot.optimizer is None else snapshot.optimizer.param_groups
        held = {id(p) for group in groups for p in group["params"]}
        if clipping.kind == "norm" and not all(id(p) in held for p in snapshot.parameters.values()):
            reason = "gradients are clipped together with those of parameters that the optimizer does not hold"
            return replace(seen, mismatch=reason)
        try:
            seen.check_gradient(clipping(gradient))
        except Unmeasurable:
            return replace(seen, mismatch=str(error))
        return replace(seen, gradient=_named(gradient, snapshot), memo={})
    return seen


def verified_player_step(snapshot: Snapshot, *others: Callable[[], Tensor]) -> Snapshot:
    """A player's step, by the first of several replays whose gradient is the step's own; its loss is then the step's.

    The gradients of the other players' parameters, which the step does not use, become those of the replay. Where no
    replay gives the step's gradient, what needs the update is not modelled. Cost: one gradient for each replay.

    Args:
        snapshot: with its ``player``, without a loss.
        others: further replays.
    """
    assert snapshot.player is not None
    first = None
    for replay in (snapshot.replay, *others):
        seen = replace(snapshot, replay=replay, memo={})
        try:
            loss, gradient = seen.run.ranks.together(seen.joint.replayed_gradient)
        except Exception:
            return snapshot
        replayed = dict(zip(seen.joint.parameters, split(gradient, list(seen.joint.parameters.values()))))
        given = seen.gradient if seen.gradient is not None else replayed
        merged = replayed | {name: given[name] for name in seen.parameters}
        seen = replace(seen, loss=loss, gradient=merged, memo={})
        first = first or seen
        own = flatten([replayed[name] for name in seen.parameters], list(seen.parameters.values()))
        with contextlib.suppress(Unmeasurable):
            seen.check_gradient(own, tolerance=_PLAYED.get(own.dtype, 0.1) if seen.graph.full else 0.1)
            return seen
    assert first is not None
    reason = (
        f"the gradient of player {snapshot.player.name!r} is not that of its loss_fn: it was clipped, or belongs to "
        "parameters before another player's update, or the loss draws random numbers in another order (put the noise "
        "into the batch, or draw it from a generator that the module keeps)"
    )
    return replace(first, mismatch=snapshot.mismatch or reason)


def _named(flat: Tensor, step: Snapshot) -> dict[str, Tensor | None]:
    """A flat gradient by name; None where the step had none: the optimizer passes over those parameters."""
    own = step.gradient or {}
    pieces = split(flat, list(step.parameters.values()))
    return {name: None if own.get(name) is None else piece for name, piece in zip(step.parameters, pieces)}


def never() -> Tensor:
    """The replay of a step that has not been taken."""
    raise AssertionError("no step is replayed before training")


def _cut(part: MicroBatch, count: int) -> MicroBatch:
    """Its first samples: of all tensors whose first axis is as long as the batch."""
    size = batch_size(part.batch)

    def first(leaf: Tensor) -> Tensor:
        return leaf[:count] if leaf.ndim and len(leaf) == size else leaf

    return replace(part, batch=apply_to_collection(part.batch, Tensor, first))


def _raising(error: Exception | None) -> Callable[[], Tensor]:
    def replay() -> Tensor:
        raise error or AssertionError

    return replay


def _sums(module: nn.Module) -> list[Tensor]:
    """A fingerprint of the parameters: in-place changes through ``.data`` leave no other mark."""
    return [p.detach().sum(dtype=torch.float32) for p in module.parameters()]


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    return torch.allclose(a.to_dense(), b.to_dense(), rtol=0.0, atol=0.0, equal_nan=True)


def _compiled(module: nn.Module) -> bool:
    # Copies are not compiled: their attributes do not tell.
    return any(is_compiled(m) or getattr(m, "_compiler_ctx", None) for m in module.modules())


def batch_size(batch: Any) -> int | None:
    """The first axis of the first tensor that has one, in lists, mappings and dataclasses.

    Lightning's rule (``extract_batch_size``) but for tensors without an axis, which it takes for batches of one.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if is_dataclass(batch):
        parts = [getattr(batch, field.name) for field in fields(batch)]
    elif isinstance(batch, Mapping):
        parts = list(batch.values())
    else:
        parts = list(batch) if isinstance(batch, list | tuple) else []
    return next((size for size in map(batch_size, parts) if size is not None), None)


def rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest learning rate of the groups; NaN where the optimizer has none."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return max([float(one) for one in rates if one is not None], default=math.nan)
