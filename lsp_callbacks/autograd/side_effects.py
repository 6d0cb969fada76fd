"""No side effects of code that is run again: on random states, streams, files and the module that trains."""

from __future__ import annotations

import builtins
import contextlib
import io
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lsp_callbacks.autograd._torch_internals import checkpoints_without_reentrance, without_hooks
from lsp_callbacks.errors import Unmeasurable

#: Of the threads that can be muted; and what was replaced for that.
muters: dict[int, Muter] = {}
_lock = threading.RLock()
_before: tuple[Any, ...] = ()


class TorchRandomState:
    """The global random states of torch (CPU and the devices in use): a copy takes a microsecond on the CPU.

    Attributes:
        setters: each puts one of them back when it is called.
    """

    def __init__(self) -> None:
        self.setters: list[Callable[[], None]] = [partial(torch.set_rng_state, torch.get_rng_state())]
        if torch.cuda.is_initialized():
            self.setters.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        if torch.backends.mps.is_available():
            self.setters.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))

    def restore(self) -> None:
        """Put them back."""
        for put_back in self.setters:
            put_back()


class RandomState(TorchRandomState):
    """The global random states of torch, numpy and Python."""

    def __init__(self) -> None:
        super().__init__()
        self.setters.append(partial(np.random.set_state, np.random.get_state()))
        self.setters.append(partial(random.setstate, random.getstate()))


class Muter:
    """Whether one thread is muted, and the files that it has written meanwhile.

    Attributes:
        depth: the thread is muted while this is above 0; whoever mutes it adds 1, and takes it off again.
        folder: of the files that were written instead; None without any, and once the thread is not muted any more.
    """

    def __init__(self) -> None:
        self.depth = self.users = 0
        self.folder: tempfile.TemporaryDirectory | None = None
        self._files: dict[str, str] = {}

    def instead(self, file: Any, mode: str) -> Any:
        """Return the file to open: for writing one of ours, for reading what was written meanwhile, if it was."""
        try:
            path = os.path.abspath(os.fsdecode(file))
        except TypeError:  # let `open` say what is wrong
            return file
        writes = set(mode) & set("wax+")
        if path in self._files or not writes or (os.path.exists(path) and not os.path.isfile(path)):
            return self._files.get(path, file)
        self.folder = self.folder or tempfile.TemporaryDirectory(prefix="lsp_callbacks-")
        scratch = os.path.join(self.folder.name, str(len(os.listdir(self.folder.name))))
        if "+" in mode and set(mode) & set("ra") and os.path.isfile(path):  # it may be read, too
            opened = _before[2]
            with opened(path, "rb") as source, opened(scratch, "wb") as copy:
                shutil.copyfileobj(source, copy)
        if set(mode) & set("wx+"):
            # What is only appended was appended by the step itself: reading finds it.
            self._files[path] = scratch
        return scratch

    def forget_files(self) -> None:
        """Remove what was written, so that it is not found when the same code runs again."""
        self._files.clear()
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


class _Stream:
    """A stream that lets through what is written by threads that are not muted."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: Any) -> int:
        return len(text) if _is_muted() else self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_muted() -> bool:
    muter = muters.get(threading.get_ident())
    return muter is not None and muter.depth > 0


def _open(file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
    opened, muter = _before[2], muters.get(threading.get_ident())
    if muter is None or not muter.depth or not isinstance(mode, str) or isinstance(file, int):
        return opened(file, mode, *args, **kwargs)
    instead = muter.instead(file, mode)
    if instead is file:
        return opened(file, mode, *args, **kwargs)
    kwargs.pop("opener", None)
    return opened(instead, mode.replace("x", "w"), *args[:5], **kwargs)


def _handle(self: logging.Logger, record: logging.LogRecord) -> None:
    if not _is_muted():
        _before[4](self, record)


@contextlib.contextmanager
def mutable() -> Iterator[Muter]:
    """Prepare once what mutes this thread, for code that mutes it often; nothing is muted by this alone."""
    thread = threading.get_ident()
    muter = _enter(thread)
    try:
        yield muter
    finally:
        _leave(thread, muter)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Let this thread's side effects of the usual kinds lead nowhere meanwhile; other threads notice nothing.

    Muted are what goes to ``sys.stdout`` and ``sys.stderr`` (``print``, warnings), records of ``logging``, and files
    that are opened for writing or appending by ``open`` or ``pathlib``: what is written there can be read back until it
    ends, and the file stays as it is. Not muted, as Python has no hand in them: files that were open before, or are
    opened by ``os`` or in C++ (``torch.save``), what is removed or renamed, what is sent over a network, other
    processes, and global variables.
    """
    with mutable() as muter:
        muter.depth += 1
        try:
            yield
        finally:
            muter.depth -= 1
            if not muter.depth:
                muter.forget_files()


def _enter(thread: int) -> Muter:
    """Replace the functions for the first thread; those that overlap may end in any order."""
    global _before
    with _lock:
        if not muters:
            _before = sys.stdout, sys.stderr, builtins.open, io.open, logging.Logger.handle
            sys.stdout, sys.stderr = (None if s is None else _Stream(s) for s in _before[:2])
            builtins.open = io.open = _open  # type: ignore[assignment]
            logging.Logger.handle = _handle  # type: ignore[method-assign]
        muter = muters.setdefault(thread, Muter())
        muter.users += 1
        return muter


def _leave(thread: int, muter: Muter) -> None:
    with _lock:
        muter.users -= 1
        if muter.users:
            return
        del muters[thread]
        if not muters:
            sys.stdout, sys.stderr, builtins.open, io.open, logging.Logger.handle = _before  # type: ignore[method-assign]


@contextlib.contextmanager
def untouched(module: nn.Module, *, in_place: bool = False) -> Iterator[None]:
    """Put the global random states back at the end, and let nothing inside call the module itself.

    Its parameters are shared with the copy, so hooks on them are off: autograd would call them. A function that a user
    stored on the module may refer to the module itself, in a copy too: calling the module raises. Nothing is compiled,
    as every copy would be compiled anew. Activations are checkpointed without re-entrance, as re-entrant checkpoints
    do not support ``torch.autograd.grad``, and hide what is inside.

    Args:
        module: that trains.
        in_place: whether replays run the module itself, see `ModuleInPlace`.
    """
    originals = set() if in_place else {id(m) for m in module.modules()}
    before = RandomState()

    def refuse(called: nn.Module, args: tuple) -> None:
        if id(called) in originals:
            raise Unmeasurable(
                f"the copy of the module calls the {type(called).__name__} of the original (through a lambda or a "
                "closure that holds it): make that function a method, or pass loss_fn=..."
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        with (
            mutable(),
            without_hooks(module.parameters()),
            torch.compiler.set_stance("force_eager"),
            checkpoints_without_reentrance(),
        ):
            yield
    finally:
        handle.remove()
        before.restore()
