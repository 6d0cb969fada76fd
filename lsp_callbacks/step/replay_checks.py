"""Replays of a step at its unchanged parameters: they must show the step's own loss and gradient."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import tree_map
from lsp_callbacks.autograd.graph import Graph, joined, read
from lsp_callbacks.autograd.stop_gradients import StopGradients
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.step.compared_gradients import check_gradient, dense, factor
from lsp_callbacks.step.flat import loss_and_gradient

if TYPE_CHECKING:
    from lsp_callbacks.step.snapshot import Snapshot


#: Relative difference of a loss of compiled code from that of the same operations one by one.
COMPILED = 1e-4
#: Steps in a row that must have been replayed to the last bit, before a step is not replayed for its graph alone; and
#: how many such steps may follow each other.
PASSED, SELDOM = 3, 8


@dataclass(frozen=True)
class Call:
    """What a module was called with, and what it returned; tensors only if `RunContext.captures_inputs` says so."""

    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Verified:
    """What the verified replays of one step have shown so far.

    Attributes:
        graph: the autograd graph of the loss, joined over the ranks; None before it was asked for.
        loss: whether a replay was found to have the step's own loss.
        calls: the first call of each module, by name; None before a replay that recorded them.
        gradient: whether the step's gradient was found to be that of its loss.
    """

    graph: Graph | None = None
    calls: dict[str, Call] | None = None
    loss: bool = False
    gradient: bool = False


@dataclass
class KnownGraph:
    """The graph of a run's loss, as verified replays have shown it.

    A replay of a step that is to show its graph alone costs a forward pass, and shows the same as at the step before:
    the graph is a property of the code. It is left out where the graph that the step itself has differentiated has the
    same properties as that of the steps that were replayed. What is measured with such a graph checks each of its
    replays by itself: a difference of gradients against the loss and the gradient of the step, the first exact product
    against both; so a ``training_step`` that begins to depend on something outside of it is found there.

    Attributes:
        of_step: properties of the graph that the last verified step itself has differentiated.
        of_replay: those of its replay, which shows what re-entrant checkpoints and the like hide.
        passed: verified steps in a row.
        used: steps that were not replayed since the last one that was.
    """

    of_step: Graph | None = None
    of_replay: Graph | None = None
    passed: int = 0
    used: int = 0

    def expected(self, of_step: Graph | None) -> Graph | None:
        """Return the graph of a step's replay; None where that has to be replayed.

        Args:
            of_step: properties of the graph that the step itself has differentiated; None if they were not seen.
        """
        if of_step is None or of_step != self.of_step or self.passed < PASSED or self.used >= SELDOM:
            return None
        self.used += 1
        return self.of_replay

    def verified(self, of_step: Graph | None, of_replay: Graph) -> None:
        """Note a step whose replay was right."""
        is_same = of_step == self.of_step and of_replay == self.of_replay
        self.passed = self.passed + 1 if is_same else 1
        self.of_step, self.of_replay, self.used = of_step, of_replay, 0

    def failed(self) -> None:
        """Note a step whose replay was wrong, or failed."""
        self.of_step, self.of_replay, self.passed, self.used = None, None, 0, 0


def verified_graph(snapshot: Snapshot) -> Graph:
    """Return what the autograd graph of the replayed loss shows; one replay a step at most, see `KnownGraph`.

    Whoever goes on to replay the step, and does not compare what that gives with the step's own loss or gradient, calls
    `verify`.

    Raises:
        Unmeasurable: if the replayed loss is not the step's.
    """
    if snapshot.verified.graph is None:
        expected = snapshot.run.known_graph.expected(snapshot.own_graph)
        snapshot.verified.graph = _verify(snapshot) if expected is None else expected
    return snapshot.verified.graph


def verify(snapshot: Snapshot) -> None:
    """Check once a step that a replay at the unchanged parameters gives the step's own loss.

    Raises:
        Unmeasurable: if it does not.
    """
    if not snapshot.verified.loss:
        snapshot.verified.graph = _verify(snapshot)


def verified_calls(snapshot: Snapshot) -> dict[str, Call]:
    """Return the first call of every module in a verified replay; one replay a step.

    Raises:
        Unmeasurable: if the replayed loss is not the step's.
    """
    if snapshot.verified.calls is None:
        with recording_calls(snapshot.module, snapshot.run.captures_inputs) as calls:
            snapshot.verified.graph = _verify(snapshot)
        snapshot.verified.calls = calls
    return snapshot.verified.calls


def calls_with_inputs(snapshot: Snapshot, captures_inputs: Callable[[str, nn.Module], bool]) -> dict[str, Call]:
    """Return the calls of a step with the inputs of some modules, by one more replay where these were not kept.

    Args:
        snapshot: the step.
        captures_inputs: of which modules, see `recording_calls`.

    Raises:
        Unmeasurable: if the replayed loss is not the step's.
    """
    modules = dict(snapshot.module.named_modules())
    wanted = [call for name, call in snapshot.calls.items() if captures_inputs(name, modules[name])]
    if all(call.args or call.kwargs for call in wanted):
        return snapshot.calls
    return verified_calls(replace(snapshot, run=replace(snapshot.run, captures_inputs=captures_inputs)))


@contextlib.contextmanager
def recording_calls(module: nn.Module, captures_inputs: Callable[[str, nn.Module], bool]) -> Iterator[dict[str, Call]]:
    """Record the first call of every module that is made inside.

    Args:
        module: all modules within it are recorded.
        captures_inputs: whether the inputs of one are kept in full, from its name and itself.
    """
    calls: dict[str, Call] = {}
    with contextlib.ExitStack() as stack:
        for name, part in module.named_modules():
            if isinstance(part, torch.jit.ScriptModule):  # takes no hooks
                continue
            hook = _Recorder(name, calls, captures_inputs(name, part))
            # `always_call` is off: a forward pass that raised has nothing to record.
            stack.callback(part.register_forward_pre_hook(hook.before, with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(hook.after).remove)
        yield calls


def captures_nothing(name: str, module: nn.Module) -> bool:
    """Return False: no quantity wants the inputs of this module."""
    return False


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


def _verify(snapshot: Snapshot, losses: list[Tensor] | None = None) -> Graph:
    """Return the graph of a replay that has the step's own loss; the replayed loss of this rank goes to ``losses``.

    Where the graph is known, see `KnownGraph`, the loss alone is looked at.
    """
    known_graph = snapshot.run.known_graph
    expected = known_graph.expected(snapshot.own_graph)

    def rank_graph() -> Graph:
        # With a graph, as in training: some kernels are chosen by whether a gradient is wanted. Hooks do not fire
        # inside compiled code, so that runs eagerly and agrees up to rounding only.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            with StopGradients() if expected is None else contextlib.nullcontext() as stopped:
                loss = snapshot.replay()
            check_loss(snapshot, loss)
        if losses is not None:
            losses.append(loss)
        if expected is not None or stopped is None:
            return expected or read(loss)
        return replace(read(loss), stopped=tuple(sorted(stopped.names)))

    try:
        graph = joined(snapshot.run.ranks.gather(rank_graph, "the replay"))
    except Exception:
        known_graph.failed()
        raise
    if expected is None:
        known_graph.verified(snapshot.own_graph, graph)
    snapshot.verified.loss = True
    return graph


def check_loss(snapshot: Snapshot, replayed: Tensor, *, tolerance: float = 0.0) -> None:
    """Refuse a replay whose loss is not the step's own, up to rounding where the step runs compiled code.

    Args:
        snapshot: the step; without a loss of its own nothing is checked.
        replayed: the loss of a replay at the unchanged parameters.
        tolerance: relative, if this path needs more than the snapshot's own.

    Raises:
        Unmeasurable: if they differ, or the step's loss is not finite.
    """
    if snapshot.loss is None:
        return
    loss, again = snapshot.loss.detach().double().cpu(), replayed.detach().double().cpu()
    if not bool(torch.isfinite(loss)):
        raise Unmeasurable(f"the loss of step {snapshot.step} is not finite")
    difference = (loss - again).abs()
    if not bool(difference <= max(tolerance, snapshot.tolerance) * loss.abs()):
        if snapshot.compiled and bool(difference <= COMPILED * loss.abs()):
            return
        if (name := snapshot.run.loss_name) is not None:
            raise Unmeasurable(
                f"the loss could not be replayed: at step {snapshot.step} {name} gives {again.item():.9g}, "
                f"where the step itself differentiates {loss.item():.9g}{factor(loss / again)}"
            )
        raise Unmeasurable(
            f"the loss could not be replayed: step {snapshot.step} had {loss.item():.9g}, its replay "
            f"{again.item():.9g}. "
            "Something outside the batch, the module and the random state changes it (a hook of yours, a "
            "global variable): pass loss_fn=... which computes it from (module, batch)"
        )


def replayed_gradient(snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """Return the loss of one replay, of this rank alone, and its flat gradient, the mean over the ranks; unchecked.

    Cost: one gradient.
    """
    parameters = list(snapshot.parameters.values())
    losses: list[Tensor] = []

    def rank_gradient() -> tuple[Tensor]:
        loss, gradient = loss_and_gradient(snapshot.replay, parameters)
        losses.append(loss)
        return (gradient,)

    (gradient,) = _mean_gradient(snapshot, rank_gradient)
    return losses[0].detach(), gradient


def _mean_gradient(snapshot: Snapshot, of_rank: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return the mean of the ranks' gradients; with shards each rank's part is of the mean already."""
    ranks = snapshot.run.ranks
    return (ranks.mean if snapshot.run.shards is None else ranks.each)(of_rank, "the gradient")


def verify_gradient(snapshot: Snapshot) -> None:
    """Check once a step that its gradient is that of its replayed loss, and that this is the step's own, as `verify`.

    Raises:
        Unmeasurable: see `verify` and `check_gradient`.

    Cost: one gradient.
    """
    if not snapshot.verified.gradient:
        parameters = list(snapshot.parameters.values())
        losses: list[Tensor] = []
        if snapshot.loss is None or snapshot.verified.loss:
            full = snapshot.graph.full
        else:
            snapshot.verified.graph = _verify(snapshot, losses)
            full = snapshot.verified.graph.full

        def rank_gradient() -> tuple[Tensor, ...]:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                loss = losses.pop() if losses else snapshot.replay()
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            return tuple(dense(g, p) for g, p in zip(gradients, parameters))

        # Parameter by parameter: flat vectors would be as large as the weights, and there may be little room.
        check_gradient(snapshot, _mean_gradient(snapshot, rank_gradient), tolerance=1e-2 if full else 0.1)
        snapshot.verified.gradient = True


def without_step_values(snapshot: Snapshot) -> Snapshot:
    """Return the step for replays at other parameters, where its own loss and gradient do not hold.

    What its autograd graph shows is taken over: it is a property of the code, not of the parameters.
    """
    other = replace(snapshot, loss=None, gradient=None, own_graph=None)
    other.verified.graph = snapshot.graph
    return other


class _Recorder:
    """The hooks of one module, which note its first call."""

    def __init__(self, name: str, calls: dict[str, Call], captures_inputs: bool):
        self.name, self.calls, self.captures_inputs = name, calls, captures_inputs

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.name in self.calls:
            return
        # Cloned, as the module may work in place on its input.
        inputs = tree_map(_detached, (args, kwargs)) if self.captures_inputs else ((), {})
        self.calls[self.name] = Call(_shape((*args, *kwargs.values())), None, *inputs)

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        call = self.calls[self.name]
        if call.output_shape is None:
            outputs = output if isinstance(output, tuple | list) else (output,)
            self.calls[self.name] = Call(call.input_shape, _shape(outputs), call.args, call.kwargs)


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _shape(values: Any) -> tuple[int, ...] | None:
    return next((tuple(v.shape) for v in values if isinstance(v, Tensor)), None)
