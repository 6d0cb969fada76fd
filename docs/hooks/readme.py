"""Write the table of default quantities into README: ``python docs/hooks/readme.py``."""

from __future__ import annotations

import re
from pathlib import Path

from lsp_callbacks.quantities import PRESETS
from lsp_callbacks.quantities.tables import quantity_table

README = Path(__file__).resolve().parents[2] / "README.md"
_PLACE = re.compile(r"(<!-- default quantities[^>]*-->\n).*?(<!-- end -->\n)", re.DOTALL)


def default_table() -> str:
    """Return the quantities of the default preset with one sentence each."""
    return quantity_table(PRESETS["default"], columns=("what it is",)) + "\n"


def written(text: str) -> str:
    """Return README's text with the table in its place.

    Raises:
        ValueError: if README has no such place.
    """
    if not _PLACE.search(text):
        raise ValueError("README.md has no place for the table: <!-- default quantities: ... --> and <!-- end -->")
    return _PLACE.sub(lambda match: match[1] + default_table() + match[2], text)


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
