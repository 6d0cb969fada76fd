"""Per-sample gradients of each parameter, recorded in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import (
    current_function_mode,
    tree_flatten,
    tree_map,
    tree_unflatten,
    without_last_function_mode,
)
from lsp_callbacks.operators.sgd.attention_projections import projected
from lsp_callbacks.operators.sgd.held_statistics import normalised
from lsp_callbacks.operators.sgd.layer_alone import layer_alone
from lsp_callbacks.operators.sgd.layer_rules import (
    Use,
    at_positions,
    channel_uses,
    dense,
    is_linear,
    is_pointwise,
    layer_uses,
    transposed,
    uses_ahead_of_norm,
    uses_of_layers,
)
from lsp_callbacks.operators.sgd.parameter_gram import Part
from lsp_callbacks.operators.sgd.shared_parameters import SharedParameters, gradients_at
from lsp_callbacks.step.criterion import Criteria

#: Of so many calls of layers with parameters, the first ones, the arguments are kept.
FEW = 3


@dataclass(frozen=True)
class RowSeed:
    """Cotangents of the outputs: one row of K for each sample.

    Attributes:
        values: ``(N, C)`` at one position, or ``(N, T, C)``.
        position: which one of each sample, ``(N,)``; None where ``values`` are those of all.
    """

    values: Tensor
    position: Tensor | None = None

    def whole(self, outputs: Tensor) -> Tensor:
        """Return a tensor of the outputs' shape."""
        if self.position is None:
            return self.values
        if outputs.shape[1] == 1:
            return self.values[:, None]
        cotangent = torch.zeros_like(outputs)
        cotangent[torch.arange(len(outputs)), self.position] = self.values
        return cotangent

    def scaled(self, weights: Tensor) -> RowSeed:
        """Return the cotangents times one number for each sample."""
        return RowSeed(self.values * weights.view(-1, *[1] * (self.values.ndim - 1)), self.position)


def whole_seeds(seeds: list[RowSeed], weights: Tensor, outputs: Tensor) -> Tensor:
    """Return the sum of several seeds, times one number for each sample ``(N, R)``, of the outputs' shape."""
    if outputs.shape[1] == 1 or any(seed.position is None for seed in seeds):
        first, *others = (seed.scaled(w).whole(outputs) for seed, w in zip(seeds, weights.unbind(1)))
        return sum(others, first)
    total, samples = torch.zeros_like(outputs), torch.arange(len(outputs))  # one for all: there may be a vocabulary
    for seed, w in zip(seeds, weights.unbind(1)):
        total[samples, seed.position] += seed.scaled(w).values
    return total


@dataclass(frozen=True)
class Call:
    """One call of a layer with parameters."""

    module: nn.Module
    modes: list[tuple[nn.Module, bool]]  # training or not, as it was called
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]  # flat, with their graph
    source: Any = None  # the first argument with its graph
    passed_on: Any = None  # what the next layer got

    @cached_property
    def normalised(self) -> Tensor:
        """The input of a normalisation over the batch, normalised by its own statistics."""
        return normalised(self.module, self.args[0])

    @property
    def differentiable(self) -> list[Tensor]:
        return [t for t in self.outputs if isinstance(t, Tensor) and t.requires_grad]


#: The module, input and gradients of `layer_uses`, or what such a rule returns.
Ruled = tuple[nn.Module, Tensor, Tensor] | dict[str, Use] | None


class Recorder:
    """Records inputs and outputs of every layer with parameters during forward passes.

    Parameters that are used outside of a layer, added to or multiplied with what all samples have (positions, a token
    of the class, a hand-written scale), are given to each sample as a copy, see `SharedParameters`. So is what an
    embedding returns that is not called with all samples.

    Args:
        module: the network.
        parameters: the trainable ones, by name.
        samples: how many there are, where each can be given a copy; None gives none.
        held: normalisations over the batch whose statistics are held fixed, see `held_statistics`.

    Attributes:
        first_inputs: the arguments of the first calls of layers with parameters of their own, trainable or not.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        *,
        samples: int | None = None,
        held: Collection[nn.Module] = (),
    ):
        self._module, self._samples, self._held = module, samples, held
        self.spread = False
        self._parameters = parameters
        self._names = {id(p): name for name, p in parameters.items()}
        self._of_module: dict[nn.Module, dict[str, nn.Parameter]] = {}
        layers = [m for m in module.modules() if self._parameters_of(m)] if samples else []
        self._shared = SharedParameters(self._names, samples) if samples and not all(map(has_rule, layers)) else None
        self.calls: list[Call] = []
        self.first_inputs: list[Tensor] = []
        self._seen = 0
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for module in self._module.modules():
            if not isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
                self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        if self._shared is not None:
            self._shared.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._shared is not None:
            self._shared.__exit__(*exception)
            self.spread |= bool(self._shared.copies)
        for handle in self._handles:
            handle.remove()

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        # What is done here is none of the operations among which the criterion is looked for.
        is_watched = isinstance(current_function_mode(), Criteria)
        with without_last_function_mode() if is_watched else contextlib.nullcontext():
            if self._seen < FEW and any(True for _ in module.parameters(recurse=False)):
                self._seen += 1
                leaves = tree_flatten((args, kwargs))[0]
                self.first_inputs += [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
            return self._record(module, args, kwargs, output) if self._parameters_of(module) else None

    def _record(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self._samples and isinstance(module, nn.Embedding) and args and len(args[0]) != self._samples:
            args, output = (_copies(args[0], self._samples),), _copies(output, self._samples)
            self.spread = True
        if isinstance(module, nn.MultiheadAttention) and (anew := self._attention(module, args, kwargs, output)):
            return anew
        leaves, spec = tree_flatten(output)
        # Clones go on, as the next layer may work in place on its input.
        clones = [leaf.clone() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in leaves]
        source = args[0] if args else None
        args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        modes = [(m, m.training) for m in module.modules()]
        self.calls.append(Call(module, modes, args, kwargs, leaves, source, clones[0] if clones else None))
        return tree_unflatten(clones, spec)

    def _attention(self, module: nn.MultiheadAttention, args: tuple, kwargs: dict, output: Any) -> Any:
        """Record attention by its projections, and return what it gives; None where that is something else."""
        found = projected(module, args, kwargs)
        if found is None:
            return None
        calls, out = found
        close = (out.detach() - output[0].detach()).abs().amax() <= 1e-4 * output[0].detach().abs().amax()
        if not bool(close):  # a subclass, or NaN
            return None
        for layer, x, result in calls:
            self.calls.append(Call(layer, [(layer, False)], (x.detach(),), {}, [result], x))
        return (out, *output[1:])

    def _parameters_of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trainable parameters of a module itself, and of children that it never calls, as attention."""
        if module not in self._of_module:
            recurse = isinstance(module, nn.MultiheadAttention)  # it uses its projection without calling it
            all_of_them = module.named_parameters(recurse=recurse)
            self._of_module[module] = {name: p for name, p in all_of_them if id(p) in self._names}
        return self._of_module[module]

    def parts(
        self, outputs: Tensor, seeds: list[RowSeed], samples: int, *, keep: bool = True, taken: Tensor | None = None
    ) -> dict[str, Part]:
        """Return the uses of each parameter, by name, without those that no rule covers.

        Args:
            outputs: of the network.
            seeds: of R rows for each sample: backward passes.
            samples: size of the first axis of the outputs.
            keep: whether the graph is used again.
            taken: indices of the samples that have rows; None is all.

        Cost: R backward passes to the outputs of layers, which take no gradient of a weight.
        """
        head = self._head(outputs, seeds)
        calls = [call for call in self.calls if call is not head]
        copies = {} if self._shared is None else self._shared.copies
        tensors = [t for call in calls for t in call.differentiable] + [t for of in copies.values() for t, _ in of]
        passes, uses = list[list[Tensor | None]](), dict[str, list[Use]]()
        for k, seed in enumerate(seeds):
            root, cotangent = (outputs, seed.whole(outputs)) if head is None else _into(head, seed)
            more = keep or k < len(seeds) - 1
            passes.append([*torch.autograd.grad(root, tensors, cotangent, retain_graph=more, allow_unused=True)])
        if head is not None:
            for name, use in _head_uses(head, seeds, taken).items():
                uses.setdefault(self._names[id(getattr(head.module, name))], []).append(use)
        position = 0
        waiting: list[tuple[Ruled, Call, list[tuple[Tensor, ...]], dict[str, str]]] = []
        for call in calls:
            kept = call.differentiable
            of_call = [
                tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads[position:], kept))
                for grads in passes
            ]
            for grads in passes:  # they are stacked: both are held for one layer at a time
                grads[position : position + len(kept)] = [None] * len(kept)
            position += len(kept)
            names = {name: self._names[id(p)] for name, p in self._parameters_of(call.module).items()}
            names = {name: whole for name, whole in names.items() if whole not in copies}
            after = self._norm_after(call) if self._held else None
            if names:
                waiting.append((*_by_rule(call, of_call, samples, after, taken), names))
        ruled = iter(uses_of_layers([given for given, *_ in waiting if isinstance(given, tuple)]))
        for given, call, of_call, names in waiting:
            of_layer = next(ruled) if isinstance(given, tuple) else given
            if of_layer is None:
                of_layer = layer_alone(call, of_call, samples, list(names), taken)
            for name, use in of_layer.items():
                if name in names:
                    uses.setdefault(names[name], []).append(use)
        for name, of_name in copies.items():
            for copy, of in of_name:
                rows = [torch.zeros_like(copy) if (g := grads[position]) is None else g for grads in passes]
                position += 1
                stacked = _some(torch.stack(rows, dim=1), taken)
                gradients = gradients_at(stacked, of, self._parameters[name])
                uses.setdefault(name, []).append(dense(gradients))
        held = samples if taken is None else len(taken)
        return {name: Part(held, of_name) for name, of_name in uses.items()}

    def mixes_samples(self, outputs: Tensor, seed: RowSeed) -> bool:
        """Return whether the first sample's outputs depend on what a layer returned for other samples.

        Layers whose first axis may be another one than the samples (a table, positions before samples) are left out.

        Args:
            outputs: of the network.
            seed: of a row of each sample.

        Cost: a backward pass to the outputs of layers.
        """
        n, whole = len(outputs), seed.whole(outputs)
        alone = torch.zeros_like(whole)
        alone[0] = whole[0]
        layers = [call for call in self.calls if not isinstance(call.module, nn.Embedding)]
        tensors = [t for call in layers for t in call.differentiable if t.ndim and len(t) == n and t.shape[1:2] != (n,)]
        if not tensors:
            return False
        of_first = torch.autograd.grad(outputs, tensors, alone, retain_graph=True, allow_unused=True)
        return any(g is not None and bool(g[1:].any()) for g in of_first)

    def _norm_after(self, call: Call) -> Call | None:
        """Return the normalisation over the batch that takes what a call returns, or that the call itself is."""
        if call.module in self._held:
            return call
        takes = (other for other in self.calls if other.module in self._held)
        return next((other for other in takes if other.source is call.passed_on), None)

    def _head(self, outputs: Tensor, seeds: list[RowSeed]) -> Call | None:
        """Return the call of a linear layer whose outputs are those of the network, if rows look at few of them."""
        if outputs.shape[1] == 1 or any(seed.position is None for seed in seeds):
            return None
        for call in reversed(self.calls):
            t, x = call.passed_on, call.source
            if (
                isinstance(t, Tensor)
                and isinstance(x, Tensor)
                and x.requires_grad
                and t.data_ptr() == outputs.data_ptr()
                and t.shape == outputs.shape
                and t.stride() == outputs.stride()
                and is_linear(call.module)
            ):
                return call
        return None


def _into(head: Call, seed: RowSeed) -> tuple[Tensor, Tensor]:
    """Return the input of the last layer, and its cotangent."""
    weight: Tensor = head.module.weight.detach()  # type: ignore[assignment, operator]
    if transposed(head.module):
        weight = weight.T
    cotangent = torch.zeros_like(head.source)
    cotangent[torch.arange(len(cotangent)), seed.position] = seed.values.to(weight) @ weight
    return head.source, cotangent


def _some(tensor: Tensor, taken: Tensor | None) -> Tensor:
    """Return those samples of a tensor that have rows."""
    return tensor if taken is None else tensor[taken.to(tensor.device)]


def _head_uses(head: Call, seeds: list[RowSeed], taken: Tensor | None) -> dict[str, Use]:
    x = head.args[0]
    places = torch.arange(len(x))
    g = _some(torch.stack([seed.values for seed in seeds], dim=1).to(x), taken)
    a = _some(torch.stack([x[places, seed.position] for seed in seeds], dim=1), taken)
    uses = {"weight": at_positions(a, g, transposed=transposed(head.module)), "bias": dense(g)}
    return {name: use for name, use in uses.items() if getattr(head.module, name, None) is not None}


def _copies(shared: Tensor, samples: int) -> Tensor:
    """Return a tensor that all samples share with a first axis that has a copy for each."""
    whole = shared if shared.ndim > 1 and len(shared) == 1 else shared[None]
    return whole.expand(samples, *whole.shape[1:]).clone()


def has_rule(layer: nn.Module) -> bool:
    """Return whether `layer_uses` knows this kind of layer."""
    return layer_uses.dispatch(type(layer)) is not layer_uses.dispatch(object) or transposed(layer)


def _by_rule(
    call: Call, passes: list[tuple[Tensor, ...]], samples: int, norm: Call | None, taken: Tensor | None
) -> tuple[Ruled, Call, list[tuple[Tensor, ...]]]:
    """Return what `layer_uses` is to be called with, or uses by another rule; with the samples in the first axis."""
    single = len(call.args) == 1 and not call.kwargs and isinstance(call.args[0], Tensor) and len(passes[0]) == 1
    shape = tuple(call.args[0].shape) if single else ()
    if shape[2:] and shape[1] == samples != shape[0] and is_pointwise(call.module):  # the samples come second
        call = replace(call, args=(call.args[0].transpose(0, 1),))
        passes = [(grads[0].transpose(0, 1),) for grads in passes]
        shape = tuple(call.args[0].shape)
    if not shape or not shape[0] or shape[0] % samples:
        return None, call, passes
    g = torch.stack([grads[0] for grads in passes], dim=1)  # (N, R, ...)
    passes = [(row,) for row in g.unbind(1)]
    if len(g) != samples:
        return None, call, passes
    some = _some(g, taken)
    if norm is call:
        return channel_uses(_some(norm.normalised, taken), some), call, passes
    if norm is not None:
        through = uses_ahead_of_norm(call.module, call.args[0], some, lambda step: norm.normalised[::step], taken)
        if through is not None:
            return through, call, passes
    return (call.module, _some(call.args[0], taken), some), call, passes
