"""SGD frozen at a point: samples, rules, and the matrices of its steps."""

import itertools

import torch

from lsp_callbacks.functional import (
    UpdateRule,
    reduced_modes,
)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def scalar(a):
    """Samples of one parameter with curvatures ``a``."""
    z = f64(a).sqrt()[:, None]
    return reduced_modes(z @ z.T)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


FOUR = f64([[1, 0.2, -0.3], [0.4, 1.5, 0.1], [-0.7, 0.3, 0.9], [0.5, -0.5, 2]])


TANH = f64(
    [
        [7.050322263264985, 4.707533649158197, 1.2527802743852994, 3.466881598808192],
        [4.707533649158197, 4.175934437557549, 2.7123704052144317, 3.6352725239767283],
        [1.2527802743852994, 2.7123704052144317, 7.081075578155439, 3.0460455952437644],
        [3.466881598808192, 3.6352725239767283, 3.0460455952437644, 4.876828221961095],
    ]
)


def step_matrices(y, outputs, batch_size, lr, rule=UpdateRule(), replacement=False):  # noqa: B008
    z = y.view(-1, outputs, y.shape[1])
    eye = torch.eye(y.shape[1], dtype=torch.float64)
    choose = itertools.product(range(len(z)), repeat=batch_size)
    for batch in choose if replacement else itertools.combinations(range(len(z)), batch_size):
        h = sum(z[i].T @ z[i] for i in batch) / batch_size + rule.weight_decay * eye
        # Written out from the optimizers, not from the coefficients under test.
        e, beta, decay = lr / rule.correction, rule.momentum, 1 - lr * rule.decoupled_decay
        if not beta:
            yield decay * eye - e * (1 + rule.direct) * h
            continue
        g = 1 - rule.dampening
        m_from_v, m_from_m = g * h, beta * eye
        if rule.nesterov:
            v_from_v, v_from_m = decay * eye - e * (h + beta * m_from_v), -e * beta * m_from_m
        else:
            v_from_v, v_from_m = decay * eye - e * (m_from_v + rule.direct * h), -e * m_from_m
        yield torch.cat([torch.cat([v_from_v, v_from_m], 1), torch.cat([m_from_v, m_from_m], 1)])


RULES = {
    "plain": UpdateRule(),
    "momentum 0.5": UpdateRule(0.5),
    "momentum 0.9": UpdateRule(0.9),
    "nesterov": UpdateRule(0.9, nesterov=True),
    "dampening": UpdateRule(0.9, dampening=0.5),
    "weight decay": UpdateRule(0.9, weight_decay=0.1),
    "plain, both decays": UpdateRule(weight_decay=0.2, decoupled_decay=0.1),
    "decoupled decay": UpdateRule(0.9, decoupled_decay=0.1),
    "adamw": UpdateRule(0.9, 0.9, decoupled_decay=0.1, correction=0.3),
}
