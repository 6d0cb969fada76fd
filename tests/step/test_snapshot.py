"""What several quantities need of a step is computed once, and a changed step begins without it."""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from lsp_callbacks import RunContext, Snapshot
from lsp_callbacks.step.snapshot import computed_once

NET = nn.Linear(2, 1)


@computed_once
def drawn(snapshot, kind="plain", *, scale=1.0):
    """A new object at each computation."""
    return [kind, scale]


def step(**settings):
    return Snapshot(step=0, module=NET, replay=lambda: NET.bias.sum(), **settings)


def test_a_shared_result_is_the_same_object():
    snapshot = step()
    assert drawn(snapshot) is drawn(snapshot)
    assert drawn(snapshot) is not drawn(step())


def test_results_are_kept_apart_by_their_arguments():
    snapshot = step()
    assert drawn(snapshot, "other") == ["other", 1.0] and drawn(snapshot, scale=2.0) == ["plain", 2.0]
    assert drawn(snapshot, "other") is drawn(snapshot, "other") is not drawn(snapshot, "third")


@pytest.mark.parametrize("change", [lambda s: replace(s), lambda s: replace(s, tolerance=1e-3)])
def test_a_changed_step_begins_without_them(change):
    snapshot = step()
    first, graph = drawn(snapshot), snapshot.graph
    assert drawn(change(snapshot)) is not first and change(snapshot).verified.graph is None
    assert drawn(snapshot) is first and snapshot.graph is graph


def test_forgotten_results_are_computed_again():
    snapshot = step()
    first = drawn(snapshot)
    snapshot.forget()
    assert drawn(snapshot) is not first


def test_the_facts_of_a_run_are_in_one_place():
    run = RunContext(unsupported="a hook", seed=3)
    assert step(run=run).unsupported == "a hook" and step().unsupported is None
    assert (
        step(run=run, mismatch="clipped").unsupported == "a hook" and step(mismatch="clipped").unsupported == "clipped"
    )
    assert not {field.name for field in fields(RunContext)} & {field.name for field in fields(Snapshot)}
    with pytest.raises(AttributeError):
        run.seed = 4
    assert torch.rand(1, generator=step(run=run).generator("a")) != torch.rand(1, generator=step().generator("a"))
