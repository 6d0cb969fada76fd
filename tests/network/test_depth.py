"""The states of a network in depth, and their Jacobians, against dense differentiation."""

import pytest
import torch
from harness import CLASSES, Model, data, fit
from model_zoo import Custom, Once, Transformer, Twice, cnn
from problems import Functional, Task, close, freeze, random
from torch import nn
from torch.func import jacrev
from torch.utils.checkpoint import checkpoint

from lsp_callbacks import Sharpness, StabilityMonitor, Unmeasurable
from lsp_callbacks.operators.network.depth import depth


def chain():
    return nn.Sequential(
        nn.LeakyReLU(inplace=True), nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip


def found(net, *shape, size=None):
    task = Task(net, *shape)
    sample = None if size is None else lambda count: (task(), size)
    return task, depth(freeze(task, sample=sample))


def test_a_layer_begins_with_a_weight_matrix_and_what_follows_belongs_to_it():
    task, states = found(chain(), 5, 4)
    assert [layer.name for layer in states.layers] == ["net.1", "net.4", "net.7"]
    assert [layer.modules for layer in states.layers] == [
        ("net.1", "net.2", "net.3"), ("net.4", "net.5", "net.6"), ("net.7",)
    ]  # fmt: skip
    assert states.samples == 5 and task.net.training
    _, twice = found(Functional(), 5, 4)
    assert [layer.name for layer in twice.layers] == ["net.first", "net.again", "net.again#2", "net.last"]


@pytest.mark.parametrize("make", [chain, Functional])
def test_jacobians_are_those_of_the_network(make):
    task, states = found(make(), 5, 4)
    net = task.net.eval()
    for i, x in enumerate(task.x):
        dense = jacrev(lambda x: net(x[None].clone())[0])(x)
        J = states.jacobian(len(states.layers))
        close(J.dense()[i], dense, 1e-12)
        close(J.T.dense()[i], dense.T, 1e-12)
    product = states.jacobian(3, 2).dense() @ states.jacobian(2, 1).dense() @ states.jacobian(1).dense()
    close(product, states.jacobian(3).dense(), 1e-12)


def test_the_loss_is_in_the_graph_of_the_input():
    task, states = found(chain(), 5, 4)
    (own,) = torch.autograd.grad(states.loss, states.start, retain_graph=True)
    task.eval()
    x = task.x.clone().requires_grad_()
    (there,) = torch.autograd.grad(task.net(x.clone()).square().mean(), x)
    close(own, there, 1e-12)


class Branches(Task):
    """A step that gives its input to more than one module, or function."""

    def __init__(self, way):
        super().__init__(nn.ModuleDict({name: nn.Linear(4, 3) for name in "ab"} | {"c": nn.Linear(7, 2)}), 5, 4)
        self.way = way

    def forward(self):
        return self.way(self.net, self.x.clone()).square().mean()


def gated(net, x):
    y = net["a"](x)
    return net["a"](torch.nn.functional.pad(y * net["b"](x), (0, 1)))


def own_views(net, x):
    return net["b"](torch.nn.functional.pad(net["a"](x.flatten(1)) * net["a"](x.flatten(1)), (0, 1)))


def masked(net, x):
    y = net["a"](x) * (x.sum(1, keepdim=True) > 0).double()
    return net["b"](torch.nn.functional.pad(y, (0, 1)))


def in_the_loss(net, x):
    return net["b"](torch.nn.functional.pad(net["a"](x), (0, 1))) - x[:, :3]


@pytest.mark.parametrize("way", [gated, own_views, masked, in_the_loss])
def test_an_input_of_two_modules_is_one(way):
    """By finite differences of the step's own last layer."""
    task = Branches(way)
    states = depth(freeze(task))
    last = []
    for module in task.net.values():
        module.register_forward_hook(lambda module, args, y: last.append(y.detach()))

    def at(x):
        way(task.net, x)
        return last[-1]

    J, v = states.jacobian(len(states.layers)), random(5, 4, seed=1)
    close(J @ v, (at(task.x + 1e-5 * v) - at(task.x - 1e-5 * v)) / 2e-5, 1e-8)


def before(net, x):
    part = x[:, 1:]
    y = net["a"](x)
    return net["c"](torch.cat([y, part, part[:, :1]], 1))


USED_AGAIN = {
    "beside": lambda net, x: net["c"](torch.cat([net["a"](x), x], 1)),
    "made of it": lambda net, x: net["c"](torch.cat([net["a"](x), 2 * x], 1)),
    "by weights": lambda net, x: net["c"](torch.cat([net["a"](x), x @ net["c"].weight[0, :4, None].expand(4, 4)], 1)),
    "in a module": lambda net, x: net["c"](torch.cat([net["a"](x), net["b"](x.tanh()), x[:, :1]], 1)),
    "whole": lambda net, x: net["c"](torch.cat([net["a"](x.view(5, 4)), x], 1)),
    "part": before,
}


@pytest.mark.parametrize("name", USED_AGAIN)
def test_an_input_that_functions_use_again_is_refused(name):
    with pytest.raises(Unmeasurable, match="used again outside of the module that it entered first"):
        depth(freeze(Branches(USED_AGAIN[name])))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embed(x))).flatten(1))


def test_integers_begin_with_what_the_first_module_makes_of_them():
    task = Task(Tokens(), dtype=torch.long)
    states = depth(freeze(task))
    assert states.start.shape == (3, 4, 3) and [layer.name for layer in states.layers] == ["net.mix", "net.head"]
    net, x = task.net, task.net.embed(task.x).detach()
    for i in range(3):
        dense = jacrev(lambda e: net.head(torch.tanh(net.mix(e)).flatten()))(x[i])
        close(states.jacobian(2).dense()[i], dense.flatten(1), 1e-12)


def test_blocks_are_layers():
    _, states = found(nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), 3, 5, 4)
    assert [layer.name for layer in states.layers] == ["net.layers.0", "net.layers.1"]


def test_sequences_may_have_their_samples_second():
    net = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 1)  # noqa: E731
    task, states = found(net(), 5, 3, 4, size=3)  # (positions, samples, width)
    assert (states.samples, states.layers[0].axis) == (3, 1)
    net = task.net.eval()
    for i in range(3):
        dense = jacrev(lambda x: net(x[:, None])[:, 0].flatten())(task.x[:, i])
        close(states.jacobian(1).dense()[i], dense.flatten(1), 1e-10)


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x - x.mean(0))


def test_samples_that_mix_are_refused():
    with pytest.raises(Unmeasurable, match="one sample's input changes another's"):
        found(Centred(), 5, 4)
    with pytest.raises(Unmeasurable, match="one sample's input changes another's"):
        found(nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 1), 5, 3, 4)  # axis 0 are positions here
    with pytest.raises(Unmeasurable, match="no depth"):
        found(nn.BatchNorm1d(4), 5, 4)


def test_forward_products_that_a_custom_function_loses_are_refused():
    """The derivative of a once-differentiable backward is 0 without a word, also along its cotangent."""
    net = lambda function: nn.Sequential(nn.Linear(4, 5), Custom(function), nn.Linear(5, 3))  # noqa: E731
    task, states = found(net(Twice), 5, 4)
    close(states.jacobian(2).dense()[0], torch.autograd.functional.jacobian(task.net, task.x[0]), 1e-12)
    with pytest.raises(Unmeasurable, match="in the network cannot be differentiated"):
        found(net(Once), 5, 4)


class Again(nn.Module):
    """Dropout that is computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Tanh()), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(checkpoint(self.inner, x, use_reentrant=False))


def test_checkpointed_activations_are_computed_again_in_eval_mode():
    """A product comes after the replay, when the network is back in the mode of training."""
    task, states = found(Again(), 5, 6)
    net = task.net.eval()
    truth = torch.stack([torch.autograd.functional.jacobian(net, x) for x in task.x])
    task.net.train()
    close(states.jacobian(len(states.layers)).dense(), truth, 1e-12)


@pytest.mark.parametrize("make", [Model, lambda: Model(cnn()), lambda: Model(Transformer(nn.ReLU()))])
def test_a_step_gives_its_first_samples_in_eval_mode(make):
    seen = []

    class Looks(Sharpness):
        def update(self, snapshot):
            states = depth(snapshot, samples=3)
            seen.append((states, [m.training for m in snapshot.module.modules()]))
            super().update(snapshot)

    fit(make, StabilityMonitor([Looks()], every_n_steps=1), loader=data(), max_steps=1)
    ((states, modes),) = seen
    assert states.samples == 3 and all(modes) and torch.isfinite(states.loss)
    assert states.layers[-1].state.shape[-1] == CLASSES
