"""A criterion that the user gives, compared with the loss that training differentiates."""

import math

import pytest
import torch
from harness import CLASSES, Model, data, fit
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import MeanSquareStability, Monitor, SGDStability, StabilityMonitor
from lsp_callbacks.loops import Watch
from lsp_callbacks.step.criterion_check import CriterionCheck, is_sum, why_other

COURANT = "stability/courant_mean_square"


def ours(caught):
    return [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]


class Step(Model):
    """A step whose loss is a function of outputs and labels, and a further term of the module."""

    def __init__(self, loss, further=None, net=None, batch_norm=False):
        super().__init__(net)
        self.of_outputs, self.further = loss, further

    def training_step(self, batch, batch_idx):
        value = self.of_outputs(self.net(batch[0]), batch[1])
        return value if self.further is None else value + self.further(self)


def by_hand(f, y):
    """Cross-entropy that nothing recognises, so that the samples are looked at through what the user gives."""
    return -(f - f.exp().sum(1, keepdim=True).log()).gather(1, y[:, None]).mean()


def monitored(criterion, quantities=("mean_square_stability",), **settings):
    return StabilityMonitor(
        [*quantities], every_n_steps=1, forward_fn=lambda module, batch: module.net(batch[0]),
        criterion=lambda f, batch: criterion(f, batch[1]), **settings,
    )  # fmt: skip


def run(make, monitor, **settings):
    fit(make, monitor, **{"max_steps": 4, **settings})
    curve = monitor.history.get(COURANT)
    return [math.nan] if curve is None else curve.values


def weights(m):
    return sum(p.square().sum() for p in m.parameters())


OTHERS = {
    "penalty": (lambda: Step(by_hand, lambda m: 0.05 * weights(m)), "a further term"),
    "two heads": (lambda: Step(lambda f, y: by_hand(f, y) + 0.3 * f.square().mean()), "a further term"),
    "factor": (lambda: Step(lambda f, y: 5 * by_hand(f, y)), "5 times the criterion"),
    "sum": (lambda: Step(lambda f, y: len(f) * by_hand(f, y)), "times the criterion"),
    "known, with a penalty": (lambda: Step(F.cross_entropy, lambda m: 0.05 * weights(m)), "a further term"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_criterion_of_another_loss_is_refused(kind):
    make, reason = OTHERS[kind]
    monitor = monitored(by_hand, ["mean_square_stability", SGDStability(16)])
    with pytest.warns(UserWarning) as caught:
        values = run(make, monitor)
    assert all(map(math.isnan, values)) and all(map(math.isnan, monitor.history["stability/courant_sgd"].values))
    (said,) = ours(caught)
    assert "criterion(forward_fn(module, batch), batch) is not the loss" in said and reason in said


def smoothed(f, y):
    return F.cross_entropy(f, y, label_smoothing=0.1)


def some_ignored(f, y):
    return F.cross_entropy(f, y.masked_fill(y == 0, -100))


def weighted(f, y):
    return F.cross_entropy(f, y, weight=torch.arange(1.0, CLASSES + 1))


def in_chunks(f, y):
    return sum(F.cross_entropy(*pair, reduction="sum") for pair in zip(f.split(3), y.split(3))) / len(f)


def shifted(f, y):
    """A constant beside, as between a divergence and a cross-entropy."""
    return by_hand(f, y) + 3.7


def dropped():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, CLASSES))


def normalised():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, CLASSES))


RIGHT = {
    "by hand": (lambda: Step(by_hand), by_hand, {}),
    "another formula": (lambda: Step(by_hand), F.cross_entropy, {}),
    "a constant": (lambda: Step(shifted), F.cross_entropy, {}),
    "dropout": (lambda: Step(by_hand, net=dropped()), by_hand, {}),
    "batch normalisation": (lambda: Step(by_hand, net=normalised()), by_hand, {}),
    "accumulation": (lambda: Step(by_hand), by_hand, {"accumulate_grad_batches": 3}),
    "autocast": (lambda: Step(by_hand), by_hand, {"precision": "bf16-mixed"}),
    "bfloat16": (lambda: Step(by_hand), by_hand, {"precision": "bf16-true"}),
    "chunks": (lambda: Step(in_chunks), in_chunks, {}),
    "chunks, told at once": (lambda: Step(in_chunks), F.cross_entropy, {}),
    "label smoothing": (lambda: Step(smoothed), smoothed, {}),
    "class weights": (lambda: Step(weighted), weighted, {}),
    "ignored labels": (lambda: Step(some_ignored), some_ignored, {}),
    "clipping": (lambda: Step(by_hand), by_hand, {"gradient_clip_val": 0.01}),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_the_criterion_of_the_loss_is_measured(kind, recwarn):
    make, criterion, settings = RIGHT[kind]
    values = run(make, monitored(criterion), **settings)
    assert not ours(recwarn) and all(value > 0 for value in values)


def test_a_loss_that_a_scaler_multiplies(recwarn):
    torch.manual_seed(0)
    net, scaler = nn.Linear(6, CLASSES), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, monitor = torch.optim.SGD(net.parameters(), 0.1), Monitor(MeanSquareStability(), every_n_steps=1)
    watch = Watch(
        net, optimizer, lambda m, b: by_hand(m(b[0]), b[1]), monitor, scaler=scaler,
        forward_fn=lambda m, b: m(b[0]), criterion=lambda f, b: by_hand(f, b[1]),
    )  # fmt: skip
    for x, y in watch(data()):
        optimizer.zero_grad()
        scaler.scale(by_hand(net(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not ours(recwarn) and all(value > 0 for value in watch.history[COURANT].values)


def test_a_penalty_at_its_least_shows_at_the_next_step():
    """As of a distance from the first weights: gradient and value are 0 there, the curvature is not."""

    class Anchored(Step):
        def __init__(self):
            super().__init__(by_hand)
            self.first = [p.detach().clone() for p in self.net.parameters()]
            self.further = lambda m: 2.0 * sum((p - q).square().sum() for p, q in zip(m.net.parameters(), self.first))

    monitor = monitored(by_hand)
    with pytest.warns(UserWarning, match="a further term"):
        values = run(Anchored, monitor)
    assert math.isfinite(values[0]) and all(map(math.isnan, values[1:]))
    with pytest.warns(UserWarning, match="pass forward_fn"):  # and is seen at the first by what the loss depends on
        values = run(AnchoredKnown, StabilityMonitor(["mean_square_stability"], every_n_steps=1))
    assert all(map(math.isnan, values))


class AnchoredKnown(Step):
    def __init__(self):
        super().__init__(F.cross_entropy)
        first = [p.detach().clone() for p in self.net.parameters()]
        self.further = lambda m: 2.0 * sum((p - q).square().sum() for p, q in zip(m.net.parameters(), first))


def test_a_criterion_that_sums_is_named_and_what_to_do_is_right(recwarn):
    def sums(f, y):
        return by_hand(f, y) * len(f)

    with pytest.warns(UserWarning, match="criterion sums over the samples"):
        assert all(map(math.isnan, run(lambda: Step(sums), monitored(sums))))
    told = run(lambda: Step(sums), monitored(lambda f, y: 8 * by_hand(f, y)))
    mean = run(lambda: Step(by_hand), monitored(by_hand))
    assert told[0] == pytest.approx(8 * mean[0], rel=1e-2)


def test_gradients_that_cancel_are_not_another_loss():
    """At the end of a fit the mean of the samples' gradients is their rounding, in whatever order it is taken."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4096, 3, generator=generator), 100 * torch.randn(4096, 1, generator=generator)
    net = nn.Linear(3, 1, bias=False)
    net.weight.data.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.T)

    def loss():
        return F.mse_loss(net(x), y)

    def outputs():
        return net(x.flip(0)).flip(0)

    parameters = [net.weight]
    own, other = (torch.autograd.grad(F.mse_loss(f, y), net.weight)[0] for f in (net(x), outputs()))
    assert (own - other).norm() > 0.05 * own.norm()
    assert not why_other(loss, outputs, lambda f: F.mse_loss(f, y), parameters)
    assert "a further term" in why_other(loss, outputs, lambda f: F.mse_loss(f, y) + 0.1 * f.mean(), parameters)


def test_when_it_is_looked_at():
    check, asked = CriterionCheck(), []
    for k in range(1, 100):
        step = type("Step", (), {})()
        for _ in range(3):  # by three quantities
            check.require(step, lambda k=k: asked.append(k) or "")
    assert asked == [1, 2, 4, 8, 16, 32, 64, 96]


def test_warm_readings_run_no_forward_pass_for_it():
    calls, monitor = [], monitored(F.cross_entropy)

    class Counted(Step):
        def __init__(self):
            super().__init__(F.cross_entropy)
            self.net.register_forward_pre_hook(Counting(calls))

    run(Counted, monitor, max_steps=12)
    assert monitor.monitor.quantities["mean_square_stability"]._known is not None
    assert calls[-3:] == ["step"] * 3 and len(calls) - 12 < 12


class Counting:
    """A hook that copies of the module keep."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, module, args):
        self.calls.append("step")

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_are_told_from_means(reduction):
    f, y = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 4
    assert is_sum(lambda f, b: F.cross_entropy(f, b[1], reduction=reduction), f, (f, y)) == (reduction == "sum")
