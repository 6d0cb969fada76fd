"""The walk of the autograd graph, on graphs drawn by hand."""

import torch
from problems import f64
from torch.nn import functional as F

from lsp_callbacks.autograd.graph import inputs_of, kinks_between, leaf_of, leaves_of, nodes_between, walk
from lsp_callbacks.autograd.module_calls import upstream


def leaf():
    return torch.ones(2, dtype=f64, requires_grad=True)


def diamond():
    """Two paths from x to y, and one from w: ``y = exp(x) * sin(exp(x)) + w``."""
    x, w = leaf(), leaf()
    e = x.exp()
    s = e.sin()
    m = e * s
    return x, w, e, s, m, m + w


def test_each_node_comes_once_and_after_its_inputs():
    x, w, *_, y = diamond()
    nodes = list(walk([y.grad_fn, None, y.grad_fn]))
    assert len(nodes) == len(set(nodes)) == 6  # two leaves, exp, sin, times, plus
    place = {node: i for i, node in enumerate(nodes)}
    assert all(place[child] < place[node] for node in nodes for child in inputs_of(node) if child is not None)
    assert [leaf_of(node) for node in nodes if leaf_of(node) is not None] == [x, w] and nodes[-1] is y.grad_fn
    assert leaves_of(y) == {id(x), id(w), id(None)}


def test_roots_come_in_their_order():
    """What an earlier root depends on comes before what only a later one does."""
    _, _, e, s, *_, y = diamond()
    nodes = list(walk([s.grad_fn, y.grad_fn]))
    assert nodes.index(s.grad_fn) == 2 and nodes[1] is e.grad_fn


def test_a_stop_is_yielded_and_not_entered():
    _, w, e, s, m, y = diamond()
    nodes = set(walk([y.grad_fn], stop={m.grad_fn}))
    assert {leaf_of(node) for node in nodes} == {None, w} and len(nodes) == 3
    assert upstream(y.grad_fn, {e.grad_fn: "e", s.grad_fn: "s"}) == ["e", "s"]
    assert upstream(y.grad_fn, {e.grad_fn: "e", m.grad_fn: "m"}) == ["m"]


def test_inputs_may_leave_some_out():
    x, w, _, _, m, y = diamond()
    short = {m.grad_fn: [child for child in inputs_of(m.grad_fn) if child.name() == "SinBackward0"]}
    nodes = list(walk([y.grad_fn], inputs=lambda node: short.get(node, inputs_of(node))))
    assert {leaf_of(node) for node in nodes} == {None, x, w}


def test_deep_graphs_need_no_recursion():
    y = x = leaf()
    for _ in range(20_000):
        y = y.sin()
    assert len(list(walk([y.grad_fn]))) == 20_001 and y.grad_fn in nodes_between([y], [x])


def test_kinks_count_on_the_paths_from_the_leaves_only():
    x, w = leaf(), leaf()
    y = F.relu(x).exp() + w.abs()
    assert kinks_between(y, [x]) == ("ReluBackward0",) and kinks_between(y, [w]) == ("AbsBackward0",)
    assert kinks_between(y, [x, w]) == ("AbsBackward0", "ReluBackward0") and kinks_between(y, [leaf()]) == ()
    assert nodes_between([y.exp()], [x]) > nodes_between([F.relu(x)], [w]) == set()
