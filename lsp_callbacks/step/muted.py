"""What a user's code says and writes while it is run again, which it has said and written already."""

from __future__ import annotations

import builtins
import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

#: Of the threads that are muted, where each may look for what it has written meanwhile; and what they have replaced.
_muted: dict[int, _Scratch] = {}
_lock = threading.RLock()
_before: tuple[Any, ...] = ()


class _Stream:
    """A stream that lets through what other threads write; all, once nobody is muted."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: Any) -> int:
        return len(text) if threading.get_ident() in _muted else self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Scratch:
    """Files in place of those that would be written; a folder is made at the first of them."""

    def __init__(self) -> None:
        self.depth = 0
        self._folder: tempfile.TemporaryDirectory | None = None
        self._written: dict[str, str] = {}

    def instead(self, file: Any, mode: str) -> Any:
        """The file to open: for writing one of ours, for reading that which was written meanwhile, if it was."""
        try:
            path = os.path.abspath(os.fsdecode(file))
        except TypeError:  # let `open` say what is wrong
            return file
        writes = set(mode) & set("wax+")
        if path in self._written or not writes or (os.path.exists(path) and not os.path.isfile(path)):
            return self._written.get(path, file)
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="lsp_callbacks-")
        scratch = os.path.join(self._folder.name, str(len(os.listdir(self._folder.name))))
        if "+" in mode and set(mode) & set("ra") and os.path.isfile(path):  # it may be read, too
            opened = _before[2]
            with opened(path, "rb") as source, opened(scratch, "wb") as copy:
                shutil.copyfileobj(source, copy)
        if set(mode) & set("wx+"):
            # What is only appended was appended by the step itself: reading finds it.
            self._written[path] = scratch
        return scratch

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def _open(file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
    opened, scratch = _before[2], _muted.get(threading.get_ident())
    if scratch is None or not isinstance(mode, str) or isinstance(file, int):
        return opened(file, mode, *args, **kwargs)
    instead = scratch.instead(file, mode)
    if instead is file:
        return opened(file, mode, *args, **kwargs)
    kwargs.pop("opener", None)
    return opened(instead, mode.replace("x", "w"), *args[:5], **kwargs)


def _handle(self: logging.Logger, record: logging.LogRecord) -> None:
    if threading.get_ident() not in _muted:
        _before[4](self, record)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """While it lasts, this thread's side effects of the usual kinds lead nowhere; other threads notice nothing.

    Muted are what goes to ``sys.stdout`` and ``sys.stderr`` (``print``, warnings), records of ``logging``, and files
    that are opened for writing or appending by ``open`` or ``pathlib``: what is written there can be read back until it
    ends, and the file stays as it is. Not muted, as Python has no hand in them: files that were open before, or are
    opened by ``os`` or in C++ (``torch.save``), what is removed or renamed, what is sent over a network, other
    processes, and global variables.
    """
    thread = threading.get_ident()
    scratch = _enter(thread)
    try:
        yield
    finally:
        _leave(thread, scratch)


def _enter(thread: int) -> _Scratch:
    """The first thread replaces, the last one puts back: those that overlap may end in any order."""
    global _before
    with _lock:
        if not _muted:
            _before = sys.stdout, sys.stderr, builtins.open, io.open, logging.Logger.handle
            sys.stdout, sys.stderr = (None if s is None else _Stream(s) for s in _before[:2])
            builtins.open = io.open = _open  # type: ignore[assignment]
            logging.Logger.handle = _handle  # type: ignore[method-assign]
        scratch = _muted.setdefault(thread, _Scratch())
        scratch.depth += 1
        return scratch


def _leave(thread: int, scratch: _Scratch) -> None:
    with _lock:
        scratch.depth -= 1
        if scratch.depth:
            return
        del _muted[thread]
        if not _muted:
            sys.stdout, sys.stderr, builtins.open, io.open, logging.Logger.handle = _before  # type: ignore[method-assign]
    scratch.close()
