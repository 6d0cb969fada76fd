"""Show docstrings as this package writes them."""

from __future__ import annotations

import re
from typing import Any

import griffe

import lsp_callbacks
from lsp_callbacks import functional, linalg, loops, operators

#: Where a name in single backticks leads to; of names that occur twice, the first.
_PAGES: dict[str, str] = {}
for _module in (lsp_callbacks, functional, operators, linalg, loops):
    for _name in _module.__all__:
        _path = f"{_module.__name__}.{_name}"
        for _form in (_name, _path, _path.removeprefix("lsp_callbacks.")):
            _PAGES.setdefault(_form, _path)
_NAME = re.compile(r"(?<![`\[])`([A-Za-z_][\w.]*)`(?!`)")


class Docstrings(griffe.Extension):
    """Takes ``Example:`` for Google's section "Examples", and links names to their pages."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = _NAME.sub(_link, text)


def _link(match: re.Match[str]) -> str:
    page = _PAGES.get(match[1])
    return f"[`{match[1]}`][{page}]" if page else match[0]
