"""Whether the settings of `StabilityMonitor` go together, and fit to the way in which a module is trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lsp_callbacks._validation import whole
from lsp_callbacks.callbacks.run_facts import unsupported
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.multi_optimizer import check_losses
from lsp_callbacks.quantities.key import PREFIX
from lsp_callbacks.quantities.tables import stated_keys
from lsp_callbacks.step.run_context import Prox


def check_settings(
    sub_batch: int | None,
    log_layers: Any,
    seed: int,
    accumulate: int | None,
    loss_fn: Any,
    prox: Prox | None,
) -> None:
    """Raise ValueError for settings that are wrong, or do not go together."""
    if sub_batch is not None:
        whole("sub_batch", sub_batch, 1, instead=", or None for the whole batch")
    if log_layers not in ("all", "summary", "histogram"):
        whole("log_layers", log_layers, 1, instead=", or 'all', 'summary' or 'histogram'")
    whole("seed", seed, 0)
    if accumulate is not None:
        whole("accumulate", accumulate, 1, instead=" batches, or None")
    if isinstance(loss_fn, Mapping):
        check_losses(loss_fn)
        if sub_batch is not None:
            raise ValueError(f"sub_batch={sub_batch}: players are measured on whole batches; leave it out")
        if accumulate is not None:
            raise ValueError(f"accumulate={accumulate}: players that sum gradients are not modelled; leave it out")
        if prox is not None:
            raise ValueError("prox: what is done to the weights of players after their steps is not modelled")


def check_trains(module: Any, monitor: Monitor, loss_fn: Any, accumulate: int | None) -> None:
    """Raise ValueError if the settings of `StabilityMonitor` do not fit to the way in which this module is trained.

    Where nothing is trained yet, and no quantity was named, there is one warning.
    """
    if not any(p.requires_grad for p in module.parameters()):
        text = f"{type(module).__name__} has no parameter that requires a gradient: nothing is trained"
        if monitor.quantities.named or monitor.quantities.strict:
            raise ValueError(text)
        monitor.errors.warn_once(f"{text}, and nothing is measured until something is")
    if module.automatic_optimization:
        if accumulate is not None:
            raise ValueError(
                f"accumulate={accumulate} is for manual optimisation: here Trainer(accumulate_grad_batches=...) is"
            )
        if isinstance(loss_fn, Mapping):
            raise ValueError(
                "loss_fn names several players, whose optimizers take turns: that needs automatic_optimization=False; "
                "otherwise pass one function"
            )


def warn_of_sub_batch(samples: int | None) -> None:
    """Warn that the numbers are not those of the whole step, if ``samples`` is not None."""
    if samples is not None:
        warnings.warn(
            f"sub_batch={samples}: sharpness and exponents are those of a sub-batch, not of the step", stacklevel=2
        )


def check_named(trainer: Any, module: Any, monitor: Monitor, loss_fn: Any) -> None:
    """Raise Unmeasurable if the user named a quantity that needs the update, and the update is not supported."""
    reason = unsupported(trainer, module, players=isinstance(loss_fn, Mapping))
    named = [q for q in monitor.quantities.values() if q.needs_update and q.name in monitor.quantities.named]
    if reason and named:
        raise Unmeasurable(f"{named[0].name} cannot be measured: {reason}")


def warn_of_unseen_steps(monitor: Monitor, module: Any) -> None:
    """Warn that no optimizer step was seen, as the module's own ``optimizer_step`` makes it behind Lightning's back."""
    monitor.errors.warn_once(
        f"no optimizer step was seen: {type(module).__name__}.optimizer_step must call "
        "optimizer.step(closure) of the optimizer that Lightning passes in"
    )


def check_watched(key: Any) -> None:
    """Raise ValueError for what `StopOnInstability` cannot watch."""
    if not isinstance(key, str):
        raise ValueError(f"monitor={key!r}: give a global key, such as 'stability/courant'")
    stated = stated_keys().get(key.removeprefix(PREFIX))
    if stated is not None and not stated.may_stop:
        raise ValueError(
            f"monitor={key!r} is no reason to stop: healthy steps reach it, too; watch a Courant number, such as "
            "'stability/courant'"
        )
