"""Per-sample gradients of each parameter, recorded in one forward pass; their Gram matrices."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lsp_callbacks.linalg import Sketch
from lsp_callbacks.operators.sgd.layer_rules import Gradients, Use, layer_uses

#: Numbers at a time that stay in the cache.
BLOCK = 2**19


@dataclass(frozen=True)
class Part:
    """All uses of a parameter on some of the samples."""

    samples: int
    uses: list[Use]

    def gradients(self, lo: int, hi: int) -> Tensor:
        return torch.stack([use.gradients(lo, hi) for use in self.uses]).sum(0)


@dataclass(frozen=True)
class ParameterGram:
    """The share of one parameter in the Gram matrix.

    Attributes:
        parts: the samples, part by part.
    """

    parts: list[Part] = field(default_factory=list)

    @property
    def path(self) -> str:
        return max((use.path for part in self.parts for use in part.uses), key=len, default="structured")

    def gram(self, root: Tensor, memory: int) -> Tensor:
        """``(N R, N R)``, sample by sample, of gradients times ``root``, a scalar or of the parameter's shape."""
        factors = [part.uses[0].factors for part in self.parts if len(part.uses) == 1]
        if len(factors) == len(self.parts) and all(factors):
            g, a = (_wide(torch.cat([pair[k] for pair in factors if pair])) for k in (0, 1))
            if root.ndim:
                return _weighted(g, a, root.T if self.parts[0].uses[0].transposed else root)
            n, rows, _ = g.shape
            flat = (root * g).flatten(0, 1)
            share = flat @ flat.T
            return share.view(n, rows, n, rows).mul_((a @ a.T)[:, None, :, None]).view(n * rows, n * rows)
        blocks = [(part, lo, hi) for part in self.parts for lo, hi in _ranges(part, memory)]
        whole = root.reshape(-1) if root.ndim else root
        table: list[list[Tensor]] = [[] for _ in blocks]
        for i, (part, lo, hi) in enumerate(blocks):
            first = _wide(part.gradients(lo, hi) * whole).flatten(0, 1)
            for j, (other, start, stop) in enumerate(blocks[: i + 1]):
                second = first if i == j else _wide(other.gradients(start, stop) * whole).flatten(0, 1)
                table[i].append(first @ second.T)
        if len(table) == 1:
            return table[0][0]
        lower = [torch.cat(row, dim=1) for row in table]
        size = lower[-1].shape[1]
        square = torch.cat([F.pad(row, (0, size - row.shape[1])) for row in lower])
        return square.tril() + square.tril(-1).T


def _weighted(g: Tensor, a: Tensor, root: Tensor) -> Tensor:
    """``sum_o g_io g_jo sum_k root_ok^2 a_ik a_jk``, some of the outputs o at a time: no gradient is ever formed."""
    n, rows, _ = g.shape
    share = g.new_zeros(n, rows, n, rows)
    step = max(1, BLOCK // (n * (a.shape[1] + 3 * n)))
    for some, weights in zip(g.permute(2, 1, 0).split(step), root.to(a).split(step)):
        weighted = a * weights[:, None]  # (o, n, k)
        inner = weighted @ weighted.mT
        for r in range(rows):
            left = inner * some[:, r, :, None]
            for s in range(rows):
                share[:, r, :, s] += (left * some[:, s, None]).sum(0)
    return share.view(n * rows, n * rows)


def _wide(t: Tensor) -> Tensor:
    """Sums over many entries are never rounded to half precision."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _ranges(part: Part, memory: int) -> Iterator[tuple[int, int]]:
    """Cuts the samples so that two blocks of gradients stay within the memory."""
    entries = part.gradients(0, 1).numel()
    step = max(1, memory // (2 * max(entries, 1)))
    return ((lo, min(lo + step, part.samples)) for lo in range(0, part.samples, step))


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    modes: list[tuple[nn.Module, bool]]  # training or not, as it was called
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]  # flat, with their graph


class Recorder:
    """Notes inputs and outputs of every layer with parameters during forward passes.

    Args:
        module: the network.
        parameters: the trainable ones, by name.
        spread: how many samples share what an embedding gives when it is not asked for each (of positions, say): it is
            given to each of them apart. None leaves it alone.
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
        if not self._own(module):
            return None
        if self._spread and isinstance(module, nn.Embedding) and args and len(args[0]) != self._spread:
            args, output = (_each(args[0], self._spread),), _each(output, self._spread)
            self.spread = True
        leaves, spec = tree_flatten(output)
        # Clones go on, as the next layer may work in place on what it is given.
        clones = [leaf.clone() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in leaves]
        args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        self.calls.append(_Call(module, [(m, m.training) for m in module.modules()], args, kwargs, leaves))
        return tree_unflatten(clones, spec)

    def _own(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Trainable parameters of the module itself, and of children that it never calls, as attention does."""
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.MultiheadAttention):  # uses its projection without calling it
            own = dict(module.named_parameters())
        return {name: p for name, p in own.items() if id(p) in self._names}

    def parts(self, outputs: Tensor, cotangents: list[Tensor], samples: int) -> dict[str, Part]:
        """The uses of each parameter, by name; those that cannot be told are missing.

        Args:
            outputs: of the network.
            cotangents: R tensors of the outputs' shape: backward passes.
            samples: first axis of the outputs.

        Cost: R backward passes.
        """
        tensors = [t for call in self.calls for t in _tensors(call)]
        passes = [torch.autograd.grad(outputs, tensors, w, retain_graph=True, allow_unused=True) for w in cotangents]
        found: dict[str, list[Use]] = {}
        position = 0
        for call in self.calls:
            kept = _tensors(call)
            own = [
                tuple(torch.zeros_like(t) if g is None else g for g, t in zip(one[position:], kept)) for one in passes
            ]
            position += len(kept)
            names = {name: self._names[id(p)] for name, p in self._own(call.module).items()}
            for name, use in _uses(call, own, samples, list(names)).items():
                if name in names:
                    found.setdefault(names[name], []).append(use)
        return {name: Part(samples, uses) for name, uses in found.items()}


def _each(shared: Tensor, samples: int) -> Tensor:
    """The same for each sample, with an axis of its own."""
    whole = shared if shared.ndim > 1 and len(shared) == 1 else shared[None]
    return whole.expand(samples, *whole.shape[1:]).clone()


def _tensors(call: _Call) -> list[Tensor]:
    return [t for t in call.outputs if isinstance(t, Tensor) and t.requires_grad]


def _uses(call: _Call, passes: list[tuple[Tensor, ...]], samples: int, names: list[str]) -> dict[str, Use]:
    single = len(call.args) == 1 and not call.kwargs and isinstance(call.args[0], Tensor) and len(passes[0]) == 1
    structured: dict[str, Use] | None = None
    if single and call.args[0].ndim and len(call.args[0]) and call.args[0].shape[0] % samples == 0:
        g = torch.stack([one[0] for one in passes], dim=1)  # (N, R, ...)
        if g.shape[0] == samples:
            structured = layer_uses(call.module, call.args[0], g)
    if structured is not None:
        return structured
    return _layer_alone(call, passes, samples, names)


def _layer_alone(call: _Call, passes: list[tuple[Tensor, ...]], samples: int, names: list[str]) -> dict[str, Use]:
    """The layer is run again on one sample at a time, and differentiated by its own parameters alone."""
    module = call.module
    first = 1 if getattr(module, "batch_first", True) is False else 0

    def axis(t: Any) -> int | None:
        """Where the samples are: recurrent layers have them first in some tensors, second in others."""
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
    def one(i: int) -> list[Tensor]:
        """Gradients of sample i, ``(R, P)`` by parameter."""
        args, kwargs = tree_unflatten([at(t, i) for t in leaves], spec)
        with torch.enable_grad(), _as_it_was(call.modes):
            out = tree_flatten(functional_call(module, dict[str, Tensor](parameters), args, kwargs))[0]
            outputs = [t for t, d in zip(out, differentiable) if d]
        rows = []
        for g in passes:
            pieces = [at(t, i) for t in g]
            parts = torch.autograd.grad(
                outputs, list(parameters.values()), pieces, retain_graph=True, materialize_grads=True
            )
            rows.append([p.reshape(-1) for p in parts])
        return [torch.stack(column) for column in zip(*rows)]

    def gradients(k: int) -> Gradients:
        return lambda lo, hi: torch.stack([one(i)[k] for i in range(lo, hi)])

    return {name: Use(gradients(k), path="layer") for k, name in enumerate(parameters)}


@contextlib.contextmanager
def _as_it_was(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    now = [module.training for module, _ in modes]
    try:
        for module, training in modes:
            module.training = training
        yield
    finally:
        for (module, _), training in zip(modes, now):
            module.training = training


class TiedRows:
    """Rows of Z through the statistics of a batch: each is a backward pass over all of its samples.

    Where they are more numbers than ``memory``, the gradients of large parameters are sketched: ``K_ij`` is then right
    to ``sqrt(2 / width)`` of ``|z_i| |z_j|``, `defect`, without bias.

    Args:
        roots: of the diagonal of D, by name.
        parameters: by name.
        rows: how many there will be.
        memory: bound on the numbers held.
    """

    def __init__(self, roots: dict[str, Tensor], parameters: dict[str, nn.Parameter], rows: int, memory: int):
        self._roots, self._parameters = roots, parameters
        sizes = [p.numel() for p in parameters.values()]
        width = max(sizes)
        while rows * sum(min(size, width) for size in sizes) > memory and width > 2**12:
            width = width // 2 + 1
        self._sketches = {
            name: Sketch(seed, keep=True, buckets=width)
            for seed, (name, p) in enumerate(parameters.items())
            if p.numel() > width
        }
        self.defect = (2 / width) ** 0.5 if self._sketches else 0.0
        self._rows: dict[str, list[Tensor]] = {name: [] for name in parameters}

    def add(self, outputs: Tensor, cotangents: list[Tensor]) -> None:
        """The rows of one batch. Cost: a backward pass for each."""
        for i in range(len(outputs)):
            for w in cotangents:
                alone = torch.zeros_like(w)
                alone[i] = w[i]
                found = torch.autograd.grad(
                    outputs, list(self._parameters.values()), alone, retain_graph=True, materialize_grads=True
                )
                for name, g in zip(self._parameters, found):
                    row = _wide(g.to_dense() * self._roots[name])
                    sketch = self._sketches.get(name)
                    self._rows[name].append(row.reshape(-1) if sketch is None else sketch([row]).to(row.dtype))

    def grams(self) -> dict[str, Tensor]:
        """Each parameter's share of K."""
        stacked = {name: torch.stack(rows) for name, rows in self._rows.items()}
        return {name: rows @ rows.T for name, rows in stacked.items()}


def rows_alone(outputs: Tensor, parameters: list[nn.Parameter], cotangents: list[Tensor]) -> list[Part]:
    """One backward pass for each row, which serves all parameters: what always works."""

    @functools.lru_cache(maxsize=2)
    def blocks(lo: int, hi: int) -> list[Tensor]:
        rows: list[list[Tensor]] = [[] for _ in parameters]
        for i in range(lo, hi):
            for w in cotangents:
                alone = torch.zeros_like(w)
                alone[i] = w[i]
                found = torch.autograd.grad(outputs, parameters, alone, retain_graph=True, materialize_grads=True)
                for own, g in zip(rows, found):
                    own.append((g.to_dense() if g.is_sparse else g).reshape(-1))
        return [torch.stack(own).reshape(hi - lo, len(cotangents), -1) for own in rows]

    def use(k: int) -> Use:
        return Use(lambda lo, hi: blocks(lo, hi)[k], path="rows")

    return [Part(len(outputs), [use(k)]) for k in range(len(parameters))]
