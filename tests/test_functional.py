"""The public functions: plain objects in, tensors and small results out."""

import inspect
import typing

import pytest
import torch
from torch import nn

import lsp_callbacks.functional as functional
from lsp_callbacks.functional import sharpness, spectral_norm, training_exponent

FUNCTIONS = [name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))]
TOPICS = (functional.curvature, functional.sgd, functional.trajectory, functional.network, functional.numerics)


@pytest.mark.parametrize("name", functional.__all__)
def test_nothing_public_takes_or_gives_what_belongs_to_a_training_step(name):
    public = getattr(functional, name)
    # Annotations resolve to objects: a class of step or operators would show its module.
    callables = (
        [public] if inspect.isfunction(public) else [m for _, m in inspect.getmembers(public, inspect.isfunction)]
    )
    for function in callables:
        if function.__module__.startswith("lsp_callbacks"):
            for annotation in typing.get_type_hints(function).values():
                assert not any(word in str(annotation) for word in ("Snapshot", "lsp_callbacks.step", ".operators."))


def test_each_topic_lists_its_own_and_all_lists_all():
    topics = [set(topic.__all__) for topic in TOPICS]
    assert set(functional.__all__) == set().union(*topics) | {"lyapunov_exponents"}
    assert sum(map(len, topics)) + 1 == len(functional.__all__)
    assert all(getattr(functional, name) is getattr(topic, name) for topic in TOPICS for name in topic.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_says_in_its_first_line_what_it_returns(name):
    first = inspect.getdoc(getattr(functional, name)).splitlines()[0]
    assert first.split()[0] in ("Return", "Fit", "Push") and first[-1] in ".", first


def test_three_numbers_in_a_few_lines():
    """As README shows them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    batch = torch.randn(128, 8, 8), torch.randint(10, (128,))
    loss_fn = nn.CrossEntropyLoss()

    value = sharpness(net, loss_fn, batch)  # gradient descent is stable at rates below 2 / value

    norm = spectral_norm(nn.Conv2d(3, 16, 3, stride=2), input_size=(32, 32))

    def train_step(net, optimizer, batch):
        optimizer.zero_grad()
        loss_fn(net(batch[0]), batch[1]).backward()
        optimizer.step()

    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    exponent = training_exponent(train_step, net, sgd, [batch] * 20)  # nats a step; positive: runs part

    assert 0 < value < 20 and 0 < norm < 5 and abs(exponent) < 0.01
    assert all(x.shape == () and x.dtype == torch.float64 and not x.requires_grad for x in (value, norm, exponent))
