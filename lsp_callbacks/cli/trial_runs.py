"""Short runs at constant rates, each from the initial weights, on the batches that a trainer brings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.hidden_hooks import call_hook
from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor
from lsp_callbacks.cli.batch_sizes import BatchSizes
from lsp_callbacks.cli.configured import Done, train_without_end
from lsp_callbacks.cli.rate_search import RateSearch, TrialRun
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.budget import measurement_cost
from lsp_callbacks.monitor.critical_rate import critical_rate
from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.monitor.rates_of_update import set_rate
from lsp_callbacks.operators.trajectory.update_rules import rule_with_edge
from lsp_callbacks.quantities import MeanSquareStability, SGDStability
from lsp_callbacks.step.flat import largest_learning_rate
from lsp_callbacks.step.snapshot import Snapshot

#: Readings in a run, and in the mean by which one is ended early: where that is twice the edge.
READINGS, RECENT, TOO_HIGH = 25, 3, 2.0
#: Steps within which the first reading has to come, at this share of the configured rate: the weights do not move.
PATIENCE, STILL = 50, 1e-6
#: Parts of the later half of a run whose means give the error, and the share of its steps after which batch sizes are
#: compared.
PARTS, LATE = 4, 0.75


class KeptRows(MeanSquareStability):
    """The headline number, from steps that are kept for a replay while ``keeps`` is set."""

    keeps = False

    @property
    def needs_replay(self) -> bool:
        return self.keeps or super().needs_replay


class TrialRuns(Callback):
    """Makes the runs that a `RateSearch` asks for within one ``fit``, and ends it.

    Weights, buffers, optimizer and gradient scaler are put back before each run; the batches go on, so that no two
    runs see the same. Schedules are switched off. What is measured is the headline number, `MeanSquareStability`.

    Args:
        steps: of a run that does not end early.
        monitor: makes the `StabilityMonitor` of a run, from its quantities and keyword arguments.
        probes: samples by which batch sizes are compared.

    Attributes:
        search: None before the first reading.
        batches: what the last run says of batch sizes; empty where ``without_batches`` says why.
        cost: gradients of a whole batch that measuring took.
        taken: steps of all runs, and those up to the first reading.
    """

    def __init__(self, steps: int, monitor: Callable[..., StabilityMonitor], probes: int = 128):
        self.steps, self._monitor_of, self.probes = steps, monitor, probes
        self.every = max(1, steps // READINGS)
        self.search: RateSearch | None = None
        self.batches: list[BatchSizes] = []
        self.without_batches = ""
        self.cost, self.taken, self._waited = 0.0, 0, 0

    # -- before the first run ------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        train_without_end(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._optimizer = _only_optimizer(trainer, pl_module)
        trainer.strategy.lr_scheduler_configs = []  # their rates are not those of a run
        groups = self._optimizer.param_groups
        base = [float(group.get("initial_lr", group["lr"])) for group in groups]
        if not max(base) > 0:
            base = [1.0] * len(groups)
        self._relative = [rate / max(base) for rate in base]
        state = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        self._weights = {name: tensor.detach().clone() for name, tensor in state.items()}
        self._optimizer_state = copy.deepcopy(self._optimizer.state_dict())
        self._precision_state = copy.deepcopy(trainer.precision_plugin.state_dict())
        self._begin(trainer, pl_module, STILL * max(base))

    def _begin(self, trainer: Any, pl_module: Any, rate: float) -> None:
        """Put everything back, and begin a run."""
        with torch.no_grad():
            for name, tensor in {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}.items():
                tensor.copy_(self._weights[name])
        self._optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))
        trainer.precision_plugin.load_state_dict(copy.deepcopy(self._precision_state))
        self._rate, self._losses, self._readings = rate, list[float](), list[tuple[int, float]]()
        self._set_rates()
        is_first = self.search is None
        self._headline = KeptRows()
        self.inner = self._monitor_of([self._headline], every_n_steps=1 if is_first else self.every, strict=is_first)
        self.inner.reading_listeners.append(self._take)
        self.inner.loss_listeners.append(lambda step, loss: self._losses.append(float(loss)))
        observer = self.inner.observer
        observer.listeners.append(self._pay)
        self._is_candidate = self.search is not None and self.search.is_candidate
        if self._is_candidate:
            self.batches.clear()
            observer.probes.wanted = self.probes
            observer.listeners.append(self._compare_batches)
        self.inner.setup(trainer, pl_module, "fit")
        self.inner.on_fit_start(trainer, pl_module)
        self.inner.on_train_start(trainer, pl_module)
        self._from = observer.step

    def _set_rates(self) -> None:
        for group, relative in zip(self._optimizer.param_groups, self._relative):
            set_rate(group, self._rate * relative)

    # -- one step ------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        call_hook(self.inner, "on_train_epoch_start", trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._headline.keeps = self._is_candidate and self._compares(len(self._losses))
        call_hook(self.inner, "on_train_batch_start", trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        call_hook(self.inner, "on_before_backward", trainer, pl_module, loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        call_hook(self.inner, "on_before_optimizer_step", trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        before = len(self._losses)
        call_hook(self.inner, "on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)
        if len(self._losses) == before:
            self._waited += 1
            if self._waited > PATIENCE * trainer.accumulate_grad_batches:
                raise Unmeasurable(f"{type(pl_module).__name__}.training_step has returned no loss for long")
            return
        self._waited, self.taken = 0, self.taken + 1
        self._check_rate(pl_module)
        failure = "" if self.search is None else self._failure()
        if self.search is None:
            self._begin_search()
        elif failure or len(self._losses) == self.steps:
            self.search.add(self._run(failure))
        else:
            return
        if self.search is not None:
            self.inner.teardown(trainer, pl_module, "validate")  # its hooks go; there is nobody to send results to
            rate = self.search.next_rate()
            if rate is None:
                raise Done
            self._begin(trainer, pl_module, rate)

    def _check_rate(self, module: Any) -> None:
        rate = largest_learning_rate(self._optimizer)
        if not math.isclose(rate, self._rate, rel_tol=1e-6):
            raise Unmeasurable(
                f"{type(module).__name__} sets the learning rate by itself, to {rate:.3g} instead of "
                f"{self._rate:.3g}: leave that to a scheduler, which is left out here"
            )

    def _begin_search(self) -> None:
        if self._readings:
            critical = self._readings[-1][1]
            if not critical < math.inf:
                raise Unmeasurable(
                    "no learning rate is unstable at the initial weights: the outputs do not depend on the parameters "
                    "that are trained; look at the initialisation"
                )
            self.search = RateSearch(critical)
        elif self.inner.monitor.quantities.skipped or len(self._losses) > PATIENCE:
            why = "; ".join(self.inner.skipped.values()) or f"no reading within {PATIENCE} steps"
            raise Unmeasurable(f"the critical rate cannot be measured here: {why}")

    def _take(self, observation: Observation) -> None:
        critical = critical_rate(observation.values, used=self._rate)
        if observation.values.get("stability/collapsed", 0.0) > 0:
            critical = math.inf
        if not math.isnan(critical):
            self._readings.append((observation.step - self._from, critical))

    def _pay(self, snapshot: Snapshot) -> None:
        quantities = self.inner.monitor.quantities.values()
        self.cost += sum(sum(measurement_cost(quantity, snapshot).values()) for quantity in quantities)

    def _failure(self) -> str:
        """Return why the run is to be ended now; empty if it is not."""
        losses, loss = self.inner.monitor.losses, self._losses[-1]
        losses.settle()
        if not math.isfinite(loss):
            return f"the loss was {loss:g} at step {len(self._losses) - 1}"
        if losses.exploded(loss):
            return f"the loss rose to {loss:.3g} at step {len(self._losses) - 1}"
        last = [self._rate / critical for _, critical in self._readings[-RECENT:]]
        if len(last) == RECENT and sum(last) > RECENT * TOO_HIGH:
            return f"the Courant number was {sum(last) / RECENT:.2g} at step {len(self._losses) - 1}"
        return ""

    def _run(self, failure: str) -> TrialRun:
        """Return the run that is over."""
        steps = len(self._losses)
        late = [self._rate / critical for step, critical in self._readings if step >= self.steps / 2]
        used = [self._rate / critical for _, critical in self._readings[-RECENT:]] if failure else late
        mean = sum(used) / len(used) if used else math.nan
        part = -(-len(used) // PARTS) or 1
        means = [sum(used[k : k + part]) / len(used[k : k + part]) for k in range(0, len(used), part)]
        spread = math.sqrt(sum((each - mean) ** 2 for each in means) / max(len(means) * (len(means) - 1), 1))
        last = self._losses[-max(1, self.steps // 4) :]
        if not failure and len(used) < PARTS:
            failure = "the critical rate could not be measured in its later half"
        return TrialRun(
            self._rate, steps, mean, spread / mean if mean > 0 else 0.0, self._losses[0], sum(last) / len(last), failure
        )

    # -- batch sizes ---------------------------------------------------------------------------------------------------

    def _compares(self, step: int) -> bool:
        """Return whether batch sizes are compared at a step of a run that may be the last: twice, late in it."""
        return step >= (self.steps - self.every if self.batches else LATE * self.steps) and len(self.batches) < 2

    def _compare_batches(self, snapshot: Snapshot) -> None:
        if self._compares(snapshot.step - self._from) and snapshot.probes is not None and snapshot.probes.full:
            self.cost += sum(SGDStability(self.probes).cost(snapshot).values())
            try:
                self.batches.append(BatchSizes.at(snapshot))
            except Exception as error:  # whatever a model's own code raises; the rates are known
                self.without_batches = f"{type(error).__name__}: {error}"


def _only_optimizer(trainer: Any, module: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a run whose steps can be repeated at another rate.

    Raises:
        Unmeasurable: where there is no such, or it has no critical rate.
    """
    name = type(module).__name__
    if trainer.world_size > 1:
        raise Unmeasurable(
            f"{trainer.world_size} processes: pass --trainer.devices 1; the batch size is then that of one of them"
        )
    if not module.automatic_optimization:
        raise Unmeasurable(
            f"{name} has automatic_optimization=False: when and how it steps is up to training_step; look for its rate "
            "with StabilityMonitor(loss_fn=...) in a run, whose stability/mean_square_lr is the critical rate"
        )
    if len(trainer.optimizers) != 1:
        raise Unmeasurable(f"{name} has {len(trainer.optimizers)} optimizers: one learning rate can be looked for")
    optimizer = trainer.optimizers[0]
    if any("lr" not in group for group in optimizer.param_groups):
        raise Unmeasurable(f"{type(optimizer).__name__} has no learning rate 'lr'")
    rule_with_edge(optimizer)
    return optimizer
