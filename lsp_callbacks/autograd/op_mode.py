"""Every operation of a forward and backward pass, with the module that it belongs to."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Operation:
    """One call of a kernel.

    Attributes:
        name: of the operator, such as "aten.sqrt".
        module: name of the innermost module that runs it, or whose backward pass does; "" is what runs outside of all
            submodules, as the loss in a ``training_step``.
        node: in the backward pass the node of the autograd graph, such as "SqrtBackward0"; None in the forward pass.
        forward: the operator whose backward pass it belongs to; None in the forward pass, and where nobody knows.
    """

    name: str
    module: str
    node: str | None = None
    forward: str | None = None


class Operations(TorchDispatchMode):
    """While it is entered, `run` is called in place of each operation of the module's forward and backward pass.

    An operation of the backward pass is told its module by the sequence number that autograd gave to the graph's node
    when the forward operation made it. What activation checkpoints compute again counts as forward.

    Args:
        module: whose submodules give the names; they carry hooks meanwhile. Scripted ones take none: what they run
            counts to what is around them.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._running = [""]
        self._made: dict[int, tuple[str, str]] = {}

    @abstractmethod
    def run(self, operation: Operation, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns what ``func(*args, **kwargs)`` does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(self._operation(str(func._overloadpacket)), func, args, kwargs or {})

    def _operation(self, name: str) -> Operation:
        node: Any = torch._C._current_autograd_node()
        inside = self._running[-1]
        if node is None or inside:
            # The node of this operation, or (then it is there already) one made before it.
            self._made.setdefault(torch.autograd._get_sequence_nr() - 1, (name, inside))
            return Operation(name, inside)
        forward, module = self._made.get(node._sequence_nr(), (None, ""))
        if isinstance(node, BackwardCFunction):
            forward = node._forward_cls.__name__  # type: ignore[attr-defined]
        return Operation(name, module, node.name(), forward)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Enters the mode, with hooks on the module that it takes away again."""
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
            if name in self._running:  # with all that has not come to its end
                del self._running[len(self._running) - 1 - self._running[::-1].index(name) :]

        return before, after


def floats(values: Any) -> list[Tensor]:
    """The tensors of real or complex numbers in any nest of containers; of a sparse one, what it holds."""
    found = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    dense = (t._values() if t.layout is torch.sparse_coo else t for t in found)
    return [t for t in dense if (t.is_floating_point() or t.is_complex()) and t.layout is torch.strided and t.numel()]
