"""From Lightning's hooks to a `Snapshot`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lsp_callbacks.replay import RandomState, Shadow, copied, replayer
from lsp_callbacks.snapshot import Snapshot

LossFn = Callable[[nn.Module, Any], Tensor]


class Pending:
    """A step that will be measured: what must be kept from before its forward pass.

    Args:
        trainer: Lightning's.
        module: the user's LightningModule.
        batch: on the device, as ``training_step`` will receive it.
        batch_idx: its number.
        loss_fn: the user's own ``(module, batch) -> loss``; None replays ``training_step``.
        probe_samples: how many samples of the batch to use; None takes all.
    """

    def __init__(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int, loss_fn: LossFn | None, probe_samples: int | None
    ):
        self.trainer, self.batch_idx, self.loss_fn = trainer, batch_idx, loss_fn
        self.probe_samples = probe_samples
        self.random_state = RandomState()
        self.batch = copied(batch)
        self.module = module
        self.shadow: Shadow | None = None
        self.failure: Exception | None = None
        self.loss: Tensor | None = None
        try:
            self.shadow = Shadow(module, prepare=lambda shadow: _mute(shadow, trainer))
        except Exception as error:  # whatever the user's attributes raise when they are copied
            self.failure = error

    def saw_loss(self, loss: Tensor) -> None:
        """Called before the backward pass, with the loss that is differentiated."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.loss = loss.detach().clone() if scaler is None else loss.detach() / scaler.get_scale()

    def snapshot(self, step: int, optimizer: torch.optim.Optimizer, **settings: Any) -> Snapshot:
        """The step, after its backward pass and before its update."""
        if self.shadow is None:
            module, replay = self.module, self._refuse
        else:
            module, replay = self.shadow.module, replayer(self.shadow, self.random_state, self.batch, self._loss)
        gradient = {name: p.grad for name, p in self.module.named_parameters() if p.requires_grad}
        snapshot = Snapshot(
            step=step, module=module, replay=replay, optimizer=optimizer, loss=self.loss, gradient=gradient, **settings
        )
        return snapshot if self.probe_samples is None else self._sub_batch(snapshot)

    def _loss(self, module: Any, batch: Any) -> Tensor:
        with self.trainer.precision_plugin.train_step_context():
            if self.loss_fn is not None:
                return self.loss_fn(module, batch)
            outputs = module.training_step(*_arguments(module.training_step, batch, self.batch_idx))
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        # Exactly what Lightning's closure does with it.
        return loss / self.trainer.accumulate_grad_batches

    def _refuse(self) -> Tensor:
        raise TypeError(
            f"the module cannot be copied for a replay ({type(self.failure).__name__}: {self.failure}): pass "
            "loss_fn=..., a function of (module, batch), and keep what cannot be copied outside the module"
        )

    def _sub_batch(self, full: Snapshot) -> Snapshot:
        """The same step on the first samples of its batch; the whole batch's replay is checked first."""
        size = _batch_size(self.batch)
        count = self.probe_samples
        assert count is not None and self.shadow is not None
        if size is None or size <= count:
            return full
        sub = tree_map(lambda t: t[:count] if isinstance(t, Tensor) and t.ndim and len(t) == size else t, self.batch)
        replay = replayer(self.shadow, self.random_state, sub, self._loss)
        _ = full.faithful
        names, parameters = zip(*full.parameters.items())
        with torch.enable_grad():
            loss = replay()
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        return Snapshot(
            step=full.step,
            module=full.module,
            replay=replay,
            optimizer=full.optimizer,
            loss=loss.detach(),
            gradient=dict(zip(names, gradient)),
            unmodelled=full.unmodelled,
            keep=full.keep,
            seed=full.seed,
        )


class _Muted:
    """The trainer as the shadow sees it: everything can be read, nothing is logged."""

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


def _mute(shadow: nn.Module, trainer: Any) -> None:
    muted = _Muted(trainer)
    for module in shadow.modules():
        if hasattr(module, "_trainer"):  # LightningModules read the epoch and the step from it
            vars(module)["_trainer"] = muted
            vars(module)["log"] = vars(module)["log_dict"] = _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Instead of ``self.log``."""


def _arguments(training_step: Callable, batch: Any, batch_idx: int) -> list[Any]:
    parameters = inspect.signature(training_step).parameters.values()
    wide = any(p.kind is p.VAR_POSITIONAL for p in parameters) or len(parameters) > 1
    return [batch, batch_idx] if wide else [batch]


def _batch_size(batch: Any) -> int | None:
    sizes: list[int] = []
    tree_map(lambda t: sizes.append(len(t)) if isinstance(t, Tensor) and t.ndim else None, batch)
    return sizes[0] if sizes else None


def unmodelled(trainer: Any, module: Any) -> str | None:
    """Why the parameters will not move by the optimizer's step on the step's own loss; None if they will."""
    base = next(
        c for c in type(module).__mro__ if c.__module__.endswith("core.module") and c.__name__ == "LightningModule"
    )
    if trainer.gradient_clip_val:
        return f"gradient_clip_val={trainer.gradient_clip_val}: the derivative of clipping is not modelled"
    if trainer.accumulate_grad_batches > 1:
        return f"accumulate_grad_batches={trainer.accumulate_grad_batches}: accumulated steps are not modelled"
    if trainer.world_size > 1:
        return f"world_size={trainer.world_size}: products over several processes are not modelled"
    for hook in ("configure_gradient_clipping", "optimizer_step"):
        if getattr(type(module), hook) is not getattr(base, hook):
            return f"{type(module).__name__} overrides {hook}: what it does to the update is not known"
    if not module.automatic_optimization and len(trainer.optimizers) > 1:
        return "several optimizers take turns: their joint update is not modelled"
    return None


def warn_sub_batch(count: int) -> None:
    """Says once that the numbers are not the whole step's."""
    warnings.warn(
        f"probe_samples={count}: sharpness and exponents are those of a sub-batch, not of the step", stacklevel=3
    )
