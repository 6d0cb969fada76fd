"""A plain PyTorch loop, watched: two lines are added, and one is changed."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import Monitor, SGDStability, Sharpness
from lsp_callbacks.loops import Watch


def loss_fn(model, batch):
    """Return the mean over a batch."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def train(epochs=4, watched=True):
    """Train a small classifier with momentum; return it and what was measured."""
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    watch = None
    batches = loader
    if watched:
        watch = Watch(model, optimizer, loss_fn, Monitor(SGDStability(), Sharpness(), every_n_steps=8))
    for _ in range(epochs):
        if watch is not None:
            batches = watch(loader)
        for batch in batches:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    return model, watch


if __name__ == "__main__":
    _, watch = train()
    for step, value in zip(*vars(watch.history["stability/courant"]).values()):
        print(f"step {step:4d}  courant {value:.3f}")
