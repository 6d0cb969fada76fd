"""Sharpness, its limit, and the Courant number of gradient descent."""

from __future__ import annotations

import math
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.operators.cost import followed_cost, forward_cost, lanczos_cost
from lsp_callbacks.operators.curvature.followed_top import MOST, followed_top, products_taken
from lsp_callbacks.operators.curvature.hessian import Method, hessian, resolved
from lsp_callbacks.operators.curvature.stability_threshold import (
    NOTHING,
    Recent,
    SharpMode,
    StabilityThreshold,
    followed_mode,
    followed_threshold,
    has_own_run,
    may_share_products,
    stability_threshold,
    threshold_constant,
)
from lsp_callbacks.operators.curvature.top_eigenvalue import bounded_top
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.trajectory.coming_preconditioner import DRAWS, gradients_missing
from lsp_callbacks.operators.trajectory.frozen_preconditioner import coupled_decay, step_constants
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.quantities.curvature.whole_or_shards import whole_or_shards
from lsp_callbacks.quantities.key import CURVATURE, PREFIX, Key, relative_bar
from lsp_callbacks.step.snapshot import Snapshot

#: Products at most where the error bar is a bound, with an earlier vector and without, and the bar at which they stop.
_BOUNDED_WARM, _BOUNDED_COLD, _TOLERANCE = 7, 12, 0.1
#: Where a step keeps its thresholds, by method and whether they are bounded, and why it has no edge that is known.
_THRESHOLDS, _EDGE = "thresholds", "unknown edge"
#: Turns after which a player that has not stepped makes the measurement fail.
PATIENCE = 8
#: Sharpness, limit and Courant number of a player, and the error bars of the first and of the last.
Readings = tuple[float, ...]


def measured_threshold(
    snapshot: Snapshot,
    start: Tensor | None,
    top: Tensor | None,
    method: Method,
    recent: Recent = NOTHING,
    *,
    bounded: bool = False,
) -> StabilityThreshold:
    """Return the step's `StabilityThreshold`, computed once for all quantities that align with it.

    ``bounded`` is `stability_threshold`, which all of them take where one of those before did; otherwise
    `followed_threshold`.
    """
    # They also depend on where the first caller started.
    thresholds: dict[tuple[Method, bool], StabilityThreshold] = snapshot.shared.setdefault(_THRESHOLDS, {})
    if (method, True) in thresholds or bounded:
        steps = _BOUNDED_WARM if start is not None and _size(snapshot) > _BOUNDED_COLD else _BOUNDED_COLD
        if (method, True) not in thresholds:
            thresholds[method, True] = stability_threshold(
                snapshot, start=start, top=top, steps=steps, tol=_TOLERANCE, method=method
            )
        return thresholds[method, True]
    if (method, False) not in thresholds:
        thresholds[method, False] = followed_threshold(snapshot, start=start, top=top, recent=recent, method=method)
    return thresholds[method, False]


def measured_mode(snapshot: Snapshot, start: Tensor | None, top: Tensor | None, method: Method) -> SharpMode:
    """Return the sharp mode of a step: that of its threshold, where one was measured or costs no more products."""
    if snapshot.shared.get(_THRESHOLDS) or not has_own_run(snapshot):
        return measured_threshold(snapshot, start, top, method)
    return followed_mode(snapshot, start=start, method=method)


def _unknown_edge(snapshot: Snapshot) -> str | None:
    """Return why the optimizer of a step has no edge of stability that is known; None where it has."""
    snapshot.require_optimizer()
    try:
        threshold_constant(step_constants(snapshot))
    except Unmeasurable as error:
        return str(error)
    return None


def alignment_cost(snapshot: Snapshot, method: Method, *, warm: bool = True, bounded: bool = False) -> dict[str, float]:
    """Return the cost, in gradients, of the edge of stability, with an earlier mode or without: see `mode_cost`."""
    method = resolved(snapshot, method)
    maximize = step_constants(snapshot).sign < 0
    parts = mode_cost(snapshot, method, warm=warm, bounded=bounded)
    if not has_own_run(snapshot):
        return parts
    if not bounded and may_share_products(snapshot):
        shared = followed_cost(snapshot, method, products_taken(_size(snapshot), warm, metrics=2))
        return parts | {"sharpness": shared - parts["edge"]}
    runs = 2 + (maximize or isinstance(coupled_decay(snapshot), Tensor))
    return parts | {"sharpness": _top_cost(snapshot, method, warm, bounded, runs) - parts["edge"]}


def mode_cost(snapshot: Snapshot, method: Method, *, warm: bool = True, bounded: bool = False) -> dict[str, float]:
    """Return the cost, in gradients, of the sharp mode that sharpness and exponent share."""
    method = resolved(snapshot, method)
    runs = 1 if has_own_run(snapshot) else 1 + (step_constants(snapshot).sign < 0)
    scatter = {"signs": (1 + 2 * DRAWS) / 3} if gradients_missing(snapshot) else {}
    slopes = {"slopes": 1 / 3} if method == "finite_difference" and snapshot.kinked else {}
    edge = _top_cost(snapshot, method, warm, bounded, runs)
    return {"forward": forward_cost(snapshot), "edge": edge} | scatter | slopes


def _top_cost(snapshot: Snapshot, method: Method, warm: bool, bounded: bool, runs: int) -> float:
    n = _size(snapshot)
    if bounded:
        return lanczos_cost(snapshot, method, min(n, _BOUNDED_WARM if warm else _BOUNDED_COLD), runs)
    return followed_cost(snapshot, method, products_taken(n, warm), runs)


def _size(snapshot: Snapshot) -> int:
    return snapshot.size


def alignment_memory(snapshot: Snapshot, method: Method, *, bounded: bool = False) -> dict[str, float]:
    """Return the bytes for the alignment: a vector for each product, and one more."""
    return product_memory(snapshot, method, _BOUNDED_COLD if bounded else MOST + 1)


class Sharpness(Quantity):
    """Largest algebraic Hessian eigenvalue of the step's loss, and its ratio to the optimizer's stability limit.

    ``courant_gd = lambda_max(R^1/2 H' R^1/2) / c`` with R the effective rates, H' the Hessian with coupled weight
    decay, and c from `lsp_callbacks.functional.stability_constant`: 1 is the edge of stability of full-batch steps.
    R is the learning rate times the preconditioner of Adam, its variants, RMSprop or Adagrad, as it will be some ten
    steps later (`lsp_callbacks.operators.coming_rule`), and the factor of clipping, as it is in this step; a ``prox``
    after the step is not part of it. With a preconditioner it is first measured when that holds two gradients. It is
    measured on one mini-batch and, under momentum, blind to batch noise.

    By default the largest eigenvalue is followed from reading to reading by two products each, see
    `lsp_callbacks.operators.curvature.followed_top`; ``sharpness_residual`` is a relative error bar: the largest
    eigenvalue lies within ``sharpness (1 +- sharpness_residual)``, in at least 95 % of readings along ten runs
    (``benchmarks/sharpness_error_bars.md``); likewise ``courant_gd``. A single reading may miss a mode that has only
    now become the sharpest. ``bounded=True`` takes up to seven products, and the bar is what a noisy start of Lanczos
    may have missed with a probability of 5 %, whatever the spectrum, see
    `lsp_callbacks.operators.curvature.top_eigenvalue`. With at most 12 parameters there is one product for each, and
    nothing is missed.

    Where several players take turns, each is measured on its own loss and its own parameters; the measurement is
    complete when all have stepped. The largest Courant number is reported, with that player's sharpness, limit and
    residual. It does not see how the players drive each other: `LyapunovTrajectory` does.

    Where the real update is not the one that the optimizer computes from the gradient, and where the optimizer has no
    implemented formula or its steps have no edge of stability (Lion, Muon), only sharpness and residual are measured.

    Args:
        method: of the Hessian products, see `lsp_callbacks.operators.hessian`.
        bounded: whether the error bar is a bound, at three times the cost.

    Raises:
        Unmeasurable: with several players, if one of them does not step for a long time.

    Cost: two products, shared with the exponent, a third or a fourth where the error bar is wide, three at the first
    reading. A product is one gradient, on a small network with nearly as much again for its vectors, and at kinks one
    forward pass more, see `lsp_callbacks.operators.hessian`. With rates that differ, as with every preconditioner, it
    is one product more, which tell of both operators; with coupled weight decay or ``maximize`` H has products of its
    own: twice as many.

    Source: Cohen et al. 2021, 2022; docs/theory.md, section Edges of stability.

    Example:
        >>> import torch
        >>> from lsp_callbacks import Sharpness, Snapshot
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[2.0]])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> metric = Sharpness()
        >>> metric.update(Snapshot(step=0, module=net, replay=lambda: net(x).square().mean(), optimizer=sgd))
        >>> {key: float(value) for key, value in metric.compute().items()}
        {'stability/sharpness': 8.0, 'stability/courant_gd': 1.0, ...}
    """

    weight = 0.1
    name = "sharpness"
    KEYS: ClassVar = {
        "sharpness": Key(
            "Largest eigenvalue of the Hessian of the step's loss.",
            CURVATURE,
            "If it stays above sharpness_limit and the loss does not fall: lower the learning rate.",
        ),
        "courant_gd": Key(
            "Learning rate divided by the largest stable one, by the curvature of one batch.",
            "",
            "If it stays above 1 and the loss does not fall: lower the learning rate, or warm it up for longer.",
            threshold=1.0,
        ),
        "sharpness_residual": relative_bar("sharpness"),
        "sharpness_limit": Key("Largest sharpness that is stable at this learning rate.", CURVATURE, optional=True),
        "courant_gd_residual": relative_bar("courant_gd", optional=True),
        "player_courant/<player>": Key("courant_gd of one of several optimizers.", threshold=1.0),
        "player_sharpness/<player>": Key("sharpness of the loss of one of several optimizers.", CURVATURE),
    }
    needs_update = True
    without_update = ("stability/sharpness", "stability/sharpness_residual")
    supports_multiple_optimizers = True
    players: Tensor

    def __init__(self, method: Method = "auto", bounded: bool = False):
        super().__init__()
        self.method: Method = choice("method", method, *get_args(Method))
        self.bounded = bounded
        self._starts: dict[str, tuple[Tensor, Tensor]] = {}
        self._recent: dict[str, Recent] = {}
        self._turn: dict[str, Readings] = {}
        self._first = 0
        self._alone = self._is_part = False
        self._names: list[str] = []
        self.add_state("players", default=torch.empty(0, 2, dtype=torch.float64), persistent=True)

    def view(self, snapshot: Snapshot) -> Snapshot:
        """Return a step on whole parameters, or the shards themselves where there is no room for these."""
        return whole_or_shards(snapshot, needs_whole=self.bounded)

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        warm = bool(self._starts)
        if self.unknown_update(snapshot):
            edge = _top_cost(snapshot, resolved(snapshot, self.method), warm, self.bounded, 1)
            parts = {"forward": forward_cost(snapshot), "edge": edge}
        else:
            parts = alignment_cost(snapshot, self.method, warm=warm, bounded=self.bounded)
        parts["edge"] *= 1 if snapshot.player is None else len(snapshot.player.optimizers)
        return parts

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        return alignment_memory(snapshot, self.method, bounded=self.bounded)

    def warm_up(self, snapshot: Snapshot) -> int:
        """Return how many gradients the preconditioner still lacks: that of one batch says nothing of the next."""
        return 0 if self.unknown_update(snapshot) else gradients_missing(snapshot)

    def check(self, snapshot: Snapshot) -> None:
        if snapshot.player is not None:
            threshold_constant(step_constants(snapshot))
        elif not snapshot.run.invalidated:
            snapshot.require_optimizer()

    def unknown_update(self, snapshot: Snapshot) -> str | None:
        """Return why the optimizer's edge of stability is not known: its own, or how it is set."""
        if snapshot.run.invalidated or snapshot.player:
            return snapshot.run.invalidated
        if _EDGE not in snapshot.shared:
            snapshot.shared[_EDGE] = _unknown_edge(snapshot)
        return snapshot.shared[_EDGE]

    def update(self, snapshot: Snapshot) -> None:
        """Measure one step; with several players, the measurement is complete when each was measured."""
        self.complete, self._alone = False, self.unknown_update(snapshot) is not None
        self._is_part = snapshot.held is not None
        if self._alone:
            self._without_update(snapshot)
            return
        player = snapshot.player
        name, names = ("", ("",)) if player is None else (player.name, tuple(player.optimizers))
        turn = self._turn if player is not None else {}
        first = self._first if turn else snapshot.step
        if snapshot.step - first >= PATIENCE * len(names):
            missing = ", ".join(other for other in names if other not in turn)
            raise Unmeasurable(f"player {missing} has not stepped for {snapshot.step - first} steps of the others")
        if name not in turn:
            start, top = self._starts.get(name, (None, None))
            recent = self._recent.get(name, NOTHING)
            result = measured_threshold(snapshot, start, top, self.method, recent, bounded=self.bounded)
            self._recent[name] = result.recent
            numbers = (result.sharpness, result.limit, result.courant, result.error, result.courant_error)
            self._starts[name], turn = (result.carried, result.carried_top), {**turn, name: tuple(map(float, numbers))}
        self._turn, self._first = turn, first
        if turn.keys() != set(names):
            return
        # A NaN may be the largest.
        largest = max(turn.values(), key=lambda numbers: (math.isnan(numbers[2]), numbers[2]))
        sharpness, limit, courant, residual, courant_residual = largest
        if player is not None:
            self._names = list(names)
            self.players = torch.tensor([(turn[name][2], turn[name][0]) for name in names], dtype=torch.float64)
        self._turn = {}
        self.finish({
            "sharpness": sharpness,
            "sharpness_limit": limit if math.isfinite(limit) else math.nan,  # at rate 0 there is no limit
            "courant_gd": courant,
            "sharpness_residual": residual,
            "courant_gd_residual": courant_residual,
        })  # fmt: skip

    def _without_update(self, snapshot: Snapshot) -> None:
        """Measure the Hessian's own eigenvalue, without the optimizer."""
        (_, top), recent = self._starts.get("", (None, None)), self._recent.get("", NOTHING)
        H = hessian(snapshot, method=self.method)
        if self.bounded:
            steps = _BOUNDED_COLD if top is None else _BOUNDED_WARM
            found = bounded_top(H, snapshot, top, steps=steps, tol=_TOLERANCE)
        else:
            found = followed_top(H, snapshot, top, recent.tops)
        self._starts[""] = (found.carried, found.carried)
        self._recent[""] = recent.with_values(found.early, found.early)
        error = found.error / found.value.abs().clamp_min(torch.finfo(torch.float64).tiny)
        self.finish({"sharpness": found.value, "sharpness_residual": error})

    def compute(self) -> dict[str, Tensor]:
        """Return the last measurement."""
        values = super().compute()
        if self._alone:
            del values[f"{PREFIX}courant_gd"]
        for name, (courant, sharpness) in zip(self._names, self.players):
            values[f"{PREFIX}player_courant/{name}"] = scalar(courant)
            values[f"{PREFIX}player_sharpness/{name}"] = scalar(sharpness)
        return values

    def vectors(self) -> dict[str, Any]:
        if not self._starts or self._is_part:
            return {}
        recent = {name: (values.tops, values.modes) for name, values in self._recent.items()}
        return {"starts": dict(self._starts), "recent": recent, "turn": dict(self._turn), "first": self._first}

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        self._starts, self._turn = dict(vectors.get("starts", {})), dict(vectors.get("turn", {}))
        self._recent = {name: Recent(*map(tuple, values)) for name, values in vectors.get("recent", {}).items()}
        self._first = vectors.get("first", 0)
