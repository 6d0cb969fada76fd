"""What a run in processes of its own leaves for the one that started it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
import weakref
from typing import Any


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
        """Called in all processes at the end of a run; writes where the run was launched from another one."""
        launched = any(c.__name__ == "_MultiProcessingLauncher" for c in type(trainer.strategy.launcher).__mro__)
        if not launched or os.getpid() == self._home or not trainer.is_global_zero:
            return
        text = json.dumps(contents)  # in whole, or not at all
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # nobody else's to read
        with os.fdopen(descriptor, "w") as file:
            file.write(text)

    def receive(self) -> dict[str, Any] | None:
        """What has come since the last call; None in the processes of the run."""
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


def _remove(path: str, home: int) -> None:
    if os.getpid() == home:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
