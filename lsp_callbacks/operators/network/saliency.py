"""A prediction, its input gradient as its explanation, and how both depend on inputs and parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.autograd.double_backward import check_adjoint, jacobian
from lsp_callbacks.autograd.graph import Graph, read
from lsp_callbacks.autograd.sample_rows import Rows
from lsp_callbacks.linalg import LinearOperator
from lsp_callbacks.operators.network.depth import Depth, depth, states
from lsp_callbacks.step.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Explanation:
    """Prediction and explanation of some samples, in eval mode, with their graph.

    Attributes:
        snapshot: of the step.
        states: of the network.
        chosen: ``(S,)``, the index c of the output that is explained, of each sample.
        score: ``sum_i f_c(x_i)``.
        saliency: ``g = d score / d X_0``, in its shape: each sample's gradient of its own ``f_c``.
    """

    snapshot: Snapshot
    states: Depth
    chosen: Tensor
    score: Tensor
    saliency: Tensor

    @property
    def inputs(self) -> Rows:
        """Return the layout of ``X_0`` and of the explanation."""
        return Rows(self.states.start, self.states.axis)

    @property
    def outputs(self) -> Rows:
        """Return the layout of the prediction."""
        last = self.states.layers[-1]
        return Rows(last.state, last.axis)

    @property
    def prediction(self) -> Tensor:
        """Return f, ``(S, m)``, without a graph."""
        return self.outputs.flat(self.states.layers[-1].state).detach()

    @property
    def explanation(self) -> Tensor:
        """Return g, ``(S, n)``, without a graph."""
        return self.inputs.flat(self.saliency).detach()

    @property
    def graph(self) -> Graph:
        """Return the properties of the score's graph."""
        return read(self.score)

    def by_input(self) -> tuple[LinearOperator, LinearOperator]:
        """Return ``df/dx`` and ``dg/dx``, one matrix for each sample.

        The second is symmetric, and 0 where the network is linear around the sample.
        """
        rows, x = self.inputs, self.states.start

        def product(v: Tensor) -> Tensor:
            if not self.saliency.requires_grad:
                return torch.zeros_like(v)
            (image,) = torch.autograd.grad(self.saliency, x, rows.back(v), retain_graph=True, materialize_grads=True)
            return rows.flat(image)

        n = rows.length
        hessian = LinearOperator((n, n), product, product, batch=(rows.samples,), dtype=rows.dtype, device=x.device)
        return self.states.jacobian(len(self.states.layers)), hessian

    def by_parameters(self) -> tuple[LinearOperator, LinearOperator]:
        """Return ``df/dtheta`` and ``dg/dtheta``, of all samples together, with ``X_0`` held fixed.

        Raises:
            Unmeasurable: custom functions that cannot be differentiated twice.
        """
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
    """Return the prediction on the first samples of the step's batch, and its explanation.

    The prediction is what the network's last module returns (logits, for a classifier), flat. The explanation is the
    gradient of its largest entry, the predicted class's score, with respect to ``X_0`` (Simonyan et al. 2014); of
    several positions, that of the largest entry of all. Which entry it is stays fixed when inputs move.

    Args:
        snapshot: a step.
        samples: how many, at most.
        start: inputs other than the batch's, for the outputs that are ``chosen`` there; parameters may have moved.
        skip: `Depth.skip` for the batch's inputs.
        chosen: ``(S,)``; None takes the largest entries.

    Raises:
        Unmeasurable: see `lsp_callbacks.operators.network.depth.depth`.

    Cost: a forward and a backward pass on these samples.
    """
    if start is None:
        network = depth(snapshot, samples=samples)
    else:
        network = states(snapshot, samples=samples, start=start, skip=skip)
    last = network.layers[-1]
    with torch.enable_grad():
        flat = last.state.movedim(last.axis, 0).flatten(1)
        chosen = flat.detach().argmax(1) if chosen is None else chosen
        score = flat.gather(1, chosen[:, None]).sum()
        (saliency,) = torch.autograd.grad(score, network.start, create_graph=True, materialize_grads=True)
    return Explanation(snapshot, network, chosen, score, saliency)


def _by_parameters(tensor: Tensor, rows: Rows, at: Explanation) -> LinearOperator:
    """Return ``d tensor / d theta``, the tensor flat, sample by sample."""
    parameters = list(at.snapshot.parameters.values())
    if not tensor.requires_grad:
        m, n = tensor.numel(), sum(p.numel() for p in parameters)
        return LinearOperator(
            (m, n), lambda v: v.new_zeros(m), lambda w: w.new_zeros(n), dtype=rows.dtype, device=tensor.device
        )
    with torch.enable_grad():
        J = jacobian(rows.flat(tensor), parameters)
    check_adjoint(J, read(at.score), "the network")
    return J


def change_by_input(at: Explanation, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return how prediction and explanation change when the inputs move by ``delta``, ``(S, n)``.

    Cost: see `explain`.
    """
    moved = at.states.start.detach() + at.inputs.back(delta)
    return _change(at, _moved(at, moved))


def change_by_parameters(at: Explanation) -> tuple[Tensor, Tensor]:
    """Return how prediction and explanation have changed since the parameters moved, at the same ``X_0``; flat.

    Cost: see `explain`.
    """
    prediction, explanation = _change(at, _moved(at, at.states.start.detach()))
    return prediction.flatten(), explanation.flatten()


def _moved(at: Explanation, start: Tensor) -> Explanation:
    return explain(at.snapshot, samples=at.states.samples, start=start, skip=at.states.skip, chosen=at.chosen)


def _change(at: Explanation, moved: Explanation) -> tuple[Tensor, Tensor]:
    return moved.prediction - at.prediction, moved.explanation - at.explanation
