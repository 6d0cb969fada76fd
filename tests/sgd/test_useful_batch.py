"""The batch size at which noise and mean curvature limit the rate alike."""

import math

import pytest
import torch

from lsp_callbacks.functional import gram_mean_square_lr, mean_square_lr, reduced_modes, useful_batch


def rows(count, generator, noise=4.0, width=60):
    """Curvature 1 along one direction that all samples share, and noise in the others."""
    z = noise / width**0.5 * torch.randn(count, width, generator=generator, dtype=torch.float64)
    z[:, 0] = 1.0
    return z


def critical(z, population):
    return lambda size: gram_mean_square_lr(z @ z.mT, batch_size=size, population=population, tol=2e-3)


def test_the_law_of_noise_and_curvature():
    batch = useful_batch(lambda size: 1 / (12 / size + 0.25), population=10**6, samples=10**6)
    assert batch.low == batch.size == batch.high == pytest.approx(48, abs=1)


def test_all_samples_say_it_exactly():
    """By the dense operator of the second moment, at every batch size."""
    z, n = rows(40, torch.Generator().manual_seed(0)), 40
    batch = useful_batch(critical(z, n), population=n, samples=n)
    modes = reduced_modes(z @ z.mT)
    exact = [mean_square_lr(modes, batch_size=size) for size in range(1, n + 1)]
    assert batch.low == 1 + next(k for k, rate in enumerate(exact) if rate >= exact[-1] / 2)
    assert 1 < batch.low < n


def test_identical_samples_make_batches_useless():
    z = torch.ones(8, 3, dtype=torch.float64)
    assert useful_batch(critical(z, 8), population=8, samples=8).size == 1


@pytest.mark.parametrize(("noise", "width"), [(4.0, 10), (4.0, 60), (8.0, 400)])
@pytest.mark.parametrize("seed", range(3))
def test_few_samples_bound_that_of_all(seed, noise, width):
    generator = torch.Generator().manual_seed(seed)
    every = rows(400, generator, noise, width)
    many = useful_batch(critical(every[:320], 10**6), population=10**6, samples=320)
    few = useful_batch(critical(every[320:], 10**6), population=10**6, samples=80)
    assert few.low <= many.size <= few.high and few.high / few.low < 8


def test_too_few_samples_say_little():
    z = rows(12, torch.Generator().manual_seed(0), 40.0, 2000)
    batch = useful_batch(critical(z, 10**6), population=10**6, samples=12)
    assert batch.high > 4 * batch.low


def test_refuses_what_has_no_limit():
    with pytest.raises(ValueError, match="nothing limits"):
        useful_batch(lambda size: math.inf, population=10, samples=10)
    with pytest.raises(ValueError, match="samples=11"):
        useful_batch(lambda size: 1.0, population=10, samples=11)


def test_fewer_samples_than_the_batch_needs_set_no_upper_bound():
    batch = useful_batch(lambda size: 1 / (30 / size + 1), population=10**6, samples=20)
    assert batch.low < 30 and batch.high == math.inf
