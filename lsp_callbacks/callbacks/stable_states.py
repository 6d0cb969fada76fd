"""The checkpoints of the states that were measured stable: one to return to, and one that waits to be confirmed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: The file in which a roll-back is written down before it is made.
RECORD = "roll_backs.json"


@dataclass(frozen=True)
class StableState:
    """A checkpoint of a state that was measured stable.

    Attributes:
        step: Lightning's ``global_step``, the number of updates that have made it.
        path: of the checkpoint.
        critical: the largest stable learning rate there; NaN where it was not known.
    """

    step: int
    path: str
    critical: float


@dataclass(frozen=True)
class RollBack:
    """A return to an earlier state.

    Attributes:
        at: Lightning's ``global_step`` when training was found unstable.
        state: to which it returned.
        scale: by which all rates of the schedule are multiplied from there on.
        reason: why it was found unstable.
        skipped: epoch, first and last batch (not included) of the batches that are left out; empty if none are.
        limit: above which that factor is not raised before step ``at`` is passed: ``safety`` times the least critical
            rate since the state, before the loss rose, over the rate that was found unstable.
    """

    at: int
    state: StableState
    scale: float
    reason: str
    skipped: tuple[int, ...] = ()
    limit: float = math.inf


@dataclass
class StableStates:
    """The last state that was measured stable before and after it was reached, and one that may become that.

    A reading belongs to the weights before a step. So a state is kept as a candidate first, and becomes the one to
    return to with the next stable reading.
    """

    confirmed: StableState | None = None
    candidate: StableState | None = None
    _unused: list[str] = field(default_factory=list)

    def add(self, state: StableState) -> None:
        """Take in a new candidate; the first state of all is the one to return to at once."""
        if self.confirmed is None:
            self.confirmed = state
            return
        self._drop(self.candidate)
        self.candidate = state

    def confirm(self) -> None:
        """Return to the candidate from now on."""
        if self.candidate is not None:
            self._drop(self.confirmed)
            self.confirmed, self.candidate = self.candidate, None

    def return_to(self, state: StableState) -> None:
        """Forget the candidate: it lies on the way that was left."""
        self._drop(self.candidate)
        self.confirmed, self.candidate = state, None

    def _drop(self, state: StableState | None) -> None:
        if state is not None:
            self._unused.append(state.path)

    def remove_unused(self, trainer: Any, roll_backs: Sequence[RollBack]) -> None:
        """Delete the checkpoints to which nobody will return, and nobody who is resumed."""
        kept = {each.state.path for each in roll_backs}
        unused, self._unused = self._unused, []
        for path in unused:
            if path not in kept:
                trainer.strategy.remove_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        """Return names and numbers."""
        return {
            "confirmed": None if self.confirmed is None else asdict(self.confirmed),
            "candidate": None if self.candidate is None else asdict(self.candidate),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.confirmed, self.candidate = (
            None if state[name] is None else StableState(**state[name]) for name in ("confirmed", "candidate")
        )
        self._unused = []


def write_record(folder: str, roll_backs: Sequence[RollBack]) -> None:
    """Write down all roll-backs of a run: in whole, or not at all."""
    path = Path(folder) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(each) for each in roll_backs], indent=1))
    os.replace(part, path)


def read_record(folder: str) -> list[RollBack]:
    """Return the roll-backs that were written down; none where there is no record."""
    path = Path(folder) / RECORD
    return roll_backs_of(json.loads(path.read_text())) if path.is_file() else []


def missing_from(made: Sequence[RollBack], folder: str, step: int) -> list[RollBack]:
    """Return the record of a run that is on a way that was left before, by a return that is not made; empty otherwise.

    Args:
        made: the returns that the run knows of.
        folder: of the record.
        step: at which the run is.
    """
    record = read_record(folder) if step else []
    missing = record[len(made) :]
    is_left = record[: len(made)] == list(made) and bool(missing) and missing[0].state.step <= step <= missing[0].at
    return record if is_left else []


def roll_backs_of(listed: Sequence[Mapping[str, Any]]) -> list[RollBack]:
    """Return roll-backs from what ``dataclasses.asdict`` made of them."""
    return [
        RollBack(**{**each, "state": StableState(**each["state"]), "skipped": tuple(each["skipped"])})
        for each in listed
    ]
