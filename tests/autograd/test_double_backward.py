"""One Jacobian by double backward: against dense ones, whatever the shapes."""

import pytest
import torch
from model_zoo import Twice
from problems import close, f64, random

from lsp_callbacks import Unmeasurable
from lsp_callbacks.autograd.double_backward import Comparison, agrees, check_adjoint, jacobian
from lsp_callbacks.autograd.graph import read


def transposed(J):
    return J.T.dense().T


def test_of_several_inputs_it_is_the_dense_one_of_their_concatenation():
    W, b, x = (random(*shape).requires_grad_() for shape in ((3, 4), (3,), (4,)))

    def f(W, b, x):
        return torch.tanh(W @ x + b) * b

    J = jacobian(f(W, b, x), [W, b, x])
    dense = torch.cat([part.flatten(1) for part in torch.autograd.functional.jacobian(f, (W, b, x))], dim=1)
    close(J.dense(), dense, 1e-12)
    close(transposed(J), dense, 1e-12)


@pytest.mark.parametrize("axes", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_of_samples_it_is_one_matrix_for_each_wherever_their_axis_is(axes):
    x, W = random(5, 2, 3), random(6, 4)
    inputs = x.movedim(0, axes[1]).clone().requires_grad_()
    outputs = torch.sin(inputs.movedim(axes[1], 0).flatten(1) @ W).view(5, 2, 2).movedim(0, axes[0])
    J = jacobian(outputs, inputs, axes=axes)
    expected = torch.cos(x.flatten(1) @ W)[:, :, None] * W.T
    close(J.dense(), expected, 1e-12)
    v, w = random(5, 6, seed=1), random(5, 4, seed=2)
    close((w * (J @ v)).sum(-1), ((J.T @ w) * v).sum(-1), 1e-12)


def test_outputs_that_do_not_depend_on_an_input_give_zeros():
    x, other = random(3).requires_grad_(), random(2).requires_grad_()
    J = jacobian(x.sin(), [other, x])
    assert J.shape == (3, 5) and not J.dense()[:, :2].any() and J.dense()[:, 2:].any()
    assert not jacobian(x.sin(), other).dense().any()
    with pytest.raises(RuntimeError):
        jacobian(torch.ones(2), x)


def test_vectors_are_never_half_precision():
    x = random(3).bfloat16().requires_grad_()
    J = jacobian(x.sin(), x)
    assert J.dtype == (J @ torch.ones(3)).dtype == (J.T @ torch.ones(3)).dtype == torch.float32


class Doubled(Twice):
    """A backward that is right, and whose own derivative is lost."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (g.detach() * x.detach().cos()).detach()


def test_a_backward_without_a_derivative_is_refused():
    x = random(4).requires_grad_()
    good, bad = x.sin(), Doubled.apply(x)
    assert agrees(jacobian(good, x), 1e-9) and not agrees(jacobian(bad, x), 1e-3)
    check_adjoint(jacobian(good, x), read(good.sum()), "it")
    with pytest.raises(Unmeasurable, match="backward of Doubled in it cannot be differentiated"):
        check_adjoint(jacobian(bad, x), read(bad.sum()), "it")


@pytest.mark.parametrize(
    ("factor", "distance", "holds"),
    [(1.0, 1e-3, (True, False, False)), (0.97, 1e-3, (False, False, False)), (0.975, 3e-15, (True, True, False)),
     (0.5, 1e-15, (False, True, True))],
)  # fmt: skip
def test_rounding_excuses_two_per_cent_and_hides_all_at_last(factor, distance, holds):
    central = torch.tensor([0.6, 0.8], dtype=f64)
    if holds[2]:
        central = 1e-1 * central
    found = Comparison.of(factor * central, central, torch.tensor([1.0], dtype=f64), distance)
    assert (found.agrees, found.rounded, found.lost) == holds
