"""The Trainer of transformers: its own training loop, with and without our callback."""

import math

import pytest
import torch
from harness import SGD, fit
from hugging_face_harness import Callback, Loop, batches, gpt2
from loop_harness import LYAPUNOV, NORM, SHARPNESS, example, left, quantities
from transformers import TrainerCallback
from transformers.optimization import get_constant_schedule, get_linear_schedule_with_warmup

from lsp_callbacks import Monitor, SGDLaw, Sharpness, StabilityMonitor, Unmeasurable
from lsp_callbacks.functional import PowerLaw
from lsp_callbacks.loops.hugging_face import StabilityCallback

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture
def run(tmp_path):
    """Five batches an epoch: with two in a window, the last is short."""

    def run(*callbacks, accumulate=2, max_grad_norm=0.0, knows_items=True, model=None, loader=None):
        model = gpt2() if model is None else model
        loader = batches(ragged=True) if loader is None else loader
        settings = {"accumulate": accumulate, "max_grad_norm": max_grad_norm, "knows_items": knows_items}
        loop = Loop(tmp_path, model, loader, list(callbacks), **settings)
        torch.manual_seed(2)
        loop.train()
        return loop, left(model, loop.optimizer.optimizer)

    return run


@pytest.mark.parametrize("accumulate, knows_items", [(1, True), (2, True), (2, False)])
def test_training_is_bit_identical_and_everything_is_measured(run, accumulate, knows_items):
    settings = {"accumulate": accumulate, "knows_items": knows_items}
    callback = StabilityCallback(Monitor(*quantities(), every_n_steps=2, strict=True))
    loop, ours = run(callback, **settings)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(**settings)[1], strict=True))
    history, steps = callback.watch.history, {1: 10, 2: 6}[accumulate]
    assert loop.state.global_step == callback.watch.step == steps
    assert history[SHARPNESS].steps == [*range(0, steps, 2)]
    for key in (SHARPNESS, LYAPUNOV, NORM, "stability/courant_sgd"):
        assert key in history and all(map(math.isfinite, history[key].values)), key
    rows = [row for row in loop.state.log_history if SHARPNESS in row]
    assert [row["step"] for row in rows] == [step + 1 for step in history[SHARPNESS].steps]
    assert not loop.model._forward_pre_hooks


@pytest.mark.parametrize("knows_items, clip", [(True, 0.0), (False, 0.0), (True, 0.1)])
def test_the_curves_are_those_of_lightnings_callback(run, knows_items, clip):
    """Batches of one size: the mean over tokens is the mean over batches, so both ways of dividing agree."""
    theirs = StabilityMonitor(quantities(), every_n_steps=1)
    loader = torch.utils.data.DataLoader(batches(4), batch_size=None)
    fit(
        lambda: Callback(gpt2(**NO_DROPOUT)),
        theirs,
        loader=loader,
        accumulate_grad_batches=2,
        max_steps=4,
        gradient_clip_val=clip,
    )
    callback, model = StabilityCallback(Monitor(*quantities(), every_n_steps=1, strict=True)), gpt2(**NO_DROPOUT)
    settings = {"accumulate": 2, "max_grad_norm": clip, "knows_items": knows_items}
    run(callback, model=model, loader=batches(4), **settings)
    for key in (SHARPNESS, "stability/courant_gd", LYAPUNOV, NORM, "stability/kernel_trace"):
        ours, other = callback.watch.history[key], theirs.history[key]
        assert ours.steps == other.steps and ours.values == pytest.approx(other.values, rel=1e-3), key


def test_evaluation_in_between_is_not_measured(run):
    class Evaluates(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model(**batches()[0])

        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()
            model(**batches()[0])

    callback = StabilityCallback(Monitor(*quantities(), every_n_steps=1, strict=True))
    run(Evaluates(), callback, loader=batches())
    assert callback.watch.history[SHARPNESS].steps == [*range(6)]


@pytest.mark.parametrize(
    "make, verdict",
    [(lambda o: get_linear_schedule_with_warmup(o, 3, 200), 0.0), (get_constant_schedule, 0.0),
     (lambda o: torch.optim.lr_scheduler.LambdaLR(o, PowerLaw(0.6)), 1.0),
     (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: (1 + t) ** -0.75), None)],
)  # fmt: skip
def test_the_trainers_schedule_has_a_verdict(make, verdict, tmp_path):
    callback, model = StabilityCallback(Monitor(SGDLaw(probes=8, products=3), every_n_steps=70)), gpt2()
    loop = Loop(tmp_path, model, batches(), [callback], accumulate=1, max_grad_norm=0.0, knows_items=True, epochs=15)
    loop.lr_scheduler = make(loop.optimizer)
    loop.train()
    history = {key: vars(curve) for key, curve in callback.watch.history.items() if "robbins" in key}
    if verdict is None:
        assert history == {"stability/robbins_monro_so_far": {"steps": [70], "values": [1.0]}}
    else:
        assert history == {"stability/robbins_monro": {"steps": [1, 70], "values": [verdict] * 2}}


def test_a_second_run_begins_anew(run):
    """Also after one that was interrupted, whose hooks are still there."""
    callback = StabilityCallback(Monitor(*quantities(), every_n_steps=2, strict=True))
    loop, _ = run(callback)
    first = {key: ([*curve.steps], [*curve.values]) for key, curve in callback.watch.history.items()}
    state = {name: p.clone() for name, p in gpt2().state_dict().items()}

    class Interrupts(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    for interrupts in (True, False):
        loop.model.load_state_dict(state)
        loop.optimizer = SGD(loop.model.parameters())
        loop.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: 1.0)
        torch.manual_seed(2)
        if interrupts:
            loop.add_callback(Interrupts)
            with pytest.raises(KeyboardInterrupt):
                loop.train()
            loop.remove_callback(Interrupts)
        else:
            loop.train()
    second = {key: (curve.steps, curve.values) for key, curve in callback.watch.history.items()}
    assert second == first and not loop.model._forward_pre_hooks and not loop.model._forward_hooks


def test_the_example_runs():
    stability = example("hugging_face_trainer").train()
    assert stability.watch.history[SHARPNESS].steps == [0, 4, 8]
    assert all(map(math.isfinite, stability.watch.history["stability/courant"].values))


def test_it_takes_what_the_stability_monitor_takes(run):
    settings = {"every_n_steps": 3, "window": 1, "average": 2, "layers": "transformer.h.*", "strict": True}
    names = ["sharpness", "lyapunov", "spectral_norm"]
    ours, theirs = StabilityCallback(names, **settings), Monitor(*quantities(), every_n_steps=3, strict=True)
    run(ours, accumulate=1)
    run(StabilityCallback(theirs), accumulate=1)
    assert ours.watch.history[SHARPNESS].steps == [0, 3, 6, 9]
    assert ours.watch.history[SHARPNESS].values == pytest.approx(theirs.history[SHARPNESS].values, rel=1e-6)
    layers = [key for key in ours.watch.history if key.startswith("stability/spectral_norm/")]
    assert layers and all(key.startswith("stability/spectral_norm/transformer.h.") for key in layers)


def test_a_preset_and_a_budget(run):
    callback = StabilityCallback("economy", budget=0.5, every_n_steps={"spectral_norm": 4})
    run(callback, accumulate=1)
    cadence = callback.monitor.cadence
    assert cadence.budget == 0.4 and cadence.paces["sharpness"].price > 0
    assert callback.watch.history[NORM].steps == [0, 4, 8] and callback.watch.history[SHARPNESS].steps[0] == 0


@pytest.mark.parametrize(
    "arguments, settings, message",
    [
        ((Monitor(),), {"every_n_steps": 2, "strict": True}, "every_n_steps and strict: a Monitor is given"),
        ((), {"every_n_steps": 0}, "every_n_steps=0"),
        ((), {"budget": 0}, "budget=0"),
        ((), {"window": 0}, "window=0"),
        (("nothing",), {}, "nothing"),
        ((), {"forward_fn": len}, "belong together"),
    ],
)
def test_bad_arguments_are_named(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        StabilityCallback(*arguments, **settings)


class Never(Sharpness):
    name = "never"

    def check(self, snapshot):
        raise Unmeasurable("why")


def test_what_was_named_and_cannot_be_measured_raises_before_the_first_step(run):
    model = gpt2(**NO_DROPOUT)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="layers='nowhere'"):
        run(StabilityCallback(layers="nowhere"), model=model)
    with pytest.raises(ValueError, match="never cannot be measured: why"):
        run(StabilityCallback([Never()]), model=model)
    assert all(map(torch.equal, before, model.parameters()))


def test_weights_that_a_callback_clips_after_each_step_are_noticed(run):
    class Clipping(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for p in model.parameters():
                p.data.clamp_(-0.03, 0.03)

    callback = StabilityCallback(["mean_square_stability"], every_n_steps=3)
    with pytest.warns(UserWarning, match="the weights are moved between the optimizer's step and the next batch"):
        run(Clipping(), callback, accumulate=1)
    assert all(map(math.isnan, callback.watch.history["stability/courant"].values))
