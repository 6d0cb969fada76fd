"""The command ``lsp-callbacks diagram``: the largest stable learning rates of a configuration, before any step."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lsp_callbacks import report
from lsp_callbacks.autograd.side_effects import untouched
from lsp_callbacks.callbacks._lightning_internals import remaining_batches
from lsp_callbacks.callbacks.base import Callback
from lsp_callbacks.callbacks.lightning_loop import LightningLoop
from lsp_callbacks.callbacks.stability_monitor import StabilityMonitor
from lsp_callbacks.cli.configured import (
    Done,
    command_parser,
    existing,
    fit_until_done,
    print_failure,
    quiet,
    train_without_end,
    with_configuration,
)
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.functional.sgd.stability_diagram import StabilityDiagram
from lsp_callbacks.monitor.monitor import Monitor
from lsp_callbacks.monitor.observer import StepObserver
from lsp_callbacks.operators.sgd.frozen_sgd import FrozenSGD, frozen_sgd
from lsp_callbacks.quantities import SGDStability
from lsp_callbacks.quantities.sgd.diagram_around_step import diagram_around_step
from lsp_callbacks.step.probes import population
from lsp_callbacks.step.snapshot import Snapshot

SUFFIXES = (".png", ".pdf", ".svg")
DESCRIPTION = """\
Draws the stability of SGD over learning rate and batch size for a configuration of `lsp-callbacks fit`, at its initial
weights or at a checkpoint, and prints the largest stable rate of each batch size. Weights do not move, nothing is
logged, callbacks of the configuration are left out. Other options are those of `lsp-callbacks fit`: --model.lr 0.2\
"""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments after ``diagram``.

    Returns:
        The exit status, 1 where the diagram cannot be drawn. Bad arguments end in ``SystemExit(2)``.
    """
    options, rest = _parser().parse_known_args(argv)
    try:
        report.check_installed()
        with quiet():
            frozen, base, diagram = _examine_configuration(rest, options)
    except (Unmeasurable, MisconfigurationException, ImportError, OSError, pickle.UnpicklingError) as error:
        return print_failure("diagram", error)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):  # a bug of the user's, who wants to see where
            raise
        return print_failure("diagram", error)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report.diagram_figure(diagram, lr=frozen.lr, batch_size=frozen.batch_size).savefig(options.output)
    size = min(frozen.batch_size, frozen.population)
    sentence = report.diagram_sentence(diagram, lr=frozen.lr, batch_size=size)
    if base > frozen.lr:  # a warm-up says little about the steps after it
        later = report.diagram_sentence(diagram, lr=base, batch_size=size)
        sentence += f". At the rate from which the schedule is reckoned, {later}"
    preconditioner = ", with the optimizer's preconditioner held fixed" if frozen.frozen else ""
    report.print_report(
        report.diagram_table(diagram),
        f"lsp_callbacks: {sentence} (seen at {frozen.modes.samples} samples{preconditioner})",
        f"lsp_callbacks: the diagram is {options.output.absolute()}",
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "diagram", "--config FILE [--ckpt FILE] [--output PICTURE] [--probes N] [--KEY VALUE ...]", DESCRIPTION
    )
    parser.add_argument("--ckpt", type=existing, metavar="FILE", help="a checkpoint; otherwise the initial weights")
    parser.add_argument("--output", type=_picture, default="diagram.png", metavar="PICTURE", help="PNG, PDF or SVG")
    parser.add_argument("--probes", type=_count, metavar="N", help="samples to look at (128)")
    for name, value in (("chains", 8), ("steps", 300)):
        parser.add_argument(f"--{name}", type=_count, default=value, metavar="N", help=f"of random products ({value})")
    return parser


def _picture(text: str) -> Path:
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text}: give the name of a picture, ending in {', '.join(SUFFIXES)}")
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: give a number of at least 2")
    return int(text)


def _examine_configuration(args: list[str], options: argparse.Namespace) -> tuple[FrozenSGD, float, StabilityDiagram]:
    """Return the first step of what LightningCLI makes of the arguments, the schedule's base rate and the diagram."""
    examined: list[tuple[FrozenSGD, float]] = []

    def use(trainer: Any, model: Any, monitor: StabilityMonitor | None, **data: Any) -> None:
        data["ckpt_path"] = options.ckpt or data.get("ckpt_path")
        frozen = examine(trainer, model, settings=Settings.of(monitor, options.probes), **data)
        groups = trainer.optimizers[0].param_groups
        examined.append((frozen, max(float(group.get("initial_lr", frozen.lr)) for group in groups)))

    with_configuration(args, use, usage=_parser().usage)
    try:
        ((frozen, base),) = examined
        return frozen, base, diagram_around_step(frozen, chains=options.chains, steps=options.steps)
    except ValueError as error:
        raise Unmeasurable(str(error)) from error


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
        """Return those of a monitor; ``probes`` of the command line has precedence."""
        if monitor is None:
            return cls(probes=probes or cls.probes)
        quantity: Any = monitor.monitor.quantities.get("sgd_stability") or SGDStability()
        return cls(
            probes=probes or quantity.probes,
            outputs=quantity.outputs,
            forward_fn=monitor.observer.probes.forward_fn,
            criterion=monitor.observer.probes.criterion,
            loss_fn=monitor.loss_fn,
            seed=monitor.seed,
        )


def examine(
    trainer: Any, model: Any, *, settings: Settings | None = None, ckpt_path: str | Path | None = None, **data: Any
) -> FrozenSGD:
    """Freeze the first step that a trainer would take, and take none.

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
    fit_until_done(trainer, model, examiner, ckpt_path=None if ckpt_path is None else str(ckpt_path), **data)
    if examiner.frozen is None:
        raise Unmeasurable("the loader gives no training batch")
    return examiner.frozen


class _Examiner(Callback):
    """Looks at the first step, and ends the run before it."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.frozen: FrozenSGD | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        train_without_end(trainer)  # the schedules are made by now

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        settings, steps = self.settings, max(1, len(trainer.optimizers))
        _check(trainer, pl_module, settings)
        monitor = Monitor(SGDStability(settings.probes, outputs=settings.outputs), every_n_steps=1)
        observer = StepObserver(monitor, forward_fn=settings.forward_fn, criterion=settings.criterion)
        loop = LightningLoop(trainer, pl_module, monitor, loss_fn=settings.loss_fn, seed=settings.seed)
        observer.attach(loop)
        observer.step = trainer.global_step // steps
        observer.probes.drop(population(trainer.train_dataloader))
        with untouched(pl_module):
            for number, coming in enumerate(chain([batch], remaining_batches(trainer))):
                if number < trainer.accumulate_grad_batches:
                    observer.begin_batch(coming, partial(loop.loss, batch_idx + number, None), first=number == 0)
                elif observer.probes.full:
                    break
                else:
                    observer.probes.add(coming, pl_module)
            snapshot = observer.snapshot(trainer.optimizers[0])
            self.frozen = frozen_sgd(_with_gradient(snapshot), outputs=settings.outputs)
        raise Done


def _check(trainer: Any, module: Any, settings: Settings) -> None:
    """Raise Unmeasurable for a run that would move the weights here, or never moves them."""
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


def _with_gradient(snapshot: Snapshot) -> Snapshot:
    """Return a step that was not taken, with its gradient: Adam needs it, and it shows which parameters move."""
    names, parameters = zip(*snapshot.parameters.items())
    with torch.enable_grad():
        loss = snapshot.replay()
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    return replace(snapshot, loss=loss.detach(), gradient=dict(zip(names, gradient)))
