"""The callback that measures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_info

from lsp_callbacks._validation import whole
from lsp_callbacks.callbacks._lightning_internals import has_backward, is_accumulating
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.lightning_loop import LightningLoop
from lsp_callbacks.callbacks.lr_forecast import LRForecast, steps_left
from lsp_callbacks.callbacks.mixed_precision import is_overflowed, loss_scale
from lsp_callbacks.callbacks.publisher import Publisher
from lsp_callbacks.callbacks.run_facts import check_trains, run_context, unsupported
from lsp_callbacks.callbacks.shared_losses import LossFeed
from lsp_callbacks.callbacks.spawned_history import Mailbox, packed, unpack
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.monitor.configure import configured
from lsp_callbacks.monitor.monitor import Curve
from lsp_callbacks.monitor.multi_optimizer import check_losses
from lsp_callbacks.monitor.observer import StepObserver
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.quantities.module_filter import Selection
from lsp_callbacks.report import Run, Verdict, judge, sentence
from lsp_callbacks.step.flat import largest_learning_rate
from lsp_callbacks.step.pending_step import LossFn
from lsp_callbacks.step.probes import Criterion, ForwardFn, population
from lsp_callbacks.step.run_context import Prox

CHANGED_GRADIENT = "the gradient was changed after the on_before_optimizer_step of StabilityMonitor"


class StabilityMonitor(Callback):
    """Measures the stability of training while it runs, and leaves no trace in it.

    Global scalars go to ``trainer.callback_metrics`` (finite ones only) and to every logger, per-layer values to the
    loggers, all at the step number of the user's own row of that batch. ``history`` holds the curves without a logger.
    ``stability/courant`` is ``courant_sgd`` or, for a whole run, ``courant_gd``: ``stability/courant_source`` says 1 or
    0, `courant_source` the name. `verdict` is what is said at the end, as data.

    A measurement runs ``training_step`` again, on a copy of the module: what the module remembers, random numbers and
    what it logs through Lightning stay those of training, and ``print``, ``logging`` and files opened for writing are
    muted meanwhile. What happens elsewhere happens again and cannot be taken back: global variables, files that are
    open already or written by ``torch.save``, calls over a network (``wandb.log`` without Lightning's logger), what is
    printed in activations that are checkpointed. Do it in ``on_train_batch_end``, or pass ``loss_fn``.

    Where your module overrides ``optimizer_step``, the parameters after each measured step are compared with those to
    which the optimizer's step leads, and ``configure_gradient_clipping`` is tried on copies of the gradient: warm-ups,
    logging, clipping by norm or by value are measured as they are. What does something else loses all numbers that
    depend on the update, and keeps the sharpness. Cost: one optimizer step on copies in double precision, ten calls.

    Args:
        quantities: a preset ("economy", "default", "full"), names, or `Quantity` objects. What is named here and cannot
            be measured raises before training; what a preset brings is left out with one warning.
        every_n_steps: start a measurement every so many optimizer steps; None keeps to ``budget``, denser near the edge
            of stability and sparser far from it.
        budget: share of the training cost to spend. A deterministic model in gradients spends half of it; the
            rest is for what that does not see, such as the calls of each step.
        window: steps in a window of the exponent.
        average: windows in its mean.
        sub_batch: samples of the batch (of several processes, of each one's) for sharpness and exponent; None takes
            the whole batch. The numbers are then those of a sub-batch, and ``stability/sub_batch`` says of how many
            samples.
        layers: whose spectral norms to measure: class, glob, predicate or import path; None takes all.
        blocks: the residual blocks, likewise; None finds them.
        log_layers: "all", "summary" (none), or how many of the largest of each kind to log.
        loss_fn: ``(module, batch) -> loss``, where ``training_step`` cannot be replayed; needed under manual
            optimisation, where it is the loss of the batch's first optimizer step. Where several optimizers take turns
            (a GAN), a mapping ``{name: loss}`` with one such function for each, in the order in which
            ``configure_optimizers`` returns them. Then each optimizer step is a step, numbered as they come; each loss
            must let the parameters of the other players through, so without ``.detach()``.
        accumulate: under manual optimisation, over how many batches ``training_step`` sums gradients before it calls
            ``optimizer.step()``, each loss divided by that; ``loss_fn`` is that of one batch, before the division.
        forward_fn: ``(module, batch) -> outputs`` of shape ``(samples, ..., classes)``, and
        criterion: ``(outputs, batch) -> loss``, the mean over the samples: needed together, and only where
            ``training_step`` does not return the value of one criterion of ``torch.nn.functional``.
        prox: ``(name, tensor, lr) -> tensor``, what your code makes of each parameter after the optimizer's step:
            weight clipping, a max-norm, a soft threshold; see `lsp_callbacks.functional.trajectory.proximal`. It is not
            applied, but enters the update map; where you apply it (``optimizer_step``, ``on_train_batch_end``, a hook
            of the optimizer) is up to you. What the parameters really become is compared with it, and where they differ
            nothing is told of the update any more.
        save_vectors: put windows under way and warm starts into checkpoints too; otherwise a run that is resumed begins
            them anew. A run that goes on after a checkpoint measures the same as without it, either way; one that is
            resumed collects its probes anew.
        strict: raise where a measurement fails, instead of recording NaN with one warning.
        max_memory: bytes, or "2GB", that a measurement may take beside training; what is predicted to take more is left
            out with the number. None is what is free on a CUDA device, and no cap elsewhere.
        time_limit: seconds that a measurement may take: its longest parts are left out until the rest fits. The clock
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
        every_n_steps: int | None = None,
        budget: float = 0.05,
        window: int = 4,
        average: int = 5,
        sub_batch: int | None = None,
        layers: Selection = None,
        blocks: Selection = None,
        log_layers: Literal["all", "summary"] | int = "all",
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
        _check_settings(sub_batch, log_layers, seed, accumulate, loss_fn, prox)
        self.monitor = configured(
            quantities, every_n_steps=every_n_steps, budget=budget, window=window, average=average, layers=layers,
            blocks=blocks, strict=strict, max_memory=max_memory, time_limit=time_limit,
        )  # fmt: skip
        self.sub_batch, self.accumulate, self.loss_fn, self.prox = sub_batch, accumulate, loss_fn, prox
        self.save_vectors, self.seed = save_vectors, seed
        self.observer = StepObserver(self.monitor, forward_fn=forward_fn, criterion=criterion)
        self.forecast, self._publisher = LRForecast(), Publisher(log_layers)
        #: Told of each observation and of the end of each step: `StopOnInstability`.
        self.subscribers: list[Any] = []
        self._judges: list[Any] = []
        #: Called with the number of each step and the loss that its micro-batches returned.
        self.loss_listeners: list[Any] = []
        self._mailbox = Mailbox()
        self._verdict: Verdict | None = None  # of a run in other processes, which knew more than comes home
        self._is_counted, self._is_step_over, self._has_loss, self._is_overflowed = False, True, False, False

    @property
    def step(self) -> int:
        """Number of the optimizer step that comes next."""
        self._bring_home()
        return self.observer.step

    @property
    def history(self) -> dict[str, Curve]:
        """Steps and values of every key; after ``ddp_spawn`` and its like also in the process that called ``fit``."""
        self._bring_home()
        return self.monitor.history

    @property
    def skipped(self) -> dict[str, str]:
        """Why quantities are not measured in this run, by their names: all that a preset or a limit left out."""
        self._bring_home()
        return self.monitor.skipped

    @property
    def paths(self) -> dict[str, str]:
        """By which way each quantity was last measured, see `Monitor`."""
        self._bring_home()
        return self.monitor.paths

    @property
    def courant_source(self) -> str | None:
        """What ``stability/courant`` is: "courant_sgd" or "courant_gd" for the whole run; None before it is decided."""
        self._bring_home()
        return self.monitor.courant_source

    @property
    def fault(self) -> Fault | None:
        """What made the first NaN or Inf of the run, where "numerics" is among the quantities."""
        return self.monitor.fault

    @property
    def overhead(self) -> float:
        """Measured share of the time since training began that went into measuring."""
        return self._publisher.stopwatch.share

    @property
    def verdict(self) -> Verdict:
        """How the run went so far, or went: state, cause, evidence, advice."""
        self._bring_home()
        return self._verdict or judge(Run.of(self.monitor, self.observer.step, self._judges))

    def scheduled_courant(self, trainer: Any) -> float:
        """Return the rate that the optimizer has now, before it is used, over the critical rate; NaN if not known."""
        return self.forecast.scheduled_courant(trainer) if self._loss_feed.has_same_rates else math.nan

    def _bring_home(self) -> None:
        if (contents := self._mailbox.receive()) is not None:
            self.observer.step, self._verdict = unpack(self.monitor, contents)

    # -- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self._verdict = None
        if trainer.global_step == 0:  # a new run; one that is resumed loads its state after this
            self.observer.step, self.observer.previous = 0, None
            self.forecast.reset()
            self._publisher.reset()
            self.monitor.reset()
        self.monitor.drop()
        reason = unsupported(trainer, pl_module, players=isinstance(self.loss_fn, Mapping))
        named = [q for q in self.monitor.quantities.values() if q.needs_update and q.name in self.monitor.named]
        if reason and named:
            raise Unmeasurable(f"{named[0].name} cannot be measured: {reason}")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in setup: the module may build itself in its own setup or configure_model, which come later.
        check_trains(trainer, pl_module, self.loss_fn, self.accumulate)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        observer, losses = self.observer, self.loss_fn if isinstance(self.loss_fn, Mapping) else None
        run = run_context(trainer, pl_module, self.monitor, loss_fn=self.loss_fn, prox=self.prox, seed=self.seed)
        loop = self._loop = LightningLoop(
            trainer, pl_module, run, has_loss_fn=self.loss_fn is not None, accumulate=self.accumulate,
            sub_batch=self.sub_batch,
        )  # fmt: skip
        observer.probes.drop(
            run.ranks.first(lambda: population(trainer.train_dataloader, trainer.world_size), "the population")
        )
        self._judges = list(self.subscribers)  # they leave when training ends
        self.forecast.begin_run(trainer, is_game=losses is not None, is_overridden=loop.overrides_step)
        self._loss_feed = LossFeed(self.monitor, run.ranks, is_shared=bool(self.subscribers))
        self._is_step_over = True  # also where the run before was interrupted within a step
        if not observer.step:  # not 0 where a run is resumed from a checkpoint that does not know this callback
            observer.step = trainer.global_step // (1 if losses is not None else max(1, len(trainer.optimizers)))
        # The sum of several players' losses need not fall.
        self.monitor.losses.comparable = len(trainer.optimizers) <= 1
        observer.begin_run(
            loop,
            trainer.optimizers,
            losses=None if losses is None else {name: loop.loss(0, loss) for name, loss in losses.items()},
            steps=steps_left(trainer, 0) if observer.step == 0 else math.inf,  # a resumed run goes on with what it has
        )
        if self.sub_batch is not None:
            warnings.warn(
                f"sub_batch={self.sub_batch}: sharpness and exponents are those of a sub-batch, not of the step",
                stacklevel=1,  # Lightning's, which calls us, may be filtered
            )
        if self.history:
            self._publisher.resume(trainer, self.history)
        self._publisher.stopwatch.start()

    # -- one step --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with self._publisher.stopwatch:
            observer = self.observer
            observer.check_update()
            self._agree(trainer)
            self._is_counted = False
            first = self._begins_step(trainer, batch_idx)
            scheduled = math.nan
            if first:
                self._has_loss = self._is_overflowed = False
                self.forecast.begin_step(trainer)
                if self.monitor.cadence.every_n_steps is None:  # otherwise the rate that comes has no say
                    scheduled = self.scheduled_courant(trainer)
            loss = self._loop.loss(batch_idx, None if isinstance(self.loss_fn, Mapping) else self.loss_fn)
            observer.begin_batch(batch, loss, first=first, scheduled=scheduled, has_backward=has_backward(trainer))

    def _begins_step(self, trainer: Any, batch_idx: int) -> bool:
        """Return True at the first micro-batch of a step."""
        if self.accumulate is None:
            return batch_idx % trainer.accumulate_grad_batches == 0
        begins, self._is_step_over = self._is_step_over, False
        return begins

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        self._has_loss = True
        is_returned = pl_module.automatic_optimization
        self.observer.loss(loss, scale=lambda: loss_scale(trainer), is_returned=is_returned)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        with self._publisher.stopwatch:
            if pl_module.automatic_optimization and not self._has_loss:  # training_step returned None
                self.observer.skip_update()
                # Lightning counts it. A gradient that was set to zero, not to None, moves what has momentum.
                moved = any(p.grad is not None for p in pl_module.parameters())
            else:
                overflowed = is_overflowed(trainer, optimizer)
                self._is_overflowed |= overflowed
                self._has_loss = False
                self.forecast.before_update(trainer)
                # Under manual optimisation the user may clear gradients at any time.
                gradients = (
                    (lambda: self._loop.clipped_gradients(optimizer)) if pl_module.automatic_optimization else None
                )
                moved = self.observer.before_update(optimizer, overflowed=overflowed, coming_gradients=gradients)
            self._count(moved=moved)

    def _count(self, *, moved: bool) -> None:
        """Count an optimizer step as Lightning does: of a player each, otherwise one in a batch."""
        self._is_step_over = True
        if not self._is_counted or self.observer.game is not None:
            self.observer.count(moved=moved)
        self._is_counted = True

    def _agree(self, trainer: Any) -> None:
        """Take the number of the next step from Lightning, which also counts those that nobody shows us."""
        # Under manual optimisation with one loss a step is a batch with updates, as in Lightning's rows.
        is_automatic = trainer.lightning_module.automatic_optimization and trainer.optimizers
        if self.observer.game is not None or is_automatic:
            self.observer.step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self._publisher.stopwatch:
            observer, publisher = self.observer, self._publisher
            is_changed = observer.check_gradient(CHANGED_GRADIENT, is_gone_allowed=True)
            if not is_changed and observer.updates > 1 and observer.game is None:
                observer.invalidate_update(
                    f"one batch made {observer.updates} optimizer steps: their joint update is not modelled"
                )
            self._agree(trainer)
            observer.check_update(last=False)
            completed = observer.after_update()
            sub_batch = None if self.sub_batch is None else observer.sub_batch or 0
            for observation in completed.observations:
                publisher.measured(observation.step)
                with self.monitor.warn_instead_of_raise("the schedule could not be looked ahead"):
                    observation = self.forecast.look_ahead(trainer, self.monitor, observation, observer.step)
                publisher.publish(trainer, observation, sub_batch=sub_batch)
                for subscriber in self.subscribers:
                    subscriber.receive(trainer, observation)
            if completed.fault is not None:
                publisher.publish(trainer, completed.fault, sub_batch=sub_batch)
            observer.step_loss.add_returned(outputs)
            if self._is_step_over if self.accumulate is not None else not is_accumulating(trainer):
                self._end_step(trainer, is_measured=bool(completed.observations))
            publisher.update_age(observer.step - 1)

    def _end_step(self, trainer: Any, *, is_measured: bool) -> None:
        """Tell the loss of a step to everybody, at each step: what one process needs for that is next to nothing."""
        observer = self.observer
        returned, differentiated = observer.step_loss.returned, observer.step_loss.differentiated
        if returned is not None:
            for listener in self.loss_listeners:
                listener(observer.step - 1, returned)
        loss = returned if trainer.lightning_module.automatic_optimization or differentiated is None else differentiated
        lr = largest_learning_rate(trainer.optimizers[0]) if trainer.optimizers else 0.0
        step = max(observer.step - 1, 0)
        arrived = self._loss_feed.add(step, loss, lr=lr, left_out=self._is_overflowed, wait=is_measured)
        for subscriber in self.subscribers:
            subscriber.end_step(trainer, observer.step - 1, arrived)

    # -- afterwards ------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        observer = self.observer
        observer.check_update()
        if self._loop.overrides_step and observer.is_pending and not self.history:
            self.monitor.warn_once(
                f"no optimizer step was seen: {type(pl_module).__name__}.optimizer_step must call "
                "optimizer.step(closure) of the optimizer that Lightning passes in"
            )
        self._loss_feed.finish(max(observer.step - 1, 0))
        # StabilityReport says it below its table.
        if not any(getattr(callback, "says_verdict", False) for callback in trainer.callbacks):
            rank_zero_info(sentence(self.verdict))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._close()
        if stage == "fit":
            with self.monitor.warn_instead_of_raise("the curves could not be sent to the process that started the run"):
                self._mailbox.send(trainer, packed(self.monitor, self.observer.step, self.verdict))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        self.monitor.close()
        self.observer.close()

    def state_dict(self) -> dict[str, Any]:
        monitor = self.monitor.state_dict(vectors=self.save_vectors)
        return {"step": self.observer.step, **self.forecast.state_dict(), "monitor": monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.observer.step = int(state_dict.get("step", 0))  # 0 is taken from the trainer
        self.forecast.load_state_dict(state_dict)
        self.monitor.load_state_dict(state_dict.get("monitor", {}))


def _check_settings(
    sub_batch: int | None,
    log_layers: Any,
    seed: int,
    accumulate: int | None,
    loss_fn: Any,
    prox: Prox | None,
) -> None:
    """Raise ValueError for settings that are wrong, or do not go together."""
    if sub_batch is not None:
        whole("sub_batch", sub_batch, 1, instead=", or None for the whole batch")
    if log_layers not in ("all", "summary"):
        whole("log_layers", log_layers, 1, instead=", or 'all' or 'summary'")
    whole("seed", seed, 0)
    if accumulate is not None:
        whole("accumulate", accumulate, 1, instead=" batches, or None")
    if isinstance(loss_fn, Mapping):
        check_losses(loss_fn)
        if sub_batch is not None:
            raise ValueError(f"sub_batch={sub_batch}: players are measured on whole batches; leave it out")
        if accumulate is not None:
            raise ValueError(f"accumulate={accumulate}: players that sum gradients are not modelled; leave it out")
        if prox is not None:
            raise ValueError("prox: what is done to the weights of players after their steps is not modelled")
