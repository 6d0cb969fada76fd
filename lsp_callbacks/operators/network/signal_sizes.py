"""Sizes of activations and gradients at each layer, from one replay of the step with its backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import BatchNorm
from lsp_callbacks.autograd.module_calls import ModuleCall, leaves, record_calls, units, upstream
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.network.gains import LayerSizes
from lsp_callbacks.linalg import norm
from lsp_callbacks.operators.network.activation_slopes import ActivationSlopes, activation_slopes
from lsp_callbacks.step.replay_checks import Call, check_loss
from lsp_callbacks.step.snapshot import Snapshot


@dataclass(frozen=True)
class NormInput:
    """Input and earlier statistics of a BatchNorm layer.

    Attributes:
        name: of the module.
        module: the module itself.
        x: its input, ``(B, C, ...)``.
        mean: running mean before this batch.
        var: running variance before this batch.
        batches: how many batches it had seen.
    """

    name: str
    module: Any
    x: Tensor
    mean: Tensor
    var: Tensor
    batches: int


@dataclass(frozen=True)
class SignalSizes:
    """The result of `signal_sizes`.

    Attributes:
        layers: all layers that the loss depends on, in their order.
        path: those on one chain from the last layer back to the input, in their order.
        activations: see `lsp_callbacks.operators.network.activation_slopes`.
        norms: the BatchNorm layers in training mode with running statistics.
        calls: the shapes of each module's first call.
    """

    layers: tuple[LayerSizes, ...]
    path: tuple[LayerSizes, ...]
    activations: tuple[ActivationSlopes, ...]
    norms: tuple[NormInput, ...]
    calls: dict[str, Call]


def signal_sizes(snapshot: Snapshot) -> SignalSizes:
    """Return the sizes of activations and gradients, from a replay in training mode with its backward pass.

    A layer begins with a module that holds a weight matrix, or with a residual block (recognised by its class name),
    which is one layer with its skip path. Modules without a matrix that depend on it through functions alone (an
    activation, a norm, a pooling) belong to it; a function that is no module belongs to the next layer. Where several
    layers lie directly before one (a sum, attention), the last of them in the order of calls counts as the one before.

    Of accumulated batches the first gives the sizes.

    Args:
        snapshot: a step.

    Raises:
        Unmeasurable: if the replayed loss is not the step's, or no parameter reaches it.

    Cost: one gradient, and one pass over each activation.
    """
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        with record_calls(snapshot.module, enter=_enter, leave=_leave) as root:
            loss = snapshot.replay()
        check_loss(snapshot, loss)
        repeats = _repeats([call.name for call in leaves(root)])
        slopes = activation_slopes(root, repeats)
        parameters = list(snapshot.parameters.values())
        if not loss.requires_grad or not parameters:
            raise Unmeasurable("no parameter that requires a gradient reaches the loss: there is no backward pass")
        torch.autograd.grad(loss, parameters, allow_unused=True)
    layers, path = _layers(root, repeats)
    norms = tuple(call.notes["norm"] for call in _first(list(leaves(root)), repeats) if "norm" in call.notes)
    calls = {call.name: _shapes(call) for call in reversed(list(_all(root)))}
    return SignalSizes(layers, path, slopes, norms, calls)


def _all(call: ModuleCall) -> Iterator[ModuleCall]:
    for child in call.children:
        yield child
        yield from _all(child)


def _shapes(call: ModuleCall) -> Call:
    # An embedding receives integers, whose shape is not needed.
    shape = tuple(call.received[0].shape) if call.received else None
    return Call(shape, None if call.sent is None else tuple(call.sent.shape))


def _repeats(names: list[str]) -> int:
    """Return how often the same calls follow one another: accumulated batches, or a network that is called again."""
    n = len(names)
    return next((k for k in range(n, 1, -1) if n % k == 0 and names[: n // k] * k == names), 1)


def _first(calls: list[ModuleCall], repeats: int) -> list[ModuleCall]:
    return calls[: len(calls) // repeats]


def _enter(call: ModuleCall) -> None:
    module = call.module
    if not isinstance(module, BatchNorm) or not call.received:
        return
    if module.training and module.running_mean is not None and module.running_var is not None:
        seen = 0 if module.num_batches_tracked is None else int(module.num_batches_tracked)
        x = call.received[0].detach()
        call.notes["norm"] = NormInput(
            call.name, module, x, module.running_mean.clone(), module.running_var.clone(), seen
        )


def _leave(call: ModuleCall) -> None:
    if call.sent is None or call.exit is None or (call.children and not call.begins_layer):
        return
    call.notes["sent"] = _square(call.sent)
    if call.begins_layer and call.received:
        call.notes["received"] = _square(call.received[0])

    def back(gradient: Tensor) -> None:
        call.notes["back"] = _square(gradient)

    call.sent.register_hook(back)


def _square(tensor: Tensor) -> Tensor:
    """Return the mean square, on the device of the tensor."""
    return norm(tensor.detach()).square() / max(tensor.numel(), 1)


def _layers(root: ModuleCall, repeats: int) -> tuple[tuple[LayerSizes, ...], tuple[LayerSizes, ...]]:
    owner: dict[Any, int] = {}  # by the node that a layer ends with
    ends: list[ModuleCall] = []
    begins: list[ModuleCall] = []
    before: list[int | None] = []
    calls = list(units(root))
    for call in _first(calls, repeats) if len(calls) % repeats == 0 else calls:
        if call.exit is None or call.exit in owner or "sent" not in call.notes:
            continue
        last = max(upstream(call.exit, owner), default=None)
        if call.begins_layer:
            owner[call.exit] = len(ends)
            begins.append(call)
            ends.append(call)
            before.append(last)
        elif last is not None:
            owner[call.exit] = last
            ends[last] = call
    sizes: dict[int, LayerSizes] = {}
    for i, (first, end) in enumerate(zip(begins, ends)):
        previous = before[i]
        came = first.notes.get("received") if previous is None else ends[previous].notes["sent"]
        if came is not None and "back" in end.notes:
            returned = None if previous is None else ends[previous].notes.get("back")
            squares = (came, end.notes["sent"], end.notes["back"], *([] if returned is None else [returned]))
            sizes[i] = LayerSizes(_named(i, begins), *(math.sqrt(float(t)) for t in squares))
    path: list[int] = []
    at = max(sizes, default=None)
    while at is not None and at in sizes:
        path.append(at)
        at = before[at]
    return tuple(sizes.values()), tuple(sizes[i] for i in reversed(path))


def _named(i: int, begins: list[ModuleCall]) -> str:
    """Return the name of a module; ``name#2`` at its second call."""
    seen = sum(call.name == begins[i].name for call in begins[:i])
    return f"{begins[i].name}#{seen + 1}" if seen else begins[i].name
