"""Rows of the Gram matrix from the graph that the training step itself differentiates: no pass is made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import Convolution, saved
from lsp_callbacks.autograd.graph import read
from lsp_callbacks.autograd.graph_pull import UnknownGraph, outputs_first, require_plain
from lsp_callbacks.functional.sgd.positions import design_effect
from lsp_callbacks.operators.sgd.gram_matrix import HELD, TangentKernel, with_top
from lsp_callbacks.operators.sgd.graph_criterion import GraphCriterion, read_criterion
from lsp_callbacks.operators.sgd.graph_pass import GraphPass
from lsp_callbacks.operators.sgd.graph_sites import Samples
from lsp_callbacks.operators.sgd.output_directions import Chosen, positions_of, weighted
from lsp_callbacks.operators.sgd.parameter_gram import ParameterGram, Part, wide
from lsp_callbacks.operators.sgd.recent_rows import RecentRows, RowSketch
from lsp_callbacks.operators.sgd.sampled_rows import sampled_rows
from lsp_callbacks.operators.sgd.softmax_pairs import softmax_pairs
from lsp_callbacks.step.graph_reader import GraphReader

#: How many samples the others are compared with: where nine of ten are the same, one of three is among them.
FEW, MOST = 3, 0.9


class GraphKind(NamedTuple):
    """What does not change from step to step, and by which a graph is recognised.

    Attributes:
        nodes: their names, outputs first.
        sites: the names of the trainable parameters of each use, in the order of the graph.
        axes: of the samples in each use: first (0) or second (1).
    """

    nodes: tuple[str, ...]
    sites: tuple[tuple[str | None, ...], ...]
    axes: list[int]


class GraphRows(GraphReader):
    """Reads the graphs of a step's micro-batches before they are differentiated, and keeps what its rows need.

    Args:
        module: whose parameters are trained.
        generator: of positions and samples; private.
        rows: from the number of samples in the step to how many of them have rows.
        positions: likewise, to how many positions of each are looked at.
        known: the graph of an earlier step, which says where the samples are in each layer, and must be this one's;
            None finds out, by one more pass.
        scale: the diagonal of D, by name, as it was last; where the statistics of a batch tie samples together,
            the largest eigenvalue is then compared with what the batch itself gives, see `corrected`. None leaves it.
        recent: the rows of the last readings, for samples with several positions; None is those of this step alone.

    Attributes:
        kind: of the graph, once it was read.
        failure: why the graph could not be read; None if it could.
        chosen: what the rows of each micro-batch look at.
        samples: of all micro-batches that were looked at.
        batch: of all micro-batches.
        ties: whether statistics of the batch were held fixed.
        dtype: the least precise of the graph, where the axes were not known.
        alike: whether nine of ten samples may have the same outputs.
        gram: of the rows of this step, ``(n R, n R)`` in float64 on the CPU, sample by sample; once it was formed.
        traces: of the parameters' shares in it, by name.
        plain: these shares without D, if they were wanted.
    """

    def __init__(
        self,
        module: nn.Module,
        generator: torch.Generator,
        rows: Callable[[int], int],
        positions: Callable[[int], int],
        *,
        known: GraphKind | None = None,
        scale: Mapping[str, Tensor | float] | None = None,
        recent: RecentRows | None = None,
    ):
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._module, self._generator, self._rows, self._positions = module, generator, rows, positions
        self.kind, self._scale, self.dtype = known, scale, torch.float32
        self.failure: Exception | None = None
        self.chosen: list[Chosen] = []
        self.samples = self.batch = 0
        self.ties = self.alike = False
        self._parts: list[dict[str, Part]] = []
        self._per_sample = self._length = 1
        self._pushed: tuple[Tensor, dict[str, Tensor]] | None = None
        self.recent = recent
        self._correction: float | None = None
        self.plain: dict[str, Tensor] = {}

    def saw_loss(self, loss: Tensor, *, samples: int | None, factor: float, micro_batches: int) -> None:
        if self.failure is not None:
            return
        try:
            if not samples or loss.numel() != 1:
                raise UnknownGraph("the loss is no mean over the samples of the batch")
            self.batch += samples
            with torch.no_grad():
                if not (self.ties and self._parts):  # of tied micro-batches the first
                    self._read(loss, samples, factor, micro_batches)
        except Exception as error:  # in the middle of the user's step: it goes on
            self.failure = error.with_traceback(None)

    def _read(self, loss: Tensor, samples: int, factor: float, micro_batches: int) -> None:
        nodes = outputs_first(loss.grad_fn)
        require_plain(nodes)
        self.ties = any(node.name() == "NativeBatchNormBackward0" and saved(node, "training") for node in nodes)
        total = samples if self.ties else samples * micro_batches
        criterion = read_criterion(nodes, samples, factor)
        chosen, pairs = self._choose(criterion, total)
        self.samples += samples
        self.chosen.append(chosen)
        names = {id(p): name for name, p in self._parameters.items()}
        layers: dict[int, nn.Module] = {}
        for layer in self._module.modules():
            if isinstance(layer, nn.Linear | Convolution):  # not by its attribute: a parametrisation would compute it
                layers |= {id(p): layer for name, p in layer.named_parameters(recurse=False) if name == "weight"}
        kinds = tuple(node.name() for node in nodes)
        known = Samples(samples, chosen.taken, names, layers, None if self.kind is None else self.kind.axes)
        if self.kind is not None and self.kind.nodes != kinds:
            raise UnknownGraph("another graph than before")
        nodes = nodes[nodes.index(criterion.node) + 1 :]
        if known.axes is None:
            length, classes = criterion.outputs.shape[1:]
            alone, place = _alone(samples, length)
            only = pairs.new_zeros(samples, classes)
            only[alone] = torch.randn(classes, generator=torch.Generator().manual_seed(0)).to(only)
            probe = GraphPass(nodes, criterion, replace(known, alone=alone))
            probe.run(only, torch.full((samples,), place, device=only.device))
            self.kind, self.dtype = GraphKind(kinds, probe.uses, probe.axes), read(loss).dtype
            if self.dtype is torch.float16:
                raise UnknownGraph("cotangents of a loss that is not scaled leave the range of float16")
            known.axes = probe.axes
            del probe  # and the gradients at all layers
        graph = GraphPass(nodes, criterion, known)
        for k, position in enumerate(chosen.positions.unbind(1)):
            graph.run(pairs[:, k], position)
        if self.kind is None or graph.uses != self.kind.sites:
            raise UnknownGraph("other uses of parameters than before")
        self._parts.append(graph.parts())
        if self.ties and self._scale is not None:
            self._push(graph, pairs, chosen, self._scale)

    def _push(self, graph: GraphPass, pairs: Tensor, chosen: Chosen, scale: Mapping[str, Tensor | float]) -> None:
        """Take the sharpest combination of rows back through the statistics of the batch, to the parameters."""
        c = torch.linalg.eigh(self._gram_so_far(scale))[1][:, -1]
        weights = torch.zeros(pairs.shape[:2], dtype=c.dtype)
        weights[chosen.taken] = c.view(-1, pairs.shape[1])
        self._pushed = c, graph.gradients(pairs * weights.to(pairs)[..., None], chosen.positions)

    def _gram_so_far(self, scale: Mapping[str, Tensor | float]) -> Tensor:
        shares = [
            ParameterGram([part[name] for part in self._parts]).gram(
                torch.as_tensor(scale[name]).to(p), HELD, p.numel()
            )
            for name, p in self._parameters.items()
            if name in self._parts[0]
        ]
        total = torch.stack(shares).sum(0, dtype=torch.float64)
        return (total + total.T).mul_(0.5).cpu()

    def _choose(self, criterion: GraphCriterion, total: int) -> tuple[Chosen, Tensor]:
        """Return what to look at, as `OutputDirections` chooses it, and the cotangents there, ``(N, k, C)``."""
        n, length, classes = criterion.outputs.shape
        positions = positions_of((n, length), self._positions(total), self._generator).to(criterion.outputs.device)
        if length == 1 or self.ties or (self.recent is not None and self.recent.most == 1):
            self.recent = None
        self._length = length
        outputs = criterion.at(positions)
        if not bool(outputs.isfinite().any()):
            raise UnknownGraph("the outputs are not finite")
        self.alike |= bool((_same(outputs).sum(1) >= MOST * n).any())
        curvature = criterion.curvature(positions)
        if classes == 1:
            assert curvature.weights is not None
            pairs = curvature.weights.clamp_min(0).sqrt()[..., None].to(outputs)
        else:
            assert curvature.p is not None and curvature.weights is not None
            pairs = softmax_pairs(curvature.p, curvature.weights).to(outputs)
        self._per_sample = positions.shape[1]
        pairs = (length / positions.shape[1]) ** 0.5 * pairs
        most = round(self._rows(total) * n / total)
        if most >= n:
            return Chosen(positions, torch.arange(n), torch.ones(n, dtype=torch.float64)), pairs
        sizes = pairs.square().flatten(1).sum(1)
        offset = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        taken, chance = sampled_rows(sizes, most, offset)
        return Chosen(positions, taken, chance), weighted(pairs, taken, chance)

    def release(self) -> None:
        """Let go of all that the rows are made from."""
        self._parts.clear()
        self._pushed = None

    @torch.no_grad()
    def form(self, scale: Mapping[str, Tensor | float], *, plain: bool = False) -> None:
        """Form the Gram matrix behind the diagonal of D, by parameter name, and let go of what it is made from.

        Args:
            scale: the diagonal.
            plain: whether the shares of the parameters without D are wanted, too.

        Raises:
            UnknownGraph: if the graphs could not be read.
        """
        if self.failure is not None or not self._parts:
            raise self.failure or UnknownGraph("no loss was seen before its backward pass")
        total: Tensor | None = None
        sketch: RowSketch | None = None
        begin = 0
        self.traces = dict.fromkeys(self._parameters, 0.0)
        for name in [*self._parts[0]]:
            p, gram = self._parameters[name], ParameterGram([part.pop(name) for part in self._parts])
            diagonal = torch.as_tensor(scale[name]).to(p)
            if self.recent is None:
                share = gram.gram(diagonal, HELD, p.numel())
            else:
                sketch = sketch or RowSketch(gram.rows, wide(diagonal))
                share = sketch.share(gram, diagonal, begin, p.numel())
                begin += p.numel()
            if plain:
                self.plain[name] = gram.gram(diagonal.new_ones(()), HELD, p.numel())
            self.traces[name] = float(share.trace())
            total = share.double() if total is None else total.add_(share)
        assert total is not None
        self.gram = (total + total.T).mul_(0.5).cpu()
        if sketch is not None:
            self._sketch = sketch.values.unflatten(0, (-1, self._per_sample)) * self._per_sample**0.5
        if self._pushed is not None:
            c, pushed = self._pushed
            squares = sum(float((scale[name] * g.square()).sum()) for name, g in pushed.items())
            self._correction = squares / float(c @ self.gram @ c)
        self.release()

    def kernel(self, checked: TangentKernel | None, correction: float | None) -> TangentKernel:
        """Return K behind the diagonal of D, once it was formed, with the recent rows, to which it adds its own.

        Args:
            checked: a kernel of the same network, from a replay.
            correction: of the largest eigenvalue where statistics of the batch were held; None takes what the batch
                itself gives, see `corrected`.
        """
        gram, traces, rows = self.gram, self.traces, self._per_sample
        taken, chance = self._joined()
        length, design = 1 if self.ties else self._length, None
        if length > 1 and rows > 1:
            design = design_effect(gram, rows, length, samples=self.samples, chance=chance)
        if self.recent is not None:
            self.recent.add(self._sketch)
            gram, rows = self.recent.gram(), len(self.recent)
        if self.ties:
            correction = self._correction if correction is None else correction
            gram = with_top(gram, 1.0 if correction is None else correction)
        return TangentKernel(
            gram, rows, dict.fromkeys(traces, "structured") if checked is None else checked.path, traces,
            0.0 if checked is None else checked.defect, math.nan, "" if checked is None else checked.stated, None, 0,
            0.0, self.samples, chance if len(taken) < self.samples else None,
            1.0 if correction is None else correction, length, 1, design,
        )  # fmt: skip

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Indices of the samples that have rows, of all micro-batches, and by which chance they were taken."""
        begins = [0]
        for chosen in self.chosen[:-1]:
            begins.append(begins[-1] + len(chosen.positions))
        taken = torch.cat([begin + chosen.taken for begin, chosen in zip(begins, self.chosen)])
        return taken, torch.cat([chosen.chance for chosen in self.chosen])


def _alone(samples: int, length: int) -> tuple[int, int]:
    """Return a sample and its last position that is at another place where samples come first than where they do not.

    Of one position alone, as a layer that mixes none may see it.
    """

    def is_clear(k: int, t: int) -> bool:
        return (k * length + t) % samples != k and (t * samples + k) // length != k

    pairs = ((k, t) for t in reversed(range(length)) for k in range(samples))
    return next((pair for pair in pairs if is_clear(*pair)), (samples // 2, length - 1))


def _same(outputs: Tensor) -> Tensor:
    """Return which samples have the outputs of each of the first, to rounding, ``(3, N)``."""
    flat = outputs.flatten(1)
    rounding = 8 * torch.finfo(flat.dtype).eps * flat.abs().amax(1)
    return ((flat[:FEW, None] - flat).abs().amax(-1) <= rounding).view(-1, len(flat))
