"""Claim: at the defaults the peak of a process grows by at most 1.5 times what it grows by in training alone.

Growth is the peak of the resident memory (``VmHWM`` of Linux) after some steps of training, less what the process had
after its imports. Each run is a process of its own: training alone, and training with ``StabilityMonitor()``, whose
default quantities are each measured every ten steps, so that all of them are within few steps, again and again. What
does not fit into the cap of memory is left out, as in any run at the defaults, and printed with the number. On a small
network the cap is 256 MB, which may be more than half of what training takes. Names of networks choose some.
"""

import argparse
import importlib
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from models import TRAININGS

from lsp_callbacks import StabilityMonitor

#: Those of the claim.
NETWORKS = ["MLP", "CNN", "char transformer", "ViT", "GPT-2 10 M"]
EVERY, STEPS = 10, 25


def peak() -> float:
    """The highest resident memory of this process so far, in megabytes."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 1024


def grown(network: str, *, measures: bool) -> float:
    """Megabytes by which the peak of this process grows in a run."""
    if network.startswith("GPT"):
        importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    before = peak()
    pl.seed_everything(0, verbose=False)
    monitor = StabilityMonitor(every_n_steps=EVERY)
    trainer = pl.Trainer(
        max_steps=STEPS, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor] if measures else [],
    )  # fmt: skip
    training = TRAININGS[network]
    trainer.fit(training.module(), training.loader())
    for name, reason in monitor.skipped.items():
        print(f"  without {name}: {reason}")
    return peak() - before


def in_process(network: str, *flags: str) -> tuple[float, str]:
    """The same in a process of its own, with what it prints beside."""
    command = [sys.executable, __file__, network, "--grown", *flags]
    *beside, number = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return float(number), "\n".join(beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"all of {', '.join(NETWORKS)}")
    parser.add_argument("--grown", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grown:
        print(grown(options.networks[0], measures=not options.alone))
        return
    print("| network | growth of the peak in training | with all defaults | ratio |\n|---|---|---|---|")
    left_out = {}
    for network in options.networks or NETWORKS:
        training, ours = in_process(network, "--alone")[0], in_process(network)
        left_out[network] = ours[1]
        print(f"| {network} | {training:.0f} MB | {ours[0]:.0f} MB | {ours[0] / training:.2f} |", flush=True)
    for network, text in left_out.items():
        if text:
            print(f"{network}\n{text}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # as many arenas
    main()
