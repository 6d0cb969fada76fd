"""What the loss of a run did, in a few numbers that are kept at every step; knows of no training loop."""

from __future__ import annotations

import math
import sys
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Steps over which the loss is smoothed, and the first steps whose mean is the initial loss.
SMOOTHING, INITIAL = 30, 5
#: The smoothed loss has risen when it is this much above its least value, and above this share of the initial loss:
#: once a data set is memorised, a rise of 25 % is noise.
RISE, SHARE = 0.25, 0.15
#: A rise of the smoothed loss is clear where it is so many times its own standard error.
CLEAR = 3.0
#: The run is lost when in three quarters of the last 200 steps its loss was above the loss at the start by this many
#: times the size of that: a run may recover from an explosion of a hundred steps (``benchmarks/two_populations.py``).
LOST, LOST_STEPS, LOST_SHARE = 2.0, 200, 0.75
#: The loss has not fallen while it is above this share of the loss at the start.
FALLEN = 0.95
#: Steps after which it should have: a run that survives its first explosion has begun to fall.
SETTLED = 60
#: Share of the fall of the loss, from the one at the start to its least smoothed value, that a run has lost when its
#: rise no longer is one from which runs at the edge of stability come back: of 161 healthy ones, none lost a quarter.
FORGOTTEN = 0.4
#: The loss alarm of ``benchmarks/two_populations.md``: a mean over so many steps above so many times its least value
#: and above this share of the initial loss.
ALARM_SMOOTHING, ALARM_RISE, ALARM_SHARE = 50, 2.0, 0.25
#: It lasts while most of so many last losses are that high, too, and the later half of them is not below this share of
#: the earlier one: a spike is over by then, or about to be.
ALARM_LASTS, RECOVERING = 10, 0.8
#: Consecutive steps that a gradient scaler skips with a loss that is not finite, after which the loss counts. Halving
#: its factor helps gradients that overflow, never the loss itself.
LEFT_OUT = 25
#: Steps whose losses are looked at together while they are calm, and what no loss of them is above, in units of the
#: smoothed loss.
TOGETHER, UNUSUAL = 5, 2.0


class ArrivedLoss(NamedTuple):
    """The loss of one step, as a number on this machine.

    Attributes:
        step: number of the optimizer step.
        loss: loss of the whole step.
        left_out: whether a gradient scaler skipped the update.
    """

    step: int
    loss: float
    left_out: bool = False


class Arrivals:
    """Brings losses from their device without waiting for it.

    On the CPU a loss is there at once. From a CUDA device it is copied to pinned memory behind the work of its step,
    and returned when the copy has arrived: one step later, or as soon as the device has caught up. After ``most`` steps
    the oldest is waited for. Other devices are read one step later.

    Args:
        most: how many losses may be on their way.

    Cost: a copy of one number a step.
    """

    def __init__(self, most: int = 10):
        self.most = most
        self._on_their_way: deque[tuple[int, Tensor, Any, bool]] = deque()
        self._free: list[Tensor] = []

    def take(
        self, step: int, loss: Tensor | float | None, *, left_out: bool = False, wait: bool = False
    ) -> list[ArrivedLoss]:
        """Add a loss, and return those that have arrived, oldest first.

        Args:
            step: number of the optimizer step.
            loss: loss of the whole step; None if it is not known.
            left_out: whether a gradient scaler skipped the update.
            wait: whether to wait until all have arrived.
        """
        if isinstance(loss, Tensor) and loss.is_cpu and not loss.ndim and not self._on_their_way:
            return [ArrivedLoss(step, loss.item(), left_out)]
        if loss is not None and not isinstance(loss, Tensor):
            self._on_their_way.append((step, torch.tensor(float(loss)), None, left_out))
        elif loss is not None:
            value = loss.detach()
            value = value if value.ndim == 0 else value.float().mean()
            if value.is_cpu and not self._on_their_way:
                return [ArrivedLoss(step, value.item(), left_out)]
            self._on_their_way.append((step, *self._sent(value), left_out))
        arrived = []
        while self._on_their_way:
            at, number, event, skipped = self._on_their_way[0]
            if not (wait or len(self._on_their_way) > self.most or self._arrived(number, event)):
                break
            if event is not None:
                event.synchronize()
            arrived.append(ArrivedLoss(at, float(number), skipped))
            self._on_their_way.popleft()
            if event is not None:
                self._free.append(number)
        return arrived

    def _arrived(self, number: Tensor, event: Any) -> bool:
        if event is not None:
            return bool(event.query())
        return number.device.type == "cpu" or len(self._on_their_way) > 1

    def _sent(self, loss: Tensor) -> tuple[Tensor, Any]:
        if loss.device.type != "cuda":
            return loss, None
        number = self._free.pop() if self._free else torch.empty((), dtype=torch.float32, pin_memory=True)
        number.copy_(loss.float(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(loss.device))
        return number, event


class LossRecord:
    """The loss of a run: at first, smoothed, at its least, now; and whether it is finite.

    Several may share a record, and add each step's loss: the first one counts.

    Attributes:
        count: finite losses that were seen.
        first: the loss of the first step, before any update; None before it.
        initial: the mean of the first 5.
        smoothed: the running mean over 30 steps, of the finite ones.
        least: the least smoothed loss.
        last: the last one, finite or not.
        last_step: its step.
        recent: the last 50 finite ones.
        mean: their mean.
        least_mean: the least mean, from the fifth loss on.
        level_step: the last step at which the smoothed loss had not risen.
        nonfinite_step: the first step at which it was not finite.
        is_calm: whether the last loss was finite, and neither the smoothed loss has risen nor the loss alarm is on.
        comparable: False where the losses of several players are summed: then only whether they are finite counts.

    Example:
        >>> record = LossRecord()
        >>> for step in range(100):
        ...     record.add(ArrivedLoss(step, 2.0 if step < 60 else 5.0))
        >>> record.risen, record.nonfinite_step, round(record.smoothed, 1)
        (True, None, 4.2)
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.count = 0
        self.first: float | None = None
        self.initial = self.smoothed = self.least = self.last = math.nan
        self.last_step = self.level_step = -1
        self.nonfinite_step: int | None = None
        self.comparable = True
        self.recent = array("d")  # in one piece: fifty objects would have to be fetched from memory at each step
        self.mean = self.least_mean = math.nan
        self._added, self.is_calm = -1, True
        self._low_step = -1  # the last one without the loss alarm
        self._left_out, self._is_negative, self._has_risen = 0, False, False
        self._start = math.nan
        self._scatter = self._level_scatter = 0.0  # variance of a step's loss about its mean, and while it was level
        self._least_count = 1  # of the losses in the least smoothed one
        self._high = self._far = 0.0  # shares of the last losses that are above what `fallen` and `lost` compare with

    def add(self, arrived: ArrivedLoss) -> None:
        """Add the loss of one step."""
        step, loss, left_out = arrived
        if step <= self._added:
            return
        self._added = step
        if not math.isfinite(loss):
            self.is_calm = False
            self._left_out = self._left_out + 1 if left_out else LEFT_OUT
            if self._left_out >= LEFT_OUT:
                self.last, self.last_step = loss, step
                self.nonfinite_step = step if self.nonfinite_step is None else self.nonfinite_step
            return
        self._left_out = 0
        count = self.count = self.count + 1
        smoothing = min(count, SMOOTHING)
        if count == 1:
            self.first = self.smoothed = self.least = loss
        else:  # differences of neighbours hold no trend
            change = loss - self.recent[-1]
            self._scatter += (0.5 * change * change - self._scatter) / min(count - 1, SMOOTHING)
        self.last, self.last_step = loss, step
        self.smoothed += (loss - self.smoothed) / smoothing
        if self.smoothed < self.least:
            self.least, self._least_count = self.smoothed, smoothing
        if count <= INITIAL:
            self.initial = self.smoothed
            # A rate far too high lifts the mean at once.
            self._start = self.initial if self.first is None else min(self.first, self.initial)
        self.recent.append(loss)
        del self.recent[:-ALARM_SMOOTHING]
        self.mean = sum(self.recent) / len(self.recent)
        if count >= INITIAL:
            self.least_mean = self.mean if count == INITIAL else min(self.least_mean, self.mean)
        self._is_negative |= loss < 0
        start, size = self._start, abs(self._start)
        self._high += ((loss > start - (1 - FALLEN) * size) - self._high) / smoothing
        has_exploded = self.comparable and loss > start + LOST * max(size, abs(self.least))
        self._far += (has_exploded - self._far) / min(count, LOST_STEPS)
        # A healthy run may begin by going up. A share of the initial loss means nothing where losses can be negative.
        is_memorised = self.least >= 0 and self.smoothed <= SHARE * self.initial
        rise = self.least + RISE * abs(self.least)
        self._has_risen = count >= SMOOTHING and self.smoothed > rise and not is_memorised
        if not (self._has_risen and self.comparable):
            self.level_step, self._level_scatter = step, self._scatter
        is_high = self.mean > ALARM_RISE * self.least_mean and self.mean > ALARM_SHARE * self.initial
        if not is_high:
            self._low_step = step
        self.is_calm = not self._has_risen and not is_high

    @property
    def finite(self) -> bool:
        """Whether the last loss was finite; True before the first."""
        return self.last_step < 0 or math.isfinite(self.last)

    @property
    def broke_off(self) -> bool:
        """Whether the last loss is not finite, though those before it had neither risen nor exploded."""
        was_level = not self.risen and not any(map(self.exploded, self.recent[-INITIAL:]))
        return not self.finite and self.count >= INITIAL and was_level

    @property
    def start(self) -> float:
        """The lower of the first loss and the mean of the first 5."""
        return self._start

    def exploded(self, loss: float) -> bool:
        """Return whether a loss is above the one at the start by more than twice the size of that."""
        return self.comparable and loss > self.start + LOST * max(abs(self.start), abs(self.least))

    @property
    def risen(self) -> bool:
        """Whether the smoothed loss is well above its least value, after the first 30 steps."""
        return self._has_risen and self.comparable

    @property
    def noise(self) -> float:
        """Standard deviation of a step's loss about its mean, from the differences of neighbours while it was level."""
        return math.sqrt(self._level_scatter)

    @property
    def has_clearly_risen(self) -> bool:
        """Whether the smoothed loss is above its least value by more than the noise of both explains."""
        return self.smoothed - self.least > self._unclear(self._least_count)

    @property
    def has_clearly_not_fallen(self) -> bool:
        """Whether the smoothed loss would, but for its noise, be 5 % below the one at the start if it had fallen."""
        return self.smoothed - self._start + (1 - FALLEN) * abs(self._start) > self._unclear(INITIAL)

    def _unclear(self, count: int) -> float:
        """Return the difference of the smoothed loss from a mean of so many losses that noise explains."""
        return CLEAR * self.noise * math.sqrt(1 / count + 1 / (2 * SMOOTHING - 1))

    @property
    def has_exploded(self) -> bool:
        """Whether the smoothed loss and the last two are above the one at the start by twice the size of that."""
        return self.count > 2 and all(map(self.exploded, (self.smoothed, *self.recent[-2:])))

    @property
    def lost(self) -> bool:
        """Whether it has risen far above the loss that the run began with, for long."""
        return self.risen and self.count >= LOST_STEPS and self._far > LOST_SHARE

    @property
    def forgotten(self) -> bool:
        """Whether it has risen by 40 % of what it had fallen since the start; any rise is, where it never fell."""
        return self.risen and self.smoothed - self.least > FORGOTTEN * max(self._start - self.least, 0.0)

    @property
    def alarmed(self) -> bool:
        """Whether the loss alarm is on: the mean of 50 above twice its least value and a quarter of the initial loss.

        Twice the least value means nothing where losses can be negative.
        """
        return self.mean > self._alarm_limit and self.comparable and not self._is_negative

    @property
    def alarm_lasts(self) -> bool:
        """Whether the loss alarm is on, and the last 10 losses are high as well and do not fall: it was no spike."""
        if not self.alarmed:
            return False
        last = self.recent[-ALARM_LASTS:]
        earlier, later = last[: len(last) // 2], last[len(last) // 2 :]
        is_falling = sum(later) / len(later) < RECOVERING * sum(earlier) / len(earlier)
        return self._mostly_above(self._alarm_limit) and not is_falling

    @property
    def relapsed(self) -> bool:
        """Whether the loss alarm is on for 10 steps, and most of their losses are as high as at the start.

        Nothing is left of what was learned. Momentum alone keeps the losses after one bad batch high for some steps.
        """
        if not self.alarmed or self.last_step - self._low_step < ALARM_LASTS:
            return False
        return self._mostly_above(self._start - (1 - FALLEN) * abs(self._start))

    def _mostly_above(self, limit: float) -> bool:
        """Return whether most of the last 10 losses are above a limit."""
        last = self.recent[-ALARM_LASTS:]
        return sorted(last)[(len(last) - 1) // 2] > limit

    @property
    def _alarm_limit(self) -> float:
        if self.count < INITIAL:
            return math.inf
        return max(ALARM_RISE * self.least_mean, ALARM_SHARE * self.initial)

    @property
    def fallen(self) -> bool | None:
        """Whether most of the last losses are 5 % below the one at the start; None before 60 steps.

        It is None, too, if losses are not comparable. A mean would be too high for long after a spike.
        """
        return None if self.count < SETTLED or not self.comparable else self._high < 0.5

    def state_dict(self) -> dict[str, Any]:
        """Return numbers only."""
        state = {name.lstrip("_"): value for name, value in vars(self).items() if not isinstance(value, Arrivals)}
        return state | {"recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; what is missing is as in a new run."""
        self.reset()
        for name in vars(self):
            if name.lstrip("_") in state:
                setattr(self, name, state[name.lstrip("_")])
        self.recent = array("d", self.recent)


class LossWatch(LossRecord):
    """A record of losses that may still be on their device, and are looked at a few at a time while they are calm.

    From the sixtieth step on, losses of a calm record wait for every fifth step. One that is not finite, or above twice
    the smoothed loss, is looked at at once, with those that wait; so is any loss as long as the record is not calm.

    Attributes:
        waiting: steps and losses that are not looked at yet, and whether they were left out, as in `ArrivedLoss`.
        usual: what is above it does not wait.
    """

    def reset(self) -> None:
        super().reset()
        self._arrivals = Arrivals()
        self.waiting: list[tuple[int, float, bool]] = []
        self.usual = -math.inf

    def saw(
        self, step: int, loss: Tensor | float | None, *, left_out: bool = False, wait: bool = False
    ) -> Sequence[ArrivedLoss]:
        """Add the loss of a step, and return those that are looked at now; see `Arrivals` for the arguments.

        A loop calls it at the end of every step; it does not wait for the device, except with ``wait``.
        """
        arrived = self._arrivals.take(step, loss, left_out=left_out, wait=wait)
        self.waiting += arrived
        are_usual = all(-sys.float_info.max <= latest.loss <= self.usual for latest in arrived)
        return () if are_usual and step % TOGETHER and not wait else self.settle()

    def settle(self) -> list[ArrivedLoss]:
        """Look at the losses that wait, and return them."""
        settled, self.waiting = [ArrivedLoss(*each) for each in self.waiting], []
        for arrived in settled:
            self.add(arrived)
        is_settled = self.is_calm and self.count >= SETTLED
        self.usual = UNUSUAL * abs(self.smoothed) if is_settled else -math.inf
        return settled

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.settle()

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {name: value for name, value in super().state_dict().items() if name not in ("waiting", "usual")}
