"""The Trainer of Hugging Face's transformers; needs the extra ``hf``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lsp_callbacks.errors import Unsupported
from lsp_callbacks.loops.plain_loop import is_scheduler_of
from lsp_callbacks.loops.watch import Log, Watch
from lsp_callbacks.monitor.configure import configured
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.quantities.key import scalars
from lsp_callbacks.step.clipping import Clipping
from lsp_callbacks.step.probes import Criterion, ForwardFn, check_pair, population
from lsp_callbacks.step.run_context import Prox
from lsp_callbacks.step.step_loss import loss_of

ITEMS = "num_items_in_batch"


class StabilityCallback(TrainerCallback):
    """Measures the stability of a run of ``transformers.Trainer``: ``Trainer(callbacks=[StabilityCallback()])``.

    A callback is not shown the batches, so a hook before the model's forward pass notes its arguments. The loss must be
    the model's own, without label smoothing and ``compute_loss_func``. Finite global values go to
    ``trainer.state.log_history``; all of them are in ``watch.history``.

    The Trainer's scheduler is a ``LambdaLR``, which `SGDLaw` judges by transformers' own function: linear, cosine and
    polynomial decay to 0 fail, as do constant rates and the inverse root; others are judged by their rates.

    The Trainer clips gradients by norm unless ``max_grad_norm=0``; what needs the update is that of the clipped step.

    Other arguments of `StabilityMonitor` have no place here: the loss and the number of batches in a step are the
    Trainer's, whole batches are measured, and the Trainer's checkpoints hold nothing of ours.

    Args:
        quantities: a preset ("economy", "default", "full"), names, or `Quantity` objects; or a `Monitor`, which has the
            ``settings`` itself.
        prox: what is done to each parameter after the optimizer's step, as in `StabilityMonitor`.
        forward_fn: its batch is ``(args, kwargs)`` of the model's forward pass; so is that of
        criterion: which belongs to it.
        cap: as in `Watch`: the share of the critical rate below which the rate of each update is kept.
        log: called with new values and ``state.global_step``.
        seed: of our own random choices.
        settings: ``every_n_steps``, ``budget``, ``window``, ``average``, ``layers``, ``blocks``, ``strict``,
            ``max_memory`` and ``time_limit``, as in `lsp_callbacks.monitor.configure.configured`.

    Raises:
        ValueError: for bad arguments, or settings beside a `Monitor`.
        TypeError: for an unknown setting.

    Example:
        >>> from lsp_callbacks.loops.hugging_face import StabilityCallback
        >>> callbacks = [StabilityCallback(["sharpness", "lyapunov"], every_n_steps=50)]  # for Trainer(callbacks=...)
    """

    watch: Watch

    def __init__(
        self,
        quantities: str | Sequence[str | Quantity] | Monitor = "default",
        *,
        prox: Prox | None = None,
        forward_fn: ForwardFn | None = None,
        criterion: Criterion | None = None,
        cap: float | None = None,
        log: Log | None = None,
        seed: int = 0,
        **settings: Any,
    ):
        if isinstance(quantities, Monitor) and settings:
            raise ValueError(f"{' and '.join(settings)}: a Monitor is given, give it to that")
        self.monitor = quantities if isinstance(quantities, Monitor) else configured(quantities, **settings)
        check_pair(forward_fn, criterion)  # now, not when training begins
        self.log = log
        self._settings: dict[str, Any] = {
            "forward_fn": forward_fn, "criterion": criterion, "prox": prox, "cap": cap, "seed": seed,
        }  # fmt: skip
        self._values: dict[str, float] = {}
        self._items: Any = None
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()  # of a run that was interrupted
        if state.global_step == 0:  # a new run; one that is resumed goes on with the curves, if it is in this process
            self.monitor.reset()
        self.monitor.drop()
        model, wrapped = kwargs["model"], kwargs["optimizer"]
        optimizer = getattr(wrapped, "optimizer", wrapped)  # accelerate wraps both
        scheduler = getattr(kwargs.get("lr_scheduler"), "scheduler", kwargs.get("lr_scheduler"))
        self.watch = Watch(
            model,
            optimizer,
            self._loss,
            self.monitor,
            accumulate=args.gradient_accumulation_steps,
            log=self._keep,
            scaler=getattr(wrapped, "scaler", None),
            clipping=Clipping(args.max_grad_norm) if (args.max_grad_norm or 0) > 0 else None,
            schedulers=(scheduler,) if is_scheduler_of(optimizer, scheduler) else (),
            **self._settings,
        )
        self.watch.loop.probe_loss = _model_loss
        self.watch.observer.probes.drop(population(kwargs.get("train_dataloader")))
        self.watch.step = state.global_step
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.step = state.global_step  # which counts steps that a gradient scaler leaves out

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        values, self._values = self._values, {}
        if shown := scalars(values):
            state.log_history.append({**shown, "epoch": state.epoch, "step": state.global_step})
        if values and self.log is not None:
            self.log(values, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            self.watch.close()
        self._hooks, self._values, self._items = [], {}, None

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self._items = kwargs.get(ITEMS)  # of all micro-batches, the same at each
            self.watch.begin((args, {name: value for name, value in kwargs.items() if name != ITEMS}))

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            with contextlib.suppress(Unsupported):
                loss = _own_loss(output)
                if loss.ndim == 0:  # otherwise these are outputs, and the loss is computed from them
                    self.watch.record(loss)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._items is None:
            self.watch.observer.step_loss.average()

    def _loss(self, module: nn.Module, batch: Any) -> Tensor:
        args, kwargs = batch
        if self._items is not None:  # by which the model divides, otherwise the Trainer by the number of micro-batches
            return _own_loss(module(*args, **kwargs, **{ITEMS: self._items})) * self.watch.accumulate
        # `Watch` divides by the number in a full window.
        return _own_loss(module(*args, **kwargs)) * (self.watch.accumulate / self.watch.batches)

    def _keep(self, values: dict[str, float], step: int) -> None:
        self._values = values


def _model_loss(module: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss over a batch of training samples, which is not one of the step's micro-batches."""
    args, kwargs = batch
    return _own_loss(module(*args, **kwargs))


def _own_loss(outputs: Any) -> Tensor:
    loss = loss_of(outputs) if isinstance(outputs, Mapping) else outputs[0]
    if loss is None:
        raise Unsupported("the model returns no loss: one that the Trainer computes outside of it is not modelled")
    return loss
