"""The criterion that separates a network's outputs from its loss."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lsp_callbacks.autograd.graph import depends_beside
from lsp_callbacks.autograd.graph_pull import UnknownGraph
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.step.composed_criterion import composed

HOW = (
    "pass forward_fn=lambda module, batch: outputs, shaped (samples, ..., classes), and "
    "criterion=lambda outputs, batch: loss, the mean over the samples (for instance "
    "forward_fn=lambda module, batch: module(batch[0]) and "
    "criterion=lambda outputs, batch: torch.nn.functional.mse_loss(outputs, batch[1]))"
)


@dataclass(frozen=True)
class Evaluation:
    """One forward pass on some samples.

    Attributes:
        outputs: ``(samples, positions, classes)`` with its graph; positions are tokens or pixels, otherwise one.
        criterion: from such outputs to the loss that training minimises, a mean over the samples.
    """

    outputs: Tensor
    criterion: Callable[[Tensor], Tensor]


def evaluation(outputs: Tensor, criterion: Callable[[Tensor], Tensor], *, samples: int) -> Evaluation:
    """Return outputs of shape ``(samples, ..., classes)`` or ``(samples * positions, classes)`` in one form.

    Raises:
        Unsupported: if the outputs cannot be divided among the samples.
    """
    if not isinstance(outputs, Tensor) or not outputs.requires_grad:
        raise Unsupported(f"the outputs do not depend on the parameters: {HOW}")
    shape = outputs.shape
    if outputs.numel() % samples or (outputs.ndim and shape[0] % samples):
        raise Unsupported(f"outputs of shape {tuple(shape)} cannot be divided among {samples} samples: {HOW}")
    classes = shape[-1] if outputs.ndim > 1 else 1
    return Evaluation(outputs.reshape(samples, -1, classes), lambda f: criterion(f.reshape(shape)))


#: Criteria whose first argument is the network's output; those that act entry by entry, and those over classes.
_ENTRYWISE = (
    F.mse_loss, F.binary_cross_entropy_with_logits, F.huber_loss, F.smooth_l1_loss, F.poisson_nll_loss,
    F.soft_margin_loss, F.l1_loss,
)  # fmt: skip
_CLASSES = (F.cross_entropy, F.nll_loss)
_LOG_SOFTMAX = (F.log_softmax, torch.log_softmax, Tensor.log_softmax)
#: What may come between a softmax over the last axis and its criterion: other axes are joined.
_RESHAPES = (Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten)


class Criteria(TorchFunctionMode):
    """Records every call of a known criterion while a ``training_step`` runs; `of` finds the one that is its loss."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable, tuple, dict[str, Any], Tensor]] = []
        self._logits: dict[int, tuple[Tensor, Tensor]] = {}
        self._last_axis: set[int] = set()  # of those whose classes are in the last axis

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ENTRYWISE or func in _CLASSES:
            self._calls.append((func, args, dict(kwargs or {}), result))
        elif func in _LOG_SOFTMAX and args:
            self._logits[id(result)] = (result, args[0])
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim")
            if dim in (-1, result.ndim - 1):
                self._last_axis.add(id(result))
        elif func in _RESHAPES and args and id(args[0]) in self._last_axis:
            before, logits = self._logits[id(args[0])]
            if result.shape[-1:] == before.shape[-1:]:
                self._logits[id(result)] = (result, logits.reshape(result.shape))
                self._last_axis.add(id(result))
        return result

    def of(self, loss: Tensor, *, samples: int | None) -> Evaluation:
        """Return outputs and criterion behind a loss; without ``samples`` each row of the outputs is a sample.

        Raises:
            Unmeasurable: if the loss is not finite.
            Unsupported: if the loss is not the value of one known criterion.
        """
        for func, args, kwargs, result in reversed(self._calls):
            if not bool(loss.isfinite()):
                raise Unmeasurable("the loss of the probes is not finite")
            mean = result.ndim > 0  # reduction="none", and the user's own mean
            value = (result.mean() if mean else result).detach()
            # A further term may be 0, as a penalty is at its least, and yet have a curvature.
            if torch.equal(value, loss.detach()) and not depends_beside(loss, result):
                return self._evaluation(func, args, kwargs, mean, samples)
        if not bool(loss.isfinite()):
            raise Unmeasurable("the loss of the probes is not finite")
        with contextlib.suppress(UnknownGraph):
            return Evaluation(*composed(loss, self._softmaxed(), samples))
        raise Unsupported(
            "outputs and targets cannot be found in training_step: its loss is not the value of one criterion of "
            f"torch.nn.functional (cross_entropy, mse_loss, ...) on the network's outputs; {HOW}"
        )

    def _softmaxed(self) -> list[Tensor]:
        """Return what a softmax was taken of, with its graph."""
        given = [args[0] if args else kwargs["input"] for _, args, kwargs, _ in self._calls]
        return [t for t in (*given, *(logits for _, logits in self._logits.values())) if t.grad_fn is not None]

    def _evaluation(self, func: Callable, args: tuple, kwargs: dict, mean: bool, samples: int | None) -> Evaluation:
        if inspect.signature(func).bind(*args, **kwargs).arguments.get("reduction") == "sum":
            raise Unsupported(f"{func.__name__} sums over the batch, which is no mean of samples: {HOW}")
        kwargs = dict(kwargs)
        outputs, rest = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        samples = samples or (len(outputs) if outputs.ndim else 1)
        target = rest[0] if rest else kwargs.get("target")
        if not outputs.requires_grad and isinstance(target, Tensor) and target.requires_grad:
            raise Unsupported(f"{func.__name__} is called with the target first: call it as (outputs, target)")
        weight = rest[1] if len(rest) > 1 else kwargs.get("weight")
        if func in _CLASSES and weight is not None:
            raise Unsupported(
                f"{func.__name__} with class weights divides by the weights of the batch, which is no mean of samples: "
                f"{HOW}"
            )
        logits = self._logits.get(id(outputs))
        log_softmax = func is F.nll_loss and logits is not None
        if log_softmax and logits is not None:
            outputs = logits[1]
        elif func is F.nll_loss:
            raise Unsupported(f"nll_loss without log_softmax just before it has no curvature of its own: {HOW}")

        def criterion(f: Tensor) -> Tensor:
            value = func(F.log_softmax(f, 1 if f.ndim > 1 else 0) if log_softmax else f, *rest, **kwargs)
            return value.mean() if mean else value

        if func in _CLASSES and outputs.ndim > 2:  # (samples, classes, ...): the classes go last
            return evaluation(outputs.movedim(1, -1), lambda f: criterion(f.movedim(-1, 1)), samples=samples)
        if func in _ENTRYWISE and outputs.ndim != 2:
            flat = outputs.reshape(samples, -1)
            return evaluation(flat, lambda f: criterion(f.reshape(outputs.shape)), samples=samples)
        return evaluation(outputs, criterion, samples=samples)
