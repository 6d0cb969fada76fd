"""The sentence, the table, the picture, and the callback that shows them."""

import io
import math
import warnings

import harness
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer as UnifiedTrainer
from pytorch_lightning.loggers import CSVLogger

from lsp_callbacks import Curve, StabilityMonitor, StabilityReport, StopOnInstability
from lsp_callbacks.callbacks import stability_report
from lsp_callbacks.callbacks.stability_report import run_events
from lsp_callbacks.quantities.tables import stated_keys
from lsp_callbacks.report import e_folding, figure, loss_alarm, table, verdict
from lsp_callbacks.report.curves import averaged, centred_median, trailing_mean

NAN = math.nan
STEPS = [0, 10, 20, 30]


def history(courant=None, exponent=None, band=None, **others):
    """Curves by short names; ``band`` is the half-width of the exponent's bounds."""
    curves = {"courant": courant, "lyapunov": exponent} | others
    if band is not None:
        curves |= {"lyapunov_lower": [x - band for x in exponent], "lyapunov_upper": [x + band for x in exponent]}
    return {f"stability/{k.replace('__', '/')}": Curve(STEPS[: len(v)], list(v)) for k, v in curves.items() if v}


HISTORIES = {
    "stable": history([0.4] * 4, [-0.2] * 4, 0.1),
    "stable, no bounds yet": history([0.4], [-0.2]),
    "stable by the courant number alone": history([0.4] * 4),
    "one noisy batch": history([0.5, 0.6, 0.4, 1.4], [-0.2] * 4, 0.1),
    "recovered": history([0.5, 1.9, 0.6, 0.5], [-0.2, 0.1, 0.2, -0.2], 0.1),
    "edge by the courant number": history([1.0] * 4, [-0.05] * 4, 0.01),
    "edge by the band": history([0.8] * 4, [-0.05] * 4, 0.1),
    "stable, an exponent that tells little": history([0.3] * 4, [-0.2] * 4, 0.5, courant_mean_square=[0.3] * 4),
    "edge: amplifies, as full-batch training does": history([1.185] * 4, [0.31] * 4, 0.01),
    "unstable": history([0.5, 1.5, 2.0, 4.0], [-0.2, 0.1, 0.2, 0.3], 0.05),
    "unstable, bound not yet positive": history([0.5, 1.0, 2.0, 4.0], [-0.2, -0.1, 0.2, 0.3], 1.0),
    "unstable, hidden from one batch": history([0.3] * 4, [-0.1, -0.1, 0.2, 0.3], 0.05),
    "unstable by the courant number alone": history([0.5, 1.0, 3.0, 4.0]),
    "unstable by the exponent alone": history(None, [-0.1, 0.1, 0.2, 0.3], 0.05),
    "unstable, then NaN": history([0.5, 2.0, 3.0, NAN], [-0.1, 0.1, 0.2, NAN], 0.05),
    "infinite": history([1.0, 2.0, math.inf, math.inf], [0.1, 0.5, math.inf, math.inf]),
    "stable, then NaN": history([0.4, 0.4, NAN, NAN], [-0.2, -0.2, NAN, NAN], 0.1),
    "only the exponent fails": history([0.4] * 4, [-0.2, -0.2, -0.2, NAN], 0.1),
    "NaN in the middle": history([0.4, NAN, 0.4, 0.4], [-0.2, NAN, -0.2, -0.2], 0.1),
    "all NaN": history([NAN] * 4, [NAN] * 4),
    "nothing": {},
    "Adam": history(spectral_norm_max=[1.0, 2.0], spectral_norm__a=[1.0, 2.0], residual_gain_max=[0.5, 0.6]),
    "other quantities": history(lyapunov_trajectory=[1e-3]),
}
VERDICTS = {
    "stable": ("stable at step 30", "Courant number is 0.4 (mean of 4", "90 % bounds -0.3 and -0.1", "nothing to do"),
    "stable, no bounds yet": ("stable at step 0", "Courant number is 0.4 (the edge is at 1)", "(exponent -0.2)"),
    "stable by the courant number alone": ("stable at step 30", "(mean of 4, the edge is at 1); nothing to do"),
    "one noisy batch": ("stable at step 30", "Courant number is 0.72 (mean of 4"),
    "recovered": ("stable at step 30", "not always between steps 10 and 20", "check that the loss has recovered"),
    "edge by the courant number": ("at the edge of stability", "healthy as long as the loss falls", "divide", "by 1.2"),
    "edge by the band": ("at the edge of stability", "-0.15 and +0.05", "otherwise halve the learning rate"),
    "stable, an exponent that tells little": ("stable at step 30", "-0.7 and +0.3"),
    "edge: amplifies, as full-batch training does": ("at the edge of stability", "grows by e in 3.2 steps", "by 1.5"),
    "unstable": (
        "unstable since step 10",
        "Courant number is 2 (",
        "+0.25 and +0.35",
        "divide the learning rate by 2.5",
    ),
    "unstable, bound not yet positive": ("unstable since step 20", "-0.7 and +1.3"),
    "unstable, hidden from one batch": ("contradict each other", "is 0.3", "(exponent +0.3", "no advice"),
    "unstable by the courant number alone": ("unstable since step 20", "divide the learning rate by 2.7"),
    "unstable by the exponent alone": ("unstable since step 10", "halve the learning rate"),
    "unstable, then NaN": ("unstable since step 10", "from step 30 on, measurements failed (NaN)"),
    "infinite": ("unstable since step 0", "inf"),
    "stable, then NaN": ("unknown since step 20", "the last 2 measurements failed (NaN)", "warning"),
    "only the exponent fails": ("unknown since step 30", "the last measurement failed (NaN)"),
    "NaN in the middle": ("stable at step 30",),
    "all NaN": ("not measured", "4 measurements failed (NaN)"),
    "nothing": ("not measured", "train longer, or measure more often"),
    "Adam": ("was not measured", "largest spectral norm of a layer is 2", "0.6", "the warning at the start"),
    "other quantities": ("was not measured", "no Courant number, no exponent"),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_verdict(name):
    sentence = verdict(HISTORIES[name])
    for part in VERDICTS[name]:
        assert part in sentence
    assert sentence.startswith("lsp_callbacks: ") and sentence.endswith(".") and "\n" not in sentence
    claims = [word for word in ("stable at step", "at the edge of", "unstable since", "not measured", "unknown since",
                                "contradict each other") if word in sentence]  # fmt: skip
    assert len(claims) == 1
    if any(math.isnan(curve.values[-1]) for curve in HISTORIES[name].values()):
        assert claims[0] not in ("stable at step", "at the edge of")
    if claims[0] not in ("not measured", "unknown since"):
        assert "linear stability" in sentence


def test_the_edge_agrees_with_gradient_descent_on_a_quadratic():
    """``log |1 - 2C|``: below the edge stable, far above it unstable, whatever the exponent's size."""
    for courant, word in ((0.1, "stable at"), (0.85, "stable at"), (1.05, "at the edge"), (1.5, "unstable since")):
        assert word in verdict(history([courant] * 4, [math.log(abs(1 - 2 * courant))] * 4, 0.001))


def test_series():
    assert averaged(Curve([0, 1, 2, 3], [1.0, NAN, 3.0, 8.0]), of=2).values[2:] == [2.0, 5.5]
    values = np.array([4.0, 2.0, 0.0, 2.0, 4.0, 6.0])
    assert trailing_mean(values, 3) == pytest.approx([4, 3, 2, 4 / 3, 2, 4])
    assert centred_median(values, 3) == pytest.approx([4, 2, 2, 2, 4, 6])
    assert e_folding(math.inf) == "grows by e in 0 steps"


@pytest.mark.parametrize(
    ("values", "alarm"),
    [
        ([2.0] * 60 + [1.0] * 100, None),
        ([2.0] * 60 + [0.01] * 100 + [0.3] * 100, None),  # 30 times the best, but far below where it began
        ([2.0] * 60 + [0.01] * 100 + [2.0] * 100, 172),  # 13 of 50 above: 0.26 * 2 > 0.25 * 2
        ([2.0] * 60 + [1.0] * 100 + [NAN] + [1.0] * 10, 160),
        ([2.0] * 8 + [1e20] * 8, 8),  # too early for a mean of 50
        ([2.0, NAN], 1),
        ([-1.0] * 60 + [5.0] * 60, None),
        ([], None),
    ],
)
def test_loss_alarm(values, alarm):
    assert loss_alarm(values) == alarm


def test_loss_alarm_of_means():
    values = [2.0] * 50 + [1.0] * 50 + [5.0] * 50
    halved = [sum(values[i : i + 2]) / 2 for i in range(0, 150, 2)]
    assert 2 * loss_alarm(halved, stride=2) == pytest.approx(loss_alarm(values), abs=2)


# -- table and picture ------------------------------------------------------------------------------------------------

EVERYTHING = history(
    [0.1, 0.5, NAN, 1.5],
    [-0.2, -0.1, NAN, 0.1],
    0.05,
    courant_gd=[0.1, 0.5, NAN, 1.5],
    sharpness=[1.0] * 4,
    sharpness_residual=[0.021] * 4,
    residual_gain__one=[-0.5, 0.6, 0.7, 1.2],
    residual_gain__two=[0.1] * 4,
    **{f"spectral_norm__layer{i}": [1.0 + i] * 4 for i in range(12)},
)


def rendered(curves):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=150)
    console.print(table(curves))
    return console.file.getvalue()


def test_table():
    text = rendered(EVERYTHING)
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert rows["courant"].split()[1:5] == ["1.5", "0.1", "1.5", "30"] and "(1 NaN)" in rows["courant"]
    assert "within 2.1%" in rows["sharpness"]
    assert rows["spectral_norm/*"].split()[1:4] == ["1", "12", "30"]
    assert "layer11 12, layer10 11, layer9 10 (of 12)" in rows["spectral_norm/*"]
    assert "one 1.2, two 0.1" in rows["residual_gain/*"]
    assert not {"courant_gd", "sharpness_residual"} & rows.keys()  # the dial's twin; an error beside its value


@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_can_be_shown(name, tmp_path):
    rendered(HISTORIES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure(HISTORIES[name]).savefig(tmp_path / "small.png", dpi=30)


def test_figure(tmp_path):
    loss = (list(range(31)), [2.0 / (1 + i) for i in range(30)] + [NAN])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = figure(EVERYTHING, loss, {"exponent turned positive": 25, "loss alarm": None, "stopped": 30})
        picture.savefig(tmp_path / "all.png")
    strip, *panels = picture.axes
    titles = [ax.get_title("left") for ax in panels]
    assert [title.split()[0] for title in titles] == [
        "Training",
        "Courant",
        "Sharp-mode",
        "Sharpness",
        "Gains",
        "Spectral",
    ]
    assert "above 0 a block stretches" in panels[4].get_title("right")
    assert {t.get_text() for t in strip.texts} == {"exponent turned positive, step 25", "stopped, step 30"}
    for ax in panels:  # lines through all panels, on one axis of steps
        assert {25, 30} <= {line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2}
        assert ax.get_xlim() == panels[0].get_xlim()
    names = [text.get_text() for text in panels[-1].texts]
    assert names == [f"layer{i} {1 + i:.2f}" for i in range(11, 5, -1)]  # from below, as the first layer is at the top
    places = [text.xy[1] for text in panels[-1].texts]
    assert np.diff(places).min() > 0.08 and 0 <= places[0] < places[-1] <= 1  # no two labels overlap
    assert panels[0].get_yscale() == "log"


def test_errors_are_no_curves_of_their_own():
    """Every key that is the error of another, beside every Courant number."""
    numbers = {"courant_mean_square": [0.1, 0.5, NAN, 1.5], "courant_gd": [0.2] * 4, "courant_step": [0.3] * 4}
    errors = {name: [0.01] * 4 for name, key in stated_keys().items() if key.error_of}
    assert {"courant_step_error", "courant_gd_residual"} <= errors.keys()
    curves = history([0.1, 0.5, NAN, 1.5], **numbers, **errors)
    assert {text.get_text() for text in figure(curves).axes[0].texts} == {"edge", "courant_gd", "courant_step"}
    assert not {"courant_mean_square", "courant_step_error"} & {
        line.split()[0] for line in rendered(curves).split("\n") if line.strip()
    }


def test_labels_of_equal_lines_do_not_overlap():
    same = history(**{f"spectral_norm__layer{i}": [2.0] * 4 for i in range(6)})
    places = sorted(text.xy[1] for text in figure(same).axes[0].texts)
    assert np.diff(places).min() > 0.08 and np.mean(places) == pytest.approx(0.5, abs=0.01)


def test_many_layers_are_a_map_whose_gaps_and_infinities_are_no_calm_colours():
    curves = {f"layer{i}": (STEPS, [1.0 + i] * 4) for i in range(12)}
    curves["layer3"], curves["layer5"] = (STEPS, [4.0, NAN, 4.0, math.inf]), (STEPS[1:2], [6.0])
    history = {f"stability/spectral_norm/{name}": Curve(list(s), list(v)) for name, (s, v) in curves.items()}
    (ax,) = [ax for ax in figure(history).axes if ax.get_title("left")]
    mesh = ax.collections[0]
    cells = mesh.get_array()
    assert cells.shape == (12, 4) and cells[11].tolist() == [12.0] * 4 and ax.get_ylim() == (11.5, -0.5)
    assert cells.mask[3].tolist() == [False, True, False, False] and cells[3, 3] == 12.0  # infinite: the last colour
    assert cells.mask[5].tolist() == [True, False, True, True]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1.0, 12.0)


def test_what_is_measured_is_shown():
    """Also where that is no Courant number, and the headline's twin is no second line, NaN included."""
    curves = history(critical_sharpness=[3.0] * 4, critical_sharpness_error=[0.1] * 4, sigma_x_max=[2.0] * 4)
    titles = [ax.get_title("left") for ax in figure(curves).axes]
    assert sorted(title.split(",")[0] for title in titles) == ["critical_sharpness", "sigma_x_max"]
    curves = history([0.1, NAN, 0.3, 0.2], courant_mean_square=[0.1, math.nan * 1.0, 0.3, 0.2])
    assert {text.get_text() for text in figure(curves).axes[0].texts} == {"edge"}
    every = {f"courant_{name}": [0.1 * i] * 4 for i, name in enumerate(("gd", "step", "sgd", "mean_square"), start=2)}
    lines = figure(history([0.1] * 4, **every)).axes[0].texts
    assert len({text.get_color() for text in lines}) == 5  # each its own, and the edge
    single = history([0.1, 0.2, 0.3, 0.2], courant_gd=[0.4])  # one reading is no line
    (line,) = [line for line in figure(single).axes[0].lines if list(line.get_xdata()) == [0]]
    assert line.get_marker() == "o"


def test_the_noise_of_a_long_run_does_not_hide_its_mean():
    noise = np.random.default_rng(0).standard_normal(8000) / 4
    curves = {"stability/courant": Curve(list(range(8000)), list(0.5 + noise))}
    ax = figure(curves).axes[0]
    raw, mean = [line for line in ax.lines if len(line.get_xdata()) == 8000]
    assert raw.get_alpha() < 0.3 and "mean of 80 batches" in ax.get_title("right")
    assert np.std(mean.get_ydata()[80:]) < 0.15 * np.std(raw.get_ydata())


def test_titles_and_remarks_do_not_overlap():
    """On the picture with the longest of both."""
    picture = figure(EVERYTHING | {f"stability/residual_gain/b{i}": Curve(STEPS, [0.1] * 4) for i in range(4)})
    picture.canvas.draw()
    for ax in picture.axes:
        left, right = ax.title, ax._right_title
        boxes = [text.get_window_extent() for text in (ax._left_title, right) if text.get_text()]
        assert left is not None and (len(boxes) < 2 or boxes[0].x1 < boxes[1].x0), ax.get_title("left")


def test_an_explosion_does_not_hide_what_came_before():
    picture = figure({}, (list(range(100)), [1.0] * 90 + [1e20] * 10))
    assert picture.axes[0].get_ylim()[1] < 1e4


# -- the callback -----------------------------------------------------------------------------------------------------


def reported(tmp_path, *callbacks, **settings):
    report, losses = StabilityReport(), harness.Losses()
    settings = {"default_root_dir": tmp_path} | settings
    trainer = harness.fit(harness.Model, StabilityMonitor(every_n_steps=5), report, losses, *callbacks, **settings)
    return report, losses.losses, trainer


def test_the_loss_of_every_step(tmp_path, capsys):
    report, losses, _ = reported(tmp_path)
    assert report._losses.read() == (list(range(10)), pytest.approx(losses))
    assert (tmp_path / "stability.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    order = [
        text.index(part) for part in ("quantity", "spectral_norm_max", "lsp_callbacks: ", "the picture of this run")
    ]
    assert order == sorted(order) and text.count("stable at step") == 1


def test_the_sentence_is_said_once(tmp_path, capsys, caplog):
    with caplog.at_level("INFO"):
        reported(tmp_path)
        assert "lsp_callbacks: " not in caplog.text
        harness.fit(harness.Model, StabilityMonitor(every_n_steps=5))
        assert "stable at step" in caplog.text


def test_accumulated_losses_are_those_of_the_steps(tmp_path):
    report, losses, _ = reported(tmp_path, accumulate_grad_batches=3, max_steps=4)
    assert report._losses.read() == ([0, 1, 2, 3], pytest.approx([sum(losses[i : i + 3]) for i in range(0, 12, 3)]))


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(stability_report, "POINTS", 8)
    losses = stability_report.Losses()
    for step in range(37):
        losses.add(step, torch.tensor(float(step)))
    steps, values = losses.read()
    assert losses.stride == 8 and steps == [7, 15, 23, 31, 36]
    assert values == pytest.approx([3.5, 11.5, 19.5, 27.5, 34.0])
    copy = stability_report.Losses()
    copy.load_state_dict(losses.state_dict())
    for each in (losses, copy):
        each.add(37, torch.tensor(37.0))
    assert copy.read() == losses.read()


def test_a_resumed_run_shows_the_whole_loss(tmp_path):
    _, whole, _ = reported(tmp_path)
    *_, trainer = reported(tmp_path, max_steps=6)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    report, _, _ = reported(tmp_path, ckpt_path=tmp_path / "run.ckpt")
    assert report._losses.steps == list(range(10))
    assert report._losses.read()[1][:6] == pytest.approx(whole[:6])


def test_events_and_paths(tmp_path):
    stop = StopOnInstability("stability/courant", threshold=0.0, confirm=None, patience=2, verbose=False)
    picture = StabilityReport("plots/run.pdf", table=False)
    logger = CSVLogger(tmp_path)
    trainer = harness.fit(harness.Model, stop, StabilityMonitor(every_n_steps=2), picture, logger=logger)
    assert (tmp_path / "lightning_logs/version_0/plots/run.pdf").exists()
    assert trainer.global_step == 3
    assert run_events(trainer, [0], [1.0], 1) == {"courant above 0": 2, "loss alarm": None, "stopped": 2}


def test_both_names_of_lightning(tmp_path):
    trainer = UnifiedTrainer(callbacks=[StabilityReport()], logger=False, accelerator="cpu")
    assert any(isinstance(callback, StabilityReport) for callback in trainer.callbacks)


def test_it_needs_a_monitor():
    with pytest.raises(ValueError, match="needs a StabilityMonitor"):
        harness.fit(harness.Model, StabilityReport())


def test_it_refuses_what_is_not_a_picture():
    with pytest.raises(ValueError, match=r"path='stability.csv'.*\.png"):
        StabilityReport("stability.csv")


@pytest.mark.parametrize("missing", ["matplotlib", "rich"])
def test_a_missing_extra_is_named_before_training(missing, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'lsp-callbacks\[report\]'"):
        harness.fit(harness.Model, StabilityMonitor(), StabilityReport())
