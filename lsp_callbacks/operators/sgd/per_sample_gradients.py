"""Per-sample gradients of each parameter, recorded in one forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lsp_callbacks.autograd._torch_internals import tree_flatten, tree_map, tree_unflatten
from lsp_callbacks.operators.sgd.layer_rules import Gradients, Use, layer_uses
from lsp_callbacks.operators.sgd.parameter_gram import Part


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    modes: list[tuple[nn.Module, bool]]  # training or not, as it was called
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]  # flat, with their graph

    @property
    def differentiable(self) -> list[Tensor]:
        return [t for t in self.outputs if isinstance(t, Tensor) and t.requires_grad]


class Recorder:
    """Records inputs and outputs of every layer with parameters during forward passes.

    Args:
        module: the network.
        parameters: the trainable ones, by name.
        spread: how many samples share what an embedding returns when it is not called with all of them (for positions,
            say): each sample gets a copy. None leaves it alone.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter], *, spread: int | None = None):
        self._module, self._spread = module, spread
        self.spread = False
        self._names = {id(p): name for name, p in parameters.items()}
        self.calls: list[_Call] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for module in self._module.modules():
            if not isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
                self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self._parameters_of(module):
            return None
        if self._spread and isinstance(module, nn.Embedding) and args and len(args[0]) != self._spread:
            args, output = (_copies(args[0], self._spread),), _copies(output, self._spread)
            self.spread = True
        leaves, spec = tree_flatten(output)
        # Clones go on, as the next layer may work in place on its input.
        clones = [leaf.clone() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in leaves]
        args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        self.calls.append(_Call(module, [(m, m.training) for m in module.modules()], args, kwargs, leaves))
        return tree_unflatten(clones, spec)

    def _parameters_of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trainable parameters of a module itself, and of children that it never calls, as attention."""
        recurse = isinstance(module, nn.MultiheadAttention)  # it uses its projection without calling it
        return {name: p for name, p in module.named_parameters(recurse=recurse) if id(p) in self._names}

    def parts(self, outputs: Tensor, cotangents: list[Tensor], samples: int) -> dict[str, Part]:
        """Return the uses of each parameter, by name, without those that no rule covers.

        Args:
            outputs: of the network.
            cotangents: R tensors of the outputs' shape: backward passes.
            samples: size of the first axis of the outputs.

        Cost: R backward passes.
        """
        tensors = [t for call in self.calls for t in call.differentiable]
        passes = [torch.autograd.grad(outputs, tensors, w, retain_graph=True, allow_unused=True) for w in cotangents]
        uses: dict[str, list[Use]] = {}
        position = 0
        for call in self.calls:
            kept = call.differentiable
            of_call = [
                tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads[position:], kept))
                for grads in passes
            ]
            position += len(kept)
            names = {name: self._names[id(p)] for name, p in self._parameters_of(call.module).items()}
            for name, use in _uses(call, of_call, samples, list(names)).items():
                if name in names:
                    uses.setdefault(names[name], []).append(use)
        return {name: Part(samples, of_name) for name, of_name in uses.items()}


def _copies(shared: Tensor, samples: int) -> Tensor:
    """Return a tensor that all samples share with a first axis that has a copy for each."""
    whole = shared if shared.ndim > 1 and len(shared) == 1 else shared[None]
    return whole.expand(samples, *whole.shape[1:]).clone()


def _uses(call: _Call, passes: list[tuple[Tensor, ...]], samples: int, names: list[str]) -> dict[str, Use]:
    single = len(call.args) == 1 and not call.kwargs and isinstance(call.args[0], Tensor) and len(passes[0]) == 1
    structured: dict[str, Use] | None = None
    if single and call.args[0].ndim and len(call.args[0]) and call.args[0].shape[0] % samples == 0:
        g = torch.stack([grads[0] for grads in passes], dim=1)  # (N, R, ...)
        if g.shape[0] == samples:
            structured = layer_uses(call.module, call.args[0], g)
    if structured is not None:
        return structured
    return _layer_alone(call, passes, samples, names)


def _layer_alone(call: _Call, passes: list[tuple[Tensor, ...]], samples: int, names: list[str]) -> dict[str, Use]:
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

    @functools.lru_cache(maxsize=1 if sum(p.numel() for p in parameters.values()) > 2**16 else samples)
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
        return lambda lo, hi: torch.stack([sample_gradients(i)[k] for i in range(lo, hi)])

    return {name: Use(gradients(k), path="layer") for k, name in enumerate(parameters)}


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
