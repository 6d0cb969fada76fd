"""Claim: critical sharpness takes 5 to 6 forward passes at first and 2 to 3 from then on: about one gradient.

Measures it every tenth step of runs on networks like those that people train, along their own updates, and counts the
forward passes of each search and the work of each measurement over that of a gradient (operations, numbers and
multiplications, see ``costs_are_counted.py``): no clock. Prints of the first reading and of the later ones passes and
gradients, what the quantity says that it costs, and how many readings were NaN. Names of networks choose some.
"""

import argparse
import logging
import statistics
import warnings

import torch
from costs_are_counted import compare
from models import TRAININGS

import lsp_callbacks.quantities.curvature.critical_sharpness as quantity
from lsp_callbacks import Unmeasurable
from lsp_callbacks.functional import CriticalStep, critical_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["MLP", "CNN", "char transformer", "ViT", "GPT-2 10 M"]
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=default)
    parser.add_argument("--readings", type=int, default=20)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    passes: list[int] = []
    uphill: list[int] = []

    def counted(change, **settings) -> CriticalStep:
        looked = []
        try:
            return critical_step(lambda s: (looked.append(s), change(s))[1], **settings)
        except Unmeasurable:
            uphill.append(1)
            raise
        finally:
            passes.append(len(looked))

    quantity.critical_step = counted
    for network in options.networks:
        passes.clear(), uphill.clear()
        counts = compare(TRAININGS[network], "critical_sharpness", options.readings)
        later = statistics.mean(passes[1:])
        said, spent = (statistics.mean(numbers[1:]) for numbers in (counts.said, counts.counted))
        print(
            f"{network:17} first {passes[0]} passes, {counts.counted[0]:.2f} gradients (said {counts.said[0]:.2f}); "
            f"later {later:.1f} passes (at most {max(passes[1:])}), {spent:.2f} gradients (said {said:.2f}); "
            f"NaN {len(uphill)} of {len(passes)}",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
