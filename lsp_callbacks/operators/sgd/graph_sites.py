"""How the nodes of an autograd graph use parameters: per-sample gradients, from what the graph has saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import Convolution, call, saved
from lsp_callbacks.autograd.gathered_weights import GatheredWeights
from lsp_callbacks.autograd.graph import leaf_of
from lsp_callbacks.autograd.graph_pull import UnknownGraph
from lsp_callbacks.operators.sgd.layer_rules import (
    Table,
    Use,
    at_positions,
    dense,
    layer_uses,
    linear_uses,
    row_uses,
    table_use,
    uses_ahead_of_norm,
)
from lsp_callbacks.operators.sgd.nonzero_positions import nonzero_positions, uses_at_positions

#: Of the gradients of an operation, that of its input alone.
INPUT_ALONE = [True, False, False]


@dataclass
class Samples:
    """The samples of a graph, and what is known of its parameters.

    Attributes:
        count: N.
        taken: indices of those that have rows.
        names: of the trainable parameters, by ``id``.
        module: that holds them.
        axes: whether the samples come first (0) or second (1) in the axes of each use, in the order of the graph; None
            finds out from a pass for the only sample ``alone``.
        alone: see ``axes``.
        by_rows: whether the gradients are those of the samples that have rows alone, ``(n, ...)``, see `by_rows`.
        looks_at_some: whether rows look at some of many positions of the outputs.
        weights: gathers the weights that the graph uses, where they are spread over processes; None where they are not.
    """

    count: int
    taken: Tensor
    names: dict[int, str]
    module: nn.Module
    axes: list[int] | None = None
    alone: int = 0
    by_rows: bool = False
    looks_at_some: bool = False
    weights: GatheredWeights | None = None
    _picked: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def pick(self, t: Tensor) -> Tensor:
        """Return the samples that have rows of what the graph has saved, ``(n, ...)``; again the same tensor."""
        key = t.data_ptr(), t.shape, t.stride(), t.dtype
        if key not in self._picked:
            self._picked[key] = t.index_select(0, self.taken)
        return self._picked[key]

    @cached_property
    def layers(self) -> dict[int, nn.Module]:
        """The modules that hold convolutions and linear maps, by ``id`` of their weight."""
        layers: dict[int, nn.Module] = {}
        for layer in self.module.modules():
            if isinstance(layer, nn.Linear | Convolution):  # not by its attribute: a parametrisation would compute it
                layers |= {id(p): layer for name, p in layer.named_parameters(recurse=False) if name == "weight"}
        if self.weights is not None:
            layers |= {whole: layers[id(p)] for whole, p in self.weights.shards.items() if id(p) in layers}
        return layers

    def split(self, t: Tensor, axis: int) -> Tensor:
        """Return a tensor whose first axis are samples and positions as ``(N, T, ...)``."""
        if axis == 0:
            return t.reshape(self.count, -1, *t.shape[1:])
        return t.reshape(-1, self.count, *t.shape[1:]).transpose(0, 1)

    def rows(self, t: Tensor, axis: int = 0) -> Tensor:
        """Return the samples that have rows, ``(n, T, ...)``; where all have no copy, and without the graph."""
        split = self.split(t.detach(), axis)
        return split if len(self.taken) == self.count else split[self.taken]

    def gradient(self, g: Tensor, axis: int = 0) -> Tensor:
        """Return a gradient of the samples that have rows, ``(n, T, ...)``."""
        return g[:, None] if self.by_rows else self.rows(g, axis)

    def axis(self, g: Tensor) -> int:
        """Return the axis of the samples, from the gradient of one of them at ``(L, ...)``."""
        length = len(g) // self.count
        if len(g) % self.count:
            raise UnknownGraph(f"{len(g)} rows cannot be divided among {self.count} samples")
        touched = (g.flatten(1) != 0).any(1).nonzero().flatten()
        first = bool((touched // length == self.alone).all())
        second = bool((touched % self.count == self.alone).all())
        if not (first or second) or (first and second and length > 1 and self.count > 1):
            raise UnknownGraph("samples depend on each other, or cannot be told from positions")
        return 0 if first else 1


@dataclass
class Site:
    """A node that uses parameters.

    Args:
        node: of the graph.
        names: of the parameters, by their place among the inputs; None is what is not trained.
        axis: see `Samples`.

    Attributes:
        gradients: at its output, of the samples that have rows, pass by pass.
    """

    node: Any
    names: list[str | None]
    axis: int = 0
    gradients: list[Any] = field(default_factory=list)

    def flat(self, t: Tensor) -> Tensor:
        """Return a tensor of the output's shape whose first axis are samples and positions."""
        return t

    def rows_of(self, g: Tensor, samples: Samples) -> Any:
        """Return what is kept of the gradient at the output."""
        return samples.gradient(self.flat(g), self.axis)

    def uses_of_passes(self, samples: Samples) -> dict[str, Use]:
        """Return the use of each parameter by name, and let go of the gradients that they are made from."""
        gradients, self.gradients = self.gradients, []
        stacked = gradients[0][:, None] if len(gradients) == 1 else torch.stack(gradients, dim=1)
        return self.uses(stacked, samples)

    def pulled(self, g: Tensor) -> list[Tensor | None]:
        """Return the gradients at its inputs; None at parameters."""
        raise NotImplementedError

    def uses(self, g: Tensor, samples: Samples) -> dict[str, Use]:
        """Return the use of each parameter by name, from ``(n, R, ...)``."""
        raise NotImplementedError


class LinearSite(Site):
    """A product with a matrix, with or without a bias: ``(L, i)`` to ``(L, o)``."""

    transposed = False
    weight = 0
    norm: Any = None

    @property
    def x(self) -> Tensor:
        """Its input."""
        return saved["mat1" if len(self.names) == 3 else "self"](self.node)

    def pulled(self, g: Tensor) -> list[Tensor | None]:
        x_edge = self.node.next_functions[-2][0]
        back = None if x_edge is None else g @ saved["mat2"](self.node).T
        return [*[None] * (len(self.names) - 2), back, None]

    def rows_of(self, g: Tensor, samples: Samples) -> Any:
        rows = samples.gradient(self.flat(g), self.axis)
        return nonzero_positions(rows) if samples.looks_at_some else rows

    def uses_of_passes(self, samples: Samples) -> dict[str, Use]:
        if all(isinstance(g, Tensor) for g in self.gradients):
            return super().uses_of_passes(samples)
        gradients, self.gradients = self.gradients, []
        rows = samples.rows(self.x, self.axis)
        uses = uses_at_positions(rows, gradients, transposed=self.transposed)
        return named_uses(uses, self.names[-1], self.names[0] if len(self.names) == 3 else None)

    def uses(self, g: Tensor, samples: Samples) -> dict[str, Use]:
        weight, bias = self.names[-1], self.names[0] if len(self.names) == 3 else None
        x = self.x
        if self.norm is not None and weight is not None:
            layer = samples.layers.get(self.weight)
            uses = (
                None
                if layer is None
                else uses_ahead_of_norm(layer, x, g[:, :, 0], self.norm.every, samples.taken, self.norm.sums)
            )
            if uses is None or self.transposed or len(x) != samples.count:
                raise UnknownGraph("a linear map ahead of a normalisation has several positions")
        elif samples.by_rows and x.ndim == 2 and g.ndim == 4:
            uses = row_uses(samples.pick(x), g[:, 0, 0], transposed=self.transposed)
        else:
            rows = samples.rows(x, self.axis)
            if rows.shape[1] == g.shape[2] == 1 and g.ndim == 4:
                at = g[:, :, 0]
                both = at_positions(rows.expand(-1, g.shape[1], -1), at, transposed=self.transposed)
                uses = {"weight": both, "bias": dense(at)}
            else:
                uses = linear_uses(rows, g, transposed=self.transposed)
        return named_uses(uses, weight, bias)

    def at_rows(self, values: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cotangent of the input for some rows of the output, and those rows of the input, ``(n, i)``."""
        x = self.x
        whole = torch.zeros_like(x)
        whole[flat] = values.to(x.dtype) @ saved["mat2"](self.node).T
        return whole, x[flat]


class ConvolutionSite(Site):
    """A convolution; ``(N, ...)``."""

    layer: Any = None
    norm: Any = None

    def pulled(self, g: Tensor) -> list[Tensor | None]:
        node = self.node
        if node.next_functions[0][0] is None:
            return [None, None, None]
        how = [
            saved[name](node) for name in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        ]
        x, weight = saved["input"](node)[: len(g)], saved["weight"](node)  # its shape is enough
        back = torch.ops.aten.convolution_backward(g, x, weight, None, *how, INPUT_ALONE)[0]
        return [back, None, None]

    def uses(self, g: Tensor, samples: Samples) -> dict[str, Use]:
        x, g = saved["input"](self.node), g[:, :, 0]
        if len(x) != samples.count:
            raise UnknownGraph("a convolution has several pictures of a sample")
        if self.norm is None:
            uses = layer_uses(self.layer, x[samples.taken], g)
        else:
            uses = uses_ahead_of_norm(self.layer, x, g, self.norm.every, samples.taken, self.norm.sums)
        if uses is None:
            raise UnknownGraph(f"no rule covers {type(self.layer).__name__}")
        return named_uses(uses, self.names[1], self.names[2])


class EmbeddingSite(Site):
    """A table; ``(..., d)``."""

    def flat(self, t: Tensor) -> Tensor:
        return t.flatten(0, -2)

    def pulled(self, g: Tensor) -> list[Tensor | None]:
        return [None]

    def index(self, samples: Samples) -> Tensor:
        """Return which entries each sample looks up, ``(n, T)``."""
        return samples.rows(saved["indices"](self.node).flatten(), self.axis)

    def uses(self, g: Tensor, samples: Samples) -> dict[str, Use]:
        if saved["scale_grad_by_freq"](self.node):
            raise UnknownGraph("an embedding scales its gradient by frequency")
        index, padding = self.index(samples), saved["padding_idx"](self.node)
        if 0 <= padding < 2**63:
            g = g * (index != padding)[:, None, :, None]
        return named_uses(
            {"weight": table_use(Table(index, g), saved["weight_sym_argsize_0"](self.node))}, self.names[0]
        )


class SharedTableSite(EmbeddingSite):
    """A table that is not looked up by samples, but by positions, and added to all samples."""

    shape: tuple[int, ...] = ()

    def flat(self, t: Tensor) -> Tensor:
        return _leading(t, self.shape)

    def rows_of(self, g: Tensor, samples: Samples) -> Tensor:
        return _shared(super().rows_of(g, samples), self.shape).flatten(1, -2)

    def index(self, samples: Samples) -> Tensor:
        return saved["indices"](self.node).flatten().expand(len(samples.taken), -1)


class SharedSite(Site):
    """A parameter, or a view of one, that is added to all samples, or multiplied with them."""

    shape: tuple[int, ...] = ()

    def flat(self, t: Tensor) -> Tensor:
        return _leading(t, self.shape)

    def rows_of(self, g: Tensor, samples: Samples) -> Tensor:
        return torch.stack([self._at_leaf(one) for one in _shared(super().rows_of(g, samples), self.shape)])

    def _at_leaf(self, g: Tensor) -> Tensor:
        node = self.node
        while leaf_of(node) is None:
            (child, _), *others = node.next_functions
            inputs = call(node, [g])
            if others or inputs[0] is None:
                raise UnknownGraph(f"{node.name()} of what all samples share")
            node, g = child, inputs[0]
        return g.reshape(-1)

    def uses(self, g: Tensor, samples: Samples) -> dict[str, Use]:
        return named_uses({"weight": dense(g)}, self.names[0])


def _leading(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor whose first axis are all the axes that ``shape``, which was broadcast to it, does not have."""
    lost = t.ndim - len(shape)
    for size in shape:
        if size != 1:
            break
        lost += 1
    return t.flatten(0, max(lost, 1) - 1)


def _shared(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the gradients of each sample at what all of them share, ``(n, *shape)``, from ``(n, T, ...)``."""
    while shape and shape[0] == 1 and len(shape) >= rows.ndim - 1:
        shape = shape[1:]
    least = [1] * (rows.ndim - 1 - len(shape))
    return rows.sum_to_size(len(rows), *least, *shape)


def named_uses(uses: dict[str, Use], weight: str | None, bias: str | None = None) -> dict[str, Use]:
    """Return the uses of weight and bias by the names of the parameters; without what is not trained."""
    return {name: uses[key] for key, name in (("weight", weight), ("bias", bias)) if name is not None}
