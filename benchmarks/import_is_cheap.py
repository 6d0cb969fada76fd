"""Claim: importing the package after Lightning takes less than 0.3 s of processor time, and imports no other Lightning.

``python benchmarks/import_is_cheap.py [runs]``: a compiled copy, as pip installs it, imported by new processes under
``-X importtime``. Printed are medians: seconds that Lightning takes and that the package adds, by the clock and of
processor time (the clock of a busy machine counts what others do), how many modules that are, and the five that take
longest by themselves.
"""

from __future__ import annotations

import compileall
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

PACKAGE = Path(__file__).resolve().parents[1] / "lsp_callbacks"
LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| *(\S+)")


SCRIPT = """
import time; began = time.process_time()
import {first}; between = time.process_time()
import lsp_callbacks; print(between - began, time.process_time() - between)
"""


def imported_after(first: str, folder: str) -> tuple[dict[str, float], list[float]]:
    """Return the seconds that each module takes by itself, and of the processor's time for ``first`` and for ours."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", SCRIPT.format(first=first)],
        cwd=folder, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    modules = {name: int(alone) / 1e6 for alone, _, name in LINE.findall(done.stderr)}
    return modules, [float(seconds) for seconds in done.stdout.split()[-2:]]


def main(runs: int = 3) -> None:
    """Print one table row for each name of Lightning."""
    slowest: dict[str, list[float]] = defaultdict(list)
    with TemporaryDirectory() as folder:
        copy = shutil.copytree(PACKAGE, Path(folder) / "lsp_callbacks", ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(copy, quiet=2)
        print("| after | Lightning, s | added, s | processor, s | added, s | modules added | of another Lightning |")
        print("|---|---|---|---|---|---|---|")
        for first, other in (("pytorch_lightning", "lightning.pytorch"), ("lightning.pytorch", "pytorch_lightning")):
            clock, processor = [], []
            for _ in range(runs):
                modules, seconds = imported_after(first, folder)
                names = list(modules)
                behind = names[names.index(first) + 1 :]
                added = sum(modules[name] for name in behind)
                clock.append((sum(modules.values()) - added, added))
                processor.append(seconds)
                for name in behind:
                    slowest[name].append(modules[name])
            others = sum(name.startswith(other.split(".")[0]) for name in behind)
            row = [f"{median(column):.2f}" for column in (*zip(*clock), *zip(*processor))]
            print("|", " | ".join([f"`{first}`", *row, str(len(behind)), str(others)]), "|")
    print("\nslowest by themselves, ms:")
    for name in sorted(slowest, key=lambda name: -median(slowest[name]))[:5]:
        print(f"  {name} {1e3 * median(slowest[name]):.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
