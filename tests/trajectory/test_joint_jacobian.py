"""Several optimizers that take turns on losses of their own: the joint Jacobian, and each player's edge."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from problems import close, f64, random, same, tanh_mlp
from torch import nn
from torch.nn import functional as F

from lsp_callbacks import LyapunovTrajectory, Player, Sharpness, Snapshot, Unmeasurable
from lsp_callbacks.operators import joint_jacobian, state_blocks, step_jacobian
from lsp_callbacks.step.verified_step import verified_player_step

SGD, Adam = torch.optim.SGD, torch.optim.Adam


class Bilinear(nn.Module):
    """``min_x max_y  x^T M y + a |x|^2 / 2 - a |y|^2 / 2``."""

    def __init__(self, M=((1.0,),), a=0.0):
        super().__init__()
        self.M, self.a = torch.tensor(M, dtype=f64), a
        self.x, self.y = nn.Parameter(random(len(self.M), seed=1)), nn.Parameter(random(len(self.M[0]), seed=2))

    def value(self):
        return self.x @ self.M @ self.y + self.a / 2 * (self.x.square().sum() - self.y.square().sum())

    def losses(self):
        return {"min": self.value, "max": lambda: -self.value()}

    def optimizers(self, make):
        return {"min": make([self.x]), "max": make([self.y])}


class Duel(nn.Module):
    """A GAN of 7 + 7 parameters on fixed noise, smooth."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = tanh_mlp(1, 2, 1, seed=1), tanh_mlp(1, 2, 1, seed=2)
        self.noise, self.x = random(5, 1, seed=3), random(5, 1, seed=4) + 1

    def losses(self):
        fake = lambda: self.critic(self.generator(self.noise))  # noqa: E731
        return {
            "critic": lambda: F.softplus(-self.critic(self.x)).mean() + F.softplus(fake()).mean(),
            "generator": lambda: F.softplus(-fake()).mean(),
        }

    def optimizers(self, make):
        return {"critic": make(self.critic.parameters()), "generator": make(self.generator.parameters())}


class Relay(nn.Module):
    """Three players, of whom the last two share a parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(random(2, seed=seed)) for seed in (1, 2, 3))

    def losses(self):
        a, b, c = self.a, self.b, self.c
        return {
            "first": lambda: (a * b.sin()).sum() + 0.3 * a.square().sum(),
            "second": lambda: (b * c.cos() * a).sum(),
            "third": lambda: (c.square() * b).sum() - (a * c).sum(),
        }

    def optimizers(self, make):
        return {"first": make([self.a]), "second": make([self.b, self.c]), "third": make([self.c])}


def snapshots(module, optimizers, turns, *, losses=None, start=0, **settings):
    """Consecutive frozen steps of a real game, each before its update."""
    losses, step, trusted = losses or module.losses(), start, set()
    for _ in range(turns):
        for name, optimizer in optimizers.items():
            player = Player(name, optimizers, trusted=trusted)
            replay = losses[name]
            optimizer.zero_grad()
            replay().backward()
            gradient = {n: p.grad for n, p in module.named_parameters()}
            frozen = Snapshot(step, module, replay, optimizer, gradient=gradient, player=player, **settings)
            yield verified_player_step(frozen)
            optimizer.step()
            step += 1


def blocks(module, optimizers):
    """The tensors that a turn moves, in the order of the joint state."""
    tensors = [p.data for p in module.parameters()]
    for optimizer in optimizers.values():
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name in state_blocks(Snapshot(0, module, lambda: None, optimizer)):
            tensors += [optimizer.state[p][name] for p in module.parameters() if id(p) in held]
    return tensors


def one_turn(module, optimizers, displacement):
    """Where a real turn ends that begins with everything displaced."""
    twin, moved = copy.deepcopy((module, optimizers))
    sizes = [t.numel() for t in blocks(twin, moved)]
    for tensor, part in zip(blocks(twin, moved), displacement.split(sizes)):
        tensor += part.view_as(tensor)
    for name, optimizer in moved.items():
        optimizer.zero_grad()
        twin.losses()[name]().backward()
        optimizer.step()
    return torch.cat([t.flatten().clone() for t in blocks(twin, moved)])


def differenced_turn(module, optimizers, direction, e):
    """The real turn's derivative along a direction."""
    ends = [one_turn(module, optimizers, sign * e * direction) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * e)


MAKERS = {
    "sgd": lambda p: SGD(p, lr=0.2),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.8, weight_decay=0.1),
    "adam": lambda p: Adam(p, lr=0.05, betas=(0.5, 0.999)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03, betas=(0.0, 0.9), amsgrad=True),
}


EXACT = [("exact", 1e-6, maker) for maker in MAKERS]


@pytest.mark.parametrize("method, tol, maker", [*EXACT, ("finite_difference", 1e-4, "momentum")])
@pytest.mark.parametrize("game", [Bilinear, Duel, Relay])
def test_the_product_over_a_turn_is_the_derivative_of_the_real_turn(game, method, tol, maker):
    module = game()
    optimizers = module.optimizers(MAKERS[maker])
    for _ in snapshots(module, optimizers, 3):  # until every state is there
        pass
    # Second moments are tiny, and must stay positive.
    sizes = torch.cat([t.flatten().abs() for t in blocks(module, optimizers)])
    sizes[: sum(p.numel() for p in module.parameters())] = 1.0
    directions = sizes * random(6, len(sizes), seed=5).clamp(-2, 2)
    expected = [differenced_turn(module, optimizers, d, 1e-5) for d in directions]
    found = directions.T
    for snapshot in snapshots(module, optimizers, 1):
        jacobian = joint_jacobian(snapshot, method=method)
        found = torch.stack([jacobian @ z for z in found.T], dim=1)
    close(found, torch.stack(expected, dim=1), tol)


@pytest.mark.parametrize("lr", [0.1, 1.0, 1.9, 2.1])
def test_alternating_descent_on_a_bilinear_game_rotates_until_its_edge(lr):
    """The eigenvalues of a turn have the product 1, and the sum 2 - lr^2: modulus 1 up to lr = 2."""
    module = Bilinear()
    A = torch.eye(2, dtype=f64)
    for snapshot in snapshots(module, module.optimizers(lambda p: SGD(p, lr=lr)), 1):
        A = joint_jacobian(snapshot, method="exact").dense() @ A
    close(A, [[1, -lr], [lr, 1 - lr**2]], 1e-12)
    found = torch.linalg.eigvals(A).abs().max()
    trace = 2 - lr**2
    close(found, 1.0 if lr < 2 else (abs(trace) + math.sqrt(trace**2 - 4)) / 2, 1e-7)


def test_simultaneous_steps_would_be_another_matrix():
    """Their eigenvalues have modulus sqrt(1 + lr^2): the order of the steps is not a detail."""
    module, lr = Bilinear(), 0.5
    optimizers = module.optimizers(lambda p: SGD(p, lr=lr))
    first, second = (joint_jacobian(s, method="exact").dense() for s in snapshots(module, optimizers, 1))
    eye = torch.eye(2, dtype=f64)
    close(torch.linalg.eigvals(first + second - eye).abs(), [math.sqrt(1 + lr**2)] * 2, 1e-12)
    close(torch.linalg.eigvals(second @ first).abs(), [1.0, 1.0], 1e-12)


def exponents(module, optimizers, k, window=60, transient=0):
    metric = LyapunovTrajectory(k=k, window=window, transient=transient, method="exact")
    for snapshot in snapshots(module, optimizers, (window + transient) // len(optimizers)):
        assert not metric.complete
        metric.update(snapshot)
    assert metric.complete
    return metric.growth


@pytest.mark.parametrize("a", [0.0, 0.3])
def test_exponents_of_a_bilinear_game(a):
    """Per step half of those per turn; the sum of all is the log of the determinant, at every window."""
    module, lr = Bilinear([[1.0]], a), 0.4
    growth = exponents(module, module.optimizers(lambda p: SGD(p, lr=lr)), k=2, window=80)
    close(growth.mean(0).sum(), math.log(1 - lr * a), 1e-12)
    # Complex eigenvalues: both exponents are half of it, up to what a finite window leaves of the ellipse.
    close(growth.mean(0)[0], math.log(1 - lr * a) / 2, 0.02)


@pytest.mark.parametrize("maker", ["momentum", "adam"])
def test_exponents_are_those_of_the_dense_product(maker):
    """A transient of two turns and twenty recorded, of the same start, by finite differences of whole turns."""
    module = Duel()
    optimizers = module.optimizers(MAKERS[maker])
    for _ in snapshots(module, optimizers, 3):
        pass
    twin, others = copy.deepcopy((module, optimizers))
    metric = LyapunovTrajectory(window=40, transient=4, method="exact")
    start = next(iter(snapshots(*copy.deepcopy((module, optimizers)), 1)))
    first = joint_jacobian(start)
    v = metric._start(start, first, torch.ones(14, dtype=f64))[0]
    for snapshot in snapshots(module, optimizers, 22):
        metric.update(snapshot)
    logs, steps = 0.0, 0
    for turn in range(22):
        v = differenced_turn(twin, others, v, 1e-7)
        size = torch.linalg.vector_norm(v[:14])
        logs, steps, v = (logs + float(size.log()), steps + 2, v / size) if turn >= 2 else (0.0, 0, v / size)
        for _ in snapshots(twin, others, 1):
            pass
    close(metric.compute()["stability/lyapunov_trajectory"], logs / steps, 1e-6)


@pytest.mark.parametrize("maker", ["sgd", "momentum"])
def test_each_player_has_its_own_edge(maker):
    """The Hessian of its own loss over its own parameters; the largest Courant number stands for all."""
    module = Duel()
    optimizers = module.optimizers(MAKERS[maker])
    optimizers["generator"].param_groups[0]["lr"] = 0.05
    metric, expected = Sharpness(), {}
    beta, decay = (0.8, 0.1) if maker == "momentum" else (0.0, 0.0)
    for snapshot in snapshots(module, optimizers, 1):
        metric.update(replace(snapshot))
        name, lr = snapshot.player.name, snapshot.optimizer.param_groups[0]["lr"]
        top = torch.linalg.eigvalsh(dense_block(module, getattr(module, name), module.losses()[name]))[-1]
        expected[name] = float(top), float(lr * (top + decay) / (2 + 2 * beta))
        assert metric.complete == (name == "generator")
    values = metric.compute()
    for name, (sharpness, courant) in expected.items():
        close(values[f"stability/player_sharpness/{name}"], sharpness, 0.02)
        close(values[f"stability/player_courant/{name}"], courant, 0.02)
    largest = max(expected, key=lambda name: expected[name][1])
    assert values["stability/courant_gd"] == values[f"stability/player_courant/{largest}"]
    assert values["stability/sharpness"] == values[f"stability/player_sharpness/{largest}"]
    assert values["stability/sharpness_residual"] < 0.05


def dense_block(module, part, loss):
    parameters = list(part.parameters())
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in flat]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


# Refusals -----------------------------------------------------------------------------------------------------------


def first(module, make=MAKERS["sgd"], **settings):
    return next(iter(snapshots(module, module.optimizers(make), 1, **settings)))


def test_a_players_step_is_no_step_of_one_optimizer():
    with pytest.raises(Unmeasurable, match=r"several players \(critic, generator\)"):
        step_jacobian(first(Duel()))
    with pytest.raises(Unmeasurable, match="the snapshot has no player"):
        joint_jacobian(replace(first(Duel()), player=None))
    with pytest.raises(ValueError, match="the players are a, b"):
        Player("c", {"a": None, "b": None})


def test_an_optimizer_without_a_formula_cannot_play():
    module = Duel()
    optimizers = module.optimizers(MAKERS["sgd"]) | {"generator": torch.optim.Rprop(module.generator.parameters())}
    snapshot = next(iter(snapshots(module, optimizers, 1)))
    for quantity in (LyapunovTrajectory().check, LyapunovTrajectory().update):
        with pytest.raises(Unmeasurable, match="Rprop is not supported"):
            quantity(snapshot)


def test_a_player_without_parameters_is_named():
    module = Duel()
    optimizers = module.optimizers(MAKERS["sgd"])
    module.generator.requires_grad_(False)
    critic = Snapshot(0, module, module.losses()["critic"], optimizers["critic"], player=Player("critic", optimizers))
    with pytest.raises(Unmeasurable, match="player 'generator' has no parameter"):
        joint_jacobian(critic)


@pytest.mark.parametrize("part", ["all", "half"])
def test_a_detached_loss_is_found_where_its_product_would_be_wrong(part):
    """The gradient of the player's own parameters is right, also where only a part is detached."""
    module = Duel()
    fake = lambda: module.generator(module.noise)  # noqa: E731

    def critic():
        loss = F.softplus(-module.critic(module.x)).mean() + F.softplus(module.critic(fake().detach())).mean()
        return loss + (0.3 * module.critic(fake()).square().mean() if part == "half" else 0.0)

    snapshot = first(module, losses=module.losses() | {"critic": critic})
    assert snapshot.unsupported is None
    for method in ("exact", "finite_difference"):
        with pytest.raises(Unmeasurable, match=r"'critic' detaches the other players.* parameters \(.detach"):
            joint_jacobian(replace(snapshot), method=method)
    assert not snapshot.player.trusted


def test_a_player_that_detaches_its_own_parameters_is_found():
    """Its gradient changes with them in a way that two backward passes do not see."""
    module = Duel()

    def critic():
        score = module.critic(module.generator(module.noise))
        return F.softplus(score).mean() + (score * score.detach()).mean()

    snapshot = first(module, losses=module.losses() | {"critic": critic})
    with pytest.raises(Unmeasurable, match=r"'critic' depends on its own parameters|'critic' detaches"):
        joint_jacobian(snapshot)

    def own():
        return (
            module.critic(module.x).square().mean()
            + (module.critic(module.x) * module.critic(module.x).detach()).mean()
        )

    with pytest.raises(Unmeasurable, match=r"'critic' depends on its own parameters .* made by detach"):
        joint_jacobian(first(module, losses=module.losses() | {"critic": own}))


def test_players_that_have_nothing_to_do_with_each_other_may_play():
    module = Duel()
    losses = {"critic": lambda: module.critic(module.x).square().mean(), "generator": module.losses()["generator"]}
    snapshot = first(module, losses=losses)
    A = joint_jacobian(snapshot).dense()
    close(A[7:, :7] if A[0, 0] == 1 else A[:7, 7:], torch.zeros(7, 7), 1e-12)
    assert snapshot.player.trusted == {"critic"}


def test_the_comparison_is_made_once_a_run():
    module, calls = Duel(), []
    losses = {name: lambda loss=loss: (calls.append(1), loss())[1] for name, loss in module.losses().items()}
    found = []
    for snapshot in snapshots(module, module.optimizers(MAKERS["sgd"]), 2, losses=losses):
        calls.clear()
        joint_jacobian(snapshot, method="exact")
        found.append(len(calls))
    assert found[0] == found[1] > found[2] == found[3] == 2


def test_a_gradient_that_is_not_the_players_is_not_modelled():
    module = Duel()
    optimizers = module.optimizers(MAKERS["sgd"])
    loss, name = module.losses()["critic"], "critic"
    loss().backward()
    gradient = {n: 1.001 * p.grad for n, p in module.named_parameters()}
    settings = {"optimizer": optimizers[name], "gradient": gradient, "player": Player(name, optimizers)}
    other = verified_player_step(Snapshot(0, module, loss, **settings))
    assert "is not that of its loss_fn" in other.unsupported
    right = verified_player_step(Snapshot(0, module, loss, **settings), lambda: 1.001 * loss())
    assert right.unsupported is None and float(right.loss) == pytest.approx(1.001 * float(loss()))
    with pytest.raises(Unmeasurable, match="is not that of its loss_fn"):
        Sharpness().update(other)


def test_parameters_that_were_moved_break_the_product_alone():
    snapshot = first(Duel())
    moved = replace(snapshot, player=replace(snapshot.player, interrupted="they were moved"))
    with pytest.raises(Unmeasurable, match="they were moved"):
        LyapunovTrajectory().update(moved)
    Sharpness().update(moved)


def test_a_window_under_way_goes_on_from_its_vectors():
    module = Duel()
    optimizers = module.optimizers(MAKERS["sgd"])
    whole, resumed = Sharpness(), Sharpness()
    for snapshot in snapshots(module, optimizers, 2):
        if snapshot.step == 3:
            resumed.load_state_dict(whole.state_dict())
            resumed.load_vectors(copy.deepcopy(whole.vectors()))
            resumed.update(replace(snapshot))
        whole.update(snapshot)
    assert whole.complete and resumed.complete and same(whole.compute(), resumed.compute())
    whole.reset()
    assert not any("player" in key for key in whole.compute())


def test_a_number_that_is_not_finite_stands_for_all():
    """A player whose edge is unknown may have the largest one."""
    module = Duel()
    metric = Sharpness()
    for snapshot in snapshots(module, module.optimizers(MAKERS["sgd"]), 1):
        metric.update(snapshot)
        metric._turn = {name: (1.0, 1.0, math.nan, 0.0, 0.0) for name in metric._turn}
    assert metric.compute()["stability/courant_gd"].isnan()
