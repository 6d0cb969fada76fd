"""Batches of any kind have a size, and can be cut to their first samples."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from lsp_callbacks.step.batch import batch_size, samples_between

X, SCALAR, OTHER = torch.arange(12.0).reshape(4, 3), torch.tensor(2.0), torch.ones(5)
Pair = namedtuple("Pair", "x y")


@dataclass
class Held:
    """A batch that is an object."""

    x: torch.Tensor
    rest: dict


@dataclass(frozen=True)
class Frozen:
    """A batch that cannot be written to."""

    x: torch.Tensor


BATCHES = {
    "tensor": (X, lambda b: b),
    "tuple": ((X, "text", SCALAR, OTHER), lambda b: b[0]),
    "named tuple": (Pair(X, 3), lambda b: b.x),
    "dict": ({"x": X, "more": [X]}, lambda b: b["more"][0]),
    "user dict": (UserDict(x=X, more=(X, OTHER)), lambda b: b["more"][0]),
    "dataclass": (Held(X, {"more": X}), lambda b: b.rest["more"]),
    "frozen dataclass": ([Frozen(X)], lambda b: b[0].x),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_the_first_samples_of_a_batch(kind):
    batch, inner = BATCHES[kind]
    cut = samples_between(batch, 0, 2)
    assert type(cut) is type(batch) and batch_size(batch) == 4 and batch_size(cut) == 2
    assert torch.equal(inner(cut), X[:2]) and torch.equal(inner(batch), X)


def test_what_is_no_sample_stays_whole():
    cut = samples_between((X, "text", SCALAR, OTHER), 0, 2)
    assert cut[1] == "text" and cut[2] is SCALAR and cut[3] is OTHER
