"""What a run's curves say: one sentence, a table, a picture."""

from lsp_callbacks.report.diagram import diagram_figure, diagram_sentence, diagram_table
from lsp_callbacks.report.judgement import Run, Verdict, judge
from lsp_callbacks.report.picture import drawn, figure
from lsp_callbacks.report.rows import show, table
from lsp_callbacks.report.sentence import e_folding, sentence, verdict
from lsp_callbacks.report.series import check_installed, loss_alarm

__all__ = [
    "Run",
    "Verdict",
    "check_installed",
    "diagram_figure",
    "diagram_sentence",
    "diagram_table",
    "drawn",
    "e_folding",
    "figure",
    "judge",
    "loss_alarm",
    "sentence",
    "show",
    "table",
    "verdict",
]
