"""When to measure what; knows of no training loop."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from lsp_callbacks.monitor.after_update import completed_after_update
from lsp_callbacks.monitor.budget import Budget
from lsp_callbacks.monitor.cadence import Cadence, EveryNSteps
from lsp_callbacks.monitor.checkpoint import load_monitor_state, monitor_state
from lsp_callbacks.monitor.courant_source import PREFERENCE, CourantSource
from lsp_callbacks.monitor.error_policy import ErrorPolicy
from lsp_callbacks.monitor.history import History, Observation
from lsp_callbacks.monitor.invalidation import invalidated
from lsp_callbacks.monitor.losses import LossWatch
from lsp_callbacks.monitor.measurement import Measurement
from lsp_callbacks.monitor.selected_quantities import Reasons, SelectedQuantities, Skips, warn_of_skips
from lsp_callbacks.monitor.series_recorder import Recorder
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.step.known_scale import KnownScales
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.snapshot import Snapshot


class Monitor:
    """Measures quantities at some steps of a training run, within a budget, and keeps the curves.

    Args:
        quantities: what to measure.
        every_n_steps: start a measurement of each quantity every so many steps; of some, by name,
            ``{"spectral_norm": 500}``, while the others keep to the budget; None derives all from ``budget``, each at
            its own pace, see `Cadence`.
        budget: gradients spent on measuring, as a share of those spent on training, by the quantities' own cost model.
            Beside it there is an advance of 15 training steps for the first readings, or of one measurement of what
            was named, if that is more.
        named: names of the quantities that the user asked for; the others may be skipped with a warning, and are
            where one measurement costs more than 20 training steps (see `Quantity.limit_cost`), unless they have a
            pace of their own.
        strict: raise where a measurement fails, instead of recording NaN.
        max_memory: bytes, or "2GB", that a measurement may take beside training. It is predicted before the first one,
            by one more forward pass; what would take more is skipped. None is what is free on a CUDA device at the
            time, and elsewhere what lets the peak be 1.5 times that of training, at least 256 MB.
        time_limit: seconds that a measurement may take. Its parts are skipped, the longest first, until the rest
            fits; a measurement under way is never interrupted. The clock decides: two runs may measure different
            things. None is no limit.

    Attributes:
        quantities: what is measured, by name, see `SelectedQuantities`.
        history: the curves by key.
        paths: how each quantity was last measured: "exact", "exact, math attention", "finite difference", ...
        trace: loss, learning rate and energies of the last steps; None if no quantity asks for them.
        courant: which number ``stability/courant`` is, see `CourantSource`.
        known_scales: see `RunContext.known_scales`, which a checkpoint keeps with the vectors.
        losses: what the loss did so far, see `LossRecord`; a loop adds every step's, ``losses.saw(step, loss)``.
        invalidated: why the update of an earlier step was not the optimizer's; None if it was.

    Raises:
        ValueError: for a cadence below 1, or of a quantity that is not measured, a budget outside (0, 1], or a limit
            that is not positive.

    Example:
        >>> import torch
        >>> from lsp_callbacks import Monitor, Sharpness, Snapshot
        >>> net, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[2.0]])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> monitor = Monitor(Sharpness(), every_n_steps=1)
        >>> for step in range(3):
        ...     loss = lambda: net(x).square().mean()
        ...     _ = monitor.observe(Snapshot(step=step, module=net, replay=loss, optimizer=sgd))
        ...     sgd.zero_grad(); loss().backward(); _ = sgd.step()
        >>> monitor.history["stability/courant_gd"].values
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        *quantities: Quantity,
        every_n_steps: EveryNSteps = None,
        budget: float = 0.05,
        named: Collection[str] = (),
        strict: bool = False,
        max_memory: float | str | None = None,
        time_limit: float | None = None,
    ):
        self.cadence = Cadence(every_n_steps, budget)
        self.cadence.check_names([quantity.name for quantity in quantities])
        self.budget = Budget(max_memory, time_limit)
        self.quantities = SelectedQuantities(*quantities, named=named, strict=strict)
        self.errors, self.courant, self.losses = ErrorPolicy(strict=strict), CourantSource(), LossWatch()
        self.recorder = Recorder(self.quantities, self.errors)
        self.measurement = Measurement(self.quantities, self.cadence, self.budget)
        self.history, self.trace = History(), self.recorder.trace
        self.paths = self.measurement.paths
        self.reset()

    def reset(self) -> None:
        """Forget everything, as before a first run."""
        self.history.clear()
        for part in (
            self.quantities, self.cadence, self.budget, self.errors, self.courant, self.losses, self.recorder,
            self.measurement,
        ):  # fmt: skip
            part.reset()
        for name, quantity in self.quantities.items():
            self.cadence.add(name, weight=quantity.weight, length=quantity.prepare + quantity.window)
        self.cadence.headline = self.headline
        self.known_scales = KnownScales()
        self.invalidated: str | None = None
        self._ranks = Ranks()

    @property
    def keys(self) -> set[str]:
        """The global keys that can appear."""
        keys = self.quantities.possible_keys(without_update=bool(self.invalidated))
        return keys | self.courant.keys(keys, without_update=bool(self.invalidated))

    @property
    def skipped(self) -> dict[str, str]:
        """Why quantities are not measured, or not yet, by their names; of keys that are lost, by the keys' names."""
        return {**self.quantities.skipped, **self.cadence.waiting()}

    def require(self, snapshot: Snapshot, *, steps: float = math.inf) -> None:
        """Skip what cannot be measured on such steps; nothing is replayed.

        Args:
            snapshot: a step of the run that begins.
            steps: how many the run will take, as far as that is known.

        Raises:
            Unmeasurable: if a quantity that the user named is among it.
        """
        self._ranks = snapshot.run.ranks
        self._skip_all(self.quantities.unmeasurable(snapshot, steps=steps))
        self.quantities.begin(snapshot, self.errors)

    def _skip_all(self, skips: Skips) -> None:
        for reasons, warn in skips:
            self.skip(reasons, warn=warn, stacklevel=4)

    def skip(self, reasons: Reasons, *, warn: bool = True, stacklevel: int = 3) -> None:
        """Measure some quantities no more, with one warning for all.

        Args:
            reasons: names by the reason, of quantities, or of keys that a quantity does not report any more.
            warn: whether the user is told.
            stacklevel: of the warning.
        """
        self.quantities.skip(reasons)
        for name in (name for names in reasons.values() for name in names):
            self.cadence.drop(name)
            self.paths.pop(name, None)
        self.cadence.headline = self.headline
        if reasons:
            self.recorder.drop_unused()
        if reasons and warn and self._ranks.rank == 0:
            warn_of_skips(reasons, stacklevel=stacklevel + 1)

    def wants(self, step: int, *, scheduled: float = math.nan) -> bool:
        """Return whether `observe` would look at this step: if not, no snapshot needs to be made.

        Args:
            step: number of the optimizer step.
            scheduled: the learning rate that this step will use over the critical one, if the caller knows it.
        """
        return bool(self.cadence.due(step, scheduled=scheduled))

    def observe(self, snapshot: Snapshot) -> Observation | None:
        """Measure what is due at this step.

        Returns:
            What was completed; None if nothing was.

        Raises:
            Exception: whatever a measurement raised, under ``strict``.
        """
        if self.trace is not None:
            self.recorder.record(
                snapshot.step, snapshot.loss, snapshot.optimizer, snapshot.module, previous=snapshot.previous
            )
        if snapshot.step == 0:
            self.quantities.begin(snapshot, self.errors)
        if self.known_scales is not snapshot.run.known_scales:  # those of a checkpoint
            snapshot.run.known_scales.load(self.known_scales.state())
            self.known_scales = snapshot.run.known_scales
        given = snapshot
        if self.trace is not None or self.invalidated:  # otherwise what is cached of the snapshot stays
            snapshot = replace(snapshot, run=snapshot.run.completed(self.trace, self.invalidated))
        if not self.cadence.due(snapshot.step):
            return None
        self._ranks = snapshot.run.ranks
        try:
            measured = self.measurement.measure(snapshot)
        finally:
            if snapshot is not given:
                snapshot.forget()
        if measured.skips.warned or measured.skips.silent:
            self._skip_all(measured.skips)
        if measured.failures:
            self.errors.report(measured.failures, snapshot.step, warn=self._ranks.rank == 0)
        for text in measured.warnings if self._ranks.rank == 0 else ():
            self.errors.warn_once(text)
        has_limit = self.budget.seconds.limit is not None
        if has_limit and not self.cadence.under_way - self.quantities.awaiting():
            self.skip(self.budget.too_slow(self.quantities, snapshot))
        return self._with_courant(Observation(snapshot.step, {}, measured.failures), measured.values)

    def after_update(self, *, is_own: bool = True) -> Observation | None:
        """Complete what has awaited the update of the step that was observed last; next to nothing where nothing has.

        Args:
            is_own: whether nothing but the step's own update has moved the parameters since.

        Returns:
            What was completed; None if nothing was.
        """
        return completed_after_update(self, is_own=is_own)

    def _with_courant(self, observation: Observation, values: dict[str, float]) -> Observation | None:
        """Return the observation of a step with the headline metric, which may be that of an earlier step."""
        courant, before = self.courant, self.courant.key
        possible: Collection[str] = ()
        if before not in values:  # otherwise it does not matter what else there could be
            possible = self.quantities.possible_keys(optional=False, without_update=bool(self.invalidated))
        headline = courant.value(observation.step, values, possible)
        reported = {} if headline is None else courant.reported(headline[1])
        self.cadence.read(courant.reading(values))
        if courant.key != before:
            self.cadence.headline = self.headline
        if headline is not None:
            added = self.history.add(Observation(headline[0], {}), reported).values
            observation = Observation(observation.step, observation.values | added, observation.failures)
        return self.history.add(observation, values) if values or observation.values else None

    @property
    def headline(self) -> str | None:
        """Name of the quantity that gives ``stability/courant``, or will give it; None without one."""
        keys = PREFERENCE if self.courant.key is None else (self.courant.key,)
        return next(
            (name for key in keys for name, q in self.quantities.items() if key in self.quantities.reported_keys(q)),
            None,
        )

    def invalidate_update_metrics(self, observation: Observation | None, reason: str) -> Observation | None:
        """Measure nothing more that needs the update: a step did not move the parameters as its snapshot says.

        Args:
            observation: of that step; its numbers that depend on the update become NaN, in the history too.
            reason: for the warning.

        Returns:
            The corrected observation.

        Raises:
            Unmeasurable: under ``strict``.
        """
        return invalidated(self, observation, reason)

    def drop(self) -> None:
        """Forget windows and warm starts: the steps before are not those that come after."""
        self.cadence.interrupt()
        self.quantities.forget_vectors()
        self.known_scales.clear()

    def state_dict(self, *, vectors: bool = False) -> dict[str, Any]:
        """Return scalars, and on request the vectors of windows that are under way."""
        return monitor_state(self, vectors=vectors, joined=self._ranks.world > 1)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, of this version.

        Quantities that are new or gone are left alone. Windows that were under way begin anew if the state does not
        hold their vectors. A state that cannot be read, as that of another version, is ignored with a warning: the
        monitor measures as in a first run.
        """
        load_monitor_state(self, state)
