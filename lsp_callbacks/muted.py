"""What a user's code says and writes while it is run again, which it has said and written already."""

from __future__ import annotations

import builtins
import contextlib
import io
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any


class _Stream:
    """A stream that lets through what other threads write."""

    def __init__(self, stream: Any, thread: int):
        self._stream, self._thread = stream, thread

    def write(self, text: Any) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """While it lasts, this thread's side effects of the usual kinds lead nowhere; other threads notice nothing.

    Muted are what goes to ``sys.stdout`` and ``sys.stderr`` (``print``, warnings), records of ``logging``, and files
    that are opened for writing or appending by ``open`` or ``pathlib``: what is written there is forgotten, and the
    file stays as it is. Not muted, as Python has no hand in them: files that were open before, or are opened by ``os``
    or in C++ (``torch.save``), what is sent over a network, other processes, and global variables.
    """
    thread = threading.get_ident()
    before = sys.stdout, sys.stderr, builtins.open, io.open, logging.Logger.handle
    opened, handled = before[2], before[4]

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = isinstance(mode, str) and set(mode) & set("wax+")
        if threading.get_ident() != thread or not writes or isinstance(file, int):
            return opened(file, mode, *args, **kwargs)
        return io.BytesIO() if "b" in mode else io.StringIO()

    def handle(self: logging.Logger, record: logging.LogRecord) -> None:
        if threading.get_ident() != thread:
            handled(self, record)

    sys.stdout, sys.stderr = _Stream(before[0], thread), _Stream(before[1], thread)
    builtins.open = io.open = open_  # type: ignore[assignment]
    logging.Logger.handle = handle  # type: ignore[method-assign]
    try:
        yield
    finally:
        sys.stdout, sys.stderr, builtins.open, io.open, logging.Logger.handle = before  # type: ignore[method-assign]
