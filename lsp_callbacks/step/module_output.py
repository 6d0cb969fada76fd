"""The output of one module in the forward passes of a training step, seen by a hook."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lsp_callbacks.autograd._torch_internals import in_backward_pass
from lsp_callbacks.errors import Unmeasurable


@dataclass
class _Calls:
    """The calls of one micro-batch: of each kind the output of the first, and how many there were."""

    kept: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, output: Any) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] > 1 or kind == "without gradient":
            return
        try:  # cloned, as the next layer may work in place
            self.kept[kind] = output.detach().clone() if isinstance(output, Tensor) else type(output).__name__
        except Exception as error:  # in the middle of the user's forward pass
            self.kept[kind] = f"what raised {type(error).__name__}: {error}"

    def state(self, name: str) -> Tensor:
        forward, backward = self.counts.get("forward", 0), self.counts.get("backward", 0)
        if forward + backward == 0:
            raise Unmeasurable(
                f"state={name!r}: the module was not called in the step's forward pass (in training mode, with "
                "gradients, and not inside of compiled code)"
            )
        # In the backward pass activations are recomputed. Re-entrant checkpoints call with gradients there alone, the
        # others for a second time; a call without gradients may be a re-entrant one's first, or an additional one.
        several = forward > 1 or (backward > 1 if not forward else backward and "without gradient" in self.counts)
        if several:
            raise Unmeasurable(
                f"state={name!r}: the module was called several times for one batch, and it is not clear which "
                "output is the final state: name a module that is called once"
            )
        output = self.kept["forward" if forward else "backward"]
        if not isinstance(output, Tensor) or not output.ndim:
            what = output if isinstance(output, str) else "a tensor without axes"
            raise Unmeasurable(f"state={name!r}: the module returns {what}; name one that returns a tensor of samples")
        return output


class FinalState:
    """``X_L``, the output of a module in a training step's own forward passes, one tensor for each micro-batch.

    The hook is there from the step's first forward pass until its update, and changes nothing. Replays come later, in
    copies; a validation pass in between, in eval mode, is not counted. A copy of the module that is made meanwhile, or
    a file, gets a function of the standard library that does nothing in its place.

    Args:
        name: of the module, as in ``named_modules``; "" is the root.

    Cost: one copy of the state, kept until the update; the device is not waited for.
    """

    def __init__(self, name: str):
        self.name = name
        self._root: nn.Module | None = None
        self._handle: Any = None
        self._parts: list[_Calls] = []

    def begin(self, root: nn.Module, *, first: bool) -> None:
        """Prepare for the forward pass of a micro-batch.

        Args:
            root: the module that is trained; its calls are counted in training mode only.
            first: whether it is the first micro-batch of a step.

        Raises:
            Unmeasurable: if there is no such module, or it takes no hooks.
        """
        if first:
            self.close()
            self._root, self._handle = root, submodule(root, self.name).register_forward_hook(_Hook(self))
        if self._handle is not None:
            self._parts.append(_Calls())

    def see(self, output: Any) -> None:
        """Note a call of the module."""
        if self._root is None or not self._root.training:
            return
        kind = "without gradient"
        if torch.is_grad_enabled():
            kind = "backward" if in_backward_pass() else "forward"
        self._parts[-1].add(kind, output)

    def states(self) -> list[Tensor]:
        """Return the final state of each micro-batch of the step.

        Raises:
            Unmeasurable: if it is not clear which output is the final state.
        """
        if not self._parts:
            raise Unmeasurable(
                f"state={self.name!r} was not seen: in a custom loop call Monitor.recorder.begin(module) before the "
                "step's forward pass"
            )
        return [calls.state(self.name) for calls in self._parts]

    def close(self) -> None:
        """Remove the hook, and forget what it saw."""
        if self._handle is not None:
            self._handle.remove()
        self._root, self._handle, self._parts = None, None, []

    def __reduce__(self) -> Any:  # a copy looks at no module
        return FinalState, (self.name,)


class _Hook:
    def __init__(self, owner: FinalState):
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling():  # no part of the user's compiled code
            self.owner.see(output)

    def __reduce__(self) -> Any:
        # It takes three arguments and does nothing, and a file of the user's module needs nothing of ours.
        return getattr, (contextlib.nullcontext(), "__exit__")


def submodule(root: nn.Module, name: str) -> nn.Module:
    """Return the module of that name.

    Raises:
        Unmeasurable: if there is none, or it takes no hooks.
    """
    try:
        module = root.get_submodule(name)
    except AttributeError:
        names = ", ".join(repr(other) for other, _ in root.named_modules() if other)
        raise Unmeasurable(f"state={name!r} names no module; those here are {names}; '' is the root") from None
    if isinstance(module, torch.jit.ScriptModule):
        raise Unmeasurable(f"state={name!r} is a scripted module, which takes no hooks: name another one")
    return module
