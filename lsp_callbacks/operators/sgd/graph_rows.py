"""Rows of the Gram matrix from the graph that the training step itself differentiates: no pass is made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import saved, trained_parameters
from lsp_callbacks.autograd.gathered_weights import GatheredWeights
from lsp_callbacks.autograd.graph import read
from lsp_callbacks.autograd.graph_pull import UnknownGraph, outputs_first, plain_kinds
from lsp_callbacks.functional.sgd.positions import design_effect
from lsp_callbacks.operators.sgd.chosen_positions import Chosen, joined_counts, positions_of, rows_alone, stands_for
from lsp_callbacks.operators.sgd.gram_matrix import HELD, TangentKernel
from lsp_callbacks.operators.sgd.graph_criterion import GraphCriterion, read_criterion
from lsp_callbacks.operators.sgd.graph_pass import GraphKind, GraphPass
from lsp_callbacks.operators.sgd.graph_sites import Samples
from lsp_callbacks.operators.sgd.output_rows import OutputMetric, last_layer
from lsp_callbacks.operators.sgd.parameter_gram import ParameterGram, Part, Squares, Traces, wide
from lsp_callbacks.operators.sgd.recent_rows import RecentRows, RowSketch
from lsp_callbacks.operators.sgd.statistics_factors import StatisticsFactors, random_signs
from lsp_callbacks.operators.sgd.step_samples import random_fraction, sampled_rows
from lsp_callbacks.operators.trajectory.coming_preconditioner import remembered_rule
from lsp_callbacks.step.graph_reader import GraphReader
from lsp_callbacks.step.snapshot import Snapshot

#: From the name of a parameter to what `Part.of` makes its gradients from, for each micro-batch.
Tensors = list[dict[str, Any]]
#: See `GraphRows.looked`.
Looked = tuple[list[Chosen], int, int]


class GraphRows(GraphReader):
    """Reads the graphs of a step's micro-batches before they are differentiated, and keeps what its rows need.

    Args:
        module: whose parameters are trained.
        generator: of positions and samples; private.
        rows: from the number of samples in the step to how many of them have rows.
        positions: likewise, to how many positions of each are looked at.
        known: the graph of an earlier step, which says where the samples are in each layer, and must be this one's;
            None finds out, by one more pass.
        renews: whether a combination of the rows is taken back through the statistics of a batch that tie its samples
            together, see `StatisticsFactors`.
        recent: the rows of the last readings, for samples with several positions; None is those of this step alone.

    Attributes:
        weights: gathers those that the next graph uses, where they are spread over processes; None where they are not.
        is_sketched: whether rows are formed as sketches, see `RowSketch`, also those of one position.
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
        renews: bool = False,
        recent: RecentRows | None = None,
    ):
        self.parameters: dict[str, nn.Parameter] = {}
        self._module, self._generator, self._rows, self._positions = module, generator, rows, positions
        self.kind, self._renews, self.dtype = known, renews, torch.float32
        self.failure: Exception | None = None
        self.chosen: list[Chosen] = []
        self.samples = self.batch = 0
        self.ties = self.alike = False
        self._parts: list[dict[str, Part]] = []
        self._per_sample = self._length = 1
        self._pushed: tuple[Tensor, dict[str, Tensor]] | None = None
        self.recent = recent
        self.weights: GatheredWeights | None = None
        self.is_sketched = False
        self._is_formed, self._was_known = False, known is not None
        self._shares: dict[str, Tensor] = {}
        self._squares: dict[str, float] = {}
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
        self.parameters = self.parameters or trained_parameters(self._module)
        nodes = outputs_first(loss.grad_fn)
        kinds = plain_kinds(nodes)
        norms = [node for node, kind in zip(nodes, kinds) if kind == "NativeBatchNormBackward0"]
        self.ties = any(saved["training"](node) for node in norms)
        total = samples if self.ties else samples * micro_batches
        criterion = read_criterion(nodes, kinds, samples, factor)
        chosen, pairs = self._choose(criterion, total)
        self.samples += samples
        self.chosen.append(chosen)
        if self.kind is not None and self.kind.nodes != kinds:
            raise UnknownGraph("another graph than before")
        nodes = nodes[nodes.index(criterion.node) + 1 :]
        names = {id(p): name for name, p in self.parameters.items()}
        if self.weights is not None:
            names |= {whole: names[id(p)] for whole, p in self.weights.shards.items() if id(p) in names}
            if self.ties:
                raise UnknownGraph("statistics of a batch tie the samples of each process together")
        known = Samples(samples, chosen.taken.to(pairs.device), names, self._module, weights=self.weights)
        known.looks_at_some = criterion.outputs.shape[1] > chosen.positions.shape[1]
        if self.kind is None:
            graph = self._learn(nodes, criterion, known, pairs, chosen, kinds)
            self.dtype = read(loss).dtype
            if self.dtype is torch.float16:
                raise UnknownGraph("cotangents of a loss that is not scaled leave the range of float16")
        else:
            known.axes, known.by_rows = self.kind.axes, self.kind.by_rows
            graph = _passed(nodes, criterion, known, pairs, chosen)
        lengths = (*graph.lengths, criterion.outputs.shape[1])
        if self.kind is None or not self.kind.has_length(lengths) or graph.uses != self.kind.sites:
            raise UnknownGraph("other uses of parameters than before")
        self._parts.append(graph.parts())
        if self.ties and self._renews:
            self._push(graph, pairs, chosen)

    def _learn(
        self, nodes: list[Any], criterion: GraphCriterion, known: Samples, pairs: Tensor, chosen: Chosen,
        kinds: tuple[str, ...],
    ) -> GraphPass:  # fmt: skip
        """Find out where the samples are in each use, by a pass for one of them, and how to take back those taken."""
        samples, length, classes = criterion.outputs.shape
        alone, place = _alone(samples, length)
        probe = GraphPass(
            nodes, criterion, replace(known, taken=pairs.new_tensor([alone], dtype=torch.long), alone=alone)
        )
        only = torch.randn(1, classes, generator=torch.Generator().manual_seed(0)).to(pairs)
        probe.run(only, torch.full_like(only[:, 0], place, dtype=torch.long))
        known.axes, sites = probe.axes, probe.uses
        del probe  # and the gradients at all layers
        graph = _passed(nodes, criterion, known, pairs, chosen)
        is_agreed = False
        if length == 1:
            try:
                of_rows = _passed(nodes, criterion, replace(known, by_rows=True), pairs, chosen)
                is_agreed = of_rows.agrees(graph)
            except Exception:  # whatever the rules of layers raise: the gradients of all samples are taken back
                is_agreed = False
        self.kind = GraphKind(kinds, sites, known.axes, is_agreed, (*graph.lengths, length))
        return of_rows if is_agreed else graph

    def _push(self, graph: GraphPass, pairs: Tensor, chosen: Chosen) -> None:
        """Take a combination of rows back through the statistics of the batch, to the parameters."""
        own = torch.Generator().manual_seed(self._generator.initial_seed() + 1)  # the signs of a replay
        signs = random_signs(pairs.shape[:2].numel(), own)
        weights = signs.to(pairs).view(pairs.shape[:2])
        self._pushed = signs, graph.gradients(pairs * weights[..., None], chosen.positions[chosen.taken])

    def _summed(
        self, shares: Mapping[str, Tensor], factors: Mapping[str, float] | None = None
    ) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum of the parameters' shares, each times its factor, and their traces."""
        if factors:
            shares = {name: factors.get(name, 1.0) * share for name, share in shares.items()}
        if all([share.is_cpu for share in shares.values()]):  # few calls of numpy, and not of torch
            total = np.zeros(next(iter(shares.values())).shape)
            for share in shares.values():
                total += share.numpy()
        else:
            total = torch.stack([*shares.values()]).sum(0, dtype=torch.float64).cpu().numpy()
        return torch.from_numpy((total + total.T) * 0.5), Traces([*self.parameters], shares)

    def _choose(self, criterion: GraphCriterion, total: int) -> tuple[Chosen, Tensor]:
        """Return what to look at, and the cotangents there, ``(n, k, C)`` of the samples that have rows."""
        n, length, _ = criterion.outputs.shape
        device = criterion.outputs.device
        most = self._positions(total)
        counts = criterion.counts if most < length else None
        positions = positions_of((n, length), most, self._generator, counts).to(device)
        counted = None if counts is None else counts.sum(1)
        stands = stands_for(counted, length, positions.shape[1])
        if length == 1 or self.ties or (self.recent is not None and self.recent.most == 1):
            self.recent = None
        self._length = length
        self._per_sample = positions.shape[1]
        outputs = criterion.at(positions)
        self.alike |= outputs.alike
        sizes = outputs.sizes if isinstance(stands, float) else outputs.sizes * stands.numpy()
        least, largest = float(sizes.min()), float(sizes.max())
        if not least >= -1e-4 * largest:
            raise UnknownGraph("the outputs are not finite, or the criterion is not convex in them")
        most = min(round(self._rows(total) * n / total), n)
        taken, chance = sampled_rows(sizes, most, random_fraction(self._generator.initial_seed() + len(self.chosen)))
        places = taken.numpy()
        factor = ((stands if isinstance(stands, float) else stands.numpy()[places]) / chance.numpy()) ** 0.5
        head = None if outputs.p is None else last_layer(self.parameters, outputs.p.shape[-1])
        pairs = criterion.rows(outputs, places, factor, OutputMetric(head, criterion.outputs.shape[-1]))
        return Chosen(positions, taken, chance, counted), pairs

    def release(self) -> None:
        """Let go of all that the rows are made from."""
        self._parts.clear()
        self._pushed = None

    def before_replays(self, snapshot: Snapshot) -> None:
        if self._parts and self.weights is None:  # shards are formed with all processes
            self.form(remembered_rule(snapshot).scale, plain=not self._was_known)

    def form(self, scale: Mapping[str, Tensor | float], *, plain: bool = False) -> None:
        """Form the Gram matrix behind the diagonal of D, by parameter name, and let go of what it is made from: once.

        Args:
            scale: the diagonal.
            plain: whether the shares of the parameters without D are wanted, too.

        Raises:
            UnknownGraph: if the graphs could not be read.
        """
        if self._is_formed:
            return
        if self.failure is not None or not self._parts:
            raise self.failure or UnknownGraph("no loss was seen before its backward pass")
        if plain:
            self.plain = self.plain_shares()
        with torch.no_grad():
            self._form(scale)
        if self._pushed is not None:
            self._signs, pushed = self._pushed
            self._squares = {name: float((scale[name] * g.square()).sum()) for name, g in pushed.items()}
        self._is_formed = True
        self.release()

    def _form(self, scale: Mapping[str, Tensor | float]) -> None:
        shares: dict[str, Tensor] = {}
        squares: Squares = {}
        fraction = random_fraction(self._generator.initial_seed()) if self._was_known else None
        sketch: RowSketch | None = None
        begin = 0
        for name in [*self._parts[0]]:
            p, gram = self.parameters[name], ParameterGram.taken_from(self._parts, name)
            if self.recent is None and not self.is_sketched:
                shares[name] = gram.gram(scale[name], HELD, p.numel(), squares, fraction=fraction)
            else:
                diagonal = torch.as_tensor(scale[name]).to(p.device, p.dtype)
                sketch = sketch or RowSketch(gram.rows, wide(diagonal))
                shares[name] = sketch.share(gram, diagonal, begin, p.numel())
                begin += p.numel()
        self.gram, self.traces = self._summed(shares)
        if self.ties:
            self._shares = shares
        if sketch is not None:
            self._sketch = sketch.values.unflatten(0, (-1, self._per_sample)) * self._per_sample**0.5

    def plain_shares(self) -> dict[str, Tensor]:
        """Return the shares of the parameters without D, before they are formed."""
        return {
            name: ParameterGram([part[name] for part in self._parts]).gram(1.0, HELD, self.parameters[name].numel())
            for name in self._parts[0]
        }

    def tensors(self) -> Tensors | None:
        """Return what the rows are made from, to be sent to other processes; None where that is more than tensors."""
        parts = [{name: part.tensors() for name, part in parts.items()} for parts in self._parts]
        return None if any(part is None for of_names in parts for part in of_names.values()) else parts

    def join(self, tensors: Sequence[Tensors], looked: Sequence[Looked]) -> None:
        """Look at the rows of all processes as at those of further micro-batches; before they are formed."""
        device = next(iter(self.parameters.values())).device
        self._parts = [
            {name: Part.of(part, device) for name, part in parts.items()} for sent in tensors for parts in sent
        ]
        self._join(looked)

    def join_sketches(self, sketches: Sequence[Tensor], looked: Sequence[Looked]) -> None:
        """Look at the sketches of the rows of all processes, once they are formed."""
        self._sketch = torch.cat([sketch.to(self._sketch) for sketch in sketches])
        self._join(looked)
        flat = self._sketch.flatten(0, 1)
        self.gram = (flat @ flat.T).double().cpu() / self._per_sample

    @property
    def sketch(self) -> Tensor:
        """The sketches of the rows, ``(n, R, m)``, once they are formed."""
        return self._sketch

    @property
    def looked(self) -> Looked:
        """What was looked at in each micro-batch, how many samples that were, and how many there are."""
        chosen = [replace(each, positions=each.positions.cpu()) for each in self.chosen]
        return chosen, self.samples, self.batch

    def _join(self, looked: Sequence[Looked]) -> None:
        self.chosen = [each for chosen, _, _ in looked for each in chosen]
        self.samples, self.batch = sum(samples for _, samples, _ in looked), sum(batch for *_, batch in looked)

    def gram_times(self, factors: Mapping[str, float]) -> Tensor:
        """Return K with the parameters' shares times their factors, where statistics of the batch were held."""
        return self._summed(self._shares, factors)[0] if self.ties else self.gram

    def kernel(self, checked: TangentKernel | None, factors: StatisticsFactors | None = None) -> TangentKernel:
        """Return K behind the diagonal of D, once it was formed, with the recent rows, to which it adds its own.

        Args:
            checked: a kernel of the same network, from a replay.
            factors: of the parameters' shares where statistics of the batch were held, to which a combination of these
                rows is added that was taken back through them.
        """
        gram, traces, rows = self.gram, self.traces, self._per_sample
        taken, chance = self._joined()
        length, design = 1 if self.ties else self._length, None
        counted = None if length == 1 else self._joined_counted()
        if length > 1 and rows > 1:
            design = design_effect(gram, rows, length, samples=self.samples, chance=chance, counted=counted)
        stands = None if counted is None else rows_alone(counted, length, rows)
        if self.recent is not None:
            every = torch.full((len(taken), rows), float(length), dtype=torch.float64)
            self.recent.add(self._sketch, every if stands is None else stands)
            gram, rows, stands = self.recent.gram(), len(self.recent), self.recent.stands
        if self.ties and factors is not None:
            if self._squares:
                factors.add(self._shares, self._signs, self._squares)
            gram, traces = self._summed(self._shares, factors.values)
        return TangentKernel(
            gram=gram,
            rows=rows,
            path=dict.fromkeys(traces, "structured") if checked is None else checked.path,
            traces=traces,
            defect=0.0 if checked is None else checked.defect,
            stated="" if checked is None else checked.stated,
            samples=self.samples,
            chance=chance if len(taken) < self.samples else None,
            factors={**factors.values} if self.ties and factors is not None else {},
            positions=length,
            design=design,
            stands=stands,
        )

    def _joined_counted(self) -> Tensor | None:
        """Return how many positions the loss counts of the samples that have rows; None where it counts all."""
        parts = [None if chosen.counted is None else chosen.counted[chosen.taken] for chosen in self.chosen]
        return joined_counts(parts, [len(chosen.taken) for chosen in self.chosen], self._length)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Indices of the samples that have rows, of all micro-batches, and by which chance they were taken."""
        if len(self.chosen) == 1:
            return self.chosen[0].taken, self.chosen[0].chance
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


def _passed(nodes: list[Any], criterion: GraphCriterion, samples: Samples, pairs: Tensor, chosen: Chosen) -> GraphPass:
    """Return the pass of all rows through a graph."""
    graph = GraphPass(nodes, criterion, samples)
    if samples.by_rows:
        graph.run_rows(pairs[:, 0])
        return graph
    for values, position in zip(pairs.unbind(1), chosen.positions[chosen.taken].unbind(1)):
        graph.run(values, position)
    return graph
