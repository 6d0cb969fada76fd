"""The Hessian of a plain module's loss as a linear operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lsp_callbacks.autograd.double_backward import double_backward
from lsp_callbacks.autograd.graph import read
from lsp_callbacks.autograd.side_effects import RandomState
from lsp_callbacks.autograd.stop_gradients import StopGradients
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import LinearOperator, norm, unit


def loss_hessian(
    module: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: tuple[Any, Any]
) -> tuple[LinearOperator, Tensor]:
    """Return ``H = d^2 L / d theta^2`` and ``g = dL / d theta`` of ``L = loss_fn(module(inputs), targets)``.

    Second derivatives are exact, reverse over reverse on one graph, which lives as long as the operator does: all
    products see the same random masks. Attention runs in PyTorch's own operations and nothing is compiled, as the
    fused kernels have no second derivative. At kinks (ReLU, max-pooling) it is the Hessian on the side that autograd
    takes; the jump of the gradient is no part of it.

    Parameters, their gradients, buffers, modes and the global random states of torch, numpy and Python are afterwards
    what they were. The module runs in the mode that it is in (BatchNorm by batch statistics and dropout active in
    training mode). What its ``forward`` or hooks do to other Python objects is not undone.

    Args:
        module: with parameters in float32 or float64, on one device; those that require a gradient count.
        loss_fn: from ``(outputs, targets)`` to a scalar.
        batch: ``(inputs, targets)``. A tuple or list of inputs is passed as arguments, a mapping as keywords.

    Returns:
        A symmetric operator ``(P, P)``, and ``(P,)``: flat, in the order of ``module.named_parameters()``.

    Raises:
        ValueError: for a batch that is not a pair.
        Unmeasurable: no parameter requires a gradient; the loss is not a finite scalar that depends on one; anything on
            the way is computed in half precision; or there is no second derivative, or one that differs from that of
            the gradients by more than 1 %: a ``torch.autograd.Function`` whose backward is not differentiable, or a
            part of the loss that depends on the parameters without a graph (``spectral_norm`` in training mode).

    Cost: one forward pass, a backward pass whose graph is kept, and a backward pass through both for each product: 3
    gradients for the first product, 2 for each further one. Source: Pearlmutter 1994.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import loss_hessian
        >>> net, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> hessian, _ = loss_hessian(net, lambda f, y: 0.5 * (f - y).square().sum(), (x, torch.zeros(2, 1)))
        >>> hessian.dense()
        tensor([[1., 0.],
                [0., 9.]])
    """
    inputs, targets = _pair(batch)
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise Unmeasurable("no parameter of the module requires a gradient: unfreeze those whose Hessian you want")

    def loss_and_gradient(values: dict[str, Tensor], *, create_graph: bool) -> tuple[Tensor, Tensor]:
        with _second_derivatives(module):
            buffers = {name: b.clone() for name, b in module.named_buffers()}  # the module's keep their values
            args, kwargs = _arguments(inputs)
            with stopped:
                loss = loss_fn(functional_call(module, {**values, **buffers}, args, kwargs), targets)
            _check_loss(loss)
            wanted = list(values.values())
            return loss, _flat(torch.autograd.grad(loss, wanted, create_graph=create_graph, materialize_grads=True))

    stopped = StopGradients()
    loss, slope = loss_and_gradient(parameters, create_graph=True)
    graph = read(loss)
    if not graph.full:
        raise Unmeasurable(
            f"the loss is computed in {graph.dtype}, which rounds second derivatives: give module.float() and float32 "
            "inputs, outside of autocast"
        )
    gradient, leaves = slope.detach(), list(parameters.values())

    def product(v: Tensor) -> Tensor:
        if not slope.requires_grad:  # the loss is linear in the parameters
            return torch.zeros_like(v)
        with _second_derivatives(module):
            return _flat(torch.autograd.grad(slope, leaves, v, retain_graph=True, materialize_grads=True))

    def difference(v: Tensor, distance: float) -> Tensor:
        """Return the central difference of the gradient along v."""
        ends = []
        for shift in (distance * v, -distance * v):
            parts = shift.split([p.numel() for p in leaves])
            moved = {
                name: (p.detach() + part.view_as(p)).requires_grad_()
                for (name, p), part in zip(parameters.items(), parts)
            }
            ends.append(loss_and_gradient(moved, create_graph=False)[1])
        return (ends[0] - ends[1]) / (2 * distance)

    size = gradient.numel()
    hessian = LinearOperator((size, size), product, product, dtype=gradient.dtype, device=gradient.device)
    doubtful = (*graph.custom, *sorted(stopped.names))
    if doubtful and not _agree(hessian, difference, gradient, _flat(leaves).detach()):
        raise Unmeasurable(
            f"the second derivative of {' and '.join(doubtful)} is not that of the gradients: part of the loss depends "
            "on the parameters without a graph (detach, no_grad, spectral_norm in training mode), or the backward of a "
            "custom function is not differentiable. Write it in differentiable operations, or try module.eval()"
        )
    return hessian, gradient


@contextlib.contextmanager
def _second_derivatives(module: nn.Module) -> Iterator[None]:
    """Choose kernels with a second derivative, keep the global random states, and name what has none."""
    state = RandomState()
    try:
        with double_backward(module):
            yield
    except RuntimeError as error:
        if "derivative" not in str(error) and "checkpoint" not in str(error).lower():
            raise
        raise Unmeasurable(
            f"the loss cannot be differentiated twice: {error}. Replace that operation by differentiable ones"
        ) from error
    finally:
        state.restore()


def _agree(
    hessian: LinearOperator, difference: Callable[[Tensor, float], Tensor], gradient: Tensor, theta: Tensor
) -> bool:
    """Return whether one product, along gradient and noise, is the central difference up to 1 %."""
    noise = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=theta.dtype).to(theta)
    v = unit(unit(noise) + unit(gradient)) if bool(gradient.any()) else unit(noise)
    exact = hessian @ v
    central = difference(v, torch.finfo(theta.dtype).eps ** (1 / 3) * max(1.0, float(norm(theta))))
    return bool(norm(exact - central) <= 0.01 * norm(central))


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(f"batch is a {type(batch).__name__}{size}: give a pair (inputs, targets)")
    return batch[0], batch[1]


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise Unmeasurable(f"loss_fn(module(inputs), targets) gave {got}: it must give one floating-point number")
    if not bool(loss.isfinite()):
        raise Unmeasurable(f"the loss is {float(loss)}: curvature is defined only where it is finite")
    if not loss.requires_grad:
        raise Unmeasurable("the loss depends on no parameter that requires a gradient (detach, or no_grad inside?)")


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
