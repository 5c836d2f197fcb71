"""Memory that the ranks of one machine share, for the exchanges of ``kernels.cpu``.

It is an anonymous file of rank 0 (memfd), which the other ranks open through rank 0's process. The
file never has a name, so nothing remains of it, however the ranks end.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor

from hotloop.kernels import cpu

_KEY = "shared_memory"

_SECRET_BYTES = 16
"""Random bytes behind the exchanges, by which a rank verifies that it opened the right file: on
another machine or in another container, the process id may belong to another process."""


class SharedMemory:
    """Memory that all ranks map, initially zeros. All ranks create it at the same time.

    Args:
        store: The store of the rendezvous.
        rank: This rank.
        n_ranks: The number of ranks.

    Attributes:
        tensor: The memory, uint8; None if this rank cannot map it.
        reason: Why it cannot be mapped; None if it can.
    """

    def __init__(self, store: dist.Store, rank: int, n_ranks: int) -> None:
        self.tensor: Tensor | None = None
        self.reason = cpu.unavailable_reason()
        self._file: int | None = None
        if self.reason is None and not hasattr(os, "memfd_create"):
            self.reason = "it needs Linux"
        try:
            if rank == 0:
                store.set(_KEY, json.dumps(None if self.reason else self._create(n_ranks)))
            elif (where := json.loads(store.get(_KEY))) and self.reason is None:
                self._open(*where)
        except OSError as error:
            self.reason = str(error)
            if rank == 0:
                store.set(_KEY, json.dumps(None))

    def release_file(self) -> None:
        """Closes the file, which all ranks have mapped."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _create(self, n_ranks: int) -> tuple[int, int, str]:
        """Creates the memory on rank 0; returns process id, file descriptor and secret (hex)."""
        n_bytes = torch.ops.hotloop_cpu.exchange_bytes(n_ranks)
        self._file = os.memfd_create("hotloop ranks")
        os.ftruncate(self._file, n_bytes + _SECRET_BYTES)
        secret = secrets.token_bytes(_SECRET_BYTES)
        os.pwrite(self._file, secret, n_bytes)
        self._map(self._file)
        return os.getpid(), self._file, secret.hex()

    def _open(self, process: int, file: int, secret: str) -> None:
        """Maps the memory of rank 0."""
        path = f"/proc/{process}/fd/{file}"
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with suppress(ValueError):  # not a file, or an empty one
                self._map(opened)
            if self.tensor is None or bytes(self.tensor[-_SECRET_BYTES:]).hex() != secret:
                self.tensor, self.reason = None, f"{path} is not rank 0's memory"
        finally:
            os.close(opened)

    def _map(self, file: int) -> None:
        """Maps the whole file as ``tensor``, which keeps the mapping alive."""
        self.tensor = torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8)
