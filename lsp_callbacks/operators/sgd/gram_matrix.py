"""The Gram matrix ``K = Z D Z^T`` of per-sample output gradients, without ``Z`` where that is dear."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.graph import read
from lsp_callbacks.linalg import norm, unit
from lsp_callbacks.operators.curvature.hessian import double_backward
from lsp_callbacks.operators.curvature.output_differences import differentiated_twice
from lsp_callbacks.operators.sgd.collapsed_outputs import Alike, FirstInputs
from lsp_callbacks.operators.sgd.per_sample_gradients import ParameterGram, Recorder, TiedRows, rows_alone
from lsp_callbacks.step.probes import HOW
from lsp_callbacks.step.snapshot import Evaluation, ProbeSet, Unmeasurable, Unmodelled, displaced, flatten

#: Numbers that are held at once, at most.
HELD = 2**26
#: Positions (tokens, pixels) of a sample that are looked at; the others are taken to be like them.
POSITIONS = 4
#: Products that find the top eigenvector of each sample's output Hessian.
POWER = 20
#: Products that find the sharpest mode, from nothing and from the last one.
COLD, WARM = 20, 3
#: Of the parameters, by which a difference displaces them: a small step for outputs, a large one for their rounding.
SHARE = 1e-3

Scale = Mapping[str, "float | Tensor"]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TangentKernel:
    """``K`` and what it was made from.

    Attributes:
        gram: ``(N R, N R)`` in float64, sample by sample: ``R`` rows ``z = sqrt(s) u^T J`` a sample.
        rows: ``R``.
        path: which parameters took which path, by name: "structured", "layer", "rows".
        traces: each parameter's share of the trace.
        defect: the largest relative difference of ``c^T K c`` from ``||J^T c||^2`` over the parameters.
        loss: mean over the probes.
        stated: in words, which outputs the rows stand for.
        mode: the sharpest mode, where it was needed: the next call may start from it.
        passes: backward passes that were needed for rows by themselves.
        alike: share of the samples with the same outputs and gradients, if it is nine of ten; otherwise 0, see `Alike`.
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
    """``K_ij = z_i D z_j^T`` with ``z_i = R_i^T J_i``, ``R_i R_i^T = S_i`` the output Hessian of sample i's loss.

    ``lambda_max(K) / N`` is the sharpness of the Gauss-Newton matrix, and one SGD step on a batch acts on ``v = Z^T x``
    through the rows of K alone. By default a sample has one row, the top eigenpair of its output Hessian; where that is
    degenerate (squared loss with several outputs) the direction in which the sharpest mode moves the sample's outputs.
    A sample with several positions (tokens) has one row for each of ``positions`` of them, drawn at random and weighted
    to stand for all.

    Linear layers, embeddings, normalisations and convolutions contribute from their inputs and output gradients;
    another layer by the per-sample Jacobians of itself alone. Each parameter's share is checked against one plain
    backward pass, ``c^T K c = ||J^T c||^2`` for random c; where it fails (a weight that is used outside of its layer)
    the rows of Z are formed for that parameter, one backward pass each. Where the statistics of a batch tie its samples
    together (``probes.tied``), all rows are, as each sample moves the outputs of all others in every layer before.

    Args:
        probes: the samples.
        outputs: "top", or "all" eigenpairs of each output Hessian; "loss" takes the gradient ``g_i`` of each sample's
            loss for its only row instead: ``K_ij = g_i D g_j^T``, and no curvature.
        scale: the diagonal of D, by parameter name: relative learning rates, a frozen preconditioner. None is 1.
        positions: how many of a sample's positions to look at.
        generator: of positions and the check; private.
        memory: bound on the numbers held at once in a layer's per-sample gradients.
        start: an earlier ``mode``.
        most_rows: form rows of Z by themselves only where there are at most so many.

    Raises:
        Unmeasurable: the criterion is not convex in the outputs, or flat.
        Unmodelled: more rows would have to be formed than ``most_rows``.

    Cost: one forward and ``R + 1`` backward passes over the probes, of tied ones ``N R`` over a part; ``n^2`` memory
    for K beside the activations.
    Source: Chemnitz & Engel 2025, (2.18); MATH section 2.
    """
    generator = generator or torch.Generator().manual_seed(0)
    parameters = probes.parameters
    scale = dict.fromkeys(parameters, 1.0) | dict(scale or {})
    if probes.tied:  # a pass for each row
        positions = max(1, min(positions, most_rows // probes.samples))
    directions = _Directions(probes, scale, outputs, positions, generator, start)
    grams = {name: ParameterGram() for name in parameters}
    backward = {name: torch.zeros_like(p) for name, p in parameters.items()}
    roots = {name: torch.as_tensor(scale[name]).to(p) ** 0.5 for name, p in parameters.items()}
    signs: list[Tensor] = []
    tied: TiedRows | None = None
    loss, alike = 0.0, Alike(probes.samples)
    for index in range(len(probes.parts)):
        with FirstInputs(probes.module) as first:
            found, recorder, cotangents = directions.evaluate(index)
        samples = len(found.outputs)
        alike.add(found, first.tensors)
        loss += float(found.criterion(found.outputs.detach())) * samples / probes.samples
        if not math.isfinite(loss):
            raise Unmeasurable("the loss of the probes is not finite: the weights or the outputs have overflowed")
        c = torch.randn(samples, len(cotangents), generator=generator).to(found.outputs)
        signs.append(c.reshape(-1))
        if recorder is None:
            tied = tied or TiedRows(roots, parameters, _few(probes.samples * len(cotangents), most_rows), memory)
            tied.add(found.outputs, cotangents)
        else:
            for name, part in recorder.parts(found.outputs, cotangents, samples).items():
                grams[name].parts.append(part)
        total = torch.stack([w * c[:, r, None, None] for r, w in enumerate(cotangents)]).sum(0)
        whole = torch.autograd.grad(found.outputs, list(parameters.values()), total, allow_unused=True)
        if all(g is None for g in whole):  # a copy of them, made inside a function of the user's own
            raise Unmodelled(f"the outputs that the criterion takes do not reach the parameters: {HOW}")
        for name, g in zip(parameters, whole):
            if g is not None:
                backward[name] += g.to_dense()
    weights = torch.cat(signs)
    weights = weights if weights.element_size() > 2 else weights.float()
    gram = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=weights.device)
    expected = {
        name: float(torch.linalg.vector_norm(roots[name] * g, dtype=torch.float64)) ** 2 for name, g in backward.items()
    }
    if tied is None:
        whole_parts = {name: one for name, one in grams.items() if len(one.parts) == len(probes.parts)}
        shares = {name: one.gram(roots[name], memory) for name, one in whole_parts.items()}
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
    left = [name for name, g in backward.items() if not wrong(name) <= max(tolerance(g.dtype), allowed)]
    if left and tied is not None:
        raise Unmeasurable(f"the per-sample gradients of {left[0]} do not add up to its gradient")
    if left and len(weights) > most_rows:
        raise Unmodelled(
            f"some weights ({', '.join(left[:3])}) are used outside of their own layer, and their per-sample gradients "
            f"would take {len(weights)} backward passes: allow them with SGDStability(most_rows={len(weights)})"
        )
    for name, one in (directions.rows(left) if left else {}).items():
        shares[name], path[name] = one.gram(roots[name], memory), "rows"
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
    passes = len(weights) if left or tied is not None else 0
    return TangentKernel(
        gram, rows, path, traces, defect, loss, directions.stated, directions.mode, passes,
        alike.share(gram, precision),
    )  # fmt: skip


def _few(rows: int, most: int) -> int:
    if rows > most:
        raise Unmodelled(
            f"batch statistics tie samples together, and {rows} output gradients would take a backward pass each: "
            f"allow them with SGDStability(most_rows={rows}), or take fewer probes"
        )
    return rows


def _difference(share: Tensor, c: Tensor, expected: float, rounding: float) -> float:
    """Of ``c^T K c`` from what it should be, relative to it, to its mean over c (the trace), or to rounding."""
    scale = max(expected, float(share.trace()), rounding)
    c = c.double()
    return abs(float(c @ (share.double() @ c)) - expected) / scale if scale else 0.0


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to the same number may differ by rounding."""
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 5e-2)


class _Directions:
    """Which combinations of a sample's outputs the rows of Z stand for."""

    def __init__(
        self,
        probes: ProbeSet,
        scale: Scale,
        which: str,
        positions: int,
        generator: torch.Generator,
        mode: Tensor | None = None,
    ):
        self.mode = mode
        self.probes, self.scale, self.which, self.generator = probes, scale, which, generator
        self._count = positions
        self._chosen: Tensor | None = None
        self._moves: list[Tensor] | None = None
        self._cotangents: dict[int, list[Tensor]] = {}
        self._spread = True
        self.stated = ""

    def evaluate(self, index: int) -> tuple[Evaluation, Recorder | None, list[Tensor]]:
        """One forward pass over a part, with the cotangents ``sqrt(s) u`` of its rows."""
        with double_backward(self.probes.module):
            found, recorder = self._record(index)
            if index not in self._cotangents:  # the same ones each time: they are drawn and rounded
                self._cotangents[index] = self._choose(found, index)
            return found, recorder, self._cotangents[index]

    def _record(self, index: int) -> tuple[Evaluation, Recorder | None]:
        probes = self.probes
        if probes.tied:
            return probes.parts[index](), None
        if self._spread and len(probes.parts) == 1:
            try:
                with Recorder(probes.module, probes.parameters, spread=probes.samples) as recorder:
                    found = probes.parts[index]()
                if not recorder.spread or _alike(found.outputs, probes.parts[index]().outputs):
                    return found, recorder
            except (RuntimeError, ValueError, IndexError):  # what is shared cannot be given to each sample apart
                pass
            self._spread = False
        with Recorder(probes.module, probes.parameters) as recorder:
            return probes.parts[index](), recorder

    def rows(self, names: list[str]) -> dict[str, ParameterGram]:
        """Shares of parameters by a backward pass for each row."""
        grams = {name: ParameterGram() for name in names}
        for index in range(len(self.probes.parts)):
            found, _, cotangents = self.evaluate(index)
            parts = rows_alone(found.outputs, [self.probes.parameters[name] for name in names], cotangents)
            for name, part in zip(names, parts):
                grams[name].parts.append(part)
        return grams

    def _choose(self, found: Evaluation, index: int) -> list[Tensor]:
        shape = found.outputs.shape
        if self.which == "loss":
            self.stated = "the loss of each sample"
            f = found.outputs.detach().requires_grad_()
            with torch.enable_grad():
                return list(torch.autograd.grad(len(f) * found.criterion(f), f))
        if self._chosen is None:
            order = torch.randperm(shape[1], generator=self.generator)
            self._chosen = order[: self._count].sort().values
            some = f" at {len(self._chosen)} of {shape[1]} positions" if shape[1] > 1 else ""
            self.stated = ("the only output" if shape[2] == 1 else f"{self.which} of {shape[2]} outputs") + some
        if shape[1] <= int(self._chosen.max()):
            raise Unmeasurable("samples have different numbers of positions: pad the batches to one length")
        curvature = output_hessian(found)
        if self.which == "all" or shape[2] == 1:
            pairs = _all_pairs(curvature, found.outputs)
        else:
            pairs = [self._top(curvature, found, index)]
        weight = (shape[1] / len(self._chosen)) ** 0.5
        cotangents = []
        for rows in pairs:
            for position in self._chosen.tolist():
                alone = torch.zeros_like(rows)
                alone[:, position] = weight * rows[:, position]
                cotangents.append(alone)
        return cotangents

    def _top(self, curvature: Product, found: Evaluation, index: int) -> Tensor:
        """``sqrt(s) u`` of the top eigenpair at each position, by power iteration."""
        if found.outputs.shape[-1] <= POWER:  # the matrix itself costs less than its power
            blocks = _blocks(curvature, found.outputs)
            curvature = lambda v: (blocks @ v[..., None])[..., 0]  # noqa: E731
        # One start for all: where the eigenvalue is nearly degenerate, samples keep what they have in common.
        start = (
            torch.randn(found.outputs.shape[-1], generator=self.generator).to(found.outputs).expand_as(found.outputs)
        )
        image = curvature(unit(start))
        value = (image * unit(start)).sum(-1, keepdim=True)
        if bool(((image - value * unit(start)).norm(dim=-1) <= 1e-4 * image.norm(dim=-1)).all()):
            # Any direction is an eigenvector: take the one in which the sharpest mode moves this sample.
            if self._moves is None:
                self._moves, self.mode = _sharpest(self.probes, self.scale, self.mode, self.generator)
            self.stated = self.stated.replace("top", "sharpest mode", 1)
            start, image = self._moves[index], curvature(unit(self._moves[index]))
        for _ in range(POWER):
            start, image = image, curvature(unit(image))
        u = unit(start)
        return u * _root((image * u).sum(-1, keepdim=True), image)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of the largest."""
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-4 * b.abs().amax()).all())


def output_hessian(found: Evaluation) -> Product:
    """``v -> S v``: the Hessian of N times the mean loss in the outputs, block by block in the samples.

    Raises:
        Unmeasurable: if the criterion is linear in the outputs, or cannot be differentiated twice.
    """
    f = found.outputs.detach().requires_grad_()
    with torch.enable_grad():
        loss = len(f) * found.criterion(f)
        (gradient,) = torch.autograd.grad(loss, f, create_graph=True)
    if not gradient.requires_grad:
        raise Unmeasurable("the criterion is linear in the outputs: it has no curvature, and no Gauss-Newton matrix")

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, f, v.to(gradient), retain_graph=True, materialize_grads=True)[0]

    custom = read(loss).custom
    if custom and not differentiated_twice(product, found.criterion, f):
        raise Unmeasurable(
            f"the backward of {' and '.join(custom)} in the criterion cannot be differentiated (once_differentiable, "
            "or detached tensors): write it in operations that can, or pass criterion=... without it"
        )
    return product


def _all_pairs(curvature: Product, outputs: Tensor) -> list[Tensor]:
    """``sqrt(s_k) u_k`` for every k: the columns of ``S^(1/2)`` at each position."""
    blocks = _blocks(curvature, outputs)
    wide = blocks if blocks.element_size() > 2 else blocks.float()
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    return list((vectors * _root(values, values)[..., None, :]).to(blocks).unbind(-1))


def _blocks(curvature: Product, outputs: Tensor) -> Tensor:
    """S of each sample and position, ``(..., classes, classes)``."""
    return torch.stack([curvature(e.expand_as(outputs)) for e in torch.eye(outputs.shape[-1]).to(outputs)], dim=-1)


def _root(values: Tensor, scale: Tensor) -> Tensor:
    if bool((values < -1e-4 * scale.abs().amax()).any()):
        raise Unmeasurable(
            "the criterion is not convex in the outputs: its Gauss-Newton matrix is not positive, and the exponents of "
            "SGD are not given by a Gram matrix"
        )
    return values.clamp_min(0) ** 0.5


def _sharpest(
    probes: ProbeSet, scale: Scale, mode: Tensor | None, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """How each output moves along the top eigenvector of the Gauss-Newton matrix, by power iteration from ``mode``."""
    parameters = list(probes.parameters.values())
    weights = [torch.as_tensor(scale[name]).to(p).expand_as(p) for name, p in probes.parameters.items()]
    d = flatten(weights, parameters)
    if mode is not None and not bool(mode.any()):
        mode = None
    steps = COLD if mode is None else WARM
    vector = torch.randn(len(d), generator=generator).to(d) if mode is None else mode
    kept = [_moved(probes.parts[0], parameters)] if len(probes.parts) == 1 else []  # not all graphs at once
    for _ in range(steps):
        moves, image = [], torch.zeros_like(vector)
        for found, moved in kept or (_moved(part, parameters) for part in probes.parts):
            moves.append(moved(vector))
            curved = output_hessian(found)(moves[-1])
            pulled = torch.autograd.grad(
                found.outputs, parameters, curved, retain_graph=bool(kept), materialize_grads=True
            )
            image += flatten(pulled, parameters)
        if not bool((d * image).any()):  # dead, or saturated: no direction is felt, and any will do
            break
        vector = unit(d * image)
    return moves, vector


def _moved(part: Callable[[], Evaluation], parameters: list[nn.Parameter]) -> tuple[Evaluation, Product]:
    """A forward pass, and ``v -> J v`` of its outputs.

    The pull-back of the outputs is linear in what it is given: its own derivative is J. Behind functions whose backward
    has no derivative it is a difference, over a share of the parameters' size.
    """
    found = part()
    f, w = found.outputs, torch.zeros_like(found.outputs, requires_grad=True)
    if not read(f.sum()).custom:
        with contextlib.suppress(RuntimeError):  # no second derivative is implemented
            pulled = torch.autograd.grad(f, parameters, w, create_graph=True, materialize_grads=True)
            flat = flatten(pulled, parameters)
            _ = torch.autograd.grad(flat, w, torch.zeros_like(flat), retain_graph=True, materialize_grads=True)
            return found, lambda v: torch.autograd.grad(flat, w, v, retain_graph=True, materialize_grads=True)[0]
    size = float(norm(flatten([p.detach() for p in parameters], parameters))) or 1.0

    def difference(v: Tensor) -> Tensor:
        distance = SHARE * size / float(norm(v))
        with displaced(parameters, v, distance):
            return (part().outputs.detach() - f.detach()) / distance

    return found, difference
