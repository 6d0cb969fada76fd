"""What each of two processes runs for `test_roll_back`: the same run twice, and it breaks once, in one process."""

import os
from functools import partial

import torch
import torch.distributed as dist
from callbacks.test_roll_back import Noisy, Seen, batches, run

DDP = {"strategy": "ddp", "devices": 2}


class OnOneRank(Noisy):
    """The loss is NaN in the last process alone; masks differ between the processes."""

    def on_fit_start(self):
        if not getattr(self, "is_seeded", False):
            self.is_seeded = True
            torch.manual_seed(self.global_rank)

    def training_step(self, batch, batch_idx):
        if self.global_rank != self.trainer.world_size - 1:
            self.breaks.clear()
        return super().training_step(batch, batch_idx)


def main(folder):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    left = {}
    for name, breaks in (("plain", []), ("broken", [16])):
        seen = Seen()
        back, _ = run(
            os.path.join(folder, name), partial(OnOneRank, breaks), seen, loader=batches(160), factor=1.0, **DDP
        )
        left[name] = {"states": seen.states, "batches": seen.batches, "roll_backs": back.roll_backs}
    torch.save(left, os.path.join(folder, f"{rank}.pt"))
