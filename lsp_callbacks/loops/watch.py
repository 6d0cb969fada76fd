"""A plain PyTorch loop, whose only change is its iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.loops.capped_loop import CappedLoop
from lsp_callbacks.loops.plain_loop import PlainLoop, check_schedulers, processes_of, why_unsupported
from lsp_callbacks.monitor.configure import configured
from lsp_callbacks.monitor.history import History
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.nan_finder import finite
from lsp_callbacks.monitor.observer import StepObserver
from lsp_callbacks.report import Run, Verdict, judge
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.pending_step import LossFn
from lsp_callbacks.step.probes import Criterion, ForwardFn, population
from lsp_callbacks.step.run_context import Prox, RunContext
from lsp_callbacks.step.shards import Shards

Log = Callable[[dict[str, float], int], None]

CLOSURE = "optimizer.step(closure) computes its gradient after it was measured: call backward before step()"


class Watch:
    """Measures the stability of a loop whose only change is the iterator.

    Hooks of the optimizer, which `close` removes, observe the update. The loss of the loop is not observed: what is
    measured is the replay ``loss_fn(copy of the module, batch)``, after its gradient was compared with the step's.

    Args:
        module: whose parameters are trained.
        optimizer: that updates them; ``torch.optim``.
        loss_fn: ``(module, batch) -> loss``: what the loop does with a batch as it comes from the loader, from its move
            to the device on, autocast included, up to the loss before it is divided by ``accumulate`` and scaled.
        monitor: what to measure and when; None takes the preset "default" within a budget of 5 %.
        accumulate: batches in an update, by which the loop divides each loss.
        forward_fn: ``(module, batch) -> outputs`` of shape ``(samples, ..., classes)``, and
        criterion: ``(outputs, batch) -> loss``, the mean over the samples: needed together, and only where ``loss_fn``
            does not return the value of one criterion of ``torch.nn.functional``. The gradient of the two is compared
            with that of ``loss_fn`` now and then: it has to be all of it.
        log: called with new values and the number of the update.
        clipping: how the loop clips before each update; where it is by norm, the optimizer holds all parameters.
        prox: what the loop makes of each parameter after ``optimizer.step()`` and before the next batch,
            ``(name, tensor, lr) -> tensor``, see `lsp_callbacks.functional.trajectory.proximal`. It is not
            applied, but enters the update map, and is compared with the parameters after the step.
        scaler: of mixed precision, where the loop scales its loss: its factor is part of the head-room of the gradient,
            and a gradient that has overflowed is no step.
        schedulers: one or several of ``torch.optim.lr_scheduler`` that set the optimizer's rate, for `SGDLaw`, which
            knows their form. Without them the form of the schedule is unknown.
        cap: keep the rate of each update below this share of the critical one, as `CapLearningRate` does: lowered right
            before the optimizer's step and put back right after, so that schedulers see their own. It goes by the loss
            of each step, see `record`. The first update is not capped; None caps nothing.
        unsupported: why the update is not the optimizer's step on this loss, where you know it; quantities that need
            the update are then skipped.
        seed: of our own random choices, which never touch the global state.

    Raises:
        ValueError: for ``accumulate`` below 1, one of ``forward_fn`` and ``criterion`` without the other, a
            scheduler that sets the rate of another optimizer; a ``cap`` with ``prox``, or for an optimizer without a
            critical rate; at the first update, a ``cap`` without recorded losses or without ``stability/courant``.

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
        cap: float | None = None,
        unsupported: str | None = None,
        seed: int = 0,
    ):
        self.module, self.optimizer, self.accumulate, self.log = module, optimizer, accumulate, log
        self.monitor = monitor if monitor is not None else configured()
        ranks = processes_of(module)
        run = RunContext(
            ranks=ranks, shards=Shards.of(module, ranks), seed=seed, prox=prox,
            schedulers=check_schedulers(schedulers, optimizer), loss_name="loss_fn",
            captures_inputs=self.monitor.quantities.captures_inputs,
            unsupported=unsupported or why_unsupported(module),
        )  # fmt: skip
        self.loop = PlainLoop(module, run, loss_fn, accumulate=accumulate, clipping=clipping, scaler=scaler)
        self.observer = StepObserver(self.monitor, forward_fn=forward_fn, criterion=criterion)
        #: Batches since the last update.
        self.batches = 0
        if cap is not None and prox is not None:
            raise ValueError("cap and prox: the map after the step reads the scheduled rate; leave one of the two out")
        self.capped = None if cap is None else CappedLoop(cap, self.observer, optimizer)
        self._is_begun = self._is_skipped = False
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        )

    @property
    def step(self) -> int:
        """Number of the next update."""
        return self.observer.step

    @step.setter
    def step(self, number: int) -> None:
        self.observer.step = number

    @property
    def history(self) -> History:
        """Steps and values of every key."""
        return self.monitor.history

    @property
    def verdict(self) -> Verdict:
        """How the run went so far: state, cause, evidence, advice; `lsp_callbacks.report.sentence` says it in words."""
        return judge(Run.of(self.monitor, self.step))

    def __call__(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of the loader, unchanged: ``for batch in watch(loader): ...``."""
        if not self.observer.probes.batch_size:  # nothing was collected yet
            self.observer.probes.drop(population(loader, self.loop.run.ranks.world))
        for batch in loader:
            self.begin(batch)
            yield batch
        self._check_update()

    def begin(self, batch: Any) -> None:
        """Take in a batch before its forward pass; for those who do not iterate over `__call__`."""
        self._begin_run()
        self._check_update()
        first = self.batches in (0, self.accumulate)  # the second: a gradient scaler left the last update out
        self.batches = 1 if first else self.batches + 1
        self.observer.begin_batch(batch, self.loop.loss, first=first)

    def record(self, loss: Tensor) -> None:
        """Take in the loss of a batch, as it is differentiated (divided by ``accumulate``), before the update.

        Called at every step it costs next to nothing, and `verdict` can say what the loss did; quantities of a time
        series (``dissipation``) need it. Otherwise the loss is known at the measured steps only.
        """
        self.observer.loss(loss)

    def measure(self) -> None:
        """Measure the step where its gradient is complete; otherwise the hook of the optimizer does it.

        Where the gradient is changed afterwards, the numbers that depend on the update become NaN. A loop that clips in
        a way that ``clipping`` cannot say calls this before it: only those numbers are lost then.
        """
        parameters = list(self.module.parameters())
        if self.loop.scaler is not None and not finite([p.grad for p in parameters if p.grad is not None]):
            return  # the scaler will leave this update out
        self._begin_run()
        if self.capped is not None:
            self.capped.lower_next()
        self.observer.record(self.optimizer)
        # With a ``clipping`` it is known what the gradient becomes.
        coming = (lambda: {p: p.grad for p in parameters if p.grad is not None}) if self.loop.clipping is None else None
        self.observer.measure(self.optimizer, coming_gradients=coming)

    def close(self) -> None:
        """Remove the hooks from the optimizer, and from the module where energies look at its state."""
        self.observer.close()
        if self.capped is not None:
            self.capped.close()
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the next update, and the curves."""
        cap = None if self.capped is None else self.capped.cap.state_dict()
        return {"step": self.step, "monitor": self.monitor.state_dict(), "cap": cap}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; a window under way is cut."""
        self.observer.step, self.observer.previous = state["step"], None
        self.monitor.load_state_dict(state["monitor"])
        if self.capped is not None and state["cap"] is not None:
            self.capped.cap.load_state_dict(state["cap"])

    def _mean_loss(self, loss: Tensor) -> Tensor:
        """Return the mean of the losses of processes that train one module together."""
        (mean,) = self.loop.run.ranks.mean(lambda: (loss.detach(),), "the loss")
        return mean

    def _begin_run(self) -> None:
        if not self._is_begun:
            self._is_begun = True  # also where it raises: once is enough
            self.observer.begin_run(self.loop, [self.optimizer])

    def _check_update(self) -> None:
        if self._is_begun and not self.batches:  # otherwise the update has not been made
            self.observer.check_update()

    def _before_update(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._begin_run()
        observer = self.observer
        overflow = getattr(optimizer, "found_inf", None)  # of a gradient scaler, which leaves the update to fused ones
        self._is_skipped = overflow is not None and bool(overflow)
        if self._is_skipped:
            observer.skip_update()
            return
        if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
            observer.skip_update()  # its gradient comes later
            observer.invalidate_update(CLOSURE)
        if self.capped is not None:
            self.capped.lower_next()
        observer.before_update(optimizer)
        loss = observer.step_loss.differentiated
        loss = observer.replayed_loss if loss is None else loss
        if loss is not None:
            with self.monitor.errors.warn_instead_of_raise("the loss of all processes is not known"):
                self.monitor.losses.saw(self.step, self._mean_loss(loss))
        observer.check_gradient("the gradient was changed after Watch.measure()", is_gone_allowed=False)

    def _after_update(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        observer, self.batches = self.observer, 0
        observations, fault = observer.after_update()
        observer.forget_step()
        if self._is_skipped:  # nothing has moved
            return
        if self.capped is not None:
            observations = self.capped.read(observations)
        completed = [*observations, *([] if fault is None else [fault])]
        if completed and self.log is not None:
            self.log({key: value for each in completed for key, value in each.values.items()}, completed[0].step)
        observer.count()
