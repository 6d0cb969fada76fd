"""The one protocol by which every training loop shows its steps to a `Monitor`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd.side_effects import untouched
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.between_steps import MOVED_BETWEEN, BetweenSteps
from lsp_callbacks.monitor.cadence import Scheduled
from lsp_callbacks.monitor.gradient_check import GradientCheck, Gradients
from lsp_callbacks.monitor.history import Completed, StepResults
from lsp_callbacks.monitor.kept_step import kept_step, players_step, whole_step
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.multi_optimizer import Game
from lsp_callbacks.monitor.nan_finder import NanFinder
from lsp_callbacks.monitor.training_loop import MicroBatchLoss, TrainingLoop
from lsp_callbacks.monitor.update_check import UpdateCheck, of_whole_batch
from lsp_callbacks.quantities.numerics.numerics import Numerics
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.pending_step import PendingStep, never
from lsp_callbacks.step.players import Player
from lsp_callbacks.step.probes import Criterion, ForwardFn, Probes
from lsp_callbacks.step.snapshot import Snapshot
from lsp_callbacks.step.step_loss import StepLoss
from lsp_callbacks.step.verified_step import verified


class StepObserver:
    """Observes the optimizer steps of a training loop, and hands those that are due to a `Monitor`.

    A loop translates its own hooks into these calls, and has nothing else to do with measuring:

    1. `begin_run`, once its optimizers exist;
    2. `begin_batch` before each forward pass in training, and `loss` before each backward pass;
    3. `before_update` where the gradient is complete, or `skip_update` where no update follows;
    4. `count`, as the loop numbers its steps;
    5. `check_gradient` and `check_update` where gradient and parameters should be those of the measured step;
    6. `after_update`, which gives what was completed.

    Args:
        monitor: decides when to measure, and measures.
        forward_fn: ``(module, batch) -> outputs``, and
        criterion: ``(outputs, batch) -> loss`` of the training samples at which quantities look at outputs, see
            `StabilityMonitor`.

    Attributes:
        step: number of the optimizer step that comes next, or is under way.
        previous: number of the last step that moved the parameters; None before one was seen.
        updates: how many updates the step under way has had.
        is_idle: whether nothing of the step under way is looked at but what is recorded at every step.
        probes: the training samples at which quantities look at outputs.
        step_loss: the loss of the step under way.
        replayed_loss: the loss of its replay, where the loop does not show its own; None without a measurement.
        sub_batch: how many samples the last measurement used; None where it used the whole batch.
        game: of several optimizers that take turns on losses of their own.
        listeners: called with each snapshot that the monitor has observed.
    """

    def __init__(self, monitor: Monitor, *, forward_fn: ForwardFn | None = None, criterion: Criterion | None = None):
        self.monitor = monitor
        wanted = max((getattr(quantity, "probes", 0) for quantity in monitor.quantities.values()), default=0)
        self.probes = Probes(wanted, forward_fn, criterion)
        self.step_loss = StepLoss()
        self.nan_finder = NanFinder(monitor)
        self._gradient_check, self._update_check = GradientCheck(monitor.errors), UpdateCheck()
        self._between = BetweenSteps(monitor)
        self._results = StepResults(monitor)
        self.listeners: list[Callable[[Snapshot], None]] = []
        self.step = self.updates = 0
        self.is_idle = False
        self.previous: int | None = None
        self.replayed_loss: Tensor | None = None
        self.sub_batch: int | None = None
        self.game: Game | None = None
        self._pending: PendingStep | None = None

    def begin_run(
        self,
        loop: TrainingLoop,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        losses: Mapping[str, MicroBatchLoss] | None = None,
        steps: float = math.inf,
    ) -> None:
        """Leave out what cannot be measured in this run.

        Args:
            loop: that trains, by
            optimizers: one, or those that take turns.
            losses: of those that take turns, by name, in the order of the optimizers.
            steps: how many the run will take, as far as that is known.

        Raises:
            Unmeasurable: if a quantity that the user named cannot be measured.
            ValueError: if there are not as many losses as optimizers.
        """
        self.attach(loop)
        if losses is not None:
            self.game = Game(
                optimizers, losses, lambda: players_step(loop, self.monitor, self.step),
                self.monitor.errors.warn_instead_of_raise,
            )  # fmt: skip
            for player in self.game.players():
                self.require(player.optimizers[player.name], player=player)
        else:
            self.require(optimizers[0] if optimizers else None, steps=steps)

    def attach(self, loop: TrainingLoop) -> None:
        """Observe a loop from now on, and forget what a run before, which may have been interrupted, has left."""
        self._close_game()
        self.loop, self.is_idle = loop, False
        self.probes.ranks = self._gradient_check.ranks = self._update_check.ranks = loop.run.ranks
        self.forget_step()
        self._update_check.forget()
        self._between.reset()
        self._results.forget()

    def require(
        self, optimizer: torch.optim.Optimizer | None, *, player: Player | None = None, steps: float = math.inf
    ) -> None:
        """Skip what cannot be measured on such steps, when training begins, or when their updates are not seen."""
        loop = self.loop
        coming = Snapshot(self.step, loop.module, never, optimizer, run=loop.run, clipping=loop.clipping, player=player)
        self.monitor.require(coming, steps=steps)

    def close(self) -> None:
        """Remove all hooks of ours from the module and from the optimizers, when training ends."""
        self.monitor.recorder.close()
        self._between.forget()
        self._close_game()

    def _close_game(self) -> None:
        if self.game is not None:
            self.game.close()
        self.game = None

    # -- one step --------------------------------------------------------------------------------------------------

    def begin_batch(self, batch: Any, loss: MicroBatchLoss, *, first: bool, scheduled: Scheduled = math.nan) -> None:
        """Take in a batch whose forward pass comes next.

        Args:
            batch: on the device, as the step will receive it.
            loss: what the step will differentiate.
            first: whether it is the first micro-batch of a step.
            scheduled: the learning rate that the step will use over the critical one, where that is known.
        """
        monitor, module = self.monitor, self.loop.module
        looks_for_nan = Numerics.name in monitor.quantities
        if not self._between.looks_again:
            self._results.taken = None  # it was checked
        if first:
            self.forget_step()
            if self.game is not None:
                with monitor.errors.warn_instead_of_raise("the batch could not be kept for a replay"):
                    self.game.begin(batch)
            elif names := monitor.cadence.due(self.step, scheduled=scheduled):
                self._pending = kept_step(self.loop, monitor, self.step, names)
        else:
            self.step_loss.begin_batch()
        is_looked_at = looks_for_nan or self._between.is_under_way
        self.is_idle = self._pending is None and self.game is None and not is_looked_at
        if monitor.trace is not None:
            monitor.recorder.begin(module, first=first)
        if monitor.quantities and not self.probes.full:
            self.probes.add(batch, module)
        if self.game is None:
            if looks_for_nan:
                self.nan_finder.add(batch, loss, first=first)
            if self._pending is not None:
                self._pending.add(batch, loss)

    def forget_step(self) -> None:
        """Forget the step before; `begin_batch` does so at the first micro-batch of the next one."""
        self._pending, self.updates, self.replayed_loss, self._has_moved = None, 0, None, False
        self.step_loss.begin()
        if self._gradient_check.is_expected:
            self._gradient_check.forget()

    @property
    def is_settled(self) -> bool:
        """Whether nothing of the step that ends is left to be looked at."""
        checks = self._gradient_check.is_expected or self._update_check.is_awaited or self._between.is_under_way
        return self.is_idle or not (checks or self.game is not None or self.monitor.cadence.under_way)

    @property
    def is_pending(self) -> bool:
        """Whether the step under way will be measured."""
        return self._pending is not None

    def loss(self, loss: Tensor, *, scale: Callable[[], float] | None = None, is_returned: bool = False) -> None:
        """Take in a loss that is differentiated next.

        Args:
            loss: of one micro-batch, divided by their number already.
            scale: returns the factor that it holds by mixed precision, which may wait for the device; None is 1.
            is_returned: whether the loop adds what the micro-batch returns to `step_loss`, too. Then this one is only
                taken where a replay or a series needs it before the update.
        """
        if Numerics.name in self.monitor.quantities and self.loop.shows_losses:
            self.nan_finder.saw_loss(loss)
        pending, is_needed = self._pending, not is_returned or self.monitor.trace is not None
        if pending is None and not is_needed:
            return
        factor = 1.0 if scale is None else scale()
        if pending is not None:
            pending.saw_loss(loss, scale=factor)
        if is_needed or (pending is not None and pending.can_replay):
            self.step_loss.add(loss if factor == 1.0 else loss.detach() / factor)

    def before_update(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        overflowed: bool = False,
        coming_gradients: Callable[[], Gradients] | None = None,
    ) -> bool:
        """Look at a step whose gradient is complete: for its first NaN, at what is recorded, and at what is due.

        Args:
            optimizer: that will make the update.
            overflowed: whether a gradient scaler will leave the update out.
            coming_gradients: those that the optimizer will be given, for `check_gradient`; None if they are not known.

        Returns:
            Whether an update follows.
        """
        if Numerics.name in self.monitor.quantities:
            self._find_fault(optimizer, overflowed)
        if overflowed:
            self.skip_update()
            return False
        self.updates += 1
        if self.updates == 1 and self.monitor.trace is not None:
            self.record(optimizer)
        if self.game is None and (self._pending is not None or self._between.looks_again):
            self._between.follow(optimizer, self.loop.run)
        if self._pending is not None or self.game is not None:
            self.measure(optimizer, coming_gradients=coming_gradients)
        return True

    def settle(self) -> None:
        """Take the parameters as they are now for those of the step: its backward pass has moved them."""
        if self._pending is not None:
            self._pending.settle(self.loop.module.parameters())
            self._has_moved = True

    def skip_update(self) -> None:
        """Let go of a step that is not taken."""
        self._pending = None
        if self.game is not None:
            self.game.drop()

    def count(self, *, moved: bool = True) -> None:
        """Count an optimizer step, which moves the parameters or not."""
        self.previous, self.step = self.step if moved else self.previous, self.step + 1

    def record(self, optimizer: torch.optim.Optimizer) -> None:
        """Record loss, rate and energies of the step, if a quantity of a time series asks for them."""
        recorder, loss = self.monitor.recorder, self.step_loss.differentiated
        recorder.record(self.step, loss, optimizer, self.loop.module, previous=self.previous)

    def measure(
        self, optimizer: torch.optim.Optimizer, *, coming_gradients: Callable[[], Gradients] | None = None
    ) -> None:
        """Measure the step now, if it is due, once. For the arguments see `before_update`."""
        if self.game is not None:
            failing = self.monitor.errors.warn_instead_of_raise("the player's step could not be measured")
            with failing, self.game.turn(optimizer) as snapshot:
                if snapshot is not None:
                    with self._untouched():
                        self._observe(snapshot(self.step, previous=self.previous))
        if self.game is not None or self._pending is None:
            return
        try:
            self._measure(self._pending, optimizer, coming_gradients)
        finally:
            self._pending = None

    def _measure(self, pending: PendingStep, optimizer: Any, coming_gradients: Callable[[], Gradients] | None) -> None:
        monitor = self.monitor
        needs_update = any(quantity.needs_update for quantity in monitor.quantities.values())
        if is_compared := needs_update and self.loop.moves_parameters and self.loop.run.shards is None:
            self._update_check.awaited()
        doing, is_run = "the step could not be measured", pending.can_replay or pending.own_calls is not None
        try:
            with self._untouched() if is_run else contextlib.nullcontext():
                snapshot = self.snapshot(optimizer, tries_clipping=True)
                self.sub_batch = None if pending.sub_batch is None else pending.samples
                if snapshot.loss is None and pending.can_replay and not self._has_moved:
                    snapshot = verified(snapshot)
                    self.replayed_loss = snapshot.loss
                self._observe(snapshot)
                if is_compared:
                    doing = "the parameters after the step could not be predicted"
                    self._update_check.expect(of_whole_batch(snapshot, self._clipping) if self.sub_batch else snapshot)
        except Exception as error:
            monitor.errors.caught(doing, error)
        if needs_update and coming_gradients is not None:
            self._gradient_check.expect(coming_gradients, by_some=not pending.can_replay)

    def snapshot(self, optimizer: torch.optim.Optimizer, *, tries_clipping: bool = False) -> Snapshot:
        """Return the step under way, whose forward and backward passes are over, before its update.

        Args:
            optimizer: that will make the update.
            tries_clipping: whether the user's own clipping is tried on copies; otherwise it is taken for the loop's.
        """
        loop, pending, room = self.loop, self._pending, self.monitor.budget.room
        assert pending is not None, "no step was begun that is to be measured"
        clipping = self._clipping = self._tried_clipping(pending, optimizer) if tries_clipping else loop.clipping
        (scale, gradient_scale), (loss, context) = loop.scales(optimizer), loop.evaluated()
        own_loss = self.step_loss.differentiated if loop.shows_losses and not self.step_loss.is_ambiguous else None

        def seen(pending: PendingStep, optimizer: torch.optim.Optimizer) -> Snapshot:
            return pending.snapshot(
                self.step, optimizer, gradient_scale=gradient_scale, clipping=clipping, scale=scale, room=room,
                previous=self.previous, loss=None if self._has_moved else own_loss, own_loss=own_loss,
                probes=self.probes.probe_set(pending, loss, context=context) if self.probes.wanted else None,
                samples_of_step=partial(self.probes.samples_of_step, pending, loss, context=context),
                other_loss=lambda source: pending.other_loss(source, loop.on_device),
            )  # fmt: skip

        snapshot = seen(pending, optimizer)
        if loop.run.shards is not None and pending.can_replay:
            whole = partial(whole_step, seen, pending, optimizer, loop, room, has_moved=self._has_moved)
            snapshot = replace(snapshot, whole_step=whole)
        return snapshot

    def check_gradient(self, reason: str, *, is_gone_allowed: bool) -> bool:
        """Invalidate the update if the optimizer's gradients are not those that were foreseen; return True then.

        Args:
            reason: for the warning.
            is_gone_allowed: whether gradients may have been set to None, as after the update.
        """
        changed = self._gradient_check.is_changed(is_gone_allowed=is_gone_allowed)
        if changed:
            self.invalidate_update(reason)
        return changed

    def check_update(self, *, last: bool = True, is_epoch_over: bool = False) -> None:
        """Invalidate the update if the parameters are not where it should have brought them.

        Args:
            last: whether nothing moves them any more before the next forward pass.
            is_epoch_over: whether an epoch has ended since the step.
        """
        if last and self._between.is_awaited and self._between.finds_a_map(is_epoch_over=is_epoch_over):
            self.invalidate_update(MOVED_BETWEEN)
        # Without a prox nothing has to be done to them after the step.
        if self._update_check.is_awaited and self._update_check.missed(last=last or self.loop.run.prox is None):
            self.invalidate_update(self.loop.wrong_update)

    def invalidate_update(self, reason: str) -> None:
        """See `StepResults.invalidate_update`."""
        self._results.invalidate_update(reason)

    def after_update(self) -> Completed:
        """Return what was completed since the last call, also by what has awaited the update, be it by a closure."""
        if self.monitor.cadence.under_way and self.monitor.quantities.awaiting():
            with self._untouched():
                self._results.add(self.monitor.after_update(is_own=self.updates <= 1 or self.loop.repeats_forward))
        return self._results.take()

    def _find_fault(self, optimizer: torch.optim.Optimizer, overflowed: bool) -> None:
        again = self.updates > 0  # a batch makes several updates
        step = self.step - again
        with self.monitor.errors.warn_instead_of_raise("the step could not be checked for NaN and Inf"):
            if self.nan_finder.look(step, self.loop, optimizer, overflowed=overflowed, again=again) is not None:
                self._results.add_fault(step)

    def _untouched(self) -> contextlib.AbstractContextManager:  # for replays; with shards they run the module itself
        return untouched(self.loop.module, in_place=self.loop.run.shards is not None)

    def _tried_clipping(self, pending: PendingStep, optimizer: torch.optim.Optimizer) -> Clipping | None:
        if self.monitor.invalidated:
            return self.loop.clipping
        try:
            return self.loop.clipping_of(pending, optimizer)
        except Unmeasurable as error:
            self.monitor.invalidate_update_metrics(None, str(error))
            return None

    def _observe(self, snapshot: Snapshot) -> None:
        try:
            self._results.add(self.monitor.observe(snapshot))
            for listener in self.listeners:
                listener(snapshot)
        finally:
            snapshot.forget()  # what is shared refers to the snapshot: vectors and graphs would wait for a collection
