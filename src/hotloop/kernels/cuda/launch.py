"""Kernels on a device: load once, prepare a launch once, launch often.

A ``Call`` says everything about a launch but the device: the kernel, its grid, its shared memory
and its arguments. ``Device.prepare`` turns one into a ``Launch``, which only looks up the current
stream; so it can be called from Python at each step, or captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hotloop.errors import HotloopError
from hotloop.kernels.cuda import compile as compiler
from hotloop.kernels.cuda.compile import Kernel, compile_kernel

OLDEST = (8, 0)
"""Compute capability from which on the kernels run."""

MOST_CONFIGS = 1024
"""Launch configurations that are kept, the most recently used: a step has some dozens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A launch.

    Attributes:
        kernel: What is launched.
        grid: Blocks along x, y and z.
        shared_bytes: Shared memory of a block.
        args: The kernel's argument.
        tensors: What the argument points into, kept alive with it.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    args: ctypes.Structure
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What of a device decides how kernels are launched on it.

    Attributes:
        n_sms: Multiprocessors.
        shared_bytes: Shared memory that a block can have.
    """

    n_sms: int
    shared_bytes: int

    @property
    def alone_bytes(self) -> int:
        """Shared memory of a block that leaves no room for another like it beside it."""
        return self.shared_bytes // 2 + 512  # of 1 KB more, each takes 1 KB more


class Arguments(ctypes.Structure):
    """A struct of ``*.cu``; pointers are given as tensors, and absent ones as None."""

    _names: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        cls._names = frozenset(field[0] for field in cls._fields_)

    @classmethod
    def of(cls, **values: Tensor | float | None) -> tuple[Arguments, tuple[Tensor, ...]]:
        """The struct, and the tensors that it points into."""
        assert values.keys() == cls._names, f"{sorted(values)} for {sorted(cls._names)}"
        tensors, raw = [], {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous(), f"{name}: kernels read contiguous tensors"
                tensors.append(value)
                raw[name] = value.data_ptr()
            else:
                raw[name] = value
        return cls(**raw), tuple(tensors)


class LaunchError(HotloopError):
    """The driver refused a kernel or its launch."""


class PreparedLaunch(Protocol):
    """Launches a kernel on the current stream."""

    def __call__(self, blocks: int | None = None) -> None:
        """Launches it; ``blocks`` replaces the call's own number of blocks along x."""
        ...


class Launcher(Protocol):
    """What an engine needs of a ``Device``, or of a test's stand-in."""

    @property
    def limits(self) -> Limits:
        """What launches are made for."""
        ...

    def load(self, kernels: Iterable[Kernel]) -> None:
        """Compiles and loads what is not loaded yet."""
        ...

    def prepare(self, call: Call, *, dependent: bool) -> PreparedLaunch:
        """What launches ``call``; if ``dependent``, perhaps before its predecessor has ended."""
        ...


class Device:
    """Loads and launches kernels on one CUDA device.

    Args:
        device: Which one, with its index.
        dependent_launch: Kernels may start before their predecessors have ended, where the device
            can do that. Without it they do the same, one after the other.

    Attributes:
        architecture: What kernels are compiled for, such as ``sm_90``.
        limits: What launches are made for.
        compile_seconds: Threads' time spent in the compiler so far.
        notes: What went otherwise than it should, for records.
    """

    def __init__(self, device: torch.device, *, dependent_launch: bool = True) -> None:
        assert device.index is not None, f"which of the devices, {device}?"
        driver = _driver()
        torch.cuda.synchronize(device)  # makes torch's context current: ours is the same
        optin = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        ordinal = _checked(driver.cuDeviceGet(device.index))
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.architecture = f"sm_{properties.major}{properties.minor}"
        self.limits = Limits(
            n_sms=properties.multi_processor_count,
            shared_bytes=_checked(driver.cuDeviceGetAttribute(optin, ordinal)),
        )
        self.dependent_launch = dependent_launch and properties.major >= 9
        self.compile_seconds = 0.0
        self.notes: set[str] = set()
        self._functions: dict[Kernel, Any] = {}
        self._config = functools.lru_cache(MOST_CONFIGS)(_config)

    def load(self, kernels: Iterable[Kernel]) -> None:
        """Compiles kernels, all at once, and loads them; what is loaded already stays."""
        missing = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._functions]
        if not missing:
            return
        with ThreadPoolExecutor() as pool:
            compiled = list(pool.map(lambda k: compile_kernel(k, self.architecture), missing))
        for kernel, code in zip(missing, compiled, strict=True):
            self.compile_seconds += code.seconds
            if code.note:
                self.notes.add(code.note)
            self._functions[kernel] = self._load(kernel, code.cubin)

    def _load(self, kernel: Kernel, cubin: bytes) -> Any:
        """The driver's handle of a kernel."""
        driver = _driver()
        with torch.cuda.device(self.device):
            module = _checked(driver.cuModuleLoadData(cubin))
        function = _checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
        attribute = driver.CUfunction_attribute
        for name, value in (
            ("MAX_DYNAMIC_SHARED_SIZE_BYTES", self.limits.shared_bytes),
            # The same for all kernels: a multiprocessor can only hold blocks of two kernels at a
            # time if it need not be divided anew between them.
            ("PREFERRED_SHARED_MEMORY_CARVEOUT", 100),
        ):
            of = getattr(attribute, f"CU_FUNC_ATTRIBUTE_{name}")
            _checked(driver.cuFuncSetAttribute(function, of, value))
        return function

    def prepare(self, call: Call, *, dependent: bool = True) -> Launch:
        """Everything about a launch that can be done beforehand.

        Args:
            call: What to launch; its tensors are on this device.
            dependent: The kernel may start before its predecessor in the stream has ended
                (programmatic dependent launch), where that is on.
        """
        limit = self.limits.shared_bytes
        assert call.shared_bytes <= limit, f"{call.shared_bytes} of {limit}"
        self.load((call.kernel,))
        return Launch(call, self, self._functions[call.kernel], dependent and self.dependent_launch)

    def config(self, call: Call, blocks: int | None, stream: int, dependent: bool) -> Any:
        """What the driver is told of a launch besides its arguments."""
        x, y, z = call.grid
        grid = (x if blocks is None else blocks, y, z)
        return self._config(grid, call.kernel.threads, call.shared_bytes, stream, dependent)


class Launch:
    """A prepared launch: call it."""

    def __init__(self, call: Call, device: Device, function: Any, dependent: bool) -> None:
        self.call, self._device = call, device
        self._function, self._dependent = function, dependent
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(call.args))
        self._address = ctypes.addressof(self._pointers)
        self._launch = _driver().cuLaunchKernelEx

    def __call__(self, blocks: int | None = None) -> None:
        """Launches on the device's current stream.

        Args:
            blocks: Blocks of the grid along x, where they are not the call's.

        Raises:
            LaunchError: The driver refused.
        """
        device = self._device.device
        stream = torch.cuda.current_stream(device).cuda_stream
        config = self._device.config(self.call, blocks, stream, self._dependent)
        with torch.cuda.device(device):
            (status,) = self._launch(config, self._function, self._address, 0)
        if status.value != 0:
            raise LaunchError(
                f"launching {self.call.kernel.name} failed: {status.name} (grid {self.call.grid}, "
                f"blocks {blocks}, {self.call.shared_bytes} bytes of shared memory)."
            )


def _config(
    grid: tuple[int, int, int], threads: int, shared_bytes: int, stream: int, dependent: bool
) -> Any:
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = stream
    if dependent:
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        value = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        config.attrs = [attribute]
        config.numAttrs = 1
    return config


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None if they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "it is for NVIDIA GPUs"
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST:
        found, needed = (".".join(map(str, version)) for version in (capability, OLDEST))
        return f"it needs compute capability {needed}, not {found}"
    if reason := compiler.unavailable_reason():
        return reason
    (major, minor), architecture = compiler.nvrtc_version(), f"sm_{''.join(map(str, capability))}"
    if not compiler.knows(architecture):
        return f"NVRTC {major}.{minor} does not know {architecture}: update nvidia-cuda-nvrtc"
    newest = _checked(_driver().cuDriverGetVersion()) // 1000
    if newest < major:
        return f"the GPU's driver is for CUDA up to {newest}, and NVRTC is {major}.{minor}"
    return None


@functools.cache
def device_of(device: torch.device) -> Device:
    """The one ``Device`` of a CUDA device: kernels are loaded once."""
    return Device(device)


@functools.cache
def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status.value != 0:
        raise LaunchError(f"the CUDA driver failed: {status.name}.")
    return values[0] if values else None
