"""Planted faults: each is named, by module and by operation, and what is meant to be infinite is not."""

import math
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lsp_callbacks.functional import first_fault

NAN, INF = math.nan, math.inf


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return g * NAN


class Inner(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Function(function))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def net(middle, last=None):
    torch.manual_seed(0)
    middle = middle if isinstance(middle, nn.Module) else Function(middle)
    return nn.Sequential(nn.Linear(4, 4), middle, last or nn.Linear(4, 4))


def filled(value):
    module = net(torch.tanh)
    module[2].weight.data[0, 0] = value
    return module


def softmax_by_hand(h):
    top = (100 + h.abs()).exp()
    return top / top.sum(-1, keepdim=True)


def attention(mask):
    def attend(h):
        return (h @ h.T).masked_fill(mask, -INF).softmax(-1) @ h

    return attend


def all_masked():
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    mask = torch.ones(3, 3, dtype=torch.bool)

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x[None], x[None], x[None], attn_mask=mask, need_weights=True)[0][0]

    return Attend()


def statistics_are_nan():
    """The step's own forward pass has spoilt them already."""
    module = net(lambda h: h / 0, nn.BatchNorm1d(4))
    module[2].running_mean.fill_(NAN), module[2].running_var.fill_(NAN)
    return module


def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def total(module):
    return module(x()).sum()


def half(module):
    return module.half()(x().half()).sum()


def bfloat(module):
    with torch.autocast("cpu", torch.bfloat16):
        return module(x()).float().sum()


CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)
#: Module, loss, and what is expected of the fault.
FAULTS = {
    "log of 0": (net(lambda h: (0 * h).log()), total, "forward", "1", "aten.log", "Inf", "aten.addmm"),
    "0 / 0": (net(lambda h: (0 * h) / (0 * h)), total, "forward", "1", "aten.div", "NaN", None),
    "exp": (net(softmax_by_hand), total, "forward", "1", "aten.exp", "Inf", "aten.div"),
    "all masked": (
        net(attention(torch.ones(3, 3, dtype=torch.bool))), total, "forward", "1", "aten._softmax", "NaN", None
    ),
    "all masked, of torch": (net(all_masked()), total, "forward", "1.layer", "aten._softmax", "NaN", None),
    "variance 0": (
        net(nn.Sequential(Function(lambda h: 0 * h + 1), nn.LayerNorm(4, eps=0.0))), total,
        "forward", "1.1", "aten.native_layer_norm", "NaN", None,
    ),
    "masked, and a log of 0": (
        net(lambda h: (0 * attention(CAUSAL)(h)).log()), total, "forward", "1", "aten.log", "Inf", "aten.addmm"
    ),
    "float16": (net(lambda h: 1e3 * h.sign(), nn.Linear(4, 1)), half, "forward", "2", "aten.addmm", "Inf", None),
    "bfloat16": (
        net(lambda h: 3.4e38 * h.float().sign()), bfloat, "forward", "2", "aten._to_copy", "Inf", "aten.addmm"
    ),
    "the user's loss": (net(torch.tanh), lambda m: (0 * total(m)).log(), "forward", "", "aten.log", "Inf", None),
    "in place, in a view": (
        net(lambda h: (lambda t: (t[0].div_(0.0), t)[1])(h.clone())), total, "forward", "1", "aten.div_", "Inf",
        "aten.addmm",
    ),
    "in place, without a result": (
        net(lambda h: (lambda t: (torch._foreach_div_(t, 0.0), t[0])[1])([h.clone()])), total, "forward", "1",
        "aten._foreach_div_", "Inf", "aten.addmm",
    ),
    "all masked by a constant": (
        net(lambda h: torch.where(h < INF, torch.tensor(-INF), h).softmax(-1)), total, "forward", "1", "aten._softmax",
        "NaN", None,
    ),
    "statistics": (statistics_are_nan(), total, "forward", "1", "aten.div", "Inf", "aten.native_batch_norm"),
    "sqrt'(0)": (net(lambda h: (0 * h).sqrt()), total, "backward", "1", "aten.div", "Inf", "aten.mul"),
    "a norm by hand": (
        net(lambda h: h + (0 * h).square().sum(-1, keepdim=True).sqrt()), total, "backward", "1", "aten.div", "Inf",
        "aten.mul",
    ),
    "a custom function": (net(Bad.apply), total, "backward", "1", "aten.mul", "NaN", None),
    "masked too late": (
        net(lambda h: torch.where(h > 0, h.sqrt(), 0.0)), total, "backward", "1", "aten.sqrt", "NaN", None
    ),
    "checkpointed": (
        net(Inner(lambda h: (0 * h).sqrt())), total, "backward", "1.inner.1", "aten.div", "Inf", "aten.mul"
    ),
}  # fmt: skip
FAULTS["float16"][0][2].weight.data.fill_(100.0)


@pytest.mark.parametrize("name", FAULTS)
def test_the_operation_and_its_module_are_named(name):
    module, loss, where, place, operation, kind, then = FAULTS[name]
    fault = first_fault(lambda: loss(module), module, step=7)
    assert (fault.step, fault.where, fault.module, fault.operation) == (7, where, place, operation)
    assert (fault.kind, fault.then) == (kind, then) or (name == "float16" and fault.kind == "Inf")
    assert fault.inputs and fault.source is None
    assert operation in str(fault) and (repr(place) if place else "outside of all submodules") in str(fault)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("value, kind", [(NAN, "NaN"), (INF, "Inf"), (-INF, "Inf")])
def test_what_was_not_finite_before_is_named(value, kind):
    batch = {"x": [x(), x()]}
    batch["x"][1][0, 0] = value
    module = net(torch.relu)
    fault = first_fault(lambda: module(batch["x"][1]).sum(), module, batch)
    assert (fault.where, fault.source, fault.kind) == ("batch", "batch['x'][1]", kind)
    assert str(fault).startswith(f"the batch holds {kind}: batch['x'][1]")
    assert first_fault(lambda: module(batch["x"][0]).sum(), module, batch) is None  # it reaches no loss
    module = filled(value)
    fault = first_fault(lambda: total(module), module)
    assert (fault.where, fault.source, fault.kind, fault.operation) == ("weights", "2.weight", kind, None)
    module = net(torch.tanh, nn.BatchNorm1d(4).eval())
    module[2].running_mean.fill_(value)
    assert first_fault(lambda: total(module), module).source == "2.running_mean"


def test_a_constant_is_named():
    module = net(torch.tanh)
    fault = first_fault(lambda: total(module) * torch.tensor(NAN), module)
    assert fault.where == "forward" and "constant" in fault.source and "from outside holds NaN" in str(fault)


@pytest.mark.parametrize(
    "middle",
    [
        torch.tanh,
        attention(CAUSAL),
        lambda h: (h @ h.T + torch.full((3, 3), -INF).triu(1)).softmax(-1) @ h,
        lambda h: torch.where(h > 1e9, 1 / (0 * h), h).detach() + h,
        lambda h: h + (0 * h).norm(dim=-1, keepdim=True),  # its gradient at 0 is masked by torch
        lambda h: h.clamp(max=INF),
        lambda h: h + 0 * torch.empty(3, 4).fill_(1.0),
    ],
)
def test_what_is_meant_or_masked_is_no_fault(middle):
    module = net(middle)
    assert first_fault(lambda: total(module), module) is None


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: (0 * h).sqrt() * 0,
        lambda h: torch.where(h > 1e9, (0 * h).log(), h),
        lambda h: torch.where(h > 1e9, (0 * h).pow(0.5), h),
        lambda h: torch.where(h > 1e9, (0 * h).rsqrt() * 0, h),
        Bad.apply,
    ],
)
@pytest.mark.filterwarnings("ignore:Error detected")
def test_anomaly_mode_blames_the_same_backward(middle):
    """An independent witness: it names the first backward function whose result is NaN."""
    module = net(middle)
    with pytest.raises(RuntimeError, match="returned nan") as caught, torch.autograd.set_detect_anomaly(True):
        total(module).backward()
    theirs = re.search(r"Function '(\w+)'", str(caught.value))[1]
    fault = first_fault(lambda: total(module), module)
    assert fault.where == "backward" and fault.module == "1"
    own = fault.node or fault.operation.removeprefix("aten.").capitalize() + "Backward0"  # what was masked, forward
    assert own == theirs
