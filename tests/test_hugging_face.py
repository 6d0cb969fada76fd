"""The Trainer of transformers: its own training loop, with and without our callback."""

import contextlib
import importlib.util
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_loops import LYAPUNOV, NORM, SHARPNESS, example, left, quantities
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers import trainer as trainer_file
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
from zoo import SGD, Model, fit

from lsp_callbacks import Monitor, StabilityMonitor
from lsp_callbacks.loops.hugging_face import StabilityCallback

if not (ACCELERATE := importlib.util.find_spec("accelerate") is not None):
    trainer_file.DistributedType = SimpleNamespace(DEEPSPEED="DEEPSPEED")


CONFIG = {"vocab_size": 17, "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Accelerator:
    """As much of accelerate's as one process on a CPU in full precision takes."""

    gradient_state = SimpleNamespace(_set_sync_gradients=lambda sync: None, plugin_kwargs={})
    distributed_type, parallelism_config, num_processes, optimizer_step_was_skipped = "NO", None, 1, False

    def no_sync(self, model):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, max_norm):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


class Wrapped:
    """Accelerate's optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)


class Loop(trainer_file.Trainer):
    """The Trainer's own ``_run_epoch`` and all that it calls, without the constructor, which needs accelerate."""

    def __init__(self, model, optimizer, loader, callbacks, *, accumulate, max_grad_norm, knows_items):
        self.args = SimpleNamespace(
            gradient_accumulation_steps=accumulate, max_grad_norm=max_grad_norm, device=torch.device("cpu"), n_gpu=1,
            logging_nan_inf_filter=False, torch_empty_cache_steps=None, optim="sgd", world_size=1,
            average_tokens_across_devices=False, include_num_input_tokens_seen="no", past_index=-1,
        )  # fmt: skip
        self.model, self.accelerator, self.optimizer = model, Accelerator(), Wrapped(optimizer)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.state, self.control = TrainerState(), TrainerControl()
        self.callback_handler = CallbackHandler(callbacks, model, None, self.optimizer, self.lr_scheduler)
        self.is_distributed_loading_by_transformers = self.is_deepspeed_enabled = False
        self.label_smoother = self.compute_loss_func = self.loss_is_scaled_for_ga = None
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = knows_items, True
        self.get_tp_size = self.get_cp_size = self.get_sp_size = lambda: 1
        self._prepare_context_parallel_inputs = lambda model, inputs: (contextlib.nullcontext, inputs)
        self._mixed_mesh_grads, self.current_flos, self._globalstep_last_logged = False, 0, 0
        self.is_fsdp_enabled = self.is_tp_enabled = False
        self.floating_point_ops = lambda inputs: 0
        self._tr_loss, self.loader = torch.tensor(0.0), loader

    def train(self, epochs):
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        batches = len(self.loader)
        for epoch in range(epochs):
            self._run_epoch(
                model=self.model, epoch=epoch, train_dataloader=self.loader, steps_in_epoch=batches,
                num_update_steps_per_epoch=math.ceil(batches / self.args.gradient_accumulation_steps), trial=None,
                ignore_keys_for_eval=None, start_time=0.0, resume_from_checkpoint=None, epochs_trained=0,
                steps_trained_in_current_epoch=0,
            )  # fmt: skip
        self.callback_handler.on_train_end(self.args, self.state, self.control)


def batches(n=5, ragged=False):
    """If ``ragged``, the batches have different numbers of tokens to predict."""
    torch.manual_seed(1)
    tokens = (torch.arange(12) + torch.randint(17, (4 * n, 1))) % 17
    labels = tokens.clone()
    for number, rows in enumerate(labels.split(4)):
        rows[:, : 2 * number * ragged] = -100
    return [{"input_ids": i, "labels": o} for i, o in zip(tokens.split(4), labels.split(4))]


def gpt2(**changes):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    return GPT2LMHeadModel(GPT2Config(**CONFIG | changes))


def run(callback=None, *, accumulate=2, max_grad_norm=0.0, knows_items=True, epochs=2):
    """Five batches an epoch: with two in a window, the last is short."""
    model = gpt2()
    optimizer = SGD(model.parameters())
    settings = {"accumulate": accumulate, "max_grad_norm": max_grad_norm, "knows_items": knows_items}
    loop = Loop(model, optimizer, batches(ragged=True), [callback] if callback else [], **settings)
    loop.train(epochs)
    return loop, left(model, optimizer)


@pytest.mark.parametrize("accumulate, knows_items", [(1, True), (2, True), (2, False)])
def test_training_is_bit_identical_and_everything_is_measured(accumulate, knows_items):
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


class Callback(Model):
    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss


@pytest.mark.parametrize("knows_items, clip", [(True, 0.0), (False, 0.0), (True, 0.1)])
def test_the_curves_are_those_of_lightnings_callback(knows_items, clip):
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
    Loop(model, SGD(model.parameters()), batches(4), [callback], **settings).train(2)
    for key in (SHARPNESS, "stability/courant_gd", LYAPUNOV, NORM, "stability/kernel_trace"):
        ours, other = callback.watch.history[key], theirs.history[key]
        assert ours.steps == other.steps and ours.values == pytest.approx(other.values, rel=1e-3), key


def test_evaluation_in_between_is_not_measured():
    class Evaluates(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model(**batches()[0])

        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()
            model(**batches()[0])

    callback, model = StabilityCallback(Monitor(*quantities(), every_n_steps=1, strict=True)), gpt2()
    settings = {"accumulate": 2, "max_grad_norm": 0.0, "knows_items": True}
    Loop(model, SGD(model.parameters()), batches(), [Evaluates(), callback], **settings).train(2)
    assert callback.watch.history[SHARPNESS].steps == [*range(6)]


@pytest.mark.skipif(not ACCELERATE, reason="the constructor of transformers.Trainer needs accelerate")
def test_the_example_runs():
    stability = example("hugging_face_trainer").train()
    assert stability.watch.history[SHARPNESS].steps == [0, 4, 8]
    assert all(map(math.isfinite, stability.watch.history["stability/courant"].values))
