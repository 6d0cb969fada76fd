"""Derivatives of the optimizers' steps in closed form against forward mode, and steps on a plane against matrices."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward
from problems import close, f64, freeze, matrix, random, regression, take, trajectory
from test_step_jacobian import CLIPPINGS, GROUPS, MODES, OTHER_GROUPS, OTHERS, Small, two_groups
from update_formulas import FORMULAS

from lsp_callbacks import Lyapunov, RunContext, Snapshot, Unmeasurable
from lsp_callbacks.functional import Box, exponent_bounds, plane_map, window_exponent
from lsp_callbacks.linalg import from_matrix
from lsp_callbacks.operators import hessian
from lsp_callbacks.operators.curvature.stability_threshold import stability_threshold
from lsp_callbacks.operators.trajectory.formula_tangent import formula_tangent, has_state
from lsp_callbacks.operators.trajectory.proximal import update_jacobian, update_response
from lsp_callbacks.operators.trajectory.step_on_plane import step_on_plane
from lsp_callbacks.operators.trajectory.update_rules import descent
from lsp_callbacks.quantities.curvature.sharpness import measured_mode
from lsp_callbacks.step.clipping import Clipping

SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
KINDS = {name: partial(SGD, **settings) for name, settings in MODES.items()} | OTHERS
GROUPED = {f"group_{name}": (partial(SGD, lr=0.3, momentum=0.9), second) for name, second in GROUPS.items()} | {
    f"group_{name}": case for name, case in OTHER_GROUPS.items()
}


def made(name, problem):
    if name in KINDS:
        return KINDS[name](problem.parameters())
    kind, second = GROUPED[name]
    return kind(two_groups(problem, **second))


def at_dual(snapshot, z, change):
    """The same product by forward mode through the formula of each parameter; and the size of terms that may cancel.

    In its first step Adam's update is a sign: its derivative is the difference of two terms of the size of
    ``update / d``.
    """
    optimizer, tangent = snapshot.optimizer, formula_tangent(snapshot)
    parameters, groups = list(snapshot.parameters.values()), {}
    for group in optimizer.param_groups:
        groups |= {id(p): group for p in group["params"]}
    sizes = [p.numel() for p in parameters]
    rows = [row.split(sizes) for row in z.split(sum(sizes))]
    moved, sizes_of = [[] for _ in rows], [[] for _ in rows]
    for k, (p, g, dg) in enumerate(zip(parameters, snapshot.gradient.values(), change.split(sizes))):
        state = optimizer.state.get(p, {})
        group = groups[id(p)] | {"mu_product": float(state.get("mu_product", 1.0))}
        with torch.no_grad(), forward.dual_level():
            dual = lambda x, dx: forward.make_dual(x.detach().reshape(-1).clone(), dx.clone())  # noqa: E731
            held = {name: dual(state[name], rows[1 + j][k]) for j, name in enumerate(tangent.blocks) if name in state}
            formula = FORMULAS[type(optimizer)]
            new = formula(dual(p, rows[0][k]), dual(g, dg), held, group, float(state.get("step", 0)) + 1)
            after = {"theta": new[0], **new[1]}
            for j, name in enumerate(("theta", *tangent.blocks)):
                tangent_ = forward.unpack_dual(after[name]).tangent if name in after else None
                moved[j].append(torch.zeros_like(dg) if tangent_ is None else tangent_)
                made = forward.unpack_dual(after[name]).primal if name in after else torch.zeros_like(dg)
                made = made - p.reshape(-1) if name == "theta" else made
                moves = (dg.abs() + rows[0][k].abs()) / descent(p.detach(), g, group).reshape(-1).abs()
                sizes_of[j].append(made.abs() * moves)
    return (torch.cat([torch.cat(parts) for parts in found]) for found in (moved, sizes_of))


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (f64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("steps", [0, 3], ids=["first_step", "later"])
@pytest.mark.parametrize("name", [*KINDS, *GROUPED])
def test_it_is_the_forward_derivative_of_the_formula(name, steps, dtype, tol):
    problem = Small().to(dtype)
    optimizer = made(name, problem)
    for _ in range(steps):
        take(optimizer, problem())
    snapshot = freeze(problem, optimizer)
    tangent = formula_tangent(snapshot)
    n = tangent.length
    for seed in range(3):
        z, change = random(tangent.size, seed=seed).to(dtype), random(n, seed=9).to(dtype)
        pushed, (truth, terms) = tangent.push(z, change), at_dual(snapshot, z, change)
        for block, expected, term in zip(pushed.split(n), truth.split(n), terms.split(n)):
            assert bool(((block - expected).abs() <= tol * (expected.abs().max() + term)).all())
        w, (back, back_change) = random(tangent.size, seed=5).to(dtype), (None, None)
        back, back_change = tangent.pull(w)
        close(float(w @ pushed), float(back @ z + back_change @ change), 100 * tol * float(w.abs() @ pushed.abs()))


def test_a_part_that_has_stopped_to_move_stays_as_it_is():
    problem = Small()
    optimizer = AdamW(problem.parameters(), lr=0.1)
    take(optimizer, problem())
    snapshot = freeze(problem, optimizer)
    snapshot.gradient[next(iter(snapshot.gradient))] = None
    tangent = formula_tangent(snapshot)
    z = random(tangent.size)
    pushed, still = tangent.push(z, random(13)), next(iter(problem.parameters())).numel()
    for block, before in zip(pushed.split(13), z.split(13)):
        close(block[:still], before[:still], 0)
        assert (block[still:] - before[still:]).abs().min() > 0


@pytest.mark.parametrize("clipping", [*CLIPPINGS.values(), Clipping(1e-9)], ids=str)
def test_the_change_of_a_clipped_gradient_is_its_forward_derivative(clipping):
    gradient, change = 0.1 * random(50), random(50, seed=1)
    with forward.dual_level():
        expected = forward.unpack_dual(clipping(forward.make_dual(gradient, change))).tangent
    close(clipping.change(gradient, change), expected, 1e-13 * max(1.0, float(expected.abs().max())))
    zero = torch.zeros(50, dtype=f64)
    assert clipping.change(zero, change).isfinite().all()


# On the plane of the sharp mode ---------------------------------------------------------------------------------------

EXTRAS = {
    "plain": {},
    "clipped": {"clipping": CLIPPINGS["norm"]},
    "clipped_by_value": {"clipping": CLIPPINGS["value"]},
    "box": {"run": RunContext(prox=Box(-0.4, 0.4))},
}
PLANES = [name for name in KINDS if "rate_zero" not in name] + ["group_rates", "group_decays"]


def on_plane(problem, optimizer, **settings):
    snapshot = freeze(problem, optimizer, **settings)
    found = stability_threshold(snapshot, method="exact")
    plane = {"root": found.root, "buffer_scale": found.buffer_scale}
    return snapshot, step_on_plane(snapshot, found.mode, **plane, method="exact"), found.mode, plane


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", PLANES)
def test_the_step_on_the_plane_is_the_compressed_jacobian(name, extra):
    """By products with vectors over the whole state, of the whole step and of that at a fixed gradient."""
    problem = Small()
    optimizer = made(name, problem)
    for _ in range(2):
        take(optimizer, problem())
    snapshot, step, mode, plane = on_plane(problem, optimizer, **EXTRAS[extra])
    expected, rest = plane_map(update_jacobian(snapshot, method="exact"), mode, **plane)
    close(step.whole, expected, 1e-10 * float(expected.abs().max()))
    close(step.rest, rest, 1e-10)
    fixed = update_jacobian(snapshot, method="exact").dense()  # without what is due to the gradient
    fixed[:, : len(mode)] -= update_response(snapshot).dense() @ hessian(snapshot, method="exact").dense()
    drift, _ = plane_map(from_matrix(fixed), mode, **plane, rest=rest)
    close(step.drift, drift, 1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["plain", "nesterov_weight_decay", "adamw", "rmsprop_everything"])
def test_in_single_precision_it_is_that_of_double_precision(name):
    problem, single = Small(), Small().float()
    single.load_state_dict({key: value.float() for key, value in problem.state_dict().items()})
    optimizers = made(name, problem), made(name, single)
    for _ in range(2):
        take(optimizers[0], problem()), take(optimizers[1], single())
    _, step, mode, plane = on_plane(problem, optimizers[0])
    plane = {key: value.float() if isinstance(value, torch.Tensor) else value for key, value in plane.items()}
    same = step_on_plane(freeze(single, optimizers[1]), mode.float(), **plane, method="exact")
    close(same.whole, step.whole, 1e-4 * float(step.whole.abs().max()))


@pytest.mark.parametrize("name", ["plain", "momentum", "adamw"])
def test_a_window_is_that_of_the_steps_taken_one_by_one(name):
    """Lyapunov itself against products of the compressed whole Jacobians."""
    problem = regression()
    optimizer = made(name, problem)
    if name == "adamw":
        optimizer.param_groups[0]["lr"] = 0.01
        take(optimizer, problem())
    metric, maps, rest, frame = Lyapunov(window=3, average=1, method="exact"), [], None, {}
    for snapshot in trajectory(problem, optimizer, 4):
        metric.update(snapshot)
        frame = metric.vectors() if not snapshot.step else frame
        if not snapshot.step and not has_state(snapshot):
            continue  # it aligns, and is no step of the window
        plane = {"root": frame["root"], "buffer_scale": frame["buffer_scale"]}
        step, rest = plane_map(update_jacobian(snapshot, method="exact"), frame["mode"], **plane, rest=rest)
        if name == "plain" and not snapshot.step:  # the first step takes the estimate of its eigenvalue
            eigenvalue, _ = measured_mode(snapshot, None, None, "exact").eigenvalue
            step = matrix([[1 - optimizer.param_groups[0]["lr"] * eigenvalue]])
        maps.append(step)
        if metric.complete:
            break
    assert len(maps) == 3
    close(metric.windows[0], window_exponent(maps, rest=bool(rest.any())), 1e-10)


def test_bounds_of_a_batch_of_windows_are_those_of_each():
    generator = torch.Generator().manual_seed(0)
    for rest in (False, True):
        for k in (1, 2, 3):
            maps = [torch.randn(k, k, generator=generator, dtype=f64) for _ in range(3)]
            curvatures = [0.3 * torch.randn(k, k, generator=generator, dtype=f64) for _ in range(3)]
            low, high = exponent_bounds(maps, curvatures, 0.2, 0.4, rest=rest and k > 1)
            shifts = torch.linspace(-0.2, 0.4, 17, dtype=f64).tolist()
            each = [window_exponent([P + d * C for P, C in zip(maps, curvatures)], rest=rest and k > 1) for d in shifts]
            close(high, max(each), 1e-12)
            assert low == pytest.approx(min(each), abs=1e-12) or low == -torch.inf


def test_a_replay_that_is_not_the_step_is_still_refused_within_a_window():
    """Without a replay at the unchanged parameters: the difference itself, or the exact product, shows it."""
    for method in ("finite_difference", "exact"):
        problem = regression()
        optimizer, metric = SGD(problem.parameters(), lr=0.1), Lyapunov(method=method)
        for snapshot in trajectory(problem, optimizer, 2):
            if snapshot.step:
                other = Snapshot(
                    snapshot.step,
                    problem,
                    replay=lambda problem=problem: 1.01 * problem(),
                    optimizer=optimizer,
                    loss=snapshot.loss,
                    gradient=snapshot.gradient,
                )
                with pytest.raises(Unmeasurable, match="could not be replayed"):
                    metric.update(other)
            else:
                metric.update(snapshot)
