"""A bound on the Lipschitz constant of modules applied one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.double_backward import jacobian
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.network.activations import activation_lipschitz
from lsp_callbacks.linalg import operator_norm

#: Probability with which one norm may exceed its bound.
FAILURE = 1e-3
#: Affine in eval mode; compared by ``forward``, which subclasses may have changed.
AFFINE = {
    kind.forward
    for kind in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.BatchNorm1d, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
        nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
        nn.Upsample, nn.PixelShuffle, nn.ZeroPad2d,
    )
}  # fmt: skip
#: With the number of their dimensions.
MAX_POOLING = {nn.MaxPool1d.forward: 1, nn.MaxPool2d.forward: 2, nn.MaxPool3d.forward: 3}


def chain_lipschitz(
    modules: Sequence[nn.Module],
    x: Tensor,
    shapes: Sequence[tuple[int, ...] | None] | None = None,
    *,
    steps: int = 50,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a bound on the Lipschitz constant of modules applied one after another in eval mode.

    It holds whatever their input. Runs of affine modules are one operator, whose norm is measured: a normalisation
    by running statistics is folded into its layer, and a convolution is taken with its stride, padding and input size.
    Activations count by their steepest slope, max-pooling by the windows that an input may lie in.

    Args:
        modules: in eval mode.
        x: an input, ``(samples, ...)``; only its shape matters for the bound.
        shapes: what each module is called with, without the samples; None takes what the one before gives.
        steps: at most this many pairs of products a norm.
        tol: on their relative residuals.
        generator: of the random starts; a fixed seed otherwise.

    Returns:
        The bound, each norm from above with probability 0.999 (`lsp_callbacks.linalg.spectrum_bounds`), and the output,
        with a graph where ``x`` has one.

    Raises:
        Unmeasurable: a module without such a bound (attention, LayerNorm, ...); it is named.

    Cost: an operator norm of one sample for each run of affine modules.

    Source: Katende 2025, Thm 4.1, (D_k W_k), with slopes that may exceed 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lsp_callbacks.functional import chain_lipschitz
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> bound, _ = chain_lipschitz([layer, nn.Sigmoid()], torch.zeros(1, 2))
        >>> round(float(bound), 4)
        0.75
    """
    bound, y = torch.ones((), dtype=torch.float64), x
    start = end = y[:1].detach().requires_grad_()  # of a run of affine modules
    for module, shape in zip(modules, shapes or [None] * len(modules)):
        if shape is not None and y.shape[1:] != shape and y[:1].numel() == math.prod(shape):
            y, end = y.reshape(-1, *shape), end.reshape(-1, *shape)  # a view between two modules
        affine = _affine(module)
        if not affine:
            bound = bound * _norm(end, start, steps, tol, generator) * _lipschitz(module)
        y = module(y.clone())  # it may work in place
        if affine:
            end = module(end.clone())
        else:
            start = end = y[:1].detach().requires_grad_()
    return bound * _norm(end, start, steps, tol, generator), y


def _affine(module: nn.Module) -> bool:
    if getattr(module, "running_mean", ...) is None:  # by the statistics of the batch, also in eval mode
        return False
    return type(module).forward in AFFINE or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _lipschitz(module: nn.Module) -> float:
    """Return the Lipschitz constant of a module that is not affine.

    Raises:
        Unmeasurable: where no constant is known.
    """
    dims = MAX_POOLING.get(type(module).forward)
    if dims is not None:
        sizes = (getattr(module, name) for name in ("kernel_size", "stride", "dilation"))
        each = zip(*(size if isinstance(size, tuple) else (size,) * dims for size in sizes))
        # An input is the largest of at most so many windows.
        return math.prod(k if d > 1 else -(-k // s) for k, s, d in each) ** 0.5
    slope = activation_lipschitz(module)
    if slope is None:
        raise Unmeasurable(f"{type(module).__name__} has no Lipschitz constant that is known")
    return slope


def _norm(end: Tensor, start: Tensor, steps: int, tol: float, generator: torch.Generator | None) -> Tensor:
    if end is start:
        return torch.ones((), dtype=torch.float64)
    J = jacobian(end, start, axes=(0, 0))
    side = J if J.shape[1] <= J.shape[0] else J.T
    upper = operator_norm(side, steps=steps, tol=tol, failure=FAILURE, generator=generator).upper
    assert upper is not None
    return upper.max()
