"""Configuration of a run, taken apart without making any object that it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: A page is passed on to others: values of such names are not shown.
SECRET = re.compile(r"(?:^|[._\- ])(?:password|passwd|secret|token|api_?key|credentials?)$", re.IGNORECASE)
LINE = re.compile(r"^(\s*(?:-\s*)?)([^:#\s][^:]*?)(\s*:\s*)(\S.*)$")
HIDDEN = "(hidden)"
#: Characters of a file that are looked at.
MOST = 200_000


def read_settings(path: Path) -> dict[str, str] | str:
    """Return names and values of a YAML file, or its text if it does more than list plain values.

    Tags that name classes, and references from one place to another, are never followed.
    """
    text = path.read_text(encoding="utf-8", errors="replace")[:MOST]
    try:
        import yaml
    except ImportError:
        return without_secrets(text)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            return without_secrets(text)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return without_secrets(text)
    return dict(flattened(content)) if isinstance(content, dict) else without_secrets(text)


def flattened(content: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names and values of nested mappings and lists.

    Example:
        >>> dict(flattened({"model": {"lr": 0.1, "widths": [1, 2]}, "api_key": "x", "callbacks": [{"a": None}]}))
        {'model.lr': '0.1', 'model.widths': '[1, 2]', 'api_key': '(hidden)', 'callbacks.0.a': 'None'}
    """
    items: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list) and any(isinstance(item, dict | list) for item in content):
        items = list(enumerate(content))
    if not items:
        yield name, HIDDEN if SECRET.search(name) else str(content)
    for key, value in items:
        yield from flattened(value, f"{name}.{key}" if name else str(key))


def without_secrets(text: str) -> str:
    r"""Return a text without the values of secret names.

    Example:
        >>> print(without_secrets("lr: 0.1\nwandb_api_key: 123"))
        lr: 0.1
        wandb_api_key: (hidden)
    """
    return "\n".join(
        "".join([*parts.groups()[:3], HIDDEN]) if (parts := LINE.match(line)) and SECRET.search(parts[2]) else line
        for line in text.splitlines()
    )


def settings_beside(folder: Path, names: tuple[str, ...]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return what these files of a folder set, by file, and the texts of those that could not be taken apart."""
    settings: dict[str, dict[str, str]] = {}
    texts: dict[str, str] = {}
    for path in (folder / name for name in names):
        if path.is_file():
            content = read_settings(path)
            if isinstance(content, str):
                texts[path.name] = content
            elif content:
                settings[path.name] = content
    return settings, texts
