"""What a forward pass makes of its input behind the back of autograd: detached tensors, masks, numbers read."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lsp_callbacks.autograd.module_calls import overlap

#: What looks at a tensor's shape and type only, but takes in what else it is given.
_SHAPES = ("_like", "new_")
#: What takes in the tensor itself, and of what else it is given looks at shape or type only.
_AS = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
#: What reads numbers out of a tensor, on which Python may go its own way.
_READS = {
    "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "equal", "allclose",
    "is_nonzero",
}  # fmt: skip


class Detached(TorchFunctionMode):
    """Follows what depends on ``X_0``, with or without a graph, through every call that is made inside.

    Args:
        start: will hold ``X_0`` when it is known, and the tensor that it took the place of.

    Attributes:
        again: by backward node, the function that took in numbers made of that tensor, beside ``X_0``.
        nodes: by backward node, the function that took in something which depends on ``X_0`` without a graph.
        read: the number of the last backward node before a number was read out of what depends on ``X_0``; whatever
            comes later may depend on it.
    """

    def __init__(self, start: list[Tensor]):
        super().__init__()
        self.start = start
        self.nodes: dict[Any, str] = {}
        self.again: dict[Any, str] = {}
        self.read = math.inf
        self._latest = -1
        # Weakly: what nobody holds any more cannot be used. True of what was made of the tensor in the place of X_0.
        self._depends: Any = WeakIdKeyDictionary()

    def hidden(self, node: Any) -> str | None:
        """What a backward node takes in that its graph does not know of; None if it knows all."""
        if node._sequence_nr() > self.read:
            return "a number that was read out of a signal"
        name = self.nodes.get(node)
        return None if name is None else f"a signal without its graph, by {name}"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.start:
            return result
        name = getattr(func, "__name__", str(func))
        taken: Any = (args, kwargs)
        if name in _AS:
            taken = args[:1]
        elif any(part in name for part in _SHAPES):
            taken = (args[1:], {key: value for key, value in kwargs.items() if key != "input"})
        known = [t for t in _tensors(taken) if self._known(t)]
        if not known:
            return result
        if name in _READS:
            self.read = min(self.read, self._latest)
        changed = _tensors(args[0] if name == "__setitem__" else (result, kwargs.get("out")))
        if name == "__setitem__" or _in_place(name) or kwargs.get("out") is not None:
            changed = [one for t in changed for one in _whole(t)]
        again = any(self._replaced(t) for t in known)
        for t in changed:
            # Masks and indices are constants in every derivative.
            self._depends[t] = self._depends.get(t, False) or (again and t.is_floating_point())
            if t.grad_fn is not None:
                self._latest = max(self._latest, t.grad_fn._sequence_nr())  # type: ignore[attr-defined]
                if again or any(not one.requires_grad for one in known):
                    self.nodes[t.grad_fn] = name
                if again:
                    self.again[t.grad_fn] = name
        return result

    def _known(self, tensor: Tensor) -> bool:
        own = tensor is self.start[0] or any(t in self._depends for t in _whole(tensor))
        return own or self._replaced(tensor)

    def _replaced(self, tensor: Tensor) -> bool:
        """Whether it holds numbers of the tensor that ``X_0`` took the place of, and not by way of ``X_0``."""
        made = any(self._depends.get(t, False) for t in _whole(tensor))
        return made or overlap(tensor, self.start[1])


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _whole(tensor: Tensor) -> tuple[Tensor, ...]:
    """With what it is a view of."""
    return (tensor,) if tensor._base is None else (tensor, tensor._base)


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
