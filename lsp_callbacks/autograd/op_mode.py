"""Every operation of a forward and backward pass, with the module that it belongs to."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import (
    TorchDispatchMode,
    current_node,
    custom_function,
    next_sequence_number,
    packet,
    sequence_number,
    sparse_values,
    tree_leaves,
)


@dataclass(frozen=True)
class Operation:
    """One call of a kernel.

    Attributes:
        name: of the operator, such as "aten.sqrt".
        module: name of the innermost module that runs it, or whose backward pass does; "" is what runs outside of all
            submodules, such as the loss in a ``training_step``.
        node: in the backward pass the node of the autograd graph, such as "SqrtBackward0"; None in the forward pass.
        forward: the operator whose backward pass it belongs to; None in the forward pass, and where it is unknown.
    """

    name: str
    module: str
    node: str | None = None
    forward: str | None = None


class Operations(TorchDispatchMode):
    """While it is entered, `run` is called in place of each operation of the module's forward and backward pass.

    An operation of the backward pass is attributed to a module by the sequence number that autograd gave to the graph's
    node when the forward operation made it. What activation checkpoints compute again counts as forward.
    ``torch.utils.module_tracker.ModuleTracker`` cannot replace this: it knows the set of modules that run, but neither
    the innermost one nor the forward operation of a backward node, and keeps modules open when a forward pass raises.

    Args:
        module: its submodules give the names; they carry hooks meanwhile. Scripted modules take no hooks: their
            operations count as those of the module around them.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._running = [""]
        self._made: dict[int, tuple[str, str]] = {}

    @abstractmethod
    def run(self, operation: Operation, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the result of ``func(*args, **kwargs)``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(self._operation(str(packet(func))), func, args, kwargs or {})

    def _operation(self, name: str) -> Operation:
        node = current_node()
        inside = self._running[-1]
        if node is None or inside:
            # The node of this operation, or (then it is there already) one made before it.
            self._made.setdefault(next_sequence_number() - 1, (name, inside))
            return Operation(name, inside)
        forward, module = self._made.get(sequence_number(node), (None, ""))
        if (function := custom_function(node)) is not None:
            forward = function.__name__
        return Operation(name, module, node.name(), forward)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Enter the mode, with hooks on the module that are removed at the end."""
        with contextlib.ExitStack() as stack:
            for name, child in self.module.named_modules():
                if name and not isinstance(child, torch.jit.ScriptModule):
                    before, after = self._hooks(name)
                    stack.callback(child.register_forward_pre_hook(before).remove)
                    stack.callback(child.register_forward_hook(after, always_call=True).remove)
            stack.enter_context(self)
            yield

    def _hooks(self, name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, args: tuple) -> None:
            self._running.append(name)

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if name in self._running:  # with all modules inside it that did not return
                del self._running[len(self._running) - 1 - self._running[::-1].index(name) :]

        return before, after


def floats(values: Any) -> list[Tensor]:
    """Return the tensors of real or complex numbers in nested containers; of a sparse tensor, its stored values."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    dense = (sparse_values(t) if t.layout is torch.sparse_coo else t for t in tensors)
    return [t for t in dense if (t.is_floating_point() or t.is_complex()) and t.layout is torch.strided and t.numel()]
