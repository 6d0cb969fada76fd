"""The final state of a step's own forward passes: which calls count, and that the hook is not felt."""

import copy
import io
import math

import pytest
import pytorch_lightning as pl
import torch
from harness import SGD, Model, Recorded, data, fit, mlp, trainer, unchanged
from hugging_face_harness import Loop, batches, gpt2
from lightning.fabric import Fabric
from loop_harness import cross_entropy, net
from problems import close, f64
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lsp_callbacks import Dissipation, Monitor, Sharpness, Snapshot, StabilityMonitor, Trace, Unmeasurable
from lsp_callbacks.functional import dissipation
from lsp_callbacks.loops import Watch, watch_fabric
from lsp_callbacks.loops.hugging_face import StabilityCallback


class Soon(Dissipation):
    least = 12
    least_steps = 1  # runs are shorter, and what is recorded is looked at


def energy(out):
    return float(out.detach().double().square().flatten(1).sum(1).mean() / 2)


class Noted(Model):
    """Writes down its own outputs in training."""

    def __init__(self, *middle):
        super().__init__(mlp(*middle))
        self.seen = []

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        self.seen.append((energy(out), len(out)))
        return F.cross_entropy(out, batch[1])

    def memory(self):
        return self.seen


def series(monitor):
    return monitor.trace.read()


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def squares(module):
    return sum(p.square().sum() for p in module.parameters())


ENERGIES = {
    "objective": lambda module, loss: loss + squares(module),
    "mixed": lambda module, *, state, loss, power=2: loss * state.abs().pow(power).mean() + 1,
    "plain": squares,
}


class Watches(pl.Callback):
    def __init__(self):
        self.training, self.validation = set(), set()

    def on_before_backward(self, trainer, module, loss):
        self.training.add(hooks(module))

    def on_validation_start(self, trainer, module):
        self.validation.add(hooks(module))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning_sees_each_step(accumulate, recwarn):
    """Among validation passes and replays; an epoch's last window and batch are short."""
    ours = Recorded(state="net", energies=ENERGIES, reference="initial")
    monitor = StabilityMonitor([ours, "sharpness", "lyapunov"], every_n_steps=2, window=2)
    model, loader = Noted(nn.BatchNorm1d(5)), data(n=46)
    watches = Watches()
    settings = {"accumulate_grad_batches": accumulate, "max_steps": 8, "val_check_interval": 2}
    torch.manual_seed(0)
    trainer(monitor, watches, **settings).fit(model, loader, data(n=16))
    found = series(monitor.monitor)
    # Six batches an epoch, the last one short.
    parts = [model.seen[k : k + accumulate] for k in range(0, len(model.seen), accumulate)]
    assert len({n for _, n in model.seen}) == 2
    close(found["state"], [sum(e * n for e, n in part) / sum(n for _, n in part) for part in parts], 1e-6)
    close(found["objective"] - found["loss"], found["plain"], 1e-6)
    assert len(found["state"]) == 8 and found["mixed"].isfinite().all() and found["distance"][1] > 0
    assert watches.training == {1} and hooks(model) == 0
    # In the middle of a window the hook is there, and does not count the pass.
    assert watches.validation == ({0} if accumulate == 1 else {0, 1})
    assert not [w for w in recwarn if "lsp_callbacks" in str(w.message)]


class Copies(Noted):
    """An average, a target network and a file, all made in the middle of a step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        twin, file = copy.deepcopy(self.net), io.BytesIO()
        torch.save(self.net, file)
        assert b"lsp_callbacks" not in file.getvalue()
        file.seek(0)
        again = torch.load(file, weights_only=False)
        for other in (twin, copy.deepcopy(again), again):
            other(batch[0])
        return loss


def test_copies_and_files_are_free_of_it_and_training_is_the_same():
    monitor = StabilityMonitor([Recorded(state="net"), "sharpness", "lyapunov"], every_n_steps=3)
    unchanged(Copies, monitor)
    assert series(monitor.monitor)["state"].isfinite().all()


class Calls(Model):
    """Goes through its net in some way."""

    how = "once"

    def __init__(self, how):
        super().__init__(mlp(nn.Dropout(0.2)))
        self.how = how

    def training_step(self, batch, batch_idx):
        x, y = batch[0].requires_grad_(), batch[1]
        more = 0.0
        if self.how == "target":
            with torch.no_grad():
                self.net(x)
        if self.how == "evaluates":
            self.eval()
            self.net(x)
            self.train()
        if self.how == "twice":
            more = self.net(x).square().mean()
        if self.how == "never":
            return sum(p.square().sum() for p in self.parameters())
        if self.how == "tuple":
            return F.cross_entropy(self.pair(x)[0], y)
        if self.how == "in eval mode":
            self.eval()
        if self.how == "mixed":
            with torch.no_grad():
                self.net(x)
        reentrant = {"re-entrant": True, "two re-entrant": True, "not re-entrant": False, "mixed": False}.get(self.how)
        if reentrant is None:
            return F.cross_entropy(self.squashed(x), y) + more
        out = checkpoint(self.squashed, x, use_reentrant=reentrant)
        if self.how == "two re-entrant":
            out = out + checkpoint(self.squashed, x, use_reentrant=True)
        return F.cross_entropy(out, y)

    def squashed(self, x):
        """What is computed again stops at the last number that is needed: the net's output."""
        return self.net(x).tanh()

    @property
    def pair(self):
        return self._modules["two"]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x), x


def recorded(how, state="net", steps=4):
    def make():
        model = Calls(how)
        if how == "tuple":
            model.two = Pair()
        return model

    monitor = StabilityMonitor([Soon(state=state)], every_n_steps=50)
    run = fit(make, monitor, max_steps=steps)
    assert hooks(run.lightning_module) == 0
    return series(monitor.monitor)["state"], monitor.monitor.trace.failed


@pytest.mark.parametrize("how", ["re-entrant", "not re-entrant"])
def test_checkpointed_activations_are_counted_once(how):
    """With dropout: what is computed again has the same mask."""
    (plain, _), (found, failed) = recorded("once"), recorded(how)
    assert not failed and torch.equal(found, plain)


@pytest.mark.parametrize("how", ["target", "evaluates"])
def test_a_look_without_gradients_or_in_eval_mode_is_no_call(how):
    found, failed = recorded(how)
    assert not failed and found.isfinite().all()


@pytest.mark.parametrize(
    "how, state, reason",
    [("twice", "net", "several times"), ("two re-entrant", "net", "several times"), ("mixed", "net", "several times"),
     ("never", "net", "was not called"), ("in eval mode", "net", "was not called"), ("tuple", "two", "returns tuple")],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_with_the_reason(how, state, reason):
    with pytest.warns(UserWarning, match=reason) as caught:
        found, failed = recorded(how, state)
    assert found.isnan().all() and reason in failed["state"]
    assert len([w for w in caught if "lsp_callbacks" in str(w.message)]) == 1


def test_a_module_that_is_not_there_or_compiled_raises_before_training():
    with pytest.raises(Unmeasurable, match=r"state='nose' names no module; those here are 'net'"):
        fit(Model, StabilityMonitor([Recorded(state="nose")]))
    model = Model()
    model.net.compile(backend="eager")
    with pytest.raises(Unmeasurable, match="compiled"):
        fit(model, StabilityMonitor([Recorded(state="net")]))


def test_inside_of_compiled_code_nothing_is_seen_and_nothing_breaks():
    torch.manual_seed(0)
    module, final = nn.Linear(2, 2), Trace(4, {"e": lambda module, state: state.sum()}, state="")
    final.begin(module)
    forward = torch.compile(lambda x: module(x), backend="eager", fullgraph=True)
    out = forward(torch.ones(3, 2))
    final.record(0, out.sum(), module=module)
    assert "compiled code" in final.failed["e"] and hooks(module) == 0


def test_in_place_layers_behind_it_do_not_reach_it():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    trace, x = Trace(4, {"e": lambda module, state: state.sum()}, state="0"), torch.ones(3, 2)
    trace.begin(module)
    module(x)
    trace.record(0, torch.ones(()), module=module)
    close(trace.read()["e"], [float(module[0](x).sum())], 1e-6)


def test_a_step_that_was_not_begun_says_what_to_do():
    trace = Trace(4, {"e": lambda module, state: state.sum()}, state="")
    trace.record(0, torch.ones(()), module=nn.Linear(1, 1))
    assert "Monitor.recorder.begin" in trace.failed["e"]


def test_an_exception_in_training_leaves_no_hook():
    class Breaks(Noted):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if len(self.seen) == 3:
                assert hooks(self) == 1
                raise KeyError("mine")
            return loss

    model = Breaks()
    with pytest.raises(KeyError, match="mine"):
        fit(model, StabilityMonitor([Recorded(state="net")]))
    assert hooks(model) == 0


# -- other loops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "fabric"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_plain_loops_and_fabric(kind, accumulate):
    model, expected, left = net(nn.Dropout(0.3)), [], []
    for watched in (False, True):
        model, expected = net(nn.Dropout(0.3)), []
        optimizer, monitor = SGD(model.parameters()), Monitor(Soon(state=""), Sharpness(), every_n_steps=2)
        settings = {"accumulate": accumulate}
        run, step = model, optimizer
        if kind == "fabric":
            fabric = Fabric(accelerator="cpu", devices=1)
            run, step = fabric.setup(model, optimizer)
        if watched and kind == "plain":
            watch = Watch(model, optimizer, cross_entropy, monitor, **settings)
        elif watched:
            watch = watch_fabric(fabric, run, step, cross_entropy, monitor, **settings)
        for number, batch in enumerate(watch(data()) if watched else data()):
            out = run(batch[0])
            expected.append(energy(out))
            loss = F.cross_entropy(out, batch[1]) / accumulate
            (fabric.backward(loss) if kind == "fabric" else loss.backward())
            if watched:
                watch.record(loss)
            with torch.no_grad():
                model(batch[0])
            if (number + 1) % accumulate == 0:
                step.step(), step.zero_grad()
                model(batch[0])  # after the update: no step's own
        left.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *left))
    means = torch.tensor(expected, dtype=f64).view(-1, accumulate).mean(1)
    close(series(monitor)["state"], means, 1e-6)
    assert not monitor.trace.failed and hooks(model) == 0
    watch.begin(batch)
    assert hooks(model) == 1
    watch.close()
    assert hooks(model) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers(checkpointing, tmp_path):
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model, expected = gpt2(**still), []
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.transformer.ln_f.register_forward_hook(lambda m, a, out: expected.append(energy(out)))
    callback = StabilityCallback(Monitor(Soon(state="transformer.ln_f"), every_n_steps=50))
    Loop(tmp_path, model, batches(4), [callback], accumulate=2, max_grad_norm=0.0, knows_items=True).train()
    monitor = callback.watch.monitor
    close(series(monitor)["state"], torch.tensor(expected, dtype=f64).view(-1, 2).mean(1), 1e-5)
    assert len(expected) == 8 and not monitor.trace.failed and hooks(model) == 1 + checkpointing  # none of ours


# -- the energies ----------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """``X_L = theta x``; gradient descent on ``||theta||^2 / 2`` shrinks both by 0.8."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(1, 2, 3, dtype=f64))

    def forward(self, x):
        return self.theta * x


def test_the_papers_energies_in_closed_form(tmp_path):
    torch.save({"theta": torch.zeros(3, dtype=f64)}, tmp_path / "zero.pt")
    ours = Dissipation(60, state="", reference=tmp_path / "zero.pt", energies={"cube": cube_of_state})
    module, x, monitor = Scale(), torch.tensor([[1.0, 2, 3], [3, 2, 1]], dtype=f64), Monitor(ours, every_n_steps=1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    start = module.theta.detach().clone()
    for step in range(80):
        monitor.recorder.begin(module)
        module(x)
        optimizer.zero_grad()
        loss = module.theta.square().sum() / 2
        loss.backward()
        monitor.observe(Snapshot(step, module, lambda: module.theta.square().sum() / 2, optimizer, loss=loss))
        optimizer.step()
    last = {key.removeprefix("stability/"): curve.values[-1] for key, curve in monitor.history.items()}
    for name, q in (("state", 0.8**2), ("distance", 0.8**2), ("joint", 0.8**2), ("cube", 0.8**3)):
        close(last[f"dissipation_of/{name}"], 1 - q, 1e-6)
        assert last[f"energy_increases_of/{name}"] == 0
    found = series(monitor)
    first = (start * x).square().sum(1).mean() / 2 * 0.8 ** (2 * 20)
    close(found["state"][0] / first, 1.0, 1e-9)
    assert set(found) == {"loss", "lr", "distance", "state", "cube"}  # the joint one follows from these


def test_the_joint_energy_is_half_of_both():
    """Where both fall at rates of their own, against the fit of the sum."""
    ours, module = Soon(60, state="", reference="initial"), Scale()
    monitor, x = Monitor(ours, every_n_steps=40), torch.tensor([[3.0, 0.1, 1]], dtype=f64)
    expected, start, curvature = [], module.theta.detach().clone(), torch.tensor([1.0, 0.1, 0.4], dtype=f64)
    for step in range(41):
        monitor.recorder.begin(module)
        out = module(x).detach()
        away = (module.theta - start).square().sum().detach()
        expected.append((out.square().sum() + away) / 2)
        monitor.observe(Snapshot(step, module, lambda: None, loss=torch.tensor(0.9**step, dtype=f64)))
        module.theta.data -= 0.2 * curvature * module.theta
    # Of the distance a sketch is recorded, exact to 6 %: here of three numbers.
    ratio = series(monitor)["distance"][-1] / away
    assert 0.5 < ratio < 1.5
    states = series(monitor)["state"]
    exact = dissipation(states + ratio * (torch.stack(expected) - states))
    assert monitor.history["stability/dissipation_of/joint"].values[-1] == pytest.approx(float(exact.gamma), rel=1e-6)


def cube_of_state(module, state):
    return state.abs().pow(3).sum(1).mean()


def no_parameter():
    return 0.0


@pytest.mark.parametrize(
    "arguments, reason",
    [({"energies": {"a": lambda module, state: 0}}, "state='head'"),
     ({"energies": {"a": lambda module, batch: 0}}, "nothing is known of its parameter 'batch'"),
     ({"energies": {"a": lambda module, loss, /: 0}}, "nothing is known of its parameter 'loss'"),
     ({"energies": {"a": lambda loss: 0}}, "first parameter is the module"),
     ({"energies": {"a": no_parameter}}, "first parameter is the module"),
     ({"energies": {"state": squares}, "state": ""}, "choose another"),
     ({"energies": {"joint": squares}, "state": "", "reference": "initial"}, "choose another"),
     ({"state": 3}, "name of the module")],
)  # fmt: skip
def test_bad_energies_are_refused_at_construction(arguments, reason):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.*{reason}"):
        Dissipation(**arguments)


def test_what_an_energy_may_take():
    for fine in (squares, lambda module, *args, **kwargs: 0, lambda module, other=1: 0, nn.Module.parameters, float):
        Dissipation(energies={"fine": fine})
    Dissipation(energies={"joint": squares}, state="")  # there is none without a reference


def test_an_energy_of_the_loss_waits_for_one():
    trace = Trace(4, {"objective": lambda module, loss: 2 * loss})
    trace.record(0, None)
    trace.record(1, torch.tensor(3.0, requires_grad=True))
    assert math.isnan(trace.read()["objective"][0]) and trace.read()["objective"][1] == 6 and not trace.failed
