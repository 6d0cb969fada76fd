"""Spectral norms of all layers, with the weights that the step applies."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import Convolution
from lsp_callbacks.autograd.gathered_layer import gathered
from lsp_callbacks.errors import NotApplicable
from lsp_callbacks.functional.network.adapted_layers import is_one_map, parts_of_adapted
from lsp_callbacks.functional.network.layer_operators import in_eval_mode, is_embedding, row_norm, weight_operators
from lsp_callbacks.functional.network.spectral_norm import log_sum
from lsp_callbacks.linalg import FollowedNorm, followed_norm
from lsp_callbacks.linalg.small_norm import FEW, is_small, small_norm
from lsp_callbacks.operators.cost import beside, calls_cost
from lsp_callbacks.operators.memory import forward_memory
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.quantities.key import PREFIX, Key, relative_residual
from lsp_callbacks.quantities.module_filter import Selection, selected, validate
from lsp_callbacks.step.fingerprint import fingerprint, identical
from lsp_callbacks.step.replay_checks import Call
from lsp_callbacks.step.snapshot import Snapshot

STEPS, TOLERANCE = 20, 1e-2
#: Operations and products for each linear map: from the vectors of the last measurement, for each pair of products of
#: Lanczos where that begins anew, and where the weight is frozen and is only looked at.
WARM, PAIR, FROZEN = (60, 4), (58, 2), (4, 1)
#: Operations for a small matrix, whose eigenvalues take about as long as ten of them.
SMALL = 22
#: Pairs of products of Lanczos from nothing, and in a second measurement, until it is known where it begins anew.
COLD, SECOND = 14.0, 2.0
#: Nanoseconds of a multiplication in products with single vectors, see `lsp_callbacks.operators.cost`.
PRODUCT = 0.06


class SpectralNorm(Quantity):
    """Operator norm of every layer with a linear part, for the input sizes of the step.

    Linear, convolutions (plain and transposed), Embedding, attention projections and Hugging Face's Conv1D. Weights
    that are tied are measured once, parametrised weights as the step applied them, layers that the step did not call
    not at all. A layer with LoRA of ``peft`` is one: its norm is that of ``W + scaling B A``, under the layer's own
    name, and its parts have none. With several ranks the first one measures. The iteration starts from the last
    singular vector; what is frozen, and has not changed, keeps the norm of the last time.

    Args:
        layers: class, glob, predicate or import path of the layers, or several of these; None takes all.

    Cost: a forward replay that finds the input sizes, and two products with each layer's map and its transpose: 0.6
    gradients on a large MLP. At first Lanczos: 1.4.

    Source: Katende 2025, Thm 4.1; Miyato et al. 2018 for the iteration.
    """

    weight = 0.05
    name = "spectral_norm"
    needs_loss = False
    needs_whole = False
    supports_multiple_optimizers = True
    KEYS: ClassVar = {
        "spectral_norm_max": Key(
            "Largest operator norm of a layer.",
            "",
            "If it grows without end: weight decay, a normalisation layer, or a lower learning rate.",
        ),
        "spectral_log_sum": Key("Sum of the logarithms of the layers' norms.", "nats"),
        "spectral_norm_residual": relative_residual(
            "spectral_norm_max", "Largest residual of the iterations, relative to the norm."
        ),
        "spectral_norm/<layer>": Key("Operator norm of a layer."),
        "embedding_row_norm/<layer>": Key("Largest norm of a row of an embedding."),
    }

    def __init__(self, layers: Selection = None):
        super().__init__()
        self.layers = layers
        self._layer_norms: dict[str, Tensor] = {}
        self._row_norms: dict[str, Tensor] = {}
        self._starts: dict[str, dict[str, Tensor]] = {}
        #: Pairs of products of Lanczos for each map of a layer, when it was last followed.
        self._begun: dict[str, float] = {}
        #: Norms of layers that are frozen, with what tells that they have not changed.
        self._frozen: dict[str, tuple[tuple, list[Tensor], dict[str, FollowedNorm]]] = {}

    def check(self, snapshot: Snapshot) -> None:
        validate(self.layers, snapshot.module, "layers")
        layers = (layer for name, layer in snapshot.module.named_modules() if self._takes(name, layer))
        if not any(map(_has_linear_part, layers)):
            raise NotApplicable(
                "no layer has a linear part whose norm is known (Linear, convolutions, Embedding, attention)"
            )

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        modules, calls, time = dict(snapshot.module.named_modules()), 0.0, 0.0
        for name, called in snapshot.calls.items():
            layer = modules[name]
            if _has_linear_part(layer) and self._takes(name, layer):
                maps = 4 if isinstance(layer, nn.MultiheadAttention) else 1
                operations, products = self._work(name, layer)
                calls, time = calls + maps * operations, time + PRODUCT * products * _multiplications(layer, called)
        return {**calls_cost(snapshot), "spectral norms": beside(snapshot, calls=calls, time=time)}

    def _work(self, name: str, layer: nn.Module) -> tuple[float, float]:
        """Return operations and products for each map of a layer: Lanczos begins anew where it did the last time."""
        if name in self._frozen:
            return FROZEN
        if not isinstance(layer, Convolution) and (few := _few(layer)) <= FEW:
            return SMALL, few
        pairs = self._begun.get(name, SECOND) if name in self._starts else COLD
        return WARM[0] + PAIR[0] * pairs, WARM[1] + PAIR[1] * pairs

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        return forward_memory(snapshot)

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step."""
        self.complete = False
        calls = snapshot.calls
        starts: dict[str, dict[str, Tensor]] = {}
        ranks = snapshot.run.ranks

        def measure() -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
            return self._measure(snapshot.module, calls, starts)

        if snapshot.run.shards is None:
            # All ranks have the same weights; only the sizes of their inputs may differ.
            norms, residual, rows = ranks.first(measure, self.name)
        else:  # all are needed to gather a layer
            with ranks.checked():
                numbers = measure()
            norms, residual, rows = ranks.of_first(numbers, self.name)
        self._layer_norms, self._row_norms, self._starts = norms, rows, starts
        if not norms:
            self.finish({})
            return
        self.finish({
            "spectral_norm_max": torch.stack(list(norms.values())).max(),
            "spectral_log_sum": log_sum(list(norms.values())),
            "spectral_norm_residual": residual,
        })  # fmt: skip

    def _measure(
        self, module: nn.Module, calls: dict[str, Call], starts: dict[str, dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Return norms by layer, the largest residual, and row norms; fill ``starts`` with the next start vectors."""
        norms: dict[str, Tensor] = {}
        residual, rows = scalar(0.0), {}
        seen: set[int] = set()
        inside = {id(part) for part in parts_of_adapted(module)}
        for name, layer in module.named_modules():
            called = calls.get(name)
            if called is None or id(layer) in inside or not _has_linear_part(layer) or not self._takes(name, layer):
                continue
            tensor = _source(layer)
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            with gathered(layer):
                for part, norm_of_part in self._norms(name, layer, called).items():
                    key = f"{name}.{part}" if part else name
                    norms[key] = scalar(norm_of_part.value)
                    starts.setdefault(name, {})[part] = norm_of_part.vectors
                    residual = torch.maximum(residual, scalar(norm_of_part.residual) / norms[key].clamp_min(1e-300))
                if is_embedding(layer):
                    rows[name] = scalar(row_norm(layer))
        return norms, residual, rows

    def compute(self) -> dict[str, Tensor]:
        """Return the norms of the last measurement; nothing where the step called no such layer."""
        if not self._layer_norms:
            return {}
        values = super().compute()
        values |= {f"{PREFIX}spectral_norm/{name}": norm for name, norm in self._layer_norms.items()}
        return values | {f"{PREFIX}embedding_row_norm/{name}": norm for name, norm in self._row_norms.items()}

    def _takes(self, name: str, layer: nn.Module) -> bool:
        return self.layers is None or selected(self.layers, name, layer)

    def _norms(self, name: str, layer: nn.Module, called: Call) -> dict[str, FollowedNorm]:
        starts = self._starts.get(name, {})
        sizes, is_frozen = (called.input_shape, called.output_shape), _is_frozen(layer)
        now = fingerprint(layer.parameters()) if is_frozen else []
        if is_frozen and (last := self._frozen.get(name)) and last[0] == sizes and identical(last[1], now):
            return last[2]
        with in_eval_mode(layer):  # so that reading a parametrised weight does not move its buffers
            operators = weight_operators(layer, *sizes)
            norms = {
                part: small_norm(operator.matrix)
                if is_small(operator.matrix)
                else followed_norm(operator, starts.get(part), steps=STEPS, tol=TOLERANCE)
                for part, operator in operators.items()
            }
        if starts:
            self._begun[name] = sum(norm.begun for norm in norms.values()) / max(len(norms), 1)
        self._frozen.pop(name, None)
        if is_frozen and all(2 * norm.residual <= TOLERANCE * norm.value for norm in norms.values()):
            self._frozen[name] = sizes, now, norms
        return norms

    def vectors(self) -> dict[str, Any]:
        return {"starts": self._starts} if self._starts else {}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self._starts, self._begun = vectors.get("starts", {}), {}

    def reset(self) -> None:
        super().reset()
        self._layer_norms, self._row_norms = {}, {}


def _is_frozen(layer: nn.Module) -> bool:
    """Return whether nothing that a layer's map is made from is trained, or kept in a buffer."""
    has_weight = any("bias" not in name for name, _ in layer.named_parameters())
    return (
        has_weight and not any(p.requires_grad for p in layer.parameters()) and not any(True for _ in layer.buffers())
    )


def _has_linear_part(layer: nn.Module) -> bool:
    # The output projection of attention is read with its parent, which calls it as a function.
    registered = weight_operators.dispatch(type(layer)) is not weight_operators.dispatch(object)
    is_conv1d = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    return registered or is_conv1d or is_one_map(layer)


def _few(layer: nn.Module) -> int:
    """Return the rows or columns of the maps of a layer that is no convolution, whichever are fewer."""
    return max((min(p.shape) for name, p in layer.named_parameters() if p.ndim == 2), default=0)


def _multiplications(layer: nn.Module, called: Call) -> float:
    """Return how many a product with the layer's map takes."""
    places = math.prod((called.output_shape or ())[2:]) if isinstance(layer, Convolution) else 1
    return places * sum(float(p.numel()) for name, p in layer.named_parameters() if p.ndim > 1)


def _source(layer: nn.Module) -> Any:
    """Return the parameter behind a weight, parametrised or not, by which tied weights are recognised."""
    return next((p for name, p in layer.named_parameters() if "bias" not in name), layer)
