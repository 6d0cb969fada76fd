"""Batch sharpness over as many consecutive steps as its own error asks for."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice, number, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.batch_sharpness import batch_sharpness, curvature_along_gradient
from lsp_callbacks.operators.cost import products
from lsp_callbacks.operators.curvature.hessian import Method, hessian, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.step.snapshot import Snapshot

#: Fewer batches do not tell their own spread.
LEAST = 8


class BatchSharpness(Quantity):
    """The curvature of each batch along its own gradient, ``E[g^T H_B g / ||g||^2]``, on the batches of training.

    A measurement takes consecutive steps until the relative standard error of both means is at most ``rtol``, or
    ``most`` steps; the weights move meanwhile. Under SGD without momentum it rises to 2 / lr as the sharpness does
    under full-batch descent, and stays: no alarm, but it tells whether the learning rate limits the curvature.

    Args:
        rtol: relative standard error to reach.
        most: at most this many batches.
        method: of the Hessian products.

    Keys: ``stability/batch_sharpness`` (mean of ratios), ``stability/batch_sharpness_of_means`` (ratio of means), each
    with ``_error``, in units of loss / parameter^2; ``stability/batch_sharpness_batches``.

    Raises:
        ValueError: for bad arguments.

    Cost: one Hessian product a step (2.1 gradients, or 3.6 with kinks), some 20 steps.

    Source: Andreyev & Beneventano 2024; MATH section 3.
    """

    name = "batch_sharpness"
    keys = (
        "stability/batch_sharpness", "stability/batch_sharpness_error", "stability/batch_sharpness_of_means",
        "stability/batch_sharpness_of_means_error", "stability/batch_sharpness_batches",
    )  # fmt: skip
    pairs: Tensor

    def __init__(self, rtol: float = 0.1, most: int = 100, method: Method = "auto"):
        super().__init__()
        number("rtol", rtol, above=0), whole("most", most, LEAST)
        self.rtol, self.most = rtol, most
        self.method: Method = choice("method", method, *get_args(Method))
        self.window = most
        self._window: list[Tensor] = []
        self._step = 0
        self.add_state("pairs", default=torch.empty(0, 2, dtype=torch.float64), persistent=True)

    def check(self, snapshot: Snapshot) -> None:
        if snapshot.unsupported:  # its gradient may be that of other batches, too
            raise Unmeasurable(snapshot.unsupported)

    @property
    def least_steps(self) -> int:
        return min(LEAST, self.most)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        batches = min(self.most, max(LEAST, round((0.43 / self.rtol) ** 2)))
        return {"batches": batches * (1 / 3 + products(snapshot, resolved(snapshot, self.method), 1))}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        return product_memory(snapshot, self.method, 0)

    def update(self, snapshot: Snapshot) -> None:
        """Takes in one more batch; a gap in the steps starts again."""
        self.complete = False
        pair = curvature_of_step(snapshot, self.method)
        going = bool(self._window) and snapshot.follows(self._step)
        self._window = [*(self._window if going else []), pair]
        self._step = snapshot.step
        pairs = torch.stack(self._window)
        if len(pairs) < min(LEAST, self.most):
            return
        if len(pairs) < self.most:
            found = batch_sharpness(pairs)
            means = (
                (found.mean_of_ratios, found.mean_of_ratios_error),
                (found.ratio_of_means, found.ratio_of_means_error),
            )
            if not all(bool(error <= self.rtol * mean.abs()) for mean, error in means):
                return
        self.pairs, self._window, self.complete = pairs, [], True

    def compute(self) -> dict[str, Tensor]:
        """Both means over the last measurement's batches; NaN before one."""
        found = batch_sharpness(self.pairs)
        values = (
            found.mean_of_ratios, found.mean_of_ratios_error, found.ratio_of_means, found.ratio_of_means_error,
            scalar(float(found.batches or torch.nan)),
        )  # fmt: skip
        return dict(zip(self.keys, values))

    def vectors(self) -> dict[str, object]:
        return {"window": list(self._window), "step": self._step} if self._window else {}

    def load_vectors(self, vectors: dict) -> None:
        self._window, self._step = list(vectors.get("window", [])), vectors.get("step", 0)


def curvature_of_step(snapshot: Snapshot, method: Method = "auto") -> Tensor:
    """Return the `curvature_along_gradient` of a step, from its gradient.

    Raises:
        Unmeasurable: without the gradient, or where it vanishes; see `hessian`.
    """
    if (gradient := snapshot.flat_gradient) is None:
        raise Unmeasurable("batch sharpness is the curvature along the step's gradient: pass Snapshot(gradient=...)")
    return curvature_along_gradient(hessian(snapshot, method=method), gradient)
