"""A new quantity is one file and one line: the monitor, YAML, report and checkpoint take the rest from its class."""

import csv
import io
import math
import sys
from pathlib import Path
from typing import ClassVar

import harness
import pytest
import torch
from problems import close, regression, same, trajectory

from lsp_callbacks import Monitor, StabilityMonitor
from lsp_callbacks.cli.main import main
from lsp_callbacks.quantities import PRESETS, REGISTRY, Key, Quantity, build
from lsp_callbacks.quantities.key import standard_error
from lsp_callbacks.quantities.tables import key_table, quantity_table, section, stated_keys, summary
from lsp_callbacks.report import table
from lsp_callbacks.step.replay_checks import replayed_gradient

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"


class GradientNorm(Quantity):
    """Length of the step's gradient, times a factor.

    Cost: one gradient.

    Source: Cauchy 1847.
    """

    name = "gradient_norm"
    KEYS: ClassVar = {
        "gradient_norm": Key("Length of the gradient.", "loss / parameter", "If it explodes: clip it.", threshold=0.0),
        "gradient_norm_error": standard_error("gradient_norm", "loss / parameter"),
        "gradient_vanishes": Key("1 where it is below 1e-30.", optional=True),
        "gradient_norm/<parameter>": Key("Length of the gradient of a parameter."),
    }

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = factor

    def cost(self, snapshot):
        return {"gradient": 1.0}

    def update(self, snapshot):
        self.complete = False
        norm = self.factor * replayed_gradient(snapshot)[1].norm()
        self.finish({"gradient_norm": norm, "gradient_norm_error": 1e-3 * norm})


@pytest.fixture
def registered(monkeypatch):
    """The one line."""
    monkeypatch.setitem(REGISTRY, GradientNorm.name, GradientNorm)


def steps(n):
    task = regression()
    return trajectory(task, torch.optim.SGD(task.parameters(), lr=0.1), n)


def test_keys_and_states_follow_from_what_the_class_states():
    assert GradientNorm.keys == ("stability/gradient_norm", "stability/gradient_norm_error")
    assert GradientNorm.optional == ("stability/gradient_vanishes",) and not GradientNorm.warms_up
    snapshot = next(steps(1))
    metric, fresh = GradientNorm(), GradientNorm()
    metric.update(snapshot)
    values = metric.compute()
    close(values["stability/gradient_norm"], replayed_gradient(snapshot)[1].norm(), 1e-12)
    assert values.keys() == set(GradientNorm.keys) and metric.complete
    fresh.load_state_dict(metric.state_dict())
    assert same(fresh.compute(), values)
    metric.reset()
    with pytest.warns(UserWarning, match="before"):
        assert all(map(math.isnan, metric.compute().values()))
    with pytest.raises(KeyError, match=r"GradientNorm\.KEYS does not state stability/gradient_nrom"):
        metric.finish({"gradient_nrom": 1.0})


def test_its_name_and_settings_build_it(registered):
    (metric,), named = build("gradient_norm", gradient_norm={"factor": 2.0})
    assert type(metric) is GradientNorm and metric.factor == 2.0 and named == {"gradient_norm"}
    with pytest.raises(ValueError, match=r"neither a preset .* nor a quantity \(.*gradient_norm\)"):
        build("gradient_nrom")


def test_presets_follow_from_the_registry():
    assert PRESETS["full"] == tuple(name for name, quantity in REGISTRY.items() if not quantity.by_name_only)
    assert set(REGISTRY) - set(PRESETS["full"]) == {"clarke_training"}
    assert set(PRESETS["economy"]) | set(PRESETS["default"]) <= set(REGISTRY)


def rendered(history):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=150)
    console.print(table(history))
    return console.file.getvalue()


def test_it_is_measured_reported_and_resumed(registered, tmp_path):
    monitor = StabilityMonitor(["sharpness", "gradient_norm"], every_n_steps=1)
    rows = harness.Rows()
    trainer = harness.fit(harness.Model, monitor, max_steps=3, logger=rows)
    curve = monitor.history["stability/gradient_norm"]
    assert curve.steps == [0, 1, 2] and list(rows.curve("stability/gradient_norm").values()) == curve.values
    (row,) = (line for line in rendered(monitor.history).splitlines() if line.startswith("  gradient_norm"))
    assert "Length of the gradient." in row and "±" in row and "gradient_norm_error" not in row

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = StabilityMonitor(["sharpness", "gradient_norm"], every_n_steps=1)
    harness.fit(harness.Model, again, max_steps=5, ckpt_path=tmp_path / "run.ckpt")
    resumed = again.history["stability/gradient_norm"]
    assert resumed.steps == [0, 1, 2, 3, 4] and resumed.values[:3] == curve.values
    fresh = Monitor(GradientNorm())
    fresh.load_state_dict(monitor.monitor.state_dict())
    saved = fresh.quantities["gradient_norm"].compute()["stability/gradient_norm"]
    assert float(saved) == curve.values[-1]


def test_an_unregistered_one_has_its_meaning_in_the_report_too():
    monitor = Monitor(GradientNorm(), every_n_steps=1)
    for snapshot in steps(2):
        monitor.observe(snapshot)
    assert "Length of the gradient." in rendered(monitor.history)


def test_a_configuration_names_it(registered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lsp-callbacks"])
    settings = "\n      init_args:\n        every_n_steps: 2\n        quantities: [sharpness, gradient_norm]"
    text = CONFIG.read_text().replace("lsp_callbacks.StabilityMonitor", f"lsp_callbacks.StabilityMonitor{settings}")
    Path("run.yaml").write_text(text)
    assert main(["fit", "--config", "run.yaml", "--trainer.max_steps", "6"]) == 0
    (metrics,) = tmp_path.glob("runs/*/*/metrics.csv")
    values = [row["stability/gradient_norm"] for row in csv.DictReader(metrics.open())]
    assert any(values) and all(float(value) > 0 for value in values if value)


def test_the_tables_of_the_documentation_show_it(registered):
    row = quantity_table(["gradient_norm"]).splitlines()[-1]
    assert row.startswith("| `gradient_norm` | Length of the step's gradient, times a factor. | `gradient_norm`, ")
    assert row.endswith("| one gradient. | Cauchy 1847. |")
    assert "| `gradient_norm` | loss / parameter | Length of the gradient. | If it explodes: clip it. |" in key_table(
        "gradient_norm"
    )


@pytest.mark.parametrize("name", REGISTRY)
def test_every_quantity_has_a_complete_row(name):
    quantity = REGISTRY[name]
    assert summary(quantity).endswith(".") and section(quantity, "Cost") and section(quantity, "Source")
    for key, stated in quantity.KEYS.items():
        assert stated.meaning.endswith(".") and (not stated.advice or stated.advice.endswith(".")), key
        assert not stated.error_of or stated.error_of in quantity.KEYS, key
        assert stated_keys()[key] is stated  # no other quantity has a key of this name
    for name in (*quantity.keys, *quantity.without_update):
        assert name.removeprefix("stability/") in quantity.KEYS
    assert any(stated.advice for stated in quantity.KEYS.values())
