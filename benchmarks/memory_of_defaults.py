"""Claim: at the defaults the peak of a process grows by at most 1.5 times what it grows by in training alone.

Growth is the peak of the resident memory (``VmHWM`` of Linux) after some steps of training, less what the process had
after its imports. Each run is a process of its own: training alone, and training with ``StabilityMonitor()``, whose
default quantities are each measured every ten steps, so that all of them are within few steps, again and again. What
does not fit into the cap of memory is left out, as in any run at the defaults, and printed with the number. On a small
network the cap is 256 MB, which may be more than half of what training takes. Code pages are those of libraries that
are read from their files when they are first used: they are clean, and shared by all processes. Each number is the
median of three runs. Names of networks choose some.
"""

import argparse
import importlib
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch
from models import TRAININGS

from lsp_callbacks import StabilityMonitor

#: Those of the claim.
NETWORKS = ["MLP", "CNN", "char transformer", "ViT", "GPT-2 10 M"]
EVERY, STEPS, RUNS = 10, 25, 3


def resident(kind: str) -> float:
    """Megabytes of this process: ``VmHWM`` is the highest resident memory so far, ``RssFile`` code pages now."""
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{kind}:")[1].split()[0]) / 1024


def grown(network: str, *, measures: bool) -> tuple[float, float]:
    """Megabytes by which the peak of this process, and its code pages, grow in a run."""
    if network.startswith("GPT"):
        importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    before, code = resident("VmHWM"), resident("RssFile")
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
    return resident("VmHWM") - before, resident("RssFile") - code


def in_process(network: str, *flags: str) -> tuple[float, float, str]:
    """The same in processes of their own, the median of each number, with what the last one prints beside."""
    command = [sys.executable, __file__, network, "--grown", *flags]
    runs = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines() for _ in range(RUNS)
    ]
    peak, code = (median(column) for column in zip(*(map(float, run[-1].split()) for run in runs)))
    return peak, code, "\n".join(runs[-1][:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"all of {', '.join(NETWORKS)}")
    parser.add_argument("--grown", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grown:
        print(*grown(options.networks[0], measures=not options.alone))
        return
    print("| network | growth of the peak in training | with all defaults | ratio | ratio without code pages |")
    print("|---|---|---|---|---|")
    left_out = {}
    for network in options.networks or NETWORKS:
        (alone, code, _), (ours, more_code, left_out[network]) = in_process(network, "--alone"), in_process(network)
        ratios = f"{ours / alone:.2f} | {(ours - more_code) / (alone - code):.2f}"
        sizes = f"{alone:.0f} MB, {code:.0f} of them code | {ours:.0f} MB, {more_code:.0f}"
        print(f"| {network} | {sizes} | {ratios} |", flush=True)
    for network, text in left_out.items():
        if text:
            print(f"{network}\n{text}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # as many arenas
    main()
