"""What each of two processes runs for `test_shards`, in parts; what one process alone computes is there."""

import os
import warnings
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from harness import CLASSES, FEATURES, Losses, Model, fit
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy as FabricModelParallel
from model_zoo import TransformerBlock
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler
from two_ranks import BATCH, DDP, WORLD, SmoothBlock, dataset

from lsp_callbacks import Monitor, StabilityMonitor, StopOnInstability
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.errors import Unsupported
from lsp_callbacks.loops import Watch
from lsp_callbacks.loops.fabric import watch_fabric
from lsp_callbacks.quantities import REGISTRY
from lsp_callbacks.step.pending_step import PendingStep

STEPS, WORDS = 16, 7
#: Of the default preset, and the one that needs nothing but forward passes.
NAMES = ("spectral_norm", "residual_cfl", "sharpness", "mean_square_stability", "lyapunov", "courant_step",
         "critical_sharpness")  # fmt: skip
SHARDS_ALONE = ("spectral_norm", "courant_step", "critical_sharpness")
SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9)


def shares(rank, dtype=torch.float64):
    return DataLoader(dataset(dtype=dtype), BATCH, sampler=DistributedSampler(dataset(), WORLD, rank, shuffle=False))


def made(dtype=torch.float64):
    """A network whose layers do not divide evenly by two."""
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), SmoothBlock(), nn.Linear(5, CLASSES)).to(dtype)


def spread(net, mesh, **settings):
    for layer in (net[0], net[2], net[3]):
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(net, mesh=mesh, **settings)


class Sharded(Model):
    """Trains in shards under ModelParallelStrategy, and as it is elsewhere."""

    def __init__(self, optimizer=SGD, net=None, **settings):
        super().__init__(made() if net is None else net, optimizer)
        self.settings = settings

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            spread(self.net, self.device_mesh["data_parallel"], **self.settings)


class AtOnce(Sharded):
    """All weights in the outermost module, which keeps them gathered after the forward pass."""

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"], **self.settings)


class Kinked(Sharded):
    def __init__(self):
        super().__init__()
        self.net[1] = nn.ReLU()


class Tokens(Sharded):
    """A transformer whose samples have several positions, and whose embedding has a row for each of few words."""

    def __init__(self):
        super().__init__(net=TransformerOfTokens())

    def loss(self, batch):
        ids = (batch[0].abs() * 3).long() % WORDS
        return F.cross_entropy(self.net(ids).flatten(0, 1), ids.roll(1, 1).flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net.embedding, self.net.block):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class TransformerOfTokens(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.block = TransformerBlock(nn.GELU(), width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS, bias=False)
        self.double()

    def forward(self, ids):
        return self.head(self.norm(self.block(self.embedding(ids))))


class FailsOnce(Sharded):
    """Fails on the last process in the replays of step 4: in the middle of a pass, when others wait for its weights."""

    def __init__(self, place):
        super().__init__()
        self.place, self.calls = place, 0

    def training_step(self, batch, batch_idx):
        is_last = self.global_rank == self.trainer.world_size - 1
        is_replay = type(self.trainer).__name__ == "MutedTrainer"
        fails = is_last and is_replay and self.trainer.global_step == 4
        if fails and self.place == "before":
            raise RuntimeError("out of memory")
        hidden = self.net[1](self.net[0](batch[0]))
        if fails and self.place == "forward":
            raise RuntimeError("out of memory")
        if fails and self.place == "backward":
            hidden.register_hook(_raise)
        return F.cross_entropy(self.net[3](self.net[2](hidden)), batch[1])


def _raise(gradient):
    raise RuntimeError("out of memory")


class Remembers(Sharded):
    """With batch statistics, dropout, a counter, and hooks of the user's."""

    def __init__(self):
        net = nn.Sequential(
            nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, CLASSES)
        ).double()
        super().__init__(net=net)
        self.seen, self.calls = [], 0
        self.net[4].register_forward_hook(self.count)

    def count(self, *args):
        self.calls += 1

    def training_step(self, batch, batch_idx):
        self.seen.append(float(batch[0].sum()))
        return super().training_step(batch, batch_idx)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[4], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def memory(self):
        return self.seen, self.calls


class Checkpointed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


class Recomputes(Sharded):
    def __init__(self):
        net = made()
        net[2] = Checkpointed(net[2])
        super().__init__(net=net)


class TensorParallel(Sharded):
    """Columns of the first layer and rows of the last one on each process."""

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


class BothWays(TensorParallel):
    """Tensor parallel, and each part of the weights in shards."""

    def configure_model(self):
        super().configure_model()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def wide():
    """Without what stands between columns and rows."""
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


ADAM = partial(Sharded, partial(torch.optim.AdamW, lr=0.05))


def wide_parallel():
    return TensorParallel(net=wide())


def plain_strategy(**sizes):
    sizes = {"data_parallel_size": WORLD, "tensor_parallel_size": 1} | sizes
    return {"strategy": ModelParallelStrategy(process_group_backend="gloo", **sizes), "devices": WORLD}


def trained(make, *callbacks, loader, max_steps=STEPS, **settings):
    """What a run leaves behind, and what it said."""
    losses = Losses()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(
            make, losses, *callbacks, loader=loader, max_steps=max_steps, use_distributed_sampler=False, **settings
        )
    model = run.lightning_module
    monitor = next((c for c in callbacks if isinstance(c, StabilityMonitor)), None)
    return {
        "weights": {key: whole(v) for key, v in model.state_dict().items()},
        "momentum": [whole(t) for s in run.optimizers[0].state.values() for t in s.values() if torch.is_tensor(t)],
        "losses": losses.losses, "random": torch.get_rng_state(), "memory": model.memory(), "steps": run.global_step,
        "history": monitor and {key: (c.steps, c.values) for key, c in monitor.history.items()},
        "skipped": {} if monitor is None else dict(monitor.skipped), "paths": monitor and dict(monitor.paths),
        "said": [str(w.message) for w in caught if "lsp_callbacks" in str(w.message)],
        "stops": [(c.stop_step, c.event_step) for c in callbacks if isinstance(c, StopOnInstability)],
    }  # fmt: skip


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def pair(make, monitor, *others, plain, **settings):
    """A run without ours, and one with."""
    return trained(make, **plain, **plain_strategy(**settings)), trained(
        make, monitor, *others, **plain, **plain_strategy(**settings)
    )


def looped(rank, *, fabric=None, measured=True):
    """A loop of one's own, plain or of Fabric, and what it leaves behind."""
    torch.manual_seed(0)
    net = made()
    if fabric is None:
        module = spread(net, init_device_mesh("cpu", (WORLD,)))
        sgd = SGD(module.parameters())
    else:
        module = fabric.setup_module(net)
        sgd = fabric.setup_optimizers(SGD(module.parameters()))
    monitor = Monitor(*(REGISTRY[name]() for name in NAMES), every_n_steps=3)

    def loss_fn(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    watch = None
    if measured and fabric is None:
        watch = Watch(module, sgd, loss_fn, monitor)
    elif measured:
        watch = watch_fabric(fabric, module, sgd, loss_fn, monitor)
    loader, losses = shares(rank), []
    for _ in range(2):
        for batch in loader if watch is None else watch(loader):
            sgd.zero_grad()
            loss = loss_fn(module, batch)
            losses.append(loss.item())
            loss.backward() if fabric is None else fabric.backward(loss)
            sgd.step()
    if watch is not None:
        watch.close()
    return {
        "weights": {key: whole(v) for key, v in module.state_dict().items()}, "losses": losses,
        "history": {key: (c.steps, c.values) for key, c in monitor.history.items()}, "skipped": dict(monitor.skipped),
    }  # fmt: skip


def failing(place, plain):
    ours = StabilityMonitor([*SHARDS_ALONE, "sharpness", "mean_square_stability"], every_n_steps=2)
    return trained(partial(FailsOnce, place), ours, **plain | {"max_steps": 8}, **plain_strategy())


def core(rank):
    plain, found = {"loader": shares(rank)}, {}
    found["plain"], found["sharded"] = pair(Sharded, StabilityMonitor(NAMES, every_n_steps=3), plain=plain)
    found["ddp"] = trained(Sharded, StabilityMonitor(NAMES, every_n_steps=3), **plain, **DDP)
    found["no room"] = without_room(Sharded, ["mean_square_stability", "sharpness", "lyapunov"], plain)
    found["AdamW no room"] = without_room(ADAM, ["sharpness", "lyapunov"], plain | {"max_steps": 8})
    found["forward"] = failing("forward", plain)
    everything = {"loader": DataLoader(dataset(), 2 * BATCH), "max_steps": 8}
    found["tensor parallel"] = without_room(
        wide_parallel, ["sharpness", "lyapunov"], everything, data_parallel_size=1, tensor_parallel_size=WORLD
    )
    return found


def without_room(make, names, plain, every=3, **sizes):
    """A run in which the whole weights do not fit."""
    with mock.patch.object(PendingStep, "whole", side_effect=Unsupported("no room")):
        return trained(make, StabilityMonitor(names, every_n_steps=every), **plain, **plain_strategy(**sizes))


class Collectives(Callback):
    """How many collectives there were in each step."""

    def __init__(self):
        self.counts = []

    def on_train_batch_start(self, *args):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.__enter__()

    def on_train_batch_end(self, *args):
        self.profile.__exit__(None, None, None)
        self.counts.append(sum(event.name.startswith("c10d::") for event in self.profile.events()))


def counted(*callbacks, plain):
    counter = Collectives()
    trained(Sharded, *callbacks, counter, **plain, **plain_strategy())
    return counter.counts


def unstable():
    return Sharded(partial(torch.optim.SGD, lr=40.0))


def more(rank):
    plain, found = {"loader": shares(rank)}, {}
    found["plain"], found["default"] = pair(Sharded, StabilityMonitor(), StopOnInstability(), plain=plain)
    found["healthy"] = trained(partial(FailsOnce, "never"), **plain | {"max_steps": 8}, **plain_strategy())
    for place in ("before", "forward", "backward"):
        found[place] = failing(place, plain)
    never = without_room(partial(FailsOnce, "backward"), ["sharpness", "lyapunov"], plain | {"max_steps": 8}, every=2)
    found["backward without room"] = never
    found["plain state"], found["state"] = pair(
        Remembers, StabilityMonitor(SHARDS_ALONE, every_n_steps=2), plain=plain | {"max_steps": 8}
    )
    found["plain loop"], found["loop"] = looped(rank, measured=False), looped(rank)
    for name, ours in (
        ("stopped", StabilityMonitor()),
        ("stopped by sharpness", StabilityMonitor(["sharpness"], every_n_steps=1)),
    ):
        found[name] = trained(unstable, ours, StopOnInstability(), **plain | {"max_steps": 90}, **plain_strategy())
    found["collectives"] = counted(plain=plain), counted(StabilityMonitor(NAMES, every_n_steps=8), plain=plain)
    return found


class OnMesh(Sharded):
    """With a mesh of its own, and settings of ``fully_shard``."""

    def __init__(self, mesh, **settings):
        super().__init__(**settings)
        self.sizes = mesh

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            names = ("replicate", "shard")[-len(self.sizes) :]
            spread(self.net, init_device_mesh("cpu", self.sizes, mesh_dim_names=names), **self.settings)


def parallel(net, mesh):
    for layer in (net[0], net[2], net[3]):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(net, mesh=mesh["data_parallel"])


def modes(rank):
    plain, found = {"loader": shares(rank), "max_steps": 8}, {}

    def both(name, make, names=NAMES, settings=None, **sizes):
        ours = StabilityMonitor(list(names), every_n_steps=3)
        found[f"{name} plain"], found[name] = pair(make, ours, plain=plain | (settings or {}), **sizes)

    both("AdamW", ADAM)
    found["AdamW ddp"] = trained(ADAM, StabilityMonitor(list(NAMES), every_n_steps=3), **plain, **DDP)
    both("clipped", Sharded, settings={"gradient_clip_val": 0.05})
    both("accumulated", Sharded, settings={"accumulate_grad_batches": 2})
    both("HSDP", partial(OnMesh, (WORLD, 1)))
    both("HSDP one replica", partial(OnMesh, (1, WORLD)))
    both("not resharded", partial(Sharded, reshard_after_forward=False))
    both("checkpointed", Recomputes)
    both("at once", AtOnce)
    both("tokens", Tokens, [name for name in NAMES if name != "residual_cfl"])
    offloaded = partial(Sharded, offload_policy=CPUOffloadPolicy(pin_memory=False))
    both("offloaded", offloaded)
    both("kinked", Kinked, ["sharpness", "lyapunov"])
    clipped = plain | {"gradient_clip_val": 0.05}
    for name, make, settings in (
        ("AdamW", ADAM, plain), ("clipped", Sharded, clipped), ("kinked", Kinked, plain),
        ("checkpointed", Recomputes, plain), ("HSDP", partial(OnMesh, (WORLD, 1)), plain),
        ("offloaded", offloaded, plain),
    ):  # fmt: skip
        found[f"{name} without room"] = without_room(make, ["sharpness", "lyapunov"], settings)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    found["mixed without room"] = without_room(
        lambda: Sharded(net=made(torch.float32), mp_policy=policy), ["sharpness", "lyapunov"],
        plain | {"loader": shares(rank, dtype=torch.float32)})  # fmt: skip
    both("mixed", lambda: Sharded(net=made(torch.float32), mp_policy=policy),
         settings={"loader": shares(rank, dtype=torch.float32)})  # fmt: skip
    everything = {"loader": DataLoader(dataset(), 2 * BATCH), "max_steps": 8}
    names = [name for name in NAMES if name != "residual_cfl"]  # there is no block
    both("tensor parallel", wide_parallel, names, everything,
         data_parallel_size=1, tensor_parallel_size=WORLD)  # fmt: skip
    found["tensor parallel without room"] = without_room(
        wide_parallel, ["sharpness", "lyapunov"], everything, data_parallel_size=1, tensor_parallel_size=WORLD
    )
    for name, sizes, loader in (("two by one", (WORLD, 1), {}), ("one by two", (1, WORLD), everything)):
        both(name, lambda: BothWays(net=wide()), names, loader, data_parallel_size=sizes[0],
             tensor_parallel_size=sizes[1])  # fmt: skip
        found[f"{name} without room"] = without_room(
            lambda: BothWays(net=wide()), ["sharpness", "lyapunov"], plain | loader, data_parallel_size=sizes[0],
            tensor_parallel_size=sizes[1])  # fmt: skip
    fabric = Fabric(
        accelerator="cpu", devices=WORLD,
        strategy=FabricModelParallel(parallel, data_parallel_size=WORLD, tensor_parallel_size=1),
    )  # fmt: skip
    fabric.launch()
    found["fabric plain"], found["fabric"] = looped(rank, fabric=fabric, measured=False), looped(rank, fabric=fabric)
    return found


def main(folder, part):
    rank = int(os.environ["LOCAL_RANK"])
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.save(PARTS[part](rank), os.path.join(folder, f"{rank}.pt"))


PARTS = {"core": core, "more": more, "modes": modes}
