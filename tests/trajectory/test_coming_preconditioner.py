"""The rule that an optimizer will have ten steps later, against torch.optim itself ten steps later."""

import itertools
from functools import partial

import pytest
import torch
from problems import Regression, close, f64, freeze, random, tanh_mlp

from lsp_callbacks import ProbeSet, Sharpness
from lsp_callbacks.operators import coming_rule, frozen_rule
from lsp_callbacks.operators.curvature.stability_threshold import stability_threshold
from lsp_callbacks.operators.trajectory import coming_preconditioner as coming
from lsp_callbacks.operators.trajectory.coming_preconditioner import batch_squares, gradients_missing, probe_squares
from lsp_callbacks.operators.trajectory.frozen_preconditioner import rule_ahead
from lsp_callbacks.operators.trajectory.update_rules import by_factors
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.criterion import evaluation

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
RMSprop, Adagrad = torch.optim.RMSprop, torch.optim.Adagrad
KINDS = {
    "adam": (Adam, 10),
    "adam_quick": (partial(Adam, betas=(0.5, 0.9), eps=1e-2), 10),
    "adam_slow": (partial(Adam, betas=(0.95, 0.99)), 20),
    "amsgrad": (partial(Adam, amsgrad=True), 10),
    "adamw": (partial(AdamW, weight_decay=0.3), 10),
    "rmsprop": (RMSprop, 10),
    "rmsprop_momentum": (partial(RMSprop, momentum=0.9, alpha=0.7), 10),
    "rmsprop_centered": (partial(RMSprop, centered=True, alpha=0.9), 10),
    "adagrad": (partial(Adagrad, initial_accumulator_value=0.3), 10),
    "adagrad_decay": (partial(Adagrad, lr_decay=0.2), 10),
}


class Slope(torch.nn.Module):
    """A loss whose gradient is the same everywhere."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(random(5))
        self.slope = torch.tensor([1e-3, -0.2, 1.0, 30.0, -1e-5], dtype=f64)

    def forward(self):
        return self.slope @ self.theta


def step(optimizer, loss):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


@pytest.mark.parametrize("told", [True, False], ids=["squares", "history"])
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("name", KINDS)
def test_under_a_constant_gradient_it_is_the_rule_that_comes(name, steps, told):
    make, ahead = KINDS[name]
    task = Slope()
    optimizer = make(task.parameters(), lr=0.01)
    for _ in range(steps):
        step(optimizer, task)
    snapshot = freeze(task, optimizer)
    rule = coming_rule(snapshot, squares={"theta": task.slope**2} if told else None)
    for _ in range(ahead):
        step(optimizer, task)
    later = frozen_rule(freeze(task, optimizer))
    close(rule.scale["theta"] / later.scale["theta"], torch.ones(5), 1e-10)
    assert rule.correction == pytest.approx(later.correction, rel=1e-12) and rule.frozen
    assert (rule.lr, rule.momentum, rule.decoupled_decay) == (later.lr, later.momentum, later.decoupled_decay)


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_what_is_clipped_is_clipped_ahead_too(kind):
    task = Slope()
    optimizer = Adam(task.parameters())
    clipping = Clipping(0.5, kind)
    rule = coming_rule(freeze(task, optimizer, clipping=clipping), squares={"theta": task.slope**2})
    seen = clipping(task.slope)
    want = clipping.factor(task.slope) / (seen.abs() + 1e-8)
    close(rule.scale["theta"] / want.clamp_min(1e-30), (want > 0).to(f64), 1e-9)


def test_a_sum_takes_the_mean_of_the_squares_that_come():
    """Adagrad's nu is linear in them: exact for any sequence."""
    task = Slope()
    optimizer = Adagrad(task.parameters(), lr=0.01)
    step(optimizer, task)
    coming_ones = random(11, 5, seed=3)
    task.slope = coming_ones[0]
    snapshot = freeze(task, optimizer)
    rule = coming_rule(snapshot, squares={"theta": coming_ones[1:].square().mean(0)})
    for slope in coming_ones[:-1]:
        task.slope = slope
        step(optimizer, task)
    task.slope = coming_ones[-1]
    close(rule.scale["theta"], frozen_rule(freeze(task, optimizer)).scale["theta"], 1e-12)


def test_without_a_preconditioner_it_is_the_rule_of_the_step():
    task = Slope()
    snapshot = freeze(task, SGD(task.parameters(), lr=0.1, momentum=0.9))
    assert coming_rule(snapshot) is frozen_rule(snapshot)


def test_far_in_training_it_is_the_rule_of_the_step():
    task = Slope()
    optimizer = Adam(task.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        task.slope = torch.randn(5, generator=generator, dtype=f64)
        step(optimizer, task)
    snapshot = freeze(task, optimizer)
    close(
        coming_rule(snapshot, squares={"theta": torch.ones(5)}).scale["theta"],
        frozen_rule(snapshot).scale["theta"],
        0.02,
    )


# -- what comes ----------------------------------------------------------------------------------------------------


def network(samples=6):
    torch.manual_seed(0)
    net, x, y = tanh_mlp(3, 4, 2), random(samples, 3, seed=1), random(samples, 2, seed=2)
    task = Regression(net, x, y)
    each = []
    for i in range(samples):
        loss = torch.nn.functional.mse_loss(net(x[i : i + 1]), y[i : i + 1])
        each.append(dict(zip(dict(task.named_parameters()), torch.autograd.grad(loss, list(task.parameters())))))
    return task, each


def replayed(task, rows=slice(None)):
    return lambda: torch.nn.functional.mse_loss(task.net(task.x[rows]), task.y[rows])


def test_the_squares_of_the_own_batch(monkeypatch):
    monkeypatch.setattr(coming, "DRAWS", 4000)
    task, each = network()
    snapshot = freeze(task, Adam(task.parameters()), replay=replayed(task))
    found = batch_squares(snapshot)
    for name, p in task.named_parameters():
        scatter = sum((g[name] / len(each)).square() for g in each)
        close(found[name] / torch.maximum(snapshot.gradient[name].square(), scatter), torch.ones_like(p), 0.15)


@pytest.mark.parametrize(("population", "batch_size"), [(6, 2), (6, 6), (None, 2)])
def test_the_squares_of_the_probes_are_the_mean_over_batches(population, batch_size, monkeypatch):
    """Over all batches, one by one: without replacement from the probes, with it from a stream."""
    monkeypatch.setattr(coming, "DRAWS", 4000)
    task, each = network()

    def part(rows):
        return lambda: evaluation(
            task.net(task.x[rows]),
            lambda f: torch.nn.functional.mse_loss(f, task.y[rows]),
            samples=len(task.x[rows]),
        )

    probes = ProbeSet(task, (part(slice(0, 4)), part(slice(4, 6))), 6, batch_size, population)
    found = probe_squares(probes, torch.Generator().manual_seed(0))
    batches = list(
        itertools.combinations(range(6), batch_size) if population else itertools.product(range(6), repeat=batch_size)
    )
    for name, p in task.named_parameters():
        want = sum((sum(each[i][name] for i in batch) / batch_size).square() for batch in batches) / len(batches)
        assert float(((found[name] - want).abs() / (want + 1e-3 * want.max())).max()) < 0.15, name
        assert p.shape == found[name].shape


def test_the_squares_do_not_depend_on_how_the_graph_is_cut_and_nothing_moves():
    task, _ = network()
    snapshot = freeze(task, Adam(task.parameters()), replay=replayed(task))
    state = torch.get_rng_state()
    first = batch_squares(snapshot)
    assert torch.equal(state, torch.get_rng_state())
    again = batch_squares(freeze(task, Adam(task.parameters()), replay=replayed(task)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(p.grad is None for p in task.parameters())


def test_a_loss_of_the_users_own_goes_by_the_history():
    task, _ = network()
    optimizer = Adam(task.parameters())
    snapshot = freeze(task, optimizer)  # 0.5 * square().sum(): no criterion
    assert batch_squares(snapshot) is None
    rule, now = coming_rule(snapshot), frozen_rule(snapshot)
    for name in rule.scale:
        close(rule.scale[name], now.scale[name], 1e-9)
    assert rule.correction == pytest.approx(1 - 0.9**11) and now.correction == pytest.approx(0.1)


@pytest.mark.parametrize("name", KINDS)
def test_squares_that_are_products_of_rows_and_columns_stay_what_they_are(name):
    """And others are drawn to such products, by five gradients' weight, a row of zeros staying one."""
    make, ahead = KINDS[name]
    factors = random(4, 1, seed=1).abs() * random(1, 6, seed=2).abs()
    task = Slope()
    task.theta, task.slope = torch.nn.Parameter(random(4, 6)), factors

    def loss():
        return (task.slope * task.theta).sum()

    optimizer = make(task.parameters(), lr=0.01)
    for _ in range(3):
        step(optimizer, loss)
    snapshot = freeze(task, optimizer, loss)
    close(coming_rule(snapshot).scale["theta"], rule_ahead(snapshot, ahead).scale["theta"], 1e-10)


def test_of_few_gradients_one_that_was_small_by_chance_is_not_believed():
    """Three squares of chi-square numbers, Adam's mean of them, and the mean that they come from."""
    generator = torch.Generator().manual_seed(3)
    factors = random(20, 1, seed=1).abs() * random(1, 30, seed=2).abs() + 0.1
    task = Slope()
    task.theta = torch.nn.Parameter(random(20, 30))
    optimizer = Adam(task.parameters(), lr=0.0, betas=(0.9, 0.999))

    def loss():
        return (task.slope * task.theta).sum()

    for _ in range(2):
        task.slope = factors.sqrt() * torch.randn(20, 30, generator=generator, dtype=f64)
        step(optimizer, loss)
    task.slope = factors.sqrt() * torch.randn(20, 30, generator=generator, dtype=f64)
    snapshot = freeze(task, optimizer, loss)
    wanted = factors.rsqrt()
    found, plain = (r.scale["theta"] / wanted for r in (coming_rule(snapshot), rule_ahead(snapshot, 10)))
    # The smallest of 600 sums of three squares is next to nothing; then 5 of 8 parts of ten squares are that of others.
    assert float(plain.max()) > 6 and float(found.max()) < 1.5 * (13 / 6.25) ** 0.5
    close(found.log().mean(), torch.zeros((), dtype=f64), 0.15)


# -- the first steps -----------------------------------------------------------------------------------------------


def test_a_gradient_that_is_small_by_chance_is_no_edge():
    """One number of 20 has a gradient of 1e-7 in the first batch: in the next ones it has not."""
    task, _ = network(40)
    last = task.net[2].bias
    with torch.no_grad():  # the residual's mean vanishes there, the residuals do not
        last += (task.y - task.net(task.x)).mean(0) + 1e-7
    optimizer = Adam(task.parameters(), lr=1e-3)
    snapshot = freeze(task, optimizer, replay=replayed(task))
    assert float(snapshot.gradient["net.2.bias"].abs().max()) < 1e-6
    now, then = frozen_rule(snapshot), coming_rule(snapshot)
    assert float(now.scale["net.2.bias"].max()) > 1e6 > 1e3 > float(then.scale["net.2.bias"].max())
    assert float(stability_threshold(snapshot, steps=20).courant) < 0.1


def test_a_second_moment_of_one_gradient_is_waited_for():
    task, _ = network()
    for make, missing in ((Adam, 1), (RMSprop, 1), (Adagrad, 1), (partial(SGD, lr=0.1), 0)):
        optimizer = make(task.parameters())
        assert gradients_missing(freeze(task, optimizer)) == Sharpness().warm_up(freeze(task, optimizer)) == missing
        step(optimizer, task)
        assert gradients_missing(freeze(task, optimizer)) == 0
    parts = list(task.parameters())
    optimizer = Adam(parts[:2])
    step(optimizer, task)
    optimizer.add_param_group({"params": parts[2:]})  # joins in mid-run
    assert gradients_missing(freeze(task, optimizer)) == 1
    step(optimizer, task)
    assert gradients_missing(freeze(task, optimizer)) == 0


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e30])
def test_rows_and_columns_of_squares_have_no_scale_of_their_own(scale):
    """The mean of squares may be below the normal numbers of float32."""
    squares = random(4, 6, seed=1).square()
    close(by_factors((scale * squares).float()).double() / (scale or 1.0), by_factors(squares) * (scale > 0), 1e-5)
