"""Plain training loops, and what they leave behind."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import torch
from harness import MOMENTUM, data, mlp
from torch.nn import functional as F

from lsp_callbacks import Lyapunov, SGDStability, Sharpness, SpectralNorm
from lsp_callbacks.loops import Watch

SHARPNESS, LYAPUNOV, NORM = "stability/sharpness", "stability/lyapunov", "stability/spectral_norm_max"


EXAMPLES = Path(__file__).parents[1] / "examples"


def quantities():
    return [Sharpness(), Lyapunov(window=1), SGDStability(32), SpectralNorm()]


def net(*middle):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    return mlp(*middle)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def plain(
    model, make=MOMENTUM, steps=10, watch=None, loss_fn=cross_entropy, between=None, accumulate=1, closure=False, **own
):
    """Trains, with ``Watch`` where it is given as a monitor; returns watch and optimizer."""
    optimizer, loader, done = make(model.parameters()), data(), 0
    watch = watch and Watch(model, optimizer, loss_fn, watch, accumulate=accumulate, **own)
    while done < steps:
        for number, batch in enumerate(watch(loader) if watch else loader):
            if number % accumulate == 0:
                optimizer.zero_grad()
            loss = loss_fn(model, batch) / accumulate
            loss.backward()
            if (number + 1) % accumulate:
                continue
            if between:
                between(watch, model)
            optimizer.step((lambda loss=loss: loss) if closure else None)
            done += 1
            if done == steps:
                break
    return watch, optimizer


def left(model, optimizer):
    return [
        *model.state_dict().values(), torch.get_rng_state(),
        *(p.grad for p in model.parameters() if p.grad is not None),
        *(t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)),
        torch.tensor(random.random()), torch.from_numpy(np.random.rand(1)),
    ]  # fmt: skip


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
