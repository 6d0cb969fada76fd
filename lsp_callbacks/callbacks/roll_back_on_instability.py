"""The callback that takes training back to a stable state when it has become unstable."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lsp_callbacks._validation import number, whole
from lsp_callbacks.callbacks._lightning_internals import is_launched_elsewhere
from lsp_callbacks.callbacks.data_position import DataPosition
from lsp_callbacks.callbacks.hidden_hooks import hide_hooks, show_hooks
from lsp_callbacks.callbacks.publisher import show
from lsp_callbacks.callbacks.stable_states import (
    RollBack,
    StableState,
    StableStates,
    missing_from,
    roll_backs_of,
    write_record,
)
from lsp_callbacks.callbacks.stop_on_instability import SCHEDULED, StopOnInstability
from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.monitor.losses import ArrivedLoss
from lsp_callbacks.monitor.rates_of_update import RatesOfUpdate
from lsp_callbacks.step.flat import largest_learning_rate

#: Steps before the last one at which the loss was level, from which on batches are left out.
MARGIN = 2
#: By what the rate is multiplied at least where training begins anew: there it was measured stable at no rate.
FROM_BEGINNING = 0.1
#: Stable readings in a row, and steps since it was changed, after which the rate is raised again.
STABLE_READINGS, STABLE_STEPS = 3, 50
HOOK = ("on_train_batch_end",)


class RollBackOnInstability(StopOnInstability):
    """Takes training back to the last state that was measured stable, and lets it go on at a lower rate.

    It decides as `StopOnInstability` does, whose place it takes: where that would end training, Lightning's `Trainer`
    is fitted again from a checkpoint of Lightning's own. So weights, optimizers, schedulers, loops and callbacks are
    restored by Lightning, and random numbers and the position in the data by this class: the next batch and the next
    dropout mask are those that followed the state before. After ``times`` returns the next stop is final.

    That takes a second call of ``Trainer.fit``, which `fit` makes::

        roll_back = RollBackOnInstability()
        trainer = pl.Trainer(callbacks=[StabilityMonitor(), roll_back])
        roll_back.fit(trainer, model, datamodule)   # instead of trainer.fit(model, datamodule)

    A state is written at the end of a step with a stable reading and a calm loss, once in ``every_n_steps`` steps, and
    before that whenever the run has become twice as long; the next stable reading confirms it, and it is the one to
    return to. Before the first one, that is the beginning of the run.

    The rates of all updates are multiplied by one factor, in the update alone: schedulers and checkpoints know only the
    user's own rate. At each return it becomes at least ``factor`` times smaller, and so small that the rate at which
    training was found unstable is ``safety`` times the least critical one from the state on, before the loss rose; a
    tenth at most where training begins anew, as there no rate was measured stable. After the first return it is raised
    again, by ``1 / factor``, 50 steps later at the earliest, when the loss is calm and three Courant numbers in a row
    would stay below ``safety`` at the raised rate; and so on. It is not raised above that share of the least critical
    rate before the step is passed at which training was found unstable. The readings that it takes are asked for beside
    the monitor's budget. What has failed twice is not raised any more.

    Each return is printed, and logged as ``stability/roll_back`` (the step to which it leads) and
    ``stability/lr_scale``; `roll_backs` says when and why. It is written down in ``roll_backs.json`` before it is made.
    A run that was killed, and is resumed from a checkpoint of the way that was left, makes the return, or makes it
    again. One that is resumed from a checkpoint before it goes on from there.

    Args:
        monitor: key of the number by which training is judged, see `StopOnInstability`.
        times: returns at most.
        factor: by which the rate is lowered at least; 1 lets the measured critical rate alone decide.
        safety: share of the critical rate that is allowed, see above.
        skip_batches: whether the batches since the loss began to rise are left out the next time.
        every_n_steps: steps between two states at least, once the run has so many.
        dirpath: folder of the states; None is ``roll_back`` in the logger's folder.
        **settings: others of `StopOnInstability`.

    Raises:
        ValueError: for bad arguments; in ``setup``, beside a `StopOnInstability`, with several optimizers, where each
            process is launched by ``fit`` itself (``ddp_spawn``, notebooks), and where ``Trainer.fit`` was called
            directly.

    Attributes:
        scale: by which the rates of the schedule are multiplied.
        roll_backs: the returns so far, see `RollBack`.

    Example:
        >>> from lsp_callbacks import RollBackOnInstability, StabilityMonitor
        >>> callbacks = [StabilityMonitor(), RollBackOnInstability(times=3, factor=0.5, skip_batches=True)]
    """

    def __init__(
        self,
        monitor: str = "stability/courant",
        *,
        times: int = 3,
        factor: float = 0.5,
        safety: float = 0.9,
        skip_batches: bool = False,
        every_n_steps: int = 100,
        dirpath: str | None = None,
        **settings: Any,
    ):
        whole("times", times, 1)
        number("factor", factor, above=0, most=1, instead=", by which the rate is multiplied")
        number("safety", safety, above=0, instead=", as a share of the critical rate")
        whole("every_n_steps", every_n_steps, 1, instead=" steps")
        self.times, self.factor, self.safety, self.skip_batches = times, factor, safety, skip_batches
        self.every_n_steps, self.dirpath = every_n_steps, dirpath
        self.scale = 1.0
        self.roll_backs: list[RollBack] = []
        self._states, self._position, self._rates_of_update = StableStates(), DataPosition(), RatesOfUpdate()
        self._pending: RollBack | None = None  # decided, and not made yet
        self._data: Mapping[str, Any] | None = None  # where the state is in its data, while it is written or loaded
        self._folder: str | None = None
        self._stable: list[float] = []  # Courant numbers since the rate was lowered or raised,
        self._changed_step = 0  # which was at this step
        self._critical = math.inf  # the least critical rate since the confirmed state, before the loss rose
        self._is_driven = self._is_wanted = False
        super().__init__(monitor, **settings)

    # -- the runs -----------------------------------------------------------------------------------------------------

    def fit(self, trainer: Any, model: Any, *args: Any, **settings: Any) -> None:
        """Train with returns: ``trainer.fit(model, ...)``, as often as it takes.

        Args:
            trainer: Lightning's, with this callback.
            model: the LightningModule.
            *args: others of ``Trainer.fit``.
            **settings: likewise.

        Raises:
            ValueError: if the trainer does not have this callback.
        """
        if self not in trainer.callbacks:
            raise ValueError("the trainer does not have this callback: Trainer(callbacks=[..., roll_back])")
        if len(args) > 3:
            raise ValueError("give ckpt_path by its name: roll_back.fit(trainer, model, ..., ckpt_path=...)")
        self._is_driven = True
        try:
            trainer.fit(model, *args, **settings)
            while self._pending is not None:
                settings["ckpt_path"] = self._pending.state.path
                trainer.fit(model, *args, **settings)
        finally:
            self._is_driven = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._check(trainer)
            if trainer.global_step == 0 and self._pending is None:
                self.scale, self.roll_backs, self._states, self._folder = 1.0, [], StableStates(), None
            self._data, self._is_wanted = None, False
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._source.roll_back = self

    def _check(self, trainer: Any) -> None:
        if not self._is_driven:
            raise ValueError(
                "RollBackOnInstability returns to a state by fitting again: call roll_back.fit(trainer, model, ...) "
                "instead of trainer.fit(model, ...)"
            )
        if sum(isinstance(callback, StopOnInstability) for callback in trainer.callbacks) > 1:
            raise ValueError("RollBackOnInstability takes the place of StopOnInstability: leave that out")
        if is_launched_elsewhere(trainer):
            raise ValueError("RollBackOnInstability with processes that fit launches itself: use strategy='ddp'")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._rates_of_update.close()
        if stage == "fit" and getattr(self, "_source", None) is not None:
            self._source.roll_back = None
            if self._source.cap is None:
                self._source.monitor.cadence.want(math.inf)
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._rates_of_update.close()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._position.begin_fit()
        if self._data is not None:
            self._position.return_before_loaders(trainer, self._data)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1 or any("lr" not in group for group in trainer.optimizers[0].param_groups):
            raise ValueError("RollBackOnInstability needs one optimizer with a learning rate 'lr', which it can lower")
        super().on_train_start(trainer, pl_module)
        if self._folder is None:
            self._folder = self.dirpath or os.path.join(trainer.log_dir or trainer.default_root_dir, "roll_back")
            self._folder = os.path.abspath(trainer.strategy.broadcast(self._folder))
        if self._pending is None and self._is_abandoned(trainer):
            trainer.should_stop = True  # before the first step
            return
        if self._pending is not None:
            self._arrive(trainer, self._pending)
        if self._data is not None:
            self._position.leave_out(trainer, self.roll_backs, self._position.return_to_batch(trainer, self._data))
            self._data = None
        self._source.forecast.scale = self.scale
        if self.scale != 1:
            show_hooks(self, ("on_before_optimizer_step",))
        if trainer.global_step == 0 and self._states.confirmed is None:
            write_record(self._folder, []) if trainer.is_global_zero else None
            self._save(trainer, None)
        elif self._states.confirmed is None or not os.path.exists(self._states.confirmed.path):
            self._states.confirmed, self._is_wanted = None, True
            show_hooks(self, HOOK)

    def _is_abandoned(self, trainer: Any) -> bool:
        """Return True if the run was resumed on a way that was left before: the return is then made again."""
        assert self._folder is not None
        record = missing_from(self.roll_backs, self._folder, trainer.global_step)
        if not record:
            return False
        if not os.path.exists(record[-1].state.path):
            rank_zero_warn(f"{type(self).__name__} cannot return to {record[-1].state.path}, which is gone")
            return False
        self.roll_backs, self._pending = record, record[-1]
        return True

    def _arrive(self, trainer: Any, roll_back: RollBack) -> None:
        """Go on from the state of a roll-back, whose checkpoint has been loaded."""
        self._pending = None
        self.scale, self._stable, self._changed_step = roll_back.scale, [], trainer.global_step
        self._critical = math.inf
        self._states.return_to(roll_back.state)
        self._states.remove_unused(trainer, self.roll_backs)
        self._want_reading(trainer)
        show_hooks(self, HOOK)

    # -- one step -----------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._position.begin_epoch()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if self._source.rests and self._source.cap is None:  # otherwise the monitor asks, or the cap knows
            self.lower(trainer, optimizer)

    def lower(self, trainer: Any, optimizer: torch.optim.Optimizer) -> float | None:
        """Set the rates of the update that comes now, and return the largest that was scheduled."""
        if self.scale == 1:
            return None
        scheduled = largest_learning_rate(optimizer)
        self._rates_of_update.multiply(optimizer, self.scale)
        return scheduled

    def receive(self, trainer: Any, observation: Observation) -> None:
        super().receive(trainer, observation)
        value = observation.values.get(self.monitor, math.nan)
        critical = self._source.forecast.critical.mean
        if self._losses.is_calm and critical < self._critical:
            self._critical = critical
        last = self._states.candidate or self._states.confirmed
        if value <= self.threshold and trainer.global_step > (-1 if last is None else last.step):
            self._is_wanted = True
        if self.scale < 1 and not math.isnan(value):
            self._stable = [*self._stable, value][-STABLE_READINGS:]
            self._want_reading(trainer)

    def end_step(self, trainer: Any, step: int, arrived: Sequence[ArrivedLoss]) -> None:
        super().end_step(trainer, step, arrived)
        if self.stop_step == step and self._pending is None:
            if len(self.roll_backs) < self.times and self._states.confirmed is not None:
                self._decide(trainer, step, self._states.confirmed)
            return
        self._raise(trainer, step)
        if self._is_wanted:
            is_calm = self._losses.is_calm and not self._collapsed and not self._losses.exploded(self._losses.last)
            if not is_calm or not math.isnan(self._number.readings.above(self.threshold, step)):
                self._is_wanted = False
                return
            if self._states.candidate is not None:
                self._critical = math.inf
            self._states.confirm()
            self._states.remove_unused(trainer, self.roll_backs)
            last = self._states.confirmed
            # At first whenever the run has become twice as long.
            self._is_wanted = last is None or trainer.global_step - last.step >= min(self.every_n_steps, last.step)
            if self._is_wanted:
                show_hooks(self, HOOK)

    def _raised(self, trainer: Any) -> float:
        """Return to what the factor of the rates may be raised next: the same where it may not."""
        if len(self.roll_backs) != 1 or self.monitor not in SCHEDULED:
            return self.scale
        (last,) = self.roll_backs
        limit = last.limit if trainer.global_step <= last.at else 1.0
        return max(self.scale, min(1.0, limit, self.scale / self.factor))

    def _want_reading(self, trainer: Any) -> None:
        """Ask for the readings that raise the rate: as many as it takes by the time at which it may be raised.

        Where they do not allow it then, each one comes after a third of the time that has passed by then.
        """
        if self._raised(trainer) > self.scale and self._source.cap is None:  # which asks for its own
            gap = max(STABLE_STEPS, trainer.global_step - self._changed_step) // STABLE_READINGS
            self._source.monitor.cadence.want(self._source.observer.step + gap)

    def _raise(self, trainer: Any, step: int) -> None:
        """Raise the rate again if its Courant numbers say that it may be raised."""
        if trainer.global_step - self._changed_step < STABLE_STEPS or len(self._stable) < STABLE_READINGS:
            return
        scale = self._raised(trainer)
        if scale == self.scale or not self._losses.is_calm or max(self._stable) * scale > self.safety * self.scale:
            return
        self._source.forecast.scale = self.scale = scale
        self._stable, self._changed_step = [], trainer.global_step
        self._want_reading(trainer)
        self._say(f"stable at step {step}: from here on at {scale:.3g} times the scheduled rate again")
        show(trainer, {"stability/lr_scale": scale})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        is_whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # Lightning validates after this hook; a run that is resumed there does not know whether it has.
        every = trainer.val_check_batch
        validates = bool(trainer.enable_validation) and every not in (None, math.inf) and not (batch_idx + 1) % every
        if self._is_wanted and is_whole and not validates and not trainer.should_stop:
            self._save(trainer, batch, is_between=trainer.is_last_batch)
        self._position.leave_out(trainer, self.roll_backs, self._position.index(trainer))
        if not (self._is_wanted or self.roll_backs):
            hide_hooks(self, HOOK)

    def _save(self, trainer: Any, batch: Any, *, is_between: bool = False) -> None:
        """Write a state; for the arguments see `DataPosition.state`; collective."""
        self._is_wanted = False
        assert self._folder is not None
        state = StableState(
            trainer.global_step,
            os.path.join(self._folder, f"step-{trainer.global_step}.ckpt"),
            self._source.forecast.critical.mean,
        )
        self._data = self._position.state(trainer, batch, is_between=is_between)
        try:
            trainer.save_checkpoint(state.path)
        finally:
            self._data = None
        self._states.add(state)
        self._states.remove_unused(trainer, self.roll_backs)

    # -- a roll-back --------------------------------------------------------------------------------------------------

    def _decide(self, trainer: Any, step: int, state: StableState) -> None:
        """Write down that training returns to a state; `fit` makes the return."""
        rate, _ = self._source.rates()
        critical = min((each for each in (state.critical, self._critical) if each > 0), default=math.inf)
        limit = self.safety * critical / rate if rate > 0 else math.inf
        most = FROM_BEGINNING if state.step == 0 and self.factor < 1 else 1.0
        scale = min(self.factor, most, limit)
        skipped: tuple[int, ...] = ()
        if self.skip_batches:
            end = self._position.index(trainer)
            first = (self._losses.level_step if self._losses.finite else step - 1) - MARGIN
            skipped = (trainer.current_epoch, max(0, end - (step - first) * trainer.accumulate_grad_batches), end)
        assert self.reason is not None and self._folder is not None
        roll_back = RollBack(trainer.global_step, state, self.scale * scale, self.reason, skipped, self.scale * limit)
        self.roll_backs = [*self.roll_backs, roll_back]
        if trainer.is_global_zero:
            write_record(self._folder, self.roll_backs)
        self._pending, self._is_wanted = roll_back, False
        batches = f", without batches {skipped[1]} to {skipped[2] - 1} of epoch {skipped[0]}" if skipped else ""
        self._say(
            f"unstable at step {step}: {self.reason}. Training goes on from step {state.step} at "
            f"{roll_back.scale:.3g} times the scheduled rate{batches} (return {len(self.roll_backs)} of {self.times})"
        )
        show(trainer, {"stability/roll_back": float(state.step), "stability/lr_scale": roll_back.scale})

    def announce(self, trainer: Any, step: int, why: str) -> None:
        if len(self.roll_backs) >= self.times or self._states.confirmed is None:
            super().announce(trainer, step, why)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        made = self.roll_backs if self._pending is None else self.roll_backs[:-1]
        return super().state_dict() | {
            "roll_backs": [asdict(each) for each in made], "scale": self.scale, "folder": self._folder,
            "stable": list(self._stable), "changed_step": self._changed_step, "critical": self._critical,
            "states": self._states.state_dict(), "data": self._data,
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        names_of_state = ("roll_backs", "scale", "stable", "changed_step", "critical", "folder", "states", "data")
        super().load_state_dict({name: value for name, value in state_dict.items() if name not in names_of_state})
        self._folder, self._data = state_dict["folder"], state_dict["data"]
        self._states.load_state_dict(state_dict["states"])
        if self._pending is None:
            self.roll_backs, self.scale = roll_backs_of(state_dict["roll_backs"]), state_dict["scale"]
            self._stable, self._changed_step = list(state_dict["stable"]), state_dict["changed_step"]
            self._critical = state_dict["critical"]
