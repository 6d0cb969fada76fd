"""The verdict on every scheduler of torch, by its form; and that the form is that of its rates."""

import inspect
import math
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR
from transformers import optimization

from lsp_callbacks.functional import PowerLaw, robbins_monro
from lsp_callbacks.functional.robbins_monro import _FORMS

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
    assert found.reason.startswith({True: "yes", False: "no:", None: "not known"}[found.holds])


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
