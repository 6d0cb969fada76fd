"""A logged run with its verdict: what the page says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsp_callbacks.report.judgement import Verdict, judge
from lsp_callbacks.report.logs.causes import Finding, findings
from lsp_callbacks.report.logs.events import Event, events
from lsp_callbacks.report.logs.facts import facts, loss_key, stride_of
from lsp_callbacks.report.logs.logged_run import LoggedRun
from lsp_callbacks.report.sentence import sentence


@dataclass(frozen=True)
class JudgedRun:
    """A run as the page shows it.

    Attributes:
        name: by which it can be told from the others.
        logged: what its logs hold.
        loss: key of its training loss; None if none was logged.
        verdict: by the rules of the report at the end of training.
        events: by step.
        findings: what stands out.
    """

    name: str
    logged: LoggedRun
    loss: str | None
    verdict: Verdict
    events: list[Event]
    findings: list[Finding]

    @classmethod
    def of(cls, logged: LoggedRun, name: str, loss: str | None = None) -> JudgedRun:
        """Return the run with its verdict; ``loss`` is the user's choice of the key of the training loss."""
        key = loss_key(logged.curves, loss)
        verdict = judge(facts(logged, key))
        curve = None if key is None else logged.curves[key]
        happened = events(logged.history, curve)
        return cls(name, logged, key, verdict, happened, findings(logged.history, verdict))

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        return sentence(self.verdict).removeprefix("lsp_callbacks: ")

    @property
    def basis(self) -> str:
        """What the verdict was made from."""
        source = f"from the {self.logged.source} logs alone"
        last = self.logged.last_step
        if last is None:
            return f"{source}, which hold no numbers"
        source += f", up to step {last:,}"
        if self.loss is None:
            return f"{source}; no training loss was logged under a name that tells it"
        curve = self.logged.curves[self.loss]
        stride = stride_of(curve)
        often = "each step" if stride == 1 else f"one in {stride:,} steps"
        return f"{source}; of the training loss ({self.loss}) {len(curve.steps):,} values, {often}"


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return short names of runs, by the last parts of their paths that tell them apart.

    Example:
        >>> names_of([Path("runs/a/version_0/metrics.csv"), Path("runs/b/version_0/metrics.csv")])
        ['a/version_0', 'b/version_0']
        >>> names_of([Path("x"), Path("x")])
        ['x (1)', 'x (2)']
    """
    folders = [path.absolute().parent if path.suffix in (".csv", ".wandb") else path.absolute() for path in paths]
    for length in range(2 if len(paths) > 1 else 1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    else:
        names = [f"{path} ({i})" for i, path in enumerate(paths, 1)]
    return names
