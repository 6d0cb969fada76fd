"""What ``lsp-callbacks cost`` says, and that it leaves nothing behind."""

import math
import os
import re
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
from harness import Model, data, trainer

from lsp_callbacks import Dissipation, StabilityMonitor, Unmeasurable
from lsp_callbacks.cli.cost import Costs, measure
from lsp_callbacks.cli.main import main

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lsp-callbacks"])


def test_the_command_prints_a_table_and_leaves_no_file(tmp_path, capsys):
    assert main(["cost", "--config", str(CONFIG)]) == 0
    text = capsys.readouterr().out
    for name in ("spectral_norm", "residual_cfl", "sharpness", "mean_square_stability", "lyapunov", "together"):
        assert re.search(rf"{name}.*\d\.\d.*\d\.\d.*B", text), name
    assert re.search(r"sharpness[^\n]* [\d,]+ [^\n]* \d+ ", text)  # period and readings
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_found_is_said_in_one_line(capsys):
    assert (
        main(["cost", "--config", str(CONFIG), "--data.batch_size", "1000", "--trainer.limit_train_batches", "0"]) == 1
    )
    assert capsys.readouterr().err.startswith("lsp-callbacks cost: ")


def test_costs_agree_with_the_monitors_own():
    """The prices that a real run finds, and how often it measures."""
    costs = measure(trainer(), Model(), StabilityMonitor(["spectral_norm", "sharpness"]), train_dataloaders=data())
    real = StabilityMonitor(["spectral_norm", "sharpness"])
    trainer(real, max_steps=1000, max_epochs=-1).fit(Model(), data())
    paces = real.monitor.cadence.paces
    # The price of spectral norms follows how often Lanczos has to begin anew, and weights move less and less.
    for name, within in {"sharpness": 0.05, "spectral_norm": 0.33}.items():
        assert costs.gradients[name] == pytest.approx(paces[name].price, rel=within)
    assert all(abs(costs.readings[name] - pace.count) <= 1 for name, pace in paces.items())
    assert costs.gradients.keys() == costs.seconds.keys() == costs.memory.keys() == costs.period.keys()
    assert sum(costs.gradients.values()) > costs.total > max(costs.gradients.values())  # they share
    assert 0 < costs.step < 1 and all(0 < seconds < 5 for seconds in costs.seconds.values())
    assert costs.memory["sharpness"] > costs.memory["spectral_norm"] > 0


def test_what_costs_too_much_is_not_started():
    class Endless(Dissipation):
        name = "endless"

        def cost(self, snapshot):
            return {"passes": 1e6}

        def update(self, snapshot):
            raise AssertionError("started")

    monitor = StabilityMonitor("economy")
    monitor.monitor.quantities.all = (*monitor.monitor.quantities.all, Endless())
    costs = measure(trainer(), Model(), monitor, train_dataloaders=data())
    assert re.search(r"costs 10000\d\d gradients", costs.skipped["endless"]) and "endless" in costs.sentences()[-1]


def test_what_needs_more_steps_has_not_failed():
    class Patient(Dissipation):
        def warm_up(self, snapshot):
            return 1000

    costs = measure(trainer(), Model(), StabilityMonitor([Patient(), "spectral_norm"]), train_dataloaders=data())
    assert costs.waiting == ["dissipation"] and costs.seconds.keys() == {"spectral_norm"}
    assert 0 < costs.gradients["dissipation"] < 10 and "dissipation looks back" in costs.sentences()[1]
    assert [*costs.table().columns[4].cells][:2] == ["not yet", f"{1e3 * costs.seconds['spectral_norm']:.1f}"]
    failed = Costs(gradients={"sharpness": 1.0}, period={"sharpness": 1.0}, readings={"sharpness": 1})
    assert next(iter(failed.table().columns[4].cells)) == "failed"


def test_no_hook_believes_that_training_has_ended():
    class Ends(Model):
        ended = False

        def on_train_end(self):
            self.ended = True

        def configure_callbacks(self):
            return [Loud()]

    class Loud(pl.Callback):
        def on_fit_start(self, *args):
            raise AssertionError("not wanted")

    model = Ends()
    measure(trainer(), model, StabilityMonitor("economy"), train_dataloaders=data())
    assert not model.ended and "configure_callbacks" not in vars(model)


def test_a_loader_without_batches():
    with pytest.raises(Unmeasurable, match="too few batches"):
        measure(trainer(limit_train_batches=0), Model(), StabilityMonitor("economy"), train_dataloaders=data())


def test_the_share_of_the_time():
    costs = Costs(step=0.01, seconds={"a": 0.03, "b": 0.07}, readings={"a": 20, "b": 20}, budget=0.05)
    assert costs.share == pytest.approx(2 / 12) and not math.isnan(costs.share)
    assert "every_n_steps=200 would take 5%" in costs.sentences()[0]
