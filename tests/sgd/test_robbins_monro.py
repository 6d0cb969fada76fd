"""The verdict on every scheduler of torch, by its form; and that the form is that of its rates."""

import inspect
import math
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR
from transformers import optimization

from lsp_callbacks.functional import PowerLaw, rate_decay, robbins_monro
from lsp_callbacks.functional.sgd.robbins_monro import _FORMS
from lsp_callbacks.step.learning_rate_sums import LearningRateSums

S, INF = schedulers, math.inf


def sgd(**settings):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], **{"lr": 0.1, "momentum": 0.5} | settings)


def power(a, **settings):
    return lambda o: S.LambdaLR(o, PowerLaw(a, **settings))


CASES = {
    "constant": (lambda o: S.ConstantLR(o), 0),
    "power 0.5": (power(0.5), 0.5),
    "power 0.51": (power(0.51, start=100), 0.51),
    "power 1": (power(1.0), 1),
    "power 1.01": (power(1.01), 1.01),
    "unknown lambda": (lambda o: S.LambdaLR(o, lambda t: 1 / (1 + t)), None),
    "multiplicative": (lambda o: S.MultiplicativeLR(o, lambda t: 0.99), None),
    "step": (lambda o: S.StepLR(o, 10), INF),
    "step, gamma 1": (lambda o: S.StepLR(o, 10, gamma=1.0), 0),
    "step, growing": (lambda o: S.StepLR(o, 10, gamma=1.5), -INF),
    "milestones": (lambda o: S.MultiStepLR(o, [3, 6]), 0),
    "milestones to 0": (lambda o: S.MultiStepLR(o, [3, 6], gamma=0.0), INF),
    "exponential": (lambda o: S.ExponentialLR(o, 0.9), INF),
    "linear warm-up": (lambda o: S.LinearLR(o), 0),
    "linear to 0": (lambda o: S.LinearLR(o, 1.0, 0.0, 20), INF),
    "polynomial": (lambda o: S.PolynomialLR(o, 20, 2.0), INF),
    "cosine": (lambda o: S.CosineAnnealingLR(o, 20), INF),
    "cosine to a floor": (lambda o: S.CosineAnnealingLR(o, 20, eta_min=1e-3), 0),
    "warm restarts": (lambda o: S.CosineAnnealingWarmRestarts(o, 5, 2), 0),
    "cyclic": (lambda o: S.CyclicLR(o, 0.0, 0.1, 5), 0),
    "cyclic, halved": (lambda o: S.CyclicLR(o, 0.0, 0.1, 5, mode="triangular2"), INF),
    "cyclic, halved to a base": (lambda o: S.CyclicLR(o, 0.01, 0.1, 5, mode="triangular2"), 0),
    "cyclic, fading": (lambda o: S.CyclicLR(o, 0.0, 0.1, 5, mode="exp_range", gamma=0.9), INF),
    "cyclic, of the user": (lambda o: S.CyclicLR(o, 0.0, 0.1, 5, scale_fn=lambda x: 1.0), None),
    "one cycle": (lambda o: S.OneCycleLR(o, 0.1, 50), INF),
    "plateau": (lambda o: S.ReduceLROnPlateau(o), 0),
    "plateau without an end": (lambda o: S.ReduceLROnPlateau(o, eps=0.0), None),
    "averaging": (lambda o: SWALR(o, 0.05), 0),
    "warm-up, then power": (lambda o: S.SequentialLR(o, [S.LinearLR(o), power(0.75)(o)], [5]), 0.75),
    "power, then exponential": (lambda o: S.SequentialLR(o, [power(0.75)(o), S.ExponentialLR(o, 0.9)], [5]), INF),
    "two powers chained": (lambda o: S.ChainedScheduler([power(0.4)(o), power(0.3)(o)]), 0.7),
    "chained with a warm-up": (lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, 0.9)]), INF),
    "chained, shrinking and growing": (
        lambda o: S.ChainedScheduler([S.StepLR(o, 3, 1.5), S.ExponentialLR(o, 0.9)]), None
    ),
    "chained with the unknown": (lambda o: S.ChainedScheduler([S.LambdaLR(o, len), S.ConstantLR(o)]), None),
    "transformers: constant": (optimization.get_constant_schedule, 0),
    "transformers: linear": (lambda o: optimization.get_linear_schedule_with_warmup(o, 3, 20), INF),
    "transformers: cosine": (lambda o: optimization.get_cosine_schedule_with_warmup(o, 3, 20), INF),
    "transformers: inverse root": (lambda o: optimization.get_inverse_sqrt_schedule(o, 3), 0.5),
    "transformers: polynomial": (lambda o: optimization.get_polynomial_decay_schedule_with_warmup(o, 3, 20), 0),
    "transformers: other": (lambda o: optimization.get_wsd_schedule(o, 3, 4, num_training_steps=20), None),
}  # fmt: skip


def made(make, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return make(sgd(**settings))
        except TypeError:  # a chained lambda that cannot be called
            return None


@pytest.mark.parametrize("name", CASES)
def test_the_form_of_each_scheduler(name):
    make, exponent = CASES[name]
    if name == "chained with the unknown":
        make = lambda o: S.ChainedScheduler([S.LambdaLR(o, lambda t: 1.0), S.ConstantLR(o)])  # noqa: E731
    found = robbins_monro(made(make))
    assert found.exponent == exponent or found.exponent == pytest.approx(exponent)
    assert found.holds is (None if exponent is None else 0.5 < exponent <= 1)
    assert found.reason.startswith({True: "yes", False: "no:", None: "unknown"}[found.holds])


FOREVER = [
    name for name, (_, exponent) in CASES.items()
    if exponent is not None and exponent not in (INF, -INF) and "plateau" not in name and "averaging" not in name
]  # fmt: skip


@pytest.mark.parametrize("name", FOREVER)
def test_the_rates_have_that_form(name):
    """``t^a lr_t`` stays within bounds, from its largest in each of two far spans."""
    make, a = CASES[name]
    scheduler = made(make)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4000):
            rates.append(scheduler.get_last_lr()[0])
            scheduler.step()
    spans = [max(t**a * rates[t] for t in range(lo, hi)) for lo, hi in ((500, 1500), (2500, 4000))]
    assert spans[0] > 0 and 0.6 < spans[1] / spans[0] < 1.6


def test_every_scheduler_of_torch_is_known_or_has_no_form():
    own = {c for _, c in inspect.getmembers(S, inspect.isclass) if issubclass(c, S.LRScheduler)}
    assert own - set(_FORMS) == {S.LRScheduler, S._LRScheduler, S.MultiplicativeLR}


def test_subclasses_may_do_anything_and_several_multiply():
    class Own(S.ExponentialLR):
        def get_lr(self):
            return [1 / (1 + self.last_epoch)]

    assert robbins_monro(Own(sgd(), 0.9)).holds is None
    assert robbins_monro().holds is False and robbins_monro().exponent == 0
    optimizer = sgd()
    assert robbins_monro(power(0.4)(optimizer), power(0.3)(optimizer)).holds is True


def test_groups_that_differ_have_no_common_form():
    p, q = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.1)
    assert robbins_monro(S.LambdaLR(optimizer, [PowerLaw(0.7), PowerLaw(0.3)])).holds is None
    assert robbins_monro(S.LambdaLR(optimizer, [PowerLaw(0.7), PowerLaw(0.7, start=9)])).holds is True


# -- read off partial sums -------------------------------------------------------------------------------------------


def rates(make, n, every=1):
    """What is remembered of a schedule of torch, or of a function of the step, seen at every so many steps."""
    found, scheduler = LearningRateSums(), None
    if "o" in inspect.signature(make).parameters:
        scheduler = make(sgd(lr=1.0))
    steps = range(0, n, every) if isinstance(every, int) else every
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(n):
            if step in steps:
                found.add(step, make(step) if scheduler is None else scheduler.get_last_lr()[0])
            if scheduler is not None:
                scheduler.step()
    return found


def brute(make, T):
    """From the schedule itself."""
    late, early = (sum(make(t) for t in range(a, b)) for a, b in ((T // 2, T), (T // 4, T // 2)))
    return 1 - math.log2(late / early)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.51, 0.53, 0.75, 1.0, 1.01, 1.25, 2.0])
@pytest.mark.parametrize("shift", [0, 1])
def test_powers_are_read_within_the_tolerance(p, shift):
    make = lambda t: max(t + shift, 1) ** -p  # noqa: E731
    for n in (64, 72, 80, 1024, 4096):
        found = rates(make, n + 1)
        decay = rate_decay(found.marks)
        assert decay.exponent == pytest.approx(brute(make, n), abs=1e-10)
        assert decay.before == pytest.approx(brute(make, n // 2), abs=1e-10)
        assert abs(decay.exponent - p) <= 2 * max(p, 0.25) / n and len(found.marks) <= 25
        if p not in (0.53, 1.01) or n == 4096:
            assert decay.holds == (0.52 < p <= 1), n  # nearer to 1/2 it could be a geometric decay


def test_half_the_tolerance_is_what_half_a_step_does():
    """Its constants: the change of p by a shift, by differences of the sums of shifted powers."""
    for p, constant in ((0.5, 0.51), (1.0, 1.04)):
        for shift, sign in ((0, 1), (1, -1)):
            error = brute(lambda t, p=p, shift=shift: (t + shift) ** -p, 4096) - p
            assert error == pytest.approx(sign * constant / 4096, rel=0.02)


FADING = {
    "power": (lambda o: S.LambdaLR(o, lambda t: (1 + t) ** -0.75), {1024: (0.75, True), 4096: (0.75, True)}),
    "1 / t": (lambda o: S.LambdaLR(o, lambda t: 1 / (1 + t)), {128: (1.0, True), 4096: (1.0, True)}),
    "root": (lambda o: S.LambdaLR(o, lambda t: (1 + t) ** -0.5), {128: (0.5, False), 4096: (0.5, False)}),
    "product": (lambda o: S.MultiplicativeLR(o, lambda t: 1 - 0.75 / t), {4096: (0.75, True)}),
    "constant": (lambda o: S.ConstantLR(o, 1.0), {128: (0.0, False), 4096: (0.0, False)}),
    "geometric": (lambda o: S.ExponentialLR(o, 0.999), {1024: (0.54, False), 4096: (2.03, False)}),
    "cosine": (lambda o: S.CosineAnnealingLR(o, 4096), {1024: (0.1, False), 3584: (1.41, False), 4096: (1.92, False)}),
    "linear": (lambda o: S.PolynomialLR(o, 4096, 1.0), {1024: (0.16, False), 4096: (1.32, False)}),
    "halved": (lambda o: S.StepLR(o, 1024, 0.5), {1024: (0.0, False), 2048: (1.0, False), 4096: (1.42, False)}),
}  # fmt: skip


@pytest.mark.parametrize("name", FADING)
def test_schedules_of_torch(name):
    make, readings = FADING[name]
    for T, (p, holds) in readings.items():
        decay = rate_decay(rates(make, T + 1).marks)
        assert decay.exponent == pytest.approx(p, abs=0.02) and decay.holds is holds


@pytest.mark.parametrize("tau", [100, 700, 2150, 3000])
def test_a_geometric_decay_never_passes(tau):
    """Its p, in closed form, goes through (1/2, 1] between 0.94 and 1.93 tau."""
    found, passing = LearningRateSums(), []
    for t in range(4 * tau):
        found.add(t, math.exp(-t / tau))
        decay = rate_decay(found.marks)
        assert not decay.holds
        if t > 64 and 0.5 < decay.exponent <= 1:
            passing.append(t / tau)
        y = math.exp(-max(found.marks, default=1) / 4 / tau)
        assert math.isnan(decay.exponent) or decay.exponent == pytest.approx(1 - math.log2(y + y * y), abs=1e-6)
    assert passing[0] == pytest.approx(0.94, abs=0.13) and passing[-1] == pytest.approx(1.93, rel=0.13)


def test_halved_every_n_steps():
    found, held = LearningRateSums(), []
    for t in range(20_000):
        found.add(t, 0.5 ** (t // 200))
        decay = rate_decay(found.marks)
        held += [t] * bool(decay.holds)
        if 64 <= t < 200:
            assert decay.exponent == 0
        if t == 8192:
            assert decay.exponent == pytest.approx(1 + t / 800, rel=0.02)
    assert held and 2.8 < min(held) / 200 <= max(held) / 200 < 3.2
    assert decay.exponent == pytest.approx(1 + max(found.marks) / 800, rel=0.02)  # where sums are 1e-20 of the first


def test_a_warm_up_is_forgotten():
    make = lambda t: t / 50 if t < 50 else (t - 49) ** -0.75  # noqa: E731
    readings = {n: rate_decay(rates(make, n + 1).marks) for n in (64, 256, 1024, 8192)}
    assert readings[64].holds is False and readings[8192].holds is True
    assert readings[8192].exponent == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("every", [5, "random"])
def test_steps_of_unequal_spacing(every):
    """The rate of a step that nobody saw is that of the last one seen; p stays within the wider tolerance."""
    if every == "random":
        import random

        every = {t for t in range(4097) if random.Random(t).random() < 0.2} | {0, 4096}
    for p in (0.0, 0.5, 0.75, 1.0):
        found = rates(lambda t, p=p: (1 + t) ** -p, 4097, every=every)
        assert 5 <= found.gap < 80
        decay = rate_decay(found.marks, gap=found.gap)
        assert abs(decay.exponent - p) <= 2 * max(p, 0.01) * found.gap / 4096
        assert decay.holds == (0.5 < p <= 1)


def test_nothing_is_read_too_early_or_from_the_middle():
    assert rate_decay({}).holds is None
    dense = [rate_decay({t + 1: 0.1 for t in range(n)}).holds for n in (56, 64)]  # a mark at every step
    assert dense == [None, False]
    assert rate_decay(rates(lambda t: 0.1, 64).marks).holds is None  # the sum before step 64 is known at it
    assert rate_decay(rates(lambda t: 0.1, 65).marks).holds is False
    late = LearningRateSums()  # recorded from step 1000 on, the schedule being 1 / t: its beginning is not known
    for t in range(1000, 10_000):
        late.add(t, 1 / t)
        assert rate_decay(late.marks).holds in ((None,) if t < 8192 else (True,))


def test_rates_that_end_vanish_or_are_not_known():
    ended = rate_decay(rates(lambda t: float(t < 100), 1000).marks)
    assert math.isnan(ended.exponent) and ended.holds is False
    begun = rate_decay(rates(lambda t: float(t > 100), 129).marks)
    assert math.isnan(begun.exponent) and begun.holds is False
    found = rates(lambda t: 0.1, 200)
    found.add(200, math.nan)
    assert not found.marks and found.total == pytest.approx(20)


def test_what_is_remembered_survives_a_checkpoint(tmp_path):
    whole, first = rates(lambda t: 1 / (1 + t), 3000), rates(lambda t: 1 / (1 + t), 1234)
    torch.save(first.state_dict(), tmp_path / "rates")
    second = LearningRateSums()
    second.load_state_dict(torch.load(tmp_path / "rates", weights_only=True))
    first.add(1234, 1e9)
    for t in range(1234, 3000):
        second.add(t, 1 / (1 + t))
    assert vars(second) == vars(whole)
