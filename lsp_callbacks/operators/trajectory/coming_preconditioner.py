"""An optimizer's update rule some steps later: its preconditioner once it has seen some more batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lsp_callbacks.errors import Unsupported
from lsp_callbacks.operators.trajectory.frozen_preconditioner import (
    FrozenRule,
    frozen_rule,
    rule_ahead,
    rule_of_shards,
    step_constants,
)
from lsp_callbacks.operators.trajectory.spread_step import spread_step
from lsp_callbacks.operators.trajectory.update_rules import formula
from lsp_callbacks.step.criterion import Criteria, Evaluation
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.snapshot import Snapshot, computed_once

#: How many steps later, at least; otherwise one over ``1 - beta``, the memory of the momentum.
AHEAD = 10
#: Gradients that a second moment must hold. After one alone it is nearly 0 somewhere: the smallest of P numbers is
#: about their size over P.
GRADIENTS = 2
#: As so many gradients counts what the squares of a row, and of a column, have in common.
PRIOR = 5.0
#: Gradients after which the second moment itself says what the coming ones are like.
REMEMBERED = 100
#: How often random signs of the samples are drawn.
DRAWS = 2


def coming_rule(snapshot: Snapshot, *, squares: dict[str, Tensor] | None = None) -> FrozenRule:
    """Return the step's rule as it will be n steps later, at today's weights.

    n is 10, or more with a momentum above 0.9. Stability is a statement about the steps that follow, and the
    preconditioner of a first step is not theirs: with ``nu = g^2``, a number whose gradient happened to be small moves
    by ``lr / |g|`` for each unit of it, and Adam's bias correction ``c = 1 - beta1^t`` multiplies all rates by ten.
    Both end after a few more batches. So, with ``c = 1 - beta1^(t + n)`` and s the mean square of the coming gradients,
    D is that of

        ``nu_(t + n) = beta2^n nu_t + (1 - beta2^n) s``  over  ``1 - beta2^(t + n)``

    and likewise for RMSprop, which has no correction, and for the growing sum of Adagrad. Later in training nu hardly
    changes in n steps, and the rule is that of the step. A rate that is far too high stays so: lr 1 has ten times the
    rates of lr 0.1 here, too.

    Args:
        snapshot: a step with its optimizer, before the update.
        squares: s by parameter. None takes the mean square that nu holds so far, drawn to what the squares of each row
            and column have in common as five more gradients would: where few gradients were small by chance, the
            coming ones are not. While nu holds but one, s is that of the step's batch, see `batch_squares`.

    Raises:
        Unmeasurable: see `frozen_rule`.

    Cost: nothing without a preconditioner, and some passes over its numbers with one; while it holds one gradient only,
    1.7 gradients, once a step.
    """
    if snapshot.held is not None:
        return rule_of_shards(snapshot, coming_rule(spread_step(snapshot), squares=squares))
    constants = step_constants(snapshot)
    if not constants.frozen or snapshot.gradient is None:
        return frozen_rule(snapshot)
    steps = max(AHEAD, round(1 / (1 - constants.momentum)))
    if squares is not None:
        return rule_ahead(snapshot, steps, squares)
    if gradients_held(snapshot) < GRADIENTS:
        return _rule_from_batch(snapshot, steps)
    return _rule_from_history(snapshot, steps)


@computed_once
def remembered_rule(snapshot: Snapshot) -> FrozenRule:
    """Return the coming rule, which is that of the step once nu holds `REMEMBERED` gradients.

    Then the next few change it little, and nu knows the batches that came before better than any one batch does.

    Cost: nothing; that of `coming_rule` in the first steps.
    """
    return frozen_rule(snapshot) if is_remembered(snapshot) else coming_rule(snapshot)


def is_remembered(snapshot: Snapshot) -> bool:
    """Return whether the second moments hold enough gradients to know the coming ones."""
    return gradients_held(snapshot) >= REMEMBERED


@computed_once
def _rule_from_history(snapshot: Snapshot, steps: int) -> FrozenRule:
    return rule_ahead(snapshot, steps, prior=PRIOR)


@computed_once
def _rule_from_batch(snapshot: Snapshot, steps: int) -> FrozenRule:
    return rule_ahead(snapshot, steps, batch_squares(snapshot))


def batch_squares(snapshot: Snapshot) -> dict[str, Tensor] | None:
    """Return ``max(g_B^2, sum_i g_i^2)`` of the step's batch, by parameter; g_i is the part of sample i in ``g_B``.

    ``E g_B^2`` over batches is the square of the mean and the variance of ``g_B``, of which ``sum_i g_i^2`` is an
    estimate where the samples are independent: where ``g_B`` is small by chance, the coming ones are not. It is the
    mean of ``(sum_i e_i g_i)^2`` over random signs e, of which two are drawn. Where the criterion has one output for
    each token, tokens count as samples.

    Returns:
        None where the loss is not the value of one criterion (`lsp_callbacks.step.probes.Criteria`).

    Cost: one forward and two backward passes.
    """

    def of_rank() -> tuple[Tensor, ...]:
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            with Criteria() as criteria:
                loss = snapshot.replay()
            evaluation = criteria.of(loss, samples=None)
            seed = snapshot.generator("signs").initial_seed() + snapshot.run.ranks.rank
            generator = torch.Generator().manual_seed(seed)
            return tuple(t for draw in range(DRAWS) for t in _signed(evaluation, parameters, generator))

    parameters = list(snapshot.parameters.values())
    try:
        signed = snapshot.run.ranks.apart(lambda: snapshot.run.ranks.mean(of_rank, "gradients of random signs"))
    except Unsupported:
        return None
    assert snapshot.gradient is not None
    squares = {}
    for k, name in enumerate(snapshot.parameters):
        g = snapshot.gradient[name]
        if g is not None:
            scatter = torch.stack([t.square() for t in signed[k :: len(parameters)]]).mean(0)
            squares[name] = torch.maximum(g.detach().to_dense().square(), scatter.to(g.dtype))
    return squares


def probe_squares(probes: ProbeSet, generator: torch.Generator) -> dict[str, Tensor]:
    """Return ``E g_B^2 = g^2 + (N - B) / (N - 1) (E g_i^2 - g^2) / B`` over batches, from the probes, by parameter.

    Args:
        probes: samples of the training set.
        generator: of the random signs, which give ``E g_i^2`` as in `batch_squares`.

    Cost: one forward and three backward passes over the probes.
    """
    parameters = list(probes.parameters.values())
    totals = [[torch.zeros_like(p) for p in parameters] for _ in range(1 + DRAWS)]
    for part in probes.parts:
        with torch.enable_grad():
            evaluation = part()
        share = len(evaluation.outputs) / probes.samples
        for k, total in enumerate(totals):
            for sum_, g in zip(total, _signed(evaluation, parameters, generator if k else None)):
                sum_ += share * g
    size, population = probes.batch_size, probes.population
    noise = (1 - size / population) / (1 - 1 / population) if population and population > 1 else 1.0
    squares = {}
    for name, mean, *signed in zip(probes.parameters, *totals):
        each = probes.samples * torch.stack([t.square() for t in signed]).mean(0)
        squares[name] = mean.square() + max(noise, 0.0) / size * (each - mean.square()).clamp_min(0)
    return squares


def gradients_missing(snapshot: Snapshot) -> int:
    """Return how many steps are missing until the second moments hold two gradients; 0 for SGD.

    Raises:
        Unmeasurable: see `frozen_rule`.
    """
    return max(0, GRADIENTS - gradients_held(snapshot))


def gradients_held(snapshot: Snapshot) -> int:
    """Return how many gradients the least of the second moments holds, this step's included.

    Raises:
        Unmeasurable: see `frozen_rule`.
    """
    if snapshot.optimizer is None or formula(snapshot.optimizer).second_moment is None:
        return REMEMBERED
    parameters = snapshot.unsplit.parameters
    state, gradient = snapshot.optimizer.state, snapshot.gradient or {}
    moved = [p for name, p in parameters.items() if gradient.get(name) is not None]
    held = {id(p) for group in snapshot.optimizer.param_groups for p in group["params"]}
    counts = [1 + int(state.get(p, {}).get("step", 0)) for p in moved if id(p) in held]
    return min(counts, default=REMEMBERED)


def _signed(evaluation: Evaluation, parameters: list, generator: torch.Generator | None) -> list[Tensor]:
    """Return ``sum_i e_i g_i`` for random signs e; without a generator they are 1, and it is the loss's gradient."""
    outputs = evaluation.outputs
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (cotangent,) = torch.autograd.grad(evaluation.criterion(leaf), leaf)
    if generator is not None:
        signs = torch.randint(0, 2, (len(outputs), 1, 1), generator=generator) * 2 - 1
        cotangent = cotangent * signs.to(cotangent)
    gradients = torch.autograd.grad(outputs, parameters, cotangent, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.to_dense().detach() for g, p in zip(gradients, parameters)]
