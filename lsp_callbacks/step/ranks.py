"""The processes of a run: collectives that fail on all ranks or on none."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import TorchDispatchMode
from lsp_callbacks.autograd.spread_tensors import spread_among
from lsp_callbacks.errors import Unmeasurable, Unsupported

T = TypeVar("T")

#: Where a rank is; if it has failed there, whether that is `Unsupported`, and the message.
Report = tuple[str, tuple[bool, str] | None]


class Ranks:
    """The processes that train one model on a batch each, as under DDP; by default there is one.

    The loss of a step is the mean of the ranks' losses, so gradients and Hessian products are means, too: `mean`. Each
    rank computes its own part; what follows from the means is computed on every rank, with the same result.

    If one rank raised an exception in its own part while the others wait in a collective, they would wait forever.
    Therefore every exchange (`mean`, `any`, `any_true`, `first`, `of_first`, `gather`) begins with an all-reduce of an
    error flag and of a checksum of the exchange's name and shapes: its *check*. Only if no rank has failed, and all are
    at the same exchange, do they communicate. Otherwise all ranks raise the same error, which names the cause.

    `together` makes a *round* of several exchanges, with a last check at its end, so that a function either succeeds
    on all ranks or raises on all. After an error the round is over: whoever catches the error, and calls another
    exchange in the same round, gets it again without communication. So every rank takes part in the same checks:
    whatever it does next is an exchange, the end of the round, or an exception, and each of these begins with a check.
    Nobody waits for a rank that does not come, provided that each rank's own part ends and does not itself
    communicate, which `private` ensures.

    Args:
        world: number of processes.
        rank: number of this process, from 0.
        device: device of the tensors that are exchanged.

    Cost: none for one process; otherwise one all-reduce of three numbers for each exchange, beside its own.
    """

    def __init__(self, world: int = 1, rank: int = 0, device: torch.device | str = "cpu"):
        self.world, self.rank, self.device = world, rank, device
        self._round = False
        self._over: Exception | None = None

    @classmethod
    def joined(cls, device: torch.device | str) -> Ranks:
        """Return the processes of the default process group; one if there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_world_size(), dist.get_rank(), device)

    def together(self, compute: Callable[[], T]) -> T:
        """Return each rank's own result if ``compute`` succeeds on all ranks, otherwise raise on all: one round.

        Inside another round it is a part of that.

        Raises:
            Unmeasurable: if it failed on some ranks; its cause on a rank that failed is that rank's own exception.
            Exception: the rank's own, if all failed alike.
        """
        if self.world == 1 or self._round:
            return compute()
        self._round, self._over = True, None
        try:
            result = self._own_part(compute, "the end")
            if self._over is None:
                self._check("the end")
            if self._over is not None:  # caught in ``compute``, but the others have left
                raise self._over
            return result
        except Exception as error:
            if self._over is None or error is self._over:
                raise
            raise self._over from error  # it came after the round was over: the others know nothing of it
        finally:
            self._round, self._over = False, None

    def apart(self, compute: Callable[[], T]) -> T:
        """Run a round within a round: if it fails, it raises on all ranks, and the outer round goes on.

        Its exception can be caught on every rank, as all leave it at the same check.

        Raises:
            Exception: as `together`.
        """
        if self._over is not None:  # the others have left the outer round
            raise self._over
        if self.world > 1 and self._round:  # all are here, or the outer round is over for all
            self._check("a round within")
        outer, self._round = self._round, False
        try:
            return self.together(compute)
        finally:
            self._round = outer

    def mean(self, compute: Callable[[], tuple[Tensor, ...]], what: str) -> tuple[Tensor, ...]:
        """Return the mean over the ranks of each tensor that ``compute`` returns; the same bits on all ranks.

        Args:
            compute: the rank's own part.
            what: name of the exchange, for its check and for messages.
        """
        if self.world == 1:
            return compute()
        tensors = self._own_part(compute, what)
        self._check(" ".join([what, *(f"{tuple(t.shape)} {t.dtype}" for t in tensors)]))
        return tuple(self.average(t) for t in tensors)

    def average(self, tensor: Tensor) -> Tensor:
        """Return the mean over the ranks without a check, if none can fail before; it does not wait for the device."""
        # Sums of many half-precision numbers round too much, and not every backend has them.
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        total = (tensor.float() if half else tensor).detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return (total / self.world).to(tensor.dtype)

    def any(self, compute: Callable[[], bool], what: str) -> bool:
        """Return whether ``compute`` returns True on any rank."""
        if self.world == 1:
            return compute()
        (share,) = self.mean(lambda: (torch.tensor(float(compute()), device=self.device),), what)
        return bool(share > 0)

    def any_true(self, value: bool, what: str) -> bool:
        """Return whether the value is True on any rank."""
        return value if self.world == 1 else self.any(lambda: value, what)

    def first(self, compute: Callable[[], T], what: str) -> T:
        """Return what ``compute`` returns on rank 0, which alone runs it: anything that can be pickled, on the CPU."""
        if self.world == 1:
            return compute()
        sent = [self._own_part(compute, what) if self.rank == 0 else None]
        self._check(what)
        dist.broadcast_object_list(sent, src=0, device=torch.device(self.device))
        return sent[0]  # type: ignore[return-value]

    def of_first(self, value: T, what: str) -> T:
        """Return the value that rank 0 has: anything that can be pickled, on the CPU."""
        return value if self.world == 1 else self.first(lambda: value, what)

    def gather(self, compute: Callable[[], T], what: str) -> list[T]:
        """Return what ``compute`` returns on each rank, by rank: anything that can be pickled, on the CPU."""
        part = self._own_part(compute, what)
        if self.world == 1:
            return [part]
        self._check(what)
        return self._gathered(part)

    def private(self, compute: Callable[[], T]) -> Callable[[], T]:
        """Return a function like ``compute`` that is refused if it communicates, as the ranks could wait forever.

        Its operations are watched until it has succeeded once, as that takes time.

        Raises:
            Unsupported: when it is called, and does communicate.
        """
        if self.world == 1:
            return compute
        watched = True

        def guarded() -> T:
            nonlocal watched
            if not watched:
                return compute()
            with _Private():
                result = compute()
            watched = False
            return result

        return guarded

    def checked(self) -> contextlib.AbstractContextManager:
        """Let what runs inside communicate: before each collective all ranks agree that none has failed.

        So a rank that fails on its way takes the others with it, and nobody waits. All must enter the same collectives
        in the same order, and meet at the end of a round.
        """
        return _Checked(self._check) if self.world > 1 else contextlib.nullcontext()

    def each(self, compute: Callable[[], tuple[Tensor, ...]], what: str) -> tuple[Tensor, ...]:
        """Return the tensors that ``compute`` returns on this rank, once all ranks have theirs."""
        tensors = self._own_part(compute, what)
        if self.world > 1:
            self._check(what)
        return tensors

    def _own_part(self, compute: Callable[[], T], where: str) -> T:
        """Compute the rank's own part; if it fails, say so at the check in which the others wait."""
        if self._over is not None:
            raise self._over
        try:
            return compute()
        except Exception as error:
            if self.world > 1 and self._over is None:
                self._check(where, error)
            raise

    def _check(self, where: str, error: Exception | None = None) -> None:
        """Raise the same error on all ranks unless all are at the same place and none has failed."""
        if self._over is not None:  # the others have left the round
            raise self._over
        place = zlib.crc32(where.encode())
        state = torch.tensor([error is not None, place, -place], device=self.device)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        failed, most, least = state.tolist()
        if not failed and most == -least:
            return
        failure = None if error is None else (isinstance(error, Unsupported), _message(error))
        reports: list[Report] = self._gathered((where, failure))
        common: Exception | None = _common(reports) or error  # which all raise alike
        assert common is not None
        if self._round:
            self._over = common
        if common is error:
            raise common
        raise common from error

    def _gathered(self, part: Any) -> list[Any]:
        """Return the objects of all ranks, by rank."""
        gathered = [None] * self.world
        dist.all_gather_object(gathered, part)
        return gathered


class _Private(TorchDispatchMode):
    """Refuses every collective of ``torch.distributed``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise Unsupported(
                f"the step communicates between processes in its forward pass ({func}: SyncBatchNorm, all_gather), so "
                "that its loss is not the mean of the processes' losses: measure with one process, or without these"
            )
        return func(*args, **(kwargs or {}))


#: Operators of ``torch.distributed`` that only look at what a collective gave.
_LOCAL = ("::wait_tensor", "::_wrap_tensor_autograd")


class _Checked(TorchDispatchMode):
    """Calls a function before every collective of ``torch.distributed``."""

    def __init__(self, check: Callable[[str], None]):
        super().__init__()
        self._check = check

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if spread_among(types):
            return NotImplemented  # the tensor's own code comes first, whose collectives are seen then
        if "c10d" in getattr(func, "namespace", "") and not func.name().endswith(_LOCAL):
            self._check(func.name())
        return func(*args, **(kwargs or {}))


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, Unmeasurable) else f"{type(error).__name__}: {error}"


def _common(reports: list[Report]) -> Unmeasurable | None:
    """Return one error for all ranks, from their reports; None if all have failed with the same one."""
    failures = {rank: failure for rank, (_, failure) in enumerate(reports) if failure is not None}
    if not failures:
        places = " and ".join(f"rank {rank} at {where!r}" for rank, (where, _) in enumerate(reports))
        return Unmeasurable(f"the ranks took different paths through the measurement: {places}")
    if len(failures) == len(reports) and len(set(failures.values())) == 1:
        return None
    kind = Unsupported if all(unsupported for unsupported, _ in failures.values()) else Unmeasurable
    rank, (_, text) = next(iter(failures.items()))
    return kind(f"on rank {rank} of {len(reports)}: {text}")
