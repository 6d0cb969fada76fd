"""What a measurement may take: bytes, known before it starts, and seconds, known after it ended."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import torch

from lsp_callbacks._validation import number
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.operators.footprint import Footprint, readable

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
#: On the CPU, where nothing is said, the peak may be so many times that of training, or so many bytes beside training.
MULTIPLE, FLOOR = 1.5, 2.56e8
#: Likewise while the headline number is measured, which comes first.
HEADLINE = 3.0
#: Vectors of the size of the weights that training holds between two steps: weights, gradient, two moments.
HELD = 4.0
#: A first measurement takes this many times as long as the next ones.
COLD = 3.0


def in_bytes(value: Any) -> float | None:
    """Return ``max_memory`` as a number of bytes.

    Args:
        value: bytes, or text such as "2GB", "500 MiB"; None is no limit.

    Raises:
        ValueError: for anything else.

    Example:
        >>> from lsp_callbacks.monitor.limits import in_bytes
        >>> in_bytes("1.5 GB"), in_bytes("2KiB"), in_bytes(7)
        (1500000000.0, 2048.0, 7.0)
    """
    if value is None:
        return None
    how = " of bytes, text such as '2GB', or None"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?i?)B?\s*", value.upper().replace("I", "i"))
        if match is None or match[2] not in UNITS:
            raise ValueError(f"max_memory={value!r}: give a number of bytes, or text such as '2GB' or '500MiB'")
        return float(number("max_memory", float(match[1]) * UNITS[match[2]], above=0, instead=how))
    return float(number("max_memory", value, above=0, instead=how))


def default_cap(training: Footprint, multiple: float = MULTIPLE) -> float:
    """Return how many bytes a measurement may take on the CPU where nothing is said.

    It starts when the step's own graph is gone, beside the weights, the gradient, and two moments of the optimizer. So
    ``held + bytes <= multiple (held + activations)``: with 1.5 the peak of the process grows by half at most, against
    training alone. `FLOOR` at least, which on a small network is little beside the interpreter and its libraries.
    """
    held = HELD * training.parameters
    return max(FLOOR, multiple * (held + training.activations) - held)


def check_memory(
    predicted: float,
    cap: float | None,
    device: torch.device,
    *,
    default: float = math.inf,
    multiple: float = MULTIPLE,
) -> None:
    """Refuse a measurement that would need too much memory beside training.

    Args:
        predicted: bytes at its peak.
        cap: bytes; None is what is free at the moment on a CUDA device, and ``default`` elsewhere.
        device: of the parameters.
        default: bytes.
        multiple: of the peak of training, that ``default`` stands for.

    Raises:
        Unsupported: above the cap, as it will be at every step.
        Unmeasurable: above what is free now.
    """
    advice = "allow more with max_memory=..., or measure part of the batch with sub_batch=..."
    if cap is not None and predicted > cap:
        raise Unsupported(
            f"it would take {readable(predicted)} beside training, more than max_memory={readable(cap)}: {advice}"
        )
    if cap is None and device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reserved
        if predicted > free:
            raise Unmeasurable(
                f"it would take {readable(predicted)} beside training, and {readable(free)} are free: measure "
                "part of the batch with sub_batch=..., or train with a smaller batch"
            )
    elif cap is None and predicted > default:
        raise Unsupported(
            f"it would take {readable(predicted)} beside training, more than {readable(default)}: the peak would be "
            f"above {multiple:g} times that of training alone: {advice}"
        )


class Seconds:
    """How long measurements took, and which of them fit into a limit.

    The clock is not the same in two runs: with a limit, what is measured may differ between them.

    Args:
        limit: seconds for one measurement of everything; None is no limit.

    Raises:
        ValueError: for a limit that is not positive.
    """

    def __init__(self, limit: float | None):
        if limit is not None:
            number("time_limit", limit, above=0, instead=" of seconds, or None")
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._now: dict[str, float] = {}
        self.taken: dict[str, list[float]] = {}

    def begin(self, name: str) -> None:
        """Start a measurement, whether or not the one before was completed."""
        self._now.pop(name, None)

    def add(self, name: str, seconds: float, *, complete: bool) -> None:
        """Add the seconds of one step of a measurement, which counts when it is complete."""
        self._now[name] = self._now.get(name, 0.0) + seconds
        if complete:
            self.taken.setdefault(name, []).append(self._now.pop(name))

    def expected(self, name: str) -> float:
        """Return the seconds of the next measurement: the least so far, a third of the first, which starts cold."""
        taken = self.taken.get(name, [])
        return min(taken[1:], default=taken[0] / COLD) if taken else 0.0

    def too_long(self, names: Collection[str]) -> dict[str, str]:
        """Return which measurements to skip, the longest first, so that the rest fits, and why."""
        left = sorted(names, key=self.expected)
        reasons: dict[str, str] = {}
        while self.limit is not None and left and sum(map(self.expected, left)) > self.limit:
            total, name = sum(map(self.expected, left)), left.pop()
            reasons[name] = (
                f"a measurement takes {total:.3g} seconds, {self.expected(name):.3g} of them for this, more than "
                f"time_limit={self.limit:g}"
            )
        return reasons
