"""Parameters that are used outside of any layer, with a copy for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Operations entry by entry, in which a parameter that all samples share is broadcast.
BROADCAST = {torch.add, torch.sub, torch.mul, torch.div, Tensor.add, Tensor.sub, Tensor.mul, Tensor.div}
#: Operations that repeat a parameter for each sample by themselves.
REPEAT = {Tensor.expand, Tensor.repeat, Tensor.expand_as, torch.broadcast_to}
#: Operations that look at a part of a parameter, or at all of it in another shape.
VIEW = {
    Tensor.__getitem__, Tensor.unsqueeze, torch.unsqueeze, Tensor.view, Tensor.reshape, torch.reshape, Tensor.narrow,
    Tensor.transpose, Tensor.permute, Tensor.squeeze, Tensor.flatten,
}  # fmt: skip


class SharedParameters(TorchFunctionMode):
    """Gives each sample a copy of a parameter that is added to, or multiplied with, what all samples have.

    The gradient at the copies is that of each sample. Positions, a token of the class and hand-written scales are
    such parameters; what a layer of torch does with its own is not seen here.

    Args:
        names: of the trainable parameters, by ``id``.
        samples: how many there are.

    Attributes:
        copies: by the parameter's name, ``(N, ...)`` for each use, next to which entries it holds; None is all.
    """

    def __init__(self, names: dict[int, str], samples: int):
        super().__init__()
        self._samples = samples
        self._names: dict[int, str] = dict(names)
        self._views: dict[int, tuple[Tensor, Tensor]] = {}  # kept, as ids belong to them, with their entries
        self.copies: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BROADCAST and len(args) == 2:
            return func(*self._spread(*args), **kwargs)
        result = func(*args, **kwargs)
        name = self._names.get(id(args[0])) if args and (func in REPEAT or func in VIEW) else None
        if name is None or not isinstance(result, Tensor) or not result.requires_grad:
            return result
        if func in VIEW:
            self._names[id(result)] = name
            self._views[id(result)] = result, func(self._entries(args[0]), *args[1:], **kwargs)
        elif result.ndim and len(result) == self._samples and result.numel() == self._samples * args[0].numel():
            return self._kept(name, result.clone(), args[0])
        return result

    def _spread(self, left: Any, right: Any) -> tuple[Any, Any]:
        """Return both arguments, with a copy for each sample of a parameter among them."""
        for p, x, is_left in ((left, right, True), (right, left, False)):
            name = self._names.get(id(p))
            if name is None or not isinstance(x, Tensor) or id(x) in self._names:
                continue
            if x.ndim < max(1, p.ndim) or len(x) != self._samples or (p.ndim == x.ndim and len(p) > 1):
                continue
            shape = [1] * (x.ndim - p.ndim) + list(p.shape)
            copy = self._kept(name, p.reshape(shape).expand(self._samples, *shape[1:]).clone(), p)
            return (copy, x) if is_left else (x, copy)
        return left, right

    def _entries(self, of: Tensor) -> Tensor:
        """Return which entries of its parameter a view holds."""
        if id(of) in self._views:
            return self._views[id(of)][1]
        return torch.arange(of.numel(), device=of.device).view(of.shape)

    def _kept(self, name: str, copy: Tensor, of: Tensor) -> Tensor:
        self.copies.setdefault(name, []).append((copy, self._entries(of) if id(of) in self._views else None))
        return copy


def gradients_at(copies: Tensor, entries: Tensor | None, parameter: nn.Parameter) -> Tensor:
    """Return the gradients of a parameter, ``(N, R, P)``, from those at copies of it or of a view of it.

    Args:
        copies: gradients, ``(N, R, ...)``.
        entries: which of the parameter's were copied; None is all.
        parameter: that was copied.
    """
    rows = copies.reshape(*copies.shape[:2], -1)
    if entries is None:
        return rows
    whole = rows.new_zeros(*rows.shape[:2], parameter.numel())
    return whole.index_add_(2, entries.reshape(-1), rows)
