"""Dependencies that autograd does not record: detached tensors, masks, and numbers read out of a tensor."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lsp_callbacks.autograd._torch_internals import base, sequence_number, tree_leaves
from lsp_callbacks.autograd.module_calls import overlap

#: Factory functions: they use shape and type of the first argument, but the values of the others.
_FACTORIES = ("_like", "new_")
#: Functions that use the values of the first argument, but only shape or type of the others.
_CONVERSIONS = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
#: Functions that return Python numbers, on which the code may branch.
_READS = {
    "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "equal", "allclose",
    "is_nonzero",
}  # fmt: skip


class UntrackedDependencies(TorchFunctionMode):
    """Follows what depends on ``X_0``, with or without a graph, through every call that is made inside.

    Args:
        start: will hold ``X_0`` and the tensor that it replaced, once they are known.

    Attributes:
        reused: by backward node, the function that used the replaced tensor itself, or what was made of it, beside
            ``X_0``.
        nodes: by backward node, the function that used something that depends on ``X_0`` without a graph.
        read: the number of the last backward node before a number was read out of a tensor that depends on ``X_0``;
            whatever comes later may depend on it.
    """

    def __init__(self, start: list[Tensor]):
        super().__init__()
        self.start = start
        self.nodes: dict[Any, str] = {}
        self.reused: dict[Any, str] = {}
        self.read = math.inf
        self._latest = -1
        # Weakly: a tensor that was freed cannot be used any more. True if it was made of the replaced tensor.
        self._depends: Any = WeakIdKeyDictionary()

    def hidden(self, node: Any) -> str | None:
        """Return what a backward node depends on outside of its graph, in words; None if there is nothing."""
        if sequence_number(node) > self.read:
            return "a number that was read out of a tensor (.item(), a comparison)"
        name = self.nodes.get(node)
        return None if name is None else f"a tensor without its graph (detached, or a mask), in {name}"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.start:
            return result
        name = getattr(func, "__name__", str(func))
        used: Any = (args, kwargs)
        if name in _CONVERSIONS:
            used = args[:1]
        elif any(part in name for part in _FACTORIES):
            used = (args[1:], {key: value for key, value in kwargs.items() if key != "input"})
        dependent = [t for t in _tensors(used) if self._is_dependent(t)]
        if not dependent:
            return result
        if name in _READS:
            self.read = min(self.read, self._latest)
        changed = _tensors(args[0] if name == "__setitem__" else (result, kwargs.get("out")))
        if name == "__setitem__" or _in_place(name) or kwargs.get("out") is not None:
            changed = [tensor for t in changed for tensor in _with_base(t)]
        reused = any(self._is_replaced(t) for t in dependent)
        for t in changed:
            # Masks and indices are constants in every derivative.
            self._depends[t] = self._depends.get(t, False) or (reused and t.is_floating_point())
            if t.grad_fn is not None:
                self._latest = max(self._latest, sequence_number(t.grad_fn))
                if reused or any(not other.requires_grad for other in dependent):
                    self.nodes[t.grad_fn] = name
                if reused:
                    self.reused[t.grad_fn] = name
        return result

    def _is_dependent(self, tensor: Tensor) -> bool:
        followed = tensor is self.start[0] or any(t in self._depends for t in _with_base(tensor))
        return followed or self._is_replaced(tensor)

    def _is_replaced(self, tensor: Tensor) -> bool:
        """Return whether a tensor holds numbers of the one that ``X_0`` replaced, and not by way of ``X_0``."""
        derived = any(self._depends.get(t, False) for t in _with_base(tensor))
        return derived or overlap(tensor, self.start[1])


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _with_base(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor, and the one that it is a view of."""
    whole = base(tensor)
    return (tensor,) if whole is None else (tensor, whole)


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
