"""Lightning's training loop as a `StepObserver` sees it, and its trainer as the copies that replay steps see it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import overflowed, unscales_gradients
from lsp_callbacks.callbacks._lightning_internals import (
    has_backward,
    is_lightning_module,
    on_device,
    replace_trainer,
)
from lsp_callbacks.callbacks.custom_clipping import custom_clipping
from lsp_callbacks.callbacks.run_facts import clipping, overridden, run_context
from lsp_callbacks.errors import Unmeasurable, Unsupported
from lsp_callbacks.monitor.gradient_check import Gradients
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.training_loop import TrainingLoop
from lsp_callbacks.monitor.update_check import ELSEWHERE, MOVED
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.criterion import HOW
from lsp_callbacks.step.fingerprint import fingerprint, identical
from lsp_callbacks.step.graph_reader import GraphReader
from lsp_callbacks.step.pending_step import LossFn, PendingStep
from lsp_callbacks.step.run_context import Prox
from lsp_callbacks.step.step_loss import loss_of

#: A ``training_step`` that takes it takes the batches themselves from the loader.
FETCHED = "dataloader_iter"
#: Of an update that Lightning does not see.
UNSEEN = (
    "training_step moves the parameters without a step that Lightning sees (first_step and second_step of a SAM, or an "
    "optimizer that configure_optimizers does not return): a batch is taken for a step, and its update is over before "
    "it can be looked at; call step() of self.optimizers() to measure more"
)
_FETCHES = f"training_step({FETCHED}) fetches a batch of its own, which cannot be replayed"


class LightningLoop(TrainingLoop):
    """A run of Lightning's `Trainer`.

    Args:
        trainer: Lightning's, when training begins.
        module: the user's LightningModule.
        monitor: that measures.
        loss_fn: the user's function or functions of the loss; None replays ``training_step``.
        accumulate: under manual optimisation, by which each loss is divided; None is the trainer's number.
        prox, sub_batch, seed: see `StabilityMonitor`.

    Attributes:
        is_automatic: whether Lightning calls the optimizer, and not the user's ``training_step``.
        scaler: the gradient scaler of mixed precision; None without one, or where it is disabled.
    """

    shows_losses = True

    def __init__(
        self,
        trainer: Any,
        module: Any,
        monitor: Monitor,
        *,
        loss_fn: Any = None,
        accumulate: int | None = None,
        prox: Prox | None = None,
        sub_batch: int | None = None,
        seed: int = 0,
    ):
        run = run_context(trainer, module, monitor, loss_fn=loss_fn, prox=prox, seed=seed)
        super().__init__(module, run)
        self.trainer, self._loss_fn = trainer, None if isinstance(loss_fn, Mapping) else loss_fn
        self._replays_training_step = loss_fn is None
        # The user's own function rounds in other places than the step.
        self._tolerance = 0.0 if loss_fn is None else 1e-4
        self._sub_batch, self._accumulate = sub_batch, accumulate
        self.is_automatic = self.repeats_forward = bool(module.automatic_optimization)
        is_unsure = not (self.is_automatic or run.updates_elsewhere)
        self._first_weights = fingerprint(self._optimized()) if is_unsure else None
        self.overrides_step = overridden(module, "optimizer_step") is not None
        self._clipping_hook = overridden(module, "configure_gradient_clipping")
        self.moves_parameters |= self.overrides_step
        self.wrong_update = ELSEWHERE if run.prox is not None else f"{type(module).__name__}.optimizer_step {MOVED}"
        self._clipped: Gradients = {}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None  # without a GPU it may be disabled

    @property
    def accumulate(self) -> int:  # type: ignore[override]
        """The number of micro-batches in a step; a callback may change it from epoch to epoch."""
        return self._accumulate or self.trainer.accumulate_grad_batches

    @property
    def clipping(self) -> Clipping | None:
        """How the trainer clips."""
        return clipping(self.trainer) if self.trainer.gradient_clip_val else None

    def _optimized(self) -> list[Tensor]:
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def has_unseen_update(self, *, seen: bool) -> bool:
        """Return True once if a batch moves the parameters before any optimizer step was seen: a batch is a step then.

        Args:
            seen: whether the batch has made a step that was seen; then nothing is looked for any more.
        """
        before = self._first_weights
        if before is None or (not seen and identical(before, fingerprint(self._optimized()))):
            return False
        self._first_weights = None
        if not seen:
            self.run = replace(self.run, unsupported=self.run.unsupported or UNSEEN, updates_elsewhere=True)
        return not seen

    def has_backward(self) -> bool:
        return has_backward(self.trainer)

    @property
    def can_do_without_replay(self) -> bool:  # type: ignore[override]
        """Whether nothing that the user's code does to gradients has to be tried on a copy."""
        return self._clipping_hook is None and self._sub_batch is None

    def new_step(
        self, *, is_shared: bool = True, readers: Mapping[str, GraphReader] | None = None, can_replay: bool = True
    ) -> PendingStep:
        trainer, self._clipped = self.trainer, {}
        if not can_replay:
            return PendingStep(
                self.module, tolerance=self._tolerance, run=self.run, readers=readers, can_replay=False,
                micro_batches=self.accumulate,
            )  # fmt: skip
        muted = MutedTrainer(trainer)  # which keeps the number of the step
        step = PendingStep(
            self.module,
            shared=[muted] if trainer.datamodule is None else [muted, trainer.datamodule],
            prepare=lambda module_copy: mute(module_copy, muted),
            tolerance=self._tolerance,
            sub_batch=self._sub_batch,
            run=self.run if is_shared else None,
            readers=readers,
            micro_batches=self.accumulate,
            keeps_weights=self.run.updates_elsewhere,
            takes_buffers=getattr(trainer.strategy.model, "will_sync_module_buffers", bool)(),
        )
        if self._replays_training_step and FETCHED in self._takes:
            step.failure = Unmeasurable(_FETCHES)
        return step

    def loss(self, batch_idx: int, player_loss: LossFn | None, module: Any, batch: Any) -> Tensor | None:
        """Return the loss of one micro-batch, as Lightning differentiates it.

        Args:
            batch_idx: of the micro-batch.
            player_loss: of several optimizers that take turns, the user's function for one of them; None otherwise.
            module: or a copy of it.
            batch: on the device.
        """
        loss_fn, accumulate = player_loss or self._loss_fn, self.accumulate
        with self.trainer.precision_plugin.train_step_context():
            if loss_fn is not None:
                outputs: Any = loss_fn(module, batch)
            else:
                outputs = module.training_step(*self._arguments(batch, batch_idx))
        value = loss_of(outputs)
        # Exactly what Lightning's closure does with it.
        return None if value is None else value / accumulate

    def on_device(self, batch: Any) -> Any:
        return on_device(self.trainer, batch)

    def clipping_of(self, pending: PendingStep, optimizer: torch.optim.Optimizer) -> Clipping | None:
        hook = self._clipping_hook
        if hook is None or pending.module_copy is None or not self.repeats_forward:
            return self.clipping
        ranks, reset = self.run.ranks, pending.module_copy.reset
        try:
            rule, self._clipped = ranks.together(ranks.private(lambda: custom_clipping(self.trainer, reset, optimizer)))
        except Unmeasurable:
            raise
        except Exception as error:  # whatever the user's method raises on a copy
            raise Unmeasurable(f"{hook}: {type(error).__name__}: {error}") from error
        return rule

    def clipped_gradients(self, optimizer: torch.optim.Optimizer) -> Gradients:
        """Return the gradients that the optimizer will be given, to the last bit, by torch's own code.

        Of parameters that it does not hold nothing is said.
        """
        clipped, self._clipped = self._clipped, {}
        if clipped:
            return clipped
        held = [p for group in optimizer.param_groups for p in group["params"]]
        rule, gradients = self.clipping, {p: p.grad for p in held if p.grad is not None}
        if rule is not None:
            gradients = {p: gradient.clone() for p, gradient in gradients.items()}
            stand_ins = []
            for p in self.trainer.precision_plugin.main_params(optimizer):
                if p in gradients:
                    stand_ins.append(p.detach())
                    stand_ins[-1].grad = gradients[p]
            clip = nn.utils.clip_grad_norm_ if rule.kind == "norm" else nn.utils.clip_grad_value_
            clip(stand_ins, rule.limit)
        return gradients

    def evaluated(self) -> tuple[Callable[[Any, Any], Any], Callable[[], contextlib.AbstractContextManager]]:
        """Return ``loss_fn`` or ``training_step``, from which outputs are taken where the user has not named them."""

        def loss(module: Any, batch: Any) -> Any:
            if self._loss_fn is not None:
                return self._loss_fn(module, batch)
            if not getattr(module, "automatic_optimization", True):  # it would step the optimizer
                raise Unsupported(f"automatic_optimization=False: training_step cannot be asked for outputs; {HOW}")
            return module.training_step(*self._arguments(batch, 0))

        return loss, self.trainer.precision_plugin.train_step_context

    def loss_scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def scales(self, optimizer: torch.optim.Optimizer) -> tuple[float, Any]:
        return self.loss_scale(), None  # Lightning has divided by it

    def is_gradient_scaled(self, optimizer: torch.optim.Optimizer) -> bool:
        return self.scaler is not None and unscales_gradients(optimizer)

    def is_overflowed(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return True if the scaler will leave this step out, as its gradients have overflowed."""
        return self.scaler is not None and overflowed(self.scaler, optimizer)

    @cached_property
    def _takes(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of ``training_step``, by name."""
        training_step: Any = self.module.training_step
        return inspect.signature(training_step).parameters

    def _arguments(self, batch: Any, batch_idx: int) -> list[Any]:
        """Return what ``training_step`` takes."""
        takes = self._takes
        if FETCHED in takes:
            raise Unmeasurable(_FETCHES)
        takes_any = any(p.kind is p.VAR_POSITIONAL for p in takes.values())
        return [batch, batch_idx] if takes_any or len(takes) > 1 else [batch]


def mute(module_copy: nn.Module, trainer: MutedTrainer) -> None:
    """Let the LightningModules of a copy read the real trainer, and log and print nothing."""
    for module in module_copy.modules():
        if is_lightning_module(module):
            replace_trainer(module, trainer)
            vars(module)["log"] = vars(module)["log_dict"] = vars(module)["print"] = _do_nothing


class MutedTrainer:
    """The trainer as a copy of the module sees it: everything can be read, nothing is logged.

    Attributes:
        global_step: of the step that is replayed, also after its update.
    """

    logger: Any
    loggers: tuple[Any, ...] = ()

    def __init__(self, trainer: Any):
        self._trainer, self.global_step = trainer, trainer.global_step
        self.logger = _Silence() if trainer.logger is not None else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def __deepcopy__(self, memo: dict) -> MutedTrainer:
        return self


class _Silence:
    """An object that takes any call on any attribute, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __deepcopy__(self, memo: dict) -> _Silence:
        return self


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replace ``self.log`` and ``self.print``."""
