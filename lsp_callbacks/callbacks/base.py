"""One Callback class for both names of Lightning, which imports neither."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Where each name of Lightning defines its class.
_DEFINED_IN = ("pytorch_lightning.callbacks.callback", "lightning.pytorch.callbacks.callback")


class _WithoutLightning:
    """What a callback inherits until Lightning is imported."""


_BASES: tuple[Any, ...] = (_WithoutLightning,)


class Callback(*_BASES):  # type: ignore[misc]
    """A callback for ``pytorch_lightning`` and ``lightning.pytorch`` alike.

    It inherits the ``Callback`` of each of the two that has been imported, be it before or after this class was made:
    one class is acceptable to the Trainers and the command lines of both, and nobody waits for the other package.
    """


def _inherit() -> None:
    """Give Lightning's own classes, as many as there are by now, to the class as its bases."""
    modules = (sys.modules[name] for name in _DEFINED_IN if name in sys.modules)
    bases = tuple(module.Callback for module in modules if hasattr(module, "Callback"))
    if bases:
        Callback.__bases__ = bases


class _ImportWatch(MetaPathFinder):
    """Finds what the finders behind it find; once a module that defines Lightning's class has run, ours inherits."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _DEFINED_IN:
            return None
        finders = sys.meta_path[sys.meta_path.index(self) + 1 :]  # another watch before it would ask it again
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_inherit(module: ModuleType) -> None:
                run(module)
                _inherit()

            spec.loader.exec_module = run_and_inherit  # type: ignore[method-assign]
        return spec


_inherit()
sys.meta_path.insert(0, _ImportWatch())
