"""Layers with low-rank adapters beside their own weight (LoRA): the map that both apply together."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lsp_callbacks.autograd._torch_internals import PARAMETERS


def is_adapted(layer: nn.Module) -> bool:
    """Return whether a module is a layer of ``peft`` with LoRA beside it: ``W x + scaling B A x``."""
    names = ("get_delta_weight", "active_adapters", "disable_adapters", "merged")
    return isinstance(getattr(layer, "base_layer", None), nn.Module) and all(hasattr(layer, name) for name in names)


def is_one_map(layer: Any) -> bool:
    """Return whether a layer with adapters applies ``W + scaling B A``: not so DoRA, and quantised weights."""
    if not is_adapted(layer) or getattr(layer, "lora_variant", None):
        return False
    weight = getattr(layer.base_layer, "weight", None)
    return type(weight) is nn.Parameter and weight.is_floating_point()


def as_one_layer(layer: Any) -> nn.Module:
    """Return the layer beneath adapters with the weight of their sum, ``W + scaling B A`` of all that are active.

    The dropout ahead of an adapter is left out, as in eval mode.

    Args:
        layer: for which `is_one_map` holds.

    Returns:
        A copy that shares all but the weight.
    """
    base = layer.base_layer
    total = base.weight.detach()
    if not (layer.disable_adapters or layer.merged):
        with torch.no_grad():
            for adapter in layer.active_adapters:
                if any(adapter in getattr(layer, kind, ()) for kind in ("lora_A", "lora_embedding_A")):
                    total = total + layer.get_delta_weight(adapter).to(total)
    single = copy.copy(base)
    vars(single)[PARAMETERS] = {**vars(base)[PARAMETERS], "weight": nn.Parameter(total, requires_grad=False)}
    return single


def parts_of_adapted(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules inside of layers with adapters: each has a share in the layer's map, and none of its own."""
    for layer in module.modules():
        if is_adapted(layer):
            inside = layer.modules()
            next(inside)
            yield from inside
