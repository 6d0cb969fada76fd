"""Per-sample gradients of each kind of layer, from its input and the gradient at its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import padding_amounts
from lsp_callbacks.operators.sgd.reused_block import Block
from lsp_callbacks.operators.sgd.some_units import Units

#: One in so many samples, and so many positions at least, show how outputs and inputs of a convolution go together.
SPARSE, POSITIONS = 4, 1024
#: Per-sample gradients of a convolution are one of many groups up to this share of outputs in a channel's positions.
FEW_CHANNELS = 0.5
#: Per-sample gradients of samples lo to hi, ``(hi - lo, R, P)``: R output directions, P entries of the parameter.
Gradients = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Outer:
    """Gradients that are outer products, one for each row of K.

    Attributes:
        g: ``(N R, o)``.
        a: ``(N R, i)``.
        transposed: whether the parameter is ``(i, o)`` instead of ``(o, i)``.
    """

    g: Tensor
    a: Tensor
    transposed: bool = False

    @classmethod
    def joined(cls, parts: list[Outer]) -> Outer:
        """Return those of several parts of the samples."""
        return cls(torch.cat([p.g for p in parts]), torch.cat([p.a for p in parts]), parts[0].transposed)


@dataclass(frozen=True)
class Table:
    """Gradients that are zero but in the rows of a table that a sample looks up.

    Attributes:
        index: ``(N, T)``.
        g: ``(N, R, T, d)``.
    """

    index: Tensor
    g: Tensor


#: Entries lo to hi of the per-sample gradients of all samples, ``(N, R, hi - lo)``, which a block may hold.
Entries = Callable[[int, int, Block], Tensor]


@dataclass(frozen=True)
class Use:
    """One use of a parameter by a layer.

    Attributes:
        gradients: see `Gradients`.
        rows: R.
        outer: see `Outer`; None where the gradients are none.
        table: see `Table`; likewise.
        path: "structured", or "layer" where the layer itself was differentiated sample by sample.
        entries: see `Entries`; None where they are only formed all at once.
        width: lo and hi of ``entries`` are multiples of that.
        values: the gradients, ``(N, R, P)``, where they are held as they are.
        units: see `Units`; None where no unit can be formed alone.
    """

    gradients: Gradients
    rows: int = 1
    outer: Outer | None = None
    table: Table | None = None
    path: str = "structured"
    entries: Entries | None = None
    width: int = 1
    values: Tensor | None = None
    units: Units | None = None


@singledispatch
def layer_uses(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Use] | None:
    """Return how a layer uses its parameters, by name; None for a kind of layer without a rule.

    Supported are Linear, convolutions, Embedding and normalisations.

    Args:
        layer: the layer.
        x: its input, ``(N, ...)``.
        g: the gradients at its output, ``(N, R, ...)``.
    """
    return linear_uses(x, g, transposed=True) if transposed(layer) else None


def uses_of_layers(calls: list[tuple[nn.Module, Tensor, Tensor]]) -> list[dict[str, Use] | None]:
    """Return the `layer_uses` of several layers."""
    return [layer_uses(*call) for call in calls]


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is a linear map of the last axis."""
    return type(layer) is nn.Linear or transposed(layer)


def is_pointwise(layer: nn.Module) -> bool:
    """Return whether a layer maps each position by itself, so that it does not matter where the samples are."""
    return is_linear(layer) or isinstance(layer, nn.LayerNorm | nn.RMSNorm)


def transposed(layer: nn.Module) -> bool:
    """Return whether a layer is transformers' ``Conv1D``, ``y = x W``."""
    return type(layer).__name__ == "Conv1D" and getattr(layer, "nf", None) is not None


@layer_uses.register
def _(layer: nn.Linear, x: Tensor, g: Tensor) -> dict[str, Use] | None:
    return linear_uses(x, g)


def linear_uses(x: Tensor, g: Tensor, *, transposed: bool = False) -> dict[str, Use]:
    """Return how a linear map of the last axis uses its weight and its bias."""
    a = x.reshape(len(x), -1, x.shape[-1])  # (N, T, i)
    g = g.reshape(*g.shape[:2], -1, g.shape[-1])  # (N, R, T, o)
    return {"weight": _outer(a, g, transposed=transposed), "bias": dense(g.sum(2))}


def _outer(a: Tensor, g: Tensor, *, transposed: bool = False) -> Use:
    order = "nrto,nti->nrio" if transposed else "nrto,nti->nroi"
    rows, outer = g.shape[1], None
    if a.shape[1] == 1:
        outer = Outer(g[:, :, 0].flatten(0, 1), a.expand(-1, rows, -1).flatten(0, 1), transposed)
    return Use(
        lambda lo, hi: torch.einsum(order, g[lo:hi], a[lo:hi]).flatten(2), rows, outer,
        entries=_entries(order, a, g, transposed=transposed), width=(g if transposed else a).shape[-1],
        units=_units(order, a, g, transposed=transposed),
    )  # fmt: skip


def _units(order: str, a: Tensor, g: Tensor, *, transposed: bool) -> Units:
    def sizes() -> tuple[Tensor, Tensor]:
        of_g, of_a = (t.flatten(0, -2).square().sum(0) for t in (g, a))
        return (of_a, of_g) if transposed else (of_g, of_a)

    def entries(index: Tensor) -> Tensor:
        at = (g, a[..., index]) if transposed else (g[..., index], a)
        return torch.einsum(order, *at).flatten(2)

    return Units(sizes, entries)


def _entries(order: str, a: Tensor, g: Tensor, *, transposed: bool) -> Entries:
    """Return some rows of the matrices that are products of ``g`` and ``a``, as `Entries`."""
    outer, inner = (a, g) if transposed else (g, a)
    width = inner.shape[-1]

    def entries(lo: int, hi: int, block: Block) -> Tensor:
        some = outer[..., lo // width : hi // width]
        return block.product(order, *((g, some) if transposed else (some, a)))

    return entries


def at_positions(a: Tensor, g: Tensor, *, transposed: bool = False) -> Use:
    """Return the use of a matrix by rows that look at one position each.

    Args:
        a: the inputs there, ``(N, R, i)``.
        g: the gradients at the output there, ``(N, R, o)``.
        transposed: whether the matrix is ``(i, o)``.
    """
    order = "nro,nri->nrio" if transposed else "nro,nri->nroi"
    return Use(
        lambda lo, hi: torch.einsum(order, g[lo:hi], a[lo:hi]).flatten(2), g.shape[1],
        Outer(g.flatten(0, 1), a.flatten(0, 1), transposed),
        entries=_entries(order, a, g, transposed=transposed), width=(g if transposed else a).shape[-1],
    )  # fmt: skip


def row_uses(a: Tensor, g: Tensor, *, transposed: bool = False) -> dict[str, Use]:
    """Return how a linear map uses its weight and its bias, from one row of each sample, ``(n, i)`` and ``(n, o)``."""
    order = "nro,nri->nrio" if transposed else "nro,nri->nroi"

    def gradients(lo: int, hi: int) -> Tensor:
        return torch.einsum(order, g[lo:hi, None], a[lo:hi, None]).flatten(2)

    def entries(lo: int, hi: int, block: Block) -> Tensor:
        return _entries(order, a[:, None], g[:, None], transposed=transposed)(lo, hi, block)

    width = (g if transposed else a).shape[-1]
    return {
        "weight": Use(gradients, 1, Outer(g, a, transposed), entries=entries, width=width),
        "bias": dense(g[:, None]),
    }


def dense(values: Tensor) -> Use:
    """Return the use whose gradients, ``(N, R, ...)``, are held as they are."""
    flat = values.flatten(2)
    return Use(lambda lo, hi: flat[lo:hi], flat.shape[1], entries=lambda lo, hi, _: flat[:, :, lo:hi], values=flat)


@layer_uses.register(nn.Conv1d)
@layer_uses.register(nn.Conv2d)
@layer_uses.register(nn.Conv3d)
def _(layer: nn.Conv2d, x: Tensor, g: Tensor) -> dict[str, Use] | None:
    if x.ndim != len(layer.kernel_size) + 2:
        return None

    def gradients(lo: int, hi: int) -> Tensor:
        return _each_weight_gradient(layer, x[lo:hi], g[lo:hi]).flatten(2)

    return {"weight": Use(gradients, g.shape[1]), "bias": dense(g.flatten(3).sum(-1))}


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows of each group's channels, ``(N, G, c, L, k)``, and its gradients, ``(N, R, G, o, L)``."""
    x = _padded(layer, x)
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    x = x[(slice(None), slice(None), *(slice(n) for n in g.shape[3:]))]
    groups = layer.groups
    n, channels = x.shape[:2]
    x = x.reshape(n, groups, channels // groups, g.shape[3:].numel(), -1)
    return x, g.reshape(*g.shape[:2], groups, -1, x.shape[3])


@layer_uses.register
def _(layer: nn.Embedding, x: Tensor, g: Tensor) -> dict[str, Use] | None:
    if layer.max_norm is not None:
        return None
    index = x.reshape(len(x), -1)
    g = g.reshape(*g.shape[:2], -1, g.shape[-1])
    if layer.padding_idx is not None:
        g = g * (index != layer.padding_idx)[:, None, :, None]
    return {"weight": table_use(Table(index, g), layer.num_embeddings)}


def table_use(table: Table, entries: int) -> Use:
    """Return the use of a table of so many rows."""
    index, g = table.index, table.g

    def gradients(lo: int, hi: int) -> Tensor:
        n, rows, _, width = g[lo:hi].shape
        whole = g.new_zeros(n, rows, entries, width)
        place = index[lo:hi, None, :, None].expand(n, rows, -1, width)
        return whole.scatter_add_(2, place, g[lo:hi]).flatten(2)

    def some_entries(lo: int, hi: int, block: Block) -> Tensor:
        n, rows, _, width = g.shape
        first, last = lo // width, hi // width
        sample, place = ((index >= first) & (index < last)).nonzero(as_tuple=True)
        part = g.new_zeros(n, rows, last - first, width)
        at = sample, index[sample, place] - first
        part.transpose(1, 2).index_put_(at, g.transpose(1, 2)[sample, place], accumulate=True)
        return part.flatten(2)

    return Use(gradients, g.shape[1], table=table, entries=some_entries, width=g.shape[-1])


@layer_uses.register
def _(layer: nn.LayerNorm, x: Tensor, g: Tensor) -> dict[str, Use] | None:
    return _affine(F.layer_norm(x, layer.normalized_shape, eps=layer.eps), g, len(layer.normalized_shape))


@layer_uses.register
def _(layer: nn.RMSNorm, x: Tensor, g: Tensor) -> dict[str, Use] | None:
    return _affine(F.rms_norm(x, layer.normalized_shape, eps=layer.eps), g, len(layer.normalized_shape))


@layer_uses.register
def _(layer: nn.GroupNorm, x: Tensor, g: Tensor) -> dict[str, Use] | None:
    return channel_uses(F.group_norm(x, layer.num_groups, eps=layer.eps), g)


@layer_uses.register(nn.BatchNorm1d)
@layer_uses.register(nn.BatchNorm2d)
@layer_uses.register(nn.BatchNorm3d)
def _(layer: nn.BatchNorm2d, x: Tensor, g: Tensor) -> dict[str, Use] | None:
    if layer.running_mean is None:  # the statistics of the probes would tie them together
        return None
    return channel_uses(F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps), g)


def uses_ahead_of_norm(
    layer: nn.Module,
    x: Tensor,
    g: Tensor,
    normalised: Callable[[int], Tensor],
    taken: Tensor | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Use] | None:
    """Return the uses of the weight of a layer whose outputs are normalised over the batch: through its statistics.

    With windows ``u`` (of a linear layer its input) and normalised outputs ``y``, the mean and the scale of channel c
    move with its weight, so that sample i has the gradient ``sum_l g_icl (u_il - mean u - y_icl mean(y_c u))``; a
    bias has none. What statistics further on do is left out. ``mean(y_c u)`` of a convolution is that of some samples,
    every fourth at most: on a residual network with batches of 64 the critical rate then reads 0.5 % too low.

    Args:
        layer: a linear layer or a convolution; None is returned for others.
        x: its input, of the whole batch.
        g: the gradients at its output with the statistics held fixed, of the samples that have rows, ``(N, R, ...)``.
        normalised: from a number s to y of every s-th sample of the batch.
        taken: indices of the samples that have rows; None is all.
        sums: over positions of g and of ``g y``, ``(N, R, C)``, where they are known.
    """
    inputs = x if taken is None else x[taken]
    if is_linear(layer) and x.ndim == 2:
        groups, split = 1, g[:, :, None, :, None]
        mean, slope = x.mean(0)[None], (normalised(1).T @ x)[None] / len(x)
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and x.ndim == len(layer.kernel_size) + 2:
        groups, count = layer.groups, len(x) * g.shape[3:].numel()
        split = g.flatten(3).unflatten(2, (groups, -1))
        ones = g.new_ones(1, groups, *g.shape[3:])
        mean = _weight_gradient(layer, x.sum(0, keepdim=True), ones).view(groups, -1) / count  # of the sum, once
        step = min(SPARSE, max(1, count // POSITIONS))
        some = normalised(step)
        slope = _weight_gradient(layer, x[::step], some).view(groups, layer.out_channels // groups, -1)
        slope = slope / some[:, 0].numel()
    else:
        return None
    if sums is None:
        y = normalised(1) if taken is None else normalised(1)[taken]
        sums = split.sum(-1), (split * y.reshape(len(y), 1, *split.shape[2:])).sum(-1)
    shift, scale = (t.unflatten(2, (groups, -1)) if t.ndim == 3 else t for t in sums)  # (N, R, G, o)

    def gradients(lo: int, hi: int) -> Tensor:
        if is_linear(layer):
            rows = torch.einsum("nrgol,ngkl->nrgok", split[lo:hi], inputs[lo:hi, None, :, None])
        else:
            rows = _each_weight_gradient(layer, inputs[lo:hi], g[lo:hi])  # type: ignore[arg-type]
        rows.addcmul_(shift[lo:hi, ..., None], mean[:, None], value=-1)
        rows.addcmul_(scale[lo:hi, ..., None], slope, value=-1)
        return (rows.flatten(2, 3).transpose(2, 3) if transposed(layer) else rows).flatten(2)

    return {"weight": Use(gradients, g.shape[1]), "bias": dense(torch.zeros_like(shift))}


def has_few_channels(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, positions: int) -> bool:
    """Return whether per-sample gradients of a convolution are those of one with many groups."""
    return FEW_CHANNELS * layer.out_channels <= layer.groups * positions


def _each_weight_gradient(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, g: Tensor) -> Tensor:
    """Return the gradient of the weight for each sample and direction, ``(N, R, G, o, k)``.

    Where a sample has more positions than its layer channels, samples are groups of one convolution: it is two or three
    times as fast as the products of gradients and windows, which are many times as large as the input.
    """
    n, rows = g.shape[:2]
    if x.is_cpu and rows == 1 and has_few_channels(layer, g.shape[3:].numel()):
        single = (t.reshape(1, -1, *t.shape[-len(layer.kernel_size) :]) for t in (x, g))
        each = _weight_gradient(layer, *single, groups=n * layer.groups)
        return each.view(n, 1, layer.groups, layer.out_channels // layer.groups, -1)
    windows, split = _flat_windows(layer, x, g)
    return torch.einsum("nrgol,ngkl->nrgok", split, windows)


def _flat_windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows, ``(N, G, k, L)``, and the gradients of each group's channels, ``(N, R, G, o, L)``."""
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:  # one copy
        flat = F.unfold(_padded(layer, x), layer.kernel_size, layer.dilation, 0, layer.stride)[:, None]
        return flat, g.flatten(3)[:, :, None]
    windows, split = _windows(layer, x, g)
    return windows.transpose(3, 4).flatten(2, 3), split


def _weight_gradient(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, g: Tensor, *, groups: int | None = None
) -> Tensor:
    """Return the gradient of the weight, ``(channels of g, ...)``; of so many groups of channels."""
    dims = len(layer.kernel_size)
    like = x.new_empty(g.shape[1], *layer.weight.shape[1:])
    how = (list(layer.stride), [0] * dims, list(layer.dilation), False, [0] * dims, groups or layer.groups)
    return torch.ops.aten.convolution_backward(g, _padded(layer, x), like, None, *how, [False, True, False])[1]


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    return F.pad(x, padding_amounts(layer), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _affine(normalised: Tensor, g: Tensor, dims: int) -> dict[str, Use]:
    """Return the uses of scale and shift that act on the last ``dims`` axes."""
    shape = *g.shape[:2], -1, *g.shape[g.ndim - dims :]
    product, shift = (t.reshape(shape).sum(2) for t in (g * normalised[:, None], g))
    return {"weight": dense(product), "bias": dense(shift)}


def channel_uses(normalised: Tensor, g: Tensor) -> dict[str, Use]:
    """Return the uses of scale and shift that act on axis 1."""
    product, shift = (t.reshape(*g.shape[:3], -1).sum(-1) for t in (g * normalised[:, None], g))
    return {"weight": dense(product), "bias": dense(shift)}
