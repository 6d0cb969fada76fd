"""The command ``lsp-callbacks``: Lightning's command line with the callbacks at hand, and commands of this package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lsp_callbacks import __version__
from lsp_callbacks.callbacks.roll_back_on_instability import RollBackOnInstability

#: Commands of Lightning, and those of this package, each in a module of this folder; and what they do.
TRAINING = {
    "fit": "train from a YAML file, and measure",
    "validate": "Lightning's own: one pass over the validation data",
    "test": "Lightning's own: one pass over the test data",
    "predict": "Lightning's own: predictions for a data set",
}
MEASURING = {
    "demo": "two small runs to look at: a healthy one and, with --unstable, one that is ended; from any folder",
    "suggest": "a learning rate and a batch size before training, from short trial runs",
    "diagram": "the largest stable rates, drawn before a step is taken",
    "cost": "what measuring takes: gradients, time, memory, cadence",
    "report": "a page of HTML from the logs of one run or several",
}
EXAMPLES = """\
  lsp-callbacks demo                                 table, verdict and picture in half a minute, in runs/
  lsp-callbacks fit --config FILE --model.lr 0.2     any setting can be changed on the way
  lsp-callbacks fit --config FILE --print_config     all settings, and what they are now
  lsp-callbacks fit --help                           all options; each command has its own --help
  lsp-callbacks suggest --config FILE                the largest stable learning rate, and what larger batches bear
  lsp-callbacks diagram --config FILE --ckpt FILE    at a checkpoint instead of the initial weights
  lsp-callbacks report runs/digits/version_0         verdict and figures of a run, in stability.html

In a configuration of your own, the callbacks are listed under trainer: callbacks:, by class_path
(lsp_callbacks.StabilityMonitor, lsp_callbacks.StabilityReport, lsp_callbacks.StabilityPanel,
lsp_callbacks.StopOnInstability, lsp_callbacks.CapLearningRate, lsp_callbacks.RollBackOnInstability instead of
StopOnInstability).\
"""


def help_text() -> str:
    """Return what ``lsp-callbacks --help`` prints: every command in one line."""
    commands = "\n".join(f"  {name:<10}{does}" for name, does in (TRAINING | MEASURING).items())
    return (
        "usage: lsp-callbacks COMMAND [--config FILE] [--KEY VALUE ...]\n       lsp-callbacks --version\n\n"
        "Trains any LightningModule from a YAML file, and measures how stable the training is while it runs.\n\n"
        f"commands:\n{commands}\n\nexamples:\n{EXAMPLES}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        The exit status. Bad arguments end in ``SystemExit(2)`` with a message, as usual.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if args[0] == "--version":
        print(f"lsp-callbacks {__version__}")
        return 0
    try:
        import jsonargparse  # noqa: F401
        import pytorch_lightning.cli  # noqa: F401
    except ImportError as error:
        print(f"lsp-callbacks needs jsonargparse ({error}): pip install 'lsp-callbacks[cli]'", file=sys.stderr)
        return 1
    if args[0] in MEASURING:
        return import_module(f"lsp_callbacks.cli.{args[0]}").main(args[1:])
    train(args)
    return 0


def train(args: Sequence[str]) -> None:
    """Run a command of Lightning's own command line.

    Args:
        args: the command, and what follows it.
    """
    from pytorch_lightning.cli import LightningCLI

    class CLI(LightningCLI):
        """Lightning's, with the returns of a `RollBackOnInstability` that the configuration names."""

        def fit(self, model: Any, **settings: Any) -> None:
            trainer: Any = self.trainer
            roll_back = next((c for c in trainer.callbacks if isinstance(c, RollBackOnInstability)), None)
            if roll_back is None:
                trainer.fit(model, **settings)
            else:
                roll_back.fit(trainer, model, **settings)

    # A message about one bad argument should not drown in the list of all good ones.
    usage = {name: {"usage": f"lsp-callbacks {name} [--config FILE] [--KEY VALUE ...]"} for name in TRAINING}
    sys_argv = sys.argv
    sys.argv = sys.argv[:1]  # given both args and the process's own arguments, LightningCLI warns
    try:
        CLI(args=list(args), parser_kwargs={"prog": "lsp-callbacks", **usage})
    finally:
        sys.argv = sys_argv
