"""What importing the package imports, and takes; and that its callbacks are those of whichever Lightning is there."""

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lsp_callbacks

#: Seconds of processor time that the package may add to importing Lightning.
LIMIT = 0.3
NAMES = ("pytorch_lightning", "lightning.pytorch")
#: Imports in each order that is given, as ``a,b,c``, and forgets what was imported before the next.
SCRIPT = """
import sys, time
from importlib import import_module

NAMES = ("pytorch_lightning", "lightning.pytorch")

def loaded():
    return {name for name in NAMES if name in sys.modules}

for order in sys.argv[1:]:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("lsp_callbacks", "pytorch_lightning", "lightning", "lightning_fabric"):
            del sys.modules[name]
    for name in order.split(","):
        before, began = loaded(), time.process_time()
        module = import_module(name)
        took = time.process_time() - began
        assert loaded() == before | ({name} & set(NAMES)), f"importing {name} imported {loaded() - before}"
        if name == "lsp_callbacks":
            stop, monitor = module.StopOnInstability, module.StabilityMonitor()
            print(order, took)
        if "lsp_callbacks" in sys.modules:
            for library in map(sys.modules.get, loaded()):
                assert issubclass(stop, library.Callback) and isinstance(monitor, library.Callback), order
                trainer = library.Trainer(callbacks=monitor, logger=False, accelerator="cpu")
                assert trainer.callbacks.count(monitor) == 1
"""


@pytest.fixture
def installed(tmp_path):
    """The package as pip installs it: compiled."""
    shutil.copytree(
        Path(lsp_callbacks.__file__).parent, tmp_path / "lsp_callbacks", ignore=shutil.ignore_patterns("__pycache__")
    )
    assert compileall.compile_dir(tmp_path, quiet=2)
    return tmp_path


def test_no_name_of_lightning_is_imported_for_the_user_and_both_take_the_callbacks(installed):
    for name in NAMES:
        pytest.importorskip(name)
    orders = [f"lsp_callbacks,{a},{b}" for a, b in (NAMES, NAMES[::-1])]
    orders += [f"{a},lsp_callbacks,{b}" for a, b in (NAMES, NAMES[::-1])]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *orders],
        cwd=installed, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seconds = {order: float(took) for order, took in map(str.split, done.stdout.splitlines())}
    assert min(seconds[order] for order in orders[2:]) < LIMIT
