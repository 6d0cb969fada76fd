"""Losses in which the samples of a batch meet: they are no mean over samples, and are refused."""

import math

import pytest
import torch
from harness import CLASSES, FEATURES, Model, fit
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import StabilityMonitor

COURANT = "stability/courant_mean_square"


class Contrastive(Model):
    """Two views of each sample, told apart from those of the others."""

    def training_step(self, batch, batch_idx):
        a, b = (F.normalize(self.net(x), dim=1) for x in (batch[0], batch[0] + 0.1))
        return F.cross_entropy(2 * a @ b.T, torch.arange(len(a)))


class Pairs(Model):
    """One view."""

    def training_step(self, batch, batch_idx):
        f = self.net(batch[0])
        return F.cross_entropy(f @ f.T, torch.arange(len(f)))


class OutsideOfItsLayer(Model):
    """A weight that is used by itself, so that rows are formed one by one, of samples that do not meet."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)))

    def training_step(self, batch, batch_idx):
        f = self.net(batch[0]) + batch[0] @ self.net[0].weight.T[:, :CLASSES]
        return F.cross_entropy(f, batch[1])


@pytest.mark.parametrize("make", [Contrastive, Pairs])
def test_samples_that_meet_are_refused(make):
    monitor = StabilityMonitor(["mean_square_stability", "sharpness"], every_n_steps=1)
    with pytest.warns(UserWarning, match="depend on the other samples of its batch.*courant_gd"):
        fit(make, monitor, max_steps=3)
    assert all(map(math.isnan, monitor.history[COURANT].values))
    assert monitor.courant_source == "courant_gd" and all(v > 0 for v in monitor.history["stability/courant"].values)


def test_single_rows_of_samples_that_do_not_meet_are_measured():
    monitor = StabilityMonitor(["mean_square_stability"], every_n_steps=1)
    torch.manual_seed(0)
    fit(OutsideOfItsLayer, monitor, max_steps=3)
    assert "rows" in monitor.monitor.quantities["mean_square_stability"].latest.kernel.path.values()
    assert all(v > 0 for v in monitor.history[COURANT].values)
