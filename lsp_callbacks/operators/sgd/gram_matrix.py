"""The Gram matrix ``K = Z D Z^T`` of per-sample output gradients, without forming ``Z`` where that is expensive."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.graph import leaves_of, read
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.functional.sgd.positions import design_effect
from lsp_callbacks.operators.sgd.chosen_positions import rows_alone
from lsp_callbacks.operators.sgd.collapsed_outputs import SameOutputs
from lsp_callbacks.operators.sgd.held_statistics import can_be_held
from lsp_callbacks.operators.sgd.output_directions import Chosen, OutputDirections
from lsp_callbacks.operators.sgd.parameter_gram import ParameterGram, shares_of
from lsp_callbacks.operators.sgd.per_sample_gradients import RowSeed, whole_seeds
from lsp_callbacks.operators.sgd.rows_by_backward import TiedRows, add_rows
from lsp_callbacks.operators.sgd.statistics_factors import (
    StatisticsFactors,
    random_signs,
    squares_through_statistics,
)
from lsp_callbacks.step.criterion import HOW
from lsp_callbacks.step.probe_set import ProbeSet

#: How many numbers are held at once, at most.
HELD = 2**26
#: Of a type.
BYTES = operator.attrgetter("itemsize")
#: Positions (tokens, pixels) of a sample that are looked at; the others are taken to be like them.
POSITIONS = 4

Scale = Mapping[str, "float | Tensor"]


@dataclass(frozen=True)
class TangentKernel:
    """``K`` and what it was made from.

    Attributes:
        gram: ``(N R, N R)`` in float64, sample by sample: ``R`` rows ``z = sqrt(s) u^T J`` for each sample.
        rows: ``R``.
        path: how each parameter's share was computed, by name: "structured", "layer", "rows".
        traces: each parameter's share of the trace.
        defect: the largest relative difference of ``c^T K c`` from ``||J^T c||^2`` over the parameters.
        loss: mean over the probes.
        stated: in words, which outputs the rows stand for.
        mode: the sharpest mode, where it was needed: the next call may start from it.
        passes: backward passes for single rows.
        alike: share of the samples with the same outputs and gradients, if it is nine of ten; otherwise 0.
        samples: N, of which the gram matrix may be that of some.
        chance: by which probability each of those was taken; None where all were.
        factors: by which the shares of the parameters were multiplied as statistics were held, see `StatisticsFactors`.
        positions: of each sample, of which the rows look at some.
        outputs: rows at each of these.
        design: how alike they are, see `lsp_callbacks.functional.design_effect`; None where only one was looked at.
        stands: for how many positions of its sample a row at each of those looked at would stand if it were the only
            one, ``(n, R / outputs)``; None where that is for all.
    """

    gram: Tensor
    rows: int
    path: dict[str, str]
    traces: Mapping[str, float]
    defect: float = 0.0
    loss: float = math.nan
    stated: str = ""
    mode: Tensor | None = None
    passes: int = 0
    alike: float = 0.0
    samples: int = 0
    chance: Tensor | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    positions: int = 1
    outputs: int = 1
    design: float | None = None
    stands: Tensor | None = None


def tangent_kernel(
    probes: ProbeSet,
    *,
    outputs: Literal["top", "all", "loss"] = "top",
    scale: Scale | None = None,
    positions: int = POSITIONS,
    generator: torch.Generator | None = None,
    memory: int = HELD,
    start: Tensor | None = None,
    most_rows: int = 10**6,
    checked: TangentKernel | None = None,
    holds: bool = False,
    most: int | None = None,
    factors: StatisticsFactors | None = None,
    renews: bool = True,
    given: Mapping[int, Chosen] | None = None,
) -> TangentKernel:
    """Return ``K_ij = z_i D z_j^T``, ``z_i = R_i^T J_i``; ``R_i R_i^T = S_i`` is the output Hessian of sample i's loss.

    ``lambda_max(K) / N`` is the sharpness of the Gauss-Newton matrix, and one SGD step on a batch acts on ``v = Z^T x``
    through the rows of K alone. By default a sample has one row, see `rows_of_outputs`; of a squared loss
    with several outputs that of the direction in which the sharpest mode moves the sample's outputs.
    A sample with several positions (tokens) has one row for each of ``positions`` of them, drawn at random and weighted
    to represent all.

    Linear layers, embeddings, normalisations and convolutions contribute from their inputs and output gradients;
    other layers by their own per-sample Jacobians. Each parameter's share is checked against one plain backward pass,
    ``c^T K c = ||J^T c||^2`` for random c; where the check fails (a weight that is used outside of its layer) the rows
    of Z are formed for that parameter, one backward pass each. Where the statistics of a batch tie its samples
    together (``probes.tied``), all rows are formed, as each sample moves the outputs of all others in every layer
    before.

    Args:
        probes: the samples.
        outputs: "top", or "all" eigenpairs of each output Hessian; "loss" uses the gradient ``g_i`` of each sample's
            loss for its only row instead: ``K_ij = g_i D g_j^T``, and no curvature.
        scale: the diagonal of D, by parameter name: relative learning rates, a frozen preconditioner. None is 1.
        positions: how many of a sample's positions to look at.
        generator: of positions and the check; private.
        memory: bound on the numbers held at once in a layer's per-sample gradients.
        start: an earlier ``mode``.
        most_rows: form single rows of Z only where there are at most so many.
        checked: an earlier kernel of the same network, whose shares were checked: these are computed in the same ways,
            and not checked again.

        holds: whether the statistics of a batch are held fixed where they tie its samples together, with what they add
            ahead of each normalisation, and what they leave further ahead is in ``factors``. Otherwise the rows are
            formed one by one.
        most: how many samples have rows; None is all, see `sampled_rows`.
        factors: of the parameters' shares with held statistics, from earlier kernels; None is none yet.
        renews: whether a combination of these rows is added to them.
        given: what rows of some parts look at, by the index of the part.

    Raises:
        Unmeasurable: the criterion is not convex in the outputs, or flat.
        Unsupported: more rows would have to be formed than ``most_rows``, or samples mix otherwise than by statistics.

    Cost: one forward pass over the probes and R backward passes to the outputs of layers; the check a whole backward
    pass; of tied ones ``N R`` over a part; ``n^2`` memory for K beside the activations.
    Source: Chemnitz & Engel 2025, (2.18).
    """
    generator = generator or torch.Generator().manual_seed(0)
    tied_together, parameters = probes.tied, probes.parameters
    scale = dict.fromkeys(parameters, 1.0) | dict(scale or {})
    holds = holds and tied_together and can_be_held(probes.module)
    if tied_together and not holds:  # a pass for each row
        positions = max(1, min(positions, most_rows // probes.samples))
    grams = {name: ParameterGram() for name in parameters}
    sizes = {name: p.numel() for name, p in parameters.items()}
    diagonal = {name: torch.as_tensor(scale[name]).to(p) for name, p in parameters.items()}
    roots = {name: values.sqrt() for name, values in diagonal.items()}
    of_check = torch.Generator().manual_seed(generator.initial_seed() + 1)
    check = Check(parameters, roots, of_check) if checked is None and not holds else None
    tied: TiedRows | None = None
    loss, count = 0.0, 0
    same_outputs: SameOutputs | None = None
    reached: set[int] = set()
    directions = OutputDirections(
        probes, scale, outputs, positions, generator, start,
        checks=checked is None or "rows" in checked.path.values(), holds=holds, most=most, given=given,
        parameters=parameters, tied=tied_together,
    )  # fmt: skip
    for index in range(len(probes.parts)):
        evaluation, recorder, seeds = directions.evaluate(index)
        samples = len(evaluation.outputs)
        same_outputs = same_outputs or SameOutputs(probes.samples)
        same_outputs.add(evaluation, directions.first_inputs)
        loss += float(evaluation.criterion(evaluation.outputs.detach())) * samples / probes.samples
        if not math.isfinite(loss):
            raise Unmeasurable("the loss of the probes is not finite: the weights or the outputs have overflowed")
        taken = directions.taken[index][0] if index in directions.taken else None
        count += (samples if taken is None else len(taken)) * len(seeds)
        if recorder is None:
            tied = tied or TiedRows(roots, parameters, _affordable(probes.samples * len(seeds), most_rows), memory)
            tied.add(evaluation.outputs, seeds)
        else:
            explained = recorder.parts(evaluation.outputs, seeds, samples, keep=check is not None, taken=taken)
            if check is None and len(explained) < len(parameters):
                reached |= leaves_of(evaluation.outputs)
            for name, part in explained.items():
                grams[name].parts.append(part)
        if check is not None:
            check.add(evaluation.outputs, seeds, taken)
    if tied is None:
        complete = {name: part for name, part in grams.items() if len(part.parts) == len(probes.parts)}
        shares, path = shares_of(complete, diagonal, memory, sizes)
        path |= {name: part.path for name, part in grams.items() if name not in complete}
    else:
        shares, path = tied.grams(), dict.fromkeys(grams, "sketched rows" if tied.defect else "rows")
    if check is None:
        known = {} if checked is None else checked.path
        # A layer may have been explained that is now called with other samples, as an expert is.
        unexplained = [
            name
            for name, p in parameters.items()
            if tied is None and (known.get(name) == "rows" or (name not in shares and id(p) in reached))
        ]
    else:
        if tied is None:
            check.plain = {
                name: complete[name].gram(roots[name].new_ones(()), memory, parameters[name].numel())
                for name in complete
                if roots[name].ndim
            }
        unexplained = check.unexplained(shares, tied)
    if unexplained and tied is not None:
        raise Unmeasurable(f"the per-sample gradients of {unexplained[0]} do not add up to its gradient")
    if unexplained and count > most_rows:
        raise Unsupported(
            f"some weights ({', '.join(unexplained[:3])}) are used outside of their own layer, and their per-sample "
            f"gradients would take {count} backward passes: allow them with most_rows={count}"
        )
    rows_of = {name: ParameterGram() for name in unexplained}
    for index in range(len(probes.parts)) if unexplained else ():
        evaluation, recorder, seeds = directions.evaluate(index)
        if recorder is not None and recorder.mixes_samples(evaluation.outputs, seeds[0]):
            raise Unsupported(
                "the outputs of each sample depend on the other samples of its batch (a contrastive loss, negatives "
                "from the batch): the loss is no mean over samples, and batches of other samples would have another "
                "curvature; sharpness, courant_gd and lyapunov know that of the whole batch"
            )
        add_rows(rows_of, evaluation.outputs, parameters, seeds, directions.taken.get(index, (None,))[0])
    for name, rowwise in rows_of.items():
        shares[name], path[name] = rowwise.gram(diagonal[name], memory, parameters[name].numel()), "rows"
        if check is not None:
            if check.plain.pop(name, None) is not None:
                check.forget()
            check.require(name, shares[name])
    first = next(iter(parameters.values()))
    device, precision = first.device, tolerance(first.dtype)
    held: Mapping[str, float] = {}
    if holds:
        factors = factors or StatisticsFactors()
        path = dict.fromkeys(path, "statistics")
        if renews:
            signs = random_signs(count, of_check)
            factors.add(shares, signs, squares_through_statistics(probes, directions, roots, signs))
        held = {**factors.values}
    gram = torch.zeros(count, count, dtype=torch.float64, device=device)
    traces = dict.fromkeys(parameters, 0.0)
    for name, share in shares.items():
        factor = held.get(name, 1.0)
        gram += factor * share
        traces[name] = factor * float(share.trace())
    gram = (gram + gram.T).mul_(0.5).cpu()
    taken, chance = directions.joined_taken() if directions.taken else (None, None)
    rows, length = (
        len(directions.seeds[0]),
        directions.length if outputs != "loss" and tied is None and not holds else 1,
    )
    each = rows // directions.looked if length > 1 else 1
    design = stands = None
    counted = directions.joined_counted() if length > 1 else None
    if length > 1 and each == 1 and rows > 1:
        design = design_effect(gram, rows, length, samples=probes.samples, chance=chance, counted=counted)
    if counted is not None:
        stands = rows_alone(counted, length, directions.looked)
    return TangentKernel(
        gram=gram,
        rows=rows,
        path=path,
        traces=traces,
        defect=check.defect if check else checked.defect if checked else 0.0,
        loss=loss,
        stated=directions.description,
        mode=directions.mode,
        passes=count if unexplained or tied is not None else 0,
        alike=0.0 if same_outputs is None else same_outputs.share(gram, precision, taken),
        samples=probes.samples,
        chance=chance,
        factors=held,
        positions=length,
        outputs=each,
        design=design,
        stands=stands,
    )


def _affordable(rows: int, most: int) -> int:
    if rows > most:
        raise Unsupported(
            f"batch statistics tie samples together, and {rows} output gradients would take a backward pass each: "
            f"allow them with SGDStability(most_rows={rows}), or take fewer probes"
        )
    return rows


class Check:
    """Compares the shares of K with plain backward passes: ``c^T K c = ||J^T c||^2`` for random c."""

    def __init__(self, parameters: dict[str, nn.Parameter], roots: dict[str, Tensor], generator: torch.Generator):
        self._parameters, self._roots, self._generator = parameters, roots, generator
        self._weights: list[Tensor] = []
        #: Shares without a preconditioner, whose weights K takes by rows and columns, see `weighted_gram`.
        self.plain: dict[str, Tensor] = {}
        self._backward: dict[str, Tensor] = {}
        #: The least precise type that the forward pass goes through: a module may cast by itself.
        self._least = next(iter(parameters.values())).dtype
        self._errors: dict[str, float] = {}

    def add(self, outputs: Tensor, seeds: list[RowSeed], taken: Tensor | None) -> None:
        """Add a part of the samples. Cost: a backward pass, with gradients of the weights."""
        c = torch.randn(len(outputs), len(seeds), generator=self._generator).to(outputs)
        self._weights.append((c if taken is None else c[taken]).reshape(-1))
        total = whole_seeds(seeds, c, outputs)
        self._least = min(self._least, read(outputs).dtype, key=BYTES)
        whole = torch.autograd.grad(outputs, list(self._parameters.values()), total, allow_unused=True)
        if all(g is None for g in whole):  # a copy of them, made inside a custom function
            raise Unsupported(f"the outputs that the criterion takes do not reach the parameters: {HOW}")
        for name, g in zip(self._parameters, whole):
            if g is not None:
                before = self._backward.get(name)
                self._backward[name] = g.to_dense() if before is None else before + g.to_dense()

    def forget(self) -> None:
        """Compute anew what is expected."""
        self.__dict__.pop("_expected", None)

    @cached_property
    def _expected(self) -> dict[str, float]:
        return {
            name: float(
                torch.linalg.vector_norm(g if name in self.plain else self._roots[name] * g, dtype=torch.float64)
            )
            ** 2
            for name, g in self._backward.items()
        }

    def _wrong(self, name: str, shares: dict[str, Tensor], rounding: float) -> float:
        """Return the error of ``c^T K c``, relative to its value, to its mean over c (the trace), or to rounding."""
        expected = self._expected.get(name, 0.0)
        if name not in shares:  # never reached, or not through a layer
            return math.inf if expected else 0.0
        share = self.plain.get(name, shares[name])
        scale = max(expected, float(share.trace()), rounding)
        c = torch.cat(self._weights).double()
        return abs(float(c @ (share.double() @ c)) - expected) / scale if scale else 0.0

    def _rounding(self, *, tied: bool) -> float:
        # Some gradients are zero but for rounding: the bias of attention's keys. That of a bias ahead of BatchNorm,
        # which Adam's preconditioner magnifies, is a difference of large numbers.
        precision = tolerance(self._least)
        return (precision if tied else precision**2) * sum(self._expected.values())

    def unexplained(self, shares: dict[str, Tensor], tied: TiedRows | None) -> list[str]:
        """Return the parameters whose share is not that of their gradient."""
        self.rounding = self._rounding(tied=tied is not None)
        allowed = 10 * tied.defect if tied is not None else 0.0
        self._errors = {name: self._wrong(name, shares, self.rounding) for name in self._parameters}
        return [
            name
            for name, p in self._parameters.items()
            if not self._errors[name] <= max(tolerance(p.dtype), tolerance(self._least), allowed)
        ]

    def require(self, name: str, share: Tensor) -> None:
        """Raise an error where the rows of a parameter, formed one by one, do not add up to its gradient."""
        dtype = self._parameters[name].dtype
        if not math.isfinite(self._expected.get(name, 0.0)) or not bool(share.isfinite().all()):
            raise Unmeasurable(f"the per-sample gradients of {name} leave the range of {dtype}")
        self._errors[name] = self._wrong(name, {name: share}, self.rounding)
        if not self._errors[name] <= max(tolerance(dtype), tolerance(self._least)):
            raise Unmeasurable(
                f"the per-sample gradients of {name} do not add up to its gradient: the forward pass is random"
            )

    @property
    def defect(self) -> float:
        """The largest error over the parameters."""
        return max(self._errors.values(), default=0.0)


def tolerance(dtype: torch.dtype) -> float:
    """Return how far two ways to compute the same number may differ by rounding."""
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 5e-2)
