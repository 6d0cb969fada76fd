"""Whether a network gives (nearly) all samples the same outputs, and has stopped to learn from them."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.step.criterion import Evaluation

#: How many samples the others are compared with: if nine of ten samples are the same, one of three is among them.
FEW = 3
#: Share of the samples that must be the same.
MOST = 0.9
#: Below this share of a constant's loss, the samples that differ lower the loss.
USE = 0.99
#: Outputs of each sample that are compared first: where they are unlike, so are all.
FIRST = 64
#: Relative change of the outputs whose effect on the loss's slopes counts as noise.
WANTED = 1e-3


class SameOutputs:
    """Counts samples of different inputs that have the same outputs and the same gradient.

    The same outputs alone prove little: a last layer that begins with zeros returns them, and still learns; so do the
    same inputs; and where most targets are the same, good outputs are, too.

    Args:
        samples: how many there are in all parts.
    """

    def __init__(self, samples: int):
        self._samples = samples
        self._outputs: Tensor | None = None
        self._inputs: list[Tensor] = []
        self._same: list[Tensor] = []
        self._apart = torch.zeros(FEW, dtype=torch.bool)
        self._loss = self._constant = torch.zeros(FEW, dtype=torch.float64)
        self._wanted: list[tuple[Tensor, Tensor]] = []

    def add(self, evaluation: Evaluation, inputs: list[Tensor]) -> None:
        """Add a part of the samples.

        Args:
            evaluation: their outputs, with the criterion.
            inputs: the `Recorder.first_inputs` of its forward pass.
        """
        outputs = evaluation.outputs.detach()
        by_sample = [_by_sample(tensor, len(outputs)) for tensor in inputs]
        if self._outputs is None:
            self._outputs, self._inputs = outputs[:FEW], [tensor[:FEW] for tensor in by_sample]
        self._same.append(_same_at_first(outputs, self._outputs).cpu())
        if not bool(self._candidates.any()):
            return
        same = torch.stack([_same(outputs, row) for row in self._outputs])
        self._same[-1] = same.cpu()
        if not bool(self._candidates.any()):
            return
        apart = torch.zeros_like(same)
        for tensor, rows in zip(by_sample, self._inputs):
            apart |= torch.stack([_differ(tensor, row) for row in rows]) if len(rows) == len(same) else False
        self._apart = self._apart[: len(same)] | (apart & same).any(1).cpu()
        share = len(outputs) / self._samples
        with torch.no_grad():
            constant = [float(evaluation.criterion(row.expand_as(outputs))) for row in self._outputs]
            self._constant = self._constant[: len(same)] + share * torch.tensor(constant, dtype=torch.float64)
            self._loss = self._loss[: len(same)] + share * float(evaluation.criterion(outputs))
        wanted = _slope(evaluation, outputs)
        self._wanted.append((wanted, _slope(evaluation, (1 + WANTED) * outputs) - wanted))

    @property
    def _candidates(self) -> Tensor:
        """Return which of the compared samples are still equal to nine of ten others."""
        unlike = sum(same.logical_not().sum(1) for same in self._same)
        return torch.as_tensor(unlike) <= (1 - MOST) * self._samples

    def share(self, gram: Tensor, tolerance: float, taken: Tensor | None = None) -> float:
        """Return the largest share of the samples that are the same in all respects; 0 below nine of ten.

        Args:
            gram: Gram matrix of the gradients, sample by sample.
            tolerance: relative error of its entries.
            taken: indices of the samples that it is of; None is all.
        """
        if self._samples < 2 or not bool(self._candidates.any()):
            return 0.0
        use = self._loss < self._constant - (1 - USE) * self._constant.abs()
        wanted, noise = (torch.cat(parts) for parts in zip(*self._wanted))
        taken = torch.arange(self._samples) if taken is None else taken
        held, rows = len(taken), len(gram) // len(taken)
        shares = [0.0]
        for k in (self._candidates & self._apart & ~use).nonzero().flatten().tolist():
            same = torch.cat([part[k] for part in self._same])
            if (wanted[same] - wanted[same].mean(0)).norm() <= noise[same].norm():
                continue
            alike = same[taken]
            blocks = gram.view(held, rows, held, rows)[alike][:, :, alike].diagonal(dim1=1, dim2=3)
            each = blocks.diagonal(dim1=0, dim2=1).mean()
            if blocks.mean() >= (1 - tolerance) * each:  # the mean of the gradients is as long as they are
                shares.append(float(same.sum()) / self._samples)
        return max(shares)


def _same(outputs: Tensor, row: Tensor) -> Tensor:
    """Return which samples have the outputs of ``row``, to a few units of rounding.

    Products in half precision are rounded once, and then agree to the bit. Some outputs may be masked by numbers that
    are far larger than the others, or infinite.
    """
    if outputs.shape[1:] != row.shape:
        return torch.zeros(len(outputs), dtype=torch.bool, device=outputs.device)
    return ((outputs == row) | ((outputs - row).abs() <= _rounding(row[None])[0])).all(2).all(1)


def _same_at_first(outputs: Tensor, rows: Tensor) -> Tensor:
    """Return, for each row, which samples have its first few outputs, as far as `_same` can tell from those."""
    if outputs.shape[1:] != rows.shape[1:]:
        return torch.zeros(len(rows), len(outputs), dtype=torch.bool, device=outputs.device)
    here, there = outputs.flatten(1)[None, :, :FIRST], rows.flatten(1)[:, None, :FIRST]
    rounding = _rounding(rows).flatten(1)[:, None, :FIRST]
    return ((here == there) | ((here - there).abs() <= rounding)).all(2)


def _rounding(rows: Tensor) -> Tensor:
    size = rows.abs().nan_to_num(0.0, 0.0, 0.0)
    eps = torch.finfo(rows.dtype).eps if rows.element_size() > 2 else 0.0
    return 4 * eps * torch.minimum(size.flatten(1).amax(1)[:, None, None], 1e3 * size)


def _slope(evaluation: Evaluation, outputs: Tensor) -> Tensor:
    """Return the gradient of each sample's loss in its outputs, on the CPU."""
    f = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(len(f) * evaluation.criterion(f), f)
    return slope.flatten(1).double().cpu()


def _by_sample(tensor: Tensor, samples: int) -> Tensor:
    """Return one row for each sample; an empty tensor where the axis of the samples is ambiguous."""
    if tensor.ndim and len(tensor) and len(tensor) % samples == 0:
        return tensor.reshape(samples, -1)
    if tensor.ndim > 1 and tensor.shape[1] == samples:
        return tensor.movedim(1, 0).reshape(samples, -1)
    return tensor.new_zeros(0)


def _differ(tensor: Tensor, row: Tensor) -> Tensor:
    if tensor.shape[1:] != row.shape:
        return torch.ones(len(tensor), dtype=torch.bool, device=tensor.device)
    return (tensor != row).any(1)
