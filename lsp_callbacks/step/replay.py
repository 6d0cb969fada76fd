"""Running a training step again without leaving a trace."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader, Dataset

from lsp_callbacks.autograd._torch_internals import (
    CONTAINERS,
    HOOKS,
    buffers,
    checkpoints_without_reentrance,
    tree_map,
    without_hooks,
)
from lsp_callbacks.autograd.random_state import RandomState, TorchRandomState
from lsp_callbacks.step.muted import muted
from lsp_callbacks.step.snapshot import Unmeasurable

_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size)


class ModuleCopy:
    """A copy of a module that shares its parameters and nothing else.

    Buffers, Python attributes, metrics and caches are copied when the copy is made, which must be *before* the
    step's forward pass, and put back to that state by `reset` before each replay. The user's own hooks (functions and
    methods) are not copied, as their side effects could not be taken back; hook objects, such as those of
    ``torch.nn.utils.spectral_norm``, are.

    Args:
        module: the module to copy.
        shared: further objects to share, as the parameters; datasets and loaders always are.
        prepare: applied once to the copy, for instance to mute its logging.

    Raises:
        Exception: where something in the module cannot be copied; the caller says what to do.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        shared: Iterable[Any] = (),
        prepare: Callable[[nn.Module], None] = lambda copy: None,
    ):
        memo: dict[int, Any] = {}
        self._shared = {id(one): one for one in (*module.parameters(), *shared)}
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
        self._state = [_State(child) for child in self.module.modules()]

    def buffers(self) -> list[Tensor | None]:
        """The buffers that `reset` puts back, on the CPU, in the order of the modules."""
        return [None if b is None else b.cpu() for state in self._state for b in state.buffers.values()]

    def load_buffers(self, buffers: list[Tensor | None]) -> None:
        """Takes those of another process instead."""
        given = iter(buffers)
        for state in self._state:
            for (name, own), other in zip(list(state.buffers.items()), given):
                state.buffers[name] = None if own is None or other is None else other.to(own.device)

    def reset(self) -> nn.Module:
        """The module as it was before the step."""
        # One memo for all, so that what two modules share stays one object.
        memo = self._shared | {id(m): m for m in self.module.modules()}
        for state in self._state:
            state.restore(memo)
        return self.module


class _State:
    """Attributes and buffers of one module (not of its children)."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.attributes = dict(vars(module))
        self.containers = {name: dict(value) for name, value in vars(module).items() if name in CONTAINERS}
        self.buffers = {name: None if b is None else b.detach().clone() for name, b in buffers(module).items()}
        plain = vars(nn.Module())
        # A deep copy for each replay is dear: only of what a training step could change in place.
        self.mutable = {
            name: value
            for name, value in vars(module).items()
            if name not in plain and not isinstance(value, (*_ATOMS, types.FunctionType, nn.Module, nn.Parameter))
        }

    def restore(self, memo: dict[int, Any]) -> None:
        own = vars(self.module)
        own.clear()
        own.update(self.attributes)
        own.update({name: copy.deepcopy(value, memo) for name, value in self.mutable.items()})
        for name, entries in self.containers.items():
            container = own[name]
            container.clear()
            container.update(entries)
        for name, saved in self.buffers.items():
            buffers(self.module)[name] = None if saved is None else saved.clone()


def _is_users(hook: Any) -> bool:
    return isinstance(hook, types.FunctionType | types.MethodType | functools.partial | types.BuiltinFunctionType)


def _find_special(value: Any, shared: dict[int, Any], memo: dict[int, Any], depth: int = 0) -> None:
    """Data are shared, not copied; non-leaf tensors refuse to be deep-copied: give their values to the copy."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, Dataset | DataLoader):
        shared[id(value)] = value
    elif depth < 4 and isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            _find_special(item, shared, memo, depth + 1)


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the global random states are afterwards what they were, and the module unused.

    Its parameters are shared with the copy, so hooks on them are off: autograd would call them. A function that a user
    stored on the module may hold on to the module itself, in a copy too: calling the module raises. Nothing is
    compiled, as every copy would be compiled anew. Activations are checkpointed without re-entrance, as re-entrant
    checkpoints take no ``torch.autograd.grad``, and hide what is inside.
    """
    before = RandomState()
    own = {id(m) for m in module.modules()}

    def refuse(called: nn.Module, args: tuple) -> None:
        if id(called) in own:
            raise Unmeasurable(
                f"the copy of the module calls the {type(called).__name__} of the original (through a lambda or a "
                "closure that holds it): make that function a method, or pass loss_fn=..."
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        with (
            without_hooks(module.parameters()),
            torch.compiler.set_stance("force_eager"),
            checkpoints_without_reentrance(),
        ):
            yield
    finally:
        handle.remove()
        before.restore()


def copied(batch: Any) -> Any:
    """A deep copy; the quick way for the usual containers of tensors."""
    return tree_map(lambda leaf: leaf.clone() if type(leaf) is Tensor else copy.deepcopy(leaf), batch)


@dataclass
class MicroBatch:
    """One forward pass of a step, with all that it takes to run it again.

    Attributes:
        batch: as the step received it; copied before each use.
        loss: ``(module, batch) -> scalar``, as it is differentiated: under accumulation already divided. None is a
            forward pass without a loss.
        random_state: taken before it.
        own: the loss that the step had; None where nobody saw it.
    """

    batch: Any
    loss: Callable[[nn.Module, Any], Tensor | None]
    random_state: TorchRandomState = field(default_factory=RandomState)
    own: Tensor | None = None


def replayer(module_copy: ModuleCopy, parts: Sequence[MicroBatch]) -> Callable[[], Tensor]:
    """``() -> loss`` of a step: at each call fresh batches, buffers and random states, see also `muted`.

    The losses of the micro-batches are summed in their order, and buffers evolve through them as they did. The graphs
    of all of them are held at once.

    Args:
        module_copy: made before the step.
        parts: the micro-batches between two updates; one without accumulation.
    """

    def replay() -> Tensor:
        module = module_copy.reset()
        losses = []
        for part in parts:
            part.random_state.restore()
            with muted():
                losses.append(part.loss(module, copied(part.batch)))
        total = summed(losses)
        if total is None:
            raise Unmeasurable("the replayed step has no loss")
        return total.reshape(()) if total.numel() == 1 else total  # backward() takes one number in any shape

    return replay


def summed(losses: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of those that are there, in their order; None of none."""
    there = [loss for loss in losses if loss is not None]
    return functools.reduce(torch.add, there) if there else None
