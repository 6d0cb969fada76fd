"""The states of a network after each layer, and the Jacobians between them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import kept_activations
from lsp_callbacks.autograd.double_backward import check_adjoint, double_backward, jacobian
from lsp_callbacks.autograd.graph import nodes_between, read, walk
from lsp_callbacks.autograd.module_calls import ModuleCall, record_calls, units
from lsp_callbacks.autograd.untracked import UntrackedDependencies
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator, norm
from lsp_callbacks.step.module_modes import evaluating
from lsp_callbacks.step.snapshot import Snapshot, computed_once


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a network.

    Attributes:
        name: of the module that begins it; ``name#2`` at its second call.
        modules: the names of its modules, in the order of their calls: a module without a weight matrix (an activation,
            a norm, a pooling) belongs to the layer before it.
        state: ``X_k``, the output of the last of them.
        axis: the axis of the samples in the state.
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
        axis: the axis of the samples in it.
        layers: ``X_1 ... X_L``. Functions called between two modules belong to the second.
        loss: of these samples.
        calls: the calls of all modules, as a tree.
        skip: how many floating-point tensors came before ``X_0``, on which no layer depends.
        detached: what depends on ``X_0`` without a graph.
    """

    start: Tensor
    axis: int
    layers: tuple[Layer, ...]
    loss: Tensor
    calls: ModuleCall
    skip: int = 0
    detached: UntrackedDependencies | None = field(default=None, repr=False)
    memo: dict[tuple[int, int], LinearOperator] = field(default_factory=dict, repr=False)

    @property
    def samples(self) -> int:
        """Return how many samples there are."""
        return self.start.shape[self.axis]

    def jacobian(self, k: int, j: int = 0) -> LinearOperator:
        """Return ``dX_k / dX_j``, one matrix for each sample, ``0 <= j < k <= L``.

        Cost: a backward pass for each product, and one at the first call; kept for further calls.
        """
        if (k, j) not in self.memo:
            self.memo[k, j] = self.between(k, j)
        return self.memo[k, j]

    def between(self, k: int, j: int) -> LinearOperator:
        """Return `jacobian` without keeping it: its graph is as large as that of the layers between."""
        from_, axis = (self.start, self.axis) if j == 0 else (self.layers[j - 1].state, self.layers[j - 1].axis)
        to = self.layers[k - 1]
        return jacobian(to.state, from_, axes=(to.axis, axis))


def depth(snapshot: Snapshot, *, samples: int = 4) -> Depth:
    """Return the states of the network on the first samples of the step's batch.

    The loss is replayed in eval mode (BatchNorm by its running statistics, no dropout), so that samples do not mix. A
    layer begins with a module that holds a weight matrix, or with a residual block, recognised by its class name.
    ``X_0`` is the first floating-point tensor that enters a module and that a layer depends on.

    Args:
        snapshot: a step. Without `Snapshot.sample` its whole batch is used.
        samples: how many, at most.

    Raises:
        Unmeasurable: no such tensor, no layer that depends on it, samples that mix, a function that cannot be
            differentiated twice, or one that uses the same tensor once more, outside of all modules.

    Cost: a forward pass, and a forward product for the check, on ``samples`` samples; shared by all quantities of the
    step.
    """
    return _depth(snapshot, samples)


#: Floating-point tensors that are tried as the input of the network.
TRIES = 3


@computed_once
def _depth(snapshot: Snapshot, samples: int) -> Depth:
    network = states(snapshot, samples=samples)
    _check_samples(network)
    return network


def states(
    snapshot: Snapshot,
    *,
    samples: int | None = None,
    axis: int | None = None,
    start: Tensor | None = None,
    skip: int | None = None,
) -> Depth:
    """Return the states of `depth`, for the step as it was or with another input, without checking that samples mix.

    Args:
        snapshot: a step.
        samples: None replays the whole step in its own mode, with dropout and batch statistics.
        axis: the axis of the samples in ``X_0``; None infers it.
        start: the value of ``X_0``; None takes the step's.
        skip: see `Depth`; None infers it.

    Raises:
        Unmeasurable: as `depth`.

    Cost: a forward pass.
    """
    for passed in range(TRIES) if skip is None else [skip]:  # what enters first may only be rounded to words
        network = _from_input(snapshot, samples, axis, start, passed)
        if network is not None:
            return network
    raise Unmeasurable("no module with a weight matrix depends on the first input: there is no depth to measure")


def _from_input(
    snapshot: Snapshot, samples: int | None, axis: int | None, given: Tensor | None, skip: int
) -> Depth | None:
    """Return the states from the floating-point tensor after ``skip`` others; None where no layer depends on it."""
    module, start = snapshot.module, list[Tensor]()
    with contextlib.ExitStack() as stack:
        if samples is not None:
            stack.enter_context(evaluating(module))
        stack.enter_context(double_backward(module))
        stack.enter_context(kept_activations())
        root = stack.enter_context(record_calls(module, start=start, given=given, skip=skip))
        detached = stack.enter_context(UntrackedDependencies(start))
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
        raise Unmeasurable(
            f"cannot find the batch axis: neither of the first two axes of the first input, shape {tuple(x.shape)}, "
            f"has the size {count} of the batch: put the samples on one of them"
        )
    layers: list[Layer] = []
    calls = [(call, call.sent) for call in units(root)]
    dependent = nodes_between([y for _, y in calls if y is not None], [x])
    for call, y in calls:
        if y is None or y.grad_fn not in dependent:
            continue
        at = _axis(y, count, axis)
        if at is None:  # rows that are no samples: tokens, windows
            continue
        if call.begins_layer:
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
    """Return the axis of the samples: the first, or the second, as for sequences; None if neither has their number."""
    return next((a for a in (first, 0, 1) if tensor.ndim > a and tensor.shape[a] == samples), None)


def _check_samples(network: Depth) -> None:
    """Raise an error if a displacement of one sample moves another, or if forward products are wrong."""
    J = network.jacobian(len(network.layers))
    check_adjoint(J, read(network.loss), "the network")
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(network.samples, J.shape[1], generator=generator, dtype=J.dtype).to(J.device)
    v[1:] = 0
    moved = norm(J @ v, -1)
    if bool((moved[1:] > 1e-4 * moved[0]).any()):
        raise Unmeasurable(
            "one sample's input changes another's output, also in eval mode (a norm over the batch, or a batch axis "
            "that is neither first nor second): the Jacobian of one sample is not defined"
        )


def _check_input(state: Tensor, detached: UntrackedDependencies) -> None:
    """Raise an error if a function used the tensor that X_0 replaced: the derivative along that path would be lost."""
    for node in walk([state.grad_fn]) if detached.reused else ():
        if name := detached.reused.get(node):
            raise Unmeasurable(
                f"the input is used again outside of the module that it entered first, by {name}, where its derivative "
                "would be lost: do so in a module that is given the input"
            )
