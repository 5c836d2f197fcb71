"""Compiles CUDA C++ by NVRTC, which needs neither a compiler nor CUDA headers on the machine.

A kernel is an instance of a device function of one of the ``.cu`` files. Each kernel is compiled
separately, so that unused instances cost nothing, and cached in the user's cache directory under a
hash of its source, options and compiler. A cached file holds its checksum; a damaged file is
replaced.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotloop.cache import cache_path, writable_cache_dir
from hotloop.errors import HotloopError
from hotloop.writing import make_folder, replacing

SOURCES = Path(__file__).parent
HEADERS = ("device.cuh", "pointwise.cuh", "operand.cuh", "weights.cuh", "linear.cuh")
OPTIONS = (
    "--std=c++17",
    # The source, not the compiler, decides which multiplications and additions are fused: kernels
    # for different numbers of rows must compute the same bits.
    "--fmad=false",
)
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
"""Architectures for which tests compile kernels. Kernels run on others too, if NVRTC supports them.
"""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An instance of a device function.

    Attributes:
        name: Name of the entry point, as profilers show it.
        file: File of the device function.
        function: The function, with its template arguments.
        args: Its argument struct.
        threads: Threads of a block.
        registers: The most registers of a thread, or None for no limit.
    """

    name: str
    file: str
    function: str
    args: str
    threads: int
    registers: int | None = None

    def source(self) -> str:
        """Returns a translation unit with the entry point."""
        bounds = f"__launch_bounds__({self.threads}, 1)"  # all registers of a multiprocessor
        if self.registers is not None:
            bounds = f"__maxnreg__({self.registers})"
        return (
            f'#include "{self.file}"\n'
            f'extern "C" __global__ void {bounds}\n'
            f"{self.name}(const __grid_constant__ {self.args} args) {{ {self.function}(args); }}\n"
        )


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        cubin: Machine code for one architecture.
        seconds: Time spent in the compiler; 0 if it came from the cache.
        note: Why it could not be cached, or None.
    """

    cubin: bytes
    seconds: float
    note: str | None = None


class CompileError(HotloopError):
    """NVRTC refused a kernel; the message holds its log."""


@functools.cache
def unavailable_reason() -> str | None:
    """Returns why kernels cannot be compiled here, or None if they can."""
    if (
        importlib.util.find_spec("cuda") is None
        or importlib.util.find_spec("cuda.bindings") is None
    ):
        return "cuda-bindings is not installed (pip install 'hotloop[cuda]')"
    try:
        nvrtc_version()
    except (RuntimeError, OSError, HotloopError) as error:
        return f"NVRTC cannot be loaded (pip install 'hotloop[cuda]'): {error}"
    return None


def architecture(major: int, minor: int) -> str:
    """Returns the architecture of a compute capability; ``sm_90a`` for Hopper, to use ``wgmma``."""
    return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def has_warpgroups(architecture: str) -> bool:
    """Returns whether kernels can use ``wgmma``."""
    return architecture == "sm_90a"


def supports(architecture: str) -> bool:
    """Returns whether this NVRTC compiles for an architecture."""
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")

    return architecture.rstrip("a") in {
        f"sm_{number}" for number in _checked(nvrtc.nvrtcGetSupportedArchs())
    }


def compile_kernel(kernel: Kernel, architecture: str) -> Compiled:
    """Compiles a kernel, or reads it from the cache.

    Args:
        kernel: The kernel.
        architecture: The architecture, such as ``sm_90a``.

    Raises:
        CompileError: NVRTC refused it.
    """
    files = {name: (SOURCES / name).read_text() for name in (*HEADERS, kernel.file)}
    options = (*OPTIONS, f"--gpu-architecture={architecture}")
    identity = (*files.values(), kernel.source(), *options, str(nvrtc_version()))
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    name = f"{kernel.name}-{architecture}-{key}.cubin"
    if (cubin := _read(name)) is not None:
        return Compiled(cubin=cubin, seconds=0.0)
    started = time.perf_counter()
    cubin = _compile(kernel, files, options)
    seconds = time.perf_counter() - started
    return Compiled(cubin=cubin, seconds=seconds, note=_write(name, cubin))


def _read(name: str) -> bytes | None:
    """Reads a cached file; returns None if it is missing or damaged."""
    try:
        content = cache_path("kernels", name).read_bytes()
    except OSError:
        return None
    checksum, cubin = content[:32], content[32:]
    return cubin if hashlib.sha256(cubin).digest() == checksum else None


def _write(name: str, cubin: bytes) -> str | None:
    """Caches machine code; returns the reason if that fails, which costs only time."""
    try:
        folder = make_folder(writable_cache_dir() / "kernels")
        with replacing(folder / name) as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
    except (OSError, HotloopError) as error:
        return f"compiled kernels are not kept: {error}"
    return None


def _compile(kernel: Kernel, files: dict[str, str], options: tuple[str, ...]) -> bytes:
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")

    program = _checked(
        nvrtc.nvrtcCreateProgram(
            kernel.source().encode(),
            f"{kernel.name}.cu".encode(),
            len(files),
            [text.encode() for text in files.values()],
            [name.encode() for name in files],
        )
    )
    try:
        flags = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise CompileError(
                f"NVRTC could not compile {kernel.name} with {' '.join(options)}: "
                f"{log.decode(errors='replace').strip()[:2000]}"
            )
        cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Returns the version of CUDA that NVRTC belongs to, such as (13, 0)."""
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")

    major, minor = _checked(nvrtc.nvrtcVersion())
    return major, minor


def _checked(result: tuple[Any, ...]) -> Any:
    """Checks the status of an NVRTC call, and returns its other results."""
    status, *values = result
    if status.value != 0:
        raise CompileError(f"NVRTC failed: {status.name}.")
    return values[0] if len(values) == 1 else values
