"""Claim: the sharpness of a ReLU network by finite differences of its gradient can be wrong by a large factor.

Digits, batch 256. At every 50th step the top Ritz value of 8 Lanczos steps with differences, left unchecked, is divided
by that with exact products. A smooth activation beside it.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from lsp_callbacks import Snapshot
from lsp_callbacks.functional import sharpness

images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

for activation in (nn.Tanh, nn.ReLU):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    ratios = []
    for step in range(1501):
        rows = torch.randint(0, len(images), (256,))

        def loss(net=net, rows=rows) -> torch.Tensor:
            return nn.functional.cross_entropy(net(images[rows]), labels[rows])

        optimizer.zero_grad()
        loss().backward()
        if step % 50 == 0:
            # Without the step's own loss the trapezoidal check has nothing to check against.
            snapshot = Snapshot(step, net, loss, gradient={name: p.grad for name, p in net.named_parameters()})
            difference, exact = (
                float(sharpness(snapshot, steps=8, tol=0.0, method=method).value)
                for method in ("finite_difference", "exact")
            )
            ratios.append(difference / exact)
        optimizer.step()
    ratios.sort()
    least, median, most = ratios[0], ratios[len(ratios) // 2], ratios[-1]
    print(f"{activation.__name__}: differences / exact {least:.2f} ... {median:.2f} ... {most:.2f}")
