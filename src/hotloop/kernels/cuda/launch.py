"""Loads kernels on a device, and launches them.

A ``Call`` is a launch without its device: the kernel, its grid, its shared memory and its
arguments. ``Device.prepare`` turns it into a ``Launch``. A call of a ``Launch`` only looks up the
current stream, so it is cheap from Python; it can also be captured in a CUDA graph.
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
from hotloop.kernels.cuda.tensor_map import TensorMap

MIN_CAPABILITY = (8, 0)
"""The lowest compute capability that the kernels support."""

MAX_CONFIGS = 1024
"""Size of the LRU cache of launch configurations. A decode step has some dozens of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A launch, without its device.

    Attributes:
        kernel: The kernel.
        grid: Blocks along x, y and z.
        shared_bytes: Shared memory of a block.
        args: The kernel's argument.
        tensors: Tensors that the argument points into, which are kept alive.
        tensor_map: Encoded into the argument's ``map`` when the launch is prepared, or None.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    args: ctypes.Structure
    tensors: tuple[Tensor, ...]
    tensor_map: TensorMap | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Properties of a device that launches depend on.

    Attributes:
        n_sms: Number of multiprocessors.
        shared_bytes: The most shared memory of a block.
        bytes_per_s: The memory's nominal bandwidth; 0 if it is not known.
        warpgroups: Tensor cores can read an operand from shared memory (``wgmma``).
        boxes: One instruction can copy a box of a tensor (TMA, ``cp.async.bulk.tensor``).
    """

    n_sms: int
    shared_bytes: int
    bytes_per_s: float = 0.0
    warpgroups: bool = False
    boxes: bool = False

    @property
    def exclusive_bytes(self) -> int:
        """Shared memory of a block with which a multiprocessor has no room for a second block."""
        # A multiprocessor has 1 KB more than a block may have, and each block takes 1 KB more.
        return self.shared_bytes // 2 + 512


class Arguments(ctypes.Structure):
    """Base of the argument structs of ``*.cu``; tensors become pointers, and None becomes null."""

    TILED: ClassVar[tuple[str, ...]] = ()
    """Tensors whose first dimension may have any stride; the kernels take the stride as well."""

    _names: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        cls._names = frozenset(field[0] for field in cls._fields_)

    @classmethod
    def of(
        cls, **values: Tensor | float | ctypes.Structure | ctypes.Array[Any] | None
    ) -> tuple[Arguments, tuple[Tensor, ...]]:
        """Returns the struct, and the tensors that it points into."""
        assert values.keys() == cls._names, f"{sorted(values)} for {sorted(cls._names)}"
        tensors, raw = [], {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                read = value[0] if name in cls.TILED else value
                assert read.is_contiguous(), f"{name}: kernels read contiguous tensors"
                tensors.append(value)
                raw[name] = value.data_ptr()
            else:
                raw[name] = value
        return cls(**raw), tuple(tensors)


class LaunchError(HotloopError):
    """The driver refused a kernel or its launch."""


class PreparedLaunch(Protocol):
    """A launch that is ready to be called."""

    def __call__(self, blocks: int | None = None) -> None:
        """Launches on the current stream; ``blocks`` replaces the call's blocks along x."""
        ...


class Launcher(Protocol):
    """The part of ``Device`` that engines use, which tests implement without a GPU."""

    @property
    def limits(self) -> Limits:
        """Limits of the device."""
        ...

    def load(self, kernels: Iterable[Kernel]) -> None:
        """Compiles and loads kernels that are not loaded yet."""
        ...

    def prepare(self, call: Call, *, dependent: bool) -> PreparedLaunch:
        """Prepares a launch; a ``dependent`` one may start before its predecessor has ended."""
        ...


class Device:
    """Loads and launches kernels on one CUDA device.

    Args:
        device: The device, with its index.
        dependent_launch: Use programmatic dependent launch, in which a kernel may start before its
            predecessor has ended, where the device supports it. Results do not depend on it.

    Attributes:
        architecture: The architecture that kernels are compiled for, such as ``sm_90a``.
        limits: Limits of the device.
        compile_seconds: Seconds spent in the compiler so far, summed over threads.
        notes: Problems, to be reported in records.
    """

    def __init__(self, device: torch.device, *, dependent_launch: bool = True) -> None:
        assert device.index is not None, f"{device} has no index"
        torch.cuda.synchronize(device)  # makes torch's context current, which we share
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.architecture = compiler.architecture(properties.major, properties.minor)
        self.limits = limits_of(device)
        self.dependent_launch = dependent_launch and properties.major >= 9
        self.compile_seconds = 0.0
        self.notes: set[str] = set()
        self._functions: dict[Kernel, Any] = {}
        self._config = functools.lru_cache(MAX_CONFIGS)(_config)

    def load(self, kernels: Iterable[Kernel]) -> None:
        """Compiles kernels in parallel and loads them; skips those that are loaded already."""
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
        """Loads a kernel, and returns the driver's handle of it."""
        driver = driver_bindings()
        with torch.cuda.device(self.device):
            module = checked(driver.cuModuleLoadData(cubin))
        function = checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
        attribute = driver.CUfunction_attribute
        for name, value in (
            ("MAX_DYNAMIC_SHARED_SIZE_BYTES", self.limits.shared_bytes),
            # The same for all kernels: blocks of two kernels share a multiprocessor only if they
            # have the same carveout.
            ("PREFERRED_SHARED_MEMORY_CARVEOUT", 100),
        ):
            key = getattr(attribute, f"CU_FUNC_ATTRIBUTE_{name}")
            checked(driver.cuFuncSetAttribute(function, key, value))
        return function

    def prepare(self, call: Call, *, dependent: bool = True) -> Launch:
        """Does all work of a launch that is possible before it.

        Args:
            call: The launch; its tensors are on this device.
            dependent: The kernel may start before its predecessor in the stream has ended
                (programmatic dependent launch), where ``dependent_launch`` is on.
        """
        limit = self.limits.shared_bytes
        assert call.shared_bytes <= limit, f"{call.shared_bytes} of {limit}"
        self.load((call.kernel,))
        if call.tensor_map is not None:
            call.args.map[:] = call.tensor_map.encoded()
        return Launch(call, self, self._functions[call.kernel], dependent and self.dependent_launch)

    def config(self, call: Call, blocks: int | None, stream: int, dependent: bool) -> Any:
        """Returns the driver's configuration of a launch."""
        x, y, z = call.grid
        grid = (x if blocks is None else blocks, y, z)
        return self._config(grid, call.kernel.threads, call.shared_bytes, stream, dependent)


class Launch:
    """A prepared launch on a ``Device``."""

    def __init__(self, call: Call, device: Device, function: Any, dependent: bool) -> None:
        self.call, self._device = call, device
        self._function, self._dependent = function, dependent
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(call.args))
        self._address = ctypes.addressof(self._pointers)
        self._launch = driver_bindings().cuLaunchKernelEx

    def __call__(self, blocks: int | None = None) -> None:
        """Launches on the device's current stream.

        Args:
            blocks: Blocks of the grid along x, or None for the call's.

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
    driver = driver_bindings()
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
    """Returns why the kernels cannot run on a device, or None if they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "it is for NVIDIA GPUs"
    if (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return f"it needs compute capability {needed}, not {found}"
    if reason := compiler.unavailable_reason():
        return reason
    (major, minor), architecture = compiler.nvrtc_version(), compiler.architecture(*capability)
    if not compiler.supports(architecture):
        return f"NVRTC {major}.{minor} does not know {architecture}: update nvidia-cuda-nvrtc"
    newest = checked(driver_bindings().cuDriverGetVersion()) // 1000
    if newest < major:
        return f"the GPU's driver is for CUDA up to {newest}, and NVRTC is {major}.{minor}"
    return None


@functools.cache
def limits_of(device: torch.device) -> Limits:
    """Returns the limits of a CUDA device, without a context on it."""
    properties, driver = torch.cuda.get_device_properties(device), driver_bindings()
    index = torch.cuda.current_device() if device.index is None else device.index
    ordinal = checked(driver.cuDeviceGet(index))

    def attribute(name: str) -> int:
        key = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return checked(driver.cuDeviceGetAttribute(key, ordinal))

    kilohertz, bits = attribute("MEMORY_CLOCK_RATE"), attribute("GLOBAL_MEMORY_BUS_WIDTH")
    architecture = compiler.architecture(properties.major, properties.minor)
    return Limits(
        n_sms=properties.multi_processor_count,
        shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        bytes_per_s=2 * 1e3 * kilohertz * bits / 8,  # two transfers a cycle
        warpgroups=compiler.has_warpgroups(architecture),
        boxes=properties.major >= 9,
    )


@functools.cache
def device_of(device: torch.device) -> Device:
    """Returns the process's only ``Device`` of a CUDA device, so that kernels are loaded once."""
    return Device(device)


@functools.cache
def driver_bindings() -> Any:
    """Returns the bindings of the CUDA driver, which are imported only where there is a GPU."""
    return importlib.import_module("cuda.bindings.driver")


def checked(result: tuple[Any, ...]) -> Any:
    """Returns the value of a driver call; several values as a list.

    Raises:
        LaunchError: The driver refused.
    """
    status, *values = result
    if status.value != 0:
        raise LaunchError(f"the CUDA driver failed: {status.name}.")
    return values[0] if len(values) == 1 else values
