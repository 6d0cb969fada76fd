"""What every quantity promises as a plain torchmetrics Metric, without Lightning."""

import contextlib
import copy
import pickle
from dataclasses import replace

import pytest
import torch
from harness import Model, data, fit
from problems import Regression, close, f64, freeze, probes_of, random, same, seeded, take, trajectory
from torch import nn
from torchmetrics import MetricCollection

from lsp_callbacks import Lyapunov, Sharpness, Snapshot, SpectralNorm, Trace, Unmeasurable
from lsp_callbacks.quantities import REGISTRY

SGD = torch.optim.SGD
SETTINGS = {
    "batch_sharpness": {"rtol": 1e9, "most": 8},
    "lyapunov": {"window": 3},
    "sgd_stability": {"probes": 6, "chains": 4, "steps": 40},
    "lyapunov_trajectory": {"k": 2, "transient": 1, "window": 40},
    "sgd_law": {"probes": 6, "products": 8},
    "leave_one_out": {"samples": 2, "window": 2},
    "stability_profile": {"horizon": 2, "directions": 2, "samples": 2, "probes": 6},
    "clarke_training": {"horizon": 2},
    "courant_step": {"check_every": 1},
    "critical_sharpness": {"check_every": 1},
}
every_quantity = pytest.mark.parametrize("name", REGISTRY)


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x).tanh()


def problem():
    """A network in which there is something to measure for all of them."""
    net = nn.Sequential(nn.Linear(2, 4), ResidualBlock(), nn.Linear(4, 1))
    return Regression(seeded(net), random(6, 2, seed=1), random(6, 1, seed=2))


def trace_of(task):
    """A noisy series of losses, as after some steps."""
    trace = Trace(length=100)
    for step, noise in enumerate(random(80, seed=4)):
        trace.record(step, 1 + 0.9**step + 0.1 * noise, lr=0.3, module=task)
    return trace


class NoTrace(Trace):
    def read(self, ranks=None):
        raise KeyError("the loss of a user")


def metric_of(name):
    return REGISTRY[name](**SETTINGS.get(name, {}))


def steps(metric, n, start=problem):
    """Frozen steps of a real run, with what the metric wants to see of them."""
    task = start()
    optimizer = SGD(task.parameters(), lr=0.3, momentum=0.5)
    weights = copy.deepcopy(task.state_dict())
    take(optimizer, task())  # there is momentum
    task.load_state_dict(weights)
    keep = getattr(metric, "captures_inputs", lambda name, module: name == "net.1")
    return trajectory(task, optimizer, n, captures_inputs=keep, probes=probes_of(task), series=trace_of(task))


def fed(name, measurements=1, extra=0):
    """A metric after some measurements and a few steps more."""
    metric = metric_of(name)
    for snapshot in steps(metric, measurements * (metric.prepare + metric.window) + extra):
        metric.update(snapshot)
    return metric


def saved(metric):
    """All that a metric knows, but how often it was asked."""
    state = {k: copy.deepcopy(v) for k, v in metric.state_dict().items() if k != "_update_count"}
    return state, copy.deepcopy(metric.vectors())


@pytest.mark.quick
@every_quantity
def test_a_measurement_takes_its_steps_and_returns_its_keys(name):
    metric = metric_of(name)
    period = metric.prepare + metric.window
    completed = []
    for snapshot in steps(metric, 3 * period):
        metric.check(snapshot)
        assert all(value > 0 for value in metric.cost(snapshot).values())
        metric.update(snapshot)
        completed += [snapshot.step] * metric.complete
    assert completed == [period - 1, 2 * period - 1, 3 * period - 1]
    assert metric.update_count == 3 * period
    values = metric.compute()
    assert set(metric.keys) <= set(values)
    for key, value in values.items():
        assert key.startswith("stability/") and value.shape == () and value.dtype == f64
        assert torch.isfinite(value) and not value.requires_grad
    assert not any(key + "/" in other for key in values for other in values)  # a name is a value or a prefix


@pytest.mark.quick
@every_quantity
def test_nothing_is_known_before_the_first_measurement_and_after_a_reset(name):
    metric = fed(name, extra=1)
    metric.reset()
    for empty in (metric_of(name), metric):
        with pytest.warns(UserWarning, match="before"):
            assert all(value.isnan() for value in empty.compute().values())
        assert empty.vectors() == {} and empty.update_count == 0 and not empty.complete
    again = fed(name)
    for snapshot in steps(metric, metric.prepare + metric.window):
        metric.update(snapshot)
    assert same(metric.compute(), again.compute())


@pytest.mark.quick
@every_quantity
def test_forward_is_an_update_that_returns_the_last_measurement(name):
    """As torchmetrics' users call it; its own would begin each measurement anew and stack the states."""
    called, updated = metric_of(name), metric_of(name)
    values = {}
    for snapshot in steps(called, 2 * (called.prepare + called.window)):
        values = called(snapshot)
        updated.update(replace(snapshot))
        assert called.complete == updated.complete
    assert same(values, updated.compute()) and same(called.compute(), values) and same(called.compute(), values)
    assert called.update_count == updated.update_count and same(saved(called), saved(updated))
    assert all(value.shape == () for value in called.compute().values())


@pytest.mark.quick
@every_quantity
def test_one_key_is_a_metric_of_its_own(name):
    metric = metric_of(name)
    key = metric.keys[0]
    top = metric[key]
    for snapshot in steps(metric, metric.prepare + metric.window):
        value = top(snapshot)
    assert same(value, metric.compute()[key]) and same(top.compute(), value) and same(top._forward_cache, value)
    for twin in (pickle.loads(pickle.dumps(top)), top.clone()):
        assert same(twin.compute(), value) and repr(twin) == repr(top)


@pytest.mark.quick
def test_one_key_is_nan_where_a_measurement_lacks_it():
    """Sharpness under an optimizer without an edge has no Courant number: nobody's training may end for it."""
    task, sharpness = problem(), Sharpness()
    snapshot = freeze(task, torch.optim.Adadelta(task.parameters()))
    courant, limit, misspelt = (sharpness[f"stability/{key}"] for key in ("courant_gd", "sharpness_limit", "sharpnes"))
    assert courant(snapshot).isnan() and limit.compute().isnan() and sharpness["stability/sharpness"].compute() > 0
    with pytest.raises(KeyError, match="sharpnes'"):
        misspelt.compute()


class Logs(Model):
    """Logs a metric of its own, as torchmetrics' users do."""

    def __init__(self):
        super().__init__()
        self.top = Sharpness()["stability/sharpness"]
        self.both = MetricCollection([Sharpness(), SpectralNorm()])
        self.told = []

    def training_step(self, batch, batch_idx):
        self.batch = batch
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        step = self.global_step
        snapshot = Snapshot(step=step, module=self.net, replay=lambda: self.loss(self.batch), optimizer=optimizer)
        values = self.both(snapshot)
        self.told.append((float(self.top(snapshot)), float(values["stability/spectral_norm_max"])))
        self.log("top", self.top, on_step=True, on_epoch=True)
        self.log_dict(values)

    def on_train_batch_end(self, *_):
        logged = self.trainer.callback_metrics
        close(logged["top_step"], self.told[-1][0], 1e-6)
        close(logged["stability/spectral_norm_max"], self.told[-1][1], 1e-6)


def test_a_lightning_module_logs_one_key_and_a_collection():
    model = Logs()
    ended = fit(model, loader=data(24), max_epochs=2, max_steps=-1)  # at the end of an epoch Lightning resets them
    assert len(model.told) == ended.global_step > 2 and min(min(pair) for pair in model.told) > 0
    close(ended.callback_metrics["top_epoch"], model.told[-1][0], 1e-6)  # the last step of the epoch


@every_quantity
def test_every_quantity_can_be_drawn(name):
    metric = fed(name)
    figure, axes = metric.plot()
    assert axes in figure.axes and axes.has_data()
    shown = metric.compute()
    for values, points in ((shown, 1), ([shown, shown], 2)):  # those that have a picture of their own, too
        _, axes = metric.plot(values)
        names = [key.split("/")[1] for key in shown if key.count("/") == 1]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == names
        assert all(len(line.get_xdata()) == points for line in axes.get_lines())


@every_quantity
def test_a_snapshot_needs_no_more_than_module_loss_and_optimizer(name):
    """As users make it in loops of their own; what is missing is asked for by its name."""
    metric, task = metric_of(name), problem()
    optimizer = SGD(task.net.parameters(), lr=0.3, momentum=0.5)
    missing = {"sgd_stability": "probes=", "sgd_law": "probes=", "dissipation": "series="}.get(name)

    def loss():
        return nn.functional.mse_loss(task.net(task.x), task.y)

    for step in range(metric.least_steps + 1):
        snapshot = Snapshot(step=step, module=task.net, replay=loss, optimizer=optimizer)
        with pytest.raises(Unmeasurable, match=missing) if missing else contextlib.nullcontext():
            metric(snapshot)
        take(optimizer, loss())
        metric.after_update()  # what this completes is not hidden by what `forward` has computed before
    values = metric.compute()
    assert missing or (all(value.isfinite() for value in values.values()) and metric.numbers() == values)


@every_quantity
@pytest.mark.parametrize("argument", [nn.Linear(1, 1), torch.zeros(2), None])
def test_what_is_no_snapshot_is_told_what_is_wanted(name, argument):
    with pytest.raises(TypeError, match=rf"takes a lsp_callbacks.Snapshot, not a {type(argument).__name__}: .*replay="):
        metric_of(name).update(argument)


@pytest.mark.quick
@every_quantity
def test_state_survives_a_checkpoint(name):
    metric, fresh = fed(name, measurements=3), metric_of(name)
    box, fresh_box = nn.ModuleDict({"inside": metric}), nn.ModuleDict({"inside": fresh})
    state = box.state_dict()
    # Scalars, however large the model.
    assert all(len(v) < 100 if isinstance(v, dict) else v.numel() < 1000 for v in state.values())
    assert all(type(v) is float for v in state.get("inside._numbers", {}).values())
    fresh_box.load_state_dict(copy.deepcopy(state))
    assert same(fresh_box.state_dict(), state)
    assert fresh.update_count == metric.update_count == 3 * (metric.prepare + metric.window)
    persistent = {
        "sharpness", "sgd_stability", "lyapunov", "lyapunov_trajectory", "dissipation", "sgd_law", "spectral_density",
        "robustness", "leave_one_out",
    }  # fmt: skip
    if name in persistent:
        assert same(fresh.compute(), metric.compute())


#: What a quantity remembers of the run, whichever parameters are trained in it: keys, and states.
OF_THE_RUN = {"stability/kurtosis_initial_max", "initial"}


@every_quantity
def test_after_a_restart_nothing_of_the_parameters_before_enters(name):
    """Unfreezing: the numbers of a metric that begins with the parameters that are trained now."""

    def frozen():
        task = problem()
        task.net[0].requires_grad_(False)
        return task

    metric, fresh = metric_of(name), metric_of(name)
    period = metric.prepare + metric.window
    for snapshot in steps(metric, 3 * period + 1, start=frozen):
        metric.update(snapshot)
    metric.restart()
    for snapshot in steps(metric, period):
        later = replace(snapshot, step=3 * period + 1 + snapshot.step)
        metric.update(later)
        fresh.update(replace(later))
    assert metric.complete and fresh.complete and same(metric.vectors(), fresh.vectors())
    for values in (lambda m: m.compute(), lambda m: saved(m)[0], lambda m: saved(m)[0].get("_numbers", {})):
        ours, theirs = (
            {k: v for k, v in values(m).items() if k not in OF_THE_RUN | {"_numbers"}} for m in (metric, fresh)
        )
        assert same(ours, theirs)


@pytest.mark.parametrize("name", ["lyapunov", "lyapunov_trajectory"])
def test_a_window_under_way_goes_on_from_its_vectors(name):
    metric, resumed = fed(name, extra=2), metric_of(name)
    resumed.load_state_dict(metric.state_dict())
    resumed.load_vectors(metric.vectors())
    period = metric.prepare + metric.window
    for snapshot in steps(metric, 2 * period):
        if snapshot.step >= period + 2:
            metric.update(snapshot)
            # As in a run of its own: what one has found out about the step does not help the other.
            resumed.update(replace(snapshot))
    assert metric.complete and resumed.complete
    assert same(metric.compute(), resumed.compute())


@every_quantity
@pytest.mark.parametrize("extra", [0, 1])
def test_an_exception_leaves_the_metric_whole(name, extra):
    if name == "courant_step" and extra:
        pytest.skip("it then looks at the step before, which is sound")
    if name == "critical_sharpness":
        pytest.skip("it replays nothing before the update, see test_critical_sharpness")
    metric = fed(name, extra=extra)
    before, values = saved(metric), metric.compute()
    task = problem()

    def fails():
        raise KeyError("the loss of a user")

    optimizer = SGD(task.parameters(), lr=0.3, momentum=0.5)
    frozen = freeze(
        task, optimizer, step=metric.update_count, captures_inputs=metric.captures_inputs, probes=probes_of(task)
    )
    probes = replace(probes_of(task), parts=(fails,))
    broken = replace(frozen, replay=fails, probes=probes, run=replace(frozen.run, series=NoTrace(length=100)))
    with pytest.raises(KeyError):
        metric.update(broken)
    assert not metric.complete
    assert same(saved(metric), before) and same(metric.compute(), values)


@pytest.mark.parametrize("compute_groups", [True, False])
def test_all_work_inside_a_collection(compute_groups):
    collection = MetricCollection({name: metric_of(name) for name in REGISTRY}, compute_groups=compute_groups)
    for snapshot in steps(None, 7):
        shown = collection(snapshot)
    assert same(shown, collection.compute())
    values = collection.compute()
    for name, member in collection.items():
        alone = metric_of(name)
        for snapshot in steps(alone, 7):
            alone.update(snapshot)
        assert member.update_count == 7
        for key, value in alone.compute().items():
            if name in ("sharpness", "lyapunov", "stability_profile"):  # they share an alignment up to its tolerance
                close(values.pop(key), value, 0.03)
            elif hasattr(member, "method"):  # a difference goes as far as the products before it of the step advise
                together = values.pop(key)
                assert same(together, value) or torch.isclose(together, value, rtol=1e-5)
            else:
                assert same(values.pop(key), value)
    assert not values
    collection.reset()
    assert all(metric.update_count == 0 for metric in collection.values())


@every_quantity
def test_copies_are_independent(name):
    metric = fed(name, extra=1)
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert same(saved(twin), saved(metric)) and same(twin.compute(), metric.compute())
        twin.reset()
    assert metric.update_count > 0 and metric.compute()


@pytest.mark.quick
@every_quantity
def test_leaves_no_trace(name):
    task, metric = problem(), metric_of(name)
    before, random_state = copy.deepcopy(task.state_dict()), torch.get_rng_state()
    for training in (True, False):
        task.train(training)
        optimizer, settings = (
            SGD(task.parameters(), lr=0.3),
            {"captures_inputs": metric.captures_inputs, "probes": probes_of(task)},
        )
        settings["series"] = trace_of(task)
        metric.update(freeze(task, optimizer, step=int(not training), **settings))
        assert all(m.training is training for m in task.modules())
    assert same(task.state_dict(), before) and all(p.grad is None for p in task.parameters())
    assert torch.equal(torch.get_rng_state(), random_state) and torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())


@every_quantity
def test_the_same_steps_give_the_same_numbers(name):
    assert same(fed(name).compute(), fed(name).compute())


def test_quantities_of_one_step_share_their_work():
    calls = []
    task = problem()
    replay = lambda: calls.append(1) or task()  # noqa: E731
    snapshot = freeze(task, SGD(task.parameters(), lr=0.3), replay=replay)
    calls.clear()
    Sharpness().update(snapshot)
    first = len(calls)
    Lyapunov().update(snapshot)
    assert first > 1 and len(calls) == first


@pytest.mark.parametrize("name", [name for name, q in REGISTRY.items() if q.needs_update and not q.without_update])
def test_what_needs_the_update_map_says_so_before_it_is_measured(name):
    task = problem()
    for measure in (metric_of(name).check, metric_of(name).update):
        with pytest.raises(Unmeasurable, match="Rprop"):
            measure(freeze(task, torch.optim.Rprop(task.parameters()), probes=probes_of(task)))


@pytest.mark.parametrize("name", [name for name, quantity in REGISTRY.items() if not quantity.needs_update])
def test_what_does_not_need_the_optimizer_works_with_any(name):
    task, metric = problem(), metric_of(name)
    metric.check(freeze(task, torch.optim.Adam(task.parameters())))
    metric.update(freeze(task, captures_inputs=metric.captures_inputs, series=trace_of(task)))
    assert metric.compute()


def test_groups_without_a_common_edge_are_refused_before_training():
    net = torch.nn.Linear(2, 1)
    groups = [{"params": [net.weight], "momentum": 0.9}, {"params": [net.bias]}]
    snapshot = Snapshot(step=0, module=net, replay=lambda: net.bias.sum(), optimizer=torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(Unmeasurable, match="no common edge"):
        Lyapunov().check(snapshot)
    Sharpness().check(snapshot)
    assert "no common edge" in (Sharpness().unknown_update(snapshot) or "")  # the eigenvalue itself is measured
