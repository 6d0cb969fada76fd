"""The calls of modules in the step itself, where it cannot be replayed."""

from __future__ import annotations

import contextlib
import weakref

from torch import nn

from lsp_callbacks.step.replay_checks import Call, recording_calls
from lsp_callbacks.step.run_context import captures_nothing


class OwnCalls:
    """The first call of each module from now on, by hooks that go with this object.

    Args:
        module: that is trained; not a compiled one, which hooks would compile anew.
    """

    def __init__(self, module: nn.Module):
        with contextlib.ExitStack() as stack:
            self._calls = stack.enter_context(recording_calls(module, captures_nothing))
            self._remove = weakref.finalize(self, stack.pop_all().close)

    def taken(self) -> dict[str, Call]:
        """Return the calls so far, by name, and record no more."""
        self._remove()
        return self._calls
