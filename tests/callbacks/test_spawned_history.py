"""Runs in processes that Lightning launches by itself: what was measured is there where ``fit`` was called."""

import gc
import glob
import math
import os
import pickle
import tempfile
import warnings

import pytest
import torch
from harness import Model, data
from pytorch_lightning import Trainer

from lsp_callbacks import StabilityMonitor, StopOnInstability
from lsp_callbacks.callbacks.spawned_history import Mailbox

QUANTITIES = ["sharpness", "lyapunov", "spectral_norm"]


def run(monitor, make=Model, **settings):
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", callbacks=monitor, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=10, **{"max_steps": 6} | settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(make(), data(shuffle=False))
    return trainer


def files():
    return glob.glob(os.path.join(tempfile.gettempdir(), "lsp_callbacks-*"))


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_the_curves_come_home(strategy):
    before = files()
    monitor, twin = (StabilityMonitor(QUANTITIES, every_n_steps=2, window=1) for _ in range(2))
    trainer = run(monitor, strategy=strategy, devices=2)
    assert monitor.history["stability/sharpness"].steps == [0, 2, 4] == monitor.history["stability/lyapunov"].steps
    assert all(math.isfinite(v) for curve in monitor.history.values() for v in curve.values)
    assert set(monitor.paths) == set(QUANTITIES) and monitor.step == 6 and not monitor.monitor.skipped
    for key, curve in monitor.history.items():  # what Lightning itself brings home is the last value
        if key in trainer.callback_metrics and math.isfinite(curve.values[-1]):
            assert float(trainer.callback_metrics[key]) == pytest.approx(curve.values[-1], rel=1e-6)
    assert files() == before
    run(twin)  # in this process
    assert twin.history.keys() == monitor.history.keys() and files() == before


def test_nothing_is_left_where_nobody_asks():
    before = files()
    monitor = StabilityMonitor(["spectral_norm"], every_n_steps=2)
    run(monitor, strategy="ddp_fork", devices=1)
    assert len(files()) == len(before) + 1
    del monitor
    gc.collect()
    assert files() == before


def test_a_box_belongs_to_the_process_that_made_it():
    box = Mailbox()
    assert box.receive() is None
    copy = pickle.loads(pickle.dumps(box))
    assert copy.receive() is None and vars(copy) == vars(box)


def test_the_verdict_comes_home_first_and_whole():
    """It knows of the loss and of the stop, and is the same before and after somebody has asked for the curves."""

    class Explodes(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.nan if self.global_step == 3 else 1.0)

    monitor = StabilityMonitor(["spectral_norm"], every_n_steps=2)
    stop = StopOnInstability("stability/spectral_norm_max", threshold=1e9, verbose=False)
    run([monitor, stop], Explodes, strategy="ddp_fork", devices=1)
    told = monitor.verdict
    assert (told.state, told.cause, told.evidence["loss_nonfinite_step"], told.evidence["stop"]) == (
        "not finite", "loss", 3, 3,
    )  # fmt: skip
    assert monitor.history and monitor.verdict == told and monitor.step == 4
    run(monitor, max_steps=2)
    assert monitor.verdict.state != "not finite"


def test_what_was_broken_off_is_no_letter():
    box = Mailbox()
    with open(box._path, "w") as file:
        file.write('{"history": {"stab')
    assert box.receive() is None and box.receive() is None and not os.path.exists(box._path)
