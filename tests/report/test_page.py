"""The page: one file, all text escaped, no request, few bytes, the same numbers as the logs."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from log_files import EVIL, columns, write_csv

from lsp_callbacks import Curve
from lsp_callbacks.quantities.tables import stated_keys
from lsp_callbacks.report.logs.find import read_run
from lsp_callbacks.report.logs.logged_run import LoggedRun
from lsp_callbacks.report.page.decimation import decimated, map_of
from lsp_callbacks.report.page.html_page import html_page
from lsp_callbacks.report.page.judged_run import JudgedRun
from lsp_callbacks.report.page.maps import colours

NAN = math.nan
VOID = {"meta", "img", "br", "link", "input"}


class Parsed(HTMLParser):
    """Tags with attributes, text outside of scripts, and whether every element is closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.scripts, self._open = [], "", [], []
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] in (["script"], ["style"]):
            self.scripts.append(data)
        else:
            self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[1])


def page_of(*folders, **settings):
    runs = [JudgedRun.of(read_run(folder), folder.name) for folder in folders]
    return html_page(runs, **settings)


@pytest.fixture
def page(tmp_path):
    write_csv(tmp_path / "run", columns(100, slope=0.05))
    (tmp_path / "run" / "hparams.yaml").write_text("lr: 0.1\nname: '<b>'\n")
    return page_of(tmp_path / "run")


def test_the_order_is_verdict_time_cause_events_layers_diagram_numbers_configuration(page):
    sections = [attributes["id"] for tag, attributes in Parsed(page).tags if tag == "section"]
    assert sections == [
        "verdict", "time", "cause", "events", "layers", "diagram", "quantities", "configuration", "about"
    ]  # fmt: skip


def test_the_text_says_what_the_logs_say(page):
    parsed = Parsed(page)
    assert "✕ unstable" in parsed.text and "Courant number above 1" in parsed.text
    assert "the largest spectral_norm of 3: 50.6 at step 99" in parsed.text and "net.1" in parsed.text
    assert stated_keys()["spectral_norm/<layer>"].meaning in parsed.text and "hparams.yaml" in parsed.text
    drawn = {figure["id"]: figure for figure in parsed.data["figures"]}
    assert set(drawn) == {"courant", "loss", "rates"} and drawn["courant"]["edge"] == 1.0
    thin = next(line for line in drawn["courant"]["series"] if line["look"] == "thin")
    assert thin["x"] == list(range(100)) and thin["y"][1:3] == [0.25, 0.3]


def test_nothing_is_loaded_from_anywhere(page):
    """The policy forbids it, and no element or script asks for it."""
    parsed = Parsed(page)
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:") and "unsafe" not in policy
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster", "style"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(|@import|url\(h|innerHTML|eval\(", page)


def test_text_of_logs_and_settings_cannot_become_markup(tmp_path):
    folder = tmp_path / "run"
    write_csv(folder, columns(30) | {f"stability/spectral_norm/{EVIL}": [9.0] * 30, EVIL: [1.0] * 30})
    (folder / "hparams.yaml").write_text(json.dumps({EVIL: EVIL}))
    (folder / "config.yaml").write_text(f"a: &x 1\nb: *x\n# {EVIL}\n")
    parsed = Parsed(html_page([JudgedRun.of(read_run(folder), EVIL)]))
    assert [tag for tag, _ in parsed.tags].count("script") == 2 and "img" not in [tag for tag, _ in parsed.tags]
    assert parsed.text.count(EVIL) >= 5 and EVIL in parsed.data["maps"][1]["maps"][0]["layers"]
    assert not [a for _, a in parsed.tags if any(name.startswith("on") for name in a)]


def test_every_section_table_and_picture_has_a_name(page):
    parsed = Parsed(page)
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids)) and ("html", {"lang": "en"}) in parsed.tags
    for tag, attributes in parsed.tags:
        if tag == "section":
            assert attributes["aria-labelledby"] in ids
        if attributes.get("role") == "region":
            assert attributes["aria-label"] and attributes["tabindex"] == "0"
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    assert [tag for tag, _ in parsed.tags].count("table") == [tag for tag, _ in parsed.tags].count("caption")


def test_a_run_without_any_number_is_unknown(tmp_path):
    (tmp_path / "metrics.csv").write_text("step\n")
    parsed = Parsed(page_of(tmp_path))
    assert "? unknown" in parsed.text and "stable" not in parsed.text.replace("unstable", "").lower().split()
    assert "there is nothing to draw" in parsed.text


def test_several_runs_stand_side_by_side(tmp_path):
    for name, slope in (("one", 0.0), ("two", 0.05)):
        write_csv(tmp_path / name, columns(80, slope=slope))
        (tmp_path / name / "hparams.yaml").write_text(f"lr: {slope}\nwidth: 3\n")
    parsed = Parsed(page_of(tmp_path / "one", tmp_path / "two"))
    assert [tag for tag, _ in parsed.tags].count("article") == 2 and parsed.data["runs"] == ["one", "two"]
    courant = next(figure for figure in parsed.data["figures"] if figure["id"] == "courant")
    assert {line["run"] for line in courant["series"]} == {0, 1}
    assert all(len(group["maps"]) == 2 for group in parsed.data["maps"])
    assert parsed.text.count("differs") == 1


def test_only_a_page_of_a_run_that_goes_on_loads_itself_again(tmp_path):
    write_csv(tmp_path / "run", columns(5))
    again = page_of(tmp_path / "run", refresh=7)
    assert (
        '<noscript><meta http-equiv="refresh" content="7"></noscript>' in again and Parsed(again).data["refresh"] == 7
    )
    over = page_of(tmp_path / "run")
    assert 'http-equiv="refresh"' not in over and Parsed(over).data["refresh"] is None


def test_pictures_are_part_of_the_page_if_they_are_pictures(tmp_path):
    write_csv(tmp_path, columns(5))
    png = b"\x89PNG\r\n\x1a\n123"
    (tmp_path / "stability_diagram.png").write_bytes(png)
    (tmp_path / "stability_other.png").write_bytes(b"<script>alert(1)</script>")
    (tmp_path / "stability_large.png").write_bytes(png + bytes(700_000))
    parsed = Parsed(page_of(tmp_path))
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == 1 and "stability_diagram.png" in images[0]["alt"]
    assert "stability_large.png is left out" in parsed.text


# -- fewer points -----------------------------------------------------------------------------------------------------


def test_spikes_gaps_and_infinities_stay():
    values = [math.sin(i / 50) for i in range(10_000)]
    values[1234], values[5678], values[7000], values[7001] = 9.0, -9.0, NAN, math.inf
    few = decimated(Curve(list(range(10_000)), values), 500)
    assert (
        len(few.steps) <= 502
        and few.steps == sorted(set(few.steps))
        and {0, 1234, 5678, 7000, 7001, 9999} <= set(few.steps)
    )
    assert decimated(Curve([1, 2], [3.0, 4.0]), 500) == Curve([1, 2], [3.0, 4.0])


def test_a_cell_of_a_map_shows_what_is_furthest_from_neutral():
    steps = list(range(100))
    curves = {"a": Curve(steps, [0.1] * 37 + [-5.0] + [0.1] * 62), "b": Curve([3], [NAN]), "c": Curve([3], [0.2])}
    small = map_of(curves, neutral=0.0, columns=10, rows=2)
    assert small.layers == ["a", "c"] and small.left_out == 1 and small.columns == 100 and len(small.spans) == 10
    assert small.values[0][3] == -5.0 and small.spans[3] == (30, 39) and small.values[1] == [0.2] + [None] * 9
    whole = map_of(curves, neutral=0.0, columns=100, rows=9)
    assert math.isnan(whole.values[1][3]) and whole.values[1][4] is None


def test_colours_are_symmetric_around_a_neutral_value():
    scale = colours("residual_gain", [-0.2, 0.5, NAN])
    assert (scale.low, scale.high) == (-0.5, 0.5)
    scale = colours("sigma_x", [0.5, 4.0])
    assert scale.log and scale.neutral == 1.0 and (scale.low, scale.high) == pytest.approx((0.25, 4.0))
    assert colours("spectral_norm", [1.0, 100.0]).log and not colours("spectral_norm", [1.0, 2.0]).log
    assert colours("spectral_norm", [NAN]).high > 0


def test_ten_thousand_steps_of_a_hundred_layers_stay_below_five_megabytes():
    steps = list(range(0, 10_000, 2))
    rough = [1.0 + 1e-3 * math.sin(1e4 * i) for i in steps]
    kinds = ("spectral_norm", "sigma_x", "forward_gain", "dead_units")
    layers = {f"stability/{kind}/layer.{k}": Curve(steps, rough) for kind in kinds for k in range(100)}
    ones = {f"stability/number_{k}": Curve(steps, rough) for k in range(30)}
    run = LoggedRun("run", "CSV", {"stability/courant": Curve(steps, rough)} | layers | ones)
    page = html_page([JudgedRun.of(run, "run")])
    assert 500_000 < len(page.encode()) < 5_000_000
