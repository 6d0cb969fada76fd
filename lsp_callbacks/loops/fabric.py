"""A loop of Lightning Fabric."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import tree_map
from lsp_callbacks.loops.watch import Watch
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.step.pending_step import LossFn


def watch_fabric(
    fabric: Any, module: Any, optimizer: Any, loss_fn: LossFn, monitor: Monitor | None = None, **settings: Any
) -> Watch:
    """Return a `Watch` of what ``fabric.setup`` returned; it logs to Fabric's loggers.

    Args:
        fabric: Lightning's, after ``launch``.
        module: as set up.
        optimizer: as set up.
        loss_fn: ``(module, batch) -> loss``; the module that it is given converts and casts as Fabric's does.
        monitor: see `Watch`.
        settings: see `Watch`; ``schedulers`` may have been made with either optimizer.
    """
    precision = fabric.strategy.precision

    def loss(copy: nn.Module, batch: Any) -> Any:
        return loss_fn(_Converting(copy, precision), batch)

    forward_fn = settings.pop("forward_fn", None)
    if forward_fn is not None:
        settings["forward_fn"] = lambda copy, batch: forward_fn(_Converting(copy, precision, probed=True), batch)
    defaults = {"log": fabric.log_dict, "scaler": getattr(precision, "scaler", None)}
    watch = Watch(module.module, optimizer.optimizer, loss, monitor, **defaults | settings)
    # A LightningModule holds what it was set up with, which cannot be copied.
    watch.loop.shared = (fabric, optimizer)
    watch.loop.probe_loss = lambda copy, batch: loss_fn(_Converting(copy, precision, probed=True), batch)
    return watch


class _Converting(nn.Module):
    """Converts and casts in a forward pass as Fabric does; training samples are evaluated in the weights' precision."""

    def __init__(self, module: nn.Module, precision: Any, *, probed: bool = False):
        super().__init__()
        self.module, self._precision, self._probed = module, precision, probed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._probed:
            dtype = next(self.module.parameters()).dtype
            args, kwargs = tree_map(
                lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, (args, kwargs)
            )
            return self.module(*args, **kwargs)
        args, kwargs = self._precision.convert_input((args, kwargs))
        with self._precision.forward_context():
            output = self.module(*args, **kwargs)
        return self._precision.convert_output(output)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)
