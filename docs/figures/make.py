"""Draw the pictures of the documentation: ``python docs/figures/make.py [name ...]``, seconds each, on one core.

They lie beside this file, as PNG; ``digits_diagram.png`` is the picture of ``lsp-callbacks fit --config
configs/digits.yaml``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import nn

from lsp_callbacks import (
    CriticalSharpness,
    Monitor,
    Sharpness,
    Snapshot,
    StabilityMonitor,
    StabilityProfile,
    StopOnInstability,
)
from lsp_callbacks.demo import Digits, ResidualNet
from lsp_callbacks.functional import critical_lr, gd_exponent, reduced_modes, residual_stability, sgd_exponent
from lsp_callbacks.linalg import from_matrix

HERE = Path(__file__).parent
BLUE, ORANGE, GREY = "#2a6f97", "#d1495b", "#7a7a7a"
FIGURES: dict[str, Callable[..., Figure]] = {}


def figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Register a picture under the name of its function."""
    FIGURES[draw.__name__] = draw
    return draw


class Losses(pl.Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def fit(model: pl.LightningModule, *callbacks: pl.Callback, steps: int, batch_size: int = 256) -> None:
    """Train quietly on digits."""
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, limit_val_batches=0, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning|torch)\b")
        trainer.fit(model, Digits(batch_size))


def axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 3.4), **settings):
    """Return a figure without pyplot, and its axes."""
    canvas = Figure(figsize=size, layout="constrained")
    return canvas, canvas.subplots(rows, columns, **settings)


@figure
def courant_number(steps: int = 700) -> Figure:
    """Loss and Courant numbers while the rate grows."""
    pl.seed_everything(0, verbose=False)
    losses, stop = Losses(), StopOnInstability(verbose=False)
    monitor = StabilityMonitor()
    fit(ResidualNet(lr=0.05, schedule="ramp", ramp=30), monitor, stop, losses, steps=steps)
    canvas, (top, bottom) = axes(2, size=(7, 4.4), sharex=True)
    top.semilogy(losses.values, color=GREY, lw=0.8)
    top.set_ylabel("loss")
    for key, color in (("courant", BLUE), ("courant_step", ORANGE)):
        curve = monitor.history[f"stability/{key}"]
        bottom.semilogy(curve.steps, curve.values, ".-", color=color, lw=1, ms=4, label=key)
    bottom.axhline(1, color="black", lw=0.8)
    for ax in (top, bottom):
        for step, style, label in ((stop.event_step, "--", "event"), (stop.stop_step, "-", "stop")):
            if step is not None:
                ax.axvline(step, color="black", ls=style, lw=0.8, label=label)
    bottom.set(xlabel="step", ylabel="Courant number")
    bottom.legend(frameon=False, ncols=2)
    return canvas


def fit_polynomial(monitor: Monitor, rates: list[float]) -> list[float]:
    """Fit a Chebyshev polynomial by full-batch gradient descent with these rates, and return the loss of each step."""
    x = torch.linspace(-1, 1, 20).unsqueeze(1)
    y = 8 * x**4 - 8 * x**2 + 1
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    optimizer = torch.optim.SGD(net.parameters())
    losses = []

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(net(x), y)

    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        monitor.observe(Snapshot(step=step, module=net, replay=loss, optimizer=optimizer))
        optimizer.step()
        monitor.after_update()
    return losses


@figure
def edge_of_stability(steps: int = 4000, every: int = 50) -> Figure:
    """Sharpness along full-batch gradient descent."""
    canvas, (left, right) = axes(1, 2)
    for lr, color in ((0.1, BLUE), (0.2, ORANGE)):
        monitor = Monitor(Sharpness(), every_n_steps=every)
        losses = fit_polynomial(monitor, [lr] * steps)
        curve = monitor.history["stability/sharpness"]
        left.plot(curve.steps, curve.values, color=color, label=f"rate {lr}")
        left.axhline(2 / lr, color=color, ls="--", lw=0.8)
        right.semilogy(losses, color=color, lw=0.8)
    left.set(xlabel="step", ylabel="sharpness")
    left.legend(frameon=False)
    right.set(xlabel="step", ylabel="loss")
    return canvas


@figure
def critical_sharpness(steps: int = 3000, every: int = 25) -> Figure:
    """Critical sharpness, its edge and the sharpness under a warm-up-stable-decay schedule, by gradient descent."""
    rates = [0.2 * min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.3 * steps)) for step in range(steps)]
    monitor = Monitor(Sharpness(), CriticalSharpness(), every_n_steps=every)
    losses = fit_polynomial(monitor, rates)
    canvas, (left, right) = axes(1, 2, size=(8, 3.4))
    for key, color, label in (("sharpness", BLUE, "sharpness"), ("critical_sharpness", ORANGE, "critical sharpness")):
        curve = monitor.history[f"stability/{key}"]
        left.semilogy(curve.steps, curve.values, ".-", color=color, lw=0.8, ms=3, label=label)
    left.semilogy([2 / rate for rate in rates], color="black", ls="--", lw=0.8, label="2 / rate")
    left.set(xlabel="step", ylim=(1e-3, 300))
    left.legend(frameon=False)
    right.semilogy(losses, color=GREY, lw=0.8)
    right.set(xlabel="step", ylabel="loss")
    return canvas


@figure
def lyapunov_exponents_of_sgd(probes: int = 96, chains: int = 16, steps: int = 300) -> Figure:
    """The exponent over the rate, for several batch sizes, from one Gram matrix."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    rows = []
    for x in torch.randn(probes, 64, dtype=torch.float64):  # a squared loss: the output Hessian is 1
        gradients = torch.autograd.grad(net(x).sum(), list(net.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    Z = torch.stack(rows)
    modes = reduced_modes(Z @ Z.T)
    rates = torch.logspace(-2, 1, 90, dtype=torch.float64)
    canvas, ax = axes(size=(7, 3.6))
    for batch_size, color in ((1, ORANGE), (8, "#edae49"), (32, "#66a182")):
        exponent = sgd_exponent(modes, rates, batch_size=batch_size, chains=chains, steps=steps).value
        ax.semilogx(rates, exponent, color=color, label=f"batches of {batch_size}")
        ax.plot(critical_lr(modes, batch_size=batch_size).value, 0, "o", color=color)
    ax.semilogx(rates, gd_exponent(modes, rates), color=BLUE, label="full batch")
    ax.axhline(0, color="black", lw=0.8)
    ax.set(xlabel="learning rate", ylabel="exponent, nats per step", ylim=(-0.15, 0.3))
    ax.legend(frameon=False, loc="upper left")
    return canvas


@figure
def residual_cfl(points: int = 60) -> Figure:
    """Gain, stiffness and CFL number of two blocks over their step size."""
    blocks = {
        "dissipative": torch.tensor([[-1.0, 1.2], [-1.2, -2.0]]),
        "not dissipative": torch.tensor([[-1.0, 3.0], [0.0, -1.0]]),
    }
    canvas, both = axes(1, 2, size=(8, 3.4), sharey=True)
    for ax, (name, G) in zip(both, blocks.items()):
        sizes = torch.linspace(0.02, 1.6, points).tolist()
        found = [residual_stability(from_matrix(h * G.double()), h=h) for h in sizes]
        ax.plot(sizes, [float(one.gain) for one in found], color=ORANGE, label="gain")
        ax.plot(sizes, [float(one.stiffness) for one in found], color=BLUE, label="stiffness")
        if found[0].cfl is not None:
            ax.plot(sizes, [float(one.cfl) for one in found], color="#66a182", label="CFL number")
        for level in (0, 1):
            ax.axhline(level, color="black", lw=0.6)
        ax.set(xlabel="h", title=name, ylim=(-0.6, 2.2))
        ax.legend(frameon=False)
    return canvas


class DeepNet(pl.LightningModule):
    """Eight layers with tanh, of which the initial weights are scaled."""

    def __init__(self, lr: float, scale: float = 1.0, depth: int = 8, width: int = 32):
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, width), nn.Tanh()]
        for _ in range(depth - 2):
            layers += [nn.Linear(width, width), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 10))
        for weight in self.net.parameters():
            if weight.ndim == 2:
                nn.init.xavier_normal_(weight, gain=scale)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@figure
def learning_stability_profile(steps: int = 130) -> Figure:
    """Input sensitivity by depth, and growth of perturbations of the parameters over windows of eight steps."""
    canvas, (left, right) = axes(1, 2, size=(8, 3.4))

    def measured(model: pl.LightningModule, steps: int):
        pl.seed_everything(0, verbose=False)
        monitor = StabilityMonitor([StabilityProfile(horizon=8, bounds=8)], every_n_steps=20)
        fit(model, monitor, steps=steps, batch_size=64)
        return monitor.history

    for scale, color in ((0.7, BLUE), (1.0, "#66a182"), (1.5, ORANGE)):
        torch.manual_seed(0)
        history = measured(DeepNet(lr=0.01, scale=scale), steps=12)
        sigma = [curve.values[0] for key, curve in history.items() if key.startswith("stability/sigma_x/")]
        left.semilogy(range(1, len(sigma) + 1), sigma, ".-", color=color, label=f"weights x {scale}")
    for lr, color in ((0.05, BLUE), (0.6, ORANGE)):
        torch.manual_seed(0)
        history = measured(DeepNet(lr=lr), steps=steps)
        low, high = (history[f"stability/{key}"] for key in ("alpha_theta", "alpha_theta_bound"))
        right.fill_between(low.steps, low.values, high.values, color=color, alpha=0.3)
        right.plot(low.steps, low.values, ".-", color=color, label=f"rate {lr}")
    left.axhline(1, color="black", lw=0.6)
    left.set(xlabel="layer", ylabel=r"$\sigma^x$")
    left.legend(frameon=False)
    right.axhline(0, color="black", lw=0.6)
    right.set(xlabel="step", ylabel=r"$\alpha_\theta$, nats per step")
    right.legend(frameon=False)
    return canvas


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or FIGURES:
        FIGURES[name]().savefig(HERE / f"{name}.png", dpi=110)
        print(f"{name}.png")
