"""A GAN, and monitors of it."""

from functools import partial

import torch
from harness import FEATURES, Model
from torch import Tensor, nn
from torch.nn import functional as F

from lsp_callbacks import LyapunovTrajectory, Sharpness, StabilityMonitor

ADAM = partial(torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999))


class GAN(Model):
    """The generator steps first; noise is drawn for each player, or once."""

    def __init__(self, noise="twice", toggle=True, activation=nn.Tanh, optimizer=ADAM):
        net = nn.Sequential(nn.Linear(FEATURES, 5), activation(), nn.Linear(5, 1))
        super().__init__(net, optimizer)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), activation(), nn.Linear(5, FEATURES))
        self.noise, self.toggle, self.flags = noise, toggle, []

    def draw(self, batch):
        return batch[0][:, :2] if self.noise == "batch" else torch.randn(len(batch[0]), 2)

    def generator_loss(self, batch, z=None):
        return F.softplus(-self.net(self.generator(self.draw(batch) if z is None else z))).mean()

    def critic_loss(self, batch, z=None, detach=False):
        fake = self.generator(self.draw(batch) if z is None else z)
        fake = fake.detach() if detach else fake
        return F.softplus(-self.net(batch[0])).mean() + F.softplus(self.net(fake)).mean()

    def training_step(self, batch, batch_idx):
        z = self.draw(batch) if self.noise == "once" else None
        losses = {"generator": self.generator_loss, "critic": partial(self.critic_loss, detach=True)}
        for name, optimizer in zip(losses, self.optimizers()):
            if self.plays(name, batch_idx):
                loss = self.turn(optimizer, partial(losses[name], batch, z))
        return {"loss": loss.detach()}

    def plays(self, name, batch_idx):
        return True

    def turn(self, optimizer, loss):
        if self.toggle:
            self.toggle_optimizer(optimizer)
        value = loss()
        optimizer.zero_grad()
        self.manual_backward(value)
        self.before(optimizer)
        optimizer.step()
        self.flags.append([p.requires_grad for p in self.parameters()])
        if self.toggle:
            self.untoggle_optimizer(optimizer)
        return value

    def before(self, optimizer): ...

    def memory(self):
        return self.flags

    def configure_optimizers(self):
        return [self.optimizer(part.parameters()) for part in (self.generator, self.net)]


def generator_loss(module, batch) -> Tensor:
    return module.generator_loss(batch)


def critic_loss(module, batch) -> Tensor:
    return module.critic_loss(batch)


LOSSES = {"generator": generator_loss, "critic": critic_loss}


class Short(LyapunovTrajectory):
    """Seven steps, too few for an error bar."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.window = 7

    def compute(self):
        return dict(zip(self.keys, (self.growth.mean(), self.growth.std())))


def monitor(quantities=("sharpness", "lyapunov_trajectory"), losses=LOSSES, **settings):
    short = {"sharpness": Sharpness(), "lyapunov_trajectory": Short(transient=1)}
    return StabilityMonitor([short.get(name, name) for name in quantities], every_n_steps=1, loss_fn=losses, **settings)
