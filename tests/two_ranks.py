"""What each of two processes runs for `test_ranks`."""

import contextlib
import os
import warnings
from functools import partial
from itertools import product

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from games import GAN
from games import monitor as game
from harness import CLASSES, FEATURES, Losses, Model, fit, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lsp_callbacks import (
    BatchSharpness,
    CriticalSharpness,
    Dissipation,
    LeaveOneOut,
    SGDLaw,
    SignalPropagation,
    Snapshot,
    SpectralDensity,
    StabilityMonitor,
    StabilityProfile,
    StopOnInstability,
)
from lsp_callbacks.callbacks.shared_losses import SharedLosses
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.operators import hessian
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.run_context import RunContext

WORLD, BATCH, SAMPLES = 2, 4, 48
DDP = {"strategy": "ddp", "devices": WORLD}
#: Of each process, by batch.
SIZES = [[4, 4, 4], [4, 4, 2]]


# -- data and models, for one process too ----------------------------------------------------------------------------


def dataset(shape=(FEATURES,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, *shape, generator=generator, dtype=dtype)
    return TensorDataset(x, x.flatten(1)[:, :CLASSES].argmax(1))


def joined():
    """The batches of both processes behind one another, as one process takes them."""
    share = [list(range(rank, SAMPLES, WORLD)) for rank in range(WORLD)]
    batches = [[row for own in share for row in own[k : k + BATCH]] for k in range(0, SAMPLES // WORLD, BATCH)]
    return DataLoader(dataset(), batch_sampler=batches)


def uneven(rank=None):
    """Batches of one process, or all with the weight that each sample has in the mean of the means."""
    x, y = dataset().tensors
    weighted, start = [], 0
    for sizes in zip(*SIZES):
        parts = []
        for own, size in enumerate(sizes):
            rows = slice(start, start + size)
            start += size
            if rank in (None, own):
                weight = torch.full((size,), 1 / size / (WORLD if rank is None else 1), dtype=x.dtype)
                parts.append((x[rows], y[rows], weight))
        weighted.append(tuple(torch.cat(column) for column in zip(*parts)))
    return DataLoader(weighted, batch_size=None)


class SmoothBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return x + 0.5 * torch.tanh(self.inner(x))


def smooth():
    net = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), SmoothBlock(), nn.Linear(5, CLASSES)).double()
    return Model(net, partial(torch.optim.SGD, lr=0.2, momentum=0.9))


def unstable():
    return Model(mlp().double(), partial(torch.optim.SGD, lr=30.0))


class Weighted(Model):
    """Its loss is a weighted sum; a layer is never used."""

    def __init__(self):
        super().__init__(mlp().double(), partial(torch.optim.SGD, lr=0.2))
        self.spare = nn.Linear(2, 2).double()

    def training_step(self, batch, batch_idx):
        x, y, weight = batch
        return (F.cross_entropy(self.net(x), y, reduction="none") * weight).sum()


class ByHand(Model):
    """Its loss is no known criterion; rank 1 has a penalty beside it where that is asked for."""

    def __init__(self, penalty=0.0):
        super().__init__(mlp().double(), partial(torch.optim.SGD, lr=0.2))
        self.penalty = penalty

    def training_step(self, batch, batch_idx):
        weights = sum(p.square().sum() for p in self.parameters())
        return by_hand(self.net(batch[0]), batch) + self.penalty * self.global_rank * weights


def by_hand(f, batch):
    return -f.softmax(1).gather(1, batch[1][:, None]).log().mean()


def told():
    forward_fn = lambda module, batch: module.net(batch[0])  # noqa: E731
    return StabilityMonitor(["mean_square_stability"], every_n_steps=1, forward_fn=forward_fn, criterion=by_hand)


class Soon(Dissipation):
    least = 12
    least_steps = 1  # runs are shorter, and what is recorded is looked at


def second(module):
    """A second loss, the same on both processes."""
    x, y = dataset().tensors
    return F.cross_entropy(module.net(x[:12]), y[:12])


def quantities():
    dear = (
        BatchSharpness(most=8),
        Soon(),
        SGDLaw(probes=16, products=6),
        SpectralDensity(steps=8),
        LeaveOneOut(2, window=2),
        StabilityProfile(horizon=2, directions=2, samples=2, probes=8),
        CriticalSharpness(second, tolerance=1e-3),
    )
    return ["spectral_norm", "residual_cfl", "sharpness", "sgd_stability", "lyapunov", "robustness", *dear]


class Saves(pl.Callback):
    """Checkpoints of the trainer, and states that one process alone asks for."""

    def __init__(self, folder, every, rank):
        self.folder, self.every, self.rank = folder, every, rank

    def on_train_batch_end(self, trainer, module, *args):
        monitor = next(c for c in trainer.callbacks if isinstance(c, StabilityMonitor))
        if trainer.global_step % self.every == 0:
            trainer.save_checkpoint(os.path.join(self.folder, f"{trainer.global_step}.ckpt"))
        if self.rank == trainer.global_step % WORLD:
            monitor.state_dict()


def fails_on_one(module, rank):
    if rank:
        raise KeyError("mine")
    return sum(p.square().sum() for p in module.parameters())


def energies(rank):
    """One of which fails on the second process."""
    return {"broken": partial(fails_on_one, rank=rank), "loss twice": lambda module, loss: 2 * loss}


def checkpointed(folder, rank, every_n_steps, **plain):
    """Saved more often than the series is long, and resumed from the end of the third epoch."""
    found = {}
    for name, saves, settings in (
        ("plain", (), {}), ("saved", (Saves(folder, 6, rank),), {}),
        ("resumed", (), {"ckpt_path": os.path.join(folder, "18.ckpt")}),
    ):  # fmt: skip
        ours = Soon(state="net", energies=energies(rank))
        found[name] = trained(
            smooth, StabilityMonitor([ours], every_n_steps=every_n_steps), *saves, **plain, **settings
        )
    return found


# -- the processes ---------------------------------------------------------------------------------------------------


def rounds(rank):
    """A failure at every place, on either process and on both; and a healthy round after each."""
    ranks = Ranks.joined("cpu")
    found = {}
    failures = {"error": RuntimeError("no memory"), "unsupported": Unsupported("not here")}
    places = [
        "before",
        "in 0",
        "after 0",
        "in 1",
        "after 1",
        "swallowed",
        "catches",
        "quiet",
        "masks",
        "astray",
        "more",
    ]
    for place, who, kind in product(places, ((0,), (1,), (0, 1)), failures):
        calls = []

        def breaks(where, place=place, who=who, kind=kind, calls=calls):
            calls.append(where)
            if where == place and rank in who:
                raise failures[kind]

        def exchange(k, breaks=breaks):
            def own():
                breaks(f"in {k}")
                return (torch.tensor([float(rank), 4.0]),)

            return ranks.mean(own, "numbers")[0]

        def measure(place=place, who=who, breaks=breaks, exchange=exchange):
            breaks("before")
            total = exchange(0)
            breaks("after 0")
            if place == "swallowed":  # the cause is caught, and the process goes on
                with contextlib.suppress(RuntimeError, ValueError):
                    breaks("swallowed") if rank not in who else ranks.any(lambda: breaks("swallowed"), "a question")
            if place == "catches":  # all meet in the question, and one fails: the others go on, too
                try:
                    ranks.any(lambda: breaks("catches") or True, "a question")
                except (RuntimeError, ValueError):
                    exchange(2)
            if place == "quiet":  # all meet in the question, and are content
                with contextlib.suppress(RuntimeError, ValueError):
                    ranks.any(lambda: breaks("quiet") or True, "a question")
                return total
            if place == "masks":
                try:
                    ranks.any(lambda: breaks("masks") or True, "a question")
                except (RuntimeError, ValueError):
                    if rank in who:
                        raise KeyError("another") from None
                    raise
            if place == "astray" and rank in who:
                ranks.first(lambda: 1, "elsewhere")
            total = total + exchange(1)
            if place == "more" and rank in who:
                exchange(2)
            breaks("after 1")
            return total

        try:
            result = ranks.together(measure).tolist()
        except Exception as error:
            result = (type(error).__name__, str(error), type(error.__cause__).__name__)
        healthy = ranks.together(lambda: ranks.mean(lambda: (torch.tensor([2.0 * rank]),), "numbers")[0]).tolist()
        found[place, who, kind] = (result, healthy)
    found["nested"] = ranks.together(lambda: ranks.together(lambda: exchange(0)) + exchange(1)).tolist()
    found["losses"] = exchanged(rank, ranks)
    found["first"] = ranks.first(lambda: {"rank": rank}, "a dictionary")
    found["gather"] = ranks.gather(lambda: rank, "the numbers")
    found["half"] = ranks.mean(lambda: (torch.full((2,), 1.0 + rank / 2, dtype=torch.bfloat16),), "half")[0]
    found["any"] = [ranks.any(lambda own=own: rank in own, "who") for own in ((), (0,), (1,), (0, 1))]
    return found


def exchanged(rank, ranks):
    """What is known of the losses after each step, the number of collectives, and whether the rates are the same."""
    shared, calls, gather = SharedLosses(ranks), [], dist.all_gather
    dist.all_gather = lambda *args: (calls.append(1), gather(*args))
    told = []
    try:
        for step in range(12):
            loss = (
                None
                if (step == 2 and rank) or step == 3
                else torch.tensor(float("nan") if rank and step == 6 else step + rank)
            )
            known = shared.take(step, loss, lr=0.1 if step < 8 else 0.1 + rank, left_out=step == 6)
            told.append(([tuple(each) for each in known], shared.same_rates, len(calls)))
        told.append(([tuple(each) for each in shared.rest()], shared.same_rates, len(calls)))
    finally:
        dist.all_gather = gather
    return told


def curvature(rank):
    """The dense Hessian, by both ways and by the automatic one, where only the second process has a kink."""
    x, y = dataset().tensors
    torch.manual_seed(0)
    net = smooth().net
    state = {name: p.detach() for name, p in net.named_parameters()}

    def loss(theta, own):
        out = torch.func.functional_call(net, theta, x[own::WORLD])
        value = F.cross_entropy(out, y[own::WORLD])
        return value + 0.01 * out.abs().sum() if own else value

    def total(flat):
        parts = flat.split([p.numel() for p in state.values()])
        theta = {name: part.view_as(p) for (name, p), part in zip(state.items(), parts)}
        return sum(loss(theta, own) for own in range(WORLD)) / WORLD

    point = torch.cat([p.reshape(-1) for p in state.values()])
    gradient = torch.func.grad(total)(point).split([p.numel() for p in state.values()])
    parts = {name: g.view_as(p) for (name, p), g in zip(state.items(), gradient)}
    own = loss(state, rank)
    found = {"truth": torch.func.hessian(total)(point)}
    for method in ("exact", "finite_difference", "auto"):
        snapshot = Snapshot(
            0, net, lambda: loss(dict(net.named_parameters()), rank), loss=own, gradient=parts,
            run=RunContext(ranks=Ranks.joined("cpu")),
        )  # fmt: skip
        found[method] = snapshot.run.ranks.together(lambda s=snapshot, m=method: hessian(s, method=m).dense())
        found[method, "kinked"] = snapshot.run.ranks.together(lambda s=snapshot: s.kinked)
    wrong = Snapshot(
        0, net, lambda: loss(dict(net.named_parameters()), 0) * (1 + rank), loss=loss(state, 0), gradient=parts,
        run=RunContext(ranks=Ranks.joined("cpu")),
    )  # fmt: skip
    try:
        wrong.run.ranks.together(lambda: hessian(wrong, method="exact"))
    except ValueError as error:
        found["wrong"] = str(error)
    return found


class Breaks(SignalPropagation):
    """One of its parts fails, on some ranks."""

    def __init__(self, who):
        super().__init__()
        self.who = who

    def _loss_condition(self, snapshot):
        if snapshot.run.ranks.rank in self.who:
            raise RuntimeError("no second derivative")
        return super()._loss_condition(snapshot)


def parts(rank):
    """What of a measurement is left where a part fails, and whether its round goes on."""
    x, y = dataset().tensors
    torch.manual_seed(0)
    net = smooth().net
    found = {}
    for who in ((), (0,), (1,), (0, 1)):
        snapshot = Snapshot(
            0,
            net,
            lambda: F.cross_entropy(net(x[rank:7:WORLD]), y[rank:7:WORLD]),
            run=RunContext(ranks=Ranks.joined("cpu")),
        )
        metric = Breaks(who)

        def measure(metric=metric, snapshot=snapshot):
            metric.update(snapshot)
            return snapshot.run.ranks.mean(lambda: (torch.tensor([float(rank)]),), "afterwards")[0]

        after = float(snapshot.run.ranks.together(measure))
        found[who] = ({key: float(value) for key, value in metric.compute().items()}, metric.absent, after)
    return found


def trained(make, *callbacks, **settings):
    """What a run leaves behind, and what it said."""
    losses = Losses()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = next((c for c in callbacks if isinstance(c, StabilityMonitor)), None)
        run = fit(make, losses, *callbacks, **settings)
    model = run.lightning_module
    latest = getattr(monitor and monitor.monitor.quantities.get("sgd_stability"), "latest", None)
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()} if run.strategy.model is not None else None,
        "optimizer": run.optimizers[0].state_dict(),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "losses": losses.losses,
        "random": torch.get_rng_state(),
        "steps": run.global_step,
        "metrics": {k: float(v) for k, v in run.callback_metrics.items() if k != "stability/overhead"},
        "history": monitor and {key: (c.steps, c.values) for key, c in monitor.history.items()},
        "cadence": monitor and monitor.monitor.cadence.state_dict(),
        "gram": None if latest is None else latest.kernel.gram,
        "skipped": {} if monitor is None else dict(monitor.skipped),
        "said": [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)],
    }


class ConvNet(Model):
    """Dropout, and batch statistics that differ between the processes."""

    def __init__(self):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, CLASSES)
        )
        super().__init__(net, partial(torch.optim.SGD, lr=0.05, momentum=0.9))


class FailsOnce(Weighted):
    """Runs out of memory on the last process, when its step 4 is replayed."""

    calls = 0

    def training_step(self, batch, batch_idx):
        if self.global_rank == self.trainer.world_size - 1 and self.trainer.global_step == 4:
            type(self).calls += 1  # of the class: the copy's count, too
            if self.calls == 3:
                raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


class Game(GAN):
    """Without batch statistics, which would be each process's own."""

    def __init__(self):
        super().__init__("batch")
        self.generator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, FEATURES))
        self.double()


class Communicates(Model):
    def __init__(self):
        super().__init__(mlp().double())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * self.all_gather(batch[0].mean()).mean()


class NaNOnOne(Model):
    """The last process overflows, in its forward or its backward pass."""

    def __init__(self, what, step=4):
        super().__init__(mlp().double())
        self.what, self.step = what, step

    def loss(self, batch):
        out = self.net(batch[0])
        if self.global_rank == self.trainer.world_size - 1 and self.trainer.global_step == self.step:
            out = (0 * out).log() if self.what == "forward" else (0 * out).sqrt()
        return F.cross_entropy(out, batch[1])


def main(folder):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    found = {"rounds": rounds(rank), "curvature": curvature(rank), "parts": parts(rank)}
    share = DistributedSampler(dataset(), WORLD, rank, shuffle=False)  # Lightning's own would shuffle
    loader = DataLoader(dataset(), BATCH, sampler=share)
    plain = {"loader": loader, "use_distributed_sampler": False, "max_steps": 30, **DDP}
    found["plain"] = trained(smooth, **plain)
    found["smooth"] = trained(smooth, StabilityMonitor(quantities(), every_n_steps=5), **plain)
    found["every step"] = checkpointed(folder, rank, 1, **plain | {"max_steps": 36})
    found["now and then"] = checkpointed(folder, rank, 5, **plain | {"max_steps": 36})
    images = DataLoader(dataset((1, 6, 6), torch.float32), batch_size=BATCH, shuffle=True)
    conv = {"loader": images, "max_steps": 12, **DDP}
    found["conv plain"] = trained(ConvNet, **conv)
    found["conv"] = trained(
        ConvNet, StabilityMonitor(["spectral_norm", "sharpness", "sgd_stability"], budget=1.0, sub_batch=3), **conv
    )
    unused = {"strategy": "ddp_find_unused_parameters_true", "use_distributed_sampler": False}
    found["uneven"] = trained(
        FailsOnce, StabilityMonitor("sharpness", every_n_steps=2),
        loader=uneven(rank), max_steps=10, **DDP | unused,
    )  # fmt: skip
    stop = StopOnInstability()
    found["stopped"] = trained(
        unstable,
        StabilityMonitor(["sharpness"], every_n_steps=1), stop, **plain | {"max_steps": 60},
    )  # fmt: skip
    found["stopped"] |= {"event": stop.event_step, "stop": stop.stop_step}
    for at in (4, 6):  # the loss is NaN in one process, and nothing is measured then
        lost = StopOnInstability()
        found["not finite", at] = trained(
            partial(NaNOnOne, "forward", at), StabilityMonitor(["sharpness"], every_n_steps=100), lost, **plain,
        ) | {"stop": lost.stop_step, "reason": lost.reason}  # fmt: skip
    turns = plain | {"strategy": "ddp_find_unused_parameters_true", "max_steps": 20}
    found["game plain"] = trained(Game, **turns)
    found["game"] = trained(Game, game(), **turns)
    for what in ("forward", "backward"):
        ours = StabilityMonitor("numerics", every_n_steps=3)
        found[f"{what} plain"] = trained(partial(NaNOnOne, what), **plain | {"max_steps": 8})
        found[what] = trained(partial(NaNOnOne, what), ours, **plain | {"max_steps": 8}) | {"fault": ours.fault}
    for penalty in (0.0, 0.1):
        found["told", penalty] = trained(partial(ByHand, penalty), told(), **plain | {"max_steps": 4})
    found["communicates plain"] = trained(Communicates, **plain | {"max_steps": 4})
    found["communicates"] = trained(Communicates, StabilityMonitor(every_n_steps=2), **plain | {"max_steps": 4})
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
