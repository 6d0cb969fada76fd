"""What each of two processes runs for `test_cap_learning_rate`: a jump of the rate, capped by the budget's readings."""

import os
from functools import partial

import torch
import torch.distributed as dist
from callbacks.test_cap_learning_rate import Rates
from harness import fit
from schedules import Scheduled
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from two_ranks import DDP, dataset

from lsp_callbacks import CapLearningRate, StabilityMonitor


def main(folder):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    jump = partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1000.0 if 12 <= step < 30 else 1.0)
    rates, monitor, cap = Rates(), StabilityMonitor(), CapLearningRate(verbose=False)
    run = fit(
        lambda: Scheduled(lambda m, o: jump(o), lr=0.02), rates, monitor, cap,
        loader=DataLoader(dataset(dtype=torch.float32), batch_size=8), max_steps=40, max_epochs=-1, **DDP,
    )  # fmt: skip
    weights = [p.detach().clone() for p in run.model.parameters()]
    left = {"used": rates.used, "between": rates.between, "state": cap.state_dict(), "weights": weights}
    left["readings"] = {key: vars(monitor.history[key]) for key in ("stability/courant", "stability/lr_applied")}
    torch.save(left, os.path.join(folder, f"{rank}.pt"))
