"""What the logs of one run hold, whatever wrote them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lsp_callbacks.monitor.history import Curve
from lsp_callbacks.quantities.key import PREFIX, is_global

#: Loggers may put a prefix of the user's before all keys.
BEFORE = re.compile(rf"^.*?[-_/.](?={PREFIX})")
#: Pictures that begin otherwise are not shown, nor larger ones.
PNG, LARGEST_PICTURE = b"\x89PNG\r\n\x1a\n", 600_000


class UnreadableLogs(Exception):
    """Logs that cannot be read, and what to do."""


@dataclass(frozen=True)
class LoggedRun:
    """The logs of one run.

    Attributes:
        path: of the folder or file that was given.
        source: the kind of logs, in words.
        curves: all numbers by key, at ascending steps.
        settings: by file, names and values of the configuration.
        texts: files of the configuration that could not be taken apart.
        pictures: PNG files by name.
        notes: what is to be said of the reading.
        ended: whether the logs say that the run is over; None where they cannot say.
    """

    path: Path
    source: str
    curves: Mapping[str, Curve]
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ended: bool | None = None

    @property
    def history(self) -> dict[str, Curve]:
        """The curves of stability, as the `StabilityMonitor` had them."""
        return {key: curve for key, curve in self.curves.items() if key.startswith(PREFIX)}

    @property
    def last_step(self) -> int | None:
        """The last step of any row; None without rows."""
        return max((curve.steps[-1] for curve in self.curves.values() if curve.steps), default=None)


def curves_of(points: Mapping[str, Iterable[tuple[int, float]]]) -> dict[str, Curve]:
    """Return curves at ascending steps, without a logger's prefix; of several values of one step the last counts.

    Args:
        points: steps and values in the order in which they were logged, by key.
    """
    curves: dict[str, Curve] = {}
    for key, logged in points.items():
        by_step = dict(sorted(dict(logged).items()))
        if by_step:
            short = BEFORE.sub("", key)
            curves[key if short in points and short != key else short] = Curve(list(by_step), list(by_step.values()))
    return curves


def layers_of(curves: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Return the curves of single layers and blocks, by kind and by name of the layer."""
    kinds: dict[str, dict[str, Curve]] = {}
    for key, curve in curves.items():
        if key.startswith(PREFIX) and not is_global(key):
            kind, _, layer = key.removeprefix(PREFIX).partition("/")
            kinds.setdefault(kind, {})[layer] = curve
    return kinds


def pictures_beside(folder: Path, pattern: str = "stability*.png") -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return the pictures of a folder, and a note on those that are left out."""
    pictures, notes = {}, []
    for path in sorted(folder.glob(pattern)):
        if not path.is_file():
            continue
        if path.stat().st_size > LARGEST_PICTURE:
            notes.append(f"{path.name} is left out: it has {path.stat().st_size / 1e6:.1f} MB")
        elif (content := path.read_bytes()).startswith(PNG):
            pictures[path.name] = content
    return pictures, tuple(notes)
