"""What is kept from a step until its update was made, to see the loss of its own batch along that update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.shifted_parameters import loss_rounding, restored, shift
from lsp_callbacks.autograd.side_effects import RandomState
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.step.flat import largest_learning_rate
from lsp_callbacks.step.snapshot import OtherLoss, Snapshot

#: Numbers of float32 in an inner product whose rounding is nothing beside that of the losses.
PIECE = 65536


class LossChange(NamedTuple):
    """What a multiple of an update did to a loss; float64, means over the ranks.

    Attributes:
        change: ``L(theta + s u) - L(theta)``.
        rounding: size of the error of ``change`` by rounding.
    """

    change: Tensor
    rounding: Tensor


#: From a multiple of the update to what it does to a loss.
Along = Callable[[float], LossChange]


class TakenStep:
    """A step whose update comes next: its loss, gradient, parameters and replay.

    After the update u, which is what the parameters have moved by, whatever moved them, losses are computed at
    ``theta + s u``: by forward passes alone, with the random masks and the buffers of the step. The parameters are put
    back from a copy, to the last bit.

    The `Snapshot` itself is not kept, as it may hold autograd graphs.

    Args:
        snapshot: the step, before its update, or with what it began with.
        check: whether, after the update, a replay at the parameters before it is compared with the step's loss.

    Attributes:
        step, run: of the snapshot.
        lr: the largest learning rate of the optimizer's parameter groups; NaN where it has none.
        is_exact: whether a replay has the step's own loss to the last bit.
        other_loss: from a loss of the module to its replay, see `Snapshot.other_loss`.

    Cost: none. Memory: copies of parameters and gradient.
    """

    def __init__(self, snapshot: Snapshot, *, check: bool = False):
        self.step, self.run = snapshot.step, snapshot.run
        self.other_loss = snapshot.other_loss or partial(_of_module, snapshot.module)
        self.lr = math.nan if snapshot.optimizer is None else largest_learning_rate(snapshot.optimizer)
        self.is_exact = snapshot.tolerance == 0
        self._check, self._replay, self._tolerance = check, snapshot.replay, snapshot.tolerance
        self._names, self._parameters = list(snapshot.parameters), list(snapshot.parameters.values())
        if snapshot.before is None:
            self._loss, self._before = snapshot.loss, [p.detach().clone() for p in self._parameters]
        else:
            self._loss, self._before = snapshot.before.loss, [snapshot.before.weights[name] for name in self._names]
        #: Without one the slope is not known.
        self._gradient: list[Tensor | None] | None = None
        if (gradient := snapshot.gradient) is not None:
            self._gradient = [
                None if gradient[name] is None else _copied(gradient[name]) for name in snapshot.parameters
            ]

    def has_moved(self) -> bool:
        """Return whether the update has moved any parameter."""
        pairs = zip(self._parameters, self._before)
        return self.run.ranks.any(lambda: any(not torch.equal(p.detach(), before) for p, before in pairs), "the update")

    def slope(self) -> Tensor | None:
        """Return ``g . u`` once the update was made, and let go of the gradient; None where that is not known."""
        gradient, self._gradient = self._gradient, None
        if gradient is None:
            return None
        parts = {
            name: _slope(g, p.detach(), before)
            for name, g, p, before in zip(self._names, gradient, self._parameters, self._before)
            if g is not None
        }
        if self.run.shards is not None:
            return self.run.shards.total(parts, "the slope")
        return torch.stack(list(parts.values())).sum() if parts else torch.zeros((), dtype=torch.float64)

    @contextlib.contextmanager
    def along(self, replay: Callable[[], Tensor] | None = None, *, replays_before: bool = False) -> Iterator[Along]:
        """Give the change of a loss from before the update to a multiple of it; afterwards nothing has moved.

        Args:
            replay: of another loss at the current parameters; None is the step's own.
            replays_before: whether the step's loss before the update is replayed, too, so that differences are free of
                what replays differ by from the step; it is where the step's loss is not known.

        Raises:
            Unmeasurable: with a check, if the loss at the parameters before the update is no more that of the step.

        Cost: one forward pass for each multiple, with its graph, so that it takes the same path as in training; one
        more where the loss before is replayed or checked. Memory: a copy of the parameters, if they are moved.
        """
        with contextlib.ExitStack() as stack:
            after: list[Tensor] = []

            def loss(multiple: float) -> tuple[Tensor, float]:
                if multiple != 1 and not after:
                    after.extend(stack.enter_context(restored(self._parameters)))
                if after and multiple == 1:
                    shift(self._parameters, after, after, 0.0)
                elif after and multiple == 0:
                    shift(self._parameters, self._before, self._before, 0.0)
                elif after:
                    shift(self._parameters, self._before, (a - b for a, b in zip(after, self._before)), multiple)
                with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                    value = (self._replay if replay is None else replay)()
                    return value.detach().double(), loss_rounding(value)

            before: list[tuple[Tensor, float]] = []

            def rank_change(multiple: float) -> tuple[Tensor, Tensor]:
                if not before:
                    before.append(self._loss_before(loss, is_own=replay is None, is_replayed=replays_before))
                (old, tolerance), (new, rounding) = before[0], loss(multiple)
                return new - old, rounding * new.abs() + (rounding + tolerance) * old.abs()

            yield lambda s: LossChange(*self.run.ranks.mean(lambda: rank_change(s), "the loss along the update"))

    def _loss_before(
        self, loss: Callable[[float], tuple[Tensor, float]], *, is_own: bool, is_replayed: bool
    ) -> tuple[Tensor, float]:
        """Return a loss at the parameters before the update, and by how much its replays differ from it, relative."""
        if not is_own or self._loss is None:
            return loss(0.0)[0], 0.0
        before = self._loss.detach().double()
        if not (self._check or is_replayed):
            return before, self._tolerance
        again, rounding = loss(0.0)
        if not bool((again - before).abs() <= (rounding + self._tolerance) * before.abs()):
            raise Unmeasurable(
                f"the loss of step {self.step} is another one after its update, at the same parameters: something "
                "outside the batch, the module and the random state changes it from step to step (a counter, a "
                "global variable): keep it in the module"
            )
        return (again, 0.0) if is_replayed else (before, self._tolerance)


def _slope(gradient: Tensor, after: Tensor, before: Tensor) -> Tensor:
    """Return ``g . (after - before)`` in float64, piece by piece: there may be no room for a difference of weights."""
    pieces = zip(*(x.reshape(-1).split(PIECE) for x in (gradient, after, before)))
    parts = [_dot(g, p - p_before) for g, p, p_before in pieces]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=gradient.device)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return an inner product in float64; of at most `PIECE` float32 numbers without longer copies."""
    if a.dtype is torch.float32 and b.dtype is torch.float32:
        return torch.dot(a, b).double()
    return (a.double() * b.double()).sum()


def _copied(gradient: Tensor | None) -> Tensor | None:
    """Return a copy: the step clips gradients in place, and sets them to 0. That of a sparse embedding is dense."""
    if gradient is None:
        return None
    return gradient.detach().clone() if gradient.layout is torch.strided else gradient.detach().to_dense()


def _of_module(module: nn.Module, source: OtherLoss) -> Callable[[], Tensor]:
    """Return the replay of another loss of a module where the training loop makes none."""
    if not callable(source):
        raise Unmeasurable("the loss of other batches is not known here: give a function (module) -> loss")
    random_state = RandomState()

    def replay() -> Tensor:
        random_state.restore()
        try:
            return source(module)
        finally:
            random_state.restore()

    return replay
