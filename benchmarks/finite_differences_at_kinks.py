"""Claim: unchecked, the sharpness of a ReLU network by differences of its gradient can be wrong by a large factor.

Digits, batch 256. At every 50th step the top Ritz value of 8 Lanczos steps on differences, at the distance that they
begin with, is divided by that with exact products: as they are, and by ``method="finite_difference"``, which checks
each of them and takes exact products where it does not trust one. A smooth activation beside it.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lsp_callbacks import Snapshot
from lsp_callbacks.linalg import LinearOperator, lanczos
from lsp_callbacks.operators import hessian
from lsp_callbacks.operators.curvature.finite_differences import FIRST, Differences
from lsp_callbacks.operators.curvature.top_eigenvalue import top_eigenvalue


def unchecked(snapshot: Snapshot) -> float:
    own = snapshot.flat_gradient
    assert own is not None
    differences, n = Differences(snapshot, own), len(own)

    def product(v: Tensor) -> Tensor:
        reach = differences.reach(v)
        assert reach is not None
        size, distance = float(v.norm()), FIRST * reach
        return differences.difference(v, size, distance).change * (size / distance)

    operator = LinearOperator((n, n), product, product, dtype=own.dtype, device=own.device)
    return float(lanczos(operator, own, steps=8, tol=0.0).values[-1])


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    for activation in (nn.Tanh, nn.ReLU):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        ratios: dict[str, list[float]] = {"unchecked": [], "checked": []}
        for step in range(1501):
            rows = torch.randint(0, len(images), (256,))

            def replay(net=net, rows=rows) -> Tensor:
                return nn.functional.cross_entropy(net(images[rows]), labels[rows])

            optimizer.zero_grad()
            loss = replay()
            loss.backward()
            if step % 50 == 0:
                gradient = {name: p.grad for name, p in net.named_parameters()}
                snapshot = Snapshot(step, net, replay, loss=loss.detach(), gradient=gradient)
                checked, exact = (
                    float(top_eigenvalue(snapshot, steps=8, tol=0.0, method=method).value)
                    for method in ("finite_difference", "exact")
                )
                own = snapshot.flat_gradient
                truth = float(lanczos(hessian(snapshot, method="exact"), own, steps=8, tol=0.0).values[-1])
                ratios["unchecked"].append(unchecked(snapshot) / truth)
                ratios["checked"].append(checked / exact)
            optimizer.step()
        for name, values in ratios.items():
            values.sort()
            least, median, most = values[0], values[len(values) // 2], values[-1]
            print(f"{activation.__name__}, {name}: differences / exact {least:.2f} ... {median:.2f} ... {most:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
