"""Passes through a step's own graph, from the outputs to the nodes that use parameters: per-sample gradients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import is_identity, metadata, padding_amounts, saved
from lsp_callbacks.autograd.graph import leaf_of
from lsp_callbacks.autograd.graph_pull import UnknownGraph, pull, summed
from lsp_callbacks.operators.sgd.graph_criterion import GraphCriterion
from lsp_callbacks.operators.sgd.graph_norms import BatchNormSite, GroupNormSite, LayerNormSite
from lsp_callbacks.operators.sgd.graph_row_rules import row_inputs
from lsp_callbacks.operators.sgd.graph_sites import (
    ConvolutionSite,
    EmbeddingSite,
    LinearSite,
    Samples,
    SharedSite,
    SharedTableSite,
    Site,
    named_uses,
)
from lsp_callbacks.operators.sgd.layer_rules import at_positions, dense
from lsp_callbacks.operators.sgd.parameter_gram import Part

#: By the name of the node.
SITES: dict[str, type[Site]] = {
    "AddmmBackward0": LinearSite,
    "MmBackward0": LinearSite,
    "ConvolutionBackward0": ConvolutionSite,
    "NativeLayerNormBackward0": LayerNormSite,
    "NativeGroupNormBackward0": GroupNormSite,
    "NativeBatchNormBackward0": BatchNormSite,
    "EmbeddingBackward0": EmbeddingSite,
}
#: Between a parameter and the operation that uses it.
_ON_THE_WAY = {"TBackward0", "ToCopyBackward0"}
#: Nodes that change the shape of logits, or their type, alone.
_SAME_ENTRIES = {"ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0"}


class GraphKind(NamedTuple):
    """What does not change from step to step, and by which a graph is recognised.

    Attributes:
        nodes: their names, outputs first.
        sites: the names of the trainable parameters of each use, in the order of the graph.
        axes: of the samples in each use: first (0) or second (1).
        by_rows: whether gradients of some samples can be taken back alone.
        lengths: how many positions of each sample each use had, and at last the outputs.
    """

    nodes: tuple[str, ...]
    sites: tuple[tuple[str | None, ...], ...]
    axes: list[int]
    by_rows: bool = False
    lengths: tuple[int, ...] = ()

    def has_length(self, lengths: tuple[int, ...]) -> bool:
        """Return whether uses have as many positions as before, or as many for each of the outputs'.

        An expert is called with those tokens that are routed to it: as many as can be divided among the samples, by
        chance, and they are not theirs.
        """
        now, before = lengths[-1], self.lengths[-1]
        return self.by_rows or all(
            length == last or length * before == last * now for length, last in zip(lengths, self.lengths, strict=True)
        )


def site_of(node: Any, samples: Samples) -> Site | None:
    """Return the use of parameters by a node; None where it has none."""
    kind = SITES.get(node.name())
    if kind is None:
        return None
    names: list[str | None] = []
    turned, weight = False, 0
    for child, _ in node.next_functions:
        steps = []
        while child is not None and child.name() in _ON_THE_WAY:
            steps.append(child.name())
            child = child.next_functions[0][0]
        leaf = None if child is None else getattr(child, "variable", None)
        names.append(None if leaf is None else samples.names.get(id(leaf)))
        turned = "TBackward0" in steps  # of the last one
        weight = weight if leaf is None or leaf.ndim < 2 else id(leaf)
    if not any(names):
        return None
    site = kind(node, names)
    if isinstance(site, LinearSite):
        if names[-1] is None:
            raise UnknownGraph("a matrix that is no parameter")
        site.transposed, site.weight = not turned, weight
    elif isinstance(site, ConvolutionSite):
        layer = samples.layers.get(weight)
        if (
            not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            or saved["transposed"](node)
            or layer.padding_mode != "zeros"
        ):
            raise UnknownGraph("a convolution of another kind")
        if [*padding_amounts(layer)][::-2] != [*saved["padding"](node)]:
            raise UnknownGraph("a convolution with another padding than its layer")
        site.layer = layer
    return site


class GraphPass:
    """Passes through one graph, from the outputs to the layers.

    Args:
        nodes: of the graph behind the criterion, outputs first.
        criterion: at its root.
        samples: of the graph.

    Attributes:
        sites: the uses of parameters, by node.
        axes: of the samples in each use.
        lengths: how many positions of each sample a use has, unless gradients are those of some samples alone.
    """

    def __init__(self, nodes: list[Any], criterion: GraphCriterion, samples: Samples):
        self.nodes, self.criterion, self.samples = nodes, criterion, samples
        self.sites: dict[Any, Site] = {}
        self.axes: list[int] = []
        self.lengths: list[int] = []
        self._norms: dict[Any, BatchNormSite] = {}
        self._head: list[tuple[LinearSite, Tensor, Tensor]] = []

    @cached_property
    def _takers(self) -> Counter[Any]:
        """How many nodes take what each of them has made."""
        return Counter(child for node in self.nodes for child, _ in node.next_functions)

    @property
    def uses(self) -> tuple[tuple[str | None, ...], ...]:
        """The names of the trainable parameters of each use, in the order of the graph, the last layer first."""
        head = [self._head[0][0]] if self._head else []
        return tuple(tuple(site.names) for site in (*head, *self.sites.values()))

    def run(self, values: Tensor, position: Tensor) -> None:
        """Take one row of some samples back, ``(n, C)`` at ``(n,)``. Cost: at most a third of a gradient."""
        taken = self.samples.taken
        flat = taken * self.criterion.outputs.shape[1] + position
        if self.criterion.chunks:
            pull(self.nodes, self._into_chunks(values, flat), self._rule, self._reshape)
            return
        child = self._outputs
        head = self._linear_head(child)
        if head is None:
            start = {child: self.criterion.cotangent(values, position, taken)}
        else:
            node, site = head
            if self.samples.weights is not None:
                self.samples.weights.need(node)
            whole, a = site.at_rows(values, flat)
            self._head.append((site, a, values))
            start = {node.next_functions[-2][0]: whole.view(metadata(node.next_functions[-2][0])[0].shape)}
        pull(self.nodes, start, self._rule, self._reshape)

    def _into_chunks(self, values: Tensor, flat: Tensor) -> dict[Any, dict[int, Tensor]]:
        """Return the cotangents at the inputs of the calls of the last layer, by node and place."""
        start: dict[Any, dict[int, Tensor]] = {}
        inputs: Tensor | None = None
        last: LinearSite | None = None
        for node, at in self.criterion.chunks:
            site = site_of(node, self.samples)
            child, place = node.next_functions[-2]
            if not isinstance(site, LinearSite) or child is None or (last is not None and site.names != last.names):
                raise UnknownGraph("chunks of several last layers, or of one without parameters")
            last = site
            if self.samples.weights is not None:
                self.samples.weights.need(node)
            rows = at[flat]
            mine = rows >= 0
            whole, a = site.at_rows(values[mine], rows[mine])
            inputs = a.new_zeros(len(values), a.shape[1]) if inputs is None else inputs
            inputs[mine] = a
            start.setdefault(child, {})[place] = whole.view(metadata(child)[place].shape)
        assert inputs is not None and last is not None
        self._head.append((last, inputs, values))
        return start

    @property
    def _outputs(self) -> Any:
        if self.criterion.chunks:
            raise UnknownGraph("the outputs come in chunks")
        child, k = self.criterion.node.next_functions[0]
        if k:
            raise UnknownGraph("the outputs are one of several results")
        return child

    def run_rows(self, values: Tensor) -> None:
        """Take rows back with the gradients of the samples that have rows alone: those of the others are zero."""
        waiting = {self._outputs: values.view(len(values), *self.criterion.shape[1:])}
        for node in self.nodes:
            if node not in waiting:
                continue
            g = waiting.pop(node)
            if self.samples.weights is not None and is_identity(node):
                inputs: Sequence[Tensor | None] = [g]
                if len(metadata(node)) > 1:
                    raise UnknownGraph("several tensors are handed on together")
            else:
                ruled = self._rule(node, [g])
                inputs = row_inputs(node, g, self.samples.pick) if ruled is None else ruled
            for (child, _), back in zip(node.next_functions, inputs):
                if child is not None and back is not None:
                    waiting[child] = waiting[child] + back if child in waiting else back

    def agrees(self, other: GraphPass) -> bool:
        """Return whether two passes have seen the same rows, to rounding, and any that are not zero."""
        if self.uses != other.uses or self._head:
            return False
        for site, twin in zip(self.sites.values(), other.sites.values()):
            for g, same in zip(site.gradients, twin.gradients, strict=True):
                size = g.abs().amax()
                if g.shape != same.shape or not 0 < float((g - same).abs().amax() / size + size) < math.inf:
                    return False
                if (g - same).abs().amax() > 64 * torch.finfo(g.dtype).eps * size:
                    return False
        return True

    def gradients(self, values: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Return the gradient of ``<values, outputs>`` by parameter, through the statistics of the batch.

        Cost: a backward pass.
        """
        child, taken = self._outputs, self.samples.taken
        parts = [self.criterion.cotangent(v, at, taken) for v, at in zip(values.unbind(1), positions.unbind(1))]
        whole = torch.stack(parts).sum(0)
        totals: dict[str, Tensor] = {}

        def collect(node: Any, outputs: list[Tensor | None]) -> list[Tensor | None] | None:
            leaf = leaf_of(node)
            if leaf is None:
                return None
            if (name := self.samples.names.get(id(leaf))) is not None and outputs[0] is not None:
                totals[name] = outputs[0]
            return []

        pull(self.nodes, {child: whole}, collect, summed)
        return totals

    def _linear_head(self, node: Any) -> tuple[Any, LinearSite] | None:
        """Return the last layer, where rows look at few of many positions."""
        if self.criterion.outputs.shape[1] == 1 or self.criterion.axis != len(self.criterion.shape) - 1:
            return None
        while node.name() in _SAME_ENTRIES:
            node = node.next_functions[0][0]
        site = site_of(node, self.samples)
        if not isinstance(site, LinearSite) or node.next_functions[-2][0] is None or node.next_functions[-2][1]:
            return None
        return node, site

    def _rule(self, node: Any, outputs: Sequence[Tensor | None]) -> Sequence[Tensor | None] | None:
        g = outputs[0]
        if self.samples.weights is not None:
            self.samples.weights.need(node)
        site = self.sites.get(node)
        if site is None:
            kind = node.name()
            if kind == "ExpandBackward0" and g is not None:
                return [g]  # what it makes of one for all samples is seen below
            if kind in SITES:
                site = site_of(node, self.samples)
            elif (leaf := getattr(node, "variable", None)) is not None:
                if id(leaf) in self.samples.names:
                    raise UnknownGraph(f"{self.samples.names[id(leaf)]} is used by an operation that no rule covers")
                return []
            if site is None:
                return None
            self._place(node, site, g)
        if g is None:
            raise UnknownGraph("a layer without a gradient")
        site.gradients.append(site.rows_of(g, self.samples))
        return site.pulled(g)

    def _place(self, node: Any, site: Site, g: Tensor | None) -> None:
        """Take up a site, and find out where its samples are."""
        known = self.samples.axes
        count = len(self.axes)
        if g is None:
            raise UnknownGraph("a layer without a gradient")
        if known is None:
            site.axis = self.samples.axis(site.flat(g))
        elif count >= len(known):
            raise UnknownGraph("another graph than before")
        else:
            site.axis = known[count]
        self.axes.append(site.axis)
        self.sites[node] = site
        if not self.samples.by_rows:
            self.lengths.append(len(site.flat(g)) // self.samples.count)
        if isinstance(site, BatchNormSite) and site.ties:
            self._norms[node.next_functions[0][0]] = site
            site.is_only = self._takers[node.next_functions[0][0]] == 1
        if isinstance(site, LinearSite | ConvolutionSite):
            site.norm = self._norms.get(node)

    def _reshape(self, child: Any, k: int, g: Tensor) -> Tensor | None:
        shape = tuple(metadata(child)[k].shape)
        lost = len(shape) < g.ndim or (shape[0] == 1 != len(g))
        if not lost or not self._reaches_parameter(child):
            return summed(child, k, g)
        site = self.sites.get(child)
        if site is None:
            if child.name() == "EmbeddingBackward0":
                table = leaf_of(child.next_functions[0][0])
                site = SharedTableSite(child, [self.samples.names.get(id(table))])
            else:
                site = SharedSite(child, [self._reaches_parameter(child)])
            site.shape = shape
            self._place(child, site, g)
        site.gradients.append(site.rows_of(g, self.samples))
        return None

    def _reaches_parameter(self, node: Any) -> str | None:
        """Return the name of the parameter that a chain of nodes ends in; None where it ends in none."""
        while leaf_of(node) is None:
            children = [child for child, _ in node.next_functions if child is not None]
            if len(children) != 1:
                if not children:
                    return None
                raise UnknownGraph(f"{node.name()} of what all samples share")
            node = children[0]
        return self.samples.names.get(id(leaf_of(node)))

    def parts(self) -> dict[str, Part]:
        """Return the uses of each parameter, by name."""
        parts: dict[str, Part] = {}
        passes, count = 1, len(self.samples.taken)
        if self._head:
            (head, *_), passes = self._head[0], len(self._head)
            a = torch.stack([a for _, a, _ in self._head], dim=1)
            g = torch.stack([g for *_, g in self._head], dim=1)
            both = {"weight": at_positions(a, g.to(a), transposed=head.transposed), "bias": dense(g)}
            for name, use in named_uses(both, head.names[-1], head.names[0] if len(head.names) == 3 else None).items():
                parts.setdefault(name, Part(count, [])).uses.append(use)
        for site in self.sites.values():
            if passes > 1 and len(site.gradients) != passes:
                raise UnknownGraph("a layer that some rows do not reach")
            for name, use in site.uses_of_passes(self.samples).items():
                parts.setdefault(name, Part(count, [])).uses.append(use)
        return parts
