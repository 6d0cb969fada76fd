"""The combinations of a sample's outputs that the rows of a Gram matrix stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.sgd.low_rank_noise import Array
from lsp_callbacks.linalg import unit
from lsp_callbacks.operators.sgd.chosen_positions import Chosen, joined_counts, positions_of, stands_for
from lsp_callbacks.operators.sgd.held_statistics import held_statistics
from lsp_callbacks.operators.sgd.output_hessian import (
    OutputCurvature,
    all_pairs,
    at,
    counted_positions,
    output_curvature,
    root,
)
from lsp_callbacks.operators.sgd.output_rows import OutputMetric, last_layer, rows_of_outputs, softmax_rows
from lsp_callbacks.operators.sgd.parameter_gram import wide
from lsp_callbacks.operators.sgd.per_sample_gradients import Recorder, RowSeed
from lsp_callbacks.operators.sgd.sharpest_mode import sharpest_mode
from lsp_callbacks.operators.sgd.step_samples import random_fraction, sampled_rows
from lsp_callbacks.step.criterion import Evaluation
from lsp_callbacks.step.probe_set import ProbeSet


class OutputDirections:
    """The cotangents ``sqrt(s) u`` of each sample's rows, with the forward passes that they belong to.

    Args:
        probes: the samples.
        scale: the diagonal of D, by parameter name.
        which: "top" or "all" eigenpairs of each output Hessian, or "loss" for the gradient of each sample's loss.
        positions: how many of a sample's positions to look at.
        generator: of positions and starts.
        mode: an earlier sharpest mode.
        checks: whether a pass with copies of shared parameters is compared with one without.
        holds: whether the statistics of a batch are held fixed where they tie samples together.
        most: how many samples have rows; None is all, see `sampled_rows`.
        given: what rows of some parts look at, by the index of the part.
        parameters: those of the probes, where they are known.
        tied: whether the statistics of a batch tie samples together, where that is known.

    Attributes:
        first_inputs: the arguments of the first layers in the last forward pass.
        description: in words, which outputs the rows stand for.
        mode: the sharpest mode, where it was needed.
        length: how many positions a sample has.
        looked: at how many of them there are rows.
        seeds: the cotangents of each part's rows.
        taken: indices of each part's samples that have rows, in their part, and by which probability; all if absent.
        counted: how many positions of each part's samples the loss counts; None where it counts all.
    """

    def __init__(
        self,
        probes: ProbeSet,
        scale: Mapping[str, float | Tensor],
        which: str,
        positions: int,
        generator: torch.Generator,
        mode: Tensor | None = None,
        checks: bool = True,
        holds: bool = False,
        most: int | None = None,
        given: Mapping[int, Chosen] | None = None,
        parameters: dict[str, nn.Parameter] | None = None,
        tied: bool | None = None,
    ):
        self.tied = probes.tied if tied is None else tied
        self.parameters = probes.parameters if parameters is None else parameters
        self.given = given or {}
        self.mode, self._checks, self._holds, self._most = mode, checks, holds, most
        self.probes, self.scale, self.which, self.generator = probes, scale, which, generator
        self.description = ""
        self._count = positions
        self.length = self.looked = 1
        self._is_known = False
        self._moves: list[Tensor] | None = None
        self.seeds: dict[int, list[RowSeed]] = {}
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}
        self.counted: dict[int, Tensor | None] = {}
        self.first_inputs: list[Tensor] = []
        self._spread = True

    def evaluate(self, index: int) -> tuple[Evaluation, Recorder | None, list[RowSeed]]:
        """Return a forward pass over a part, what it recorded (None if samples are tied), and the seeds of the rows."""
        with _eagerly(self.probes.module):
            evaluation, recorder = self._record(index)
            if index not in self.seeds:  # the same ones each time: they are drawn and rounded
                self.seeds[index] = self.choose(evaluation, index)
            return evaluation, recorder, self.seeds[index]

    def _record(self, index: int) -> tuple[Evaluation, Recorder | None]:
        probes = self.probes
        if self.tied and self._holds:
            with (
                held_statistics(probes.module) as held,
                Recorder(probes.module, self.parameters, held=held) as recorder,
            ):
                self.first_inputs = recorder.first_inputs
                return probes.parts[index](), recorder
        if self.tied:
            with Recorder(probes.module, {}) as recorder:
                self.first_inputs = recorder.first_inputs
                return probes.parts[index](), None
        if self._spread and len(probes.parts) == 1:
            try:
                with Recorder(probes.module, self.parameters, samples=probes.samples) as recorder:
                    self.first_inputs = recorder.first_inputs
                    evaluation = probes.parts[index]()
                if not (self._checks and recorder.spread) or _nearly_equal(
                    evaluation.outputs, probes.parts[index]().outputs
                ):
                    return evaluation, recorder
            except (RuntimeError, ValueError, IndexError):  # a shared embedding that cannot be given to each sample
                pass
            self._spread = False
        with Recorder(probes.module, self.parameters) as recorder:
            self.first_inputs = recorder.first_inputs
            return probes.parts[index](), recorder

    def choose(self, evaluation: Evaluation, index: int) -> list[RowSeed]:
        """Return the cotangents of the rows at a part of the samples."""
        shape = evaluation.outputs.shape
        if self.which == "loss":
            self.description = "the loss of each sample"
            f = evaluation.outputs.detach().requires_grad_()
            with torch.enable_grad():
                return [RowSeed(torch.autograd.grad(len(f) * evaluation.criterion(f), f)[0])]
        if not self._is_known:
            self.length, self._is_known = shape[1], True
        if shape[1] != self.length:
            raise Unmeasurable("samples have different numbers of positions: pad the batches to one length")
        # Each sample has positions of its own: what one position is like is not what all are.
        if index in self.given:
            chosen, self.counted[index] = self.given[index].positions, self.given[index].counted
        else:
            counts = counted_positions(evaluation) if self._count < shape[1] else None
            chosen = positions_of(shape[:2], self._count, self.generator, counts)
            self.counted[index] = None if counts is None else counts.sum(1)
        stands = torch.as_tensor(stands_for(self.counted[index], shape[1], chosen.shape[1]), dtype=torch.float64)
        chosen = chosen.to(evaluation.outputs.device)
        self.looked = chosen.shape[1]
        where = f" at {chosen.shape[1]} of {shape[1]} positions" if shape[1] > 1 else ""
        self.description = ("the only output" if shape[2] == 1 else f"{self.which} of {shape[2]} outputs") + where
        curvature = output_curvature(evaluation, chosen)
        here = at(evaluation.outputs.detach(), chosen)
        if self.which == "all" or shape[2] == 1:
            pairs = all_pairs(curvature.matrices(here.shape).to(here))
        else:
            pairs = [self._top(curvature, here, index, chosen)]
        weight = stands.sqrt().to(here).view(-1, 1)
        pairs = self._sampled(pairs, index)
        return [RowSeed(weight * pair[:, k], position) for pair in pairs for k, position in enumerate(chosen.unbind(1))]

    def joined_taken(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the indices of the samples that have rows, of all parts, and by which chance; None where all have."""
        if not self.taken:
            return None, None
        indices, chances, begin = [], [], 0
        for index, seeds in self.seeds.items():
            size = len(seeds[0].values)
            taken, chance = self.taken.get(index, (torch.arange(size), torch.ones(size, dtype=torch.float64)))
            indices.append(begin + taken)
            chances.append(chance)
            begin += size
        return torch.cat(indices), torch.cat(chances)

    def joined_counted(self) -> Tensor | None:
        """Return how many positions the loss counts of the samples that have rows; None where it counts all."""
        parts, sizes = [], []
        for index, seeds in self.seeds.items():
            size = len(seeds[0].values)
            taken, counted = self.taken.get(index, (torch.arange(size),))[0], self.counted.get(index)
            parts.append(None if counted is None else counted[taken])
            sizes.append(len(taken))
        return joined_counts(parts, sizes, self.length)

    def _sampled(self, pairs: list[Tensor], index: int) -> list[Tensor]:
        """Return the pairs of those samples that have rows, times what each stands for; zeros elsewhere."""
        n = len(pairs[0])
        most = n if self._most is None else round(self._most * n / self.probes.samples)
        if index in self.given:
            self.taken[index] = self.given[index].taken, self.given[index].chance
        elif most < n:
            sizes = torch.stack([pair.square().flatten(1).sum(1) for pair in pairs]).sum(0)
            offset = random_fraction(self.generator.initial_seed() + index)
            self.taken[index] = sampled_rows(sizes.double().cpu().numpy(), most, offset)
        return pairs if index not in self.taken else [weighted(pair, *self.taken[index]) for pair in pairs]

    def _top(self, curvature: OutputCurvature, here: Tensor, index: int, chosen: Tensor) -> Tensor:
        """Return the one row of each position, see `rows_of_outputs`."""
        if curvature.is_multiple:
            # Any direction is an eigenvector: take the one in which the sharpest mode moves this sample.
            if self._moves is None:
                self._moves, self.mode = sharpest_mode(self.probes, self.scale, self.mode, self.generator)
            self.description = self.description.replace("top", "sharpest mode", 1)
            assert curvature.weights is not None
            along = unit(at(self._moves[index], chosen))
            return along * root(curvature.weights, curvature.weights).to(here)[..., None]
        metric = OutputMetric(last_layer(self.parameters, here.shape[-1]), here.shape[-1])
        if curvature.p is not None and curvature.weights is not None:
            p, weights = (wide(t).cpu().numpy() for t in (curvature.p, curvature.weights))
            return torch.from_numpy(softmax_rows(p, weights, metric)).to(here)

        def product(v: Array) -> Array:
            return wide(curvature.product(torch.from_numpy(v).to(here))).cpu().numpy()

        return torch.from_numpy(rows_of_outputs(product, tuple(here.shape), metric)).to(here)


def weighted(pairs: Tensor, taken: Tensor, chance: Tensor) -> Tensor:
    """Return the pairs, ``(N, k, C)``, of the samples that were taken, times what each stands for; zeros elsewhere."""
    factor = torch.zeros(len(pairs), dtype=pairs.dtype)
    factor[taken] = (1 / chance).sqrt().to(factor)
    return pairs * factor.to(pairs)[:, None, None]


@contextlib.contextmanager
def _eagerly(module: nn.Module) -> Iterator[None]:
    """Call hooks, which compiled code does not, and choose kernels of recurrence that have a backward pass."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _nearly_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-4 * b.abs().amax()).all())
