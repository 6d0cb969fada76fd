"""The largest Lyapunov exponent of a plain training loop, from runs that begin close to each other."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lsp_callbacks._validation import number, whole
from lsp_callbacks.autograd._torch_internals import copied_optimizer, tree_map
from lsp_callbacks.autograd.side_effects import RandomState
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.linalg import norm

#: From a module, its optimizer and a batch to anything: one step of training.
TrainStep = Callable[[nn.Module, Any, Any], Any]
#: What two mirrored differences may differ by, relative to them: beyond this the step is not linear over the distance.
NONLINEAR = 0.1
#: A difference is seen where it is more than so many times the rounding of the parameters.
ROUNDED = 40


def training_exponent(
    train_step: TrainStep,
    module: nn.Module,
    optimizer: Optimizer | None,
    batches: Iterable[Any],
    *,
    burn_in: int = 0,
    distance: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return ``lambda = (1/n) log (||d_n|| / ||d_0||)``, the growth of a small difference of parameters over n steps.

    Three copies of the module and its optimizer train on the same batches with the same random numbers: the run itself,
    and two that begin at ``theta +- distance ||theta|| v``, v a random direction. After each step the two are moved
    back to that distance along the direction into which they have moved, together with the optimizer's state and the
    buffers. So v turns into the direction that grows fastest, and the mean growth into the largest Lyapunov exponent.

    Positive: neighbouring runs part, training is chaotic or unstable. Below: they meet. A network with more parameters
    than its samples feel keeps most directions as they are; its exponent is 0 or just above it while training is
    stable. Over n steps a direction that makes up ``1/P`` of a random v is underestimated by ``log(P) / (2 n)``, unless
    ``burn_in`` steps have aligned v first.

    Args:
        train_step: called as ``train_step(module, optimizer, batch)`` on the copies; it must use what it is given,
            not what it encloses. Schedulers and gradient scalers outside of it stay where they are.
        module: the start; left as it is, as are the optimizer and the global random states.
        optimizer: of the module's parameters; None for a step that needs none.
        batches: one for each step; iterated once.
        burn_in: so many steps at the beginning do not count.
        distance: as a share of ``||theta||``. None takes ``sqrt(eps)``, eps that of the parameters' type: rounding then
            changes the growth of a step by a share of about 1e-4 in float32, 1e-8 in float64.
        generator: of v, on the CPU; None draws from a fixed seed.

    Returns:
        ``()``, float64, nats per step; ``-inf`` where a step leaves nothing of the difference.

    Raises:
        ValueError: for an argument out of its range, no steps, parameters in half precision, or a ``train_step`` that
            uses the original module or optimizer.
        Unmeasurable: where the run is not finite; where a step is not linear over the distance (the two differences
            are not mirror images within 10 %), or leaves no more of it than rounding; or where the optimizer keeps
            tensors in lists (LBFGS).

    Cost: three steps of training each, and the memory of three copies.

    Source: Benettin et al. 1980; docs/theory.md, section The exponent along the trajectory.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import training_exponent
        >>> net = torch.nn.Linear(1, 1, bias=False).double()
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.5)
        >>> def train_step(net, sgd, x):  # on a curvature of 5: theta <- (1 - 0.5 * 5) theta
        ...     sgd.zero_grad()
        ...     (2.5 * net(x).square().sum()).backward()
        ...     sgd.step()
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> round(float(training_exponent(train_step, net, sgd, [x] * 20)), 6)  # log 1.5
        0.405465
    """
    whole("burn_in", burn_in, 0)
    theta = [p.detach() for p in module.parameters() if p.requires_grad]
    if not theta:
        raise ValueError("no parameter of the module requires a gradient: unfreeze those that train")
    if any(p.dtype.itemsize <= 2 for p in theta):
        raise ValueError("parameters in half precision are too coarse for a small difference: give module.float()")
    eps = max(torch.finfo(p.dtype).eps for p in theta)
    distance = math.sqrt(eps) if distance is None else number("distance", distance, above=0, most=1)
    state = RandomState()
    try:
        with _originals_unused(module, optimizer):
            runs = _Runs(module, optimizer, distance)
            runs.displace(generator or torch.Generator().manual_seed(0))
            growth = [runs.grown(train_step, batch, ROUNDED * eps) for batch in batches][burn_in:]
    finally:
        state.restore()
    if not growth:
        raise ValueError(f"burn_in={burn_in} leaves no step to measure: give more batches than that")
    return torch.tensor(growth, dtype=torch.float64).mean()


class _Runs:
    """The run, and two that begin on either side of it.

    Attributes:
        copies: module and optimizer of the run, of the one ahead, and of the one behind.
        steps: that were taken.
        share: distance of either to the run, as a share of ``||theta||``.
        apart: that distance itself.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer | None, share: float):
        try:
            self.copies = [_copied(module, optimizer) for _ in range(3)]
        except Exception as error:
            raise Unmeasurable(
                f"the module or its optimizer cannot be copied ({type(error).__name__}: {error}): three copies train"
            ) from error
        self.steps, self.share = 0, share
        self.apart = share * (float(norm(_flat(self._theta(0)))) or 1.0)

    def displace(self, generator: torch.Generator) -> None:
        """Move the two apart, along a random direction."""
        run, ahead, behind = (self._theta(k) for k in range(3))
        v = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in run]
        scale = self.apart / float(norm(_flat(v)))
        with torch.no_grad():
            for p, plus, minus, direction in zip(run, ahead, behind, v):
                plus.copy_(p + scale * direction), minus.copy_(p - scale * direction)

    def grown(self, train_step: TrainStep, batch: Any, rounding: float) -> float:
        """Return the log of the growth in one step, and move the two back to their distance."""
        self._step(train_step, batch)
        run, ahead, behind = (_flat(self._theta(k)).double() for k in range(3))
        odd, even = float(norm(ahead - behind)) / 2, float(norm((ahead - run) + (behind - run))) / 2
        size, step = float(norm(run)), self.steps
        self.steps += 1
        if not math.isfinite(odd + even + size):
            raise Unmeasurable(f"the run is not finite after step {step}: lower the learning rate or the distance")
        if even > max(NONLINEAR * odd, rounding * size):
            raise Unmeasurable(
                f"step {step} is not linear over distance={self.share:.3g}: the runs on either side are no mirror "
                f"images, their mean is off by {even:.3g} and half of their distance {odd:.3g}. Give a smaller "
                "distance, or float64 parameters"
            )
        if not odd:
            return -math.inf
        if odd <= rounding * size:
            raise Unmeasurable(
                f"step {step} leaves {odd / size:.3g} of distance={self.share:.3g}, which rounding hides: give float64 "
                "parameters, or a larger distance"
            )
        growth = math.log(odd / self.apart)
        self.apart = self.share * (size or 1.0)
        with torch.no_grad():
            for t, plus, minus in zip(*(self._state(k) for k in range(3)), strict=True):
                half = (plus - minus) * (self.apart / odd / 2)
                # Second moments stay what has a root; parameters and momenta have entries of both signs.
                least = 0.0 if bool((torch.minimum(torch.minimum(plus, minus), t) >= 0).all()) else -math.inf
                plus.copy_((t + half).clamp_min(least)), minus.copy_((t - half).clamp_min(least))
        return growth

    def _step(self, train_step: TrainStep, batch: Any) -> None:
        """Take one step with each, on the same batch with the same random numbers."""
        start = RandomState()
        after = None
        for module, optimizer in self.copies:
            start.restore()
            with torch.enable_grad():
                train_step(module, optimizer, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch))
            after = after or RandomState()
        assert after is not None
        after.restore()

    def _theta(self, k: int) -> list[Tensor]:
        return [p.detach() for p in self.copies[k][0].parameters() if p.requires_grad]

    def _state(self, k: int) -> list[Tensor]:
        module, optimizer = self.copies[k]
        buffers = [b for b in module.buffers() if b.is_floating_point()]
        states = optimizer.state.values() if optimizer is not None else ()
        kept = list(chain.from_iterable(state.values() for state in states))
        if any(isinstance(value, list | tuple) and value for value in kept):
            raise Unmeasurable(
                f"{type(optimizer).__name__} keeps tensors in lists, whose differences cannot be followed: train with "
                "another optimizer"
            )
        # Counters, which Adam keeps in floating point, are the same in all three.
        moving = [x for x in kept if isinstance(x, Tensor) and x.is_floating_point() and x.ndim]
        return [*self._theta(k), *buffers, *moving]


def _copied(module: nn.Module, optimizer: Optimizer | None) -> tuple[nn.Module, Optimizer | None]:
    memo: dict[int, Any] = {}
    module = copy.deepcopy(module, memo)
    return module, None if optimizer is None else copied_optimizer(optimizer, memo)


@contextlib.contextmanager
def _originals_unused(module: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
    """Refuse calls of the original module, and steps of the original optimizer."""
    originals = {id(part) for part in module.modules()} | {id(optimizer)}

    def refuse(used: Any, *_: Any) -> None:
        if id(used) in originals:
            raise ValueError(f"train_step uses the original {type(used).__name__}: use the ones that it is called with")

    handles = [register_module_forward_pre_hook(refuse), register_optimizer_step_pre_hook(refuse)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])
