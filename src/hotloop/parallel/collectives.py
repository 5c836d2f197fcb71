"""Collectives over the ranks of one model: all-reduce, all-gather and gather.

``Group`` is a single rank, whose collectives do nothing; ``ProcessGroup`` is several ranks, over
gloo on CPUs and NCCL on GPUs. The all-reduce after a row-parallel projection is a torch operator
that is opaque to the compiler, so that compiled regions and CUDA graphs can contain it.

Ranks on the CPUs of one machine exchange their addends through shared memory
(``kernels/cpu/exchange.h``), since gloo takes a millisecond or more for an all-reduce of a single
token, and a step has two all-reduces per layer. Each rank sums the addends in float32 in the order
of ranks, so all ranks get the same bits.

On GPUs the activations of a single token are a few KiB, for which an all-reduce by NCCL is mostly
latency. If all ranks can read each other's memory, small all-reduces use torch's symmetric memory
instead, unless NCCL is requested: each rank reads the other ranks' values itself, in one kernel.
Ranks may then sum in different orders and differ by rounding; therefore tokens, on which ranks must
agree, are chosen by exact comparisons. The fused step uses neither backend: its kernels
(``kernels.cuda.step``) write to each other's ``inboxes``, which are symmetric memory too.
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
from torch import Tensor, library
from torch.distributed import distributed_c10d as c10d

from hotloop.errors import UnsupportedError
from hotloop.parallel.link import PeerError
from hotloop.parallel.shared_memory import SharedMemory
from hotloop.types import AllReduce

MAX_SYMMETRIC_BYTES = 256 * 2**10
"""The largest all-reduce through symmetric memory; NCCL moves fewer bytes for larger ones."""

_SYMMETRIC_DTYPES = (torch.bfloat16, torch.float32)

TIMEOUT = timedelta(minutes=30)
"""Time limit of a collective, for ranks that compile or load at different speeds. The launcher
detects ranks that die before this limit."""


Use = Literal["all_reduce", "argmax"]
"""The purpose of inboxes: the all-reduce of the residual stream, or the argmax of the logits."""


class Group:
    """A single rank, whose collectives return their input.

    Attributes:
        rank: This rank.
        size: The number of ranks.
        notes: Remarks on the choice of collectives, for readers of results.
    """

    rank = 0
    size = 1
    notes: tuple[str, ...] = ()

    @property
    def kernel(self) -> str | None:
        """The backend of small all-reduces, as records name it; None for a single rank."""
        return None

    @property
    def sums_in_one_order(self) -> bool:
        """Whether the bits of an element's sum do not depend on its position in a tensor."""
        return True

    def sum(self, x: Tensor) -> Tensor:
        """All-reduces tensors of one shape by addition; every rank gets the sum."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """All-reduces tensors by their element-wise maximum; every rank gets the same bits."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All-gathers the ranks' tensors, [size, ...]; every rank gets the same bits."""
        return x[None]

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        """Gathers the ranks' tensors, [size, ...], on rank 0; returns None on the others."""
        return x[None]

    def inboxes(self, nbytes: int, use: Use) -> Inboxes | None:  # noqa: ARG002 (others do)
        """Allocates memory of every rank that all ranks can write; None if that is impossible.

        All ranks call this at the same time, with the same arguments.

        Args:
            nbytes: Bytes of each rank's inbox.
            use: Use of the inboxes.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Inboxes:
    """Memory of every rank that all ranks can write, initially zeros.

    Attributes:
        rank: This rank.
        addresses: The address of each rank's inbox in this rank's address space.
        memory: The owner of the memory, which is kept alive.
    """

    rank: int
    addresses: Sequence[int]
    memory: object


class ProcessGroup(Group):
    """A rank in a process of its own, with its peers.

    Args:
        store: The store of the rendezvous.
        rank: This rank.
        size: The number of ranks.
        device: The device of this rank's tensors. All ranks have the same kind of device.
        all_reduce: All-reduce backend, for the kind of device. NCCL is always used for sums that
            are too large for symmetric memory, for maxima and for gathering. The fused step has its
            own kernels.

    Raises:
        UnsupportedError: Symmetric or shared memory was requested and does not work; raised on
            every rank.
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
        self._buffer: Tensor | None = None  # symmetric memory
        self._shared: Tensor | None = None  # shared memory
        if all_reduce == backend:
            return
        faster: AllReduce = "symm_mem" if backend == "nccl" else "shm"
        if backend == "nccl":
            self._buffer, reason = _symmetric_buffer(world, self, device)
        else:
            self._shared, reason = _shared_memory(store, self)
        if reason is None:
            self._kernel = faster
        elif all_reduce == faster:
            raise UnsupportedError(
                f"all_reduce {faster!r} does not work here: {reason}. Use {backend!r}, or 'auto', "
                f"which is {faster!r} only where that works."
            )
        else:
            self.notes = (f"all_reduce/{faster} not used: {reason}",)

    @property
    def kernel(self) -> str | None:
        """``shm``, ``gloo``, ``symm_mem`` or ``nccl``."""
        return self._kernel

    @property
    def sums_in_one_order(self) -> bool:
        """See ``Group``. With gloo or NCCL, the order of addends depends on the position."""
        return self._shared is not None

    def sum(self, x: Tensor) -> Tensor:
        """See ``Group``; uses shared memory, or symmetric memory if that is faster."""
        if self._shared is not None:
            x = x.contiguous()
            return torch.ops.hotloop_cpu.sum_over_ranks(x, self._shared, self.rank, self.size)
        buffer = self._buffer
        if buffer is not None and x.nbytes <= buffer.nbytes and x.dtype in _SYMMETRIC_DTYPES:
            return _sum_symmetric(x, buffer, self._name)
        return _sum(x, self._name)

    def max(self, x: Tensor) -> Tensor:
        """See ``Group``."""
        if self._shared is not None:
            return self.all_gather(x).amax(dim=0)
        result = x.clone()
        with _peer_errors():
            dist.all_reduce(result, dist.ReduceOp.MAX)
        return result

    def all_gather(self, x: Tensor) -> Tensor:
        """See ``Group``."""
        if self._shared is not None:
            x = x.contiguous()
            return torch.ops.hotloop_cpu.gather_over_ranks(x, self._shared, self.rank, self.size)
        gathered = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        with _peer_errors():
            dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered.view(self.size, *x.shape)

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        """See ``Group``."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        with _peer_errors():
            dist.gather(x, parts)
        return None if parts is None else torch.stack(parts)

    def inboxes(self, nbytes: int, use: Use) -> Inboxes | None:  # noqa: ARG002 (all alike)
        """See ``Group``; inboxes are symmetric memory, if that is used."""
        if self._buffer is None:
            return None
        import torch.distributed._symmetric_memory as symm_mem

        inbox = symm_mem.empty(nbytes, dtype=torch.uint8, device=self._buffer.device)
        handle = symm_mem.rendezvous(inbox, self._world)
        inbox.zero_()
        offset = inbox.data_ptr() - handle.buffer_ptrs[self.rank]
        self.max(inbox[:1])  # a barrier: every rank's inbox is zeros after it
        torch.cuda.synchronize(inbox.device)
        addresses = [address + offset for address in handle.buffer_ptrs]
        return Inboxes(rank=self.rank, addresses=addresses, memory=(inbox, handle))


@library.custom_op("hotloop_parallel::sum", mutates_args=())
def _sum(x: Tensor, group: str) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    with _peer_errors():
        dist.all_reduce(result, group=c10d._resolve_process_group(cast(Any, group)))
    return result


# The buffer is scratch memory that nothing else reads, so it is not declared as mutated.
@library.custom_op("hotloop_parallel::sum_symmetric", mutates_args=())
def _sum_symmetric(x: Tensor, buffer: Tensor, group: str) -> Tensor:
    scratch = buffer.view(x.dtype)[: x.numel()].view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(scratch, x.contiguous(), "sum", group)


@_sum.register_fake
@_sum_symmetric.register_fake
def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Converts the error of a collective into a ``PeerError``, except for lack of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerError(f"a collective failed: {error}") from error


def _agreed(group: ProcessGroup, reason: str | None, device: torch.device) -> bool:
    """Returns whether no rank has a reason against a backend, so that all ranks decide alike."""
    against = torch.tensor([reason is not None], dtype=torch.int32, device=device)
    return not bool(group.max(against))


def _shared_memory(store: dist.Store, group: ProcessGroup) -> tuple[Tensor | None, str | None]:
    """Maps memory that all ranks share, or returns why that fails; the same on all ranks."""
    shared = SharedMemory(store, group.rank, group.size)
    agreed = _agreed(group, shared.reason, torch.device("cpu"))
    shared.release_file()
    if agreed:
        return shared.tensor, None
    return None, shared.reason or "another rank cannot map it"


def _symmetric_buffer(
    world: dist.ProcessGroup, group: ProcessGroup, device: torch.device
) -> tuple[Tensor | None, str | None]:
    """Allocates memory that every rank can read, and tests it; or returns why that fails.

    All ranks decide alike: either all use it or none does.
    """
    reason = _symmetric_unavailable_reason(group.size, device)
    buffer = None
    if _agreed(group, reason, device):
        try:
            import torch.distributed._symmetric_memory as symm_mem

            buffer = symm_mem.empty(MAX_SYMMETRIC_BYTES, dtype=torch.uint8, device=device)
            symm_mem.rendezvous(buffer, world)
            ones = torch.ones(64, dtype=torch.bfloat16, device=device)
            if not bool((_sum_symmetric(ones, buffer, world.group_name) == group.size).all()):
                reason = "a test all-reduce gave a wrong sum"
        except (RuntimeError, ImportError, AttributeError) as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if _agreed(group, reason, device):
            return buffer, None
    return None, reason or "another rank cannot use symmetric memory"


def _symmetric_unavailable_reason(size: int, device: torch.device) -> str | None:
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        return "the ranks are on several machines"
    for other in range(size):  # ranks of one machine take its first devices
        if other != device.index and not torch.cuda.can_device_access_peer(device, other):
            return f"{device} cannot read the memory of cuda:{other}"
    return None
