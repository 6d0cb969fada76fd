"""Pieces of HTML that several sections share."""

from __future__ import annotations

import math
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
    """Return a number in a few digits."""
    return "NaN" if math.isnan(value) else f"{value:.4g}"
