"""The law of SGD with a constant step size: contraction, largest step and noise floor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SGDLawResult:
    """The law of SGD at one learning rate (Katende 2025, Thm 5.2).

    Attributes:
        q: ``E ||theta - theta*||^2`` contracts at least by this factor in a step, above the floor.
        eta_max: q is below 1 for smaller rates than this.
        floor: ``lr^2 sigma_0^2 / (1 - q)``, a bound of ``E ||theta - theta*||^2`` in the end; NaN where q is not below
            1.
    """

    q: float
    eta_max: float
    floor: float


def contraction_factor(lr: float, *, convexity: float, smoothness: float, sigma_1_squared: float = 0.0) -> float:
    """Return ``q = 1 - 2 lr mu + lr^2 (L^2 + sigma_1^2)`` of `sgd_law`, for mu of any sign.

    At mu <= 0 it is at least 1. ``<grad f(theta), e> >= mu ||e||^2`` needs a lower bound of the curvature, not
    convexity, so that ``E ||e+||^2 <= q ||e||^2 + lr^2 sigma_0^2`` holds without it; but from q = 1 on it says nothing
    of a contraction.

    Example:
        >>> from lsp_callbacks.functional.sgd.sgd_law import contraction_factor
        >>> contraction_factor(0.5, convexity=-1.0, smoothness=2.0)
        3.0
    """
    return 1 - 2 * lr * convexity + lr**2 * (smoothness**2 + sigma_1_squared)


def sgd_law(
    lr: float, *, convexity: float, smoothness: float, sigma_0_squared: float = 0.0, sigma_1_squared: float = 0.0
) -> SGDLawResult:
    """Return ``q = 1 - 2 lr mu + lr^2 (L^2 + sigma_1^2)``, ``eta_max = 2 mu / (L^2 + sigma_1^2)`` and the floor.

    For ``theta+ = theta - lr G`` with ``E G = grad f``, f mu-strongly convex and L-smooth, and ``E ||G - grad f||^2 <=
    sigma_0^2 + sigma_1^2 ||e||^2``, ``e = theta - theta*``: ``E ||e+||^2 <= q ||e||^2 + lr^2 sigma_0^2``.
    The expansion needs ``||grad f|| <= L ||e||``, so L is the largest absolute eigenvalue of the Hessian;
    where mu > 0, the largest.

    It is the *energy* that contracts by q, so distances contract by ``sqrt q``, and the exponent that follows is at
    most ``log(q) / 2``, not ``log q`` as printed. Nor does this bound the sensitivity, how neighbouring runs part:
    ``G = theta + sin(k theta + u)``, u uniform, has q = 1/4 at lr = 1/2 for every k, and its sensitivity grows by
    ``log(k / 4)`` a step, +0.92 for k = 10. What bounds it is ``log E ||I - lr dG/dtheta||^2 / 2``. And eta_max is
    cautious: without sigma_1 gradient descent is stable up to ``2 / L``, L / mu times more.

    Args:
        lr: the learning rate, plain SGD's.
        convexity: mu, positive.
        smoothness: L, at least mu.
        sigma_0_squared: of the noise at theta*.
        sigma_1_squared: by how much it grows with the squared distance.

    Raises:
        ValueError: where mu is not positive, or above L: then the theorem says nothing.

    Source: Katende 2025, (5.3), Thm 5.2; docs/theory.md, sections What does not hold as printed (claims 6 and 7) and
    The law of SGD, energies, kinks.

    Example:
        >>> from lsp_callbacks.functional import sgd_law
        >>> sgd_law(0.25, convexity=1.0, smoothness=2.0, sigma_0_squared=3.0)
        SGDLawResult(q=0.75, eta_max=0.5, floor=0.75)
    """
    if not 0 < convexity <= smoothness:
        raise ValueError(f"convexity={convexity!r}: the law needs 0 < mu <= L, and L is {smoothness!r}")
    square = smoothness**2 + sigma_1_squared
    q = contraction_factor(lr, convexity=convexity, smoothness=smoothness, sigma_1_squared=sigma_1_squared)
    return SGDLawResult(q, 2 * convexity / square, lr**2 * sigma_0_squared / (1 - q) if q < 1 else float("nan"))


def noise_gain(lr: float, *, convexity: float, smoothness: float) -> float:
    """Return ``C_u = 1 / (1 - c)``, ``c = max(|1 - lr m|, |1 - lr L_G|)``: the gain of noise in the gradients.

    ``||d theta_t / d u|| <= C_u lr L_u`` for all t.

    For ``theta+ = theta - lr G(theta, u)`` where *every* ``G(., u)`` is the gradient of an m-strongly convex function
    and L_G-Lipschitz, and G is L_u-Lipschitz in u: each step contracts by c and adds at most ``lr L_u`` times its own
    perturbation. The norm of a history ``u_0 ... u_(t-1)`` is the largest of its steps'. It is reached where c is ``1 -
    lr m``: ``C_u lr L_u = L_u / m``.

    Thm 5.2 (3) promises a C_u of ``(L_G, L_u, mu, L)`` with mu and L of the *mean* gradient, which is false: ``G =
    theta + sin(k theta + u)`` has mu = L = 1, L_u = 1, L_G = 1 + k and, at lr = 1/2, q = 1/4, and the sensitivity to
    ``u_0`` grows like ``(k / 4)^t``. Convexity of the mean bounds no pair of runs that see the same noise.

    Args:
        lr: the learning rate, plain SGD's.
        convexity: m, the least curvature of any batch.
        smoothness: L_G, the largest.

    Raises:
        ValueError: where no step need contract, c >= 1: then no such constant follows.

    Source: Katende 2025, (5.2), Thm 5.2 (3), as corrected here.

    Example:
        >>> from lsp_callbacks.functional import noise_gain
        >>> noise_gain(0.25, convexity=1.0, smoothness=2.0)
        4.0
    """
    if not convexity <= smoothness:
        raise ValueError(f"convexity={convexity!r}: must be at most smoothness={smoothness!r}")
    contraction = max(abs(1 - lr * convexity), abs(1 - lr * smoothness))
    if not contraction < 1:
        raise ValueError(
            f"lr={lr!r}: steps contract at rates between 0 and 2 / L_G only, with convexity={convexity!r} above 0 and "
            f"smoothness={smoothness!r}"
        )
    return 1 / (1 - contraction)


def noise_lipschitz(gram: Tensor) -> Tensor:
    """Return ``L_u`` of ``G(theta, u) = sum_i u_i g_i``, u the weights of a batch; exact at one theta.

    ``||G(theta, u) - G(theta, u')|| <= L_u ||u - u'||``: weights sum to 1, so the largest singular value of the
    gradients less their mean. What the gradients have in common, weight decay too, is no noise.

    Args:
        gram: ``(N, N)``, products of the samples' gradients.

    Source: Katende 2025, (5.2).

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import noise_lipschitz
        >>> g = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> round(float(noise_lipschitz(g @ g.T)), 6)  # (0, -1) and (0, 1) from the mean
        1.414214
    """
    gram = gram.detach().double()
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    return torch.linalg.eigvalsh((centred + centred.mT) / 2)[-1].clamp_min(0).sqrt()


@dataclass(frozen=True)
class NoiseFit:
    """``sigma_0^2`` and ``sigma_1^2``, neither negative, each with its standard error."""

    sigma_0_squared: Tensor
    sigma_0_squared_error: Tensor
    sigma_1_squared: Tensor
    sigma_1_squared_error: Tensor


def fit_noise(distances: Tensor, variances: Tensor, errors: Tensor | None = None) -> NoiseFit:
    """Fit ``V = sigma_0^2 + sigma_1^2 d^2`` by least squares over measurements along a run.

    A fit, not the bound that Assumption 1 asks for: some measurements lie above it. Where the slope would be negative
    it is 0 and ``sigma_0^2`` the mean; where ``sigma_0^2`` would be, the line goes through the origin.

    Args:
        distances: ``||theta - theta_ref||^2`` of each, squared already.
        variances: ``E ||G - grad L||^2`` there.
        errors: their standard errors. As they come from the same samples, they are taken to go together: they add their
            mean share of the value to each error, beside the scatter around the line.

    Returns:
        NaN with fewer than three different distances.

    Source: Katende 2025, Assumption 1; docs/theory.md, section The law of SGD, energies, kinks.

    Example:
        >>> import torch
        >>> from lsp_callbacks.functional import fit_noise
        >>> d = torch.tensor([0.0, 1.0, 4.0, 9.0])
        >>> result = fit_noise(d, 2 + 0.5 * d)
        >>> round(float(result.sigma_0_squared), 6), round(float(result.sigma_1_squared), 6)
        (2.0, 0.5)
    """
    d, v = distances.double(), variances.double()
    nan = torch.full((), torch.nan, dtype=torch.float64)
    if len(d.unique()) < 3:
        return NoiseFit(nan, nan, nan, nan)
    # In units of the largest, so that no square leaves the range of float64.
    far, loud = (x.abs().max() for x in (d, v))
    loud = torch.where(loud > 0, loud, 1.0)
    d, v = d / far, v / loud
    n, away = len(d), d - d.mean()
    slope = (away * v).sum() / away.square().sum()
    level = v.mean() - slope * d.mean()
    rest = v - level - slope * d
    spread = (rest.square().sum() / (n - 2)).sqrt()
    slope_error = spread / away.square().sum().sqrt()
    level_error = spread * (1 / n + d.mean().square() / away.square().sum()).sqrt()
    if slope < 0:
        slope, level, level_error = torch.zeros_like(slope), v.mean(), v.std() / n**0.5
    elif level < 0:
        slope, level = (d * v).sum() / d.square().sum(), torch.zeros_like(level)
    shared = torch.zeros_like(level)
    if errors is not None and bool((v > 0).any()):
        shared = (errors.double() / loud / v)[v > 0].mean()
    level_error, slope_error = torch.hypot(level_error, shared * level), torch.hypot(slope_error, shared * slope)
    per = loud / far
    return NoiseFit(loud * level, loud * level_error, per * slope, per * slope_error)
