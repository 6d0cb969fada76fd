"""A copy of a module that shares its parameters, for replays of a step."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lsp_callbacks.autograd._torch_internals import BUFFERS, CONTAINERS, HOOKS, buffers

#: Attributes that every module has.
_PLAIN = frozenset(vars(nn.Module()))
#: What cannot be changed in place, or is shared.
_ATOMS = (
    int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size, types.FunctionType,
    nn.Module, nn.Parameter,
)  # fmt: skip


class ModuleCopy:
    """A copy of a module that shares its parameters and nothing else.

    Buffers, Python attributes, metrics and caches are copied when the object is made, which must be *before* the
    step's forward pass, and put back to that state by `reset` before each replay. The user's own hooks (functions and
    methods) are not copied, as their side effects could not be undone; hook objects, such as those of
    ``torch.nn.utils.spectral_norm``, are.

    Args:
        module: the module to copy.
        shared: further objects to share, as the parameters; datasets and loaders always are.
        prepare: applied once to the copy, for instance to mute its logging.

    Raises:
        Exception: whatever an attribute of the module raises when it is copied.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        shared: Iterable[Any] = (),
        prepare: Callable[[nn.Module], None] = lambda copy: None,
    ):
        memo: dict[int, Any] = {}
        self._shared = {id(part): part for part in (*module.parameters(), *shared)}
        for child in module.modules():
            _find_special(vars(child), self._shared, memo)
        self.module = copy.deepcopy(module, memo | self._shared)
        if any(a is not b for a, b in zip_longest(module.parameters(), self.module.parameters())):
            raise TypeError("its copy has parameters of its own (a scripted module, or a __deepcopy__)")
        for child in self.module.modules():
            for kind in HOOKS:
                hooks = getattr(child, kind, {})
                for key in [k for k, hook in hooks.items() if _is_users(hook)]:
                    del hooks[key]
        prepare(self.module)
        self._states = [_State(child) for child in self.module.modules()]

    def buffers(self) -> list[Tensor | None]:
        """Return the buffers that `reset` puts back, on the CPU, in the order of the modules."""
        return [None if b is None else b.cpu() for state in self._states for b in state.buffers.values()]

    def load_buffers(self, others: list[Tensor | None]) -> None:
        """Take the buffers of another process, which `reset` then puts back."""
        given = iter(others)
        for state in self._states:
            for (name, buffer), other in zip(list(state.buffers.items()), given):
                state.buffers[name] = None if buffer is None or other is None else other.to(buffer.device)

    def reset(self) -> nn.Module:
        """Return the copy as it was before the step."""
        # One memo for all, so that what two modules share stays one object.
        memo = self._shared | {id(m): m for m in self.module.modules()}
        for state in self._states:
            state.restore(memo)
        return self.module


class _State:
    """Attributes and buffers of one module (not of its children)."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.attributes = dict(vars(module))
        self.containers = {name: dict(value) for name, value in vars(module).items() if name in CONTAINERS}
        held = self.containers.pop(BUFFERS, None)
        held = buffers(module) if held is None else held  # scripted modules keep them elsewhere
        self.buffers = {name: None if b is None else b.detach().clone() for name, b in held.items()}
        # Deep copies take time in each replay: only of what a training step could change in place.
        self.mutable = {
            name: value for name, value in vars(module).items() if name not in _PLAIN and not isinstance(value, _ATOMS)
        }

    def restore(self, memo: dict[int, Any]) -> None:
        attributes = vars(self.module)
        attributes.clear()
        attributes.update(self.attributes)
        for name, value in self.mutable.items():
            attributes[name] = copy.deepcopy(value, memo)
        for name, entries in self.containers.items():
            container = attributes[name]
            container.clear()
            container.update(entries)
        if BUFFERS in attributes:
            attributes[BUFFERS].clear()
        held = attributes[BUFFERS] if BUFFERS in attributes else buffers(self.module)
        for name, saved in self.buffers.items():
            held[name] = None if saved is None else saved.clone()


def _is_users(hook: Any) -> bool:
    return isinstance(hook, types.FunctionType | types.MethodType | functools.partial | types.BuiltinFunctionType)


def _find_special(value: Any, shared: dict[int, Any], memo: dict[int, Any], depth: int = 0) -> None:
    """Share data instead of copying them; give values of non-leaf tensors, which refuse a deep copy, to the copy."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, Dataset | DataLoader):
        shared[id(value)] = value
    elif depth < 4 and isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            _find_special(item, shared, memo, depth + 1)
