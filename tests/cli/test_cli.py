"""The command line, its configurations, and what they train."""

import csv
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import lsp_callbacks
from lsp_callbacks.cli.main import MEASURING, TRAINING, main
from lsp_callbacks.demo import Digits, ResidualBlock, ResidualNet

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lsp-callbacks"])  # LightningCLI warns when pytest's arguments are there too


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help(argv, capsys):
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name} .{{20}}", text, re.MULTILINE) for name in TRAINING | MEASURING)
    assert "lsp-callbacks demo" in text and "--version" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_every_command_has_a_module_and_every_module_with_a_command_is_in_the_help():
    folder = Path(lsp_callbacks.__file__).parent / "cli"
    commands = {path.stem for path in folder.glob("*.py") if re.search(r"^def main\(", path.read_text(), re.MULTILINE)}
    assert commands - {"main"} == set(MEASURING)


@pytest.mark.parametrize("command", MEASURING)
def test_every_command_has_a_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(f"usage: lsp-callbacks {command} ") and len(text) > 300


def test_the_version_stands_in_one_place(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lsp-callbacks {lsp_callbacks.__version__}\n"
    assert f"\nversion: {lsp_callbacks.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert lsp_callbacks.__version__ not in (ROOT / "pyproject.toml").read_text()


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lsp_callbacks", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lsp_callbacks", run_name="__main__")
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("lsp-callbacks ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fti"], "invalid choice: 'fti'"),  # words of jsonargparse; behind the bar those of its 4.37
        (["fit"], r'required: fit\.model|"fit\.model" is required'),
        (["fit", "--config", "no.yaml"], "does not exist"),
        (["fit", "--config", str(CONFIGS[0]), "--model.lrr", "1"], "'lrr' is not accepted|key='lrr'"),
        (["fit", "--config", str(CONFIGS[0]), "--trainer.max_stepz", "1"], "max_stepz"),
        (
            ["fit", "--config", str(CONFIGS[0]), "--model.schedule", "linear"],
            "'constant', 'cosine', 'ramp'|key='schedule', val='linear'",
        ),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, text, re.IGNORECASE)
    assert len(text) < 2000 and "Traceback" not in text


def test_without_jsonargparse(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["fit", "--config", str(CONFIGS[0])]) == 1
    assert "pip install 'lsp-callbacks[cli]'" in capsys.readouterr().err


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lsp-callbacks\[demo\]'"):
        Digits().setup("fit")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configurations_train(config, tmp_path, capsys):
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "12"]) == 0
    (run,) = tmp_path.glob(f"runs/{config.stem}/*")
    assert {"stability.png", "metrics.csv", "config.yaml"} <= {path.name for path in run.iterdir()}
    assert "stability/courant" in (run / "metrics.csv").read_text()
    assert os.listdir(tmp_path) == ["runs"]  # which git ignores
    assert "lsp_callbacks: stable at step" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--unstable"]], ids=" ".join)
def test_the_demo_runs_from_an_empty_folder_and_says_where_its_results_are(options, tmp_path, capsys):
    assert main(["demo", *options, "--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false"]) == 0
    output = capsys.readouterr()
    (picture,) = tmp_path.rglob("stability.png")
    assert str(picture) in output.out and "Epoch 0" not in output.out + output.err
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert str(picture.parent.relative_to(tmp_path)) in capsys.readouterr().out


def test_the_demo_without_scikit_learn(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 1
    assert "pip install 'lsp-callbacks[demo]'" in capsys.readouterr().err


@pytest.mark.slow
def test_unstable_runs_are_stopped_and_most_are_seen_before_the_loss_has_moved(tmp_path, capsys):
    # Readings of 64 samples scatter by 15 %, and their mean of three by 10 %: a run may be stopped by its loss alone.
    early = 0
    for seed in range(5):
        main(["fit", "--config", str(CONFIGS[0].with_name("digits_unstable.yaml")), f"--seed_everything={seed}"])
        out = capsys.readouterr().out
        assert re.search(r"lsp_callbacks: unstable, and stopped at step \d+", out)
        table = max(tmp_path.glob("runs/*/*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        rows = {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(table.open()) if row["train_loss"]}
        if event := re.search(r"; event at step (\d+)", out):
            before = [loss for step, loss in rows.items() if step <= int(event[1])]
            early += np.mean(before[-5:]) < 1.5 * min(before)  # one row in 5 steps
    assert early >= 4


def test_digits():
    first, again = Digits(), Digits()
    for data in (first, again):
        data.setup("fit")
    batches, others = list(first.train_dataloader()), list(again.train_dataloader())
    assert [tuple(images.shape) for images, _ in batches] == [(256, 1, 8, 8)] * 5
    assert all(torch.equal(a, b) for one, other in zip(batches, others) for a, b in zip(one, other))
    everything = torch.cat([first.train.tensors[0], first.validation.tensors[0]])
    assert len(everything) == 1797 and everything.min() == 0 and everything.max() == 1
    counts = torch.bincount(first.validation.tensors[1])
    assert counts.min() >= 34 and counts.max() <= 37  # stratified
    with pytest.raises(ValueError, match="batch_size=0"):
        Digits(batch_size=0)


@pytest.mark.parametrize(
    ("schedule", "last"), [("constant", 0.1), ("cosine", 0.1 * 0.00616), ("ramp", 0.1 * 30 ** (19 / 1000))]
)
def test_schedules(schedule, last):
    rates = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = pl.Trainer(
        max_steps=20, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Rates()], accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(ResidualNet(schedule=schedule), Digits())
    assert len(rates) == 20 and rates[0] == 0.1 and rates[-1] == pytest.approx(last, rel=1e-2)


def test_residual_block():
    x = torch.randn(3, 8)
    block = ResidualBlock(8)
    assert torch.equal(block(x), x + block.branch(x))


@pytest.mark.parametrize("settings", [{"schedule": "linear"}, {"ramp": 0.0}])
def test_bad_settings(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        ResidualNet(**settings)
