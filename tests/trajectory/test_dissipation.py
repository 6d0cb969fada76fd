"""The rate at which an energy falls: closed forms, brute force, known series, and what has no answer."""

import itertools
import math

import numpy as np
import pytest
import torch
from problems import close, f64, random, same
from torch import nn

from lsp_callbacks import Dissipation, Monitor, SGDLaw, Snapshot, Trace, Unmeasurable
from lsp_callbacks.functional import dissipation, student_quantile
from lsp_callbacks.step.run_context import RunContext

#: ``theta+ = 0.8 theta + 0.1 xi``, ``E = theta^2``.
Q, FLOOR = 0.64, 0.027777777777777794


def energies(series, n, start=None, seed=0):
    """``(n, series)`` of the quadratic, from a stationary start or a given one."""
    noise = random(n + 1, series, seed=seed)
    theta, found = noise[-1] * FLOOR**0.5 if start is None else torch.full((series,), start, dtype=f64), []
    for one in noise[:-1]:
        found.append(theta.square())
        theta = 0.8 * theta + 0.1 * one
    return torch.stack(found)


def read_with_errors(series, n, q=0.9, seed=0):
    """AR(1), each value read with an error as large as its own spread."""
    noise, errors = random(n + 1, series, seed=seed), random(n, series, seed=seed + 1)
    spread = 1 / math.sqrt(1 - q * q)
    value, found = noise[-1] * spread, []
    for one, error in zip(noise, errors):
        found.append(value + spread * error)
        value = q * value + one
    return torch.stack(found)


def fields(series, *names, **settings):
    found = [dissipation(one, **settings) for one in series.unbind(1)]
    return [torch.stack([getattr(one, name) for one in found]) for name in names]


@pytest.mark.parametrize("q, c", [(0.75, 1.0), (0.0, 2.0), (-0.5, 1.0), (1.05, -0.01), (0.999, 0.001)])
@pytest.mark.parametrize("n", [3, 30, 200])
def test_without_noise_the_answer_is_exact(q, c, n):
    energy = [3.0]
    for _ in range(n - 1):
        energy.append(q * energy[-1] + c)
    found = dissipation(torch.tensor(energy, dtype=f64))
    close(found.gamma, 1 - q, 1e-8)
    close(found.slope, q, 1e-8)
    pairs = list(itertools.pairwise(energy))
    close(found.increases, sum(b > a for a, b in pairs) / len(pairs), 1e-12)
    if q < 1:
        close(found.floor, c / (1 - q), 1e-6)
    else:
        assert found.floor.isnan() and found.floor_error.isnan()
    assert found.lower.isnan() == found.upper.isnan()
    if not found.lower.isnan():
        close(found.lower, 1 - q, 1e-6)
        close(found.upper, 1 - q, 1e-6)
    elif q > 0.5 and n == 200:
        raise AssertionError("a long series has bounds")


def test_against_brute_force():
    """Least squares by numpy, and the jackknife by fitting anew without each run of pairs."""
    energy = energies(1, 203)[:, 0]
    found = dissipation(energy)
    x, y = energy[:-1].numpy(), energy[1:].numpy()

    def fit(x, y):
        (slope, level), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)
        return slope, level / (1 - slope)

    def jackknife(x, y, fit):
        block = np.arange(len(x)) * 10 // len(x)
        others = np.array([fit(x[block != k], y[block != k]) for k in range(10)])
        whole = np.array(fit(x, y))
        return 10 * whole - 9 * others.mean(0), np.sqrt(0.9 * ((others - others.mean(0)) ** 2).sum(0))

    def instrument(xz, y):
        x, z = xz.T
        return (np.cov(z, y)[0, 1] / np.cov(z, x)[0, 1],)

    (q, _), (error, floor_error) = jackknife(x, y, fit)
    slope, _ = fit(x, y)
    most = 4 * (1 + 3 * slope) / len(x)
    q = slope + np.clip(q - slope, -most, most)
    (second,), (wide,) = jackknife(np.stack([x[1:], x[:-1]], 1), y[1:], instrument)
    t = student_quantile(0.9, 9)
    close(found.slope, fit(x, y)[0], 1e-10)
    close(found.gamma, 1 - q, 1e-10)
    close(found.floor, (y.mean() - q * x.mean()) / (1 - q), 1e-10)
    close(found.floor_error, floor_error, 1e-10)
    close(found.lower, 1 - max(q + t * error, second + t * wide), 1e-9)
    close(found.upper, 1 - min(q - t * error, second - t * wide), 1e-9)


@pytest.mark.parametrize(
    "n, start, mean, sd", [(200, None, 0.592, 0.10), (2000, None, 0.634, 0.033), (2000, 2.0, 0.636, 0.05)]
)
def test_the_quadratic_with_noise(n, start, mean, sd):
    """The bias of plain least squares is there, and is taken off."""
    series = 120
    slope, gamma, floor = fields(energies(series, n, start), "slope", "gamma", "floor")
    error = 4 * sd / series**0.5
    close(slope.mean(), mean, error)
    assert 0.7 < float(slope.std()) / sd < 1.3
    close(1 - gamma.mean(), Q, error)
    if n == 200:
        assert Q - float(slope.mean()) > 2 * abs(Q - float(1 - gamma.mean()))
    else:
        close(floor.mean(), FLOOR, 0.002)


@pytest.mark.parametrize(
    "make, gamma",
    [(lambda: energies(150, 400), 1 - Q), (lambda: energies(150, 400, 2.0), 1 - Q),
     (lambda: read_with_errors(150, 400), 0.1)],
)  # fmt: skip
def test_the_bounds_hold(make, gamma):
    """Each at least as often as promised, up to 4 standard errors of the share; they are not without end either."""
    lower, upper = fields(make(), "lower", "upper")
    assert not lower.isnan().any() and float((upper - lower).median()) < 0.75
    for share in ((lower <= gamma).double().mean(), (upper >= gamma).double().mean()):
        assert float(share) > 0.9 - 4 * (0.09 / 150) ** 0.5


def test_errors_of_reading_pull_gamma_up_and_only_the_bounds_say_so():
    gamma, lower, upper = fields(read_with_errors(60, 400), "gamma", "lower", "upper")
    assert 0.45 < float(gamma.mean()) < 0.65 and float(lower.median()) < 0.1 < 0.5 < float(upper.median())


def test_a_plateau_of_nothing_but_noise_has_no_bounds():
    lower, upper = fields(random(400, 50), "lower", "upper")
    assert float(lower.isnan().double().mean()) > 0.95 and torch.equal(lower.isnan(), upper.isnan())


@pytest.mark.parametrize("scale, shift", [(1e150, 0.0), (1e-150, 0.0), (1.0, 1e5), (1e-3, -2.0)])
def test_units_do_not_matter(scale, shift):
    energy = energies(1, 100)[:, 0]
    plain, other = dissipation(energy), dissipation(scale * energy + shift)
    for name in ("gamma", "lower", "upper", "increases"):
        close(getattr(other, name), getattr(plain, name), 1e-6)
    close((other.floor - shift) / scale, plain.floor, 1e-6)


@pytest.mark.parametrize(
    "energy, reason",
    [([1.0, 2.0], "too few"), ([], "too few"), ([1.0, math.nan, 1.0], "not finite"), ([1.0, math.inf, 1], "not finite"),
     ([2.0] * 80, "does not change"), ([0.0] * 80, "does not change")],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused(energy, reason):
    with pytest.raises(Unmeasurable, match=reason):
        dissipation(torch.tensor(energy))


# -- the quantity ----------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    def __init__(self, n=3):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(1, 2, n, dtype=f64))


def run(metric, steps=100, lr=0.2, noise=0.0, module=None, **settings):
    """Gradient descent on ``||theta||^2 / 2``, recorded; the metric is asked once at the end."""
    module = module or Sum()
    trace = Trace(metric.recorded, metric.energies)
    for step in range(steps):
        loss = module.theta.square().sum() / 2
        trace.record(step, loss, lr=lr, module=module)
        with torch.no_grad():
            module.theta -= lr * (module.theta + noise * random(len(module.theta), seed=step))
    snapshot = Snapshot(step=steps - 1, module=module, replay=lambda: loss, run=RunContext(series=trace), **settings)
    assert not metric.warm_up(snapshot)
    metric.update(snapshot)
    return metric.compute()


def cube(module):
    return module.theta.abs().pow(3).sum()


def test_energies_of_the_loss_the_distance_and_the_users_own(tmp_path):
    path = tmp_path / "zero.pt"
    torch.save({"state_dict": {"theta": torch.zeros(3, dtype=f64)}}, path)
    metric = Dissipation(60, energies={"cube": cube, "imported": "test_dissipation.cube"}, reference=path)
    found = run(metric)
    close(found["stability/dissipation"], 1 - 0.8**2, 1e-9)
    close(found["stability/dissipation_of/cube"], 1 - 0.8**3, 1e-9)
    close(found["stability/dissipation_of/imported"], 1 - 0.8**3, 1e-9)
    close(found["stability/dissipation_of/distance"], 1 - 0.8**2, 1e-9)
    close(found["stability/dissipation_lower_of/cube"], 1 - 0.8**3, 1e-6)
    close(found["stability/energy_increases_of/cube"], 0, 1e-12)
    assert {key.count("/") for key in found if "_of" in key} == {2}
    plain = run(Dissipation(60))
    assert set(plain) == {*Dissipation.keys, *Dissipation.optional}


def test_the_distance_from_the_first_step_rises_and_is_remembered():
    module, metric = Sum(4000), Dissipation(60, reference="initial")
    first = module.theta.detach().clone()
    before = run(metric, 80, module=module)
    assert float(before["stability/energy_increases_of/distance"]) > 0.5
    away = metric.energies["distance"](module)
    assert 0.7 < float(away / (module.theta.detach() - first).square().sum()) < 1.3
    other = Dissipation(60, reference="initial")
    other.load_state_dict(metric.state_dict())
    assert torch.equal(other.energies["distance"](module), away)
    other.reset()
    assert float(other.energies["distance"](module)) == 0


def test_only_the_last_steps_count():
    energy = torch.cat([random(300), 5 * 0.9 ** torch.arange(60.0, dtype=f64)])
    trace = Trace(400)
    for step, value in enumerate(energy):
        trace.record(step, value)
    metric, net = Dissipation(60), Sum()
    metric.update(Snapshot(step=359, module=net, replay=net.theta.sum, run=RunContext(series=trace)))
    close(metric.compute()["stability/dissipation"], 0.1, 1e-9)


def test_the_identity_stays_bounded_and_dissipates_nothing():
    """What Thm 3.1 has as its first claim without the second."""
    with pytest.raises(Unmeasurable, match="loss: the energy does not change"):
        run(Dissipation(60), lr=0.0)


def test_what_is_not_known_is_refused():
    net, metric = Sum(), Dissipation(60)
    with pytest.raises(Unmeasurable, match="at every optimizer step"):
        metric.update(Snapshot(step=0, module=net, replay=net.theta.sum))
    trace = Trace(60)
    for step in range(60):
        trace.record(step, None)
        assert (
            metric.warm_up(Snapshot(step=step, module=net, replay=net.theta.sum, run=RunContext(series=trace)))
            == 59 - step
        )
    with pytest.raises(Unmeasurable, match=r"Watch.record"):
        metric.update(Snapshot(step=0, module=net, replay=net.theta.sum, run=RunContext(series=trace)))
    assert all(value.isnan() for value in metric.compute().values())


@pytest.mark.parametrize(
    "arguments",
    [{"length": 59}, {"energies": {"a/b": cube}}, {"energies": {"loss": cube}}, {"energies": [cube]},
     {"energies": {"a": "no.such.thing"}}, {"energies": {"a": 3}}, {"reference": "nowhere.ckpt"}, {"reference": 1},
     {"energies": {"distance": cube}, "reference": "initial"}],
)  # fmt: skip
def test_bad_arguments_name_themselves(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        Dissipation(**arguments)


def test_a_file_of_another_model_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    metric = Dissipation(60, reference=tmp_path / "other.pt")
    monitor = Monitor(metric, every_n_steps=1)
    with pytest.warns(UserWarning, match="no checkpoint of this model"):
        monitor.recorder.record(0, torch.tensor(1.0), None, Sum())


def test_it_costs_a_step_nothing_to_be_recorded():
    module = Sum()
    before, random_state = module.theta.detach().clone(), torch.get_rng_state()
    trace = Trace(60, Dissipation(60, energies={"cube": cube}, reference="initial").energies)
    trace.record(0, cube(module), module=module)
    assert same(module.theta.detach(), before) and module.theta.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(value.requires_grad for value in trace.read().values())


# -- checkpoints -----------------------------------------------------------------------------------------------------


def square(module):
    return module.theta.square().sum()


def test_a_state_of_other_energies_is_not_misread():
    """As many, in another order, under other names."""
    first = Dissipation(60, energies={"cube": cube, "square": square})
    found = run(first)
    second = Dissipation(60, energies={"square": square, "other": cube})
    second.load_state_dict(first.state_dict(), strict=False)
    loaded = second.compute()
    for key in ("stability/dissipation", "stability/dissipation_of/square", "stability/dissipation_lower_of/square"):
        assert torch.equal(loaded[key], found[key])
    assert loaded["stability/dissipation_of/other"].isnan() and not any("cube" in key for key in loaded)


@pytest.mark.parametrize(
    "energies, state, told",
    [({"cube": cube}, None, None), ({"other": cube}, None, "now recorded are loss, lr, other"), ({}, None, "loss, lr:"),
     ({"cube": cube}, "", "state=''")],
)  # fmt: skip
def test_a_series_of_other_energies_begins_anew_with_one_warning(energies, state, told, recwarn):
    saved = Monitor(Dissipation(energies={"cube": cube}), every_n_steps=1)
    for step in range(5):
        saved.recorder.record(step, torch.tensor(1.0 + step), None, Sum())
    monitor = Monitor(Dissipation(energies=energies, state=state), every_n_steps=1)
    monitor.load_state_dict(saved.state_dict())
    said = [str(w.message) for w in recwarn if "lsp_callbacks" in str(w.message)]
    assert len(said) == (told is not None) and all(told in one for one in said)
    assert len(monitor.trace) == (5 if told is None else 0)


def test_an_energy_that_cannot_be_fitted_leaves_the_others_alone():
    own = {"still": lambda module: module.theta.new_tensor(2.0), "once": lambda module: next(once)}
    once = iter([math.inf] + [1.0 + 0.5**k for k in range(200)])
    found = run(Dissipation(60, energies=own))
    assert 0 < found["stability/dissipation"] < 1
    assert found["stability/dissipation_of/still"].isnan() and found["stability/dissipation_of/once"].isnan()


def test_an_energy_that_raised_is_not_asked_again_after_a_resume():
    def bad(module):
        raise RuntimeError("gone")

    made = lambda energy: Monitor(Dissipation(energies={"bad": energy}), every_n_steps=1)  # noqa: E731
    saved, resumed, asked = made(bad), made(lambda module: asked.append(1) or torch.tensor(1.0)), []
    with pytest.warns(UserWarning, match="gone"):
        for step in range(5):
            saved.recorder.record(step, torch.tensor(1.0 + step), None, Sum())
    resumed.load_state_dict(saved.state_dict())
    resumed.recorder.record(5, torch.tensor(1.0), None, Sum())
    assert asked == [] and "bad" in resumed.trace.failed


def test_what_nobody_asks_for_any_more_is_not_recorded():
    asked = []
    own = Dissipation(energies={"own": lambda module: asked.append(1) or torch.tensor(1.0)}, state="")
    monitor, net = Monitor(own, SGDLaw(), every_n_steps=10**6), nn.Linear(1, 1)
    for step in range(6):
        if step == 3:
            with pytest.warns(UserWarning, match="skips dissipation"):
                monitor.skip({"no reason": ["dissipation"]})
        monitor.recorder.begin(net)
        assert bool(net._forward_hooks) == (step < 3)
        net(torch.ones(2, 1))
        monitor.recorder.record(step, torch.tensor(1.0 + step), None, net)
    assert len(asked) == 3 and len(monitor.trace) == 6
