"""The contribution of each sample of a batch to its loss, and to the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.autograd.sample_rows import Rows
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import norm
from lsp_callbacks.operators.network.depth import Layer, states
from lsp_callbacks.step.flat import flatten
from lsp_callbacks.step.snapshot import Snapshot


@dataclass(frozen=True)
class SampleContributions:
    """The contributions of the first samples of a batch.

    Attributes:
        gradients: ``(m, P)``: gradient of each sample's part of the loss, ``grad l_i / B`` where the loss is a mean.
        batch: how many samples there are, ``B``.
        inputs: ``X_0`` of these samples, by which they are recognised later.
    """

    gradients: Tensor
    batch: int
    inputs: Tensor


def sample_contributions(snapshot: Snapshot, samples: int) -> SampleContributions:
    """Return the derivative of the step's gradient with respect to the weight of each of its first samples.

    The step is replayed as it was, masks and batch statistics included. Its loss depends on the parameters through the
    network's last outputs z, one row for each sample, and rows enter a sum: so the part of sample i in the loss has the
    gradient ``(dz_i / d theta)^T dL / dz_i``, whatever the criterion, its weights and its reduction are. Only the loss
    is weighted: the sample stays in batch statistics.

    Args:
        snapshot: a step.
        samples: how many, at most.

    Raises:
        Unmeasurable: where the loss does not depend on the parameters through these outputs alone (accumulated
            micro-batches, penalties on weights or features, several networks), or rows mix in it (contrastive losses).

    Cost: a forward pass, and a backward pass for each sample and one for the check; of this rank alone.
    """
    network = states(snapshot, axis=_axis(snapshot))
    last = network.layers[-1]
    z, parameters = last.state, list(snapshot.parameters.values())
    (slope,) = torch.autograd.grad(network.loss, z, create_graph=True, materialize_grads=True)
    _check_rows(slope, last)
    rows, slope = Rows(z, last.axis), slope.detach()

    def pulled(cotangent: Tensor) -> Tensor:
        parts = torch.autograd.grad(z, parameters, cotangent, retain_graph=True, materialize_grads=True)
        return flatten(parts, parameters)

    whole = torch.autograd.grad(network.loss, parameters, retain_graph=True, materialize_grads=True)
    _check_whole(pulled(slope), flatten(whole, parameters), snapshot)
    flat = rows.flat(slope)
    gradients = []
    for i in range(min(samples, rows.samples)):
        alone = torch.zeros_like(flat)
        alone[i] = flat[i]
        gradients.append(pulled(rows.back(alone)).to(rows.dtype))
    inputs = network.start.detach().movedim(network.axis, 0)[: len(gradients)].clone()
    return SampleContributions(torch.stack(gradients), rows.samples, inputs)


def _axis(snapshot: Snapshot) -> int | None:
    """Return the axis of the samples in ``X_0``, inferred from a pass on two samples."""
    return None if snapshot.sample is None else states(snapshot, samples=2).axis


def _check_rows(slope: Tensor, last: Layer) -> None:
    """Raise an error if the slope in one row depends on another row."""
    if not slope.requires_grad:  # a linear loss
        return
    rows = Rows(slope, last.axis)
    v = torch.zeros_like(rows.flat(slope.detach()))
    generator = torch.Generator().manual_seed(0)
    v[0] = torch.randn(rows.length, generator=generator, dtype=v.dtype).to(v.device)
    try:
        (moved,) = torch.autograd.grad(slope, last.state, rows.back(v), retain_graph=True, materialize_grads=True)
    except RuntimeError as error:
        raise Unmeasurable(
            f"the criterion cannot be differentiated twice, so that samples may mix in it unnoticed ({error}): write "
            "it in operations that can be differentiated, or leave leave_one_out out"
        ) from None
    size = norm(rows.flat(moved), -1)
    if bool((size[1:] > 1e-4 * size[0]).any()):
        raise Unmeasurable(
            "the loss is no sum over the samples of the batch (a contrastive loss, or a norm over the batch after the "
            "last module): the weight of one sample is not defined; leave leave_one_out out"
        )


def _check_whole(through: Tensor, whole: Tensor, snapshot: Snapshot) -> None:
    size = norm(whole)
    if not bool(size.isfinite()):
        raise Unmeasurable(f"the gradient of step {snapshot.step} is not finite")
    if not bool(norm(through - whole) <= (1e-3 if snapshot.graph.full else 0.1) * size):
        raise Unmeasurable(
            "the loss depends on the parameters not only through the outputs of the network's last module "
            "(accumulated batches, a penalty, several networks): the contribution of one sample is unknown; leave "
            "leave_one_out out"
        )
