"""A plain loop and transformers' Trainer with a cap: the run with these rates, and the schedule as it was."""

import math

import pytest
import torch
from harness import data, mlp
from loop_harness import cross_entropy, net
from torch import nn
from torch.optim import lr_scheduler

from lsp_callbacks import Monitor, Sharpness, SpectralNorm
from lsp_callbacks.loops import Watch

LR = "stability/lr_"


def jump(step):
    return 40.0 if step >= 8 else 1.0


def train(model, monitor=None, steps=24, rates=None, record=True, measure=False, make=torch.optim.SGD, lr=0.1, **own):
    """Returns the watch, the rates that the updates have used, and those that the scheduler has made."""
    optimizer, used, made, done = make(model.parameters(), lr=lr), [], [], 0
    schedule = lr_scheduler.LambdaLR(optimizer, jump)
    watch = monitor and Watch(model, optimizer, cross_entropy, monitor, schedulers=schedule, **own)
    optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    loader = data()
    while done < steps:
        for batch in watch(loader) if watch else loader:
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            if watch and record:
                watch.record(loss)
            if watch and measure:
                watch.measure()
            own_rate = optimizer.param_groups[0]["lr"]
            if rates is not None:
                optimizer.param_groups[0]["lr"] = rates[done]
            optimizer.step()
            if rates is not None:
                optimizer.param_groups[0]["lr"] = own_rate
            schedule.step()
            made.append(optimizer.param_groups[0]["lr"])
            done += 1
            if done == steps:
                break
    return watch, used, made


@pytest.mark.parametrize("measure", [False, True])
def test_a_capped_run_is_the_run_with_these_rates_and_the_schedule_never_hears_of_it(measure):
    logged = {}
    capped = net()
    watch, used, made = train(
        capped, Monitor(Sharpness(), every_n_steps=1), measure=measure, cap=0.5,
        log=lambda values, step: logged.setdefault(step, values),
    )  # fmt: skip
    assert made == [0.1 * jump(step) for step in range(1, 25)]
    assert used[0] == 0.1 and max(used[9:]) < 0.9 * 0.1 * 40 and min(used[9:]) > 0
    plain = net()
    _, again, _ = train(plain, rates=used)
    assert again == used and all(torch.equal(a, b) for a, b in zip(capped.parameters(), plain.parameters()))
    for step, values in logged.items():
        assert values[LR + "applied"] == used[step] and values[LR + "scheduled"] == pytest.approx(0.1 * jump(step))
        if step > 12:  # the rate that was used is the one that was measured
            curvature = values["stability/sharpness"]
            assert values["stability/courant_gd"] == pytest.approx(used[step] * curvature / 2, rel=1e-5)
    watch.close()
    assert len(watch.optimizer._optimizer_step_post_hooks) == 0


def test_a_parabola_is_held_at_its_share_of_the_critical_rate():
    """Curvature 2: critical is 1. The first update is not capped, and a loss that has not fallen begins at a tenth."""
    model = nn.Linear(1, 1, bias=False)
    optimizer, used = torch.optim.SGD(model.parameters(), lr=0.3), []
    watch = Watch(
        model, optimizer, lambda module, x: module(x).square().mean(), Monitor(Sharpness(), every_n_steps=1), cap=0.5
    )
    optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    for step, x in enumerate(watch(torch.ones(120, 1, 1))):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        watch.record(loss)
        optimizer.param_groups[0]["lr"] = 0.3 if step < 80 else 3.0
        optimizer.step()
    assert used[0] == 0.3 and used[1] == pytest.approx(0.05, rel=1e-4) and used[79] == 0.3
    assert used[80] == pytest.approx(0.309) and used[-1] == pytest.approx(0.5, rel=1e-4)  # by 3 % at most


def test_it_goes_on_from_a_state():
    watch, *_ = train(net(), Monitor(Sharpness(), every_n_steps=1), cap=0.5)
    other = Watch(
        model := mlp(), torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, Monitor(Sharpness()), cap=0.5
    )
    other.load_state_dict(watch.state_dict())
    assert other.capped.cap.limits == watch.capped.cap.limits and other.capped.cap.is_on
    assert other.capped.cap.factor([4.0], step=24) < 0.5


@pytest.mark.parametrize("settings, said", [
    ({"record": False}, "watch.record"),
    ({"monitor": Monitor(SpectralNorm(), every_n_steps=1)}, "never measured"),
    ({"cap": -1.0}, "cap=-1.0"),
    ({"cap": math.nan}, "cap=nan"),
    ({"make": torch.optim.Adadelta}, "cap=0.5"),
    ({"prox": lambda name, tensor, lr: tensor}, "cap and prox"),
])  # fmt: skip
def test_refused_before_the_first_update(settings, said):
    model = net()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=said):
        train(model, **{"monitor": Monitor(Sharpness(), every_n_steps=1), "cap": 0.5} | settings)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    from hugging_face_harness import CONFIG, Loop, batches
    from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

    from lsp_callbacks.loops.hugging_face import StabilityCallback

    class Rates(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer = getattr(optimizer, "optimizer", optimizer)
            self.used = []
            self.optimizer = optimizer
            optimizer.register_step_pre_hook(lambda o, *_: self.used.append(o.param_groups[0]["lr"]))

    def run(*callbacks):
        torch.manual_seed(0)
        model, rates = GPT2LMHeadModel(GPT2Config(**CONFIG)), Rates()
        loop = Loop(
            str(tmp_path), model, batches(), [*callbacks, rates], accumulate=1, max_grad_norm=0, knows_items=False
        )
        for group in loop.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = 5.0
        loop.lr_scheduler.base_lrs = [5.0]
        loop.train()
        return rates

    without, capped = run(), run(StabilityCallback(["sharpness"], every_n_steps=1, cap=0.5))
    assert set(without.used) == {5.0}
    assert capped.used[0] == 5.0 and max(capped.used[1:]) < 2.5 and capped.optimizer.param_groups[0]["lr"] == 5.0
