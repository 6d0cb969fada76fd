"""The command ``report``: a page from the logs of a real run, written again while a run goes on."""

import threading
import time
from functools import partial

import harness
import pytest
from log_files import columns, write_csv
from pytorch_lightning.loggers import CSVLogger
from torch.optim import SGD

from lsp_callbacks import StabilityMonitor, StopOnInstability
from lsp_callbacks.cli import report
from lsp_callbacks.cli.main import main
from lsp_callbacks.report import judge
from lsp_callbacks.report.logs.facts import facts, loss_key
from lsp_callbacks.report.logs.find import read_run


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_page_is_written(tmp_path, capsys):
    write_csv(tmp_path / "run", columns())
    assert main(["report", "run", "-o", "pages/page.html"]) == 0
    assert capsys.readouterr().out == f"lsp_callbacks: the page is {tmp_path}/pages/page.html\n"
    assert (tmp_path / "pages" / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("args", "says"),
    [(["none"], "does not exist"), (["run", "--loss", "b"], "--loss b is not logged: give one of")],
    ids=["no run", "no loss"],
)
def test_what_cannot_be_read_is_said_in_one_line(args, says, tmp_path, capsys):
    write_csv(tmp_path / "run", columns())
    assert main(["report", *args]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "stability.html").exists()


@pytest.mark.parametrize("lr", [0.1, 30.0])
def test_the_verdict_is_that_of_the_run_whose_losses_are_all_logged(tmp_path, lr):
    logger = CSVLogger(str(tmp_path), name="", version="run", flush_logs_every_n_steps=1)
    monitor = StabilityMonitor(["mean_square_stability", "spectral_norm"], every_n_steps=5)
    stop = StopOnInstability(patience=1, confirm=None)
    harness.fit(harness.Model(optimizer=partial(SGD, lr=lr)), monitor, stop, logger=logger, max_steps=80,
                log_every_n_steps=1)  # fmt: skip
    logged = read_run(tmp_path / "run")
    verdict = judge(facts(logged, loss_key(logged.curves)))
    assert (verdict.state, verdict.cause) == (monitor.verdict.state, monitor.verdict.cause)
    assert verdict.evidence.get("stop") == monitor.verdict.evidence.get("stop") == stop.stop_step
    assert verdict.evidence["courant"] == pytest.approx(monitor.verdict.evidence["courant"])
    assert {key for key in logged.history if "/spectral_norm/" in key}


def test_follow_writes_the_page_again_and_leaves_one_that_stays(tmp_path, monkeypatch):
    write_csv(tmp_path / "run", columns(10))
    written = []
    write = report._write

    def write_and_note(options, *, going):
        written.append(going)
        return write(options, going=going)

    monkeypatch.setattr(report, "_write", write_and_note)
    grow = threading.Timer(1.2, write_csv, (tmp_path / "run", columns(60)))
    grow.start()
    begin = time.monotonic()
    assert main(["report", "run", "--follow", "--every", "1", "--patience", "3"]) == 0
    grow.join()
    assert written[0] and written[-1] is False and written.count(True) >= 2 and time.monotonic() - begin < 60
    page = (tmp_path / "stability.html").read_text()
    assert 'http-equiv="refresh"' not in page and "up to step 59" in page


def test_follow_waits_for_the_first_logs(tmp_path, capsys):
    begin = threading.Timer(1.5, write_csv, (tmp_path / "run", columns(30)))
    begin.start()
    assert main(["report", "run", "--follow", "--every", "1", "--patience", "4"]) == 0
    begin.join()
    out = capsys.readouterr().out
    assert out.index("waiting for the first logs") < out.index("the page is")
    assert "up to step 29" in (tmp_path / "stability.html").read_text()


def test_follow_gives_up_where_no_logs_come(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", "empty", "--follow", "--every", "1", "--patience", "1"]) == 1
    assert "no logs came within 1 seconds" in capsys.readouterr().err
