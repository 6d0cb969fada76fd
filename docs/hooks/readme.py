"""Write the table of default quantities and the address of its links into README: ``python docs/hooks/readme.py``.

Links are relative until ``pyproject.toml`` names the address of the repository as ``Source`` under ``[project.urls]``.
"""

from __future__ import annotations

import re
from pathlib import Path

from lsp_callbacks.quantities import PRESETS
from lsp_callbacks.quantities.tables import quantity_table

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RELATIVE_LINK = re.compile(r"(!?\[[^\]]*\])\((?!\w+:|#)([^)\s]+)\)")
_PLACE = re.compile(r"(<!-- default quantities[^>]*-->\n).*?(<!-- end -->\n)", re.DOTALL)


def default_table() -> str:
    """Return the quantities of the default preset with one sentence each."""
    return quantity_table(PRESETS["default"], columns=("what it is",)) + "\n"


def address(pyproject: str) -> str:
    """Return the address of the repository in the text of a ``pyproject.toml``, or an empty string."""
    named = re.search(r"^\[project\.urls\]\n(?:[^\[\n].*\n)*?Source = \"([^\"]*)\"", pyproject, re.MULTILINE)
    return named[1].rstrip("/") if named else ""


def with_address(text: str, source: str) -> str:
    """Return a text whose links into the repository begin with its address; unchanged without one.

    Args:
        text: with links that are relative to the repository's root.
        source: as ``https://github.com/OWNER/NAME``.
    """

    def absolute(match: re.Match[str]) -> str:
        shown, path = match.groups()
        kind = "raw" if shown.startswith("!") else "tree" if (ROOT / path).is_dir() else "blob"
        return f"{shown}({source}/{kind}/HEAD/{path})"

    return RELATIVE_LINK.sub(absolute, text) if source else text


def written(text: str) -> str:
    """Return README's text with the table in its place, and the address before its links.

    Raises:
        ValueError: if README has no such place.
    """
    if not _PLACE.search(text):
        raise ValueError("README.md has no place for the table: <!-- default quantities: ... --> and <!-- end -->")
    text = _PLACE.sub(lambda match: match[1] + default_table() + match[2], text)
    return with_address(text, address((ROOT / "pyproject.toml").read_text()))


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
