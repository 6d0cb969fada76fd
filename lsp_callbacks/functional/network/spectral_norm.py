"""The operator norm of a layer as it is applied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import Convolution
from lsp_callbacks.linalg import Eigenpair, operator_norm
from lsp_callbacks.operators.network.weights import weight_operators
from lsp_callbacks.step.replay_checks import Call


def spectral_norm(
    layer: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    *,
    start: dict[str, Tensor] | None = None,
    output_shape: tuple[int, ...] | None = None,
    steps: int = 50,
    tol: float = 1e-3,
) -> dict[str, Eigenpair]:
    """``||A||_2`` of the linear map that a layer applies: stride, padding mode, dilation, groups and input size count.

    Args:
        layer: Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding (its matrix norm), MultiheadAttention (parts q, k,
            v, out_proj) or Hugging Face's Conv1D. Put it into eval mode if its weight is parametrised.
        input_shape: of a convolution's input, with or without a batch axis.
        start: right singular vectors of an earlier call, by part; left out where the input had another size.
        output_shape: of a transposed convolution, where it was called with ``output_size``.
        steps: at most this many pairs of products.
        tol: on the relative residual of ``A^T A``.

    Returns:
        The norm by part; the part is "" where there is one. Each is a lower bound with its residual.

    Raises:
        ValueError: for a layer that is not of these types, or a convolution without ``input_shape``.

    Cost: about ``2 / (3 B)`` gradients an iteration at batch size B.

    Source: the FFT formula (Sedghi et al. 2019) holds for circular padding and stride 1 only; the reshaped kernel's
    norm is not the convolution's. Here: Golub-Kahan-Lanczos on the map itself.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import spectral_norm
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> round(float(spectral_norm(layer)[""].value), 4)
        3.0
    """
    convolution = isinstance(layer, Convolution)
    if convolution and input_shape is None:
        raise ValueError("a convolution's norm depends on the size of its input: pass input_shape=(C, H, W)")
    operators = weight_operators(layer, Call(input_shape, output_shape))
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
    """``sum log ||W_k||``: the log of the product bound on a feedforward network's Lipschitz constant (Thm 4.1)."""
    return torch.stack(norms).double().log().sum()
