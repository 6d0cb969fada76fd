"""A trainer that can be read and logs nothing, for the copies of a module that replay its steps."""

from __future__ import annotations

from typing import Any

from torch import nn

from lsp_callbacks.callbacks._lightning_internals import is_lightning_module, replace_trainer


def mute(module_copy: nn.Module, trainer: MutedTrainer) -> None:
    """Let the LightningModules of a copy read the real trainer, and log and print nothing."""
    for module in module_copy.modules():
        if is_lightning_module(module):
            replace_trainer(module, trainer)
            vars(module)["log"] = vars(module)["log_dict"] = vars(module)["print"] = _do_nothing


class MutedTrainer:
    """The trainer as a copy of the module sees it: everything can be read, nothing is logged.

    Attributes:
        global_step: of the step that is replayed, also after its update.
    """

    logger: Any
    loggers: tuple[Any, ...] = ()

    def __init__(self, trainer: Any):
        self._trainer, self.global_step = trainer, trainer.global_step
        self.logger = _Silence() if trainer.logger is not None else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def __deepcopy__(self, memo: dict) -> MutedTrainer:
        return self


class _Silence:
    """An object that takes any call on any attribute, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __deepcopy__(self, memo: dict) -> _Silence:
        return self


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replace ``self.log`` and ``self.print``."""
