"""The calls of modules in one forward pass, with their places in the autograd graph."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

T = TypeVar("T")
#: A class whose name ends like this *may* be a residual block; `has_skip_path` decides.
BLOCK_NAME = re.compile(r".*(Residual|Bottleneck|BasicBlock|Block|Layer)(V\d)?$|Residual.*|Inverted.*")


def is_residual_block(module: nn.Module) -> bool:
    """Return whether the class name looks like a residual block's."""
    return BLOCK_NAME.fullmatch(type(module).__name__) is not None


@dataclass(eq=False)
class Passage:
    """One call of a module.

    Attributes:
        name: of the module.
        module: itself.
        children: the calls of modules within it.
        received: the floating-point tensors that it was called with. What works in place may have changed them since.
        output: what it returned; None of the module that made ``X_0``.
        entry: the backward node of each tensor received, None where it needs no gradient.
        exit: the backward node of the first floating-point tensor of the output, as it was then.
        notes: what whoever watches wants to remember of it.
    """

    name: str
    module: nn.Module
    children: list[Passage] = field(default_factory=list)
    received: tuple[Tensor, ...] = ()
    output: Any = None
    entry: tuple[Any, ...] = ()
    exit: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def sent(self) -> Tensor | None:
        """The first floating-point tensor of the output."""
        return first_float(self.output)

    @property
    def begins(self) -> bool:
        """Whether a layer begins with it: it holds a weight matrix, or is a residual block by its class name."""
        return is_residual_block(self.module) or any(p.ndim > 1 for p in self.module.parameters())


def first_float(value: Any) -> Tensor | None:
    """The first floating-point tensor in a nested value."""
    return next((t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()), None)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one and the same, or the same view of one."""
    place = one.shape == other.shape and one.stride() == other.stride()
    return one is other or (place and overlap(one, other) and one.data_ptr() == other.data_ptr())


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, or one those of the other; not two parts that begin apart."""
    roots = [t if t._base is None else t._base for t in (one, other)]
    if roots[0] is not roots[1]:
        return False
    return any(root is t for root, t in zip(roots, (one, other))) or one.data_ptr() == other.data_ptr()


def leaves(root: Passage) -> Iterator[Passage]:
    """The calls of modules that call no other, in their order."""
    for child in root.children:
        if child.children:
            yield from leaves(child)
        else:
            yield child


def units(root: Passage) -> Iterator[Passage]:
    """As `leaves`, but residual blocks are one each."""
    for child in root.children:
        if is_residual_block(child.module) or not child.children:
            yield child
        else:
            yield from units(child)


def upstream(node: Any, stops: dict[Any, T]) -> list[T]:
    """What a node depends on directly: the entries of ``stops`` that are reached without passing through another."""
    found, seen = [], set()
    stack = [child for child, _ in node.next_functions]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in stops:
            found.append(stops[node])
        else:
            stack.extend(child for child, _ in node.next_functions)
    return found


@contextlib.contextmanager
def passages(
    module: nn.Module,
    *,
    start: list[Tensor] | None = None,
    given: Tensor | None = None,
    skip: int = 0,
    enter: Callable[[Passage], None] = lambda call: None,
    leave: Callable[[Passage], None] = lambda call: None,
) -> Iterator[Passage]:
    """Keeps the tree of the calls that are made inside.

    Args:
        module: all modules within it are seen, but for parametrizations of weights, and scripted ones.
        start: an empty list asks for ``X_0``, a leaf in the place of the first floating-point tensor that enters a
            module, or that one returns, and of the same tensor wherever it enters a later one. ``X_0`` and that tensor
            are put into the list.
        given: takes the place of ``X_0``; None is a copy of what was there.
        skip: so many floating-point tensors before it.
        enter: called with each before its module runs.
        leave: called with each after it.
    """
    root = Passage("", module)
    open_calls = [root]
    waiting, passed = start is not None, dict[int, Tensor]()
    inside: Tensor | None = None  # what goes through the network for X_0

    def leaf(value: Any) -> Any:
        nonlocal waiting, inside
        if start is None:
            return value
        flat, spec = tree_flatten(value)
        for i, one in enumerate(flat):
            if waiting and isinstance(one, Tensor) and one.is_floating_point() and one.ndim > 1:
                passed[id(one)] = one
                if len(passed) <= skip:
                    continue
                start.extend([(one if given is None else given).detach().clone().requires_grad_(), one])
                flat[i] = inside = start[0].clone()  # what comes may work in place on it
                waiting = False
            elif inside is not None and isinstance(one, Tensor) and same(one, start[1]):
                flat[i] = inside
        return tree_unflatten(flat, spec)

    def before(name: str):
        def hook(child: nn.Module, args: tuple, kwargs: dict) -> Any:
            changed = leaf((args, kwargs))
            tensors = [t for t in tree_leaves(changed) if isinstance(t, Tensor) and t.is_floating_point()]
            call = Passage(name, child, received=tuple(tensors), entry=tuple(t.grad_fn for t in tensors))
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
            of_a_layer = "parametrizations" in name.split(".")  # which is one with what makes its weight
            if not of_a_layer and not isinstance(child, torch.jit.ScriptModule):  # which takes no hooks
                stack.callback(child.register_forward_pre_hook(before(name), with_kwargs=True).remove)
                stack.callback(child.register_forward_hook(after).remove)
        yield root
