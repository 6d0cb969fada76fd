"""The page as text: sections, data and script in one file, under a policy that forbids any request."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lsp_callbacks import __version__
from lsp_callbacks.quantities.key import PREFIX
from lsp_callbacks.report.curves import latest, readings
from lsp_callbacks.report.page.figures import figures, is_single, quantities
from lsp_callbacks.report.page.judged_run import JudgedRun
from lsp_callbacks.report.page.maps import heat_maps
from lsp_callbacks.report.table import keys_of_a_run

SCRIPTS, STYLE = ("line_figure.js", "heat_map.js", "page.js"), "page.css"
#: Look of a state, and its sign: the word says the same without a colour.
LOOKS = {"stable": ("calm", "✓"), "recovered": ("care", "!"), "edge": ("care", "!"), "unknown": ("unknown", "?")}


def html_page(runs: Sequence[JudgedRun], *, refresh: int | None = None, made: str = "") -> str:
    """Return the page of logged runs.

    Args:
        runs: to be shown, side by side.
        refresh: seconds after which the page loads itself again, while a run goes on; None for a run that is over.
        made: when, in words.
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
    sections = [
        _verdicts(runs), _slots(drawn), _causes(runs), _events(runs), _maps(maps), _diagrams(runs, drawn),
        _quantities(runs), _others(runs), _configuration(runs), _about(runs, made),
    ]  # fmt: skip
    body = "\n".join(filter(None, sections))
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


def _section(name: str, title: str, content: str) -> str:
    head = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{head}\n{content}\n</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, look: str = "") -> str:
    """Return a table of cells that are HTML already, which scrolls in its own frame."""
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{c}</td>" for c in row[1:])}</tr>' for row in rows
    )
    title = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table class="{look}"><caption>{title}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.4g}"


def _verdicts(runs: Sequence[JudgedRun]) -> str:
    cards = []
    for i, run in enumerate(runs):
        look, sign = LOOKS.get(run.verdict.state, ("bad", "✕"))
        going = "" if run.logged.ended is not False else " So far: the logs do not say that the run is over."
        evidence = {name: value for name, value in run.verdict.evidence.items() if value != ""}
        rows = [[escape(name), escape(_said(value))] for name, value in evidence.items()]
        basis = (
            f"<details><summary>Numbers behind it</summary>{_table(('number', 'value'), rows, 'Evidence')}</details>"
        )
        notes = "".join(f"<p class='note'>{escape(note)}.</p>" for note in run.logged.notes)
        key = f'<span class="key k{i % 6}" aria-hidden="true"></span>'
        words = escape(run.sentence[:1].upper() + run.sentence[1:])
        cards.append(
            f'<article class="verdict {look}"><h3>{key}{escape(run.name)}</h3><p class="state"><span aria-hidden="true">{sign}</span> {escape(run.verdict.state)}</p>'
            f'<p class="words">{words}</p><p class="note">By the rules of the report at the end of training, '
            f"{escape(run.basis)}.{going}</p>{notes}{basis if rows else ''}</article>"
        )
    return _section("verdict", "Verdict", f'<div class="cards">{"".join(cards)}</div>')


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _slots(drawn: Sequence[Mapping[str, Any]]) -> str:
    """Return the places that the script fills."""
    slots = [f'<div class="figure" data-figure="{f["id"]}"></div>' for f in drawn if f["id"] != "rates"]
    without = "<noscript><p>Figures need JavaScript; the tables below hold their numbers.</p></noscript>"
    nothing = "<p>No Courant number, loss or exponent was logged: there is nothing to draw.</p>"
    return _section("time", "Over time", (without + "".join(slots)) if slots else nothing)


def _causes(runs: Sequence[JudgedRun]) -> str:
    rows = [
        [escape(_of(run, runs) + finding.where), f"<code>{escape(finding.name)}</code>", escape(finding.text),
         escape(finding.meaning), escape(finding.advice)]
        for run in runs for finding in run.findings
    ]  # fmt: skip
    unmeasured = [run.name for run in runs if not any(f.where != "quantity" for f in run.findings)]
    text = "<p>What decided, and what stands out. A layer that does is where to look first, not a proved cause.</p>"
    if unmeasured:
        of = f" of {', '.join(unmeasured)}" if len(runs) > 1 else ""
        text += f"<p>No number of single layers or blocks{escape(of)} was logged: nothing points to one.</p>"
    head = ("what", "name", "what stands out", "meaning", "when it is bad")
    return _section("cause", "Cause", text + (_table(head, rows, "What stands out", "worded") if rows else ""))


def _of(run: JudgedRun, runs: Sequence[JudgedRun]) -> str:
    return "" if len(runs) == 1 else f"{run.name}: "


def _events(runs: Sequence[JudgedRun]) -> str:
    listed = sorted((event.step, event.name, event.detail, run.name) for run in runs for event in run.events)
    if not listed:
        return _section("events", "Events", "<p>None was logged, and no reading passed a level that matters.</p>")
    several = len(runs) > 1
    rows = [[f"{step:,}", *([escape(of)] * several), escape(name), escape(detail)] for step, name, detail, of in listed]
    head = ("step", *(["run"] * several), "event", "what is known of it")
    return _section("events", "Events", _table(head, rows, "Events by step"))


def _maps(maps: Sequence[Mapping[str, Any]]) -> str:
    if not maps:
        return ""
    slots = "".join(f'<div class="maps" data-map="{i}"></div>' for i in range(len(maps)))
    return _section("layers", "Layers and blocks", slots)


def _diagrams(runs: Sequence[JudgedRun], drawn: Sequence[Mapping[str, Any]]) -> str:
    content = "".join('<div class="figure" data-figure="rates"></div>' for f in drawn if f["id"] == "rates")
    content += _pictures(runs, diagrams=True)
    return _section("diagram", "Stability diagram", content) if content else ""


def _pictures(runs: Sequence[JudgedRun], *, diagrams: bool) -> str:
    """Return the stability diagrams that were saved with the runs, or the other pictures."""
    content = ""
    for run, name, png in [(run, name, png) for run in runs for name, png in run.logged.pictures.items()]:
        if ("diagram" in name) is diagrams:
            text = escape(f"{_of(run, runs)}{name}")
            content += (
                f'<figure><img alt="{text}, a picture that was saved with the run" loading="lazy" '
                f'src="data:image/png;base64,{base64.b64encode(png).decode()}"><figcaption>{text}, as it was saved '
                "with the run</figcaption></figure>"
            )
    return content


def _others(runs: Sequence[JudgedRun]) -> str:
    content = _pictures(runs, diagrams=False)
    return _section("pictures", "Pictures saved with the run", content) if content else ""


def _quantities(runs: Sequence[JudgedRun]) -> str:
    return _section(
        "quantities", "All numbers", '<div id="chooser"></div>' + "".join(_numbers(run, runs) for run in runs)
    )


def _numbers(run: JudgedRun, runs: Sequence[JudgedRun]) -> str:
    rows = []
    for name, curve, about in _listed(run):
        values = readings(curve) or [math.nan]
        failed = len(curve.values) - len(readings(curve))
        beyond = values[-1] > about.threshold if about is not None else False
        last = f"<strong class='beyond'>{_number(values[-1])} (above {about.threshold:g})</strong>" if beyond else (
            _number(values[-1]))  # fmt: skip
        meaning = "" if about is None else f"{about.meaning} {about.advice if beyond else ''}"
        lost = f" {failed:,} measurements failed (NaN)." if failed else ""
        unit = "" if about is None else about.unit
        rows.append([
            f"<code>{escape(name)}</code>", last, _number(min(values)), _number(max(values)), f"{curve.steps[-1]:,}",
            f"{len(curve.steps):,}", escape(unit), escape(meaning + lost),
        ])  # fmt: skip
    head = ("number", "last", "min", "max", "step", "readings", "unit", "meaning")
    caption = f"Numbers of {run.name}"
    opened = " open" if len(runs) == 1 else ""
    return f"<details{opened}><summary>{escape(caption)}</summary>{_table(head, rows, caption)}</details>"


def _listed(run: JudgedRun) -> Iterator[tuple[str, Any, Any]]:
    keys = keys_of_a_run()
    names = sorted((k for k in run.logged.curves if is_single(k)), key=lambda k: (not k.startswith(PREFIX), k))
    for name in names:
        yield name, run.logged.curves[name], keys.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None


def _configuration(runs: Sequence[JudgedRun]) -> str:
    content = ""
    files_ = dict.fromkeys(file for run in runs for file in run.logged.settings)
    for file in files_:
        settings = [run.logged.settings.get(file, {}) for run in runs]
        rows = []
        for name in dict.fromkeys(name for each in settings for name in each):
            values = [each.get(name) for each in settings]
            mark = " <span class='differs'>differs</span>" if len(set(values)) > 1 else ""
            shown = ["—" if value is None else escape(value) for value in values]
            rows.append([f"<code>{escape(name)}</code>{mark}", *shown])
        head = ("setting", *(escape(run.name) for run in runs)) if len(runs) > 1 else ("setting", "value")
        opened = " open" if len(rows) <= 30 else ""
        content += (
            f"<details{opened}><summary>{escape(file)}</summary>{_table(head, rows, f'Settings in {file}')}</details>"
        )
    for run in runs:
        for name, text in run.logged.texts.items():
            title = f"{_of(run, runs)}{name}, as it is"
            content += f"<details><summary>{escape(title)}</summary><pre tabindex='0'>{escape(text)}</pre></details>"
    return _section("configuration", "Configuration", content or "<p>None was logged.</p>")


def _about(runs: Sequence[JudgedRun], made: str) -> str:
    rows = [
        [escape(run.name), escape(run.logged.source), f"<code>{escape(str(run.logged.path))}</code>"] for run in runs
    ]
    share = latest(runs[0].logged.curves.get("stability/overhead"))
    cost = "" if math.isnan(share) else f" Measuring took {share:.1%} of the time so far, by the last row of the logs."
    text = (
        f"<p>Made by lsp_callbacks {escape(__version__)}{escape(made)} from the logs alone: nothing in them was run. "
        f"Long curves and large maps are drawn with fewer points; of the readings that share one, the least and the "
        f"largest are kept, in a map that furthest from the neutral value.{cost if len(runs) == 1 else ''}</p>"
    )
    return _section("about", "About this page", text + _table(("run", "logs", "path"), rows, "Logs of this page"))
