"""The callback inside Lightning: when, where and what it logs, what it refuses, and that the numbers are true."""

import csv
import math
from functools import partial
from itertools import pairwise

import lightning.pytorch as unified
import pytest
import pytorch_lightning as pl
import torch
from harness import MOMENTUM, SGD, Model, Progress, ResidualBlock, Rows, Scheduled, data, encoder, fit, mlp
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lsp_callbacks import (
    LyapunovTrajectory,
    ResidualCFL,
    SGDStability,
    Sharpness,
    SpectralNorm,
    StabilityMonitor,
    StopOnInstability,
    Unmeasurable,
)

SHARPNESS, COURANT, LYAPUNOV = "stability/sharpness", "stability/courant", "stability/lyapunov"
NORM = "stability/spectral_norm_max"


def ours(caught):
    return [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]


# -- where the numbers go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lib", [pl, unified], ids=["pytorch_lightning", "lightning"])
@pytest.mark.parametrize("logger", [False, CSVLogger, TensorBoardLogger])
def test_both_packages_and_any_logger(lib, logger, tmp_path):
    class Net(lib.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return SGD(self.parameters())

    monitor = StabilityMonitor(every_n_steps=5)
    callbacks = [StopOnInstability(), monitor] if lib is pl else monitor  # a single one needs no list
    trainer = lib.Trainer(
        callbacks=callbacks, logger=logger and logger(tmp_path), max_steps=6, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(), data())
    assert {SHARPNESS, COURANT, LYAPUNOV, NORM, "stability/age"} <= trainer.callback_metrics.keys()
    assert monitor.history[SHARPNESS].steps == [0, 5] == monitor.history[LYAPUNOV].steps


class Numbered(Model):
    """Logs which batch it saw."""

    def training_step(self, batch, batch_idx):
        self.log("batch", float(batch_idx))
        return self.loss(batch)


def test_csv_rows_are_those_of_the_users_batch(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    monitor = StabilityMonitor(every_n_steps=3)
    fit(Numbered(), monitor, loader=data(shuffle=False), logger=logger, log_every_n_steps=1, max_epochs=2, max_steps=-1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    sharpness = {int(row["step"]): float(row[SHARPNESS]) for row in rows if row[SHARPNESS]}
    batches = {int(row["step"]): int(float(row["batch"])) for row in rows if row["batch"]}
    assert list(sharpness) == monitor.history[SHARPNESS].steps == [0, 3, 6, 9]
    assert list(sharpness.values()) == pytest.approx(monitor.history[SHARPNESS].values)
    assert batches == {step: step % 6 for step in range(12)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_our_row_has_the_number_of_the_users_row_of_the_same_batch(accumulate):
    rows = Rows()
    monitor = StabilityMonitor("spectral_norm", every_n_steps=2)
    fit(Numbered(), monitor, logger=rows, log_every_n_steps=1, max_steps=6, accumulate_grad_batches=accumulate)
    pairs = [(i, step) for i, (step, row) in enumerate(rows.rows) if NORM in row]
    assert [step for _, step in pairs] == monitor.history[NORM].steps == [0, 2, 4]
    for i, step in pairs:  # the user's own row of the batch is written next
        assert rows.rows[i + 1][0] == step and "batch" in rows.rows[i + 1][1]
    assert [rows.curve("batch")[step] for _, step in pairs] == [(accumulate * (s + 1) - 1) % 6 for s in (0, 2, 4)]


class Breaks(Model):
    """The loss is NaN from the given step on."""

    at = 4

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (math.nan if self.global_step >= self.at else 1.0)


@pytest.mark.parametrize("settings", [{}, {"sub_batch": 4}])
def test_nan_goes_to_the_loggers_only(settings):
    quantities = ["spectral_norm", "sharpness", SGDStability(8), "lyapunov"]  # the probes are one batch
    rows, monitor = Rows(), StabilityMonitor(quantities, every_n_steps=1, window=1, **settings)
    with pytest.warns(UserWarning) as caught:
        trainer = fit(Breaks(), monitor, logger=rows)
    said = [message for message in ours(caught) if "sub-batch" not in message]
    assert len(said) == 1 and "the loss of step 4 is not finite" in said[0]
    assert trainer.global_step == 10
    for key in (SHARPNESS, COURANT, NORM):
        finite = [math.isfinite(value) for value in rows.curve(key).values()]
        assert finite == [True] * 4 + [False] * 6
        assert trainer.callback_metrics[key] == pytest.approx(monitor.history[key].values[3])
    assert all(value.isfinite() for key, value in trainer.callback_metrics.items() if key != "loss")
    assert trainer.progress_bar_metrics["courant"] == round(monitor.history[COURANT].values[3], 3)


def test_stock_callbacks_find_their_key(tmp_path):
    stop = EarlyStopping(COURANT, strict=False, check_finite=False, patience=100)
    save = ModelCheckpoint(tmp_path, monitor=COURANT, filename="{stability/courant:.4f}")
    monitor = StabilityMonitor(every_n_steps=1)
    fit(Model(), stop, save, monitor, loader=data(), max_epochs=2, max_steps=-1, enable_checkpointing=True)
    values = dict(zip(monitor.history[COURANT].steps, monitor.history[COURANT].values))
    assert list(values) == [*range(12)]
    assert stop.best_score == pytest.approx(min(values[5], values[11])) == save.best_model_score


def test_the_first_step_is_measured_and_the_budget_says_when_the_next():
    monitor = StabilityMonitor("economy", budget=0.85)
    trainer = fit(Model(), monitor, max_steps=600)
    account = monitor.monitor.cadence.account
    far = 1 / account.budget, account.period("sharpness")  # the rate is a hundredth of the critical one
    steps = monitor.history[COURANT].steps
    assert steps[0] == 0 and len(steps) > 5
    gaps = {b - a for a, b in pairwise(steps) if a > 200}  # shorter beside a norm, whose hooks and replay it shares
    assert math.ceil(min(far)) <= min(gaps) and max(gaps) <= math.ceil(max(far))
    assert 0.5 * account.income * 600 < account.spent <= account.income * 600 + account.advance
    assert trainer.callback_metrics["stability/age"] == 599 - max(c.steps[-1] for c in monitor.history.values())
    assert 0 < trainer.callback_metrics["stability/overhead"] < 1 and 0 < monitor.overhead < 1


@pytest.mark.parametrize("log_layers, layers", [("all", 3), ("summary", 0), ("histogram", 0), (1, 1), (2, 2), (9, 3)])
def test_layers_are_logged_as_asked(log_layers, layers):
    rows = Rows()
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    monitor = StabilityMonitor("spectral_norm", log_layers=log_layers)
    trainer = fit(Model(net), monitor, logger=rows, max_steps=1)
    logged = {k: v for _, row in rows.rows for k, v in row.items() if k.startswith("stability/spectral_norm/")}
    assert len(logged) == layers and rows.curve(NORM).keys() == {0}
    assert sum(k.count("/") == 2 for k in monitor.history) == 3  # the history has them all
    assert not [k for k in trainer.callback_metrics if k.count("/") == 2]
    if layers in (1, 2):
        assert max(logged.values()) == monitor.history[NORM].values[0]


def test_no_key_is_also_a_folder():
    class Deep(nn.Sequential):
        pass

    monitor = StabilityMonitor("full", every_n_steps=1)
    fit(Model(Deep(encoder(), nn.Linear(3, 3))), monitor, max_steps=6)
    keys = monitor.history.keys()
    assert not [key for key in keys if any(other.startswith(key + "/") for other in keys)]


# -- ways to train -------------------------------------------------------------------------------------------------


class Skips(Model):
    """Every third training_step returns None."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


def test_steps_without_a_loss_are_not_measured():
    rows, monitor = Rows(), StabilityMonitor("sharpness", every_n_steps=1)
    fit(Skips(), monitor, logger=rows, max_epochs=1, max_steps=-1, log_every_n_steps=1)
    assert monitor.history[SHARPNESS].steps == list(rows.curve(SHARPNESS)) == [0, 2, 3, 5]


def test_fast_dev_run_and_validation_in_between():
    monitor = StabilityMonitor(every_n_steps=1)
    fit(Model(), monitor, fast_dev_run=True)
    assert monitor.history[SHARPNESS].steps == [0]
    model, monitor = Model(mlp(nn.BatchNorm1d(5))), StabilityMonitor(every_n_steps=1)
    trainer = pl.Trainer(
        callbacks=monitor, max_epochs=2, val_check_interval=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, data(), data())
    assert monitor.history[SHARPNESS].steps == [*range(12)]
    assert monitor.history[LYAPUNOV].steps == [*range(12)]
    assert "val_loss" in trainer.callback_metrics
    trainer.validate(model, data(), verbose=False)  # a stage that is not ours
    assert monitor.history[SHARPNESS].steps == [*range(12)]


def test_a_new_run_starts_afresh_and_a_longer_one_goes_on():
    monitor = StabilityMonitor(every_n_steps=1, window=4)
    trainer = fit(Model(), monitor, max_epochs=1, max_steps=-1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.model, data())
    assert monitor.history[SHARPNESS].steps == [*range(12)]
    assert monitor.history[LYAPUNOV].steps == [3, 9]  # the window that the end of the first fit cut is gone
    with pytest.warns(UserWarning, match="Adadelta"):
        fit(Model(optimizer=torch.optim.Adadelta), monitor, max_steps=3)
    assert LYAPUNOV not in monitor.history and monitor.history[NORM].steps == [0, 1, 2]
    fit(Model(mlp(width=7)), monitor, max_steps=4)
    assert monitor.history[SHARPNESS].steps == [*range(4)] and monitor.history[LYAPUNOV].steps == [3]


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_modules_that_build_themselves_late(hook):
    class Late(Model):
        def __init__(self):
            super().__init__()
            del self.net

    setattr(Late, hook, lambda self, stage=None: setattr(self, "net", mlp()))
    monitor = StabilityMonitor("spectral_norm", layers="net.0")
    fit(Late(), monitor, max_steps=1)
    assert "stability/spectral_norm/net.0" in monitor.history


def test_a_step_that_fetches_its_own_batch_is_refused():
    class Fetches(Model):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    monitor = StabilityMonitor(every_n_steps=1)
    with pytest.warns(UserWarning) as caught:
        trainer = fit(Fetches(), monitor, max_steps=4)
    assert trainer.global_step == 4 and len(ours(caught)) == 1
    assert all(map(math.isnan, monitor.history[SHARPNESS].values))


@pytest.mark.parametrize("how", ["module", "submodule", "in_place"])
def test_compiled_modules_are_replayed_eagerly(how):
    class Plain(Model):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    model = compiled = Plain(mlp(nn.Dropout(0.2)))
    if how == "module":
        compiled = torch.compile(model, backend="eager")
    elif how == "submodule":
        model.net = torch.compile(model.net, backend="eager")
    else:
        model.net.compile(backend="eager")
    monitor = StabilityMonitor(every_n_steps=1)
    fit(compiled, monitor, max_steps=5)
    assert all(map(math.isfinite, monitor.history[SHARPNESS].values)) and LYAPUNOV in monitor.history


def own_loss(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


class Uncopyable(Model):
    def __init__(self):
        super().__init__(mlp(nn.Dropout(0.3)))
        self.open = (i for i in range(3))


@pytest.mark.parametrize("settings", [{}, {"loss_fn": own_loss}, {"sub_batch": 2}])
def test_a_module_that_cannot_be_copied_is_trained_all_the_same(settings):
    monitor = StabilityMonitor(every_n_steps=1, **settings)
    with pytest.warns(UserWarning) as caught:
        assert fit(Uncopyable(), monitor, max_steps=3).global_step == 3
    said = [message for message in ours(caught) if "sub-batch" not in message]
    assert len(said) == 1 and "cannot be copied" in said[0] and "generator" in said[0]


def test_a_loss_function_replaces_the_step():
    class Unreplayable(Progress):
        def training_step(self, batch, batch_idx):
            self.outside = getattr(type(self), "outside", 0)
            type(self).outside = self.outside + 1
            return self.loss(batch) + 0.0 * type(self).outside

    found = []
    for settings in ({}, {"loss_fn": own_loss}):
        monitor = StabilityMonitor(every_n_steps=1, **settings)
        fit(Unreplayable, monitor, max_steps=5)
        found.append(monitor.history[SHARPNESS].values)
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    with pytest.warns(UserWarning, match="could not be replayed"):
        fit(Model(), StabilityMonitor("sharpness", loss_fn=lambda m, b: 2 * own_loss(m, b)), max_steps=1)


class Manual(Model):
    """Manual optimisation; ``inner`` updates a batch, each of ``backward`` passes."""

    def __init__(self, optimizers=1, inner=1, backward=1, lightning=True):
        super().__init__(mlp(nn.Dropout(0.2) if backward == 1 else nn.Identity()))
        self.automatic_optimization = False
        self.optimizers_, self.inner, self.backward_, self.lightning = optimizers, inner, backward, lightning

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers] * self.inner:
            optimizer.zero_grad()
            for _ in range(self.backward_):
                loss = self.loss(batch)
                self.manual_backward(loss) if self.lightning else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.log("loss", loss)

    def configure_optimizers(self):
        return [SGD(layer.parameters()) for layer in (self.net, self.net[0])][: self.optimizers_]


@pytest.mark.parametrize(
    "settings, measured, reason",
    [
        ({}, True, None),
        ({"lightning": False}, True, None),
        ({"optimizers": 2}, False, "several optimizers"),
        ({"inner": 2}, False, "2 optimizer steps"),
        ({"backward": 2}, False, "several backward passes"),
    ],
)
def test_manual_optimisation(settings, measured, reason, recwarn):
    outputs = {
        "forward_fn": lambda module, batch: module.net(batch[0]),
        "criterion": lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
    }
    rows, monitor = Rows(), StabilityMonitor(every_n_steps=3, window=1, loss_fn=own_loss, **outputs)
    fit(Manual(**settings), monitor, logger=rows, max_epochs=2, max_steps=-1, log_every_n_steps=1)
    said = ours(recwarn)
    assert len(said) == (reason is not None) and all(reason in message for message in said)
    assert list(rows.curve(NORM)) == monitor.history[NORM].steps == [0, 3, 6, 9]
    assert all(map(math.isfinite, monitor.history[NORM].values))
    curvature = measured or "inner" in settings  # that of the first step's own loss
    for key, there in ((SHARPNESS, curvature), (LYAPUNOV, measured), (COURANT, measured)):
        values = monitor.history[key].values if key in monitor.history else []
        assert [math.isfinite(v) for v in values] == [there] * len(values) and (values or not there)


def test_a_sub_batch_is_announced_and_measured():
    full, part = (StabilityMonitor(["sharpness"], every_n_steps=1, sub_batch=n) for n in (None, 4))
    fit(Model, full, max_steps=3)
    with pytest.warns(UserWarning, match="sub_batch=4"):
        fit(Model, part, max_steps=3)
    values = full.history[SHARPNESS].values, part.history[SHARPNESS].values
    assert all(map(math.isfinite, values[1])) and values[0] != pytest.approx(values[1], rel=1e-3)
    with pytest.warns(UserWarning, match="sub_batch=8"):
        fit(Model, same := StabilityMonitor(["sharpness"], every_n_steps=1, sub_batch=8), max_steps=3)
    assert same.history[SHARPNESS].values == values[0]


class Casts(Model):
    """Autocast of its own: no plugin tells."""

    def loss(self, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return super().loss(batch)


@pytest.mark.parametrize("precision, kind", [("bf16-mixed", Model), ("32-true", Casts), ("64-true", Model)])
def test_other_precisions(precision, kind, monkeypatch):
    from lsp_callbacks.quantities.curvature import sharpness as lanczos

    # Lanczos to its end: it starts from other noise in each precision, which is no part of what is compared.
    for name, value in (("_TOLERANCE", 1e-3), ("_BOUNDED_WARM", 40), ("_BOUNDED_COLD", 40)):
        monkeypatch.setattr(lanczos, name, value)
    quantities = [Sharpness(bounded=True), "mean_square_stability", "lyapunov", "spectral_norm"]
    found = []
    for model, settings in ((Model, {}), (kind, {"precision": precision})):
        monitor = StabilityMonitor(quantities, every_n_steps=1, window=2)
        fit(model, monitor, max_steps=3, **settings)
        found.append([monitor.history[key].values for key in (SHARPNESS, COURANT, LYAPUNOV, NORM)])
    for a, b in zip(*found):
        assert a == pytest.approx(b, rel=0.05)


def test_a_noisy_gradient_is_reported_by_strict():
    class Noisy(Model):
        def on_before_optimizer_step(self, optimizer):
            self.net[0].weight.grad.add_(0.1)

    with pytest.raises(Unmeasurable, match="gradient was changed"):
        fit(Noisy(), StabilityMonitor(strict=True))


def test_a_gradient_that_is_only_looked_at_is_fine(recwarn):
    class Looks(Model):
        def on_before_optimizer_step(self, optimizer):
            nn.utils.clip_grad_norm_(self.parameters(), 1e6)

    class Clears(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.zero_grad()

    monitor = StabilityMonitor(every_n_steps=1)
    fit(Looks(), Clears(), monitor)
    assert not ours(recwarn) and len(monitor.history[SHARPNESS].steps) == 10


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantities": "sharpnes"}, "quantities='sharpnes'"),
        ({"quantities": ["sharpness", "nothing"]}, "quantities='nothing'"),
        ({"quantities": ["sharpness", "sharpness"]}, "once"),
        ({"quantities": []}, "empty"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"budget": 0}, "budget=0"),
        ({"window": 0}, "window=0"),
        ({"average": 0}, "average=0"),
        ({"sub_batch": 0}, "sub_batch=0"),
        ({"log_layers": "none"}, "log_layers='none'"),
        ({"log_layers": 0}, "log_layers=0"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        StabilityMonitor(**settings)


@pytest.mark.parametrize(
    "monitor, make, trainer, message",
    [
        (lambda: StabilityMonitor(layers="nothing.*"), Model, {}, "layers='nothing"),
        (lambda: StabilityMonitor(blocks="nothing.*"), Model, {}, "blocks='nothing"),
        (lambda: StabilityMonitor(blocks=ResidualBlock), Model, {}, "blocks="),
        (lambda: StabilityMonitor(strict=True), lambda: Model().requires_grad_(False), {}, "no parameter"),
        (lambda: StabilityMonitor(strict=True), Manual, {}, "loss_fn"),
        (lambda: StabilityMonitor(strict=True), lambda: Model(optimizer=torch.optim.Adadelta), {}, "Adadelta"),
        (lambda: StabilityMonitor("lyapunov"), lambda: Model(optimizer=torch.optim.Adadelta), {}, "lyapunov.*Adadelta"),
        (lambda: StabilityMonitor([SpectralNorm(layers="nothing.*")]), Model, {}, "layers='nothing"),
        (lambda: StabilityMonitor([ResidualCFL()]), Model, {}, "residual_cfl cannot be measured: no residual block"),
        (lambda: StabilityMonitor("spectral_norm"), lambda: Model(Scale()), {}, "no layer has a linear part"),
        (lambda: StabilityMonitor([LyapunovTrajectory()]), Model, {"max_steps": 9}, "takes 200 steps, and the run"),
        (lambda: StabilityMonitor("dissipation"), Model, {"max_steps": 9}, "takes 60 steps, and the run has 9"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(monitor, make, trainer, message):
    class Untouched(Callback):
        def on_train_batch_start(self, *args):
            raise AssertionError("training began")

    model = make()
    if not any(p.requires_grad for p in model.parameters()):
        model.configure_optimizers = lambda: None
    with pytest.raises(ValueError, match=message):
        fit(model, monitor(), Untouched(), **trainer)


def test_what_a_preset_brings_and_does_not_apply_is_skipped_without_a_warning(recwarn):
    """Not even under strict: nothing has failed. One place says it afterwards."""
    monitor = StabilityMonitor(every_n_steps=1, window=5, strict=True)
    fit(Model, monitor, max_steps=4)
    assert not ours(recwarn)
    assert {name: why.split(":")[0] for name, why in monitor.skipped.items()} == {
        "residual_cfl": "no residual block x + g(x) was recognised in this network",
        "lyapunov": "it takes 5 steps, and the run has 4",
    }
    assert "stability/residual_stiffness_max" not in monitor.history


class Scale(nn.Module):
    """A trained factor and no layer that is known."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x[:, :3] * self.factor


def test_strict_raises_at_the_step():
    with pytest.raises(Unmeasurable, match="loss of step 4 is not finite"):
        fit(Breaks(), StabilityMonitor(every_n_steps=1, strict=True))


def test_quantities_can_be_given_ready_made():
    monitor = StabilityMonitor(["sharpness", SpectralNorm(layers="net.0"), LyapunovTrajectory(transient=0, window=40)])
    fit(Model(), monitor, max_steps=40)
    assert "stability/spectral_norm/net.0" in monitor.history and "stability/spectral_norm/net.2" not in monitor.history
    assert abs(monitor.history["stability/lyapunov_trajectory"].values[0]) < 0.1


# -- the truth -----------------------------------------------------------------------------------------------------


class Witness(Callback):
    """Weights, momentum, rates and batch of every step, read by other means than the monitor's."""

    def __init__(self):
        self.steps = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.before = torch.cat([p.detach().reshape(-1).clone() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append((self.before, batch, self.rate))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]


def dense_hessian(model, flat, batch):
    names, parameters = zip(*model.named_parameters())

    def loss(vector):
        parts = vector.split([p.numel() for p in parameters])
        values = {n.removeprefix("net."): part.view_as(p) for n, p, part in zip(names, parameters, parts)}
        return F.cross_entropy(functional_call(model.net, values, (batch[0],)), batch[1])

    return torch.autograd.functional.hessian(loss, flat)


RULES = {
    "sgd": (partial(SGD, lr=0.5), {}),
    "momentum": (partial(MOMENTUM, lr=0.2), {}),
    "nesterov": (partial(MOMENTUM, lr=0.2, nesterov=True), {}),
    "decay": (partial(MOMENTUM, lr=0.2, weight_decay=0.1, dampening=0.2), {}),
    "scheduler": (partial(SGD, lr=0.5), {"gamma": 0.8}),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_numbers_are_those_of_dense_matrices(rule, monkeypatch):
    """Sharpness, Courant number and exponent against dense Hessians and Jacobians, at the step that logged them."""
    from lsp_callbacks.quantities.curvature import sharpness as settings

    # Lanczos to the end: what is tested is which step, rate, batch and state were measured.
    for name, value in (("_TOLERANCE", 1e-9), ("_BOUNDED_WARM", 60), ("_BOUNDED_COLD", 60)):
        monkeypatch.setattr(settings, name, value)
    make, scheduler = RULES[rule]

    class Double(Scheduled):
        def configure_optimizers(self):
            optimizer = make(self.parameters())
            if not scheduler:
                return optimizer
            decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, **scheduler)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    torch.manual_seed(0)
    model = Double(nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3))).double()
    rows, witness, window = Rows(), Witness(), 3
    quantities = [Sharpness(bounded=True), "lyapunov"]
    monitor = StabilityMonitor(quantities, every_n_steps=2, window=window, average=1)
    fit(model, witness, monitor, loader=data(dtype=torch.float64), logger=rows, max_steps=9)

    options = make([torch.zeros(1, requires_grad=True)]).defaults
    beta, tau, decay = (float(options[k]) for k in ("momentum", "dampening", "weight_decay"))
    c = (2 + 2 * beta) / (1 + 2 * beta) if options["nesterov"] else (2 + 2 * beta) / (1 - tau)
    H = [dense_hessian(model, flat, batch) for flat, batch, _ in witness.steps]
    rate = [rate for _, _, rate in witness.steps]
    top = [torch.linalg.eigvalsh(h)[-1].item() for h in H]

    assert list(rows.curve(SHARPNESS)) == [0, 2, 4, 6, 8]
    for step, value in rows.curve(SHARPNESS).items():
        assert value == pytest.approx(top[step], rel=1e-5)
    for step, value in rows.curve(COURANT).items():
        assert value == pytest.approx(rate[step] * (top[step] + decay) / c, rel=1e-5)

    first = 3 if beta else 2  # in the first step there is no momentum
    assert list(rows.curve(LYAPUNOV)) == [first, 6]
    for step, value in rows.curve(LYAPUNOV).items():
        start, n = 0 if step == first else 4, len(H[0])
        mode, eye = torch.linalg.eigh(H[start])[1][:, -1:], torch.eye(n, dtype=torch.float64)
        plane = torch.block_diag(mode, mode) if beta else torch.cat([mode, 0 * mode])
        product = torch.eye(plane.shape[1], dtype=torch.float64)
        for k in range(step - window + 1, step + 1):
            B = H[k] + decay * eye
            gain = 1.0 if k == 0 else 1 - tau
            m = torch.cat([gain * B, beta * eye], 1)  # the new buffer, as a function of (v, m)
            moved = torch.cat([B, 0 * eye], 1) + beta * m if options["nesterov"] else m
            v = torch.cat([eye, 0 * eye], 1) - rate[k] * moved
            # Compressed step by step: of a product of whole Jacobians the other directions would have their share.
            product = plane.T @ torch.cat([v, m]) @ plane @ product
        growth = torch.linalg.eigvals(product).abs().max()
        assert value == pytest.approx(growth.log().item() / window, abs=2e-5)


class OneNumber(Model):
    """A loss of shape (1,), which ``backward`` takes as well."""

    def loss(self, batch):
        return super().loss(batch)[None]


def test_a_loss_of_one_number_may_have_any_shape():
    settings = {"quantities": ["sharpness", "lyapunov", "secant_ratio"], "every_n_steps": 1}
    found = [StabilityMonitor(**settings) for _ in range(2)]
    for make, monitor in zip((Model, OneNumber), found):
        fit(make, monitor, max_steps=6)
    assert found[0].history.keys() == found[1].history.keys() >= {SHARPNESS, LYAPUNOV}
    for key, curve in found[0].history.items():
        assert found[1].history[key].values == pytest.approx(curve.values, rel=1e-6, nan_ok=True), key
    assert all(map(math.isfinite, found[1].history[SHARPNESS].values))


def test_a_run_that_was_broken_off_within_a_step_leaves_nothing_to_the_next():
    class Breaks(Model):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            if self.global_step == 3:
                raise KeyError("in the middle of step 2")

    heard = []

    class Hears:
        event_step = stop_step = reason = None

        def receive(self, trainer, observation):
            heard.append(observation.step)

        def end_step(self, trainer, step, told): ...

    monitor = StabilityMonitor(["spectral_norm"], every_n_steps=1)
    with pytest.raises(KeyError):
        fit(Breaks, monitor, max_steps=5)
    monitor.subscribers.append(Hears())
    fit(Model, monitor, max_steps=3)
    assert heard == [0, 1, 2]
