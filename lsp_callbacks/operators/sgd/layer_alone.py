"""Per-sample gradients of a layer that no rule covers: the layer is run again on one sample at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lsp_callbacks.autograd._torch_internals import tree_flatten, tree_unflatten
from lsp_callbacks.operators.sgd.layer_rules import Gradients, Use

if TYPE_CHECKING:
    from lsp_callbacks.operators.sgd.per_sample_gradients import Call

#: Numbers of per-sample gradients that are held of a layer that is run again on one sample at a time.
HELD_ALONE = 2**25


def layer_alone(
    call: Call, passes: list[tuple[Tensor, ...]], samples: int, names: list[str], taken: Tensor | None
) -> dict[str, Use]:
    """Run the layer again on one sample at a time, and differentiate it with respect to its parameters alone."""
    module = call.module
    first = 1 if getattr(module, "batch_first", True) is False else 0

    def axis(t: Any) -> int | None:
        """Return the axis of the samples: recurrent layers have them first in some tensors, second in others."""
        axes = (a for a in (first, 1 - first) if isinstance(t, Tensor) and t.ndim > a and t.shape[a] == samples)
        return next(axes, None)

    def at(t: Any, i: int) -> Any:
        a = axis(t)
        return t if a is None else t.narrow(a, i, 1)

    leaves, spec = tree_flatten((call.args, call.kwargs))
    differentiable = [isinstance(t, Tensor) and t.requires_grad for t in call.outputs]
    if all(axis(t) is None for t in leaves) or any(axis(g) is None for g in passes[0]):
        return {}
    parameters = {name: p for name, p in module.named_parameters() if name in names}

    numbers = samples * len(passes) * sum(p.numel() for p in parameters.values())

    # All are held where there is room: otherwise each parameter of the layer needs them anew.
    @functools.lru_cache(maxsize=samples if numbers <= HELD_ALONE else 1)
    def sample_gradients(i: int) -> list[Tensor]:
        """Return the gradients of sample i, ``(R, P)`` by parameter."""
        args, kwargs = tree_unflatten([at(t, i) for t in leaves], spec)
        with torch.enable_grad(), _in_modes(call.modes):
            out = tree_flatten(functional_call(module, dict[str, Tensor](parameters), args, kwargs))[0]
            outputs = [t for t, d in zip(out, differentiable) if d]
        rows = []
        for grads in passes:
            parts = torch.autograd.grad(
                outputs, list(parameters.values()), [at(t, i) for t in grads], retain_graph=True, materialize_grads=True
            )
            rows.append([p.reshape(-1) for p in parts])
        return [torch.stack(column) for column in zip(*rows)]

    def gradients(k: int) -> Gradients:
        indices = range(samples) if taken is None else taken.tolist()
        return lambda lo, hi: torch.stack([sample_gradients(i)[k] for i in indices[lo:hi]])

    return {name: Use(gradients(k), len(passes), path="layer") for k, name in enumerate(parameters)}


@contextlib.contextmanager
def _in_modes(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Put modules in training or eval mode as given, and back at the end."""
    now = [module.training for module, _ in modes]
    try:
        for module, training in modes:
            module.training = training
        yield
    finally:
        for (module, _), training in zip(modes, now):
            module.training = training
