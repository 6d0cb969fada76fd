"""The callback that measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_info

from lsp_callbacks._validation import whole
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.custom_clipping import Gradients, own_clipping
from lsp_callbacks.callbacks.lightning_step import (
    clipped,
    clipping,
    loss_scale,
    overridden,
    pending_step,
    probe_set,
    ranks,
    scaled,
    schedulers,
    sharded,
    skipped,
    step_loss,
    unscaled,
    unsupported,
    warn_sub_batch,
)
from lsp_callbacks.callbacks.logging import Stopwatch, log, show, thinned
from lsp_callbacks.callbacks.lr_forecast import CriticalRate, Schedule, steps_left
from lsp_callbacks.callbacks.multi_optimizer import Game, check_losses
from lsp_callbacks.callbacks.shared_losses import SharedLosses
from lsp_callbacks.callbacks.spawned_history import Mailbox
from lsp_callbacks.callbacks.step_loss import StepLoss
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.numerics.first_fault import Fault
from lsp_callbacks.monitor.configure import configured
from lsp_callbacks.monitor.history import Curve, Observation
from lsp_callbacks.monitor.losses import Told
from lsp_callbacks.monitor.nan_finder import NanFinder, first_fault_of
from lsp_callbacks.monitor.update_check import ELSEWHERE, MOVED, UpdateCheck
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.quantities.module_filter import Selection
from lsp_callbacks.report import Run, Verdict, judge, sentence
from lsp_callbacks.step.batch import batch_size
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.fingerprint import identical
from lsp_callbacks.step.flat import largest_learning_rate
from lsp_callbacks.step.pending_step import LossFn, PendingStep, never
from lsp_callbacks.step.probes import Criterion, ForwardFn, Probes, population
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.run_context import Prox, RunContext
from lsp_callbacks.step.side_effects import untouched
from lsp_callbacks.step.snapshot import Snapshot
from lsp_callbacks.step.verified_step import verified

#: How many steps of the schedule to look ahead.
HORIZON = 1000


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
        self.monitor = configured(
            quantities, every_n_steps=every_n_steps, budget=budget, window=window, average=average, layers=layers,
            blocks=blocks, strict=strict, max_memory=max_memory, time_limit=time_limit,
        )  # fmt: skip
        self.sub_batch, self.layers, self.blocks = sub_batch, layers, blocks
        self.accumulate = accumulate
        self.log_layers, self.loss_fn, self.save_vectors, self.seed = log_layers, loss_fn, save_vectors, seed
        wanted = max((getattr(quantity, "probes", 0) for quantity in self.monitor.quantities.values()), default=0)
        self.probes = Probes(wanted, forward_fn, criterion)
        self.prox = prox
        self._destination = UpdateCheck()
        self._mailbox = Mailbox()
        self._verdict: Verdict | None = None  # of a run in other processes, which knew more than comes home
        self._published: Observation | None = None
        self.subscribers: list[Any] = []
        self._judges: list[Any] = []
        self.step = 0
        self._previous: int | None = None
        self._counted, self._stepped = False, True
        self._ranks = Ranks()
        self._run = RunContext()
        self._overrides = False
        self._pending: PendingStep | None = None
        self._saw_loss = False
        self._step_loss = StepLoss()
        self._shared: SharedLosses | None = None
        self._seen: torch.Tensor | None = None
        self._observations: list[Observation] = []
        self._game: Game | None = None
        self._guard = NanFinder(self.monitor)
        self._fault: Observation | None = None
        self._gradients: Gradients = []
        self._watching = False
        self._updates = 0
        self._measured_at: int | None = None
        self._age = torch.zeros(())
        self._critical = CriticalRate()
        self._schedule: Schedule | None = None
        self._stopwatch = Stopwatch()
        self._rate_used = self._rate_before = 0.0
        self._samples = 0

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

    def _bring_home(self) -> None:
        if (sent := self._mailbox.receive()) is not None:
            self.step = sent["step"]
            for mine, of_run in ((self.monitor.skipped, sent["skipped"]), (self.monitor.paths, sent["paths"])):
                mine.clear()
                mine.update(of_run)
            self.monitor.history.replace({key: Curve(*curve) for key, curve in sent["history"].items()})
            self.monitor.courant.load_state_dict(sent["courant"])
            self.monitor.losses.load_state_dict(sent["losses"])
            self._verdict = Verdict(**sent["verdict"])

    @property
    def courant_source(self) -> str | None:
        """What ``stability/courant`` is: "courant_sgd" or "courant_gd" for the whole run; None before it is decided."""
        self._bring_home()
        return self.monitor.courant.name

    @property
    def fault(self) -> Fault | None:
        """What made the first NaN or Inf of the run, where "numerics" is among the quantities; see `NanFinder`."""
        return first_fault_of(self.monitor)

    # -- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self._verdict = None
        if trainer.global_step == 0:  # a new run; one that is resumed loads its state after this
            self.step, self._previous, self._measured_at, self._critical = 0, None, None, CriticalRate()
            self.monitor.reset()
        self.monitor.drop()
        unsupported = self._why_unsupported(trainer, pl_module)
        named = [
            q for q in self.monitor.quantities.values() if q.needs_update and q.name in self.monitor.quantities.named
        ]
        if unsupported and named:
            raise Unmeasurable(f"{named[0].name} cannot be measured: {unsupported}")

    def _why_unsupported(self, trainer: Any, pl_module: Any) -> str | None:
        players = isinstance(self.loss_fn, Mapping)
        return unsupported(trainer, pl_module, players=players)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in setup: the module may build itself in its own setup or configure_model, which come later.
        if not any(p.requires_grad for p in pl_module.parameters()):
            raise ValueError(
                f"{type(pl_module).__name__} has no parameter that requires a gradient: nothing is trained"
            )
        if not pl_module.automatic_optimization and self.loss_fn is None:
            several = len(trainer.optimizers or ()) > 1
            form = "{'generator': lambda module, batch: ..., 'critic': ...}" if several else "lambda module, batch: ..."
            which = ", one for each optimizer, in the order in which configure_optimizers returns them" * several
            raise ValueError(
                "automatic_optimization=False: the loss of a step cannot be told from training_step; pass "
                f"StabilityMonitor(loss_fn={form}) which returns it{which}"
            )
        if pl_module.automatic_optimization and self.accumulate is not None:
            raise ValueError(
                f"accumulate={self.accumulate} is for manual optimisation: here Trainer(accumulate_grad_batches=...) is"
            )
        if pl_module.automatic_optimization and isinstance(self.loss_fn, Mapping):
            raise ValueError(
                "loss_fn names several players, whose optimizers take turns: that needs automatic_optimization=False; "
                "otherwise pass one function"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._ranks = self.probes.ranks = self._destination.ranks = ranks(trainer)
        self.probes.drop(
            self._ranks.first(lambda: population(trainer.train_dataloader, trainer.world_size), "the population")
        )
        self._judges = list(self.subscribers)  # they leave when training ends
        self._shared = SharedLosses(self._ranks) if self._ranks.world > 1 and self.subscribers else None
        self._schedule = Schedule(trainer)
        self._overrides = overridden(pl_module, "optimizer_step") is not None
        self._destination.forget()
        # A run that was interrupted within a step has left its own.
        self._published, self._stepped, self._fault = None, True, None
        self._observations, self._gradients, self._watching = [], [], False
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        if not self.step:  # not 0 where a run is resumed from a checkpoint that does not know this callback
            takes_turns = isinstance(self.loss_fn, Mapping)
            self.step = trainer.global_step // (1 if takes_turns else max(1, len(trainer.optimizers)))
        one_loss = not isinstance(self.loss_fn, Mapping)
        self._run = RunContext(
            ranks=self._ranks,
            seed=self.seed,
            prox=self.prox,
            schedulers=schedulers(trainer, optimizer) if one_loss else None,
            loss_name="loss_fn" if one_loss and self.loss_fn is not None else None,
            captures_inputs=self.monitor.quantities.captures_inputs,
            unsupported=self._why_unsupported(trainer, pl_module),
            sharded=sharded(trainer),
        )
        settings: dict[str, Any] = {"run": self._run, "clipping": clipping(trainer)}
        # The sum of several players' losses need not fall.
        self.monitor.losses.comparable = len(trainer.optimizers) <= 1
        if isinstance(self.loss_fn, Mapping):
            self._leave_game()
            self._game = Game(
                trainer, self.loss_fn, lambda: self._kept(trainer, pl_module), self.monitor.errors.warn_instead_of_raise
            )
            for player in self._game.players():
                one = player.optimizers[player.name]
                self.monitor.require(Snapshot(self.step, pl_module, never, one, player=player, **settings))
        else:
            self.monitor.require(
                Snapshot(self.step, pl_module, replay=never, optimizer=optimizer, **settings),
                steps=steps_left(trainer, 0) if self.step == 0 else math.inf,  # a resumed run goes on with what it has
            )
        if self.sub_batch is not None:
            warn_sub_batch(self.sub_batch)
        if self.history:  # resumed: stock callbacks find their key before the next measurement, too
            self._measured_at = max(curve.steps[-1] for curve in self.history.values())
            last = {key: [v for v in curve.values if math.isfinite(v)][-1:] for key, curve in self.history.items()}
            show(trainer, {key: values[0] for key, values in last.items() if values}, age=self._age)
        self._stopwatch.start()

    # -- one step --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with self._stopwatch:
            self._arrive(pl_module)
            self._agree(trainer)
            self._published, self._counted = None, False
            first = self._begins(trainer, batch_idx)
            if first:
                self._pending, self._updates, self._saw_loss, self._seen = None, 0, False, None
                self._step_loss.begin()
                self._guard.begin()
                self._rate_before = largest_learning_rate(trainer.optimizers[0]) if self._overrides else 0.0
                if self._game is not None:
                    with self.monitor.errors.warn_instead_of_raise("the batch could not be kept for a replay"):
                        self._game.begin(batch)
                else:
                    self._pending = self._kept(trainer, pl_module)
            self.monitor.recorder.begin(pl_module, first=first)
            if self.monitor.quantities:
                self.probes.add(batch, pl_module)
            if not isinstance(self.loss_fn, Mapping):
                loss = step_loss(trainer, self.loss_fn, batch_idx, self.accumulate)
                self._guard.add(batch, loss)
                if self._pending is not None:
                    self._pending.add(batch, loss)

    def _begins(self, trainer: Any, batch_idx: int) -> bool:
        """Whether it is the first micro-batch of a step."""
        if self.accumulate is None:
            return batch_idx % trainer.accumulate_grad_batches == 0
        begins, self._stepped = self._stepped, False
        return begins

    def _kept(self, trainer: Any, pl_module: Any) -> PendingStep | None:
        """What the coming step must be replayed from, if it is to be measured."""
        known = self.monitor.cadence.every_n_steps is not None  # then the rate that comes has no say
        scheduled = math.nan if known else self.scheduled_courant(trainer)
        wanted = self.monitor.wants(self.step, scheduled=scheduled)
        if wanted and not trainer.fit_loop._skip_backward:  # an epoch of weight averaging
            with self.monitor.errors.warn_instead_of_raise("the step could not be kept for a replay"):
                return pending_step(
                    trainer, pl_module, own_loss=self.loss_fn is not None, sub_batch=self.sub_batch,
                    run=self._run,
                )  # fmt: skip
        return None

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        if self._pending is not None:
            self._pending.saw_loss(unscaled(trainer, loss))
        if self.monitor.trace is not None:
            own = unscaled(trainer, loss).detach()
            self._seen = own if self._seen is None else self._seen + own
        if not pl_module.automatic_optimization:  # otherwise training_step returns it, at no cost
            self._step_loss.saw(unscaled(trainer, loss))
        self._guard.saw_loss(loss)
        self._saw_loss = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        with self._stopwatch:
            no_loss = pl_module.automatic_optimization and not self._saw_loss  # training_step returned None
            left_out = not no_loss and skipped(trainer, optimizer)
            self._step_loss.left_out |= left_out
            if not no_loss:
                with self.monitor.errors.warn_instead_of_raise("whether the step is finite could not be told"):
                    self._look(trainer, pl_module, left_out or scaled(trainer, optimizer))
            if no_loss or left_out:
                # Lightning counts it. A gradient that was set to zero, not to None, moves what has momentum.
                self._count(moved=no_loss and any(p.grad is not None for p in pl_module.parameters()))
                self._pending = None
                if self._game is not None:
                    self._game.drop()
                return
            self._saw_loss = False
            self._rate_used = largest_learning_rate(trainer.optimizers[0])
            self._updates += 1
            if self._updates == 1:
                self.monitor.record(self.step, self._seen, trainer.optimizers[0], pl_module, previous=self._previous)
            pending, self._pending = self._pending, None
            if self._game is not None:
                with self.monitor.errors.warn_instead_of_raise("the player's step could not be looked at"):
                    self._observe_player(self._game, pl_module, optimizer)
            elif pending is not None:
                update = any(quantity.needs_update for quantity in self.monitor.quantities.values())
                if update and self._checks:
                    self._destination.awaited()
                with self.monitor.errors.warn_instead_of_raise("the step could not be looked at"), untouched(pl_module):
                    self._note(self._observe(trainer, pending, optimizer))
                if update and pl_module.automatic_optimization:  # otherwise the user may clear gradients at any time
                    self._watching = True  # on every rank, also where the copy fails
                    with self.monitor.errors.warn_instead_of_raise(
                        "whether the gradient is changed later could not be watched"
                    ):
                        self._gradients = self._gradients or clipped(trainer, optimizer)
            self._count()

    def _count(self, *, moved: bool = True) -> None:
        """An optimizer step, as Lightning counts them: of a player each, otherwise one in a batch."""
        self._stepped = True
        if self._counted and self._game is None:
            return
        self._previous = self.step if moved else self._previous
        self.step, self._counted = self.step + 1, True

    def _agree(self, trainer: Any) -> None:
        """The number of the next step is Lightning's, which also counts those that nobody shows us."""
        # Under manual optimisation with one loss a step is a batch with updates, as in Lightning's rows.
        if self._game is not None or (trainer.lightning_module.automatic_optimization and trainer.optimizers):
            self.step = trainer.global_step

    def _look(self, trainer: Any, pl_module: Any, left_out: bool) -> None:
        again = self._updates > 0 and not pl_module.automatic_optimization  # LBFGS evaluates the loss anew
        step = self.step - (self._updates > 0)
        fault = self._guard.look(
            step,
            pl_module,
            lambda: pending_step(trainer, pl_module, own_loss=self.loss_fn is not None),
            ranks=self._ranks,
            left_out=left_out,
            moved="an earlier update of the same batch has moved the parameters" if again else None,
        )
        if fault is not None:
            self._fault = self.monitor.history.add(Observation(step, {}), {"stability/nonfinite_step": float(step)})

    def _observe_player(self, game: Game, pl_module: Any, optimizer: Any) -> None:
        with game.turn(optimizer) as snapshot:
            if snapshot is not None:
                with untouched(pl_module):
                    self._note(self.monitor.observe(snapshot(self.step, previous=self._previous)))

    def _note(self, observation: Observation | None) -> None:
        if observation is not None:
            self._observations.append(observation)

    def _observe(self, trainer: Any, pending: PendingStep, optimizer: Any) -> Observation | None:
        if self.sub_batch is not None:
            sizes = [batch_size(part.batch) or self.sub_batch for part in pending.parts]
            self._samples = min(self.sub_batch, sum(sizes))
        rule, self._gradients = self._clipping(trainer, pending, optimizer)
        snapshot = pending.snapshot(
            self.step,
            optimizer,
            clipping=rule,
            probes=probe_set(trainer, self.probes, pending, self.accumulate) if self.probes.wanted else None,
            scale=loss_scale(trainer),
            previous=self._previous,
        )
        # Under manual optimisation nobody need have told us the loss.
        snapshot = verified(snapshot) if snapshot.loss is None else snapshot
        observation = self.monitor.observe(snapshot)
        if self._destination.is_awaited:
            with self.monitor.errors.warn_instead_of_raise("where the step leads could not be told"):
                own = {name: p.grad for name, p in snapshot.parameters.items()}  # not that of a sub-batch
                self._destination.expect(replace(snapshot, gradient=own, clipping=rule))
        return observation

    @property
    def _checks(self) -> bool:
        """Whether something of the user's has a say in where the parameters go, so that it is checked."""
        return self.prox is not None or self._overrides

    def _clipping(self, trainer: Any, pending: PendingStep, optimizer: Any) -> tuple[Clipping | None, Gradients]:
        """How the gradient will be clipped, and what it will be if that is up to the user's own method."""
        module = trainer.lightning_module
        mine = overridden(module, "configure_gradient_clipping")
        if mine is None or not module.automatic_optimization or pending.module_copy is None or self.monitor.invalidated:
            return clipping(trainer), []
        reset = pending.module_copy.reset
        try:
            return self._ranks.together(self._ranks.private(lambda: own_clipping(trainer, reset, optimizer)))
        except Exception as error:  # whatever the user's method raises on a copy
            reason = str(error) if isinstance(error, Unmeasurable) else f"{mine}: {type(error).__name__}: {error}"
            self.monitor.invalidate_update_metrics(None, reason)
            return None, []

    def _arrive(self, pl_module: Any, *, last: bool = True) -> None:
        """The parameters should be where step and prox lead, at the latest when nothing comes any more."""
        # Where there is no prox, nothing has to be done to them after ``optimizer_step``.
        if self._destination.missed(last=last or self.prox is None):
            kind = type(pl_module).__name__
            self._invalidate(ELSEWHERE if self.prox is not None else f"{kind}.optimizer_step {MOVED}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self._stopwatch:
            changed = False
            if self._watching:
                with self.monitor.errors.warn_instead_of_raise("whether the gradient was changed could not be told"):
                    changed = self._ranks.any(self._gradient_changed, "the gradient after the step")
            if changed:
                self._invalidate("the gradient was changed after the on_before_optimizer_step of StabilityMonitor")
            elif self._updates > 1 and self._game is None:
                self._invalidate(f"one batch made {self._updates} optimizer steps: their joint update is not modelled")
            self._gradients, self._watching = [], False
            self._agree(trainer)
            self._arrive(pl_module, last=False)
            observations, self._observations = self._observations, []
            for observation in observations:
                self._measured_at = observation.step
                with self.monitor.errors.warn_instead_of_raise("the schedule could not be looked ahead"):
                    observation = self._look_ahead(trainer, observation)
                self._published = observation
                self._publish(trainer, observation)
                for subscriber in self.subscribers:
                    subscriber.receive(trainer, observation)
            if self._fault is not None:
                self._publish(trainer, self._fault)
                self._fault = None
            self._step_loss.returned(outputs)
            if self._stepped if self.accumulate is not None else not trainer.fit_loop._should_accumulate():
                self._judge(trainer, measured=bool(observations))
            if self._measured_at is not None:  # the tensor that lies in callback_metrics: reading that dict is dear
                self._age.fill_(self.step - 1 - self._measured_at)

    def _judge(self, trainer: Any, *, measured: bool) -> None:
        # At each step: what one process needs is next to nothing.
        step, loss, left_out = self.step - 1, self._step_loss.value, self._step_loss.left_out
        if self._shared is None:
            told = self.monitor.losses.saw(max(step, 0), loss, left_out=left_out)
        else:
            lr = largest_learning_rate(trainer.optimizers[0]) if trainer.optimizers else 0.0
            told = self._shared.take(max(step, 0), loss, lr=lr, left_out=left_out, wait=measured)
            self._tell(told)
        # Losses and measurements are the same numbers on all processes, so all of them stop at the same step.
        if any([subscriber.judge(trainer, step, told) for subscriber in self.subscribers]):
            trainer.should_stop = True

    def _tell(self, told: Sequence[Told]) -> None:
        """Note losses that have arrived from all processes."""
        for each in told:
            self.monitor.losses.add(each)
        if self._shared is not None and not self._shared.same_rates:
            self.monitor.errors.warn_once(
                "the learning rates of the processes differ, so that StopOnInstability does not look at the rate that "
                "the schedule brings next: give all of them the same (a metric that a scheduler watches needs "
                "sync_dist=True)"
            )

    def _gradient_changed(self) -> bool:
        return any(p.grad is not None and not identical(p.grad, gradient) for p, gradient in self._gradients)

    def _invalidate(self, reason: str) -> None:
        found, self._observations = self._observations, []
        own = self.monitor.invalidate_update_metrics(found[0] if found else self._published, reason)
        self._note(own if found else None)

    def _publish(self, trainer: Any, observation: Observation) -> None:
        values = thinned(observation.values, self.log_layers)
        values["stability/overhead"] = self.overhead
        if self.sub_batch is not None:
            values["stability/sub_batch"] = float(self._samples)
        show(trainer, values, age=self._age)
        log(trainer, values)

    def scheduled_courant(self, trainer: Any) -> float:
        """The rate that the optimizer has now, before it is used, over the mean of the last critical rates; or NaN.

        Players have rates of their own, and no common schedule: NaN.
        """
        differ = self._shared is not None and not self._shared.same_rates
        critical = math.nan if differ or self._game is not None else self._critical.mean
        return (
            largest_learning_rate(trainer.optimizers[0]) / critical if trainer.optimizers and critical > 0 else math.nan
        )

    def _look_ahead(self, trainer: Any, observation: Observation) -> Observation:
        """Adds ``stability/steps_to_edge`` where the schedule will cross the critical rate."""
        if self._game is not None or not self._critical.take(observation.values, used=self._rate_used):
            return observation
        assert self._schedule is not None
        left = max(1, min(HORIZON, steps_left(trainer, self.step)))
        crossing = self._critical.crossing(self._schedule.ahead(self.step, left))
        kept = self._schedule.confirmed and self._rate_used == self._rate_before
        if self._overrides and not kept:  # ``optimizer_step`` sets rates of its own
            return observation
        if crossing is None or self._rate_used > self._critical.mean:
            return observation
        return self.monitor.history.add(observation, {"stability/steps_to_edge": crossing + 1.0})

    @property
    def overhead(self) -> float:
        """Measured share of the time since training began that went into measuring."""
        return self._stopwatch.share

    # -- afterwards ------------------------------------------------------------------------------------------------

    @property
    def verdict(self) -> Verdict:
        """How the run went so far, or went: state, cause, evidence, advice."""
        self._bring_home()
        return self._verdict or judge(Run.of(self.monitor, self.step, self._judges))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._arrive(pl_module)
        self._tell_unseen(pl_module)
        if self._shared is None:
            self.monitor.losses.saw(max(self.step - 1, 0), None, wait=True)
        else:
            self._tell(self._shared.rest())
        # StabilityReport says it below its table.
        if not any(getattr(callback, "says_verdict", False) for callback in trainer.callbacks):
            rank_zero_info(sentence(self.verdict))

    def _tell_unseen(self, pl_module: Any) -> None:
        if self._overrides and self._pending is not None and not self.history:
            self.monitor.errors.warn_once(
                f"no optimizer step was seen: {type(pl_module).__name__}.optimizer_step must call "
                "optimizer.step(closure) of the optimizer that Lightning passes in"
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._let_go()
        if stage == "fit":
            self._send_home(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._let_go()

    def _send_home(self, trainer: Any) -> None:
        curves = {key: (curve.steps, curve.values) for key, curve in self.monitor.history.items()}
        contents = {
            "history": curves, "step": self.step, "skipped": self.monitor.skipped, "paths": self.monitor.paths,
            "courant": self.monitor.courant.state_dict(), "losses": self.monitor.losses.state_dict(),
        }  # fmt: skip
        with self.monitor.errors.warn_instead_of_raise(
            "the curves could not be sent to the process that started the run"
        ):
            told = self.verdict
            verdict = vars(told) | {"evidence": dict(told.evidence)}
            self._mailbox.send(trainer, {**contents, "verdict": verdict})

    def _let_go(self) -> None:
        self.monitor.recorder.close()
        self._leave_game()

    def _leave_game(self) -> None:
        if self._game is not None:
            self._game.close()
        self._game = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "critical": self._critical.known,
            "stochastic": self._critical.stochastic,
            "monitor": self.monitor.state_dict(vectors=self.save_vectors),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict.get("step", 0))  # 0 is taken from the trainer
        self._critical = CriticalRate(state_dict.get("critical", ()), state_dict.get("stochastic", False))
        self.monitor.load_state_dict(state_dict.get("monitor", {}))
