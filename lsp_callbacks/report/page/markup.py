"""Pieces of HTML that several sections share."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape


def section(name: str, title: str, content: str) -> str:
    """Return a section with its heading; ``content`` is HTML already."""
    head = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{head}\n{content}\n</section>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, look: str = "") -> str:
    """Return a table of cells that are HTML already, which scrolls in its own frame."""
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{c}</td>" for c in row[1:])}</tr>' for row in rows
    )
    title = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table class="{look}">'
        f"<caption>{title}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


def number(value: float) -> str:
    """Return a number in a few digits; whole numbers, such as steps, in full."""
    if math.isnan(value):
        return "NaN"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 and value == round(value) else f"{value:.4g}"


def prose(text: str) -> str:
    """Return a sentence of the package's own as HTML: names between backticks are code."""
    return re.sub(r"`([^`<>&]+)`", r"<code>\1</code>", escape(text))
