"""Scalars of every optimizer step: what quantities of a time series look at."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import whole
from lsp_callbacks.step.learning_rate_sums import Rates
from lsp_callbacks.step.module_output import FinalState
from lsp_callbacks.step.ranks import Ranks

#: A function of the module, cheap and without side effects, called at every step. Parameters called ``loss`` and
#: ``state`` are given the step's loss and its final state.
Energy = Callable[..., Tensor]
SEEN = ("loss", "state")


def asked(name: str, energy: Energy, state: str | None) -> frozenset[str]:
    """Which of `SEEN` an energy takes beside the module, by the names of its parameters.

    Args:
        name: of the energy.
        energy: the function.
        state: name of the module whose output is the state; None where it is not known.

    Raises:
        ValueError: for a function without a parameter, one with further ones that have neither these names nor
            defaults, or one that asks for a state that is not known.
    """
    try:
        parameters = list(inspect.signature(energy).parameters.values())
    except (TypeError, ValueError):  # written in C: it takes the module
        return frozenset()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    own = [p for p in named if p.kind is not p.KEYWORD_ONLY][:1]
    if (not own and len(named) == len(parameters)) or any(p.name in SEEN for p in own):
        raise ValueError(
            f"energies={{{name!r}: ...}}: its first parameter is the module: def {name}(module, loss, state)"
        )
    rest = [p for p in named if p not in own]
    for p in rest:
        if (p.name not in SEEN and p.default is p.empty) or (p.name in SEEN and p.kind is p.POSITIONAL_ONLY):
            raise ValueError(
                f"energies={{{name!r}: ...}}: nothing is known of its parameter {p.name!r}: beside the module it may "
                "take 'loss' and 'state', by these names; give others a default, or bind them with functools.partial"
            )
    found = frozenset(p.name for p in rest if p.name in SEEN)
    if "state" in found and state is None:
        raise ValueError(
            f"energies={{{name!r}: ...}} asks for the state: name the module whose output that is, state='head', or '' "
            "for the root"
        )
    return found


class Trace:
    """The loss, the learning rate and named energies of the last ``length`` consecutive optimizer steps.

    All are those before the update: ``E_t`` is the energy of the parameters at which the loss and the gradient of step
    t were taken. They stay on their device until `read`, so that no step waits for it. Where a step is missing the
    record begins anew.

    Args:
        length: how many steps are kept.
        energies: by name, called with the module under ``no_grad``; they must draw no random number and change nothing.
            Those with a parameter ``loss`` are given the step's; those with ``state`` the output of a module, once for
            each micro-batch, and the mean, with the numbers of samples as weights, is recorded.
        state: name of that module, see `FinalState`; "" is the root. None sees none.

    Attributes:
        rates: what is known of the learning rates of all recorded steps, also of those that are not kept.
        sparse: whether two steps in a row came alone: then no series comes about.
        failed: energies that raised, and what; they are NaN from then on.

    Raises:
        ValueError: for a length below 1, an energy called "loss" or "lr", or one that asks for what is not known.

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
        self.length, self.energies = length, dict(energies or {})
        if taken := {"loss", "lr"} & self.energies.keys():
            raise ValueError(f"energies={sorted(taken)}: these are recorded anyway, give another name")
        self.final = None if state is None else FinalState(state)
        self._asked = {name: asked(name, energy, state) for name, energy in self.energies.items()}
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.close()
        self.rates = Rates()
        self.failed: dict[str, str] = {}
        self._off: set[str] = set()
        self._blind = False
        #: What all ranks knew at the last `read`, and the step after it.
        self._joined: tuple[int | None, dict[str, Tensor]] = (None, {})
        self._rings: dict[str, Tensor] = {}
        self._count = 0
        self._next: int | None = None
        self.sparse = False

    def begin(self, module: nn.Module, *, first: bool = True) -> None:
        """A micro-batch whose forward pass comes next; needed where an energy asks for the state.

        Args:
            module: that is trained, in training mode.
            first: of a step.

        Raises:
            Unmeasurable: if the module whose output is the state is not there.
        """
        if self.final is not None and not self._blind:
            self.final.begin(module, first=first)

    def drop(self, energies: Iterable[str], *, state: bool) -> None:
        """Nobody asks for these any more: they are NaN from now on, and if ``state``, the final state is not seen."""
        self._off |= set(energies)
        if state:
            self.close()
            self._blind = True

    def close(self) -> None:
        """Takes the hook away, where one looks at the state: nothing more is recorded of this step."""
        if self.final is not None:
            self.final.close()

    def __len__(self) -> int:
        return min(self._count, self.length)

    def record(
        self,
        step: int,
        loss: Tensor | None,
        *,
        lr: float = math.nan,
        module: nn.Module | None = None,
        previous: int | None = None,
    ) -> None:
        """One more step, before its update; a step that is recorded already is passed over.

        Args:
            step: number of the optimizer step.
            loss: of the whole step; None where nobody saw it.
            lr: the rate that the step uses.
            module: for the energies.
            previous: the last step before it that moved anything; None is ``step - 1``.

        Raises:
            ValueError: if the loss or an energy is not one number.

        Cost: one copy of a number for each, and the energies.
        """
        if self._next is not None and step == self._next - 1:
            return
        with torch.no_grad():
            found: dict[str, Any] = {"loss": math.nan if loss is None else loss, "lr": lr}
            for name in self.energies:
                found[name] = self._energy(name, module, loss)
        self.close()
        values = {
            name: value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
            for name, value in found.items()
        }
        for name, value in values.items():
            if value.numel() != 1:
                raise ValueError(f"{name} of step {step} has shape {tuple(value.shape)}: give one number")
        if (step if previous is None else previous + 1) != self._next:
            self.sparse, self._count = self._count == 1, 0
        for name, value in values.items():
            self._ring(name, value)[self._count % self.length] = value.reshape(())
        self._next, self._count = step + 1, self._count + 1
        if self._count == 2:
            self.sparse = False
        self.rates.add(step, lr)

    def _energy(self, name: str, module: nn.Module | None, loss: Tensor | None) -> Any:
        """NaN once it has raised: it is not asked again, and the other series go on."""
        wanted = self._asked[name]
        if name in self.failed or name in self._off or ("loss" in wanted and loss is None):
            return math.nan
        settings = {"loss": loss.detach()} if "loss" in wanted and loss is not None else {}
        try:
            if "state" not in wanted or self.final is None:
                return self.energies[name](module, **settings)
            states = self.final.states()
            parts = [self.energies[name](module, state=state, **settings) for state in states]
            if len(parts) == 1:
                return parts[0]
            return sum(len(state) * part for state, part in zip(states, parts)) / sum(map(len, states))
        except Exception as error:  # whatever the user's function raises
            self.failed[name] = f"{type(error).__name__}: {error}"
            return math.nan

    def _ring(self, name: str, like: Tensor) -> Tensor:
        ring = self._rings.get(name)
        if ring is None or ring.device != like.device:  # of a checkpoint: the first copy would wait for the device
            dtype = torch.promote_types(like.dtype, torch.float32)
            kept = torch.full((self.length,), math.nan, dtype=dtype) if ring is None else ring
            ring = self._rings[name] = kept.to(like.device, dtype)
        return ring

    def read(self, ranks: Ranks | None = None) -> dict[str, Tensor]:
        """The recorded series by name, oldest first, in float64 on the CPU: "loss", "lr" and the energies.

        Args:
            ranks: the processes that took the steps together: the means of theirs, by one all-reduce. All come here.
        """
        series = {name: self._ordered(ring) for name, ring in self._rings.items()}
        if ranks is None or ranks.world == 1 or not series:
            return series
        (mean,) = ranks.mean(lambda: (torch.stack(list(series.values())).to(ranks.device),), "the trace")
        joined = dict(zip(series, mean.cpu()))
        self._joined = (self._next, joined)
        return joined

    def _ordered(self, ring: Tensor) -> Tensor:
        start = self._count % self.length if self._count > self.length else 0
        return ring.roll(-start)[: len(self)].double().cpu()

    def state_dict(self, *, joined: bool = False) -> dict[str, Any]:
        """Numbers only.

        Args:
            joined: whether the steps are those of several ranks. Each has a series of its own, and a checkpoint may be
                written by one alone; so it holds what all knew at the last `read`, which a resumed run goes on with if
                no step was taken since.
        """
        following, series = self._joined if joined else (self._next, self.read())
        return {
            "next": following,
            "series": series,
            "state": None if self.final is None else self.final.name,
            "failed": dict(self.failed),
            "rates": self.rates.state_dict(),
            "sparse": self.sparse,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; a series of other energies begins anew, with a warning."""
        self.reset()
        self.rates.load_state_dict(state["rates"])
        if not state["series"]:
            return
        own = (None if self.final is None else self.final.name, {"loss", "lr", *self.energies})
        found = (state.get("state"), {*state["series"]})
        if own != found:
            warnings.warn(
                f"lsp_callbacks: the checkpoint holds a series of {_told(*found)}, now recorded are {_told(*own)}: all "
                "begin anew",
                stacklevel=2,
            )
            return
        self._next, self.sparse = state["next"], state["sparse"]
        self._joined, self.failed = (state["next"], state["series"]), dict(state.get("failed", {}))
        for name, series in state["series"].items():
            kept = series[-self.length :]
            self._count = len(kept)
            ring = self._rings[name] = torch.full((self.length,), math.nan, dtype=torch.float64)
            ring[: len(kept)] = kept


def _told(state: str | None, names: set[str]) -> str:
    return ", ".join(sorted(names)) + f" with state={state!r}" * (state is not None)
