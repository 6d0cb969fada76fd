"""A module that cannot be copied, put back to the state before a step for as long as the step is replayed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import BUFFERS, COMPOSABLE, HOOKS, PLAIN, forget_passes
from lsp_callbacks.autograd.spread_tensors import local, sharded_modules
from lsp_callbacks.step.module_copy import find_special, is_mutable, is_users_hook, shared_kinds, state_of
from lsp_callbacks.step.whole_copy import WholeCopy

#: Packages whose hooks stay, as they gather the shards, or are our own.
_KEPT = ("torch.", "lsp_callbacks.")


class ModuleInPlace:
    """A module with shards of its parameters, whose steps are replayed on the module itself.

    ``fully_shard`` and ``parallelize_module`` gather and spread by hooks that belong to the very modules, which refuse
    to be copied. So attributes and buffers are noted when the object is made, *before* the step's forward pass.
    `running` puts copies of them back for a replay, and at its end the module's own, to the last bit, together with
    the shards. Meanwhile the user's hooks are off, as their side effects could not be undone.

    Args:
        module: that trains.
        shared: further objects that are not copied with the attributes.
        prepare: applied to the module for each replay, for instance to mute its logging.

    Attributes:
        module: the given one.
        parameters: the shards that this process holds, as plain tensors in the same memory.

    Raises:
        Exception: whatever an attribute of the module raises when it is copied.

    Memory: twice the buffers and what attributes hold; no parameter.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        shared: Iterable[Any] = (),
        prepare: Callable[[nn.Module], None] = lambda copy: None,
    ):
        self.module, self._prepare = module, prepare
        self._modules = list(module.modules())
        #: After a pass the module may still hold whole ones in their place.
        self._spread = [*module.parameters()]
        self.parameters = [local(p) for p in self._spread]
        keep = [*module.parameters(), *self._modules, *shared]
        self._shared = {id(part): part for part in keep}
        memo: dict[int, Any] = {}
        attributes, kinds = [_attributes(child) for child in self._modules], shared_kinds()
        for values in attributes:
            find_special(values, self._shared, memo, kinds)
        memo |= self._shared
        self._attributes = [_copied(values, memo) for values in attributes]
        self._buffers = [_clones(vars(child)[BUFFERS]) for child in self._modules]

    def reset(self) -> nn.Module:
        """Return the module as it was before the step; only while it is `running`."""
        memo: dict[int, Any] = dict(self._shared)
        for child, attributes, held in zip(self._modules, self._attributes, self._buffers):
            _set_attributes(child, _copied(attributes, memo))
            _replace(vars(child)[BUFFERS], _clones(held))
        self._prepare(self.module)
        return self.module

    def whole(self) -> WholeCopy:
        """Return a plain copy with the whole parameters, as it was before the step; all processes make it together."""
        return WholeCopy(self.module, self._attributes, self._buffers, self._prepare)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the module be run for a replay, and put everything back at the end, also after an error."""
        with contextlib.ExitStack() as stack:
            for child in self._modules:
                stack.callback(_set_attributes, child, _attributes(child, everything=True))
                stack.callback(_replace, vars(child)[BUFFERS], dict(vars(child)[BUFFERS]))
                for kind in HOOKS:
                    hooks = vars(child).get(kind, {})
                    stack.callback(_replace, hooks, dict(hooks))
                    _replace(hooks, {key: hook for key, hook in hooks.items() if not _is_users(hook)})
            for child in sharded_modules(self.module):
                stack.callback(forget_passes, child)
                forget_passes(child)
            self.reset()
            yield

    @contextlib.contextmanager
    def gradients_aside(self) -> Iterator[None]:
        """Put the gradients of the step aside, which a backward pass would add to, and back at the end."""
        held = [(p, p.grad) for p in self._spread]
        try:
            for p, _ in held:
                p.grad = None
            yield
        finally:
            for p, gradient in held:
                p.grad = gradient


def _attributes(module: nn.Module, *, everything: bool = False) -> dict[str, Any]:
    """Return the attributes of a module beside its layout; without what copies of it leave out, unless ``everything``.

    So a LightningModule has no trainer among them.
    """
    source = vars(module) if everything else state_of(module)
    return {name: value for name, value in source.items() if name == "training" or not _is_layout(name)}


def _is_layout(name: str) -> bool:
    return name in PLAIN or name.startswith(COMPOSABLE)


def _set_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    held = vars(module)
    for name in [name for name in held if not _is_layout(name) and name not in attributes]:
        del held[name]
    held.update(attributes)


def _copied(attributes: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value, memo) if is_mutable(value) else value for name, value in attributes.items()}


def _clones(held: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    with torch.no_grad():
        return {name: None if b is None else b.detach().clone() for name, b in held.items()}


def _replace(entries: dict, others: dict) -> None:
    entries.clear()
    entries.update(others)


def _is_users(hook: Any) -> bool:
    return is_users_hook(hook) and not (getattr(hook, "__module__", None) or "").startswith(_KEPT)
