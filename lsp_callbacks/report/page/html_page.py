"""The page as text: sections, data and script in one file, under a policy that forbids any request."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lsp_callbacks.report.page import sections
from lsp_callbacks.report.page.figures import figures, quantities
from lsp_callbacks.report.page.judged_run import JudgedRun
from lsp_callbacks.report.page.maps import heat_maps

SCRIPTS, STYLE = ("line_figure.js", "heat_map.js", "page.js"), "page.css"


def html_page(runs: Sequence[JudgedRun], *, refresh: int | None = None, made: str = "by lsp_callbacks") -> str:
    """Return the page of logged runs.

    Args:
        runs: to be shown, side by side.
        refresh: seconds after which the page loads itself again, while a run goes on; None for a run that is over.
        made: by what and when, in words.
    """
    maps, drawn = heat_maps(runs), figures(runs)
    names = [run.name for run in runs]
    data = {"runs": names, "figures": drawn, "maps": maps, "quantities": quantities(runs), "refresh": refresh}
    style, script = (_asset(STYLE), "".join(map(_asset, SCRIPTS)))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"Stability of {', '.join(names[:3])}{' ...' * (len(names) > 3)}"
    again = "" if refresh is None else f'<noscript><meta http-equiv="refresh" content="{refresh}"></noscript>\n'
    parts = [
        sections.verdicts(runs), sections.slots(drawn), sections.causes(runs), sections.events(runs),
        sections.maps(maps), sections.diagrams(runs, drawn), sections.quantities(runs), sections.others(runs),
        sections.configuration(runs), sections.about(runs, made),
    ]  # fmt: skip
    body = "\n".join(filter(None, parts))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{again}<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#verdict">To the verdict</a>
<header>
<h1>{escape(title)}</h1>
<div class="tools" id="tools"></div>
</header>
<main>
{body}
</main>
<script type="application/json" id="data">{_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return files("lsp_callbacks.report.page").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: Any) -> str:
    """Return JSON that cannot end the element that holds it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
