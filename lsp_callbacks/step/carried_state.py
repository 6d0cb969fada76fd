"""What a module carries from one batch to the next, such as the hidden state of a recurrent network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lsp_callbacks.autograd._torch_internals import tree_leaves, tree_map

_PLAIN = frozenset(vars(nn.Module()))
_MISSING = object()
#: Containers that are longer or deeper (a list of all losses) are no states.
_LONGEST, _DEEPEST = 64, 3

#: By the name of the module and of its attribute: None, or tensors without a graph.
Carried = dict[tuple[str, str], Any]


def carried(module: nn.Module) -> Carried:
    """Return the attributes that hold tensors, or could, before a forward pass: not copied, but without graphs.

    They do not include parameters and buffers, what holds parameters (the weights of ``torch.nn.LSTM``), and the states
    of torchmetrics' metrics.
    """
    return {key: tree_map(_detached, value) for key, value in _attributes(module)}


def belongs(state: Carried, samples: int) -> bool:
    """Return whether any of it has one entry for each sample of a batch."""
    return any(_per_sample(value, samples) for value in state.values())


def kept(state: Carried, samples: int) -> Carried:
    """Return the state for later: what belongs to the samples is copied, as a module may change it in place."""
    return {key: _copied(value) if _per_sample(value, samples) else value for key, value in state.items()}


def give_back(module: nn.Module, state: Carried, samples: int) -> list[str]:
    """Put a copy of what belongs to the samples of a batch into a module that is given that batch again.

    Args:
        module: a copy, which may carry the state of a later batch.
        state: of the batch.
        samples: in the batch.

    Returns:
        The names of the attributes.
    """
    modules, now = dict(module.named_modules()), dict(_attributes(module))
    names = []
    for key in {**now, **state}:
        before, after = state.get(key, _MISSING), now.get(key, _MISSING)
        if not (_per_sample(before, samples) or _per_sample(after, samples)) or key[0] not in modules:
            continue
        names.append(".".join(filter(None, key)))
        if before is _MISSING:
            delattr(modules[key[0]], key[1])
        else:
            setattr(modules[key[0]], key[1], _copied(before))
    return names


def _attributes(module: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    for prefix, child in module.named_modules():
        if isinstance(child, Metric):
            continue
        for name, value in vars(child).items():
            if name not in _PLAIN and _plain(value):
                yield (prefix, name), value


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether it is nothing, a tensor, or a small container of such."""
    if isinstance(value, list | tuple | dict):
        items = list(value.values()) if isinstance(value, dict) else value
        return depth < _DEEPEST and len(value) <= _LONGEST and all(_plain(item, depth + 1) for item in items)
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    return value is None or (depth > 0 and isinstance(value, int | float | str))


def _per_sample(value: Any, samples: int) -> bool:
    return any(isinstance(t, Tensor) and samples in t.shape for t in tree_leaves(value))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, value)
