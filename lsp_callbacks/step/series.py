"""Loss, learning rate and energies of the last optimizer steps: what quantities of a time series look at."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import whole
from lsp_callbacks.step.energies import Energies, Energy
from lsp_callbacks.step.learning_rate_sums import LearningRateSums
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.ring_buffer import RingBuffer


class Trace:
    """The loss, the learning rate and named energies of the last ``length`` consecutive optimizer steps.

    All are those before the update: ``E_t`` is the energy of the parameters at which the loss and the gradient of step
    t were taken. They stay on their device until `read`, so that no step waits for it. If a step is missing, the series
    begin anew.

    Args:
        length: how many steps are kept.
        energies: by name, called with the module under ``no_grad``; they must draw no random number and change nothing.
            Those with a parameter ``loss`` are given the step's; those with ``state`` the output of a module, once for
            each micro-batch, and the mean, with the numbers of samples as weights, is recorded.
        state: name of that module, see `FinalState`; "" is the root. None sees none.

    Attributes:
        rates: what is known of the learning rates of all recorded steps, also of those that are not kept.
        sparse: whether two steps in a row came alone: then there will be no series.

    Raises:
        ValueError: for a length below 1, an energy called "loss" or "lr", or one that takes what is not known.

    Example:
        >>> import torch
        >>> from lsp_callbacks import Trace
        >>> trace = Trace(length=2)
        >>> for step in range(3):
        ...     trace.record(step, torch.tensor(0.5**step), lr=0.1)
        >>> trace.read()["loss"].tolist()
        [0.5, 0.25]
    """

    def __init__(self, length: int, energies: Mapping[str, Energy] | None = None, *, state: str | None = None):
        whole("length", length, 1, instead=" of steps")
        if taken := {"loss", "lr"} & {*(energies or {})}:
            raise ValueError(f"energies={sorted(taken)}: these are recorded anyway, give another name")
        self._energies, self._values = Energies(energies or {}, state), RingBuffer(length)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._energies.reset()
        self._values.reset()
        self.rates = LearningRateSums()
        #: What all ranks knew at the last `read`, and the step after it.
        self._joined: tuple[int | None, dict[str, Tensor]] = (None, {})
        self._next: int | None = None
        self.sparse = False

    @property
    def energies(self) -> dict[str, Energy]:
        """The energies by name."""
        return self._energies.energies

    @property
    def failed(self) -> dict[str, str]:
        """Energies that raised, and what; they are NaN from then on."""
        return self._energies.failed

    def __len__(self) -> int:
        return len(self._values)

    def begin(self, module: nn.Module, *, first: bool = True) -> None:
        """Prepare for the forward pass of a micro-batch; needed if an energy takes the state.

        Args:
            module: that is trained, in training mode.
            first: whether it is the first micro-batch of a step.

        Raises:
            Unmeasurable: if the module whose output is the state is not there.
        """
        self._energies.begin(module, first=first)

    def drop(self, energies: Iterable[str], *, state: bool) -> None:
        """Evaluate some energies no more: they are NaN from now on.

        Args:
            energies: their names.
            state: whether no energy takes the final state any more.
        """
        self._energies.drop(energies, state=state)

    def close(self) -> None:
        """Remove the hook that looks at the state: nothing more is recorded of this step."""
        self._energies.close()

    def record(
        self,
        step: int,
        loss: Tensor | None,
        *,
        lr: float = math.nan,
        module: nn.Module | None = None,
        previous: int | None = None,
    ) -> None:
        """Record one more step, before its update; a step that is recorded already is ignored.

        Args:
            step: number of the optimizer step.
            loss: of the whole step; None if it is not known.
            lr: the learning rate that the step uses.
            module: for the energies.
            previous: the last step before it that moved anything; None is ``step - 1``.

        Raises:
            ValueError: if the loss or an energy is not one number.

        Cost: one copy of a number for each, and the energies.
        """
        if self._next is not None and step == self._next - 1:
            return
        with torch.no_grad():
            energies = self._energies.values(module, loss)
        self.close()
        values = {
            name: value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
            for name, value in {"loss": math.nan if loss is None else loss, "lr": lr, **energies}.items()
        }
        for name, value in values.items():
            if value.numel() != 1:
                raise ValueError(f"{name} of step {step} has shape {tuple(value.shape)}: give one number")
        if (step if previous is None else previous + 1) != self._next:
            self.sparse = self._values.count == 1
            self._values.restart()
        self._values.append(values)
        self._next = step + 1
        if self._values.count == 2:
            self.sparse = False
        self.rates.add(step, lr)

    def read(self, ranks: Ranks | None = None) -> dict[str, Tensor]:
        """Return the series by name, oldest value first, in float64 on the CPU: "loss", "lr" and the energies.

        Args:
            ranks: the processes that took the steps together: the means of theirs, by one all-reduce. All call this.
        """
        series = self._values.read()
        if ranks is None or ranks.world == 1 or not series:
            return series
        (mean,) = ranks.mean(lambda: (torch.stack(list(series.values())).to(ranks.device),), "the trace")
        joined = dict(zip(series, mean.cpu()))
        self._joined = (self._next, joined)
        return joined

    def state_dict(self, *, joined: bool = False) -> dict[str, Any]:
        """Return numbers only.

        Args:
            joined: whether the steps are those of several ranks. Each has series of its own, and a checkpoint may be
                written by one alone; so it holds what all knew at the last `read`, which a resumed run continues if
                no step was taken since.
        """
        following, series = self._joined if joined else (self._next, self.read())
        return {
            "next": following,
            "series": series,
            "state": self._state,
            "failed": dict(self.failed),
            "rates": self.rates.state_dict(),
            "sparse": self.sparse,
        }

    @property
    def _state(self) -> str | None:
        return None if self._energies.final is None else self._energies.final.name

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; series of other energies begin anew, with a warning."""
        self.reset()
        self.rates.load_state_dict(state["rates"])
        if not state["series"]:
            return
        recorded = (self._state, {"loss", "lr", *self.energies})
        saved = (state.get("state"), {*state["series"]})
        if recorded != saved:
            warnings.warn(
                f"lsp_callbacks: the checkpoint holds a series of {_listed(*saved)}, now recorded are "
                f"{_listed(*recorded)}: all begin anew",
                stacklevel=2,
            )
            return
        self._next, self.sparse = state["next"], state["sparse"]
        self._joined = (state["next"], state["series"])
        self._energies.failed = dict(state.get("failed", {}))
        self._values.load(state["series"])


def _listed(state: str | None, names: set[str]) -> str:
    return ", ".join(sorted(names)) + f" with state={state!r}" * (state is not None)
