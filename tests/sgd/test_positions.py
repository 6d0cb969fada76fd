"""Rows at few positions (tokens) of each sample, and the noise of a batch in which all positions have their part."""

import pytest
import torch

from lsp_callbacks.functional import UpdateRule, design_effect, mean_square_lr, reduced_modes
from lsp_callbacks.operators.sgd.frozen_sgd import FrozenSGD
from lsp_callbacks.operators.sgd.gram_matrix import TangentKernel

N, T, B, ENDLESS = 12, 16, 4, 10**9


def rows_of(kind, seed=0):
    """Rows as if each position stood for its whole sample, ``(N, T, r)``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N, 1 if kind == "alike" else T, 6)
    z = torch.randn(shape, generator=generator, dtype=torch.float64).expand(N, T, 6).clone()
    return z + torch.randn(N, 1, 6, generator=generator, dtype=torch.float64) if kind == "partly" else z


def whole(z):
    """The rate from all positions, as the rows of their samples."""
    flat = (z / T**0.5).flatten(0, 1)
    return mean_square_lr(reduced_modes(flat @ flat.T, T), batch_size=B, population=ENDLESS)


def looked_at(z, places, chance=None):
    """The rate from the rows at some positions of some samples."""
    looked = places.shape[1]
    some = z.gather(1, places[..., None].expand(-1, -1, z.shape[-1])) / looked**0.5
    some = some if chance is None else (some / chance.sqrt()[:, None, None])[: len(chance)]
    gram = some.flatten(0, 1) @ some.flatten(0, 1).T
    design = design_effect(gram, looked, T, samples=N, chance=chance)
    kernel = TangentKernel(
        gram, looked, {}, {}, 0.0, 0.0, "", None, 0, samples=N, chance=chance, positions=T, design=design
    )
    sgd = FrozenSGD(UpdateRule(), 0.1, B, ENDLESS, kernel, frozen=False)
    return sgd.mean_square_lr(design=design, tol=1e-2), design


@pytest.mark.parametrize(("kind", "within"), [("apart", 0.05), ("partly", 0.25), ("alike", 0.02)])
def test_from_all_positions_the_rate_is_that_of_their_samples(kind, within):
    z = rows_of(kind)
    rate, design = looked_at(z, torch.arange(T).expand(N, T))
    assert rate == pytest.approx(whole(z), rel=within)
    assert {"apart": design < 1.3, "partly": 1.5 < design < T / 2, "alike": design > 0.99 * T}[kind]


@pytest.mark.parametrize("kind", ["apart", "partly", "alike"])
def test_from_few_positions_it_scatters_around_that(kind):
    ratios = []
    for seed in range(24):
        z = rows_of(kind, seed)
        places = torch.rand(N, T, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :3]
        ratios.append(looked_at(z, places)[0] / whole(z))
    assert 0.75 <= torch.tensor(ratios).median() <= 1.2  # as samples of three positions: 0.25 where these are apart


def test_whole_batches_have_no_noise():
    z = rows_of("apart")
    flat = (z / T**0.5).flatten(0, 1)
    kernel = TangentKernel(flat @ flat.T, T, {}, {}, 0.0, 0.0, "", None, 0, samples=N, positions=T)
    rate = FrozenSGD(UpdateRule(), 0.1, N, N, kernel, frozen=False).mean_square_lr(tol=1e-2)
    assert rate == pytest.approx(2 * N / float(torch.linalg.eigvalsh(kernel.gram)[-1]), rel=2e-2)


@pytest.mark.parametrize("outputs", [2, 3])
def test_several_outputs_of_a_position_stay_together(outputs):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(N, T, outputs, 6, generator=generator, dtype=torch.float64)
    flat = z.transpose(1, 2).flatten(0, 2) / T**0.5  # outputs come first
    kernel = TangentKernel(
        flat @ flat.T, T * outputs, {}, {}, 0.0, 0.0, "", None, 0, samples=N, positions=T, outputs=outputs
    )
    rate = FrozenSGD(UpdateRule(), 0.1, B, ENDLESS, kernel, frozen=False).mean_square_lr(tol=1e-2)
    rows = z.flatten(0, 1).flatten(0, 1)
    expected = mean_square_lr(reduced_modes(rows @ rows.T, outputs), batch_size=B * T, population=ENDLESS)
    assert rate == pytest.approx(expected, rel=2e-2)


def test_some_samples_stand_for_the_others():
    z = rows_of("partly")[: N // 2]
    chance = torch.full((N // 2,), 0.5, dtype=torch.float64)
    rate, design = looked_at(z, torch.arange(T).expand(N // 2, T), chance)
    flat = (z / T**0.5).flatten(0, 1)
    assert design == pytest.approx(design_effect(flat @ flat.T, T, T, samples=N // 2), rel=0.2)
    assert rate == pytest.approx(whole(torch.cat([z, z])), rel=0.25)
