"""What gives a headline number of 0, or nearly so, and that nothing calm is said of it where the run is not."""

import math

import pytest
import pytorch_lightning as pl
import torch
from harness import fit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.report import sentence

COURANT, GD = "stability/courant_mean_square", "stability/courant_gd"
GENERATOR = torch.Generator().manual_seed(0)
X, W = torch.randn(256, 8, generator=GENERATOR), torch.randn(4, 8, generator=GENERATOR)
Y = (X @ W.T).argmax(1)


class Model(pl.LightningModule):
    def __init__(self, net, loss=F.cross_entropy, lr=0.1, optimizer=torch.optim.SGD, schedule=None):
        super().__init__()
        self.net, self.loss, self.lr, self.optimizer, self.schedule = net, loss, lr, optimizer, schedule

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad], self.lr)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def net(activation=nn.Tanh, outputs=4):
    return nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, outputs))


def changed(net, change):
    with torch.no_grad():
        change(net)
    return net


def zero(module):
    for p in module.parameters():
        p.zero_()


def regression(loss):
    return lambda f, y: loss(f[:, 0], y - 1.5)


def far(f, y):
    return F.huber_loss(f, 1e4 * y)


#: The model, whether its first reading is 0, positive or NaN, and what the verdict may be after twelve steps.
CASES = {
    "dead units": (lambda: Model(changed(net(nn.ReLU), lambda n: n[0].bias.fill_(-100.0))), "positive", "unknown"),
    "all weights 0": (lambda: Model(changed(net(), zero)), "positive", "unknown"),
    "last layer 0": (lambda: Model(changed(net(), lambda n: zero(n[2]))), "positive", "stable"),
    "first layer frozen": (lambda: Model(changed(net(), lambda n: n[0].requires_grad_(False))), "positive", "stable"),
    "saturated at wrong classes": (
        lambda: Model(changed(net(), lambda n: n[2].weight.mul_(1e4)), lr=1e-3), "nan", "stable edge recovered unstable"
    ),
    "saturated at one class": (lambda: Model(changed(net(), lambda n: n[2].bias[0].fill_(300.0))), "nan", "stable"),
    "saturated at the right classes": (
        lambda: Model(changed(nn.Linear(8, 4), lambda n: n.weight.copy_(1e3 * W))), "positive", "stable unknown"
    ),
    "rate of 0": (lambda: Model(net(), lr=0.0), "zero", "unknown"),
    "warm-up from 0": (lambda: Model(net(), schedule=lambda t: min(t / 10, 1)), "zero", "stable"),
    "loss that is linear": (lambda: Model(net(outputs=1), regression(F.l1_loss)), "nan", "stable"),
    "loss that is linear there": (lambda: Model(net(outputs=1), regression(far)), "nan", "stable"),
    "exploded by Adam": (lambda: Model(net(nn.ReLU), lr=30.0, optimizer=torch.optim.Adam), "nan", "risen unstable"),
}  # fmt: skip


def measured(make, **settings):
    torch.manual_seed(1)
    monitor = StabilityMonitor(["mean_square_stability", "sharpness"], every_n_steps=1)
    fit(make, monitor, loader=DataLoader(TensorDataset(X, Y), 32), max_steps=12, seed=1, **settings)
    return monitor


@pytest.mark.filterwarnings("ignore:lsp_callbacks could not measure")
@pytest.mark.parametrize("kind", CASES)
def test_a_reading_of_0_calms_nobody(kind):
    make, first, states = CASES[kind]
    monitor = measured(make)
    value = monitor.history[COURANT].values[0]
    assert {"zero": value == 0, "positive": 0 < value < 0.1, "nan": math.isnan(value)}[first]
    assert monitor.verdict.state in states.split(), sentence(monitor.verdict)
    if first == "nan":  # the number of the whole curvature takes its place for the run
        assert monitor.courant_source == "courant_gd" and all(v > 0 for v in monitor.history[GD].values)


def test_the_reason_is_given():
    with pytest.warns(UserWarning, match="no curvature in the outputs.*courant_gd and lyapunov know the rest"):
        measured(CASES["loss that is linear"][0])


def test_an_exploded_softmax_has_no_curvature_in_float64_either():
    """The 0 is true of the frozen Gauss-Newton matrix, and useless."""
    make, *_ = CASES["exploded by Adam"]
    torch.manual_seed(1)
    model = make()
    x, y = X[:32], Y[:32]
    optimizer = model.configure_optimizers()
    model.loss(model.net(x), y).backward()
    optimizer.step()
    f = model.net.double()(x.double())
    logs = f.log_softmax(1)
    p, rest = logs.exp(), -torch.expm1(logs)
    products = p[:, :, None] * p[:, None, :]
    hessian = torch.diag_embed(p * rest) - products.tril(-1) - products.triu(1)
    assert F.cross_entropy(f, y).item() > 100
    assert float(torch.linalg.eigvalsh(hessian).amax()) < 1e-30
