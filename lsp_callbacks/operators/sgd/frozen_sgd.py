"""From one training step to the modes of its Gauss-Newton matrix and the rule that acts on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.sgd.gram_rate import gram_mean_square_lr
from lsp_callbacks.functional.sgd.mean_square import mean_square_lr
from lsp_callbacks.functional.sgd.modes import Modes, UpdateRule, noise_share, reduced_modes
from lsp_callbacks.linalg import norm
from lsp_callbacks.operators.sgd.chosen_positions import Chosen
from lsp_callbacks.operators.sgd.gram_matrix import POSITIONS, TangentKernel, tangent_kernel
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.operators.sgd.statistics_factors import StatisticsFactors
from lsp_callbacks.operators.trajectory.coming_preconditioner import coming_rule, probe_squares, remembered_rule
from lsp_callbacks.operators.trajectory.frozen_preconditioner import (
    StepConstants,
    coupled_decay,
    frozen_rule,
    require_gradient,
    step_constants,
)
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot

#: Eigenvalues of a float32 Gram matrix below this share of the largest are rounding errors.
ROUNDING = 1e-6
#: Norm of a gradient that is none, in the units of the loss.
NO_GRADIENT = 1e-20
#: Samples of a stream without end.
ENDLESS = 10**9


@dataclass(frozen=True)
class FrozenSGD:
    """SGD with fixed linearisation and preconditioner, as they are at one step.

    Attributes:
        rule: of the optimizer.
        lr: the step's learning rate, the largest of its groups.
        batch_size: of the step.
        population: samples that batches are drawn from; equal to those in ``modes`` where all are probes.
        kernel: where the modes come from; of the samples in batches, where their statistics tie them together.
        frozen: whether a preconditioner is held fixed.
        together: samples of a batch with statistics of its own, see `lsp_callbacks.functional.Modes`.
        rounding: eigenvalues of K up to this share of the largest are rounding errors; None where K is in float64.
    """

    rule: UpdateRule
    lr: float
    batch_size: int
    population: int
    kernel: TangentKernel
    frozen: bool
    together: int = 1
    rounding: float | None = None

    @cached_property
    def modes(self) -> Modes:
        """Reduced coordinates of K, see `lsp_callbacks.functional.reduced_modes`."""
        kernel = self.kernel
        return reduced_modes(
            kernel.gram, kernel.rows, tol=self.rounding, together=self.together, samples=kernel.samples,
            chance=kernel.chance,
        )  # fmt: skip

    def mean_square_lr(self, *, replacement: bool = False, design: float = 1.0, tol: float = 5e-3) -> float:
        """Return the largest rate at which the second moment is bounded, at most ``tol`` too low.

        Args:
            replacement: within a batch.
            design: of several positions, see `lsp_callbacks.functional.design_effect`.
            tol: relative.

        NaN if K is not finite. Cost: see `lsp_callbacks.functional.gram_mean_square_lr`, and `mean_square_lr` where
        samples have several rows.
        """
        kernel, size = self.kernel, min(self.batch_size, self.population)
        if self.together == 1 and kernel.positions > 1:
            return self._of_positions(size, design, replacement, tol)
        if kernel.rows > 1 or self.together > 1:
            return mean_square_lr(
                self.modes, batch_size=size, rule=self.rule, replacement=replacement, population=self.population,
                tol=tol,
            )  # fmt: skip
        return gram_mean_square_lr(
            kernel.gram, batch_size=size, rule=self.rule, samples=kernel.samples, chance=kernel.chance,
            replacement=replacement, population=self.population, tol=tol,
        )  # fmt: skip

    def _of_positions(self, size: int, design: float, replacement: bool, tol: float) -> float:
        """Take each position for a sample, of which a batch draws as many as have its noise.

        Few positions that stand for all of a sample would have the noise of so few: many times that of the batch.
        """
        kernel, total, chance = self.kernel, self.kernel.samples * self.kernel.positions, self.kernel.chance
        looked = kernel.rows // kernel.outputs
        chance = torch.ones(len(kernel.gram) // kernel.rows, dtype=torch.float64) if chance is None else chance
        stands = torch.full((1, looked), kernel.positions) if kernel.stands is None else kernel.stands
        each = (chance[:, None] * (looked / stands)).flatten()
        among = self.population * kernel.positions
        noise = noise_share(self.population, size, replacement) * design / kernel.positions
        drawn = min(max(round(among / (1 + noise * (among - 1))), 1), among)
        gram = kernel.gram * kernel.positions
        if kernel.outputs == 1:
            return gram_mean_square_lr(
                gram, batch_size=drawn, rule=self.rule, samples=total, chance=each, population=among, tol=tol
            )
        order = torch.arange(len(kernel.gram)).view(-1, kernel.outputs, looked).transpose(1, 2).flatten()
        modes = reduced_modes(gram[order][:, order], kernel.outputs, tol=self.rounding, samples=total, chance=each)
        return mean_square_lr(modes, batch_size=drawn, rule=self.rule, population=among, tol=tol)


def frozen_sgd(
    snapshot: Snapshot,
    probes: ProbeSet | None = None,
    *,
    outputs: Literal["top", "all"] = "top",
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    most_rows: int = 10**6,
    positions: int = POSITIONS,
    checked: TangentKernel | None = None,
    squares: Literal["probes", "batch"] = "probes",
    most: int | None = None,
    factors: StatisticsFactors | None = None,
    renews: bool = True,
    rows: GraphRows | None = None,
    chosen: Mapping[int, Chosen] | None = None,
) -> FrozenSGD:
    """Linearise a training step on ``range(J^T)``: exact at interpolation, a Gauss-Newton statement elsewhere.

    Learning rates that differ between groups, the frozen preconditioner of Adam, RMSprop or Adagrad, as it will be
    after some more batches (`coming_rule`), and the factor by which this step's gradient was clipped enter as
    ``Z -> Z D^(1/2)``; rates are those of the group with the largest.
    Weight decay that differs between parameters is averaged, weighted by the trace of K.

    Under BatchNorm the outputs of a batch depend on all of its samples, ``f_i(theta, X_b)``, and a step on batch b acts
    by ``I - lr H_b``, ``H_b = (1/B) sum_i J_i^T S_i J_i`` with ``J_i = d f_i(theta, X_b) / d theta`` *through* the
    statistics. So scaling or shifting a weight ahead of BatchNorm moves no output, as in training; running statistics,
    or those of the batch held fixed, lose that invariance, and give the matrix of another training. The rows of K are
    those of whole batches, ``probes.batches``, and steps draw whole batches, see `sgd_exponent`.

    Args:
        snapshot: a step with its optimizer.
        probes: the samples; None takes those of the snapshot.
        outputs: rows of K, see `lsp_callbacks.operators.sgd.gram_matrix`.
        generator: for the random choices; None draws from the snapshot's.
        start: an earlier ``kernel.mode``.
        rows: formed from the step's own graph, which take the place of those of the probes.
        chosen: what rows of some parts look at, by the index of the part.
        most_rows, positions, checked, most, factors, renews: see `lsp_callbacks.operators.sgd.gram_matrix`.
        squares: of which samples the mean square of the coming gradients is taken for a preconditioner: of these, or
            of the step's batch while the optimizer has seen few (`remembered_rule`).

    Raises:
        Unmeasurable: no probes, an optimizer that is not supported, or a criterion without a Gauss-Newton matrix.

    Cost: one forward and two backward passes over the probes, with a preconditioner one and three more; under BatchNorm
    a backward pass over its batch for each.
    """
    given = snapshot.probes if probes is None else probes
    if given is None:
        raise Unmeasurable("the snapshot has no probes: pass Snapshot(probes=ProbeSet(...))")
    is_frozen = critical_rule(snapshot).frozen
    require_gradient(snapshot)
    probes = given.trained
    if not is_frozen:
        rule = frozen_rule(snapshot)
    elif squares == "probes":
        rule = coming_rule(snapshot, squares=probe_squares(probes, snapshot.generator("signs")))
    else:
        rule = remembered_rule(snapshot)
    if rows is not None:
        kernel = rows.kernel(checked, factors)
    else:
        generator = generator or snapshot.generator("probes")
        kernel = tangent_kernel(
            probes, outputs=outputs, scale=rule.scale, generator=generator, start=start, most_rows=most_rows,
            positions=positions, checked=checked, holds=squares == "batch", most=most, factors=factors,
            renews=renews, given=chosen,
        )  # fmt: skip

    def mean(decay: Mapping[str, float | Tensor]) -> float:
        if len({*map(float, decay.values())}) == 1:  # then no trace is asked for
            return float(next(iter(decay.values())))
        values, trace = [float(decay[name]) for name in kernel.traces], sum(kernel.traces.values())
        if min(values) == max(values):
            return values[0]
        if not trace:
            return 0.0
        return sum(value * share for value, share in zip(values, kernel.traces.values())) / trace

    double = all(p.dtype == torch.float64 for p in snapshot.parameters.values())
    return FrozenSGD(
        rule=UpdateRule(
            momentum=rule.momentum,
            dampening=rule.dampening,
            nesterov=rule.nesterov,
            weight_decay=mean(rule.weight_decay),
            decoupled_decay=mean(rule.decoupled_decay),
            correction=rule.correction,
            direct=rule.direct,
        ),
        lr=rule.lr,
        batch_size=probes.batch_size,
        population=max(probes.population or ENDLESS, probes.samples),
        kernel=kernel,
        frozen=rule.frozen,
        together=probes.together if len(probes.batches) > 1 else 1,
        rounding=None if double else ROUNDING,
    )


def require_curvature(snapshot: Snapshot, kernel: TangentKernel) -> None:
    """Refuse a Gauss-Newton matrix that is 0 although the step has a gradient, where the network has not collapsed.

    Raises:
        Unmeasurable: it says nothing of stability.
    """
    if kernel.alike or bool(kernel.gram.diagonal().any()) or snapshot.gradient is None:
        return
    if any(g is not None and bool(norm(g) > NO_GRADIENT) for g in snapshot.gradient.values()):
        raise Unmeasurable(
            "the loss has a gradient, but no curvature in the outputs (a softmax that is saturated at wrong classes, "
            "or a loss that is linear there: L1, or Huber's beyond its bend): the Gauss-Newton matrix is 0 and says "
            "nothing of stability; sharpness, courant_gd and lyapunov know the rest of the curvature"
        )


def critical_rule(snapshot: Snapshot) -> StepConstants:
    """Return the numbers of the step's rule if it has a critical rate on a Gauss-Newton matrix.

    Raises:
        Unmeasurable: see `frozen_rule`; for ``maximize``, with a prox, and for coupled weight decay behind a
            preconditioner.
    """
    rule = step_constants(snapshot)
    if snapshot.run.prox is not None:
        raise Unmeasurable("the map that prox applies after the step is not supported: use lyapunov instead")
    if rule.sign < 0:
        raise Unmeasurable(
            "maximize=True: the Gauss-Newton matrix of a loss that is maximised is not positive: minimise its negative"
        )
    if rule.frozen and (isinstance(decay := coupled_decay(snapshot), Tensor) or decay):
        raise Unmeasurable(
            "coupled weight decay behind a preconditioner (Adam's weight_decay) has no critical rate here: use "
            "AdamW's, or sharpness and its courant_gd, which know it"
        )
    return rule
