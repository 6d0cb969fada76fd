"""The command ``lsp-callbacks suggest``: a learning rate and a batch size before training, from short trial runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pickle
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor
from lsp_callbacks.cli.batch_sizes import BatchSizes
from lsp_callbacks.cli.configured import (
    command_parser,
    existing,
    fit_until_done,
    print_failure,
    quiet,
    with_configuration,
)
from lsp_callbacks.cli.rate_search import StableRate, TrialRun
from lsp_callbacks.cli.trial_runs import TrialRuns
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.losses import FALLEN

#: Steps of a trial run, and the fewest that say anything.
STEPS, LEAST = 100, 20
DESCRIPTION = f"""\
Finds the largest stable learning rate of a configuration of `lsp-callbacks fit`, and the batch size beyond which
larger batches bear little more, both with an interval. The critical rate at the initial weights is far above the one
that trains, so it makes some runs of {STEPS} steps at constant rates, each from the initial weights: those beyond the
edge end early. Nothing is logged or saved; schedules and callbacks of the configuration are left out. Other options
are those of `lsp-callbacks fit`: --data.batch_size 32\
"""


@dataclass(frozen=True)
class Suggestion:
    """A learning rate and a batch size to train with.

    Attributes:
        rate: the largest stable one.
        batches: what larger batches bear, at one or two steps of the last run; none where ``without_batches`` says why.
        runs: that were made.
        steps: of a run that did not end early.
        taken: steps of all of them.
        gradients: of a whole batch that it took, steps and measurements.
        without_batches: why nothing is said of batch sizes.
    """

    rate: StableRate
    batches: list[BatchSizes]
    runs: list[TrialRun]
    steps: int
    taken: int
    gradients: float
    without_batches: str = ""

    def sentences(self) -> list[str]:
        """Return what the command prints."""
        rate, last = self.rate, self.runs[-1]
        size = f" at batch size {self.batches[0].size}" if self.batches else ""
        lines = [
            f"the largest stable learning rate is {rate.value:.3g} ({rate.low:.3g} to {rate.high:.3g}){size}",
            f"{last.steps} steps at {last.rate:.3g} brought the loss from {last.start:.3g} to {last.end:.3g}, at a "
            f"Courant number of {last.courant:.2g}",
            self._of_batches(),
            f"it took {len(self.runs)} runs of at most {self.steps} steps from the initial weights, {self.taken} steps "
            f"in all; with the measurements {self.gradients:.0f} gradients",
        ]
        if self.runs[-1].end > FALLEN * last.start > 0:
            lines.insert(2, f"the loss has hardly fallen in {self.steps} steps: the rate may be that of the initial "
                         f"phase only, and too high; give --run_steps {4 * self.steps}")  # fmt: skip
        return [f"lsp_callbacks: {line}" for line in lines]

    def _of_batches(self) -> str:
        if not self.batches:
            return f"of batch sizes nothing can be said: {self.without_batches or 'too few samples were seen'}"
        low, middle, high = self.useful
        population = self.batches[0].population
        doubled = sum(batch.doubled for batch in self.batches) / len(self.batches)
        twice = f"twice the batch of {self.batches[0].size} bears {doubled:.2g} times the rate"
        if math.isinf(middle):
            return f"batches of {low:.0f} and more still pay: {twice}"
        interval = f"{low:.0f} to {high:.0f}" if high < math.inf else f"at least {low:.0f}"
        if low >= population:
            return f"any batch pays, up to all {population} training samples: {twice}"
        return (
            f"larger batches stop paying at about {middle:.0f} ({interval}), which bears half the rate of the largest "
            f"ones: {twice}"
        )

    @property
    def useful(self) -> tuple[float, float, float]:
        """Lower end, value and upper end of the batch size beyond which larger ones bear little more."""
        sizes = [batch.useful for batch in self.batches]
        middle = math.exp(sum(math.log(each.size) for each in sizes) / len(sizes))
        return min(each.low for each in sizes), middle, max(each.high for each in sizes)

    def as_json(self) -> str:
        """Return everything as JSON; what is not finite is null."""
        batch: dict[str, Any] = {"without": self.without_batches}
        if self.batches:
            low, middle, high = self.useful
            first = self.batches[0]
            batch = {"value": middle, "low": low, "high": high, "configured": first.size}
            batch |= {"training_samples": first.population, "samples_seen": first.samples}
            batch |= {"rate_of_twice": sum(each.doubled for each in self.batches) / len(self.batches)}
        contents = {
            "largest_stable_lr": asdict(self.rate), "useful_batch_size": batch,
            "runs": [asdict(run) for run in self.runs], "steps": self.taken, "gradients": self.gradients,
        }  # fmt: skip
        return json.dumps(_finite(contents), indent=1)


def _finite(contents: Any) -> Any:
    if isinstance(contents, dict):
        return {key: _finite(value) for key, value in contents.items()}
    if isinstance(contents, list):
        return [_finite(value) for value in contents]
    return None if isinstance(contents, float) and not math.isfinite(contents) else contents


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments after ``suggest``.

    Returns:
        The exit status, 1 where nothing can be suggested. Bad arguments end in ``SystemExit(2)``.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    suggestions: list[Suggestion] = []

    def use(trainer: Any, model: Any, monitor: StabilityMonitor | None, **data: Any) -> None:
        data["ckpt_path"] = options.ckpt or data.get("ckpt_path")
        suggestions.append(suggest(trainer, model, monitor, steps=options.run_steps, probes=options.probes, **data))

    try:
        # What the user's code prints must not come between the lines of a file of JSON.
        with quiet(), contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            with_configuration(rest, use, usage=parser.usage)
    except (Unmeasurable, MisconfigurationException, ImportError, OSError, pickle.UnpicklingError) as error:
        return print_failure("suggest", error)
    print(suggestions[0].as_json() if options.json else "\n".join(suggestions[0].sentences()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "suggest", "--config FILE [--ckpt FILE] [--run_steps N] [--probes N] [--json] [--KEY VALUE ...]", DESCRIPTION
    )
    parser.add_argument("--ckpt", type=existing, metavar="FILE", help="a checkpoint; otherwise the initial weights")
    parser.add_argument("--run_steps", type=partial(_count, least=LEAST), default=STEPS, metavar="N",
                        help=f"steps of a run ({STEPS}); more where the loss is slow to fall")  # fmt: skip
    parser.add_argument("--probes", type=partial(_count, least=2), default=128, metavar="N",
                        help="samples by which batch sizes are compared (128)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print numbers, for a program")
    return parser


def _count(text: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: give a number of at least {least}")
    return int(text)


def suggest(
    trainer: Any,
    model: Any,
    monitor: StabilityMonitor | None = None,
    *,
    steps: int = STEPS,
    probes: int = 128,
    ckpt_path: str | Path | None = None,
    **data: Any,
) -> Suggestion:
    """Look for the largest stable learning rate by short runs from the initial weights; see `RateSearch`.

    Args:
        trainer: of either name of Lightning; it is used up.
        model: the LightningModule; its weights are those of the last run afterwards.
        monitor: whose ``forward_fn``, ``criterion``, ``loss_fn`` and ``seed`` are used.
        steps: of a run that does not end early.
        probes: samples by which batch sizes are compared.
        ckpt_path: weights and optimizer states to start from.
        data: other arguments of ``trainer.fit``.

    Raises:
        Unmeasurable: for what has no critical rate, or none that is stable; for several optimizers or processes, and
            under manual optimisation.
    """
    how: dict[str, Any] = {"loss_fn": None, "seed": 0, "forward_fn": None, "criterion": None}
    if monitor is not None:
        kept = monitor.observer.probes
        how = {
            "loss_fn": monitor.loss_fn, "seed": monitor.seed, "forward_fn": kept.forward_fn,
            "criterion": kept.criterion,
        }  # fmt: skip
    runs = TrialRuns(steps, partial(StabilityMonitor, **how), probes)
    fit_until_done(trainer, model, runs, ckpt_path=None if ckpt_path is None else str(ckpt_path), **data)
    if runs.search is None or runs.search.next_rate() is not None:
        raise Unmeasurable("the run ended before the search was over: the loader gives too few batches")
    search = runs.search
    return Suggestion(
        search.estimate(), runs.batches, search.runs, steps, runs.taken, runs.taken + runs.cost, runs.without_batches
    )
