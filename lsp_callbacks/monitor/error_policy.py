"""What happens when something goes wrong around a measurement: a warning, once for each kind, or an exception."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping


class ErrorPolicy:
    """Warns once for each kind of text, whatever its numbers are; raises if strict.

    Args:
        strict: whether errors are raised, instead of being turned into warnings.
    """

    def __init__(self, *, strict: bool):
        self.strict = strict
        self.reset()

    def reset(self) -> None:
        """Forget which warnings were issued."""
        self._warned: set[str] = set()

    def warn_once(self, text: str) -> None:
        """Warn, unless a text of the same kind was a warning before."""
        if _kind(text) not in self._warned:
            warnings.warn(f"lsp_callbacks: {text}", stacklevel=3)
        self._warned.add(_kind(text))

    @contextlib.contextmanager
    def warn_instead_of_raise(self, what: str) -> Iterator[None]:
        """Turn any exception inside into a warning, so that training goes on; raise it if strict.

        Args:
            what: failed, for the warning.
        """
        try:
            yield
        except Exception as error:
            self.caught(what, error)

    def caught(self, what: str, error: Exception) -> None:
        """Turn an exception that was caught into a warning; raise it if strict.

        Args:
            what: failed, for the warning.
            error: the exception, which is being handled.
        """
        if self.strict:
            raise error
        self.warn_once(f"{what}: {type(error).__name__}: {error}")

    def report(self, failures: Mapping[str, str], step: int, *, warn: bool) -> None:
        """Warn of failed measurements, once for each kind of reason.

        Args:
            failures: the reasons by quantity.
            step: number of the optimizer step.
            warn: whether this process issues the warnings; a reason names the rank that failed.
        """
        kinds: dict[str, list[str]] = {}
        for name, reason in failures.items():
            kinds.setdefault(_kind(reason), []).append(name)
        for kind, names in kinds.items():
            if kind not in self._warned and warn:
                text = f"lsp_callbacks could not measure {', '.join(names)} at step {step}; reporting NaN"
                warnings.warn(f"{text}: {failures[names[0]]}", stacklevel=3)
        self._warned |= kinds.keys()


def _kind(text: str) -> str:
    return re.sub(r"[-+.\w]*\d[-+.\w]*", "#", text)
