"""The processes of a run, which measure together or not at all."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lsp_callbacks.autograd._torch_internals import TorchDispatchMode
from lsp_callbacks.errors import Unmeasurable, Unsupported

T = TypeVar("T")

Report = tuple[str, tuple[bool, str] | None]


class Ranks:
    """The processes that train one model on a batch each, as under DDP; by default there is one.

    The loss of a step is the mean of the ranks' losses, so gradients and Hessian products are means, too: `mean`. Each
    rank computes its own part; what follows from the means is computed on every rank, with the same result.

    One rank may fail in its own part while the others wait for it in a collective, which would then wait for ever. So
    nobody enters a collective before all ranks have *met*. `together` is a round. In it the ranks meet at each `mean`,
    `any`, `first` and `gather`, after their own part and before the exchange, and once more at the end. At a meeting,
    one small all-reduce, each says where it stands: at such an exchange (its name, the shapes of what it brings), at
    the end, or that it has failed. If all stand at the same place, they exchange; if that is the end, the round is
    over. Otherwise the round is over for all: all raise the same error, which names the cause, and whoever catches it
    and calls another exchange in the same round gets it again, without a meeting.

    So a round ends on all ranks at the same meeting, and until then every rank comes to every meeting: whatever it does
    next is an exchange, the end, or an exception, and each of these is a meeting. Nobody waits for one who does not
    come, provided that each rank's own part comes to an end and does not itself communicate: `private` sees to that.

    Args:
        world: how many.
        rank: which one this is, from 0.
        device: of the tensors that are exchanged.

    Cost: alone none; otherwise an exchange costs one all-reduce of three numbers beside its own.
    """

    def __init__(self, world: int = 1, rank: int = 0, device: torch.device | str = "cpu"):
        self.world, self.rank, self.device = world, rank, device
        self._round = False
        self._over: Exception | None = None

    @classmethod
    def joined(cls, device: torch.device | str) -> Ranks:
        """The processes of the default process group; one where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_world_size(), dist.get_rank(), device)

    def together(self, compute: Callable[[], T]) -> T:
        """A round: ``compute`` succeeds on all ranks, and returns each rank's own result, or it raises on all.

        Inside another round it is a part of that.

        Raises:
            Unmeasurable: where it failed on some ranks; its cause on a rank that failed is that rank's own exception.
            Exception: the rank's own, where all failed alike.
        """
        if self.world == 1 or self._round:
            return compute()
        self._round, self._over = True, None
        try:
            result = self._own(compute, "the end")
            if self._over is None:
                self._meet("the end")
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
        """A round within a round: where it fails, it raises on all, and the round that it is in goes on.

        Whoever catches its exception may do so on every rank, for all leave it at the same meeting.

        Raises:
            Exception: as `together`.
        """
        if self._over is not None:  # the others have left the outer one
            raise self._over
        if self.world > 1 and self._round:  # all are here, or the outer one is over for all
            self._meet("a round within")
        outer, self._round = self._round, False
        try:
            return self.together(compute)
        finally:
            self._round = outer

    def mean(self, compute: Callable[[], tuple[Tensor, ...]], what: str) -> tuple[Tensor, ...]:
        """The mean over the ranks of each tensor that ``compute`` returns; the same bits on all ranks.

        Args:
            compute: the rank's own part.
            what: name of the exchange.
        """
        if self.world == 1:
            return compute()
        own = self._own(compute, what)
        self._meet(" ".join([what, *(f"{tuple(t.shape)} {t.dtype}" for t in own)]))
        return tuple(self.average(t) for t in own)

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks without a meeting, where none can fail before; it does not wait for the device."""
        # Sums of many half-precision numbers round too much, and not every backend has them.
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        total = (tensor.float() if half else tensor).detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return (total / self.world).to(tensor.dtype)

    def any(self, compute: Callable[[], bool], what: str) -> bool:
        """Whether it is true on any rank."""
        if self.world == 1:
            return compute()
        (share,) = self.mean(lambda: (torch.tensor(float(compute()), device=self.device),), what)
        return bool(share > 0)

    def first(self, compute: Callable[[], T], what: str) -> T:
        """What ``compute`` returns on rank 0, which alone runs it: anything that can be pickled, tensors on the CPU."""
        if self.world == 1:
            return compute()
        sent = [self._own(compute, what) if self.rank == 0 else None]
        self._meet(what)
        dist.broadcast_object_list(sent, src=0, device=torch.device(self.device))
        return sent[0]  # type: ignore[return-value]

    def gather(self, compute: Callable[[], T], what: str) -> list[T]:
        """What ``compute`` returns on each rank, by rank: anything that can be pickled, tensors on the CPU."""
        own = self._own(compute, what)
        if self.world == 1:
            return [own]
        self._meet(what)
        return self._everybodys(own)

    def private(self, compute: Callable[[], T]) -> Callable[[], T]:
        """``compute``, refused where it communicates: if a rank fails before, the others would wait for it.

        It is watched until it has succeeded once, as watching every operation takes time.

        Raises:
            Unsupported: when it is called, and does communicate.
        """
        watched = self.world > 1

        def guarded() -> T:
            nonlocal watched
            if not watched:
                return compute()
            with _Private():
                result = compute()
            watched = False
            return result

        return guarded

    def _own(self, compute: Callable[[], T], where: str) -> T:
        """The rank's own part; where it fails, the others learn of it."""
        if self._over is not None:
            raise self._over
        try:
            return compute()
        except Exception as error:
            if self.world > 1 and self._over is None:
                self._meet(where, error)
            raise

    def _meet(self, where: str, error: Exception | None = None) -> None:
        place = zlib.crc32(where.encode())
        state = torch.tensor([error is not None, place, -place], device=self.device)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        failed, most, least = state.tolist()
        if not failed and most == -least:
            return
        told = None if error is None else (isinstance(error, Unsupported), _told(error))
        reports: list[Report] = self._everybodys((where, told))
        common: Exception | None = _common(reports) or error  # which all raise alike
        assert common is not None
        if self._round:
            self._over = common
        if common is error:
            raise common
        raise common from error

    def _everybodys(self, own: Any) -> list[Any]:
        found = [None] * self.world
        dist.all_gather_object(found, own)
        return found


class _Private(TorchDispatchMode):
    """Refuses every collective of ``torch.distributed``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise Unsupported(
                f"the step communicates between processes in its forward pass ({func}: SyncBatchNorm, all_gather), so "
                "that its loss is no mean of the processes' own: measure with one process, or without what communicates"
            )
        return func(*args, **(kwargs or {}))


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, Unmeasurable) else f"{type(error).__name__}: {error}"


def _common(reports: list[Report]) -> Unmeasurable | None:
    """One error for all ranks, from what they have said; None where all have failed with the same one."""
    failures = {rank: told for rank, (_, told) in enumerate(reports) if told is not None}
    if not failures:
        places = " and ".join(f"rank {rank} at {where!r}" for rank, (where, _) in enumerate(reports))
        return Unmeasurable(f"the ranks took different paths through the measurement: {places}")
    if len(failures) == len(reports) and len(set(failures.values())) == 1:
        return None
    kind = Unsupported if all(unsupported for unsupported, _ in failures.values()) else Unmeasurable
    rank, (_, text) = next(iter(failures.items()))
    return kind(f"on rank {rank} of {len(reports)}: {text}")
