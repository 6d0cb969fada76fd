"""The sharpest direction of a step's loss, and how far the step is from its edge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsp_callbacks.linalg import Eigenpair, lanczos
from lsp_callbacks.operators.coming import coming_rule
from lsp_callbacks.operators.curvature import Method, hessian
from lsp_callbacks.operators.frozen import (
    FrozenRule,
    buffer_rates,
    coupled_decay,
    decay_rates,
    decayed_hessian,
    preconditioned_hessian,
    rates,
)
from lsp_callbacks.snapshot import Snapshot, Unmeasurable


@dataclass(frozen=True)
class Edge:
    """Where a step stands with respect to the edge of stability of its own optimizer.

    Attributes:
        sharpness: ``lambda_max(H)``, algebraic, of the step's loss.
        residual: ``||H v - lambda v|| / |lambda|`` of the pair behind ``courant``, relative.
        courant: ``lambda_max(R^1/2 H' R^1/2) / c``: 1 is the edge.
        limit: ``lambda_max(H') / courant``, the sharpness at which the step would be at its edge; NaN at rate 0.
        mode: unit eigenvector of ``R^1/2 H' R^1/2``, flat.
        top: unit eigenvector of H, flat; the mode itself where R is one number.
        root: ``sqrt(R)`` of each parameter, which turns ``mode`` into a displacement of the parameters.
        kick: turns ``mode`` into the momentum buffer that displaces by ``root * mode``; None without momentum.
        products: Hessian products spent.
        converged: whether the residual met the tolerance.
    """

    sharpness: Tensor
    residual: Tensor
    courant: Tensor
    limit: Tensor
    mode: Tensor
    top: Tensor
    root: Tensor | float
    kick: Tensor | float | None
    products: int
    converged: bool


def sharpness(
    snapshot: Snapshot,
    *,
    start: Tensor | None = None,
    steps: int = 20,
    tol: float = 1e-3,
    method: Method = "auto",
) -> Eigenpair:
    """The largest *algebraic* eigenvalue of the Hessian of a step's loss.

    Args:
        snapshot: a step; no optimizer is needed.
        start: flat vector to start from, for instance the last eigenvector; None starts from the gradient.
        steps: at most this many products.
        tol: on the relative residual.
        method: of the Hessian products, see `lsp_callbacks.operators.hessian`.

    Returns:
        Value, unit vector and residual. The value is a lower bound, and some eigenvalue is within ``residual``.

    Raises:
        Unmeasurable: see `lsp_callbacks.operators.hessian`.

    Cost: one product a step. Source: Cohen et al. 2021 (edge of stability).

    Example:
        >>> import torch
        >>> from lsp_callbacks import Snapshot
        >>> from lsp_callbacks.functional import sharpness
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double()  # H = diag(1, 9) for 0.5 * sum of squares
        >>> float(sharpness(Snapshot(step=0, module=net, replay=lambda: 0.5 * net(x).square().sum())).value)
        9.0...
    """
    operator = hessian(snapshot, method=method)
    return _top(operator, snapshot, start, steps, tol).pair(-1)


def stability_constant(momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> float:
    """``c``: the step is linearly stable while ``lr * lambda < c`` (full batch).

    Plain gradient descent 2; heavy ball ``2 + 2 beta``; Nesterov ``(2 + 2 beta) / (1 + 2 beta)``; dampening tau
    ``(2 + 2 beta) / (1 - tau)``. Source: Cohen et al. 2021, appendix B; MATH section 3.

    Example:
        >>> from lsp_callbacks.functional import stability_constant
        >>> stability_constant(), stability_constant(0.9), stability_constant(0.9, dampening=0.9)
        (2.0, 3.8, 38.0...)
    """
    if not momentum:
        return 2.0
    if nesterov:
        return (2 + 2 * momentum) / (1 + 2 * momentum)
    if dampening >= 1:
        raise Unmeasurable(f"dampening={dampening} never lets a gradient in: there is no edge")
    return (2 + 2 * momentum) / (1 - dampening)


def edge_constant(rule: FrozenRule) -> float:
    """The `stability_constant` of a rule; decoupled weight decay multiplies it by ``1 - lr wd / 2``.

    With ``v+ = (1 - lr wd) v - R m+``, ``m+ = beta m + (1 - tau) h v`` an eigenvalue is -1 where ``R h (1 - tau) =
    (2 - lr wd) (1 + beta)``. Of decays that differ the largest is taken: then the step may become unstable a little
    later than at Courant number 1.

    Raises:
        Unmeasurable: where the decay alone is unstable.
    """
    decay = rule.lr * max(rule.decoupled_decay.values(), default=0.0)
    if decay >= 2:
        raise Unmeasurable(f"lr * weight_decay = {decay:.3g} is unstable by itself: it must stay below 2")
    return stability_constant(rule.momentum, rule.dampening, rule.nesterov) * (1 - decay / 2)


def edge(
    snapshot: Snapshot,
    *,
    start: Tensor | None = None,
    top: Tensor | None = None,
    steps: int = 20,
    tol: float = 1e-3,
    method: Method = "auto",
) -> Edge:
    """Sharpness, its limit, and the Courant number ``lambda_max(R^1/2 H' R^1/2) / c`` of a step.

    R are the effective rates of the parameters: the learning rate times the preconditioner of Adam, AdamW, RMSprop
    or Adagrad over Adam's bias correction, held fixed as they will be some ten steps later (`coming_rule`), times
    the factor by which this step's gradient was clipped, held fixed too. H' is the Hessian with coupled weight
    decay. With one rate and one weight decay everything follows from one Lanczos run on H; otherwise the
    preconditioned operator gets a run of its own. It holds for full-batch steps; under momentum it is blind to
    batch noise.

    Args:
        snapshot: a step with its optimizer.
        start: an earlier ``mode``; None starts from the gradient.
        top: an earlier ``top``, likewise.
        steps: at most this many products a run.
        tol: on the relative residual.
        method: of the Hessian products.

    Raises:
        Unmeasurable: optimizer not modelled, betas that differ between groups, loss that cannot be replayed.

    Source: MATH section 3; Cohen et al. 2021; Cohen et al. 2022 for preconditioned gradients.
    """
    rule = coming_rule(snapshot)
    constant, maximize = edge_constant(rule), rule.sign < 0
    rate, decay = rates(snapshot, rule), decay_rates(snapshot, rule)
    root = rate**0.5 if rule.lr else 1.0
    if isinstance(rate, Tensor) or isinstance(decay, Tensor):
        own = _top(hessian(snapshot, method=method), snapshot, top, steps, tol, both=maximize)
        added = coupled_decay(snapshot)
        if isinstance(added, Tensor):
            decayed = _top(decayed_hessian(snapshot, method=method), snapshot, None, steps, tol).values[-1]
        else:
            decayed = (-own.values[0] if maximize else own.values[-1]) + added
        run = _top(preconditioned_hessian(snapshot, method=method, rule=rule), snapshot, start, steps, tol)
        pair, extra, eigenvector = run.pair(-1), len(own.basis), own.pair(-1).vector
        sharp, courant = own.values[-1], pair.value / constant
    else:
        # lambda_max(-H) is the other end of the same run.
        run = _top(hessian(snapshot, method=method), snapshot, start, steps, tol, both=maximize)
        pair, extra = run.pair(0 if maximize else -1), 0
        eigenvector = pair.vector
        decayed = rule.sign * pair.value + (decay / rate if rate else coupled_decay(snapshot))
        sharp, courant = run.values[-1], rate * decayed / constant
    return Edge(
        sharpness=sharp,
        residual=pair.residual / pair.value.abs().clamp_min(torch.finfo(torch.float64).tiny),
        courant=courant,
        limit=decayed / courant,
        mode=pair.vector,
        top=eigenvector,
        root=root,
        kick=_kick(root, buffer_rates(snapshot, rule)) if rule.momentum else None,
        products=pair.products + extra,
        converged=pair.converged,
    )


def _kick(root: Tensor | float, buffer: Tensor | float) -> Tensor | float:
    """``root / buffer``, and 0 where the buffer moves nothing."""
    if isinstance(buffer, Tensor):
        return torch.where(buffer > 0, root / buffer, 0.0)
    return root / buffer if buffer else 1.0


def _top(operator, snapshot: Snapshot, start: Tensor | None, steps: int, tol: float, both: bool = False):
    """Lanczos from ``start`` mixed with the gradient and some noise.

    The mixture makes a warm start safe: an eigenvector that is no longer the top one would otherwise be kept
    for ever, with a small residual. The gradient leans towards the sharp directions (Gur-Ari et al. 2018).
    """
    n = operator.shape[1]
    generator = snapshot.generator("lanczos")
    noise = torch.randn(n, generator=generator, dtype=operator.dtype).to(operator.device)
    mixed = _unit(noise)
    if snapshot.flat_gradient is not None:
        mixed = 0.3 * mixed + _unit(snapshot.flat_gradient.to(operator.dtype))
    if start is not None:
        mixed = 0.2 * _unit(mixed) + _unit(start)
    return lanczos(operator, mixed, steps=steps, tol=tol, ends=(0, -1) if both else (-1,))


def _unit(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
