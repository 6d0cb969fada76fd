"""One Callback class for both names of Lightning."""

from __future__ import annotations

import pytorch_lightning

try:
    import lightning.pytorch as unified
except ImportError:  # only `pytorch_lightning` is installed
    unified = pytorch_lightning  # type: ignore[misc]

# Inheriting both makes one class acceptable to the Trainers and the command lines of both packages.
_BASES = tuple(dict.fromkeys((pytorch_lightning.Callback, unified.Callback)))


class Callback(*_BASES):  # type: ignore[misc]
    """A callback for ``pytorch_lightning`` and ``lightning.pytorch`` alike."""
