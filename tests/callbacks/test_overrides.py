"""Overrides of ``optimizer_step`` and ``configure_gradient_clipping``: what is plain is measured, the rest is not."""

import math
import warnings
from functools import partial

import pytest
import torch
from harness import MOMENTUM, SGD, Model, Rows, everything, fit, mlp, same
from torch import nn

from lsp_callbacks import StabilityMonitor, StopOnInstability, Unmeasurable

KEYS = ("stability/sharpness", "stability/courant_gd", "stability/lyapunov")
SHARPNESS, COURANT = KEYS[:2]
ADAM = partial(torch.optim.AdamW, lr=1e-2)


def stepping(step):
    """A model whose ``optimizer_step`` is ``step(model, optimizer, closure)``."""

    class Own(Model):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            step(self, optimizer, optimizer_closure)

    return Own


def clipping(clip):
    class Own(Model):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    return Own


def warm(model, optimizer, closure):
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * min(1.0, (model.trainer.global_step + 1) / 8)
    optimizer.step(closure=closure)


def warm_afterwards(model, optimizer, closure):
    optimizer.step(closure=closure)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * min(1.0, (model.trainer.global_step + 2) / 8)


class Scheduled(Model):
    """The same warm-up as a scheduler's."""

    first = None

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=0.1)

        def factor(step):
            return self.first / 0.1 if self.first and not step else min(1.0, (step + 1) / 8)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def measured(make, quantities=("sharpness", "lyapunov"), steps=20, silent=True, **settings):
    monitor = StabilityMonitor(list(quantities), every_n_steps=1, window=2)
    with warnings.catch_warnings():
        if silent:
            warnings.filterwarnings("error", message="lsp_callbacks")
        fit(make, monitor, max_steps=steps, **settings)
    return monitor


def plain(model, optimizer, closure):
    optimizer.step(closure=closure)


def by_hand(model, optimizer, closure):
    closure()
    optimizer.step()


@pytest.mark.parametrize(
    "step, optimizer", [(plain, MOMENTUM), (plain, ADAM), (warm, SGD), (warm, ADAM), (warm_afterwards, MOMENTUM)]
)
def test_a_step_that_is_plain_is_measured_at_the_rate_that_it_used(step, optimizer):
    later = type("Later", (Scheduled,), {"first": optimizer.keywords["lr"]})
    twin = {plain: Model, warm: Scheduled, warm_afterwards: later}[step]
    ours = measured(lambda: stepping(step)(mlp(), optimizer), steps=9)
    theirs = measured(lambda: twin(mlp(), optimizer), steps=9)
    for key in KEYS:
        assert ours.history[key].steps == theirs.history[key].steps
        assert ours.history[key].values == pytest.approx(theirs.history[key].values, rel=1e-6), key
    assert not ours.monitor.skipped


def clamps(model, optimizer, closure):
    optimizer.step(closure=closure)
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.2, 0.2)


def averages(model, optimizer, closure):
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure=closure)
    with torch.no_grad():
        for p, old in zip(model.parameters(), before):
            p.lerp_(old, 0.5)


def doubles(model, optimizer, closure):
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure=closure)
    with torch.no_grad():
        for p, old in zip(model.parameters(), before):
            p.add_(p - old)


@pytest.mark.parametrize("step, optimizer", [(clamps, SGD), (clamps, ADAM), (averages, SGD), (doubles, ADAM)])
def test_a_step_that_leads_elsewhere_takes_its_numbers_back_and_keeps_the_sharpness(step, optimizer):
    with pytest.warns(UserWarning, match=r"Own\.optimizer_step leaves the parameters elsewhere.*prox=") as caught:
        monitor = measured(lambda: stepping(step)(mlp(), optimizer), steps=6, silent=False)
    assert len([w for w in caught if "lsp_callbacks" in str(w.message)]) == 1
    # What does not depend on the update is that of a run whose replays differ in nothing.
    assert monitor.history[SHARPNESS].steps == [*range(optimizer is ADAM, 6)]  # Adam waits for a second gradient
    assert all(math.isfinite(v) and v > 0 for v in monitor.history[SHARPNESS].values)
    for key in monitor.history.keys() - {SHARPNESS, "stability/sharpness_residual"}:
        assert all(map(math.isnan, monitor.history[key].values)), key
    assert set(monitor.monitor.skipped) >= {"lyapunov", "courant_gd", "sharpness_limit"}
    assert "stability/courant" not in monitor.monitor.keys


def test_the_sharpness_that_is_left_is_that_of_the_hessian():
    """Against the dense one, where the clamp has made the Courant number unknown."""
    truth = []

    class Dense(stepping(clamps)):
        def training_step(self, batch, batch_idx):
            shapes = {n: p for n, p in self.net.named_parameters()}

            def loss(flat):
                parts = flat.split([p.numel() for p in shapes.values()])
                own = {n: part.view_as(p) for (n, p), part in zip(shapes.items(), parts)}
                return nn.functional.cross_entropy(torch.func.functional_call(self.net, own, (batch[0],)), batch[1])

            if type(self.trainer).__name__ == "Trainer":
                theta = torch.cat([p.detach().reshape(-1) for p in shapes.values()])
                truth.append(float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, theta))[-1]))
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="elsewhere"):
        monitor = measured(lambda: Dense(mlp().double()), ["sharpness"], 6, silent=False, precision="64-true")
    values = monitor.history[SHARPNESS].values
    residuals = monitor.history["stability/sharpness_residual"].values
    assert len(values) == len(truth) == 6
    for value, residual, exact in zip(values, residuals, truth):
        assert value == pytest.approx(exact, rel=max(0.05, 2 * residual))


@pytest.mark.parametrize("name", ["sharpness", "lyapunov", "sgd_stability"])
@pytest.mark.parametrize("make", [stepping(warm), clipping(lambda model, *args: model.clip_gradients(*args))])
def test_a_named_quantity_does_not_raise_because_of_an_override(name, make):
    monitor = measured(make, [name], steps=6, gradient_clip_val=0.5)
    assert monitor.history and not monitor.monitor.skipped


def test_gradients_changed_before_the_step_are_no_gradients_of_the_loss():
    def scales(model, optimizer, closure):
        closure()
        for p in model.parameters():
            p.grad.mul_(3.0)
        optimizer.step()

    with pytest.warns(UserWarning, match="gradient is not that of its loss"):
        monitor = measured(lambda: stepping(scales)(), steps=4, silent=False)
    assert all(math.isnan(v) for key in KEYS if key in monitor.history for v in monitor.history[key].values)
    assert not measured(stepping(by_hand), steps=8).monitor.skipped


def test_batches_that_the_override_leaves_out_are_counted_as_lightning_does():
    def every_second(model, optimizer, closure):
        optimizer.step(closure=closure) if model.trainer.global_step % 2 == 0 else closure()

    rows = Rows()
    monitor = measured(stepping(every_second), logger=rows)
    assert monitor.step == 20 and monitor.history[SHARPNESS].steps == [*range(0, 20, 2)] == list(rows.curve(SHARPNESS))
    assert len(monitor.history["stability/lyapunov"].steps) == 5  # windows go on over what moves nothing


def test_a_step_behind_lightnings_back_is_told():
    def behind(model, optimizer, closure):
        closure()
        optimizer.optimizer.step()

    with pytest.warns(UserWarning, match="no optimizer step was seen: Own.optimizer_step"):
        monitor = measured(stepping(behind), steps=6, silent=False)
    assert not monitor.history


def test_a_warm_up_of_ones_own_gets_no_forecast():
    """The schedule alone would cross the edge; the override holds the rate down."""

    class Held(Model):
        def configure_optimizers(self):
            optimizer = SGD(self.parameters())
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + 20.0 * step)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class Overridden(Held):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.step(closure=optimizer_closure)

    told = "stability/steps_to_edge"
    assert told in measured(Held, ["sharpness"], 3).history
    assert told not in measured(Overridden, ["sharpness"], 12).history


# -- clipping ------------------------------------------------------------------------------------------------------


def calls(model, optimizer, value, algorithm):
    model.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm)


def logs(model, optimizer, value, algorithm):
    model.log("norm", torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm())
    calls(model, optimizer, value, algorithm)


def torchs(limit):
    return lambda model, *_: nn.utils.clip_grad_norm_(model.parameters(), limit)


def values(limit):
    return lambda model, *_: nn.utils.clip_grad_value_(model.parameters(), limit)


@pytest.mark.parametrize("limit", [0.05, 0.5, 100.0, None])
@pytest.mark.parametrize("kind", ["norm", "value"])
@pytest.mark.parametrize("own, optimizer", [("calls", ADAM), ("logs", SGD), ("torch", MOMENTUM)])
def test_clipping_by_norm_or_value_is_found(own, kind, limit, optimizer):
    """Limits that always bite, sometimes, and never: the numbers are those of the trainer's own clipping."""
    settings = {} if limit is None else {"gradient_clip_val": limit, "gradient_clip_algorithm": kind}
    theirs = measured(lambda: Model(mlp(), optimizer), steps=6, **settings)
    method = {"calls": calls, "logs": logs, "torch": {"norm": torchs, "value": values}[kind](limit or 1e30)}[own]
    ours = measured(lambda: clipping(method)(mlp(), optimizer), steps=6, **{} if own == "torch" else settings)
    for key in KEYS:
        assert ours.history[key].values == pytest.approx(theirs.history[key].values, rel=1e-3, abs=1e-4), key
    assert not ours.monitor.skipped


def per_layer(model, *_):
    for p in model.parameters():
        nn.utils.clip_grad_norm_([p], 0.05)


def halves(model, *_):
    for p in model.parameters():
        p.grad.mul_(0.5)


def spikes(model, *_):
    if torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm() > 1e3:
        for p in model.parameters():
            p.grad.zero_()


def crashes(model, *_):
    if type(model.trainer).__name__ != "Trainer":
        raise RuntimeError("not on a copy")


@pytest.mark.parametrize("clip", [per_layer, halves, spikes, crashes])
def test_what_is_no_clipping_leaves_out_what_needs_the_update(clip):
    with pytest.warns(UserWarning, match="configure_gradient_clipping") as caught:
        monitor = measured(lambda: clipping(clip)(), steps=5, silent=False)
    assert len([w for w in caught if "lsp_callbacks" in str(w.message)]) == 1
    assert all(map(math.isfinite, monitor.history[SHARPNESS].values)) and len(monitor.history[SHARPNESS].values) == 5
    assert COURANT not in monitor.history and "stability/lyapunov" not in monitor.history
    with pytest.raises(Unmeasurable, match="configure_gradient_clipping"):
        fit(clipping(clip)(), StabilityMonitor(["sharpness"], strict=True), max_steps=2)


@pytest.mark.parametrize("where", ["configure_gradient_clipping", "optimizer_step", "both"])
def test_one_gradient_that_is_not_finite_takes_away_one_reading(where):
    """The user's own code repairs it, or leaves the step out; the readings go on."""

    class Repairs(Model):
        def on_after_backward(self):
            if self.global_step == 2:
                next(self.parameters()).grad[0] = math.inf

        def repaired(self):
            for p in self.parameters():
                p.grad.nan_to_num_(0.0, 0.0, 0.0)

    def clip(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.repaired()
        self.clip_gradients(optimizer, 0.5, "norm")

    def step(self, epoch, batch_idx, optimizer, optimizer_closure):
        before = [p.detach().clone() for p in self.parameters()]
        optimizer.step(closure=optimizer_closure)
        if not all(p.isfinite().all() for p in self.parameters()):
            for p, old in zip(self.parameters(), before):
                p.data.copy_(old)

    methods = {"configure_gradient_clipping": clip, "optimizer_step": step}
    own = methods if where == "both" else {where: methods[where]}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(skips|elsewhere|changed after|neither by)")
        monitor = measured(type("Own", (Repairs,), own), ["sharpness"], steps=6, silent=False)
    assert [k for k, v in enumerate(monitor.history[COURANT].values) if not math.isfinite(v)] == [2]
    assert len(monitor.history[COURANT].values) == 6 and not monitor.monitor.skipped


def test_a_rule_that_changes_from_one_call_to_the_next_is_noticed_by_the_gradient():
    """What the copy cannot know: the real gradient is compared with the one that was expected."""
    calls = []

    def wayward(model, *_):
        if type(model.trainer).__name__ == "Trainer":
            calls.append(1)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    with pytest.warns(UserWarning, match="the gradient was changed after"):
        monitor = measured(lambda: clipping(wayward)(), steps=3, silent=False)
    assert len(calls) == 3 and all(map(math.isnan, monitor.history[COURANT].values))


class Both(stepping(warm_afterwards)):
    """Remembers, draws random numbers, moves the rate: all of that must happen once."""

    def __init__(self):
        super().__init__(mlp(nn.Dropout(0.2)))
        self.norms = []

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.norms.append(float(torch.cat([p.grad.reshape(-1) for p in self.parameters()]).norm()))
        torch.rand(1)
        optimizer.param_groups[0]["weight_decay"] = 1e-3 * len(self.norms)
        self.log("norm", self.norms[-1])
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def memory(self):
        return self.norms


def test_the_trials_leave_no_trace():
    left = []
    for ours in ([], [StabilityMonitor(every_n_steps=1), StopOnInstability(threshold=math.inf)]):
        rows = Rows()
        run = fit(Both, *ours, logger=rows, log_every_n_steps=1, max_steps=12, gradient_clip_val=0.3)

        class Nothing:
            losses = None

        left.append(everything(run, run.lightning_module, Nothing, rows))
    for what in left[0]:
        assert same(left[0][what], left[1][what]), what
