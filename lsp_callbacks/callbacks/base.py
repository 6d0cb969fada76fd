"""One Callback class for both names of Lightning."""

from __future__ import annotations

from collections.abc import Iterable

import pytorch_lightning

try:
    import lightning.pytorch as unified
except ImportError:  # only `pytorch_lightning` is installed
    unified = pytorch_lightning  # type: ignore[misc]

# Inheriting both makes one class acceptable to the Trainers and the command lines of both packages.
_BASES = tuple(dict.fromkeys((pytorch_lightning.Callback, unified.Callback)))


#: Packages whose hooks do nothing, or what this package knows of.
_OURS = (__name__.partition(".")[0], *(base.__module__.partition(".")[0] for base in _BASES))
#: What Lightning calls at each batch.
BATCH_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip


class Callback(*_BASES):  # type: ignore[misc]
    """A callback for ``pytorch_lightning`` and ``lightning.pytorch`` alike."""

    def hide_hooks(self, names: Iterable[str]) -> None:
        """Let Lightning, which calls what can be called, pass over hooks that have nothing to do.

        Those that a class of the user's overrides are called all the same.
        """
        for name in names:
            if getattr(type(self), name).__module__.partition(".")[0] in _OURS:
                self.__dict__.setdefault(name, None)

    def show_hooks(self, names: Iterable[str]) -> None:
        """Let Lightning call again what was hidden."""
        for name in names:
            if name in vars(self) and vars(self)[name] is None:
                del self.__dict__[name]
