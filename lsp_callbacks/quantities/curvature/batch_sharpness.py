"""Batch sharpness over as many consecutive steps as its standard error requires."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice, number, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.batch_sharpness import batch_sharpness, curvature_along_gradient
from lsp_callbacks.operators.cost import products
from lsp_callbacks.operators.curvature.hessian import Method, hessian, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.quantities.base import Quantity
from lsp_callbacks.quantities.key import CURVATURE, Key, standard_error
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.snapshot import Snapshot

#: Fewer batches do not show their own spread.
LEAST = 8


class BatchSharpness(Quantity):
    """Curvature of each batch along its own gradient, ``E[g^T H_B g / ||g||^2]``, on the batches of training.

    A measurement takes consecutive steps until the relative standard error of both means is at most ``rtol``, or
    ``most`` steps; the weights move meanwhile. Under SGD without momentum it rises to 2 / lr, as the sharpness does
    under full-batch descent, and stays there: no alarm, but it shows whether the learning rate limits the curvature.

    Args:
        rtol: relative standard error to reach.
        most: at most this many batches.
        method: of the Hessian products.

    Raises:
        ValueError: for a tolerance that is not positive, or fewer than 8 batches.

    Cost: one Hessian product a step (2.1 gradients, or 3.6 with kinks), some 20 steps.

    Source: Andreyev & Beneventano 2024; docs/theory.md, section Edges of stability.
    """

    name = "batch_sharpness"
    KEYS: ClassVar = {
        "batch_sharpness": Key(
            "Mean over the batches of their curvature along their own gradient.",
            CURVATURE,
            "At 2 / lr the learning rate limits the curvature: a smaller rate allows sharper weights, a larger one "
            "flatter weights.",
        ),
        "batch_sharpness_error": standard_error("batch_sharpness", CURVATURE),
        "batch_sharpness_of_means": Key("The same as a ratio of means, E[g^T H g] / E[||g||^2].", CURVATURE),
        "batch_sharpness_of_means_error": standard_error("batch_sharpness_of_means", CURVATURE),
        "batch_sharpness_batches": Key("Number of batches that the means are taken over.", "batches"),
    }

    def __init__(self, rtol: float = 0.1, most: int = 100, method: Method = "auto"):
        super().__init__()
        number("rtol", rtol, above=0), whole("most", most, LEAST)
        self.rtol, self.most = rtol, most
        self.method: Method = choice("method", method, *get_args(Method))
        self.window = most
        self._window: list[Tensor] = []
        self._step = 0

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
        """Add one more batch; a gap in the steps starts again."""
        self.complete = False
        pair = curvature_of_step(snapshot, self.method)
        continues = bool(self._window) and snapshot.follows(self._step)
        self._window = [*(self._window if continues else []), pair]
        self._step = snapshot.step
        pairs = torch.stack(self._window)
        if len(pairs) < min(LEAST, self.most):
            return
        sharpness = batch_sharpness(pairs)
        mean, ratio = sharpness.mean_of_ratios, sharpness.ratio_of_means
        errors = (sharpness.mean_of_ratios_error, mean), (sharpness.ratio_of_means_error, ratio)
        if len(pairs) < self.most and not all(bool(error <= self.rtol * value.abs()) for error, value in errors):
            return
        self._window = []
        self.finish({
            "batch_sharpness": mean,
            "batch_sharpness_error": sharpness.mean_of_ratios_error,
            "batch_sharpness_of_means": ratio,
            "batch_sharpness_of_means_error": sharpness.ratio_of_means_error,
            "batch_sharpness_batches": float(sharpness.batches or torch.nan),
        })  # fmt: skip

    def vectors(self) -> dict[str, Any]:
        return {"window": list(self._window), "step": self._step} if self._window else {}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self._window, self._step = list(vectors.get("window", [])), vectors.get("step", 0)


def curvature_of_step(snapshot: Snapshot, method: Method = "auto") -> Tensor:
    """Return the `curvature_along_gradient` of a step, from its gradient, or from a replay's where it is not given.

    Raises:
        Unmeasurable: where the gradient vanishes; see `hessian`.
    """
    gradient = snapshot.flat_gradient
    if gradient is None:
        gradient = replayed_gradient(snapshot)[1]
    return curvature_along_gradient(hessian(snapshot, method=method), gradient)
