"""The operator norm of a layer as it is applied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import number, whole
from lsp_callbacks.autograd._torch_internals import Convolution
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.curvature.condition import SMALL
from lsp_callbacks.functional.network.layer_operators import in_eval_mode, weight_operators
from lsp_callbacks.linalg import Eigenpair, operator_norm, top_between

#: Probability, over the random start, that the norm lies further above the returned value than the tolerance says.
FAILURE = 1e-3
_LAYERS = "a Linear, Conv, ConvTranspose, Embedding or transformers' Conv1D"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def spectral_norm(
    layer: nn.Module, input_size: int | Sequence[int] | None = None, *, tol: float = 1e-3, steps: int = 500
) -> Tensor:
    """Return ``||A||_2``, the largest stretch of a difference of two inputs by the linear map A that a layer applies.

    The norm of a convolution is that of the operator, with its stride, padding mode, dilation, groups and input size.
    It is neither the norm of the reshaped kernel nor, but for circular padding and stride 1, what Fourier transforms
    give. An embedding counts with its whole matrix.

    Args:
        layer: a Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding or transformers' Conv1D. It is left as it is;
            a parametrised weight is taken as eval mode shows it.
        input_size: of a convolution, along its spatial axes: ``(H, W)`` of a Conv2d. One number is taken for each axis.
        tol: relative: the norm is at most ``1 + tol`` times the value, with probability 0.999 over a random start
            that is the same at each call.
        steps: at most this many pairs of products.

    Returns:
        ``()``, float64, without a graph; exact up to rounding where a side of A has at most 256 numbers, otherwise from
        below.

    Raises:
        ValueError: for another layer, an argument out of its range, or a convolution without ``input_size``.
        Unmeasurable: where the weight is not finite, or ``steps`` do not reach ``tol``; the message has both bounds.

    Cost: some 20 to 150 pairs of a forward and a backward pass of one sample through the layer, and the memory of as
    many of its inputs.

    Source: Golub & Van Loan, Matrix Computations, 10.4; `lsp_callbacks.linalg.spectrum_bounds` for the bound.
    docs/theory.md, section Layers, for what the other two norms give.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import spectral_norm
        >>> conv = torch.nn.Conv2d(1, 1, kernel_size=3, padding=1)
        >>> _ = torch.nn.init.constant_(conv.weight, 1 / 9)  # the mean of a neighbourhood
        >>> round(float(spectral_norm(conv, input_size=(8, 8))), 4)  # ((1 + 2 cos(pi / 9)) / 3)^2
        0.9212
    """
    number("tol", tol, above=0, most=1), whole("steps", steps, 2)
    shape = _input_shape(layer, input_size)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in layer.parameters()):
        raise ValueError(f"layer={layer!r} has no weights yet: run one forward pass first")
    with torch.no_grad(), in_eval_mode(layer):
        parts = weight_operators(layer, shape)
        if set(parts) != {""}:
            held = f"holds {len(parts)} linear maps ({', '.join(parts)})" if parts else "has no known linear map"
            other = "; weight_norms(layer) returns the norm of each" if parts else ""
            raise ValueError(f"layer={layer!r} {held}: give {_LAYERS}{other}")
        operator = parts[""]
        if operator.dtype.is_complex:
            raise ValueError(f"layer={layer!r} has complex weights: give a layer with real ones")
        if min(operator.shape) <= SMALL:
            matrix = operator.T.dense() if operator.shape[0] < operator.shape[1] else operator.dense()
            _require_finite(matrix)
            return torch.linalg.svdvals(matrix.double())[0].cpu()
        side = operator if operator.shape[1] <= operator.shape[0] else operator.T
        ritz, upper = top_between(side.T @ side, steps=steps, ratio=(1 + tol) ** 2, failure=FAILURE)
    value, upper = ritz.values[-1].clamp_min(0).sqrt(), upper.clamp_min(0).sqrt()
    _require_finite(value)
    if not bool(upper <= (1 + tol) * value):
        raise Unmeasurable(
            f"after steps={steps} the norm lies between {float(value):.6g} and {float(upper):.6g}, which is wider than "
            f"tol={tol}: give more steps, or a larger tol"
        )
    return value


def weight_norms(
    layer: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    *,
    start: dict[str, Tensor] | None = None,
    output_shape: tuple[int, ...] | None = None,
    steps: int = 50,
    tol: float = 1e-3,
) -> dict[str, Eigenpair]:
    """Return ``||A||_2`` of each linear map that a layer applies, by Lanczos that may start from earlier vectors.

    Args:
        layer: as in `spectral_norm`, or MultiheadAttention (parts q, k, v, out_proj). Put it into eval mode if its
            weight is parametrised.
        input_shape: of a convolution's input, with or without a batch axis.
        start: right singular vectors of an earlier call, by part; ignored where the input had another size.
        output_shape: of a transposed convolution, where it was called with ``output_size``.
        steps: at most this many pairs of products.
        tol: on the relative residual of ``A^T A``.

    Returns:
        The norm by part; the part is "" where there is one. Each is a lower bound with its residual.

    Raises:
        ValueError: for a layer that is not of these types, or a convolution without ``input_shape``.

    Cost: about ``2 / (3 B)`` gradients an iteration at batch size B.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import weight_norms
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> round(float(weight_norms(layer)[""].value), 4)
        3.0
    """
    convolution = isinstance(layer, Convolution)
    if convolution and input_shape is None:
        raise ValueError("a convolution's norm depends on the size of its input: pass input_shape=(C, H, W)")
    operators = weight_operators(layer, input_shape, output_shape)
    if not operators:
        raise ValueError(
            f"{type(layer).__name__} is not a layer with a known linear part: pass a Linear, Conv, "
            "ConvTranspose, Embedding or MultiheadAttention"
        )
    # The vector of a convolution on inputs of another size is of no use.
    starts = {part: v for part, v in (start or {}).items() if v.shape[-1] == operators[part].shape[1]}
    return {
        part: operator_norm(operator, starts.get(part), steps=steps, tol=tol) for part, operator in operators.items()
    }


def log_sum(norms: list[Tensor]) -> Tensor:
    """Return ``sum log ||W_k||``, the log of the product bound on a feedforward network's Lipschitz constant.

    Source: Katende 2025, Thm 4.1.
    """
    return torch.stack(norms).double().log().sum()


def _input_shape(layer: nn.Module, size: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if not isinstance(layer, _CONVOLUTIONS):
        if size is not None:
            raise ValueError(f"input_size={size!r}: only the norm of a convolution depends on it, leave it out")
        return None
    axes = len(layer.kernel_size)
    if size is None:
        raise ValueError(
            "input_size=None: the norm of a convolution depends on the size of its input, give "
            f"{'one number' if axes == 1 else f'{axes} numbers'}, one for each spatial axis"
        )
    sizes = (size,) * axes if isinstance(size, int) else tuple(size)
    if len(sizes) != axes:
        raise ValueError(f"input_size={size!r}: give {axes} numbers, the spatial axes without batch and channels")
    return (layer.in_channels, *(whole("input_size", n, 1) for n in sizes))


def _require_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise Unmeasurable("the layer's weight is not finite: its norm is not defined")
