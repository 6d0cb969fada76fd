"""What a run's curves say: one sentence, a table, a picture."""

from lsp_callbacks.report.diagram import diagram_figure, diagram_sentence, diagram_table
from lsp_callbacks.report.picture import drawn, figure
from lsp_callbacks.report.rows import show, table
from lsp_callbacks.report.sentence import e_folding, verdict
from lsp_callbacks.report.series import check_installed, loss_alarm

__all__ = [
    "check_installed",
    "diagram_figure",
    "diagram_sentence",
    "diagram_table",
    "drawn",
    "e_folding",
    "figure",
    "loss_alarm",
    "show",
    "table",
    "verdict",
]
