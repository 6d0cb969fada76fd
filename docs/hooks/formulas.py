"""Turn formulas into MathML when the site is built: browsers render it without scripts, fonts or a network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

#: What pymdownx.arithmatex leaves behind.
_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Return the page with each formula in MathML.

    Raises:
        ValueError: for a formula that cannot be converted, with its source.
    """
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    latex = html.unescape(match["latex"]).strip()
    try:
        return convert(latex, display="block" if match["tag"] == "div" else "inline")
    except Exception as error:  # the converter raises many kinds
        raise ValueError(f"formula {latex!r} cannot be converted to MathML: {error!r}") from error
