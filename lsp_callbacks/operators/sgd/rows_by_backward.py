"""Per-sample output gradients by one backward pass for each row: what always works."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lsp_callbacks.linalg import Sketch
from lsp_callbacks.operators.sgd.layer_rules import Use
from lsp_callbacks.operators.sgd.parameter_gram import ParameterGram, Part, wide
from lsp_callbacks.operators.sgd.per_sample_gradients import RowSeed


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

    def add(self, outputs: Tensor, seeds: list[RowSeed]) -> None:
        """Compute the rows of one batch. Cost: a backward pass for each."""
        parameters = list(self._parameters.values())
        for i in range(len(outputs)):
            for seed in seeds:
                for name, g in zip(self._parameters, _row(outputs, parameters, seed, i)):
                    row = wide(g.to_dense() * self._roots[name])
                    sketch = self._sketches.get(name)
                    self._rows[name].append(row.reshape(-1) if sketch is None else sketch([row]).to(row.dtype))

    def grams(self) -> dict[str, Tensor]:
        """Return each parameter's share of K."""
        stacked = {name: torch.stack(rows) for name, rows in self._rows.items()}
        return {name: rows @ rows.T for name, rows in stacked.items()}


def add_rows(
    grams: dict[str, ParameterGram],
    outputs: Tensor,
    parameters: Mapping[str, nn.Parameter],
    seeds: list[RowSeed],
    taken: Tensor | None = None,
) -> None:
    """Add a part to the Gram matrices of some parameters, by a backward pass for each row, which serves all of them."""
    for name, part in zip(grams, rows_alone(outputs, [parameters[name] for name in grams], seeds, taken)):
        grams[name].parts.append(part)


def rows_alone(
    outputs: Tensor, parameters: list[nn.Parameter], seeds: list[RowSeed], taken: Tensor | None = None
) -> list[Part]:
    """Return the per-sample gradients of each parameter; they are computed when they are asked for."""
    indices = range(len(outputs)) if taken is None else taken.tolist()

    @functools.lru_cache(maxsize=2)
    def blocks(lo: int, hi: int) -> list[Tensor]:
        rows: list[list[Tensor]] = [[] for _ in parameters]
        for i in indices[lo:hi]:
            for seed in seeds:
                for of_parameter, g in zip(rows, _row(outputs, parameters, seed, i)):
                    of_parameter.append((g.to_dense() if g.is_sparse else g).reshape(-1))
        return [torch.stack(of_parameter).reshape(hi - lo, len(seeds), -1) for of_parameter in rows]

    def use(k: int) -> Use:
        return Use(lambda lo, hi: blocks(lo, hi)[k], len(seeds), path="rows")

    return [Part(len(indices), [use(k)]) for k in range(len(parameters))]


def _row(outputs: Tensor, parameters: list[nn.Parameter], seed: RowSeed, sample: int) -> tuple[Tensor, ...]:
    """Return the gradients of one sample's outputs, combined by its cotangent."""
    whole = seed.whole(outputs)
    alone = torch.zeros_like(whole)
    alone[sample] = whole[sample]
    return torch.autograd.grad(outputs, parameters, alone, retain_graph=True, materialize_grads=True)
