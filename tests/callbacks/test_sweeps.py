"""Hopeless trials of a sweep end, with the real packages."""

import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import Losses, Model, data, trainer
from torch.nn import functional as F

from lsp_callbacks import StabilityMonitor, StabilityPruner, StabilityReporter

RATES = [0.05, 0.1, 3000.0]


class Regression(Model):
    """A squared loss, which explodes where the rate is too high."""

    def loss(self, batch):
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 3).float())

    def on_train_epoch_end(self):
        self.log("end", self.trainer.callback_metrics["loss"])


def train(lr, *callbacks):
    torch.manual_seed(0)
    model = Regression(optimizer=partial(torch.optim.SGD, lr=lr))
    t = trainer(StabilityMonitor(["sharpness"], every_n_steps=2), *callbacks, max_steps=-1, max_epochs=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.fit(model, data(), data(shuffle=False))
    return t


def test_optuna_prunes_the_trial_that_explodes_and_no_other():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(logging.ERROR)
    steps = []

    def objective(trial):
        losses = Losses()
        try:
            return train(trial.suggest_categorical("lr", RATES), losses, StabilityPruner(trial)).callback_metrics["end"]
        finally:
            steps.append(len(losses.losses))

    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"lr": RATES}, seed=0))
    study.optimize(objective, n_trials=3)
    by_rate = {trial.params["lr"]: trial for trial in study.trials}
    assert [by_rate[rate].state.name for rate in RATES] == ["COMPLETE", "COMPLETE", "PRUNED"]
    pruned = by_rate[3000.0]
    assert pruned.user_attrs["stability/stop"] == min(steps) - 1 < 71 and pruned.user_attrs["stability/reason"]
    assert sorted(steps)[1:] == [72, 72] and study.best_params["lr"] in (0.05, 0.1)


def test_optunas_own_pruning_callback_goes_on_beside_it():
    optuna = pytest.importorskip("optuna")
    integration = pytest.importorskip("optuna_integration")
    optuna.logging.set_verbosity(logging.ERROR)
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=1e-9))

    def objective(trial):
        train(0.05, StabilityPruner(trial), integration.PyTorchLightningPruningCallback(trial, "val_loss"))

    pytest.importorskip("lightning")
    try:
        study.optimize(objective, n_trials=1)
    except TypeError:
        pytest.skip("this version of optuna_integration takes the Trainer of lightning.pytorch only")
    assert study.trials[0].state.name == "PRUNED" and not study.trials[0].user_attrs


def test_a_trial_of_one_is_refused_for_many():
    optuna = pytest.importorskip("optuna")
    from types import SimpleNamespace

    pruner = StabilityPruner(optuna.create_study().ask())
    with pytest.raises(ValueError, match="2 processes"):
        pruner.setup(SimpleNamespace(world_size=2, callbacks=[]), None, "fit")


@pytest.mark.slow
def test_ray_tune_is_told_and_the_trial_that_explodes_ends(tmp_path):
    ray = pytest.importorskip("ray")
    tune = pytest.importorskip("ray.tune")
    seen = {"env_vars": {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}}
    ray.init(
        num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, runtime_env=seen
    )  # fmt: skip
    try:
        tuner = tune.Tuner(
            lambda config: train(config["lr"], StabilityReporter(["val_loss"])) and None,
            param_space={"lr": tune.grid_search(RATES)},
            run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
        )
        results = {result.config["lr"]: result for result in tuner.fit()}
    finally:
        ray.shutdown()
    assert not any(result.error for result in results.values())
    assert [results[rate].metrics["stability/unstable"] for rate in RATES] == [0.0, 0.0, 1.0]
    assert [len(results[rate].metrics_dataframe) for rate in RATES[:2]] == [12, 12]
    assert results[3000.0].metrics["stability/stop"] < 71 and "val_loss" in results[0.05].metrics


@pytest.mark.parametrize("settings", [{"metrics": ["a"], "at": "batch"}, {"metrics": "val_loss"}])
def test_bad_arguments(settings):
    pytest.importorskip("ray.tune")
    with pytest.raises(ValueError, match=r"at=|metrics="):
        StabilityReporter(**settings)
