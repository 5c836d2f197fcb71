"""Runs the CUDA kernels' own source on a CPU: slowly, but with all of its indexing and waits.

``EmulatedDevice`` replaces a GPU in an engine, so that whole models run on the kernels.
"""

import ctypes
import dataclasses
import functools
import itertools
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cached_builds import digest, kept_folder
from torch import Tensor

from hotloop.kernels import cpu
from hotloop.kernels.cuda.compile import SOURCES, Kernel
from hotloop.kernels.cuda.launch import Call, Limits, PreparedLaunch

EMULATED = Path(__file__).with_name("emulated")

ALIGNMENT = 128
"""Of arguments, whose type can be ``PlainRowsArgs``."""

FLAGS = (
    *("-std=c++20", "-O1", "-ffp-contract=off", "-w", "-Wno-psabi", "-fPIC"),
    "-U_FORTIFY_SOURCE",  # it rejects jumps between stacks
)
RUN = """
extern "C" void run(const void* args, int x, int y, int z, int threads, int bytes,
                    const Late* late, int n_late) {
  const auto kernel = [](const void* a) { NAME(*(ARGS*)a); };
  run_grid(kernel, args, {x, y, z}, threads, bytes, late, n_late);
}
extern "C" int n_prefetches() { return machine.prefetches.size(); }
extern "C" void prefetches(Prefetch* to) {
  std::copy(machine.prefetches.begin(), machine.prefetches.end(), to);
}
"""

needs_compiler = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


_building: dict[Kernel, threading.Lock] = {}
_busy: set[int] = set()
_choosing = threading.Lock()


@contextmanager
def acquire_machine() -> Iterator[int]:
    """Yields the number of a free machine: ranks can be threads, whose kernels run together."""
    with _choosing:
        number = next(i for i in itertools.count() if i not in _busy)
        _busy.add(number)
    try:
        yield number
    finally:
        _busy.remove(number)


class Late(ctypes.Structure):
    _fields_ = (("to", ctypes.c_void_p), ("from_", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class Prefetch(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class EncodedMap(ctypes.Structure):
    """``TensorMap`` of the emulation."""

    _fields_ = (
        ("tensor", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("sizes", ctypes.c_int32 * 4),
        ("box", ctypes.c_int32 * 4),
    )


def arguments(call: Call) -> ctypes.Array[ctypes.c_char]:
    """Copies a launch's argument to where a compiler may expect it, with its map encoded."""
    size = ctypes.sizeof(call.args)
    memory = ctypes.create_string_buffer(size + ALIGNMENT)
    aligned = (ctypes.c_char * size).from_buffer(memory, -ctypes.addressof(memory) % ALIGNMENT)
    ctypes.memmove(aligned, ctypes.byref(call.args), size)
    if (of := call.tensor_map) is not None:
        encoded = EncodedMap(of.tensor.data_ptr(), of.strides, of.sizes, of.box)
        at = type(call.args).map.offset
        ctypes.memmove(ctypes.byref(aligned, at), ctypes.byref(encoded), ctypes.sizeof(encoded))
    return aligned


def emulate(call: Call, late: Sequence[Tensor] = ()) -> list[tuple[int, int]]:
    """Executes a launch, whose tensors are in ordinary memory.

    The tensors ``late`` hold their values only after a block has waited for the kernel before.

    Returns:
        The prefetches into L2: addresses and bytes.
    """
    contents = [t.clone() for t in late]
    pairs = zip(late, contents, strict=True)
    copies = [Late(t.data_ptr(), content.data_ptr(), t.nbytes) for t, content in pairs]
    shape = (*call.grid, call.kernel.threads, call.shared_bytes)
    with acquire_machine() as number:
        library = ctypes.CDLL(str(built_for(number, call.kernel)))
        library.run(arguments(call), *shape, (Late * len(copies))(*copies), len(copies))
        found = (Prefetch * library.n_prefetches())()
        library.prefetches(found)
    return [(one.at, one.bytes) for one in found]


class EmulatedDevice:
    """Implements ``kernels.cuda.launch.Launcher`` on a CPU.

    Attributes:
        launched: Names of the kernels that were launched, and whether each could have overlapped.
    """

    limits = Limits(n_sms=3, shared_bytes=227 * 1024)
    compile_seconds = 0.0
    notes: frozenset[str] = frozenset()

    def __init__(self, limits: Limits = limits) -> None:
        self.limits = limits
        self.launched: list[tuple[str, bool]] = []

    def load(self, kernels: Iterable[Kernel]) -> None:
        sources()  # once, before the threads call it
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(build, set(kernels)))

    def prepare(self, call: Call, *, dependent: bool) -> PreparedLaunch:
        def launch(blocks: int | None = None) -> None:
            self.launched.append((call.kernel.name, dependent))
            x, y, z = call.grid
            emulate(dataclasses.replace(call, grid=(x if blocks is None else blocks, y, z)))

        return launch


@functools.cache
def copies() -> tempfile.TemporaryDirectory:
    """Makes the folder of this process's copies of libraries."""
    return tempfile.TemporaryDirectory(prefix="hotloop-emulated-")


@functools.cache
def built_for(machine: int, kernel: Kernel) -> Path:
    """Copies a library, so that each machine has variables of its own."""
    return shutil.copyfile(build(kernel), Path(copies().name) / f"{kernel.name}.{machine}.so")


def build(kernel: Kernel) -> Path:
    """Builds a shared library with the emulated ``device.cuh``, unless it is in the cache."""
    with _building.setdefault(kernel, threading.Lock()):
        return _build(kernel)


@functools.cache
def _build(kernel: Kernel) -> Path:
    text = kernel.source() + RUN.replace("NAME", kernel.name).replace("ARGS", kernel.args)
    library = sources() / f"{kernel.name}-{digest(text)}.so"
    if not library.exists():
        # Included first: a precompiled header is used only if no other header includes it.
        compile_to(library, "-shared", "-include", "device.cuh", "-x", "c++", "-", text=text)
    return library


@functools.cache
def sources() -> Path:
    """Makes a folder in the cache with the kernels' source and the precompiled emulation."""
    files = {path.name: path.read_text() for path in SOURCES.glob("*.cu*")}
    files |= {path.name: path.read_text() for path in EMULATED.glob("*.cuh")}
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True)
    texts = (*itertools.chain(*sorted(files.items())), *FLAGS, compiler.stdout)
    folder = kept_folder("emulated-kernels", *texts)
    for name, text in files.items():
        if not (folder / name).exists():
            scratch = folder / f"{name}.{threading.get_native_id()}"
            scratch.write_text(text)
            scratch.replace(folder / name)
    if not (folder / "device.cuh.gch").exists():
        compile_to(folder / "device.cuh.gch", "-x", "c++-header", "device.cuh")
    return folder


def compile_to(path: Path, *arguments: str, text: str | None = None) -> None:
    """Compiles to ``path``, which appears once it is complete."""
    scratch = path.with_suffix(f".{threading.get_native_id()}{path.suffix}")
    command = ("c++", *FLAGS, *arguments, "-o", scratch.name)
    subprocess.run(command, cwd=path.parent, input=text, text=True, check=True)
    scratch.replace(path)
