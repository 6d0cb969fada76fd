"""A copy of a module that shares its parameters, for replays of a step."""

from __future__ import annotations

import copy
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from itertools import zip_longest
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle

from lsp_callbacks.autograd._torch_internals import (
    BUFFERS,
    CONTAINERS,
    HOOKS,
    MODULES,
    PARAMETERS,
    PLAIN,
    buffers,
    foreach_copy,
)
from lsp_callbacks.step.moving_parameters import MovingParameter

#: What cannot be changed in place, or is shared.
_ATOMS = (
    int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size, types.FunctionType,
    nn.Module, nn.Parameter,
)  # fmt: skip
#: Packages whose modules' ``__getstate__`` and ``__setstate__`` do nothing but leave out and add attributes.
_KNOWN = ("torch.nn.", "pytorch_lightning.", "lightning.")


class ModuleCopy:
    """A copy of a module that shares its parameters and nothing else.

    Frozen parameters that the steps of the run move, as those of a momentum encoder, are copied, too: see
    `StandingCopy.move`.

    Buffers, Python attributes, metrics and caches are copied when the object is made, which must be *before* the
    step's forward pass, and put back to that state by `reset` before each replay. The user's own hooks (functions and
    methods) are not copied, as their side effects could not be undone; hook objects, such as those of
    ``torch.nn.utils.spectral_norm``, are.

    Args:
        module: the module to copy.
        shared: further objects to share, as the parameters; datasets and loaders always are.
        prepare: applied to the copy, for instance to mute its logging.
        standing: the run's copy, which is brought up to date instead of made anew where it can be; None makes one.

    Attributes:
        module: the copy.
        parameters: that both share.

    Raises:
        Exception: whatever an attribute of the module raises when it is copied.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        shared: Iterable[Any] = (),
        prepare: Callable[[nn.Module], None] = lambda copy: None,
        standing: StandingCopy | None = None,
    ):
        self._twin = _Twin(module, shared) if standing is None else standing.lent(self, module, shared)
        self.module, self.parameters = self._twin.module, self._twin.parameters
        prepare(self.module)
        self._twin.keep()

    def buffers(self) -> list[Tensor | None]:
        """Return the buffers that `reset` puts back, on the CPU, in the order of the modules."""
        return [None if b is None else b.cpu() for state in self._twin.states for b in state.buffers.values()]

    def load_buffers(self, others: list[Tensor | None]) -> None:
        """Take the buffers of another process, which `reset` then puts back."""
        given = iter(others)
        for state in self._twin.states:
            for (name, buffer), other in zip(list(state.buffers.items()), given):
                absent = buffer is None or other is None
                state.buffers[name] = None if absent else other.to(buffer.device, copy=True)  # type: ignore[union-attr]

    def reset(self) -> nn.Module:
        """Return the copy as it was before the step."""
        self._twin.reset()
        return self.module


class StandingCopy:
    """The copy of a run's module that its measured steps use one after the other.

    A deep copy takes as long as a quarter of a gradient on a small network. It is made once: before each further step
    its attributes and buffers are brought up to date, with deep copies only of what could be changed in place. It is
    made anew where the module holds other modules or parameters than before, where copying it is code of the user's,
    where hook objects have a state, and where an earlier step still uses it.
    """

    def __init__(self) -> None:
        self._twin: _Twin | None = None
        self._moving: list[nn.Parameter] = []
        self._user: Callable[[], ModuleCopy | None] = lambda: None

    def lent(self, user: ModuleCopy, module: nn.Module, shared: Iterable[Any]) -> _Twin:
        """Return the copy, up to date, for as long as its user lives."""
        if self._twin is None or self._user() is not None or not self._twin.follows(module, shared):
            self._twin = _Twin(module, shared, self._moving)
        self._user = weakref.ref(user)
        return self._twin

    def move(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy these parameters from now on, and put them back as buffers are: steps move them before their update."""
        moving = {id(p) for p in self._moving}
        self._moving += [p for p in parameters if id(p) not in moving]
        self._twin = None

    def __reduce__(self) -> tuple[type, tuple]:
        return StandingCopy, ()  # another process begins without


class _Twin:
    """A copy of a module, with what is needed to bring it up to date."""

    def __init__(self, module: nn.Module, shared: Iterable[Any], moving: Iterable[nn.Parameter] = ()):
        self._moving = [MovingParameter(p) for p in moving]
        copies = {id(moved.original): moved.copy for moved in self._moving}
        parameters = [copies.get(id(p), p) for p in module.parameters()]
        self.parameters = [p for p in module.parameters() if id(p) not in copies]
        memo: dict[int, Any] = {}
        self._shared = self._kept_apart(shared)
        originals, held_in_common = list(module.modules()), shared_kinds()
        for child in originals:
            find_special(vars(child), self._shared, memo, held_in_common)
        self.module = copy.deepcopy(module, memo | self._shared)
        if any(a is not b for a, b in zip_longest(parameters, self.module.parameters())):
            raise TypeError("its copy has parameters of its own (a scripted module, or a __deepcopy__)")
        for child in self.module.modules():
            for kind in HOOKS:
                hooks = getattr(child, kind, {})
                for key in [k for k, hook in hooks.items() if is_users_hook(hook)]:
                    del hooks[key]
        self.states = [_State(*pair) for pair in zip(self.module.modules(), originals)]
        self._modules = {id(state.original): state.module for state in self.states}
        self._itself = {id(state.module): state.module for state in self.states}
        self._can_follow = all(map(_is_copied_by_torch, originals))
        if self._can_follow:
            for state in self.states:
                state.remember_made()

    def _kept_apart(self, shared: Iterable[Any]) -> dict[int, Any]:
        """Return by the identity of what is not copied again what stands for it in the copy."""
        stands_for = {id(part): part for part in (*self.parameters, *shared)}
        for moved in self._moving:
            stands_for[id(moved.original)] = stands_for[id(moved.copy)] = moved.copy
        return stands_for

    def follows(self, module: nn.Module, shared: Iterable[Any]) -> bool:
        """Bring the copy up to date with the module that it was made from; return False where it cannot be."""
        is_original = self._can_follow and module is self.states[0].original
        if not (is_original and all(state.fits(self._shared) for state in self.states)):
            return False
        self._shared = self._kept_apart(shared)
        memo: dict[int, Any] = {}
        changed, held_in_common = [state.changeable() for state in self.states], shared_kinds()
        for values in changed:
            if values:
                find_special(values, self._shared, memo, held_in_common)
        memo |= self._shared | self._modules
        for state, values in zip(self.states, changed):
            state.follow(values, memo)
        follow_buffers(self.states)
        for state in self.states:
            state.restore_containers()
        for moved in self._moving:
            moved.follow()
        return True

    def keep(self) -> None:
        """Keep the attributes as they are now for `reset`."""
        for state in self.states:
            state.keep()

    def reset(self) -> None:
        """Put attributes and buffers back to what was kept."""
        # One memo for all, so that what two modules share stays one object.
        memo = self._shared | self._itself
        for state in self.states:
            state.restore(memo)
        for moved in self._moving:
            moved.restore()


class _State:
    """Attributes and buffers of one module of a copy (not of its children)."""

    def __init__(self, module: nn.Module, original: nn.Module):
        self.module, self.original = module, original
        attributes = vars(module)
        self.containers = {name: dict(value) for name, value in attributes.items() if name in CONTAINERS}
        held = self.containers.pop(BUFFERS, None)
        held = buffers(module) if held is None else held  # scripted modules keep them elsewhere
        self.buffers = {name: None if b is None else b.detach().clone() for name, b in held.items()}
        self._plain = {name: value for name, value in attributes.items() if name in PLAIN}
        self._made: dict[str, Any] = {}
        self._children = list(vars(original).get(MODULES, {}).values())
        self.attributes: dict[str, Any] = {}
        self.mutable: dict[str, Any] = {}

    def remember_made(self) -> None:
        """Remember what ``__setstate__`` has made of what ``__getstate__`` left out: weak references, in a LSTM."""
        source = state_of(self.original)
        self._made = {name: value for name, value in vars(self.module).items() if name not in source}

    def keep(self) -> None:
        """Keep the attributes as they are now."""
        self.attributes = dict(vars(self.module))
        # Deep copies take time in each replay: only of what a training step could change in place.
        self.mutable = _mutable(self.attributes)

    def fits(self, stands_for: dict[int, Any]) -> bool:
        """Return whether the original still holds the modules and parameters of the copy, and no state in hooks.

        Args:
            stands_for: by the identity of each of the original's parameters, that of the copy.
        """
        theirs, ours = vars(self.original), vars(self.module)
        if type(self.original) is not type(self.module) or theirs[BUFFERS].keys() != self.buffers.keys():
            return False
        if any(ours[kind] or not all(map(is_users_hook, theirs[kind].values())) for kind in HOOKS):
            return False
        pairs = ((PARAMETERS, self.containers[PARAMETERS].values()), (MODULES, self._children))
        return all(
            theirs[name].keys() == self.containers[name].keys()
            and all(map(is_, (stands_for.get(id(value), value) for value in theirs[name].values()), values))
            for name, values in pairs
        )

    def changeable(self) -> dict[str, Any]:
        """Return what a step could change in place of the original's attributes; the copy takes all others."""
        source, attributes = state_of(self.original), vars(self.module)
        attributes.clear()
        attributes.update({name: value for name, value in source.items() if name not in PLAIN})
        attributes.update(self._plain | self._made)
        attributes["training"] = source["training"]
        return {
            name: value
            for name, value in attributes.items()
            if name not in PLAIN and (not isinstance(value, _ATOMS) or isinstance(value, nn.Module))
        }

    def follow(self, values: dict[str, Any], memo: dict[int, Any]) -> None:
        """Take copies of what could be changed in place."""
        for name, value in values.items():
            vars(self.module)[name] = copy.deepcopy(value, memo)

    def restore(self, memo: dict[int, Any]) -> None:
        """Put back what was kept."""
        attributes = vars(self.module)
        attributes.clear()
        attributes.update(self.attributes)
        for name, value in self.mutable.items():
            attributes[name] = copy.deepcopy(value, memo)
        self.restore_containers()

    def restore_containers(self) -> None:
        """Put back parameters, modules and buffers."""
        attributes = vars(self.module)
        for name, entries in self.containers.items():
            container = attributes[name]
            container.clear()
            container.update(entries)
        held = attributes.get(BUFFERS)
        if held is not None:
            held.clear()
        if self.buffers:
            held = buffers(self.module) if held is None else held
            for name, saved in self.buffers.items():
                held[name] = None if saved is None else saved.clone()


def state_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that a deep copy of it takes."""
    is_plain = type(module).__getstate__ is nn.Module.__getstate__
    return vars(module) if is_plain else module.__getstate__()


def follow_buffers(states: list[_State]) -> None:
    """Copy the buffers of the originals, by one call where they are as they were."""
    kept, now = [], []
    for state in states:
        for name, buffer in vars(state.original)[BUFFERS].items():
            saved = state.buffers[name]
            if buffer is None or saved is None or not _is_like(saved, buffer):
                state.buffers[name] = None if buffer is None else buffer.detach().clone()
            else:
                kept.append(saved)
                now.append(buffer.detach())
    if kept:
        foreach_copy(kept, now)


def _is_like(a: Tensor, b: Tensor) -> bool:
    same = type(a) is type(b) is Tensor and a.layout is b.layout is torch.strided
    return same and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def is_mutable(value: Any) -> bool:
    """Return whether a step could change an attribute of a module in place."""
    return not isinstance(value, _ATOMS)


def _mutable(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in PLAIN and is_mutable(value)}


def _is_copied_by_torch(module: nn.Module) -> bool:
    """Return whether a deep copy of a module is a deep copy of its attributes."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    for kind in type(module).__mro__[:-1]:
        names = vars(kind).keys()
        if names & {"__deepcopy__", "__reduce__", "__reduce_ex__", "__slots__"}:
            return False
        if names & {"__getstate__", "__setstate__"} and not kind.__module__.startswith(_KNOWN):
            return False
    return True


def is_users_hook(hook: Any) -> bool:
    """Return whether a hook is a function or a method, and no object with a state of its own."""
    return isinstance(hook, types.FunctionType | types.MethodType | functools.partial | types.BuiltinFunctionType)


def shared_kinds() -> tuple[type, ...]:
    """Return the classes of what a copy shares: data, and meshes and groups of processes, which cannot be copied."""
    meshes, groups = (sys.modules.get(f"torch.distributed{name}") for name in (".device_mesh", ""))
    kinds = (getattr(meshes, "DeviceMesh", None), getattr(groups, "ProcessGroup", None))  # as far as they are imported
    return (Dataset, DataLoader, *(kind for kind in kinds if kind is not None))


def find_special(
    value: Any, shared: dict[int, Any], memo: dict[int, Any], kinds: tuple[type, ...], depth: int = 0
) -> None:
    """Share what is of some kinds instead of copying it; give what refuses a deep copy to the copy in another form.

    Of tensors with a graph their values, of handles of hooks one that removes nothing.
    """
    if not is_mutable(value):
        return
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, kinds):
        shared[id(value)] = value
    elif isinstance(value, RemovableHandle):
        # The copy has no hooks that it could remove; one whose hooks are gone cannot be copied a second time.
        memo[id(value)] = RemovableHandle.__new__(RemovableHandle)
        memo[id(value)].__setstate__((None, value.id))
    elif depth < 4 and isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            find_special(item, shared, memo, kinds, depth + 1)
