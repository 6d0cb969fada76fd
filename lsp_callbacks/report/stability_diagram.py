"""Stability diagram as a table and a sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lsp_callbacks.functional.sgd.stability_diagram import StabilityDiagram
from lsp_callbacks.plots.figure import load

if TYPE_CHECKING:
    from rich.table import Table


def diagram_table(diagram: StabilityDiagram) -> Table:
    """Return one row a batch size: the largest stable rate with its standard error, and the mean-square rate.

    Args:
        diagram: of `SGDStability.diagram` or `lsp_callbacks.functional.sgd.stability_diagram.stability_diagram`.

    Raises:
        ImportError: without rich.
    """
    rows = load("rich.table").Table(
        title="Largest stable learning rates", title_justify="left", title_style="bold",
        box=load("rich.box").SIMPLE_HEAD,
    )  # fmt: skip
    for column in ("batch size", "largest stable rate", "mean-square rate"):
        rows.add_column(column, justify="right", no_wrap=True)
    edges = (diagram.batch_sizes, diagram.critical_lr, diagram.critical_error, diagram.mean_square_lr)
    for size, critical, error, mean_square in zip(*(values.tolist() for values in edges)):
        rows.add_row(str(size), _edge(critical, error), _edge(mean_square))
    return rows


def diagram_sentence(diagram: StabilityDiagram, *, lr: float, batch_size: int) -> str:
    """Return where a run is in the diagram, in one sentence.

    Args:
        diagram: with ``batch_size`` among its batch sizes.
        lr: rate of the run.
        batch_size: of the run.

    Raises:
        ValueError: if the diagram has no such batch size.
    """
    sizes = diagram.batch_sizes.tolist()
    if batch_size not in sizes:
        raise ValueError(f"batch_size={batch_size} is not in the diagram: give one of {sizes}")
    row = sizes.index(batch_size)
    critical, error = float(diagram.critical_lr[row]), float(diagram.critical_error[row])
    if math.isinf(critical):
        return f"at batch size {batch_size} no rate was found at which SGD is linearly unstable"
    if abs(lr - critical) <= 2 * error:
        state = "at the edge of linear stability"
    else:
        state = "linearly stable" if lr < critical else "linearly unstable"
    sentence = (
        f"{state}: the rate {lr:.3g} is {lr / critical:.2g} of {_edge(critical, error)}, the largest stable one at "
        f"batch size {batch_size}"
    )
    if state != "linearly unstable":
        return sentence
    enough = [n for n, edge in zip(sizes, diagram.critical_lr.tolist()) if n > batch_size and edge > lr]
    larger = f"; a batch of {enough[0]} allows it" if enough else "; no larger batch of the diagram allows it"
    return sentence + larger


def _edge(value: float, error: float = 0.0) -> str:
    """Return a rate with as many digits as its error allows."""
    if math.isinf(value):
        return "any"
    if not error:
        return f"{value:.3g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}" if value < 1e4 and digits < 7 else f"{value:.3g} ± {error:.1g}"
