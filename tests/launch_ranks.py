"""Start a script in two processes, as torchrun does."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

WORLD = 2


def launched(script, folder):
    """What each process of ``python <script> <folder>`` saves as ``<rank>.pt``; a deadlock ends in the time limit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD), "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (here.parent, here))),
    }  # fmt: skip
    command = [sys.executable, str(here / script), str(folder)]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(open(folder / f"{rank}.log", "w")) for rank in range(WORLD)]
        processes = [
            subprocess.Popen(command, env=os.environ | shared | {"LOCAL_RANK": str(rank)}, stdout=log, stderr=log)
            for rank, log in enumerate(logs)
        ]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(WORLD))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
