"""Sums, maxima and gathering over the ranks of one model.

``Group`` is one rank by itself, for which there is nothing to do; ``ProcessGroup`` is several, over
gloo on CPUs and NCCL on GPUs. The sum after a row-parallel projection is a torch operator that the
compiler does not look into, so that it can stand in compiled regions and in CUDA graphs.

A single token's activations are a few KiB, for which NCCL's latency is most of its time. Where all
ranks can read each other's memory, such small sums go through torch's symmetric memory, unless NCCL
is asked for: each rank reads the others' numbers itself, and one kernel does all of it. Ranks may
then add them in different orders and differ by rounding, which is why whatever must agree (tokens)
is decided by exact comparisons. The fused step needs neither: its kernels (``kernels.cuda.step``)
leave what they have in each other's ``inboxes``, which are symmetric memory too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from hotloop.errors import UnsupportedError
from hotloop.parallel.link import PeerError
from hotloop.types import AllReduce

SYMMETRIC_BYTES = 256 * 2**10
"""Sums up to this size go through symmetric memory; beyond, NCCL moves fewer bytes."""

_SYMMETRIC_DTYPES = (torch.bfloat16, torch.float32)

TIMEOUT = timedelta(minutes=30)
"""For ranks that compile or read at different speeds. Ranks that die are noticed by the launcher,
which does not wait for this."""


Use = Literal["sums", "choices"]
"""What ranks leave in inboxes: parts of the residual stream, or most likely tokens."""


class Group:
    """One rank by itself: sums and maxima are what they are of.

    Attributes:
        rank: Which of the group's ranks this is.
        size: How many there are.
        notes: What a reader of results must know of the choice of collectives.
    """

    rank = 0
    size = 1
    notes: tuple[str, ...] = ()

    @property
    def kernel(self) -> str | None:
        """What small sums run on, as records name it; None where there is nothing to sum."""
        return None

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of tensors of one shape, on every rank."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """Their element-wise maximum, on every rank: exact, the same bits everywhere."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All of them, [size, ...], on every rank: the same bits everywhere."""
        return x[None]

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        """All of them, [size, ...], on rank 0; None on the others."""
        return x[None]

    def inboxes(self, nbytes: int, use: Use) -> Inboxes | None:  # noqa: ARG002 (others do)
        """Memory of every rank that every rank can write into; None where there is no such thing.

        All ranks ask for as many bytes at the same time.

        Args:
            nbytes: Of each.
            use: What for.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Inboxes:
    """Memory of every rank, zeros at first.

    Attributes:
        rank: Which rank this is.
        addresses: Where it finds each rank's.
        memory: What keeps it alive.
    """

    rank: int
    addresses: Sequence[int]
    memory: object


class ProcessGroup(Group):
    """This process and its peers.

    Args:
        store: By which they find each other.
        rank: This rank.
        size: How many there are.
        device: Where its tensors are. The others' are on the same kind of device.
        all_reduce: What sums run on, on GPUs; whatever it is, NCCL takes those that are too large
            for symmetric memory, maxima and gathering, but for what the fused step does by itself.

    Raises:
        UnsupportedError: Symmetric memory was asked for and does not work here; on every rank.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        *,
        all_reduce: AllReduce = "auto",
    ) -> None:
        self.rank, self.size = rank, size
        backend = "gloo"
        if device.type == "cuda":
            backend = "nccl"
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device if backend == "nccl" else None,
        )
        world = dist.group.WORLD
        assert world is not None, "it was just made"
        self._world, self._name = world, str(world.group_name)
        self._kernel = backend
        self._buffer: Tensor | None = None
        if backend == "nccl" and all_reduce != "nccl":
            self._use_symmetric_memory(world, device, must=all_reduce == "symm_mem")

    def _use_symmetric_memory(
        self, world: dist.ProcessGroup, device: torch.device, *, must: bool
    ) -> None:
        """Where that works; else a note says why not, or an error if it ``must``."""
        self._buffer, reason = _symmetric_buffer(world, self, device)
        if self._buffer is not None:
            self._kernel = "symm_mem"
        elif must:
            raise UnsupportedError(
                f"all_reduce 'symm_mem' cannot be had here: {reason}. Use 'nccl', or 'auto', which "
                "takes what there is."
            )
        else:
            self.notes = (f"all_reduce/symm_mem not used: {reason}",)

    @property
    def kernel(self) -> str | None:
        """``gloo``, ``nccl`` or ``symm_mem``."""
        return self._kernel

    def sum(self, x: Tensor) -> Tensor:
        """As in ``Group``; through symmetric memory where that is quicker."""
        buffer = self._buffer
        if buffer is not None and x.nbytes <= buffer.nbytes and x.dtype in _SYMMETRIC_DTYPES:
            return _sum_symmetric(x, buffer, self._name)
        return _sum(x, self._name)

    def max(self, x: Tensor) -> Tensor:
        """As in ``Group``."""
        result = x.clone()
        with _peers():
            dist.all_reduce(result, dist.ReduceOp.MAX)
        return result

    def gather(self, x: Tensor) -> Tensor:
        """As in ``Group``."""
        gathered = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        with _peers():
            dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered.view(self.size, *x.shape)

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        """As in ``Group``."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        with _peers():
            dist.gather(x, parts)
        return None if parts is None else torch.stack(parts)

    def inboxes(self, nbytes: int, use: Use) -> Inboxes | None:  # noqa: ARG002 (all alike)
        """As in ``Group``: symmetric memory, where that is used."""
        if self._buffer is None:
            return None
        import torch.distributed._symmetric_memory as symm_mem

        mine = symm_mem.empty(nbytes, dtype=torch.uint8, device=self._buffer.device)
        handle = symm_mem.rendezvous(mine, self._world)
        mine.zero_()
        offset = mine.data_ptr() - handle.buffer_ptrs[self.rank]
        self.max(mine[:1])  # which no rank gets before all have come to it, with zeros
        torch.cuda.synchronize(mine.device)
        addresses = [address + offset for address in handle.buffer_ptrs]
        return Inboxes(rank=self.rank, addresses=addresses, memory=(mine, handle))


@torch.library.custom_op("hotloop_parallel::sum", mutates_args=())
def _sum(x: Tensor, group: str) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    with _peers():
        dist.all_reduce(result, group=c10d._resolve_process_group(cast(Any, group)))
    return result


# The buffer is scratch, whose content nobody is meant to see: it is not declared as mutated.
@torch.library.custom_op("hotloop_parallel::sum_symmetric", mutates_args=())
def _sum_symmetric(x: Tensor, buffer: Tensor, group: str) -> Tensor:
    mine = buffer.view(x.dtype)[: x.numel()].view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(mine, x.contiguous(), "sum", group)


@_sum.register_fake
@_sum_symmetric.register_fake
def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerError(f"a collective failed: {error}") from error


def _symmetric_buffer(
    world: dist.ProcessGroup, group: ProcessGroup, device: torch.device
) -> tuple[Tensor | None, str | None]:
    """Memory that every rank can read, tried out; or why there is none.

    Every rank takes the same way: what any of them lacks, none uses.
    """

    def agreed(reason: str | None) -> bool:
        ok = torch.tensor([reason is not None], dtype=torch.int32, device=device)
        return not bool(group.max(ok))

    reason = _symmetric_unavailable_reason(group.size, device)
    buffer = None
    if agreed(reason):
        try:
            import torch.distributed._symmetric_memory as symm_mem

            buffer = symm_mem.empty(SYMMETRIC_BYTES, dtype=torch.uint8, device=device)
            symm_mem.rendezvous(buffer, world)
            ones = torch.ones(64, dtype=torch.bfloat16, device=device)
            if not bool((_sum_symmetric(ones, buffer, world.group_name) == group.size).all()):
                reason = "a first sum came out wrong"
        except (RuntimeError, ImportError, AttributeError) as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if agreed(reason):
            return buffer, None
    return None, reason or "another rank cannot"


def _symmetric_unavailable_reason(size: int, device: torch.device) -> str | None:
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        return "the ranks are on several machines"
    for other in range(size):  # ranks of one machine take its first devices
        if other != device.index and not torch.cuda.can_device_access_peer(device, other):
            return f"{device} cannot read the memory of cuda:{other}"
    return None
