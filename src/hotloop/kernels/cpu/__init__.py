"""Decode kernels for CPUs: C++ compiled on the user's machine, and registered as torch operators.

They need a C++20 compiler, as does torch.compile on a CPU. They are built in a few seconds, once
per source, compiler, instruction set and torch version, and cached in the user's cache directory.
If they cannot be built, ``unavailable_reason`` returns why, and other kernels are used.

The operators are ``torch.ops.hotloop_cpu.*``: matrix products, embeddings, attention over the
cache, norms, rope and SwiGLU, each specified by ``kernels.reference``; the attention and
feed-forward halves of a block, which combine these; and exchanges with other ranks through shared
memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, library

from hotloop.cache import cache_path

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-ignored-attributes",
    "-shared",
    "-fPIC",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11
)

BUILD_LIMIT_S = 300
"""Time limit of the compiler."""

_BUILD_PREFIX = "build-"

SLOWER = "decoding is several times slower"
"""The consequence if the operators cannot be used, for messages."""


@contextlib.contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Runs PyTorch's operators on the calling thread; hotloop's operators keep their threads.

    PyTorch uses OpenMP's threads, which assume an otherwise idle machine: a parallel loop lasts as
    long as its slowest thread, and afterwards the threads spin for many milliseconds, which takes
    processors from the caller and from our threads.
    """
    torch.ops.hotloop_cpu.keep_threads(True)
    try:
        yield
    finally:
        torch.ops.hotloop_cpu.keep_threads(False)


@functools.cache
def unavailable_reason() -> str | None:
    """Loads the operators; returns why they cannot be used, or None if they can."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return f"no C++ compiler found, so {SLOWER} (install g++, or set CXX)"
    try:
        torch.ops.load_library(_build(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        end = detail.strip()[-500:]
        return f"building the CPU kernels with {compiler} failed, so {SLOWER}: {end}"
    _register_shapes()
    return None


def _build(compiler: str) -> Path:
    """Builds the shared library, unless it is in the cache; returns its path."""
    torch_dir = Path(torch.__file__).parent
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    # -march=native: processors that share a home directory may need different libraries.
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    identity = (*sources, version, torch.__version__, _processor(), *FLAGS)
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    library = cache_path("kernels", f"cpu-{key}.so")
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(library.parent)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=_BUILD_PREFIX) as scratch:
        built = Path(scratch) / library.name
        lib_dir = torch_dir / "lib"
        subprocess.run(
            [
                *(compiler, *FLAGS, f"-I{torch_dir / 'include'}", str(SOURCE), "-o", str(built)),
                *(f"-L{lib_dir}", "-ltorch_cpu", f"-Wl,-rpath,{lib_dir}"),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=BUILD_LIMIT_S,
        )
        built.replace(library)  # atomic: another process sees all of it or none
    return library


def _remove_abandoned(folder: Path) -> None:
    """Removes the files of builds whose processes were killed."""
    for path in folder.glob(f"{_BUILD_PREFIX}*"):
        with contextlib.suppress(OSError):  # another process removes it
            if time.time() - path.stat().st_mtime > 2 * BUILD_LIMIT_S:
                shutil.rmtree(path)


def _processor() -> str:
    """Identifies the processor, on which -march=native depends."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    return "\n".join(s for s in lines if s.startswith(("model name", "flags", "Features")))


def _register_shapes() -> None:
    """Registers the shape of each operator's result for torch.compile."""

    def linear_rows(x: Tensor, values: Tensor, _: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], values.shape[0])

    def linear_groups(x: Tensor, _: Tensor, blocks: Tensor, n: int) -> Tensor:  # noqa: ARG001
        return x.new_empty(x.shape[0], n)

    def embed_groups(ids: Tensor, _: Tensor, blocks: Tensor, k: int) -> Tensor:  # noqa: ARG001
        return ids.new_empty(*ids.shape, k, dtype=torch.bfloat16)

    def like_first(x: Tensor, *_: Tensor | int | float) -> Tensor:
        return torch.empty_like(x)

    def gather_over_ranks(x: Tensor, _: Tensor, rank: int, ranks: int) -> Tensor:  # noqa: ARG001
        return x.new_empty(ranks, *x.shape)

    library.register_fake("hotloop_cpu::linear_rows", linear_rows)
    library.register_fake("hotloop_cpu::sum_over_ranks", like_first)
    library.register_fake("hotloop_cpu::gather_over_ranks", gather_over_ranks)
    library.register_fake("hotloop_cpu::linear_groups", linear_groups)
    library.register_fake("hotloop_cpu::embed_groups", embed_groups)
    library.register_fake("hotloop_cpu::decode_attention", like_first)
