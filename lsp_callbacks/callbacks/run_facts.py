"""What Lightning's trainer says of a run before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lsp_callbacks.callbacks._lightning_internals import has_communication_hook, has_no_optimizer, is_kind_of
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.run_context import Prox, RunContext
from lsp_callbacks.step.shards import Shards, why_refused

#: Strategies whose shards are flat buffers of their own, without names and shapes of parameters, and what to use.
#: DeepSpeed's is also a DDPStrategy by name.
_REFUSED = {
    "FSDPStrategy": (
        "FSDPStrategy (FSDP1) joins parameters into flat buffers, which are views of nothing between two passes: use "
        "ModelParallelStrategy with fully_shard (FSDP2)"
    ),
    "DeepSpeedStrategy": (
        "DeepSpeedStrategy makes the update inside of its engine, from its own copies of gradients and weights: no "
        "step between a gradient and an update can be looked at; use ModelParallelStrategy with fully_shard (FSDP2)"
    ),
}


def overridden(module: Any, *hooks: str) -> str | None:
    """Return the first of these hooks that the module does not have from Lightning, or None."""
    base = next(
        c for c in type(module).__mro__ if c.__module__.endswith("core.module") and c.__name__ == "LightningModule"
    )
    changed = (hook for hook in hooks if hook in vars(module) or getattr(type(module), hook) is not getattr(base, hook))
    return next(changed, None)


def unsupported(trainer: Any, module: Any, *, players: bool = False) -> str | None:
    """Return why the parameters will not move by the optimizer's step on the step's own loss; None if they will.

    What an override of ``optimizer_step`` or ``configure_gradient_clipping`` does is looked at step by step.

    Args:
        trainer: Lightning's.
        module: the user's.
        players: whether each optimizer's own loss is known.
    """
    if trainer.world_size > 1:
        if is_kind_of("ModelParallelStrategy", trainer.strategy):
            # Before its optimizers exist, configure_model was not called.
            if trainer.optimizers and (reason := why_refused(module, trainer.world_size)) is not None:
                return reason
        elif not is_kind_of("DDPStrategy", trainer.strategy):
            name = type(trainer.strategy).__name__
            return f"{name} with {trainer.world_size} processes is not modelled: use strategy='ddp'"
    if has_communication_hook(trainer):
        return "ddp_comm_hook: gradients that are not the plain mean over the processes are not modelled"
    if has_no_optimizer(trainer):
        return (
            "configure_optimizers returns no optimizer: updates that are made elsewhere, as by hooks of the backward "
            "pass, are over before a step is complete; step an optimizer after the backward pass to measure them"
        )
    if not module.automatic_optimization and len(trainer.optimizers) > 1 and not players:
        return (
            "several optimizers take turns, and one loss does not determine their joint update: pass "
            "loss_fn={name: loss, ...}, one for each optimizer; where they step together on one loss, as Muon for the "
            "matrices and AdamW for the rest, let configure_optimizers return one whose step makes both"
        )
    return None


def unknown_loss(trainer: Any, module: Any, loss_fn: Any) -> str | None:
    """Return why the loss of a step is not known as a function of module and batch; None if it is."""
    if module.automatic_optimization or loss_fn is not None:
        return None
    several = len(trainer.optimizers or ()) > 1
    form = "{'generator': lambda module, batch: ..., 'critic': ...}" if several else "lambda module, batch: ..."
    which = ", one for each optimizer, in the order in which configure_optimizers returns them" * several
    return (
        "automatic_optimization=False: the loss of a step is not known from training_step; pass "
        f"StabilityMonitor(loss_fn={form}) which returns it{which}"
    )


def sharded(trainer: Any) -> str | None:
    """Return why shards that the strategy gives to each process cannot be looked at; None if there are none such."""
    return next((reason for name, reason in _REFUSED.items() if is_kind_of(name, trainer.strategy)), None)


def ranks(trainer: Any) -> Ranks:
    """Return the processes that train the model together."""
    return Ranks.joined(trainer.strategy.root_device) if trainer.world_size > 1 else Ranks()


def run_context(
    trainer: Any, module: Any, monitor: Monitor, *, loss_fn: Any = None, prox: Prox | None = None, seed: int = 0
) -> RunContext:
    """Return what all steps of a run share, when training begins.

    Args:
        trainer: Lightning's.
        module: the user's.
        monitor: that measures.
        loss_fn, prox, seed: see `StabilityMonitor`.
    """
    is_game, processes = isinstance(loss_fn, Mapping), ranks(trainer)
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    return RunContext(
        ranks=processes,
        seed=seed,
        prox=prox,
        schedulers=None if is_game else schedulers(trainer, optimizer),
        loss_name=None if is_game or loss_fn is None else "loss_fn",
        captures_inputs=monitor.quantities.captures_inputs,
        unsupported=unsupported(trainer, module, players=is_game),
        updates_elsewhere=has_no_optimizer(trainer),
        unknown_loss=unknown_loss(trainer, module, loss_fn),
        sharded=sharded(trainer),
        shards=Shards.of(module, processes),
    )


def schedulers(trainer: Any, optimizer: torch.optim.Optimizer | None) -> tuple[Any, ...]:
    """Return the schedulers that set the rate of this optimizer."""
    return tuple(c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer)


def clipping(trainer: Any) -> Clipping | None:
    """Return how the trainer clips the gradient after ``on_before_optimizer_step``; None if it does not."""
    limit = trainer.gradient_clip_val
    if not limit or limit < 0:
        return None
    kind = str(trainer.gradient_clip_algorithm or "norm").lower().rsplit(".")[-1]
    return Clipping(float(limit), "value" if kind == "value" else "norm")
