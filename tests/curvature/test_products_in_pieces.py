"""Exact products over pieces of a batch: the sum is that of the whole, and where it is not, nothing is divided."""

import math
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from harness import fit
from torch import nn

from lsp_callbacks import Sharpness, StabilityMonitor, Unmeasurable
from lsp_callbacks.monitor import budget
from lsp_callbacks.operators.curvature.followed_top import USUAL
from lsp_callbacks.operators.curvature.hessian import hessian
from lsp_callbacks.operators.divided_step import graph_memory, pieces_of
from lsp_callbacks.operators.footprint import TWICE, footprint
from lsp_callbacks.step.room import Room


class Net(pl.LightningModule):
    """Two layers in double precision, with what is given between them."""

    def __init__(self, between=None, *, reduction="mean"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), between or nn.Tanh(), nn.Linear(16, 3)).double()
        self.reduction = reduction

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction=self.reduction)
        return loss / 7 if self.reduction == "sum" else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader():
    """Return two batches of 11 samples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(22, 6, generator=generator, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, torch.randint(3, (22,), generator=generator))
    return torch.utils.data.DataLoader(data, batch_size=11)


def looked_at(model, look, **settings):
    """Return what is seen of the first step of a run in which a graph may take a third of what the whole takes."""
    seen = []
    monitor = StabilityMonitor("sharpness", every_n_steps=1)
    observe = monitor.monitor.observe

    def observed(snapshot):
        third = 2.01 * TWICE * footprint(snapshot).activations / 3
        seen.append(look(replace(snapshot, room=lambda: Room(third, math.inf))))
        return observe(snapshot)

    vars(monitor.monitor)["observe"] = observed
    fit(model, monitor, loader=loader(), max_steps=1, **settings)
    return seen[0]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_product_is_that_of_the_whole_to_rounding(micro_batches):
    """11 samples are not divided evenly; of two micro-batches each is divided."""

    def look(snapshot):
        whole, v = replace(snapshot, room=Room), torch.ones(len(snapshot.flat_gradient), dtype=torch.float64)
        assert not pieces_of(whole) and graph_memory(whole) == TWICE * footprint(snapshot).activations
        assert graph_memory(snapshot) == graph_memory(whole) / len(pieces_of(snapshot))
        return len(pieces_of(snapshot)), *(hessian(step, method="exact") @ v for step in (snapshot, whole))

    count, divided, whole = looked_at(Net, look, accumulate_grad_batches=micro_batches)
    assert count == 3 * micro_batches and float(whole.norm()) > 0
    assert torch.allclose(divided, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Net(nn.BatchNorm1d(16).double()),
        lambda: Net(nn.Dropout(0.5)),
        lambda: Net(reduction="sum"),
    ],
    ids=["statistics of the batch", "random masks", "a sum, not a mean"],
)
def test_what_is_no_mean_over_samples_is_not_divided(model):
    """A sum over samples would be one over pieces, too, but each counts by its share of the samples."""
    assert looked_at(model, pieces_of) == []


def test_gradients_of_pieces_are_compared_with_the_steps():
    """A loss whose value adds up, and whose gradient does not, is refused."""

    class Twice(Net):
        def training_step(self, batch, batch_idx):
            odd = self.net[0].weight.sum() * len(batch[0])
            return super().training_step(batch, batch_idx) + odd - odd.detach()

    def look(snapshot):
        assert pieces_of(snapshot)
        with pytest.raises(Unmeasurable, match="gradient"):
            hessian(snapshot, method="exact") @ snapshot.flat_gradient
        return True

    assert looked_at(Twice, look)


def test_a_run_divides_its_batch_where_the_graph_would_not_fit(monkeypatch):
    """The numbers stay, and the price has the graphs that are made anew."""
    values, prices = [], []
    for room in (1e12, 1e3):
        monkeypatch.setattr(budget, "beside_training", lambda training, multiple, beside=0.0, room=room: room)
        monitor = StabilityMonitor([Sharpness(method="exact")], budget=1.0)
        fit(Net, monitor, loader=loader(), max_steps=2)
        values.append(monitor.history["stability/sharpness"].values)
        prices.append(monitor.monitor.cadence.paces["sharpness"].price)
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert prices[1] == pytest.approx(prices[0] + 1.3 * (USUAL[1][0] - 1) + 1 / 3)  # one is a comparison
