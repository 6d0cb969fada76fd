"""Lightning with FSDP2, measured: ``python examples/sharded_lightning.py`` starts two processes on the CPU."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import StabilityMonitor, StopOnInstability


class Classifier(pl.LightningModule):
    """A small classifier whose layers lie in shards on the processes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

    def configure_model(self):
        """Spread the weights over the processes."""
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        """Return the loss of a batch."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def train(processes=2, max_steps=64):
    """Train in shards; return what was measured."""
    pl.seed_everything(0)  # the same weights everywhere, before they are spread
    x = torch.randn(256, 6)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16, shuffle=True)
    strategy = ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1, process_group_backend="gloo")
    monitor = StabilityMonitor()
    trainer = pl.Trainer(
        accelerator="cpu", devices=processes, strategy=strategy, max_steps=max_steps, logger=False,
        enable_checkpointing=False, callbacks=[monitor, StopOnInstability()],
    )  # fmt: skip
    trainer.fit(Classifier(), loader)
    return monitor


if __name__ == "__main__":
    for key, curve in train().history.items():
        rank_zero_only(print)(key, round(curve.values[-1], 4))
