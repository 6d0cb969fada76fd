"""Selection of layers and blocks by class, glob or predicate."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Selector = str | type | Callable[[str, nn.Module], bool]
Selection = Selector | Sequence[Selector] | None


def selected(selection: Selection, name: str, module: nn.Module) -> bool:
    """Return whether any selector selects the module.

    A string is a glob on the module's name, or the import path of a class or predicate (``my_package.MyBlock``,
    ``my_package.is_block``); a predicate is called with name and module.
    """
    return any(_selects(selector, name, module) for selector in _as_list(selection))


def validate(selection: Selection, root: nn.Module, argument: str) -> None:
    """Refuse a selector that selects no module at all.

    Raises:
        ValueError: naming the selector and some names that would match.
    """
    modules = [(name, module) for name, module in root.named_modules() if name]
    for selector in _as_list(selection):
        if not any(_selects(selector, name, module) for name, module in modules):
            names = ", ".join(name for name, _ in modules[:8]) or "none"
            raise ValueError(f"{argument}={selector!r} matches no module; the names here are {names} ...")


def _as_list(selection: Selection) -> list[Any]:
    if selection is None:
        return []
    return list(selection) if isinstance(selection, Sequence) and not isinstance(selection, str) else [selection]


def _selects(selector: Any, name: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        target = imported(selector)
        if target is None:
            return fnmatchcase(name, selector)
        selector = target
    if isinstance(selector, type):
        return isinstance(module, selector)
    return bool(selector(name, module))


def imported(path: str) -> Any | None:
    """Return the object of an import path; None where there is none."""
    package, _, attribute = path.rpartition(".")
    if not package or not path.replace(".", "").isidentifier():
        return None
    try:
        return getattr(importlib.import_module(package), attribute, None)
    except ImportError:
        return None
