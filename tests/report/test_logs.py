"""Readers of logs, and the verdict that logs allow: nothing in them is run, and nothing is calmer than they are."""

import math
import sqlite3
import sys

import pytest
from log_files import columns, write_csv, write_mlflow, write_wandb

from lsp_callbacks import Curve
from lsp_callbacks.monitor.losses import ArrivedLoss, LossRecord
from lsp_callbacks.report import judge, sentence
from lsp_callbacks.report.logs.causes import findings
from lsp_callbacks.report.logs.events import events
from lsp_callbacks.report.logs.facts import facts, loss_key, loss_record
from lsp_callbacks.report.logs.find import read_run
from lsp_callbacks.report.logs.logged_run import UnreadableLogs
from lsp_callbacks.report.logs.settings import read_settings
from lsp_callbacks.report.page.judged_run import JudgedRun

NAN = math.nan


# -- CSV --------------------------------------------------------------------------------------------------------------


def test_csv_gives_steps_and_values_of_each_key(tmp_path):
    write_csv(tmp_path, {"train_loss": [2.0, None, 1.0], "stability/courant": [None, "nan", 0.5]}, steps=[0, 4, 9])
    run = read_run(tmp_path)
    assert run.curves["train_loss"] == Curve([0, 9], [2.0, 1.0])
    courant = run.history["stability/courant"]
    assert courant.steps == [4, 9] and math.isnan(courant.values[0]) and courant.values[1] == 0.5
    assert run.last_step == 9 and run.ended is None and not run.notes


def test_csv_of_a_run_that_goes_on_loses_only_the_line_that_is_not_whole(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train_loss\n0,2.5\n1,2.25\n2,2.1")  # the last loss may be 2.125
    assert read_run(path).curves["train_loss"].values == [2.5, 2.25]


def test_csv_says_what_it_leaves_out_and_that_steps_go_back(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a\n0,1\n1,tall\n5,2\n1,7\nx,3\n")
    run = read_run(tmp_path)
    assert run.curves["a"] == Curve([0, 1, 5], [1.0, 7.0, 2.0])
    assert any("2 cells" in note for note in run.notes) and any("go back 1 times" in note for note in run.notes)


def test_a_prefix_of_the_logger_is_taken_off(tmp_path):
    write_csv(tmp_path, {"mine-stability/courant": [0.5], "mine-train_loss": [1.0]})
    assert set(read_run(tmp_path).curves) == {"stability/courant", "mine-train_loss"}


@pytest.mark.parametrize(
    ("content", "says"), [("", "no column 'step'"), ("a,b\n1,2\n", "no column 'step'")], ids=["empty", "another table"]
)
def test_a_table_without_steps_is_refused(tmp_path, content, says):
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(UnreadableLogs, match=says):
        read_run(tmp_path)


def test_paths_that_hold_no_run_or_several_are_refused(tmp_path):
    with pytest.raises(UnreadableLogs, match="does not exist"):
        read_run(tmp_path / "none")
    with pytest.raises(UnreadableLogs, match="holds no logs"):
        read_run(tmp_path)
    write_csv(tmp_path / "version_0", {"a": [1]})
    (tmp_path / "latest").symlink_to(tmp_path / "version_0")  # as W&B does
    assert read_run(tmp_path).curves["a"].values == [1.0]
    write_csv(tmp_path / "version_1", {"a": [1]})
    with pytest.raises(UnreadableLogs, match="holds 2 runs"):
        read_run(tmp_path)


# -- settings: parsed, never run ---------------------------------------------------------------------------------------


def test_no_object_of_a_configuration_is_made(tmp_path):
    """The tag would import and call: the file is shown as it is."""
    path = tmp_path / "hparams.yaml"
    text = f"lr: 0.1\nbad: !!python/object/apply:os.mkdir ['{tmp_path}/touched']\n"
    path.write_text(text)
    assert read_settings(path) == text.rstrip() and not (tmp_path / "touched").exists()


def test_references_in_a_configuration_are_not_followed(tmp_path):
    path = tmp_path / "hparams.yaml"
    path.write_text("a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{b}, *{b}]\n" for b, c in zip("abcdefgh", "bcdefghi")))
    assert isinstance(read_settings(path), str)


def test_secrets_of_a_configuration_are_not_shown(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("logger:\n  api_key: 12345\nmax_tokens: 7\n")
    assert read_settings(path) == {"logger.api_key": "(hidden)", "max_tokens": "7"}
    path.write_text("a: &x 1\nb: *x\npassword: 12345\n")
    assert "12345" not in read_settings(path)


# -- other loggers ----------------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(tmp_path))
    for step, value in enumerate([0.5, NAN, 1.5]):
        writer.add_scalar("stability/courant", value, 10 * step)
    writer.close()
    curve = read_run(tmp_path).history["stability/courant"]
    assert curve.steps == [0, 10, 20] and math.isnan(curve.values[1]) and curve.values[2] == 1.5


def test_tensorboard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(UnreadableLogs, match="pip install tensorboard"):
        read_run(tmp_path)


def test_mlflow(tmp_path):
    metrics = {"stability/courant": [0.5, "nan", "inf"], "stability/spectral_norm/a.b": [1.0], "epoch": [0]}
    write_mlflow(tmp_path / "1" / "abc", metrics, status=1, parameters={"lr": "0.1", "token": "12345"})
    run = read_run(tmp_path)
    assert set(run.curves) == {"stability/courant", "stability/spectral_norm/a.b"} and run.ended is False
    assert run.curves["stability/courant"].values[2] == math.inf
    assert run.settings == {"params": {"lr": "0.1", "token": "(hidden)"}}


def test_mlflow_in_a_data_base(tmp_path):
    path = tmp_path / "mlflow.db"
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE runs (run_uuid, name, status, start_time); CREATE TABLE params (run_uuid, key, value);"
        "CREATE TABLE metrics (run_uuid, key, value, timestamp, step, is_nan);"
        "INSERT INTO runs VALUES ('abc', 'first', 'RUNNING', 1), ('abd', 'second', 'FINISHED', 2);"
        "INSERT INTO params VALUES ('abc', 'lr', '0.1'), ('abd', 'lr', '0.2');"
        "INSERT INTO metrics VALUES ('abc', 'stability/courant', 0.5, 1, 0, 0), "
        "('abc', 'stability/courant', 0, 2, 5, 1), ('abc', 'stability/courant', 1.7976931348623157e308, 3, 9, 0),"
        "('abd', 'stability/courant', 7, 1, 0, 0)"
    )
    connection.commit()
    before = path.read_bytes()
    run = read_run(tmp_path / "mlflow.db:abc")
    curve = run.curves["stability/courant"]
    assert curve.steps == [0, 5, 9] and curve.values[0] == 0.5 and math.isnan(curve.values[1])
    assert curve.values[2] == math.inf and run.settings == {"params": {"lr": "0.1"}} and run.ended is False
    assert read_run(tmp_path / "mlflow.db:abd").ended and path.read_bytes() == before
    for wanted, says in (("mlflow.db", "holds 2 runs: give one of"), ("mlflow.db:ab", "2 runs whose ids begin")):
        with pytest.raises(UnreadableLogs, match=says):
            read_run(tmp_path / wanted)
    (tmp_path / "other.db").write_text("something else, of some length, that is no data base" * 9)
    with pytest.raises(UnreadableLogs, match="cannot be read as a data base"):
        read_run(tmp_path / "other.db")


def test_wandb(tmp_path):
    """More than a block, so that records are split; JSON has no NaN, and W&B writes a word."""
    rows = [
        {"trainer/global_step": 5 * i, "stability/courant": "NaN" if i == 1 else i / 1000, "_step": i, "text": "x" * 99}
        for i in range(1000)
    ]
    path = write_wandb(tmp_path / "offline-run-1" / "run-1.wandb", rows, config={"lr": 0.1, "_wandb": {}})
    run = read_run(tmp_path)
    curve = run.curves["stability/courant"]
    assert path.stat().st_size > 3 * 32768 and set(run.curves) == {"stability/courant"}
    assert curve.steps == [5 * i for i in range(1000)] and math.isnan(curve.values[1]) and curve.values[999] == 0.999
    assert run.settings == {"config": {"lr": "0.1"}} and run.ended


def test_wandb_of_a_run_that_goes_on_ends_with_its_last_whole_record(tmp_path):
    rows = [{"trainer/global_step": i, "a": i} for i in range(20)]
    path = write_wandb(tmp_path / "run-1.wandb", rows, ended=False)
    path.write_bytes(path.read_bytes()[:-5])
    run = read_run(path)
    assert run.curves["a"].steps == list(range(19)) and run.ended is False
    path.write_bytes(b"something else")
    with pytest.raises(UnreadableLogs, match="does not begin"):
        read_run(path)


# -- the verdict ------------------------------------------------------------------------------------------------------


def judged(tmp_path, table, **more):
    return JudgedRun.of(read_run(write_csv(tmp_path, table, **more)), "run")


@pytest.mark.parametrize(
    ("table", "state"),
    [
        ({"train_loss": [2.0 - i / 100 for i in range(100)]}, "unknown"),
        ({"train_loss": [1.0]}, "unknown"),
        ({"train_loss": [2.0 - i / 100 for i in range(100)], "stability/courant": ["nan"] * 100}, "unknown"),
        ({"train_loss": [2.0 - i / 100 for i in range(100)], "stability/courant": [0.1] * 10}, "unknown"),
        ({"train_loss": [2.0 - i / 100 for i in range(100)], "stability/courant": [0.1] * 100}, "stable"),
        ({"train_loss": [2.0 - i / 100 for i in range(99)] + ["nan"], "stability/courant": [0.1] * 100}, "not finite"),
        ({"train_loss": [2.0] * 100, "stability/courant": [0.1] * 100}, "not learning"),
        ({"train_loss": [2.0 - i / 100 for i in range(100)], "stability/courant": [5.0] * 100}, "unstable"),
        ({"train_loss": [2.0 - i / 100 for i in range(99)], "stability/courant": [0.1] * 99,
          "stability/nonfinite_step": [None] * 98 + [98]}, "not finite"),
        ({"train_loss": [2.0 - i / 100 for i in range(99)], "stability/courant": [0.1] * 99,
          "stability/nonfinite_step": [None] * 50 + [50]}, "stable"),
        ({"train_loss": [2.0 - i / 100 for i in range(99)], "stability/courant": [0.1] * 99,
          "stability/event": [None] * 50 + [50]}, "recovered"),
        ({"train_loss": [2.0 - i / 100 for i in range(99)], "stability/courant": [0.1] * 99,
          "stability/stop": [None] * 98 + [98]}, "unstable"),
        ({"train_loss": [2.0 - i / 100 for i in range(99)], "stability/courant": [0.1] * 99,
          "stability/stop": [None] * 50 + [50]}, "stable"),
    ],
    ids=["no stability", "one loss", "all failed", "old", "calm", "nan loss", "flat", "beyond", "fault", "fault, gone",
         "event", "stop", "stop, and gone on"],
)  # fmt: skip
def test_states(tmp_path, table, state):
    """A fault at the last step counts; one with finite losses after it does not."""
    if "stability/nonfinite_step" in table and state == "not finite":
        table = table | {"train_loss": table["train_loss"][:-1]}
    assert judged(tmp_path, table).verdict.state == state


def test_a_fault_with_losses_after_it_that_are_not_finite_is_the_cause(tmp_path):
    """The last loss alone would say the same state, but not since when."""
    table = {"train_loss": [1.0] * 8 + ["nan"] * 4, "stability/nonfinite_step": [None] * 8 + [8]}
    run = judged(tmp_path, table)
    assert run.verdict.cause == "fault" and "since step 8" in run.sentence


def test_without_a_loss_calm_readings_say_that_it_was_not_seen(tmp_path):
    run = judged(tmp_path, {"stability/courant": [0.1] * 20})
    assert run.verdict.state == "stable" and "was not seen" in run.sentence and "no training loss" in run.basis


def test_a_loss_of_every_step_gives_the_record_of_training():
    losses = [2.0 if i < 60 else 5.0 for i in range(100)]
    seen = LossRecord()
    for step, loss in enumerate(losses):
        seen.add(ArrivedLoss(step, loss))
    logged = loss_record(Curve(list(range(100)), losses))
    assert logged.state_dict() == seen.state_dict()


@pytest.mark.parametrize("stride", [5, 50])
def test_a_rise_shows_in_a_loss_that_is_logged_rarely_and_one_batch_does_not(stride):
    steps = [stride * i for i in range(60)]
    fell = [2.0 * math.exp(-i / 10) + 0.5 for i in range(60)]
    assert loss_record(Curve(steps, fell)).risen is False and loss_record(Curve(steps, fell)).fallen
    assert loss_record(Curve(steps, [*fell[:50], *([1.5] * 10)])).risen
    assert not loss_record(Curve(steps, [*fell[:59], 0.9])).risen
    record = loss_record(Curve(steps, [*fell[:59], NAN]))
    assert not record.finite and record.nonfinite_step == steps[-1]


def test_the_loss_is_named_or_chosen():
    curves = {key: Curve([0], [1.0]) for key in ("a_loss", "b_loss", "val_loss", "stability/loss")}
    assert loss_key(curves) is None and loss_key(curves, "b_loss") == "b_loss"
    assert loss_key({key: curves[key] for key in ("a_loss", "val_loss")}) == "a_loss"
    with pytest.raises(UnreadableLogs, match="--loss c is not logged"):
        loss_key(curves, "c")


def test_events_and_findings_name_the_step_the_layer_and_the_block(tmp_path):
    table = columns(100, slope=0.05) | {"stability/event": [None] * 30 + [30]}
    run = read_run(write_csv(tmp_path, table))
    happened = {event.name: event for event in events(run.history, run.curves["train_loss"])}
    assert happened["Courant number above 1"].step == 17 and happened["event"].step == 30
    found = {(each.where, each.name): each for each in findings(run.history, judge(facts(run, "train_loss")))}
    assert set(found) == {("quantity", "courant"), ("layer", "net.1"), ("block", "blocks.2")}
    courant = found["quantity", "courant"]
    assert "first at step 17" in courant.text and "courant_mean_square" in courant.meaning and "lower" in courant.advice
    assert found["layer", "net.1"].meaning and "50.6" in found["layer", "net.1"].text


def test_a_sentence_from_logs_needs_nothing_that_they_lack(tmp_path):
    for name, table in {"fault": {"stability/nonfinite_step": [3]}, "stop": {"stability/stop": [3]}}.items():
        run = read_run(write_csv(tmp_path / name, table))
        assert len(sentence(judge(facts(run)))) > 40
