"""Stability of SGD itself by its second moment: cheap, without chance, from the step's own batch."""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from statistics import median
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lsp_callbacks._validation import whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.sgd.frozen_sgd import FrozenSGD, critical_rule, frozen_sgd, require_curvature
from lsp_callbacks.operators.sgd.gram_matrix import tolerance
from lsp_callbacks.operators.sgd.graph_check import unexplained_rows
from lsp_callbacks.operators.sgd.graph_pass import GraphKind
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.operators.sgd.recent_rows import RecentRows
from lsp_callbacks.operators.sgd.statistics_factors import StatisticsFactors
from lsp_callbacks.operators.sgd.step_samples import LEAST, row_count, step_samples
from lsp_callbacks.operators.trajectory.coming_preconditioner import gradients_missing, remembered_rule
from lsp_callbacks.quantities.key import Key
from lsp_callbacks.quantities.sgd.collapse import COLLAPSED, collapse, none_yet
from lsp_callbacks.quantities.sgd.frozen_exponents import courant_of
from lsp_callbacks.quantities.sgd.mean_square_cost import COMPARED, checked_price, graph_price, replay_price, rule_cost
from lsp_callbacks.quantities.sgd.mean_square_shards import OfShards, shards_memory, shards_price
from lsp_callbacks.quantities.sgd.probe_cost import kernel_memory
from lsp_callbacks.step.graph_reader import GraphReader
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.replay_checks import verify, verify_gradient
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.snapshot import Snapshot

#: Relative error of the critical rate by its iteration, by which the rate is lowered.
TOLERANCE = 5e-3
#: Positions of each sample that are looked at in one step, at most.
AT_ONCE = 4
#: Of so many such comparisons the median is taken.
DESIGNS = 5


class MeanSquareStability(OfShards):
    """Learning rate relative to the largest at which the second moment of SGD stays bounded.

    As `SGDStability`, from the Gram matrix of per-sample output gradients, the optimizer's momentum or frozen
    preconditioner, and the batch size; but of samples of the step's own batch, so that nothing is collected, and of the
    second moment alone, which follows without simulation. Its edge lies below that of `SGDStability`, and is passed
    earlier.

    Each step brings fresh samples. Few of them read low where a few samples of many are sharp, and from one reading to
    the next the number scatters: look at the mean of three.

    Where the rows come from the step's own graph, they are those of the step as it was taken, with the masks of its
    dropout. They are looked at in a replay without dropout, which costs several times as much and is rarer by that,
    where that graph cannot be read (custom functions, activation checkpoints, 16 bits with a gradient scaler, a network
    that has collapsed, dropout together with statistics of the batch).

    Of samples with many positions the rows are at a few. Each position then counts as a sample of its own, and a batch
    as that many positions over their design effect, see `lsp_callbacks.functional.design_effect`: few positions that
    stood for all would have many times the noise of the batch. In large layers a quarter of the units, taken by size,
    stands for all (`some_units`), but for readings that are checked. From 32 rows the number is within a factor of
    about two of that from all positions, and low where a batch has few sharp ones, which 32 rows mostly miss.

    The network has *collapsed* where its outputs no longer depend on its inputs: nine of ten samples, of different
    inputs, have the same outputs to the last digits and the same gradient (dead ReLUs, saturated units), though their
    targets differ, and no lower a loss than a constant output has. A last layer that begins with zeros has another
    gradient for each input, and so has a network that is bad but still moves: both count as not collapsed.

    Args:
        rows: how many output gradients to look at; None takes a quarter of the batch, 32 at least and 128 at most.
            Where a batch has fewer samples, which have several positions (tokens), several of each are taken; later
            one, beside the rows of the last readings, each at the weights of its own step.
        outputs: "top" takes of each sample the combination of outputs that moves most; "all" takes every output.
        replacement: whether samples are drawn with replacement within a batch.
        most_rows: as in `SGDStability`.

    Raises:
        ValueError: for an argument out of its range.

    Cost: one pass over a quarter of the batch, back to the outputs of layers, and their products for each pair
    of rows: about a gradient, on small networks the time of some hundred calls. The readings 1, 32, 1024, ... are
    checked against a replay, which takes two gradients more (with batch statistics three), and so is the one after the
    graph of the step, or what is trained, was found to have changed.

    A first reading without any curvature in the outputs, though the loss has a gradient, is NaN: of losses that are
    linear there (L1) the Gauss-Newton matrix says nothing. A later one is 0.

    Source: Mulayoff & Michaeli 2024; docs/theory.md, section The exponent of SGD, frozen at the weights.
    """

    name = "mean_square_stability"
    weight = 0.6
    KEYS: ClassVar = {
        "courant_mean_square": Key(
            "Learning rate divided by the largest one at which the second moment is bounded; near 1 is normal.",
            "",
            "If it stays above 1 and the loss does not fall: lower the learning rate, or take larger batches; "
            "`SGDStability.diagram` shows the largest rate of each batch size.",
            threshold=1.0,
        ),
        "mean_square_lr": Key("Largest learning rate at which the second moment is bounded.", "learning rate"),
        "collapsed": COLLAPSED,
        "mean_square_rows": Key("How many output gradients that was computed from.", optional=True),
    }
    needs_update = True
    alike: Tensor
    alike_since: Tensor

    def __init__(
        self,
        rows: int | None = None,
        *,
        outputs: Literal["top", "all"] = "top",
        replacement: bool = False,
        most_rows: int = 64,
    ):
        super().__init__()
        if rows is not None:
            whole("rows", rows, 2, instead=", or None for a quarter of the batch, 32 at least")
        whole("most_rows", most_rows, 0)
        if outputs not in ("top", "all"):
            raise ValueError(f"outputs={outputs!r}: give 'top' or 'all'")
        self.rows, self.outputs, self.replacement, self.most_rows = rows, outputs, replacement, most_rows
        self.latest: FrozenSGD | None = None
        self._most: int | None = None
        self._factors = StatisticsFactors()
        self._mode: Tensor | None = None
        self._forget_graph()
        for name, value in zip(("alike", "alike_since"), none_yet()):
            self.add_state(name, default=value, persistent=True)

    def _forget_graph(self) -> None:
        """Go back to replays: nothing is known of the graph of a step."""
        self._known: GraphKind | None = None
        self._population: int | None = None
        self._price: dict[str, float] = {}
        self._recent = RecentRows()
        self._designs: deque[float] = deque(maxlen=DESIGNS)

    def reader(self, module: nn.Module, run: RunContext, step: int) -> GraphReader | None:
        """Return what reads the rows from the step's own graph, so that no pass is made again."""
        if self.outputs != "top" or self._most is not None or run.shards is not None:
            return None  # the graph of a module with shards holds weights that are gone again
        return self._rows(module, run.generator(step, self.name), checks=self._checks_next)

    def _rows(self, module: nn.Module, generator: torch.Generator, *, checks: bool) -> GraphRows:
        """Return what reads the rows of the coming measurement from a graph."""
        return GraphRows(
            module, generator, partial(row_count, wanted=self.rows), self._passes,
            known=None if checks else self._known, renews=not checks and self._factors.is_due(self._update_count + 1),
            recent=self._recent,
        )  # fmt: skip

    def check(self, snapshot: Snapshot) -> None:
        critical_rule(snapshot)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        if self.reads_shards(snapshot):
            return shards_price(snapshot, self.rows, checks=self._checks_next or self._known is None)
        rule = rule_cost(snapshot)
        if self._price and not self.needs_replay:
            return self._price | rule
        if self._price and self._checks_next and "batch statistics" not in self._price:
            return self._price | rule | {"gradient": 1.0, "check of the rows": 1.0, "places of the samples": 1 / 3}
        if self._checks_next and (price := checked_price(snapshot, self._rows_of_graph(snapshot))):
            return price | rule
        samples = step_samples(snapshot, self._most)
        n, is_first = samples.samples, self.latest is None
        positions = max(2, self._positions(n)) if self.latest is None else self.latest.kernel.rows
        count = row_count(n, self.rows)
        price = replay_price(snapshot, samples, count, positions, is_first=is_first, checks=self._checks_next)
        return price | rule

    def limit_cost(self, snapshot: Snapshot, gradients: float) -> str | None:
        """Look at fewer samples of the batch, 32 at least."""
        if self.reads_shards(snapshot):
            return None
        samples = step_samples(snapshot, self._most).samples
        fewer = max(LEAST, round(samples * (gradients / max(sum(self.cost(snapshot).values()), 1e-9))))
        if fewer >= samples:
            return None
        self._most = fewer
        return f"{fewer} of {samples} samples"

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        if self.reads_shards(snapshot):
            return shards_memory(snapshot, self.rows)
        samples = step_samples(snapshot, self._most)
        return kernel_memory(snapshot, samples, samples.samples, max(samples.samples, self.rows or LEAST))

    def warm_up(self, snapshot: Snapshot) -> int:
        """Return how many gradients the preconditioner still lacks: that of one batch says nothing of the next."""
        # The first rank asks alone: nothing may be sent.
        return gradients_missing(snapshot)

    def path(self, snapshot: Snapshot) -> str:
        """Return by which rules per-sample gradients were computed, see `TangentKernel`."""
        return "exact" if self._checked is None else " and ".join(sorted(set(self._checked.path.values())))

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step; do nothing while its probes, where it has only those, are being collected."""
        vars(self)["complete"] = False
        try:
            if snapshot.held is not None and self.reads_shards(snapshot):
                if self._measure_shards(snapshot):
                    return
                snapshot = snapshot.whole
            self._measure(snapshot, self._rows_of_graph(snapshot))
        finally:
            if (reader := snapshot.readers.get(self.name)) is not None:
                reader.release()

    def _measure_shards(self, snapshot: Snapshot) -> bool:
        """Measure without a copy of the whole weights; return whether that is possible, on all ranks alike."""
        checks = self._checks(self._update_count) or self._known is None
        if checks:
            self._forget_graph()
        rows = self._rows(snapshot.module, snapshot.generator(self.name), checks=checks)
        if (sgd := self._of_shards(snapshot, rows, checks=checks)) is not None:
            self._finish(snapshot, sgd, checks=checks)
        return sgd is not None

    def _measure(self, snapshot: Snapshot, rows: GraphRows | None) -> None:
        checks = self._checks(self._update_count)
        if rows is not None:
            try:
                rows.form(remembered_rule(snapshot).scale, plain=checks)
            except Unmeasurable:
                raise
            except Exception:  # whatever the rules of layers raise: the samples are looked at
                rows = None
        reads = rows is not None and not checks and self._known is not None
        if snapshot.run.ranks.any_true(not reads, "the rows of the step's own graph"):
            if self._known is not None and not checks:
                self._is_changed()
                if self._checked is not None and self._checked.traces.keys() != snapshot.parameters.keys():
                    self._checked = None
                return  # the next step, at which this measurement goes on, is kept for a replay
            if not snapshot.can_replay:
                return
            reads = False
        if rows is not None and reads:
            samples = ProbeSet(
                snapshot.module, (), rows.samples, rows.batch * snapshot.run.ranks.world, self._population
            )
        else:
            samples = step_samples(snapshot, self._most)
        if not samples.full:
            return
        if checks and snapshot.gradient is not None:
            verify_gradient(snapshot)
        if checks and snapshot.loss is not None:
            verify(snapshot)  # nothing more where the gradient was checked
        is_agreed = checks and not snapshot.run.ranks.any(
            lambda: not self._agrees(snapshot, samples, rows), "rows of the step's own graph"
        )
        reads = reads or is_agreed
        of_pass: dict[str, Any] = {}
        if not reads:
            of_pass = {
                "outputs": self.outputs,
                "generator": snapshot.generator(self.name),
                "start": self._mode,
                "most_rows": self.most_rows,
                "positions": max(2, self._positions(samples.samples)),
                "most": row_count(samples.samples, self.rows),
                "renews": checks or self._factors.is_due(self._update_count),
            }
        try:
            sgd = frozen_sgd(
                snapshot,
                samples,
                checked=None if checks else self._checked,
                squares="batch",
                factors=self._factors,
                rows=rows if reads else None,
                chosen=dict(enumerate(rows.chosen)) if checks and rows is not None else None,
                **of_pass,
            )
        except Exception as error:
            if not reads or checks or snapshot.run.ranks.world > 1 or isinstance(error, Unmeasurable):
                raise
            self._is_changed()  # whatever the rules of layers raise: the measurement goes on at the next step
            return
        if checks:
            self._learn(snapshot, samples, sgd, rows, is_agreed=is_agreed)
        self._finish(snapshot, sgd, checks=checks)

    def _finish(self, snapshot: Snapshot, sgd: FrozenSGD, *, checks: bool) -> None:
        """Complete a measurement with the critical rate of the linearised step."""
        if self.latest is None:  # later a number of 0 stands beside others, and the loss says the rest
            require_curvature(snapshot, sgd.kernel)
        if sgd.kernel.design is not None:
            self._designs.append(sgd.kernel.design)
        rate = (1 - TOLERANCE) * sgd.mean_square_lr(  # errs downwards
            replacement=self.replacement, design=median(self._designs or [1.0]), tol=TOLERANCE
        )
        if math.isnan(rate):
            raise Unmeasurable("the Gram matrix is not finite: the weights or the outputs have overflowed")
        numbers = {
            "courant_mean_square": courant_of(sgd.lr, rate),
            "mean_square_lr": rate,
            "mean_square_rows": float(len(sgd.kernel.gram)),
        }
        # Each rank has looked at samples of its own.
        numbers, is_alike = snapshot.run.ranks.of_first((numbers, bool(sgd.kernel.alike)), self.name)
        numbers["collapsed"], alike, since = collapse(
            self.alike, self.alike_since, step=snapshot.step, is_alike=is_alike
        )
        # As setattr does, after a dozen questions for each.
        vars(self).update(alike=alike, alike_since=since, latest=sgd, _mode=sgd.kernel.mode)
        if checks:
            self._checked = sgd.kernel
        self.finish(numbers)

    def _rows_of_graph(self, snapshot: Snapshot) -> GraphRows | None:
        """Return the rows that were read from the step's own graph; None where it could not be read."""
        rows = snapshot.readers.get(self.name)
        if not isinstance(rows, GraphRows) or rows.failure is not None or not rows.chosen or rows.alike:
            return None
        return rows

    def _agrees(self, snapshot: Snapshot, samples: ProbeSet, rows: GraphRows | None) -> bool:
        """Return whether rows from the step's own graph were found to be those of its replay, masks and all.

        Where statistics of the batch tie samples together, or the step has several micro-batches, they are compared
        with rows of the samples instead, see `_learn`.
        """
        if rows is None or samples.batches or samples.is_given or len(rows.chosen) != 1:
            return False
        try:
            return not unexplained_rows(snapshot, rows)
        except Exception:  # whatever the rules of layers raise: the samples are looked at
            return False

    def _learn(
        self, snapshot: Snapshot, samples: ProbeSet, sgd: FrozenSGD, rows: GraphRows | None, *, is_agreed: bool
    ) -> None:
        """Find out whether rows from the step's own graph are those of its samples; then no replay is made any more.

        Args:
            snapshot: a step.
            samples: of its batch.
            sgd: what was measured.
            rows: from its graph; None where it could not be read.
            is_agreed: whether the rows were found to be those of the replayed step.
        """
        price = self._price
        self._forget_graph()
        self._is_checked()

        def is_other() -> bool:
            if is_agreed:
                return False
            if rows is None or not {*sgd.kernel.path.values()} <= {"structured", "statistics"}:
                return True
            gram, known = rows.gram_times(sgd.kernel.factors), sgd.kernel.gram
            error = (gram - known).abs().amax() if gram.shape == known.shape else math.inf
            return not bool(error <= tolerance(rows.dtype) * known.abs().amax())

        if not snapshot.run.ranks.any(is_other, "rows of the step's own graph") and rows is not None:
            self._known, self._population = rows.kind, samples.population
            self._price = price or graph_price(snapshot, rows)
        elif self._update_count == 1:
            self._next_check = 2  # what is peculiar about the first step may be over

    def _positions(self, samples: int) -> int:
        """Return how many positions of each sample are looked at, if it has several."""
        return -(-(self.rows or LEAST) // max(samples, 1))

    def _passes(self, samples: int) -> int:
        """Return how many positions of each sample are looked at beside those that are known from earlier steps."""
        self._recent.most = self._positions(samples)
        least = 2 if self._update_count % COMPARED == 0 else 1
        return max(least, min(AT_ONCE, self._recent.most - len(self._recent)))

    def restart(self) -> None:
        super().restart()
        self.alike, self.alike_since = none_yet()

    def compute(self) -> dict[str, Tensor]:
        """Return the last measurement, without an infinite rate, where nothing can become unstable."""
        values = super().compute()
        if bool(values["stability/mean_square_lr"].isinf()):
            del values["stability/mean_square_lr"]
        return values

    def vectors(self) -> dict[str, Tensor]:
        return {} if self._mode is None else {"mode": self._mode}

    def load_vectors(self, vectors: dict[str, Tensor]) -> None:
        self.latest, self._checked, self._mode = None, None, vectors.get("mode")
        self._factors = StatisticsFactors()
        self._gathers = False
        self._forget_graph()
