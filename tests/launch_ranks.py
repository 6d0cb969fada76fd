"""Run a script's ``main`` in two processes, with the variables that torchrun sets."""

import faulthandler
import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

WORLD, LIMIT = 2, 280


def launched(script, folder, *words):
    """What each process saves as ``<rank>.pt`` in the folder; a deadlock ends in the time limit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD), "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (here.parent, here))),
    }  # fmt: skip
    command = [sys.executable, __file__, script, str(folder), *words]
    subprocess.run(command, env=os.environ | shared, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs = [(folder / f"{rank}.log").read_text()[-3000:] for rank in range(WORLD)]
    assert all((folder / f"{rank}.done").exists() for rank in range(WORLD)), "\n".join(logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def run(script, rank, folder, *words):
    with open(Path(folder) / f"{rank}.log", "w") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    os.environ["LOCAL_RANK"] = str(rank)
    importlib.import_module(script).main(folder, *words)
    (Path(folder) / f"{rank}.done").touch()


def main(script, *words):
    """Imports cost more than many a run: they are made once, before the processes part."""
    importlib.import_module(script)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(script, rank, *words)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
