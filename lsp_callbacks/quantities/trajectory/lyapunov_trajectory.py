"""Leading Lyapunov exponents over all parameters along the trajectory of training."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lsp_callbacks._validation import whole
from lsp_callbacks.functional.trajectory.statistics import batch_means
from lsp_callbacks.linalg import LinearOperator, orthonormalise, push
from lsp_callbacks.operators.cost import beside, products
from lsp_callbacks.operators.curvature.hessian import Method, decided, resolved
from lsp_callbacks.operators.memory import product_memory
from lsp_callbacks.operators.trajectory.formula_tangent import blocks_of, state_blocks
from lsp_callbacks.operators.trajectory.multi_optimizer import joint_jacobian, require_game
from lsp_callbacks.operators.trajectory.proximal import update_jacobian
from lsp_callbacks.operators.trajectory.step_jacobian import Path, state_weight, tangent_path
from lsp_callbacks.quantities.base import scalar
from lsp_callbacks.quantities.key import NATS, PREFIX, Key, standard_error
from lsp_callbacks.quantities.trajectory.windowed import Windowed
from lsp_callbacks.step.snapshot import Snapshot


class LyapunovTrajectory(Windowed):
    """Leading ``k`` exponents over *all* parameters, the alpha_theta of the theory, in nats per optimizer step.

    A random frame is pushed through ``transient`` steps that are not recorded and ``window`` steps that are, with a QR
    at each. Over all parameters of an overparameterised model the leading exponent is kept at 0 or just above by
    directions that no sample depends on: in healthy training 1e-4 to 1e-3. They are finite-time numbers, sorted with
    the largest first, as two that are close may change places during the window; exponents that differ by less than
    their errors are not distinguished. The error is by batch means over the recorded steps. The norm is that of
    ``(v, r m)``, both displacements of the parameters, see `lsp_callbacks.operators.state_weight`; second moments are
    pushed along.

    Where several players take turns (a GAN), the frame contains the parameters and states of all of them, and each
    step's `lsp_callbacks.operators.joint_jacobian` is applied: the exponents are those of the game, in nats per
    *optimizer step*; times the steps in a batch they are those of a turn. ``transient`` and ``window`` are rounded up
    to whole turns, one step of each player. The norm is that of v alone. A pure rotation has exponent 0: players that
    circle each other without end.

    An optimizer without a built-in formula is differentiated by finite differences of its own ``step`` on copies;
    `path` then ends with "finite difference of step".

    Args:
        k: number of exponents.
        transient: number of steps before recording.
        window: number of recorded steps; at least 40, for the error bar.
        method: of the Hessian products.

    Raises:
        ValueError: for a window below 40, k below 1 or a negative transient.

    Cost: k products with the Jacobian of each step: 2.5 gradients a step for the first, or 4.3 with kinks.

    Source: Benettin et al. 1980; Katende 2025, alpha_theta.
    """

    name = "lyapunov_trajectory"
    supports_multiple_optimizers = True
    KEYS: ClassVar = {
        "lyapunov_trajectory": Key(
            "Largest exponent of the real updates over all parameters.",
            NATS,
            "Clearly above 0 with several optimizers, they drive each other apart: lower both rates, or add damping (a "
            "gradient penalty, weight averaging).",
        ),
        "lyapunov_trajectory_error": standard_error("lyapunov_trajectory", NATS),
        "lyapunov_spectrum/<i>": Key("i-th largest exponent, from the second on.", NATS),
    }
    key_states = False
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
        """Return transient and window, in whole turns."""
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
        supported = tangent_path(snapshot) == "exact"
        blocks = 1 + (len(state_blocks(snapshot)) if supported else 2)  # an unknown optimizer counts as Adam
        return product_memory(snapshot, self.method, 4 * self.k * blocks)

    def update(self, snapshot: Snapshot) -> None:
        """Push the frame through one step; a gap in the steps starts again."""
        self.complete = False
        continues = self._continues(snapshot)
        # Each player has a loss of its own.
        player = "" if snapshot.player is None else snapshot.player.name
        methods: dict[str, Method] = self._frame.get("methods", {}) if continues else {}
        method = methods.get(player) or decided(snapshot.joint, self.method)
        tangent = self._tangent if continues else tangent_path(snapshot)
        jacobian, weight = _step(snapshot, method)
        if continues and self._frame["frame"].shape[1] == jacobian.shape[1]:  # otherwise a player froze parameters
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
        """Return random displacements of the parameters and buffers; second moments start at 0."""
        generator = snapshot.generator(self.name)
        frame = torch.zeros(self.k, jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.device)
        random = torch.randn(self.k, len(weight), generator=generator, dtype=jacobian.dtype)
        frame[:, : len(weight)] = random.to(jacobian.device) / weight
        return frame

    def compute(self) -> dict[str, Tensor]:
        """Return the exponents of the last window."""
        if not len(self.growth):
            return {key: scalar(torch.nan) for key in self.keys}
        mean, error = batch_means(self.growth)
        order = mean.argsort(descending=True)  # over a finite window the frame may have them in another order
        mean, error = mean[order], error[order]
        values = {f"{PREFIX}lyapunov_trajectory": mean[0], f"{PREFIX}lyapunov_trajectory_error": error[0]}
        return values | {f"{PREFIX}lyapunov_spectrum/{i + 1}": mean[i] for i in range(1, self.k)}


def _step(snapshot: Snapshot, method: Method) -> tuple[LinearOperator, Tensor]:
    """Return the Jacobian of a step, over all players where there are several, and the weights of the norm."""
    if snapshot.player is None:
        return update_jacobian(snapshot, method=method), state_weight(snapshot)
    jacobian = joint_jacobian(snapshot, method=method)
    size = sum(p.numel() for p in snapshot.joint.parameters.values())
    # The reach of the other players' buffers is not known before their own steps.
    return jacobian, torch.ones(size, dtype=jacobian.dtype, device=jacobian.device)
