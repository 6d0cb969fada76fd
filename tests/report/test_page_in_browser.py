"""The page in a real browser, at the widths of a phone and a desktop, where one is installed."""

import math

import pytest
from chromium import chromium, executable
from log_files import EVIL, columns, write_csv

from lsp_callbacks.report.logs.find import read_run
from lsp_callbacks.report.page.html_page import html_page
from lsp_callbacks.report.page.judged_run import JudgedRun

pytestmark = pytest.mark.skipif(executable() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser():
    with chromium() as page:
        yield page


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Two runs with long names, an event, and a hundred layers with long names."""
    folder = tmp_path_factory.mktemp("long")
    table = columns(600, slope=0.005) | {"stability/event": [None] * 360 + [360]}
    layers = {f"stability/spectral_norm/model.layers.{k}.mlp.projection": [1 + k / 50] * 600 for k in range(100)}
    table = {key: values for key, values in table.items() if "spectral" not in key} | layers
    runs = [JudgedRun.of(read_run(write_csv(folder / str(i), table)), f"digits_unstable/version_{i}") for i in range(2)]
    (folder / "page.html").write_text(html_page(runs))
    return folder / "page.html"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    table = columns(100, slope=0.05) | {f"stability/spectral_norm/{EVIL}": [math.inf] * 50 + ["nan"] * 50}
    runs = [JudgedRun.of(read_run(write_csv(folder / "one", table)), EVIL)]
    table = columns(80) | {"stability/lyapunov": ["nan"] * 80, "stability/event": [None] * 20 + [20]}
    runs.append(JudgedRun.of(read_run(write_csv(folder / "two", table)), "two"))
    (folder / "page.html").write_text(html_page(runs, refresh=900))
    return folder / "page.html"


WIDTHS = pytest.mark.parametrize(
    "look", [{"width": 1200}, {"width": 360, "height": 780, "phone": True}], ids=["desktop", "phone"]
)


@WIDTHS
def test_all_figures_are_drawn_without_a_request_a_complaint_or_a_page_that_is_too_wide(browser, path, look):
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(path, **look)
    assert set(browser.requests) == {path.as_uri()} and not browser.complaints
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.run("document.querySelectorAll('.figure svg path').length") > 10
    assert browser.run("[...document.querySelectorAll('canvas')].every((canvas) => canvas.width > 100)")
    assert browser.run("typeof window.alert.calls") == "undefined" and browser.run("document.images.length") == 0


def test_dark_and_light_follow_the_system_and_the_button(browser, path):
    back = "getComputedStyle(document.body).backgroundColor"
    browser.open(path, dark=True)
    dark = browser.run(back)
    browser.run("sessionStorage.clear()")
    browser.open(path)
    light = browser.run(back)
    assert (dark, light) == ("rgb(20, 23, 26)", "rgb(255, 255, 255)")
    browser.run("document.querySelector('#tools button').click()")
    assert browser.run(back) == dark
    browser.run("sessionStorage.clear()")


def test_keys_walk_through_readings_and_zoom_and_the_voice_says_so(browser, path):
    browser.open(path)
    browser.run("document.querySelector('.plot').focus()")
    browser.press("Home")
    said = "document.querySelector('.figure [aria-live]').textContent"
    assert browser.run(said).startswith("step 0, ") and ": 0.2" in browser.run(said)
    browser.press("ArrowRight")
    assert browser.run(said).startswith("step 1, ") and ": 0.25" in browser.run(said)
    assert browser.run("document.querySelector('.figure .tip').hidden") is False
    whole = browser.run("view.range[1] - view.range[0]")
    browser.press("+")
    assert browser.run("view.range[1] - view.range[0]") < 0.8 * whole
    browser.press("Escape")
    assert browser.run("view.range[1] - view.range[0]") == pytest.approx(whole)


def test_dragging_zooms_all_figures(browser, path):
    browser.open(path)
    place = browser.run("(({x, y, width, height}) => [x, y, width, height])(document.querySelector('.plot svg')"
                        ".getBoundingClientRect())")  # fmt: skip
    x, y, width, height = place
    browser.mouse("mousePressed", x + 0.3 * width, y + height / 2, button="left", clickCount=1)
    browser.mouse("mouseMoved", x + 0.6 * width, y + height / 2, button="left", buttons=1)
    browser.mouse("mouseReleased", x + 0.6 * width, y + height / 2, button="left", clickCount=1)
    low, high = browser.run("view.range")
    assert 15 < low < 40 < high < 70
    ticks = "[...document.querySelectorAll('.figure')].map((f) => f.querySelector('svg text')?.textContent)"
    assert len({text for text in browser.run(ticks) if text}) == 1


def test_a_legend_switches_curves_and_tables_hold_the_numbers(browser, path):
    browser.open(path)
    paths = "document.querySelectorAll('.figure .plot svg g path').length"
    before = browser.run(paths)
    browser.run("document.querySelector('.legend button').click()")
    assert browser.run(paths) < before
    assert browser.run("document.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    browser.run("document.querySelectorAll('.figure details, .maps details').forEach((each) => { each.open = true; })")
    browser.run("new Promise((done) => setTimeout(done, 200))")
    rows = browser.run("[...document.querySelectorAll('.figure tbody tr')].slice(0, 2).map((row) => row.textContent)")
    assert rows[0].startswith("0") and "0.2" in rows[0]
    rows = browser.run("[...document.querySelectorAll('.maps tbody tr')].map((row) => row.children[0].textContent)")
    assert {"net.1", "blocks.2", EVIL} <= set(rows)
    assert browser.run("document.images.length") == 0


def test_every_button_plot_and_canvas_has_a_name(browser, path):
    browser.open(path)
    unnamed = browser.run(
        "[...document.querySelectorAll('button, [role], canvas:not([aria-hidden]), select')].filter((e) => "
        "!e.textContent.trim() && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby') && "
        "!document.querySelector(`label[for='${e.id}']`)).length"
    )
    assert unnamed == 0
    assert browser.run("[...document.querySelectorAll('.plot')].every((plot) => plot.tabIndex === 0)")


def test_a_page_that_follows_a_run_loads_again_until_it_is_paused(browser, path):
    again = path.with_name("again.html")
    again.write_text(path.read_text().replace('"refresh":900', '"refresh":1'))
    browser.open(again)
    browser.wait_for_load()
    browser.run("document.querySelectorAll('#tools button')[1].click()")
    assert browser.run("document.querySelectorAll('#tools button')[1].textContent") == "Paused: go on"
    loads = browser.loads
    browser.run("new Promise((done) => setTimeout(done, 1500))")
    assert browser.loads == loads
    browser.run("sessionStorage.clear()")


@WIDTHS
def test_no_text_of_a_figure_is_cut_off(browser, long_run, look):
    browser.open(long_run, **look)
    outside = browser.run(
        "[...document.querySelectorAll('.figure svg[role=img] text')].filter((text) => { "
        "const t = text.getBoundingClientRect(), box = text.ownerSVGElement.getBoundingClientRect(); "
        "return t.left < box.left - 1 || t.right > box.right + 1; }).map((text) => text.textContent)"
    )
    assert outside == []
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_names_of_layers_are_cut_where_they_are_the_same(browser, long_run):
    names = [f"model.layers.{k}.mlp" for k in range(3)]
    browser.open(long_run)
    assert browser.run(f"commonBeginning({names})") == len("model.layers.")
    assert browser.run("commonBeginning(['a.b'])") == browser.run("commonBeginning(['a.b', 'c.b'])") == 0


def test_codes_in_tables_are_not_broken_in_the_middle_of_a_short_word(browser, long_run):
    browser.open(long_run, width=390, height=844, phone=True)
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    tall = browser.run("[...document.querySelectorAll('td > code, th > code')].filter((code) => "
                       "code.textContent.length < 18 && code.getClientRects().length > 1).length")  # fmt: skip
    assert tall == 0
