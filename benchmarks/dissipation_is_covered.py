"""Claim: the bounds of the dissipation hold as often as they say: ``python benchmarks/dissipation_is_covered.py``.

Series with a known q: the bias of plain least squares, what Kendall's correction and the jackknife leave of it, and the
share of series whose q lies on the right side of each bound, of a promised 90 %. At the end, series with no answer: how
often there are no bounds.
"""

import math

import torch

from lsp_callbacks.functional import dissipation

SERIES, LENGTHS = 400, (60, 200, 400, 2000)


def quadratic(series, n, start=None):
    """``theta+ = 0.8 theta + 0.1 xi``, ``E = theta^2``."""
    theta = 0.1 / 0.6 * torch.randn(series).double() if start is None else torch.full((series,), start).double()
    energies = []
    for _ in range(n):
        energies.append(theta.square())
        theta = 0.8 * theta + 0.1 * torch.randn(series)
    return torch.stack(energies), 0.64


def autoregressive(series, n, q, start=None, reading=0.0):
    """AR(1); ``reading`` is the size of an error of each value by itself, in standard deviations."""
    spread = 1 / math.sqrt(1 - q**2)
    value = spread * torch.randn(series).double() if start is None else torch.full((series,), start * spread).double()
    values = []
    for _ in range(n):
        values.append(value + reading * spread * torch.randn(series))
        value = q * value + torch.randn(series)
    return torch.stack(values), q


CASES = {
    "squares of a quadratic": lambda n: quadratic(SERIES, n),
    "the same from theta = 2": lambda n: quadratic(SERIES, n, 2.0),
    "AR(1), q = 0.5": lambda n: autoregressive(SERIES, n, 0.5),
    "AR(1), q = 0.9": lambda n: autoregressive(SERIES, n, 0.9),
    "the same from 10 sd above": lambda n: autoregressive(SERIES, n, 0.9, start=10),
    "AR(1), q = 0.9, read with errors": lambda n: autoregressive(SERIES, n, 0.9, reading=1.0),
    "the same from 10 sd above, read so": lambda n: autoregressive(SERIES, n, 0.9, start=10, reading=1.0),
    "nothing but errors (no q)": lambda n: (torch.randn(n, SERIES).double(), math.nan),
}


def main():
    torch.manual_seed(0)
    print(f"{'':36s}{'steps':>6s}{'q':>7s}{'plain':>8s}{'Kendall':>9s}{'here':>7s}{'sd':>7s}", end="")
    print(f"{'gamma >= lower':>16s}{'<= upper':>10s}{'width':>8s}{'none':>7s}")
    for name, make in CASES.items():
        for n in LENGTHS:
            series, q = make(n)
            found = [dissipation(one) for one in series.unbind(1)]
            slope, gamma, lower, upper = (
                torch.stack([getattr(one, field) for one in found]) for field in ("slope", "gamma", "lower", "upper")
            )
            none = lower.isnan().double().mean()
            kendall = (slope + (1 + 3 * slope) / n).mean()
            print(f"{name:36s}{n:6d}{q:7.2f}{slope.mean():8.3f}{kendall:9.3f}{1 - gamma.mean():7.3f}", end="")
            below, above = ~(lower > 1 - q), ~(upper < 1 - q)
            print(f"{gamma.std():7.3f}{below.double().mean():16.3f}{above.double().mean():10.3f}", end="")
            print(f"{(upper - lower).nanmedian():8.3f}{none:7.3f}")


if __name__ == "__main__":
    main()
