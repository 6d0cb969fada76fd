"""What the optimizer does once its preconditioner is held fixed, against torch.optim itself."""

from functools import partial

import pytest
import torch
from problems import Quadratic, close, dense_hessian, f64, freeze, interpolating_tanh, same, symmetric

from lsp_callbacks import ProbeSet, Snapshot, Unmeasurable
from lsp_callbacks.functional import gd_exponent
from lsp_callbacks.operators.sgd.frozen_sgd import critical_rule, frozen_sgd
from lsp_callbacks.operators.trajectory.frozen_preconditioner import frozen_rule
from lsp_callbacks.operators.trajectory.step_jacobian import step_jacobian
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.criterion import evaluation

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
RMSprop, Adagrad = torch.optim.RMSprop, torch.optim.Adagrad
H = symmetric([3.0, 2.0, 1.0, 0.5, 0.1])


def quadratic():
    return Quadratic(H, (2, 3))


def groups(task, **second):
    """The second parameter in a group of its own."""
    one, two = task.parts
    return [{"params": [one]}, {"params": [two], **second}]


def step(task, optimizer):
    optimizer.zero_grad()
    task().backward()
    optimizer.step()


def after(steps, make, task=None):
    """The problem and its optimizer after some real steps."""
    task = task or quadratic()
    optimizer = make(task)
    for _ in range(steps):
        step(task, optimizer)
    return task, optimizer


def predicted(rule, name, theta, buffer, gradient):
    """``theta+`` of the formula; the buffer in units of a gradient, D and relative rates inside of d."""
    s = torch.as_tensor(rule.scale[name], dtype=f64)
    d = s * gradient + rule.weight_decay[name] * theta
    m = rule.momentum * s * buffer + (1 - rule.dampening) * d
    update = d + rule.momentum * m if rule.nesterov else m
    return (1 - rule.lr * rule.decoupled_decay[name]) * theta - rule.lr / rule.correction * update


SGDS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "dampening_alone": {"dampening": 0.4},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "decay": {"momentum": 0.7, "weight_decay": 0.1},
    "nesterov_decay": {"momentum": 0.7, "weight_decay": 0.1, "nesterov": True},
    "dampening_decay": {"momentum": 0.7, "weight_decay": 0.1, "dampening": 0.2},
}


@pytest.mark.parametrize("second", [{}, {"lr": 0.02}, {"lr": 0.3}], ids=str)
@pytest.mark.parametrize("settings", SGDS)
def test_a_step_of_sgd(settings, second):
    settings = SGDS[settings]
    task, optimizer = after(3, lambda t: SGD(groups(t, **second), lr=0.1, **settings))
    snapshot = freeze(task, optimizer)
    rule = frozen_rule(snapshot)
    assert rule.lr == max(0.1, second.get("lr", 0)) and not rule.frozen and rule.correction == 1
    rate = {"parts.0": 0.1, "parts.1": second.get("lr", 0.1)}
    assert rule.scale == pytest.approx({name: eta / rule.lr for name, eta in rate.items()})
    buffers = {}
    for name, p in snapshot.parameters.items():
        buffer = optimizer.state[p].get("momentum_buffer")
        buffers[name] = torch.zeros_like(p) if buffer is None else buffer.clone()
    want = {n: predicted(rule, n, p.detach(), buffers[n], snapshot.gradient[n]) for n, p in snapshot.parameters.items()}
    step(task, optimizer)
    for name, p in snapshot.parameters.items():
        close(p.detach(), want[name], 1e-12)


@pytest.mark.parametrize("settings", SGDS)
def test_the_difference_of_two_steps_of_sgd_is_the_linear_map(settings):
    settings = SGDS[settings]
    runs = []
    for shift in (0.0, 1.0):
        task, optimizer = after(2, lambda t: SGD(groups(t, lr=0.03), lr=0.1, **settings))
        rule = frozen_rule(freeze(task, optimizer))
        start = []
        for k, p in enumerate(task.parts):
            p.data.add_(shift * torch.arange(1.0, len(p) + 1, dtype=f64))
            buffer = optimizer.state[p].get("momentum_buffer")
            if buffer is not None:
                buffer.add_(shift * (k + 2.0))
            start.append((p.detach().clone(), torch.zeros_like(p) if buffer is None else buffer.clone()))
        gradient = torch.autograd.grad(task(), list(task.parts))
        step(task, optimizer)
        runs.append([(*own, g, p.detach().clone()) for own, g, p in zip(start, gradient, task.parts)])
    for k, (one, two) in enumerate(zip(*runs)):
        v, m, u, end = (b - a for a, b in zip(one, two))
        close(end, predicted(rule, f"parts.{k}", v, m, u), 1e-12)


ADAMS = {
    "adam": partial(Adam, lr=0.1),
    "adam_betas": partial(Adam, lr=0.1, betas=(0.7, 0.9), eps=1e-2),
    "adamw": partial(AdamW, lr=0.1, weight_decay=0.3),
    "amsgrad": partial(AdamW, lr=0.1, weight_decay=0.3, amsgrad=True, betas=(0.8, 0.5)),
    "adam_decoupled": partial(Adam, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
    "no_momentum": partial(AdamW, lr=0.1, betas=(0.0, 0.9)),
}


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("second", [{}, {"lr": 0.02}, {"lr": 0.3, "eps": 0.1}], ids=str)
@pytest.mark.parametrize("name", ADAMS)
def test_a_step_of_adam(name, second, steps):
    task, optimizer = after(steps, lambda t: ADAMS[name](groups(t, **second)))
    snapshot = freeze(task, optimizer)
    rule = frozen_rule(snapshot)
    beta = optimizer.param_groups[0]["betas"][0]
    assert rule.frozen and rule.momentum == rule.dampening == beta and not rule.nesterov
    assert rule.lr == max(0.1, second.get("lr", 0)) and rule.correction == pytest.approx(1 - beta ** (steps + 1))
    want = {}
    for n, p in snapshot.parameters.items():
        buffer = optimizer.state[p]["exp_avg"].clone() if steps else torch.zeros_like(p)
        want[n] = predicted(rule, n, p.detach(), buffer, snapshot.gradient[n])
    state = {n: optimizer.state[p].get("exp_avg_sq") for n, p in snapshot.parameters.items() if p in optimizer.state}
    assert same(state, {n: s.clone() for n, s in state.items()})
    step(task, optimizer)
    for n, p in snapshot.parameters.items():
        close(p.detach(), want[n], 1e-12)


OTHERS = {
    "rmsprop": partial(RMSprop, lr=0.1),
    "rmsprop_momentum": partial(RMSprop, lr=0.1, momentum=0.8, alpha=0.7, weight_decay=0.3),
    "rmsprop_centered": partial(RMSprop, lr=0.1, momentum=0.8, alpha=0.7, centered=True),
    "adagrad": partial(Adagrad, lr=0.1, weight_decay=0.3),
    "adagrad_decay": partial(Adagrad, lr=0.1, lr_decay=0.4, initial_accumulator_value=0.5),
    "nadam": partial(torch.optim.NAdam, lr=0.1),
    "nadam_decoupled": partial(torch.optim.NAdam, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
    "nadam_no_momentum": partial(torch.optim.NAdam, lr=0.1, betas=(0.0, 0.9), weight_decay=0.3),
    "radam": partial(torch.optim.RAdam, lr=0.1, weight_decay=0.3),
    "radam_rectified": partial(torch.optim.RAdam, lr=0.1, betas=(0.9, 0.7)),
    "adamax": partial(torch.optim.Adamax, lr=0.1, weight_decay=0.3, eps=1e-3),
    "adam_coupled": partial(Adam, lr=0.1, weight_decay=0.3),
    "adam_maximize": partial(Adam, lr=0.1, weight_decay=0.3, maximize=True),
    "sgd_maximize": partial(SGD, lr=0.1, weight_decay=0.3, maximize=True, momentum=0.5),
}


@pytest.mark.parametrize("kind", [None, "norm", "value"])
@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", [*OTHERS, "adamw", "amsgrad", "no_momentum"])
def test_a_step_with_its_preconditioner_and_clipping(name, steps, kind):
    """The formula gives torch's own step, wherever the gradient is not cut off by value."""
    task, optimizer = after(steps, lambda t: (OTHERS | ADAMS)[name](groups(t, lr=0.02)))
    own = torch.cat([g.detach() for g in torch.autograd.grad(task(), list(task.parts))])
    # The median is not cut off itself.
    limit = 0.3 * float(own.norm()) if kind == "norm" else float(own.abs().median())
    clipping = None if kind is None else Clipping(limit, kind)
    snapshot = freeze(task, optimizer, clipping=clipping)
    rule = frozen_rule(snapshot)
    start, buffers = [p.detach().clone() for p in task.parts], []
    for p in task.parts:
        state = optimizer.state.get(p, {})
        buffers.append(state.get("exp_avg", state.get("momentum_buffer", torch.zeros_like(p))).clone())
    optimizer.zero_grad()
    task().backward()
    if kind == "norm":
        torch.nn.utils.clip_grad_norm_(task.parameters(), limit)
    elif kind == "value":
        torch.nn.utils.clip_grad_value_(task.parameters(), limit)
    optimizer.step()
    if steps == 0:  # PyTorch's first buffer of SGD is the gradient itself, without what the rule averages with
        assert all(not b.any() for b in buffers)
    kept = (own.abs() <= limit).split([2, 3]) if kind == "value" else [slice(None)] * 2
    gradients = own.split([2, 3])  # the factor of clipping is in the scale
    for (n, p), x, b, g, keep in zip(snapshot.parameters.items(), start, buffers, gradients, kept):
        scale, reach, decay = (
            torch.as_tensor(d[n], dtype=f64).expand_as(p) for d in (rule.scale, rule.buffer_scale, rule.weight_decay)
        )
        d = rule.sign * scale * g + decay * x
        m = rule.momentum * reach * b + (1 - rule.dampening + rule.direct) * d
        want = (1 - rule.lr * rule.decoupled_decay[n]) * x - rule.lr / rule.correction * m
        # NAdam's product of momenta is a number in single precision, whatever the parameters are.
        close(p.detach()[keep], want[keep], 1e-7 if name.startswith("nadam") else 1e-12)
        assert kind != "value" or bool((scale[~keep] == 0).all())


def test_clipping_scales_the_rates_of_this_step():
    task, optimizer = after(2, partial_parameters(SGD, lr=0.1))
    plain = frozen_rule(freeze(task, optimizer)).scale
    norm = torch.cat(list(freeze(task, optimizer).gradient.values())).norm()
    tight = frozen_rule(freeze(task, optimizer, clipping=Clipping(0.25 * float(norm)))).scale
    loose = frozen_rule(freeze(task, optimizer, clipping=Clipping(2 * float(norm)))).scale
    assert loose == plain
    for name in plain:
        assert tight[name] == pytest.approx(0.25 * plain[name], rel=1e-5)


def test_the_preconditioner_is_that_of_the_steps_own_second_moment():
    task, optimizer = after(4, partial_parameters(AdamW, lr=0.1, weight_decay=0.0))
    rule = frozen_rule(snapshot := freeze(task, optimizer))
    step(task, optimizer)
    for name, p in snapshot.parameters.items():
        state = optimizer.state[p]
        close(rule.scale[name], 1 / ((state["exp_avg_sq"] / (1 - 0.999**5)).sqrt() + 1e-8), 1e-12)


def partial_parameters(kind, **settings):
    return lambda task: kind(task.parameters(), **settings)


def test_the_state_and_the_gradient_are_left_alone():
    task, optimizer = after(3, partial_parameters(Adam, lr=0.1, amsgrad=True))
    snapshot = freeze(task, optimizer)
    before = {k: {n: v.clone() for n, v in s.items()} for k, s in enumerate(optimizer.state.values())}
    gradient = {n: g.clone() for n, g in snapshot.gradient.items()}
    frozen_rule(snapshot)
    assert same({k: dict(s) for k, s in enumerate(optimizer.state.values())}, before)
    assert same(snapshot.gradient, gradient)


def test_warm_up_from_zero_takes_the_relative_rates_of_initial_lr():
    task = quadratic()
    for kind in (SGD, AdamW):
        optimizer = kind(groups(task, lr=0.02), lr=0.1)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)
        assert [g["lr"] for g in optimizer.param_groups] == [0, 0]
        rule = frozen_rule(freeze(task, optimizer))
        assert rule.lr == 0
        plain = frozen_rule(freeze(task, kind(groups(task, lr=0.02), lr=0.1)))
        for name in rule.scale:
            close(rule.scale[name], plain.scale[name], 1e-12)
    optimizer = SGD(task.parameters(), lr=0.0)  # nothing is known: as if all were alike
    assert frozen_rule(freeze(task, optimizer)).scale == {"parts.0": 1, "parts.1": 1}


def test_what_the_optimizer_does_not_hold_or_has_no_gradient_does_not_move():
    task = quadratic()
    for kind in (SGD, Adam):
        rule = frozen_rule(freeze(task, kind([task.parts[1]], lr=0.1)))
        assert rule.scale["parts.0"] == 0 and bool((torch.as_tensor(rule.scale["parts.1"]) > 0).all())
        snapshot = freeze(task, kind(task.parameters(), lr=0.1))
        snapshot.gradient["parts.0"] = None
        rule = frozen_rule(snapshot)
        assert rule.scale["parts.0"] == 0 and bool((torch.as_tensor(rule.scale["parts.1"]) > 0).all())


class OwnSGD(SGD):
    def step(self, closure=None):
        return super().step(closure)


class OwnAdam(AdamW):
    def step(self, closure=None):
        return super().step(closure)


REFUSED = {
    "lbfgs": (partial_parameters(torch.optim.LBFGS), "LBFGS"),
    "adadelta": (partial_parameters(torch.optim.Adadelta), "Adadelta"),
    "own_sgd": (partial_parameters(OwnSGD, lr=0.1), "overrides SGD.step"),
    "own_adam": (partial_parameters(OwnAdam, lr=0.1), "overrides Adam.step"),
    "sgd_maximize": (partial_parameters(SGD, lr=0.1, maximize=True), "maximize"),
    "adam_maximize": (partial_parameters(Adam, lr=0.1, maximize=True), "maximize"),
    "sgd_momentum": (lambda t: SGD(groups(t, momentum=0.9), lr=0.1), "different momentum"),
    "sgd_dampening": (lambda t: SGD(groups(t, dampening=0.3), lr=0.1, momentum=0.9), "different momentum"),
    "adam_betas": (lambda t: Adam(groups(t, betas=(0.5, 0.999)), lr=0.1), "different momentum"),
    "coupled": (partial_parameters(Adam, lr=0.1, weight_decay=0.1), "coupled"),
    "coupled_group": (lambda t: Adam(groups(t, weight_decay=0.1), lr=0.1), "coupled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, reason = REFUSED[name]
    task = quadratic()
    with pytest.raises(Unmeasurable, match=reason):
        critical_rule(freeze(task, make(task)))


def test_refused_without_an_optimizer_or_with_clipping():
    task = quadratic()
    with pytest.raises(Unmeasurable, match="optimizer="):
        frozen_rule(freeze(task))
    with pytest.raises(Unmeasurable, match="clipped"):
        frozen_rule(freeze(task, SGD(task.parameters(), lr=0.1), unsupported="gradients are clipped"))


def test_before_training_there_is_no_gradient():
    """As in on_train_start: checked without a step."""
    task = quadratic()
    for make in (partial(SGD, momentum=0.9), Adam, AdamW):
        optimizer = make(task.parameters(), lr=0.1)
        rule = frozen_rule(Snapshot(0, task, replay=task, optimizer=optimizer))
        assert rule.lr == 0.1 and rule.scale.keys() == {"parts.0", "parts.1"}


# -- the rule on the modes -----------------------------------------------------------------------------------------


def frozen(problem, optimizer):
    net, x, y = problem.net, problem.x, problem.y
    part = lambda: evaluation(net(x), lambda f: 0.5 * (f - y).square().sum(1).mean(), samples=len(x))  # noqa: E731
    probes = ProbeSet(module=problem, parts=(part,), samples=len(x), batch_size=len(x), population=len(x))
    # The optimizer is past its first step: a gradient, not the exact zero of interpolation, for Adam's preconditioner.
    gradient = {n: 0.1 + torch.ones_like(p) for n, p in problem.named_parameters()}
    return freeze(problem, optimizer, probes=probes, gradient=gradient), gradient


@pytest.mark.parametrize("settings", SGDS)
@pytest.mark.parametrize("lr", [1.0, 8.0])
def test_the_exponent_is_that_of_the_dense_step(settings, lr):
    settings = SGDS[settings]
    problem, _ = interpolating_tanh()
    one, two = list(problem.net[0].parameters()), list(problem.net[2].parameters())
    optimizer = SGD([{"params": one}, {"params": two, "lr": lr / 4}], lr=lr, **settings)
    if settings.get("weight_decay"):  # uniform in D-coordinates only with one rate
        optimizer = SGD(problem.parameters(), lr=lr, **settings)
    for p in problem.parameters():  # past the first step, whose buffer is special
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p) if settings.get("momentum") else None
    snapshot, _ = frozen(problem, optimizer)
    found = frozen_sgd(snapshot)
    radius = torch.linalg.eigvals(step_jacobian(freeze(problem, optimizer), method="exact").dense()).abs().max()
    assert found.lr == lr and not found.frozen
    exponent = gd_exponent(found.modes, found.lr, rule=found.rule)
    assert radius > 1.05 or lr == 1.0
    if radius > 1 + 1e-9:  # otherwise it is 1 in the directions that no sample feels
        close(exponent, radius.log(), 1e-8)
    else:
        assert exponent < 1e-8


@pytest.mark.parametrize("name", ["adam", "adamw", "no_momentum"])
def test_the_exponent_of_frozen_adam_is_that_of_the_dense_step(name):
    problem, _ = interpolating_tanh()
    optimizer = ADAMS[name](problem.parameters(), lr=3.0, weight_decay=0.0 if name == "adam" else 0.01)
    snapshot, gradient = frozen(problem, optimizer)
    found = frozen_sgd(snapshot)
    rule = frozen_rule(snapshot)
    curvature = dense_hessian(problem)
    n = len(curvature)
    # After ten batches of probes that interpolate, and have no gradients: of the first step's g^2 this is left.
    decay, beta = optimizer.param_groups[0]["betas"][1], rule.momentum
    left = decay**10 * (1 - decay) / (1 - decay**11)
    D = torch.cat([(1 / (left**0.5 * g.abs() + 1e-8)).reshape(-1) for g in gradient.values()])
    eta, I = 3.0 / (1 - beta**11), torch.eye(n, dtype=f64)  # noqa: E741
    keep = 1 - 3.0 * (0.0 if name == "adam" else 0.01)
    m = torch.cat([(1 - beta) * curvature, beta * I], dim=1)
    A = torch.cat([torch.cat([keep * I, 0 * I], dim=1) - eta * D[:, None] * m, m])
    radius = torch.linalg.eigvals(A).abs().max()
    assert found.frozen and found.rule.correction == pytest.approx(1 - beta**11) and radius > 1.5
    close(gd_exponent(found.modes, found.lr, rule=found.rule), radius.log(), 1e-8)


def test_decay_that_differs_is_taken_at_its_mean_over_the_trace():
    problem, _ = interpolating_tanh()
    one, two = list(problem.net[0].parameters()), list(problem.net[2].parameters())
    optimizer = AdamW([{"params": one, "weight_decay": 0.0}, {"params": two, "weight_decay": 0.2, "lr": 0.05}], lr=0.1)
    snapshot, _ = frozen(problem, optimizer)
    found = frozen_sgd(snapshot)
    share = sum(v for n, v in found.kernel.traces.items() if n.startswith("net.2")) / sum(found.kernel.traces.values())
    assert found.rule.decoupled_decay == pytest.approx(0.2 * 0.5 * share) and 0 < share < 1


def test_parameters_that_joined_later_give_nadam_the_larger_share_of_the_gradient():
    """Their momentum schedule is behind; the edge errs on the early side, and comes back to the exact one."""
    task = quadratic()
    optimizer = torch.optim.NAdam([task.parts[0]], lr=0.01, momentum_decay=0.4)
    for _ in range(20):
        step(task, optimizer)
    alone = frozen_rule(freeze(task, optimizer)).direct
    optimizer.add_param_group({"params": [task.parts[1]]})
    fresh = torch.optim.NAdam([task.parts[1]], lr=0.01, momentum_decay=0.4)
    assert frozen_rule(freeze(task, optimizer)).direct == frozen_rule(freeze(task, fresh)).direct > 2 * alone
    for _ in range(300):
        step(task, optimizer)
    assert frozen_rule(freeze(task, optimizer)).direct == pytest.approx(0.1 / 0.9, rel=0.05)
