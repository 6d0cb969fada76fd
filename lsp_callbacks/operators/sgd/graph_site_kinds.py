"""Which nodes of an autograd graph use parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from lsp_callbacks.autograd._torch_internals import padding_amounts, saved
from lsp_callbacks.autograd.graph_pull import UnknownGraph
from lsp_callbacks.operators.sgd.graph_norms import BatchNormSite, GroupNormSite, LayerNormSite
from lsp_callbacks.operators.sgd.graph_sites import ConvolutionSite, EmbeddingSite, LinearSite, Samples, Site

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
            or saved(node, "transposed")
            or layer.padding_mode != "zeros"
        ):
            raise UnknownGraph("a convolution of another kind")
        if [*padding_amounts(layer)][::-2] != [*saved(node, "padding")]:
            raise UnknownGraph("a convolution with another padding than its layer")
        site.layer = layer
    return site
