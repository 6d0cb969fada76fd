"""The calls of modules in one forward pass, with their places in the autograd graph."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import base, tree_flatten, tree_leaves, tree_unflatten
from lsp_callbacks.autograd.graph import inputs_of, walk

T = TypeVar("T")
#: A class whose name matches *may* be a residual block; `has_skip_path` decides.
BLOCK_NAME = re.compile(r".*(Residual|Bottleneck|BasicBlock|Block|Layer)(V\d)?$|Residual.*|Inverted.*")


def is_residual_block(module: nn.Module) -> bool:
    """Return whether the class name looks like that of a residual block."""
    return BLOCK_NAME.fullmatch(type(module).__name__) is not None


@dataclass(eq=False)
class ModuleCall:
    """One call of a module.

    Attributes:
        name: of the module.
        module: the module itself.
        children: the calls of modules within it.
        received: the floating-point tensors among its arguments. Operations in place may have changed them since.
        output: what it returned; None for the module whose output became ``X_0``.
        entry: the backward node of each tensor received, None where it needs no gradient.
        exit: the backward node of the first floating-point tensor of the output, as it was at the return.
        notes: free for the code that records the calls.
    """

    name: str
    module: nn.Module
    children: list[ModuleCall] = field(default_factory=list)
    received: tuple[Tensor, ...] = ()
    output: Any = None
    entry: tuple[Any, ...] = ()
    exit: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def sent(self) -> Tensor | None:
        """Return the first floating-point tensor of the output."""
        return first_float(self.output)

    @property
    def begins_layer(self) -> bool:
        """Return whether a layer begins with it: it holds a weight matrix, or looks like a residual block."""
        return is_residual_block(self.module) or any(p.ndim > 1 for p in self.module.parameters())


def first_float(value: Any) -> Tensor | None:
    """Return the first floating-point tensor in nested containers."""
    return next((t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()), None)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are one object, or the same view of one tensor."""
    layout = a.shape == b.shape and a.stride() == b.stride()
    return a is b or (layout and overlap(a, b) and a.data_ptr() == b.data_ptr())


def overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors share numbers: one is the other's base, or both are views that begin at one place."""
    roots = [t if base(t) is None else base(t) for t in (a, b)]
    if roots[0] is not roots[1]:
        return False
    return any(root is t for root, t in zip(roots, (a, b))) or a.data_ptr() == b.data_ptr()


def leaves(root: ModuleCall) -> Iterator[ModuleCall]:
    """Yield the calls of modules that call no other module, in their order."""
    for child in root.children:
        if child.children:
            yield from leaves(child)
        else:
            yield child


def units(root: ModuleCall) -> Iterator[ModuleCall]:
    """Yield the calls of `leaves`, with each residual block as one call."""
    for child in root.children:
        if is_residual_block(child.module) or not child.children:
            yield child
        else:
            yield from units(child)


def upstream(node: Any, stops: dict[Any, T]) -> list[T]:
    """Return the entries of ``stops`` whose nodes a node depends on without another of them in between."""
    return [stops[other] for other in walk(inputs_of(node), stop=stops) if other in stops]


@contextlib.contextmanager
def record_calls(
    module: nn.Module,
    *,
    start: list[Tensor] | None = None,
    given: Tensor | None = None,
    skip: int = 0,
    enter: Callable[[ModuleCall], None] = lambda call: None,
    leave: Callable[[ModuleCall], None] = lambda call: None,
) -> Iterator[ModuleCall]:
    """Record the calls that are made inside, as a tree under a call without a name.

    Args:
        module: all modules within it are recorded, except parametrizations of weights and scripted modules.
        start: an empty list asks for ``X_0``, a leaf that replaces the first floating-point tensor that enters a
            module, or that one returns, and the same tensor wherever it enters a later one. ``X_0`` and the tensor that
            it replaced are put into the list.
        given: the value of ``X_0``; None copies the tensor that it replaces.
        skip: how many floating-point tensors to pass over before it.
        enter: called with each call before its module runs.
        leave: called with each call after it.
    """
    root = ModuleCall("", module)
    open_calls = [root]
    waiting, passed = start is not None, dict[int, Tensor]()
    inside: Tensor | None = None  # what goes through the network for X_0

    def leaf(value: Any) -> Any:
        nonlocal waiting, inside
        if start is None:
            return value
        flat, spec = tree_flatten(value)
        for i, item in enumerate(flat):
            if waiting and isinstance(item, Tensor) and item.is_floating_point() and item.ndim > 1:
                passed[id(item)] = item
                if len(passed) <= skip:
                    continue
                start.extend([(item if given is None else given).detach().clone().requires_grad_(), item])
                flat[i] = inside = start[0].clone()  # later operations may work in place on it
                waiting = False
            elif inside is not None and isinstance(item, Tensor) and same(item, start[1]):
                flat[i] = inside
        return tree_unflatten(flat, spec)

    def before(name: str):
        def hook(child: nn.Module, args: tuple, kwargs: dict) -> Any:
            changed = leaf((args, kwargs))
            tensors = [t for t in tree_leaves(changed) if isinstance(t, Tensor) and t.is_floating_point()]
            call = ModuleCall(name, child, received=tuple(tensors), entry=tuple(t.grad_fn for t in tensors))
            open_calls[-1].children.append(call)
            open_calls.append(call)
            enter(call)
            return changed

        return hook

    def after(child: nn.Module, args: tuple, output: Any) -> Any:
        call = open_calls.pop()
        if waiting and not call.children:
            return leaf(output)
        call.output, sent = output, first_float(output)
        call.exit = None if sent is None else sent.grad_fn
        leave(call)
        return output

    with contextlib.ExitStack() as stack:
        for name, child in module.named_modules():
            in_parametrization = "parametrizations" in name.split(".")  # part of the layer whose weight it makes
            if not in_parametrization and not isinstance(child, torch.jit.ScriptModule):  # which takes no hooks
                stack.callback(child.register_forward_pre_hook(before(name), with_kwargs=True).remove)
                stack.callback(child.register_forward_hook(after).remove)
        yield root
