"""What a run in processes of its own leaves for the one that started it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
import weakref
from typing import Any

from lsp_callbacks.callbacks._lightning_internals import is_launched_elsewhere
from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.report import Verdict


class Mailbox:
    """From rank 0 of ``ddp_spawn``, ``ddp_fork`` or ``ddp_notebook`` to the process that called ``fit``.

    Lightning's launcher brings home weights and ``callback_metrics`` only, and calls no hook afterwards. So there is a
    file, which is read when somebody asks, and deleted then, or when the box is no longer needed. Of a run that raises
    nothing comes home: Lightning calls no hook in its processes.
    """

    def __init__(self) -> None:
        self._home = os.getpid()
        self._path = os.path.join(tempfile.gettempdir(), f"lsp_callbacks-{uuid.uuid4().hex}.json")
        weakref.finalize(self, _remove, self._path, self._home)

    def send(self, trainer: Any, contents: dict[str, Any]) -> None:
        """Write the contents, where the run was launched from another process; called in all at the end of a run."""
        if not is_launched_elsewhere(trainer) or os.getpid() == self._home or not trainer.is_global_zero:
            return
        text = json.dumps(contents)  # in whole, or not at all
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # nobody else's to read
        with os.fdopen(descriptor, "w") as file:
            file.write(text)

    def receive(self) -> dict[str, Any] | None:
        """Return what has come since the last call; None in the processes of the run."""
        if os.getpid() != self._home:
            return None
        try:
            with open(self._path) as file:
                contents = json.load(file)
        except FileNotFoundError:
            return None
        except ValueError:  # the disk was full, or the process was killed while it wrote
            contents = None
        _remove(self._path, self._home)
        return contents


def packed(monitor: Monitor, step: int, verdict: Verdict) -> dict[str, Any]:
    """Return what a run leaves, as JSON can hold it; `unpack` is its inverse."""
    return {
        "history": {key: (curve.steps, curve.values) for key, curve in monitor.history.items()},
        "step": step,
        "skipped": monitor.skipped,
        "paths": monitor.paths,
        "courant": monitor.courant.state_dict(),
        "losses": monitor.losses.state_dict(),
        "verdict": vars(verdict) | {"evidence": dict(verdict.evidence)},
    }


def unpack(monitor: Monitor, contents: dict[str, Any]) -> tuple[int, Verdict]:
    """Give what a run has left to the monitor, and return its number of steps and its verdict."""
    monitor.history.replace({key: Curve(*curve) for key, curve in contents["history"].items()})
    for kept, of_run in ((monitor.quantities.skipped, contents["skipped"]), (monitor.paths, contents["paths"])):
        kept.clear()
        kept.update(of_run)
    monitor.courant.load_state_dict(contents["courant"])
    monitor.losses.load_state_dict(contents["losses"])
    return contents["step"], Verdict(**contents["verdict"])


def _remove(path: str, home: int) -> None:
    if os.getpid() == home:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
