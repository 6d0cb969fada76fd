"""SGDStability on frozen steps and inside Lightning: its numbers, its dial, its refusals, and no trace of it."""

import copy
import io
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from harness import MEASURED, MOMENTUM, SGD, STOPPED, Losses, Model, Rows, Sequence, data, encoder, everything, fit, mlp
from harness import same as same_run
from problems import close, f64, freeze, interpolating_tanh, matrix, random, same, seeded
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import MeanSquareStability, Monitor, ProbeSet, SGDStability, StabilityMonitor, Unmeasurable
from lsp_callbacks.callbacks import lightning_loop as adapter
from lsp_callbacks.functional import UpdateRule, critical_lr, moment_exponent, reduced_modes, sgd_exponent
from lsp_callbacks.functional.sgd.moment_exponent import MODES
from lsp_callbacks.step.criterion import evaluation

SGD_COURANT, GD_COURANT, DIAL = "stability/courant_sgd", "stability/courant_gd", "stability/courant"
KEYS = {SGD_COURANT, "stability/critical_lr", "stability/sgd_lyapunov"}
OPTIONAL = {
    "stability/critical_lr_error", "stability/sgd_lyapunov_error", "stability/kernel_rank", "stability/kernel_trace",
    "stability/gd_lyapunov",
}  # fmt: skip

# Computed elsewhere, by explicit Jacobians and long products: the tanh network at interpolation, at rate 0.35.
K = matrix(
    [
        [7.050322263264985, 4.707533649158197, 1.2527802743852994, 3.466881598808192],
        [4.707533649158197, 4.175934437557549, 2.7123704052144317, 3.6352725239767283],
        [1.2527802743852994, 2.7123704052144317, 7.081075578155439, 3.0460455952437644],
        [3.466881598808192, 3.6352725239767283, 3.0460455952437644, 4.876828221961095],
    ]
)
RATE, SHARPNESS, TRACE = 0.35, 3.8207521245901077, 5.796040125234767
LYAPUNOV = {1: (0.023802, 8e-6), 2: (-0.02178, 1e-5), 4: (-0.021580239529324852, 1e-12)}


def probes_of(problem, batch_size=1, full=True, population=4):
    net, x, y = problem.net, problem.x, problem.y
    part = lambda: evaluation(net(x), lambda f: 0.5 * (f - y).square().sum(1).mean(), samples=len(x))  # noqa: E731
    return ProbeSet(problem, (part,), len(x), batch_size, population, full)


def snapshot_of(make=SGD, batch_size=1, step=0, full=True, **settings):
    problem, _ = interpolating_tanh()
    optimizer = make(problem.parameters(), lr=RATE)
    return freeze(problem, optimizer, step=step, probes=probes_of(problem, batch_size, full), **settings)


def measured(quantity=None, **settings):
    quantity = quantity or SGDStability(4)
    quantity.update(snapshot_of(**settings))
    return {key: float(value) for key, value in quantity.compute().items()}


# -- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", LYAPUNOV)
def test_ground_truth_at_interpolation(batch_size):
    found = measured(SGDStability(4, steps=3000, chains=16), batch_size=batch_size)
    assert found.keys() == KEYS | OPTIONAL
    value, error = LYAPUNOV[batch_size]
    assert abs(found["stability/sgd_lyapunov"] - value) <= 4 * found["stability/sgd_lyapunov_error"] + 4 * error
    assert found["stability/sgd_lyapunov_error"] < 2e-3
    close(found["stability/kernel_trace"], TRACE, 1e-10)
    assert found["stability/kernel_rank"] == 4
    assert (found[SGD_COURANT] > 1) == (value > 0)
    close(found[SGD_COURANT] * found["stability/critical_lr"], RATE, 1e-12)
    if batch_size == 4:  # no noise is left
        close(found["stability/critical_lr"], 2 / SHARPNESS, 1e-9)
        assert found["stability/critical_lr_error"] == found["stability/sgd_lyapunov_error"] == 0


RULES = {
    "plain": (SGD, UpdateRule()),
    "momentum": (partial(SGD, momentum=0.9), UpdateRule(momentum=0.9)),
    "dampening": (partial(SGD, momentum=0.9, dampening=0.5), UpdateRule(momentum=0.9, dampening=0.5)),
    "nesterov": (partial(SGD, momentum=0.9, nesterov=True), UpdateRule(momentum=0.9, nesterov=True)),
    "decay": (partial(SGD, weight_decay=0.1), UpdateRule(weight_decay=0.1)),
}


@pytest.mark.parametrize("settings", [{}, {"replacement": True}, {"sampling": "reshuffle"}], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_values_are_those_of_the_functions_on_the_dense_kernel(rule, batch_size, settings):
    make, own = RULES[rule]
    found = measured(SGDStability(4, steps=60, chains=4, **settings), make=make, batch_size=batch_size)
    generator = snapshot_of().generator("sgd_stability")
    draw = {"batch_size": batch_size, "rule": own, "chains": 4, "population": 4, "generator": generator}
    critical = critical_lr(reduced_modes(K), steps=60, tol=1e-4, **draw, **settings)
    exponent = sgd_exponent(reduced_modes(K), RATE, steps=30, burn_in=30, **draw, **settings)
    close(found["stability/critical_lr"], critical.value, 1e-7)
    close(found["stability/critical_lr_error"], critical.error, 1e-7)
    close(found["stability/sgd_lyapunov"], exponent.value, 1e-7)
    close(found["stability/sgd_lyapunov_error"], exponent.error, 1e-7)
    close(found[SGD_COURANT], RATE / critical.value, 1e-7)


def test_two_rates_are_a_preconditioner():
    problem, _ = interpolating_tanh()
    one, two = list(problem.net[0].parameters()), list(problem.net[2].parameters())
    found = {}
    for rate in (RATE, RATE / 5):
        optimizer = torch.optim.SGD([{"params": one}, {"params": two, "lr": rate}], lr=RATE)
        quantity = SGDStability(4)
        quantity.update(freeze(problem, optimizer, probes=probes_of(problem)))
        found[rate] = float(quantity.compute()[SGD_COURANT])
    assert found[RATE / 5] < 0.9 * found[RATE]


def test_a_sub_sample_of_a_stream_and_a_batch_larger_than_it():
    for population, batch_size in ((None, 64), (1000, 64), (10, 64)):
        problem, _ = interpolating_tanh()
        optimizer = torch.optim.SGD(problem.parameters(), lr=RATE)
        quantity = SGDStability(4)
        probes = ProbeSet(problem, probes_of(problem).parts, 4, batch_size, population)
        quantity.update(freeze(problem, optimizer, probes=probes))
        value = float(quantity.compute()["stability/critical_lr"])
        assert 0.8 * 2 / SHARPNESS < value < 1.2 * 2 / SHARPNESS  # many samples: little noise


def test_adamw_is_taken_with_its_preconditioner_frozen():
    problem, _ = interpolating_tanh()
    optimizer = torch.optim.AdamW(problem.parameters(), lr=1e-3, weight_decay=0.0)
    for p in problem.parameters():  # long ago, as if all gradients had been 0.5; at interpolation this one is 0
        state = {"step": torch.tensor(1e6), "exp_avg": torch.zeros_like(p)}
        optimizer.state[p] = state | {"exp_avg_sq": torch.full_like(p, 0.5**2 / 0.999)}
    gradient = {name: torch.zeros_like(p) for name, p in problem.named_parameters()}
    quantity = SGDStability(4)
    quantity.update(freeze(problem, optimizer, gradient=gradient, probes=probes_of(problem, 4)))
    # D = 1 / 0.5 everywhere: the edge of averaging, (2 + 2 beta) / (1 - beta), on D K.
    edge = 38 / (2 * SHARPNESS)
    close(quantity.compute()["stability/critical_lr"], edge, 0.01)
    assert quantity.latest.frozen


def test_a_rate_of_zero_is_a_courant_number_of_zero():
    found = measured(make=lambda p, lr: SGD(p, lr=0.0))
    assert found[SGD_COURANT] == 0 and found["stability/sgd_lyapunov"] == 0
    assert found["stability/critical_lr"] > 0


def test_the_diagram_is_that_of_the_last_measurement():
    quantity = SGDStability(4)
    with pytest.raises(ValueError, match="nothing has been measured"):
        quantity.diagram()
    measured(quantity)
    diagram = quantity.diagram(batch_sizes=[1, 4], steps=100)
    assert diagram.batch_sizes.tolist() == [1, 4]
    close(diagram.critical_lr[1], 2 / SHARPNESS, 1e-9)


# -- dead and broken networks --------------------------------------------------------------------------------------


class Rectified(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = seeded(nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 1)))
        self.x, self.y = random(24, 3, seed=1), random(24, 1, seed=2)

    def forward(self):
        return 0.5 * (self.net(self.x) - self.y).square().sum(1).mean()


def broken_from(monitor, break_, steps=4, at=2, loss=None):
    problem = Rectified()
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.1)
    for step in range(steps):
        if step == at:
            break_(problem)
        monitor.observe(freeze(problem, optimizer, step=step, probes=probes_of(problem, 4, population=24), loss=loss))
    return {key: curve.values for key, curve in monitor.history.items()}


def test_a_collapsed_network_is_told_from_a_stable_one():
    def die(problem):
        problem.net[0].bias.data.fill_(-100)

    history = broken_from(Monitor(MeanSquareStability(), SGDStability(24), every_n_steps=1), die)
    assert history["stability/collapsed"] == [0, 0, 0.5, 0.5]  # not for good yet
    assert history["stability/kernel_rank"][0] > 20 and history["stability/kernel_rank"][2:] == [1, 1]
    assert history[SGD_COURANT][2] < history[SGD_COURANT][0]


def test_a_network_that_fits_has_not_collapsed():
    def fits(problem):
        problem.net[0].bias.data.fill_(-100)
        problem.y = problem.net(problem.x).detach()

    assert broken_from(Monitor(MeanSquareStability(), every_n_steps=1), fits)["stability/collapsed"] == [0, 0, 0, 0]


def test_no_curvature_at_all():
    problem = Rectified()
    problem.net[2].bias.requires_grad_(False)
    problem.net[0].bias.data.fill_(-100)
    quantity = SGDStability(24)
    quantity.update(freeze(problem, torch.optim.SGD(problem.net[:2].parameters(), lr=0.1), probes=probes_of(problem)))
    found = {key: float(value) for key, value in quantity.compute().items()}
    assert found["stability/kernel_rank"] == found[SGD_COURANT] == found["stability/kernel_trace"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("with_loss", [True, False])
def test_weights_that_overflow_give_nan_and_not_zero(value, with_loss):
    def overflow(problem):
        problem.net[0].weight.data.fill_(value)
        problem.net[2].weight.data.fill_(value)

    monitor = Monitor(SGDStability(24), every_n_steps=1)
    with pytest.warns(UserWarning, match="reporting NaN"):
        history = broken_from(monitor, overflow, **({} if with_loss else {"loss": None}))
    assert [math.isnan(v) for v in history[SGD_COURANT]] == [False, False, True, True]
    assert [math.isnan(v) for v in history[DIAL]] == [False, False, True, True]


# -- states --------------------------------------------------------------------------------------------------------


def test_it_waits_until_the_probes_are_full():
    quantity, monitor = SGDStability(4), Monitor(SGDStability(4), every_n_steps=10)
    for step in range(3):
        snapshot = snapshot_of(step=step, full=step == 2)
        quantity.update(snapshot)
        assert quantity.complete == (step == 2)
        monitor.observe(snapshot)
    assert monitor.history[SGD_COURANT].steps == [2]
    assert monitor.history[DIAL].values == monitor.history[SGD_COURANT].values
    assert not monitor.wants(3) and monitor.wants(10)


def test_checkpoint_copies_and_reset():
    quantity = SGDStability(4)
    values = measured(quantity)
    state = quantity.state_dict()
    torch.save(state, file := io.BytesIO())
    assert len(file.getvalue()) < 1e6 and sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor)) < 100
    fresh = SGDStability(4)
    fresh.load_state_dict(copy.deepcopy(state))
    assert same(fresh.compute(), quantity.compute())
    for twin in (copy.deepcopy(quantity), pickle.loads(pickle.dumps(quantity)), quantity.clone()):
        assert same(twin.compute(), quantity.compute())
        twin.reset()
        assert not twin.complete and bool(twin.compute()[SGD_COURANT].isnan())
    assert measured(quantity) == values  # the same step, the same numbers
    with pytest.warns(UserWarning, match="before"):
        assert all(value.isnan() for value in SGDStability(4).compute().values())


def test_a_reset_forgets_the_diagram_too():
    quantity = SGDStability(4)
    measured(quantity)
    quantity.reset()
    assert quantity.latest is None


def test_what_is_infinite_is_left_out():
    problem = Rectified()
    problem.net[2].bias.requires_grad_(False)
    problem.net[0].bias.data.fill_(-100)
    quantity = SGDStability(24)
    quantity.update(freeze(problem, torch.optim.SGD(problem.parameters(), lr=0.1), probes=probes_of(problem)))
    assert all(not value.isinf() for value in quantity.compute().values())


def test_a_failure_leaves_the_metric_whole():
    quantity = SGDStability(4)
    values = measured(quantity)
    for bad in (snapshot_of(make=lambda p, lr: torch.optim.Adadelta(p)), freeze(interpolating_tanh()[0])):
        with pytest.raises(Unmeasurable):
            quantity.update(bad)
        assert not quantity.complete and {k: float(v) for k, v in quantity.compute().items()} == values


@pytest.mark.parametrize("bad", [{"probes": 1}, {"chains": 1}, {"steps": 0}, {"outputs": "best"}], ids=str)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SGDStability(**bad)


def test_a_bad_sampling_is_refused_at_once():
    with pytest.raises(ValueError, match="sampling"):
        SGDStability(sampling="shuffled")


# -- inside Lightning ----------------------------------------------------------------------------------------------


def quantity(probes=16, **settings):
    return SGDStability(probes, **{"chains": 4, "steps": 20} | settings)


def ours(caught):
    return [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)]


def test_keys_go_everywhere_and_wait_for_the_samples():
    rows, monitor = Rows(), StabilityMonitor(["sharpness", quantity(20)], every_n_steps=3)
    run = fit(Model, monitor, logger=rows)
    steps = monitor.history[SGD_COURANT].steps
    assert steps == [2, 3, 6, 9]  # 3 batches of 8 hold 20 samples
    assert monitor.history[GD_COURANT].steps == [0, 3, 6, 9]
    assert monitor.history.keys() >= KEYS | OPTIONAL and run.callback_metrics.keys() >= KEYS | {DIAL}
    dial, sgd, gd = (monitor.history[key] for key in (DIAL, SGD_COURANT, GD_COURANT))
    assert dial == sgd  # one number for the whole run: it waits, too
    assert set(monitor.history["stability/courant_source"].values) == {1.0}
    assert monitor.courant_source == "courant_sgd"
    assert not set(sgd.values) & set(gd.values)
    assert list(rows.curve(SGD_COURANT).values()) == monitor.history[SGD_COURANT].values
    assert all(0 < v < 10 for v in monitor.history[SGD_COURANT].values)


class ByHand(Model):
    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - F.one_hot(batch[1], 3)).square().sum(1).mean()


def test_the_headline_number_is_the_best_that_is_measured(recwarn):
    monitor = StabilityMonitor([quantity(), "sharpness"], every_n_steps=1)
    fit(Model, monitor, max_steps=4)
    assert not ours(recwarn)
    assert monitor.history[SGD_COURANT].steps == [1, 2, 3] and monitor.history[GD_COURANT].steps == [0, 1, 2, 3]
    assert monitor.history[DIAL] == monitor.history[SGD_COURANT]


def test_a_hand_written_loss_leaves_it_out_with_the_way_out():
    monitor = StabilityMonitor(every_n_steps=1)
    with pytest.warns(UserWarning) as caught:
        run = fit(ByHand, monitor, max_steps=5)
    assert len(ours(caught)) == 1 and "mean_square_stability" in ours(caught)[0] and "forward_fn" in ours(caught)[0]
    assert run.global_step == 5 and "stability/courant_mean_square" not in monitor.history
    gd = dict(zip(monitor.history[GD_COURANT].steps, monitor.history[GD_COURANT].values))
    dial = dict(zip(monitor.history[DIAL].steps, monitor.history[DIAL].values))
    assert dial.items() <= gd.items() and {1, 2, 3, 4} <= dial.keys()
    assert monitor.courant_source == "courant_gd"
    assert set(monitor.history["stability/courant_source"].values) == {0.0}


def test_a_hand_written_loss_of_a_named_quantity_is_nan():
    monitor = StabilityMonitor(quantity(), every_n_steps=1)
    with pytest.warns(UserWarning) as caught:
        fit(ByHand, monitor, max_steps=4)
    assert len(ours(caught)) == 1 and "forward_fn" in ours(caught)[0]
    assert all(map(math.isnan, monitor.history[SGD_COURANT].values)) and monitor.history[SGD_COURANT].steps == [1, 2, 3]
    with pytest.raises(Unmeasurable, match="forward_fn"):
        fit(ByHand, StabilityMonitor(quantity(), every_n_steps=1, strict=True), max_steps=4)


@pytest.mark.parametrize(
    "make, settings, reason",
    [
        (lambda: Model(optimizer=partial(torch.optim.Adadelta, lr=1e-2)), {}, "Adadelta"),
        (lambda: Model(optimizer=partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1)), {}, "coupled"),
    ],
    ids=["adadelta", "coupled"],
)
def test_an_update_that_is_not_modelled(make, settings, reason):
    with pytest.raises(Unmeasurable, match=f"(?s)sgd_stability.*{reason}"):
        fit(make, StabilityMonitor(quantity()), **settings)
    monitor = StabilityMonitor(every_n_steps=1)
    with pytest.warns(UserWarning) as caught:
        fit(make, monitor, max_steps=3, **settings)
    assert all("mean_square_stability" in m for m in ours(caught) if reason in m) and ours(caught)
    assert "stability/courant_mean_square" not in monitor.history


class Sparse(Model):
    """Ends in numbers of its own kind: a regression with one output."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0])[:, 0], batch[0][:, 0])


UNTOUCHED = {
    **{
        name: (MEASURED | STOPPED)[name]
        for name in (
            "dropout", "batch_norm", "momentum", "nesterov", "scheduler", "frozen", "tied", "lstm", "transformer",
            "residual", "spectral_norm", "weight_norm", "sideeffecthooks", "owngenerators", 
        )
    },
    "adamw": lambda: Model(mlp(nn.Dropout(0.2), nn.BatchNorm1d(5)), partial(torch.optim.AdamW, lr=1e-2)),
    "adam": lambda: Model(optimizer=partial(torch.optim.Adam, lr=1e-2)),
    "regression": Sparse,
}  # fmt: skip


@pytest.mark.parametrize("name", UNTOUCHED)
def test_training_is_untouched_to_the_last_bit(name, recwarn):
    left = []
    monitor = StabilityMonitor(quantity(), every_n_steps=2)
    for callbacks in ([], [monitor]):
        torch.manual_seed(3)
        model, losses, logger = UNTOUCHED[name](), Losses(), Rows()
        run = fit(model, losses, *callbacks, logger=logger, log_every_n_steps=1, max_steps=8)
        left.append(everything(run, model, losses, logger))
    for what in left[0]:
        assert same_run(left[0][what], left[1][what]), what
    values = monitor.history[SGD_COURANT].values
    assert monitor.history[SGD_COURANT].steps == [1, 2, 4, 6] and all(0 < v < math.inf for v in values)
    assert not ours(recwarn)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_other_precisions(precision, recwarn):
    found = {}
    for kind in (precision, "32-true"):
        monitor = StabilityMonitor(quantity(), every_n_steps=2)
        run = fit(lambda: Model(optimizer=MOMENTUM), monitor, precision=kind, max_steps=5)
        assert run.global_step == 5
        found[kind] = monitor.history[SGD_COURANT].values
    assert all(0 < v < math.inf for v in found[precision])
    assert found[precision] == pytest.approx(found["32-true"], rel=0.3)


def test_one_output_in_bfloat16():
    monitor = StabilityMonitor(quantity(), every_n_steps=2)
    fit(Sparse, monitor, precision="bf16-true", max_steps=5)
    assert all(0 < v < math.inf for v in monitor.history[SGD_COURANT].values)


def test_all_outputs_and_the_top_one_tell_the_same_edge():
    found = {}
    for outputs in ("top", "all"):
        monitor = StabilityMonitor(quantity(48, outputs=outputs, steps=100), every_n_steps=3)
        fit(lambda: Model(Sequence(nn.LSTM(4, 4, batch_first=True))), monitor, max_steps=7)
        found[outputs] = monitor.history[SGD_COURANT].values
    assert found["top"] == pytest.approx(found["all"], rel=0.35) and len(found["top"]) == 2


def test_a_run_that_is_resumed_draws_its_probes_again(tmp_path):
    """At the end of an epoch, and from a loader that does not shuffle: so they are the same samples."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    def run(ckpt=None, monitor=None):
        save = ModelCheckpoint(tmp_path / str(ckpt is None), every_n_train_steps=6, save_top_k=-1)
        monitor = StabilityMonitor(quantity(), every_n_steps=2)
        fit(
            lambda: Model(optimizer=MOMENTUM), monitor, save, enable_checkpointing=True, ckpt_path=ckpt, max_steps=12,
            loader=data(shuffle=False),
        )  # fmt: skip
        return monitor

    whole = run()
    path = next((tmp_path / "True").glob("*step=6.ckpt"))
    state = torch.load(path, weights_only=False)["callbacks"]
    torch.save(state, file := io.BytesIO())
    assert len(file.getvalue()) < 1e6
    resumed = run(path)
    for key in (SGD_COURANT, "stability/kernel_trace", "stability/sgd_lyapunov"):
        before, after = (dict(zip(run.history[key].steps, run.history[key].values)) for run in (whole, resumed))
        assert list(before) == [1, 2, 4, 6, 8, 10] and list(after) == [1, 2, 4, 7, 8, 10]  # at step 6 it collects
        both = before.keys() & after.keys()
        assert [after[step] for step in both] == pytest.approx([before[step] for step in both], rel=1e-6)


def test_a_transformer_of_one_precision_and_the_dtype_of_the_values():
    own = quantity(8)
    fit(lambda: Model(encoder(), MOMENTUM), StabilityMonitor(own, every_n_steps=2), max_steps=3)
    assert all(value.dtype == f64 and value.shape == () for value in own.compute().values())
    assert own.latest.kernel.gram.shape == (8, 8) and own.latest.population == 48 and own.latest.batch_size == 8


def test_the_details_are_those_of_the_ground_truth():
    """The tanh network at interpolation, batches of 1: lambda 0.023802, mu -0.02158, K_11 ... K_44."""
    found = measured(SGDStability(4, horizon=200, steps=2000))
    close(found["stability/gd_lyapunov"], -0.021580239529324852, 1e-9)
    close(found["stability/kernel_margin"], abs(1 - 0.35 * 4.175934437557549), 1e-9)
    assert found["stability/kernel_components"] == 1
    least, most = found["stability/sgd_lyapunov_least"], found["stability/sgd_lyapunov_most"]
    assert least < 0.023802 < most
    # E log |det(I - lr K_ii)| over the four samples, by the rank.
    own = torch.tensor([7.050322263264985, 4.175934437557549, 7.081075578155439, 4.876828221961095])
    close(least, (1 - 0.35 * own).abs().log().mean() / 4, 1e-6)
    finite, spread = found["stability/sgd_lyapunov_finite"], found["stability/sgd_lyapunov_finite_spread"]
    assert abs(finite - 0.0238) < 4 * spread / 8 + 0.01 and 0 < spread < 0.1
    assert "stability/gd_lyapunov" in measured() and "stability/kernel_margin" not in measured()
    with pytest.raises(ValueError, match="horizon=0"):
        SGDStability(horizon=0)


def test_moments_are_those_of_the_function():
    keys = {p: f"stability/sgd_moment_{p}" for p in (2, 4)}
    for make, own in ((SGD, UpdateRule()), (partial(SGD, momentum=0.9), UpdateRule(0.9))):
        found = measured(SGDStability(4, steps=60, chains=4, moments=(4, 2)), make=make)
        for p, key in keys.items():
            close(found[key], moment_exponent(reduced_modes(K), RATE, p=p, batch_size=1, rule=own), 1e-7)
    assert not set(keys.values()) & measured().keys()
    assert keys[4] not in measured(SGDStability(4, steps=60, chains=4, moments=[2]))


def test_a_moment_that_is_too_large_leaves_the_dial():
    monitor = StabilityMonitor(SGDStability(MODES + 8, steps=20, chains=2, moments=(2, 4)), every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(lambda: Model(mlp(), SGD), monitor, max_steps=8)
    said = [str(w.message) for w in caught if "sgd_moment_4" in str(w.message)]
    assert len(said) == 1 and "too large" in said[0] and "fewer probes" in said[0]
    assert monitor.history[SGD_COURANT].values and "stability/sgd_moment_4" not in monitor.history
    assert all(math.isfinite(value) for value in monitor.history["stability/sgd_moment_2"].values)


@pytest.mark.parametrize("moments", [(3,), (2, 6), "24", 2, (2.5,), None])
def test_moments_that_are_not_exact_are_refused(moments):
    with pytest.raises(ValueError, match="moments="):
        SGDStability(moments=moments)
    with pytest.raises(ValueError, match=r"moments=.*independent"):
        SGDStability(moments=(2,), sampling="reshuffle")


class Late(SGDStability):
    """Has to know 7 steps first."""

    def warm_up(self, snapshot):
        return max(0, 7 - snapshot.step)


@pytest.mark.parametrize("period", [20, None])
def test_what_waits_is_measured_when_it_need_not_wait_any_more(period, monkeypatch):
    """Nothing else waits, nothing is kept."""
    monitor, kept = StabilityMonitor([Late(8), "sharpness"], every_n_steps=period, budget=1.0), []
    pending = adapter.PendingStep

    def counted(*args, **settings):
        kept.append(monitor.step)
        return pending(*args, **settings)

    monkeypatch.setattr(adapter, "PendingStep", counted)
    fit(Model, monitor, loader=data(n=400, batch_size=8), max_steps=50 if period else 100)
    sgd, gd = monitor.history[SGD_COURANT].steps, monitor.history[GD_COURANT].steps
    assert sgd[0] == 7 and gd[0] == 0 and len(sgd) > 2 and len(gd) > 2
    assert period is None or (sgd[1:] == gd[1:] == [20, 40])  # otherwise each has a pace of its own
    unused = {*kept} - {*sgd, *gd}  # the price of a second measurement is a guess until its step is seen
    assert len(unused) <= (period is None)


def test_what_waits_is_measured_after_a_resume_too(tmp_path):
    made = lambda: StabilityMonitor([Late(8), "sharpness"], every_n_steps=20)  # noqa: E731
    whole, second = made(), made()
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    settings = {"loader": data(n=400, batch_size=8, shuffle=False)}
    fit(Model, whole, saved, max_steps=25, enable_checkpointing=True, **settings)
    fit(Model, second, max_steps=25, ckpt_path=tmp_path / "step=5.ckpt", **settings)
    for key in (SGD_COURANT, GD_COURANT):
        assert second.history[key].steps == whole.history[key].steps
    assert second.history[SGD_COURANT].steps[0] == 7
