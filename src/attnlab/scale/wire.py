"""What ranks say to each other: pass something on around the ring, swap pieces all to all, gather from all.

:class:`ProcessWire` speaks through ``torch.distributed`` (gloo on CPUs, NCCL on GPUs), :class:`ThreadWire` through queues between
threads of one process, which costs nothing to start. Both count the bytes that this rank sent.
"""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

#: hands out what was sent, once it is there
Receipt = Callable[[], list[Tensor]]


class Wire(ABC):
    """The connections of one rank.

    Attributes:
        rank: of this end, from 0.
        ranks: how many there are.
        sent: bytes sent to other ranks since :meth:`reset`.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.sent = rank, ranks, 0

    def reset(self) -> None:
        """Count from 0 again."""
        self.sent = 0

    def shift(self, *tensors: Tensor) -> Receipt:
        """Start sending to the next rank and receiving the same shapes from the previous one; the receipt waits for them.

        All ranks must shift in the same order.
        """
        if self.ranks == 1:
            return lambda: list(tensors)
        self._count(*tensors)
        return self._shift([x.contiguous() for x in tensors])

    def swap(self, x: Tensor) -> Tensor:
        """Send ``x[r]`` to rank r; what rank r sent arrives as ``[r]``: ``[ranks, ...]`` to the same shape."""
        if x.shape[0] != self.ranks:
            raise ValueError(
                f"x: shape {tuple(x.shape)}, but one entry of axis 0 for each of {self.ranks} ranks is wanted"
            )
        if self.ranks == 1:
            return x
        self._count(x[1:])
        return self._swap(x.contiguous())

    def gather(self, x: Tensor) -> Tensor:
        """What every rank passes, ``[ranks, ...]``."""
        if self.ranks == 1:
            return x[None]
        self._count(*[x] * (self.ranks - 1))
        return self._gather(x.contiguous())

    def agree(self, values: Mapping[str, float], device: torch.device) -> None:
        """Raise on every rank if these numbers, by name, are not the same on all; not counted as sent.

        Raises:
            ValueError: naming the first rank that differs from rank 0, and what differs.
        """
        if self.ranks == 1:
            return
        mine = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        for rank, row in enumerate(rows := self._gather(mine).tolist()):
            both = zip(values, row, rows[0], strict=True)
            if wrong := [f"{name} is {x:g} on rank {rank}, but {y:g} on rank 0" for name, x, y in both if x != y]:
                raise ValueError(f"{'; '.join(wrong)}; all ranks must pass the same")

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank is here."""

    @abstractmethod
    def _shift(self, tensors: Sequence[Tensor]) -> Receipt: ...

    @abstractmethod
    def _swap(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _gather(self, x: Tensor) -> Tensor: ...

    def _count(self, *tensors: Tensor) -> None:
        self.sent += sum(x.numel() * x.element_size() for x in tensors)


class ProcessWire(Wire):
    """Over a process group of ``torch.distributed`` that stands already; ``group`` is a part of it, by default all."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self.group = group

    def barrier(self) -> None:
        dist.barrier(self.group)

    def _shift(self, tensors: Sequence[Tensor]) -> Receipt:
        after, before = (self._global((self.rank + step) % self.ranks) for step in (1, -1))
        arriving = [torch.empty_like(x) for x in tensors]
        operations = [dist.P2POp(dist.isend, x, after, self.group) for x in tensors]
        operations += [dist.P2POp(dist.irecv, x, before, self.group) for x in arriving]
        works = dist.batch_isend_irecv(operations)  # at once: a send that waits for a receive would lock the ring

        def receipt(keep: Sequence[Tensor] = tensors) -> list[Tensor]:  # what is under way must not be freed
            for work in works:
                work.wait()
            return arriving

        return receipt

    def _swap(self, x: Tensor) -> Tensor:
        arriving = torch.empty_like(x)
        dist.all_to_all_single(arriving, x, group=self.group)
        return arriving

    def _gather(self, x: Tensor) -> Tensor:
        arriving = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(arriving, x, group=self.group)
        return torch.stack(arriving)

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class ThreadWire(Wire):
    """Between threads, on CPU tensors; made by :func:`attnlab.scale.launch.threads`."""

    def __init__(self, rank: int, ranks: int, post: Sequence[Sequence[queue.Queue]], time_limit_s: float) -> None:
        super().__init__(rank, ranks)
        self.post, self.time_limit_s = post, time_limit_s  # post[from][to]
        self.due: deque[Callable[[], None]] = (
            deque()
        )  # shifts under way, oldest first: they arrive in the order of sending

    def barrier(self) -> None:
        self._gather(torch.zeros(1))

    def _shift(self, tensors: Sequence[Tensor]) -> Receipt:
        self.post[self.rank][(self.rank + 1) % self.ranks].put([_in_transit(x) for x in tensors])
        arriving = [torch.empty_like(x) for x in tensors]  # as a process would: memory of this rank from now on
        here = False

        def arrive() -> None:
            nonlocal here
            for place, x in zip(arriving, self._take((self.rank - 1) % self.ranks), strict=True):
                place.copy_(x)
            here = True

        self.due.append(arrive)

        def receipt() -> list[Tensor]:
            while not here:
                self.due.popleft()()
            return arriving

        return receipt

    def _swap(self, x: Tensor) -> Tensor:
        for rank, piece in enumerate(x):
            self.post[self.rank][rank].put(_in_transit(piece))
        return torch.stack([self._take(rank) for rank in range(self.ranks)])

    def _gather(self, x: Tensor) -> Tensor:
        return self._swap(x[None].expand(self.ranks, *x.shape))

    def _take(self, rank: int) -> Any:
        try:
            return self.post[rank][self.rank].get(timeout=self.time_limit_s)
        except queue.Empty:
            raise TimeoutError(
                f"rank {self.rank} waited {self.time_limit_s:g} s for rank {rank}; did all ranks call the same operations?"
            ) from None


def _in_transit(x: Tensor) -> Tensor:
    """A copy that belongs to no rank: whoever counts this rank's memory does not see it."""
    with _disable_current_modes():
        return x.detach().clone()
