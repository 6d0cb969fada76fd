"""A step can be run again, from the same state, and nothing of the original moves."""

import copy
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import MEASURED, data, mlp
from torch import nn
from torch.nn.utils import spectral_norm

from lsp_callbacks.autograd.side_effects import RandomState, untouched
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.step.batch import MicroBatch
from lsp_callbacks.step.flat import displaced, flatten, split
from lsp_callbacks.step.module_copy import ModuleCopy, StandingCopy
from lsp_callbacks.step.replay import copied, replayer
from lsp_callbacks.step.replay_checks import verified_calls, verify
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.snapshot import Snapshot


def net():
    torch.manual_seed(0)
    module = mlp(nn.BatchNorm1d(5), nn.Dropout(0.5))
    module.calls, module.plain = [], {"depth": [1, 2]}
    return module


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


# -- ModuleCopy --------------------------------------------------------------------------------------------------------


def test_a_shadow_shares_the_parameters_and_nothing_else():
    module = net()
    module_copy = ModuleCopy(module).reset()
    assert all(a is b for a, b in zip(module.parameters(), module_copy.parameters(), strict=True))
    before = copy.deepcopy(module.state_dict())
    module_copy(X), module_copy.calls.append(1), module_copy.plain["depth"].append(3), module_copy.eval()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values()))
    assert (module.calls, module.plain, module.training) == ([], {"depth": [1, 2]}, True)


def test_reset_takes_everything_back():
    module_copy = ModuleCopy(net())
    module = module_copy.reset()
    before = copy.deepcopy(module.state_dict())
    module(X), module.calls.append(1), module.plain["depth"].append(3), module.eval()
    module.new, module.calls = "attribute", None
    module.register_buffer("late", torch.ones(1))
    module[3] = nn.Identity()
    again = module_copy.reset()
    assert again is module and again.state_dict().keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), again.state_dict().values()))
    assert (again.calls, again.plain, again.training) == ([], {"depth": [1, 2]}, True)
    assert not hasattr(again, "new") and isinstance(again[3], nn.Tanh)


def test_what_modules_share_stays_shared():
    module = net()
    module[0].calls = module.calls
    module[0].owner = [module]
    module_copy = ModuleCopy(module)
    for _ in range(2):
        again = module_copy.reset()
        assert again[0].calls is again.calls == [] and again[0].owner[0] is again
        again.calls.append(1)


def test_function_hooks_stay_behind_and_hook_objects_come_along():
    calls = []
    module = nn.Sequential(spectral_norm(nn.Linear(6, 5)))
    module[0].register_forward_hook(lambda *_: calls.append(1))
    module[0].register_full_backward_hook(lambda *_: calls.append(1))
    module_copy = ModuleCopy(module).reset()
    module_copy(X).sum().backward()
    assert not calls and [type(h).__name__ for h in module_copy[0]._forward_pre_hooks.values()] == ["SpectralNorm"]
    assert len(module[0]._forward_hooks) == 1


def test_tensors_in_a_graph_are_copied_by_value():
    module = net()
    module.last = {"h": [module[0](X)]}
    last = ModuleCopy(module).reset().last["h"][0]
    assert torch.equal(last, module.last["h"][0]) and last.grad_fn is None and module.last["h"][0].grad_fn is not None


def test_data_are_shared():
    module, owner = net(), object()
    module.loaders, module.owner = {"train": data()}, owner
    module_copy = ModuleCopy(module, shared=[owner])
    for _ in range(2):
        again = module_copy.reset()
        assert again.loaders["train"] is module.loaders["train"] and again.loaders is not module.loaders
        assert again.owner is owner


def test_what_cannot_be_copied_raises():
    module = net()
    module.lock = threading.Lock()
    with pytest.raises(TypeError, match="lock"):
        ModuleCopy(module)


# -- StandingCopy ------------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """What a step may change: buffers, plain attributes, containers, a cycle, a hidden module and a graph."""

    def __init__(self):
        super().__init__()
        self.layers, self.rate, self.seen, self.last = mlp(nn.BatchNorm1d(5), nn.Dropout(0.5)), 1.0, [], None
        self.register_buffer("count", torch.zeros(()))
        object.__setattr__(self, "owner", [self])
        self.cache = {"first": self.layers[0], "weight": self.layers[0].weight}

    def forward(self, x):
        self.count += 1
        self.rate, self.last = 0.5 * self.rate, self.layers(x)
        self.seen.append(float(self.last.mean()))
        return self.rate * self.last.square().mean() * self.count * len(self.seen)


def seen_by(module_copy, x):
    """Return what replays of a copy give: two, as the first may change it."""
    torch.manual_seed(1)
    first = module_copy.reset()(x)
    torch.manual_seed(1)
    assert torch.equal(first, module_copy.reset()(x))
    return first


def test_a_standing_copy_is_as_good_as_a_new_one_at_every_step():
    module, standing = Counter(), StandingCopy()
    copies = set()
    for k in range(6):
        if k == 3:
            module.eval(), setattr(module, "late", {"k": [k]}), setattr(module.layers[1], "momentum", 0.5)
        if k == 4:
            del module.late
            module.count = torch.ones(3).mean()  # another tensor
            module.layers[0].weight.data.add_(0.1)
        followed, fresh = ModuleCopy(module, standing=standing), ModuleCopy(module)
        copies.add(id(followed.module))
        a, b = followed.reset(), fresh.reset()
        assert vars(a).keys() == vars(b).keys() and a.training == b.training == module.training
        assert a.owner[0] is a and a.cache["first"] is a.layers[0] and a.cache["weight"] is module.layers[0].weight
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
        assert torch.equal(seen_by(followed, X), seen_by(fresh, X))
        before = copy.deepcopy(module.state_dict()), list(module.seen)
        followed.module(X), followed.module.seen.append(1)
        assert module.seen == before[1] and all(map(torch.equal, before[0].values(), module.state_dict().values()))
        torch.manual_seed(k)
        module(X)
        del followed, fresh, a, b
    assert len(copies) == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_standing_copy_keeps_what_a_deep_copy_makes_anew(kind):
    """Recurrent modules leave out weak references of themselves, and make them again."""
    module, standing, copies = kind(6, 3, num_layers=2), StandingCopy(), set()
    for _ in range(3):
        followed, fresh = ModuleCopy(module, standing=standing), ModuleCopy(module)
        copies.add(id(followed.module))
        assert vars(followed.reset()).keys() == vars(fresh.reset()).keys()
        assert torch.equal(followed.module(X)[0], fresh.module(X)[0])
        copy.deepcopy(followed.module), followed.reset()
        next(module.parameters()).data.add_(0.1)
        del followed, fresh
    assert len(copies) == 1


def test_a_standing_copy_is_not_lent_twice():
    module, standing = net(), StandingCopy()
    first, second = ModuleCopy(module, standing=standing), ModuleCopy(module, standing=standing)
    assert first.module is not second.module
    second.reset().calls.append(1)
    assert first.reset().calls == []


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.append(nn.Linear(4, 4)),
        lambda module: module.register_parameter("more", nn.Parameter(torch.ones(1))),
        lambda module: setattr(module[0], "weight", nn.Parameter(torch.ones(5, 6))),
        lambda module: setattr(module, "3", nn.ReLU()),
        lambda module: module.register_buffer("more", torch.ones(1)),
        lambda module: module[0].register_forward_pre_hook(Hook()),
        lambda module: setattr(module[0], "__class__", Other),
    ],
)
def test_a_module_of_another_layout_is_copied_anew(change):
    module, standing = net(), StandingCopy()
    before = id(ModuleCopy(module, standing=standing).module)
    assert id(ModuleCopy(module, standing=standing).module) == before
    change(module)
    again, fresh = ModuleCopy(module, standing=standing), ModuleCopy(module)
    assert [*map(type, again.module.modules())] == [*map(type, module.modules())]
    assert all(a is b for a, b in zip(again.module.parameters(), module.parameters(), strict=True))
    assert again.module.state_dict().keys() == fresh.module.state_dict().keys()
    assert len(again.module[0]._forward_pre_hooks) == len(fresh.module[0]._forward_pre_hooks)


class Other(nn.Linear):
    pass


class Hook:
    """A hook that is an object, whose state would not be put back."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, args):
        self.calls += 1


class Own(nn.Linear):
    def __deepcopy__(self, memo):
        twin = Own(6, 5)
        twin.weight, twin.bias, twin.copies = self.weight, self.bias, getattr(self, "copies", 0) + 1
        return twin


def test_a_module_that_says_how_it_is_copied_is_copied_so_each_time():
    module, standing = nn.Sequential(Own(6, 5)), StandingCopy()
    for k in range(3):
        module[0].copies = k
        assert ModuleCopy(module, standing=standing).module[0].copies == k + 1


def test_a_standing_copy_takes_what_is_shared_and_prepared_now():
    module, standing, owners = net(), StandingCopy(), [[0], [1]]
    for owner in owners:
        module.owner = owner
        twin = ModuleCopy(
            module, shared=[owner], prepare=lambda m, owner=owner: setattr(m, "muted", owner), standing=standing
        )
        again = twin.reset()
        assert again.owner is owner and again.muted == owner and not hasattr(module, "muted")
        del twin, again


# -- random state --------------------------------------------------------------------------------------------------


def test_random_state_restores_every_source():
    state = RandomState()
    first = draws()
    state.restore()
    assert draws() == first


def test_untouched_restores_the_random_state_after_an_error():
    module, state = net(), RandomState()
    expected = draws()
    state.restore()
    with pytest.raises(KeyError), untouched(module):
        draws()
        raise KeyError
    assert draws() == expected


def test_untouched_switches_parameter_hooks_off_and_on_again():
    module, calls = net(), []
    module[0].weight.register_hook(lambda gradient: calls.append(1))
    with untouched(module):
        torch.autograd.grad(module[0].weight.sum(), module[0].weight)
    assert not calls
    torch.autograd.grad(module[0].weight.sum(), module[0].weight)
    assert calls == [1]


def test_untouched_forbids_the_original():
    module = net()
    with untouched(module):
        ModuleCopy(module).reset()(X)
        with pytest.raises(Unmeasurable, match="the original"):
            module[0](X)
    module(X)


# -- the replay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [[X, 1], {"x": X, "more": (X, None)}, SimpleNamespace(x=X), X])
def test_batches_are_copied_in_depth(batch):
    def leaf(b):
        return b if isinstance(b, torch.Tensor) else b.x if isinstance(b, SimpleNamespace) else next(
            v for v in (b.values() if isinstance(b, dict) else b) if isinstance(v, torch.Tensor)
        )  # fmt: skip

    copy_of = copied(batch)
    assert type(copy_of) is type(batch) and torch.equal(leaf(copy_of), X)
    assert leaf(copy_of).data_ptr() != X.data_ptr()


def step(module, batch):
    batch.mul_(0.5)
    module.calls.append(1)
    noise = float(np.random.rand()) + random.random()
    return (module(batch) + noise).square().mean() * len(module.calls)


def test_replays_equal_the_step_to_the_last_bit():
    module, batch = net(), X.clone()
    replay = replayer(ModuleCopy(module), [MicroBatch(batch.clone(), step)])
    loss = step(module, batch)
    for _ in range(3):
        draws()
        assert torch.equal(replay(), loss)


# -- Snapshot ------------------------------------------------------------------------------------------------------


def snapshot(loss=1.0, replayed=1.0, **settings):
    module = nn.Linear(2, 1, bias=False)
    return Snapshot(
        step=3, module=module, loss=None if loss is None else torch.tensor(loss),
        replay=lambda: module.weight.sum() * 0 + replayed, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    "snap, reason",
    [
        (snapshot(), None),
        (snapshot(loss=None, replayed=2.0), None),
        (snapshot(replayed=1.0 + 1e-6), "could not be replayed: step 3"),
        (snapshot(replayed=1.0 + 1e-6, tolerance=1e-5), None),
        (snapshot(replayed=1.001, tolerance=1e-5), "could not be replayed"),
        (snapshot(replayed=float("nan"), tolerance=1e-5), "could not be replayed"),
        (snapshot(loss=float("nan")), "not finite"),
        (snapshot(loss=float("inf"), replayed=float("inf")), "not finite"),
    ],
)
@pytest.mark.parametrize("access", [verified_calls, verify])
def test_a_replay_must_give_the_loss_of_the_step(snap, reason, access):
    if reason is None:
        access(snap)
    else:
        with pytest.raises(Unmeasurable, match=reason):
            access(snap)


def test_calls_keep_what_is_asked_for_and_leave_no_hook():
    module = net()
    snap = Snapshot(
        0, module, replay=lambda: module(X).sum(), run=RunContext(captures_inputs=lambda name, m: name == "0")
    )
    assert snap.calls["0"].args[0].equal(X) and snap.calls["0"].output_shape == (8, 5)
    assert snap.calls["1"].args == () and snap.calls["1"].input_shape == (8, 5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_generators_are_private_and_keyed():
    module = nn.Linear(1, 1)

    def draw(seed, step, key):
        return torch.rand(
            4, generator=Snapshot(step, module, lambda: None, run=RunContext(seed=seed)).generator(key)
        ).tolist()

    before = torch.get_rng_state()
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    assert len({tuple(draw(*key)) for key in keys}) == 4 and draw(*keys[0]) == draw(*keys[0])
    assert torch.equal(before, torch.get_rng_state())


def test_tied_and_frozen_parameters_count_once_or_not():
    module = MEASURED["tied"]().net
    module[0].bias.requires_grad_(False)
    parameters = Snapshot(0, module, lambda: None).parameters
    assert list(parameters) == ["0.weight", "2.bias", "3.weight", "3.bias"]


def test_displaced_puts_every_bit_back():
    parameters = list(net().parameters())
    before, versions = [p.detach().clone() for p in parameters], [p._version for p in parameters]
    direction = torch.randn(sum(p.numel() for p in parameters))
    with pytest.raises(KeyError), displaced(parameters, direction, 0.1):
        assert not torch.equal(before[0], parameters[0])
        raise KeyError
    assert all(map(torch.equal, before, parameters)) and versions == [p._version for p in parameters]
    assert torch.equal(flatten(split(direction, parameters), parameters), direction)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_standing_copy_has_what_pickling_leaves_out(cell):
    """Recurrent modules of torch leave references to their weights out of their state, and make them anew."""
    module, standing, x = cell(4, 5, num_layers=2, batch_first=True), StandingCopy(), torch.randn(2, 3, 4)
    copies = set()
    for _ in range(3):
        twin = ModuleCopy(module, standing=standing)
        copies.add(id(twin.module))
        assert torch.equal(twin.reset()(x)[0], module(x)[0])
        others = {name: 2 * p for name, p in module.named_parameters()}
        assert not torch.equal(torch.func.functional_call(twin.reset(), others, (x,))[0], module(x)[0])
        assert torch.equal(twin.reset()(x)[0], module(x)[0])
        with torch.no_grad():
            module.weight_hh_l1.mul_(1.1)
        del twin
    assert len(copies) == 1
