"""The gradient of one replay with its graph, by which a Hessian product differentiates it: whole, or in pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lsp_callbacks.autograd.double_backward import double_backward
from lsp_callbacks.linalg import norm
from lsp_callbacks.operators.divided_step import path_tolerance, pieces_of
from lsp_callbacks.step.compared_gradients import check_gradient
from lsp_callbacks.step.flat import flatten, split
from lsp_callbacks.step.replay import Replay
from lsp_callbacks.step.replay_checks import check_loss
from lsp_callbacks.step.snapshot import Snapshot


class NoSecondDerivative(Exception):
    """A backward function without a derivative."""


class GradientGraph:
    """``v -> H v`` of one rank or of all, from the graph of the gradient.

    The graph of the whole batch is kept for all products. Where it would not fit, each product makes those of pieces
    of the batch one after the other, see `pieces_of`; the first checks that their gradients add up to the step's.

    Args:
        snapshot: a step.

    Attributes:
        mean: the gradient, flat, the mean over the ranks.

    Raises:
        Unmeasurable: a replay that is not the step.

    Cost: 1.3 gradients, and 2 for each product; in pieces nothing, and 3.3 for each.
    """

    def __init__(self, snapshot: Snapshot):
        self._snapshot, self._parameters = snapshot, list(snapshot.parameters.values())
        self._tolerance = path_tolerance(snapshot.graph.dtype)
        self._pieces = pieces_of(snapshot)
        self._whole: Tensor | None = None
        self._is_checked = False
        if self._pieces and snapshot.flat_gradient is not None:
            self.mean = snapshot.flat_gradient
            return

        def rank_gradient() -> tuple[Tensor]:
            self._whole = self._gradient(snapshot.replay, is_checked=True)
            return (self._whole.detach(),)

        (self.mean,) = snapshot.run.ranks.mean(rank_gradient, "the gradient with its graph")
        check_gradient(snapshot, self.mean, tolerance=100 * self._tolerance)

    def _gradient(self, replay: Replay, *, is_checked: bool = False) -> Tensor:
        with double_backward(self._snapshot.module):
            loss = replay()
            if is_checked:
                # Another path than the step's (no fused attention, not compiled): equal up to its rounding.
                check_loss(self._snapshot, loss, tolerance=self._tolerance)
            parts = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
            return flatten(parts, self._parameters)

    def product(self, v: Tensor) -> Tensor:
        """Return ``H v``, the mean over the ranks.

        Raises:
            NoSecondDerivative: if a backward function on any rank has none.
            Unmeasurable: if gradients of pieces are not the step's.
        """
        if float(norm(v)) == 0:
            return torch.zeros_like(v)
        if self._whole is None:
            return self._in_pieces(v)
        whole, reasons = self._whole, list[str]()

        def rank_product() -> tuple[Tensor, Tensor]:
            try:
                return flatten(self._products(whole, v, keep=True), self._parameters).to(v.dtype), v.new_zeros(())
            except NoSecondDerivative as error:
                reasons.append(str(error))
                return torch.zeros_like(v), v.new_ones(())

        image, raised = self._snapshot.run.ranks.mean(rank_product, "the exact product")
        if raised > 0:
            raise NoSecondDerivative(reasons[0] if reasons else "on another rank")
        return image

    def _in_pieces(self, v: Tensor) -> Tensor:
        image, total = torch.zeros_like(v), None if self._is_checked else torch.zeros_like(v)
        for piece in self._pieces:
            gradient = self._gradient(piece)
            if total is not None:
                total += gradient.detach().to(v.dtype)
            for whole, part in zip(split(image, self._parameters), self._products(gradient, v, keep=False)):
                whole += part.to_dense().to(v.dtype)
            del gradient, part  # or the next piece would be formed beside them
        if total is not None:
            check_gradient(self._snapshot, total, tolerance=10 * self._tolerance)
            self._is_checked = True
        return image

    def _products(self, gradient: Tensor, v: Tensor, *, keep: bool) -> Sequence[Tensor]:
        """Return ``H v`` of what a gradient belongs to, by parameter."""
        if not gradient.requires_grad:  # a loss linear in the parameters has no graph left
            return [torch.zeros_like(p) for p in self._parameters]
        try:
            with double_backward(self._snapshot.module):
                return torch.autograd.grad(
                    gradient, self._parameters, v.to(gradient.dtype), retain_graph=keep, materialize_grads=True
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # no second derivative is implemented
            raise NoSecondDerivative(str(error)) from None
