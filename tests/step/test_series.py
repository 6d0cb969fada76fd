"""What is recorded at every step, in each loop, and what a checkpoint keeps of it."""

import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from checkpoint_harness import Once, Repeatable, curves, stream
from harness import Losses, Model, Recorded, Rows, fit
from hugging_face_harness import Callback, Loop, batches, gpt2
from loop_harness import cross_entropy, net, plain

from lsp_callbacks import Dissipation, Monitor, Sharpness, SpectralNorm, StabilityMonitor, Trace
from lsp_callbacks.linalg import Sketch
from lsp_callbacks.loops.hugging_face import StabilityCallback

f64 = torch.float64


class Soon(Dissipation):
    least = 12
    least_steps = 1  # runs are shorter, and what is recorded is looked at


def square(module):
    return sum(p.square().sum() for p in module.parameters())


def filled(length, values, start=0, **settings):
    trace = Trace(length, **settings)
    for step, value in enumerate(values, start):
        trace.record(step, torch.tensor(value), lr=0.1 * step)
    return trace


@pytest.mark.parametrize("length, n", [(1, 3), (4, 3), (4, 4), (4, 5), (4, 11)])
def test_the_last_steps_are_kept_in_their_order(length, n):
    values = [0.5**k for k in range(n)]
    trace = filled(length, values)
    series = trace.read()
    assert len(trace) == min(n, length)
    assert series["loss"].tolist() == values[-length:] and series["loss"].dtype == f64
    assert series["lr"].tolist() == [0.1 * k for k in range(n)][-length:]
    assert trace.rates.total == pytest.approx(sum(0.1 * k for k in range(n)))
    assert trace.rates.squares == pytest.approx(sum(0.01 * k * k for k in range(n)))


def test_a_step_counts_once_and_a_gap_begins_anew():
    trace = filled(5, [1.0, 2.0, 3.0])
    trace.record(2, torch.tensor(9.0), lr=9.0)
    assert trace.read()["loss"].tolist() == [1.0, 2.0, 3.0] and trace.rates.total == pytest.approx(0.3)
    trace.record(7, torch.tensor(4.0))
    assert trace.read()["loss"].tolist() == [4.0] and not trace.sparse
    trace.record(8, None)
    assert trace.read()["loss"].isnan().tolist() == [False, True] and not trace.sparse
    trace.record(10, torch.tensor(4.0)), trace.record(12, torch.tensor(4.0))
    assert trace.sparse and len(trace) == 1
    trace.record(13, torch.tensor(4.0))
    assert not trace.sparse and len(trace) == 2
    trace.reset()
    assert len(trace) == 0 and trace.read() == {} and trace.rates.total == 0


def test_what_is_no_number_is_refused_and_leaves_no_half_a_step():
    net = torch.nn.Linear(2, 2)
    trace = Trace(4, {"wide": lambda module: module.weight})
    with pytest.raises(ValueError, match=r"wide of step 0 has shape \(2, 2\)"):
        trace.record(0, torch.tensor(1.0), module=net)
    assert len(trace) == 0 and trace.read() == {}
    with pytest.raises(ValueError, match="energies"):
        Trace(4, {"loss": square})
    with pytest.raises(ValueError, match="length"):
        Trace(0)


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 7])
def test_a_state_goes_on_as_if_nothing_had_been(cut):
    whole, values = filled(4, [0.7**k for k in range(10)]), [0.7**k for k in range(10)]
    first, second = filled(4, values[:cut]), Trace(4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(cut, 10):
        second.record(step, torch.tensor(values[step]), lr=0.1 * step)
    assert second.read().keys() == whole.read().keys()
    assert all(torch.equal(a, b) for a, b in zip(second.read().values(), whole.read().values()))
    assert second.rates.total == whole.rates.total
    other = Trace(4, {"square": square})
    with pytest.warns(UserWarning, match="now recorded are loss, lr, square") if cut else nullcontext():
        other.load_state_dict(first.state_dict())
    assert len(other) == 0 and other.rates.total == first.rates.total


def test_nothing_is_recorded_for_nobody():
    assert Monitor(SpectralNorm(), Sharpness()).trace is None
    monitor = Monitor(Dissipation(), every_n_steps=1)
    module = torch.nn.Linear(1, 1)
    monitor.recorder.record(0, torch.tensor(1.0), None, module)
    monitor.quantities.clear()
    monitor.recorder.record(1, torch.tensor(1.0), None, module)
    assert len(monitor.trace) == 1


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning_records_the_loss_of_each_step(accumulate):
    losses, monitor = Losses(), StabilityMonitor([Recorded(energies={"square": square})], every_n_steps=5)
    fit(Model, losses, monitor, max_steps=12, accumulate_grad_batches=accumulate)
    series = monitor.monitor.trace.read()
    # What `training_step` returned is divided by the number of micro-batches; an epoch of six holds two windows.
    expected = torch.tensor(losses.losses, dtype=f64).view(12, accumulate).sum(1)
    torch.testing.assert_close(series["loss"], expected, rtol=1e-6, atol=0)
    assert series["lr"].tolist() == [0.1] * 12
    assert len(series["square"].unique()) == 12


def test_steps_without_a_loss_are_no_steps():
    class Sometimes(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses = [*getattr(self, "losses", []), float(loss)] if batch_idx % 2 else getattr(self, "losses", [])
            return loss if batch_idx % 2 else None

    monitor = StabilityMonitor([Recorded()], every_n_steps=50)
    run = fit(Sometimes, monitor, max_steps=6)
    assert monitor.monitor.trace.read()["loss"].tolist() == run.lightning_module.losses


def test_an_energy_that_fails_is_one_warning_and_training_goes_on():
    def broken(module):
        raise KeyError("mine")

    monitor = StabilityMonitor([Soon(energies={"broken": broken})], every_n_steps=1)
    with pytest.warns(UserWarning, match="the energy broken is not recorded any more, it raised KeyError") as caught:
        run = fit(Model, monitor, max_steps=15)
    assert run.global_step == 15 and len([w for w in caught if "lsp_callbacks" in str(w.message)]) == 1
    assert all(map(math.isnan, monitor.history["stability/dissipation_of/broken"].values))
    assert all(map(math.isfinite, monitor.history["stability/dissipation"].values))  # the others go on


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("cut", [5, 14, 23])
def test_a_resumed_run_dissipates_the_same(cut, vectors, tmp_path):
    def made():
        own = Soon(energies={"square": square}, reference="initial")
        return StabilityMonitor([own], every_n_steps=4, save_vectors=vectors)

    settings = {"max_steps": 40, "log_every_n_steps": 1}
    rows, resumed, once = Rows(), Rows(), Once(tmp_path, cut)
    whole, second = made(), made()
    fit(Repeatable, whole, once, loader=stream(), logger=rows, **settings)
    fit(Repeatable, second, loader=stream(cut), logger=resumed, ckpt_path=once.path, seed=9, **settings)
    assert whole.history["stability/dissipation"].steps == [11, 12, 16, 20, 24, 28, 32, 36]
    assert curves(rows, cut) == curves(resumed, cut)
    assert "stability/dissipation_of/distance" in whole.history
    assert second.history["stability/dissipation"] == whole.history["stability/dissipation"]


def test_a_plain_loop_tells_its_loss():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = Monitor(Soon(), every_n_steps=1, strict=True)
        told = []

        def loss_fn(model, batch):
            loss = cross_entropy(model, batch)
            told.append(loss)
            return loss

        watch, _ = plain(
            model, steps=20, watch=monitor, loss_fn=loss_fn, between=lambda watch, model: watch.record(told[-1])
        )
    assert watch.history["stability/dissipation"].steps == [*range(11, 20)]
    with pytest.warns(UserWarning, match=r"losses of the steps were not seen.*Watch.record"):
        silent, _ = plain(net(), steps=20, watch=Monitor(Soon(), every_n_steps=1))
    assert all(map(math.isnan, silent.history["stability/dissipation"].values))


@pytest.mark.parametrize("knows_items", [True, False])
def test_transformers_records_what_lightning_does(knows_items, tmp_path):
    theirs, loader = StabilityMonitor([Recorded()]), torch.utils.data.DataLoader(batches(5), batch_size=None)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if knows_items:  # otherwise Lightning divides a short window by two, and transformers by one
        loader = torch.utils.data.DataLoader(batches(4), batch_size=None)
    fit(lambda: Callback(gpt2(**still)), theirs, loader=loader, accumulate_grad_batches=2, max_steps=4)
    callback, model = StabilityCallback(Monitor(Dissipation())), gpt2(**still)
    settings = {"accumulate": 2, "max_grad_norm": 0.0, "knows_items": knows_items}
    Loop(tmp_path, model, [*loader], [callback], **settings).train()
    ours, other = callback.watch.monitor.trace.read()["loss"], theirs.monitor.trace.read()["loss"]
    n = 4 if knows_items else 2
    torch.testing.assert_close(ours[:n], other[:n], rtol=1e-4, atol=0)
    if not knows_items:
        assert float(ours[2] / other[2]) == pytest.approx(2, rel=1e-3)
    assert not model._forward_hooks


def test_a_monitor_by_itself_takes_the_snapshots_loss_and_says_what_it_misses():
    from problems import regression, trajectory

    task = regression()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    monitor = Monitor(Soon(), every_n_steps=3)
    losses = []
    for snapshot in trajectory(task, optimizer, 20):
        losses.append(float(snapshot.loss))
        monitor.observe(snapshot)
    assert monitor.trace.read()["loss"].tolist() == losses
    assert monitor.history["stability/dissipation"].steps == [11, 12, 15, 18]
    assert monitor.history["stability/dissipation"].values[-1] > 0
    sparse = Monitor(Soon(), every_n_steps=3)
    with pytest.warns(UserWarning, match="at every optimizer step"):
        for snapshot in trajectory(task, optimizer, 20):
            if sparse.wants(snapshot.step):
                sparse.observe(snapshot)
    assert all(map(math.isnan, sparse.history["stability/dissipation"].values))


# -- the sketch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "one column", "rank one"])
def test_a_sketch_keeps_lengths(kind):
    """The mean over seeds is right, and the spread that of 509 numbers, also where matrices are not."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    matrix = {
        "dense": noise(300, 509),
        "one column": torch.nn.functional.pad(noise(2000, 1), (3, 60)),
        "rank one": noise(300, 1) @ noise(1, 256),
    }[kind]
    tensors = [matrix, noise(7)]
    truth = sum(t.square().sum() for t in tensors)
    ratios = torch.stack([Sketch(seed)(tensors).square().sum() for seed in range(150)]) / truth
    assert abs(float(ratios.mean()) - 1) < 4 * (2 / 509 / 150) ** 0.5
    assert 0.8 < float(ratios.std()) / (2 / 509) ** 0.5 < 1.25


def test_a_sketch_is_linear_and_the_same_with_and_without_memory():
    a, b = torch.arange(1200.0).view(30, 40), torch.ones(5)
    kept, fresh = Sketch(1, keep=True), Sketch(1)
    torch.testing.assert_close(kept([a, b]) + kept([b.new_ones(30, 40), b]), fresh([a + 1, 2 * b]))
    assert torch.equal(kept([a.bfloat16()]), fresh([a.bfloat16()]))
    assert Sketch()([]).tolist() == [0.0] * 509
