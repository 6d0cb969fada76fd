"""Hooks of a callback that Lightning passes over while they have nothing to do: it calls what can be called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: What Lightning calls at each batch.
BATCH_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip
#: Packages whose hooks do nothing, or what this package knows of; those that a class of the user's overrides stay.
_KNOWN = ("lsp_callbacks", "pytorch_lightning", "lightning")


def hide_hooks(callback: Any, names: Iterable[str]) -> None:
    """Hide hooks of a callback."""
    for name in names:
        if getattr(type(callback), name).__module__.partition(".")[0] in _KNOWN:
            callback.__dict__.setdefault(name, None)


def call_hook(callback: Any, name: str, *arguments: Any) -> None:
    """Call a hook of a callback as Lightning does: not while it is hidden."""
    if callable(hook := getattr(callback, name)):
        hook(*arguments)


def show_hooks(callback: Any, names: Iterable[str] = BATCH_HOOKS) -> None:
    """Show hooks again that were hidden."""
    for name in names:
        if callback.__dict__.get(name, show_hooks) is None:
            del callback.__dict__[name]
