"""All that the package uses of torch beyond its public interface: the one file to look at when torch changes.

``tests/test_architecture.py`` checks that no other file touches a private attribute.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import _get_current_function_mode as current_function_mode
from torch.overrides import _pop_mode_temporarily as without_last_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from torch.utils.checkpoint import CheckpointFunction, checkpoint

__all__ = [
    "HOOKS",
    "BatchNorm",
    "Convolution",
    "Dropout",
    "InstanceNorm",
    "TorchDispatchMode",
    "current_function_mode",
    "keystr",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "without_last_function_mode",
]

# Base classes of layers, which torch does not export.
BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm
Convolution = nn.modules.conv._ConvNd
Dropout = nn.modules.dropout._DropoutNd

#: Attributes of a module that hold its hooks.
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)
#: Attributes of a module that hold what is registered in it; the second holds its buffers.
CONTAINERS = (PARAMETERS := "_parameters", BUFFERS := "_buffers", MODULES := "_modules")
#: That of the names of buffers that are not saved.
NOT_SAVED = "_non_persistent_buffers_set"

#: Attributes that every module has, and that of ``Module.compile``; but for ``training`` they hold its layout alone.
PLAIN = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}

#: How the names of attributes begin in which ``fully_shard`` and its like keep their state.
COMPOSABLE = "__composable_api_"


# Nodes of the autograd graph.


def sequence_number(node: Any) -> int:
    """Return the number that autograd gave to a backward node when the forward operation made it."""
    return node._sequence_nr()


def next_sequence_number() -> int:
    """Return the number that autograd will give to the next backward node of this thread."""
    return torch.autograd._get_sequence_nr()


def current_node() -> Any:
    """Return the backward node that is running in this thread; None outside of a backward pass."""
    return torch._C._current_autograd_node()


def in_backward_pass() -> bool:
    """Return whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def saves_elsewhere() -> bool:
    """Return whether hooks are set on what operations save for their backward pass, as inside of a checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def custom_function(node: Any) -> type | None:
    """Return the ``torch.autograd.Function`` that a backward node belongs to; None for an operation of torch."""
    return node._forward_cls if isinstance(node, BackwardCFunction) else None  # type: ignore[attr-defined]


def is_identity(node: Any) -> bool:
    """Return whether a backward node is one by which ``fully_shard`` notices a pass, and that changes no gradient."""
    function = custom_function(node)
    return function is not None and function.__module__.startswith("torch.distributed.fsdp.")


def custom_functions(nodes: Iterable[Any]) -> set[str]:
    """Return the names of classes of ``torch.autograd.Function``, not torch's own, among some backward nodes."""
    functions = (custom_function(node) for node in nodes)
    return {f.__name__ for f in functions if f is not None and not f.__module__.startswith("torch.")}


#: Shape, dtype and device of each output of the operation that a backward node belongs to.
metadata: Callable[[Any], Any] = operator.attrgetter("_input_metadata")


def least_precise(nodes: Iterable[Any], dtype: torch.dtype) -> torch.dtype:
    """Return the least precise floating-point type among one and the outputs of the operations of backward nodes."""
    dtypes = {dtype, *(entry.dtype for node in nodes for entry in node._input_metadata)}
    return min((kind for kind in dtypes if kind.is_floating_point), key=lambda kind: kind.itemsize)


class _Saved(dict[str, Callable[[Any], Any]]):
    def __missing__(self, name: str) -> Callable[[Any], Any]:
        self[name] = operator.attrgetter(f"_saved_{name}")
        return self[name]


#: By a name, such as that of the argument ``alpha``, what a backward node of torch saved under it.
saved = _Saved()


def call(node: Any, gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradients at the inputs of an operation from those at its outputs, without any hook of the node."""
    inputs = node(*gradients)
    return inputs if isinstance(inputs, tuple) else (inputs,)


#: Names under which nodes of a kind keep what they saved, by kind.
_SAVED: dict[type, tuple[str, ...]] = {}


def calls_users_code(node: Any) -> bool:
    """Return whether a backward node runs Python code: a custom function, or a hook that unpacks what it has saved."""
    kind = type(node)
    if kind not in _SAVED:
        _SAVED[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    if isinstance(node, BackwardCFunction):
        return True
    for name in _SAVED[kind]:
        kept = getattr(node, name)
        if isinstance(kept, tuple):
            if any(each is not None and each.unpack_hook is not None for each in kept):
                return True
        elif kept is not None and kept.unpack_hook is not None:
            return True
    return False


# Tensors and operators.


#: How often a tensor was changed in place, and the tensor that one is a view of (None where it is no view).
version: Callable[[Tensor], int] = operator.attrgetter("_version")
base: Callable[[Tensor], Tensor | None] = operator.attrgetter("_base")


def sparse_values(tensor: Tensor) -> Tensor:
    """Return the values that a sparse COO tensor stores, without coalescing it."""
    return tensor._values()


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that is the same for all Python objects of one storage."""
    return storage._cdata


#: A norm of each tensor, a copy of tensors into others, and multiples added in place, each by one kernel where there is
#: one; of one tensor at least.
foreach_norm, foreach_copy, foreach_add_ = torch._foreach_norm, torch._foreach_copy_, torch._foreach_add_


#: Operators that run a whole recurrent layer: its input, then its weights.
RECURRENT = ("mkldnn_rnn_layer", "_cudnn_rnn")


def packet(func: Any) -> Any:
    """Return the operator, such as ``aten.add``, that an overload belongs to."""
    return func._overloadpacket


def works_in_place(func: Any) -> bool:
    """Return whether an operator writes into one of its arguments."""
    return func._schema.is_mutable


# Modules.


def buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary that holds the buffers of a module itself, to read and to write."""
    return module._buffers


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, as ``named_parameters`` names and orders them, in one call."""
    trained: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    is_usual = type(module).named_parameters is nn.Module.named_parameters
    stack: list[tuple[str, Any]] = [("", module)]
    while stack:
        prefix, each = stack.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        inside = vars(each)
        if not is_usual or PARAMETERS not in inside:  # a script keeps them elsewhere
            return {name: p for name, p in module.named_parameters() if p.requires_grad}
        for name, p in inside[PARAMETERS].items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                if p.requires_grad:
                    trained[prefix + name] = p
        for name, child in reversed(inside[MODULES].items()):
            stack.append((f"{prefix}{name}.", child))
    return trained


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` was applied to a module or one inside it, to its call, or to its methods."""
    # Missing attributes of modules are looked up slowly, by an error. The third is that of Lightning's modules.
    return any(
        m._compiled_call_impl is not None or "_orig_mod" in vars(m).get(MODULES, ()) or vars(m).get("_compiler_ctx")
        for m in module.modules()
    )


def convolve(layer: nn.Conv1d, x: Tensor, weight: Tensor) -> Tensor:
    """Apply a convolution with another weight and without its bias, with the padding of the layer."""
    return layer._conv_forward(x, weight, None)


def padding_amounts(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Return how far a convolution pads its input, in the order of ``F.pad``."""
    return layer._reversed_padding_repeated_twice


def output_padding(layer: nn.ConvTranspose1d, x: Tensor, size: list[int] | None) -> list[int]:
    """Return the output padding with which a transposed convolution maps x to an output of the given size."""
    padding: Any = layer.padding
    dims = len(layer.kernel_size)
    return layer._output_padding(x, size, layer.stride, padding, layer.kernel_size, dims, layer.dilation)  # type: ignore[arg-type]


@contextlib.contextmanager
def without_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Take the hooks off parameters, and put them back at the end."""
    hooks = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    try:
        for p, _ in hooks:
            p._backward_hooks = None
        yield
    finally:
        for p, kept in hooks:
            p._backward_hooks = kept


def forget_passes(module: Any) -> None:
    """Let a module of ``fully_shard`` forget passes that were not completed, and shard its weights again.

    The outermost ones that were called do so for those inside of them; the others have nothing to forget.
    """
    if module._get_fsdp_state()._is_root:  # None before its first pass
        module.reset_iter_state()


def computes_in(module: Any) -> torch.dtype | None:
    """Return the type to which a module of ``fully_shard`` rounds its weights in each pass; None for their own."""
    return module._get_fsdp_state()._mp_policy.param_dtype


def gathered_parameters(module: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the parameters of a module of ``fully_shard``: each shard, and the whole tensor of its passes."""
    for group in getattr(module._get_fsdp_state(), "_fsdp_param_groups", ()):
        for p in group.fsdp_params:
            if hasattr(p, "_unsharded_param"):  # from its first pass on
                yield p.sharded_param, p._unsharded_param


def scales_gradients(module: Any) -> bool:
    """Return whether a module of ``fully_shard`` reduces gradients to anything else than their mean."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", ())
    return any(g.gradient_divide_factor is not None or g._all_reduce_hook is not None for g in groups)


# Activation checkpoints.


@contextlib.contextmanager
def checkpoints_without_reentrance() -> Iterator[None]:
    """Checkpoint activations without re-entrance: re-entrant checkpoints refuse ``torch.autograd.grad``."""

    def apply(function: Callable, preserve: bool, *args: Any) -> Any:
        if not any(isinstance(a, Tensor) and a.requires_grad for a in args):  # then it gives no gradient at all
            with torch.no_grad():
                return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)

    CheckpointFunction.apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply


@contextlib.contextmanager
def kept_activations() -> Iterator[None]:
    """Keep activations that would be checkpointed: products on a graph of few samples need them again and again.

    What is computed again would also be computed in another mode than the first time, as replays restore the mode.
    """

    def keep(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    name = "_checkpoint_without_reentrant_generator"
    original = getattr(torch.utils.checkpoint, name)
    setattr(torch.utils.checkpoint, name, keep)
    try:
        yield
    finally:
        setattr(torch.utils.checkpoint, name, original)


# Optimizers and schedulers.


def forget_step_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Remove the hooks that run before and after the steps of an optimizer."""
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        getattr(optimizer, hooks, {}).clear()


def first_after_step(optimizer: torch.optim.Optimizer, hook: Callable[..., Any]) -> Any:
    """Register a hook that runs after each step of an optimizer, before all others; return its handle."""
    handle = optimizer.register_step_post_hook(hook)
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)
    return handle


def copied_optimizer(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """Return a deep copy of an optimizer with all of its attributes, of which pickling keeps some only.

    Its hooks are gone, and what a scheduler puts on ``step``: both may be bound to the original. With the ``memo`` of
    the module's copy it holds the parameters of that copy.
    """
    bound = {"step", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"}
    attributes = {name: value for name, value in vars(optimizer).items() if name not in bound}
    twin = object.__new__(type(optimizer))
    vars(twin).update(copy.deepcopy(attributes, memo))
    vars(twin).update({name: OrderedDict() for name in bound - {"step"}})
    return twin


def unscales_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer divides the loss scale of mixed precision out in its step, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def overflowed(scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a gradient scaler has found gradients of an optimizer that are not finite."""
    return any(bool(flag) for flag in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values())


def parts_of(scheduler: Any) -> list[Any]:
    """Return the schedulers that a ``SequentialLR`` or ``ChainedScheduler`` is made of."""
    return scheduler._schedulers


def has_scale_function(scheduler: torch.optim.lr_scheduler.CyclicLR) -> bool:
    """Return whether a cyclic schedule was given a function ``scale_fn`` of its own."""
    return scheduler._scale_fn_custom is not None


def plain_tensors(t: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor subclass wraps: of a quantised weight its integers and scales."""
    if not is_traceable_wrapper_subclass(t):
        return [t.detach()]
    names, _ = t.__tensor_flatten__()
    return [inner for name in names for inner in plain_tensors(getattr(t, name))]
