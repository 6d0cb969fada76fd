"""Callbacks that end the hopeless trials of a sweep: for Optuna, and for Ray Tune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lsp_callbacks.callbacks.stop_on_instability import StopOnInstability

#: What a sweep is told of a trial that was ended, beside the reason.
STOP, REASON, UNSTABLE = "stability/stop", "stability/reason", "stability/unstable"


class StabilityPruner(StopOnInstability):
    """Prunes an Optuna trial whose training has become unstable.

    It decides as `StopOnInstability` does, whose place it takes, at the step and not at the end of an epoch, and needs
    neither validation nor other trials to compare with. Then ``Trainer.fit`` raises ``optuna.TrialPruned``, and the
    trial's attributes ``stability/stop`` and ``stability/reason`` say when and why. Pruners of Optuna's own, which
    compare trials, go on beside it: ``optuna_integration.PyTorchLightningPruningCallback``.

    Args:
        trial: of Optuna.
        monitor: key of the number by which training is judged, see `StopOnInstability`.
        **settings: others of `StopOnInstability`.

    Raises:
        ImportError: without Optuna.
        ValueError: before training, with several processes: each would have a trial of its own.

    Example:
        >>> from lsp_callbacks import StabilityMonitor, StabilityPruner
        >>> def objective(trial):
        ...     callbacks = [StabilityMonitor(), StabilityPruner(trial)]
        ...     trainer = pl.Trainer(callbacks=callbacks)
        ...     trainer.fit(Model(lr=trial.suggest_float("lr", 1e-3, 10, log=True)), data)
        ...     return trainer.callback_metrics["val_loss"].item()
    """

    def __init__(self, trial: Any, monitor: str = "stability/courant", **settings: Any):
        import optuna

        super().__init__(monitor, **settings)
        self.trial, self._pruned = trial, optuna.TrialPruned

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and trainer.world_size > 1:
            raise ValueError(
                f"StabilityPruner with {trainer.world_size} processes: the trial is that of one; use StopOnInstability "
                "instead, and raise optuna.TrialPruned where its stop_step is not None"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.stop_step is not None:
            self.trial.set_user_attr(STOP, self.stop_step)
            self.trial.set_user_attr(REASON, self.reason)
            raise self._pruned(f"unstable at step {self.stop_step}: {self.reason}")


class StabilityReporter(StopOnInstability):
    """Reports a trial's metrics to Ray Tune, and ends it when its training has become unstable.

    It decides as `StopOnInstability` does, whose place it takes. A report has the metrics that are asked for, those of
    them that are finite numbers by then, and ``stability/unstable``, 1 in the last report of a trial that was ended.
    So a scheduler of Tune's compares the trials that are worth it, and the table of results says which were not.

    Args:
        metrics: keys of ``trainer.callback_metrics``; ``stability/courant`` comes with them.
        at: "validation" or "epoch": the ends of which are reported.
        monitor: key of the number by which training is judged, see `StopOnInstability`.
        **settings: others of `StopOnInstability`.

    Raises:
        ImportError: without Ray Tune.
        ValueError: for another ``at``.

    Example:
        >>> from lsp_callbacks import StabilityMonitor, StabilityReporter
        >>> def train(config):
        ...     callbacks = [StabilityMonitor(), StabilityReporter(["val_loss"])]
        ...     pl.Trainer(callbacks=callbacks).fit(Model(lr=config["lr"]), data)
    """

    def __init__(
        self,
        metrics: Sequence[str],
        *,
        at: str = "validation",
        monitor: str = "stability/courant",
        **settings: Any,
    ):
        from ray import tune

        if at not in ("validation", "epoch"):
            raise ValueError(f"at={at!r}: give 'validation' or 'epoch'")
        if isinstance(metrics, str):
            raise ValueError(f"metrics={metrics!r}: give a list of keys, [{metrics!r}]")
        super().__init__(monitor, **settings)
        self.metrics, self.at, self._tune = [*metrics], at, tune

    def _report(self, trainer: Any, *, unstable: bool = False) -> None:
        metrics = trainer.callback_metrics
        values = {key: float(metrics[key]) for key in (*self.metrics, self.monitor) if key in metrics}
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        values[UNSTABLE] = float(unstable)
        if self.stop_step is not None:
            values[STOP] = float(self.stop_step)
        if trainer.is_global_zero:
            self._tune.report(values)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.at == "validation" and not trainer.sanity_checking and self.stop_step is None:
            self._report(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.at == "epoch" and self.stop_step is None:
            self._report(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.stop_step is not None:
            self._report(trainer, unstable=True)
