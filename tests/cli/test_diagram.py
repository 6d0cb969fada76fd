"""The stability diagram: drawn, logged, and on the command line."""

import csv
import io
import math
import sys
from pathlib import Path

import lightning.pytorch as unified
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from rich.console import Console
from torch import nn

from lsp_callbacks import SGDStability, StabilityMonitor, StabilityReport, Unmeasurable
from lsp_callbacks.callbacks.log_pictures import log_figure
from lsp_callbacks.cli.diagram import Settings, examine
from lsp_callbacks.cli.main import main
from lsp_callbacks.demo import Digits, ResidualNet
from lsp_callbacks.functional.sgd.stability_diagram import StabilityDiagram
from lsp_callbacks.report import diagram_figure, diagram_sentence, diagram_table

torch.set_num_threads(1)
DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
#: A small network and little sampling.
SMALL = ["--model.width", "8", "--model.depth", "1"]
QUICK = ["--probes", "24", "--chains", "2", "--steps", "60"]
TRAINER = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lsp-callbacks"])


def a_diagram():
    f64 = torch.float64
    return StabilityDiagram(
        lrs=torch.tensor([0.1, 0.3, 1.0], dtype=f64),
        batch_sizes=torch.tensor([1, 8]),
        lyapunov=torch.tensor([[-0.004, 0.1, math.nan], [-math.inf, -0.01, 3.0]], dtype=f64),
        error=torch.zeros(2, 3, dtype=f64),
        critical_lr=torch.tensor([0.15, math.inf], dtype=f64),
        critical_error=torch.tensor([0.012, 0.0], dtype=f64),
        mean_square_lr=torch.tensor([0.12, 0.7], dtype=f64),
    )


# Figure, table, sentence


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()} | {c.get_label(): c.lines[0] for c in ax.containers}


def test_the_figure_shows_the_numbers():
    figure = diagram_figure(a_diagram(), lr=0.05, batch_size=8)
    ax, bar = figure.axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log") and ax.get_yaxis().get_transform().base == 2
    assert "learning rate" in ax.get_xlabel() and ax.get_ylabel() == "batch size (samples)"
    assert "nats per step" in bar.get_ylabel()
    drawn = lines(ax)
    assert np.array_equal(drawn["largest stable rate"].get_xdata(), [0.15, math.nan], equal_nan=True)
    assert drawn["largest stable rate"].get_ydata().tolist() == [1, 8]
    (bars,) = ax.containers[0].lines[2]
    assert bars.get_segments()[0][:, 0] == pytest.approx([0.138, 0.162])
    assert drawn["mean-square edge"].get_xdata().tolist() == [0.12, 0.7]
    run = drawn["this run (rate 0.05, batch 8)"]
    assert (run.get_xdata()[0], run.get_ydata()[0]) == (0.05, 8)
    assert ax.get_xlim()[0] < 0.05 and ax.get_xlim()[1] > 1  # the star and all cells
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert set(names) == drawn.keys() - {name for name in drawn if name.startswith("_")} and len(names) == 3
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "8"]


def test_colours_are_centred_and_clipped():
    figure = diagram_figure(a_diagram())
    mesh = figure.axes[0].collections[0]
    assert mesh.norm.vmin == -mesh.norm.vmax == -1.0 and mesh.norm(0.0) == pytest.approx(0.5)
    cells = np.ma.asarray(mesh.get_array()).reshape(2, 3)
    assert cells.mask.tolist() == [[False, False, True], [False, False, False]]  # NaN is a hole
    assert cells.filled(0).tolist() == [[-0.004, 0.1, 0.0], [-1.0, -0.01, 3.0]]
    corners = mesh.get_coordinates()
    assert np.allclose(corners[0, 1:3, 0], [math.sqrt(0.03), math.sqrt(0.3)])
    assert not any("this run" in name for name in lines(figure.axes[0]))  # nobody said where it is


def test_draws_into_axes_and_changes_no_settings():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert diagram_figure(a_diagram(), ax=right) is figure
    assert right.get_lines() and not left.get_lines()
    assert dict(matplotlib.rcParams) == before


def test_one_cell():
    f64 = torch.float64
    one = StabilityDiagram(
        torch.tensor([0.1], dtype=f64), torch.tensor([5]), *(torch.full((1, 1), 0.0, dtype=f64) for _ in range(2)),
        *(torch.full((1,), 0.1, dtype=f64) for _ in range(3)),
    )  # fmt: skip
    figure = diagram_figure(one)
    figure.savefig("one.png")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["5"]


def test_the_table():
    text = io.StringIO()
    Console(width=100, file=text).print(diagram_table(a_diagram()))
    rows = [line.split() for line in text.getvalue().splitlines() if line.strip()[:1].isdigit()]
    assert rows == [["1", "0.150", "±", "0.012", "0.12"], ["8", "any", "0.7"]]


@pytest.mark.parametrize(
    ("lr", "batch_size", "says"),
    [
        (0.05, 1, "linearly stable: the rate 0.05 is 0.33 of 0.150 ± 0.012"),
        (0.16, 1, "at the edge of linear stability"),
        (0.3, 1, "linearly unstable: the rate 0.3 is 2 of 0.150 ± 0.012, the largest stable one at batch size 1; a "),
        (0.3, 1, "; a batch of 8 allows it"),
        (0.3, 8, "no rate was found"),
    ],
)  # fmt: skip
def test_the_sentence(lr, batch_size, says):
    assert says in diagram_sentence(a_diagram(), lr=lr, batch_size=batch_size)


def test_the_sentence_needs_the_batch_size():
    with pytest.raises(ValueError, match="batch_size=4"):
        diagram_sentence(a_diagram(), lr=0.1, batch_size=4)


# The metric


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A quantity that a run has filled, and the run's loggers."""
    folder = tmp_path_factory.mktemp("run")
    pl.seed_everything(0)
    quantity = SGDStability(probes=24, chains=2, steps=60)
    loggers = [TensorBoardLogger(folder), CSVLogger(folder), WandB(), MLFlow()]
    trainer = pl.Trainer(
        max_steps=4, logger=loggers, default_root_dir=folder, **TRAINER,
        callbacks=[
            StabilityMonitor([quantity], every_n_steps=2), StabilityReport(),
            ModelCheckpoint(folder, every_n_train_steps=3),
        ],
    )  # fmt: skip
    # A checkpoint is written after the last measurement: the quantity forgets its vectors, the report does not.
    trainer.fit(ResidualNet(width=8, depth=1), Digits())
    return quantity, loggers


class Fake(Logger):
    name, version, run_id = "fake", "0", "run 7"

    def __init__(self):
        super().__init__()
        self.taken = []

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, *args, **kwargs): ...


class WandB(Fake):
    def log_image(self, key, images, step=None, **kwargs):
        self.taken.append((key, images, step))


class MLFlow(Fake):
    experiment = property(lambda self: self)

    def log_figure(self, run_id, figure, artifact_file):
        self.taken.append((run_id, figure, artifact_file))


def test_plot(measured):
    trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, **TRAINER)
    quantity = SGDStability(probes=24, chains=2, steps=60)
    with pytest.raises(ValueError, match="nothing has been measured yet"):
        quantity.plot()
    quantity.latest = found = examine(trainer, ResidualNet(width=8, depth=1), datamodule=Digits(64))
    figure, ax = quantity.plot()
    assert isinstance(figure, Figure) and ax is figure.axes[0]
    assert "this run (rate 0.1, batch 64)" in lines(ax) and found.lr == 0.1
    mine = Figure().subplots()
    figure, ax = quantity.plot(a_diagram(), ax=mine)
    assert ax is mine and figure is mine.get_figure()
    assert lines(ax)["mean-square edge"].get_xdata().tolist() == [0.12, 0.7]
    assert not any("this run" in name for name in lines(ax))


# Loggers


def test_figures_reach_the_loggers(measured):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    quantity, (tensorboard, table, wandb, mlflow) = measured
    assert quantity.latest is not None  # a checkpoint that is written takes nothing away
    events = EventAccumulator(tensorboard.log_dir).Reload()
    assert sorted(events.Tags()["images"]) == ["stability/diagram", "stability/run"]
    (image,) = events.Images("stability/diagram")
    assert image.step == 4 and image.encoded_image_string.startswith(b"\x89PNG") and image.width > 500
    scalars = events.Tags()["scalars"]  # a name is never both a value and a prefix
    assert "stability/courant_sgd" in scalars and not any(tag.startswith("stability/diagram") for tag in scalars)
    (_, step_of_run), (key, images, step) = ((wandb.taken[0][0], wandb.taken[0][2]), wandb.taken[1])
    assert step_of_run == 4 and (key, step) == ("stability/diagram", 4) and isinstance(images[0], Figure)
    assert [(run, name) for run, _, name in mlflow.taken] == [
        ("run 7", "stability/run.png"), ("run 7", "stability/diagram.png")
    ]  # fmt: skip
    assert (Path(tensorboard.log_dir) / "stability_diagram.png").stat().st_size > 10_000
    assert any(row for row in csv.DictReader((Path(table.log_dir) / "metrics.csv").open()))


def test_others_are_passed_over(tmp_path):
    class Other(Fake):  # an experiment.log_figure whose arguments nobody knows
        run_id = property()
        experiment = property(lambda self: type("Experiment", (), {"log_figure": None})())

    del Fake.run_id
    try:
        taken = [
            log_figure(logger, "stability/diagram", Figure(), 0) for logger in (CSVLogger(tmp_path), Fake(), Other())
        ]
    finally:
        Fake.run_id = "run 7"
    assert taken == [False, False, False]


def test_no_diagram_without_its_measurement(tmp_path):
    trainer = pl.Trainer(
        max_steps=2, callbacks=[StabilityMonitor(["spectral_norm"]), StabilityReport()], logger=False,
        enable_checkpointing=False, default_root_dir=tmp_path, **TRAINER,
    )  # fmt: skip
    trainer.fit(ResidualNet(width=8, depth=1), Digits())
    assert [path.name for path in tmp_path.iterdir()] == ["stability.png"]


# Before the first step


class Spy(ResidualNet):
    """Counts what must not happen, and keeps what training would have moved."""

    def __init__(self, optimizer=torch.optim.SGD, **settings):
        super().__init__(width=8, depth=1, **settings)
        self.optimizer, self.calls = optimizer, []

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.hparams["lr"])

    def configure_callbacks(self):
        self.calls.append("callbacks")
        return []

    def training_step(self, batch, batch_idx):
        self.calls.append("step")
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        self.calls.append("end")


class UnifiedSpy(unified.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        data = Digits(64)
        data.setup("fit")
        return data.train_dataloader()


def trainer_of(module=pl, **settings):
    return module.Trainer(logger=False, enable_checkpointing=False, **({"max_epochs": 2} | TRAINER | settings))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_nothing_moves(optimizer):
    model, before = Spy(optimizer), None
    before, random = state(model), torch.get_rng_state()
    found = examine(trainer_of(), model, settings=Settings(probes=100), datamodule=Digits(64))
    assert unchanged(model, before) and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random) and model.training and model.calls == []
    assert "configure_callbacks" not in vars(model)
    assert (found.lr, found.batch_size, found.population, found.modes.samples) == (0.1, 64, 1437, 100)
    assert found.frozen is (optimizer is not torch.optim.SGD) and found.modes.rank > 50


def test_the_probes_are_the_loaders_first_samples():
    """By the trace of the Gauss-Newton matrix, from the loader's own batches and plain autograd."""
    model, data = Spy(label_smoothing=0.0), Digits(32)
    found = examine(trainer_of(), model, settings=Settings(probes=48, outputs="all"), datamodule=data)
    batches = iter(data.train_dataloader())
    images = torch.cat([next(batches)[0], next(batches)[0]])[:48]
    trace = 0.0
    for image in images:
        logits = model(image[None])[0]
        rows = [torch.autograd.grad(z, model.parameters(), retain_graph=True) for z in logits]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
        p = logits.softmax(0).detach().double()
        trace += float(((torch.diag(p) - torch.outer(p, p)) * (jacobian @ jacobian.T)).sum()) / 48
    assert found.modes.trace == pytest.approx(trace, rel=1e-4)


class Normed(Spy):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Linear(8, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        torch.autograd.grad(self(x).sum(), x)  # as a penalty on the gradient does
        return super().training_step(batch, batch_idx)


def test_running_statistics_do_not_enter_where_training_does_not_use_them():
    models = []
    for frozen in (False, False, True, True):
        torch.manual_seed(0)
        models.append(Normed())
        if frozen:
            models[-1].on_train_epoch_start = models[-1].net[2].eval
    for told in models[1::2]:
        told.net[2].running_mean.fill_(2.0), told.net[2].running_var.fill_(30.0)
    before = [state(m) for m in models]
    found = [examine(trainer_of(), m, settings=Settings(probes=128), datamodule=Digits(64)) for m in models]
    assert all(unchanged(m, b) for m, b in zip(models, before))
    fresh, other, frozen, strange = (one.modes.trace for one in found)
    assert fresh == other and frozen != pytest.approx(strange, rel=0.2)
    assert [one.modes.together for one in found] == [64, 64, 1, 1]


def test_both_names_of_lightning():
    model = UnifiedSpy()
    before = state(model)
    found = examine(trainer_of(unified), model, settings=Settings(probes=24))
    assert unchanged(model, before) and found.batch_size == 64 and found.modes.rank == 24


def test_fewer_samples_than_probes():
    found = examine(trainer_of(limit_train_batches=1), Spy(), settings=Settings(probes=100), datamodule=Digits(64))
    assert found.modes.samples == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit_train_batches": 0}, "no training batch"),
    ],
)
def test_what_is_not_modelled(settings, message):
    with pytest.raises(Unmeasurable, match=message):
        examine(trainer_of(**settings), Spy(), datamodule=Digits(64))


def test_manual_optimisation_is_refused_before_it_steps():
    class Manual(Spy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.optimizers().step()

    model = Manual()
    model.automatic_optimization = False
    before = state(model)
    with pytest.raises(Unmeasurable, match="automatic_optimization=False"):
        examine(trainer_of(), model, datamodule=Digits(64))
    assert unchanged(model, before)


def test_an_own_criterion():
    class Own(Spy):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) ** 2).mean()

    with pytest.raises(Unmeasurable, match="forward_fn"):
        examine(trainer_of(), Own(), datamodule=Digits(64))
    monitor = StabilityMonitor(
        forward_fn=lambda module, batch: module(batch[0]), criterion=lambda f, batch: (f**2).mean(), seed=3
    )
    settings = Settings.of(monitor, 24)
    assert (settings.seed, settings.probes, Settings.of(monitor, None).probes) == (3, 24, 128)
    assert examine(trainer_of(), Own(), settings=settings, datamodule=Digits(64)).modes.samples == 24


# The command


def table_of(text):
    """Largest stable rates by batch size."""
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    return {int(row[0]): float(row[1]) for row in rows}


def test_the_command_before_training_and_at_a_checkpoint(tmp_path, capsys):
    command = ["diagram", "--config", DIGITS, *SMALL, *QUICK]
    assert main([*command, "--model.lr", "0.2", "--data.batch_size", "100"]) == 0
    captured = capsys.readouterr()
    untrained = table_of(captured.out)
    assert list(untrained) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert "linearly stable: the rate 0.2 is" in captured.out and "batch size 100 (seen at 24 samples)" in captured.out
    assert not captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["diagram.png"]  # no logs, no checkpoints

    # By hand, from the same seed.
    pl.seed_everything(0)
    model = ResidualNet(width=8, depth=1, lr=0.2)
    found = examine(trainer_of(), model, settings=Settings(probes=24), datamodule=Digits(100))
    by_hand = SGDStability(probes=24)
    by_hand.latest = found
    exact = by_hand.diagram(chains=2, steps=60, batch_sizes=[1, 100])
    assert untrained[1] == pytest.approx(float(exact.critical_lr[0]), rel=2e-2)
    assert untrained[100] == pytest.approx(float(exact.critical_lr[1]), rel=2e-2)

    # A run that has ended: all its epochs are behind the checkpoint.
    trainer = pl.Trainer(max_epochs=10, logger=False, enable_checkpointing=False, **TRAINER)
    trainer.fit(model, Digits(100))
    trainer.save_checkpoint("end.ckpt")
    saved = torch.load("end.ckpt", weights_only=False)["state_dict"]
    options = ["--ckpt", "end.ckpt", "--output", "pictures/end.svg", "--trainer.max_epochs", "10"]
    assert main([*command, "--model.lr", "0.2", "--data.batch_size", "100", *options]) == 0
    trained = table_of(capsys.readouterr().out)
    assert trained.keys() == untrained.keys() and abs(trained[100] / untrained[100] - 1) > 0.1
    assert Path("pictures/end.svg").read_text().startswith("<?xml")
    again = examine(trainer_of(), ResidualNet(width=8, depth=1), settings=Settings(probes=24), datamodule=Digits(100),
                    ckpt_path="end.ckpt")  # fmt: skip
    assert again.lr == 0.2  # of the checkpoint's optimizer, not of the module
    by_hand.latest = again
    assert trained[100] == pytest.approx(
        float(by_hand.diagram(chains=2, steps=60, batch_sizes=[100]).critical_lr), rel=0.05
    )
    assert all(torch.equal(saved[k], v) for k, v in torch.load("end.ckpt", weights_only=False)["state_dict"].items())
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--config", DIGITS, "--ckpt", "no.ckpt"], 2, "no.ckpt does not exist"),
        (["--config", DIGITS, "--output", "diagram.txt"], 2, "ending in .png, .pdf, .svg"),
        (["--config", DIGITS, "--probes", "one"], 2, "give a number of at least 2"),
        (["--config", DIGITS, "--probes", "1"], 2, "give a number of at least 2"),
        (["--config", "no.yaml"], 2, "does not exist"),
        (["--config", DIGITS, "--model.lrr", "1"], 2, "lrr'"),  # the words are jsonargparse's
        ([], 2, "required"),
        (["--config", DIGITS, "--ckpt", DIGITS], 1, "lsp-callbacks diagram: "),
    ],
)
def test_bad_arguments(argv, status, message, capsys, tmp_path):
    try:
        found = main(["diagram", *argv])
    except SystemExit as stop:
        found = stop.code
    text = capsys.readouterr().err
    assert found == status and message.lower() in text.lower()
    assert len(text) < 2000 and "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_a_warm_up_does_not_hide_the_rate_after_it(capsys, monkeypatch):
    def warm_up(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01)]

    monkeypatch.setattr(ResidualNet, "configure_optimizers", warm_up)
    assert main(["diagram", "--config", DIGITS, *SMALL, *QUICK, "--model.lr", "100"]) == 0
    text = capsys.readouterr().out
    assert "the rate 1 is" in text and "schedule is reckoned, linearly unstable: the rate 100 is" in text


def test_a_checkpoint_of_another_model(capsys):
    trainer = trainer_of(max_steps=1)
    trainer.fit(ResidualNet(width=4, depth=1), Digits())
    trainer.save_checkpoint("other.ckpt")
    assert main(["diagram", "--config", DIGITS, *SMALL, *QUICK, "--ckpt", "other.ckpt"]) == 1
    text = capsys.readouterr().err
    assert "size mismatch" in text and text.strip().count("\n") == 0


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["diagram", "--help"])
    assert stop.value.code == 0 and "--ckpt FILE" in capsys.readouterr().out
    assert main([]) == 0 and "lsp-callbacks diagram" in capsys.readouterr().out
