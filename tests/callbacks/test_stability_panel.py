"""The panel in a terminal and the figure in a notebook: drawn at readings alone, without a trace in training."""

import io

import harness
import pytest
import torch
from lightning.pytorch import Trainer as UnifiedTrainer
from lightning.pytorch.callbacks import RichProgressBar as UnifiedBar
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar

from lsp_callbacks import Curve, StabilityMonitor, StabilityPanel, StabilityReport, StopOnInstability
from lsp_callbacks.callbacks import stability_panel
from lsp_callbacks.report import Run, judge
from lsp_callbacks.report.live_panel import LivePanel


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """However long a drawing takes, the next reading is drawn, too."""
    monkeypatch.setattr(stability_panel, "REST", 0.0)


def bar(file, *, terminal=True, kind=RichProgressBar):
    return kind(console_kwargs={"file": file, "force_terminal": terminal, "width": 100, "color_system": None})


def monitor():
    return StabilityMonitor(["mean_square_stability", "sharpness"], every_n_steps=4)


class Noting(StabilityPanel):
    """Notes at which step it draws, and whether Lightning would call it at the end of each batch."""

    def __init__(self):
        super().__init__()
        self.drawn, self.is_called = [], []

    def _draw(self, trainer):
        self.drawn.append(trainer.global_step)
        super()._draw(trainer)


def test_the_panel_shows_the_numbers_and_the_sentence_below_the_bar():
    file = io.StringIO()
    harness.fit(harness.Model, StopOnInstability(), monitor(), StabilityPanel(), bar(file), enable_progress_bar=True)
    text = file.getvalue()
    last = text[text.rindex("Epoch ") :]
    for part in ("✓ stable at step 8", "Courant number", "sharpness x rate", "the edge is at 1", "event", "none",
                 "stable at step 8 (linear stability)"):  # fmt: skip
        assert part in last, part
    assert "exponent" not in last.split("stable at step 8 (linear")[0]  # which is not measured


@pytest.mark.parametrize("first", [True, False], ids=["before the monitor", "after it"])
def test_it_draws_at_readings_alone_and_at_the_end(first):
    panel, source = Noting(), monitor()

    class Watch(harness.pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            panel.is_called.append(callable(panel.on_train_batch_end))

    callbacks = [panel, source] if first else [source, panel]
    harness.fit(harness.Model, *callbacks, Watch(), bar(io.StringIO()), enable_progress_bar=True)
    assert source.history["stability/courant"].steps == [0, 4, 8]
    assert panel.drawn == ([2, 6, 10, 10] if first else [1, 5, 9, 10])
    assert panel.is_called == [first and step in (1, 5, 9) for step in range(10)]
    assert panel._note not in source.reading_listeners and callable(panel.on_train_batch_end)


def test_it_rests_after_a_drawing_that_took_long(monkeypatch):
    monkeypatch.setattr(stability_panel, "REST", 1e9)
    panel = Noting()
    harness.fit(harness.Model, monitor(), panel, bar(io.StringIO()), enable_progress_bar=True)
    assert panel.drawn == [1, 10]  # the first reading, and the end


def left_by(*callbacks, **settings):
    """All that a run with dropout leaves behind."""
    torch.manual_seed(3)
    model, losses, logger = harness.Model(harness.mlp(torch.nn.Dropout(0.3))), harness.Losses(), harness.Rows()
    run = harness.fit(model, losses, *callbacks, logger=logger, log_every_n_steps=1, **settings)
    return harness.everything(run, model, losses, logger)


def test_training_is_unchanged():
    without, shown = left_by(), left_by(monitor(), StabilityPanel(), bar(io.StringIO()), enable_progress_bar=True)
    assert all(harness.same(without[what], shown[what]) for what in without)


@pytest.mark.parametrize("first", [True, False], ids=["before the monitor", "after it"])
def test_what_is_measured_is_unchanged(first):
    """Under a budget, which prices and losses decide, with a verdict asked for at every reading."""
    curves = []
    for is_shown in (False, True):
        source, panel = StabilityMonitor(budget=0.5), StabilityPanel()
        ours = [panel, source] if first else [source, panel]
        callbacks = [*ours, bar(io.StringIO())] if is_shown else [source]
        left_by(*callbacks, StopOnInstability(), enable_progress_bar=is_shown, max_steps=60)
        curves.append(source.history)
    assert repr(curves[0]) == repr(curves[1]) and len(curves[0]["stability/courant"].steps) > 5


def test_the_bar_of_either_lightning_will_do():
    trainer = UnifiedTrainer(callbacks=[StabilityPanel(), bar(io.StringIO(), kind=UnifiedBar)], logger=False,
                             accelerator="cpu")  # fmt: skip
    assert isinstance(stability_panel.display_of(trainer), stability_panel.TerminalDisplay)


@pytest.mark.parametrize("progress", [None, TQDMProgressBar(), "file"], ids=["no bar", "tqdm", "no terminal"])
def test_elsewhere_it_shows_nothing(progress, capsys):
    file, source, panel = io.StringIO(), monitor(), Noting()
    bars = [] if progress is None else [bar(file, terminal=False) if progress == "file" else progress]
    harness.fit(harness.Model, source, panel, *bars, enable_progress_bar=bool(bars))
    assert "Courant" not in file.getvalue() + capsys.readouterr().out
    assert (panel.drawn == [10]) is (progress != "file")  # the end, with no place to draw


def test_a_drawing_that_fails_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(stability_panel.TerminalDisplay, "show", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="StabilityPanel shows nothing any more: ZeroDivisionError") as caught:
        run = harness.fit(harness.Model, monitor(), StabilityPanel(), bar(io.StringIO()), enable_progress_bar=True)
    assert run.global_step == 10 and sum("StabilityPanel" in str(w.message) for w in caught) == 1


def test_it_needs_a_monitor():
    with pytest.raises(ValueError, match="StabilityPanel needs a StabilityMonitor"):
        harness.fit(harness.Model, StabilityPanel())


def test_the_panel_is_laid_out_once_for_a_width():
    from rich.console import Console

    panel = LivePanel({"stability/courant": Curve([0], [2.0])}, judge(Run({})))
    console = Console(width=60, file=io.StringIO())
    console.print(panel)
    laid_out = panel._laid_out
    console.print(panel)
    assert panel._laid_out is laid_out and list(laid_out) == [60]
    console.width = 40
    console.print(panel)
    lines = console.file.getvalue().splitlines()
    assert list(panel._laid_out) == [40] and len(lines[0]) == 60 and len(lines[-1]) == 40


# -- in a notebook ----------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch):
    """What a notebook's shell is told to display; the real IPython, but for the kernel."""
    shell_module = pytest.importorskip("IPython.core.interactiveshell")
    from IPython.core.displaypub import CapturingDisplayPublisher

    shell = shell_module.InteractiveShell.instance()
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    monkeypatch.setattr(shell, "display_pub", CapturingDisplayPublisher())
    yield shell.display_pub.outputs
    shell_module.InteractiveShell.clear_instance()


@pytest.mark.parametrize("is_kept", [False, True], ids=["readings", "with the loss"])
def test_one_figure_is_replaced_at_each_reading(published, is_kept, tmp_path):
    keeper = [StabilityReport(table=False)] if is_kept else []
    harness.fit(harness.Model, monitor(), StabilityPanel(), *keeper, default_root_dir=tmp_path)
    assert [output["update"] for output in published] == [False, True, True, True]
    assert len({output["transient"]["display_id"] for output in published}) == 1
    pages = [output["data"]["text/html"] for output in published]
    assert all(page.startswith('<img style="max-width: 760px" alt="lsp_callbacks: ') for page in pages)
    assert "stable at step 0" in pages[0] and "stable at step 8" in pages[-1] and len(set(pages)) >= 3


def test_training_in_a_notebook_is_unchanged(published, tmp_path):
    without, shown = left_by(), left_by(monitor(), StabilityPanel(), default_root_dir=tmp_path)
    assert published and all(harness.same(without[what], shown[what]) for what in without)
