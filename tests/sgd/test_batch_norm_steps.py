"""Steps under BatchNorm: rows through the statistics of their own batch, and the noise of whole batches."""

import itertools
import math
from functools import partial

import pytest
import torch
from harness import CLASSES, FEATURES, SGD, Model, data, fit
from problems import close, f64, random, seeded
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from lsp_callbacks import ProbeSet, SGDStability, StabilityMonitor
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.functional import UpdateRule, gd_exponent, reduced_modes, sgd_exponent, sum_of_exponents
from lsp_callbacks.functional.sgd.mean_square import mean_square_lr, second_moment
from lsp_callbacks.functional.sgd.sgd_stability import Draw
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.step.criterion import evaluation
from lsp_callbacks.step.module_modes import as_trained, batch_norms
from lsp_callbacks.step.probes import Probes

# -- rows ------------------------------------------------------------------------------------------------------------


def dense_net():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    return seeded(nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2)))


def image_net():
    first, second = (nn.BatchNorm2d(2, track_running_stats=False) for _ in range(2))
    body = [nn.Conv2d(1, 2, 2, padding=1), first, nn.SiLU(), nn.Conv2d(2, 2, 2), second, nn.Tanh()]
    return seeded(nn.Sequential(*body, nn.Flatten(), nn.Linear(18, 2)))


NETS = {"dense": (dense_net, random(12, 3)), "images": (image_net, random(12, 1, 3, 3))}
PER_BATCH = 4


def tied_probes(net, x, loss, size=PER_BATCH):
    """``loss(outputs, batch number)``; batches of equal size."""

    def part(k, rows):
        return lambda: evaluation(net(rows), lambda f: loss(f, k), samples=size)

    parts = tuple(part(k, rows) for k, rows in enumerate(x.split(size)))
    return ProbeSet(net, parts, len(x), size, None, True, parts, size)


def squares(targets):
    return lambda f, k: 0.5 * (f - targets[k]).square().flatten(1).sum(1).mean()


def dense_rows(net, x):
    """``(N outputs, P)``: the Jacobian of each whole batch, in train mode, by ``torch.func``."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    rows = []
    for batch in x.split(PER_BATCH):
        found = jacrev(lambda values, b=batch: functional_call(net, values, (b,)))(parameters)
        rows.append(torch.cat([found[name].flatten(2) for name in parameters], dim=2).flatten(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("name", NETS)
def test_rows_are_those_of_the_whole_batch_by_brute_force(name):
    make, x = NETS[name]
    net = make()
    scale = {key: random(*p.shape, seed=i).exp() for i, (key, p) in enumerate(net.named_parameters())}
    kernel = tangent_kernel(tied_probes(net, x, squares(random(3, PER_BATCH, 2))), outputs="all", scale=scale)
    d = torch.cat([value.reshape(-1) for value in scale.values()])
    z = dense_rows(net, x)
    # The order of a sample's rows, and their signs, are free where all output directions are alike.
    close(kernel.gram.square().sum(), (z * d @ z.T).square().sum(), 1e-10)
    close(torch.linalg.eigvalsh(kernel.gram), torch.linalg.eigvalsh(z * d @ z.T), 1e-9)
    blocks = kernel.gram.view(3, 8, 3, 8).square().sum((1, 3))
    close(blocks, (z * d @ z.T).view(3, 8, 3, 8).square().sum((1, 3)), 1e-9)
    assert set(kernel.path.values()) == {"rows"} and kernel.passes == 24


def test_the_top_row_of_the_cross_entropy():
    net, x = dense_net(), random(12, 3)
    y = torch.arange(12).view(3, 4) % 2
    kernel = tangent_kernel(tied_probes(net, x, lambda f, k: F.cross_entropy(f, y[k])))
    z = dense_rows(net, x).view(12, 2, -1)
    with torch.no_grad():
        p = torch.cat([net(batch) for batch in x.split(PER_BATCH)]).softmax(-1)
    # S = p0 p1 [[1, -1], [-1, 1]] has one eigenpair.
    rows = p.prod(-1, keepdim=True).sqrt() * (z[:, 0] - z[:, 1])
    close((rows @ rows.T).abs(), kernel.gram.abs(), 1e-9)
    close(torch.linalg.eigvalsh(rows @ rows.T), torch.linalg.eigvalsh(kernel.gram), 1e-9)


def test_a_weight_ahead_of_the_norm_has_no_direction_of_its_own():
    """f(s W) = f(W): its share falls with 1 / s^2, the others stay; its bias moves nothing."""
    shares = []
    for s in (1.0, 1e2, 1e-2):
        net = dense_net()
        net[1].eps = 1e-14
        with torch.no_grad():
            net[0].weight *= s
            net[0].bias *= s
        shares.append(tangent_kernel(tied_probes(net, random(12, 3), squares(random(3, 4, 2))), outputs="all").traces)
    for s, found in zip((1e2, 1e-2), shares[1:]):
        close(found["0.weight"] * s**2, shares[0]["0.weight"], 1e-6)
        for name in ("1.weight", "1.bias", "3.weight", "3.bias"):
            close(found[name], shares[0][name], 1e-6)
    assert shares[0]["0.bias"] < 1e-20 * shares[0]["0.weight"]


def test_large_gradients_are_sketched_without_bias():
    net, x = seeded(nn.Sequential(nn.Linear(800, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, 2))), random(8, 800)
    probes = tied_probes(net, x, squares(random(2, 4, 2)))
    exact, rough = (tangent_kernel(probes, outputs="all", memory=memory) for memory in (2**26, 2**12))
    assert set(exact.path.values()) == {"rows"} and set(rough.path.values()) == {"sketched rows"}
    size = exact.gram.diagonal().sqrt()
    defect = (rough.gram - exact.gram) / (size * size[:, None])
    width = 4096  # sqrt(2 / width) is 2 %
    assert 0 < defect.abs().max() < 5 * math.sqrt(2 / width) and defect.square().mean().sqrt() < math.sqrt(2 / width)
    with pytest.raises(Unsupported, match="most_rows=16"):
        tangent_kernel(probes, outputs="all", most_rows=15)


# -- steps -----------------------------------------------------------------------------------------------------------


def test_exponents_are_those_of_the_product_of_real_steps():
    """At interpolation a training step's Jacobian is I - lr Hess L_b: dense, by autograd, in train mode."""
    net, x, size = dense_net(), random(64, 3, seed=3), PER_BATCH
    with torch.no_grad():
        targets = [net(batch) for batch in x.split(size)]
    kernel = tangent_kernel(tied_probes(net, x, squares(targets)), outputs="all")
    modes = reduced_modes(kernel.gram, kernel.rows, together=size)
    names, values = zip(*net.named_parameters())
    sizes = [p.numel() for p in values]

    def loss(theta, k):
        own = {name: t.view_as(p) for name, t, p in zip(names, theta.split(sizes), values)}
        return 0.5 * (functional_call(net, own, (x.split(size)[k],)) - targets[k]).square().sum(1).mean()

    theta = torch.cat([p.detach().flatten() for p in values])
    curvatures = torch.stack([hessian(lambda t, k=k: loss(t, k), theta) for k in range(16)])
    close(modes.curvatures[0], torch.linalg.eigvalsh(curvatures.mean(0))[-1], 1e-9)
    lr, generator = 1.2 * 2 / float(modes.curvatures[0]), torch.Generator().manual_seed(0)
    steps = torch.eye(len(theta), dtype=f64) - lr * curvatures
    v, logs = torch.randn(64, len(theta), generator=generator, dtype=f64), []
    for _ in range(400):
        v = torch.einsum("cij,cj->ci", steps[torch.randint(16, (64,), generator=generator)], v)
        logs.append(v.norm(dim=1).log())
        v = v / v.norm(dim=1, keepdim=True)
    exact = torch.stack(logs[100:]).mean()
    how = {"batch_size": size, "replacement": True, "chains": 64, "steps": 300}
    found = sgd_exponent(modes, lr, **how)
    samples = sgd_exponent(reduced_modes(kernel.gram, kernel.rows), lr, **how)
    assert exact > 0.1 and gd_exponent(modes, lr) > 0.1
    assert abs(float(found.value) - exact) < 0.07 * exact  # the share 1 / 16 of the noise is that of samples
    assert abs(float(found.value) - exact) < 0.5 * abs(float(samples.value) - exact)


def tied_modes(outputs=2):
    y = random(6, outputs, 5, seed=4)
    return reduced_modes(y.flatten(0, 1) @ y.flatten(0, 1).T, outputs, together=2), y


def draws(batch_size):
    """Weights of the samples in every batch that can be drawn from 3 groups of 2, equally likely; they sum to 1."""
    count = -(-batch_size // 2)
    share = 1 - (1 - 1 / 3) * batch_size / (2 * count)
    for groups in itertools.product(range(3), repeat=count):
        for within in itertools.product(range(2), repeat=batch_size):
            weights = torch.zeros(6, dtype=f64)
            for g in groups:
                weights[2 * g : 2 * g + 2] += (1 - share**0.5) / (2 * count)
            for k, i in enumerate(within):
                weights[2 * groups[k % count] + i] += share**0.5 / batch_size
            yield weights


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("population", [6, 11])
def test_the_second_moment_is_that_of_every_draw(batch_size, population):
    modes, _ = tied_modes()
    y, x = modes.factor, random(modes.rank, modes.rank, seed=5)
    x = x + x.T
    each = torch.einsum("nor,nos->nrs", y, y)
    noise = math.sqrt((population - batch_size) / (population - 1))
    mean, total, count = each.mean(0), 0, 0
    for weights in draws(batch_size):
        h = (1 - noise) * mean + noise * torch.einsum("n,nrs->rs", weights, each)
        total, count = total + h @ x @ h, count + 1
    close(second_moment(modes, batch_size, population=population)(x), total / count, 1e-10)
    assert 0 < mean_square_lr(modes, batch_size=batch_size, population=population) < 2 / modes.curvatures[0]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_what_is_drawn_has_the_moments_of_every_draw(batch_size):
    modes, _ = tied_modes()
    every = torch.stack(list(draws(batch_size)))
    found = Draw(modes, batch_size, "iid", False, 100, torch.Generator().manual_seed(0))._tied(400, 500).flatten(0, 1)
    close(found.sum(-1), torch.full((len(found),), batch_size, dtype=f64), 1e-12)
    found = found / batch_size
    close(found.mean(0), every.mean(0), 3e-3)
    close(found.T @ found / len(found), every.T @ every / len(every), 3e-3)


def test_groups_of_one_sample_and_one_group_are_plain_samples():
    """Of one group all noise is that of samples; sizes between are refused where a permutation must be known."""
    gram = random(8, 8, seed=6)
    gram = gram @ gram.T
    plain, one = reduced_modes(gram), reduced_modes(gram, together=8)
    assert one.shares(4)[1] == pytest.approx(1 - 0 * 4) and one.shares(8) == (1, 1.0)
    x = torch.eye(8, dtype=f64)
    close(second_moment(one, 8, population=99)(x), second_moment(plain, 8, population=99)(x), 1e-12)
    with pytest.raises(ValueError, match="iid"):
        sgd_exponent(reduced_modes(gram, together=2), 0.1, batch_size=2, sampling="reshuffle")
    with pytest.raises(ValueError, match="statistics"):
        sum_of_exponents(reduced_modes(gram, together=2), 0.1, batch_size=2)
    with pytest.raises(ValueError, match="together=3"):
        reduced_modes(gram, together=3)
    momentum = sgd_exponent(
        reduced_modes(gram, together=2), 1e-3, batch_size=2, population=99, rule=UpdateRule(momentum=0.9)
    )
    assert momentum.value.isfinite()


# -- probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch, count, size",
    [(3, 42, 3), (42, 3, 42), (64, 2, 64), (70, 2, 64), (100, 1, 100), (128, 1, 128), (256, 1, 128)],
)
def test_probes_are_cut_into_batches_of_the_training_size(batch, count, size):
    probes = Probes(128, None, None)
    probes.drop(10**4)
    while not probes.full:
        probes.add((torch.zeros(batch, 2), torch.zeros(batch)))
    found = probes._forward_passes()
    assert len(found) == count and all(one == size and len(x) == len(y) == size for (x, y), one, _ in found)


class Normed(Model):
    """One norm in the middle, in training or frozen."""

    def __init__(self, norm, frozen=False, optimizer=SGD):
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 4), norm, nn.Tanh(), nn.Linear(4, CLASSES)), optimizer)
        self.frozen = frozen

    def on_train_epoch_start(self):
        if self.frozen:
            self.net[1].eval()


class Handmade(nn.Module):
    """BatchNorm as people write it."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1), self.running_var.lerp_(x.var(0), 0.1)
        return (x - mean) / (var + 1e-5).sqrt()


def values(norm, frozen=False, optimizer=SGD, **settings):
    own = SGDStability(16, chains=4, steps=20)
    monitor = StabilityMonitor(own, every_n_steps=2)
    fit(
        lambda: Normed(norm(), frozen, optimizer), monitor, **{"max_steps": 7, "loader": data(shuffle=False)} | settings
    )
    curve = monitor.history["stability/courant_sgd"]
    assert all(0 < value < math.inf for value in curve.values)
    return curve.values, curve.steps, own.latest


def test_batch_norm_is_measured_from_the_first_full_probes_on_by_its_batches():
    found, steps, latest = values(lambda: nn.BatchNorm1d(4))
    assert steps == [1, 2, 4, 6] and (latest.modes.together, latest.modes.samples, latest.batch_size) == (8, 16, 8)
    assert set(latest.kernel.path.values()) == {"rows"} and latest.kernel.passes == 16
    # Running statistics do not enter.
    strange = nn.BatchNorm1d(4)
    strange.running_mean.fill_(3.0), strange.running_var.fill_(50.0)
    assert values(lambda: strange)[0] == found
    assert values(lambda: nn.BatchNorm1d(4, track_running_stats=False))[0] == found
    by_hand = values(lambda: Handmade(4))[0]
    assert by_hand == pytest.approx(values(lambda: nn.BatchNorm1d(4, affine=False))[0], rel=1e-3)


def test_micro_batches_are_normalised_apart():
    _, _, latest = values(lambda: nn.BatchNorm1d(4), accumulate_grad_batches=2)
    assert (latest.modes.together, latest.batch_size) == (8, 16)


def test_a_preconditioner_that_magnifies_the_rounding_of_a_bias_without_effect():
    """Adam divides by the size of the gradient: of a bias ahead of BatchNorm, that is rounding."""
    adam = partial(torch.optim.AdamW, lr=0.02)
    found, _, latest = values(lambda: nn.BatchNorm1d(4), optimizer=adam, max_steps=41)
    traces = latest.kernel.traces
    assert len(found) == 21 and traces["net.0.bias"] < 1e-5 * sum(traces.values())


@pytest.mark.parametrize(
    "norm, frozen",
    [(lambda: nn.BatchNorm1d(4), True), (lambda: nn.GroupNorm(1, 4), False), (lambda: nn.LayerNorm(4), False)],
    ids=["frozen", "group", "layer"],
)
def test_frozen_statistics_and_those_of_a_sample_tie_nothing(norm, frozen):
    _, _, latest = values(norm, frozen)
    assert latest.modes.together == 1 and "rows" not in latest.kernel.path.values()


def test_instance_norm_takes_the_statistics_of_training():
    def make(**settings):
        lift = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True, **settings), nn.Flatten())
        return lambda: lift

    found, _, latest = values(make())
    assert latest.modes.together == 1
    assert values(make(track_running_stats=True))[0] == pytest.approx(found, rel=1e-4)


def test_modes_are_put_back():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4).eval())
    before = [m.training for m in net.modules()]
    assert batch_norms(net) == [net[1]]
    with as_trained(net, together=True):
        assert [m.training for m in net] == [False, True, False, False]
    with as_trained(net, together=False):
        assert not any(m.training for m in net)
    assert [m.training for m in net.modules()] == before
