"""Gains, units, tails and drift, against what was planted and against direct computation."""

import copy
import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from harness import Model, data, fit
from problems import Regression, close, f64, freeze, random, same, seeded, trajectory
from torch import nn
from transformers.activations import NewGELUActivation

from lsp_callbacks import Monitor, SignalPropagation, StabilityMonitor, Unmeasurable
from lsp_callbacks.functional import activation_slope, batch_norm_drift, excess_kurtosis, gains, inactive_units
from lsp_callbacks.operators.network.batch_statistics import outputs
from lsp_callbacks.operators.network.signal_sizes import signal_sizes
from lsp_callbacks.quantities.tables import stated_keys


def step(net, *shape, seed=1, **settings):
    """A step of half the mean square of a network's outputs on random inputs."""
    x = random(*shape, seed=seed)
    with torch.no_grad():
        y = copy.deepcopy(net)(x)
    return freeze(Regression(net, x, torch.zeros_like(y)), **settings)


def rms(t):
    return float(t.detach().square().mean().sqrt())


def measured(net, *shape, **settings):
    metric = SignalPropagation(**settings)
    metric.update(step(net, *shape))
    return {key.removeprefix("stability/"): float(value) for key, value in metric.compute().items()}, metric


# Gains ----------------------------------------------------------------------------------------------------------------


def orthogonal(n, gain, seed):
    layer = nn.Linear(n, n, bias=False).double()
    layer.weight.data = gain * torch.linalg.qr(random(n, n, seed=seed))[0]
    return layer


def test_a_deep_linear_network_has_the_gains_that_it_was_given():
    wanted = [0.5, 2.0, 1.0, 3.0, 0.25]
    found, _ = measured(nn.Sequential(*(orthogonal(6, g, i) for i, g in enumerate(wanted))), 7, 6)
    for i, g in enumerate(wanted):
        close(found[f"forward_gain/net.{i}"], g, 1e-12)
        assert i == 0 or found[f"backward_gain/net.{i}"] == pytest.approx(g, rel=1e-12)
    close(found["forward_log_gain"], sum(map(math.log, wanted)), 1e-12)
    close(found["backward_log_gain"], sum(map(math.log, wanted[1:])), 1e-12)
    close([found["forward_gain_min"], found["forward_gain_max"]], [0.25, 3.0], 1e-12)
    assert "backward_gain/net.0" not in found  # nobody needs the gradient by the data


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return x + self.b(F.relu(self.a(x)))


class Mixed(nn.Module):
    """Modules and functions, in place and not, a block, and two branches."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.relu = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True)
        self.block, self.left, self.right, self.last = Block(), nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 2)

    def states(self, x):
        one = self.relu(self.norm(self.first(x)))
        two = self.block(one)
        three = self.left(two)
        four = self.right(two)
        return [x, one, two, three, four, self.last(torch.tanh(three + four))]

    def forward(self, x):
        return self.states(x)[-1]


def test_gains_are_those_of_the_states_and_of_their_gradients():
    net = seeded(Mixed())
    task = Regression(net, random(9, 4, seed=1), torch.zeros(9, 2, dtype=f64))
    found = signal_sizes(freeze(task))
    states = copy.deepcopy(net).train().states(task.x)
    loss = 0.5 * states[-1].square().sum(-1).mean()
    back = torch.autograd.grad(loss, states[1:])
    # first, block, left, right, last; the last one comes after `right`, the later of the two before it.
    before = [0, 1, 2, 2, 4]
    assert [one.name for one in found.layers] == ["net.first", "net.block", "net.left", "net.right", "net.last"]
    assert [one.name for one in found.path] == ["net.first", "net.block", "net.right", "net.last"]
    for i, (one, previous) in enumerate(zip(found.layers, before)):
        close([one.received, one.sent, one.back], [rms(states[previous]), rms(states[i + 1]), rms(back[i])], 1e-12)
        assert math.isnan(one.returned) if previous == 0 else one.returned == pytest.approx(rms(back[previous - 1]))
    ratios = gains(found.layers, found.path)
    close(ratios.forward_log, math.log(rms(states[-1]) / rms(task.x)), 1e-12)
    close(ratios.backward_log, math.log(rms(back[0]) / rms(back[-1])), 1e-12)


def test_initialisations_of_he_and_glorot_keep_sizes():
    """Up to the scatter of finite widths; PyTorch's default shrinks them by sqrt(6) with ReLU."""
    logs = {}
    for name in ("he", "default"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(300, 300, bias=False) for _ in range(8)]
            for layer in layers if name == "he" else []:
                nn.init.kaiming_normal_(layer.weight)
        # The first layer has no ReLU before it: the signal doubles its mean square there, and is halved after it.
        net = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU()))).double()
        found = signal_sizes(step(net, 64, 300))
        logs[name] = gains(found.layers, found.path).forward_log / 8
    assert abs(logs["he"]) < 0.03
    assert logs["default"] == pytest.approx(-math.log(6) / 2, abs=0.03)


def test_a_signal_that_vanishes_has_no_log():
    net = nn.Sequential(orthogonal(3, 1.0, 0), orthogonal(3, 0.0, 1), nn.Linear(3, 2)).double()
    found, _ = measured(net, 8, 3)
    assert found["forward_gain/net.1"] == found["forward_gain_min"] == 0.0
    assert "forward_log_gain" not in found and "forward_gain/net.2" not in found
    assert all(map(math.isfinite, found.values()))


def test_without_layers_there_is_no_gain():
    task = Regression(nn.Sequential(nn.LayerNorm(2)), random(8, 2), random(8, 2)).double()
    with pytest.raises(Unmeasurable, match="no module with a weight matrix"):
        SignalPropagation().update(freeze(task))


# Units ----------------------------------------------------------------------------------------------------------------


class Acts(nn.Module):
    """A layer of six units, and an activation."""

    def __init__(self, activation, convolution=False):
        super().__init__()
        self.layer = nn.Conv2d(2, 6, 3) if convolution else nn.Linear(4, 6)
        self.activation, self.last = activation, nn.Linear(6, 2)
        self.convolution = convolution

    def forward(self, x):
        h = self.activation(self.layer(x))
        return self.last(h.mean((2, 3)) if self.convolution else h)


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU(inplace=True), F.relu_, torch.relu, nn.ReLU6()],
    ids=lambda a: str(a).split(" at ")[0],
)
@pytest.mark.parametrize("convolution", [False, True])
def test_planted_dead_units_are_found(activation, convolution):
    net = seeded(Acts(activation, convolution))
    net.layer.bias.data[:] = 0
    net.layer.bias.data[:2] = -50.0
    if isinstance(activation, nn.ReLU6):
        net.layer.bias.data[2] = 50.0  # beyond its upper end
    shape = (10, 2, 5, 5) if convolution else (40, 4)
    task = step(net, *shape)
    (found,) = signal_sizes(task).activations
    z = net.layer(task.module.x).detach()
    slopes = activation_slope(activation, z)
    assert torch.equal(found.values, slopes.movedim(1, -1).flatten(0, -2))
    expected = (3 if isinstance(activation, nn.ReLU6) else 2) / 6
    values, _ = measured(net, *shape)
    assert values["dead_share"] == values["dead_units/net.layer"] == expected
    assert values["saturated_share"] == 0 and values["flat_slopes/net.layer"] == float((slopes == 0).double().mean())


SMOOTH = [nn.Tanh(), torch.tanh, nn.Sigmoid(), nn.SiLU(), nn.GELU(), NewGELUActivation(), lambda z: F.elu(z, 0.9)]


@pytest.mark.parametrize("activation", SMOOTH)
def test_planted_saturated_units_are_found(activation):
    net = seeded(Acts(activation))
    net.layer.weight.data *= 0.1
    net.layer.bias.data[:] = 0
    net.layer.bias.data[1] = -6.0
    values, _ = measured(net, 10, 4)
    assert values["dead_share"] == 0 and values["saturated_share"] == pytest.approx(1 / 6)
    assert values["flat_slopes/net.layer"] == pytest.approx(1 / 6)
    (found,) = signal_sizes(step(net, 10, 4)).activations
    close(found.values, activation_slope(activation, net.layer(random(10, 4, seed=1)).detach()), 1e-9)


def test_sequences_have_their_units_last_and_a_composite_that_mixes_is_no_activation():
    class Mixes(nn.Module):
        def forward(self, x):
            return torch.tanh(x) * x.mean(-1, keepdim=True)

    net = seeded(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), Mixes(), nn.Linear(6, 2)))
    (found,) = signal_sizes(step(net, 3, 5, 4)).activations
    assert found.name == "net.0" and found.values.shape == (15, 6)


def test_a_second_call_of_a_network_brings_rows_not_units():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = seeded(Acts(nn.ReLU()))

        def forward(self):
            # No unit is alive in the first batch.
            return self.net(torch.zeros(8, 4, dtype=f64)).square().mean() + self.net(random(8, 4)).square().mean()

    task = Twice()
    task.net.layer.bias.data[:] = -1e-6
    found = signal_sizes(freeze(task))
    assert [one.values.shape for one in found.activations] == [(16, 6)]
    assert not inactive_units(found.activations[0].values).dead.all()
    assert [one.name for one in found.layers] == ["net.layer", "net.last"]
    assert found.layers[0].received == 0  # that of the first call


def test_few_rows_tell_nothing():
    values, metric = measured(seeded(Acts(nn.ReLU())), 7, 4)
    assert "dead_share" not in values and "7 rows" in metric.absent["units/net.layer"]
    with pytest.raises(ValueError, match="7 rows"):
        inactive_units(torch.ones(7, 2))


# Kurtosis -------------------------------------------------------------------------------------------------------------


def cubes(n, generator):
    return torch.randn(n, generator=generator) ** 3


@pytest.mark.parametrize("draw", [torch.randn, torch.rand, cubes])
def test_kurtosis_is_scipys(draw):
    values = draw(1000, generator=torch.Generator().manual_seed(0)).double() + 5
    value, error = excess_kurtosis(values)
    close(value, scipy.stats.kurtosis(values.numpy()), 1e-9)
    expected = -6 / 1001  # of normal numbers; kurtosistest divides by the same error, then transforms
    assert (abs(float(value) - expected) < 4 * error) == (draw is torch.randn)


def test_kurtosis_scatters_by_its_error():
    found = [excess_kurtosis(random(50, seed=i))[0] for i in range(2000)]
    close(torch.stack(found).std() / excess_kurtosis(random(50))[1], 1.0, 0.1)


@pytest.mark.parametrize("values", [torch.zeros(9), torch.full((9,), 0.1), torch.ones(3), torch.tensor([])])
def test_constant_or_few_weights_have_no_kurtosis(values):
    assert excess_kurtosis(values)[0].isnan()


def test_the_kurtosis_before_the_first_update_is_remembered_through_a_checkpoint():
    task = Regression(seeded(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))), random(9, 4), random(9, 1))
    metric, resumed = SignalPropagation(), SignalPropagation()
    first = {n: float(scipy.stats.kurtosis(p.detach().flatten())) for n, p in task.named_parameters() if p.ndim > 1}
    for snapshot in trajectory(task, torch.optim.SGD(task.parameters(), lr=0.5), 4):
        if snapshot.step == 3:
            resumed.load_state_dict(metric.state_dict())
            resumed.update(replace(snapshot))  # products adapt to those before them on a snapshot
        now = {n: float(scipy.stats.kurtosis(p.detach().flatten())) for n, p in task.named_parameters() if p.ndim > 1}
        metric.update(snapshot)
    values = metric.compute()
    for name in first:
        close(values[f"stability/kurtosis/{name}"], now[name], 1e-9)
        assert abs(first[name] - now[name]) > 1e-4
    assert same(resumed.compute(), values)
    close(values["stability/kurtosis_initial_max"], max(first.values()), 1e-9)


class Late(Model):
    """Before its first update, one weight has heavy tails; the optimizer flattens it at once."""

    def on_train_batch_end(self, *args):
        with torch.no_grad():
            self.net[0].weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(self.global_step))


def test_initial_kurtosis_is_that_before_the_first_update_whenever_it_is_measured():
    def make():
        model = Late(nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3)))
        model.net[0].weight.data = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) ** 5
        return model

    first = max(float(scipy.stats.kurtosis(p.detach().flatten())) for p in make().parameters() if p.ndim > 1)
    assert first > 10
    for ours in (StabilityMonitor("signal_propagation", every_n_steps=1), Slow("signal_propagation", every_n_steps=1)):
        fit(make, ours, loader=data(shuffle=False), max_steps=6)
        own = ours.history["stability/kurtosis_initial_max"]
        assert own.steps[0] == (4 if isinstance(ours, Slow) else 0)
        close(own.values, [first] * len(own.values), 1e-6)
        assert ours.history["stability/kurtosis_max"].values[-1] < 1


class Slow(StabilityMonitor):
    """Its first measurements do not come."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        due = self.monitor.cadence.due
        self.monitor.cadence.due = lambda step, **known: due(step, **known) if step >= 4 else frozenset()


def test_a_run_resumed_without_its_initial_weights_says_nothing_of_them():
    task = Regression(seeded(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))), random(9, 4), random(9, 1))
    monitor = Monitor(SignalPropagation(), every_n_steps=1)
    own = freeze(task, step=7)
    monitor.require(own)
    monitor.observe(own)
    assert "stability/kurtosis_max" in monitor.history and "stability/kurtosis_initial_max" not in monitor.history


# BatchNorm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 4, 5), (12, 3, 7)])
def test_drift_is_that_of_the_channels(shape):
    x, mean, var = 2 * random(*shape) + 1, random(3, seed=1), random(3, seed=2).square() + 0.5
    found = batch_norm_drift(x, mean, var, eps=0.1)
    rows = x.movedim(1, -1).flatten(0, -2)
    close(found.mean, ((rows.mean(0) - mean) / (var + 0.1).sqrt()).square().mean().sqrt(), 1e-12)
    close(found.variance, ((rows.var(0) + 0.1) / (var + 0.1)).log().square().mean().sqrt(), 1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_errors_are_what_sampling_scatters_by(shared):
    """Also where all positions of a sample say the same."""
    ratios = []
    for seed in range(300):
        x = random(16, 2, 1 if shared else 6, seed=seed).expand(-1, -1, 6)
        found = batch_norm_drift(x, torch.zeros(2), torch.ones(2), eps=0.0)
        ratios.append([found.mean / found.mean_error, found.variance / found.variance_error])
    close(torch.tensor(ratios).square().mean(0).sqrt(), [1.0, 1.0], 0.25)


def test_running_statistics_scatter_too():
    """An average with momentum m has m / (2 - m) of the variance of a batch."""
    x, (mean, var) = random(8, 2), (torch.zeros(2), torch.ones(2))
    one, two = (batch_norm_drift(x, mean, var, memory=m) for m in (0.0, 1.0))
    close(two.mean_error / one.mean_error, math.sqrt(2), 1e-12)
    close(two.variance_error / one.variance_error, math.sqrt(2), 1e-12)
    norm, means = nn.BatchNorm1d(1, momentum=0.3).double(), []
    for seed in range(4000):
        norm(random(4, 1, seed=seed))
        means.append(float(norm.running_mean))
    assert torch.tensor(means[50:]).var() * 4 == pytest.approx(0.3 / 1.7, rel=0.15)


def test_few_samples_do_not_tell_their_scatter():
    with pytest.raises(ValueError, match="3 samples"):
        batch_norm_drift(random(3, 2), torch.zeros(2), torch.ones(2))


def with_norm(dropout=0.0):
    net = seeded(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 2)))
    net[1].running_mean[:], net[1].running_var[:] = 3.0, 0.25
    return net


def test_the_trap_is_the_change_of_the_output_and_moves_nothing():
    net = with_norm(dropout=0.5)
    task = Regression(net, random(9, 4), torch.zeros(9, 2, dtype=f64))
    before = copy.deepcopy(task.state_dict())
    # The running statistics are those of a copy in a real run; here they are read before the replay.
    sample = lambda count: (task(), 9)  # noqa: E731
    snapshot = freeze(task, replay=copy.deepcopy(task), sample=sample)
    running, batch = outputs(snapshot), outputs(snapshot, batch_statistics=True)
    net.eval()
    close(running, net(task.x).detach(), 1e-12)
    h = net[0](task.x)
    h = torch.tanh(F.batch_norm(h, None, None, net[1].weight, net[1].bias, training=True))
    close(batch, net[4](h).detach(), 1e-12)
    assert (batch - running).norm() > 0.1 * batch.norm()
    assert same(task.state_dict(), before)


def test_drift_is_measured_in_training_with_what_was_known_before_the_step():
    class Normed(Model):
        def __init__(self):
            net = with_norm().float()
            super().__init__(nn.Sequential(nn.Linear(6, 4), *net[:4], nn.Linear(5, 3)))

    model = Normed()
    monitor = StabilityMonitor("signal_propagation", every_n_steps=1)
    net, (x, _) = copy.deepcopy(model.net), next(iter(data(shuffle=False)))
    z = net[1](net[0](x)).detach()
    fit(model, monitor, loader=data(shuffle=False), max_steps=2)
    history = {key.removeprefix("stability/"): curve.values for key, curve in monitor.history.items()}
    expected = batch_norm_drift(z, net[2].running_mean, net[2].running_var, memory=0.1 / 1.9)
    close(history["batch_norm_mean_drift/net.2"][0], expected.mean, 1e-5)
    close(history["batch_norm_variance_error/net.2"][0], expected.variance_error, 1e-5)
    close(history["batch_norm_excess_max"][0], expected.excess, 1e-5)
    running, batch = (copy.deepcopy(net).train(mode)(x).detach() for mode in (False, True))
    close(history["batch_norm_output_change"][0], (batch - running).norm() / batch.norm(), 1e-5)
    # With momentum 0.1 a tenth of the way is made in a step.
    assert history["batch_norm_mean_drift/net.2"][1] < 0.97 * history["batch_norm_mean_drift/net.2"][0]


def test_accumulated_batches_count_once():
    single, double = (
        StabilityMonitor("signal_propagation", every_n_steps=1),
        StabilityMonitor("signal_propagation", every_n_steps=1),
    )
    make = lambda: Model(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))  # noqa: E731
    fit(make, single, loader=data(shuffle=False), max_steps=1)
    fit(make, double, loader=data(shuffle=False), max_steps=1, accumulate_grad_batches=2)
    for key in ("forward_log_gain", "backward_log_gain", "forward_gain/net.0"):
        close(double.history[f"stability/{key}"].values, single.history[f"stability/{key}"].values, 1e-6)
    assert double.history.keys() == single.history.keys()


def test_every_global_key_has_a_meaning():
    wanted = {key.removeprefix("stability/") for key in (*SignalPropagation.keys, *SignalPropagation.optional)}
    assert wanted <= {key for key, stated in stated_keys().items() if stated.meaning}
