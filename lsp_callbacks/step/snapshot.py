"""One frozen training step: all that a quantity may look at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import BatchNorm, InstanceNorm, buffers, is_compiled, tree_map
from lsp_callbacks.autograd.graph import Graph, joined, read
from lsp_callbacks.errors import NotApplicable as NotApplicable
from lsp_callbacks.errors import Unmeasurable
from lsp_callbacks.errors import Unsupported as Unsupported
from lsp_callbacks.linalg import norm
from lsp_callbacks.step.players import Player
from lsp_callbacks.step.run_context import RunContext

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """What a module was called with, and what it returned; tensors only where they were kept."""

    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """One forward pass on some samples.

    Attributes:
        outputs: ``(samples, positions, classes)`` with its graph; positions are tokens or pixels, otherwise one.
        criterion: from such outputs to the loss that training minimises, a mean over the samples.
    """

    outputs: Tensor
    criterion: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Clipping:
    """How a step's gradient is clipped before the optimizer sees it, as by ``torch.nn.utils``.

    By norm ``g -> min(1, limit / (||g|| + 1e-6)) g``, over all parameters of the optimizer together; by value each
    number to ``[-limit, limit]``.

    Args:
        limit: the largest norm, or the largest number.
        kind: "norm" or "value".

    Raises:
        ValueError: for another kind, or a limit that is not positive.
    """

    limit: float
    kind: Literal["norm", "value"] = "norm"

    def __post_init__(self):
        if self.kind not in ("norm", "value") or not self.limit > 0:
            raise ValueError(f"Clipping({self.limit!r}, {self.kind!r}): give 'norm' or 'value' and a positive limit")

    def __call__(self, gradient: Tensor) -> Tensor:
        """The clipped gradient, from the flat one of all parameters of the optimizer; differentiable."""
        if self.kind == "value":
            return gradient.clamp(-self.limit, self.limit)
        return gradient * (self.limit / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)

    def factor(self, gradient: Tensor) -> Tensor:
        """What a small change of the gradient is multiplied with where this step's factor is held fixed.

        By norm one number, by value 1, or 0 where the gradient is clipped.
        """
        if self.kind == "value":
            return (gradient.abs() <= self.limit).to(gradient.dtype)
        return (self.limit / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)


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
        batches: where samples depend on each other in training, by the statistics of their batch: each evaluates
            ``together`` of the samples as a step does that takes them in one forward pass, and has no dropout.
        together: samples of each of those.

    Example:
        >>> import torch
        >>> from lsp_callbacks import ProbeSet
        >>> from lsp_callbacks.step.probes import evaluation
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

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, each once, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @property
    def trained(self) -> ProbeSet:
        """The same samples as a step sees them: in batches of their own statistics, where those tie them together."""
        if not self.batches:
            return self
        return replace(self, parts=self.batches, samples=self.together * len(self.batches))

    @property
    def tied(self) -> bool:
        """Whether the samples of a part depend on each other."""
        return bool(self.batches) and self.parts == self.batches


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A training step between its backward pass and its update.

    Args:
        step: number of the optimizer step, counted from 0.
        module: the module that ``replay`` runs. Its parameters are the real ones, shared; its buffers and
            Python attributes should be a copy (see `lsp_callbacks.step.replay.ModuleCopy`), as replays move them.
        replay: computes the loss of the step again, at the current values of the parameters: the same batch,
            the same random masks, the same buffers, however often it is called.
        optimizer: holds the groups and the state *before* the update.
        run: what all steps of the run share: ranks, seed, prox, schedulers.
        sample: from n to the loss of the first n samples of the step's batch, in eval mode, and how many there are;
            None where there is only the whole batch.
        loss: the step's own loss, against which replays are checked; None takes the first replay's.
        gradient: the step's own gradients by parameter name, unclipped, the mean over the ranks; None where the step
            had none.
        clipping: how the gradient is clipped before the optimizer sees it; None leaves it as it is.
        mismatch: why this step's gradient was found not to be that of its loss; None if it was not.
        tolerance: relative difference allowed between ``loss`` and its replay; 0 is to the last bit, for the same path.
        probes: training samples for the quantities that look at outputs; None where there are none.
        scale: the factor that a gradient scaler puts on the loss before its backward pass; ``gradient`` is without it.
        previous: number of the last step before this one that moved anything: batches between them may have been
            skipped. None is ``step - 1``.
        player: whose turn it is where several optimizers take turns on losses of their own; None is one optimizer.
    """

    step: int
    module: nn.Module
    replay: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    run: RunContext = field(default_factory=RunContext)
    sample: Callable[[int], tuple[Tensor, int]] | None = None
    loss: Tensor | None = None
    gradient: dict[str, Tensor | None] | None = None
    clipping: Clipping | None = None
    mismatch: str | None = None
    tolerance: float = 0.0
    probes: ProbeSet | None = None
    scale: float = 1.0
    previous: int | None = None
    player: Player | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def unsupported(self) -> str | None:
        """Why the update is not the optimizer's step on this loss, by the run or by this step; None if it is."""
        return self.run.unsupported or self.mismatch

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, each once, by name; in a game the player's own, or those of all, see `Player`."""
        held = (lambda p: True) if self.player is None else self.player.holds
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad and held(p)}

    def follows(self, step: int) -> bool:
        """Whether it begins where that step has ended."""
        return step == (self.step - 1 if self.previous is None else self.previous)

    @property
    def joint(self) -> Snapshot:
        """The same step, looking at the parameters of all players; without a game itself."""
        player = self.player
        if player is None or player.joint:
            return self
        return self.once("joint", lambda: replace(self, player=replace(player, joint=True), memo={}))

    @cached_property
    def flat_gradient(self) -> Tensor | None:
        """The step's own gradient as one flat vector; zeros where a parameter had none."""
        if self.gradient is None:
            return None
        own = [self.gradient[name] for name in self.parameters]
        return flatten(own, list(self.parameters.values())).detach()

    def check_gradient(self, flat: Tensor, *, tolerance: float = 1e-2) -> None:
        """Refuses a step whose gradient is not ``flat``, the gradient of its replayed loss.

        Raises:
            Unmeasurable: if they differ, or it is not finite or below the normal range.
        """
        own = self.flat_gradient
        if own is None:
            return
        size = norm(own)
        if not bool(size.isfinite()):
            raise Unmeasurable(f"the gradient of step {self.step} is not finite")
        if 0 < float(size) < torch.finfo(own.dtype).tiny:  # numbers that have lost their digits
            raise Unmeasurable(f"the gradient of step {self.step} is below the range of {own.dtype}: scale the loss")
        if not bool(norm(own - flat) <= tolerance * size):
            raise Unmeasurable(self._other_gradient(own.double(), flat.double()))

    def _other_gradient(self, own: Tensor, flat: Tensor) -> str:
        name = self.run.loss_name
        if name is None:
            return (
                "the step's gradient is not that of its loss: a hook changed it, or several backward passes were summed"
            )
        norms = torch.linalg.vector_norm(own), torch.linalg.vector_norm(flat)
        cosine = float((own @ flat) / (norms[0] * norms[1]))
        return (
            f"the step's gradient is not that of its loss: its norm is {float(norms[0]):.4g}, that of the gradient of "
            f"{name} {float(norms[1]):.4g}, their cosine {cosine:.4f}"
            f"{_factor(norms[0] / norms[1]) if cosine > 0.9999 else ''}. {name} must return what the step "
            "differentiates, the sum where there are several backward passes; or the gradient was changed after them"
        )

    @cached_property
    def own_gradient(self) -> bool:
        """True if the step's gradient is that of its replayed loss; see `check_gradient` for what it raises."""
        _, gradient = self.replayed_gradient()
        self.check_gradient(gradient, tolerance=1e-2 if self.graph.full else 0.1)
        return True

    def replayed_gradient(self) -> tuple[Tensor, Tensor]:
        """The loss of one replay, of this rank alone, and its flat gradient, the mean over the ranks; unchecked.

        Cost: one gradient.
        """
        parameters = list(self.parameters.values())
        losses: list[Tensor] = []

        def own() -> tuple[Tensor]:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                losses.append(self.replay())
                return (flatten(torch.autograd.grad(losses[0], parameters, allow_unused=True), parameters),)

        (gradient,) = self.run.ranks.mean(own, "the gradient")
        return losses[0].detach(), gradient

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """What several quantities need of the same step is computed once."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def generator(self, key: str) -> torch.Generator:
        """A private random source for ``(seed, step, key)``, the same on every rank."""
        value = self.run.seed
        for number in (self.step, *key.encode()):
            value = (value * 1_000_003 + number + 1) % (2**63)
        return torch.Generator().manual_seed(value)

    @cached_property
    def calls(self) -> dict[str, Call]:
        """One forward replay at the current parameters, checked, with the call of every module.

        A module that is called several times is represented by its first call.

        Raises:
            Unmeasurable: if the replayed loss is not the step's.

        Cost: one forward pass, about 1/3 gradient.
        """
        calls: dict[str, Call] = {}
        with contextlib.ExitStack() as stack:
            for name, module in self.module.named_modules():
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                    continue
                hook = _Recorder(name, calls, self.run.captures_inputs(name, module))
                # `always_call` is off: a forward that raised has nothing to tell.
                stack.callback(module.register_forward_pre_hook(hook.before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(hook.after).remove)
            self._verify()
        vars(self)["faithful"] = True
        return calls

    @cached_property
    def faithful(self) -> bool:
        """True once a replay at the unchanged parameters gave the step's own loss; see `calls` for what it raises."""
        self._verify()
        return True

    def _verify(self) -> None:
        def graph() -> Graph:
            # With a graph, as in training: some kernels are chosen by whether a gradient is wanted. Hooks do not fire
            # inside compiled code, so that runs eagerly and agrees up to rounding only.
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                loss = self.replay()
                self.check(loss, tolerance=1e-4 if self.compiled else 0.0)
            return read(loss)

        vars(self)["graph"] = joined(self.run.ranks.gather(graph, "the replay"))

    @cached_property
    def graph(self) -> Graph:
        """What the autograd graph of the replayed loss tells; see `calls` for what it raises."""
        self._verify()
        return vars(self)["graph"]

    @property
    def kinked(self) -> bool:
        """Whether the loss is only piecewise smooth in the parameters: ReLU, max-pooling and their like."""
        return self.graph.kinked

    @cached_property
    def compiled(self) -> bool:
        """Whether ``torch.compile`` was used on any module."""
        return any(is_compiled(m) for m in self.module.modules())

    def check(self, replayed: Tensor, *, tolerance: float = 0.0) -> None:
        """Refuses a replay whose loss is not the step's own.

        Args:
            replayed: the loss of a replay at the unchanged parameters.
            tolerance: relative, where this path needs more than the snapshot's own.

        Raises:
            Unmeasurable: if they differ, or the step's loss is not finite.
        """
        if self.loss is None:
            return
        own, again = self.loss.detach().double().cpu(), replayed.detach().double().cpu()
        if not bool(torch.isfinite(own)):
            raise Unmeasurable(f"the loss of step {self.step} is not finite")
        if not bool((own - again).abs() <= max(tolerance, self.tolerance) * own.abs()):
            if (name := self.run.loss_name) is not None:
                raise Unmeasurable(
                    f"the loss could not be replayed: at step {self.step} {name} gives {again.item():.9g}, "
                    f"where the step itself differentiates {own.item():.9g}{_factor(own / again)}"
                )
            raise Unmeasurable(
                f"the loss could not be replayed: step {self.step} had {own.item():.9g}, its replay "
                f"{again.item():.9g}. "
                "Something outside the batch, the module and the random state changes it (a hook of yours, a "
                "global variable): pass loss_fn=... which computes it from (module, batch)"
            )


def _factor(ratio: Tensor) -> str:
    """What a ratio of one over a whole number is likely to be."""
    whole = round(1 / float(ratio)) if 1e-4 < float(ratio) < 0.9 else 0
    if whole < 2 or abs(whole * float(ratio) - 1) > 1e-3:
        return ""
    return f", {whole} times less: if the loss is divided by the number of batches in a step, pass accumulate={whole}"


class _Recorder:
    def __init__(self, name: str, calls: dict[str, Call], keep: bool):
        self.name, self.calls, self.keep = name, calls, keep

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.name in self.calls:
            return
        # Cloned, as the module may work in place on its input.
        kept = tree_map(_detached, (args, kwargs)) if self.keep else ((), {})
        self.calls[self.name] = Call(_shape((*args, *kwargs.values())), None, *kept)

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        call = self.calls[self.name]
        if call.output_shape is None:
            outputs = output if isinstance(output, tuple | list) else (output,)
            self.calls[self.name] = Call(call.input_shape, _shape(outputs), call.args, call.kwargs)


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _shape(values: Any) -> tuple[int, ...] | None:
    return next((tuple(v.shape) for v in values if isinstance(v, Tensor)), None)


@contextlib.contextmanager
def restored(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whatever moves the parameters inside, every bit is put back."""
    saved = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        for p, original in zip(parameters, saved):
            p.data.copy_(original)


@contextlib.contextmanager
def displaced(parameters: list[nn.Parameter], direction: Tensor, distance: float) -> Iterator[None]:
    """Moves the parameters by ``distance * direction`` (flat), and puts every bit back."""
    with restored(parameters):
        for p, d in zip(parameters, split(direction, parameters)):
            p.data.add_(d.to(p.dtype), alpha=distance)
        yield


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode (running statistics, no dropout) with a graph; the modes are put back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The normalisations that make samples depend on each other in a training step, by the statistics of their batch.

    Those of torch and their subclasses, unless frozen (in eval mode, with running statistics, inside of training), and
    those of the user's own that keep running statistics under torch's names.
    """

    def ties(m: nn.Module) -> bool:
        if isinstance(m, BatchNorm):
            return m.training or m.running_mean is None
        return m.training and not isinstance(m, InstanceNorm) and {"running_mean", "running_var"} <= {*buffers(m)}

    return [m for m in module.modules() if ties(m)]


@contextlib.contextmanager
def as_trained(module: nn.Module, *, together: bool) -> Iterator[None]:
    """Eval mode (no dropout) with a graph, but normalisations that a step takes in training mode stay in it.

    They move their running statistics: let them be those of a copy.

    Args:
        module: as a step begins with it.
        together: also those over the batch, see `batch_norms`; otherwise those of a sample alone.
    """
    alone = (m for m in module.modules() if isinstance(m, InstanceNorm))
    modes = [(m, m.training) for m in (*alone, *(batch_norms(module) if together else ()))]
    with evaluating(module):
        for m, training in modes:
            m.training = training
        yield


def flatten(tensors: Any, like: list[nn.Parameter]) -> Tensor:
    """One flat vector; None stands for zeros, and the gradient of a sparse embedding becomes dense."""
    dense = (torch.zeros_like(p) if t is None else t.to_dense() for t, p in zip(tensors, like))
    return torch.cat([t.reshape(-1) for t in dense])


def split(vector: Tensor, like: list[nn.Parameter]) -> list[Tensor]:
    """The inverse of `flatten`: views of the vector in the shapes of the parameters."""
    return [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in like]), like)]
