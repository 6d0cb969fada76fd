"""What is said at the end of a run, as data: of made-up runs, and of real ones at the default cadence."""

import math
from dataclasses import replace
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from harness import fit
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import Curve, Fault, Lyapunov, Monitor, SpectralNorm, StabilityMonitor, StopOnInstability
from lsp_callbacks.monitor.losses import ArrivedLoss, LossRecord
from lsp_callbacks.report import Run, Verdict, judge, sentence

NAN = math.nan
FALLS, FLAT = [2.3 * 0.98**k for k in range(400)], [2.3] * 400
RISES = [1.0] * 200 + [1.0 + 0.02 * k for k in range(200)]


def history(courant, exponent=(), steps=(0, 130, 260, 390), **others):
    curves = {"courant": courant, "lyapunov": exponent} | others
    return {f"stability/{k}": Curve(list(steps[: len(v)]), list(v)) for k, v in curves.items() if v}


def losses(values):
    record = LossRecord()
    for step, value in enumerate(values):
        record.add(ArrivedLoss(step, value))
    return record


STABLE, ABOVE = history([0.4] * 4, [-0.2] * 4), history([0.5, 1.5, 2.0, 4.0], [-0.2, 0.1, 0.2, 0.3])
EDGE, APART = history([1.0] * 4, [-0.05] * 4), history([0.2] * 4, [0.3] * 4)
EARLY = history([0.4], [-0.2])


@pytest.mark.parametrize(
    "curves, values, settings, state, cause, advice",
    [
        (STABLE, FALLS, {}, "stable", "exponent", "nothing to do"),
        (STABLE, FALLS, {"event": 100}, "recovered", "event", "check that the loss has recovered"),
        (STABLE, FALLS, {"event": 100, "stop": 200, "reason": "why"}, "unstable", "stop", "lower the learning rate"),
        (STABLE, FLAT, {}, "not learning", "loss", "compare it with a tenth"),
        (STABLE, RISES, {}, "risen", "loss", "every_n_steps=20"),
        (STABLE, [*FALLS[:-1], NAN], {}, "not finite", "loss", "nothing before shows instability"),
        (STABLE, [*FALLS[:-3], 50.0, 1e6, NAN], {}, "not finite", "loss", "lower the learning rate"),
        (ABOVE, [*FALLS[:-1], NAN], {}, "not finite", "loss", "divide the learning rate by 2.5"),
        (EARLY, [*FALLS[:-1], NAN], {}, "not finite", "loss", "lower the learning rate"),  # read long before
        (history([1e14] * 4), FALLS, {}, "unstable", "courant", "start again with a much lower learning rate"),
        (STABLE, [*FALLS[:-9], math.inf, *FALLS[-8:]], {}, "stable", "exponent", "has recovered"),
        (STABLE, FALLS[:40], {"step": 40}, "stable", "exponent", "60 steps are too few"),
        (STABLE, [], {}, "stable", "exponent", "it was not seen"),
        (STABLE, FALLS, {"fault": Fault(7, "forward", operation="aten.log")}, "not finite", "fault", "clamp"),
        (STABLE, FALLS, {"scheduled": 1.3}, "unknown", "rate", "every_n_steps=20"),
        (ABOVE, FALLS, {"scheduled": 9.0}, "unstable", "exponent", "divide the learning rate by 2.5"),
        (history([0.0]), FALLS[:40], {"step": 40}, "unknown", "rate", "every_n_steps=2"),  # of a rate of 0
        (ABOVE, FALLS, {}, "unstable", "exponent", "divide the learning rate by 2.5"),
        (ABOVE, FLAT, {}, "not learning", "loss", "divide the learning rate by 2.5"),
        (history([500.0] * 4), FALLS, {}, "unstable", "courant", "divide the learning rate by 625"),
        (ABOVE, RISES, {}, "unstable", "exponent", "divide the learning rate by 2.5"),
        (ABOVE, [*FALLS[:-1], NAN], {}, "not finite", "loss", "divide the learning rate by 2.5"),
        (EDGE, FALLS, {}, "edge", "exponent", "as long as the loss falls"),
        (EDGE, RISES, {}, "unstable", "loss", "divide the learning rate by 1.2"),
        (APART, FALLS, {}, "contradictory", "contradiction", None),
        (APART, FLAT, {}, "not learning", "loss", None),
        (EARLY, FALLS, {}, "unknown", "age", "every_n_steps=20"),
        (EARLY, FALLS, {"event": 9}, "unknown", "age", "every_n_steps=20"),
        (EARLY, RISES, {}, "risen", "loss", "measure more often"),
        ({}, FALLS, {}, "unknown", "not measured", "measure more often"),
        (history([], courant_gd=[0.4] * 4), FALLS, {}, "stable", "courant", "nothing to do"),  # the probes never full
        (history([], courant_gd=[4.0] * 4), FALLS, {}, "unstable", "courant", "divide"),
        (history([NAN], courant_gd=[4.0] * 4), FALLS, {}, "unstable", "courant", "divide"),
        (history([0.4, 0.4, NAN, NAN], [-0.2] * 4), FALLS, {}, "unknown", "failed", "warning"),
        (history([0.4] * 4, collapsed=[0.0, 0.0, 1.0, 1.0]), FLAT, {}, "collapsed", "collapse", "lower learning rate"),
        (history([0.4], collapsed=[0.5]), FLAT, {}, "collapsed", "collapse", "lower learning rate"),
        (history([0.4] * 4, [-0.2] * 4, collapsed=[0.0, 0.0, 0.0, 0.5]), FALLS, {}, "unknown", "collapse", "measure"),
        (history([0.4] * 4, [-0.2] * 4, collapsed=[0.0, 0.5, 0.0, 0.0]), FLAT, {}, "not learning", "loss", "compare"),
    ],
)  # fmt: skip
def test_the_state_by_gravity(curves, values, settings, state, cause, advice):
    verdict = judge(Run(curves, **{"step": 399, "losses": losses(values)} | settings))
    assert (verdict.state, verdict.cause) == (state, cause)
    assert not verdict.advice if advice is None else advice in verdict.advice
    said = sentence(verdict)
    assert said.startswith("lsp_callbacks: ") and said.endswith(".") and "\n" not in said and "nan," not in said
    assert (verdict.advice or "no advice") in said
    calm = not settings and state == "stable" and values == FALLS
    assert ("nothing to do" in said) == calm and (not calm or verdict.calm)
    for step in (settings.get("event"), settings.get("stop")):
        assert step is None or f"step {step}" in said
    assert ("contradict" in said) == (curves is APART)


@pytest.mark.parametrize(
    "scheduled, said", [(0.0, "says nothing of larger rates"), (1.3, "the learning rate has grown")]
)
def test_a_rate_that_stays_at_0_has_not_grown(scheduled, said):
    curves = history([0.0] * 4) if scheduled == 0 else history([0.1] * 4)
    assert said in sentence(judge(Run(curves, step=399, losses=losses(FALLS), scheduled=scheduled)))


def test_nothing_is_calm_that_could_be_worse():
    """Each fact that is added to a calm run makes it graver, never calmer."""
    calm = Run(STABLE, step=399, losses=losses(FALLS))
    assert judge(calm).calm
    seen = [{"losses": losses(values)} for values in (FLAT, RISES, [NAN])]
    for worse in ({"event": 3}, {"stop": 3, "reason": "why"}, {"step": 9999}, {"history": {}},
                  {"fault": Fault(3, "batch")}, *seen):  # fmt: skip
        verdict = judge(Run(**{**vars(calm), **worse}))
        assert not verdict.calm and "nothing to do" not in sentence(verdict)


def test_what_the_budget_has_not_paid_for_is_said_and_not_blamed_on_a_warning(monkeypatch):
    """No warning was given: what helps is to measure more often."""
    monitor = Monitor(SpectralNorm(), Lyapunov())
    monitor.reset()
    monitor.history["stability/spectral_norm_max"] = Curve([0], [2.0])
    assert "the warning at the start" in judge(Run.of(monitor, 40)).advice
    monkeypatch.setattr(monitor.cadence, "waiting", lambda: dict.fromkeys(("spectral_norm", "lyapunov"), "too dear"))
    verdict = judge(Run.of(monitor, 40))
    assert (verdict.state, verdict.cause) == ("unknown", "not measured")
    assert "every_n_steps=2," in verdict.advice and "no lyapunov yet" in verdict.advice
    assert "warning" not in sentence(verdict)


def test_a_rate_that_has_not_grown_to_the_edge_leaves_a_run_stable():
    calm = Run(STABLE, step=399, losses=losses(FALLS))
    assert all(judge(replace(calm, scheduled=scheduled)).calm for scheduled in (0.0, 0.4, 0.7))
    assert judge(replace(calm, history=EDGE, scheduled=1.3)).state == "edge"


def test_there_is_a_verdict_before_training():
    assert StabilityMonitor().verdict.state == "unknown"


def noisy(values, scatter=0.9):
    """Losses whose steps scatter evenly about some values."""
    generator = torch.Generator().manual_seed(0)
    return [v * (1 + scatter * float(2 * torch.rand((), generator=generator) - 1)) for v in values]


#: The least of the first few is low by chance; of 30, a quarter above it is more than noise.
CHANCE = [4.0, 5.0, *noisy([8.4] * 58)]


@pytest.mark.parametrize(
    "curves, values, state, cause",
    [
        (STABLE, CHANCE, "unknown", "noise"),
        (EDGE, CHANCE, "unstable", "loss"),  # what cannot be told is not told for the better
        (STABLE, [*noisy([4.0] * 100, 0.3), *noisy([8.0] * 100, 0.3)], "risen", "loss"),
        (STABLE, RISES, "risen", "loss"),
        (STABLE, FLAT, "not learning", "loss"),
        (STABLE, noisy(FALLS, 0.3), "stable", "exponent"),
        (STABLE, [2.3, 6000.0, 700.0, 30.0, 20.0], "risen", "loss"),  # before 30 steps
        (EDGE, [2.3, 6000.0, 700.0, 30.0, 20.0], "unstable", "loss"),
        (STABLE, [2.3, 2.2, 9.0, 2.1, 2.0], "stable", "exponent"),
        (STABLE, [2.3 * 2.0**k for k in range(40)], "risen", "loss"),
    ],
)
def test_a_rise_is_more_than_noise(curves, values, state, cause):
    verdict = judge(Run(curves, step=390, losses=losses(values)))
    assert (verdict.state, verdict.cause) == (state, cause) and verdict.calm == (state == "stable")


def test_noise_is_told_in_words():
    verdict = judge(Run(STABLE, step=390, losses=losses(CHANCE)))
    text = sentence(verdict)
    assert "whether the loss falls is unknown: smoothed, it is" in text and "scatters by" in text
    assert "rose" not in text and verdict.evidence["loss_noise"] == pytest.approx(8.4 * 0.9 / 3**0.5, rel=0.3)


@pytest.mark.parametrize("values, state", [([5000.0] * 8, "unknown"), (FALLS, "stable"), ([2.3] * 70, "not learning")])
def test_a_matrix_that_has_vanished_is_not_told_stable(values, state):
    """Without a critical rate beside it, a number of 0 is no small rate."""
    curves = history([0.1, 0.1, 0.0, 0.0], courant_mean_square=[0.1, 0.1, 0.0, 0.0], mean_square_lr=[1.0, 1.0])
    verdict = judge(Run(curves, step=390, losses=losses(values)))
    assert verdict.state == state
    assert state != "unknown" or "no curvature in the outputs" in sentence(verdict)


def test_a_rate_of_0_is_not_said_to_have_grown():
    curves = history([0.0] * 4, courant_mean_square=[0.0] * 4, mean_square_lr=[1.0] * 4)
    verdict = judge(Run(curves, step=390, losses=losses(FALLS[:40]), scheduled=0.0))
    assert verdict.state == "unknown" and "says nothing of larger rates" in sentence(verdict)
    assert "grown" not in sentence(verdict)


def test_a_warm_up_from_zero_is_not_told_stable_by_its_first_step():
    """The only reading is of a learning rate of 0."""
    make, loader = digits(T, sgd(0.1), schedule=lambda t: t / 60)
    monitor = StabilityMonitor(["mean_square_stability"], every_n_steps=1000)
    fit(make, monitor, loader=loader, max_steps=40, max_epochs=-1)
    assert monitor.history["stability/courant"].values == [0.0]
    assert (monitor.verdict.state, monitor.verdict.cause) == ("unknown", "rate")
    assert 0 < monitor.verdict.evidence["scheduled"] < 1
    assert "the learning rate has grown" in sentence(monitor.verdict)


def test_a_rate_that_has_grown_to_the_edge_is_not_told_stable():
    make, loader = digits(T, sgd(0.1), schedule=lambda t: 1e-2 if t < 2 else 50.0)
    monitor = StabilityMonitor(["mean_square_stability"], every_n_steps=1000)
    fit(make, monitor, loader=loader, max_steps=3, max_epochs=-1)
    assert monitor.verdict.state == "unknown" and monitor.verdict.evidence["scheduled"] > 1
    assert "the learning rate has grown" in sentence(monitor.verdict)


def test_a_stop_by_the_loss_alone_says_that_no_reading_shows_it():
    stopped = Run(STABLE, step=399, losses=losses(RISES), stop=200, reason="why")
    assert "confirm=None" in judge(stopped).advice
    for others in ({"history": ABOVE}, {"event": 9}, {"history": {}}):
        assert "confirm=None" not in judge(Run(**{**vars(stopped), **others})).advice


def test_a_verdict_cannot_be_changed():
    verdict = judge(Run(STABLE))
    with pytest.raises(AttributeError):
        verdict.state = "stable"
    with pytest.raises(TypeError):
        verdict.evidence["courant"] = 0.1
    assert Verdict("stable", "courant").advice == ""


# -- real runs, at the default cadence ------------------------------------------------------------------------------

torch.manual_seed(3)
X = torch.randn(8, 5)
Y = X @ torch.randn(5, 1)
SHARPNESS = float(torch.linalg.eigvalsh(2 / 8 * X.T @ X)[-1])
T, R = nn.Tanh, nn.ReLU


class Task(pl.LightningModule):
    def __init__(self, net, optimizer, loss, schedule=None):
        super().__init__()
        self.net, self.optimizer, self.criterion, self.schedule = net, optimizer, loss, schedule

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def quadratic(factor, schedule=None):
    sgd = partial(torch.optim.SGD, lr=factor / SHARPNESS)
    return lambda: Task(nn.Linear(5, 1, bias=False), sgd, F.mse_loss, schedule), DataLoader(TensorDataset(X, Y), 8)


def one_hot(outputs, target):
    return F.mse_loss(outputs, F.one_hot(target, 10).float())


def digits(act, optimizer, loss=F.cross_entropy, schedule=None):
    def make():
        net = nn.Sequential(nn.Linear(64, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 10))
        return Task(net, optimizer, loss, schedule)

    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    return make, DataLoader(data, 64, shuffle=True)


def sgd(lr, momentum=0.0):
    return partial(torch.optim.SGD, lr=lr, momentum=momentum)


#: What is run, for how many steps, until when it must have been stopped (None: must not), and states that are true: the
#: runs of the table of issue 13 are among them.
ENDS = {
    "GD, 1.5 / L": (quadratic(1.5), 300, None, {"stable"}),
    "GD, 2.05 / L": (quadratic(2.05), 300, 60, {"unstable"}),
    "GD, 2.5 / L": (quadratic(2.5), 300, 30, {"unstable"}),
    "GD, 10 / L": (quadratic(10.0), 300, 20, {"unstable"}),
    "tanh, SGD 3": (digits(T, sgd(3.0)), 300, 20, {"unstable"}),
    "tanh, SGD 10": (digits(T, sgd(10.0)), 300, 20, {"unstable"}),
    "ReLU, SGD 3": (digits(R, sgd(3.0)), 300, 200, {"collapsed", "unstable"}),  # dead
    "ReLU, SGD 10": (digits(R, sgd(10.0)), 300, 60, {"collapsed", "unstable"}),
    "tanh, squared loss, SGD 10": (digits(T, sgd(10.0), one_hot), 300, 20, {"unstable", "not finite"}),
}
SLOW = {
    "tanh, SGD 1": (digits(T, sgd(1.0)), 600, 60, {"unstable"}),  # it would come back from a loss of 25
    # It has come back, and is read above 1 at times; its exponent, where there is one, says the contrary.
    "ReLU, momentum, SGD 0.3": (
        digits(R, sgd(0.3, 0.9)), 600, None, {"edge", "unstable", "recovered", "contradictory"},
    ),
    "ReLU, momentum, SGD 1": (digits(R, sgd(1.0, 0.9)), 600, 200, {"unstable", "collapsed"}),  # at chance
    "ReLU, Adam 1": (digits(R, partial(torch.optim.Adam, lr=1.0)), 600, 200, {"collapsed"}),
    "tanh, squared loss, SGD 1": (digits(T, sgd(1.0), one_hot), 600, None, {"stable", "edge"}),
    "ramp over 600": (digits(R, sgd(0.05), schedule=lambda t: 1000 ** (t / 600)), 600, 590, {"unstable", "not finite"}),
    "quadratic ramp": (quadratic(0.5, lambda t: 20 ** (t / 1000)), 1000, 990, {"unstable", "not finite"}),
}  # fmt: skip


@pytest.mark.parametrize("name", [*ENDS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_end_of_a_real_run(name):
    (make, loader), steps, until, states = (ENDS | SLOW)[name]
    monitor, stop = StabilityMonitor(), StopOnInstability(verbose=False)
    run = fit(make, monitor, stop, loader=loader, max_steps=steps, max_epochs=-1)
    verdict = monitor.verdict
    assert verdict.state in states, verdict
    assert (stop.stop_step is None) == (until is None)
    assert until is None or run.global_step <= until
    said = sentence(verdict)
    assert ("nothing to do" in said) == (verdict.state == "stable") and "healthy" not in said[: said.index(";")]
    assert verdict.evidence["loss_did"] == "fallen" or verdict.state != "stable"
    assert until is not None or (verdict.evidence["age"] <= 200 and f"step {verdict.evidence['step']}" in said)


def test_a_network_that_died_at_once_is_told_where_it_is_measured():
    make, loader = digits(R, partial(torch.optim.Adam, lr=1.0))
    monitor, stop = StabilityMonitor(["mean_square_stability"], every_n_steps=20), StopOnInstability(verbose=False)
    fit(make, monitor, stop, loader=loader, max_steps=120, max_epochs=-1)
    assert monitor.verdict.state == "collapsed" and stop.stop_step <= 80 and "collapsed" in stop.reason
