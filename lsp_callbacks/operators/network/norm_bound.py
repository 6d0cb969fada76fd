"""The product of the layers' operator norms and activation slopes, which bounds the Jacobian of the network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.double_backward import jacobian
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.network.chain_lipschitz import chain_lipschitz
from lsp_callbacks.linalg import norm
from lsp_callbacks.operators.network.depth import Depth


def norm_bound(
    network: Depth,
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...] | None],
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return ``sum_k log (||W_k|| slope_k)`` over the layers of a network, the bound of Thm 4.1 times L.

    Whether the network is the chain of its modules is checked at the samples: a random vector, pushed through the
    modules alone, must be ``dX_k/dX_0 v`` at each depth.

    Args:
        network: its states.
        modules: by name, in eval mode.
        shapes: of the input of each, samples first.
        generator: of the random starts; a fixed seed otherwise.

    Raises:
        Unmeasurable: a layer that has no bound, with the reason: a module (attention, LayerNorm), a function called
            between modules, a path around it.
    """
    J = network.jacobian(len(network.layers))
    v = image = torch.randn(*J.batch, J.shape[1], generator=torch.Generator().manual_seed(0), dtype=J.dtype).to(
        J.device
    )
    state, axis, total = network.start, network.axis, torch.zeros((), dtype=torch.float64)
    for k, layer in enumerate(network.layers, start=1):
        if axis or layer.axis:
            raise Unmeasurable(f"layer {layer.name!r}: its samples are not on the first axis: put them there")
        sizes = [None if (shape := shapes.get(name)) is None else shape[1:] for name in layer.modules]
        x = state.detach().requires_grad_()
        try:
            bound, y = chain_lipschitz([modules[name] for name in layer.modules], x, sizes, generator=generator)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any error of a user's module, called outside of its network
            raise Unmeasurable(f"layer {layer.name!r}: {error}") from None
        image, real = jacobian(y, x, axes=(0, 0)) @ image, network.between(k, 0) @ v
        if image.shape != real.shape or not _close(image, real):
            raise Unmeasurable(
                f"layer {layer.name!r} does more than its modules (a function between them, a sum): use modules only, "
                "or leave the norm bound out"
            )
        total = total + bound.log()
        state, axis = layer.state, layer.axis
    return total


def _close(image: Tensor, real: Tensor) -> bool:
    difference, size = norm(image - real, -1), norm(real, -1)
    return bool((difference <= 1e-3 * size).all())
