"""Lyapunov exponents along the trajectory that training really takes."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from lsp_callbacks._validation import choice, whole
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.trajectory.lyapunov import exponent_bounds, plane_map, window_exponent
from lsp_callbacks.functional.trajectory.statistics import batch_means, student_bounds
from lsp_callbacks.linalg import LinearOperator, orthonormalise, push
from lsp_callbacks.operators.cost import beside, products, push_cost
from lsp_callbacks.operators.curvature.finite_differences import LEAST
from lsp_callbacks.operators.curvature.hessian import Method, resolved
from lsp_callbacks.operators.curvature.stability_threshold import threshold_constant
from lsp_callbacks.operators.memory import footprint, product_memory
from lsp_callbacks.operators.trajectory.formula_tangent import blocks_of, state_blocks
from lsp_callbacks.operators.trajectory.frozen_preconditioner import frozen_rule
from lsp_callbacks.operators.trajectory.multi_optimizer import joint_jacobian, require_game
from lsp_callbacks.operators.trajectory.proximal import update_drift, update_jacobian
from lsp_callbacks.operators.trajectory.step_jacobian import Path, state_weight, tangent_path
from lsp_callbacks.quantities.base import Quantity, scalar
from lsp_callbacks.quantities.curvature.sharpness import edge_cost, edge_memory, measured_edge
from lsp_callbacks.step.snapshot import Snapshot


class Windowed(Quantity):
    """A frame of directions that is pushed through consecutive steps."""

    needs_update = True

    def __init__(self, method: Method):
        super().__init__()
        self.method: Method = choice("method", method, *get_args(Method))
        self._frame: dict[str, Any] = {}
        # Of those that align with the sharp mode: where the next alignment starts.
        self._mode: Tensor | None = None
        self._top: Tensor | None = None

    def check(self, snapshot: Snapshot) -> None:
        tangent_path(snapshot)

    def _continues(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot is the next step of the window under way."""
        return bool(self._frame) and snapshot.follows(self._frame["step"])

    def vectors(self) -> dict[str, Any]:
        return self._frame | ({} if self._mode is None else {"mode": self._mode, "top": self._top})

    def load_vectors(self, vectors: dict[str, Any]) -> None:
        vectors = dict(vectors)
        self._mode, self._top = vectors.pop("mode", None), vectors.pop("top", None)
        self._frame = vectors


class Lyapunov(Windowed):
    """The *sharp-mode* exponent of the real update map, in nats per optimizer step.

    One step aligns a direction v with the top algebraic eigenvector of the (preconditioned) Hessian; the derivative of
    the real update of each of the next ``window`` steps, on the same batches, masks, rates, momentum, clipping and
    prox, is compressed onto it (with momentum: onto the plane of ``(v, 0)`` and ``(0, m)``, m the buffer that displaces
    by v), and the exponent is that of the product, see `lsp_callbacks.functional.sharp_mode_exponent`. A mode that is
    wrong by an angle phi errs by ``phi^2`` in the curvature, and by nothing else. Second moments of Adam, AdamW,
    RMSprop and Adagrad are not frozen: the direction into which v moves them is one more of the plane. In the first
    twenty steps or so, while they change by large factors, the update has no such mode: read the Courant number there.

    The value is the mean of the last ``average`` windows. ``_lower`` and ``_upper`` are one-sided 90 % bounds: the
    means of what each window's exponent may be at the least and at the most, given the error bar of the sharpness that
    it was aligned with (on a fixed quadratic all windows coincide, and that is all), less and plus Student's width,
    which is the spread of the windows. Where ``|1 - courant_gd|`` is above that error bar the sign is that of the
    step's own quadratic. Below the edge, near ``eta lambda = 1``, nothing is left of the mode after a step, and
    ``_lower`` is ``-inf`` where that lies within the bar.

    It is negative below the edge of stability. A positive value says that the linearised update amplifies: healthy
    full-batch training lives there for long stretches, so take it as an event, and stop when the loss confirms it. It
    does not see batch noise. When it stays positive and the loss does not fall: lower the learning rate.

    Args:
        window: steps in a window, 1 or more.
        average: windows in the mean.
        method: of the Hessian products.

    Keys: ``stability/lyapunov``; ``_lower`` and ``_upper`` from 3 windows on.

    Raises:
        ValueError: for a window or an average below 1.

    Cost: the alignment shared with sharpness, then a Hessian product a step, whatever the momentum, and all that the
    optimizer remembers is pushed along. With the alignment, by differences or with kinks: under SGD 28 or 36
    gradients, with momentum 43 or 48, under Adam 92 or 103.

    Source: Chemnitz & Engel 2025 for the exponent; Benettin et al. 1980; MATH section 1.
    """

    name = "lyapunov"
    keys = ("stability/lyapunov", "stability/lyapunov_lower", "stability/lyapunov_upper")
    prepare = 1
    windows: Tensor
    spans: Tensor

    def __init__(self, window: int = 4, average: int = 5, method: Method = "auto"):
        super().__init__(method)
        whole("window", window, 1), whole("average", average, 1)
        self.window, self.average = window, average
        self.add_state("windows", default=torch.empty(0, dtype=torch.float64), persistent=True)
        self.add_state("spans", default=torch.empty(0, 2, dtype=torch.float64), persistent=True)

    def check(self, snapshot: Snapshot) -> None:
        threshold_constant(frozen_rule(snapshot))  # the alignment needs an edge

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        method = resolved(snapshot, self.method)
        # Parameters, buffer and rest, each also at a fixed gradient, and the response of Adam: only one takes passes.
        rule = frozen_rule(snapshot)
        pushes = 2 * (1 + bool(rule.momentum) + rule.frozen) + rule.frozen
        step = products(snapshot, method, 1) + push_cost(snapshot, pushes)
        return {**edge_cost(snapshot, method), "window": self.window * (1 / 3 + step)}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        blocks = 1 + len(state_blocks(snapshot))
        plane = 2 * blocks * (3 if frozen_rule(snapshot).momentum else 2)  # before the step and after it
        return {**edge_memory(snapshot, self.method), "plane": plane * footprint(snapshot).parameters}

    def update(self, snapshot: Snapshot) -> None:
        """Aligns, or pushes through one more step; a gap in the steps starts again."""
        self.complete = False
        if not self._continues(snapshot):
            found = measured_edge(snapshot, self._mode, self._top, self.method)
            self._mode, self._top = found.mode, found.top
            self._frame = {
                "root": found.root,
                "kick": found.kick,
                "below": float(found.accuracy),
                "above": float(found.courant_error),
                "method": resolved(snapshot, self.method),
                "rest": None,
                "maps": [],
                "curvatures": [],
                "step": snapshot.step,
            }
            return
        frame = self._frame
        assert self._mode is not None
        plane: dict[str, Any] = {"mode": self._mode, "root": frame["root"], "kick": frame["kick"]}
        step, rest = plane_map(update_jacobian(snapshot, method=frame["method"]), **plane, rest=frame["rest"])
        curvature = step - plane_map(update_drift(snapshot), **plane, rest=rest)[0]
        maps, curvatures = [*frame["maps"], step], [*frame["curvatures"], curvature]
        if len(maps) < self.window:
            self._frame = frame | {"maps": maps, "curvatures": curvatures, "rest": rest, "step": snapshot.step}
            return
        self._frame = {}
        remembers = bool(rest.any())
        exponent = window_exponent(maps, rest=remembers)
        if math.isnan(exponent):  # one such window would hide the next ones
            raise Unmeasurable("the pushed direction is not finite: the weights or the loss have overflowed")
        if exponent == -math.inf and snapshot.run.prox is not None:
            raise Unmeasurable("prox holds the sharp mode where it is: nothing of it is left to grow")
        least, most = exponent_bounds(maps, curvatures, frame["below"], frame["above"], rest=remembers)
        # Of the steps' own numbers, whatever the curvature.
        eps = torch.finfo(self._mode.dtype).eps
        rounding = LEAST * eps**0.5 if self.path(snapshot).startswith("finite difference") else 16 * eps
        span = (least - rounding, most + rounding)
        self.windows = torch.cat([self.windows, scalar(exponent)[None]])[-self.average :]
        self.spans = torch.cat([self.spans, torch.tensor([span], dtype=torch.float64)])[-self.average :]
        self.complete = True

    def restart(self) -> None:
        super().restart()
        self.windows, self.spans = self.windows[:0], self.spans[:0]  # of another map

    def compute(self) -> dict[str, Tensor]:
        """Mean of the last windows and its bounds, in nats a step."""
        mean, lower, upper = student_bounds(self.windows)
        values = {"stability/lyapunov": mean}
        if len(self.windows) >= 3:
            # NaN where the windows are those of a state that had no spans.
            least, most = self.spans.mean(0) + (0.0 if len(self.spans) == len(self.windows) else torch.nan)
            values["stability/lyapunov_lower"] = least - (mean - lower)
            values["stability/lyapunov_upper"] = most + (upper - mean)
        return values


class LyapunovTrajectory(Windowed):
    """The ``k`` leading exponents over *all* parameters, the alpha_theta of the theory, in nats per optimizer step.

    A random frame is pushed through ``transient`` steps unrecorded and ``window`` steps recorded, with a QR at each.
    Over all parameters of an overparameterised model the leading exponent is held at 0 or just above by directions that
    no sample sees: in healthy training 1e-4 to 1e-3. They are finite-time numbers: each direction of the frame has one,
    and they are told sorted, the largest first, as two that are close may have changed places; exponents closer than
    their errors are not told apart. The error is by batch means over the recorded steps. The norm is that of ``(v, r
    m)``, both displacements of the parameters, see `lsp_callbacks.operators.state_weight`; second moments are pushed
    along.

    Where several players take turns (a GAN), the frame holds the parameters and states of all of them, and each step's
    `lsp_callbacks.operators.joint_jacobian` is pushed: the exponents are those of the game, in nats per *optimizer
    step*; times the steps in a batch they are those of a turn. ``transient`` and ``window`` are rounded up to
    whole turns, one step of each player. The norm is that of v alone. A pure rotation has exponent 0: players that
    circle each other without end. When it is clearly positive, the players drive each other apart: lower both rates, or
    add what damps (a gradient penalty, weight averaging).

    An optimizer whose formula is not known is differentiated by finite differences of its own ``step`` on copies;
    `path` then ends with "finite difference of step".

    Args:
        k: how many exponents.
        transient: steps before recording.
        window: steps recorded; at least 40, for the error bar.
        method: of the Hessian products.

    Keys: ``stability/lyapunov_trajectory`` with ``_error``; the others ``stability/lyapunov_spectrum/<i>``, i from 2.

    Raises:
        ValueError: for a window below 40, k below 1 or a negative transient.

    Cost: k products with the Jacobian of each step: 2.5 gradients a step for the first, or 4.3 with kinks.

    Source: Benettin et al. 1980; Katende, alpha_theta.
    """

    name = "lyapunov_trajectory"
    plays = True
    keys = ("stability/lyapunov_trajectory", "stability/lyapunov_trajectory_error")
    growth: Tensor

    def __init__(self, k: int = 1, transient: int = 100, window: int = 100, method: Method = "auto"):
        super().__init__(method)
        whole("k", k, 1), whole("transient", transient, 0), whole("window", window, 40)
        self.k, self.prepare, self.window = k, transient, window
        self._tangent: Path = "exact"
        self.add_state("growth", default=torch.empty(0, k, dtype=torch.float64), persistent=True)

    def check(self, snapshot: Snapshot) -> None:
        super().check(snapshot) if snapshot.player is None else require_game(snapshot)

    def _lengths(self, snapshot: Snapshot) -> tuple[int, int]:
        """Transient and window, in whole turns."""
        turn = 1 if snapshot.player is None else len(snapshot.player.optimizers)
        return -(-self.prepare // turn) * turn, -(-self.window // turn) * turn

    def cost(self, snapshot: Snapshot) -> dict[str, float]:
        steps = sum(self._lengths(snapshot))
        joint = snapshot.joint
        push = products(joint, resolved(joint, self.method), self.k, tangent=True)
        return {"trajectory": steps * (1 / 3 + push + beside(joint, calls=60, vectors=4 * self.k))}

    def memory(self, snapshot: Snapshot) -> dict[str, float]:
        if snapshot.player is not None:
            blocks = max(1 + len(blocks_of(optimizer)) for optimizer in require_game(snapshot).optimizers.values())
            return product_memory(snapshot.joint, self.method, 4 * self.k * blocks)
        known = tangent_path(snapshot) == "exact"
        blocks = 1 + (len(state_blocks(snapshot)) if known else 2)  # of an unknown optimizer, as of Adam
        return product_memory(snapshot, self.method, 4 * self.k * blocks)

    def update(self, snapshot: Snapshot) -> None:
        """Pushes the frame through one step; a gap in the steps starts again."""
        self.complete = False
        going = self._continues(snapshot)
        # Each player has a loss of its own.
        player = "" if snapshot.player is None else snapshot.player.name
        methods: dict[str, Method] = self._frame.get("methods", {}) if going else {}
        method = methods.get(player) or resolved(snapshot.joint, self.method)
        tangent = self._tangent if going else tangent_path(snapshot)
        jacobian, weight = _step(snapshot, method)
        if going and self._frame["frame"].shape[1] == jacobian.shape[1]:  # otherwise a player has frozen parameters
            frame, logs = self._frame["frame"], self._frame["logs"]
        else:
            frame, logs = orthonormalise(self._start(snapshot, jacobian, weight), weight)[0], []
        frame, log = orthonormalise(push(jacobian, frame), weight)
        logs, self._tangent = [*logs, log.cpu()], tangent
        transient, window = self._lengths(snapshot)
        if len(logs) < transient + window:
            self._frame = {"frame": frame, "logs": logs, "step": snapshot.step, "methods": methods | {player: method}}
            return
        self._frame = {}
        self.growth = torch.stack(logs[transient:])
        self.complete = True

    def path(self, snapshot: Snapshot) -> str:
        products = super().path(snapshot.joint)
        return products if self._tangent == "exact" else f"{products}, finite difference of step"

    def _start(self, snapshot: Snapshot, jacobian: LinearOperator, weight: Tensor) -> Tensor:
        """Random displacements; what is no displacement starts at 0."""
        generator = snapshot.generator(self.name)
        frame = torch.zeros(self.k, jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.device)
        random = torch.randn(self.k, len(weight), generator=generator, dtype=jacobian.dtype)
        frame[:, : len(weight)] = random.to(jacobian.device) / weight
        return frame

    def compute(self) -> dict[str, Tensor]:
        """The exponents of the last window."""
        if not len(self.growth):
            return {key: scalar(torch.nan) for key in self.keys}
        mean, error = batch_means(self.growth)
        order = mean.argsort(descending=True)  # over a finite window the frame may have them in another one
        mean, error = mean[order], error[order]
        values = {"stability/lyapunov_trajectory": mean[0], "stability/lyapunov_trajectory_error": error[0]}
        return values | {f"stability/lyapunov_spectrum/{i + 1}": mean[i] for i in range(1, self.k)}


def _step(snapshot: Snapshot, method: Method) -> tuple[LinearOperator, Tensor]:
    """The Jacobian of a step, over all players where there are several, and the weights of the norm."""
    if snapshot.player is None:
        return update_jacobian(snapshot, method=method), state_weight(snapshot)
    jacobian = joint_jacobian(snapshot, method=method)
    size = sum(p.numel() for p in snapshot.joint.parameters.values())
    # How far the other players' buffers reach is not known before their own steps.
    return jacobian, torch.ones(size, dtype=jacobian.dtype, device=jacobian.device)
