"""Sharpness, its limit, and the Courant number of gradient descent."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.cost import forward_cost, lanczos_cost
from lsp_callbacks.operators.curvature.hessian import Method, resolved
from lsp_callbacks.operators.curvature.stability_threshold import (
    StabilityThreshold,
    stability_threshold,
    threshold_constant,
    top_eigenvalue,
)
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.trajectory.coming_preconditioner import DRAWS, gradients_missing
from lsp_callbacks.operators.trajectory.frozen_preconditioner import coupled_decay, decay_rates, frozen_rule, rates
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.step.snapshot import Snapshot, computed_once

#: Lanczos products at most, from the last eigenvector and without one; the cost model counts the first. With no more
#: parameters than the second, as many as there are parameters.
WARM, COLD = 7, 12
#: On the relative error bars: fewer products are taken where they are enough.
TOLERANCE = 0.1
#: Turns after which a player that has not stepped is given up.
PATIENCE = 8
#: Sharpness, limit, Courant number and the error bars of the first and of the last, of a player.
Readings = tuple[float, ...]


def measured_edge(snapshot: Snapshot, start: Tensor | None, top: Tensor | None, method: Method) -> StabilityThreshold:
    """The step's `StabilityThreshold`, computed once for all quantities that align with it."""
    steps = _steps(snapshot, start)
    thresholds = _thresholds(snapshot)
    if method not in thresholds:
        thresholds[method] = stability_threshold(
            snapshot, start=start, top=top, steps=steps, tol=TOLERANCE, method=method
        )
    return thresholds[method]


@computed_once
def _thresholds(snapshot: Snapshot) -> dict[Method, StabilityThreshold]:
    """Return the thresholds of the step by method; they also depend on where the first caller started."""
    return {}


def _steps(snapshot: Snapshot, start: Tensor | None) -> int:
    n = _size(snapshot)
    return WARM if start is not None and len(start) == n and n > COLD else COLD


def edge_cost(snapshot: Snapshot, method: Method) -> dict[str, float]:
    """Gradients for the alignment that sharpness and exponent share."""
    method, n = resolved(snapshot, method), _size(snapshot)
    one = all(isinstance(value, float) for value in (rates(snapshot), decay_rates(snapshot)))
    maximize = frozen_rule(snapshot).sign < 0
    runs = 1 + maximize if one else 2 + (maximize or isinstance(coupled_decay(snapshot), Tensor))
    scatter = {"signs": (1 + 2 * DRAWS) / 3} if frozen_rule(snapshot).frozen else {}
    products = lanczos_cost(snapshot, method, WARM if n > COLD else n, runs)
    return {"forward": forward_cost(snapshot), "edge": products} | scatter


def _size(snapshot: Snapshot) -> int:
    return sum(p.numel() for p in snapshot.parameters.values())


def edge_memory(snapshot: Snapshot, method: Method) -> dict[str, float]:
    """Bytes for the alignment: the basis of a Lanczos run that starts from nothing."""
    return product_memory(snapshot, method, COLD)


class Sharpness(Quantity):
    """The largest algebraic Hessian eigenvalue of the step's loss against what the optimizer can bear.

    ``courant_gd = lambda_max(R^1/2 H' R^1/2) / c`` with R the effective rates, H' the Hessian with coupled weight
    decay, and c from `lsp_callbacks.functional.stability_constant`: 1 is the edge of stability of full-batch steps.
    R is the learning rate times the preconditioner of Adam, AdamW, RMSprop or Adagrad, as it will be some ten steps
    later (`lsp_callbacks.operators.coming_rule`), and the factor of clipping, as it is in this step; what a
    ``prox`` does to the weights after it is not in it. Behind a preconditioner it is first measured when that holds
    two gradients, which a single step does not. It is measured on one mini-batch and, under momentum, blind to
    batch noise. When it stays above 1 and the loss does not fall: lower the learning rate, or warm it up for
    longer.

    ``sharpness_residual`` is a relative error bar: the largest eigenvalue lies between ``sharpness`` and ``sharpness +
    sharpness_residual |sharpness|``; likewise ``courant_gd``. It is no residual of one eigenvector, which says nothing
    of a mode that has only now become the sharpest, but what the noise in the start of Lanczos may have missed, see
    `lsp_callbacks.operators.curvature.stability_threshold`; how often it holds along ten runs is in
    ``benchmarks/sharpness_error_bars.md``. With at most 12 parameters Lanczos runs to its end, and nothing is missed.

    Where several players take turns, each is measured on its own loss and its own parameters; the measurement is
    complete when all have been seen. The largest Courant number stands for all, and with it that player's sharpness,
    limit and residual. It does not see how the players drive each other: `LyapunovTrajectory` does.

    Where the update is not what the optimizer makes of the gradient, sharpness and residual are all that is measured.

    Args:
        method: of the Hessian products, see `lsp_callbacks.operators.hessian`.

    Keys: ``stability/sharpness`` (units of loss / parameter^2), ``stability/sharpness_limit``,
    ``stability/courant_gd``, ``stability/sharpness_residual`` (relative). Where ``courant_gd`` has a run of its own, as
    behind a preconditioner, its error bar is ``stability/courant_gd_residual``. For players also
    ``stability/player_courant/<name>`` and ``stability/player_sharpness/<name>``.

    Raises:
        Unmeasurable: with several players, if one of them does not step for a long time.

    Cost: at most 7 products, shared with the exponent: with what Lanczos makes of them 15 gradients by differences, 17
    where exact products are taken; fewer where the error bar is below 10 % before; 12 products at the first reading.
    With rates that differ, as behind every preconditioner, H has a run of its own: 35 and 37.

    Source: Cohen et al. 2021, 2022; MATH section 3.

    Example:
        >>> import torch
        >>> from lsp_callbacks import Sharpness, Snapshot
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[2.0]])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> metric = Sharpness()
        >>> metric.update(Snapshot(step=0, module=net, replay=lambda: net(x).square().mean(), optimizer=sgd))
        >>> {key: float(value) for key, value in metric.compute().items()}
        {'stability/sharpness': 8.0, ..., 'stability/courant_gd': 1.0, ...}
    """

    name = "sharpness"
    keys = ("stability/sharpness", "stability/courant_gd", "stability/sharpness_residual")
    optional = ("stability/sharpness_limit", "stability/courant_gd_residual")
    needs_update = True
    without_update = ("stability/sharpness", "stability/sharpness_residual")
    patient = True
    plays = True
    sharpness: Tensor
    limit: Tensor
    courant: Tensor
    residual: Tensor
    courant_residual: Tensor
    players: Tensor

    def __init__(self, method: Method = "auto"):
        super().__init__()
        self.method: Method = choice("method", method, *get_args(Method))
        self._starts: dict[str, tuple[Tensor, Tensor]] = {}
        self._turn: dict[str, Readings] = {}
        self._first = 0
        self._alone = False
        self._names: list[str] = []
        self.add_state("players", default=torch.empty(0, 2, dtype=torch.float64), persistent=True)
        for state in ("sharpness", "limit", "courant", "residual", "courant_residual"):
            self.add_state(state, default=scalar(torch.nan), persistent=True)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        if snapshot.run.invalidated:
            method = resolved(snapshot, self.method)
            return {"forward": forward_cost(snapshot), "edge": lanczos_cost(snapshot, method, WARM, 1)}
        players = 1 if snapshot.player is None else len(snapshot.player.optimizers)
        return {
            part: gradients * (players if part == "edge" else 1)
            for part, gradients in edge_cost(snapshot, self.method).items()
        }

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        return edge_memory(snapshot, self.method)

    def wait(self, snapshot: Snapshot) -> int:
        """A preconditioner that has met one batch only is that of none: one step."""
        return gradients_missing(snapshot)

    def check(self, snapshot: Snapshot) -> None:
        threshold_constant(frozen_rule(snapshot))

    def update(self, snapshot: Snapshot) -> None:
        """Measures one step; in a game, until each player was measured."""
        self.complete, self._alone = False, snapshot.run.invalidated is not None
        if self._alone:
            self._without_update(snapshot)
            return
        player = snapshot.player
        name, names = ("", ("",)) if player is None else (player.name, tuple(player.optimizers))
        turn = self._turn if player is not None else {}
        first = self._first if turn else snapshot.step
        if snapshot.step - first >= PATIENCE * len(names):
            missing = ", ".join(one for one in names if one not in turn)
            raise Unmeasurable(f"player {missing} has not stepped for {snapshot.step - first} steps of the others")
        if name not in turn:
            start, top = self._starts.get(name, (None, None))
            found = measured_edge(snapshot, start, top, self.method)
            parts = (found.sharpness, found.limit, found.courant, found.error, found.courant_error)
            own = tuple(map(float, parts))
            self._starts[name], turn = (found.mode, found.top), {**turn, name: own}
        self._turn, self._first = turn, first
        if turn.keys() != set(names):
            return
        # What is unknown may be the largest.
        largest = max(turn.values(), key=lambda own: (math.isnan(own[2]), own[2]))
        self.sharpness, self.limit, self.courant, self.residual, self.courant_residual = map(scalar, largest)
        if player is not None:
            self._names = list(names)
            self.players = torch.tensor([(turn[name][2], turn[name][0]) for name in names], dtype=torch.float64)
        self._turn, self.complete = {}, True

    def _without_update(self, snapshot: Snapshot) -> None:
        """The Hessian's own eigenvalue, without the optimizer."""
        _, top = self._starts.get("", (None, None))
        pair = top_eigenvalue(snapshot, start=top, steps=_steps(snapshot, top), tol=TOLERANCE, method=self.method)
        assert pair.upper is not None
        error = (pair.upper - pair.value) / pair.value.abs().clamp_min(torch.finfo(torch.float64).tiny)
        self._starts[""] = (pair.vector, pair.vector)
        self.sharpness, self.residual, self.complete = scalar(pair.value), scalar(error), True
        self.limit = self.courant = self.courant_residual = scalar(math.nan)

    def compute(self) -> dict[str, Tensor]:
        """The last measurement."""
        values = {
            "stability/sharpness": self.sharpness,
            "stability/sharpness_limit": self.limit,
            "stability/courant_gd": self.courant,
            "stability/sharpness_residual": self.residual,
        }
        if not bool(self.courant_residual == self.residual) and not bool(self.courant_residual.isnan()):
            values["stability/courant_gd_residual"] = self.courant_residual
        if not bool(torch.isfinite(self.limit)):  # at rate 0 there is no limit
            del values["stability/sharpness_limit"]
        if self._alone:
            del values["stability/courant_gd"]
        for name, (courant, sharpness) in zip(self._names, self.players):
            values[f"stability/player_courant/{name}"] = scalar(courant)
            values[f"stability/player_sharpness/{name}"] = scalar(sharpness)
        return values

    def vectors(self) -> dict[str, Any]:
        return {"starts": dict(self._starts), "turn": dict(self._turn), "first": self._first} if self._starts else {}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self._starts, self._turn = dict(vectors.get("starts", {})), dict(vectors.get("turn", {}))
        self._first = vectors.get("first", 0)
