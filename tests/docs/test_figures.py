"""The pictures of the concept pages are those that the script draws."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
#: So many steps are enough to see that a picture can be drawn.
SHORT = {
    "courant_number": {"steps": 12},
    "edge_of_stability": {"steps": 4, "every": 2},
    "critical_sharpness": {"steps": 6, "every": 2},
    "lyapunov_exponents_of_sgd": {"probes": 40, "chains": 2, "steps": 10},
    "residual_cfl": {"points": 5},
    "learning_stability_profile": {"steps": 10},
}


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FIGURES


def test_each_picture_is_drawn_and_shown(figures):
    pages = "".join(page.read_text() for page in FOLDER.parent.rglob("*.md"))
    shown = set(re.findall(r"figures/(\w+)\.png", pages))
    assert (
        shown
        == {path.stem for path in FOLDER.glob("*.png")}
        == {*figures, "digits_diagram"}
        == {*SHORT, "digits_diagram"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_picture_can_be_drawn(figures, name):
    canvas = figures[name](**SHORT[name])
    assert all(axes.lines for axes in canvas.axes)
