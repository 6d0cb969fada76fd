"""The rate of an update is lowered, and nothing else: not the schedule, not a step below the cap."""

import logging
import math
from functools import partial

import pytest
import torch
from checkpoint_harness import STEPS, Once, Repeatable, stream
from harness import BATCH, FEATURES, Losses, Model, Rows, bits, data, everything, fit, mlp
from launch_ranks import launched
from schedules import SCHEDULES, Scheduled
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import CapLearningRate, SpectralNorm, StabilityMonitor, StopOnInstability
from lsp_callbacks.monitor.capped_updates import CappedStep
from lsp_callbacks.monitor.history import Observation
from lsp_callbacks.monitor.rate_cap import GROWTH, START

KEY, CAP = "stability/courant", "stability/lr_cap"
SCHEDULED, APPLIED = "stability/lr_scheduled", "stability/lr_applied"


def measuring(every=2, what="mean_square_stability"):
    return StabilityMonitor([what], every_n_steps=every)


class Rates(Losses):
    """The rates between the steps, and in them."""

    def __init__(self):
        super().__init__()
        self.between, self.used, self.momentum = [], [], []

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:  # the post hook of the cap comes later
            optimizer.register_step_post_hook(lambda o, *_: self.used.append([float(g["lr"]) for g in o.param_groups]))

    def on_train_batch_start(self, trainer, pl_module, *args):
        group = trainer.optimizers[0].param_groups[0]
        self.between.append([float(g["lr"]) for g in trainer.optimizers[0].param_groups])
        self.momentum.append(group.get("momentum", group.get("betas")))


# -- a cap that never holds ----------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=1e-3),
    "momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-4),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-4),
    "a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-4), foreach=False),
}


@pytest.mark.parametrize("make", [
    *(partial(Model, optimizer=optimizer) for optimizer in OPTIMIZERS.values()),
    *(partial(Scheduled, make, **{**settings, "lr": 1e-3}) for make, settings in list(SCHEDULES.values())[:6:2]),
])  # fmt: skip
def test_a_cap_that_never_holds_changes_no_bit(make):
    left = []
    for ours in ([], [cap := CapLearningRate(safety=1e4), measuring()]):
        torch.manual_seed(3)
        losses, logger = Losses(), Rows()
        trainer = fit(make, losses, *ours, logger=logger, log_every_n_steps=1, max_steps=8)
        left.append(everything(trainer, trainer.model, losses, logger))
    assert [what for what in left[0] if bits(left[0][what]) != bits(left[1][what])] == []
    assert cap.capped == 0 and cap._cap.limits and cap.first_step is None


# -- a cap that holds ----------------------------------------------------------------------------------------------


class Constant(Scheduled):
    """Watched is a number that has nothing to do with the rates."""

    def training_step(self, batch, batch_idx):
        loss = Model.loss(self, batch)
        self.log("loss", 1.0 + self.current_epoch, on_epoch=True)
        return loss


MANY = SCHEDULES | {
    "plateau": (lambda m, o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5), {"interval": "epoch"}),
    "chained": (
        lambda m, o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
        ),
        {},
    ),
    "restarts": (lambda m, o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5), {}),
}


@pytest.mark.parametrize("name", MANY)
def test_every_schedule_goes_on_as_without(name):
    make, settings = MANY[name]
    runs = []
    for ours in ([], [measuring(), cap := CapLearningRate(safety=1e-4, verbose=False)]):
        rates = Rates()
        run = fit(lambda: Constant(make, **settings), rates, *ours, max_epochs=3, max_steps=-1)
        runs.append((rates, [c.scheduler.state_dict() for c in run.lr_scheduler_configs], run.optimizers[0]))
    (without, state, _), (with_cap, state_with, optimizer) = runs
    drop = ("_get_lr_called_within_step", "lr_lambdas", "_schedulers", "best")
    assert [{k: v for k, v in s.items() if k not in drop} for s in state] == [
        {k: v for k, v in s.items() if k not in drop} for s in state_with
    ]
    assert with_cap.between == without.between and with_cap.momentum == without.momentum
    capped = [a < b for (a,), (b,) in zip(with_cap.used, with_cap.between)]
    assert sum(capped) == cap.capped >= 15 and all(capped)  # from the very first update
    assert without.used == without.between and len(optimizer._optimizer_step_post_hooks) == 1  # of `Rates` alone


def test_a_capped_run_is_the_run_with_these_rates_and_so_are_its_readings():
    class ByHand(Losses):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.optimizers[0].param_groups[0]["lr"] = rates.used[len(self.losses)][0]

    jump = lambda m, o: lr_scheduler.LambdaLR(o, lambda step: 100.0 if 5 <= step < 20 else 1.0)  # noqa: E731
    rates, capped, cap = Rates(), StabilityMonitor(every_n_steps=2), CapLearningRate()
    first = fit(lambda: Scheduled(jump, lr=0.02), rates, capped, cap, max_steps=30)
    by_hand, plain = ByHand(), StabilityMonitor(every_n_steps=2)
    second = fit(lambda: Model(optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.9)), by_hand, plain, max_steps=30)
    assert cap.capped >= 5 and rates.losses == by_hand.losses
    assert bits(first.model.state_dict()) == bits(second.model.state_dict())
    ours = {CAP, SCHEDULED, APPLIED, "stability/steps_to_edge"}
    keys = (capped.history.keys() | plain.history.keys()) - ours
    assert (
        KEY in keys
        and {key for key in keys if bits(vars(capped.history[key])) != bits(vars(plain.history[key]))} == set()
    )
    used, between = (dict(enumerate(each)) for each in (rates.used, rates.between))
    for key, steps in ((APPLIED, used), (SCHEDULED, between)):
        assert capped.history[key].values == pytest.approx([steps[s][0] for s in capped.history[key].steps], rel=1e-12)


class Quadratic(Model):
    """A curvature that no step changes: the same full batch, squared loss, one layer."""

    def __init__(self, optimizer, split=False):
        super().__init__(nn.Linear(FEATURES, 1, bias=split).double(), optimizer)

    def loss(self, batch):
        return F.mse_loss(self.net(batch[0]), batch[1])


def full_batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=BATCH), x


def heavy_ball(x, rates, momentum):
    """The losses of `Quadratic` at these rates, by the recursion for its error ``w - 1``."""
    torch.manual_seed(0)
    error = nn.Linear(FEATURES, 1, bias=False).double().weight.detach()[0] - 1
    velocity, losses = torch.zeros_like(error), []
    for rate in rates:
        losses.append(float((x @ error).square().mean()))
        velocity = momentum * velocity + 2 / BATCH * x.T @ (x @ error)
        error = error - rate * velocity
    return losses


@pytest.mark.parametrize("lr, momentum", [(40.0, 0.0), (40.0, 0.9), (0.29, 0.0)])  # the last one without an explosion
def test_the_courant_number_of_a_capped_run_is_safety_and_its_rate_that_of_theory(lr, momentum):
    loader, x = full_batch()
    rates, monitor = Rates(), measuring(1, "sharpness")
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=momentum)
    fit(lambda: Quadratic(optimizer), rates, monitor, CapLearningRate(safety=0.9), loader=loader, max_steps=90)
    top = float(torch.linalg.eigvalsh(2 / BATCH * x.T @ x)[-1])
    cap = 0.9 * 2 * (1 + momentum) / top
    theory = [cap * min(1, START * GROWTH**k) for k in range(90)]  # the warm-up that nobody has tuned
    assert monitor.history[KEY].values == pytest.approx([0.9 * rate / cap for rate in theory], rel=1e-3)
    assert [used for (used,) in rates.used] == pytest.approx(theory, rel=1e-3) and theory[-1] == cap
    assert rates.losses == pytest.approx(heavy_ball(x, theory, momentum), rel=0.01, abs=1e-9)
    assert rates.losses[-1] < 0.2 * max(rates.losses)


def test_groups_keep_their_ratios():
    def optimizer(parameters):
        weight, bias = parameters
        return torch.optim.SGD([{"params": [weight], "lr": 40.0}, {"params": [bias], "lr": 4.0}], lr=1.0)

    loader, x = full_batch()
    rates, monitor = Rates(), measuring(1, "sharpness")
    fit(lambda: Quadratic(optimizer, split=True), rates, monitor, CapLearningRate(), loader=loader, max_steps=90)
    assert all(b == pytest.approx(a / 10) for a, b in rates.used)
    one = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    scale = torch.tensor([1.0] * FEATURES + [0.1], dtype=x.dtype).sqrt()
    top = float(torch.linalg.eigvalsh(2 / BATCH * (one * scale).T @ (one * scale))[-1])
    assert rates.used[-1][0] == pytest.approx(0.9 * 2 / top, rel=1e-3)
    assert monitor.history[KEY].values[-1] == pytest.approx(0.9, rel=1e-3)


def test_it_is_undone_with_the_danger_and_seen_in_the_logs(caplog):
    rows, monitor = Rows(), measuring(1, "sharpness")
    cap, rates = CapLearningRate(), Rates()
    jump = lambda m, o: lr_scheduler.LambdaLR(o, lambda step: 1000.0 if 5 <= step < 12 else 1.0)  # noqa: E731
    with caplog.at_level(logging.INFO):
        fit(lambda: Scheduled(jump, lr=0.01), rates, monitor, cap, logger=rows, max_steps=20, log_every_n_steps=3)
    assert (cap.first_step, cap.capped) == (5, 7)
    assert [u < b for u, b in zip(rates.used, rates.between)] == [5 <= step < 12 for step in range(20)]
    assert "capped at" in caplog.text and "7 updates" in caplog.text
    assert rows.curve(SCHEDULED) == {step: rate for step, (rate,) in enumerate(rates.between)}
    assert rows.curve(APPLIED) == pytest.approx({step: rate for step, (rate,) in enumerate(rates.used)})
    growing = {step: 0.01 * GROWTH ** (step - 4) for step in range(5, 12)}  # a jump becomes a ramp
    assert {step: rates.used[step][0] for step in growing} == pytest.approx(growing)
    assert all(rates.used[step][0] < rows.curve(CAP)[step] < 10 for step in growing)
    ahead = monitor.history["stability/steps_to_edge"]  # of the schedule: none while that is above the edge
    assert (ahead.steps, ahead.values) == ([0, 1, 2, 3, 4], [5, 4, 3, 2, 1])


def test_the_schedule_of_a_module_with_its_own_step_is_foreseen_from_capped_steps():
    class OwnStep(Scheduled):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)

    jump = lambda m, o: lr_scheduler.LambdaLR(o, lambda step: 1e5 if step >= 9 else 1.0)  # noqa: E731
    monitor, cap = measuring(1, "sharpness"), CapLearningRate(safety=1e-4)
    fit(lambda: OwnStep(jump, lr=0.01), monitor, cap, max_steps=12)
    ahead = monitor.history["stability/steps_to_edge"]
    assert cap.capped == 12 and (ahead.steps, ahead.values) == ([*range(1, 9)], [*range(8, 0, -1)])


def test_capped_steps_between_readings_are_logged_where_it_begins_and_ends():
    rows, monitor = Rows(), measuring(20, "sharpness")
    jump = lambda m, o: lr_scheduler.LambdaLR(o, lambda step: 1000.0 if 5 <= step < 12 else 1.0)  # noqa: E731
    fit(lambda: Scheduled(jump, lr=0.01), monitor, CapLearningRate(), logger=rows, max_steps=20, log_every_n_steps=3)
    assert list(rows.curve(APPLIED)) == [0, 5, 8, 11, 12]


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_the_callbacks_does_not_matter(first):
    rates, ours = Rates(), [measuring(), CapLearningRate(safety=0.01)]
    fit(Model, rates, *(ours if first else reversed(ours)), max_steps=8)
    reference = Rates()
    fit(Model, measuring(), reference, CapLearningRate(safety=0.01), max_steps=8)
    assert rates.losses == reference.losses and min(rates.used) < min(rates.between)


def test_a_stop_judges_the_rate_that_is_used():
    jump = lambda m, o: lr_scheduler.LambdaLR(o, lambda step: 1e5 if step >= 5 else 1.0)  # noqa: E731
    stopped = []
    for ours in ([], [CapLearningRate()]):
        stop = StopOnInstability()
        fit(lambda: Scheduled(jump, lr=0.01), stop, measuring(1, "sharpness"), *ours, max_steps=20)
        stopped.append((stop.stop_step, 4 in stop.events))
    assert stopped == [(4, True), (None, False)]


# -- with what Lightning and users do beside -------------------------------------------------------------------------


class OwnWarmUp(Model):
    """Sets the rate where Lightning's documentation does."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize(
    "make, settings",
    [
        (OwnWarmUp, {}),
        (Model, {"gradient_clip_val": 0.01}),
        (Model, {"accumulate_grad_batches": 3}),
        (partial(Model, mlp(nn.BatchNorm1d(5))), {}),
    ],
)
def test_what_is_done_to_the_step_goes_on(make, settings, recwarn):
    rates, monitor = Rates(), StabilityMonitor(every_n_steps=2)
    cap = CapLearningRate(safety=1e-5)
    fit(make, rates, monitor, cap, max_steps=9, **settings)
    assert cap.capped == 9 and monitor.monitor.invalidated is None
    said = [str(w.message) for w in recwarn if "lsp_callbacks" in str(w.message)]
    assert not [text for text in said if "update" in text and "rounding" not in text]
    for step, value in zip(monitor.history[KEY].steps, monitor.history[KEY].values):
        assert 0 < value < 1e-3, step


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_a_gradient_scaler_leaves_out_keep_their_rate(accumulate):
    from pytorch_lightning.plugins import MixedPrecision

    class Overflows(Scheduled):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.inf if batch_idx // accumulate == 3 else 1.0)

    left = []
    for ours in ([], [measuring(), cap := CapLearningRate(safety=1e-4)]):
        rates = Rates()
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**6))
        fit(
            lambda: Overflows(lambda m, o: lr_scheduler.ExponentialLR(o, 0.9)),
            rates,
            *ours,
            plugins=[plugin],
            max_steps=8,
            loader=data(n=160, shuffle=False),
            accumulate_grad_batches=accumulate,
        )
        left.append(rates)
    assert left[0].between == left[1].between and len(left[1].used) == 7
    assert cap.capped == 7  # the fourth was not made


def test_a_run_that_is_resumed_goes_on_with_its_cap(tmp_path):
    def ours():
        return StabilityMonitor(["mean_square_stability"], every_n_steps=7, save_vectors=True), CapLearningRate(0.01)

    def run(*callbacks, **settings):
        rates = Rates()
        fit(Repeatable, rates, *callbacks, **settings)
        return rates

    whole, (monitor, cap) = Rates(), ours()
    fit(Repeatable, whole, monitor, cap, Once(tmp_path, 10), loader=stream(), max_steps=20)
    again, more = ours()
    rest = run(again, more, loader=stream(10), max_steps=20, ckpt_path=tmp_path / "cut.ckpt")
    assert STEPS > 20 and rest.used[:5] == whole.used[10:15] and rest.used[0] < rest.between[0]
    # A monitor that is resumed begins with other samples.
    assert [rate for (rate,) in rest.used] == pytest.approx([rate for (rate,) in whole.used[10:]], rel=0.01)
    assert more.capped == cap.capped and more.first_step == cap.first_step


def test_an_exception_in_a_step_leaves_the_rate_of_the_schedule():
    class Fails(Rates):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.lowered = optimizer.param_groups[0]["lr"]
            if trainer.global_step == 5:
                self.optimizer = optimizer
                raise RuntimeError("enough")

    fails = Fails()
    with pytest.raises(RuntimeError, match="enough"):
        fit(Model, measuring(), CapLearningRate(1e-3), fails, max_steps=9)
    assert fails.lowered < 0.1 == fails.optimizer.param_groups[0]["lr"]


# -- readings that are not acted on ----------------------------------------------------------------------------------


def after(*readings, losses=(), **settings):
    """A callback that was told these values, at steps 0, 1, ... at the rate 1."""
    from types import SimpleNamespace

    from lsp_callbacks.monitor.losses import ArrivedLoss, LossWatch

    monitor = SimpleNamespace(
        losses=LossWatch(),
        invalidated=None,
        courant=SimpleNamespace(key="stability/courant_mean_square"),
        cadence=SimpleNamespace(want=lambda step: None),
    )
    cap = CapLearningRate(safety=0.5, **settings)
    cap._cap.is_proven = True
    observer = SimpleNamespace(step=0, is_idle=False)
    forecast = SimpleNamespace(scale=1.0)
    cap._source = SimpleNamespace(monitor=monitor, has_same_rates=True, observer=observer, forecast=forecast)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    for step, values in enumerate(readings):
        observer.step = step
        monitor.losses.add(ArrivedLoss(step, (losses or [1.0] * 99)[step]))
        cap._updates.steps.append(CappedStep(step, [1.0], [1.0], 1.0))
        cap.receive(None, Observation(step, {f"stability/{key}": value for key, value in values.items()}))
        cap.end_step(None, step, [ArrivedLoss(step, (losses or [1.0] * 99)[step])])
    observer.step = len(readings)
    return cap, optimizer


def headline(courant, **others):
    return {"courant": courant, "courant_mean_square": courant, "mean_square_lr": 1 / courant, **others}


def test_the_reading_that_is_trusted_and_those_that_are_not():
    def factor(*readings, **settings):
        cap, optimizer = after(*readings, **settings)
        return cap.factor(optimizer)

    assert factor(headline(4.0)) == 0.125
    assert factor(headline(math.nan)) == factor({"courant_step": 9.0}) == factor({"courant_gd": 9.0}) == 1.0
    assert factor(headline(4.0), headline(math.nan)) == 0.125  # it holds
    assert factor({"courant": 9.0, "courant_gd": 9.0}) == 1.0  # not the headline number of this step
    # Of a step that has exploded, and of a network that has collapsed: it can lower the cap only.
    for broken in (9.0, math.nan):
        assert factor(headline(4.0), *[headline(0.1)] * 3, losses=[1.0, *[broken] * 3]) == 0.125
    assert factor(headline(4.0), headline(8.0), losses=[1.0, 9.0]) == pytest.approx(0.5 / 8)
    assert factor(headline(4.0), *[headline(0.1, collapsed=0.5)] * 3) == 0.125
    assert factor(headline(4.0), headline(0.1)) == 0.125 < factor(headline(4.0), *[headline(0.1)] * 3)
    # Infinitely large critical rates are not logged.
    assert factor(headline(4.0), {"courant": 0.0, "courant_mean_square": 0.0}) == 0.125
    assert after(headline(4.0), *[{"courant": 0.0, "courant_mean_square": 0.0}] * 3)[0]._cap.limits == [math.inf]


def test_what_was_found_to_be_another_update_is_not_acted_on():
    cap, optimizer = after(headline(4.0))
    cap._source.monitor.invalidated = "moved elsewhere"
    assert cap.factor(optimizer) == 1.0
    cap, optimizer = after(headline(4.0))
    cap._source.has_same_rates = False
    assert cap.factor(optimizer) == 1.0


def test_an_old_reading_begins_no_cap_and_that_is_said_once():
    jump = lambda m, o: lr_scheduler.LambdaLR(o, lambda step: 1000.0 if step >= 7 else 1.0)  # noqa: E731
    rates, cap, monitor = Rates(), CapLearningRate(max_age=4), measuring(12, "sharpness")
    cap._check_keys = lambda source: None  # it would refuse
    with pytest.warns(UserWarning, match=r"of step 0, which is too old \(max_age=4\)") as caught:
        fit(lambda: Scheduled(jump, lr=0.01), rates, cap, monitor, max_steps=20)
    assert sum("too old" in str(w.message) for w in caught) == 1
    lower = [used < between for used, between in zip(rates.used, rates.between)]
    assert lower == [step > 12 for step in range(20)]  # from the next reading on, for longer than its age


# -- what cannot be right is refused -----------------------------------------------------------------------------------


class Manual(Model):
    automatic_optimization = False


@pytest.mark.parametrize(
    "make, monitor, said",
    [
        (Model, None, "needs a StabilityMonitor"),
        (Manual, partial(StabilityMonitor, loss_fn=lambda m, b: m.loss(b)), "automatic_optimization=False"),
        (Model, partial(StabilityMonitor, [SpectralNorm()]), "never measured here"),
        (Model, partial(StabilityMonitor, ["courant_step"]), "never measured here"),
        (Model, partial(StabilityMonitor, every_n_steps=300), "max_age=200"),
        (Model, partial(StabilityMonitor, prox=lambda name, tensor, lr: tensor), "prox"),
        (partial(Model, optimizer=partial(torch.optim.LBFGS, lr=0.1)), StabilityMonitor, "LBFGS"),
        (partial(Model, optimizer=partial(torch.optim.Rprop, lr=0.1)), StabilityMonitor, "Rprop"),
        (partial(Model, optimizer=partial(torch.optim.ASGD, lr=0.1)), StabilityMonitor, "ASGD"),
    ],
)
@pytest.mark.filterwarnings("ignore:lsp_callbacks")
def test_refused_before_the_first_step(make, monitor, said):
    losses, ours = Losses(), [CapLearningRate()]
    ours += [] if monitor is None else [monitor()]
    with pytest.raises(ValueError, match=said):
        fit(make, losses, *ours)
    assert not losses.losses


def test_two_of_them_are_refused():
    """Two of one class Lightning refuses itself."""

    class Other(CapLearningRate):
        pass

    with pytest.raises(ValueError, match="two CapLearningRate"):
        fit(Model, StabilityMonitor(), CapLearningRate(), Other(0.5))


@pytest.mark.parametrize("settings", [{"safety": 0}, {"safety": math.nan}, {"safety": math.inf}, {"max_age": 0}])
def test_bad_arguments(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CapLearningRate(**settings)


# -- two processes -----------------------------------------------------------------------------------------------------


def test_two_processes_cap_the_same_updates_at_the_same_rates(tmp_path):
    here, there = launched("cap_ranks", tmp_path)
    assert here["state"] == there["state"] and here["readings"] == there["readings"]
    assert here["used"] == there["used"] and here["between"] == there["between"]
    assert all(torch.equal(a, b) for a, b in zip(here["weights"], there["weights"]))
    lower = [used < between for used, between in zip(here["used"], here["between"])]
    assert lower[12] and not any(lower[:12]) and not any(lower[30:]) and here["state"]["capped"] == sum(lower)
