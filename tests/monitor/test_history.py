"""The curves of a run as a data frame and as a file."""

import math
import sys

import harness
import pytest

from lsp_callbacks import Curve, History, StabilityMonitor
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.report.logs.find import read_run

COURANT, NORM = "stability/courant", 'stability/spectral_norm/a,"b"'
HISTORY = History({COURANT: Curve([0, 50, 100], [0.1, math.nan, math.inf]), NORM: Curve([7, 50], [1 / 3, -1e-300])})


def same(a, b):
    """Equal keys in one order, steps, and values, NaN included."""
    return list(a) == list(b) and all(a[key].steps == b[key].steps and repr(a[key].values) == repr(b[key].values)
                                      for key in a)  # fmt: skip


def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path):
    HISTORY.save(tmp_path / "new" / "history.csv")
    loaded = History.load(str(tmp_path / "new" / "history.csv"))
    assert same(loaded, HISTORY) and isinstance(loaded[COURANT].steps[0], int)
    rows = (tmp_path / "new" / "history.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["0.1", "", "nan", "inf"]  # not measured is not failed
    History().save(tmp_path / "empty.csv")
    assert History.load(tmp_path / "empty.csv") == {}


def test_the_page_reads_what_is_saved(tmp_path):
    HISTORY.save(tmp_path / "history.csv")
    assert same(read_run(tmp_path / "history.csv").curves, HISTORY)


def test_another_ending_or_another_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'history.json'.*ending in .csv"):
        HISTORY.save("history.json")
    (tmp_path / "other.csv").write_text("epoch,step\n1,2\n")
    with pytest.raises(ValueError, match="no saved history: its first column is"):
        History.load(tmp_path / "other.csv")


def test_the_history_of_a_run_is_one(tmp_path):
    monitor = StabilityMonitor(["sharpness", "spectral_norm"], every_n_steps=2)
    harness.fit(harness.Model, monitor)
    monitor.history.save(tmp_path / "history.csv")
    assert same(History.load(tmp_path / "history.csv"), monitor.history) and len(monitor.history) > 4
    assert isinstance(Monitor().history, History)


def test_a_missing_pandas_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        HISTORY.to_frame()


def test_a_frame_has_a_row_for_each_step_and_a_column_for_each_key(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = HISTORY.to_frame()
    assert (
        list(frame.index) == [0, 7, 50, 100] and frame.index.name == "step" and list(frame.columns) == [COURANT, NORM]
    )
    assert frame[COURANT].dropna().to_dict() == {0: 0.1, 100: math.inf} and frame.loc[7, NORM] == 1 / 3
    HISTORY.save(tmp_path / "history.csv")
    pandas.testing.assert_frame_equal(pandas.read_csv(tmp_path / "history.csv", index_col="step"), frame)
    assert History().to_frame().empty
