"""Each model of the zoo, with every quantity: training unchanged, finite values or a stated reason, the path told."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from fine_tuning_zoo import FINE_TUNING, SLOW
from harness import CLASSES, SGD, Model, data, fit, mlp, unchanged
from model_zoo import CASES as MODELS
from model_zoo import CURVATURE, NETS, OPTIMIZERS, Bag, Checkpointed, FirstCheckpointed, Transformer, cnn
from optimizer_zoo import SAMByHand
from support import is_open_below, path, results
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from lsp_callbacks import StabilityMonitor, StopOnInstability
from lsp_callbacks.quantities import (
    PRESETS,
    REGISTRY,
    BatchSharpness,
    Dissipation,
    LeaveOneOut,
    LyapunovTrajectory,
    ProximalStep,
    SGDLaw,
    SGDStability,
    SpectralDensity,
    StabilityProfile,
    build,
)

CASES = MODELS | FINE_TUNING
#: Whose path is that of the Hessian products.
PRODUCTS = set(CURVATURE) - {"leave_one_out", "stability_profile"}


class Short(LyapunovTrajectory):
    """Two steps, too few for an error bar."""

    window = 2

    def compute(self):
        return dict(zip(self.keys, (self.growth.mean(), self.growth.std())))


def everything(**arguments):
    """The full preset, with windows that a short run completes; as a preset it leaves out what cannot be measured."""
    small = (
        Short(transient=0),
        BatchSharpness(most=8),
        SGDStability(probes=8, chains=2, steps=20),
        Dissipation(),
        SGDLaw(probes=8, products=3),
        SpectralDensity(steps=6),
        LeaveOneOut(2, window=2),
        StabilityProfile(horizon=2, directions=2, samples=2, probes=8),
        ProximalStep(steps=1),
    )
    short: dict = {q.name: q for q in small}
    short["lyapunov_trajectory"].window, short["batch_sharpness"].most, short["dissipation"].least = 2, 2, 3
    settings = {"lyapunov": {"window": 1, "average": 3}}
    quantities = [short.get(name) or build(name, **settings)[0][0] for name in PRESETS["full"]]
    monitor = StabilityMonitor(quantities, every_n_steps=1, **arguments)
    monitor.monitor.quantities.named.clear()
    return monitor


def test_every_quantity_is_in_the_suite():
    """But for that of whole derivatives, which is for small models: see test_clarke_training."""
    assert set(everything().monitor.quantities) == set(PRESETS["full"]) == set(REGISTRY) - {"clarke_training"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_contract(name, recwarn, support):
    case = CASES[name]
    loader = data(shape=case.shape, **case.loader)
    callback = everything(**case.monitor)
    unchanged(case.make, callback, loader=loader, **{"max_steps": 4} | case.trainer)
    monitor = callback.monitor

    block_free = not case.blocks and "residual_cfl" not in {**case.left_out, **case.failed}
    left_out = case.left_out | ({"residual_cfl": "no residual block"} if block_free else {})
    assert {name: reason in callback.skipped.get(name, "") for name, reason in left_out.items()} == dict.fromkeys(
        callback.skipped, True
    ), callback.skipped
    said = [str(w.message) for w in recwarn if "lsp_callbacks" in str(w.message)]
    reasons = [*case.left_out.values(), *case.failed.values(), *case.partly.values()]
    assert len(said) == len(set(reasons)) and all(any(reason in one for one in said) for reason in reasons), said

    for quantity in monitor.quantities.values():
        for key in quantity.keys:
            curve = callback.history.get(key)
            if key.endswith(("_lower", "_upper")) and curve is None:  # a bound needs three windows
                continue
            assert curve is not None, key
            finite = [math.isfinite(v) or (v == -math.inf and is_open_below(key)) for v in curve.values]
            if quantity.name in case.partly:
                assert any(finite) and not all(finite), (key, curve.values)
            else:
                assert not any(finite) if quantity.name in case.failed else all(finite), (key, curve.values)

    measured = set(PRESETS["full"]) - set(left_out) - set(case.failed)
    assert set(callback.paths) == measured
    allowed = {case.hessian} if isinstance(case.hessian, str) else set(case.hessian)
    assert {callback.paths[name] for name in PRODUCTS & measured} <= allowed, callback.paths
    if "sgd_stability" in measured:
        assert callback.paths["sgd_stability"] == case.kernel
    recorded = results(callback, case.failed | case.partly)
    assert {name for name, result in recorded.items() if result["state"] == "measured"} == measured - set(case.partly)
    support(
        "precision" if "precision" in case.trainer else "model", name, list(CASES).index(name), recorded, path(callback)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, support):
    """Each optimizer on one model: training unchanged, numbers finite, and the rest left out for a reason."""
    make, left_out = OPTIMIZERS[name]
    left_out = left_out | {"residual_cfl": "no residual block"}
    callback = everything()
    net = NETS.get(name, mlp)
    unchanged(lambda: Model(net(), make), callback, loader=data(), max_steps=4)
    recorded = results(callback, left_out)
    assert {name for name, result in recorded.items() if result["state"] != "measured"} == set(left_out), recorded
    for quantity, reason in left_out.items():
        assert reason in recorded[quantity]["reason"], quantity
    assert set(recorded) == set(PRESETS["full"])
    support("optimizer", name, list(OPTIMIZERS).index(name), recorded, path(callback))


STEPS = partial(torch.optim.AdamW, lr=1e-2)


class InBackward(Model):
    """Each parameter has an optimizer of its own, which steps as soon as its gradient is there."""

    def __init__(self, make=STEPS, is_automatic=False):
        super().__init__()
        self.automatic_optimization = is_automatic
        self.optimizers_of = {p: make([p]) for p in self.parameters()}
        for p in self.optimizers_of:
            p.register_post_accumulate_grad_hook(self.step)

    def step(self, p):
        self.optimizers_of[p].step()
        self.optimizers_of[p].zero_grad()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        return {"loss": loss.detach()}

    def configure_optimizers(self):
        return None


class TwoGradients(Model):
    """A SAM whose two steps are made by hand, so that Lightning sees none."""

    def __init__(self):
        super().__init__(optimizer=partial(SAMByHand, lr=0.1))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for step in (optimizer.first_step, optimizer.second_step):
            loss = self.loss(batch)
            self.manual_backward(loss)
            step()
        return {"loss": loss.detach()}


OF_BATCH = {"loss_fn": lambda module, batch: module.loss(batch)}
ALONG = ["spectral_norm", "courant_step", "critical_sharpness"]


def test_updates_in_the_backward_pass_leave_what_needs_no_optimizer():
    callback = StabilityMonitor(every_n_steps=1, **OF_BATCH)
    with pytest.warns(UserWarning, match="skips sharpness .*configure_optimizers returns no optimizer") as said:
        unchanged(InBackward, callback, loader=data(), max_epochs=1)
    assert len([w for w in said if "lsp_callbacks" in str(w.message)]) == 1
    assert len(callback.history["stability/spectral_norm_max"].values) == 6
    assert all(map(math.isfinite, callback.history["stability/courant_step"].values))
    model, last = InBackward(), StabilityMonitor(["spectral_norm"], every_n_steps=1, **OF_BATCH)
    fit(model, last, loader=data(), max_epochs=1)
    norms = [float(torch.linalg.matrix_norm(model.net[k].weight, 2)) for k in (0, 2)]
    assert last.history["stability/spectral_norm_max"].values[-1] == pytest.approx(max(norms), rel=1e-2)


@pytest.mark.parametrize("is_automatic", [False, True])
def test_updates_in_the_backward_pass_have_the_numbers_of_the_same_steps_after_it(is_automatic):
    settings = {} if is_automatic else OF_BATCH
    here, there = (StabilityMonitor(ALONG, every_n_steps=1, **settings) for _ in range(2))
    fit(partial(InBackward, SGD, is_automatic), here, loader=data(), max_epochs=1)
    fit(Model, there, loader=data(), max_steps=6)
    for key in ("courant_step", "critical_multiple"):
        values, expected = (callback.history[f"stability/{key}"].values for callback in (here, there))
        assert values == pytest.approx(expected, rel=1e-4 if key == "courant_step" else 0.05), key


@pytest.mark.filterwarnings("ignore:lsp_callbacks skips", "ignore:StopOnInstability will never")
@pytest.mark.parametrize("is_automatic", [False, True])
def test_updates_in_the_backward_pass_at_the_defaults(is_automatic):
    callback = StabilityMonitor()
    unchanged(partial(InBackward, SGD, is_automatic), callback, loader=data(), max_epochs=3)
    assert math.isfinite(callback.history["stability/spectral_norm_max"].values[-1])
    assert ("stability/courant_step" in callback.history) == is_automatic


def test_steps_that_lightning_does_not_see():
    callback = StabilityMonitor(every_n_steps=1, quantities=["spectral_norm", "critical_sharpness"], **OF_BATCH)
    fit(TwoGradients, callback, loader=data(), max_epochs=1)
    assert len(callback.history["stability/spectral_norm_max"].values) == 6
    assert len(callback.history["stability/critical_sharpness"].values) == 5  # the weights before the first are gone
    assert all(map(math.isfinite, callback.history["stability/critical_sharpness"].values))

    default = StabilityMonitor(every_n_steps=1, **OF_BATCH)
    with pytest.warns(UserWarning, match="skips sharpness .*without a step that Lightning sees"):
        unchanged(TwoGradients, default, loader=data(), max_epochs=1)
    assert len(default.history["stability/spectral_norm_max"].values) == 6


class Growing(Model):
    """Its loss grows until it overflows, or without bounds, whatever the optimizer does."""

    rate = 0.4

    def loss(self, batch):
        return super().loss(batch) * math.exp(self.rate * max(0, self.global_step - 12))


class Overflowing(Growing):
    def loss(self, batch):
        return super().loss(batch) * (math.inf if self.global_step > 15 else 1.0)


@pytest.mark.filterwarnings("ignore:lsp_callbacks skips", "ignore:StopOnInstability will never")
@pytest.mark.parametrize("kind", [Growing, Overflowing])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_is_stopped_with_whatever_is_measured(name, kind):
    """The defaults: by the loss, where no Courant number is known."""
    net = NETS.get(name, mlp)
    stop = StopOnInstability()
    run = fit(lambda: kind(net(), OPTIMIZERS[name][0]), StabilityMonitor(), stop, loader=data(), max_steps=120)
    assert run.global_step < (25 if kind is Overflowing else 110)


def test_the_support_matrix_of_the_documentation_is_that_of_this_suite():
    """Its rows and columns; record it anew with ``pytest --support-matrix`` when this fails."""
    recorded = json.loads((Path(__file__).parents[1] / "docs" / "support_matrix.json").read_text())
    assert recorded["quantities"] == list(PRESETS["full"])
    rows = [(row["axis"], row["name"]) for row in recorded["rows"]]
    assert len(rows) == len(set(rows))
    assert {name for axis, name in rows if axis in ("model", "precision")} == set(CASES)
    assert {name for axis, name in rows if axis == "optimizer"} == set(OPTIMIZERS)
    for row in recorded["rows"]:
        left_out = {name for name, result in row["results"].items() if result["state"] != "measured"}
        case = CASES.get(row["name"])
        if row["axis"] in ("model", "precision"):
            assert left_out - {"residual_cfl"} == {*case.left_out, *case.failed, *case.partly} - {"residual_cfl"}, row[
                "name"
            ]
        elif row["axis"] == "optimizer":
            assert left_out == {*OPTIMIZERS[row["name"]][1], "residual_cfl"}, row["name"]


def measured(make, **settings):
    """All curves of a run that is compared with another."""
    callback = everything()
    fit(make, callback, loader=data(), **{"max_steps": 3} | settings)
    return callback.history


@pytest.mark.parametrize("activation, precision", [(nn.Tanh, "32-true"), (nn.ReLU, "64-true")])
def test_checkpointed_activations_are_measured_as_those_that_are_kept(activation, precision):
    """Slopes cannot be held in checkpoints: there ReLU has exact products beside differences, in double precision."""
    kept, plain, reentrant = (
        measured(lambda r=r: Model(Checkpointed(r, activation)), precision=precision) for r in (None, False, True)
    )
    # Read with the masks of dropout from the step's own graph, but without them where activations are checkpointed.
    with_masks = {"stability/courant", "stability/courant_mean_square", "stability/mean_square_lr"}
    for key, curve in kept.items():
        assert plain[key].values == reentrant[key].values, key
        if key in with_masks:
            continue
        if activation is nn.Tanh:
            assert curve.values == plain[key].values, key
        assert curve.values == pytest.approx(plain[key].values, rel=1e-5, abs=1e-9), key


def test_a_reentrant_checkpoint_without_a_gradient_stays_without_one():
    """Its input needs no gradient, so PyTorch gives none to what is inside."""
    model = Model(nn.Sequential(FirstCheckpointed(), nn.Linear(5, CLASSES)))
    history = measured(lambda: model)
    assert model.net[0].inner[0].weight.grad is None
    assert "apply" not in vars(CheckpointFunction)  # training has its own back
    assert all(map(math.isfinite, history["stability/sharpness"].values))


def test_sparse_gradients_are_measured_as_dense_ones():
    """In double precision: their rounding differs, and that of single precision is in differences of gradients."""
    sparse, dense = (measured(lambda s=s: Model(Bag(s)), precision="64-true") for s in (True, False))
    for key in ("sharpness", "courant_sgd", "lyapunov", "batch_sharpness", "spectral_norm_max"):
        key = f"stability/{key}"
        assert dense[key].values == pytest.approx(sparse[key].values, rel=1e-6), key


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make", [Model, lambda: Model(Transformer(nn.ReLU())), lambda: Model(cnn())])
def test_half_precision_costs_two_per_cent(make, precision):
    full, half = (measured(make, max_steps=2, precision=one) for one in ("32-true", precision))
    for key in ("batch_sharpness", "spectral_norm_max", "mean_square_lr", "kernel_trace"):
        key = f"stability/{key}"
        assert half[key].values[0] == pytest.approx(full[key].values[0], rel=0.02), key
    # A first reading of sharpness is raised by half of what its last product has gained, and rounding is raised, too.
    sharpness = "stability/sharpness"
    assert half[sharpness].values[0] == pytest.approx(full[sharpness].values[0], rel=0.04)
