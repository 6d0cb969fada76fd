"""The training map and its products along the run."""

from lsp_callbacks.operators.trajectory import adam_variants, muon, torch_formulas

__all__ = ["adam_variants", "muon", "torch_formulas"]
