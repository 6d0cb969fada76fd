"""The response to the loss of a sample, against closed forms and against runs without it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import Regression, Written, close, f64, freeze, random, same, seeded, take, tanh_mlp
from torch import nn

from lsp_callbacks import LeaveOneOut, Unmeasurable
from lsp_callbacks.functional import data_response, leave_one_out
from lsp_callbacks.linalg import from_matrix
from lsp_callbacks.operators import step_response
from lsp_callbacks.operators.sgd.sample_contributions import sample_contributions
from lsp_callbacks.step.clipping import Clipping

optim = torch.optim
SAMPLES, BATCH = 12, 4
OPTIMIZERS = {
    "sgd": partial(optim.SGD, lr=0.3),
    "momentum": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(optim.Adam, lr=0.01, weight_decay=0.1),
    "adamw": partial(optim.AdamW, lr=0.01),
    "rmsprop": partial(optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adagrad": partial(optim.Adagrad, lr=0.05),
    "unknown": partial(Written, lr=0.2),
}


def task(net=None):
    net = net or tanh_mlp(2, 4, 2)
    return Regression(net, random(SAMPLES, 2, seed=1), random(SAMPLES, 2, seed=2))


def rows(step, full):
    return slice(None) if full else slice(BATCH * (step % 3), BATCH * (step % 3) + BATCH)


def weighted(problem, at, step, lost, sample, full):
    """The loss of a step in which one sample has a smaller weight, in the first batch or in all."""
    x, y = problem.x[at], problem.y[at]
    each = 0.5 * (problem.net(x) - y).square().sum(-1)
    weight = torch.ones(len(x), dtype=f64)
    if full or step == 0:
        weight[sample] -= lost
    return (weight * each).mean()


def run(optimizer, steps, lost=0.0, sample=0, *, full=False, clipping=None, begin=3):
    """A real run from the state that ``begin`` ordinary steps have left."""
    problem = task()
    rule = optimizer(problem.parameters())
    for step in range(-begin, steps):
        rule.zero_grad()
        at = rows(step, full)
        (problem(at) if step < 0 else weighted(problem, at, step, lost, sample, full)).backward()
        if clipping is not None:
            nn.utils.clip_grad_norm_(problem.parameters(), clipping)
        rule.step()
    return problem


def vector(problem):
    return nn.utils.parameters_to_vector(problem.parameters()).detach()


def measured(optimizer, window, *, full=False, clipping=None, begin=3, **settings):
    """The quantity on the same run, with what it held before it was read."""
    problem = task()
    rule = optimizer(problem.parameters())
    metric = LeaveOneOut(window=window, full_batch=full, method="exact", **settings)
    for step in range(-begin, window + 1):
        at = rows(step, full)
        if step >= 0:
            clip = None if clipping is None else Clipping(clipping)
            if step == window:
                state = metric._frame["state"]
            metric.update(freeze(problem, rule, lambda at=at: problem(at), step=step, clipping=clip))
        rule.zero_grad()
        problem(at).backward()
        if clipping is not None:
            nn.utils.clip_grad_norm_(problem.parameters(), clipping)
        rule.step()
    assert metric.complete
    return metric, state


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("clipping", [None, 0.05])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_derivative_of_real_runs(name, clipping, full):
    make, window, h = OPTIMIZERS[name], 5, 1e-4
    metric, state = measured(make, window, full=full, clipping=clipping, samples=2)
    ends = {
        (i, s): run(make, window, s * h, i, full=full, clipping=clipping) for i in range(2) for s in (-1, 1)
    }  # fmt: skip
    sizes, rises, others = [], [], []
    for i in range(2):
        up, down = ends[i, 1], ends[i, -1]
        truth = (vector(up) - vector(down)) / (2 * h)
        assert float(torch.linalg.vector_norm(truth)) > 1e-3
        tolerance = 1e-5 if name == "unknown" else 1e-6
        close(state[i, : len(truth)] / truth.norm(), truth / truth.norm(), tolerance)
        sizes.append(truth.norm())
        own = [0.5 * (p.net(p.x[i]) - p.y[i]).square().sum() for p in (up, down)]
        rises.append((own[0] - own[1]) / (2 * h))
        after = [p(rows(window, full)) for p in (up, down)]
        others.append((after[0] - after[1]).abs() / (2 * h))
    found = metric.compute()
    key = "stability/leave_one_out_{}".format
    rises, sizes = torch.stack(rises), torch.stack(sizes)
    close(found[key("parameters")], sizes.mean(), 1e-5)
    close(found[key("parameters_max")], sizes.max(), 1e-5)
    close(found[key("parameters_error")], (sizes[0] - sizes[1]).abs() / 2, 1e-5)
    close(found[key("loss")], rises.mean(), 1e-5)
    close(found[key("loss_max")], rises.abs().max(), 1e-5)
    close(found[key("loss_error")], (rises[0] - rises[1]).abs() / 2, 1e-5)
    close(found[key("next_loss")], torch.stack(others).max(), 1e-5)


def test_least_squares_end_at_the_influence_function():
    """Full-batch descent without its sample: (I - (I - lr H)^T) H^-1 x_i e_i / N, T steps (Cook 1977)."""
    net = seeded(nn.Linear(2, 1, bias=False))
    problem = Regression(net, random(6, 2, seed=1), random(6, 1, seed=2))
    rule, T = optim.SGD(net.parameters(), lr=0.8), 30
    H = problem.x.T @ problem.x / 6
    theta = torch.linalg.solve(H, problem.x.T @ problem.y / 6)
    with torch.no_grad():
        net.weight.copy_(theta.T)  # at the minimum, where all steps are alike
    metric = LeaveOneOut(6, window=T, full_batch=True, method="exact")
    for step in range(T + 1):
        if step == T:
            state = metric._frame["state"]
        metric.update(freeze(problem, rule, step=step))
        take(rule, problem())
    error = problem.x @ theta - problem.y
    walked = torch.eye(2, dtype=f64) - torch.linalg.matrix_power(torch.eye(2, dtype=f64) - 0.8 * H, T)
    influence = (walked @ torch.linalg.solve(H, (problem.x * error / 6).T)).T
    close(state, influence, 1e-9)
    # At the minimum the rise of the own loss is a square: whoever is left out is fitted worse.
    assert bool(((state * problem.x * error).sum(-1) > 0).all())
    close(metric.compute()["stability/leave_one_out_loss"], (influence * problem.x * error).sum(-1).mean(), 1e-9)
    close(metric.compute()["stability/leave_one_out_next_loss"], 0.0, 1e-9)


def test_the_recursion_in_closed_form():
    A, R = from_matrix(torch.diag(torch.tensor([0.5, 2.0]))), from_matrix(-0.1 * torch.eye(2))
    share = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    close(data_response([(A, R, share), (A, R, None), (A, R, None)]), [[0.025, 0.4], [0.0, 1.2]], 1e-6)
    close(data_response([(A, R, share), (A, R, share)])[0], [0.15, 0.3], 1e-6)
    with pytest.raises(ValueError, match="no step"):
        data_response([])
    numbers = leave_one_out(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, -7.0]]))
    expected = (3.0, 2.0, 5.0, -2.0, 5.0, 7.0)
    for value, truth in zip(vars(numbers).values(), expected):
        close(value, truth, 1e-9)
    alone = leave_one_out(torch.ones(1, 2), torch.ones(1, 2))
    assert bool(alone.loss_error.isnan()) and float(alone.loss) == 2.0


def test_the_response_to_a_gradient_is_the_rate():
    problem = task()
    dg = random(len(vector(problem)))
    close(step_response(freeze(problem, optim.SGD(problem.parameters(), lr=0.3))) @ dg, -0.3 * dg, 1e-12)
    with pytest.raises(Unmeasurable, match="no optimizer"):
        step_response(freeze(problem))


class Classifier(nn.Module):
    """With dropout and batch statistics, replayed with the same masks."""

    def __init__(self, criterion):
        super().__init__()
        self.net = seeded(
            nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))
        )
        self.criterion, self.x, self.y = criterion, random(6, 3, seed=4), torch.tensor([0, 1, 2, 1, 0, 2])

    def outputs(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.net(self.x)

    def forward(self):
        return self.criterion(self.outputs(), self.y)


WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=f64)


@pytest.mark.parametrize(
    "criterion",
    [F.cross_entropy, partial(F.cross_entropy, reduction="sum"), partial(F.cross_entropy, weight=WEIGHTS)],
)
def test_shares_are_those_of_the_step_itself(criterion):
    problem = Classifier(criterion)
    found = sample_contributions(freeze(problem), 10)
    assert found.batch == 6 and same(found.inputs, problem.x)
    each = criterion(problem.outputs(), problem.y, reduction="none")
    divisor = {"sum": 1.0}.get(criterion.keywords.get("reduction"), 6.0) if isinstance(criterion, partial) else 6.0
    if isinstance(criterion, partial) and "weight" in criterion.keywords:
        divisor = WEIGHTS[problem.y].sum()
    for own, loss in zip(found.gradients, each):
        parts = torch.autograd.grad(loss / divisor, list(problem.parameters()), retain_graph=True)
        close(own, torch.cat([p.reshape(-1) for p in parts]), 1e-12)


def contrastive(outputs, y):
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


def test_what_is_no_sum_over_samples_is_refused():
    with pytest.raises(Unmeasurable, match="no sum over the samples"):
        sample_contributions(freeze(Classifier(contrastive)), 2)
    problem = Classifier(F.cross_entropy)
    penalty = lambda: problem() + 0.1 * problem.net[0].weight.square().sum()  # noqa: E731
    with pytest.raises(Unmeasurable, match="not only through the outputs"):
        sample_contributions(freeze(problem, replay=penalty), 2)
    accumulated = lambda: problem() / 2 + problem() / 2  # noqa: E731
    with pytest.raises(Unmeasurable, match="accumulated"):
        sample_contributions(freeze(problem, replay=accumulated), 2)


def steps_of(metric, batches):
    problem = task()
    rule = optim.SGD(problem.parameters(), lr=0.1)
    for step, at in enumerate(batches):
        metric.update(freeze(problem, rule, lambda at=at: problem(at), step=step))
        take(rule, problem(at))
    return metric


def test_a_full_batch_is_checked():
    metric = LeaveOneOut(window=2, full_batch=True)
    with pytest.raises(Unmeasurable, match="not those of the step before"):
        steps_of(metric, [slice(0, 4), slice(4, 8)])
    assert steps_of(LeaveOneOut(window=2, full_batch=True), [slice(0, 4)] * 3).complete


def test_a_gap_starts_again_and_one_sample_has_no_error():
    metric = LeaveOneOut(1, window=2)
    problem = task()
    rule = optim.SGD(problem.parameters(), lr=0.1)
    for step, complete in ((0, False), (1, False), (3, False), (4, False), (5, True)):
        metric.update(freeze(problem, rule, step=step))
        assert metric.complete == complete
    assert set(metric.compute()) == set(metric.keys)


def test_what_has_overflowed_is_refused():
    metric = LeaveOneOut(window=1)
    problem = task()
    rule = optim.SGD(problem.parameters(), lr=0.1)
    metric.update(freeze(problem, rule, step=0))
    metric._frame["state"] *= float("inf")
    with pytest.raises(Unmeasurable, match="overflowed"):
        metric.update(freeze(problem, rule, step=1))


@pytest.mark.parametrize("bad", [{"samples": 0}, {"window": 0}, {"method": "guess"}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LeaveOneOut(**bad)
