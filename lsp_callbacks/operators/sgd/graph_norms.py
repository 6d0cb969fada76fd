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
        rows = self.normalised_rows(samples)
        g = samples.gradient(self.flat(g), self.axis)
        return torch.stack([self.summed(g * rows), self.summed(g)], dim=1)

    @property
    def normalised(self) -> Tensor:
        """The normalised input, in the shape of the output."""
        raise NotImplementedError

    def normalised_rows(self, samples: Samples) -> Tensor:
        """Return it of the samples that have rows, ``(n, T, ...)``."""
        return samples.rows(self.flat(self.normalised), self.axis)

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
    """Over the batch, whose statistics are held fixed; ``(N, C, ...)``.

    Attributes:
        is_only: whether nothing else takes what it normalises.
        sums: over positions of the gradients at its input, and of them times the normalised input, ``(n, R, C)``, of
            the samples that have rows; None where something else has a part in these gradients.
    """

    is_only = False
    sums: tuple[Tensor, Tensor] | None = None

    @property
    def ties(self) -> bool:
        """Whether the statistics are those of the batch."""
        return bool(saved["training"](self.node))

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        if self.ties:
            return saved["result1"](self.node), saved["result2"](self.node)
        return saved["running_mean"](self.node), (saved["running_var"](self.node) + saved["eps"](self.node)).rsqrt()

    @property
    def _factor(self) -> Tensor:
        """From the gradients at its output to those at its input, ``(C,)``."""
        weight, rstd = saved["weight"](self.node), self._statistics[1]
        return rstd if weight is None else rstd * weight

    def normalised_rows(self, samples: Samples) -> Tensor:
        return self._normalised(samples.rows(self.flat(saved["input"](self.node)), self.axis))

    def every(self, step: int) -> Tensor:
        """Return the normalised input of every so many samples of the batch."""
        return self._normalised(saved["input"](self.node)[::step])

    def _normalised(self, x: Tensor) -> Tensor:
        behind = [1] * (saved["input"](self.node).ndim - 2)
        mean, rstd = (t.view(-1, *behind) for t in self._statistics)
        return (x - mean).mul_(rstd)

    def uses(self, g: Tensor, samples: Samples) -> dict[str, Use]:
        if self.is_only:
            factor = self._factor
            self.sums = g[:, :, 1] * factor, g[:, :, 0] * factor
        return super().uses(g, samples)

    def pulled(self, g: Tensor) -> list[Tensor | None]:
        return [g * self._factor.view(1, -1, *[1] * (g.ndim - 2)), None, None]
