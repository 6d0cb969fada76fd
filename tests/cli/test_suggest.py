"""What ``lsp-callbacks suggest`` says where it is known exactly, and that it leaves nothing behind."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from harness import Model, data, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import Unmeasurable
from lsp_callbacks.cli.main import main
from lsp_callbacks.cli.suggest import suggest
from lsp_callbacks.functional import mean_square_lr, reduced_modes, useful_batch

CONFIG = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
SMALL = ["--config", CONFIG, "--model.width", "8", "--model.depth", "1", "--run_steps", "20", "--probes", "16"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lsp-callbacks"])


class Line(pl.LightningModule):
    """Linear regression: its curvature is the same everywhere."""

    def __init__(self, features, optimizer, schedule=None):
        super().__init__()
        self.net, self.optimizer, self.schedule = nn.Linear(features, 1, bias=False), optimizer, schedule
        nn.init.ones_(self.net.weight)
        self.begins = []

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])


def points(count, features, batch_size=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, features, generator=generator)
    y = x @ torch.linspace(1, 2, features)[:, None] + 1e-3 * torch.randn(count, 1, generator=generator)
    return x, DataLoader(TensorDataset(x, y), batch_size=batch_size or count, shuffle=True)


def look(model, loader, **settings):
    return suggest(trainer(max_steps=5), model, train_dataloaders=loader, **{"steps": 40, "probes": 32} | settings)


@pytest.mark.parametrize(("lr", "momentum"), [(1e-4, 0.0), (5.0, 0.9)])
def test_a_quadratic_has_the_rate_of_its_curvature(momentum, lr):
    """Full batches: 2 (1 + momentum) / lambda, from whatever rate the configuration names."""
    x, loader = points(24, 4)
    found = look(Line(4, partial(torch.optim.SGD, lr=lr, momentum=momentum)), loader)
    sharpness = np.linalg.eigvalsh((2 * x.T @ x / len(x)).numpy())[-1]
    exact = 2 * (1 + momentum) / sharpness
    if momentum:  # at the edge a run first grows by 1 / (1 - momentum)
        assert 0.8 * exact < found.rate.value < exact and found.rate.low < 0.99 * exact < found.rate.high
    else:
        assert found.rate.value == pytest.approx(exact, rel=0.02) and found.rate.high / found.rate.low < 1.05
    # The dense iteration falls below it and explodes above.
    for factor, falls in ((0.95, True), (1.05, False)):
        a, b = factor * exact * sharpness, momentum
        radius = abs(np.linalg.eigvals(np.array([[1 + b - a, -b], [1, 0]]))).max()
        assert (radius < 1) == falls


@pytest.mark.slow
def test_a_linear_model_has_the_rate_of_its_second_moment():
    x, loader = points(256, 2, batch_size=32)
    found = look(Line(2, partial(torch.optim.SGD, lr=0.01)), loader, steps=60, probes=256)
    z = (2**0.5 * x).double()
    modes = reduced_modes(z @ z.mT)
    exact = mean_square_lr(modes, batch_size=32)
    assert found.rate.low * 0.9 <= exact <= found.rate.high * 1.1 and found.rate.value == pytest.approx(exact, rel=0.2)
    # All samples were looked at.
    size = useful_batch(lambda size: mean_square_lr(modes, batch_size=size), population=256, samples=256)
    assert found.useful == pytest.approx((size.low, size.size, size.high), rel=0.1)
    assert len(found.batches) == 2 and found.batches[0].population == 256


@pytest.mark.slow
def test_a_warm_up_does_not_count_and_groups_keep_their_ratio():
    _, loader = points(24, 4)

    def groups(parameters):
        (weight,) = parameters
        return torch.optim.SGD([{"params": [weight], "lr": 0.5}, {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}])

    warm_up = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1e-3)
    plain = look(Line(4, partial(torch.optim.SGD, lr=0.1)), loader).rate.value
    model = Line(4, groups, warm_up)
    assert look(model, loader).rate.value == pytest.approx(plain, rel=0.02)
    first, second = (group["lr"] for group in model.trainer.optimizers[0].param_groups)
    assert second / first == pytest.approx(0.2)


def test_each_run_begins_at_the_initial_weights_with_other_batches():
    class Watched(Model):
        def __init__(self):
            super().__init__(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
            self.seen, self.register_buffer = [], super().register_buffer
            self.register_buffer("count", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            if not torch.is_grad_enabled() or self.net[0].weight.grad_fn is not None:
                return super().training_step(batch, batch_idx)
            self.count += 1
            self.seen.append((float(self.count), self.net[0].weight.detach().clone(), batch[0].sum().item()))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    model = Watched()
    before = model.net[0].weight.detach().clone()
    found = look(model, data(n=200, batch_size=16), steps=30)
    begins = [seen for seen in model.seen if seen[0] == 1]
    assert len(begins) > len(found.runs) and all(torch.equal(weight, before) for _, weight, _ in begins)
    assert len({batch for *_, batch in begins}) > len(found.runs) / 2
    assert found.taken == 1 + sum(run.steps for run in found.runs)
    assert found.runs[-1].rate == pytest.approx(found.rate.value, rel=0.1)


def test_the_command_says_it_in_plain_lines_and_leaves_no_file(tmp_path, capsys):
    assert main(["suggest", *SMALL]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) in (4, 5) and all(line.startswith("lsp_callbacks: ") for line in lines)
    assert "the largest stable learning rate is" in lines[0] and "at batch size 256" in lines[0]
    assert os.listdir(tmp_path) == []


def test_json_and_a_checkpoint(tmp_path, capsys):
    from lsp_callbacks.demo import Digits, ResidualNet

    run = trainer(max_steps=3)
    run.fit(ResidualNet(width=8, depth=1), Digits())
    run.save_checkpoint("begin.ckpt")
    before = Path("begin.ckpt").read_bytes()
    assert main(["suggest", *SMALL, "--ckpt", "begin.ckpt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rate, batch = found["largest_stable_lr"], found["useful_batch_size"]
    assert 0 < rate["low"] <= rate["value"] <= rate["high"] and batch["configured"] == 256
    assert found["runs"][-1]["failure"] == "" and found["gradients"] > found["steps"] > 40
    assert Path("begin.ckpt").read_bytes() == before and os.listdir(tmp_path) == ["begin.ckpt"]


class Manual(Model):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().step()


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[0], self.net[2])]


class OwnRate(Model):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        for group in optimizer.param_groups:
            group["lr"] = 0.123
        optimizer.step(closure=closure)


class Constant(Model):
    """Its outputs are those of frozen weights, and a parameter that nothing depends on."""

    def configure_optimizers(self):
        return torch.optim.SGD([self.net[0].weight], 0.1)

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.net[2].weight)
        self.net[2].requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Manual, "automatic_optimization=False.*StabilityMonitor"),
        (OwnRate, "sets the learning rate by itself, to 0.123.*scheduler"),
        (partial(Model, optimizer=partial(torch.optim.LBFGS, lr=0.1)), "LBFGS"),
        (partial(Model, optimizer=partial(torch.optim.Adadelta, lr=0.1)), "Adadelta"),
        (Constant, "no learning rate is unstable at the initial weights.*initialisation"),
    ],
)
def test_refuses_what_is_not_modelled(model, says):
    with pytest.raises(Unmeasurable, match=says):
        look(model(), data())


def test_refuses_in_one_line(capsys):
    assert main(["suggest", *SMALL, "--trainer.limit_train_batches", "0"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("lsp-callbacks suggest: ") and "too few batches" in text and text.strip().count("\n") == 0


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["suggest", "--help"])
    assert stop.value.code == 0 and "--run_steps N" in capsys.readouterr().out
    assert main([]) == 0 and "lsp-callbacks suggest" in capsys.readouterr().out
