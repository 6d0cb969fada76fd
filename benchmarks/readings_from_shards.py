"""Question: what does a reading take of a model in shards, and what do the defaults read of one?

A small causal transformer under ``fully_shard`` and AdamW, on two processes with gloo. First each quantity alone, read
at every step and warm, in a run in which no whole copy of the weights is allowed where the shards will do: forward
passes, gradients, and the collectives of a reading, beside a run without us. *Gathers* move weights and gradients, as
in training (so many for each pass); *all-reduces* are of a few numbers: inner products, and the checks that no process
has failed, one before each collective. Then a run at the defaults: how many readings
there are of each quantity, and what ``monitor.skipped`` says of the others.

Usage:
    python benchmarks/readings_from_shards.py [steps of the run at the defaults] [--defaults]
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import warnings
from collections import Counter
from statistics import median
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.autograd.spread_tensors import spread_among
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.step.pending_step import PendingStep

WORLD, STEPS, WARM = 2, 10, 5
WORDS, LENGTH, BATCH, WIDTH, LAYERS = 64, 32, 16, 64, 2
NAMES = ("courant_step", "critical_sharpness", "spectral_norm", "mean_square_stability", "sharpness", "lyapunov")
#: What is read in one step.
TOGETHER = (*((name,) for name in NAMES), ("sharpness", "lyapunov"))
GATHERS = ("_allgather_base_", "_reduce_scatter_base_", "allgather_")
KINDS = (("embedding",), ("embedding_dense_backward",), GATHERS, ("allreduce_",))


class Language(pl.LightningModule):
    """A small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, LAYERS, enable_nested_tensor=False)
        self.register_buffer("hidden", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def configure_model(self) -> None:
        """Spread each block, and the rest."""
        for module in (self.table, *self.blocks.layers, self.head, self.blocks):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, words: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Return the cross-entropy of the next word."""
        logits = self.head(self.blocks(self.table(words[:, :-1]), mask=self.hidden))
        return F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count one operation on plain tensors, which those that are spread come to."""
        if spread_among(types):
            return NotImplemented
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Steps(pl.Callback):
    """What had been counted at the end of each step."""

    def __init__(self, operations: Operations):
        self.operations, self.rows = operations, []

    def on_train_batch_end(self, *_) -> None:
        """Take the sums."""
        self.rows.append([sum(self.operations.counts[name] for name in kind) for kind in KINDS])


def batches(steps: int) -> DataLoader:
    """Return the batches of this process: words that walk on by a few at random."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    first = torch.randint(0, WORDS, (steps * BATCH, 1), generator=generator)
    moves = torch.randint(0, 3, (steps * BATCH, LENGTH + 1), generator=generator)
    return DataLoader((first + moves.cumsum(-1)) % WORDS, BATCH)


def trained(steps: int, *callbacks: pl.Callback) -> None:
    """Train the model."""
    torch.manual_seed(0)
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1, process_group_backend="gloo")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, max_steps=steps, callbacks=[*callbacks],
        enable_model_summary=False, use_distributed_sampler=False, **quiet,
    )  # fmt: skip
    trainer.fit(Language(), batches(steps))


def counted(names: tuple[str, ...] = ()) -> list[float]:
    """Return what a step of a run with some quantities counts: passes, gradients, gathers, all-reduces."""
    ours = [StabilityMonitor(names, every_n_steps=1)] if names else []
    with Operations() as operations, mock.patch.object(PendingStep, "whole", side_effect=Unsupported("no room")):
        steps = Steps(operations)
        trained(STEPS, *ours, steps)
    for monitor in ours:
        assert not monitor.skipped, monitor.skipped
    pairs = [*zip(steps.rows, steps.rows[1:])][WARM:]
    return [median(after[k] - before[k] for before, after in pairs) for k in range(len(KINDS))]


def costs() -> None:
    """Print what a reading of each quantity takes beside the step."""
    base = counted()
    say("| quantity | forward passes | gradients | gathers | all-reduces |\n|---|---|---|---|---|")
    say(f"| a step of training | {' | '.join(f'{x:.0f}' for x in base)} |")
    for names in TOGETHER:
        label, counts = " and ".join(f"`{name}`" for name in names), zip(counted(names), base)
        say(f"| {label} | {' | '.join(f'{x - y:.0f}' for x, y in counts)} |")


def defaults(steps: int) -> None:
    """Print how often the defaults have read each quantity."""
    ours = StabilityMonitor()
    trained(steps, ours)
    say(f"\nAt the defaults, {steps} steps:\n\n| quantity | readings | how |\n|---|---|---|")
    for name, quantity in ours.monitor.quantities.items():
        curves = [curve for key, curve in ours.history.items() if key in quantity.keys]
        readings = max((sum(x == x for x in curve.values) for curve in curves), default=0)
        say(f"| `{name}` | {readings} | {ours.skipped.get(name) or ours.paths.get(name, '')} |")
    for name in ours.skipped.keys() - ours.monitor.quantities.keys():
        say(f"| `{name}` | 0 | {ours.skipped[name]} |")


def say(text: str) -> None:
    """Print on the first process."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def main(rank: int, port: int, steps: int) -> None:
    """Run on one process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ["WORLD_SIZE"] = str(WORLD)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    say(f"{sum(p.numel() for p in Language().parameters()):,} parameters, {WORLD} processes, AdamW\n")
    if "--defaults" not in sys.argv:
        costs()
    defaults(steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    length = int(next((word for word in sys.argv[1:] if word.isdigit()), 200))
    processes = [fork.Process(target=main, args=(rank, port, length)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
