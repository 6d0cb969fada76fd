"""Training returns to a state that was measured stable, to the last bit, and goes on at a lower rate."""

import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from harness import BATCH, CLASSES, FEATURES, MOMENTUM, Model, Rows, mlp, same, trainer
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import CapLearningRate, RollBackOnInstability, StabilityMonitor, StopOnInstability
from lsp_callbacks.callbacks.base import Callback

ROLL, SCALE = "stability/roll_back", "stability/lr_scale"


class Noisy(Model):
    """Dropout, momentum, a schedule, and random numbers of three kinds; it breaks once, at a step that is told."""

    def __init__(self, breaks=(), by=math.nan, decay=0.99):
        super().__init__(mlp(nn.Dropout(0.3)), MOMENTUM)
        self.breaks, self.by, self.decay = list(breaks), by, decay

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.breaks and self.global_step == self.breaks[0] and not getattr(self.trainer, "is_replaying", False):
            loss = loss * self.by
        return loss * (1 + 0.01 * random.random() + 0.01 * np.random.rand())

    def on_train_batch_end(self, *args):
        if self.breaks and self.trainer.global_step > self.breaks[0]:
            self.breaks.pop(0)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [{"scheduler": lr_scheduler.ExponentialLR(optimizer, self.decay), "interval": "step"}]


def batches(n=80, shuffle=True, **settings):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, FEATURES, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :CLASSES].argmax(1)), batch_size=BATCH, shuffle=shuffle, **settings)


class Seen(Callback):
    """Every batch that was trained with, by step, and the whole state after it."""

    def __init__(self):
        self.batches, self.states, self.rates = [], {}, []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(
            lambda o, *_: self.rates.append((trainer.global_step, o.param_groups[0]["lr"]))
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((trainer.global_step, batch[0].clone()))
        self.states.setdefault(trainer.global_step, []).append({
            "weights": {k: v.clone() for k, v in pl_module.state_dict().items()},
            "optimizer": json.dumps(
                [g["lr"] for g in trainer.optimizers[0].param_groups]
                + [s["momentum_buffer"].tolist() for s in trainer.optimizers[0].state.values()]
            ),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "rng": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
            "progress": (trainer.current_epoch, batch_idx),
        })  # fmt: skip


def run(folder, make, *callbacks, loader=None, every=2, states=4, ckpt_path=None, seed=0, **settings):
    """Trains with returns; the callback is the last one."""
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    own = {k: settings.pop(k) for k in ("times", "factor", "skip_batches", "safety") if k in settings}
    back = RollBackOnInstability(dirpath=str(folder), every_n_steps=states, **own)
    measuring = StabilityMonitor(["sharpness"], every_n_steps=every)
    t = trainer(measuring, *callbacks, back, **{"max_steps": 40} | settings)
    back.fit(t, make(), batches() if loader is None else loader, ckpt_path=ckpt_path)
    return back, t


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [17, 23])  # within the second epoch of ten batches, within the third
def test_it_returns_to_the_last_bit_and_goes_on_as_if_nothing_had_been(tmp_path, at):
    plain, broken = Seen(), Seen()
    run(tmp_path / "a", Noisy, plain)
    back, t = run(tmp_path / "b", partial(Noisy, [at]), broken, factor=1.0, safety=1e9)
    (roll_back,) = back.roll_backs
    assert t.global_step == 40 and roll_back.at == at + 1 and 0 < roll_back.state.step <= at
    assert "loss is nan" in roll_back.reason and roll_back.scale == 1
    for step in range(1, 41):
        assert same(plain.states[step][0], broken.states[step][-1]), step
        if roll_back.state.step < step <= at:
            assert len(broken.states[step]) == 2 and same(*broken.states[step])
    trained = {step: batch for step, batch in broken.batches}
    assert all(torch.equal(trained[step], batch) for step, batch in plain.batches)
