"""Claim: the paces spend no more than the budget and the advance, and put more measurements near the edge.

Three networks on digits under SGD, whose rate lies far below the edge and passes near it in the middle of the run.
Prints, for the paces and for fixed periods: gradients by the model of the cost over those that budget and advance
allow, the share of the time by the clock, how many measurements had a Courant number above 0.5, and how often each
quantity was measured. Fixed periods measure everything as often as the paces measure the Courant number.
"""

import logging
import math
import warnings

import pytorch_lightning as pl
import torch
from runs import digits
from torch import nn
from torch.utils.data import DataLoader

from lsp_callbacks import StabilityMonitor
from lsp_callbacks.monitor.account import union

STEPS, BUDGET = 1500, 0.05
NETS = {
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)),
    "deep MLP": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    ),
    "CNN": lambda: nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 10)),
}


def bump(step: int) -> float:
    """Of the rate: 1 at both ends, 40 in the middle."""
    return 40.0 ** math.exp(-(((step - STEPS / 2) / (STEPS / 8)) ** 2))


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, bump)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(name: str, period: int | None) -> tuple[StabilityMonitor, float]:
    """The monitor after the run, and the gradients of its measurements."""
    pl.seed_everything(0, verbose=False)
    monitor = StabilityMonitor(every_n_steps=period, budget=BUDGET)
    trainer = pl.Trainer(
        max_steps=STEPS, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor],
    )  # fmt: skip
    trainer.fit(Classifier(NETS[name]()), DataLoader(digits(), batch_size=32, shuffle=True))
    return monitor, monitor.overhead


def main() -> None:
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    near: dict[str, int] = {"adaptive": 0, "fixed": 0}
    for name in NETS:
        adaptive, share = run(name, None)
        found, account = adaptive.history["stability/courant"], adaptive.monitor.cadence.account
        fixed, fixed_share = run(name, math.ceil(STEPS / len(found.steps)))
        allowed = account.budget * STEPS + account.advance
        everything = union(pace.parts or {} for pace in account.paces.values())
        for kind, monitor, time in (("adaptive", adaptive, share), ("fixed", fixed, fixed_share)):
            courants = monitor.history["stability/courant"].values
            own = sum(value > 0.5 for value in courants)
            near[kind] += own
            spent = account.spent if kind == "adaptive" else len(courants) * everything
            counts = ", ".join(f"{name} {pace.count}" for name, pace in monitor.monitor.cadence.paces.items())
            print(
                f"{name:9} {kind:9} {len(courants):3} measurements, {spent / allowed:.2f} of the gradients allowed, "
                f"{time:.1%} of the time, {own:3} near the edge (largest {max(courants):.2f}); {counts}"
            )
    ratio = near["adaptive"] / max(near["fixed"], 1)
    print(f"near the edge {ratio:.1f} times as many measurements as with fixed periods")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
