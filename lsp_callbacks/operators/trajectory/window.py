"""A window of past training steps as one linear operator, in both directions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.shifted_parameters import restored
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator, push
from lsp_callbacks.linalg.logs import exp
from lsp_callbacks.operators.curvature.hessian import Method, products_so_far
from lsp_callbacks.operators.trajectory.optimizer_copy import held
from lsp_callbacks.operators.trajectory.proximal import update_jacobian, update_response
from lsp_callbacks.operators.trajectory.update_rules import formula, formula_of
from lsp_callbacks.step.flat import split
from lsp_callbacks.step.replay_checks import replayed_gradient
from lsp_callbacks.step.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class KeptStep:
    """A step whose derivative can be computed after parameters and optimizer have moved on.

    Attributes:
        snapshot: with copies of its gradient and of the optimizer's state.
        theta: copies of its parameters.
        method: of its Hessian products.
    """

    snapshot: Snapshot
    theta: list[Tensor]
    method: Method
    _again: list[tuple[Snapshot, LinearOperator, LinearOperator]] = field(default_factory=list, init=False, repr=False)

    def maps(self) -> tuple[LinearOperator, LinearOperator]:
        """Return `update_jacobian` and `update_response` by new replays, while the parameters are ``theta``.

        Differences of gradients under SGD keep three vectors, and serve all passes; what would keep a graph, or the
        diagonals of a preconditioner, is made for each pass anew.
        """
        if self._again:
            again, A, B = self._again[0]
            if not products_so_far(again).untrusted:
                return A, B
            self._again.clear()
        again = replace(self.snapshot)
        again.verified.graph = self.snapshot.verified.graph  # of the code: the same in each replay
        A, B = update_jacobian(again, method=self.method), update_response(again)
        if self.is_light:
            self._again.append((again, A, B))
        return A, B

    @property
    def is_light(self) -> bool:
        """Whether the derivative takes few vectors beside the step's own."""
        rule = formula(self.snapshot.require_optimizer())
        return self.method == "finite_difference" and rule.second_moment is None and not rule.couples


def keep(snapshot: Snapshot, method: Method) -> KeptStep:
    """Return a copy of all that the derivative of a step needs.

    Its replay is checked later against the loss and the gradient that the step has now.

    Args:
        snapshot: a step, before its update.
        method: of the Hessian products, resolved.

    Raises:
        Unmeasurable: an optimizer without a formula, whose step has no adjoint; one that cannot be copied; products in
            half precision, which are too coarse for bounds.

    Cost: memory of the parameters, their gradient and the optimizer's state; one gradient where the snapshot has no
    loss or gradient.
    """
    optimizer = snapshot.require_optimizer()
    kind = type(optimizer).__name__
    if formula_of(optimizer) is None:
        raise Unmeasurable(f"the step of {kind} is differentiated by differences, which give no adjoint")
    if not snapshot.graph.full:
        raise Unmeasurable("products in half precision are too coarse for a bound: train some steps in float32")
    try:
        frozen = copy.deepcopy(optimizer, {id(p): p for p in held(optimizer)})
    except Exception as error:  # any error of a subclass
        raise Unmeasurable(f"{kind} cannot be copied ({type(error).__name__}: {error})") from None
    loss, gradient = snapshot.loss, snapshot.gradient
    if loss is None or gradient is None:
        replayed, flat = replayed_gradient(snapshot)
        parts = split(flat, list(snapshot.parameters.values()))
        loss = replayed if loss is None else loss
        gradient = dict(zip(snapshot.parameters, parts)) if gradient is None else gradient
    kept = replace(
        snapshot,
        optimizer=frozen,
        loss=loss.detach().clone(),
        gradient={name: None if g is None else g.detach().clone() for name, g in gradient.items()},
        probes=None,
    )
    kept.verified.graph = snapshot.graph
    return KeptStep(kept, [p.detach().clone() for p in snapshot.parameters.values()], method)


@dataclass(frozen=True, eq=False)
class Window:
    """``M = A_T ... A_1`` from the parameters at the start to those at the end, and ``L`` from the noise of each step.

    ``L (xi_1, ..., xi_T) = sum_s A_T ... A_(s+1) B_s xi_s``, see `update_jacobian` and `update_response`. Each pass
    sets the parameters to those of one step after the other, replays it, and restores every bit at its end.

    Attributes:
        steps: in their order.
        logs: each ``A_t`` is divided by ``exp(logs[t])``, so that no window overflows.
        noise_log: L is divided by its exponential.

    Cost: a replay and a Hessian product for each row, step and direction.
    """

    steps: Sequence[KeptStep]
    logs: Sequence[float]
    noise_log: float = 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the network."""
        return list(self.steps[0].snapshot.parameters.values())

    def forward(self, rows: Tensor, noise: Sequence[Tensor] = ()) -> Tensor:
        """Apply ``M`` to each row, ``(r, P)``; where there is noise, add L of it to the last one."""
        z = rows
        with placed(self.parameters) as place:
            for t, step in enumerate(self.steps):
                place(step.theta)
                A, B = step.maps()
                z = exp(-self.logs[t]) * push(A, _padded(z, A.shape[1]))
                if noise:
                    z[-1] += self._reach(t) * (B @ noise[t])
        return z[:, : rows.shape[1]]

    def backward(self, rows: Tensor, driven: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Apply ``M^T`` to each row; and, if ``driven``, ``L^T`` to the last, step by step."""
        a, noise = rows, []
        with placed(self.parameters) as place:
            for t, step in reversed(list(enumerate(self.steps))):
                place(step.theta)
                A, B = step.maps()
                a = _padded(a, A.shape[0])
                if driven:
                    noise.append(self._reach(t) * (B.T @ a[-1]))
                a = exp(-self.logs[t]) * push(A.T, a)
        return a[:, : rows.shape[1]], noise[::-1]

    def _reach(self, t: int) -> float:
        """Return the factor that undoes the scaling of the steps after t for its noise, less ``noise_log``."""
        return exp(sum(self.logs[t + 1 :]) - self.noise_log)


def squares(window: Window, readers: Sequence[LinearOperator]) -> LinearOperator:
    """Return ``M M^T``, ``J M M^T J^T`` for each reader J of the parameters at the end, and ``L L^T``: a batch.

    Vectors are as long as the longest of them, ``max(P, m_1, ...)``: the others are 0 beyond their length.

    Cost: two passes through the window, of all rows together.
    """
    P = sum(p.numel() for p in window.parameters)
    p = window.parameters[0]
    dtype = torch.promote_types(p.dtype, torch.float32)
    n = max([P, *(J.shape[0] for J in readers)])

    def apply(u: Tensor) -> Tensor:
        ends = [u[0, :P], *(_as(J.T @ x[: J.shape[0]].to(J.dtype), u) for J, x in zip(readers, u[1:])), u[-1, :P]]
        starts, noise = window.backward(torch.stack(ends), driven=True)
        starts[-1] = 0.0  # noise begins in the steps
        z = window.forward(starts, noise)
        images = [z[0], *(_as(J @ row.to(J.dtype), u) for J, row in zip(readers, z[1:])), z[-1]]
        return torch.stack([_padded(image, n) for image in images])

    return LinearOperator((n, n), apply, apply, batch=(len(readers) + 2,), dtype=dtype, device=p.device)


@contextlib.contextmanager
def placed(parameters: list[nn.Parameter]) -> Iterator[Callable[[list[Tensor]], None]]:
    """Yield a function that sets parameters to other values; every bit is restored at the end."""

    def place(values: list[Tensor]) -> None:
        for p, value in zip(parameters, values):
            p.data.copy_(value)

    with restored(parameters):
        yield place


def _padded(rows: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, length - rows.shape[-1]))


def _as(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like)
