"""Question: how far are ascent and certified bound from the sup over all vertices, in random ReLU chains?"""

import itertools
import statistics

import torch
from torch import nn

from lsp_callbacks.functional import generalized_norm
from lsp_callbacks.operators.curvature.kink_relaxation import relax_kinks


def ratios(widths: tuple[int, ...], seeds: int = 40) -> list[tuple[float, float, float]]:
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())][:-1]
        net = nn.Sequential(*layers).double().requires_grad_(False)
        (free,) = relax_kinks(net, torch.randn(1, widths[0], dtype=torch.float64), eps=0.4 / (len(widths) - 2))
        if 2 <= len(free.radius) <= 12:
            sup, bounds = generalized_norm(free).lower, generalized_norm(free, vertices=0)
            product = torch.stack([torch.linalg.matrix_norm(one.weight, 2) for one in net[::2]]).prod()
            found.append(tuple(float(one / sup) for one in (bounds.lower, bounds.upper, product)))
    return found


if __name__ == "__main__":
    print(
        "widths, networks, ascent / sup (least, mean), bound / sup (median, largest), product of norms / sup (median)"
    )
    for widths in ((4, 9, 3), (4, 12, 12, 3), (6, 16, 16, 16, 4)):
        lower, upper, product = zip(*ratios(widths))
        print(widths, len(lower), f"{min(lower):.3f} {statistics.mean(lower):.4f}", end="   ")
        print(f"{statistics.median(upper):.2f} {max(upper):.2f}   {statistics.median(product):.1f}")
