"""Claim: what a reading takes in passes, vectors and all-reduces is known from a small transformer, at any size.

A causal transformer with one table of words, trained with AdamW, with and without one quantity that is read at every
step, warm. Operations are counted, not timed: forward passes by look-ups in the table, whole gradients by its backward
operation (under data parallelism each of them is one all-reduce of all parameters), multiplications of matrices for the
price, in training steps. Vectors over all parameters are those that a quantity carries from one reading to the next;
what is smaller than one is as large as activations or the sides of layers, and does not count. The second table
multiplies these constants for a model of so many parameters: bytes of vectors in 32 bits, of all ranks together; bytes
that each rank sends and receives by a ring of many ranks; and the pace at which the reading takes 5 % of the training.
"""

import argparse
import logging
import warnings
from statistics import median

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.operators.cost import WorkCounter
from lsp_callbacks.quantities import PRESETS

WORDS, LENGTH, BATCH, STEPS, WARM = 256, 32, 16, 16, 8
NAMES = [*PRESETS["default"], "critical_sharpness"]
SIZES = {"1e9": 1e9, "1e11": 1e11}
SHARE = 0.05


class Language(pl.LightningModule):
    """A small language model."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS, bias=False)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of the next word."""
        (words,) = batch
        logits = self.head(self.blocks(self.table(words[:, :-1]), mask=self.hidden))
        return F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Passes(WorkCounter):
    """Counts operations, and passes by those of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = self.gradients = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count one operation."""
        name = func.overloadpacket.__name__
        self.forwards += name == "embedding"
        self.gradients += name == "embedding_dense_backward"
        return super().__torch_dispatch__(func, types, args, kwargs)


class Counts(pl.Callback):
    """What had been counted at the end of each step."""

    def __init__(self, passes: Passes):
        self.passes, self.rows = passes, []

    def on_train_batch_end(self, *_) -> None:
        """Take the sums."""
        self.rows.append((self.passes.forwards, self.passes.gradients, self.passes.flops))


def counted(width: int, layers: int, name: str | None) -> tuple[list[float], float, StabilityMonitor | None]:
    """Return forward passes, gradients and flops of a warm step, the parameters, and the monitor."""
    torch.manual_seed(0)
    model, passes = Language(width, layers), Passes()
    monitor = None if name is None else StabilityMonitor([name], every_n_steps=1, max_memory="8GB")
    counts = Counts(passes)
    words = torch.randint(0, WORDS, (STEPS * BATCH, LENGTH + 1))
    trainer = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*([] if monitor is None else [monitor]), counts],
    )  # fmt: skip
    with passes:
        trainer.fit(model, DataLoader(TensorDataset(words), batch_size=BATCH))
    steps = [[b - a for a, b in zip(*pair)] for pair in zip(counts.rows[WARM:], counts.rows[WARM + 1 :])]
    return [median(column) for column in zip(*steps)], sum(p.numel() for p in model.parameters()), monitor


def vectors(monitor: StabilityMonitor, name: str, parameters: float) -> float:
    """Return how many whole vectors over all parameters a quantity carries."""

    def size(value: object) -> int:
        if isinstance(value, Tensor):
            return value.numel()
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    return size(monitor.monitor.quantities[name].vectors()) // parameters


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    (forwards, gradients, flops), parameters, _ = counted(given.width, given.layers, None)
    print(f"{parameters:,.0f} parameters, {BATCH} sequences of {LENGTH} words, AdamW\n")
    print("| quantity | forward passes | whole gradients | price in training steps | vectors carried |")
    print("|---|---|---|---|---|")
    found = {}
    for name in NAMES:
        (more_forwards, more_gradients, more_flops), _, monitor = counted(given.width, given.layers, name)
        assert monitor is not None
        row = more_forwards - forwards, more_gradients - gradients, more_flops / flops - 1
        found[name] = *row, vectors(monitor, name, parameters)
        print(f"| `{name}` | {row[0]:.0f} | {row[1]:.0f} | {row[2]:.2f} | {found[name][3]:.0f} |")
    print()
    for title, size in SIZES.items():
        print(f"\nAt {title} parameters:\n")
        print("| quantity | vectors | sent and received a reading, each rank | steps from reading to reading for 5 % |")
        print("|---|---|---|---|")
        for name, (_, whole, price, held) in found.items():
            sent = whole * 2 * 4 * size / 1e9
            print(f"| `{name}` | {held * 4 * size / 1e9:,.0f} GB | {sent:,.0f} GB | {max(price / SHARE, 1):,.0f} |")


if __name__ == "__main__":
    main()
