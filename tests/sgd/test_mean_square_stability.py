"""MeanSquareStability: its rows of the step's own batch, its numbers, and what it spends."""

import math
from functools import partial

import pytest
import torch
from harness import Model, data, fit
from problems import close, f64, freeze, interpolating_tanh, random, seeded
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import MeanSquareStability, ProbeSet, Snapshot, StabilityMonitor
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.functional import UpdateRule, mean_square_lr, reduced_modes
from lsp_callbacks.operators.sgd import per_sample_gradients
from lsp_callbacks.operators.sgd.gram_matrix import tangent_kernel
from lsp_callbacks.operators.sgd.graph_rows import GraphRows
from lsp_callbacks.operators.sgd.output_directions import OutputDirections
from lsp_callbacks.operators.sgd.output_hessian import output_curvature, output_hessian
from lsp_callbacks.operators.sgd.statistics_factors import (
    StatisticsFactors,
    random_signs,
    squares_through_statistics,
)
from lsp_callbacks.operators.sgd.step_samples import sampled_rows
from lsp_callbacks.operators.sgd.weighted_gram import FEW, weighted_gram
from lsp_callbacks.operators.trajectory.coming_preconditioner import REMEMBERED
from lsp_callbacks.quantities.sgd import mean_square_stability
from lsp_callbacks.quantities.sgd.mean_square_stability import TOLERANCE
from lsp_callbacks.step.criterion import Evaluation, evaluation
from lsp_callbacks.step.module_modes import as_trained
from lsp_callbacks.step.pending_step import PendingStep
from lsp_callbacks.step.probes import Probes

COURANT, RATE = "stability/courant_mean_square", "stability/mean_square_lr"
SGD = torch.optim.SGD


def squares_of(problem, population=4):
    net, x, y = problem.net, problem.x, problem.y
    part = lambda: evaluation(net(x), lambda f: 0.5 * (f - y).square().sum(1).mean(), samples=len(x))  # noqa: E731
    return ProbeSet(problem, (part,), len(x), 1, population)


# -- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, rule",
    [
        (SGD, UpdateRule()),
        (partial(SGD, momentum=0.9), UpdateRule(momentum=0.9)),
        (partial(SGD, momentum=0.9, nesterov=True), UpdateRule(momentum=0.9, nesterov=True)),
        (partial(SGD, weight_decay=0.1), UpdateRule(weight_decay=0.1)),
    ],
)
def test_the_rate_is_that_of_the_dense_kernel_and_never_above_it(make, rule):
    problem, _ = interpolating_tanh()
    rows = []
    for row in problem.net(problem.x).flatten():
        gradient = torch.autograd.grad(row, list(problem.net.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradient]))
    K = torch.stack(rows) @ torch.stack(rows).T
    exact = mean_square_lr(reduced_modes(K), batch_size=1, rule=rule, population=4, tol=1e-12)
    metric = MeanSquareStability()
    found = metric(freeze(problem, make(problem.parameters(), lr=0.35), probes=squares_of(problem)))
    assert exact * (1 - 2 * TOLERANCE) <= float(found[RATE]) <= exact * (1 + 1e-9)
    close(found[COURANT] * found[RATE], 0.35, 1e-12)
    assert float(found["stability/mean_square_rows"]) == 4


def classifier():
    return seeded(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


def loss_of(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def step_of(net, batch, *, step=0, optimizer=None, loss=loss_of):
    """A step of a plain loop, as an observer takes it."""
    optimizer = optimizer or SGD(net.parameters(), lr=0.1)
    probes, pending = Probes(0, None, None), PendingStep(net)
    pending.add(batch, loss)
    value = loss(net, batch)
    optimizer.zero_grad()
    value.backward()
    own = partial(probes.samples_of_step, pending, loss)
    return pending.snapshot(step, optimizer, loss=value.detach().clone(), samples_of_step=own)


def batch_of(n=48, seed=1):
    return random(n, 6, seed=seed), torch.arange(n) % 3


def test_rows_are_of_the_steps_own_batch_and_nothing_is_collected():
    net, metric = classifier(), MeanSquareStability(rows=48)
    for seed in (1, 2):
        x, y = batch_of(seed=seed)
        snapshot = step_of(net, (x, y), step=seed)
        found = metric(snapshot)
        part = lambda x=x, y=y: evaluation(net(x), lambda f: F.cross_entropy(f, y), samples=48)  # noqa: E731
        K = tangent_kernel(ProbeSet(net, (part,), 48, 48)).gram
        exact = mean_square_lr(reduced_modes(K), batch_size=48, population=10**9, tol=1e-10)
        assert float(found[RATE]) == pytest.approx(exact, rel=2 * TOLERANCE)
    assert metric.vectors() == {}


def test_some_of_the_batch_read_as_the_whole():
    """On average over readings, which take other rows: on both sides of it, and near."""
    net = classifier()
    exact = float(MeanSquareStability(rows=96)(step_of(net, batch_of(96)))[RATE])
    metric = MeanSquareStability()
    rates = [float(metric(step_of(net, batch_of(96), step=k))[RATE]) for k in range(12)]
    assert float(metric.compute()["stability/mean_square_rows"]) == 32
    assert min(rates) < exact < max(rates) and sum(rates) / 12 == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("readings", [34])
def test_replay_gradient_and_shares_are_checked_at_first_and_then_seldom(readings, monkeypatch):
    checks = []
    monkeypatch.setattr(mean_square_stability, "verify", lambda snapshot: checks.append(snapshot.step))
    net, metric = classifier(), MeanSquareStability()
    for step in range(readings):
        metric.update(step_of(net, batch_of(), step=step))
    assert checks == [0, 1, 31]  # the readings 1, 32, and 2, as none of the first graph could be read


def test_fewer_samples_where_less_may_be_spent():
    net, metric = classifier(), MeanSquareStability()
    snapshot = step_of(net, batch_of(96))
    cost = sum(metric.cost(snapshot).values())
    assert metric.limit_cost(snapshot, 0.5 * cost) == "48 of 96 samples"
    assert sum(metric.cost(snapshot).values()) < cost
    assert metric.limit_cost(snapshot, 1e-3) == "32 of 48 samples" and metric.limit_cost(snapshot, 1e-3) is None
    assert float(metric(snapshot)["stability/mean_square_rows"]) == 32


def test_it_is_the_headline_number_by_default():
    fit(Model, monitor := StabilityMonitor(every_n_steps=3), max_steps=7, loader=data())
    assert monitor.courant_source == "courant_mean_square"
    assert monitor.history["stability/courant"] == monitor.history[COURANT]
    assert set(monitor.history["stability/courant_source"].values) == {2.0}


def test_an_old_preconditioner_is_that_of_the_step():
    """After many gradients nu itself says what the coming ones are like: D is 2 everywhere here."""
    problem, answer = interpolating_tanh()
    optimizer = torch.optim.AdamW(problem.parameters(), lr=1e-3, weight_decay=0.0)
    for p in problem.parameters():
        state = {"step": torch.tensor(10.0 * REMEMBERED**2), "exp_avg": torch.zeros_like(p)}
        optimizer.state[p] = state | {"exp_avg_sq": torch.full_like(p, 0.5**2 / 0.999)}
    gradient = {name: torch.zeros_like(p) for name, p in problem.named_parameters()}
    probes = ProbeSet(problem, squares_of(problem).parts, 4, 4, 4)  # a full batch
    found = MeanSquareStability()(freeze(problem, optimizer, gradient=gradient, probes=probes))
    assert float(found[RATE]) == pytest.approx(38 / (2 * float(answer)), rel=0.02)


# -- samples of rows, and of weights -------------------------------------------------------------------------------


def test_rows_are_taken_by_their_size_and_stand_for_the_others():
    sizes = torch.tensor([5.0, 0.1, 0.2, 0.0, 7.0, 0.4, 0.3, 0.2])
    offsets = (torch.arange(400) + 0.5) / 400
    counts = torch.zeros(8, dtype=f64)
    for offset in offsets.tolist():
        taken, chance = sampled_rows(sizes.numpy(), 4, offset)
        assert len(taken) == 4 and bool((chance[(taken == 0) | (taken == 4)] == 1).all())
        counts[taken] += 1 / chance / len(offsets)
    close(counts[sizes > 0], torch.ones(7, dtype=f64), 1e-2)  # unbiased
    assert torch.equal(sampled_rows(sizes.numpy(), 9, 0.5)[0], torch.arange(8))


def test_samples_without_curvature_need_no_row():
    """Half of the samples are fitted: the rate of the others' rows is that of all."""
    z = random(8, 5, seed=3)
    K = torch.zeros(16, 16, dtype=f64)
    K[:8, :8] = z @ z.T
    for rule in (UpdateRule(), UpdateRule(momentum=0.9)):
        whole = mean_square_lr(reduced_modes(K), batch_size=4, population=1000, rule=rule)
        some = reduced_modes(K[:8, :8], samples=16, chance=torch.ones(8, dtype=f64))
        assert mean_square_lr(some, batch_size=4, population=1000, rule=rule) == pytest.approx(whole, rel=1e-9)


def test_alike_samples_are_half_of_them():
    """Each of two equal halves, taken with probability 1/2, gives what both give: second and fourth powers, too."""
    z = random(6, 9, seed=4)
    K = torch.cat([z, z]) @ torch.cat([z, z]).T
    whole = mean_square_lr(reduced_modes(K), batch_size=4, population=1000)
    half = reduced_modes(2 * z @ z.T, samples=12, chance=torch.full((6,), 0.5, dtype=f64))
    assert mean_square_lr(half, batch_size=4, population=1000) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("spread, allowed", [(0.0, 1e-9), (0.5, 0.03), (1.0, 0.07)])
def test_rows_and_columns_of_a_preconditioner_tell_its_kernel(spread, allowed):
    """Against each weight of each row, for a preconditioner of rank one times random numbers."""
    g, a = random(24, 160, seed=1), random(24, 240, seed=2).relu()
    scale = random(160, 1, seed=3).abs() * random(240, seed=4).abs() * random(160, 240, seed=5).exp() ** spread
    rows = (g[:, :, None] * scale.sqrt() * a[:, None]).flatten(1)
    exact, gram = rows @ rows.T, weighted_gram(g, a, scale)
    assert scale.numel() > 2 * FEW
    values, vectors = torch.linalg.eigh(gram)
    assert (gram - exact).norm() <= allowed * exact.norm()
    assert float(values[-1]) == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=allowed)
    assert float(values[0]) > -1e-9 * float(values[-1]) and (gram - gram.T).norm() <= 1e-12 * exact.norm()
    top = vectors[:, -1]
    assert float(values[-1]) == pytest.approx(float(top @ exact @ top), rel=2e-3)
    close(gram.diagonal() / exact.diagonal(), torch.ones(24, dtype=f64), 4e-3)
    close(weighted_gram(g * 0, a, scale), torch.zeros(24, 24, dtype=f64), 0.0)


@pytest.mark.parametrize("of_g, of_weights", [(1e-23, 1e23), (1e-18, 1e18), (1e9, 1.0), (1e15, 1e-15), (1.0, 1e25)])
def test_a_weighted_gram_matrix_has_no_scale_of_its_own(of_g, of_weights):
    """Squares of its rows leave float32, the matrix itself does not."""
    g, a, scale = random(24, 160, seed=1), random(24, 240, seed=2), random(160, 240, seed=3).abs()
    assert scale.numel() > 2 * FEW
    gram = weighted_gram((of_g * g).float(), a.float(), (of_weights * scale).float()).double()
    exact = weighted_gram(g, a, scale)
    size = exact.diagonal().amax()
    close(gram / (of_g**2 * of_weights * size), exact / size, 1e-5)


# -- output Hessians -----------------------------------------------------------------------------------------------

TARGETS = torch.tensor([[0, 4, -100], [1, -100, 2], [3, 3, 3], [2, 0, 1]])


@pytest.mark.parametrize(
    "criterion, closed",
    [
        (lambda f: F.cross_entropy(f.flatten(0, 1), TARGETS.flatten()), True),  # labels that are ignored
        (lambda f: F.cross_entropy(f.mT, TARGETS, label_smoothing=0.1), True),
        (lambda f: 3 * F.mse_loss(f, torch.zeros_like(f)), True),
        (lambda f: F.huber_loss(f, torch.zeros_like(f)), False),
        (lambda f: F.binary_cross_entropy_with_logits(f, torch.full_like(f, 0.3)), False),
    ],
)
@pytest.mark.parametrize("gain", [1.0, 60.0])
def test_output_hessians_in_closed_form_are_those_of_double_backward(criterion, closed, gain):
    outputs = (gain * random(4, 3, 5, seed=8)).requires_grad_()
    where = torch.tensor([[0, 2], [1, 2], [0, 1], [1, 2]])
    curvature = output_curvature(Evaluation(outputs, criterion), where)
    assert (curvature.weights is not None) == closed
    v, place = random(4, 2, 5, seed=9), where[..., None].expand(-1, -1, 5)
    whole = output_hessian(Evaluation(outputs, criterion))(torch.zeros_like(outputs).scatter(1, place, v))
    close(curvature.product(v), whole.gather(1, place), 1e-9)
    matrices = curvature.matrices(v.shape) if closed else None
    if matrices is not None:
        close((matrices @ v[..., None])[..., 0], whole.gather(1, place), 1e-9)


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, tokens):
        return self.head(self.middle(self.table(tokens)).tanh().cumsum(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_rows_at_few_positions_need_no_gradient_of_all_outputs(tied, is_weighted, monkeypatch):
    net = seeded(Language())
    if tied:
        net.head.weight = net.table.weight
    tokens = torch.randint(9, (6, 5), generator=torch.Generator().manual_seed(3))
    loss = lambda f: F.cross_entropy(f.flatten(0, 1), tokens.flatten())  # noqa: E731
    probes = ProbeSet(net, (lambda: evaluation(net(tokens), loss, samples=6),), 6, 2)
    scale = {n: random(*p.shape, seed=7).abs() for n, p in net.named_parameters()} if is_weighted else None
    lean = tangent_kernel(probes, positions=2, scale=scale)
    monkeypatch.setattr(per_sample_gradients.Recorder, "_head", lambda *args: None)
    dense = tangent_kernel(probes, positions=2, scale=scale)
    assert lean.rows == 2 and lean.defect < 1e-9 and set(lean.path.values()) == {"structured"}
    close(lean.gram, dense.gram, 1e-10)


# -- batch statistics ----------------------------------------------------------------------------------------------


def tied_probes(net, x, y):
    def part():
        with as_trained(net, together=True):
            return evaluation(net(x), lambda f: F.cross_entropy(f, y), samples=len(x))

    return ProbeSet(net, (part,), len(x), len(x), batches=(part,), together=len(x))


def normed_mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def normed_cnn(**settings):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, **settings), nn.BatchNorm2d(4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0])


@pytest.mark.parametrize(
    "make, x",
    [
        (normed_mlp, random(8, 4, seed=1)),
        (normed_cnn, random(8, 2, 5, 6, seed=2)),
        (partial(normed_cnn, stride=2, padding=1, groups=2), random(8, 2, 5, 6, seed=2)),
        (partial(normed_cnn, padding=2, padding_mode="circular", dilation=2), random(8, 2, 5, 6, seed=2)),
    ],
)
def test_one_normalisation_is_exact_with_its_statistics_held(make, x):
    """The rows of all weights ahead of it go through its mean and its scale in closed form."""
    net = seeded(make()).double().train()
    probes = tied_probes(net, x, LABELS)
    exact, held = tangent_kernel(probes), tangent_kernel(probes, holds=True)
    close(held.gram, exact.gram, 1e-9)
    assert set(held.path.values()) == {"statistics"}
    assert all(factor == pytest.approx(1, rel=1e-9) for factor in held.factors.values())
    some = tangent_kernel(probes, holds=True, most=5)  # a part of it, times what each row stands for
    assert len(some.gram) == 5 and some.samples == 8
    rows = exact.gram.diagonal()
    assert all(any(abs(float(row * w) / float(r) - 1) < 1e-6 for r in rows) for row, w in zip(
        some.gram.diagonal(), some.chance))  # fmt: skip


def shares_of(probes, **settings):
    """Return the share of each parameter in K, by name."""
    every = tangent_kernel(probes, **settings).gram
    return {name: tangent_kernel(probes, scale={name: 2.0}, **settings).gram - every for name in probes.parameters}


def two_norms():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(),
                         nn.Linear(6, 3))  # fmt: skip


def test_factors_are_ratios_of_what_a_batch_gives_and_what_held_statistics_give():
    """From the rows of each parameter, taken back one by one, and the same random combination."""
    probes = tied_probes(seeded(two_norms()).double().train(), random(8, 4, seed=1), LABELS)
    exact, none = shares_of(probes), StatisticsFactors()
    held = shares_of(probes, holds=True, factors=none, renews=False)
    kernel = tangent_kernel(probes, holds=True)
    signs = random_signs(8, torch.Generator().manual_seed(1))
    for name, factor in kernel.factors.items():
        if held[name].trace() > 1e-9:  # not of a bias ahead of a normalisation
            through, fixed = (float(signs @ k[name] @ signs) / float(held[name].trace()) for k in (exact, held))
            assert factor == pytest.approx((through + 0.1) / (fixed + 0.1), rel=1e-6)
    close(kernel.gram, sum(factor * held[name] for name, factor in kernel.factors.items()), 1e-9)
    assert kernel.factors["6.weight"] == pytest.approx(1, rel=1e-9)
    assert kernel.factors["4.weight"] == pytest.approx(1, rel=1e-9)


def test_the_mean_of_many_combinations_is_the_trace_through_the_statistics():
    probes = tied_probes(seeded(two_norms()).double().train(), random(8, 4, seed=1), LABELS)
    exact = shares_of(probes)
    held = shares_of(probes, holds=True, factors=StatisticsFactors(), renews=False)
    mean, generator = dict.fromkeys(exact, 0.0), torch.Generator().manual_seed(0)
    directions = OutputDirections(
        probes, dict.fromkeys(exact, 1.0), "top", 1, generator, None, checks=False, holds=True
    )
    directions.evaluate(0)
    roots = {name: torch.ones_like(p) for name, p in probes.parameters.items()}
    for _ in range(200):
        squares = squares_through_statistics(probes, directions, roots, random_signs(8, generator))
        mean = {name: value + squares[name] / 200 for name, value in mean.items()}
    for name in ("0.weight", "1.weight", "1.bias"):
        assert mean[name] == pytest.approx(float(exact[name].trace()), rel=0.25)
    assert exact["1.bias"].trace() < 0.5 * held["1.bias"].trace()  # what a shift does, the next normalisation undoes


def test_factors_are_those_of_the_last_combinations_and_never_believe_a_chance_zero():
    factors, share = StatisticsFactors(), {"w": torch.eye(2, dtype=torch.float64), "dead": torch.zeros(2, 2)}
    signs = torch.ones(2, dtype=torch.float64)
    factors.add(share, signs, {"w": 0.0, "dead": 0.0})
    assert factors.values == {"w": pytest.approx(0.1 / 1.1), "dead": 1.0}
    for _ in range(5):  # the first is forgotten
        factors.add(share, signs, {"w": 1.0})
    assert factors.values["w"] == pytest.approx(2.6 / 5.1)
    factors.add(share, signs, {"w": math.nan})
    assert factors.values["w"] == pytest.approx(2.6 / 5.1)


def test_rows_of_the_graph_take_their_factors():
    first = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()]
    net = seeded(nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))).double().train()
    x = random(8, 2, 7, 8, seed=2)
    rows = GraphRows(net, torch.Generator().manual_seed(0), lambda n: n, lambda n: 1, renews=True)
    rows.saw_loss(F.cross_entropy(net(x), LABELS), samples=8, factor=1.0, micro_batches=1)
    rows.form(dict.fromkeys(dict(net.named_parameters()), 1.0))
    kernel = rows.kernel(None, StatisticsFactors())
    held = shares_of(tied_probes(net, x, LABELS), holds=True, factors=StatisticsFactors(), renews=False)
    assert kernel.factors["1.bias"] != pytest.approx(1, abs=1e-3)
    mixed = sum(float(held[name].trace()) * factor for name, factor in kernel.factors.items())
    assert float(kernel.gram.trace()) == pytest.approx(mixed, rel=1e-6)


def test_held_statistics_leave_the_module_as_it_was():
    net = seeded(two_norms()).double().train()
    probes = tied_probes(net, random(8, 4, seed=1), LABELS)
    state = {name: value.clone() for name, value in net.state_dict().items() if "num_batches" not in name}
    tangent_kernel(probes, holds=True)
    moved = [name for name, value in net.state_dict().items() if name in state and not torch.equal(value, state[name])]
    assert not [name for name in moved if "running" not in name]
    assert all(m.training and not m._forward_pre_hooks for m in net.modules())


def test_a_normalisation_written_by_hand_takes_its_rows_one_by_one():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(6))
            self.register_buffer("running_var", torch.ones(6))

        def forward(self, x):
            return (x - x.mean(0)) / x.std(0)

    net = seeded(nn.Sequential(nn.Linear(4, 6), Own(), nn.Linear(6, 3))).double().train()
    probes = tied_probes(net, random(8, 4, seed=1), LABELS)
    held = tangent_kernel(probes, holds=True)
    assert held.passes == 8 and math.isfinite(held.loss)
    close(held.gram, tangent_kernel(probes).gram, 1e-12)


def test_a_snapshot_made_by_hand_is_told_to_hold_its_samples_and_is_measured_with_them():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(32, 4)
    settings = {"step": 0, "module": net, "optimizer": SGD(net.parameters(), 0.1)}

    def loss(outputs):
        return (outputs - x[:, :3]).pow(4).mean()

    with pytest.raises(Unsupported, match=r"in replay: .* give the snapshot probes=ProbeSet\(module, \(lambda"):
        MeanSquareStability()(Snapshot(replay=lambda: loss(net(x)), **settings))
    probes = ProbeSet(net, (lambda: evaluation(net(x), loss, samples=32),), 32, 32)
    values = MeanSquareStability()(Snapshot(replay=lambda: loss(net(x)), probes=probes, **settings))
    assert 0 < values[COURANT] < math.inf and values[COURANT] * values[RATE] == pytest.approx(0.1)
