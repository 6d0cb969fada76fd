"""The states of a network on its way through depth, and the Jacobians between them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks.autograd.module_calls import Passage, passages, units
from lsp_callbacks.autograd.untracked import Detached
from lsp_callbacks.linalg import LinearOperator, norm
from lsp_callbacks.operators.curvature.hessian import double_backward
from lsp_callbacks.operators.sgd.sample_rows import check_adjoint, jacobian
from lsp_callbacks.step.replay import kept_activations
from lsp_callbacks.step.snapshot import Snapshot, Unmeasurable, evaluating


@dataclass(frozen=True, eq=False)
class Layer:
    """One step in depth.

    Attributes:
        name: of the module that begins it; ``name#2`` at its second call.
        modules: the names of those that belong to it, in the order of their calls: what has no weight matrix (an
            activation, a norm, a pooling) belongs to the layer before it.
        state: ``X_k``, what the last of them returned.
        axis: of the samples in the state.
    """

    name: str
    modules: tuple[str, ...]
    state: Tensor
    axis: int


@dataclass(frozen=True, eq=False)
class Depth:
    """A network on some samples, in eval mode, with its graph.

    Attributes:
        start: ``X_0``: the input of the network, or what its first module makes of integers (an embedding).
        axis: of the samples in it.
        layers: ``X_1 ... X_L``. Functions called between two modules belong to the second.
        loss: of these samples.
        calls: of all modules, as a tree.
        skip: floating-point tensors that came before ``X_0``, on which no layer depends.
        detached: what depends on ``X_0`` without a graph.
    """

    start: Tensor
    axis: int
    layers: tuple[Layer, ...]
    loss: Tensor
    calls: Passage
    skip: int = 0
    detached: Detached | None = field(default=None, repr=False)
    memo: dict[tuple[int, int], LinearOperator] = field(default_factory=dict, repr=False)

    @property
    def samples(self) -> int:
        return self.start.shape[self.axis]

    def jacobian(self, k: int, j: int = 0) -> LinearOperator:
        """``dX_k / dX_j`` with one matrix for each sample, ``0 <= j < k <= L``; see `samples.jacobian` for the cost."""
        if (k, j) not in self.memo:
            self.memo[k, j] = self.between(k, j)
        return self.memo[k, j]

    def between(self, k: int, j: int) -> LinearOperator:
        """As `jacobian`, but not kept: its graph is as large as that of the layers between."""
        from_, axis = (self.start, self.axis) if j == 0 else (self.layers[j - 1].state, self.layers[j - 1].axis)
        to = self.layers[k - 1]
        return jacobian(to.state, from_, axes=(to.axis, axis))


def depth(snapshot: Snapshot, *, samples: int = 4) -> Depth:
    """The states of the network on the first samples of the step's batch.

    The loss is replayed in eval mode (BatchNorm by its running statistics, no dropout), so that samples do not mix. A
    layer begins with a module that holds a weight matrix, or with a residual block, told by its class name. ``X_0`` is
    the first floating-point tensor that enters a module and that a layer depends on.

    Args:
        snapshot: a step. Without `Snapshot.sample` its whole batch is taken.
        samples: how many, at most.

    Raises:
        Unmeasurable: no such tensor, no layer that depends on it, samples that mix, a function that cannot be
            differentiated twice, or one that takes in the same tensor once more, outside of all modules.

    Cost: a forward pass, and a forward product for the check, on ``samples`` samples; shared by all quantities of the
    step.
    """
    return snapshot.once(("depth", samples), lambda: _depth(snapshot, samples))


#: Floating-point tensors that are tried as the input of the network.
TRIES = 3


def _depth(snapshot: Snapshot, samples: int) -> Depth:
    found = states(snapshot, samples=samples)
    _check_samples(found)
    return found


def states(
    snapshot: Snapshot,
    *,
    samples: int | None = None,
    axis: int | None = None,
    start: Tensor | None = None,
    skip: int | None = None,
) -> Depth:
    """As `depth`, of the step as it was or with another input; whether samples mix is not checked.

    Args:
        snapshot: a step.
        samples: None replays the whole step in its own mode: dropout, batch statistics and all.
        axis: of the samples in ``X_0``, where it is known.
        start: takes the place of ``X_0``.
        skip: see `Depth`, where it is known.

    Raises:
        Unmeasurable: as `depth`.

    Cost: a forward pass.
    """
    for passed in range(TRIES) if skip is None else [skip]:  # what enters first may only be rounded to words
        found = _begun(snapshot, samples, axis, start, passed)
        if found is not None:
            return found
    raise Unmeasurable("no module with a weight matrix depends on the first input: there is no depth to measure")


def _begun(snapshot: Snapshot, samples: int | None, axis: int | None, given: Tensor | None, skip: int) -> Depth | None:
    """The states from the first floating-point tensor on, but for ``skip``; None where no layer depends on it."""
    module, start = snapshot.module, list[Tensor]()
    with contextlib.ExitStack() as stack:
        if samples is not None:
            stack.enter_context(evaluating(module))
        stack.enter_context(double_backward(module))
        stack.enter_context(kept_activations())
        root = stack.enter_context(passages(module, start=start, given=given, skip=skip))
        detached = stack.enter_context(Detached(start))
        whole = samples is None or snapshot.sample is None
        loss, size = (snapshot.replay(), None) if whole else snapshot.sample(samples)  # type: ignore[misc, arg-type]
    if not start and skip:
        return None
    if not start:
        raise Unmeasurable("no module received or returned a floating-point tensor: depth begins nowhere")
    x = start[0]
    count = x.shape[axis or 0] if size is None else size
    axis = _axis(x, count) if axis is None else axis
    if axis is None:
        raise Unmeasurable(f"of {count} samples the network's first input is {tuple(x.shape)}: which are they?")
    layers: list[Layer] = []
    reached = _Reached(x)
    for call in units(root):
        y = call.sent
        if y is None or not reached(y):
            continue
        at = _axis(y, count, axis)
        if at is None:  # rows that are no samples: tokens, windows
            continue
        if call.begins:
            seen = sum(layer.modules[0] == call.name for layer in layers)
            layers.append(Layer(f"{call.name}#{seen + 1}" if seen else call.name, (call.name,), y, at))
        elif layers:
            last = layers[-1]
            layers[-1] = Layer(last.name, (*last.modules, call.name), y, at)
    if not layers:
        return None
    _check_input(layers[-1].state, detached)
    return Depth(x, axis, tuple(layers), loss, root, skip, detached)


def _axis(tensor: Tensor, samples: int, first: int = 0) -> int | None:
    """Of the samples: the first, but for sequences that have them second (``batch_first=False``)."""
    return next((a for a in (first, 0, 1) if tensor.ndim > a and tensor.shape[a] == samples), None)


def _check_samples(found: Depth) -> None:
    """One sample moves alone, and no other may follow; products forward are those of the derivative."""
    J = found.jacobian(len(found.layers))
    check_adjoint(J, found.loss, "the network")
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(found.samples, J.shape[1], generator=generator, dtype=J.dtype).to(J.device)
    v[1:] = 0
    moved = norm(J @ v, -1)
    if bool((moved[1:] > 1e-4 * moved[0]).any()):
        raise Unmeasurable(
            "one sample's input changes another's output, also in eval mode (a norm over the batch, or a batch axis "
            "that is neither first nor second): the Jacobian of one sample is not defined"
        )


def _check_input(state: Tensor, detached: Detached) -> None:
    """No function may have taken in the tensor that X_0 took the place of: that path would be held fixed."""
    stack, seen = [state.grad_fn], set[Any]()
    while detached.again and stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if name := detached.again.get(node):
            raise Unmeasurable(
                f"the input is used again outside of the module that it entered first, by {name}, where its derivative "
                "would be lost: do so in a module that is given the input"
            )
        seen.add(node)
        stack.extend(child for child, _ in node.next_functions)


class _Reached:
    """Whether a tensor depends on the leaf, by its graph."""

    def __init__(self, leaf: Tensor):
        self.leaf, self.known = leaf, dict[Any, bool]()

    def __call__(self, tensor: Tensor) -> bool:
        stack = [tensor.grad_fn]
        while stack:  # in post-order, without recursion: graphs are deep
            node = stack[-1]
            if node is None or node in self.known:
                stack.pop()
                continue
            if getattr(node, "variable", None) is self.leaf:
                self.known[node] = True
                continue
            children = [child for child, _ in node.next_functions if child is not None]
            fresh = [child for child in children if child not in self.known]
            if fresh:
                stack += fresh
            else:
                self.known[node] = any(self.known[child] for child in children)
        return bool(self.known.get(tensor.grad_fn, False))
