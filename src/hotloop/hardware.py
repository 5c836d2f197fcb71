"""The machine: its devices, memory, read bandwidth and provenance.

Decoding at small batch is bound by memory reads, so a speed means little without the bandwidth of
the device. This module measures it, on CPUs and GPUs, and quotes the vendor's figure if the device
is known. :func:`provenance` collects the facts that are needed to judge or to repeat a measurement,
and leaves out facts that identify a person or a host.

Nothing here changes the machine: it locks no clocks and sets no power limits.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hotloop.cache import code_hash
from hotloop.errors import ConfigError, UnsupportedError, shorten_value

if TYPE_CHECKING:
    import torch

GB = 1e9

DATASHEET_BYTES_PER_S = {
    # From vendors' datasheets and product pages, by the name that the driver reports, without
    # "NVIDIA ", "Tesla " and "GeForce ". Names must match exactly: a laptop GPU or a MIG slice
    # whose name begins with one of these has another bandwidth.
    "V100-SXM2-16GB": 900 * GB,
    "V100-SXM2-32GB": 900 * GB,
    "V100-PCIE-16GB": 900 * GB,
    "V100-PCIE-32GB": 900 * GB,
    "T4": 320 * GB,
    "A10": 600 * GB,
    "A10G": 600 * GB,
    "A30": 933 * GB,
    "A40": 696 * GB,
    "RTX A6000": 768 * GB,
    "A100-SXM4-40GB": 1555 * GB,
    "A100-PCIE-40GB": 1555 * GB,
    "A100-SXM4-80GB": 2039 * GB,
    "A100 80GB PCIe": 1935 * GB,
    "L4": 300 * GB,
    "L40": 864 * GB,
    "L40S": 864 * GB,
    "RTX 6000 Ada Generation": 960 * GB,
    "RTX 3090": 936 * GB,
    "RTX 3090 Ti": 1008 * GB,
    "RTX 4090": 1008 * GB,
    "RTX 5090": 1792 * GB,
    "H100 PCIe": 2000 * GB,
    "H100 80GB HBM3": 3350 * GB,
    "H100 NVL": 3900 * GB,
    "H200": 4800 * GB,
    "H200 NVL": 4800 * GB,
    "GH200 480GB": 4000 * GB,
    "GH200 144G HBM3e": 4900 * GB,
    "B200": 8000 * GB,
    "GB200": 8000 * GB,
}


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """The properties of a device that determine speed and fit.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        name: Name of the device; for a CPU the model name of the processor.
        total_bytes: Its memory; for a CPU at most the limit of the control group.
        datasheet_bytes_per_s: The vendor's memory bandwidth, if the name is known.
        compute_capability: CUDA's, such as (9, 0).
        n_sms: Streaming multiprocessors of a GPU.
        n_threads: Threads of torch on a CPU.
        isa: Vector instructions of torch on a CPU, such as ``AVX512``.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    total_bytes: int
    datasheet_bytes_per_s: float | None = None
    compute_capability: tuple[int, int] | None = None
    n_sms: int | None = None
    n_threads: int | None = None
    isa: str | None = None


def resolve_device(name: str) -> torch.device:
    """Returns the torch device of a name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    ``auto`` is the current CUDA device if there is one, else the CPU.

    Raises:
        ConfigError: ``name`` is not a name of a device.
        UnsupportedError: The device does not exist, or hotloop does not run on its kind.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device {shorten_value(name)} is not the name of a device. Use auto, cpu, cuda or "
            "cuda:N."
        ) from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UnsupportedError(f"device {name!r}: hotloop runs on cpu and cuda.")
    if not torch.cuda.is_available():
        why = "sees no CUDA device" if torch.version.cuda else "was built without CUDA"
        raise UnsupportedError(f"device {name!r}: torch {torch.__version__} {why}. Use cpu.")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        there = ", ".join(f"cuda:{i}" for i in range(count))
        raise UnsupportedError(f"device {name!r} does not exist. There are {count}: {there}.")
    return torch.device("cuda", index)


def device_info(device: torch.device) -> DeviceInfo:
    """Describes ``device``."""
    import torch

    if device.type == "cpu":
        return DeviceInfo(
            kind="cpu",
            name=_cpu_name(),
            total_bytes=_host_memory()[0],
            n_threads=torch.get_num_threads(),
            isa=torch.backends.cpu.get_cpu_capability(),
        )
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo(
        kind="cuda",
        name=properties.name,
        total_bytes=properties.total_memory,
        datasheet_bytes_per_s=datasheet_bytes_per_s(properties.name),
        compute_capability=(properties.major, properties.minor),
        n_sms=properties.multi_processor_count,
    )


def datasheet_bytes_per_s(gpu_name: str) -> float | None:
    """Returns the vendor's memory bandwidth of a GPU by its name; None if it is not known."""
    for brand in ("NVIDIA ", "Tesla ", "GeForce "):
        gpu_name = gpu_name.removeprefix(brand)
    return DATASHEET_BYTES_PER_S.get(gpu_name)


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that can still be allocated on ``device``.

    On a CPU these are the system's available bytes (with reclaimable file cache), within the limit
    of the control group, as in a container. On CUDA they are the driver's free bytes, without
    memory that torch's allocator has cached.
    """
    import torch

    return _host_memory()[1] if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


_OUT_OF_MEMORY = (
    "out of memory",  # torch's allocator, a graph's instantiation (CUDA error), NCCL
    "CUDA_ERROR_OUT_OF_MEMORY",  # the driver, on loading or launching a kernel
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # torch on a CPU
    "not enough memory",
    "std::bad_alloc",
)


def find_out_of_memory(error: BaseException) -> BaseException | None:
    """Finds the out-of-memory error among an error and its causes; None if there is none.

    Libraries raise their own types for it, often a plain RuntimeError, and compilers wrap them.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or any(words in str(seen) for words in _OUT_OF_MEMORY):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def requested_bytes(shortage: BaseException) -> int | None:
    """Returns the bytes of a failed allocation, if an out-of-memory error names them."""
    found = re.search(
        r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(shortage), re.IGNORECASE
    )
    if found is None:
        return None
    unit = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}[found[2].lower()]
    return int(float(found[1].rstrip(".")) * unit)


def measure_read_bandwidth(device: torch.device, *, min_seconds: float = 0.3) -> float:
    """Measures the bytes per second that ``device`` reads from its memory, with torch's threads.

    It times reductions over a buffer far larger than the last-level cache: at least eight times as
    large, and at least 0.25 GiB on a CPU and 4 GiB on a GPU, but at most a quarter of the free
    memory. No reduction is the fastest on every device, so a few are timed and the best median
    counts.

    Args:
        device: The device, which should be idle.
        min_seconds: Seconds of timing over all reductions, without filling the buffer.

    Raises:
        UnsupportedError: Too little memory is free: the bandwidth of the cache would be measured.
    """
    import numpy as np
    import torch

    cache = _last_level_cache_bytes(device)
    floor = 2**28 if device.type == "cpu" else 2**32
    size = min(max(floor, 8 * cache), free_bytes(device) // 4) // 8 * 8
    if size < 2 * cache:
        raise UnsupportedError(
            f"measuring the read bandwidth of {device} needs {8 * cache / 2**20:.0f} MiB of free "
            f"memory, four times its smallest buffer, but only "
            f"{free_bytes(device) / 2**20:.0f} MiB are free: close other programs."
        )
    if device.type == "cpu":
        # numpy requests huge pages, and torch does not; small ones cost up to a tenth.
        buffer = torch.from_numpy(np.empty(size // 4, dtype=np.float32))
    else:
        buffer = torch.empty(size // 4, dtype=torch.float32, device=device)
    # Written, because unwritten pages all map to one page of zeros, which is cached; and by torch's
    # threads, so that each has its share in the nearest memory.
    buffer.fill_(1)
    float64, int64 = buffer.view(torch.float64), buffer.view(torch.int64)
    reads: tuple[Callable[[], object], ...] = (buffer.sum, float64.sum, int64.sum)
    seconds = min(_median_seconds(read, device, min_seconds / len(reads)) for read in reads)
    if device.type == "cuda":
        del reads, buffer, float64, int64
        torch.cuda.empty_cache()  # so that free_bytes counts the buffer as free
    return size / seconds


def _median_seconds(call: Callable[[], object], device: torch.device, min_seconds: float) -> float:
    import torch

    def timed_cpu() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def timed_cuda() -> float:
        n_calls = 8  # queued together, to hide the launch latency
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(n_calls):
                call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / n_calls

    timed = timed_cpu if device.type == "cpu" else timed_cuda
    samples: list[float] = []
    timed()
    deadline = time.perf_counter() + min_seconds
    while time.perf_counter() < deadline or len(samples) < 3:
        samples.append(timed())
    return statistics.median(samples)


def gpu_state(device: torch.device) -> dict[str, float]:
    """Reads clocks, power and temperature of a GPU from nvidia-smi.

    Returns:
        ``sm_clock_mhz``, ``max_sm_clock_mhz``, ``memory_clock_mhz``, ``power_w``,
        ``power_limit_w`` and ``temperature_c``, each if known: none of them for a CPU, without
        nvidia-smi, or in a MIG slice.
    """
    fields = {
        "sm_clock_mhz": "clocks.sm",
        "max_sm_clock_mhz": "clocks.max.sm",
        "memory_clock_mhz": "clocks.mem",
        "power_w": "power.draw",
        "power_limit_w": "power.limit",
        "temperature_c": "temperature.gpu",
    }
    answers = _nvidia_smi(device, list(fields.values()))
    return {
        name: float(answers[field])
        for name, field in fields.items()
        if answers.get(field, "").replace(".", "", 1).isdigit()  # "[N/A]" is not
    }


def _nvidia_smi(device: torch.device, fields: list[str]) -> dict[str, str]:
    import torch

    if device.type != "cuda":
        return {}
    # By UUID, because nvidia-smi does not renumber by CUDA_VISIBLE_DEVICES as torch does.
    uuid = torch.cuda.get_device_properties(device).uuid
    query = [f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}"]
    answer = _output("nvidia-smi", *query, "--format=csv,noheader,nounits")
    return dict(zip(fields, answer.split(", "), strict=True)) if answer else {}


def provenance(device: torch.device, *, read_bytes_per_s: float | None = None) -> dict[str, Any]:
    """Collects versions, device and host as JSON, without names of hosts, users or folders.

    Args:
        device: The device in use.
        read_bytes_per_s: Its measured read bandwidth; None measures it, for which the device should
            be idle and have free memory.

    Returns:
        ``hotloop`` (version, ``code``, a hash of the code that can run in a measurement, and in a
        source checkout its commit and whether it has changes, else None), ``versions``, ``device``
        (:class:`DeviceInfo`, measured bandwidth, bytes of the last-level cache, 0 if not known, and
        :func:`gpu_state`) and ``host``.
    """
    import psutil
    import torch

    if read_bytes_per_s is None:
        read_bytes_per_s = measure_read_bandwidth(device)
    return {
        # By name: this module must not import the package, which imports all levels.
        "hotloop": {
            "version": importlib.import_module("hotloop").__version__,
            "code": code_hash(),
            **_git_state(Path(__file__).parent),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton") if importlib.util.find_spec("triton") else None,
            "cuda": torch.version.cuda,
            "driver": _nvidia_smi(device, ["driver_version"]).get("driver_version"),
        },
        "device": {
            **asdict(device_info(device)),
            "read_bytes_per_s": read_bytes_per_s,
            "last_level_cache_bytes": _last_level_cache_bytes(device),
            "state": gpu_state(device),
        },
        "host": {
            "system": platform.system(),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "cpu": _cpu_name(),
            "n_cpus": psutil.cpu_count(),
            "n_cpus_allowed": _n_cpus_allowed(),
            "memory_bytes": _host_memory()[0],
            "load_average_1m": psutil.getloadavg()[0],
        },
    }


def machine() -> dict[str, Any]:
    """Names the processors of this machine, without torch and without using a GPU.

    Returns:
        The CPU's name, the CPUs that this process may use, and the names of the GPUs.
    """
    found = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    gpus = found.splitlines() if found else []
    return {"cpu": _cpu_name(), "n_cpus_allowed": _n_cpus_allowed(), "gpus": gpus}


def circumstances() -> dict[str, Any]:
    """Collects facts whose change may let a failed cell succeed, without using a GPU.

    Returns:
        ``code`` (a hash of hotloop's), ``packages`` (a hash of all installed packages), the GPUs'
        ``driver`` and names, and ``free_bytes`` of the host and of the GPU with the least.
    """
    found = _output(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.free", "--format=csv,noheader,nounits"
    )
    gpus = [line.split(", ") for line in (found or "").splitlines() if line.count(", ") == 2]
    free_mib = [int(free) for *_, free in gpus if free.isdigit()]
    # Not of sys.path, to which importing setuptools adds its own copies of packages.
    places = [sysconfig.get_path(scheme) for scheme in ("purelib", "platlib")]
    installed = sorted({f"{d.name}=={d.version}" for d in distributions(path=places)})
    return {
        "code": code_hash(),
        "packages": hashlib.sha256("\n".join(installed).encode()).hexdigest()[:16],
        "driver": gpus[0][1] if gpus else None,
        "gpus": [name for name, *_ in gpus],
        "free_bytes": {
            "cpu": _host_memory()[1],
            "cuda": min(free_mib) * 2**20 if free_mib else None,
        },
    }


def _git_state(package: Path) -> dict[str, Any]:
    """Returns the commit of a source checkout, and whether ``package`` in it has changes.

    Both are None if ``package`` is not the ``src/hotloop`` of a checkout.
    """
    # Without optional locks, so that git status does not block a commit.
    git = ("git", "--no-optional-locks", "-C", str(package))
    in_checkout = package.parent.name == "src" and (package.parents[1] / ".git").exists()
    commit = _output(*git, "rev-parse", "--verify", "HEAD") if in_checkout else None
    changes = _output(*git, "status", "--short", "--", ".") if commit else None
    return {"git_commit": commit, "git_dirty": None if changes is None else changes != ""}


def _output(*command: str) -> str | None:
    """Returns the output of a program; None if there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _n_cpus_allowed() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _host_memory() -> tuple[int, int]:
    """Returns the total and the available bytes of memory, within the control groups' limits."""
    import psutil

    memory = psutil.virtual_memory()
    bounds = [(memory.total, memory.available)]
    membership = Path("/proc/self/cgroup")
    if membership.is_file():
        bounds += _cgroup_memory(membership.read_text(), Path("/sys/fs/cgroup"))
    totals, available = zip(*bounds, strict=True)
    return min(totals), min(available)


def _cgroup_memory(membership: str, root: Path) -> Iterator[tuple[int, int]]:
    """Returns limit and remaining bytes of each control group (version 1 or 2) of a process.

    Args:
        membership: The text of ``/proc/self/cgroup``.
        root: The mount point of control groups.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root, ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":
            mount = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        leaf = mount / path.lstrip("/")
        # Every ancestor's limit holds. In a container the path can be the host's and not be there,
        # but the mount itself is then the container's group.
        for group in (leaf, *leaf.parents):
            if not group.is_relative_to(mount):
                break
            limit_file, usage_file = group / names[0], group / names[1]
            if not limit_file.is_file() or (limit := limit_file.read_text().strip()) == "max":
                continue
            stat = dict(pair.split() for pair in (group / "memory.stat").read_text().splitlines())
            used = int(usage_file.read_text()) - int(stat.get(names[2], 0))
            yield int(limit), max(0, int(limit) - used)


def _last_level_cache_bytes(device: torch.device) -> int:
    """Returns the bytes of the last-level cache; 0 if the system does not report it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    levels: dict[int, dict[str, int]] = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        size, level, shared_by = (
            (cache / name).read_text().strip() for name in ("size", "level", "shared_cpu_list")
        )
        levels.setdefault(int(level), {})[shared_by] = int(size.removesuffix("K")) * 1024
    return sum(levels[max(levels)].values()) if levels else 0
