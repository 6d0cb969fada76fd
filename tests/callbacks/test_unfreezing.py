"""Parameters that begin or cease to train in mid-run: numbers of the new set, nothing left of the old one."""

import math
import warnings
from functools import partial

import pytest
import torch
from harness import CLASSES, FEATURES, MOMENTUM, SGD, Model, data, fit
from pytorch_lightning.callbacks import BackboneFinetuning, Callback
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import LyapunovTrajectory, Sharpness, StabilityMonitor
from lsp_callbacks.quantities.curvature import sharpness as settings

SHARPNESS, LYAPUNOV, LOWER = "stability/sharpness", "stability/lyapunov", "stability/lyapunov_lower"
ADAM = partial(torch.optim.AdamW, lr=1e-2)


class Tuned(Model):
    """A backbone and a head, and the dense sharpness over what is trained at each step."""

    def __init__(self, optimizer=SGD):
        super().__init__(nn.Identity(), optimizer)
        self.backbone, self.head = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh()), nn.Linear(4, CLASSES)
        self.double()
        self.truth = []

    def loss(self, batch):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def on_before_optimizer_step(self, optimizer):
        moving = {name: p for name, p in self.named_parameters() if p.requires_grad}
        x, y = self.seen

        def loss(flat):
            parts = flat.split([p.numel() for p in moving.values()])
            own = {n: part.view_as(p) for (n, p), part in zip(moving.items(), parts)}
            backbone = {n.removeprefix("backbone."): p for n, p in own.items() if n.startswith("backbone.")}
            head = {n.removeprefix("head."): p for n, p in own.items() if n.startswith("head.")}
            features = torch.func.functional_call(self.backbone, backbone, (x,))
            return F.cross_entropy(torch.func.functional_call(self.head, head, (features,)), y)

        theta = torch.cat([p.detach().reshape(-1) for p in moving.values()])
        hessian = torch.autograd.functional.hessian(loss, theta)
        self.truth.append((len(theta), float(torch.linalg.eigvalsh(hessian)[-1])))

    def on_train_batch_start(self, batch, batch_idx):
        self.seen = batch


class Sets(Callback):
    """Which parts are trained from which step on."""

    def __init__(self, **parts):
        self.parts = parts

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for name, steps in self.parts.items():
            getattr(pl_module, name).requires_grad_(trainer.global_step in steps)


def run(*callbacks, optimizer=SGD, quantities=("sharpness", "lyapunov"), steps=18, every=1, **settings):
    monitor = StabilityMonitor(list(quantities), every_n_steps=every, window=2)
    model = {}

    def make():
        model["it"] = Tuned(optimizer)
        return model["it"]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lsp_callbacks")
        fit(make, *callbacks, monitor, loader=data(dtype=torch.float64), max_steps=steps, **settings)
    return monitor, model["it"].truth


@pytest.mark.parametrize(
    "callback, sizes, optimizer, waits",
    [
        (lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1), [15] * 6 + [43] * 3, MOMENTUM, []),
        (lambda: Sets(backbone=range(4, 9)), [15] * 4 + [43] * 5, SGD, []),
        # Adam waits for a second gradient of what it moves.
        (lambda: Sets(backbone=range(4, 9)), [15] * 4 + [43] * 5, ADAM, [0, 4]),
        (lambda: Sets(backbone=range(4)), [43] * 4 + [15] * 5, ADAM, [0]),
        (lambda: Sets(backbone=range(4)), [43] * 4 + [15] * 5, SGD, []),
        (lambda: Sets(head=range(0, 9, 2)), [43, 28] * 4 + [43], MOMENTUM, []),
    ],
)
def test_sharpness_is_that_of_what_is_trained(callback, sizes, optimizer, waits, monkeypatch):
    for name, value in (("_TOLERANCE", 1e-6), ("_BOUNDED_WARM", 60), ("_BOUNDED_COLD", 60)):
        monkeypatch.setattr(settings, name, value)
    monitor, truth = run(callback(), optimizer=optimizer, quantities=[Sharpness(bounded=True)], steps=9)
    assert [size for size, _ in truth] == sizes
    curve = monitor.history[SHARPNESS]
    assert curve.steps == [step for step in range(9) if step not in waits]
    assert curve.values == pytest.approx([truth[step][1] for step in curve.steps], rel=1e-3)


def test_windows_begin_anew_and_the_mean_is_over_new_ones_only():
    every = 4
    monitor, _ = run(Sets(backbone=range(9, 28)), steps=28, every=every)
    # The window of steps 8 and 9 is cut by the change at 9.
    assert monitor.history[LYAPUNOV].steps == [1, 5, 13, 17, 21, 25]
    assert monitor.history[LOWER].steps == [21, 25]
    alone, _ = run(Sets(backbone=range(9, 16)), steps=16, every=every, quantities=["lyapunov"])
    assert all(map(math.isfinite, monitor.history[LYAPUNOV].values)) and alone.history[LYAPUNOV].steps[2] == 13


def test_a_window_over_all_parameters_is_cut():
    monitor, _ = run(
        Sets(backbone=range(8, 50)), steps=50, every=1, quantities=[LyapunovTrajectory(transient=0, window=40)]
    )
    assert monitor.history["stability/lyapunov_trajectory"].steps[0] == 47  # begun at 8


def test_freezing_is_no_collapse():
    """The rank of K falls to that of a head of few parameters."""
    monitor, _ = run(Sets(backbone=range(6), head=range(18)), quantities=["mean_square_stability"])
    assert not any(monitor.history["stability/collapsed"].values)
    assert all(map(math.isfinite, monitor.history["stability/courant_mean_square"].values))
