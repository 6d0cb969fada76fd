"""The command ``lsp-callbacks diagram``: which learning rates a configuration can bear, before a step is taken."""

from __future__ import annotations

import argparse
import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lsp_callbacks import report
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.lightning_step import clipping, pending_step, probe_set, step_loss, unsupported
from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.sgd.stability_diagram import StabilityDiagram
from lsp_callbacks.operators.sgd.frozen_sgd import FrozenSGD, frozen_sgd
from lsp_callbacks.plots.stability_diagram import diagram_around
from lsp_callbacks.quantities import SGDStability
from lsp_callbacks.step.probes import Probes, population
from lsp_callbacks.step.run_context import RunContext
from lsp_callbacks.step.side_effects import untouched
from lsp_callbacks.step.snapshot import Snapshot

SUFFIXES = (".png", ".pdf", ".svg")
#: Of the trainer: what could leave files behind or take time.
QUIET = {
    "logger": False, "profiler": None, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip
#: Packages that log and warn under names of their own.
LIGHTNING = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")
DESCRIPTION = """\
Draws the stability of SGD over learning rate and batch size for a configuration of `lsp-callbacks fit`, at its initial
weights or at a checkpoint, and prints the largest stable rate of each batch size. Weights do not move, nothing is
logged, callbacks of the configuration are left out. Other options are those of `lsp-callbacks fit`: --model.lr 0.2\
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after ``diagram``.

    Returns:
        The exit status, 1 where the diagram cannot be drawn. Bad arguments end in ``SystemExit(2)``.
    """
    own, rest = _parser().parse_known_args(argv)
    try:
        report.check_installed()
        with quiet():
            found, base, diagram = _configured(rest, own)
    except (Unmeasurable, MisconfigurationException, ImportError, OSError, pickle.UnpicklingError) as error:
        return _fail(error)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):  # a bug of the user's, who wants to see where
            raise
        return _fail(error)
    own.output.parent.mkdir(parents=True, exist_ok=True)
    report.diagram_figure(diagram, lr=found.lr, batch_size=found.batch_size).savefig(own.output)
    size = min(found.batch_size, found.population)
    sentence = report.diagram_sentence(diagram, lr=found.lr, batch_size=size)
    if base > found.lr:  # a warm-up says little about the steps after it
        later = report.diagram_sentence(diagram, lr=base, batch_size=size)
        sentence += f". At the rate from which the schedule is reckoned, {later}"
    frozen = ", with the optimizer's preconditioner held fixed" if found.frozen else ""
    report.show(
        report.diagram_table(diagram),
        f"lsp_callbacks: {sentence} (seen at {found.modes.samples} samples{frozen})",
        f"lsp_callbacks: the diagram is {own.output.absolute()}",
    )
    return 0


def _fail(error: Exception) -> int:
    print(f"lsp-callbacks diagram: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lsp-callbacks diagram",
        usage="lsp-callbacks diagram --config FILE [--ckpt FILE] [--output PICTURE] [--probes N] [--KEY VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt", type=existing, metavar="FILE", help="a checkpoint; otherwise the initial weights")
    parser.add_argument("--output", type=_picture, default="diagram.png", metavar="PICTURE", help="PNG, PDF or SVG")
    parser.add_argument("--probes", type=_count, metavar="N", help="samples to look at (128)")
    for name, value in (("chains", 8), ("steps", 300)):
        parser.add_argument(f"--{name}", type=_count, default=value, metavar="N", help=f"of random products ({value})")
    return parser


def existing(text: str) -> Path:
    """A file that is there, for a command line."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return Path(text)


def _picture(text: str) -> Path:
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text}: give the name of a picture, ending in {', '.join(SUFFIXES)}")
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: give a number of at least 2")
    return int(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's advice is about training."""
    loggers = [logging.getLogger(name) for name in LIGHTNING]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Its own, by where they are raised: those of the user's code are shown.
            for package in LIGHTNING:
                warnings.filterwarnings("ignore", module=package)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _configured(args: list[str], own: argparse.Namespace) -> tuple[FrozenSGD, float, StabilityDiagram]:
    """What LightningCLI makes of the arguments: its first step, the schedule's base rate and the diagram."""
    found: list[tuple[FrozenSGD, float]] = []

    def look(trainer: Any, model: Any, monitor: StabilityMonitor | None, **data: Any) -> None:
        data["ckpt_path"] = own.ckpt or data.get("ckpt_path")
        frozen = examine(trainer, model, settings=Settings.of(monitor, own.probes), **data)
        groups = trainer.optimizers[0].param_groups
        found.append((frozen, max(float(group.get("initial_lr", frozen.lr)) for group in groups)))

    configured(args, look, usage=_parser().usage)
    try:
        ((frozen, base),) = found
        return frozen, base, diagram_around(frozen, chains=own.chains, steps=own.steps)
    except ValueError as error:
        raise Unmeasurable(str(error)) from error


def configured(args: list[str], look: Callable[..., None], *, usage: str | None) -> None:
    """Makes trainer, module and data from the arguments of the command ``fit``, and hands them over before training.

    The trainer leaves no files and has no callbacks.

    Args:
        args: as they follow ``fit``.
        look: ``(trainer, model, monitor, **data)``; the monitor is that of the configuration, or None.
        usage: for messages.
    """
    from pytorch_lightning.cli import LightningCLI
    from pytorch_lightning.loggers.logger import DummyLogger

    class ConfiguredCLI(LightningCLI):
        """The command ``fit`` up to its first step: any configuration that trains is understood."""

        def before_instantiate_classes(self) -> None:
            vars(self.config.fit.trainer).update(QUIET)

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            # Dropped once they are made: the monitor's settings are wanted, and no other callback's work.
            listed = self._get(self.config_init, "trainer")["callbacks"] or []
            listed = listed if isinstance(listed, list) else [listed]
            self.monitor = next((c for c in listed if isinstance(c, StabilityMonitor)), None)
            self._get(self.config_init, "trainer")["callbacks"] = None
            trainer = super().instantiate_trainer(**kwargs)
            trainer.logger = DummyLogger()  # hooks of the module may call it
            return trainer

        def fit(self, model: Any, **data: Any) -> None:
            look(self.trainer, model, self.monitor, **data)

    sys_argv = sys.argv
    sys.argv = sys.argv[:1]  # given both args and the process's own arguments, LightningCLI warns
    try:
        ConfiguredCLI(
            args=["fit", *args],
            save_config_callback=None,
            parser_kwargs={"prog": "lsp-callbacks", "fit": {"usage": usage}},
        )
    finally:
        sys.argv = sys_argv


@dataclass(frozen=True)
class Settings:
    """How to look at a step: what the configuration's `StabilityMonitor` says, if it has one.

    Attributes:
        probes: how many samples.
        outputs, forward_fn, criterion, loss_fn, seed: see `SGDStability` and `StabilityMonitor`.
    """

    probes: int = 128
    outputs: Any = "top"
    forward_fn: Any = None
    criterion: Any = None
    loss_fn: Any = None
    seed: int = 0

    @classmethod
    def of(cls, monitor: StabilityMonitor | None, probes: int | None) -> Settings:
        """Takes them from a monitor; ``probes`` of the command line has precedence."""
        if monitor is None:
            return cls(probes=probes or cls.probes)
        quantity: Any = monitor.monitor.quantities.get("sgd_stability") or SGDStability()
        return cls(
            probes=probes or quantity.probes,
            outputs=quantity.outputs,
            forward_fn=monitor.probes.forward_fn,
            criterion=monitor.probes.criterion,
            loss_fn=monitor.loss_fn,
            seed=monitor.seed,
        )


def examine(
    trainer: Any, model: Any, *, settings: Settings | None = None, ckpt_path: str | Path | None = None, **data: Any
) -> FrozenSGD:
    """Freezes the first step that a trainer would take, and takes none.

    Everything is set up as for training: device, precision, loaders, optimizers, and the checkpoint with their states.
    Then the trainer is left by an exception, so that no hook believes that training has ended.

    Args:
        trainer: of either name of Lightning; it is used up.
        model: the LightningModule.
        settings: how to look at the step.
        ckpt_path: weights, optimizer states and schedules to start from.
        data: other arguments of ``trainer.fit``: ``datamodule`` or ``train_dataloaders``.

    Raises:
        Unmeasurable: if the step cannot be frozen; see `lsp_callbacks.operators.sgd.frozen_sgd.frozen_sgd`.
    """
    if trainer.world_size > 1:
        raise Unmeasurable(
            f"{trainer.world_size} processes: pass --trainer.devices 1; the batch size is then that of one of them"
        )
    examiner = _Examiner(settings or Settings())
    trainer.callbacks.append(examiner)
    vars(model)["configure_callbacks"] = list  # of the module: not wanted either
    try:
        trainer.fit(model, ckpt_path=None if ckpt_path is None else str(ckpt_path), **data)
    except _Done:
        pass
    finally:
        vars(model).pop("configure_callbacks", None)
        trainer.callbacks.remove(examiner)
    if examiner.found is None:
        raise Unmeasurable("the loader gives no training batch")
    return examiner.found


class _Done(Exception):
    """All has been seen."""


class _Examiner(Callback):
    """Looks at the first step, and ends the run before it."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.found: FrozenSGD | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # The schedules are made by now. A checkpoint of a run that has ended has a next step, too.
        trainer.fit_loop.max_epochs = trainer.fit_loop.epoch_loop.max_steps = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        settings, steps = self.settings, max(1, len(trainer.optimizers))
        _check(trainer, pl_module, settings)
        probes = Probes(settings.probes, settings.forward_fn, settings.criterion)
        probes.drop(population(trainer.train_dataloader))
        run = RunContext(seed=settings.seed, unsupported=unsupported(trainer, pl_module))
        pending = pending_step(trainer, pl_module, own_loss=settings.loss_fn is not None, run=run)
        with untouched(pl_module):
            for number, one in enumerate(chain([batch], _rest(trainer)), start=batch_idx):
                if number - batch_idx < trainer.accumulate_grad_batches:
                    pending.add(one, step_loss(trainer, settings.loss_fn, number))
                elif probes.full:
                    break
                probes.add(one)
            snapshot = pending.snapshot(
                trainer.global_step // steps,
                trainer.optimizers[0],
                clipping=clipping(trainer),
                probes=probe_set(trainer, probes, pending),
            )
            self.found = frozen_sgd(_with_gradient(snapshot), outputs=settings.outputs)
        raise _Done


def _check(trainer: Any, module: Any, settings: Settings) -> None:
    """Refuses what would move the weights, or does not move them."""
    if not trainer.optimizers:
        raise Unmeasurable(f"{type(module).__name__} has no optimizer: nothing is trained")
    if not module.automatic_optimization and (settings.loss_fn is None or settings.forward_fn is None):
        raise Unmeasurable(
            "automatic_optimization=False: training_step would step by itself; give a StabilityMonitor with loss_fn, "
            "forward_fn and criterion in the configuration"
        )
    if isinstance(settings.loss_fn, Mapping):
        raise Unmeasurable(
            "several players take turns on losses of their own: no one learning rate has a limit that could be drawn"
        )


def _rest(trainer: Any) -> Iterator[Any]:
    """The other batches of the epoch, on the device as ``training_step`` would receive them."""
    fetcher = trainer.fit_loop._data_fetcher
    while True:
        try:
            batch, *_ = next(fetcher)  # iter() would begin again, with samples that have been seen
        except StopIteration:
            return
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _with_gradient(snapshot: Snapshot) -> Snapshot:
    """Before a step no gradient is there, which Adam's preconditioner needs, and by which it is told what moves."""
    names, parameters = zip(*snapshot.parameters.items())
    with torch.enable_grad():
        loss = snapshot.replay()
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    return replace(snapshot, loss=loss.detach(), gradient=dict(zip(names, gradient)))
