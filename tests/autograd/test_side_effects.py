"""What a user's code prints, logs and writes while it is replayed: once in training, and never again."""

import builtins
import contextlib
import io
import logging
import os
import pathlib
import sys
import threading

import pytest
import torch
from harness import Model, data, fit, mlp
from torch import nn

from lsp_callbacks import Monitor, Sharpness, StabilityMonitor
from lsp_callbacks.autograd.side_effects import muted
from lsp_callbacks.loops import Watch

SHARPNESS = "stability/sharpness"
log = logging.getLogger("users")


class Loud(Model):
    """Says in all ways which batch it sees."""

    def __init__(self, folder):
        super().__init__(mlp(nn.Dropout(0.2)))
        self.folder = pathlib.Path(folder)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.say(f"batch {batch_idx} {loss.item():.4f}\n")
        return loss

    def say(self, text):
        print(text, end="")
        print(text, end="", file=sys.stderr)
        sys.stdout.writelines([text])
        log.warning(text.strip())
        with open(self.folder / "appended", "a") as file:
            file.write(text)
        with (self.folder / "pathlib").open("ab") as file:
            file.write(text.encode())
        (self.folder / "last").write_text(text)
        with contextlib.suppress(FileExistsError), open(self.folder / text.split()[1], "x") as file:
            print(text, file=file)


class Clips(Loud):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.say("clips here\n")
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


def patched():
    return sys.stdout, sys.stderr, builtins.open, io.open, logging.Logger.handle


def heard(make, folder, *callbacks, **settings):
    folder.mkdir()
    out, err, records = io.StringIO(), io.StringIO(), []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log.addHandler(handler)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run = fit(lambda: make(folder), *callbacks, max_steps=10, **settings)
    finally:
        log.removeHandler(handler)
    files = {path.name: path.read_text() for path in sorted(folder.iterdir())}
    weights = [p.tolist() for p in run.model.parameters()]
    return out.getvalue().count("batch"), err.getvalue().count("batch"), records, files, weights


@pytest.mark.parametrize("make", [Loud, Clips])
@pytest.mark.parametrize("quantities", ["default", pytest.param("full", marks=pytest.mark.slow), ["numerics"]])
def test_it_is_said_once(make, quantities, tmp_path):
    monitor = StabilityMonitor(quantities, every_n_steps=1 if quantities == "default" else 5)
    settings = {"gradient_clip_val": 0.5} if make is Clips else {}
    left = [heard(make, tmp_path / name, *ours, **settings) for name, ours in (("without", []), ("with", [monitor]))]
    assert left[0] == left[1]
    assert monitor.history and left[0][0] == 20  # on stdout by print and writelines


def test_a_plain_loop(tmp_path, capsys):
    model = Loud(tmp_path)
    model._trainer = None
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(module, batch):
        loss = module.loss(batch)
        Loud.say(model, "batch 0\n")
        return loss

    watch = Watch(model, sgd, loss_fn, Monitor(Sharpness(), every_n_steps=1))
    for batch in watch(data()):
        sgd.zero_grad()
        loss_fn(model, batch).backward()
        sgd.step()
    assert len(watch.history[SHARPNESS].steps) == 6
    assert capsys.readouterr().out.count("batch") == 12 and (tmp_path / "appended").read_text().count("batch") == 6


def test_our_own_warnings_are_heard(capsys):
    """They come between replays."""

    class Wanders(Model):
        calls = 0

        def training_step(self, batch, batch_idx):
            Wanders.calls += 1
            return super().training_step(batch, batch_idx) * Wanders.calls

    with pytest.warns(UserWarning, match="could not be replayed"):
        fit(Wanders, StabilityMonitor(["sharpness"], every_n_steps=1), max_steps=1)


def test_other_threads_notice_nothing_and_everything_is_put_back(tmp_path, capsys):
    before = patched()
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log.addHandler(handler)

    def others():
        print("other")
        log.warning("other")
        with open(tmp_path / "other", "w") as file:
            file.write("other")

    with pytest.raises(KeyError), muted():
        thread = threading.Thread(target=others)
        thread.start(), thread.join()
        print("mine"), log.warning("mine")
        with open(tmp_path / "mine", "w") as file:
            file.write("mine")
        assert (tmp_path / "other").read_text() == "other"  # reading goes on
        raise KeyError
    log.removeHandler(handler)
    assert patched() == before
    assert capsys.readouterr().out == "other\n" and records == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_threads_that_overlap_may_end_in_any_order(tmp_path, capsys):
    """Two trainers in two threads: the first to begin is the first to end."""
    before = patched()
    begun, over = threading.Event(), threading.Event()

    def second():
        with muted():
            begun.set()
            over.wait(10)
            print("second")

    thread = threading.Thread(target=second)
    with muted():
        thread.start()
        begun.wait(10)
    (tmp_path / "after").write_text("after")  # while the second thread still is muted
    print("after")
    over.set()
    thread.join()
    assert patched() == before
    print("at last")
    assert capsys.readouterr().out == "after\nat last\n" and (tmp_path / "after").read_text() == "after"


def test_what_is_written_can_be_read_back(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "log").write_text("of the step\n")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with muted():
        (tmp_path / "new").write_text("new")
        assert (tmp_path / "new").read_text() == "new"
        with open(tmp_path / "weights", "wb") as file:
            torch.save(torch.ones(2), file)
        with open(tmp_path / "weights", "rb") as file:
            assert torch.load(file).tolist() == [1, 1]
        with open(tmp_path / "kept", "r+") as file:
            assert file.read() == "kept" and file.fileno() > 2 and file.name
            file.write(" and changed")
        assert (tmp_path / "kept").read_text() == "kept and changed"
        with open(tmp_path / "log", "a", encoding="utf-8") as file:
            file.write("of the step\n")
        assert (tmp_path / "log").read_text() == "of the step\n"  # as the step itself saw it
        with muted(), open(tmp_path / "new") as file:  # of a replay in a replay
            assert file.read() == "new"
        with open(os.devnull, "w") as file:
            assert file.name == os.devnull
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_streams_that_are_not_there_or_outlive_it(monkeypatch, capsys):
    with muted():
        kept = sys.stdout
    print("heard", file=kept)
    assert capsys.readouterr().out == "heard\n"
    monkeypatch.setattr(sys, "stdout", None)  # a process without a console
    with muted():
        print("nobody hears it", flush=True)
