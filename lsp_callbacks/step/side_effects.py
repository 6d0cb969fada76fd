"""No side effects of code that is run again: on streams, files, random states, and the module itself."""

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

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lsp_callbacks.autograd._torch_internals import checkpoints_without_reentrance, without_hooks
from lsp_callbacks.autograd.random_state import RandomState
from lsp_callbacks.errors import Unmeasurable

#: The threads that are muted, each with the files that it has written meanwhile; and what was replaced.
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
    """Files that take the place of those that would be written; a folder is made at the first of them."""

    def __init__(self) -> None:
        self.depth = 0
        self._folder: tempfile.TemporaryDirectory | None = None
        self._written: dict[str, str] = {}

    def instead(self, file: Any, mode: str) -> Any:
        """Return the file to open: for writing one of ours, for reading what was written meanwhile, if it was."""
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
    """Let this thread's side effects of the usual kinds lead nowhere meanwhile; other threads notice nothing.

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
    """Replace the functions for the first thread; those that overlap may end in any order."""
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


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Put the global random states back at the end, and let nothing inside call the module itself.

    Its parameters are shared with the copy, so hooks on them are off: autograd would call them. A function that a user
    stored on the module may refer to the module itself, in a copy too: calling the module raises. Nothing is compiled,
    as every copy would be compiled anew. Activations are checkpointed without re-entrance, as re-entrant checkpoints
    do not support ``torch.autograd.grad``, and hide what is inside.
    """
    before = RandomState()
    originals = {id(m) for m in module.modules()}

    def refuse(called: nn.Module, args: tuple) -> None:
        if id(called) in originals:
            raise Unmeasurable(
                f"the copy of the module calls the {type(called).__name__} of the original (through a lambda or a "
                "closure that holds it): make that function a method, or pass loss_fn=..."
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        with (
            without_hooks(module.parameters()),
            torch.compiler.set_stance("force_eager"),
            checkpoints_without_reentrance(),
        ):
            yield
    finally:
        handle.remove()
        before.restore()
