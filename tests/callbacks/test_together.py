"""Features that were made apart, together."""

import math

import pytest
import torch
from harness import Model, fit
from problems import freeze, regression
from torch import nn

from lsp_callbacks import LeaveOneOut, StabilityMonitor, StabilityProfile
from lsp_callbacks.functional.numerics.numeric_range import peak
from lsp_callbacks.operators.network.depth import depth
from lsp_callbacks.operators.network.lipschitz import lipschitz_upper
from lsp_callbacks.operators.trajectory.proximal import update_response
from lsp_callbacks.operators.trajectory.step_jacobian import step_response
from lsp_callbacks.quantities.numerics.numerics import range_of_step


def erased(name, tensor, lr):
    return 0 * tensor


def halved(name, tensor, lr):
    return tensor / 2


def test_the_prox_is_in_every_tangent():
    task = regression()
    snapshot = freeze(task, torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9), prox=halved)
    n = sum(p.numel() for p in task.parameters())
    plain, whole = step_response(snapshot).dense(), update_response(snapshot).dense()
    torch.testing.assert_close(whole[:n], plain[:n] / 2)
    torch.testing.assert_close(whole[n:], plain[n:])  # the buffer does not feel it


class Erased(Model):
    """All weights are 0 after each step."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        for p in self.parameters():
            p.data.zero_()


def test_what_is_erased_has_no_sensitivity():
    quantities = [StabilityProfile(horizon=2, directions=2, samples=2), LeaveOneOut(2, window=2)]
    fit(Erased, callback := StabilityMonitor(quantities, every_n_steps=1, prox=erased), max_steps=6)
    for key in ("sigma_theta", "sigma_u", "leave_one_out_parameters"):
        values = callback.history[f"stability/{key}"].values
        assert values and not any(values), (key, values)


def test_what_knows_no_prox_is_left_out():
    with pytest.warns(UserWarning, match=r"skips mean_square_stability .the map that prox applies"):
        fit(Erased, callback := StabilityMonitor(every_n_steps=1, prox=erased), max_steps=2)
    assert "mean_square_stability" in callback.monitor.skipped
    losses = dict.fromkeys(("a", "b"), lambda module, batch: module.loss(batch))
    with pytest.raises(ValueError, match=r"prox.*players"):
        StabilityMonitor(loss_fn=losses, prox=erased)


@pytest.mark.parametrize("pool", [nn.AvgPool1d(4, 4, ceil_mode=True), nn.AvgPool1d(2, 2, 1, count_include_pad=False)])
def test_windows_that_are_cut_have_no_bound(pool):
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv1d(1, 1, 1), pool)
            self.register_buffer("x", torch.randn(3, 1, 5))

        def forward(self):
            return self.net(self.x).square().mean()

    with pytest.raises(ValueError, match="AvgPool"):
        lipschitz_upper(depth(freeze(Task())))


def test_overflow_is_no_head_room():
    step = regression()
    for p in step.parameters():
        p.data.fill_(1e200)
    assert min(range_of_step(freeze(step, replay=lambda: (step() ** 0).sum())).activations.values()) == 0.0
    overflown, mask = torch.tensor([1.0, math.inf]), torch.tensor([1.0, torch.finfo(torch.float32).min])
    assert peak(mask, True) == 1.0 and peak(overflown, True) == 1.0 and peak(overflown[1:], False) == 0.0
    assert peak(overflown) == math.inf and peak(overflown[1:], True) == math.inf
    assert peak(torch.tensor([math.nan, 1.0])) == math.inf
