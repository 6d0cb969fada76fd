"""The Gram matrix ``K = Z D Z^T`` of per-sample output gradients, without forming ``Z`` where that is expensive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.operators.sgd.collapsed_outputs import FirstInputs, SameOutputs
from lsp_callbacks.operators.sgd.output_directions import OutputDirections
from lsp_callbacks.operators.sgd.parameter_gram import ParameterGram
from lsp_callbacks.operators.sgd.rows_by_backward import TiedRows, add_rows
from lsp_callbacks.step.criterion import HOW
from lsp_callbacks.step.probe_set import ProbeSet

#: How many numbers are held at once, at most.
HELD = 2**26
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
    """

    gram: Tensor
    rows: int
    path: dict[str, str]
    traces: dict[str, float]
    defect: float
    loss: float
    stated: str
    mode: Tensor | None
    passes: int
    alike: float = 0.0


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
) -> TangentKernel:
    """Return ``K_ij = z_i D z_j^T``, ``z_i = R_i^T J_i``; ``R_i R_i^T = S_i`` is the output Hessian of sample i's loss.

    ``lambda_max(K) / N`` is the sharpness of the Gauss-Newton matrix, and one SGD step on a batch acts on ``v = Z^T x``
    through the rows of K alone. By default a sample has one row, the top eigenpair of its output Hessian; where that is
    degenerate (squared loss with several outputs) the direction in which the sharpest mode moves the sample's outputs.
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

    Raises:
        Unmeasurable: the criterion is not convex in the outputs, or flat.
        Unsupported: more rows would have to be formed than ``most_rows``.

    Cost: one forward and ``R + 1`` backward passes over the probes, of tied ones ``N R`` over a part; ``n^2`` memory
    for K beside the activations.
    Source: Chemnitz & Engel 2025, (2.18).
    """
    generator = generator or torch.Generator().manual_seed(0)
    parameters = probes.parameters
    scale = dict.fromkeys(parameters, 1.0) | dict(scale or {})
    if probes.tied:  # a pass for each row
        positions = max(1, min(positions, most_rows // probes.samples))
    directions = OutputDirections(probes, scale, outputs, positions, generator, start)
    grams = {name: ParameterGram() for name in parameters}
    backward = {name: torch.zeros_like(p) for name, p in parameters.items()}
    roots = {name: torch.as_tensor(scale[name]).to(p) ** 0.5 for name, p in parameters.items()}
    weights_by_part: list[Tensor] = []
    tied: TiedRows | None = None
    loss, same_outputs = 0.0, SameOutputs(probes.samples)
    for index in range(len(probes.parts)):
        with FirstInputs(probes.module) as first:
            evaluation, recorder, cotangents = directions.evaluate(index)
        samples = len(evaluation.outputs)
        same_outputs.add(evaluation, first.tensors)
        loss += float(evaluation.criterion(evaluation.outputs.detach())) * samples / probes.samples
        if not math.isfinite(loss):
            raise Unmeasurable("the loss of the probes is not finite: the weights or the outputs have overflowed")
        c = torch.randn(samples, len(cotangents), generator=generator).to(evaluation.outputs)
        weights_by_part.append(c.reshape(-1))
        if recorder is None:
            tied = tied or TiedRows(roots, parameters, _affordable(probes.samples * len(cotangents), most_rows), memory)
            tied.add(evaluation.outputs, cotangents)
        else:
            for name, part in recorder.parts(evaluation.outputs, cotangents, samples).items():
                grams[name].parts.append(part)
        total = torch.stack([w * c[:, r, None, None] for r, w in enumerate(cotangents)]).sum(0)
        whole = torch.autograd.grad(evaluation.outputs, list(parameters.values()), total, allow_unused=True)
        if all(g is None for g in whole):  # a copy of them, made inside a custom function
            raise Unsupported(f"the outputs that the criterion takes do not reach the parameters: {HOW}")
        for name, g in zip(parameters, whole):
            if g is not None:
                backward[name] += g.to_dense()
    weights = torch.cat(weights_by_part)
    weights = weights if weights.element_size() > 2 else weights.float()
    gram = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=weights.device)
    expected = {
        name: float(torch.linalg.vector_norm(roots[name] * g, dtype=torch.float64)) ** 2 for name, g in backward.items()
    }
    if tied is None:
        complete = {name: part for name, part in grams.items() if len(part.parts) == len(probes.parts)}
        shares = {name: part.gram(roots[name], memory) for name, part in complete.items()}
        path = {name: grams[name].path for name in grams}
    else:
        shares, path = tied.grams(), dict.fromkeys(grams, "sketched rows" if tied.defect else "rows")

    # Some gradients are zero but for rounding: the bias of attention's keys. That of a bias ahead of BatchNorm, which
    # Adam's preconditioner magnifies, is a difference of large numbers.
    precision = tolerance(next(iter(backward.values())).dtype)
    rounding = (precision**2 if tied is None else precision) * sum(expected.values())

    def wrong(name: str) -> float:
        if name not in shares:  # never reached, or not through a layer
            return float("inf") if expected[name] else 0.0
        return _difference(shares[name], weights, expected[name], rounding)

    allowed = 10 * tied.defect if tied is not None else 0.0
    unexplained = [name for name, g in backward.items() if not wrong(name) <= max(tolerance(g.dtype), allowed)]
    if unexplained and tied is not None:
        raise Unmeasurable(f"the per-sample gradients of {unexplained[0]} do not add up to its gradient")
    if unexplained and len(weights) > most_rows:
        raise Unsupported(
            f"some weights ({', '.join(unexplained[:3])}) are used outside of their own layer, and their per-sample "
            f"gradients would take {len(weights)} backward passes: allow them with "
            f"SGDStability(most_rows={len(weights)})"
        )
    rows_of = {name: ParameterGram() for name in unexplained}
    for index in range(len(probes.parts)) if unexplained else ():
        evaluation, _, cotangents = directions.evaluate(index)
        add_rows(rows_of, evaluation.outputs, parameters, cotangents)
    for name, rowwise in rows_of.items():
        shares[name], path[name] = rowwise.gram(roots[name], memory), "rows"
        if not math.isfinite(expected[name]) or not bool(shares[name].isfinite().all()):
            raise Unmeasurable(f"the per-sample gradients of {name} leave the range of {backward[name].dtype}")
        if not wrong(name) <= tolerance(backward[name].dtype):
            raise Unmeasurable(
                f"the per-sample gradients of {name} do not add up to its gradient: the forward pass is random"
            )
    defect = max(map(wrong, backward), default=0.0)
    traces = dict.fromkeys(backward, 0.0)
    for name, share in shares.items():
        gram += share
        traces[name] = float(share.trace())
    gram = (gram + gram.T).mul_(0.5).cpu()
    rows = len(gram) // probes.samples
    passes = len(weights) if unexplained or tied is not None else 0
    return TangentKernel(
        gram, rows, path, traces, defect, loss, directions.description, directions.mode, passes,
        same_outputs.share(gram, precision),
    )  # fmt: skip


def _affordable(rows: int, most: int) -> int:
    if rows > most:
        raise Unsupported(
            f"batch statistics tie samples together, and {rows} output gradients would take a backward pass each: "
            f"allow them with SGDStability(most_rows={rows}), or take fewer probes"
        )
    return rows


def _difference(share: Tensor, c: Tensor, expected: float, rounding: float) -> float:
    """Return the error of ``c^T K c``, relative to its value, to its mean over c (the trace), or to rounding."""
    scale = max(expected, float(share.trace()), rounding)
    c = c.double()
    return abs(float(c @ (share.double() @ c)) - expected) / scale if scale else 0.0


def tolerance(dtype: torch.dtype) -> float:
    """Return how far two ways to compute the same number may differ by rounding."""
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 5e-2)
