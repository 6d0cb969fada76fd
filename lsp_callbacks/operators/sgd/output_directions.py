"""The combinations of a sample's outputs that the rows of a Gram matrix stand for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lsp_callbacks.autograd.double_backward import double_backward
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import power_iteration, unit
from lsp_callbacks.operators.sgd.output_hessian import Product, all_pairs, blocks, output_hessian, root
from lsp_callbacks.operators.sgd.per_sample_gradients import Recorder
from lsp_callbacks.operators.sgd.sharpest_mode import sharpest_mode
from lsp_callbacks.step.criterion import Evaluation
from lsp_callbacks.step.probe_set import ProbeSet

#: Products that find the top eigenvector of each sample's output Hessian.
POWER = 20


class OutputDirections:
    """The cotangents ``sqrt(s) u`` of each sample's rows, with the forward passes that they belong to.

    Args:
        probes: the samples.
        scale: the diagonal of D, by parameter name.
        which: "top" or "all" eigenpairs of each output Hessian, or "loss" for the gradient of each sample's loss.
        positions: how many of a sample's positions to look at.
        generator: of positions and starts.
        mode: an earlier sharpest mode.

    Attributes:
        description: in words, which outputs the rows stand for.
        mode: the sharpest mode, where it was needed.
    """

    def __init__(
        self,
        probes: ProbeSet,
        scale: Mapping[str, float | Tensor],
        which: str,
        positions: int,
        generator: torch.Generator,
        mode: Tensor | None = None,
    ):
        self.mode = mode
        self.probes, self.scale, self.which, self.generator = probes, scale, which, generator
        self.description = ""
        self._count = positions
        self._chosen: Tensor | None = None
        self._moves: list[Tensor] | None = None
        self._cotangents: dict[int, list[Tensor]] = {}
        self._spread = True

    def evaluate(self, index: int) -> tuple[Evaluation, Recorder | None, list[Tensor]]:
        """Return a forward pass over a part, what it recorded (None if samples are tied), and the cotangents."""
        with double_backward(self.probes.module):
            evaluation, recorder = self._record(index)
            if index not in self._cotangents:  # the same ones each time: they are drawn and rounded
                self._cotangents[index] = self._choose(evaluation, index)
            return evaluation, recorder, self._cotangents[index]

    def _record(self, index: int) -> tuple[Evaluation, Recorder | None]:
        probes = self.probes
        if probes.tied:
            return probes.parts[index](), None
        if self._spread and len(probes.parts) == 1:
            try:
                with Recorder(probes.module, probes.parameters, spread=probes.samples) as recorder:
                    evaluation = probes.parts[index]()
                if not recorder.spread or _nearly_equal(evaluation.outputs, probes.parts[index]().outputs):
                    return evaluation, recorder
            except (RuntimeError, ValueError, IndexError):  # a shared embedding that cannot be given to each sample
                pass
            self._spread = False
        with Recorder(probes.module, probes.parameters) as recorder:
            return probes.parts[index](), recorder

    def _choose(self, evaluation: Evaluation, index: int) -> list[Tensor]:
        shape = evaluation.outputs.shape
        if self.which == "loss":
            self.description = "the loss of each sample"
            f = evaluation.outputs.detach().requires_grad_()
            with torch.enable_grad():
                return list(torch.autograd.grad(len(f) * evaluation.criterion(f), f))
        if self._chosen is None:
            order = torch.randperm(shape[1], generator=self.generator)
            self._chosen = order[: self._count].sort().values
            where = f" at {len(self._chosen)} of {shape[1]} positions" if shape[1] > 1 else ""
            self.description = ("the only output" if shape[2] == 1 else f"{self.which} of {shape[2]} outputs") + where
        if shape[1] <= int(self._chosen.max()):
            raise Unmeasurable("samples have different numbers of positions: pad the batches to one length")
        curvature = output_hessian(evaluation)
        if self.which == "all" or shape[2] == 1:
            pairs = all_pairs(curvature, evaluation.outputs)
        else:
            pairs = [self._top(curvature, evaluation, index)]
        weight = (shape[1] / len(self._chosen)) ** 0.5
        cotangents = []
        for pair in pairs:
            for position in self._chosen.tolist():
                cotangent = torch.zeros_like(pair)
                cotangent[:, position] = weight * pair[:, position]
                cotangents.append(cotangent)
        return cotangents

    def _top(self, curvature: Product, evaluation: Evaluation, index: int) -> Tensor:
        """Return ``sqrt(s) u`` of the top eigenpair at each position, by power iteration."""
        outputs, matrices = evaluation.outputs, None
        if outputs.shape[-1] <= POWER:  # the matrix itself costs less than its power
            matrices = blocks(curvature, outputs)
            curvature = lambda v: (matrices @ v[..., None])[..., 0]  # noqa: E731
        # One start for all: where the eigenvalue is nearly degenerate, samples keep what they have in common.
        start = torch.randn(outputs.shape[-1], generator=self.generator).to(outputs).expand_as(outputs)
        image = curvature(unit(start))
        value = (image * unit(start)).sum(-1, keepdim=True)
        if bool(((image - value * unit(start)).norm(dim=-1) <= 1e-4 * image.norm(dim=-1)).all()):
            # Any direction is an eigenvector: take the one in which the sharpest mode moves this sample.
            if self._moves is None:
                self._moves, self.mode = sharpest_mode(self.probes, self.scale, self.mode, self.generator)
            self.description = self.description.replace("top", "sharpest mode", 1)
            start, image = self._moves[index], curvature(unit(self._moves[index]))
        if matrices is not None:
            start, image = power_iteration(matrices, image, POWER)
        else:
            for _ in range(POWER):
                start, image = image, curvature(unit(image))
        u = unit(start)
        return u * root((image * u).sum(-1, keepdim=True), image)


def _nearly_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-4 * b.abs().amax()).all())
