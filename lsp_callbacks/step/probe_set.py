"""A fixed sample of the training set, at which quantities look at the network's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from lsp_callbacks.autograd._torch_internals import trained_parameters
from lsp_callbacks.step.criterion import Evaluation


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """A fixed sample of the training set.

    Args:
        module: whose parameters are trained.
        parts: each evaluates the module, in eval mode, at some of the samples; together they are the probes.
        samples: how many the parts hold.
        batch_size: how many a training step takes.
        population: how many there are to take them from; None is a stream without end.
        full: False while samples are still being collected.
        batches: for samples that depend on each other in training, by the statistics of their batch: each evaluates
            ``together`` of the samples as a step does that takes them in one forward pass, and has no dropout.
        together: samples of each of those.
        is_given: whether the user has said what outputs and criterion are: they may be others than those of the step.

    Example:
        >>> import torch
        >>> from lsp_callbacks import ProbeSet
        >>> from lsp_callbacks.step.criterion import evaluation
        >>> net, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.zeros(8, 2)
        >>> part = lambda: evaluation(net(x), lambda f: torch.nn.functional.mse_loss(f, y), samples=8)
        >>> probes = ProbeSet(module=net, parts=(part,), samples=8, batch_size=4)
    """

    module: nn.Module
    parts: tuple[Callable[[], Evaluation], ...]
    samples: int
    batch_size: int
    population: int | None = None
    full: bool = True
    batches: tuple[Callable[[], Evaluation], ...] = ()
    together: int = 1
    is_given: bool = False

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, each once, by name."""
        return trained_parameters(self.module)

    @property
    def trained(self) -> ProbeSet:
        """The same samples as a step sees them: in batches of their own statistics, if those tie them together."""
        if not self.batches:
            return self
        return replace(self, parts=self.batches, samples=self.together * len(self.batches))

    @property
    def tied(self) -> bool:
        """Whether the samples of a part depend on each other."""
        return bool(self.batches) and self.parts == self.batches
