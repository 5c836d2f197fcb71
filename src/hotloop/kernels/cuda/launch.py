"""Kernels on a device: load once, prepare a launch once, launch often.

A ``Call`` says everything about a launch but the device: the kernel, its grid, its shared memory
and its arguments. ``Device.prepare`` turns one into a ``Launch``, which only looks up the current
stream; so it can be called from Python at each step, or captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hotloop.errors import HotloopError
from hotloop.kernels.cuda.compile import Kernel, compile_kernel


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


class Arguments(ctypes.Structure):
    """A struct of ``*.cu``; pointers are given as tensors, and absent ones as None."""

    @classmethod
    def of(cls, **values: Tensor | float | None) -> tuple[Arguments, tuple[Tensor, ...]]:
        """The struct, and the tensors that it points into."""
        names = [field[0] for field in cls._fields_]
        assert sorted(values) == sorted(names), f"{sorted(values)} for {sorted(names)}"
        tensors = tuple(v for v in values.values() if isinstance(v, Tensor))
        assert all(t.is_contiguous() for t in tensors), "kernels read contiguous tensors"
        raw = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()}
        return cls(**raw), tensors


class LaunchError(HotloopError):
    """The driver refused a kernel or its launch."""


class Device:
    """Loads and launches kernels on one CUDA device.

    Attributes:
        architecture: What kernels are compiled for, such as ``sm_90``.
        n_sms: Multiprocessors.
        shared_bytes: Shared memory that a block can have.
        compile_seconds: Time spent in the compiler so far.
        notes: What went otherwise than it should, for records.
    """

    def __init__(self, device: torch.device) -> None:
        assert device.index is not None, f"which of the devices, {device}?"
        driver = _driver()
        torch.cuda.synchronize(device)  # makes torch's context current: ours is the same
        optin = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        ordinal = _checked(driver.cuDeviceGet(device.index))
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.architecture = f"sm_{properties.major}{properties.minor}"
        self.n_sms = properties.multi_processor_count
        self.shared_bytes = _checked(driver.cuDeviceGetAttribute(optin, ordinal))
        self.has_dependent_launch = properties.major >= 9
        self.compile_seconds = 0.0
        self.notes: set[str] = set()
        self._functions: dict[Kernel, Any] = {}

    def load(self, kernel: Kernel) -> Any:
        """The driver's handle of a kernel, which is compiled if need be."""
        driver = _driver()
        if kernel in self._functions:
            return self._functions[kernel]
        compiled = compile_kernel(kernel, self.architecture)
        self.compile_seconds += compiled.seconds
        if compiled.note:
            self.notes.add(compiled.note)
        with torch.cuda.device(self.device):
            module = _checked(driver.cuModuleLoadData(compiled.cubin))
        function = _checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
        attribute = driver.CUfunction_attribute
        for name, value in (
            ("MAX_DYNAMIC_SHARED_SIZE_BYTES", self.shared_bytes),
            # The same for all kernels: a multiprocessor can only hold blocks of two kernels at a
            # time if it need not be divided anew between them.
            ("PREFERRED_SHARED_MEMORY_CARVEOUT", 100),
        ):
            of = getattr(attribute, f"CU_FUNC_ATTRIBUTE_{name}")
            _checked(driver.cuFuncSetAttribute(function, of, value))
        self._functions[kernel] = function
        return function

    def prepare(self, call: Call, *, dependent: bool = True) -> Launch:
        """Everything about a launch that can be done beforehand.

        Args:
            call: What to launch; its tensors are on this device.
            dependent: The kernel may start before its predecessor in the stream has ended
                (programmatic dependent launch), where the device can do that.
        """
        driver = _driver()
        assert call.shared_bytes <= self.shared_bytes, f"{call.shared_bytes} of {self.shared_bytes}"
        function = self.load(call.kernel)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = call.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = call.kernel.threads, 1, 1
        config.sharedMemBytes = call.shared_bytes
        if dependent and self.has_dependent_launch:
            attribute = driver.CUlaunchAttribute()
            attribute.id = (
                driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            value = driver.CUlaunchAttributeValue()
            value.programmaticStreamSerializationAllowed = 1
            attribute.value = value
            config.attrs = [attribute]
            config.numAttrs = 1
        return Launch(call, function, config, self.device)


class Launch:
    """A prepared launch: call it."""

    def __init__(self, call: Call, function: Any, config: Any, device: torch.device) -> None:
        driver = _driver()
        self.call, self.device = call, device
        self._function, self._config = function, config
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(call.args))
        self._address = ctypes.addressof(self._pointers)
        self._launch = driver.cuLaunchKernelEx

    def __call__(self) -> None:
        """Launches on the device's current stream.

        Raises:
            LaunchError: The driver refused.
        """
        self._config.hStream = torch.cuda.current_stream(self.device).cuda_stream
        (status,) = self._launch(self._config, self._function, self._address, 0)
        if status.value != 0:
            raise LaunchError(
                f"launching {self.call.kernel.name} failed: {status.name} (grid {self.call.grid}, "
                f"{self.call.shared_bytes} bytes of shared memory)."
            )


@functools.cache
def device_of(device: torch.device) -> Device:
    """The one ``Device`` of a CUDA device: kernels are loaded once."""
    return Device(device)


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status.value != 0:
        raise LaunchError(f"the CUDA driver failed: {status.name}.")
    return values[0] if values else None
