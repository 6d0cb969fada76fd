"""Reports of a run: one sentence, a table, a picture."""

from lsp_callbacks.plots.stability_diagram import diagram_figure
from lsp_callbacks.report.curves import check_installed, loss_alarm
from lsp_callbacks.report.judgement import Run, Verdict, judge
from lsp_callbacks.report.run_figure import figure, quantity_figure
from lsp_callbacks.report.sentence import e_folding, sentence, verdict
from lsp_callbacks.report.stability_diagram import diagram_sentence, diagram_table
from lsp_callbacks.report.table import print_report, table

__all__ = [
    "Run",
    "Verdict",
    "check_installed",
    "diagram_figure",
    "diagram_sentence",
    "diagram_table",
    "e_folding",
    "figure",
    "judge",
    "loss_alarm",
    "print_report",
    "quantity_figure",
    "sentence",
    "table",
    "verdict",
]
