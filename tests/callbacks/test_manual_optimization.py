"""Manual optimisation: what is asked for, accumulation that is declared, and a loss_fn that is another loss."""

import math
import warnings
from functools import partial

import pytest
from harness import MOMENTUM, SGD, Model, fit, mlp

from lsp_callbacks import StabilityMonitor

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


def test_with_several_optimizers_the_form_by_name_is_asked_for():
    class Two(Plain):
        def configure_optimizers(self):
            return [SGD(self.net[0].parameters()), SGD(self.net[2].parameters())]

    with pytest.raises(ValueError, match=r"loss_fn=\{'generator'.*'critic'.*one for each optimizer, in the order"):
        fit(Two, StabilityMonitor(), max_steps=1)
    with pytest.raises(ValueError, match=r"loss_fn=lambda module, batch: \.\.\.\) which returns it$"):
        fit(Plain, StabilityMonitor(), max_steps=1)


def test_accumulation_is_declared_where_it_belongs():
    with pytest.raises(ValueError, match=r"accumulate=2 is for manual.*accumulate_grad_batches"):
        fit(Model, StabilityMonitor(accumulate=2), max_steps=1)
    with pytest.raises(ValueError, match="accumulate=0"):
        StabilityMonitor(accumulate=0)
    losses = {"a": cross_entropy, "b": cross_entropy}
    with pytest.raises(ValueError, match="accumulate=2: players"):
        StabilityMonitor(loss_fn=losses, accumulate=2)
