"""Which operation made the first NaN or Inf of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import (
    keystr,
    storage_key,
    tree_flatten_with_path,
    tree_leaves,
    works_in_place,
)
from lsp_callbacks.autograd.op_mode import Operation, Operations, floats

Kind = Literal["NaN", "Inf"]
Where = Literal["forward", "backward", "batch", "weights", "unknown"]

#: What they return is not computed, and may be anything.
_EMPTY = ("aten.empty", "aten.new_empty", "aten.resize")
#: Constants and buffers of Inf are masks, or were moved by the step already: guilty only where nothing else is.
_GUILTY, _INNOCENT = 0, 1


@dataclass(frozen=True)
class Fault:
    """The reason why a step is not finite.

    Attributes:
        step: number of the optimizer step.
        where: "forward"; "backward": the loss is finite; "batch" and "weights": NaN or Inf was there before the step;
            "unknown": a replay of the step does not show it, and ``reason`` says why.
        kind: "NaN" or "Inf", of what came first; None where that is unknown.
        module: name of the innermost module to which the operation belongs; "" is outside of all submodules.
        operation: such as "aten.sqrt".
        inputs: types and shapes of what it took.
        dtype: of what it gave.
        source: the tensor, where none was computed: "batch[0]", "net.0.weight".
        node: of the autograd graph, where the operation belongs to a backward pass: "SqrtBackward0".
        forward: the operation whose backward pass that is.
        then: the operation that made NaN of Inf, where the two differ.
        reason: what else is to be said.
        rank: of the process, where there are several.
    """

    step: int
    where: Where
    kind: Kind | None = None
    module: str | None = None
    operation: str | None = None
    inputs: tuple[str, ...] = ()
    dtype: str | None = None
    source: str | None = None
    node: str | None = None
    forward: str | None = None
    then: str | None = None
    reason: str = ""
    rank: int | None = None

    def __str__(self) -> str:
        """Return what happened, in words."""
        text = self._what() + (f", and {self.then} made NaN of it" if self.then else "")
        text += f" ({self.reason})" if self.reason else ""
        return text if self.rank is None else f"on rank {self.rank}, {text}"

    def _what(self) -> str:
        if self.where == "unknown":
            return "no operation can be named"
        if self.source is not None:
            holder = {"batch": "the batch", "weights": "the module"}.get(self.where, "a tensor from outside")
            return f"{holder} holds {self.kind}: {self.source}"
        place = f"in module {self.module!r}" if self.module else "outside of all submodules"
        at = f"of {', '.join(self.inputs) or 'no tensor'}"
        if self.where == "forward":
            return f"{self.operation} {place} gave {self.kind} in {self.dtype}, {at}"
        if self.node is None:
            return (
                f"the loss is finite and its gradient is not: {self.operation} {place} gave {self.kind}, "
                f"{at}, which the forward pass masked and the backward pass uses again"
            )
        backward = f"{self.node}, the backward pass of {self.forward}" if self.forward else f"{self.node}"
        return (
            f"the loss is finite and its gradient is not: {backward} {place}, gave {self.kind} ({self.operation} {at})"
        )


@dataclass(frozen=True)
class _Origin:
    """The origin of the NaN or Inf of a tensor; ordered by guilt, then by time."""

    guilt: int
    time: int
    kind: Kind
    operation: Operation | None = None
    inputs: tuple[str, ...] = ()
    dtype: str | None = None
    where: Where | None = None
    source: str | None = None
    then: str | None = None
    reason: str = ""


class _Tracer(Operations):
    """Follows NaN and Inf from tensor to tensor, by their storages."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._origins: dict[int, dict[Kind, _Origin]] = {}
        self._held: list[Any] = []  # a storage that is freed would give its address to another one
        self._time = 0

    def seed(self, tensors: list[tuple[str, Tensor]], where: Where, guilt: int = _GUILTY) -> None:
        """Record what is not finite before the first operation."""
        for k, (name, tensor) in enumerate(tensors):
            for part in floats(tensor):
                for kind in kinds(part):
                    self._blame(part, _Origin(guilt, k - len(tensors), kind, where=where, source=name))

    def of(self, tensors: list[Tensor]) -> _Origin | None:
        """Return the earliest origin of what is not finite in tensors, culprits first; None if all are finite."""
        origins = [self._origin(t, kind) for t in tensors for kind in kinds(t)]
        return min(origins, key=lambda origin: (origin.guilt, origin.time), default=None)

    def run(self, operation: Operation, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs = floats((args, kwargs))
        before = [(t, kinds(t)) for t in inputs]
        said = tuple(f"{_short(t)} {tuple(t.shape)}" for t in inputs)
        out = func(*args, **kwargs)
        self._time += 1
        if operation.name.startswith(_EMPTY):
            return out
        for tensor in floats(out) + (inputs if works_in_place(func) else []):
            for kind in kinds(tensor):
                origin = self._cause(kind, operation, before, (args, kwargs))
                self._blame(tensor, replace(origin, inputs=origin.inputs or said, dtype=origin.dtype or _short(tensor)))
        return out

    def _cause(
        self,
        kind: Kind,
        operation: Operation,
        before: list[tuple[Tensor, set[Kind]]],
        given: Any,
    ) -> _Origin:
        nan = [self._origin(t, "NaN") for t, held in before if "NaN" in held]
        inf = [self._origin(t, "Inf") for t, held in before if "Inf" in held]
        # NaN of an Inf that should not be there goes back to that.
        turned = [replace(origin, then=origin.then or operation.name) for origin in inf if origin.guilt == _GUILTY]
        inherited = nan + turned if kind == "NaN" else inf
        if inherited:
            return min(inherited, key=lambda origin: (origin.guilt, origin.time))
        meant = kind == "Inf" and _infinite(given)
        reason = "of constants that are Inf, as in a mask that leaves nothing" if inf else ""
        return _Origin(_INNOCENT if meant else _GUILTY, self._time, kind, operation, reason=reason)

    def _origin(self, tensor: Tensor, kind: Kind) -> _Origin:
        recorded = self._origins.get(storage_key(tensor.untyped_storage()), {}).get(kind)
        if recorded is not None:
            return recorded
        # Made by no operation: a constant. Those of Inf are meant.
        guilt = _INNOCENT if kind == "Inf" else _GUILTY
        return _Origin(guilt, self._time, kind, where="forward", source=f"a constant {tuple(tensor.shape)}")

    def _blame(self, tensor: Tensor, origin: _Origin) -> None:
        storage = tensor.untyped_storage()
        origins = self._origins.setdefault(storage_key(storage), {})
        kind: Kind = "NaN" if origin.then else origin.kind
        origins.setdefault(kind, origin)
        self._held.append(storage)


def kinds(tensor: Tensor) -> set[Kind]:
    """Return which of NaN and Inf a tensor holds."""
    with torch.no_grad():
        t = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        t = t.float() if t.element_size() < 2 else t  # there are no kernels for eight bits
        held: set[Kind] = set()
        if not bool(t.isfinite().all()):
            held |= {"NaN"} if bool(t.isnan().any()) else set()
            held |= {"Inf"} if bool(t.isinf().any()) else set()
        return held


def first_fault(
    loss: Callable[[], Tensor | None], module: nn.Module, batch: Any = None, *, step: int = 0
) -> Fault | None:
    """Return the first operation that gives NaN or Inf, of those that reach the loss or its gradient.

    The gradient is looked at where the loss is finite. One forward and one backward pass, in which every
    operation's inputs and outputs are looked at, and what is not finite is followed from tensor to tensor. An operation
    is to blame for a NaN if its inputs hold neither NaN nor an Inf that an operation made by overflow or division; of
    an Inf that later becomes NaN the maker is named. Inf that is meant (``masked_fill(mask, -inf)``, constants,
    buffers) is nobody's fault; what makes NaN of it is. What is masked out and reaches neither loss nor gradient is
    passed over.

    Args:
        loss: one forward pass, which leaves the parameters alone.
        module: whose submodules and parameters give the names. The module must not be the user's own: it carries hooks.
        batch: what ``loss`` reads; its tensors are named by their places.
        step: for the result.

    Returns:
        None if loss and gradient are finite.

    Cost: one gradient, with several looks at each operation: some 10 to 100 times as long. Memory: as activations, what
    is not finite is kept.

    What to do: see that the operation's argument stays in its domain (``clamp``, ``eps``, a mask *before* the operation
    instead of after it), or compute it in float32; where weights grow before, lower the learning rate.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import first_fault
        >>> net = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.zeros_(net.weight), torch.nn.init.zeros_(net.bias)
        >>> print(first_fault(lambda: net(torch.ones(1, 2)).log().sum(), net))
        aten.log outside of all submodules gave Inf in float32, of float32 (1, 1)
    """
    tracer = _Tracer(module)
    leaves = [(f"batch{keystr(path)}", leaf) for path, leaf in tree_flatten_with_path(batch)[0]]
    tracer.seed([(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)], "batch")
    tracer.seed(list(module.named_parameters()), "weights")
    tracer.seed(list(module.named_buffers()), "weights", _INNOCENT)
    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.enable_grad(), tracer.watching():
        value = loss()
        if value is None:
            return None
        if (origin := tracer.of([value.detach()])) is not None:
            return _fault(step, origin, "forward")
        if not value.requires_grad:
            return None
        gradients = torch.autograd.grad(value, parameters, torch.ones_like(value), allow_unused=True)
        origin = tracer.of(floats(gradients))
    return None if origin is None else _fault(step, origin, "backward")


def _fault(step: int, origin: _Origin, where: Where) -> Fault:
    operation = origin.operation
    shared: dict[str, Any] = {
        "kind": origin.kind,
        "source": origin.source,
        "then": origin.then,
        "reason": origin.reason,
    }
    if operation is None:
        return Fault(step, origin.where or where, **shared)
    return Fault(
        step, where, module=operation.module, operation=operation.name, inputs=origin.inputs, dtype=origin.dtype,
        node=operation.node, forward=operation.forward, **shared,
    )  # fmt: skip


def _infinite(given: Any) -> bool:
    """Return whether a number among the arguments is Inf."""
    return any(isinstance(leaf, float) and leaf in (float("inf"), float("-inf")) for leaf in tree_leaves(given))


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
