"""The generalized sensitivity near kinks: closed forms, all vertices one by one, networks whose slopes flip."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from problems import Regression, close, f64, freeze, random, seeded
from torch import nn

from lsp_callbacks import ClarkeProfile, Unmeasurable
from lsp_callbacks.functional import generalized_norm
from lsp_callbacks.functional.network.clarke import _upper
from lsp_callbacks.operators.curvature.kink_relaxation import KinkRelaxation, relax_kinks


def norm(matrix):
    return torch.linalg.matrix_norm(matrix, 2)


def found(forward, x, vertices=12, **settings):
    (free,) = relax_kinks(forward, x, **settings)
    return generalized_norm(free, vertices=vertices), free


def chain(*widths, activation=nn.ReLU, seed=0):
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return seeded(nn.Sequential(*layers[:-1]), seed)


def by_hand(net, x, slopes, eps):
    """The sup over all vertices of W_L D ... W_1, each product formed by itself; and how many slopes were free."""
    choices, weights, z = [], [], x
    for layer in net:
        if isinstance(layer, nn.Linear):
            weights.append(layer.weight.detach())
            z = layer(z)
        else:
            near = z.abs() <= eps * z.square().mean().sqrt()
            own = slopes + (1 - slopes) * (z > 0).double()
            free = near[0].nonzero()[:, 0].tolist()
            signs = list(itertools.product((slopes, 1.0), repeat=len(free)))
            vertices = own.expand(len(signs), -1).clone()
            vertices[:, free] = torch.tensor(signs, dtype=f64).view(len(signs), -1)
            choices.append(vertices)
            z = layer(z)
    best, free = 0.0, 1
    for diagonals in itertools.product(*choices):
        J = weights[0]
        for d, W in zip(diagonals, weights[1:]):
            J = W @ (d[:, None] * J)
        best = max(best, float(norm(J)))
    for vertices in choices:
        free *= len(vertices)
    return best, free


@pytest.mark.parametrize("activation, slope", [(nn.ReLU, 0.0), (lambda: nn.LeakyReLU(0.1), 0.1)])
@pytest.mark.parametrize("seed", range(3))
def test_all_vertices_of_a_chain(activation, slope, seed):
    net, x = chain(3, 5, 5, 4, activation=activation, seed=seed), random(1, 3, seed=seed)
    truth, free = by_hand(net, x, slope, 0.5)
    exact, _ = found(net, x, eps=0.5)
    assert exact.exact and free >= 2 and 2**exact.near <= free
    close(exact.lower, truth, 1e-12)
    close(exact.upper, truth, 1e-12)
    bounded, _ = found(net, x, vertices=0, eps=0.5)
    assert not bounded.exact
    assert 0.95 * truth <= float(bounded.lower) <= truth * (1 + 1e-12) and truth <= float(bounded.upper)
    ordinary = torch.autograd.functional.jacobian(net, x)[0, :, 0]
    close(bounded.ordinary, norm(ordinary), 1e-12)


def test_the_bound_of_one_hidden_layer_is_the_one_in_closed_form():
    for slope, activation in ((0.0, nn.ReLU), (0.3, lambda: nn.LeakyReLU(0.3))):
        net, x = chain(4, 9, 3, activation=activation), random(1, 4)
        W1, W2 = net[0].weight.detach(), net[2].weight.detach()
        z = net[0](x)[0]
        A = z.abs() <= 0.6 * z.square().mean().sqrt()
        assert 2 <= int(A.sum()) <= 8
        D = slope + (1 - slope) * (0.5 * A + (~A & (z > 0)).double())
        factor = (1 - slope) / 2
        formula = norm(W2 @ (D[:, None] * W1)) + factor * norm(W2[:, A]) * norm(W1[A])
        entries = norm(W2 @ (D[:, None] * W1)) + factor * norm(W2[:, A].abs() @ W1[A].abs())
        (free,) = relax_kinks(net, x, eps=0.6)
        assert len(free.radius) == int(A.sum())
        close(_upper(free), torch.minimum(formula, entries), 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_bounds_hold_in_deep_networks_with_many_free_slopes(seed):
    net, x = chain(4, 12, 12, 12, 3, seed=seed), random(1, 4, seed=seed)
    (free,) = relax_kinks(net, x, eps=1.0)
    bounds = generalized_norm(free)
    assert bounds.near > 12 and not bounds.exact
    generator = torch.Generator().manual_seed(seed)
    eye, best = torch.eye(bounds.near, dtype=f64), 0.0
    for _ in range(300):
        e = free.radius * (2 * torch.randint(0, 2, (bounds.near,), generator=generator) - 1)
        through = torch.linalg.inv(eye - free.between * e) @ free.into
        best = max(best, float(norm(free.jacobian + free.out * e @ through)))
    assert best <= float(bounds.lower) * (1 + 1e-12) and float(bounds.lower) <= float(bounds.upper)


class Residual(nn.Module):
    """In-place, twice the same activation, sums of branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.norm(self.a(x)))
        return x + self.b(h) - F.leaky_relu(self.relu(self.b(x)) - 0.3, 0.2)


def test_any_network_by_finite_differences_on_both_sides_of_its_kinks():
    """Moving the biases across the kinks flips slopes: every Jacobian that is then met is below the sup."""
    net, x = seeded(Residual()).eval(), random(1, 4, seed=3)
    exact, _ = found(net, x, eps=0.7)
    assert exact.exact and exact.near >= 3
    close(exact.ordinary, norm(torch.autograd.functional.jacobian(net, x.clone())[0, :, 0]), 1e-12)
    best = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        moved = x + 0.2 * torch.randn(x.shape, dtype=f64, generator=generator)
        own, there = relax_kinks(net, moved, eps=0.0)[0], exact
        # Where no unit beyond those that are free has changed its side, the Jacobian is a member of the set.
        if same_sides(net, x, moved, 0.7):
            best = max(best, float(norm(own.jacobian)))
            assert float(norm(own.jacobian)) <= float(there.lower) * (1 + 1e-9)
    assert best > float(exact.ordinary) + 1e-3  # slopes did flip


def same_sides(net, x, moved, eps):
    sides = []
    for point in (x, moved):
        own = []
        h = net.norm(net.a(point))
        b = net.b(point)
        for z in (h, b, b.relu() - 0.3):
            own.append((z, eps * z.square().mean().sqrt()))
        sides.append(own)
    return all(bool((((z > 0) == (w > 0)) | (z.abs() <= gap)).all()) for (z, gap), (w, _) in zip(*sides))


def test_the_product_set_is_larger_than_clarkes():
    """relu(x) - relu(-x) is x: Clarke's derivative is 1, the chain rule's product set reaches 2."""
    zero = torch.zeros(1, 1, dtype=f64)
    both, _ = found(lambda x: x.relu() - (-x).relu(), zero)
    close(torch.stack([both.lower, both.upper]), [2.0, 2.0], 1e-15)
    assert both.near == 2 and both.exact
    away, _ = found(lambda x: x.relu() - (-x).relu(), zero + 1)
    close(away.lower, 1.0, 1e-15)


@pytest.mark.parametrize(
    "call, at, slopes",
    [
        (nn.ReLU(), 0.0, (0, 1)),
        (nn.ReLU6(), 6.0, (0, 1)),
        (nn.ReLU6(), 0.0, (0, 1)),
        (nn.Hardtanh(-2.0, 1.0), -2.0, (0, 1)),
        (nn.LeakyReLU(3.0), 0.0, (1, 3)),
        (nn.PReLU(init=-2.0).double(), 0.0, (-2, 1)),
        (nn.RReLU(0.2, 0.4).eval(), 0.0, (0.3, 1)),
        (nn.Hardsigmoid(), 3.0, (0, 1 / 6)),
        (lambda x: x.clamp(-1, 1), 1.0, (0, 1)),
        (lambda x: x.clamp(min=0.5), 0.5, (0, 1)),
        (lambda x: F.relu(x, True), 0.0, (0, 1)),
        (lambda x: torch.relu_(x), 0.0, (0, 1)),
        (torch.abs, 0.0, (-1, 1)),
    ],
)
def test_each_kind_of_kink(call, at, slopes):
    def forward(x):
        # Two slopes of the same unit: the kink alone, and beside a straight line.
        return torch.cat([call(x.clone()), call(x.clone()) + 5 * x], dim=1)

    x = torch.full((1, 1), at, dtype=f64)
    exact, free = found(forward, x)
    assert exact.near == 2 and exact.exact and not free.fixed
    ends = [(a**2 + (b + 5) ** 2) ** 0.5 for a in slopes for b in slopes]
    close(exact.lower, max(ends), 1e-12)
    side = torch.autograd.functional.jacobian(forward, x + 1e-3)[0, :, 0]
    close(found(forward, x + 1e-3, eps=1e-9)[0].ordinary, norm(side), 1e-12)


def test_max_pooling_between_two_and_three_entries():
    x = torch.tensor([[[1.0, 1.0, 0.0, 3.0, 2.0, 5.0]]], dtype=f64)
    weight = torch.tensor([1.0, 4.0, 2.0, 1.0, 1.0, 1.0], dtype=f64)
    two, free = found(lambda x: F.max_pool1d(weight * x / weight.detach(), 2) * 2, x)
    assert two.near == 1 and not free.fixed
    close(two.lower, 2.0, 1e-12)
    # The larger of two functions that cross: x and 3 x at 0.
    crossing, _ = found(lambda x: F.max_pool1d(torch.cat([x, 3 * x], -1), 2), torch.zeros(1, 1, 1, dtype=f64))
    close(crossing.lower, 3.0, 1e-12)
    three, free = found(lambda x: F.max_pool1d(torch.cat([x, 3 * x, 2 * x], -1), 3), torch.zeros(1, 1, 1, dtype=f64))
    assert three.upper is None and not three.exact and free.fixed == ("max-pooling tied three ways",)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, stride=2, padding=1), nn.MaxPool2d(2, dilation=2)])
@pytest.mark.parametrize("in_place", [False, True])
def test_pooling_behind_an_activation_has_no_ties_among_dead_units(pool, in_place):
    x, width = random(1, 1, 8, 8), pool(torch.zeros(1, 2, 6, 6)).numel()
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=in_place), pool, nn.Flatten(), nn.Linear(width, 3))
    seeded(net)
    net[0].bias.data -= 0.5  # most units are dead
    exact, free = found(net, x, eps=1e-9)
    assert exact.near == 0 and not free.fixed and exact.exact
    J = torch.autograd.functional.jacobian(net, x).reshape(3, -1)
    close(exact.lower, norm(J), 1e-12)
    bounds, _ = found(net, x, eps=0.3)
    assert bounds.near > 1 and bounds.upper >= bounds.lower > bounds.ordinary


def test_other_kinks_are_named_and_cost_the_upper_bound():
    x = random(1, 4)
    for forward, name in ((lambda x: F.hardswish(x).relu(), "Hardswish"), (lambda x: x.sort()[0].relu(), "Sort")):
        bounds, free = found(forward, x)
        assert bounds.upper is None and not bounds.exact and any(name in one for one in free.fixed)
    bounds, free = found(lambda x: torch.maximum(x, torch.ones_like(x)), x)
    assert free.fixed


def test_smooth_networks_have_the_ordinary_norm_and_several_samples_are_told_apart():
    net, x = chain(3, 6, 2, activation=nn.Tanh), random(3, 3)
    for one, point in zip(relax_kinks(net, x), x):
        smooth = generalized_norm(one)
        close(smooth.upper, norm(torch.autograd.functional.jacobian(net, point[None])[0, :, 0]), 1e-12)
        assert smooth.exact and smooth.near == 0
    net = chain(3, 6, 6, 2)
    together = [generalized_norm(one) for one in relax_kinks(net, torch.cat([x, x]), eps=0.3)]
    assert sum(one.near for one in together) >= 2 and together[0].near < sum(one.near for one in together)
    for first, second in zip(together[:3], together[3:]):
        close(first.lower, second.lower, 1e-12)


def test_degenerate_inputs():
    dead, _ = found(lambda x: (0 * x).relu(), random(1, 3))  # all units at the kink, none reached
    assert dead.near == 0 and float(dead.upper) == 0
    constant, _ = found(lambda x: torch.ones(1, 2, dtype=f64) + 0 * x.sum(), random(1, 3))
    assert float(constant.lower) == 0
    with pytest.raises(Unmeasurable, match="most=2"):
        relax_kinks(lambda x: x.relu(), torch.zeros(1, 3, dtype=f64), most=2)
    for bad in ({"eps": 0.0}, {"samples": 0}, {"most": 0}, {"vertices": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ClarkeProfile(**bad)


def test_the_quantity_takes_the_first_samples_of_the_batch():
    net = chain(3, 6, 6, 2)
    task = Regression(net, random(4, 3), random(4, 2))
    metric = ClarkeProfile(eps=0.3)
    metric.update(freeze(task))
    values = {key.removeprefix("stability/clarke_"): float(value) for key, value in metric.compute().items()}
    each = [generalized_norm(one) for one in relax_kinks(net, task.x, eps=0.3)]  # without `sample`, the whole batch
    close(values["lower"], max(one.lower for one in each), 1e-12)
    close(values["upper"], max(one.upper for one in each), 1e-12)
    close(values["ordinary"], max(one.ordinary for one in each), 1e-12)
    assert values["near"] == max(one.near for one in each) > 0 and values["exact"] == 1
    assert values["lower"] > values["ordinary"]


# By depth ------------------------------------------------------------------------------------------------------------


def of_layers(metric, bound):
    start = f"stability/clarke_sigma_{bound}/"
    return {k.removeprefix(start): float(v) for k, v in metric.compute().items() if k.startswith(start)}


def test_each_depth_is_the_network_up_to_it():
    net, x = chain(3, 5, 5, 4), random(1, 3, seed=1)
    metric = ClarkeProfile(eps=0.5)
    metric.update(freeze(Regression(net, x, random(1, 4))))
    lower, upper = of_layers(metric, "lower"), of_layers(metric, "upper")
    assert list(lower) == list(upper) == ["net.0", "net.2", "net.4"] and not metric.absent
    for k, name in enumerate(lower):
        # A state ends behind its activation.
        truth, free = by_hand([*net[: 2 * k + 1], *([net[2 * k + 1], identity(5)] if k < 2 else [])], x, 0.0, 0.5)
        close(lower[name], truth, 1e-12)
        close(upper[name], truth, 1e-12)
        assert free >= 2
    assert lower["net.4"] == float(metric.compute()["stability/clarke_lower"])


def identity(n):
    layer = nn.Linear(n, n, bias=False).double()
    layer.weight.data = torch.eye(n, dtype=f64)
    return layer


def convolutions():
    """Skips, a pooling, and states that are wider than the input."""
    return seeded(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), Skip(4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
        )
    )


class Skip(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.a, self.b = nn.Conv2d(n, n, 3, padding=1), nn.Conv2d(n, n, 3, padding=1)

    def forward(self, x):
        return x + self.b(F.leaky_relu(self.a(x), 0.2, inplace=True)).relu()


def at(free, e):
    """``J(e)``, by the series that ends."""
    through = term = free.into
    for _ in range(len(e)):
        term = free.between @ (e[:, None] * term)
        through = through + term
    return free.jacobian + free.out @ (e[:, None] * through)


def test_products_forwards_give_the_same_matrices_as_passes_backwards(monkeypatch):
    net, x = convolutions()[:3], random(2, 1, 8, 8)  # 256 numbers from 64
    wider = torch.cat([x.flatten(1), random(2, 300)], dim=1)  # of which the network looks at the first 64
    backwards = relax_kinks(lambda x: net(x[:, :64].view(-1, 1, 8, 8)), wider, eps=0.02)
    rows, row = [], KinkRelaxation._row
    monkeypatch.setattr(KinkRelaxation, "_row", lambda *args: rows.append(args) or row(*args))
    for whole, forwards in zip(backwards, relax_kinks(net, x, eps=0.02, most=300)):
        assert len(whole.radius) > 3 and forwards.jacobian.shape == (256, 64)
        for one in ("out", "between", "radius", "real", "layer"):
            close(getattr(whole, one), getattr(forwards, one), 1e-12)
        for one in ("jacobian", "into"):
            close(getattr(whole, one)[:, :64], getattr(forwards, one), 1e-12)
            assert not getattr(whole, one)[:, 64:].any()
        assert forwards.centre is None
    assert 3 < len(rows) < 256  # of the units only


def test_wide_states_are_bounded_on_a_subspace(monkeypatch):
    net, x = convolutions()[:3], random(2, 1, 8, 8, seed=4)
    monkeypatch.setattr("lsp_callbacks.operators.curvature.kink_relaxation.STEPS", 12)
    monkeypatch.setattr("lsp_callbacks.operators.curvature.kink_relaxation.FAILURE", 0.5)  # of so few steps
    for whole, part in zip(relax_kinks(net, x, eps=0.02, most=300), relax_kinks(net, x, eps=0.02, most=50)):
        assert 3 < len(whole.radius) == len(part.radius) and part.jacobian.shape[1] < 64
        found, truth = generalized_norm(part, vertices=0), generalized_norm(whole, vertices=0)
        assert not found.exact and not generalized_norm(part, vertices=99).exact
        # The rows of the units are held whole, and what J does to them is.
        close(norm(part.into), norm(whole.into), 1e-12)
        assert 0.99 * norm(whole.jacobian) <= norm(part.jacobian) <= norm(whole.jacobian) * (1 + 1e-12) <= part.centre
        assert 0.98 * truth.lower <= found.lower <= truth.lower * (1 + 1e-9)
        assert 0.98 * truth.ordinary <= found.ordinary <= truth.ordinary * (1 + 1e-12)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            e = whole.radius * (2 * torch.rand(len(whole.radius), generator=generator, dtype=f64) - 1)
            assert norm(at(part, e)) <= norm(at(whole, e)) * (1 + 1e-12) <= found.upper
        assert found.upper <= 1.1 * truth.upper


def test_one_state_behind_too_many_units_takes_only_itself_along():
    net, x = chain(3, 8, 8, 2), random(1, 3, seed=2)
    metric, whole = ClarkeProfile(eps=1.0, most=8), ClarkeProfile(eps=1.0)
    for one in (metric, whole):
        one.update(freeze(Regression(net, x, random(1, 2))))
    assert list(of_layers(metric, "lower")) == ["net.0"] and list(metric.absent) == ["net.2", "net.4"]
    assert all("most=8" in reason for reason in metric.absent.values())
    assert of_layers(metric, "lower")["net.0"] == of_layers(whole, "lower")["net.0"]
    assert all(metric.compute()[key].isnan() for key in ClarkeProfile.keys)
    with pytest.raises(Unmeasurable, match="most=1"):
        ClarkeProfile(eps=1.0, most=1).update(freeze(Regression(net, x, random(1, 2))))
