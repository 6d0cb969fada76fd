"""The command ``lsp-callbacks report``: one page of HTML from the logs of one run or several."""

from __future__ import annotations

import argparse
import time
import webbrowser
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from lsp_callbacks import __version__
from lsp_callbacks.cli.configured import command_parser, print_failure
from lsp_callbacks.report.logs.find import read_run
from lsp_callbacks.report.logs.logged_run import LoggedRun, UnreadableLogs
from lsp_callbacks.report.logs.mlflow_database import split_run
from lsp_callbacks.report.page.html_page import html_page
from lsp_callbacks.report.page.judged_run import JudgedRun, names_of

DESCRIPTION = """\
Writes one page of HTML from what runs have logged: the verdict, the headline Courant number over time with its edge,
what stands out, events, heat maps over layers and blocks, the stability diagram where it was saved, all numbers, the
configuration. It needs neither a server nor a network; nothing in the logs is run.

RUN is the folder of a run, or its log file: metrics.csv of Lightning's CSVLogger, event files of TensorBoard (needs its
package), a run of MLflow (mlruns/EXPERIMENT/RUN, or mlflow.db:RUN of its data base), an offline run of W&B. Several
runs stand side by side.

The page holds the configuration: look through it before you pass it on.\
"""
#: Seconds between two looks at the logs, and without news after which a run is taken to be over.
EVERY, PATIENCE = 10, 1800


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments after ``report``.

    Returns:
        The exit status, 1 where the logs cannot be read. Bad arguments end in ``SystemExit(2)``.
    """
    options = _parser().parse_args(argv)
    if options.follow and not all(_begins(path) for path in options.runs):
        print("lsp_callbacks: waiting for the first logs, until Ctrl-C", flush=True)
        if not _wait(options):
            return print_failure("report", UnreadableLogs(f"no logs came within {options.patience} seconds"))
    try:
        _write(options, going=options.follow)
    except (UnreadableLogs, OSError) as error:
        return print_failure("report", error)
    print(f"lsp_callbacks: the page is {options.output.absolute()}", flush=True)
    if options.open:
        webbrowser.open(options.output.absolute().as_uri())
    if options.follow:
        _follow(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("report", "RUN [RUN ...] [-o FILE] [--open] [--follow] [--loss KEY]", DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder or log file")
    parser.add_argument("-o", "--output", type=Path, default=Path("stability.html"), metavar="FILE",
                        help="the page (stability.html)")  # fmt: skip
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument("--follow", action="store_true",
                        help="write it again when the logs grow, until Ctrl-C")  # fmt: skip
    parser.add_argument("--every", type=_seconds, default=EVERY, metavar="SECONDS", help=f"with --follow ({EVERY})")
    parser.add_argument("--patience", type=_seconds, default=PATIENCE, metavar="SECONDS",
                        help=f"without news after which --follow ends ({PATIENCE})")  # fmt: skip
    parser.add_argument("--loss", metavar="KEY", help="name of the training loss in the logs (train_loss and the like)")
    return parser


def _seconds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of seconds")
    return int(text)


def _write(options: argparse.Namespace, *, going: bool) -> list[LoggedRun]:
    """Write the page, and return what it shows; a reader never sees half of it."""
    logged = [read_run(path) for path in options.runs]
    names = names_of([run.path for run in logged])
    runs = [JudgedRun.of(run, name, options.loss) for run, name in zip(logged, names)]
    made = f"by lsp_callbacks {__version__} at {datetime.now():%Y-%m-%d %H:%M:%S}"
    text = html_page(runs, refresh=options.every if going else None, made=made)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    beside = options.output.with_name(f"{options.output.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(options.output)
    return logged


def _begins(path: Path) -> bool:
    """Return whether there are logs at a path: loggers write the first ones late."""
    try:
        return bool(read_run(path).curves)
    except (UnreadableLogs, OSError):
        return False


def _wait(options: argparse.Namespace) -> bool:
    """Wait for the first logs of all runs; return False where they do not come."""
    began = time.monotonic()
    try:
        while time.monotonic() - began < options.patience:
            if all(_begins(path) for path in options.runs):
                return True
            time.sleep(options.every)
    except KeyboardInterrupt:
        pass
    return False


def _follow(options: argparse.Namespace) -> None:
    """Write the page again whenever the logs have grown, until they say that the run is over, or do not grow."""
    seen, news = _state(options.runs), time.monotonic()
    try:
        while time.monotonic() - news < options.patience:
            time.sleep(options.every)
            if (state := _state(options.runs)) == seen:
                continue
            seen, news = state, time.monotonic()
            try:
                logged = _write(options, going=True)
            except (UnreadableLogs, OSError):  # caught while it is written: the next look finds it whole
                continue
            if all(run.ended for run in logged):
                break
    except KeyboardInterrupt:
        pass
    try:
        _write(options, going=False)
    except (UnreadableLogs, OSError) as error:
        print_failure("report", error)


def _state(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return name, size and time of all files, by which it can be told that something was logged."""
    places = [split_run(path)[0] for path in paths]
    files = [file for path in places for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
