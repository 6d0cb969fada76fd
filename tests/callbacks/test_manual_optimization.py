"""Manual optimisation: what is asked for, accumulation that is declared, and a loss_fn that is another loss."""

import math
import re
import warnings
from functools import partial

import pytest
import torch
from harness import CLASSES, FEATURES, MOMENTUM, SGD, Model, data, fit, mlp, unchanged
from torch import nn

from lsp_callbacks import StabilityMonitor, StopOnInstability
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.quantities import PRESETS

KEYS = ("stability/sharpness", "stability/courant_gd", "stability/lyapunov")
QUANTITIES = ["sharpness", "lyapunov"]


def cross_entropy(module, batch):
    return Model.loss(module, batch)


class Accumulates(Model):
    """Steps after every ``k`` batches, and in the last one of an epoch; ``told`` is whether Lightning sees the loss."""

    def __init__(self, k=2, told=True, optimizer=SGD, end=True):
        super().__init__(mlp(), optimizer)
        self.automatic_optimization = False
        self.k, self.told, self.end, self.seen = k, told, end, 0

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch) / self.k
        self.manual_backward(loss) if self.told else loss.backward()
        self.seen += 1
        last = self.end and batch_idx + 1 == self.trainer.num_training_batches
        if self.seen % self.k == 0 or last:
            self.seen = 0
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def measured(make, silent=True, **settings):
    monitor = StabilityMonitor(QUANTITIES, every_n_steps=1, window=2, **settings)
    with warnings.catch_warnings():
        if silent:
            warnings.filterwarnings("error", message="lsp_callbacks")
        run = fit(make, monitor, max_steps=-1, max_epochs=3, accumulate_grad_batches=settings.get("trainers", 1))
    return monitor, run


@pytest.mark.parametrize(  # four of six batches: then two
    "k, told, optimizer",
    [(1, True, MOMENTUM), (2, True, SGD), (2, False, MOMENTUM), (4, True, MOMENTUM), (4, False, SGD)],
)
def test_declared_accumulation_is_lightnings(k, told, optimizer):
    theirs = StabilityMonitor(QUANTITIES, every_n_steps=1, window=2)
    fit(lambda: Model(mlp(), optimizer), theirs, max_steps=-1, max_epochs=3, accumulate_grad_batches=k)
    ours, run = measured(lambda: Accumulates(k, told, optimizer), loss_fn=cross_entropy, accumulate=k)
    assert ours.step == run.global_step == theirs.step
    if told:  # one loss a step, of all its batches
        assert ours.monitor.losses.count == theirs.monitor.losses.count
        assert ours.monitor.losses.first == pytest.approx(theirs.monitor.losses.first, rel=1e-6)
    for key in KEYS:
        assert ours.history[key].steps == theirs.history[key].steps
        assert ours.history[key].values == pytest.approx(theirs.history[key].values, rel=2e-2, abs=1e-4), key


def test_windows_may_cross_the_end_of_an_epoch():
    ours, run = measured(lambda: Accumulates(4, end=False), loss_fn=cross_entropy, accumulate=4)
    assert run.global_step == ours.step == 4 and ours.history[KEYS[0]].steps == [0, 1, 2, 3]
    assert all(map(math.isfinite, ours.history[KEYS[0]].values))


@pytest.mark.parametrize("told, reason", [(True, "2 times less.*accumulate=2"), (False, "cosine")])
def test_accumulation_that_is_not_declared_is_named(told, reason):
    with pytest.warns(UserWarning, match=f"loss_fn.*{reason}"):
        ours, _ = measured(lambda: Accumulates(2, told), silent=False, loss_fn=cross_entropy)
    assert all(math.isnan(v) for key in KEYS if key in ours.history for v in ours.history[key].values)


class Plain(Accumulates):
    def __init__(self, **settings):
        super().__init__(1, **settings)


@pytest.mark.parametrize(
    "make, wrong, reason",
    [
        (
            Model,
            lambda m, b: 3 * cross_entropy(m, b),
            r"at step 0 loss_fn gives [\d.]+, where the step itself",
        ),
        (Model, lambda m, b: cross_entropy(m, (b[0], (b[1] + 1) % 3)), "loss_fn gives"),
        (Plain, lambda m, b: 3 * cross_entropy(m, b), r"loss_fn gives .*, 3 times less"),
        (partial(Plain, told=False), lambda m, b: 3 * cross_entropy(m, b), r"of the gradient of loss_fn.*3 times less"),
        (partial(Plain, told=False), lambda m, b: cross_entropy(m, (b[0], (b[1] + 1) % 3)), r"their cosine -?0"),
    ],
)
def test_a_wrong_loss_fn_is_named_as_what_differs(make, wrong, reason):
    with pytest.warns(UserWarning, match=reason):
        ours, _ = measured(make, silent=False, loss_fn=wrong)
    assert all(math.isnan(v) for key in KEYS if key in ours.history for v in ours.history[key].values)


def test_gradients_of_several_backward_passes_are_those_of_the_sum():
    class Twice(Plain):
        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch))
            self.manual_backward(2 * self.loss(batch))
            self.optimizers().step()

    ours, _ = measured(Twice, loss_fn=lambda m, b: 3 * cross_entropy(m, b))
    assert all(map(math.isfinite, ours.history[KEYS[0]].values))


class Two(Plain):
    """A step for each half of the network."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(loss := self.loss(batch))
            optimizer.step()
        return {"loss": loss.detach()}

    def configure_optimizers(self):
        return [SGD(self.net[0].parameters()), SGD(self.net[2].parameters())]


class Returns(Plain):
    """The loss is returned, which Lightning does not differentiate."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return {"loss": self.loss(batch).detach()}


class Buffers(Returns):
    """Layers whose buffers move with each pass."""

    def __init__(self):
        super().__init__()
        first, last = nn.utils.spectral_norm(nn.Linear(FEATURES, 4)), nn.Linear(4, CLASSES)
        self.net = nn.Sequential(first, nn.BatchNorm1d(4), last)


@pytest.mark.parametrize(
    "make, form",
    [
        (Two, r"loss_fn=\{'generator'.*'critic'.*one for each optimizer, in the order"),
        (Returns, r"loss_fn=lambda module, batch: \.\.\.\) which returns it\)$"),
        (Buffers, r"loss_fn=lambda module, batch: \.\.\.\) which returns it\)$"),
    ],
)
def test_a_loss_that_is_not_known_leaves_what_needs_none(make, form):
    """Norms are those of automatic optimisation; the rest is left out with one warning, and training goes on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(make, callback := StabilityMonitor(every_n_steps=1), StopOnInstability(), max_steps=6)
    ours = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert len(ours) == 1 and re.search(form, ours[0])
    unchanged(make, StabilityMonitor(every_n_steps=1), max_steps=6)
    assert set(callback.skipped) == {*PRESETS["default"]} - {"spectral_norm"}
    assert callback.verdict.state == "unknown"
    norms = callback.history["stability/spectral_norm_max"]
    assert len(norms.values) == callback.step and all(map(math.isfinite, norms.values))
    exact = max(float(torch.linalg.matrix_norm(p, 2)) for p in run.model.net[-1].parameters() if p.ndim > 1)
    last = callback.history[f"stability/spectral_norm/net.{len(run.model.net) - 1}"].values[-1]
    assert last == pytest.approx(exact, rel=0.05)  # of the step before the last update
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.net if not hasattr(m, "weight_u"))


def test_what_was_named_and_needs_a_loss_raises_before_training():
    with pytest.raises(Unmeasurable, match=r"sharpness cannot be measured: automatic_optimization=False.*loss_fn"):
        fit(Plain, StabilityMonitor(["sharpness"]), max_steps=1)
    with pytest.raises(Unmeasurable, match="cannot be measured: automatic_optimization=False"):
        fit(Two, StabilityMonitor(strict=True), max_steps=1)
    fit(Plain, callback := StabilityMonitor(["spectral_norm"], every_n_steps=1), max_steps=2)
    assert len(callback.history["stability/spectral_norm_max"].values) == 2


def test_a_module_in_which_nothing_is_trained_yet_is_no_error():
    """It begins to be measured when something is unfrozen; named quantities raise."""

    class Frozen(Model):
        def __init__(self):
            super().__init__(mlp(), SGD)
            self.requires_grad_(False)

        def configure_optimizers(self):
            return SGD(self.parameters())

        def on_train_batch_start(self, batch, batch_idx):
            self.requires_grad_(batch_idx > 2)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx > 2 else None

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Frozen, callback := StabilityMonitor(every_n_steps=1), StopOnInstability(), max_steps=6)
    ours = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert any("nothing is trained, and nothing is measured until" in text for text in ours)
    assert math.isfinite(callback.history["stability/sharpness"].values[-1])
    with pytest.raises(ValueError, match=r"nothing is trained$"):
        fit(Frozen, StabilityMonitor(["sharpness"]), max_steps=1)


def test_a_second_fit_finds_the_courant_number_skipped_and_goes_on():
    run = fit(Plain, StabilityMonitor(), StopOnInstability(), max_steps=2)
    run.fit_loop.epoch_loop.max_steps = 4
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="monitor=")
        run.fit(run.model, data())
    assert run.global_step == 4


def test_accumulation_is_declared_where_it_belongs():
    with pytest.raises(ValueError, match=r"accumulate=2 is for manual.*accumulate_grad_batches"):
        fit(Model, StabilityMonitor(accumulate=2), max_steps=1)
    with pytest.raises(ValueError, match="accumulate=0"):
        StabilityMonitor(accumulate=0)
    losses = {"a": cross_entropy, "b": cross_entropy}
    with pytest.raises(ValueError, match="accumulate=2: players"):
        StabilityMonitor(loss_fn=losses, accumulate=2)
