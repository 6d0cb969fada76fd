"""From Lightning's hooks to a `Snapshot`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lsp_callbacks.replay import RandomState, Shadow, copied, replayer
from lsp_callbacks.snapshot import Snapshot, Unmeasurable

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
        self.trainer, self.module, self.batch_idx, self.loss_fn = trainer, module, batch_idx, loss_fn
        self.probe_samples = probe_samples
        self.random_state = RandomState()
        self.shadow: Shadow | None = None
        self.failure: Exception | None = None
        self.loss: Tensor | None = None
        try:
            self.batch = copied(batch)
            self.sums = _sums(module)
            shared = [] if trainer.datamodule is None else [trainer.datamodule]
            self.shadow = Shadow(module, shared=shared, prepare=lambda shadow: _mute(shadow, trainer))
        except Exception as error:  # whatever the user's attributes raise when they are copied
            self.failure = Unmeasurable(
                f"batch or module cannot be copied for a replay ({type(error).__name__}: {error}): keep what cannot be "
                "copied outside the module"
            )

    def saw_loss(self, loss: Tensor) -> None:
        """Called before the backward pass, with the loss that is differentiated."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.loss = loss.detach().clone() if scaler is None else loss.detach() / scaler.get_scale()

    def snapshot(self, step: int, optimizer: torch.optim.Optimizer, **settings: Any) -> Snapshot:
        """The step, after its backward pass and before its update."""
        failure = self.failure or self._moved()
        if failure or self.shadow is None:
            module, replay = self.module, _raising(failure)
        else:
            module, replay = self.shadow.module, replayer(self.shadow, self.random_state, self.batch, self._loss)
        snapshot = Snapshot(
            step=step,
            module=module,
            replay=replay,
            optimizer=optimizer,
            loss=self.loss,
            gradient={name: p.grad for name, p in self.module.named_parameters() if p.requires_grad},
            # Compiled code and the user's own function round in other places than the step.
            tolerance=1e-4 if self.loss_fn is not None or _compiled(self.module) else 0.0,
            **settings,
        )
        if self.probe_samples is None:
            return snapshot
        try:
            return self._sub_batch(snapshot, self.probe_samples)
        except Exception as error:
            return replace(snapshot, replay=_raising(error))

    def _loss(self, module: Any, batch: Any) -> Tensor:
        with self.trainer.precision_plugin.train_step_context():
            if self.loss_fn is not None:
                return self.loss_fn(module, batch)
            outputs = module.training_step(*arguments(module.training_step, batch, self.batch_idx))
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        # Exactly what Lightning's closure does with it.
        return loss / self.trainer.accumulate_grad_batches

    def _moved(self) -> Exception | None:
        """The step itself must leave the parameters alone: a replay, which shares them, would move them again."""
        if self.failure is None and not all(map(identical, self.sums, _sums(self.module))):
            return Unmeasurable(
                "the step changes parameters before its update (a moving average or a clamp in training_step), and a "
                "replay would do so again: do it in on_train_batch_end, or pass loss_fn=..."
            )
        return None

    def _sub_batch(self, full: Snapshot, count: int) -> Snapshot:
        """The same step on the first samples of its batch; the whole batch's replay is checked first."""
        _ = full.faithful
        size = batch_size(self.batch)
        if size is None or size <= count or self.shadow is None:
            return full
        sub = apply_to_collection(self.batch, Tensor, lambda t: t[:count] if t.ndim and len(t) == size else t)
        replay = replayer(self.shadow, self.random_state, sub, self._loss)
        names, parameters = zip(*full.parameters.items())
        with torch.enable_grad():
            loss = replay()
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        return replace(full, replay=replay, loss=loss.detach(), gradient=dict(zip(names, gradient)), memo={})


def _raising(error: Exception | None) -> Callable[[], Tensor]:
    def replay() -> Tensor:
        raise error or AssertionError

    return replay


def _sums(module: nn.Module) -> list[Tensor]:
    """A fingerprint of the parameters: in-place changes through ``.data`` leave no other mark."""
    return [p.detach().sum(dtype=torch.float32) for p in module.parameters()]


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _compiled(module: nn.Module) -> bool:
    # Copies are not compiled: their attributes do not tell.
    return any(
        m._compiled_call_impl is not None or hasattr(m, "_orig_mod") or getattr(m, "_compiler_ctx", None)
        for m in module.modules()
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


def batch_size(batch: Any) -> int | None:
    """The first axis of the first tensor that has one, in lists, mappings and dataclasses.

    Lightning's rule (``extract_batch_size``) but for tensors without an axis, which it takes for batches of one.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if is_dataclass(batch):
        parts = [getattr(batch, field.name) for field in fields(batch)]
    elif isinstance(batch, Mapping):
        parts = list(batch.values())
    else:
        parts = list(batch) if isinstance(batch, list | tuple) else []
    return next((size for size in map(batch_size, parts) if size is not None), None)


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
        f"probe_samples={count}: sharpness and exponents are those of a sub-batch, not of the step", stacklevel=2
    )
