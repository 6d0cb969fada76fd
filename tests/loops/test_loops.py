"""Loops other than Lightning's Trainer: the same curves, and training as it is without us."""

import math

import pytest
import torch
from harness import CLASSES, MOMENTUM, SGD, Model, Rows, data, fit, mlp
from lightning.fabric import Fabric
from loop_harness import LYAPUNOV, NORM, SHARPNESS, cross_entropy, example, left, net, plain, quantities
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import Lyapunov, Monitor, Numerics, SGDStability, Sharpness, SpectralNorm, StabilityMonitor
from lsp_callbacks.loops import Watch, watch_fabric
from lsp_callbacks.step.clipping import Clipping


def fabric(model, make=MOMENTUM, steps=10, watch=None, precision="32-true", backward=True, **own):
    run = Fabric(accelerator="cpu", devices=1, precision=precision)
    wrapped, optimizer = run.setup(model, make(model.parameters()))
    watch = watch and watch_fabric(run, wrapped, optimizer, cross_entropy, watch, **own)
    loader, done = run.setup_dataloaders(data()), 0
    while done < steps:
        for batch in watch(loader) if watch else loader:
            optimizer.zero_grad()
            run.backward(cross_entropy(wrapped, batch))
            optimizer.step()
            done += 1
            if done == steps:
                break
    return watch, optimizer.optimizer


LOOPS = {"plain": plain, "fabric": fabric}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("make", [SGD, MOMENTUM])
def test_the_curves_are_those_of_the_callback(loop, make):
    ours = LOOPS[loop](net(nn.Dropout(0.2)), make, watch=Monitor(*quantities(), every_n_steps=2))[0]
    callback = StabilityMonitor(quantities(), every_n_steps=2)
    fit(lambda: Model(mlp(nn.Dropout(0.2)), make), callback)
    assert len(ours.history[SHARPNESS].steps) == 5 and "stability/courant_sgd" in ours.history
    named = {key.replace("/net.", "/"): curve for key, curve in callback.history.items()}
    assert ours.history.keys() == named.keys() - {"stability/steps_to_edge"}
    for key, curve in ours.history.items():
        assert curve.steps == named[key].steps
        assert curve.values == pytest.approx(named[key].values, rel=1e-5), key


@pytest.mark.parametrize("loop", LOOPS)
def test_training_is_bit_identical(loop):
    found = []
    for watch in (None, Monitor(*quantities(), every_n_steps=2)):
        model = net(nn.BatchNorm1d(5), nn.Dropout(0.3))
        found.append(left(model, LOOPS[loop](model, watch=watch)[1]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(map(math.isfinite, watch.history[SHARPNESS].values))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_fabric_in_other_precisions(precision):
    found = []
    for watch in (None, Monitor(SpectralNorm(), Sharpness(), SGDStability(32), every_n_steps=2, strict=True)):
        model = net(nn.Dropout(0.3))
        found.append(left(model, fabric(model, watch=watch, precision=precision)[1]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(map(math.isfinite, watch.history[SHARPNESS].values)) and len(watch.history[NORM].steps) == 5


def test_accumulation_in_a_plain_loop():
    found = []
    for watch in (None, Monitor(*quantities(), every_n_steps=2, strict=True)):
        model = net(nn.BatchNorm1d(5), nn.Dropout(0.3))
        found.append(left(model, plain(model, watch=watch, accumulate=2)[1]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    callback = StabilityMonitor(quantities(), every_n_steps=2)
    fit(lambda: Model(mlp(nn.BatchNorm1d(5), nn.Dropout(0.3)), MOMENTUM), callback, accumulate_grad_batches=2)
    for key in (SHARPNESS, LYAPUNOV, "stability/courant_sgd"):
        assert watch.history[key].values == pytest.approx(callback.history[key].values, rel=1e-5), key


def test_a_loss_function_that_is_not_the_loops_is_found_out():
    def other(model, batch):
        return 1.1 * cross_entropy(model, batch)

    model, monitor = net(), Monitor(*quantities(), every_n_steps=1)
    optimizer, loader = SGD(model.parameters()), data()
    watch = Watch(model, optimizer, other, monitor)
    with pytest.warns(UserWarning, match="gradient is not that of its loss"):
        for batch in watch(loader):
            optimizer.zero_grad(), cross_entropy(model, batch).backward(), optimizer.step()
    assert all(math.isnan(v) for v in watch.history[SHARPNESS].values + watch.history[LYAPUNOV].values)
    assert all(map(math.isfinite, watch.history[NORM].values)) and len(watch.history[NORM].steps) == 6


def clip(watch, model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def measure_and_clip(watch, model):
    if watch:
        watch.measure()
    clip(watch, model)


@pytest.mark.parametrize(
    "between, settings, reason",
    [
        (clip, {}, "gradient is not that of its loss"),
        (measure_and_clip, {}, "changed after Watch.measure"),
        (clip, {"unsupported": "clipped to 1e-3"}, "clipped to 1e-3"),
        (clip, {"clipping": Clipping(2e-3)}, "gradient is not that of its loss"),
        (None, {"closure": True}, r"step\(closure\)"),
    ],
)
def test_an_update_that_is_another_gives_no_wrong_number(between, settings, reason):
    with pytest.warns(UserWarning) as caught:
        watch, _ = plain(net(), watch=Monitor(*quantities(), every_n_steps=1), between=between, **settings)
    said = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert len(said) == 1 and reason.replace("\\", "") in said[0]
    keys = ("stability/courant_gd", "stability/courant", LYAPUNOV)
    assert all(math.isnan(v) for key in keys if key in watch.history for v in watch.history[key].values)
    # The gradient was that of the loss when it was measured: its curvature is known.
    curvature = watch.history[SHARPNESS].values if SHARPNESS in watch.history else []
    assert all(map(math.isfinite if between is measure_and_clip else math.isnan, curvature))
    if not settings.get("closure"):
        assert all(map(math.isfinite, watch.history[NORM].values))


@pytest.mark.parametrize("limit", [0.05, 1e3])
def test_clipping_that_is_known_is_measured_as_lightnings(limit):
    def bite(watch, model):
        nn.utils.clip_grad_norm_(model.parameters(), limit)

    ours, _ = plain(
        net(), watch=Monitor(*quantities(), every_n_steps=1, strict=True), between=bite, clipping=Clipping(limit)
    )
    theirs = StabilityMonitor(quantities(), every_n_steps=1)
    fit(lambda: Model(mlp(), MOMENTUM), theirs, gradient_clip_val=limit)
    for key in (SHARPNESS, "stability/courant_gd", LYAPUNOV, NORM):
        assert ours.history[key].values == pytest.approx(theirs.history[key].values, rel=1e-3), key


def test_clipping_that_does_not_bite_is_none():
    def loose(watch, model):
        nn.utils.clip_grad_norm_(model.parameters(), 1e3)

    watch, _ = plain(net(), watch=Monitor(*quantities(), every_n_steps=1, strict=True), between=loose)
    assert len(watch.history[SHARPNESS].steps) == 10


@pytest.mark.parametrize(
    "asked, settings", [(False, {}), (True, {}), (False, {"fused": True}), (True, {"fused": True})]
)
def test_an_update_that_a_gradient_scaler_leaves_out_is_none(asked, settings):
    """Fused optimizers are called all the same, with the factor on the gradient if nobody has divided it out."""
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer, loader = SGD(model.parameters(), **settings), data(n=80)
    monitor = Monitor(*quantities(), every_n_steps=1, strict=True)
    watch = Watch(model, optimizer, cross_entropy, monitor, scaler=scaler)
    for number, batch in enumerate(watch(loader)):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model, batch) * (math.inf if number in (0, 4, 5) else 1.0)).backward()
        if asked:
            scaler.unscale_(optimizer), watch.measure()
        scaler.step(optimizer), scaler.update()
    assert watch.step == 7 and watch.history[SHARPNESS].steps == [*range(7)]


def test_the_factor_of_a_gradient_scaler_takes_head_room():
    key, found = "stability/gradient_headroom_min", {}
    for scale in (1.0, 2.0**8):
        model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = SGD(model.parameters())
        watch = Watch(model, optimizer, cross_entropy, Monitor(Numerics(), every_n_steps=1), scaler=scaler)
        for batch in watch(data()):
            optimizer.zero_grad(), scaler.scale(cross_entropy(model, batch)).backward()
            scaler.step(optimizer), scaler.update()
        found[scale] = watch.history[key].values[0]
    assert found[1.0] - found[2.0**8] == pytest.approx(8, abs=1e-9)


def test_values_are_logged_the_hooks_can_be_taken_away_and_a_run_goes_on():
    rows, whole = Rows(), Monitor(Sharpness(), every_n_steps=2)
    plain(net(), watch=whole, log=rows.log_metrics)
    assert rows.curve(SHARPNESS) == dict(zip(*vars(whole.history[SHARPNESS]).values()))
    assert [step for step, _ in rows.rows] == [0, 2, 4, 6, 8]
    first, _ = plain(net(), watch=Monitor(Sharpness(), every_n_steps=2), steps=3)
    second = Watch(first.module, first.optimizer, cross_entropy, Monitor(Sharpness(), every_n_steps=2))
    second.load_state_dict(first.state_dict())
    first.close()
    assert len(first.optimizer._optimizer_step_pre_hooks) == len(first.optimizer._optimizer_step_post_hooks) == 1
    for batch in second(data()):
        second.optimizer.zero_grad(), cross_entropy(second.module, batch).backward(), second.optimizer.step()
    assert second.history[SHARPNESS].steps == [0, 2, 4, 6, 8] and first.step == 3


@pytest.mark.parametrize(
    "settings, message", [({"accumulate": 0}, "accumulate=0"), ({"forward_fn": len}, "belong together")]
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Watch(net(), SGD(net().parameters()), cross_entropy, **settings)


def test_named_quantities_that_cannot_be_measured_raise_at_the_first_batch():
    model = net()
    watch = Watch(model, torch.optim.LBFGS(model.parameters()), cross_entropy, Monitor(Lyapunov(), named={"lyapunov"}))
    with pytest.raises(ValueError, match="lyapunov cannot be measured"):
        next(iter(watch(data())))


class Forward(Model):
    def forward(self, x):
        return self.net(x)


def test_a_lightning_module_that_fabric_has_set_up():
    """It holds Fabric and the wrapped optimizers, which cannot be copied."""
    watched, found = Monitor(*quantities(), every_n_steps=2), []
    for watch in (None, watched):
        model = Forward(net())
        found.append(left(model, fabric(model, watch=watch)[1]))
    assert all(map(torch.equal, *found))
    assert all(map(math.isfinite, watched.history[SHARPNESS].values))


def test_outputs_named_by_the_user():
    def by_hand(model, batch):
        return (model(batch[0]) - F.one_hot(batch[1], CLASSES)).square().mean()

    settings = {
        "forward_fn": lambda model, batch: model(batch[0]),
        "criterion": lambda outputs, batch: (outputs - F.one_hot(batch[1], CLASSES)).square().mean(),
    }
    watch, _ = plain(net(), watch=Monitor(SGDStability(32), every_n_steps=2), loss_fn=by_hand, **settings)
    assert watch.history["stability/courant_sgd"].values[0] > 0


# -- examples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, settings", [("plain_loop", {}), ("fabric_loop", {"loggers": Rows()})])
def test_the_examples_run(name, settings):
    model, watch = example(name).train(**settings)
    assert len(watch.history[SHARPNESS].steps) == 8
    assert all(map(math.isfinite, watch.history["stability/courant"].values))
    if settings:
        assert settings["loggers"].curve(SHARPNESS).keys() == {*range(0, 64, 8)}
    else:
        same, _ = example(name).train(watched=False)
        assert all(map(torch.equal, model.parameters(), same.parameters()))
