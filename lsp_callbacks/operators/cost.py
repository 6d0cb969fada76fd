"""The cost of work beside forward and backward passes (calls, vectors), in gradients of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lsp_callbacks.autograd._torch_internals import RECURRENT, TorchDispatchMode, packet, tree_leaves
from lsp_callbacks.operators.curvature.hessian import Method, product_cost
from lsp_callbacks.operators.divided_step import pieces_of
from lsp_callbacks.operators.trajectory.update_rules import formula_of
from lsp_callbacks.step.snapshot import Snapshot, computed_once


@dataclass(frozen=True)
class Work:
    """The work of one forward pass, counted rather than timed, so that it is the same at each replay.

    Attributes:
        calls: how many operations.
        elements: how many numbers in their results, views not counted.
        multiplications: in products of matrices and convolutions.
        parameters: how many numbers in a vector over all trainable parameters.
    """

    calls: int
    elements: int
    multiplications: float
    parameters: int


@computed_once
def work(snapshot: Snapshot) -> Work:
    """Replay the loss once and count its work. Cost: one forward pass."""
    counter = WorkCounter()
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"), counter:
        snapshot.replay()
    parameters = sum(p.numel() for p in snapshot.parameters.values())
    return Work(counter.calls, counter.elements, counter.flops / 2, parameters)


def assume(snapshot: Snapshot, counts: Work) -> None:
    """Let a step's work be that of an earlier one, so that no pass has to be counted."""
    snapshot.shared[_WORK] = counts


#: Where `computed_once` keeps it.
_WORK = (work.__wrapped__, ())  # type: ignore[attr-defined]


class WorkCounter(TorchDispatchMode):
    """Counts the operations that are run inside its context, those of backward passes included.

    Attributes:
        calls, elements, flops: as in `Work`; two flops are a multiplication.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.elements = 0
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if not func.is_view:
            self.elements += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        if packet(func) is torch.ops.aten.convolution_backward:  # torch's formula takes the groups for a single one
            g, x, weight, _, *how, mask = args
            forward = flop_registry[torch.ops.aten.convolution](x, weight, None, *how, out_val=g)
            self.flops += forward * (mask[0] + mask[1])
        elif (formula := flop_registry.get(IN_PLACE.get(packet(func), packet(func)))) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        elif packet(func).__name__ in RECURRENT:  # torch knows no formula
            steps, weights = args[0].shape[:2].numel(), [w for w in tree_leaves(args[1:3]) if isinstance(w, Tensor)]
            self.flops += 2 * steps * sum(w.numel() for w in weights)
        return out


#: Products that torch has no formula for, as their results have a place already, by those that do the same.
IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
#: Nanoseconds on one core, fitted to gradients of fifteen networks of 400 to 900,000 parameters within 40 %: for a
#: replay, for each operation with its backward pass, each number, each multiplication in either direction, and each
#: number of a gradient. Only their ratios matter.
START, OPERATION, ELEMENT, MULTIPLICATION, PARAMETER = 1.6e5, 4e4, 2.8, 0.028, 0.4
#: Nanoseconds that a step of Lightning takes beside its passes, at least: hooks, batches, metrics, the update
#: (``benchmarks/step_in_gradients.py``).
LOOP = 3e6
#: Nanoseconds that a measured step takes beside what its quantities do: hooks, copies, the snapshot, what is logged.
HOOKS = 1.5e6
#: Gradients of an exact product that is summed over pieces of the batch, each of which makes its graph anew.
PIECES = 3.3
#: Nanoseconds of an operation of the package, and of each number of a vector that is read and written once.
CALL, VECTOR = 1.2e4, 1.0


def gradient_time(snapshot: Snapshot) -> float:
    """Return the nanoseconds of a forward and a backward pass of the step, on the core that was used for the fit."""
    once = work(snapshot)
    passes = OPERATION * once.calls + ELEMENT * once.elements + 3 * MULTIPLICATION * once.multiplications
    return START + passes + PARAMETER * once.parameters


def step_cost(snapshot: Snapshot) -> float:
    """Return the gradients that a whole step of a training loop takes: its passes, and on a small network the rest."""
    return 1 + LOOP / gradient_time(snapshot)


def hooks_cost(snapshot: Snapshot) -> dict[str, float]:
    """Return the gradients of a measured step beside what its quantities do, by purpose; all of them share it."""
    return {"hooks and copies": HOOKS / gradient_time(snapshot)}


def beside(snapshot: Snapshot, *, calls: float = 0.0, vectors: float = 0.0, time: float = 0.0) -> float:
    """Return the cost of work beside the passes, in gradients: much on a small network, little on a large one.

    Args:
        snapshot: the step.
        calls: how many operations on small tensors.
        vectors: how many vectors over all parameters are read and written once.
        time: further nanoseconds.
    """
    spent = time + CALL * calls + VECTOR * vectors * work(snapshot).parameters
    return spent / gradient_time(snapshot)


def forward_cost(snapshot: Snapshot) -> float:
    """Return the gradients of the one replay that is checked, with the calls of its modules."""
    return 1 / 3 + beside(snapshot, calls=60)


def calls_cost(snapshot: Snapshot) -> dict[str, float]:
    """Return the gradients of the replay that shows with what each module is called, by purpose."""
    return {"forward": forward_cost(snapshot), "modules": beside(snapshot, calls=25 * len(snapshot.calls))}


def sample_passes(snapshot: Snapshot, samples: int, count: float) -> float:
    """Return the gradients of forward and backward passes on a few samples: their operations cost as those of all."""
    full = gradient_time(snapshot)
    calls = START + OPERATION * work(snapshot).calls
    shapes = (call.input_shape or call.output_shape for call in snapshot.calls.values())
    batch = max((shape[0] for shape in shapes if shape), default=1)
    return count * (calls + min(1.0, samples / max(batch, 1)) * (full - calls)) / full


def products(snapshot: Snapshot, method: Method, count: float, *, tangent: bool = False) -> float:
    """Return the gradients of Hessian products on one step; ``tangent``: within the Jacobian of an optimizer step."""
    calls, vectors = (60, 4) if method == "finite_difference" else (20, 3)
    vector_work = beside(snapshot, calls=count * calls, vectors=count * vectors)
    in_pieces = method == "exact" and bool(pieces_of(snapshot))
    passes = 1 / 3 + PIECES * count if in_pieces else product_cost(method, count)
    return passes + vector_work + (push_cost(snapshot, count) if tangent else 0.0)


def push_cost(snapshot: Snapshot, count: float) -> float:
    """Return the gradients of pushing vectors through the optimizer's step, without their Hessian products."""
    rule = None if snapshot.optimizer is None else formula_of(snapshot.optimizer)
    if rule is None or snapshot.optimizer is None:
        vectors = 39  # as of Adam
    else:
        blocks = {block for group in snapshot.optimizer.param_groups for block in rule.blocks(group)}
        vectors = 15 + 6 * len(blocks) + 12 * (rule.second_moment is not None)
    return beside(snapshot, calls=30 * count, vectors=vectors * count)


def lanczos_cost(snapshot: Snapshot, method: Method, steps: int, runs: int = 1) -> float:
    """Return the gradients of Lanczos runs on a Hessian: products, and two orthogonalisations of each."""
    vector_work = beside(
        snapshot, calls=60.0 * runs * steps, vectors=runs * (1.1 * steps * (steps + 1) / 2 + 6 * steps)
    )
    return products(snapshot, method, runs * steps) + vector_work


def followed_cost(snapshot: Snapshot, method: Method, steps: float, runs: int = 1) -> float:
    """Return the gradients of following the top of a Hessian by few products, see `followed_top`."""
    vectors = runs * (4 * steps + 3)
    return products(snapshot, method, runs * steps) + beside(snapshot, calls=15.0 * runs * steps, vectors=vectors)
