"""Scalars and pictures reach the loggers that people use, each with its real package where it is installed."""

import json
import math
import time
import zipfile
from pathlib import Path

import harness
import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lsp_callbacks import StabilityMonitor, StabilityReport
from lsp_callbacks.callbacks.log_pictures import by_kind, log_histogram
from lsp_callbacks.report.logs.find import read_run
from lsp_callbacks.report.logs.logged_run import PNG

KEYS = ("stability/courant", "stability/sharpness", "stability/spectral_norm/net.0")


def trained(logger, root, *callbacks, log_layers="all", **settings):
    """A short run with a picture; returns its curves."""
    monitor = StabilityMonitor(["mean_square_stability", "sharpness", "spectral_norm"], every_n_steps=4,
                               log_layers=log_layers)  # fmt: skip
    callbacks = callbacks or (StabilityReport(table=False),)
    settings = {"default_root_dir": root, "log_every_n_steps": 1, "max_steps": 9} | settings
    harness.fit(harness.Model, monitor, *callbacks, logger=logger, **settings)
    return monitor.history


def assert_logged(curves, history):
    for key in KEYS:
        assert len(history[key].steps) == 3
        assert curves[key].values == pytest.approx(history[key].values, rel=1e-6)
        assert curves[key].steps == history[key].steps


def saved(root):
    """The pictures below a folder, by their path in it."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.png") if path.stem.startswith("stability"))


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="digits")
    history = trained(logger, tmp_path)
    assert_logged(read_run(Path(logger.log_dir)).curves, history)
    events = EventAccumulator(logger.log_dir).Reload()
    (image,) = events.Images("stability/run")
    assert image.step == 9 and image.encoded_image_string.startswith(b"\x89PNG") and image.width > 500
    assert saved(tmp_path) == ["digits/version_0/stability.png"]


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = []
    for _ in range(2):
        logger = WandbLogger(project="digits", save_dir=tmp_path, offline=True)
        history = trained(logger, tmp_path)
        folder = Path(logger.experiment.dir).parent
        names.append(f"digits/{logger.version}/stability.png")
        wandb.finish()
        end = time.monotonic() + 60
        while not read_run(folder).ended and time.monotonic() < end:  # its service writes the rest when it likes
            time.sleep(0.1)
        assert_logged(read_run(folder).curves, history)
        (picture,) = (folder / "files" / "media" / "images" / "stability").glob("run_*.png")
        assert picture.read_bytes().startswith(PNG)
    assert saved(tmp_path) == sorted(names)  # the second run has left the picture of the first


@pytest.mark.parametrize("store", ["files", "data base"])
def test_mlflow(store, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    uri = (tmp_path / "mlruns").as_uri() if store == "files" else f"sqlite:///{tmp_path}/mlflow.db"
    names = []
    for _ in range(2):
        logger = MLFlowLogger("digits", tracking_uri=uri, artifact_location=(tmp_path / "artifacts").as_uri())
        history = trained(logger, tmp_path)
        below = "mlruns/" if store == "files" else ""
        names.append(f"{below}{logger.experiment_id}/{logger.run_id}/stability.png")
        file = tmp_path / names[-1] if store == "files" else tmp_path / f"mlflow.db:{logger.run_id}"
        assert_logged(read_run(file.parent if store == "files" else file).curves, history)
        artifacts = mlflow.MlflowClient(uri).list_artifacts(logger.run_id, "stability")
        assert [artifact.path for artifact in artifacts] == ["stability/run.png"]
    assert saved(tmp_path) == sorted(names)


def test_comet_offline(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_START_ONLINE", "0")  # with online=False Lightning makes an experiment that keeps nothing
    logger = CometLogger(project="digits", offline_directory=str(tmp_path))
    history = trained(logger, tmp_path)
    log_histogram(logger, "stability/spectral_norm", [1.0, 2.0], 8)
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        messages = [json.loads(line) for line in file.read("messages.json").splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    for key in KEYS:
        values = [metric["metricValue"] for metric in metrics if metric["metricName"] == key]
        assert values == pytest.approx(history[key].values)
    uploads = [message["payload"] for message in messages if message["type"] == "file_upload"]
    for name in ("stability/run", "stability/spectral_norm"):
        assert any(name in json.dumps(upload) for upload in uploads)
    assert saved(tmp_path) == [f"digits/{logger.version}/stability.png"]


def test_histograms_of_layers_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    history = trained(logger, tmp_path, pl.Callback(), log_layers="histogram")
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload()
    assert events.Tags()["histograms"] == ["stability/spectral_norm"]
    assert not [tag for tag in events.Tags()["scalars"] if tag.count("/") > 1]
    norms = [history[f"stability/spectral_norm/net.{k}"] for k in (0, 2)]
    for i, event in enumerate(events.Histograms("stability/spectral_norm")):
        values = [curve.values[i] for curve in norms]
        assert event.step == norms[0].steps[i] and event.histogram_value.num == 2
        assert (event.histogram_value.min, event.histogram_value.max) == pytest.approx((min(values), max(values)))


def test_histograms_of_layers_in_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="digits", save_dir=tmp_path, offline=True)
    history = trained(logger, tmp_path, pl.Callback(), log_layers="histogram")
    logged = logger.experiment.summary["stability/spectral_norm"]
    wandb.finish()
    assert logged["_type"] == "histogram" and sum(logged["values"]) == 2
    assert logged["bins"][-1] == pytest.approx(history["stability/spectral_norm_max"].values[-1])


def test_only_finite_numbers_of_layers_make_a_histogram():
    values = {"stability/a": 1.0, "stability/b/x.1": 2.0, "stability/b/y/z": 3.0, "stability/b/n": math.nan}
    assert by_kind(values | {"stability/c/x": math.inf}) == {"stability/b": [2.0, 3.0]}


def test_a_logger_that_fails_at_a_picture_does_not_end_the_run(tmp_path, capsys):
    class Away(harness.Rows):
        def log_image(self, key, images, step=None):
            raise ConnectionError("no network")

    trained(Away(), tmp_path)
    assert "lsp_callbacks: Away took no picture stability/run: no network" in capsys.readouterr().out
    assert saved(tmp_path) == ["rows/version_0/stability.png"]


def test_no_picture_replaces_that_of_another_run(tmp_path):
    trained(False, tmp_path)
    trained(False, tmp_path)
    assert saved(tmp_path) == ["stability-v1.png", "stability.png"]
    logger = CSVLogger(tmp_path, name="digits", version="one")
    for _ in range(2):
        trained(logger, tmp_path)
    assert saved(tmp_path / "digits") == ["one/stability-v1.png", "one/stability.png"]


def test_a_run_that_goes_on_replaces_its_own_picture(tmp_path):
    report = StabilityReport(table=False)
    torch_model = harness.Model()
    run = harness.fit(torch_model, StabilityMonitor(every_n_steps=4), report, default_root_dir=tmp_path, max_steps=5)
    size = (tmp_path / "stability.png").stat().st_size
    run.fit_loop.epoch_loop.max_steps = 20
    run.fit(torch_model, harness.data())
    assert saved(tmp_path) == ["stability.png"] and (tmp_path / "stability.png").stat().st_size != size
