"""No number depends on the units of a run but by the power that its own unit says: see `scaling.UNITS`."""

import pytest
import torch
from scaling import LOOSE, POWERS_OF_TWO, TOLERANCE, UNITS, compared, unit_of

from lsp_callbacks.quantities import REGISTRY

f32, f64 = torch.float32, torch.float64
#: A few thousandths of the numbers may be missing.
MISSING = 0.01


def test_every_number_of_every_quantity_has_a_law():
    assert UNITS.keys() == REGISTRY.keys()
    for name, quantity in REGISTRY.items():
        for key in (*quantity.keys, *quantity.optional):
            assert unit_of(name, key)


def held(name, *, dtype, **which):
    for law, row in compared(name, dtype=dtype, **which).items():
        most = max(TOLERANCE[dtype], LOOSE.get(name, 0) * (dtype == f32))
        assert row.worst[0] <= most, (law, row.worst)
        assert row.missing <= MISSING * row.numbers, (law, row.reasons)
        yield law, row.numbers


@pytest.mark.parametrize("name", REGISTRY)
def test_a_quantity_in_other_units(name):
    kinds = ("sgd",) if name == "sgd_stability" else ("momentum",)
    numbers = dict(held(name, dtype=f64, scales=(1e3,), models=("tanh",), optimizers=kinds, laws=("loss", "inside")))
    numbers |= held(name, dtype=f32, scales=(1e-3,), models=("relu",), optimizers=("adamw",), laws=("homogeneous",))
    assert numbers["loss"] and numbers["inside"]


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_errors_that_round_to_nothing_are_there_in_all_units(kind):
    """12 parameters or fewer are exact: whether two errors are both 0 must not say which numbers are shown."""
    how = {"scales": (1e-6, 1e3), "models": ("linear",), "optimizers": (kind,), "laws": ("loss", "inside")}
    for row in compared("sharpness", dtype=f64, **how).values():
        assert row.numbers and not row.missing, row.reasons


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize("name", ["lyapunov", "lyapunov_trajectory"])
def test_the_first_steps_of_a_run_in_other_units(name, kind):
    """The optimizer has no buffer yet: what is pushed must not be weighed by a number without its unit."""
    how = {"scales": (1e6,), "models": ("tanh",), "optimizers": (kind,), "laws": ("inside",), "before": 0}
    assert all(numbers for _, numbers in held(name, dtype=f64, **how))


@pytest.mark.parametrize(
    "name, kind, scale",
    [
        ("lyapunov", "adam", 1e-6),
        ("lyapunov", "adam", 1e6),
        ("stability_profile", "adamw", 1e6),
        ("sharpness", "adamw", 1e-6),
    ],
)
def test_second_moments_whose_squares_leave_float32(name, kind, scale):
    """Gradients of 1e-18 and 1e18: what moves second moments is far from 1, and so is its square."""
    how = {"scales": (scale,), "models": ("relu",), "optimizers": (kind,), "laws": ("homogeneous",)}
    assert all(numbers for _, numbers in held(name, dtype=f32, **how))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("name", REGISTRY)
def test_a_quantity_at_all_scales(name, dtype):
    assert sum(numbers for _, numbers in held(name, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTRY)
def test_powers_of_two_change_no_digit(name):
    """In float32, too, but for norms that are summed otherwise."""
    for law, row in compared(name, dtype=f32, scales=POWERS_OF_TWO).items():
        assert row.worst[0] <= (1e-6 if law == "loss" else 5e-4), (law, row.worst)
        assert row.missing == 0, (law, row.reasons)
