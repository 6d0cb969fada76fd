"""Tables of the documentation, derived from the classes: what is measured, and what each number means."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.quantities.key import PREFIX, Key

#: Columns of the table of quantities, beside their names.
COLUMNS = ("what it is", f"keys, under `{PREFIX}`", "cost", "source")


def registry() -> dict[str, type[Quantity]]:
    """Return all quantities by name; imported late, as the registry imports their files."""
    from lsp_callbacks.quantities import REGISTRY

    return REGISTRY


def stated_keys() -> dict[str, Key]:
    """Return all keys by name, without ``stability/``: first those of the optimizer's steps, then those of the network.

    Quantities of the user are among them, whether they are registered or not.
    """
    classes = dict.fromkeys([*registry().values(), *_subclasses(Quantity)])
    ordered = sorted(classes, key=lambda quantity: not quantity.needs_update)
    keys: dict[str, Key] = {}
    for quantity in ordered:
        keys |= {name: key for name, key in quantity.KEYS.items() if name not in keys}
    return keys


def _subclasses(parent: Any) -> Iterator[type[Quantity]]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


def section(quantity: type[Quantity], title: str) -> str:
    """Return a one-paragraph section of a class's docstring, such as "Cost" or "Source"; empty without one."""
    text = inspect.cleandoc(quantity.__doc__ or "")
    match = re.search(rf"^{title}: (.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(match.group(1).split()) if match else ""


def summary(quantity: type[Quantity]) -> str:
    """Return the first line of a class's docstring."""
    return inspect.cleandoc(quantity.__doc__ or "").partition("\n")[0]


def quantity_table(names: Sequence[str] | None = None, *, columns: Sequence[str] = COLUMNS) -> str:
    """Return a Markdown table of quantities.

    Args:
        names: of the quantities, such as ``PRESETS["default"]``; None takes all.
        columns: some of ``COLUMNS``.

    Example:
        >>> print(quantity_table(["sharpness"]).splitlines()[0])
        | quantity | what it is | keys, under `stability/` | cost | source |
        >>> print(quantity_table(["sharpness"], columns=("what it is",)).splitlines()[0])
        | quantity | what it is |
    """
    rows = [("quantity", *columns)]
    for name in registry() if names is None else names:
        quantity = registry()[name]
        keys = ", ".join(f"`{key}`" for key, stated in quantity.KEYS.items() if not stated.error_of)
        cells = (summary(quantity), keys, section(quantity, "Cost"), section(quantity, "Source"))
        rows.append((f"`{name}`", *(dict(zip(COLUMNS, cells))[column] for column in columns)))
    return _markdown(rows)


def key_table(name: str) -> str:
    """Return a Markdown table of a quantity's keys: unit, meaning, what to do when the number is bad.

    Args:
        name: of the quantity.

    Example:
        >>> print(key_table("sharpness").splitlines()[0])
        | key, under `stability/` | unit | meaning | when it is bad |
    """
    rows = [(f"key, under `{PREFIX}`", "unit", "meaning", "when it is bad")]
    for key, stated in registry()[name].KEYS.items():
        rows.append((f"`{key}`", stated.unit or "1", stated.meaning, stated.advice))
    return _markdown(rows)


def cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("``", "`")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell(text) for text in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
