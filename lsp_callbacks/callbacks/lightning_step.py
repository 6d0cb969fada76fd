"""From Lightning's hooks to a `PendingStep`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import overflowed, unscales_gradients
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.criterion import HOW
from lsp_callbacks.step.pending_step import LossFn, PendingStep
from lsp_callbacks.step.probe_set import ProbeSet
from lsp_callbacks.step.probes import Probes
from lsp_callbacks.step.ranks import Ranks
from lsp_callbacks.step.run_context import RunContext


def pending_step(
    trainer: Any,
    module: Any,
    *,
    own_loss: bool = False,
    sub_batch: int | None = None,
    run: RunContext | None = None,
) -> PendingStep:
    """A step of Lightning's that will be measured; made in ``on_train_batch_start`` of its first micro-batch.

    Args:
        trainer: Lightning's.
        module: the user's LightningModule.
        own_loss: whether a function of the user's own computes the loss; otherwise ``training_step`` is replayed.
        sub_batch: how many samples of the batch to use; None takes all.
        run: what all steps of the run share; None is a run of this process alone.
    """
    muted = _Muted(trainer)
    return PendingStep(
        module,
        shared=[muted] if trainer.datamodule is None else [muted, trainer.datamodule],
        prepare=lambda module_copy: _mute(module_copy, muted),
        # The user's own function rounds in other places than the step.
        tolerance=1e-4 if own_loss else 0.0,
        sub_batch=sub_batch,
        run=run,
        takes_buffers=getattr(trainer.strategy.model, "will_sync_module_buffers", bool)(),
    )


def step_loss(
    trainer: Any, loss_fn: LossFn | None, batch_idx: int, accumulate: int | None = None
) -> Callable[[nn.Module, Any], Tensor | None]:
    """``(module, batch) -> loss`` of one micro-batch, as Lightning differentiates it.

    Args:
        trainer: Lightning's.
        loss_fn: the user's own; None replays ``training_step``.
        batch_idx: of the micro-batch.
        accumulate: by which the loss is divided; None is the trainer's.
    """

    def loss(module: Any, batch: Any) -> Tensor | None:
        with trainer.precision_plugin.train_step_context():
            if loss_fn is not None:
                outputs: Any = loss_fn(module, batch)
            else:
                outputs = module.training_step(*arguments(module.training_step, batch, batch_idx))
        value = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        # Exactly what Lightning's closure does with it.
        return None if value is None else value / (accumulate or trainer.accumulate_grad_batches)

    return loss


def unscaled(trainer: Any, loss: Tensor) -> Tensor:
    """The loss that ``on_before_backward`` is given, without the factor of mixed precision."""
    scale = loss_scale(trainer)
    return loss if scale == 1.0 else loss.detach() / scale


def loss_scale(trainer: Any) -> float:
    """The factor of mixed precision on the loss, and on its gradient in the backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def scaled(trainer: Any, optimizer: Any) -> bool:
    """Whether the gradients are still multiplied by the factor of mixed precision: fused optimizers divide it out."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and unscales_gradients(optimizer)


def skipped(trainer: Any, optimizer: Any) -> bool:
    """Whether the gradient scaler of mixed precision will leave this step out, as its gradients have overflowed."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and overflowed(scaler, optimizer)


def probe_set(trainer: Any, probes: Probes, pending: PendingStep, accumulate: int | None = None) -> ProbeSet:
    """The probes at a step, with their outputs from ``training_step`` where the user has not named them."""

    def loss(module: Any, batch: Any) -> Any:
        if not getattr(module, "automatic_optimization", True):  # it would step the optimizer
            raise Unsupported(f"automatic_optimization=False: training_step cannot be asked for outputs; {HOW}")
        return module.training_step(*arguments(module.training_step, batch, 0))

    context = trainer.precision_plugin.train_step_context
    return probes.probe_set(pending, loss, context=context, micro_batches=accumulate or trainer.accumulate_grad_batches)


class _Muted:
    """The trainer as the copy sees it: everything can be read, nothing is logged."""

    logger: Any
    loggers: tuple[Any, ...] = ()

    def __init__(self, trainer: Any):
        self._real = trainer
        self.logger = _Silence() if trainer.logger is not None else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __deepcopy__(self, memo: dict) -> _Muted:
        return self


class _Silence:
    """Takes any call on any attribute, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __deepcopy__(self, memo: dict) -> _Silence:
        return self


def _mute(module_copy: nn.Module, muted: _Muted) -> None:
    for module in module_copy.modules():
        if hasattr(module, "_trainer"):  # LightningModules read the epoch and the step from it
            vars(module)["_trainer"] = muted
            vars(module)["log"] = vars(module)["log_dict"] = vars(module)["print"] = _nothing
            vars(module).pop("_hparams_initial", None)  # never changed, and as large as what it was made from
            for name in vars(module).pop("_compiler_ctx", None) or ():
                # Compiled methods are bound to the original.
                vars(module).pop(name.removeprefix("original_"), None)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Instead of ``self.log`` and ``self.print``."""


def arguments(training_step: Callable, batch: Any, batch_idx: int) -> list[Any]:
    """What this ``training_step`` takes."""
    names = inspect.signature(training_step).parameters
    if "dataloader_iter" in names:
        raise Unmeasurable("training_step(dataloader_iter) fetches a batch of its own, which cannot be replayed")
    parameters = names.values()
    wide = any(p.kind is p.VAR_POSITIONAL for p in parameters) or len(parameters) > 1
    return [batch, batch_idx] if wide else [batch]


def overridden(module: Any, *hooks: str) -> str | None:
    """The first of these hooks that the module does not have from Lightning."""
    base = next(
        c for c in type(module).__mro__ if c.__module__.endswith("core.module") and c.__name__ == "LightningModule"
    )
    changed = (hook for hook in hooks if hook in vars(module) or getattr(type(module), hook) is not getattr(base, hook))
    return next(changed, None)


def unsupported(trainer: Any, module: Any, *, players: bool = False) -> str | None:
    """Why the parameters will not move by the optimizer's step on the step's own loss; None if they will.

    What an override of ``optimizer_step`` or ``configure_gradient_clipping`` does is looked at step by step.

    Args:
        trainer: Lightning's.
        module: the user's.
        players: whether each optimizer's own loss is known.
    """
    if trainer.world_size > 1 and not _is("DDPStrategy", trainer.strategy):
        return (
            f"{type(trainer.strategy).__name__} with {trainer.world_size} processes is not modelled: use strategy='ddp'"
        )
    if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
        return "ddp_comm_hook: gradients that are not the plain mean over the processes are not modelled"
    if not module.automatic_optimization and len(trainer.optimizers) > 1 and not players:
        return (
            "several optimizers take turns, and one loss does not tell their joint update: pass loss_fn={name: loss, "
            "...}, one for each optimizer"
        )
    return None


#: Strategies that leave each process a shard of the parameters. DeepSpeed's is also a DDPStrategy by name.
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def sharded(trainer: Any) -> str | None:
    """Why no process has the parameters as a whole; None if each has."""
    name = next((name for name in _SHARDED if _is(name, trainer.strategy)), None)
    if name is None:
        return None
    return (
        f"{name} gives each process a shard of the parameters: a replay of the step and the products of its Hessian "
        "would have to gather them out of step with training. Use strategy='ddp', or measure a smaller model"
    )


def _is(name: str, strategy: Any) -> bool:
    # By name, as both packages have one, and neither needs to be installed.
    return any(c.__name__ == name for c in type(strategy).__mro__)


def ranks(trainer: Any) -> Ranks:
    """The processes that train the model together."""
    return Ranks.joined(trainer.strategy.root_device) if trainer.world_size > 1 else Ranks()


def schedulers(trainer: Any, optimizer: Any) -> tuple[Any, ...]:
    """Those that move the rate of this optimizer."""
    return tuple(c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer)


def clipping(trainer: Any) -> Clipping | None:
    """How the trainer clips the gradient after ``on_before_optimizer_step``; None if it does not."""
    limit = trainer.gradient_clip_val
    if not limit or limit < 0:
        return None
    kind = str(trainer.gradient_clip_algorithm or "norm").lower().rsplit(".")[-1]
    return Clipping(float(limit), "value" if kind == "value" else "norm")


def clipped(trainer: Any, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Parameters and the gradients that they will have after the step's clipping, to the last bit, by torch's own code.

    Parameters that the optimizer does not hold keep theirs.
    """
    module = trainer.lightning_module
    found = [(p, p.grad.clone()) for p in module.parameters() if p.grad is not None]
    rule, gradients = clipping(trainer), {id(p): g for p, g in found}
    if rule is not None:
        stand_ins = []
        for p in trainer.precision_plugin.main_params(optimizer):
            if id(p) in gradients:
                stand_ins.append(p.detach())
                stand_ins[-1].grad = gradients[id(p)]
        clip = nn.utils.clip_grad_norm_ if rule.kind == "norm" else nn.utils.clip_grad_value_
        clip(stand_ins, rule.limit)
    return found


def warn_sub_batch(count: int) -> None:
    """Says once that the numbers are not the whole step's."""
    warnings.warn(f"sub_batch={count}: sharpness and exponents are those of a sub-batch, not of the step", stacklevel=2)
