"""A loop of Lightning Fabric, watched; the values go to Fabric's loggers."""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import Monitor, SGDStability, Sharpness
from lsp_callbacks.loops import watch_fabric


def loss_fn(model, batch):
    """Return the mean over a batch."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def train(epochs=4, loggers=None, precision="32-true"):
    """Train a small classifier with momentum; return it and what was measured."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision, loggers=loggers)
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)

    monitor = Monitor(SGDStability(), Sharpness(), every_n_steps=8)
    watch = watch_fabric(fabric, model, optimizer, loss_fn, monitor)
    loader = fabric.setup_dataloaders(loader)
    for _ in range(epochs):
        for batch in watch(loader):
            optimizer.zero_grad()
            fabric.backward(loss_fn(model, batch))
            optimizer.step()
    return model, watch


if __name__ == "__main__":
    _, watch = train()
    for step, value in zip(*vars(watch.history["stability/courant"]).values()):
        print(f"step {step:4d}  courant {value:.3f}")
