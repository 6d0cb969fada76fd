"""The callback that measures."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.hidden_hooks import hide_hooks, show_hooks
from lsp_callbacks.callbacks.lightning_loop import LightningLoop
from lsp_callbacks.callbacks.loss_feed import LossFeed
from lsp_callbacks.callbacks.lr_forecast import steps_left
from lsp_callbacks.callbacks.publisher import Publisher
from lsp_callbacks.callbacks.rest import Rest
from lsp_callbacks.callbacks.run_results import RunResults
from lsp_callbacks.callbacks.setting_checks import (
    check_named,
    check_settings,
    check_trains,
    warn_of_sub_batch,
    warn_of_unseen_steps,
)
from lsp_callbacks.callbacks.step_numbers import StepNumbers
from lsp_callbacks.monitor.cadence import Scheduled
from lsp_callbacks.monitor.configure import configured
from lsp_callbacks.monitor.history import NOTHING
from lsp_callbacks.monitor.observer import StepObserver
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.quantities.module_filter import Selection
from lsp_callbacks.report import sentence
from lsp_callbacks.step.pending_step import LossFn
from lsp_callbacks.step.probes import Criterion, ForwardFn, population
from lsp_callbacks.step.run_context import Prox

CHANGED_GRADIENT = "the gradient was changed after the on_before_optimizer_step of StabilityMonitor"


class StabilityMonitor(RunResults, Callback):
    """Measures the stability of training while it runs, and leaves no trace in it.

    Global scalars go to ``trainer.callback_metrics`` (finite ones only) and to every logger, values of single layers to
    the loggers, all at the step number of the user's own row of that batch. `history` holds the curves without a
    logger. ``stability/courant`` is ``courant_sgd`` or, for a whole run, ``courant_gd``: ``stability/courant_source``
    is 1 or 0, `courant_source` the name. `verdict` is the sentence printed at the end, as data.

    A measurement runs ``training_step`` again, on a copy of the module: what the module remembers, random numbers and
    what it logs through Lightning stay those of training, and ``print``, ``logging`` and files opened for writing are
    muted meanwhile. Effects elsewhere happen again and cannot be taken back: on global variables, on files that are
    open already or written by ``torch.save``, over a network (``wandb.log`` without Lightning's logger), prints in
    activations that are checkpointed. Move such code to ``on_train_batch_end``, or pass ``loss_fn``.

    Where your module overrides ``optimizer_step``, the parameters after each measured step are compared with those to
    which the optimizer's step leads, and ``configure_gradient_clipping`` is tried on copies of the gradient: warm-ups,
    logging, clipping by norm or by value are measured as they are. With anything else the numbers that depend on the
    update are no longer measured, and the sharpness is. Cost: one optimizer step on copies in double precision, ten
    calls of the method.

    Args:
        quantities: a preset ("economy", "default", "full"), names, or `Quantity` objects. One that is named here and
            cannot be measured raises before training; one of a preset is skipped with one warning.
        every_n_steps: start a measurement of each quantity every so many optimizer steps; a mapping gives some of them
            a pace of their own, ``{"sgd_stability": 25, "spectral_norm": 500}``; None keeps to ``budget``.
        budget: share of the training cost to spend, by a deterministic model in gradients: 80 % of it on measurements,
            the rest is for what the model does not see, such as the calls of each step. Most of it is for
            ``stability/courant``, measured once in ``1 / budget`` steps far from the edge of stability, and more often
            near it; each quantity has its own pace, see `lsp_callbacks.monitor.cadence.Cadence`. An advance of 15
            steps pays for the first readings, at 0, 1, 2, 4, 8, ... steps. What costs more than 20 steps a measurement
            is left out, unless it is named or has a pace.
        window: steps in a window of the exponent; None is the default of `Lyapunov`.
        average: windows in its mean; likewise.
        sub_batch: samples of the batch (of several processes, of each one's) for sharpness and exponent; None takes
            the whole batch. The numbers are then those of a sub-batch, whose size is ``stability/sub_batch``.
        layers: whose spectral norms to measure: class, glob, predicate or import path; None takes all.
        blocks: the residual blocks, likewise; None finds them.
        log_layers: "all", "summary" (none), how many of the largest of each kind to log, or "histogram": one of each
            kind and reading, with the loggers that take them (TensorBoard, W&B, Comet); the others log no layer.
        loss_fn: ``(module, batch) -> loss``, where ``training_step`` cannot be replayed; needed under manual
            optimisation, where it is the loss of the batch's first optimizer step: without it one warning says so, and
            only what needs no loss is measured, the norms of the layers. Where several optimizers take turns
            (a GAN), a mapping ``{name: loss}`` in the order in which ``configure_optimizers`` returns them. Then each
            optimizer step is a step, numbered as they come; each loss must let the parameters of the other players
            through, so without ``.detach()``.
        accumulate: under manual optimisation, over how many batches ``training_step`` sums gradients before it calls
            ``optimizer.step()``, each loss divided by that; ``loss_fn`` is that of one batch, before the division.
        forward_fn: ``(module, batch) -> outputs`` of shape ``(samples, ..., classes)``, and
        criterion: ``(outputs, batch) -> loss``, the mean over the samples: needed together, and only where
            ``training_step`` does not return the value of one criterion of ``torch.nn.functional``. The gradient of the
            two has to be that of the step's own loss, all of it: with which it is compared now and then.
        prox: ``(name, tensor, lr) -> tensor``, what your code makes of each parameter after the optimizer's step:
            weight clipping, a max-norm, a soft threshold; see `lsp_callbacks.functional.trajectory.proximal`. It is not
            applied, but enters the update map; where you apply it (``optimizer_step``, ``on_train_batch_end``, a hook
            of the optimizer) is up to you. The parameters after the step are compared with it; once they differ, no
            number that depends on the update is measured any more.
        save_vectors: put windows under way and warm starts into checkpoints too; otherwise a run that is resumed begins
            them anew. A run that goes on after a checkpoint measures the same as without it, either way; one that is
            resumed collects its training samples anew.
        strict: raise where a measurement fails, instead of recording NaN with one warning.
        max_memory: bytes, or "2GB", that a measurement may take beside training; a quantity that is predicted to take
            more is skipped. None is what is free on a CUDA device, and elsewhere what lets the peak be 1.5
            times that of training alone (weights, gradient, two moments and activations), or 256 MB if that is more;
            the headline number may take it to 3 times.
        time_limit: seconds that a measurement may take: its longest parts are skipped until the rest fits. The clock
            decides, so two runs may measure different things. None is no limit.
        seed: of our own random choices, which never touch the global state.

    Raises:
        ValueError: for bad arguments; before training, for a model or selection that cannot be measured.

    Example:
        >>> from lsp_callbacks import StabilityMonitor, StopOnInstability
        >>> callbacks = [StabilityMonitor(every_n_steps=50), StopOnInstability()]  # for Trainer(callbacks=callbacks)
    """

    def __init__(
        self,
        quantities: str | Sequence[str | Quantity] = "default",
        *,
        every_n_steps: int | dict[str, int] | None = None,
        budget: float = 0.05,
        window: int | None = None,
        average: int | None = None,
        sub_batch: int | None = None,
        layers: Selection = None,
        blocks: Selection = None,
        log_layers: Literal["all", "summary", "histogram"] | int = "all",
        loss_fn: dict[str, LossFn] | LossFn | None = None,
        accumulate: int | None = None,
        forward_fn: ForwardFn | None = None,
        criterion: Criterion | None = None,
        prox: Prox | None = None,
        save_vectors: bool = False,
        strict: bool = False,
        max_memory: float | str | None = None,
        time_limit: float | None = None,
        seed: int = 0,
    ):
        check_settings(sub_batch, log_layers, seed, accumulate, loss_fn, prox)
        monitor = configured(
            quantities, every_n_steps=every_n_steps, budget=budget, window=window, average=average, layers=layers,
            blocks=blocks, strict=strict, max_memory=max_memory, time_limit=time_limit,
        )  # fmt: skip
        observer = StepObserver(monitor, forward_fn=forward_fn, criterion=criterion)
        super().__init__(monitor, observer, Publisher(log_layers))
        self.sub_batch, self.accumulate, self.loss_fn, self.prox = sub_batch, accumulate, loss_fn, prox
        self.save_vectors, self.seed = save_vectors, seed
        self._numbers = StepNumbers(self.observer, accumulate)
        self._has_loss = self._is_overflowed = False

    @property
    def rests(self) -> bool:
        """Whether nothing is measured at this step, so that Lightning passes over most hooks."""
        return self._rest.is_on

    # -- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        hide_hooks(self, ("on_before_zero_grad", "on_after_backward"))
        self._verdict = None
        if trainer.global_step == 0:  # a new run; one that is resumed loads its state after this
            self._numbers.reset()
            self.forecast.reset()
            self._publisher.reset()
            self.monitor.reset()
        self.monitor.drop()
        check_named(trainer, pl_module, self.monitor, self.loss_fn)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in setup: the module may build itself in its own setup or configure_model, which come later.
        check_trains(pl_module, self.monitor, self.loss_fn, self.accumulate)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        observer, losses = self.observer, self.loss_fn if isinstance(self.loss_fn, Mapping) else None
        loop = self._loop = LightningLoop(
            trainer, pl_module, self.monitor, loss_fn=self.loss_fn, accumulate=self.accumulate, prox=self.prox,
            sub_batch=self.sub_batch, seed=self.seed,
        )  # fmt: skip
        ranks = loop.run.ranks
        observer.probes.drop(
            ranks.first(lambda: population(trainer.train_dataloader, trainer.world_size), "the population")
        )
        self._begin_results()
        self.forecast.begin_run(trainer, is_game=losses is not None, is_overridden=loop.overrides_step)
        told = self.subscribers if self.cap is None else [self.cap, *self.subscribers]  # which ask for its next rate
        self._loss_feed = LossFeed(self.monitor, ranks, told, self.loss_listeners, is_automatic=loop.is_automatic)
        self._numbers.begin_run(trainer, is_game=losses is not None)
        is_one = len(trainer.optimizers) == 1 and losses is None and self.accumulate is None
        self._rest = Rest(self, observer, self.forecast, self._loss_feed, loop, is_one=is_one)
        # The sum of several players' losses need not fall.
        self.monitor.losses.comparable = len(trainer.optimizers) <= 1
        observer.begin_run(
            loop,
            trainer.optimizers,
            losses=None if losses is None else {name: partial(loop.loss, 0, loss) for name, loss in losses.items()},
            steps=steps_left(trainer, 0) if observer.step == 0 else math.inf,  # a resumed run goes on with what it has
        )
        warn_of_sub_batch(self.sub_batch)
        if self.history:
            self._publisher.resume(trainer, self.history)
        self.stopwatch.start()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._rest.end()

    # -- one step --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._rest.is_on:
            return
        began, observer = time.perf_counter(), self.observer
        first = self._numbers.begin_batch(trainer, batch_idx)
        scheduled: Scheduled = math.nan
        if first:
            self._has_loss = self._is_overflowed = False
            if self._loop.overrides_step:
                self.forecast.begin_step(trainer)
            if self._loss_feed.has_same_rates:
                scheduled = self.forecast.scheduled_courant
        if not observer.is_idle:  # of the step before
            observer.check_update(is_epoch_over=batch_idx == 0 and trainer.num_training_batches > 1)
        observer.begin_batch(batch, partial(self._loop.loss, batch_idx, None), first=first, scheduled=scheduled)
        self.stopwatch.spent += time.perf_counter() - began

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        if self._rest.is_on:
            return
        self._has_loss = True
        if self.observer.is_idle and self._loop.is_automatic and self.monitor.trace is None:
            return
        scale = None if self._loop.scaler is None else self._loop.loss_scale
        self.observer.loss(loss, scale=scale, is_returned=self._loop.is_automatic)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if not (self._rest.is_on or self._loop.run.updates_elsewhere):
            self._before_update(trainer, pl_module, optimizer)

    def _before_update(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        began, observer, loop = time.perf_counter(), self.observer, self._loop
        scheduled = None
        lowering = self.roll_back if self.cap is None else self.cap
        if lowering is not None and (loop.scaler is None or (self._has_loss and not loop.is_overflowed(optimizer))):
            if self.cap is not None and observer.is_pending:
                self.cap.foresee(optimizer)
            scheduled = lowering.lower(trainer, optimizer)  # before anything is measured
        if loop.is_automatic and not self._has_loss:  # training_step returned None
            observer.skip_update()
            # Lightning counts it. A gradient that was set to zero, not to None, moves what has momentum.
            moved = any(p.grad is not None for p in pl_module.parameters())
        elif observer.is_idle and loop.scaler is None:
            self._has_loss = False
            moved = observer.before_update(optimizer)
        else:
            overflowed = loop.scaler is not None and loop.is_overflowed(optimizer)
            self._is_overflowed |= overflowed
            self._has_loss = False
            self.forecast.before_update(trainer, scheduled=scheduled)
            # Under manual optimisation the user may clear gradients at any time.
            is_known = loop.is_automatic and not loop.run.updates_elsewhere
            gradients = partial(loop.clipped_gradients, optimizer) if is_known else None
            moved = observer.before_update(optimizer, overflowed=overflowed, coming_gradients=gradients)
        self._numbers.count(moved=moved)
        self.stopwatch.spent += time.perf_counter() - began

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._rest.is_on:
            self._publisher.update_age(self._rest.end_step(trainer, outputs))
            return
        if self._loop.has_unseen_update(seen=self.observer.updates > 0):
            with self.monitor.errors.warn_instead_of_raise("the optimizer's steps are not seen"):
                self.observer.require(trainer.optimizers[0])
        if self._loop.run.updates_elsewhere:
            self.observer.settle()
            self._before_update(trainer, pl_module, trainer.optimizers[0])
        began, observer = time.perf_counter(), self.observer
        is_changed = not observer.is_idle and observer.check_gradient(CHANGED_GRADIENT, is_gone_allowed=True)
        if not is_changed and observer.updates > 1 and observer.game is None:
            observer.invalidate_update(
                f"one batch made {observer.updates} optimizer steps: their joint update is not modelled"
            )
        is_over, completed = self._numbers.end_batch(trainer), NOTHING
        if not observer.is_idle:
            observer.check_update(last=False)
            completed = observer.after_update()
            self._publish(trainer, completed)
        self._publisher.update_age(observer.step - 1)
        observer.step_loss.add_returned(outputs)
        if is_over:
            self._loss_feed.end_step(
                trainer, observer.step - 1, observer.step_loss, left_out=self._is_overflowed,
                wait=bool(completed.observations),
            )  # fmt: skip
        self._rest.begin_after(trainer)
        self.stopwatch.spent += time.perf_counter() - began

    # -- afterwards ------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        observer = self.observer
        observer.check_update()
        if self._loop.overrides_step and observer.is_pending and not self.history:
            warn_of_unseen_steps(self.monitor, pl_module)
        self._loss_feed.finish(observer.step - 1)
        # StabilityReport says it below its table.
        if not any(getattr(callback, "says_verdict", False) for callback in trainer.callbacks):
            rank_zero_info(sentence(self.verdict))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.observer.close()
        show_hooks(self)
        if stage == "fit":
            self._send_home(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.observer.close()


def monitor_among(callbacks: Iterable[Any]) -> StabilityMonitor | None:
    """Return the first `StabilityMonitor` of some callbacks; None if there is none."""
    return next((c for c in callbacks if isinstance(c, StabilityMonitor)), None)


def monitor_beside(name: str, trainer: Any) -> StabilityMonitor:
    """Return the `StabilityMonitor` of a trainer that the callback of this name needs.

    Raises:
        ValueError: if there is none.
    """
    monitor = monitor_among(trainer.callbacks)
    if monitor is None:
        raise ValueError(f"{name} needs a StabilityMonitor: add one to Trainer(callbacks=[...])")
    return monitor
