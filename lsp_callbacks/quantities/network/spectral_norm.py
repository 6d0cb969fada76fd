"""Spectral norms of all layers, as they are applied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.errors import NotApplicable
from lsp_callbacks.functional.network.layer_operators import row_norm, weight_operators
from lsp_callbacks.functional.network.spectral_norm import log_sum, weight_norms
from lsp_callbacks.operators.cost import beside, forward_cost
from lsp_callbacks.operators.memory import footprint
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.quantities.module_filter import Selection, selected, validate
from lsp_callbacks.step.replay_checks import Call
from lsp_callbacks.step.snapshot import Snapshot

STEPS, TOLERANCE = 20, 1e-2


class SpectralNorm(Quantity):
    """The operator norm of every layer with a linear part, for the input sizes of the step.

    Linear, convolutions (plain and transposed), Embedding, attention projections and Hugging Face's Conv1D. Weights
    that are tied are measured once, parametrised weights as the step applied them, layers that the step did not call
    not at all. Of several ranks the first one measures. The iteration starts from the last singular vector. A norm that
    grows without end: weight decay, a normalisation layer, or a lower rate.

    Args:
        layers: which layers: class, glob, predicate, import path, or several; None takes all.

    Keys: ``stability/spectral_norm_max``, ``stability/spectral_log_sum`` (nats), ``stability/spectral_norm_residual``
    (the largest, relative), ``stability/spectral_norm/<layer>``, ``stability/embedding_row_norm/<layer>``.

    Cost: 0.8 gradients on a large MLP, the forward replay that finds the input sizes included; 3 on a small one.

    Source: Katende, Thm 4.1; Miyato et al. 2018 for the iteration.
    """

    name = "spectral_norm"
    plays = True
    keys = ("stability/spectral_norm_max", "stability/spectral_log_sum", "stability/spectral_norm_residual")
    norms: Tensor
    residual: Tensor

    def __init__(self, layers: Selection = None):
        super().__init__()
        self.layers = layers
        self._names: list[str] = []
        self._rows: dict[str, Tensor] = {}
        self._starts: dict[str, dict[str, Tensor]] = {}
        self.add_state("norms", default=torch.empty(0, dtype=torch.float64))
        self.add_state("residual", default=scalar(torch.nan))

    def check(self, snapshot: Snapshot) -> None:
        validate(self.layers, snapshot.module, "layers")
        layers = (layer for name, layer in snapshot.module.named_modules() if self._takes(name, layer))
        if not any(map(_has_linear_part, layers)):
            raise NotApplicable(
                "no layer has a linear part whose norm is known (Linear, convolutions, Embedding, attention)"
            )

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        modules = dict(snapshot.module.named_modules())
        layers = sum(_has_linear_part(modules[name]) for name in snapshot.calls)
        return {"forward": forward_cost(snapshot), "spectral norms": 0.2 + beside(snapshot, calls=150 * layers)}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        found = footprint(snapshot)
        return {"activations": found.activations, "copies": 2 * found.buffers}

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step."""
        self.complete = False
        calls = snapshot.calls
        starts: dict[str, dict[str, Tensor]] = {}
        # All ranks have the same weights; only the sizes of their inputs may differ.
        norms, residual, rows = snapshot.run.ranks.first(
            lambda: self._measure(snapshot.module, calls, starts), self.name
        )
        self._names, self._rows, self._starts = list(norms), rows, starts
        self.norms = torch.stack(list(norms.values())) if norms else torch.empty(0, dtype=torch.float64)
        self.residual = residual
        self.complete = True

    def _measure(
        self, module: nn.Module, calls: dict[str, Call], starts: dict[str, dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Norms by layer, the largest residual, and row norms; ``starts`` takes up the vectors for the next time."""
        norms: dict[str, Tensor] = {}
        residual, rows = scalar(0.0), {}
        seen: set[int] = set()
        for name, layer in module.named_modules():
            called = calls.get(name)
            if called is None or not _has_linear_part(layer) or not self._takes(name, layer):
                continue
            tensor = _source(layer)
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            for part, pair in self._norms(name, layer, called).items():
                key = f"{name}.{part}" if part else name
                norms[key] = scalar(pair.value)
                starts.setdefault(name, {})[part] = pair.vector
                residual = torch.maximum(residual, scalar(pair.residual) / norms[key].clamp_min(1e-300))
            if isinstance(layer, nn.Embedding):
                rows[name] = scalar(row_norm(layer))
        return norms, residual, rows

    def compute(self) -> dict[str, Tensor]:
        """The norms of the last measurement; nothing where the model has no such layer."""
        if not len(self.norms):
            return {}
        values = {
            "stability/spectral_norm_max": self.norms.max(),
            "stability/spectral_log_sum": log_sum(list(self.norms)),
            "stability/spectral_norm_residual": self.residual,
        }
        values |= {f"stability/spectral_norm/{name}": norm for name, norm in zip(self._names, self.norms)}
        return values | {f"stability/embedding_row_norm/{name}": norm for name, norm in self._rows.items()}

    def _takes(self, name: str, layer: nn.Module) -> bool:
        return self.layers is None or selected(self.layers, name, layer)

    def _norms(self, name: str, layer: nn.Module, called: Call):
        training = layer.training
        try:
            layer.train(False)  # so that reading a parametrised weight does not move its buffers
            start = self._starts.get(name)
            return weight_norms(
                layer, called.input_shape, output_shape=called.output_shape, start=start, steps=STEPS, tol=TOLERANCE
            )
        finally:
            layer.train(training)

    def vectors(self) -> dict[str, Any]:
        return {"starts": self._starts} if self._starts else {}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self._starts = vectors.get("starts", {})


def _has_linear_part(layer: nn.Module) -> bool:
    # The output projection of attention is read with its parent, which calls it as a function.
    known = weight_operators.dispatch(type(layer)) is not weight_operators.dispatch(object)
    return known or (type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"))


def _source(layer: nn.Module) -> Any:
    """The tensor behind a weight, so that tied weights are recognised: the parameter, or the parametrised one."""
    return next((p for name, p in layer.named_parameters() if "bias" not in name), layer)
