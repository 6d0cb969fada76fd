"""The command ``lsp-callbacks``: Lightning's command line, with the callbacks of this package at hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = ("fit", "validate", "test", "predict")
HELP = """\
usage: lsp-callbacks {fit,validate,test,predict,diagram,cost} [--config FILE] [--KEY VALUE ...]

Trains any LightningModule from a YAML file, and measures how stable the training is while it runs.

  lsp-callbacks fit --config configs/digits.yaml            a healthy run: table, verdict and picture in half a minute
  lsp-callbacks fit --config configs/digits_unstable.yaml   a rate that grows past the edge, and the run that is ended
  lsp-callbacks fit --config FILE --model.lr 0.2            any setting can be changed on the way
  lsp-callbacks fit --config FILE --print_config            all settings, and what they are now
  lsp-callbacks fit --help                                  all options
  lsp-callbacks diagram --config FILE [--ckpt FILE]         the largest stable rates, drawn before a step is taken
  lsp-callbacks cost --config FILE [--ckpt FILE]            what measuring it takes: gradients, time, memory, cadence

The two files are in the repository. In your own, the callbacks are listed under trainer: callbacks:, by class_path
(lsp_callbacks.StabilityMonitor, lsp_callbacks.StabilityReport, lsp_callbacks.StopOnInstability).\
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        The exit status. Bad arguments end in ``SystemExit(2)`` with a message, as usual.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return 0
    try:
        import jsonargparse  # noqa: F401
        from pytorch_lightning.cli import LightningCLI
    except ImportError as error:
        print(f"lsp-callbacks needs jsonargparse ({error}): pip install 'lsp-callbacks[cli]'", file=sys.stderr)
        return 1
    if args[0] == "diagram":
        from lsp_callbacks.cli import diagram

        return diagram.main(args[1:])
    if args[0] == "cost":
        from lsp_callbacks.cli import cost

        return cost.main(args[1:])
    # A message about one bad argument should not drown in the list of all good ones.
    usage = {name: {"usage": f"lsp-callbacks {name} [--config FILE] [--KEY VALUE ...]"} for name in COMMANDS}
    # Given both argv and the process's own arguments, LightningCLI warns.
    LightningCLI(args=None if argv is None else args, parser_kwargs={"prog": "lsp-callbacks", **usage})
    return 0


if __name__ == "__main__":
    sys.exit(main())
