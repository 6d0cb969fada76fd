"""A plain copy of a module whose parameters lie in shards on several processes, with the whole parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import (
    BUFFERS,
    HOOKS,
    MODULES,
    NOT_SAVED,
    PARAMETERS,
    computes_in,
    copied_optimizer,
    tree_leaves,
)
from lsp_callbacks.autograd.spread_tensors import is_spread, local_gradients, plain_class, sharded_modules, whole
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.step.module_copy import is_users_hook


class WholeCopy:
    """A module without shards: each process holds all parameters, as under DDP, and runs it by itself.

    Its classes are those from before ``fully_shard``, and the hooks that gather and spread are gone. Weights and
    gradients are gathered when it is made, together by all processes.

    Args:
        module: with shards, after the backward pass of the step.
        attributes, buffers: of its modules before the step, in the order of ``module.modules()``; no attribute of them
            belongs to the copy alone.
        prepare: applied to the copy at each `reset`.

    Attributes:
        module: the copy; the gradients of its parameters are those of the step.
        parameters: of the copy.
        stand_ins: the parameters of the copy by the ids of those of the module.

    Memory: the whole weights and gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        attributes: list[dict[str, Any]],
        buffers: list[dict[str, Tensor | None]],
        prepare: Callable[[nn.Module], None],
    ):
        self._attributes, self._buffers, self._prepare = attributes, buffers, prepare
        self.stand_ins = {id(p): _whole_parameter(p) for p in module.parameters()}
        originals = list(module.modules())
        self._modules = [_shell(child) for child in originals]
        copies = {id(child): shell for child, shell in zip(originals, self._modules)}
        self._memo: dict[int, Any] = {**self.stand_ins, **copies}
        for child, shell in zip(originals, self._modules):
            held = vars(child)
            vars(shell)[PARAMETERS].update(
                {name: None if p is None else self.stand_ins[id(p)] for name, p in held[PARAMETERS].items()}
            )
            vars(shell)[MODULES].update(
                {name: None if inner is None else copies[id(inner)] for name, inner in held[MODULES].items()}
            )
            for kind in HOOKS:
                objects = {key: hook for key, hook in held[kind].items() if not is_users_hook(hook)}
                vars(shell)[kind].update({key: copy.deepcopy(hook, self._memo) for key, hook in objects.items()})
            vars(shell)[NOT_SAVED] = set(held[NOT_SAVED])
        self.module = self._modules[0]
        self.parameters = list(self.module.parameters())
        self.reset()

    def reset(self) -> nn.Module:
        """Return the copy as the module was before the step."""
        memo = dict(self._memo)
        for shell, attributes, buffers in zip(self._modules, self._attributes, self._buffers):
            for name, value in attributes.items():
                vars(shell)[name] = copy.deepcopy(value, memo)
            held = vars(shell)[BUFFERS]
            held.clear()
            held.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        self._prepare(self.module)
        return self.module

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return a copy of an optimizer that holds the parameters of the copy, with the whole of its state."""
        memo: dict[int, Any] = dict(self.stand_ins)
        spread = [t for t in tree_leaves([*optimizer.state.values()]) if is_spread(t)]
        memo |= {id(t): whole(t).clone() for t in spread}
        return copied_optimizer(optimizer, memo)


def require_room(module: nn.Module, optimizer: torch.optim.Optimizer, room: float) -> None:
    """Refuse to gather the weights, gradients and state of the optimizer where they would not fit.

    Raises:
        Unsupported: above ``room`` bytes.
    """
    state = sum(t.numel() * t.element_size() for t in tree_leaves([*optimizer.state.values()]) if is_spread(t))
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    if 2 * weights + state > room:
        raise Unsupported(
            "each process would have to hold all weights, gradients and the optimizer's state, "
            f"{2 * weights + state:.3g} bytes beside its shards, more than {room:.3g}: allow more with max_memory=..., "
            "or look at courant_step, critical_sharpness and spectral_norm, which need no more than the shards"
        )


def require_same_precision(module: nn.Module) -> None:
    """Refuse a copy where ``fully_shard`` rounds weights before each pass.

    Raises:
        Unsupported: if it does.
    """
    if (lower := rounded_to(module)) is not None:
        raise Unsupported(
            f"MixedPrecisionPolicy rounds the weights to {lower} before each pass, and a copy with the whole "
            "weights has another loss than the step: look at courant_step, critical_sharpness and spectral_norm, or "
            "train without the policy"
        )


def rounded_to(module: nn.Module) -> torch.dtype | None:
    """Return the type to which ``fully_shard`` rounds weights before each pass; None where it does not."""
    types = {p.dtype for p in module.parameters()}
    return next((d for child in sharded_modules(module) if (d := computes_in(child)) not in {None, *types}), None)


def _whole_parameter(p: nn.Parameter) -> nn.Parameter:
    gathered = nn.Parameter(whole(p).clone(), requires_grad=p.requires_grad)
    if p.grad is not None:
        gathered.grad = whole(p.grad).clone() if is_spread(p.grad) else local_gradients([p])[0]
    return gathered


def _shell(module: nn.Module) -> nn.Module:
    """Return a module of the class from before ``fully_shard``, with nothing in it."""
    shell: nn.Module = object.__new__(plain_class(module))
    vars(shell).update(vars(nn.Module()))
    return shell
