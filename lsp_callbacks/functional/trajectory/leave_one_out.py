"""How a run answers to a change of the weight of one training sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg import LinearOperator, push


def data_response(steps: Iterable[tuple[LinearOperator, LinearOperator, Tensor | None]]) -> Tensor:
    """Return the derivative of the state by a lost weight: ``r_{t+1} = A_t r_t - R_t s_t``, from ``r_0 = 0``.

    Args:
        steps: for each the Jacobian ``A_t`` of its update, ``R_t`` its derivative with respect to the gradient, see
            `lsp_callbacks.operators.step_response`, and the gradients ``s_t`` of the samples' shares in the batch's
            loss, ``(m, P)``; None where the samples have none.

    Returns:
        ``(m, n)``, of the whole state, by sample.

    Raises:
        ValueError: where no step has a share.

    Cost: m products with A_t a step.

    Example:
        >>> import torch
        >>> from lsp_callbacks.linalg import from_matrix
        >>> A, R, share = from_matrix(torch.tensor([[0.5]])), from_matrix(torch.tensor([[-0.1]])), torch.tensor([[2.0]])
        >>> data_response([(A, R, share), (A, R, None)])  # 0.5 * 0.1 * 2
        tensor([[0.1000]])
    """
    state: Tensor | None = None
    for jacobian, response, share in steps:
        state = responded(state, jacobian, None if share is None else -push(response, share))
    if state is None:
        raise ValueError("no step has a share: there is nothing to respond to")
    return state


def responded(state: Tensor | None, jacobian: LinearOperator, forced: Tensor | None) -> Tensor | None:
    """Return one step of `data_response`, ``A r + forced``; None stands for 0."""
    moved = None if state is None else push(jacobian, state)
    if moved is None or forced is None:
        return forced if moved is None else moved
    return moved + forced


@dataclass(frozen=True)
class LeaveOneOutResult:
    """The response of a run to a smaller weight of one sample, over some samples, per unit of weight (1 removes it).

    Attributes:
        parameters: mean of ``||d theta||``.
        parameters_error: its standard error over the samples; NaN for one.
        parameters_max: the largest, a lower bound of that over all samples.
        loss: mean rise of the sample's own loss.
        loss_error: its standard error.
        loss_max: the largest |change| of the own loss.
    """

    parameters: Tensor
    parameters_error: Tensor
    parameters_max: Tensor
    loss: Tensor
    loss_error: Tensor
    loss_max: Tensor


def leave_one_out(displacements: Tensor, gradients: Tensor) -> LeaveOneOutResult:
    """Return a summary of the responses of some samples.

    Args:
        displacements: ``(m, P)``, the derivative of the parameters with respect to the weight that sample i loses.
        gradients: ``(m, P)``, of each sample's own loss at the end.

    Returns:
        Numbers in float64.

    Source: Bousquet & Elisseeff 2002, definitions 3 and 6, in first order; Hardt, Recht & Singer 2016; Koh & Liang
    2017 for the converged run.
    """
    size = torch.linalg.vector_norm(displacements.double(), dim=-1)
    rise = (displacements.double() * gradients.double()).sum(-1)
    return LeaveOneOutResult(size.mean(), _error(size), size.max(), rise.mean(), _error(rise), rise.abs().max())


def _error(values: Tensor) -> Tensor:
    return values.std() / len(values) ** 0.5 if len(values) > 1 else values.new_tensor(torch.nan)
