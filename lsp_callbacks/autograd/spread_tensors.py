"""Tensors that are spread over processes (DTensor): the part that this process holds, and the whole."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def _kind() -> Any:
    """Return the class of such tensors; None where nobody has imported it, so that there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_spread(tensor: Any) -> bool:
    """Return whether a tensor is spread over processes."""
    kind = _kind()
    return kind is not None and isinstance(tensor, kind)


def spread_among(types: Any) -> bool:
    """Return whether any of some tensor classes is that of tensors that are spread."""
    kind = _kind()
    return kind is not None and any(issubclass(each, kind) for each in types)


def has_shards(module: nn.Module) -> bool:
    """Return whether a module holds parameters that are spread, by ``fully_shard`` or ``parallelize_module``."""
    return any(map(is_spread, module.parameters()))


def sharded_modules(module: nn.Module) -> list[Any]:
    """Return the modules to which ``fully_shard`` was applied."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [child for child in module.modules() if isinstance(child, kind)]


def plain_class(module: nn.Module) -> type:
    """Return the class of a module from before ``fully_shard``, which derives another one from it."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or not isinstance(module, kind):
        return type(module)
    return next(c for c in type(module).__mro__ if not issubclass(c, kind) and issubclass(c, nn.Module))


def local(tensor: Tensor) -> Tensor:
    """Return the part that this process holds, without a graph and sharing its memory; any other tensor itself."""
    return tensor.detach().to_local() if is_spread(tensor) else tensor.detach()  # type: ignore[attr-defined]


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return what `local` gives of each tensor."""
    return [local(tensor) for tensor in tensors]


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """Return this process's part of each parameter's gradient; may communicate, where that is not summed yet."""
    parameters, kind = [*parameters], _kind()
    if kind is None or not any([isinstance(p, kind) for p in parameters]):
        return [None if (g := p.grad) is None else g.detach() for p in parameters]
    parts: list[Tensor | None] = []
    for p in parameters:
        gradient: Any = p.grad
        placed: Any = p
        if gradient is not None and is_spread(gradient) and is_spread(p) and gradient.placements != placed.placements:
            gradient = gradient.redistribute(placements=placed.placements)
        parts.append(None if gradient is None else local(gradient))
    return parts


def whole(tensor: Tensor) -> Tensor:
    """Return a spread tensor as one plain tensor, on every process; any other is returned itself. It communicates."""
    return tensor.detach().full_tensor() if is_spread(tensor) else tensor.detach()  # type: ignore[attr-defined]


def part_of_whole(full: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a plain tensor that is to be spread as another one is; it does not communicate."""
    if not is_spread(like):
        return full
    from torch.distributed.tensor import distribute_tensor  # there already: `like` is of it

    placed: Any = like
    return local(distribute_tensor(full, placed.device_mesh, placed.placements, src_data_rank=None))


def spread_like(part: Tensor, like: Tensor) -> Tensor:
    """Return the tensor of which this process holds a part, if that is spread as another one is; nothing is sent."""
    if not is_spread(like):
        return part
    from torch.distributed.tensor import DTensor  # there already: `like` is of it

    placed: Any = like
    return DTensor.from_local(
        part, placed.device_mesh, placed.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def copies(tensor: Tensor, world: int) -> int:
    """Return how many of the processes hold each number of a tensor; all of them, where it is not spread."""
    if not is_spread(tensor):
        return world
    placed: Any = tensor
    sizes = zip(placed.device_mesh.shape, placed.placements)
    held = torch.Size(size for size, placement in sizes if placement.is_replicate()).numel()
    return held * world // placed.device_mesh.size()


def processes_of(tensor: Any) -> int:
    """Return over how many processes a spread tensor lies."""
    return tensor.device_mesh.size()
