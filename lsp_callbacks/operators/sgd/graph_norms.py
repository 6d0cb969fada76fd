"""Normalisations in an autograd graph: per-sample gradients of scale and shift, from what the graph has saved."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import saved
from lsp_callbacks.operators.sgd.graph_sites import INPUT_ALONE, Samples, Site, named_uses
from lsp_callbacks.operators.sgd.layer_rules import Use, dense


class NormSite(Site):
    """A normalisation with scale and shift: its gradients are summed over positions at once."""

    def rows_of(self, g: Tensor, samples: Samples) -> Tensor:
        rows = samples.rows(self.flat(self.normalised), self.axis)
        g = samples.gradient(self.flat(g), self.axis)
        return torch.stack([self.summed(g * rows), self.summed(g)], dim=1)

    @property
    def normalised(self) -> Tensor:
        """The normalised input, in the shape of the output."""
        raise NotImplementedError

    def summed(self, t: Tensor) -> Tensor:
        """Return the sum of ``(n, T, C, ...)`` over all but samples and channels."""
        return torch.einsum("ntc...->nc", t)

    def uses(self, g: Tensor, samples: Samples) -> dict[str, Use]:
        return named_uses({"weight": dense(g[:, :, 0]), "bias": dense(g[:, :, 1])}, *self.names[1:])


class LayerNormSite(NormSite):
    """Over the last axes of each position."""

    @property
    def normalised(self) -> Tensor:
        return (saved["input"](self.node) - saved["result1"](self.node)) * saved["result2"](self.node)

    def flat(self, t: Tensor) -> Tensor:
        return t.flatten(0, -1 - len(saved["normalized_shape"](self.node)))

    def summed(self, t: Tensor) -> Tensor:
        return t.sum(1)

    def pulled(self, g: Tensor) -> list[Tensor | None]:
        what = [saved[k](self.node) for k in ("input", "normalized_shape", "result1", "result2", "weight", "bias")]
        return [torch.ops.aten.native_layer_norm_backward(g.contiguous(), *what, INPUT_ALONE)[0], None, None]


class GroupNormSite(NormSite):
    """Over groups of channels; ``(N, C, ...)``."""

    @property
    def normalised(self) -> Tensor:
        x = saved["input"](self.node)
        groups = x.reshape(len(x), saved["group"](self.node), -1)
        mean, rstd = (saved[k](self.node).view(len(x), -1, 1) for k in ("result1", "result2"))
        return ((groups - mean) * rstd).view_as(x)

    def pulled(self, g: Tensor) -> list[Tensor | None]:
        names = ("input", "result1", "result2", "weight", "N", "C", "HxW", "group")
        what = [saved[name](self.node) for name in names]
        return [torch.ops.aten.native_group_norm_backward(g.contiguous(), *what, INPUT_ALONE)[0], None, None]


class BatchNormSite(NormSite):
    """Over the batch, whose statistics are held fixed; ``(N, C, ...)``."""

    @property
    def ties(self) -> bool:
        """Whether the statistics are those of the batch."""
        return bool(saved["training"](self.node))

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        if self.ties:
            return saved["result1"](self.node), saved["result2"](self.node)
        return saved["running_mean"](self.node), (saved["running_var"](self.node) + saved["eps"](self.node)).rsqrt()

    @cached_property
    def normalised(self) -> Tensor:  # type: ignore[override]
        """The normalised input of the whole batch."""
        x = saved["input"](self.node)
        mean, rstd = (t.view(1, -1, *[1] * (x.ndim - 2)) for t in self._statistics)
        return (x - mean).mul_(rstd)

    def pulled(self, g: Tensor) -> list[Tensor | None]:
        weight, rstd = saved["weight"](self.node), self._statistics[1]
        factor = rstd if weight is None else rstd * weight
        return [g * factor.view(1, -1, *[1] * (g.ndim - 2)), None, None]
