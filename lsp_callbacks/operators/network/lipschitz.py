"""An upper bound of a network's Lipschitz constant, from the graph of one forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch

from lsp_callbacks.autograd._torch_internals import metadata, saved
from lsp_callbacks.autograd.graph import inputs_of, leaf_of, walk
from lsp_callbacks.autograd.module_calls import ModuleCall, leaves
from lsp_callbacks.functional.network.lipschitz import layer_lipschitz, overlap
from lsp_callbacks.operators.network.activation_slopes import NODES, kind
from lsp_callbacks.operators.network.depth import Depth
from lsp_callbacks.step.module_modes import evaluating


class Uncertified(ValueError):
    """No finite bound is known for an operation between input and output; the message names it."""


def lipschitz_upper(depth: Depth) -> float:
    """Return an upper bound of the Lipschitz constant of ``X_0 -> X_L`` in eval mode, in the norm of one sample.

    Constants multiply along a chain and add where branches are summed: ``1 + L_f`` for a residual block ``x + f(x)``.
    Layers count with the norm of the operator that they apply, norms over the batch with their running statistics,
    LayerNorm, GroupNorm and RMSNorm with ``max |gain| / sqrt(eps)``, which they attain at constant inputs, activations
    with the supremum of their slope. The bound holds for all inputs. It can be above the truth by orders of magnitude.

    Raises:
        Uncertified: at a product of two signals (attention, gates), which has no constant at all, at operations without
            a rule, and where a signal is used without its graph (``detach``, ``no_grad``, a mask, a number that is read
            out of it): that branch depends on the input, and no derivative shows it.

    Cost: the norms, about ``60 / (3 B)`` gradients at batch size B. Norms of layers whose shorter side is above 256 are
    not exact: 30 steps of Lanczos, enlarged so that each holds with probability 0.999 (`linalg.spectrum_bounds`), by at
    most some 3 %. Source: Szegedy et al. 2014, Sec. 4.3; Katende 2025, Thm 4.1.
    """
    with evaluating(depth.calls.module):  # so that reading a parametrised weight does not move its buffers
        return _Walk(depth).bound(depth.layers[-1].state.grad_fn)


_VIEWS = {
    "Alias", "Clone", "Contiguous", "ConstantPadNd", "Neg", "Permute", "Reshape", "ReshapeAlias", "Select", "Slice",
    "Split", "SplitWithSizes", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView",
    "Unsqueeze", "View",
}  # fmt: skip


class _Walk:
    """The bounds of all nodes between the input and the output of a network."""

    def __init__(self, depth: Depth):
        self.start, self.detached = depth.start, depth.detached
        self.calls: dict[Any, ModuleCall] = {}
        for call in leaves(depth.calls):
            if call.exit is not None and call.exit not in call.entry:
                self.calls[call.exit] = call
        self.constants: dict[Any, float] = {}  # of modules with a rule, by the node of their output
        self._inputs: dict[Any, list[Any]] = {}

    def bound(self, output: Any) -> float:
        bounds: dict[Any, float] = {None: 0.0}
        for node in walk([output], inputs=self._inputs_of):
            bounds[node] = self._of(node, [bounds[child] for child in self._inputs_of(node)])
        return bounds[output]

    def _inputs_of(self, node: Any) -> list[Any]:
        """Return the nodes that a node depends on; a module with a rule counts as one operation."""
        if node not in self._inputs:
            self._inputs[node] = self._module_inputs(node) or inputs_of(node)
        return self._inputs[node]

    def _module_inputs(self, node: Any) -> list[Any]:
        call = self.calls.get(node)
        entries = [] if call is None else [entry for entry in call.entry if entry is not None]
        if call is None or len(entries) != 1 or self._passes_by(node, entries[0]):
            return []
        constant = layer_lipschitz(call.module, *_shapes(call))
        if constant is None:
            return []
        self.constants[node] = constant
        return entries

    def _hidden(self, node: Any) -> str | None:
        return None if self.detached is None else self.detached.hidden(node)

    def _passes_by(self, node: Any, entry: Any) -> bool:
        """Return whether a module uses the input other than through its argument, with a graph or without."""
        for inner in walk([node], stop=(entry,)):
            if inner is not entry:
                leaf = leaf_of(inner)
                if leaf is self.start or (leaf is None and self._hidden(inner)):
                    return True
        return False

    def _of(self, node: Any, below: list[float]) -> float:
        if leaf_of(node) is not None:
            return 1.0 if leaf_of(node) is self.start else 0.0
        if hidden := self._hidden(node):
            raise Uncertified(f"{node.name()} uses {hidden}: no bound is known for what depends on the input there")
        if not any(below):  # a constant: weights, masks
            return 0.0
        if node in self.constants:
            return self.constants[node] * below[0]
        name = kind(node).removesuffix("Backward")
        if name in _VIEWS:
            return max(below)
        if kind(node) in NODES and (slope := NODES[kind(node)](node)) is not None:
            return slope * max(below)
        rule = getattr(self, f"_{name.lower()}", None)
        bound = None if rule is None else rule(node, below)
        if bound is None:
            raise Uncertified(f"{node.name()} has no Lipschitz constant (a product of signals), or none is known")
        return bound

    def _add(self, node: Any, below: list[float]) -> float:
        scales = (1.0, abs(float(saved["alpha"](node))))
        return sum(s * b * self._spread(node, i) for i, (s, b) in enumerate(zip(scales, below)))

    _sub = _add

    def _mul(self, node: Any, below: list[float]) -> float | None:
        if all(below):
            return None
        signal = 0 if below[0] else 1
        factor = saved["other"](node) if signal == 0 else saved["self"](node)
        return _largest(factor) * below[signal] * self._spread(node, signal)

    def _div(self, node: Any, below: list[float]) -> float | None:
        if len(below) > 1 and below[1]:
            return None
        return _largest(1 / torch.as_tensor(saved["other"](node))) * below[0] * self._spread(node, 0)

    def _mean(self, node: Any, below: list[float]) -> float:
        return below[0] * math.sqrt(self._ratio(node, 0))

    def _sum(self, node: Any, below: list[float]) -> float:
        return below[0] / math.sqrt(self._ratio(node, 0))

    def _expand(self, node: Any, below: list[float]) -> float:
        return below[0] * self._spread(node, 0)

    def _cat(self, node: Any, below: list[float]) -> float:
        return math.hypot(*below)

    def _maxpool2dwithindices(self, node: Any, below: list[float]) -> float | None:
        if any(step != 1 for step in saved["dilation"](node)):
            return None
        return below[0] * overlap(saved["kernel_size"](node), saved["stride"](node) or saved["kernel_size"](node))

    def _avgpool2d(self, node: Any, below: list[float]) -> float | None:
        size = saved["kernel_size"](node)
        cut = saved["ceil_mode"](node) or (any(saved["padding"](node)) and not saved["count_include_pad"](node))
        if saved["divisor_override"](node) is not None or cut:  # a window that is cut is divided by less
            return None
        return below[0] * overlap(size, saved["stride"](node) or size) / math.sqrt(math.prod(size))

    def _ratio(self, node: Any, i: int) -> float:
        """Return the number of outputs over the number of inputs."""
        child, index = node.next_functions[i]
        inside = leaf_of(child)
        shape = metadata(child)[index].shape if inside is None else inside.shape
        return math.prod(metadata(node)[0].shape) / math.prod(shape)

    def _spread(self, node: Any, i: int) -> float:
        """Return the factor by which broadcasting, which copies numbers, enlarges the norm."""
        return 1.0 if node.next_functions[i][0] is None else math.sqrt(max(1.0, self._ratio(node, i)))


def _largest(factor: Any) -> float:
    return float(torch.as_tensor(factor).detach().abs().max())


def _shapes(call: ModuleCall) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    sent = call.sent
    return tuple(call.received[0].shape), None if sent is None else tuple(sent.shape)
