"""Scalars and pictures reach the loggers that people use, each with its real package where it is installed."""

import json
import zipfile
from pathlib import Path

import harness
import pytest
from pytorch_lightning.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lsp_callbacks import StabilityMonitor, StabilityReport
from lsp_callbacks.report.logs.find import read_run
from lsp_callbacks.report.logs.logged_run import PNG

KEYS = ("stability/courant", "stability/sharpness", "stability/spectral_norm/net.0")


def trained(logger, root, *callbacks, **settings):
    """A short run with a picture; returns its curves."""
    monitor = StabilityMonitor(["mean_square_stability", "sharpness", "spectral_norm"], every_n_steps=4)
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


def test_comet_offline(tmp_path):
    comet_ml = pytest.importorskip("comet_ml")
    logger = CometLogger(project="digits", online=False, offline_directory=str(tmp_path))
    if logger.experiment.disabled:  # as Lightning makes it with online=False: such an experiment keeps nothing
        logger.experiment.end()
        logger._comet_config = comet_ml.ExperimentConfig(offline_directory=str(tmp_path))
        logger._create_experiment()
    history = trained(logger, tmp_path)
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        messages = [json.loads(line) for line in file.read("messages.json").splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    for key in KEYS:
        values = [metric["metricValue"] for metric in metrics if metric["metricName"] == key]
        assert values == pytest.approx(history[key].values)
    uploads = [message["payload"] for message in messages if message["type"] == "file_upload"]
    assert any("stability/run" in json.dumps(upload) for upload in uploads)
    assert saved(tmp_path) == [f"digits/{logger.version}/stability.png"]


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
