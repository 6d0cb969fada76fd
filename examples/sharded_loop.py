"""A plain loop with FSDP2, watched: ``torchrun --nproc-per-node 2 examples/sharded_loop.py``."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lsp_callbacks.loops import Watch
from lsp_callbacks.monitor.configure import configured


def loss_fn(model, batch):
    """Return the mean over a batch."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def train(epochs=4):
    """Train a small classifier in shards; return it and what was measured."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)  # the same weights everywhere, before they are spread
    x = torch.randn(256, 6)
    data = TensorDataset(x, x[:, :3].argmax(1))
    loader = DataLoader(data, batch_size=16, sampler=DistributedSampler(data))
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    watch = Watch(model, optimizer, loss_fn, configured(every_n_steps=8))
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in watch(loader):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    return model, watch


if __name__ == "__main__":
    _, watch = train()
    if dist.get_rank() == 0:
        for key, curve in watch.history.items():
            print(key, round(curve.values[-1], 4))
    dist.destroy_process_group()
