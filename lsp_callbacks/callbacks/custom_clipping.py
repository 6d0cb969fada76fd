"""How a user's own ``configure_gradient_clipping`` clips, found by trying it on copies of the gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.shifted_parameters import restored
from lsp_callbacks.autograd.side_effects import muted
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.gradient_check import Gradients
from lsp_callbacks.step.clipping import Clipping

#: Sizes at which it is tried, relative to the step's gradient, and the relative difference that is rounding.
SIZES, TOLERANCE = (1.0, 0.5, 2.0, 0.01, 100.0), 1e-4


@contextlib.contextmanager
def _put_back(parameters: list[nn.Parameter], optimizer: Any) -> Iterator[None]:
    gradients = [(p, p.grad) for p in parameters]
    options = [(group, dict(group)) for group in optimizer.param_groups]
    try:
        with restored(parameters):
            yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        for group, before in options:
            group.clear()
            group.update(before)


def custom_clipping(trainer: Any, reset: Callable[[], nn.Module], optimizer: Any) -> tuple[Clipping | None, Gradients]:
    """Return how ``configure_gradient_clipping`` clips, and the gradients that the step will have after it.

    The limit is read off a very large gradient, and the rule is then compared with what the method makes of gradients
    of several sizes and of another direction. It is called on a copy of the module, whose parameters are the real ones:
    these, their gradients and the options of the optimizer are put back.

    Args:
        trainer: Lightning's.
        reset: gives the copy of the module as it was before the step.
        optimizer: that the method is given.

    Raises:
        Unmeasurable: if it clips neither by the norm over all of the optimizer's parameters nor by value.

    Cost: no gradient; ten calls of the method.
    """
    module = reset()
    parameters = [p for p in module.parameters() if p.grad is not None]
    of_step = [p.grad.detach().clone() for p in parameters if p.grad is not None]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    moving = [id(p) in held for p in parameters]

    def apply(gradients: list[Tensor]) -> list[Tensor]:
        for p, g in zip(parameters, gradients):
            p.grad = g.clone()
        with muted():
            reset().configure_gradient_clipping(  # type: ignore[operator]
                optimizer,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def flat(gradients: list[Tensor]) -> Tensor:
        parts = [g.to_dense().double().reshape(-1) for g, moves in zip(gradients, moving) if moves]
        return torch.cat(parts) if parts else torch.zeros(0)

    generator = torch.Generator().manual_seed(0)  # the global one is left alone
    noise = [torch.randn(g.shape, generator=generator).to(g.device, g.dtype) for g in of_step]
    length = float(torch.linalg.vector_norm(flat(of_step)))
    across = [(length or 1.0) / max(float(torch.linalg.vector_norm(flat(noise))), 1e-30) * g for g in noise]
    top = max((float(g.abs().max()) for g in across if g.numel()), default=1.0)
    most = 1e4 if any(g.dtype == torch.float16 for g in of_step) else 1e8
    huge = [most / max(top, 1e-30) * g for g in across]
    with _put_back(parameters, optimizer):
        if not math.isfinite(length):  # it cannot be tried on this step, and that is no fault of the method
            return None, dict(zip(parameters, apply(of_step)))
        rule = _limit(flat(huge), flat(apply(huge)))
        for gradients in (huge, across, *([size * g for g in of_step] for size in SIZES)):
            before, after = flat(gradients), flat(apply(gradients))
            expected = before if rule is None else rule(before)
            if not bool(torch.linalg.vector_norm(after - expected) <= TOLERANCE * torch.linalg.vector_norm(expected)):
                raise Unmeasurable(
                    f"{type(module).__name__}.configure_gradient_clipping makes of the gradient what is clipping "
                    "neither by the norm over all of the optimizer's parameters nor by value: the derivative of that "
                    "is not modelled. Clip by self.clip_gradients(...)"
                )
        return rule, dict(zip(parameters, apply(of_step)))


def _limit(before: Tensor, after: Tensor) -> Clipping | None:
    """Return the clipping that makes ``after`` of ``before``; None if there is none."""
    norms = torch.linalg.vector_norm(before), torch.linalg.vector_norm(after)
    if not bool(torch.isfinite(after).all()) or not len(before) or float(norms[1]) == 0:
        return None
    if bool(torch.linalg.vector_norm(after - before) <= TOLERANCE * norms[0]):
        return None
    scaled = before * (norms[1] / norms[0])
    if bool(torch.linalg.vector_norm(after - scaled) <= TOLERANCE * norms[1]):
        return Clipping(float(norms[1] / norms[0] * (norms[0] + 1e-6)))
    return Clipping(float(after.abs().max()), "value")
