"""Runs the CUDA kernels' own source on a CPU: slowly, but with every index and every wait in it.

``EmulatedDevice`` takes the place of a GPU in an engine, so that whole models run on the kernels.
"""

import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import Tensor

from hotloop.kernels import cpu
from hotloop.kernels.cuda.compile import SOURCES, Kernel
from hotloop.kernels.cuda.launch import Call, Limits

EMULATED = Path(__file__).with_name("emulated")

needs_compiler = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


_building: dict[Kernel, threading.Lock] = {}
_busy: set[int] = set()
_choosing = threading.Lock()


@contextmanager
def a_machine() -> Iterator[int]:
    """The number of one that is free: ranks can be threads, whose kernels wait for each other."""
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


def emulate(call: Call, late: Sequence[Tensor] = ()) -> list[tuple[int, int]]:
    """What launching ``call`` would do; its tensors are in ordinary memory.

    What is ``late`` is there only once a block has waited for the kernel before this one.

    Returns:
        What was read into the L2 cache ahead of time: addresses and bytes.
    """
    contents = [t.clone() for t in late]
    pairs = zip(late, contents, strict=True)
    copies = [Late(t.data_ptr(), content.data_ptr(), t.nbytes) for t, content in pairs]
    shape = (*call.grid, call.kernel.threads, call.shared_bytes)
    with a_machine() as number:
        library = ctypes.CDLL(str(built_for(number, call.kernel)))
        library.run(ctypes.byref(call.args), *shape, (Late * len(copies))(*copies), len(copies))
        found = (Prefetch * library.n_prefetches())()
        library.prefetches(found)
    return [(one.at, one.bytes) for one in found]


class EmulatedDevice:
    """As ``kernels.cuda.launch.Device``, with tensors in ordinary memory.

    Attributes:
        launched: Names of the kernels that were launched, and whether each could have overlapped.
    """

    limits = Limits(n_sms=3, shared_bytes=227 * 1024)
    compile_seconds = 0.0
    notes: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.launched: list[tuple[str, bool]] = []

    def load(self, kernels: Iterable[Kernel]) -> None:
        folder()  # one, before threads ask for it
        with ThreadPoolExecutor() as pool:
            list(pool.map(build, set(kernels)))

    def prepare(self, call: Call, *, dependent: bool) -> Callable[[], None]:
        def launch() -> None:
            self.launched.append((call.kernel.name, dependent))
            emulate(call)

        return launch


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    """Where libraries are built; with the kernels' source and the emulated functions."""
    made = tempfile.TemporaryDirectory(prefix="hotloop-emulated-")
    for source in (*SOURCES.glob("*.cu*"), *EMULATED.glob("*.cuh")):
        (Path(made.name) / source.name).write_text(source.read_text())
    return made


@functools.cache
def built_for(machine: int, kernel: Kernel) -> Path:
    """A copy of the library whose variables are one machine's."""
    library = build(kernel)
    return shutil.copyfile(library, library.with_suffix(f".{machine}.so"))


def build(kernel: Kernel) -> Path:
    """A shared library in which ``device.cuh`` is the CPU's."""
    with _building.setdefault(kernel, threading.Lock()):
        return _build(kernel)


@functools.cache
def _build(kernel: Kernel) -> Path:
    source = Path(folder().name) / f"{kernel.name}.cpp"
    source.write_text(
        f"{kernel.source()}\n"
        'extern "C" void run(const void* args, int x, int y, int z, int threads, int bytes,\n'
        "                    const Late* late, int n_late) {\n"
        f"  const auto kernel = [](const void* a) {{ {kernel.name}(*({kernel.args}*)a); }};\n"
        "  run_grid(kernel, args, {x, y, z}, threads, bytes, late, n_late);\n"
        "}\n"
        'extern "C" int n_prefetches() { return machine.prefetches.size(); }\n'
        'extern "C" void prefetches(Prefetch* to) {\n'
        "  std::copy(machine.prefetches.begin(), machine.prefetches.end(), to);\n"
        "}\n"
    )
    library = source.with_suffix(".so")
    flags = ("-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC")
    jumps = "-U_FORTIFY_SOURCE"  # which takes jumps between stacks for mistakes
    subprocess.run(["c++", *flags, jumps, str(source), "-o", str(library)], check=True)
    return library
