"""What the Gauss-Newton matrix leaves out in the first steps, by dense float64 matrices of the step's own batch.

The headline number is of the Gauss-Newton matrix ``J^T S J``, and looks at one combination of each sample's outputs;
`courant_gd` and the exponent are of the whole Hessian, which holds ``sum_c (dl / df_c) d^2 f_c`` beside it. First a
tanh network on digits at SGD 3, step 0, as it is told and as it is; then random inputs and more and more classes, at
0.1.

    python benchmarks/gauss_newton_at_the_start.py
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytorch_lightning as pl
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lsp_callbacks import StabilityMonitor

warnings.filterwarnings("ignore")


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, lr: float):
        super().__init__()
        self.net, self.lr, self.batch = net, lr, ()

    def training_step(self, batch, batch_idx):
        self.batch = self.batch or tuple(t.clone() for t in batch)
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def told(net: nn.Module, lr: float, x: Tensor, y: Tensor, size: int) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
    """Return the first readings, and the batch that they are of."""
    model, monitor = Classifier(net, lr), StabilityMonitor(every_n_steps=1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=1, callbacks=[monitor], enable_model_summary=False, **quiet)
    trainer.fit(model, DataLoader(TensorDataset(x, y), size, shuffle=len(x) > size))
    keys = ("courant_mean_square", "courant_gd", "lyapunov")
    return {key: monitor.history[f"stability/{key}"].values[0] for key in keys}, model.batch


def dense(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the largest eigenvalues of the Gauss-Newton matrix, of all outputs, and of the Hessian, in float64."""
    net, x = net.double(), x.double()
    parameters = [*net.parameters()]
    f = net(x)
    p = f.detach().softmax(1)
    values, vectors = torch.linalg.eigh((torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(x))
    roots = vectors * values.clamp_min(0).sqrt()[:, None, :]
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(f[i] @ roots[i, :, c], parameters, retain_graph=True)])
        for i in range(len(x))
        for c in range(f.shape[1])
    ]
    z = torch.stack(rows)
    slope = torch.autograd.grad(F.cross_entropy(f, y), parameters, create_graph=True)

    def product(v: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(v.reshape(-1)).split([q.numel() for q in parameters])
        along = sum((g * part.view_as(g)).sum() for g, part in zip(slope, parts))
        return torch.cat([h.reshape(-1) for h in torch.autograd.grad(along, parameters, retain_graph=True)]).numpy()

    hessian = LinearOperator((z.shape[1],) * 2, matvec=product, dtype=np.float64)
    largest = eigsh(hessian, 1, which="LA", return_eigenvectors=False)[0]
    return float(torch.linalg.eigvalsh(z @ z.T)[-1]), float(largest)


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    start = {name: t.clone() for name, t in net.state_dict().items()}
    lr = 3.0
    readings, batch = told(net, lr, x, y, 64)
    net.load_state_dict(start)
    newton, hessian = dense(net, *batch)
    print(f"digits, tanh, SGD 3, step 0: told {readings}")
    print(
        f"  dense: Gauss-Newton lr lambda / 2 = {lr * newton / 2:.3f}, Hessian {lr * hessian / 2:.3f}, "
        f"log|1 - lr lambda| = {math.log(abs(1 - lr * hessian)):+.3f}"
    )
    print("classes  told  Gauss-Newton, all outputs  ratio  Hessian   (courants at 0.1)")
    for classes in (4, 10, 50, 200):
        torch.manual_seed(1)
        inputs, labels = torch.randn(32, 6), torch.arange(32) * 7 % classes
        net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, classes))
        start = {name: t.clone() for name, t in net.state_dict().items()}
        readings, _ = told(net, 0.1, inputs, labels, 32)
        net.load_state_dict(start)
        newton, hessian = dense(net, inputs, labels)
        value, true = readings["courant_mean_square"], 0.05 * newton
        print(f"{classes:7d}  {value:.5f}  {true:.5f}  {true / value:.2f}  {0.05 * hessian:.5f}", flush=True)


if __name__ == "__main__":
    main()
