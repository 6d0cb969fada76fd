"""Small LightningModules, each with one habit that a replay could trip over, and the fit that all tests share."""

import math
import random
import warnings
from functools import partial

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyExperiment, Logger
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import Dissipation, StabilityMonitor, StopOnInstability

SGD, MOMENTUM = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.SGD, lr=0.05, momentum=0.9)
FEATURES, CLASSES, BATCH = 6, 3, 8


class Rows(Logger):
    """A logger that remembers what it is told."""

    name, version = "rows", 0

    @property
    def experiment(self):
        return DummyExperiment()

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def curve(self, key):
        return {step: row[key] for step, row in self.rows if key in row}


class Recorded(Dissipation):
    """For runs that are shorter than its first measurement, where what is recorded is looked at."""

    least_steps = 1


class Losses(pl.Callback):
    """The loss of every batch, to the last bit."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(None if outputs is None else outputs["loss"].item())


def mlp(*middle, width=5):
    return nn.Sequential(nn.Linear(FEATURES, width), *middle, nn.Tanh(), nn.Linear(width, CLASSES))


class Model(pl.LightningModule):
    """A classifier; the zoo overrides one thing at a time."""

    def __init__(self, net=None, optimizer=SGD):
        super().__init__()
        self.net, self.optimizer = net or mlp(), optimizer

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad])

    def memory(self):
        """Python state that training leaves behind."""
        return None


def data(n=48, batch_size=BATCH, shape=(FEATURES,), dtype=torch.float32, **settings):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator, dtype=dtype)
    y = (x.flatten(1)[:, :CLASSES]).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **{"shuffle": True} | settings)


def trainer(*callbacks, lib=pl, **settings):
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_steps": 10, "max_epochs": 100,
    }  # fmt: skip
    return lib.Trainer(callbacks=list(callbacks), **quiet | settings)


def fit(model, *callbacks, loader=None, seed=0, ckpt_path=None, **settings):
    """Trains quietly a model, or what a class or function makes after the seed; returns the trainer."""
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    model = model if isinstance(model, nn.Module) else model()
    run = trainer(*callbacks, **settings)
    with warnings.catch_warnings():  # Lightning's advice; ours stays visible
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning|torch)\b")
        run.fit(model, data() if loader is None else loader, ckpt_path=ckpt_path)
    return run


def everything(trainer, model, losses, logger):
    """All that training leaves behind, ours excepted."""
    ours = "stability/"
    rows = [(step, {k: v for k, v in row.items() if not k.startswith(ours)}) for step, row in logger.rows]
    return {
        "weights and buffers": model.state_dict(),
        "optimizer": [o.state_dict() for o in trainer.optimizers],
        "gradients": [p.grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "losses": losses.losses,
        "rows": [row for row in rows if row[1]],
        "callback_metrics": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith(ours)},
        "logged_metrics": {k: v for k, v in trainer.logged_metrics.items() if not k.startswith(ours)},
        "memory": model.memory(),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor) and a.is_sparse:
        a, b = a.to_dense(), b.to_dense()
    if isinstance(a, torch.Tensor | np.ndarray):
        return type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def unchanged(make, monitor, **settings):
    """Trains twice from the same seed, without and with the monitor, and compares to the last bit."""
    left = []
    for ours in ([], [monitor, StopOnInstability(threshold=math.inf)]):
        torch.manual_seed(3)
        model, losses, logger = make(), Losses(), Rows()
        trainer = fit(model, losses, *ours, logger=logger, log_every_n_steps=1, **settings)
        left.append(everything(trainer, model, losses, logger))
    for what in left[0]:
        assert same(left[0][what], left[1][what]), what


# -- the zoo -------------------------------------------------------------------------------------------------------


class Metric(Model):
    def __init__(self):
        super().__init__(mlp(nn.Dropout(0.3)))
        from torchmetrics.classification import MulticlassAccuracy

        self.accuracy = MulticlassAccuracy(CLASSES)

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return F.cross_entropy(logits, batch[1]) * (1 + 0.1 * self.accuracy.compute())


class Counter(Model):
    seen = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return super().training_step(batch, batch_idx) * (1 + 0.1 * self.seen)

    def memory(self):
        return self.seen


class Appends(Model):
    def __init__(self):
        super().__init__()
        self.losses = []
        self.alias = {"losses": self.losses}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss))
        return loss * (1 + 0.1 * len(self.alias["losses"]))

    def memory(self):
        return self.losses


class SharedList(Model):
    """Parent and child hold one list: it must stay one list in the copy."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.net.calls = self.calls

    def training_step(self, batch, batch_idx):
        self.net.calls.append(1)
        return super().training_step(batch, batch_idx) * (1 + 0.1 * len(self.calls))

    def memory(self):
        return self.calls


class Progress(Model):
    def training_step(self, batch, batch_idx):
        trainer = self.trainer
        weight = self.global_step + 10 * self.current_epoch + trainer.num_training_batches + trainer.current_epoch
        weight += trainer.optimizers[0].param_groups[0]["lr"] + batch_idx + trainer.max_steps
        return super().training_step(batch, batch_idx) * (1 + 0.01 * weight)


class SideEffectHooks(Model):
    """Forward, backward and parameter hooks that count."""

    def __init__(self):
        super().__init__()
        count = self.count = {"forward": 0, "backward": 0, "parameter": 0}

        def bump(kind):
            def hook(*_):
                count[kind] += 1

            return hook

        self.net[0].register_forward_hook(bump("forward"))
        self.net[0].register_full_backward_hook(bump("backward"))
        self.net[0].weight.register_hook(bump("parameter"))

    def memory(self):
        return self.count


class OutputHook(Model):
    def __init__(self):
        super().__init__()
        self.net[0].register_forward_hook(lambda module, args, output: 1.5 * output)


class GradientHook(Model):
    """The gradient is not the loss's any more."""

    def __init__(self):
        super().__init__()
        self.net[0].weight.register_hook(lambda gradient: 1.5 * gradient)


class AfterBackward(Model):
    def on_after_backward(self):
        self.net[0].weight.grad.mul_(1.5)


class BeforeStep(Model):
    def on_before_optimizer_step(self, optimizer):
        self.net[0].weight.grad.data.add_(torch.randn_like(self.net[0].weight))


class PythonRandom(Model):
    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * random.random() + torch.from_numpy(np.random.randn(*x.shape)).to(x)
        return super().training_step((x, y), batch_idx)


class OwnGenerators(Model):
    def __init__(self):
        super().__init__()
        self.torch_random, self.numpy_random = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn(x.shape, generator=self.torch_random) + float(self.numpy_random.normal())
        return super().training_step((x, y), batch_idx)

    def memory(self):
        return self.torch_random.get_state(), self.numpy_random.bit_generator.state


class InPlaceBatch(Model):
    def training_step(self, batch, batch_idx):
        batch[0].mul_(0.5)
        batch.append("seen")
        return super().training_step(batch[:2], batch_idx) * len(batch)


class ReturnsDict(Model):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "extra": loss.detach()}


class OnlyBatch(Model):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class Hyperparameters(Model):
    """Keeps a network among its hyperparameters, and changes them."""

    def __init__(self, network=None, scale=1.0):
        network = network or mlp(nn.Dropout(0.2))
        super().__init__(network)
        self.save_hyperparameters({"network": network, "scale": scale})

    def training_step(self, batch, batch_idx):
        self.hparams.scale += 0.1
        return super().training_step(batch, batch_idx) * self.hparams.scale

    def memory(self):
        return self.hparams.scale, self.hparams_initial.scale


class Logs(Model):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log_dict({"loss": loss, "double": 2 * loss}, on_step=True, on_epoch=True, prog_bar=True)
        self.logger.experiment.add_scalar("loss", float(loss), self.global_step)
        self.logger.log_metrics({"direct": float(loss)}, step=self.global_step)
        self.print("quiet, please")
        return loss


class Features(Model):
    def training_step(self, batch, batch_idx):
        self.last = {"features": [self.net[0](batch[0])]}
        return super().training_step(batch, batch_idx) + 0.1 * self.last["features"][0].square().mean()


class Target(Model):
    """A moving average that training_step itself updates, in place."""

    def __init__(self):
        super().__init__()
        self.target = mlp().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        for own, target in zip(self.net.parameters(), self.target.parameters()):
            target.data.lerp_(own.data, 0.1)
        return super().training_step(batch, batch_idx) + F.mse_loss(self.net(batch[0]), self.target(batch[0]))


class Clamped(Model):
    def training_step(self, batch, batch_idx):
        for p in self.parameters():
            p.data.mul_(0.999)
        return super().training_step(batch, batch_idx)


class Closure(Model):
    """A function that holds on to the real module: a copy of it would still train the real one's buffers."""

    def __init__(self):
        super().__init__(mlp(nn.BatchNorm1d(5)))
        self.through = lambda x: self.net(x)

    def loss(self, batch):
        return F.cross_entropy(self.through(batch[0]), batch[1])


class BatchStart(Model):
    shift = 0.0

    def on_train_batch_start(self, batch, batch_idx):
        self.shift = torch.randn(())

    def loss(self, batch):
        return super().loss((batch[0] + self.shift, batch[1]))


class Scheduled(Model):
    def configure_optimizers(self):
        optimizer = MOMENTUM(self.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Sequence(nn.Module):
    """Two numbers a step, three steps."""

    def __init__(self, recurrent):
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(4, CLASSES)

    def forward(self, x):
        h = self.recurrent(F.pad(x.view(len(x), 3, 2), (0, 2)))
        return self.head((h[0] if isinstance(h, tuple) else h)[:, -1])


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x)


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    return Sequence(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), ResidualBlock(), nn.Flatten(),
        nn.Linear(12, CLASSES),
    )  # fmt: skip


def wrapped(wrap):
    net = mlp()
    net[0] = wrap(net[0])
    return Model(net)


def frozen():
    model = Model(mlp(nn.BatchNorm1d(5)))
    model.net[0].requires_grad_(False)
    return model


def tied():
    net = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 3))
    net[2].weight = net[0].weight
    return Model(net)


#: Everything is measured.
MEASURED = {
    "dropout": lambda: Model(mlp(nn.Dropout(0.3))),
    "batch_norm": lambda: Model(mlp(nn.BatchNorm1d(5))),
    "weight_norm_hook": lambda: wrapped(nn.utils.weight_norm),
    "weight_norm": lambda: wrapped(parametrizations.weight_norm),
    "momentum": lambda: Model(optimizer=MOMENTUM),
    "nesterov": lambda: Model(optimizer=partial(MOMENTUM, nesterov=True, weight_decay=1e-2)),
    "adam": lambda: Model(optimizer=partial(torch.optim.Adam, lr=1e-2)),
    "adamw": lambda: Model(optimizer=partial(torch.optim.AdamW, lr=1e-2)),
    "rmsprop": lambda: Model(optimizer=partial(torch.optim.RMSprop, lr=1e-2, momentum=0.5)),
    "adagrad": lambda: Model(optimizer=partial(torch.optim.Adagrad, lr=1e-2)),
    "scheduler": Scheduled,
    "frozen": frozen,
    "tied": tied,
    "lstm": lambda: Model(Sequence(nn.LSTM(4, 4, batch_first=True))),
    "transformer": lambda: Model(encoder(), MOMENTUM),
    "residual": lambda: Model(convolutional()),
    **{
        kind.__name__.lower(): kind
        for kind in (
            Metric, Counter, Appends, SharedList, Progress, SideEffectHooks, PythonRandom, OwnGenerators, InPlaceBatch,
            ReturnsDict, OnlyBatch, Logs, Features, Hyperparameters,
        )
    },
}  # fmt: skip

#: Their power iteration depends on the weights and is no part of the graph: no second derivative is that of training.
STOPPED = {
    "spectral_norm_hook": lambda: wrapped(nn.utils.spectral_norm),
    "spectral_norm": lambda: wrapped(parametrizations.spectral_norm),
}

#: Left out before training, with one warning: all that needs the update map. Model, Trainer arguments, the reason.
LEFT_OUT = {
    "lbfgs": (lambda: Model(optimizer=partial(torch.optim.LBFGS, lr=0.1, max_iter=4)), {}, "LBFGS"),
}

#: NaN with a reason, for everything.
REFUSED = {
    "output_hook": (OutputHook, "could not be replayed"),
    "clamped": (Clamped, "changes parameters"),
    "closure": (Closure, "the original"),
    "scripted": (lambda: wrapped(torch.jit.script), "parameters of its own"),
    "batch_start": (BatchStart, "could not be replayed"),
}

#: NaN or left out with a reason, for what needs the update map.
GRADIENT_CHANGED = {"gradient_hook": GradientHook, "after_backward": AfterBackward, "before_step": BeforeStep}


def with_and_without(make, **settings):
    monitor = StabilityMonitor("full", every_n_steps=2, window=2)
    monitor.monitor.quantities["spectral_density"].steps = 6  # its 40 only take time
    monitor.monitor.quantities["leave_one_out"].window = 4  # of its 20 a run of ten steps has none
    unchanged(make, monitor, **settings)
    return monitor


def finite(monitor, key):
    return key in monitor.history and all(map(math.isfinite, monitor.history[key].values))


def bits(value):
    """NaN equals NaN: by the bits."""
    if isinstance(value, torch.Tensor):
        return value.detach().contiguous().view(torch.uint8).tolist() if value.numel() and value.ndim else repr(value)
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [bits(one) for one in value]
    return repr(value)


class GoesOn(StopOnInstability):
    """Says when it would have stopped, and lets training go on."""

    def __init__(self):
        super().__init__(threshold=math.inf, limit=None)

    def judge(self, *args):
        super().judge(*args)
        return False


def changed_by(make, monitor, loader=None, stop=None, **settings):
    """Trains twice from the same seed; returns what is different."""
    left = []
    for ours in ([], [monitor, stop or StopOnInstability(threshold=math.inf, limit=None)]):
        losses, logger = Losses(), Rows()
        trainer = fit(make, losses, *ours, loader=None if loader is None else loader(), logger=logger, **settings)
        left.append(everything(trainer, trainer.model, losses, logger))
        if ours:
            assert all(bool(torch.isfinite(v).all()) for k, v in trainer.callback_metrics.items() if "stability" in k)
    return [what for what in left[0] if bits(left[0][what]) != bits(left[1][what])]
