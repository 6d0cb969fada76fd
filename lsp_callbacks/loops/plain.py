"""A plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.monitor.configure import configured
from lsp_callbacks.monitor.history import Curve, Observation
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.nan_finder import NanFinder, finite
from lsp_callbacks.monitor.update_check import ELSEWHERE, UpdateCheck
from lsp_callbacks.report import Run, Verdict, judge
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.fingerprint import identical
from lsp_callbacks.step.pending_step import LossFn, PendingStep, never
from lsp_callbacks.step.probes import Criterion, ForwardFn, Probes, population
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.run_context import Prox, RunContext
from lsp_callbacks.step.side_effects import untouched
from lsp_callbacks.step.snapshot import Snapshot
from lsp_callbacks.step.verified_step import verified

Log = Callable[[dict[str, float], int], None]


class Watch:
    """Measures the stability of a loop whose only change is the iterator.

    The update is seen by hooks of the optimizer, which `close` removes. The loss is not seen at all: what is measured
    is the replay ``loss_fn(copy of the module, batch)``, after its gradient was found to be the step's own.

    Args:
        module: whose parameters are trained.
        optimizer: that updates them; ``torch.optim``.
        loss_fn: ``(module, batch) -> loss``: what the loop does with a batch as it comes from the loader, from its move
            to the device on, autocast included, up to the loss before it is divided by ``accumulate`` and scaled.
        monitor: what to measure and when; None takes the preset "default" within a budget of 5 %.
        accumulate: batches in an update, by which the loop divides each loss.
        forward_fn: ``(module, batch) -> outputs`` of shape ``(samples, ..., classes)``, and
        criterion: ``(outputs, batch) -> loss``, the mean over the samples: needed together, and only where ``loss_fn``
            does not return the value of one criterion of ``torch.nn.functional``.
        log: called with new values and the number of the update.
        clipping: how the loop clips before each update; where it is by norm, the optimizer holds all parameters.
        prox: what the loop makes of each parameter after ``optimizer.step()`` and before the next batch,
            ``(name, tensor, lr) -> tensor``, see `lsp_callbacks.functional.trajectory.proximal`. It is not
            applied, but enters the update map, and is compared with what the parameters really become.
        scaler: of mixed precision, where the loop scales its loss: its factor is part of the head-room of the gradient,
            and a gradient that has overflowed is no step.
        schedulers: one or several of ``torch.optim.lr_scheduler`` that move the optimizer's rate: `SGDLaw` tells their
            form. Where none are given, nothing is taken for known.
        unsupported: why the update is not the optimizer's step on this loss, where you know it; quantities that need
            the update are then skipped.
        seed: of our own random choices, which never touch the global state.

    Raises:
        ValueError: for ``accumulate`` below 1, one of ``forward_fn`` and ``criterion`` without the other, a
            scheduler that moves another optimizer.

    Cost: beside the measurements, one gradient for each measured step.

    Example:
        >>> import torch
        >>> from lsp_callbacks import Monitor, Sharpness
        >>> from lsp_callbacks.loops import Watch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> def loss_fn(module, x):
        ...     return module(x).square().mean()
        >>> watch = Watch(net, sgd, loss_fn, Monitor(Sharpness(), every_n_steps=1))
        >>> for batch in watch(torch.full((3, 1, 1), 2.0)):
        ...     sgd.zero_grad()
        ...     loss_fn(net, batch).backward()
        ...     sgd.step()
        >>> [round(value, 3) for value in watch.history["stability/courant_gd"].values]
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        monitor: Monitor | None = None,
        *,
        accumulate: int = 1,
        forward_fn: ForwardFn | None = None,
        criterion: Criterion | None = None,
        log: Log | None = None,
        clipping: Clipping | None = None,
        prox: Prox | None = None,
        scaler: torch.amp.GradScaler | None = None,
        schedulers: Any = (),
        unsupported: str | None = None,
        seed: int = 0,
    ):
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate}: give the number of batches in an update, 1 or more")
        self.module, self.optimizer, self.loss_fn, self.accumulate = module, optimizer, loss_fn, accumulate
        self.monitor = monitor if monitor is not None else configured()
        self.log, self.clipping, self.scaler = log, clipping, scaler
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            unsupported = unsupported or _several(torch.distributed.get_world_size())
        self.run = RunContext(
            seed=seed,
            prox=prox,
            schedulers=_schedulers(schedulers, optimizer),
            loss_name="loss_fn",
            captures_inputs=self.monitor.quantities.captures_inputs,
            unsupported=unsupported,
        )
        wanted = max((getattr(quantity, "probes", 0) for quantity in self.monitor.quantities.values()), default=0)
        self.probes = Probes(wanted, forward_fn, criterion)
        #: Whose criterion tells outputs from targets.
        self.probe_loss: Callable[[nn.Module, Any], Any] = loss_fn
        self._destination = UpdateCheck()
        self._published: Observation | None = None
        self.step = 0
        #: Seen since the last update.
        self.batches = 0
        self._required = False
        self._pending: PendingStep | None = None
        self._observation: Observation | None = None
        self._left_out = False
        self._guard = NanFinder(self.monitor)
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._seen: Tensor | None = None
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        )

    @property
    def history(self) -> dict[str, Curve]:
        """Steps and values of every key."""
        return self.monitor.history

    def __call__(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of the loader, unchanged: ``for batch in watch(loader): ...``."""
        if not self.probes.batch_size:  # nothing was collected yet
            self.probes.drop(population(loader))
        for batch in loader:
            self.begin(batch)
            yield batch
        self._check_update()

    def begin(self, batch: Any) -> None:
        """Called before the forward pass on a batch, by those who do not iterate over `__call__`."""
        if not self._required:
            self._require()
        self._check_update()
        first = self.batches in (0, self.accumulate)  # the second: a gradient scaler left the last update out
        if first:
            self.batches, self._pending, self._seen = 0, None, None
            self._guard.begin()
            if self.monitor.wants(self.step):
                with self.monitor.errors.warn_instead_of_raise("the step could not be kept for a replay"):
                    self._pending = PendingStep(self.module, run=self.run)
        self.monitor.recorder.begin(self.module, first=first)
        self.batches += 1
        self.probes.add(batch, self.module)
        self._guard.add(batch, self._loss)
        if self._pending is not None:
            self._pending.add(batch, self._loss)

    def measure(self) -> None:
        """Called where the gradient is complete; otherwise the hook of the optimizer does it.

        Where the gradient is changed afterwards, the numbers that depend on the update become NaN. A loop that clips in
        a way that ``clipping`` cannot say calls this before it: only those numbers are lost then.
        """
        if self.scaler is not None and not finite([p.grad for p in self.module.parameters() if p.grad is not None]):
            return  # the scaler will leave this update out
        self.monitor.record(self.step, self._seen, self.optimizer, self.module)
        if self._pending is None:
            return
        self._measure()
        if self.clipping is None:  # otherwise what comes is known
            self._gradients = [(p, p.grad.clone()) for p in self.module.parameters() if p.grad is not None]

    def record(self, loss: Tensor) -> None:
        """Tells the loss of a batch, as it is differentiated (divided by ``accumulate``), before the update.

        Called at every step it costs next to nothing, and `verdict` can say what the loss did; quantities of a time
        series (``dissipation``) need it. Otherwise the loss is known at the measured steps only.
        """
        self._seen = loss.detach() if self._seen is None else self._seen + loss.detach()

    @property
    def verdict(self) -> Verdict:
        """How the run went so far: state, cause, evidence, advice; `lsp_callbacks.report.sentence` says it in words."""
        return judge(Run.of(self.monitor, self.step))

    def close(self) -> None:
        """Takes the hooks from the optimizer, and from the module where energies look at its state."""
        self.monitor.recorder.close()
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The number of the next update, and the curves."""
        return {"step": self.step, "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; a window under way is cut."""
        self.step = state["step"]
        self.monitor.load_state_dict(state["monitor"])

    def _require(self) -> None:
        self._required = True
        step = Snapshot(self.step, self.module, never, self.optimizer, run=self.run, clipping=self.clipping)
        self.monitor.require(step)

    def _loss(self, module: nn.Module, batch: Any) -> Tensor:
        return self.loss_fn(module, batch) / self.accumulate

    def _measure(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self.monitor.errors.warn_instead_of_raise("the step could not be looked at"), untouched(self.module):
            probes = None
            if self.probes.wanted:
                probes = self.probes.probe_set(pending, self.probe_loss, micro_batches=self.accumulate)
            snapshot = pending.snapshot(
                self.step,
                self.optimizer,
                clipping=self.clipping,
                probes=probes,
                scale=1.0 if self.scaler is None else float(self.scaler.get_scale()),
            )
            if (factor := self._factor) is not None:
                own = (snapshot.gradient or {}).items()
                snapshot = replace(snapshot, gradient={name: g if g is None else g / factor for name, g in own})
            snapshot = verified(snapshot)
            if self._seen is None and snapshot.loss is not None:  # nobody tells it
                self.monitor.losses.saw(self.step, snapshot.loss)
            self._observation = self.monitor.observe(snapshot)
            if self.run.prox is not None and any(q.needs_update for q in self.monitor.quantities.values()):
                self._destination.awaited()
                self._destination.expect(snapshot)

    @property
    def _factor(self) -> Any:
        """Of a gradient scaler, if the gradient still holds it: fused optimizers divide it out by themselves."""
        return getattr(self.optimizer, "grad_scale", None)

    def _check_update(self) -> None:
        """Whether the parameters are where step and prox should have brought them, at the end of the loop's body."""
        if not self.batches and self._destination.missed():  # otherwise the update has not been made
            self.monitor.invalidate_update_metrics(self._published, ELSEWHERE)
            self._published = None

    def _before_update(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        overflow = getattr(optimizer, "found_inf", None)  # of a gradient scaler, which leaves the update to fused ones
        self._left_out = overflow is not None and bool(overflow)
        if self._left_out:
            self._pending, self._gradients = None, []
            return
        if any(callable(one) for one in (*args[1:], *kwargs.values())):
            self._pending = None  # its gradient comes later
            self.monitor.invalidate_update_metrics(
                None, "optimizer.step(closure) finds its gradient after our look at it: call backward before step()"
            )
        self.monitor.record(self.step, self._seen, self.optimizer, self.module)
        if self._seen is not None:
            self.monitor.losses.saw(self.step, self._seen)
        fault = None
        with self.monitor.errors.warn_instead_of_raise("whether the step is finite could not be told"):
            pending, left_out = (lambda: PendingStep(self.module, run=self.run)), self._factor is not None
            fault = self._guard.look(self.step, self.module, pending, ranks=Ranks(), left_out=left_out)
        self._measure()
        if fault is not None:
            seen = self._observation or Observation(self.step, {})
            self._observation = self.monitor.history.add(seen, {"stability/nonfinite_step": float(self.step)})
        if any(p.grad is None or not identical(p.grad, gradient) for p, gradient in self._gradients):
            self._observation = self.monitor.invalidate_update_metrics(
                self._observation, "the gradient was changed after Watch.measure()"
            )
        self._gradients = []

    def _after_update(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._left_out:  # nothing has moved
            self.batches, self._observation = 0, None
            return
        observation, self._observation = self._observation, None
        self._published = observation
        if observation is not None and self.log is not None:
            self.log(dict(observation.values), observation.step)
        self.step, self.batches, self._seen = self.step + 1, 0, None


def _several(processes: int) -> str | None:
    if processes == 1:
        return None
    return f"{processes} processes: a loop of one's own is measured in one, Lightning's Trainer with 'ddp' in several"


def _schedulers(given: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, ...] | None:
    """None where none are given: then nobody knows."""
    found = tuple(given) if isinstance(given, list | tuple) else (given,)
    for one in found:
        if not moves(one, optimizer):
            raise ValueError(f"schedulers={one!r} does not move this optimizer's rate: give those that do, or none")
    return found or None


def moves(scheduler: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is this optimizer's, which Fabric and accelerate wrap."""
    moved = getattr(scheduler, "optimizer", None)
    return getattr(moved, "optimizer", moved) is optimizer
