"""One real step, forwards and backwards, with the size of what passes through each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import BatchNorm
from lsp_callbacks.autograd.module_calls import ModuleCall, leaves, record_calls, units, upstream
from lsp_callbacks.functional.network.gains import LayerSizes
from lsp_callbacks.linalg import norm
from lsp_callbacks.operators.network.activation_slopes import ActivationSlopes, activation_slopes
from lsp_callbacks.step.snapshot import Call, Snapshot, Unmeasurable


@dataclass(frozen=True)
class NormInput:
    """What a BatchNorm layer saw, and what it knew before.

    Attributes:
        name: of the module.
        module: itself.
        x: its input, ``(B, C, ...)``.
        mean: running, before this batch was taken in.
        var: likewise.
        batches: how many it had seen.
    """

    name: str
    module: Any
    x: Tensor
    mean: Tensor
    var: Tensor
    batches: int


@dataclass(frozen=True)
class SignalSizes:
    """See `signal_sizes`.

    Attributes:
        layers: all through which the loss is reached, by their order.
        path: those of them that lie on one chain from the last layer back to the input, in their order.
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
    """Replays the step as it was, in training mode, with its backward pass.

    A layer begins with a module that holds a weight matrix, or with a residual block (told by its class name), which is
    one layer with its skip path. What depends on it through functions alone and holds no matrix (an activation, a norm,
    a pooling) belongs to it; a function that is no module belongs to the layer that comes after. Where several layers
    lie directly before one (a sum, attention), the last of them in the order of calls counts as the one before it.

    Of accumulated batches the first gives the sizes.

    Raises:
        Unmeasurable: if the replayed loss is not the step's.

    Cost: one gradient, and one pass over each activation.
    """
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        with record_calls(snapshot.module, enter=_enter, leave=_leave) as root:
            loss = snapshot.replay()
        snapshot.check(loss, tolerance=1e-4 if snapshot.compiled else 0.0)
        repeats = _repeats([call.name for call in leaves(root)])
        found = activation_slopes(root, repeats)
        parameters = list(snapshot.parameters.values())
        if not loss.requires_grad or not parameters:
            raise Unmeasurable("no parameter that requires a gradient reaches the loss: there is no backward pass")
        torch.autograd.grad(loss, parameters, allow_unused=True)
    layers, path = _layers(root, repeats)
    norms = tuple(call.notes["norm"] for call in _first(list(leaves(root)), repeats) if "norm" in call.notes)
    calls = {call.name: _shapes(call) for call in reversed(list(_all(root)))}
    return SignalSizes(layers, path, found, norms, calls)


def _all(call: ModuleCall) -> Iterator[ModuleCall]:
    for child in call.children:
        yield child
        yield from _all(child)


def _shapes(call: ModuleCall) -> Call:
    # An embedding receives integers, which nobody asks for.
    shape = tuple(call.received[0].shape) if call.received else None
    return Call(shape, None if call.sent is None else tuple(call.sent.shape))


def _repeats(names: list[str]) -> int:
    """How often the same calls come one after the other: accumulated batches, or a network that is called again."""
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
    """Mean square, left on its device."""
    return norm(tensor.detach()).square() / max(tensor.numel(), 1)


def _layers(root: ModuleCall, repeats: int) -> tuple[tuple[LayerSizes, ...], tuple[LayerSizes, ...]]:
    owner: dict[Any, int] = {}  # which layer ends with a node
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
    found: dict[int, LayerSizes] = {}
    for i, (first, end) in enumerate(zip(begins, ends)):
        previous = before[i]
        came = first.notes.get("received") if previous is None else ends[previous].notes["sent"]
        if came is not None and "back" in end.notes:
            returned = None if previous is None else ends[previous].notes.get("back")
            known = (came, end.notes["sent"], end.notes["back"], *([] if returned is None else [returned]))
            found[i] = LayerSizes(_named(i, begins), *(math.sqrt(float(t)) for t in known))
    path: list[int] = []
    at = max(found, default=None)
    while at is not None and at in found:
        path.append(at)
        at = before[at]
    return tuple(found.values()), tuple(found[i] for i in reversed(path))


def _named(i: int, begins: list[ModuleCall]) -> str:
    """The name of a module; ``name#2`` at its second call."""
    seen = sum(call.name == begins[i].name for call in begins[:i])
    return f"{begins[i].name}#{seen + 1}" if seen else begins[i].name
