"""Lyapunov exponent of the sharp mode along the trajectory of training."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lsp_callbacks._validation import whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.lyapunov import exponent_bounds, window_exponent
from lsp_callbacks.functional.trajectory.statistics import student_bounds
from lsp_callbacks.operators.cost import beside, forward_cost, products
from lsp_callbacks.operators.curvature.finite_differences import LEAST
from lsp_callbacks.operators.curvature.hessian import Method, decided, path_taken, products_so_far, resolved
from lsp_callbacks.operators.curvature.stability_threshold import has_own_run, threshold_constant
from lsp_callbacks.operators.footprint import footprint
from lsp_callbacks.operators.trajectory.coming_preconditioner import gradients_missing
from lsp_callbacks.operators.trajectory.formula_tangent import has_state
from lsp_callbacks.operators.trajectory.frozen_preconditioner import step_constants
from lsp_callbacks.operators.trajectory.step_on_plane import needs_product, step_on_plane
from lsp_callbacks.operators.trajectory.update_rules import formula_of
from lsp_callbacks.quantities.base import scalar
from lsp_callbacks.quantities.curvature.sharpness import alignment_memory, measured_mode, mode_cost
from lsp_callbacks.quantities.curvature.whole_or_shards import whole_or_shards
from lsp_callbacks.quantities.key import NATS, PREFIX, Key
from lsp_callbacks.quantities.trajectory.windowed import Windowed
from lsp_callbacks.step.snapshot import Snapshot

#: Vectors over all parameters that a step on the plane reads and writes, and further ones with a preconditioner.
PLANE, FROZEN = 6, 32


class Lyapunov(Windowed):
    """Exponent of the *sharp mode* under the real update map, in nats per optimizer step.

    The first step of a window aligns a direction v with the top algebraic eigenvector of its (preconditioned) Hessian;
    the derivative of the real update of each of the ``window`` steps from this one on, on the same batches, masks,
    rates, momentum, clipping and prox, is compressed onto it (with momentum: onto the plane of ``(v, 0)`` and ``(0,
    m)``, m the buffer that displaces by v), and the exponent is that of the product, see
    `lsp_callbacks.functional.sharp_mode_exponent`. A mode that is wrong by an angle phi makes an error of ``phi^2`` in
    the curvature, and no other. In the first step under SGD the curvature is the estimate that ``sharpness`` is, which
    costs no product; there the sign is that of ``courant_gd - 1``. Second moments of Adam, AdamW,
    RMSprop and Adagrad are not frozen: the direction in which v moves them is added to the plane. In the first twenty
    steps or so, while they change by large factors, the update has no such mode: read the Courant number there.

    The value is the mean of the last ``average`` windows. ``_lower`` and ``_upper`` are one-sided 90 % bounds: the
    means of the least and the largest exponents that each window allows, given the error bar of the sharpness that it
    was aligned with (on a fixed quadratic all windows coincide, and this is the only error), less and plus Student's
    width of the spread of the windows. Where ``|1 - courant_gd|`` is above that error bar, the sign is that of the
    step's own quadratic. Below the edge, near ``eta lambda = 1``, a step removes the mode completely, and ``_lower`` is
    ``-inf`` where that lies within the error bar.

    It is negative below the edge of stability. A positive value means that the linearised update amplifies: healthy
    full-batch training stays there for long stretches, so treat it as an event, and stop when the loss confirms it. It
    does not depend on batch noise.

    Args:
        window: number of steps in a window, 1 or more.
        average: number of windows in the mean.
        method: of the Hessian products.

    Raises:
        ValueError: for a window or an average below 1.

    Cost: the alignment shared with sharpness, then one Hessian product in each step of the window (none in the first
    under SGD, unless gradients are clipped or a prox follows), and the optimizer's formula on the plane alone.

    Source: Chemnitz & Engel 2025 for the exponent; Benettin et al. 1980; docs/theory.md, section The exponent along
    the trajectory.
    """

    weight = 0.8
    name = "lyapunov"
    KEYS: ClassVar = {
        "lyapunov": Key(
            "Growth of the sharpest direction under the real update; above 0 it amplifies.",
            NATS,
            "If it stays above 0 and the loss does not fall: lower the learning rate.",
            threshold=0.0,
        ),
        "lyapunov_lower": Key("One-sided 90 % lower bound, from 3 windows on.", NATS, threshold=0.0),
        "lyapunov_upper": Key("One-sided 90 % upper bound, from 3 windows on.", NATS),
    }
    key_states = False
    windows: Tensor
    spans: Tensor

    def __init__(self, window: int = 1, average: int = 5, method: Method = "auto"):
        super().__init__(method)
        whole("window", window, 1), whole("average", average, 1)
        self.window, self.average = window, average
        self._path, self._is_part = "exact", False
        self.add_state("windows", default=torch.empty(0, dtype=torch.float64), persistent=True)
        self.add_state("spans", default=torch.empty(0, 2, dtype=torch.float64), persistent=True)

    def check(self, snapshot: Snapshot) -> None:
        threshold_constant(step_constants(snapshot))  # the alignment needs an edge

    def view(self, snapshot: Snapshot) -> Snapshot:
        """Return a step on whole parameters, or the shards themselves where there is no room for these."""
        couples = snapshot.optimizer is not None and (rule := formula_of(snapshot.optimizer)) and rule.couples
        return whole_or_shards(snapshot, needs_whole=bool(couples) or snapshot.run.prox is not None)

    def warm_up(self, snapshot: Snapshot) -> int:
        """Return how many gradients the preconditioner still lacks: that of one batch says nothing of the next."""
        return gradients_missing(snapshot)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        rule, waits = step_constants(snapshot), not has_state(snapshot)
        steps = self.window - (not waits and not has_own_run(snapshot) and not needs_product(snapshot))
        pushed = products(snapshot, self._pushed_by(snapshot), 1) + beside(
            snapshot, vectors=PLANE + FROZEN * rule.frozen
        )
        window = steps * pushed + beside(snapshot, calls=90 * self.window) + waits * forward_cost(snapshot)
        return {**mode_cost(snapshot, resolved(snapshot, self.method), warm=self._mode is not None), "window": window}

    def _pushed_by(self, snapshot: Snapshot) -> Method:
        """Return the method that prices assume of the update's derivative.

        Behind a preconditioner differences are seldom accurate enough for it.
        """
        is_exact = step_constants(snapshot).frozen and self.method == "auto"
        return "exact" if is_exact else resolved(snapshot, self.method)

    def limit_cost(self, snapshot: Snapshot, gradients: float) -> str | None:
        """Take fewer steps in a window, down to one."""
        lowered = self._lower("window", snapshot, gradients)
        return None if lowered is None else f"{lowered} steps in a window"

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        frozen = step_constants(snapshot).frozen
        plane = 3 + 2 * frozen  # derivatives of the formula, which SGD has as numbers
        method = self._pushed_by(snapshot) if frozen else self.method
        return {**alignment_memory(snapshot, method), "plane": plane * footprint(snapshot).parameters}

    def update(self, snapshot: Snapshot) -> None:
        """Align in the first step of a window, and push through it and each one after it; a gap starts again.

        The first step of a run, in which no momentum exists yet, is none of the window.
        """
        self.complete = False
        is_new = not self._continues(snapshot) or self._frame["in_parts"] != (snapshot.held is not None)
        self._is_part = snapshot.held is not None
        frame = self._aligned(snapshot) if is_new else self._frame
        if is_new and not has_state(snapshot):
            self._frame = frame
            return
        assert self._mode is not None
        plane = {name: frame[name] for name in ("root", "buffer_scale", "rest", "method", "eigenvalue")}
        taken = products_so_far(snapshot)
        before = taken.taken
        step = step_on_plane(snapshot, self._mode, **plane)
        rough = frame["rough"] or taken.taken > before  # a difference in any step, whichever path the last one took
        self._path = path_taken(snapshot, frame["method"])
        maps, curvatures = [*frame["maps"], step.whole], [*frame["curvatures"], step.curvature]
        rest = step.rest
        if len(maps) < self.window:
            window = {"maps": maps, "curvatures": curvatures, "rest": rest, "rough": rough, "step": snapshot.step}
            self._frame = frame | window | {"eigenvalue": None}
            return
        self._frame = {}
        remembers = step.remembers
        exponent = window_exponent(maps, rest=remembers)
        if math.isnan(exponent):  # a NaN would hide the next windows
            raise Unmeasurable("the pushed direction is not finite: the weights or the loss have overflowed")
        if exponent == -math.inf and snapshot.run.prox is not None:
            raise Unmeasurable(
                "prox removes the sharp mode: a displacement along it is 0 after one step, and has no exponent"
            )
        least, most = exponent_bounds(maps, curvatures, frame["below"], frame["above"], rest=remembers)
        # Rounding of the steps themselves, for any curvature.
        eps = torch.finfo(self._mode.dtype).eps
        rounding = LEAST * eps**0.5 if rough else 16 * eps
        span = (least - rounding, most + rounding)
        self.windows = torch.cat([self.windows, scalar(exponent)[None]])[-self.average :]
        self.spans = torch.cat([self.spans, torch.tensor([span], dtype=torch.float64)])[-self.average :]
        self.complete = True

    def _aligned(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return a window that begins at a step, and follow the sharp mode to it.

        Where a step on the plane knows nothing else of the curvature, it takes the estimate of its largest eigenvalue,
        which lies nearer than the quotient of the mode, with its error bar on both sides.
        """
        aligned = measured_mode(snapshot, self._mode, self._top, self.method)
        self._mode, self._top = aligned.mode, getattr(aligned, "top", self._top)
        below, above, eigenvalue = float(aligned.accuracy), float(aligned.beyond), None
        if aligned.eigenvalue is not None and not needs_product(snapshot) and has_state(snapshot):
            eigenvalue, below = map(float, aligned.eigenvalue)
            above = below if self.window == 1 else max(below, above)
        if snapshot.held is not None and needs_product(snapshot):
            # No exact product takes over, and that of the step is as accurate as those of the alignment.
            below, above = below + float(aligned.accuracy), above + float(aligned.accuracy)
        return {
            "root": aligned.root,
            "buffer_scale": aligned.buffer_scale,
            "below": below,
            "above": above,
            "method": decided(snapshot, self.method),
            "eigenvalue": eigenvalue,
            "rest": None,
            "maps": [],
            "curvatures": [],
            "rough": False,
            "step": snapshot.step,
            "in_parts": snapshot.held is not None,
        }

    def vectors(self) -> dict[str, Any]:
        """Return what is carried to the next steps; nothing of it where it is this process's part alone."""
        return {} if self._is_part else super().vectors()

    def path(self, snapshot: Snapshot) -> str:
        return self._path

    def restart(self) -> None:
        super().restart()
        self.windows, self.spans = self.windows[:0], self.spans[:0]  # the old ones are those of another map

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of the last windows and its bounds, in nats per step."""
        mean, lower, upper = student_bounds(self.windows)
        values = {f"{PREFIX}lyapunov": mean}
        if len(self.windows) >= 3:
            # NaN where a state gave the windows without their spans.
            least, most = self.spans.mean(0) + (0.0 if len(self.spans) == len(self.windows) else torch.nan)
            values[f"{PREFIX}lyapunov_lower"] = least - (mean - lower)
            values[f"{PREFIX}lyapunov_upper"] = most + (upper - mean)
        return values
