"""Claim: all default quantities together cost a few per cent of the training time, logging and alignment included.

Pairs of runs, one without and one with ``StabilityMonitor(), StopOnInstability()`` at their defaults, in turn and in
both orders, on MNIST. Each run is as long as the default cadence waits for its second measurement. Prints, for each
model, the median of the ratios by the wall clock and by the processor's, the ratio of the fastest runs of either kind
(other work on a machine can only add time), and ``stability/overhead``, which compares times of one and the same run.
"""

import logging
import time
import warnings
from statistics import median
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from runs import mnist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lsp_callbacks import StabilityMonitor, StopOnInstability


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def seconds(build, steps: int, batch: int, monitored: bool) -> tuple[float, float, float]:
    """By the wall clock, by the processor's, and the share that the monitor itself says."""
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(mnist(), batch_size=batch, shuffle=True)
    ours = StabilityMonitor()
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps, max_epochs=-1, logger=CSVLogger(folder), enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[ours, StopOnInstability(verbose=False)] if monitored else [],
        )  # fmt: skip
        model = Classifier(build())
        began = time.perf_counter(), time.process_time()
        trainer.fit(model, loader)
        return time.perf_counter() - began[0], time.process_time() - began[1], ours.overhead


def main(pairs: int = 5) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name, build, steps, batch in (
        ("MLP 784-256-256-10, batch 128", mlp, 6286, 128),
        ("CNN, batch 64", cnn, 1706, 64),
    ):
        seconds(build, 100, batch, True)  # imports and first calls
        runs: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
        for pair in range(pairs):
            for monitored in (False, True) if pair % 2 else (True, False):
                runs[monitored].append(seconds(build, steps, batch, monitored))
        wall, processor = (
            [ours[clock] / without[clock] for ours, without in zip(runs[True], runs[False])] for clock in (0, 1)
        )
        fastest = min(ours[1] for ours in runs[True]) / min(without[1] for without in runs[False])
        print(
            f"{name}: {median(wall):.3f} times the time without ({', '.join(f'{r:.3f}' for r in wall)}), "
            f"of the processor {median(processor):.3f}, fastest over fastest {fastest:.3f}; "
            f"its own share {median(ours[2] for ours in runs[True]):.1%}",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)  # less noise
    main()
