"""Sections of the page that are text and tables, and the places that its script fills."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from lsp_callbacks.quantities.key import PREFIX
from lsp_callbacks.report.curves import latest, readings
from lsp_callbacks.report.looks import look
from lsp_callbacks.report.page.figures import is_single
from lsp_callbacks.report.page.judged_run import JudgedRun
from lsp_callbacks.report.page.markup import number, prose, section, table
from lsp_callbacks.report.table import keys_of_a_run


def verdicts(runs: Sequence[JudgedRun]) -> str:
    """Return the verdict on each run, side by side."""
    cards = []
    for i, run in enumerate(runs):
        kind, sign = look(run.verdict.state)
        going = "" if run.logged.ended is not False else " So far: the logs do not say that the run is over."
        evidence = {name: value for name, value in run.verdict.evidence.items() if value != ""}
        rows = [[escape(name), escape(_said(value))] for name, value in evidence.items()]
        basis = f"<details><summary>Numbers behind it</summary>{table(('number', 'value'), rows, 'Evidence')}</details>"
        notes = "".join(f"<p class='note'>{escape(note)}.</p>" for note in run.logged.notes)
        key = f'<span class="key k{i % 6}" aria-hidden="true"></span>'
        words = escape(run.sentence[:1].upper() + run.sentence[1:])
        state = f'<span aria-hidden="true">{sign}</span> {escape(run.verdict.state)}'
        rules = f"By the rules of the report at the end of training, {escape(run.basis)}.{going}"
        cards.append(
            f'<article class="verdict {kind}"><h3>{key}{escape(run.name)}</h3><p class="state">{state}</p>'
            f'<p class="words">{words}</p><p class="note">{rules}</p>{notes}{basis}</article>'
        )
    return section("verdict", "Verdict", f'<div class="cards">{"".join(cards)}</div>')


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def slots(drawn: Sequence[Mapping[str, Any]]) -> str:
    """Return the places of the figures over time."""
    slots = [f'<div class="figure" data-figure="{f["id"]}"></div>' for f in drawn if f["id"] != "rates"]
    without = "<noscript><p>Figures need JavaScript; the tables below hold their numbers.</p></noscript>"
    nothing = "<p>No Courant number, loss or exponent was logged: there is nothing to draw.</p>"
    return section("time", "Over time", (without + "".join(slots)) if slots else nothing)


def causes(runs: Sequence[JudgedRun]) -> str:
    """Return what decided, and what stands out."""
    rows = [
        [escape(_of(run, runs) + finding.where), f"<code>{escape(finding.name)}</code>", escape(finding.text),
         prose(finding.meaning), prose(finding.advice)]
        for run in runs for finding in run.findings
    ]  # fmt: skip
    unmeasured = [run.name for run in runs if not any(f.where != "quantity" for f in run.findings)]
    text = "<p>What decided, and what stands out. A layer that does is where to look first, not a proved cause.</p>"
    if unmeasured:
        of = f" of {', '.join(unmeasured)}" if len(runs) > 1 else ""
        text += f"<p>No number of single layers or blocks{escape(of)} was logged: nothing points to one.</p>"
    head = ("what", "name", "what stands out", "meaning", "when it is bad")
    return section("cause", "Cause", text + (table(head, rows, "What stands out", "worded") if rows else ""))


def _of(run: JudgedRun, runs: Sequence[JudgedRun]) -> str:
    return "" if len(runs) == 1 else f"{run.name}: "


def events(runs: Sequence[JudgedRun]) -> str:
    """Return what happened, by step."""
    listed = sorted((event.step, event.name, event.detail, run.name) for run in runs for event in run.events)
    if not listed:
        return section("events", "Events", "<p>None was logged, and no reading passed a level that matters.</p>")
    several = len(runs) > 1
    rows = [[f"{step:,}", *([escape(of)] * several), escape(name), escape(detail)] for step, name, detail, of in listed]
    head = ("step", *(["run"] * several), "event", "what is known of it")
    return section("events", "Events", table(head, rows, "Events by step"))


def maps(maps: Sequence[Mapping[str, Any]]) -> str:
    """Return the places of the heat maps."""
    if not maps:
        return ""
    slots = "".join(f'<div class="maps" data-map="{i}"></div>' for i in range(len(maps)))
    return section("layers", "Layers and blocks", slots)


def diagrams(runs: Sequence[JudgedRun], drawn: Sequence[Mapping[str, Any]]) -> str:
    """Return rates beside the largest stable ones, and stability diagrams that were saved."""
    content = "".join('<div class="figure" data-figure="rates"></div>' for f in drawn if f["id"] == "rates")
    content += _pictures(runs, diagrams=True)
    return section("diagram", "Stability diagram", content) if content else ""


def _pictures(runs: Sequence[JudgedRun], *, diagrams: bool) -> str:
    """Return the stability diagrams that were saved with the runs, or the other pictures."""
    content = ""
    saved = [(run, name, png) for run in runs for name, png in run.logged.pictures.items()]
    for run, name, png in saved:
        if ("diagram" in name) is diagrams:
            text = escape(f"{_of(run, runs)}{name}")
            content += (
                f'<figure><img alt="{text}, a picture that was saved with the run" loading="lazy" '
                f'src="data:image/png;base64,{base64.b64encode(png).decode()}"><figcaption>{text}, as it was saved '
                "with the run</figcaption></figure>"
            )
    return content


def others(runs: Sequence[JudgedRun]) -> str:
    """Return the other pictures that were saved with the runs."""
    content = _pictures(runs, diagrams=False)
    return section("pictures", "Pictures saved with the run", content) if content else ""


def quantities(runs: Sequence[JudgedRun]) -> str:
    """Return all numbers that are no layer's."""
    return section(
        "quantities", "All numbers", '<div id="chooser"></div>' + "".join(_numbers(run, runs) for run in runs)
    )


def _numbers(run: JudgedRun, runs: Sequence[JudgedRun]) -> str:
    rows = []
    for name, curve, about in _listed(run):
        values = readings(curve) or [math.nan]
        failed = len(curve.values) - len(readings(curve))
        beyond = values[-1] > about.threshold if about is not None else False
        last = f"<strong class='beyond'>{number(values[-1])} (above {about.threshold:g})</strong>" if beyond else (
            number(values[-1]))  # fmt: skip
        meaning = "" if about is None else f"{about.meaning} {about.advice if beyond else ''}"
        lost = f" {failed:,} measurements failed (NaN)." if failed else ""
        unit = "" if about is None else about.unit
        rows.append([
            f"<code>{escape(name)}</code>", last, number(min(values)), number(max(values)), f"{curve.steps[-1]:,}",
            f"{len(curve.steps):,}", escape(unit), prose(meaning + lost),
        ])  # fmt: skip
    head = ("number", "last", "min", "max", "step", "readings", "unit", "meaning")
    caption = f"Numbers of {run.name}"
    opened = " open" if len(runs) == 1 else ""
    return f"<details{opened}><summary>{escape(caption)}</summary>{table(head, rows, caption, 'numbers')}</details>"


def _listed(run: JudgedRun) -> Iterator[tuple[str, Any, Any]]:
    keys = keys_of_a_run()
    names = sorted((k for k in run.logged.curves if is_single(k)), key=lambda k: (not k.startswith(PREFIX), k))
    for name in names:
        yield name, run.logged.curves[name], keys.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None


def configuration(runs: Sequence[JudgedRun]) -> str:
    """Return the settings, by file, with a column for each run."""
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
            f"<details{opened}><summary>{escape(file)}</summary>{table(head, rows, f'Settings in {file}')}</details>"
        )
    for run in runs:
        for name, text in run.logged.texts.items():
            title = f"{_of(run, runs)}{name}, as it is"
            content += f"<details><summary>{escape(title)}</summary><pre tabindex='0'>{escape(text)}</pre></details>"
    return section("configuration", "Configuration", content or "<p>None was logged.</p>")


def about(runs: Sequence[JudgedRun], made: str) -> str:
    """Return how the page was made, and from which logs."""
    rows = [
        [escape(run.name), escape(run.logged.source), f"<code>{escape(str(run.logged.path))}</code>"] for run in runs
    ]
    share = latest(runs[0].logged.curves.get("stability/overhead"))
    cost = "" if math.isnan(share) else f" Measuring took {share:.1%} of the time so far, by the last row of the logs."
    text = (
        f"<p>Made {escape(made)} from the logs alone: nothing in them was run. "
        f"Long curves and large maps are drawn with fewer points; of the readings that share one, the least and the "
        f"largest are kept, in a map that furthest from the neutral value.{cost if len(runs) == 1 else ''}</p>"
    )
    return section("about", "About this page", text + table(("run", "logs", "path"), rows, "Logs of this page"))
