"""The projections of multi-head attention, which its module applies without calling any layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsp_callbacks.operators.sgd.layer_rules import Use, layer_uses, linear_uses


class Projection(nn.Module):
    """A linear map by some rows of a matrix that other projections share.

    Args:
        weight: the whole matrix.
        bias: of all rows, or None.
        begin: the first row.
        rows: how many.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, begin: int, rows: int):
        super().__init__()
        self.weight, self.bias, self.begin, self.rows = weight, bias, begin, rows

    def forward(self, x: Tensor) -> Tensor:
        some = slice(self.begin, self.begin + self.rows)
        return F.linear(x, self.weight[some], None if self.bias is None else self.bias[some])


@layer_uses.register
def _(layer: Projection, x: Tensor, g: Tensor) -> dict[str, Use] | None:
    uses = linear_uses(x, g)
    if layer.rows == len(layer.weight):
        return uses
    after = len(layer.weight) - layer.begin - layer.rows

    def among_all(use: Use, width: int) -> Use:
        return Use(lambda lo, hi: F.pad(use.gradients(lo, hi), (layer.begin * width, after * width)), use.rows)

    return {"weight": among_all(uses["weight"], layer.weight.shape[1]), "bias": among_all(uses["bias"], 1)}


def projected(
    module: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any]
) -> tuple[list[tuple[Projection, Tensor, Tensor]], Tensor] | None:
    """Compute attention anew, projection by projection.

    Args:
        module: that was called.
        args: its arguments, with their graph.
        kwargs: likewise.

    Returns:
        Each projection with its input, samples first, and its output; and the output of the module. None for a kind of
        attention that is not covered: keys and values of other widths, appended biases, dropout, no batch.
    """
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    call = dict(zip(names, args)) | kwargs
    q, k, v = (call[name] for name in names[:3])
    weight, bias, width = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    if weight is None or module.bias_k is not None or module.add_zero_attn or q.ndim != 3:
        return None
    if module.dropout and module.training:
        return None
    is_self = q is k and k is v
    calls: list[tuple[Projection, Tensor, Tensor]] = []

    def linear(x: Tensor, *shape: Any) -> Tensor:
        layer = Projection(*shape)
        calls.append((layer, x, layer(x)))
        return calls[-1][2].clone()

    q, k, v = (t if module.batch_first else t.transpose(0, 1) for t in (q, k, v))
    if is_self:
        parts = linear(q, weight, bias, 0, 3 * width).chunk(3, dim=-1)
    else:
        parts = tuple(linear(t, weight, bias, begin * width, width) for begin, t in enumerate((q, k, v)))
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in parts)
    mask = _mask(call.get("attn_mask"), call.get("key_padding_mask"), q, k)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    out = linear(mixed, module.out_proj.weight, module.out_proj.bias, 0, width)
    return calls, out if module.batch_first else out.transpose(0, 1)


def _mask(attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return both masks as one that is added to the scores."""
    total = None
    for mask in (attention, padding):
        if mask is None:
            continue
        added = mask if mask.is_floating_point() else torch.zeros(mask.shape).to(q).masked_fill(mask, -torch.inf)
        if mask is padding:
            added = added[:, None, None]
        elif mask.ndim == 3:
            added = added.view(len(q), q.shape[1], *mask.shape[1:])
        total = added if total is None else total + added
    return total
