"""Head-room, underflow and lost updates against closed forms and the arithmetic of half precision; watched runs."""

import itertools
import math
from functools import partial

import pytest
import torch
from harness import GoesOn, Losses, Model, Rows, changed_by, data, fit, mlp
from lightning.fabric import Fabric
from problems import freeze
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.profiler import ProfilerActivity, profile

from lsp_callbacks import Monitor, Numerics, Sharpness, Snapshot, StabilityMonitor, Unmeasurable
from lsp_callbacks.functional import headroom, lost_share
from lsp_callbacks.loops import Watch, watch_fabric
from lsp_callbacks.monitor import nan_finder as guard
from lsp_callbacks.monitor.nan_finder import finite, first_fault_of, unrecovered_fault_of
from lsp_callbacks.quantities.numerics.numerics import ROOT, range_of_step
from lsp_callbacks.report import verdict
from lsp_callbacks.step.clipping import Clipping

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SMALL = partial(SGD, lr=0.1)
STEP = "stability/nonfinite_step"


# -- head-room -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1e-3, 0.7, 3.0, 6e4])
def test_headroom_is_the_number_of_doublings_that_stay_finite(dtype, value):
    x = torch.tensor(value, dtype=dtype)
    bits = headroom(float(x), dtype)
    doublings = [
        x * 2.0 ** (math.floor(bits) // 2) * 2.0 ** (math.floor(bits) - math.floor(bits) // 2 + k) for k in (0, 1)
    ]
    assert [bool(y.isfinite()) for y in doublings] == [True, False]


def test_the_ends():
    assert headroom(math.inf, torch.float32) == headroom(math.nan, torch.float16) == 0
    assert headroom(0.0, torch.float16) == headroom(2.0**-24, torch.float16) > headroom(2.0**-23, torch.float16)


def line(weight, dtype=torch.float32):
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).to(dtype)
    nn.init.constant_(net[0].weight, weight), nn.init.constant_(net[1].weight, 2.0)
    return net


def step_of(net, replay, **settings):
    return Snapshot(0, net, replay, **settings)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_line_in_float16_has_the_headroom_of_its_numbers(autocast):
    """x = 4, weights 8 and 2: activations 32 and 64, gradients S, 2 S, 4 S x and 32 S; by module, in its own type."""
    net, x = line(8.0, torch.float32 if autocast else torch.float16), torch.full((1, 1), 4.0)

    def loss():
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return net(x if autocast else x.half()).float().sum()

    scale = 128.0
    found = range_of_step(step_of(net, loss, scale=scale))
    half, full = torch.finfo(torch.float16).max, torch.finfo(torch.float32).max
    assert found.activations["0"] == pytest.approx(math.log2(half / 32))
    assert found.activations["1"] == pytest.approx(math.log2(half / 64))
    assert found.activations[""] == pytest.approx(math.log2(full / 64 if autocast else half / 4))
    assert found.gradients["1"] == pytest.approx(math.log2(half / (32 * scale)))
    assert found.gradients["0"] == pytest.approx(math.log2(half / (2 * 4 * scale)))
    assert found.weights["0.weight"] == pytest.approx(math.log2((full if autocast else half) / 8))
    metric = Numerics()
    metric.update(step_of(net, loss, scale=scale))
    values = {key.removeprefix("stability/"): float(value) for key, value in metric.compute().items()}
    assert values["overflow_headroom"] == values["gradient_headroom_min"] == found.gradients["1"]
    assert values["activation_headroom_min"] == found.activations["1"] == values["activation_headroom/1"]
    assert values[f"activation_headroom/{ROOT}"] == found.activations[""]
    assert values["weight_headroom_min"] == values["weight_headroom/0.weight"]


def test_masks_have_no_say():
    net = line(1.0)

    def loss():
        h = net(torch.ones(2, 1)) + torch.full((2, 2), torch.finfo(torch.float32).min).triu(1)
        return (h + torch.full((2, 2), -math.inf).triu(1)).softmax(-1).sum()

    found = range_of_step(step_of(net, loss))
    assert min(found.activations.values()) == pytest.approx(126, abs=1)


def test_an_intermediate_number_counts():
    """It is the result of no module."""
    net = line(1.0)
    found = range_of_step(step_of(net, lambda: (net(torch.ones(1, 1)) * 1e30 / 1e30).sum()))
    assert found.activations[""] == pytest.approx(math.log2(torch.finfo(torch.float32).max / 2e30))


# -- underflow -----------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """``sum x a b``: the backward pass multiplies the scale by b, and that by a."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first, second = -torch.rand(2, 500, generator=generator, dtype=torch.float64)
        # The wide types end so far down that a whole tensor must be near it.
        shift = 0 if dtype == torch.float16 else -110
        self.a, self.b = (2 ** (40 * first)).to(dtype), (2 ** (40 * second + shift)).to(dtype)
        self.x = nn.Parameter(torch.ones(500, dtype=dtype))

    def forward(self):
        return (self.x * self.a * self.b).sum()


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_underflow_is_what_the_type_cannot_hold(dtype, scale):
    net = Chain(dtype)
    found = range_of_step(step_of(net, net, scale=scale))
    first = net.b.double() * scale
    second = first.to(dtype).double() * net.a.double()
    exact = torch.stack([first, second])
    tiny = torch.finfo(dtype).tiny
    there = exact.abs() > 1e-13 * exact.amax(1, keepdim=True)
    assert found.small == int((there & (exact < tiny)).sum())
    lost = exact.to(dtype).abs() < tiny  # the type's own arithmetic: zero or subnormal
    assert found.small == int((there & lost).sum())
    assert found.small > 50
    assert abs(found.nonzero - int(there.sum())) <= 1000 - int(there.sum())  # all of them, where none was small


def test_zeros_and_cancellation_are_not_underflow():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1)).half()
    x = torch.randn(32, 6).half()
    found = range_of_step(step_of(net, lambda: net(x).float().sum() * 1e3))  # the gradient of a constant
    wide = range_of_step(step_of(net, lambda: net(x).float()[:, 0].log().sum() * 8))
    assert wide.underflow < 0.01 and found.nonzero > 0
    single = net.float()
    assert range_of_step(step_of(single, lambda: single(x.float())[:, 0].log().sum())).underflow == 0


# -- lost updates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("make, tolerance", [(partial(SGD, lr=3e-3), 0.0), (partial(Adam, lr=3e-4), 0.02)])
@pytest.mark.parametrize("clipping", [None, Clipping(1e-2)])
def test_lost_updates_are_those_of_the_real_step(dtype, make, tolerance, clipping):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1)).to(dtype)
    x = torch.randn(16, 20, dtype=dtype)
    optimizer = make(net.parameters())
    snapshot = freeze(net, optimizer, replay=lambda: net(x).float().square().mean(), clipping=clipping)
    metric = Numerics()
    metric.update(snapshot)
    before = [p.detach().clone() for p in net.parameters()]
    for p, g in zip(net.parameters(), snapshot.gradient.values()):
        p.grad = g.clone()
    moved = sum(int((g != 0).sum()) for g in snapshot.gradient.values())
    if clipping is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clipping.limit)
    optimizer.step()
    lost = sum(int(((p == old) & (p.grad != 0)).sum()) for p, old in zip(net.parameters(), before))
    own = float(metric.compute()["stability/update_lost"])
    assert own == pytest.approx(lost / moved, abs=tolerance or (0.01 if clipping else 1e-12))
    assert (own > 0.3) == (dtype == torch.bfloat16) or dtype == torch.float16


def test_lost_share_on_both_sides_of_half_a_step():
    before = torch.ones(4, dtype=torch.bfloat16)
    moves = torch.tensor([2**-8 * 0.99, 2**-8 * 1.01, -(2**-9) * 0.99, 0.0], dtype=torch.float64)
    assert lost_share(before, before.double() + moves) == (2, 3)


@pytest.mark.parametrize("without", ["optimizer", "gradient", "step"])
def test_no_update_no_share(without):
    net, x = line(1.0), torch.ones(1, 1)
    optimizer = SGD(net.parameters(), lr=0.1)
    settings = {"optimizer": {"optimizer": None}, "gradient": {"gradient": None}, "step": {"unsupported": "a hook"}}
    metric = Numerics()
    metric.update(freeze(net, optimizer, replay=lambda: net(x).sum(), **settings[without]) if without != "optimizer"
                  else freeze(net, None, replay=lambda: net(x).sum()))  # fmt: skip
    assert "stability/update_lost" not in metric.compute()


def test_a_closure_is_no_obstacle():
    net, x = line(1.0), torch.ones(1, 1)
    metric = Numerics()
    metric.update(freeze(net, torch.optim.LBFGS(net.parameters()), replay=lambda: net(x).square().sum()))
    values = metric.compute()
    assert "stability/update_lost" not in values and math.isfinite(values["stability/overflow_headroom"])


def test_degenerate_steps():
    net = line(0.0)
    metric = Numerics()
    metric.update(freeze(net, SGD(net.parameters(), lr=0.0), replay=lambda: 0 * net(torch.zeros(1, 1)).sum()))
    values = metric.compute()
    assert all(map(math.isfinite, values.values())) and values["stability/update_lost"] == 0
    with pytest.raises(Unmeasurable, match="not finite"):
        metric.update(freeze(net, replay=lambda: net(torch.ones(1, 1)).sum() / 0))
    with pytest.raises(Unmeasurable, match="could not be replayed"):
        metric.update(step_of(net, lambda: net(torch.ones(1, 1)).sum(), loss=torch.tensor(5.0)))
    assert metric.compute() == values


# -- the watch -----------------------------------------------------------------------------------------------------


class Faulty(Model):
    """From step 4 on, something goes wrong."""

    def __init__(self, what="forward", *middle, optimizer=SMALL):
        super().__init__(mlp(*middle), optimizer)
        self.what = what

    def loss(self, batch):
        x, y = batch
        bad = self.global_step >= 4
        if self.what == "moves":
            for p in self.parameters():
                p.data.mul_(0.999)
        if bad and self.what == "batch":
            x[0, 0] = math.nan
        h = self.net[:-1](x)
        if bad and self.what in ("forward", "moves"):
            h = (0 * h).log()
        if bad and self.what == "backward":
            h = (0 * h).sqrt()
        return F.cross_entropy(self.net[-1](h), y)

    def on_after_backward(self):
        if self.global_step >= 4 and self.what == "gradient":
            self.net[0].weight.grad[0, 0] = math.nan

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.what != "weights":
            return optimizer
        rate = lambda step: math.inf if step == 3 else 1.0  # noqa: E731
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Recovers(Faulty):
    """A gradient that is not finite once, and is mended before the update."""

    def loss(self, batch):
        if self.what == "moves":
            for p in self.parameters():
                p.data.mul_(0.999)
        return Model.loss(self, batch)

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad.nan_to_num_(0.0)

    def on_after_backward(self):
        if self.global_step == 4:
            self.net[0].weight.grad[0, 0] = math.nan


WATCHED = {
    "forward": (Faulty, {}, "forward", "aten.log"),
    "backward": (lambda: Faulty("backward", nn.Dropout(0.3)), {}, "backward", "aten.div"),
    "batch": (lambda: Faulty("batch"), {}, "batch", None),
    "weights": (lambda: Faulty("weights"), {}, "weights", None),
    "gradient": (lambda: Faulty("gradient"), {}, "unknown", None),
    "moves": (lambda: Faulty("moves"), {}, "forward", "aten.log"),
    "batch_norm": (lambda: Faulty("forward", nn.BatchNorm1d(5)), {}, "forward", "aten.log"),
    "adam, clipped": (
        lambda: Faulty("backward", optimizer=partial(Adam, lr=0.01)), {"gradient_clip_val": 0.1}, "backward", "aten.div"
    ),
    "accumulated": (
        lambda: Faulty("backward", nn.Dropout(0.3)), {"accumulate_grad_batches": 2}, "backward", "aten.div"
    ),
    "bfloat16": (lambda: Faulty("forward"), {"precision": "bf16-mixed"}, "forward", "aten.log"),
    "bfloat16 weights": (lambda: Faulty("backward"), {"precision": "bf16-true"}, "backward", "aten.div"),
    "lbfgs": (lambda: Faulty("forward", optimizer=partial(torch.optim.LBFGS, max_iter=2)), {}, "forward", "aten.log"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:lsp_callbacks could not")
@pytest.mark.parametrize("name", WATCHED)
def test_the_fault_of_a_run_is_named_at_its_step_and_nothing_is_changed(name):
    make, settings, where, operation = WATCHED[name]
    monitor = StabilityMonitor(["numerics", "sharpness"], every_n_steps=100)
    monitor.monitor.quantities.named.clear()  # as from a preset: LBFGS has no edge
    with pytest.warns(UserWarning, match="lsp_callbacks: step 4 is not finite") as caught:
        assert not changed_by(make, monitor, stop=GoesOn(), max_steps=7, **settings)
    assert len([w for w in caught if "lsp_callbacks: step" in str(w.message)]) == 1
    fault = monitor.fault
    assert (fault.step, fault.where, fault.operation) == (4, where, operation)
    assert monitor.history[STEP].values == [4.0] and monitor.history[STEP].steps == [4]
    assert fault.source == {"batch": "batch[0]", "weights": "net.0.weight"}.get(where)
    assert "changed after the backward" in fault.reason or where != "unknown"
    said = verdict(monitor.history, unrecovered_fault_of(monitor.monitor))
    assert said.startswith("lsp_callbacks: not finite since step 4: ") and str(fault) in said
    assert not monitor.observer.nan_finder._parts or len(monitor.observer.nan_finder._parts) == settings.get(
        "accumulate_grad_batches", 1
    )


def test_the_step_is_logged_in_its_row_and_the_step_is_replayed_once(monkeypatch):
    calls, real = [], guard.first_fault
    monkeypatch.setattr(guard, "first_fault", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    logger, monitor = Rows(), StabilityMonitor(["numerics"], every_n_steps=100)
    with pytest.warns(UserWarning, match="not finite"):
        run = fit(Faulty, monitor, logger=logger, max_steps=9)
    assert len(calls) == 1 and logger.curve(STEP) == {4: 4.0} and run.callback_metrics[STEP] == 4
    state = monitor.state_dict()
    fresh = StabilityMonitor(["numerics"])
    fresh.load_state_dict(state)
    assert fresh.history[STEP].values == [4.0] and fresh.monitor.quantities["numerics"].nonfinite_step == 4


@pytest.mark.parametrize("make", [lambda: Faulty("gradient"), lambda: Recovers("")])
def test_the_step_is_said_once_where_every_step_is_measured(make):
    """Also at the step itself, whose loss is finite."""
    logger, monitor = Rows(), StabilityMonitor(["numerics"], every_n_steps=1)
    with pytest.warns(UserWarning, match="not finite"):
        fit(make, monitor, logger=logger, max_steps=9)
    assert monitor.history["stability/overflow_headroom"].steps[4] == 4
    assert (monitor.history[STEP].steps, monitor.history[STEP].values) == ([4], [4.0])
    assert sum(STEP in row for _, row in logger.rows) == 1
    assert monitor.monitor.quantities["numerics"].nonfinite_step == 4


def test_the_predicted_memory_is_what_a_step_takes():
    """Within a factor of two: once the trial of the optimizer's step takes most, once the replay of a wide layer."""
    for net, x in (
        (nn.Sequential(nn.Linear(400, 500), nn.Tanh(), nn.Linear(500, 5)), torch.randn(4, 400)),
        (nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3)), torch.randn(16, 2, 24, 24)),
    ):
        snapshot = freeze(net, Adam(net.parameters()), replay=lambda net=net, x=x: net(x).square().mean())
        predicted = sum(Numerics().memory(snapshot).values())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            Numerics().update(snapshot)
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        assert 0.5 < predicted / max(held) < 2


def test_a_run_that_recovers_goes_on_as_without_us():
    """Its weights stay finite, so that a parameter which a replay had moved would show."""
    monitor = StabilityMonitor(["numerics", "sharpness"], every_n_steps=100)
    with pytest.warns(UserWarning, match="step 4 is not finite"):
        assert not changed_by(lambda: Recovers("moves"), monitor, stop=GoesOn(), max_steps=9)
    assert unrecovered_fault_of(monitor.monitor) is None


def test_a_run_that_recovers_did_not_end_so():
    monitor = StabilityMonitor(["numerics"], every_n_steps=100)
    with pytest.warns(UserWarning, match="step 4 is not finite"):
        run = fit(lambda: Recovers("recovers"), monitor, max_steps=9)
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert monitor.fault.step == 4 and unrecovered_fault_of(monitor.monitor) is None
    monitor.monitor.reset()
    assert monitor.fault is None


@pytest.mark.parametrize("seed", range(3))
def test_the_replay_draws_the_random_numbers_of_the_step(seed):
    class Unlucky(Model):
        def loss(self, batch):
            return F.cross_entropy(self.net(batch[0]) / (torch.rand(()) > 0.1), batch[1])

    monitor = StabilityMonitor(["numerics"], every_n_steps=100)
    with pytest.warns(UserWarning, match=r"aten\.div outside of all submodules gave Inf"):
        fit(Unlucky, monitor, max_steps=60, seed=seed)


def test_nothing_is_kept_where_it_is_not_measured():
    monitor = StabilityMonitor("economy", every_n_steps=100)
    fit(Faulty, monitor, max_steps=6)
    assert monitor.fault is None and not monitor.observer.nan_finder._parts


def test_manual_optimisation_with_two_updates():
    class Manual(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for second in (False, True):
                self.optimizers().zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss * math.nan if second and batch_idx == 2 else loss)
                self.optimizers().step()

    monitor = StabilityMonitor(["numerics"], every_n_steps=100, loss_fn=lambda m, batch: m.loss(batch))
    with pytest.warns(UserWarning, match="an earlier update of the same batch"):
        fit(Manual, monitor, max_steps=20)
    assert monitor.fault.where == "unknown"


@pytest.mark.parametrize("what", ["gradients", "loss", "neither"])
def test_a_step_that_a_gradient_scaler_leaves_out_is_no_fault(what, monkeypatch):
    replays, real = [], guard.first_fault
    monkeypatch.setattr(guard, "first_fault", lambda *args, **kwargs: replays.append(1) or real(*args, **kwargs))

    class Scaled(Model):
        def loss(self, batch):
            out = self.net(batch[0])
            if self.trainer.fit_loop.epoch_loop.batch_progress.total.ready == 5 and what == "loss":
                out = out.half() * 6e4 * 6e4
            if self.trainer.fit_loop.epoch_loop.batch_progress.total.ready == 5 and what == "gradients":
                out = out + 1e3 * out - 1e3 * out.detach()
            return F.cross_entropy(out.float(), batch[1])

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**14))
    monitor = StabilityMonitor(["numerics"], every_n_steps=3)
    losses = Losses()
    fit(Scaled, monitor, losses, plugins=[plugin], max_steps=8)
    assert (monitor.fault is not None) == (what == "loss") == bool(replays)
    if what == "loss":
        assert (monitor.fault.where, monitor.fault.operation, monitor.fault.dtype) == ("forward", "aten.mul", "float16")
    assert plugin.scaler.get_scale() == 2.0 ** (14 if what == "neither" else 13)
    assert monitor.step == 8


def test_the_scaled_gradients_are_measured():
    """A scale of 2^10 takes ten bits."""
    found = []
    for scale in (1.0, 2.0**10):
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        monitor = StabilityMonitor(["numerics"], every_n_steps=100)
        fit(Model, monitor, plugins=[plugin], max_steps=1)
        found.append(monitor.history["stability/gradient_headroom_min"].values[0])
    assert found[0] - found[1] == pytest.approx(10, abs=0.02)


def cross_entropy(module, batch):
    out = module(batch[0])
    return F.cross_entropy((0 * out).sqrt() if batch[0][0, 0] > 50 else out, batch[1])


def batches():
    for k, (x, y) in enumerate(data(n=80)):
        x[0, 0] = 100.0 if k == 6 else x[0, 0]
        yield x, y


@pytest.mark.parametrize("loop", ["plain", "fabric"])
def test_other_loops(loop):
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        net, monitor, log = mlp(nn.Dropout(0.2)), Monitor(Numerics(), every_n_steps=100), Rows()
        optimizer, module, backward = SGD(net.parameters(), lr=0.1), net, torch.Tensor.backward
        if loop == "fabric":
            run = Fabric(accelerator="cpu", devices=1)
            module, optimizer = run.setup(net, optimizer)
            backward = run.backward
            watch = (
                watch_fabric(run, module, optimizer, cross_entropy, monitor, log=log.log_metrics) if watched else None
            )
        else:
            watch = Watch(net, optimizer, cross_entropy, monitor, log=log.log_metrics) if watched else None
        torch.manual_seed(2)
        for batch in watch(batches()) if watch else batches():
            optimizer.zero_grad(), backward(cross_entropy(module, batch)), optimizer.step()
        ends.append(
            (torch.cat([p.detach().flatten() for p in net.parameters()]).view(torch.int32), torch.get_rng_state())
        )
    assert all(map(torch.equal, *ends))
    fault = first_fault_of(monitor)
    assert (fault.step, fault.where, fault.forward) == (6, "backward", "aten.sqrt")
    assert len(watch.observer.nan_finder._parts) == 1  # of the last step
    assert unrecovered_fault_of(monitor) is fault and log.curve(STEP) == {6: 6.0}
    watch.close()


# -- finite --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_is_enough(value, dtype):
    tensors = [torch.ones(3, 2, dtype=dtype), torch.zeros(0), torch.ones(5, dtype=torch.float64)]
    assert finite([]) and finite(tensors)
    assert finite([torch.full((9,), torch.finfo(dtype).max, dtype=dtype), *tensors])  # its norm is not
    tensors[0][2, 1] = value
    assert not finite(tensors)


def test_sparse_gradients():
    index = torch.tensor([[0, 2]])
    sparse = torch.sparse_coo_tensor(index, torch.tensor([1.0, 2.0]), (4,))
    assert finite([sparse]) and not finite([sparse * math.inf])


def test_other_quantities_see_no_scale():
    """The gradient that they are given is without the factor."""
    net, x = line(1.0), torch.ones(1, 1)
    values = []
    for scale in (1.0, 64.0):
        metric = Sharpness("exact")
        sgd = SGD(net.parameters(), lr=0.1)
        metric.update(freeze(net, sgd, replay=lambda: net(x).square().sum(), scale=scale))
        values.append(float(metric.compute()["stability/sharpness"]))
    assert values[0] == values[1]
