"""What the commands share: a configuration of ``lsp-callbacks fit`` up to its first step, and a run that has no end."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lsp_callbacks.callbacks.stability_monitor import monitor_among

#: Of the trainer: what could leave files behind or take time.
QUIET = {
    "logger": False, "profiler": None, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip
#: Packages that log and warn under names of their own.
LIGHTNING = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")


def existing(text: str) -> Path:
    """Return the path of a file that must be there, for a command line."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return Path(text)


def command_parser(command: str, arguments: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command line, with its usage; the text is printed as it stands."""
    return argparse.ArgumentParser(
        f"lsp-callbacks {command}",
        usage=f"lsp-callbacks {command} {arguments}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def print_failure(command: str, error: Exception) -> int:
    """Print in one line why a command has failed, and return its exit status."""
    print(f"lsp-callbacks {command}: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's advice, which is about training."""
    loggers = [logging.getLogger(name) for name in LIGHTNING]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Lightning's own warnings, by where they are raised: those of the user's code are shown.
            for package in LIGHTNING:
                warnings.filterwarnings("ignore", module=package)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def with_configuration(args: list[str], use: Callable[..., None], *, usage: str | None) -> None:
    """Make trainer, module and data from the arguments of the command ``fit``, and hand them over before training.

    The trainer leaves no files and has no callbacks.

    Args:
        args: as they follow ``fit``.
        use: ``(trainer, model, monitor, **data)``; the monitor is that of the configuration, or None.
        usage: for messages.
    """
    from pytorch_lightning.cli import LightningCLI
    from pytorch_lightning.loggers.logger import DummyLogger

    class ConfiguredCLI(LightningCLI):
        """The command ``fit`` up to its first step: any configuration that trains is understood."""

        def before_instantiate_classes(self) -> None:
            vars(self.config.fit.trainer).update(QUIET)

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            # Dropped once they are made: the monitor's settings are wanted, and no other callback's work.
            listed = self._get(self.config_init, "trainer")["callbacks"] or []
            listed = listed if isinstance(listed, list) else [listed]
            self.monitor = monitor_among(listed)
            self._get(self.config_init, "trainer")["callbacks"] = None
            trainer = super().instantiate_trainer(**kwargs)
            trainer.logger = DummyLogger()  # hooks of the module may call it
            return trainer

        def fit(self, model: Any, **data: Any) -> None:
            use(self.trainer, model, self.monitor, **data)

    sys_argv = sys.argv
    sys.argv = sys.argv[:1]  # given both args and the process's own arguments, LightningCLI warns
    try:
        ConfiguredCLI(
            args=["fit", *args],
            save_config_callback=None,
            parser_kwargs={"prog": "lsp-callbacks", "fit": {"usage": usage}},
        )
    finally:
        sys.argv = sys_argv


class Done(Exception):
    """Raised by a callback that has seen enough: no hook believes that training has ended."""


def fit_until_done(trainer: Any, model: Any, callback: Any, **data: Any) -> None:
    """Train until a callback raises `Done`, with no callbacks of the module's own.

    Args:
        trainer: of either name of Lightning; it is used up.
        model: the LightningModule.
        callback: that sees the steps.
        data: other arguments of ``trainer.fit``.
    """
    trainer.callbacks.append(callback)
    vars(model)["configure_callbacks"] = list  # of the user's module: they are not even made
    try:
        trainer.fit(model, **data)
    except Done:
        pass
    finally:
        vars(model).pop("configure_callbacks", None)
        trainer.callbacks.remove(callback)


def train_without_end(trainer: Any) -> None:
    """Let a trainer that begins to fit go on for ever; a checkpoint of a run that has ended has a next step, too."""
    trainer.fit_loop.max_epochs = trainer.fit_loop.epoch_loop.max_steps = -1
