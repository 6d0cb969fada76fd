"""The command ``lsp-callbacks demo``: the two configurations that come with the package, from any folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lsp_callbacks.cli.configured import command_parser, print_failure

#: In the repository a link to ``configs/`` beside the package; in a wheel a folder.
CONFIGS = Path(__file__).parents[1] / "configs"
DESCRIPTION = """\
Trains a small residual network on scikit-learn's digits, half a minute on a CPU; nothing is downloaded. The rate of the
healthy run is constant; with --unstable it grows until training fails, and the run is ended.

Results go to runs/digits/version_0 of the current folder (runs/digits_unstable/version_0 with --unstable; the next run
has version_1): the picture stability.png, all curves in metrics.csv, the configuration config.yaml, from which
`lsp-callbacks fit --config FILE` starts a run of your own. Another folder: --trainer.logger.init_args.save_dir DIR.
Other options are those of `lsp-callbacks fit`: --model.lr 0.2, --trainer.enable_progress_bar false\
"""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments after ``demo``.

    Returns:
        The exit status, 1 without the packages of the extra ``demo``. Bad arguments end in ``SystemExit(2)``.
    """
    from lsp_callbacks.cli.main import train

    parser = command_parser("demo", "[--unstable] [--KEY VALUE ...]", DESCRIPTION)
    parser.add_argument("--unstable", action="store_true", help="a rate that grows past the edge")
    options, rest = parser.parse_known_args(argv)
    config = CONFIGS / ("digits_unstable.yaml" if options.unstable else "digits.yaml")
    try:
        train(["fit", "--config", str(config), *rest])
    except ImportError as error:
        return print_failure("demo", error)
    return 0
