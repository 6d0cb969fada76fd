"""The callback that shows what was measured, when training ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsp_callbacks import report
from lsp_callbacks.callbacks._lightning_internals import logged_row
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.log_pictures import log_figure
from lsp_callbacks.callbacks.run_folder import run_folder, unused
from lsp_callbacks.callbacks.stability_monitor import monitor_among, monitor_beside
from lsp_callbacks.callbacks.stop_on_instability import StopOnInstability
from lsp_callbacks.quantities import Quantity
from lsp_callbacks.quantities.key import PREFIX

#: Points of the loss that are kept; when they are full, neighbours are averaged.
POINTS = 8192
SUFFIXES = (".png", ".pdf", ".svg")


class StabilityReport(Callback):
    """Shows a table, one sentence, and a picture of the run beside its logs, when training ends, also early.

    The picture shows the training loss of every optimizer step (on rank zero) with the curves of the
    `StabilityMonitor`, and where the exponent turned positive, a loss alarm would have gone off, and
    `StopOnInstability` stopped. Keeping the loss never waits for the device, and takes a bounded amount of memory.

    The figures of single quantities are saved beside the picture: of `SGDStability` the stability diagram of its last
    measurement, as ``stability_diagram.png``; of `SpectralDensity` its densities, as ``stability_spectrum.png``. The
    loggers that take figures (TensorBoard, W&B, MLflow, Comet) are given all of them: ``stability/run``,
    ``stability/diagram``, ``stability/spectrum``.

    Args:
        path: of the picture: PNG, PDF or SVG. A relative path starts at the run's own folder: that of the logger's
            version (TensorBoard, CSV), ``save_dir/name/version`` with another logger, where ``ModelCheckpoint`` puts
            its checkpoints, too, and ``default_root_dir`` without one. The picture of another run is never replaced:
            where one is, this is ``stability-v1.png``, and so on.
        table: print the table.

    Raises:
        ValueError: for another kind of file; in ``setup``, without a `StabilityMonitor`.
        ImportError: in ``setup``, without matplotlib or rich: ``pip install 'lsp-callbacks[report]'``.
    """

    #: `StabilityMonitor` leaves its sentence to this callback, which prints it below the table.
    says_verdict = True

    def __init__(self, path: str | Path = "stability.png", *, table: bool = True):
        self.path, self.table = Path(path), table
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"path={str(path)!r}: give the name of a picture, ending in {', '.join(SUFFIXES)}")
        self._losses = Losses()
        self._files: dict[Path, Path] = {}  # where this run has put each of its pictures

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        report.check_installed()  # now, not after hours of training
        source = monitor_beside("StabilityReport", trainer)
        self._source = source
        if trainer.global_step == 0:  # a new run; one that is resumed loads its state after this
            self._losses, self._files = Losses(), {}
        if self._add_loss not in source.loss_listeners:
            source.loss_listeners.append(self._add_loss)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        source = monitor_among(trainer.callbacks)
        if source is not None and self._add_loss in source.loss_listeners:
            source.loss_listeners.remove(self._add_loss)

    def _add_loss(self, step: int, loss: Tensor) -> None:
        if step > (self._losses.steps[-1] if self._losses.steps else -1):  # a batch need not end with an update
            self._losses.add(step, loss.float())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        folder = run_folder(trainer)  # asked on all ranks
        if not trainer.is_global_zero:
            return
        history = self._source.history
        path = self._file((folder / self.path).absolute())
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = self.picture(trainer)
        figure.savefig(path)
        sentences = (
            report.sentence(self._source.verdict),
            f"lsp_callbacks: the picture of this run is {path}",
            *self._log(trainer, "run", figure),
        )
        drawn = [q for q in self._source.monitor.quantities.values() if q.picture and q.update_count]
        reasons = self._source.skipped.items()
        skipped = [f"lsp_callbacks: {name} was not measured: {why}" for name, why in reasons]
        pictures = [text for q in drawn for text in self._drawn(q, trainer, path)]
        report.print_report(*[report.table(history)] * self.table, *sentences, *skipped, *pictures)

    def picture(self, trainer: Any) -> Any:
        """Draw the run so far.

        Args:
            trainer: Lightning's.
        """
        steps, values = self._losses.read()
        events = run_events(trainer, steps, values, self._losses.stride)
        return report.figure(self._source.history, (steps, values), events)

    def _drawn(self, quantity: Quantity, trainer: Any, beside: Path) -> list[str]:
        """Draw, save and log the figure of a quantity; return what there is to say of it."""
        try:
            figure = report.quantity_figure(quantity)
        except Exception as error:  # the run is over: no reason to end it with an exception
            return [f"lsp_callbacks: no picture of {quantity.name}: {error}"]
        path = self._file(beside.with_name(f"{beside.stem}_{quantity.picture}.png"))
        figure.savefig(path)
        failures = self._log(trainer, quantity.picture, figure)
        return [f"lsp_callbacks: the picture of {quantity.name} is {path}", *failures]

    def _file(self, path: Path) -> Path:
        """Return where a picture is written: never where that of another run is."""
        return self._files.setdefault(path, unused(path))

    def _log(self, trainer: Any, name: str, figure: Any) -> list[str]:
        """Log a figure with the loggers that take one; return what has failed."""
        failures = []
        for logger in trainer.loggers:
            try:
                log_figure(logger, f"{PREFIX}{name}", figure, logged_row(trainer))
            except Exception as error:  # a server that is away, say: the picture is saved
                failures.append(f"lsp_callbacks: {type(logger).__name__} took no picture {PREFIX}{name}: {error}")
        return failures

    def state_dict(self) -> dict[str, Any]:
        return self._losses.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._losses.load_state_dict(state_dict)


class Losses:
    """Losses by optimizer step, in one buffer on their own device.

    When the buffer is full, neighbours are averaged; from then on a point is the mean of ``stride`` steps, the last of
    which gives it its number.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.stride = 1
        self._values: Tensor | None = None
        self._count = 0

    def add(self, step: int, loss: Tensor) -> None:
        if self._values is None:
            self._values = torch.zeros(POINTS)
        self._values = self._values.to(loss.device)  # once: a copy from a device at every step would wait for it
        if self._count in (0, self.stride):
            if len(self.steps) == POINTS:
                self._values[: POINTS // 2] = self._values.view(-1, 2).mean(1)
                self.steps, self.stride = self.steps[1::2], 2 * self.stride
            self.steps.append(step)
            self._values[len(self.steps) - 1] = loss
            self._count = 1
        else:
            self._count += 1
            self.steps[-1] = step
            self._values[len(self.steps) - 1].lerp_(loss, 1 / self._count)

    def read(self) -> tuple[list[int], list[float]]:
        return list(self.steps), [] if self._values is None else self._values[: len(self.steps)].tolist()

    def state_dict(self) -> dict[str, Any]:
        steps, values = self.read()
        return {
            "steps": torch.tensor(steps),
            "values": torch.tensor(values),
            "stride": self.stride,
            "count": self._count,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.steps, self.stride = state_dict["steps"].tolist(), state_dict["stride"]
        self._count, self._values = state_dict["count"], torch.zeros(POINTS)
        self._values[: len(self.steps)] = state_dict["values"]


def run_events(trainer: Any, steps: Sequence[int], losses: Sequence[float], stride: int) -> dict[str, int | None]:
    """Return the step of each event by its name, None where it has not happened.

    Args:
        trainer: Lightning's.
        steps: of the losses.
        losses: of the run, or means over several steps.
        stride: number of steps in a mean.
    """
    events: dict[str, int | None] = {}
    stop = next((c for c in trainer.callbacks if isinstance(c, StopOnInstability)), None)
    if stop is not None:
        name = stop.monitor.removeprefix("stability/")
        sign = "lyapunov" in name and stop.threshold == 0
        events["exponent turned positive" if sign else f"{name} above {stop.threshold:g}"] = stop.event_step
    alarm = report.loss_alarm(losses, stride=stride)
    events["loss alarm"] = None if alarm is None else steps[alarm]
    if stop is not None:
        events["stopped"] = stop.stop_step
    return events
