"""Optimizers that users bring along: sign updates, two gradients a step, wrappers, averaged weights, small states."""

from __future__ import annotations

import torch
from torch import nn, optim


class Lion(optim.Optimizer):
    """The sign of a momentum, with decoupled decay. Source: Chen et al. 2023."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                mean = state.setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.lerp(p.grad, mean, first).sign_(), alpha=-group["lr"])
                mean.lerp_(p.grad, 1 - second)
        return loss


class Sophia(optim.Optimizer):
    """A momentum over a curvature that is estimated now and then, clipped number by number. Source: Liu et al. 2023."""

    def __init__(self, params, lr=1e-3, betas=(0.965, 0.99), rho=0.04, every=2, batch=8):
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "every": every, "batch": batch})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "hessian": torch.zeros_like(p)}
                state["exp_avg"].lerp_(p.grad, 1 - first)
                if state["step"] % group["every"] == 0:
                    state["hessian"].mul_(second).addcmul_(p.grad, p.grad, value=(1 - second) * group["batch"])
                state["step"] += 1
                size = (group["rho"] * state["hessian"]).clamp_min(1e-12)
                p.add_((state["exp_avg"] / size).clamp_(-1, 1), alpha=-group["lr"])
        return loss


class SAM(optim.Optimizer):
    """Descends by the gradient at the top of a small climb; its step calls the closure again. Source: Foret 2021."""

    def __init__(self, params, lr=0.1, rho=0.05):
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        held = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        size = torch.stack([p.grad.norm() for p, _ in held]).norm() + 1e-12
        climbs = [group["rho"] / size * p.grad for p, group in held]
        for (p, _), climb in zip(held, climbs):
            p.add_(climb)
        closure()
        for (p, group), climb in zip(held, climbs):
            p.sub_(climb).sub_(p.grad, alpha=group["lr"])
        return loss


class SAMByHand(optim.SGD):
    """Climbs and descends in two calls, between which the user makes the second gradient."""

    @torch.no_grad()
    def first_step(self):
        held = [p for group in self.param_groups for p in group["params"]]
        size = torch.stack([p.grad.norm() for p in held]).norm()
        self.climbs = [(p, 0.05 / size * p.grad) for p in held]
        for p, climb in self.climbs:
            p.add_(climb)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, climb in self.climbs:
            p.sub_(climb)
        super().step()  # which the loop does not see
        self.zero_grad()


class Lookahead(optim.Optimizer):
    """Steps of another optimizer, whose weights are drawn back to slow ones now and then. Source: Zhang et al. 2019."""

    def __init__(self, inner, every=3, share=0.5):
        self.inner, self.every, self.share, self.taken = inner, every, share, 0
        super().__init__(inner.param_groups, {})
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.taken += 1
        if self.taken % self.every == 0:
            with torch.no_grad():
                for p in (p for group in self.param_groups for p in group["params"]):
                    slow = self.state[p].setdefault("slow", p.detach().clone())
                    slow.lerp_(p, self.share)
                    p.copy_(slow)
        return loss


class ScheduleFree(optim.Optimizer):
    """Gradients at y, between the fast weights z and their average x; in training the weights are y. Defazio 2024."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["k"] += 1
            share = 1 / group["k"]
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.detach().clone())
                x = (p - (1 - group["beta"]) * z) / group["beta"]
                z.sub_(p.grad, alpha=group["lr"])
                p.copy_(torch.lerp(z, torch.lerp(x, z, share), group["beta"]))
        return loss


class PackedMomentum(optim.Optimizer):
    """Momentum whose state is kept in another dtype, packed after each step and unpacked before the next."""

    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                held = self.unpacked(state) if state else torch.zeros_like(p)
                speed = group["momentum"] * held + p.grad
                state.update(self.packed(speed))
                p.sub_(speed, alpha=group["lr"])
        return loss


class HalfState(PackedMomentum):
    """Momentum whose state is kept in bfloat16."""

    def packed(self, speed):
        return {"speed": speed.bfloat16()}

    def unpacked(self, state):
        return state["speed"].float()


class EightBit(PackedMomentum):
    """Momentum whose state is kept in 8 bits with one scale, as 8-bit optimizers do. Source: Dettmers et al. 2022."""

    def packed(self, speed):
        scale = speed.abs().max().clamp_min(1e-30) / 127
        return {"scale": scale, "code": (speed / scale).round().to(torch.int8)}

    def unpacked(self, state):
        return state["code"].to(state["scale"]) * state["scale"]


def matrices_and_rest(make_matrices, make_rest):
    """Matrices with one optimizer and the rest with another, as one optimizer."""

    def make(params):
        params = list(params)
        return Both(make_matrices([p for p in params if p.ndim == 2]), make_rest([p for p in params if p.ndim != 2]))

    return make


class Both(optim.Optimizer):
    """Two optimizers that step together, as they are given to trainers that take one."""

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss


def without_biases(width=5, features=6, classes=3):
    """A network of matrices alone."""
    return nn.Sequential(nn.Linear(features, width, bias=False), nn.Tanh(), nn.Linear(width, classes, bias=False))


class Masters(torch.optim.Optimizer):
    """SGD with momentum on 32-bit copies of 16-bit weights, which are rounded from them after each step."""

    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"master": p.detach().float().clone(), "momentum_buffer": torch.zeros(p.shape)}

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad.float())
                state["master"].sub_(group["lr"] * state["momentum_buffer"])
                p.copy_(state["master"])
        return loss


class HalfWeights(torch.nn.Sequential):
    """Weights in 16 bits, and a loss in 32."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.to(torch.bfloat16)

    def forward(self, x):
        return super().forward(x.to(torch.bfloat16)).float()
