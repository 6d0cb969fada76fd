"""Games in a real Trainer: manual optimisation with several optimizers, each with a loss of its own."""

import contextlib
import copy
import math
from functools import partial

import pytest
import torch
from games import ADAM, GAN, LOSSES, monitor
from harness import Model, fit, unchanged
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import LyapunovTrajectory, Snapshot, StabilityMonitor
from lsp_callbacks.quantities import PRESETS, REGISTRY
from lsp_callbacks.report import verdict
from lsp_callbacks.step.pending_step import never

EXPONENT, COURANT, SHARPNESS = (f"stability/{key}" for key in ("lyapunov_trajectory", "courant_gd", "sharpness"))


def finite(callback, key):
    return key in callback.history and all(map(math.isfinite, callback.history[key].values))


@pytest.mark.parametrize("noise, activation", [("twice", nn.Tanh), ("once", nn.LeakyReLU)])
def test_a_gan_is_measured_and_unchanged(noise, activation, recwarn):
    """With the other player's gradients switched off, and without: the same numbers to the last bit."""
    found = []
    for toggle in (True, False):
        callback = monitor()
        unchanged(lambda t=toggle: GAN(noise, t, activation), callback, max_steps=12)
        assert len(callback.history[COURANT].steps) == 5  # one a turn, from Adam's second gradient on
        # Transient and window are rounded up to whole turns.
        assert callback.history[EXPONENT].steps == [9]
        assert finite(callback, COURANT) and finite(callback, EXPONENT)
        players = [callback.history[f"stability/player_courant/{name}"].values for name in LOSSES]
        assert callback.history[COURANT].values == list(map(max, *players))
        found.append({key: (curve.steps, curve.values) for key, curve in callback.history.items()})
    assert found[0] == found[1]
    assert not [w for w in recwarn if "lsp_callbacks" in str(w.message)]


class EveryOther(GAN):
    """The generator steps at every other batch."""

    def plays(self, name, batch_idx):
        return name == "critic" or batch_idx % 2 == 0


class Three(GAN):
    """The generator's last layer has an optimizer of its own, of another kind."""

    def training_step(self, batch, batch_idx):
        losses = (self.generator_loss, self.critic_loss, lambda batch: self.generator_loss(batch).square())
        for optimizer, loss in zip(self.optimizers(), losses):
            value = self.turn(optimizer, partial(loss, batch))
        return {"loss": value.detach()}

    def configure_optimizers(self):
        momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.7)
        parts = ((ADAM, self.generator[0]), (momentum, self.net), (ADAM, self.generator[3]))
        return [make(part.parameters()) for make, part in parts]


THREE = LOSSES | {"last": lambda module, batch: module.generator_loss(batch).square()}


@pytest.mark.parametrize("make, losses", [(GAN, LOSSES), (EveryOther, LOSSES), (Three, THREE)])
def test_the_exponent_is_that_of_two_neighbouring_runs(make, losses):
    """``log(||theta_T - theta'_T|| / ||theta_0 - theta'_0||) / T`` of real training, T optimizer steps."""

    class Apart(make):
        """The same run from a displaced start; ends where it is asked to."""

        def __init__(self, displacement=None, steps=None):
            super().__init__("batch")
            self.displacement = displacement

        def on_train_start(self):
            if self.displacement is not None:
                for p, part in zip(self.parameters(), self.displacement):
                    p.data.add_(part.view_as(p) if part.ndim else part)

    settings = {"precision": "64-true", "loader": None}
    window = 42  # whole batches of each
    trajectory = LyapunovTrajectory(transient=0, window=window, method="exact")
    callback = StabilityMonitor(trajectory, every_n_steps=1000, loss_fn=losses)
    models = []

    def run(displacement, *callbacks):
        torch.manual_seed(5)
        model = Apart(displacement)
        models.append(model)
        fit(model, *callbacks, **settings | {"max_steps": window})
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    run(None, callback)
    held = {id(p) for one in models[0].trainer.optimizers for group in one.param_groups for p in group["params"]}
    sizes = [p.numel() * (id(p) in held) for p in models[0].parameters()]
    generator = Snapshot(0, models[0], never).generator("lyapunov_trajectory")
    v = torch.randn(1, sum(sizes), generator=generator, dtype=torch.float64)[0]
    parts = [part if len(part) else torch.zeros(()) for part in (1e-7 * v / v.norm()).split(sizes)]
    ahead, behind = run(parts), run([-part for part in parts])
    expected = math.log(float((ahead - behind).norm()) / 2e-7) / window
    assert callback.history[EXPONENT].steps == [window - 1]
    assert callback.history[EXPONENT].values == pytest.approx([expected], abs=2e-6)


def test_a_player_that_steps_seldom_is_waited_for_and_one_that_never_does_is_given_up():
    callback = monitor(["sharpness"])
    fit(EveryOther, callback, max_steps=12)
    # Generator, critic; critic alone. A measurement ends when both have stepped, and Adam's begins with two gradients.
    assert callback.history[COURANT].steps == [3, 6, 9]
    assert finite(callback, COURANT)

    class Never(GAN):
        def plays(self, name, batch_idx):
            return name == "critic"

    with pytest.warns(UserWarning, match="player generator has not stepped for 16 steps"):
        fit(Never, never_complete := monitor(["sharpness"]), max_steps=20)
    assert never_complete.history[COURANT].steps == [17] and math.isnan(never_complete.history[COURANT].values[0])


class Simultaneous(GAN):
    """At so small a rate that the gradients hardly differ."""

    def __init__(self, noise):
        super().__init__(noise, optimizer=partial(torch.optim.SGD, lr=1e-7))

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = [self.generator_loss(batch), self.critic_loss(batch, detach=True)]
        for loss, part in zip(losses, (self.generator, self.net)):
            loss.backward(inputs=list(part.parameters()))
        for optimizer in optimizers:
            optimizer.step()
        return {"loss": losses[0].detach()}


class Stale(GAN):
    """The critic sees the fakes of the generator as it was before its step."""

    def training_step(self, batch, batch_idx):
        fake = self.generator(self.draw(batch))
        self.turn(self.optimizers()[0], partial(self.generator_loss, batch))
        loss = lambda: F.softplus(-self.net(batch[0])).mean() + F.softplus(self.net(fake.detach())).mean()  # noqa: E731
        return {"loss": self.turn(self.optimizers()[1], loss).detach()}


class Clipped(GAN):
    def before(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")


class Between(GAN):
    """Draws numbers that the losses do not."""

    def turn(self, optimizer, loss):
        torch.rand(())
        return super().turn(optimizer, loss)


REFUSED = {
    "simultaneous": (Simultaneous, "simultaneous steps are not modelled"),
    "stale": (Stale, "is not that of its loss_fn"),
    "clipped": (Clipped, "is not that of its loss_fn"),
    "noise": (Between, "put the noise into the batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_players_step_is_refused(name):
    make, reason = REFUSED[name]
    callback = monitor(["sharpness", "lyapunov_trajectory"])
    with pytest.warns(UserWarning) as caught:
        unchanged(lambda: make("batch" if name in ("simultaneous", "stale") else "twice"), callback, max_steps=8)
    ours = [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]
    assert ours and all(reason in one for one in ours), ours
    # A player that steps first may be what it says; the whole turn never is.
    for key in (COURANT, EXPONENT):
        assert not [v for v in callback.history[key].values if math.isfinite(v)]


def test_a_loss_that_detaches_the_other_player_has_no_exponent_and_every_edge():
    losses = LOSSES | {"critic": lambda module, batch: module.critic_loss(batch, detach=True)}
    callback, joined = monitor(losses=losses), monitor()
    with pytest.warns(UserWarning, match=r"'critic' detaches the other players' parameters"):
        fit(GAN, callback, max_steps=8)
    fit(GAN, joined, max_steps=8)
    assert all(map(math.isnan, callback.history[EXPONENT].values)) and EXPONENT not in joined.history
    # Exact products on one side, which the detached tensors ask for, and finite differences on the other.
    assert callback.history[COURANT].values == pytest.approx(joined.history[COURANT].values, rel=2e-3)


class WeightClipping(GAN):
    def training_step(self, batch, batch_idx):
        result = super().training_step(batch, batch_idx)
        for p in self.net.parameters():
            p.data.clamp_(-0.1, 0.1)
        return result


class Average(GAN):
    """What no optimizer holds may move as it likes."""

    def __init__(self):
        super().__init__()
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        result = super().training_step(batch, batch_idx)
        for own, mean in zip(self.generator.parameters(), self.average.parameters()):
            mean.data.lerp_(own.data, 0.1)
        return result


def test_clipped_weights_break_the_product_and_an_average_does_not():
    callback = monitor()
    with pytest.warns(UserWarning, match="moved between the steps"):
        fit(WeightClipping, callback, max_steps=8)
    assert finite(callback, COURANT) and all(map(math.isnan, callback.history[EXPONENT].values))
    fit(Average, callback := monitor(), max_steps=10)
    assert finite(callback, COURANT) and finite(callback, EXPONENT)


def test_what_belongs_to_one_loss_is_left_out():
    with pytest.warns(UserWarning, match="several players") as caught:
        fit(GAN, callback := StabilityMonitor("full", every_n_steps=1, loss_fn=LOSSES), max_steps=8)
    single = {name for name in PRESETS["full"] if not REGISTRY[name].supports_multiple_optimizers}
    assert set(callback.skipped) == single | {"residual_cfl"}  # there is no residual block
    assert len([w for w in caught if "lsp_callbacks" in str(w.message)]) == 1
    assert finite(callback, COURANT) and finite(callback, "stability/spectral_norm_max")
    with pytest.raises(ValueError, match=r"lyapunov cannot be measured: several players \(generator, critic\)"):
        fit(GAN, StabilityMonitor(["lyapunov"], loss_fn=LOSSES))


@pytest.mark.parametrize(
    "losses, reason",
    [
        ({"one": len}, "two players or more"),
        ({"a/b": len, "c": len}, "'a/b' is no name"),
        ({"a": len, "b": "b"}, r"loss_fn\['b'\]='b'"),
    ],
)
def test_bad_losses(losses, reason):
    with pytest.raises(ValueError, match=reason):
        StabilityMonitor(loss_fn=losses)


def test_losses_that_do_not_fit_the_run():
    with pytest.raises(ValueError, match=r"names 3 players \(generator, critic, last\), .* returns 2 optimizers"):
        fit(GAN, StabilityMonitor(loss_fn=THREE))
    with pytest.raises(ValueError, match="automatic_optimization=False"):
        fit(Model, StabilityMonitor(loss_fn=LOSSES))
    with pytest.raises(ValueError, match="sub_batch"):
        StabilityMonitor(loss_fn=LOSSES, sub_batch=4)


def test_the_optimizers_have_their_hooks_back():
    class Fails(GAN):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("a user's")
            return super().training_step(batch, batch_idx)

    for make in (GAN, Fails):
        model = make()
        with contextlib.suppress(KeyError):
            fit(model, monitor(), max_steps=8)
        assert not any(one._optimizer_step_post_hooks for one in model.trainer.optimizers)


def test_a_run_that_goes_on_counts_on(tmp_path):
    first, second = monitor(["sharpness"]), monitor(["sharpness"])
    fit(GAN, first, max_steps=6).save_checkpoint(tmp_path / "half.ckpt")
    fit(GAN, second, max_steps=12, ckpt_path=tmp_path / "half.ckpt")
    assert second.history[COURANT].steps == [3, 5, 7, 9, 11] and finite(second, COURANT)

    fit(GAN, max_steps=6).save_checkpoint(tmp_path / "without.ckpt")
    fit(GAN, joined := monitor(["sharpness"]), max_steps=10, ckpt_path=tmp_path / "without.ckpt")
    assert joined.history[COURANT].steps == [7, 9]


def test_losses_in_yaml_are_import_paths():
    parser = pytest.importorskip("jsonargparse").ArgumentParser()
    parser.add_class_arguments(StabilityMonitor, "monitor")
    paths = '{"generator": "games.generator_loss", "critic": "games.critic_loss"}'
    made = parser.instantiate_classes(parser.parse_args(["--monitor.loss_fn", paths])).monitor
    assert [loss.__name__ for loss in made.loss_fn.values()] == ["generator_loss", "critic_loss"]


def test_the_verdict_says_that_it_is_of_each_player():
    fit(GAN, callback := monitor(), max_steps=12)
    assert "This is each player by itself" in verdict(callback.history)
    assert f"{callback.history[EXPONENT].values[-1]:+.2g} a step" in verdict(callback.history)


def test_no_rate_is_looked_ahead_for_players():
    fit(GAN, callback := monitor(["sharpness"]), max_steps=4)
    assert math.isfinite(callback.history[COURANT].values[-1])
    assert "stability/steps_to_edge" not in callback.history
    assert math.isnan(callback.forecast.critical.mean)  # of which player?


def test_a_gan_in_half_precision():
    """The curvature of the first turns within a few per cent of that in full precision."""
    unchanged(GAN, monitor(["sharpness"]), precision="bf16-mixed", max_steps=12)
    found = {}
    for precision in ("bf16-mixed", "32-true"):
        callback = monitor(["sharpness"])
        fit(GAN, callback, precision=precision, max_steps=12)
        found[precision] = [callback.history[f"stability/player_sharpness/{name}"].values for name in LOSSES]
    half, full = found.values()
    assert all(map(math.isfinite, half[0] + half[1])) and len(half[0]) == 5
    assert [one[0] for one in half] == pytest.approx([one[0] for one in full], rel=0.05)
