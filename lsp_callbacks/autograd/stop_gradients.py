"""What a forward pass computes from the parameters without a graph, and uses in its loss all the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lsp_callbacks.autograd._torch_internals import base, tree_leaves

#: Functions that use shape and type of a tensor only.
_SHAPES = ("_like", "new_")
#: Functions that use shape and type only of all arguments but the first; the second of a deep copy holds what was
#: copied before it, such as the parameters that a copy of a module shares.
_CONVERSIONS = {"to", "type_as", "expand_as", "view_as", "reshape_as", "__deepcopy__"}


class StopGradients(TorchFunctionMode):
    """Follows tensors that depend on trainable parameters and have no graph, through every call that is made inside.

    ``detach``, ``no_grad`` and ``.data`` make them; the power iteration of ``torch.nn.utils.spectral_norm`` does so in
    each forward pass. Where one of them enters the graph again, a second backward pass takes for a constant what
    changes with the parameters. Masks and indices are constants in every derivative.

    Attributes:
        names: the functions by which such tensors were made that entered the graph again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        # Weakly: a tensor that was freed cannot be used any more.
        self._origin: Any = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if any(part in name for part in _SHAPES):
            return result
        taken = _floats(args[:1] if name in _CONVERSIONS else (args, kwargs))
        hidden = [origin for t in taken if (origin := self._made_by(t)) is not None]
        if not hidden and not any(t.requires_grad for t in taken):
            return result
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        for t in _floats((result, kwargs.get("out"), args[:1] if in_place else ())):
            if not t.requires_grad:
                self._origin[_whole(t)] = hidden[0] if hidden else name
            elif hidden:
                self.names.add(hidden[0])
        return result

    def _made_by(self, tensor: Tensor) -> str | None:
        """Return the function that left the graph; None for what has one, or does not depend on parameters."""
        if tensor.requires_grad:
            return None
        return self._origin.get(_whole(tensor))


def _whole(tensor: Tensor) -> Tensor:
    """Return what a tensor is a view of, or itself."""
    viewed = base(tensor)
    return tensor if viewed is None else viewed


def _floats(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
