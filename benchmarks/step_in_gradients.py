"""Question: how many gradients does a whole training step take? The model of the cost should say no more than that.

Trains with Lightning, a logger and one logged value, and times a forward and a backward pass of each step's batch
beside the step itself, by the processor's time. Prints the ratio of the sums and what the model says.
"""

import argparse
import logging
import time
import warnings
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from models import TRAININGS
from pytorch_lightning.loggers import CSVLogger
from torch.nn import functional as F

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.operators.cost import step_cost

STEPS, WARM = 120, 20


class Clock(pl.Callback):
    """Times a gradient before each step, and the step."""

    def __init__(self) -> None:
        self.gradients, self.steps, self._began = [], [], None

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        now = time.process_time()
        if self._began is not None:
            self.steps.append(now - self._began)
        began = time.process_time()
        loss = F.cross_entropy(module.net(batch[0]).flatten(0, -2), batch[1].flatten())
        torch.autograd.grad(loss, [*module.parameters()])
        self._began = time.process_time()
        self.gradients.append(self._began - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=["MLP", "CNN", "char transformer"])
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    for name in parser.parse_args().networks:
        pl.seed_everything(0, verbose=False)
        clock, said = Clock(), []
        monitor = StabilityMonitor(["courant_step"], every_n_steps=STEPS)
        monitor.observer.listeners.append(lambda snapshot: said.append(step_cost(snapshot)))  # noqa: B023
        for callback, steps in ((clock, STEPS), (monitor, 2)):
            with TemporaryDirectory() as folder:
                trainer = pl.Trainer(
                    max_steps=steps, max_epochs=-1, logger=CSVLogger(folder), enable_checkpointing=False,
                    accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
                )  # fmt: skip
                trainer.fit(TRAININGS[name].module(), TRAININGS[name].loader())
        ratio = sum(clock.steps[WARM:]) / sum(clock.gradients[WARM:-1])
        print(f"{name}: a step takes {ratio:.2f} gradients, the model says {said[0]:.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
