"""A prediction, its input gradient as its explanation, and how both depend on inputs and parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.autograd.graph import Graph, read
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.network.depth import Depth, depth, states
from lsp_callbacks.operators.sgd.sample_rows import Rows, check_adjoint
from lsp_callbacks.step.snapshot import Snapshot, flatten


@dataclass(frozen=True, eq=False)
class Explanation:
    """Of some samples, in eval mode, with its graph.

    Attributes:
        snapshot: of the step.
        states: of the network.
        chosen: ``(S,)``, of each sample's outputs c, the one that is explained.
        score: ``sum_i f_c(x_i)``.
        saliency: ``g = d score / d X_0``, in its shape: the gradient of each sample's own ``f_c``.
    """

    snapshot: Snapshot
    states: Depth
    chosen: Tensor
    score: Tensor
    saliency: Tensor

    @property
    def inputs(self) -> Rows:
        return Rows(self.states.start, self.states.axis)

    @property
    def outputs(self) -> Rows:
        last = self.states.layers[-1]
        return Rows(last.state, last.axis)

    @property
    def prediction(self) -> Tensor:
        """``(S, m)``, f, without a graph."""
        return self.outputs.flat(self.states.layers[-1].state).detach()

    @property
    def explanation(self) -> Tensor:
        """``(S, n)``, g, without a graph."""
        return self.inputs.flat(self.saliency).detach()

    @property
    def graph(self) -> Graph:
        """Of the score."""
        return read(self.score)

    def by_input(self) -> tuple[LinearOperator, LinearOperator]:
        """``df/dx`` and ``dg/dx``, one matrix for each sample; the second is symmetric, and 0 within linear pieces."""
        rows, x = self.inputs, self.states.start

        def product(v: Tensor) -> Tensor:
            if not self.saliency.requires_grad:
                return torch.zeros_like(v)
            (found,) = torch.autograd.grad(self.saliency, x, rows.back(v), retain_graph=True, materialize_grads=True)
            return rows.flat(found)

        n = rows.length
        hessian = LinearOperator((n, n), product, product, batch=(rows.samples,), dtype=rows.dtype, device=x.device)
        return self.states.jacobian(len(self.states.layers)), hessian

    def by_parameters(self) -> tuple[LinearOperator, LinearOperator]:
        """``df/dtheta`` and ``dg/dtheta``, of all samples together, with ``X_0`` held fixed."""
        outputs = _by_parameters(self.states.layers[-1].state, self.outputs, self)
        return outputs, _by_parameters(self.saliency, self.inputs, self)


def explain(
    snapshot: Snapshot,
    *,
    samples: int = 4,
    start: Tensor | None = None,
    skip: int = 0,
    chosen: Tensor | None = None,
) -> Explanation:
    """The prediction on the first samples of the step's batch, and its explanation.

    The prediction is what the network's last module returns (logits, for a classifier), flat. The explanation is the
    gradient of its largest entry, the predicted class's score, with respect to ``X_0`` (Simonyan et al. 2014); of
    several positions, that of the largest entry of all. Which entry it is stays as it is when inputs move.

    Args:
        snapshot: a step.
        samples: how many, at most.
        start: inputs other than the batch's, for the outputs that are ``chosen`` there; parameters may have moved.
        skip: what `Depth` says of the batch's inputs.
        chosen: ``(S,)``.

    Raises:
        Unmeasurable: see `lsp_callbacks.operators.network.depth.depth`.

    Cost: a forward and a backward pass on these samples.
    """
    if start is None:
        found = depth(snapshot, samples=samples)
    else:
        found = states(snapshot, samples=samples, start=start, skip=skip)
    last = found.layers[-1]
    with torch.enable_grad():
        flat = last.state.movedim(last.axis, 0).flatten(1)
        chosen = flat.detach().argmax(1) if chosen is None else chosen
        score = flat.gather(1, chosen[:, None]).sum()
        (saliency,) = torch.autograd.grad(score, found.start, create_graph=True, materialize_grads=True)
    return Explanation(snapshot, found, chosen, score, saliency)


def _by_parameters(tensor: Tensor, rows: Rows, at: Explanation) -> LinearOperator:
    """``d tensor / d theta``; forward products differentiate the adjoint, which is linear."""
    parameters = list(at.snapshot.parameters.values())

    def pulled(cotangent: Tensor, graph: bool) -> Tensor:
        if not tensor.requires_grad:
            return flatten([None] * len(parameters), parameters)
        parts = torch.autograd.grad(
            tensor, parameters, cotangent, retain_graph=True, create_graph=graph, materialize_grads=True
        )
        return flatten(parts, parameters)

    with torch.enable_grad():
        u = torch.zeros_like(tensor, requires_grad=True)
        pullback = pulled(u, True)

    def forward(v: Tensor) -> Tensor:
        if not pullback.requires_grad:
            return v.new_zeros(tensor.numel())
        (found,) = torch.autograd.grad(pullback, u, v.to(pullback.dtype), retain_graph=True, materialize_grads=True)
        return rows.flat(found).flatten()

    def adjoint(w: Tensor) -> Tensor:
        return pulled(rows.back(w.view(rows.samples, -1)), False).to(rows.dtype)

    shape = (tensor.numel(), pullback.numel())
    operator = LinearOperator(shape, forward, adjoint, dtype=rows.dtype, device=tensor.device)
    check_adjoint(operator, at.score, "the network")
    return operator


def change_by_input(at: Explanation, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Of prediction and explanation when the inputs move by ``delta``, ``(S, n)``. Cost: see `explain`."""
    moved = at.states.start.detach() + at.inputs.back(delta)
    return _change(at, _moved(at, moved))


def change_by_parameters(at: Explanation) -> tuple[Tensor, Tensor]:
    """Of prediction and explanation since the parameters moved, at the same ``X_0``; flat. Cost: see `explain`."""
    start = at.states.start.detach()
    found = _change(at, _moved(at, start))
    return found[0].flatten(), found[1].flatten()


def _moved(at: Explanation, start: Tensor) -> Explanation:
    return explain(at.snapshot, samples=at.states.samples, start=start, skip=at.states.skip, chosen=at.chosen)


def _change(at: Explanation, moved: Explanation) -> tuple[Tensor, Tensor]:
    return moved.prediction - at.prediction, moved.explanation - at.explanation
