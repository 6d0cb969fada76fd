"""Critical sharpness: against dense Hessians, root finders and the doubling of its source; what it leaves behind."""

import copy
import math
from functools import partial

import harness
import pytest
import pytorch_lightning as pl
import torch
from harness import FEATURES, Model, data, fit, mlp, unchanged
from problems import Quadratic, close, dense_hessian, freeze, random, regression, same, symmetric, take
from scipy.optimize import brentq
from torch import nn, optim
from torch.nn import functional as F

from lsp_callbacks import CriticalSharpness, Monitor, StabilityMonitor, StopOnInstability, Unmeasurable
from lsp_callbacks.functional import critical_sharpness, critical_step
from lsp_callbacks.loops import Watch

KEY, MULTIPLE, RELATIVE = (
    f"stability/{name}" for name in ("critical_sharpness", "critical_multiple", "relative_critical_sharpness")
)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def gradient_of(problem):
    return flat(torch.autograd.grad(problem(), list(problem.parameters())))


def measured(problem, optimizer, steps=1, **settings):
    """The numbers of the last of some steps, each of which is looked at."""
    metric = CriticalSharpness(**{"tolerance": 1e-8} | settings)
    for step in range(steps):
        metric.update(freeze(problem, optimizer, step=step))
        take(optimizer, problem())
        metric.after_update()
    return {key: float(value) for key, value in metric.compute().items()}


# -- the search ------------------------------------------------------------------------------------------------------


def searched(loss, *, rounding=0.0, **settings):
    """The result of a search, and where it has looked."""
    looked = []

    def change(s):
        looked.append(s)
        return loss(s), rounding

    return critical_step(change, **settings), looked


@pytest.mark.parametrize("crossing", [3e-3, 0.3, 1.0, 1.01, 7.0, 60.0, 5e3])
def test_passes_on_a_quadratic(crossing):
    loss = lambda s: s * (s - crossing)  # noqa: E731
    cold, looked = searched(loss, slope=-crossing)
    close(cold.multiple / crossing, 1, 1e-12)
    assert cold.passes == len(looked) <= (4 if 1 / 8 <= crossing <= 8 else 7) and cold.error <= 0.05
    for start, most in ((1.01 * crossing, 2), (1.5 * crossing, 3), (0.7 * crossing, 3)):
        warm, looked = searched(loss, slope=-crossing, start=start)
        close(warm.multiple / crossing, 1, 1e-12)
        assert warm.passes == len(looked) <= most
    unknown, _ = searched(loss)
    assert unknown.passes <= cold.passes + 1


LOSSES = {
    "cubic": lambda s: s**3 + 0.3 * s**2 - 8 * s, "exponential": lambda s: math.expm1(s) - 5 * s,
    "steep": lambda s: s**8 - 5 * s, "flat": lambda s: math.log1p(s) ** 2 - 2 * math.log1p(s),
    "wall": lambda s: math.inf if s > 2.5 else -s, "nan": lambda s: math.nan if s > 2.5 else -s,
    "concave": lambda s: -s - s**2 + 0.01 * s**4,
}  # fmt: skip


@pytest.mark.parametrize("slope_is_known", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_the_bracket_holds_the_crossing_of_any_loss(name, slope_is_known):
    loss = LOSSES[name]
    slope = loss(1e-9) / 1e-9 if slope_is_known else None
    exact = 2.5 if name in ("wall", "nan") else brentq(loss, 0.5, 100)
    for tolerance, most in ((0.05, 10), (1e-6, 30)):
        result, looked = searched(loss, slope=slope, tolerance=tolerance)
        assert abs(result.multiple - exact) <= (result.error + 1e-12) * exact and result.error <= tolerance
        assert result.passes == len(looked) <= most, (name, looked)


def test_the_least_multiple_that_was_seen_to_raise_the_loss_counts():
    waves = lambda s: math.sin(s) * -s  # above 0 between pi and 2 pi  # noqa: E731
    close(searched(waves, slope=-1e-3, start=1.0)[0].multiple, math.pi, 0.1)


@pytest.mark.parametrize("share", [1e-4, 1e-2, 0.02])
def test_noise_of_the_size_that_is_stated_stays_within_the_error(share):
    generator, wrong = torch.Generator().manual_seed(0), []
    rounding = share * 9  # of the slope times the crossing

    def loss(s):
        return s * (s - 3) + float(rounding * (2 * torch.rand((), generator=generator, dtype=torch.float64) - 1))

    for k in range(200):
        start, slope = 2.0 ** (k % 7 - 3), -3.0 if k % 2 else None
        result, _ = searched(loss, rounding=rounding, slope=slope, start=start)
        wrong += [result] if abs(result.multiple - 3) > result.error * 3 else []
    assert not wrong


@pytest.mark.parametrize("start", [1.0, 3.0, 1e-2])
@pytest.mark.parametrize("slope", [-3.0, None])
def test_more_noise_than_that_is_no_number(start, slope):
    with pytest.raises(Unmeasurable, match="rounding hides where the loss rises"):
        searched(lambda s: s * (s - 3), rounding=4.0, slope=slope, start=start)


@pytest.mark.parametrize("slope", [1.0, 0.0, None])
def test_a_loss_that_does_not_fall(slope):
    with pytest.raises(Unmeasurable, match=r"does not (lower the loss|fall along)"):
        searched(lambda s: s + s * s, slope=slope)
    with pytest.raises(Unmeasurable, match="does not lower"):  # though it is below at the update itself
        searched(lambda s: s - s * s + 0.1 * s**3, slope=1.0)


def test_a_slope_that_is_not_that_of_the_loss_changes_no_result():
    for slope in (-1e3, -1e-3, 5.0):
        result, _ = searched(lambda s: s * (s - 3), slope=slope)
        assert abs(result.multiple - 3) <= 3 * result.error <= 0.15


@pytest.mark.parametrize("slope", [-1.0, None])
@pytest.mark.parametrize("rounding, most", [(0.0, 13), (1e-4, 10)])
def test_a_loss_that_never_rises(slope, rounding, most):
    looked = []
    with pytest.raises(Unmeasurable, match="does not rise along the update"):
        critical_step(lambda s: (looked.append(s) or -s / (1 + s), rounding), slope=slope)
    assert len(looked) <= most


# -- dense Hessians --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-3, 0.1, 2.0])
def test_gradient_descent_on_a_quadratic_is_the_curvature_along_the_gradient(lr):
    H = symmetric([3.0, 1.0, 0.2], seed=2)
    problem = Quadratic(H)
    g = H @ flat(problem.parameters())
    numbers = measured(problem, optim.SGD(problem.parameters(), lr=lr))
    close(numbers[KEY], g @ H @ g / (g @ g), 1e-7)
    close(numbers[MULTIPLE] * lr, 2 * (g @ g) / (g @ H @ g), 1e-7)
    assert numbers[KEY] <= 3.0 and numbers[f"{KEY}_error"] <= 2e-8


OPTIMIZERS = {
    "momentum": partial(optim.SGD, lr=0.1, momentum=0.5, nesterov=True), "Adam": partial(optim.Adam, lr=0.03),
    "AdamW": partial(optim.AdamW, lr=0.03, weight_decay=0.1), "Rprop": partial(optim.Rprop, lr=0.03),
    "NAdam": partial(optim.NAdam, lr=0.02), "Adafactor": partial(optim.Adafactor, lr=0.05),
    "LBFGS": partial(optim.LBFGS, lr=0.1, max_iter=3),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_along_the_update_of_any_optimizer(name):
    """On a quadratic ``u^T H u / (-g^T u) / lr``; for Adam the Rayleigh quotient of its preconditioned Hessian."""
    H = symmetric([3.0, 1.0, 0.2, 0.1], seed=4)
    problem = Quadratic(H, (3, 1))
    optimizer = OPTIMIZERS[name](problem.parameters())

    def closure():
        optimizer.zero_grad()
        loss = problem()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    theta, metric = flat(problem.parameters()), CriticalSharpness(tolerance=1e-8)
    metric.update(freeze(problem, optimizer))
    optimizer.step(closure)
    metric.after_update()
    u, g = flat(problem.parameters()) - theta, H @ theta
    lr = optimizer.param_groups[0]["lr"]
    value = float(metric.compute()[KEY])
    close(value, u @ H @ u / -(g @ u) / lr, 1e-6)
    if name == "Adam":
        states = [optimizer.state[p] for p in problem.parameters()]
        m, v = (flat(state[key] for state in states) for key in ("exp_avg", "exp_avg_sq"))
        P = (v / (1 - 0.999**3)).sqrt() + 1e-8
        w = (m / (1 - 0.9**3)) / P.sqrt()  # u = -lr P^(-1/2) w
        scaled = torch.diag(P**-0.5) @ H @ torch.diag(P**-0.5)
        close(value, (w @ scaled @ w) / (w @ (P**-0.5 * g)), 1e-6)


def test_the_function_agrees_with_a_root_finder_and_the_dense_hessian():
    problem = regression()
    g, H, theta = gradient_of(problem), dense_hessian(problem), flat(problem.parameters())
    before, twin = problem().item(), copy.deepcopy(problem)

    def change(s, direction):
        nn.utils.vector_to_parameters(theta + s * direction, twin.parameters())
        return twin().item() - before

    for direction in (-g, -0.1 * g, -g / (1 + g.abs())):
        found = critical_sharpness(problem, lambda p: p(), direction, tolerance=1e-7)
        exact = brentq(change, 0.5 * found.multiple, 2 * found.multiple, args=(direction,), xtol=1e-13)
        close(found.multiple / exact, 1, 1e-6)
        close(found.value * exact, 2, 1e-6)
    # To first order in the gradient: near a minimum, of a loss whose third derivatives count less and less.
    close(critical_sharpness(problem, lambda p: p(), -g, lr=0.5).value, 4 / found_multiple(problem, -g), 0.02)
    assert float(g @ H @ g / (g @ g)) <= float(torch.linalg.eigvalsh(H)[-1])
    assert torch.equal(flat(problem.parameters()), theta)


def found_multiple(problem, direction):
    return critical_sharpness(problem, lambda p: p(), direction).multiple


def test_the_function_leaves_no_trace_and_sees_one_mask():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1))
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    loss = lambda net: F.mse_loss(net(x), y)  # noqa: E731
    torch.manual_seed(1)
    g = flat(torch.autograd.grad(loss(net), list(net.parameters())))
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    results = [critical_sharpness(net, loss, -g) for _ in range(2)]
    assert results[0] == results[1] and torch.equal(torch.get_rng_state(), state)
    assert same(net.state_dict(), before) and net.training


@pytest.mark.parametrize(
    "arguments, message",
    [({"direction": torch.ones(2)}, "has 2 numbers"), ({"lr": 0.0}, "lr=0"), ({"start": 0.0}, "start=")],
)
def test_wrong_arguments_are_named(arguments, message):
    problem = regression()
    with pytest.raises(ValueError, match=message):
        critical_sharpness(problem, lambda p: p(), **{"direction": -gradient_of(problem)} | arguments)


def test_a_loss_that_is_not_finite_has_none():
    problem = regression()
    with pytest.raises(Unmeasurable, match="the loss is inf"):
        critical_sharpness(problem, lambda p: p() * math.inf, -gradient_of(problem))


def by_doubling(problem, direction, tolerance=1e-3):
    """As its source finds it: a bracket by doublings, then bisections; forward passes of a deep copy."""
    theta, before, twin = flat(problem.parameters()), problem().item(), copy.deepcopy(problem)

    def rises(s):
        nn.utils.vector_to_parameters(theta + s * direction, twin.parameters())
        return twin().item() > before

    high = 1.0
    while not rises(high):
        high *= 2
    while rises(high / 2):
        high /= 2
    low = high / 2
    while high - low > tolerance * low:
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
    return 4 / (low + high)


class Characters(nn.Module):
    """A small GPT on text, whose forward pass is its loss."""

    TEXT = "the loss goes up where the step is too long for the valley, and down where the valley is wide enough. " * 4

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        words = sorted(set(self.TEXT))
        ids = torch.tensor([words.index(c) for c in self.TEXT])
        self.register_buffer("ids", ids[:384].view(12, 32))
        self.embed, self.place = nn.Embedding(len(words), width), nn.Parameter(0.1 * torch.randn(31, width))
        block = nn.TransformerEncoderLayer(
            width, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(words))
        self.double()

    def forward(self):
        mask = nn.Transformer.generate_square_subsequent_mask(31, dtype=torch.float64)
        hidden = self.blocks(self.embed(self.ids[:, :-1]) + self.place, mask=mask, is_causal=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), self.ids[:, 1:].flatten())


def test_a_small_gpt_on_text_has_that_of_the_published_search():
    """Doublings and bisections as in Kalra et al. 2026, along the whole update of AdamW, from step to step."""
    gpt = Characters()
    adamw = optim.AdamW(gpt.parameters(), lr=3e-3, weight_decay=0.1)
    metric, passes = CriticalSharpness(tolerance=1e-3), []
    for step in range(6):
        before = copy.deepcopy(gpt)
        counted = [0]

        def replay(counted=counted):
            counted[0] += 1
            return gpt()

        metric.update(freeze(gpt, adamw, replay, step=step))
        take(adamw, gpt())
        counted[0] = 0
        metric.after_update()
        passes.append(counted[0])
        u = flat(gpt.parameters()) - flat(before.parameters())
        close(float(metric.compute()[KEY]) * 3e-3, by_doubling(before, u), 2e-3)
    assert max(passes[1:]) <= 6, passes


# -- steps as they are trained ---------------------------------------------------------------------------------------


class Noisy(Model):
    """Dropout and BatchNorm: another loss for other masks, or for running statistics."""

    def __init__(self, optimizer):
        super().__init__(nn.Sequential(nn.BatchNorm1d(FEATURES), mlp(nn.Dropout(0.4), width=20)), optimizer)


class ByHand(pl.Callback):
    """The same number, by a root finder on deep copies of the module and of the random state from before each batch."""

    def __init__(self):
        self.multiples, self.batches = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        logged, held = module.log, module._trainer
        module._trainer, module.log = None, lambda *_: None
        self.batches.append((copy.deepcopy(module), torch.get_rng_state(), batch))
        module._trainer, module.log = held, logged

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.theta = flat(module.parameters())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.batches) < trainer.accumulate_grad_batches:
            return
        state, u = torch.get_rng_state(), flat(module.parameters()) - self.theta

        def loss(s):
            twin, total = copy.deepcopy(self.batches[0][0]), 0.0
            nn.utils.vector_to_parameters(self.theta + s * u, twin.parameters())
            for _, random_state, part in self.batches:
                torch.set_rng_state(random_state)
                total += twin.loss(part).item() / len(self.batches)
            return total

        before, high = loss(0.0), 0.25
        while loss(high) <= before:
            high *= 2
        self.multiples.append(brentq(lambda s: loss(s) - before, high / 2, high))
        torch.set_rng_state(state)
        self.batches = []


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}])
@pytest.mark.parametrize("optimizer", [partial(optim.SGD, lr=1.5), partial(optim.Adamax, lr=0.05)])
def test_masks_statistics_accumulation_and_clipping_are_those_of_the_step(optimizer, settings):
    by_hand, metric = ByHand(), CriticalSharpness(tolerance=1e-4)
    monitor = StabilityMonitor([metric], every_n_steps=1, strict=True)
    settings = settings | {"loader": data(dtype=torch.float64), "precision": "64-true"}
    fit(partial(Noisy, optimizer), by_hand, monitor, max_steps=6, **settings)
    curve = monitor.history[MULTIPLE]
    assert curve.steps == list(range(6))
    assert curve.values == pytest.approx(by_hand.multiples, rel=2e-4)
    assert [2 / (optimizer.keywords["lr"] * s) for s in curve.values] == pytest.approx(monitor.history[KEY].values)


@pytest.mark.parametrize("every", [1, 2, None])
def test_it_leaves_training_unchanged(every):
    """Weights, buffers, optimizer, gradients and random states, to the last bit; also with a second loss."""
    make = partial(Noisy, partial(optim.RMSprop, lr=0.05))
    ours = CriticalSharpness(data(), batches=2)  # a shuffled loader draws random numbers
    unchanged(make, StabilityMonitor(["sharpness", ours], every_n_steps=every), max_steps=8)


@pytest.mark.parametrize("optimizer", [partial(optim.LBFGS, lr=0.1, max_iter=3), partial(optim.NAdam, lr=0.01)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_way_of_training_is_changed(optimizer, precision):
    monitor = StabilityMonitor(["sharpness", "critical_sharpness"], every_n_steps=1)
    monitor.monitor.quantities.named.clear()
    unchanged(partial(Noisy, optimizer), monitor, max_steps=4, precision=precision)


def test_lbfgs_is_measured_over_all_of_its_evaluations():
    by_hand = ByHand()
    by_hand.on_before_optimizer_step = lambda *_: None
    start = by_hand.on_train_batch_start

    def noted(trainer, module, batch, batch_idx):
        start(trainer, module, batch, batch_idx)
        by_hand.theta = flat(module.parameters())

    by_hand.on_train_batch_start = noted
    monitor = StabilityMonitor([CriticalSharpness(tolerance=1e-4)], every_n_steps=1, strict=True)
    make = lambda: Model(optimizer=partial(optim.LBFGS, lr=0.1, max_iter=4))  # noqa: E731
    fit(make, by_hand, monitor, loader=data(dtype=torch.float64), max_steps=4, precision="64-true")
    assert monitor.history[MULTIPLE].values == pytest.approx(by_hand.multiples, rel=2e-4)


def test_a_changed_gradient_and_a_compiled_module_are_measured():
    """Its losses say where the loss rises, whatever the gradient is."""
    for make in (harness.GradientHook, lambda: compiled(Model())):
        by_hand, monitor = ByHand(), StabilityMonitor([CriticalSharpness(tolerance=1e-3)], every_n_steps=1, strict=True)
        fit(make, *([] if make is not harness.GradientHook else [by_hand]), monitor, max_steps=4)
        assert all(map(math.isfinite, monitor.history[KEY].values)) and len(monitor.history[KEY].values) == 4
        if by_hand.multiples:
            assert monitor.history[MULTIPLE].values == pytest.approx(by_hand.multiples, rel=0.01)


def compiled(model):
    model.net = torch.compile(model.net, backend="eager")
    return model


def test_a_plain_loop_measures_where_the_update_is_made():
    torch.manual_seed(0)
    net, watched = mlp(), {}
    sgd, others = optim.SGD(net.parameters(), lr=0.5), next(iter(data(batch_size=48)))
    loss_fn = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    log = lambda values, step: watched.update({step: values})  # noqa: E731
    ours = CriticalSharpness(lambda module: loss_fn(module, others), tolerance=1e-3)
    watch = Watch(net, sgd, loss_fn, Monitor(ours, every_n_steps=2), log=log)
    expected = {}
    for step, batch in enumerate(watch(data(n=24))):
        sgd.zero_grad()
        before = copy.deepcopy(net)
        loss_fn(net, batch).backward()
        sgd.step()
        u = flat(net.parameters()) - flat(before.parameters())
        found = critical_sharpness(before, lambda net, batch=batch: loss_fn(net, batch), u, lr=0.5, tolerance=1e-3)
        other = critical_sharpness(before, lambda net: loss_fn(net, others), u, lr=0.5)
        expected[step] = float(found.value), float(other.value)
    assert list(watched) == [0, 2]
    for step, values in watched.items():
        assert values[KEY] == pytest.approx(expected[step][0], rel=5e-3)
        assert values[RELATIVE] == pytest.approx(expected[step][1], rel=2e-2)


# -- momentum, rounding, schedules -----------------------------------------------------------------------------------


def test_a_step_that_moves_nothing_gives_no_reading():
    problem, schedule = regression(), [0.0, 0.1, 0.0, 0.1]
    monitor, sgd = Monitor(CriticalSharpness(), every_n_steps=1), optim.SGD(problem.parameters(), lr=1.0)
    for step, lr in enumerate(schedule):
        sgd.param_groups[0]["lr"] = lr
        monitor.observe(freeze(problem, sgd, step=step))
        take(sgd, problem())
        assert (monitor.after_update() is None) == (lr == 0)
    assert monitor.history[KEY].steps == [1, 3]


@pytest.mark.parametrize("start", [1e-9, 1e5, 1e9])
def test_a_start_far_from_this_update_is_no_reason_for_nothing(start):
    """The last critical rate, where updates differ by orders of magnitude, as those of a line search do."""
    result = critical_step(lambda s: (s * s - 4 * s, 0.0), slope=-4.0, start=start)
    assert result.multiple == pytest.approx(4, rel=0.05)
    with pytest.raises(Unmeasurable, match="does not fall along"):
        critical_step(lambda s: (s, 0.0), start=start)


def test_a_heavy_ball_goes_uphill_in_many_stable_steps():
    problem = Quadratic(symmetric([1.0, 0.3], seed=1))
    heavy_ball = optim.SGD(problem.parameters(), lr=1.0, momentum=0.9)
    monitor = Monitor(CriticalSharpness(), every_n_steps=1)
    with pytest.warns(UserWarning, match="momentum takes it uphill"):
        for step in range(60):
            monitor.observe(freeze(problem, heavy_ball, step=step))
            take(heavy_ball, problem())
            monitor.after_update()
    values = monitor.history[KEY].values
    assert 10 < sum(map(math.isnan, values)) < 40 and float(problem()) < 1e-2


@pytest.mark.parametrize("key", [KEY, MULTIPLE, RELATIVE])
def test_it_is_never_alone_the_cause_of_a_stop(key):
    """Steps of healthy runs are at their edge, and those of a heavy ball go uphill."""
    with pytest.raises(ValueError, match=f"{key}.*no reason to stop"):
        StopOnInstability(key, threshold=1.0)


def test_half_precision_is_seen_where_the_loss_rises_or_refused():
    """A single step changes the loss by less than its rounding; where it rises again the change is larger."""

    class Autocast(nn.Module):
        def __init__(self, half):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.x, self.half = nn.Linear(8, 4), torch.randn(64, 8), half

        def forward(self):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                return self.net(self.x).float().square().mean()

    values = []
    for half in (False, True):
        problem = Autocast(half)
        numbers = measured(problem, optim.SGD(problem.parameters(), lr=1e-3), tolerance=0.05)
        values.append((numbers[KEY], numbers[f"{KEY}_error"]))
    (full, _), (half, error) = values
    assert abs(half / full - 1) <= error <= 0.2 and half != full


@pytest.mark.parametrize("lr", [1.0, 1e-2, 1e-4])
def test_single_precision_agrees_with_double_within_its_error(lr):
    """Below that the rounding of the weights is a part of the update: another one is measured."""
    values = []
    for dtype in (torch.float64, torch.float32):
        problem = regression().to(torch.float32).to(dtype)
        values.append(measured(problem, optim.SGD(problem.parameters(), lr=lr), tolerance=1e-3))
    assert abs(values[1][KEY] / values[0][KEY] - 1) <= values[0][f"{KEY}_error"] + values[1][f"{KEY}_error"] <= 0.01


def test_warm_starts_and_their_passes():
    """A run of gradient descent whose rate changes: the critical rate is followed, not the multiple."""
    problem, passes = regression(), []
    sgd, metric = optim.SGD(problem.parameters(), lr=0.05), CriticalSharpness()
    for step in range(24):
        sgd.param_groups[0]["lr"] = 0.05 * 2.0 ** (step // 6)
        counted = [0]

        def replay(counted=counted):
            counted[0] += 1
            return problem()

        metric.update(freeze(problem, sgd, replay, step=step))
        take(sgd, problem())
        counted[0] = 0
        metric.after_update()
        passes.append(counted[0])
    assert passes[0] <= 7 and sum(passes[1:]) / 23 <= 3.1 and max(passes[1:]) <= 5, passes


def test_it_goes_on_from_a_checkpoint_as_without():
    problem, metric, resumed = regression(), CriticalSharpness(), CriticalSharpness()
    adam = optim.RAdam(problem.parameters(), lr=0.05)
    for step in range(6):
        if step == 4:
            resumed.load_state_dict(metric.state_dict())
        for one in (metric, *([resumed] if step >= 4 else [])):
            one.update(freeze(problem, adam, step=step))
        take(adam, problem())
        for one in (metric, *([resumed] if step >= 4 else [])):
            one.after_update()
    assert same(metric.compute(), resumed.compute()) and same(metric.state_dict(), resumed.state_dict())


def test_a_loss_that_changes_from_step_to_step_by_itself_is_refused():
    problem, counter = regression(), [0]
    sgd, metric = optim.SGD(problem.parameters(), lr=0.1), CriticalSharpness()
    metric.update(freeze(problem, sgd, replay=lambda: problem() * (1 + 0.1 * counter[0])))
    take(sgd, problem())
    counter[0], after = 1, flat(problem.parameters())
    with pytest.raises(Unmeasurable, match="step 0 is another one after its update"):
        metric.after_update()
    assert torch.equal(flat(problem.parameters()), after)


def test_a_replay_that_fails_puts_every_bit_back_and_leaves_the_numbers():
    problem, broken = regression().float(), [math.inf]
    sgd, metric = optim.SGD(problem.parameters(), lr=0.3), CriticalSharpness(check_every=100)

    def replay():
        broken[0] -= 1
        if broken[0] < 0:
            raise KeyError("the loss of a user")
        return problem()

    for step in range(2):
        metric.update(freeze(problem, sgd, replay, step=step))
        take(sgd, problem())
        before, after = metric.compute(), flat(problem.parameters())
        if step:
            broken[0] = 1  # the second pass fails, at shifted parameters
            with pytest.raises(KeyError):
                metric.after_update()
        else:
            metric.after_update()
        assert torch.equal(flat(problem.parameters()), after)
    assert same(metric.compute(), before)


# -- a second loss ---------------------------------------------------------------------------------------------------


def test_a_second_loss_on_a_quadratic():
    """``u^T H2 u / (-g2^T u) / lr`` along the update of the first loss."""
    H, H2, shift = symmetric([3.0, 1.0, 0.2], seed=2), symmetric([2.0, 0.5, 0.1], seed=5), random(3, seed=9)
    problem = Quadratic(H)

    def second(module):
        x = torch.cat([p.reshape(-1) for p in module.parameters()]) - shift
        return x @ H2 @ x / 2

    theta = flat(problem.parameters())
    g, g2 = H @ theta, H2 @ (theta - shift)
    numbers = measured(problem, optim.SGD(problem.parameters(), lr=0.1), second_loss=second)
    expected = (g @ H2 @ g) / (g2 @ g)
    assert expected > 0
    close(numbers[RELATIVE], expected, 1e-6)
    close(numbers[KEY], g @ H @ g / (g @ g), 1e-6)


def test_a_second_loss_that_rises_at_once_is_left_out_with_one_warning():
    loader = data(n=8, shuffle=False)
    monitor = StabilityMonitor([CriticalSharpness(lambda module: -module.loss(next(iter(loader))))], every_n_steps=1)
    with pytest.warns(UserWarning, match="no stability/relative_critical_sharpness: second_loss: the loss") as said:
        fit(Model, monitor, loader=loader, max_steps=3)
    assert len([w for w in said if "second_loss" in str(w.message)]) == 1
    assert RELATIVE not in monitor.history and all(map(math.isfinite, monitor.history[KEY].values))


def test_a_loader_gives_the_loss_of_its_first_batches():
    loader = data(n=24, shuffle=False)
    by_function = lambda module: sum(F.cross_entropy(module.net(x), y) for x, y in list(loader)[:2]) / 2  # noqa: E731
    curves = []
    for second, settings in ((loader, {"batches": 2}), (by_function, {})):
        monitor = StabilityMonitor([CriticalSharpness(second, **settings)], every_n_steps=1, strict=True)
        fit(Model, monitor, max_steps=4, accumulate_grad_batches=2)
        curves.append(monitor.history[RELATIVE].values)
    assert len(curves[0]) >= 3 and curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_the_same_loss_as_the_second_has_the_same_number():
    loader = data(n=8, shuffle=False)
    monitor = StabilityMonitor([CriticalSharpness(loader, tolerance=1e-3)], every_n_steps=1, strict=True)
    fit(Model, monitor, loader=loader, max_steps=4)
    assert monitor.history[RELATIVE].values == pytest.approx(monitor.history[KEY].values, rel=2e-3)


@pytest.mark.parametrize("second", [3.0, "batches", torch.ones(2)])
def test_a_second_loss_that_is_none_is_named(second):
    with pytest.raises(ValueError, match="second_loss="):
        CriticalSharpness(second)


@pytest.mark.parametrize("offset, is_seen", [(1.0, True), (1e5, False)])
def test_a_change_of_the_loss_below_its_rounding_is_no_number(offset, is_seen):
    problem = regression().float()
    sgd, metric = optim.SGD(problem.parameters(), lr=0.1), CriticalSharpness()
    replay = lambda: problem() + offset  # noqa: E731
    metric.update(freeze(problem, sgd, replay))
    take(sgd, problem())
    if is_seen:
        metric.after_update()
    else:
        with pytest.raises(Unmeasurable, match="rounding hides where the loss rises"):
            metric.after_update()
