"""Whether a criterion that the user has given is the loss that training differentiates."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd.graph import read
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.linalg import norm
from lsp_callbacks.step.batch import batch_size, samples_between
from lsp_callbacks.step.flat import flatten

#: Steps at which it is used that are looked at: the first, second, fourth, ... up to this, then every so many.
LOOKED_AT = 32
#: Units of rounding of the samples' own gradients by which two gradients may differ.
UNITS = 64
SUMS = "criterion sums over the samples, where a mean is needed: return their mean times the size of the batch"
WAY_OUT = (
    "let criterion return the whole loss of the step, as a mean over the samples; where some of it does not depend on "
    "the outputs (a weight penalty: use the optimizer's weight_decay), leave forward_fn and criterion out, and look at "
    "courant_gd, which knows all of it"
)


class CriterionCheck:
    """Refuses a criterion whose gradient is not that of the step's own loss.

    The curvature of another loss would be measured, and a term that is missing has none in it. Gradients are compared,
    not values: a constant changes nothing. At a minimum of the missing term both are the same; the second step that is
    looked at leaves it.

    A criterion that was refused is looked at again at each step at which it would be used.
    """

    def __init__(self) -> None:
        self._used, self._reason = 0, ""
        self._seen: Callable[[], Any] = lambda: None

    def require(self, step: object, reason: Callable[[], str]) -> None:
        """Look at a step's criterion if that is due; once for all who use it.

        Args:
            step: under way.
            reason: returns why the criterion is another loss; empty where it is not.

        Raises:
            Unsupported: with that reason.

        Cost: two gradients at the steps that are looked at.
        """
        if self._seen() is not step:
            self._seen = weakref.ref(step)
            self._used += 1
            is_power = not self._used & (self._used - 1)
            if self._reason or self._used % LOOKED_AT == 0 or (is_power and self._used < LOOKED_AT):
                self._reason = reason()
        if self._reason:
            raise Unsupported(self._reason)


def why_other(
    loss: Callable[[], Tensor],
    outputs: Callable[[], Tensor],
    criterion: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
) -> str:
    """Return why a criterion of the outputs is not the loss of the same batch; empty where rounding explains the rest.

    Args:
        loss: returns what training differentiates, with its graph.
        outputs: returns those of the same module at the same batch, with theirs.
        criterion: of these.
        parameters: of the module.

    Cost: two gradients.
    """
    value = loss()
    if not isinstance(value, Tensor) or not value.requires_grad:
        return ""  # it is told elsewhere that there is no gradient
    graph_of_step, true = read(value), _gradient(value, parameters)
    f = outputs()
    if not isinstance(f, Tensor) or not f.requires_grad:
        return ""  # likewise
    given = criterion(f)
    told = _gradient(given, parameters, keep=True)
    size, other, difference = norm(true), norm(told), norm(true - told)
    graphs = graph_of_step, read(given)
    if not bool(difference > (1e-2 if all(graph.full for graph in graphs) else 0.1) * size):
        return ""  # nor is it said here that one of them is not finite
    # Where the samples' gradients cancel each other, what is left of them may be their rounding.
    (slope,) = torch.autograd.grad(given, f, retain_graph=True)
    signs = torch.randint(0, 2, (len(f), *[1] * (f.ndim - 1)), generator=torch.Generator().manual_seed(0))
    uncancelled = norm(_gradient(f, parameters, slope * (2 * signs - 1).to(slope)))
    if bool(difference <= UNITS * max(torch.finfo(graph.dtype).eps for graph in graphs) * uncancelled):
        return ""
    cosine = float(true.double() @ told.double() / (size * other).clamp_min(1e-300))
    which = (
        f"the loss is {float(size / other):.4g} times the criterion (a factor, or another reduction)"
        if cosine > 1 - 1e-4
        else "it has a further term (a penalty, another head), or other targets or random numbers"
    )
    return (
        "criterion(forward_fn(module, batch), batch) is not the loss that training differentiates: on the step's own "
        f"batch the norm of its gradient is {float(other):.4g}, that of the loss {float(size):.4g}, their cosine "
        f"{cosine:.4f}: {which}. Its curvature would not be that of training: {WAY_OUT}"
    )


def is_sum(criterion: Callable[[Tensor, Any], Tensor], outputs: Tensor, batch: Any) -> bool:
    """Return whether the values of a criterion at two halves of a batch add up to that at the batch.

    Args:
        criterion: ``(outputs, batch) -> loss``.
        outputs: of the batch.
        batch: with its targets.
    """
    size = batch_size(batch) or 0
    half = size // 2
    if not half or not outputs.ndim or len(outputs) % size:
        return False
    each = len(outputs) // size
    parts = ((outputs[: half * each], 0, half), (outputs[half * each :], half, size))
    try:
        with torch.no_grad():
            halves = sum(float(criterion(f, samples_between(batch, lo, hi))) for f, lo, hi in parts)
            whole = float(criterion(outputs, batch))
    except Exception:  # whatever the user's function raises of half of a batch
        return False
    return abs(halves - whole) < 0.25 * abs(whole)


def _gradient(
    value: Tensor, parameters: list[nn.Parameter], cotangent: Tensor | None = None, *, keep: bool = False
) -> Tensor:
    parts = torch.autograd.grad(value, parameters, cotangent, retain_graph=keep, allow_unused=True)
    return flatten(parts, parameters)
