import getpass
import json
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hotloop import hardware
from hotloop.errors import ConfigError, UnsupportedError
from hotloop.hardware import find_out_of_memory, requested_bytes
from hotloop.kernels.cuda.launch import LaunchError

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.resolve_device("auto") == CPU


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "index"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_a_cuda_device_always_resolves_to_its_index(name, index):
    assert hardware.resolve_device(name) == torch.device("cuda", index)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UnsupportedError, match=r"'cuda:3'.*There are 2: cuda:0, cuda:1"):
        hardware.resolve_device("cuda:3")


def test_cuda_without_a_gpu_is_refused_and_not_replaced_by_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="Use cpu"):
        hardware.resolve_device("cuda")


def test_a_device_that_is_none_and_one_of_another_kind_are_told_apart():
    with pytest.raises(ConfigError, match="'gpu' is not the name of a device"):
        hardware.resolve_device("gpu")
    with pytest.raises(UnsupportedError, match="runs on cpu and cuda"):
        hardware.resolve_device("meta")


@pytest.mark.parametrize(
    ("name", "gb_per_s"),
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("A100-PCIE-40GB", 1555),
        ("Tesla T4", 320),
        ("NVIDIA GeForce RTX 4090", 1008),
    ],
)
def test_the_datasheet_is_found_by_the_name_the_driver_gives(name, gb_per_s):
    assert hardware.datasheet_bytes_per_s(name) == gb_per_s * 1e9


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Some GPU", ""],
)
def test_the_datasheet_of_a_similar_name_is_not_borrowed(name):
    assert hardware.datasheet_bytes_per_s(name) is None


def test_cpu_info_says_what_torch_computes_with():
    info = hardware.device_info(CPU)
    assert (info.kind, info.n_threads) == ("cpu", torch.get_num_threads())
    assert info.name
    assert info.isa == torch.backends.cpu.get_cpu_capability()
    assert 0 < hardware.free_bytes(CPU) <= info.total_bytes


def _group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)


def test_free_memory_heeds_every_ancestor_of_a_version_2_control_group(tmp_path):
    stat = "anon 10\ninactive_file 100\n"
    _group(tmp_path / "a", {"memory.max": "1000", "memory.current": "700", "memory.stat": stat})
    leaf = {"memory.max": "max", "memory.current": "300", "memory.stat": stat}
    _group(tmp_path / "a/b", leaf)
    # 100 of the 700 bytes in use are file cache that the kernel would give up.
    assert list(hardware._cgroup_memory("0::/a/b\n", tmp_path)) == [(1000, 400)]


def test_free_memory_heeds_a_version_1_control_group_seen_from_inside_its_container(tmp_path):
    files = {
        "memory.limit_in_bytes": "1000",
        "memory.usage_in_bytes": "1200",
        "memory.stat": "total_inactive_file 0\n",
    }
    _group(tmp_path / "memory", files)
    membership = "4:memory:/docker/not/visible/here\n1:cpu:/\n0::/\n"
    assert list(hardware._cgroup_memory(membership, tmp_path)) == [(1000, 0)]


def test_free_memory_is_within_the_control_groups_limit(monkeypatch):
    monkeypatch.setattr(hardware, "_cgroup_memory", lambda *_: iter([(4096, 512)]))
    assert hardware.free_bytes(CPU) == 512
    assert hardware.device_info(CPU).total_bytes == 4096


def test_read_bandwidth_of_this_machine_is_in_bytes_per_second_and_no_caches():
    assert 1e6 < hardware.measure_read_bandwidth(CPU, min_seconds=0.02) < 2e12


def test_a_cache_is_never_measured_as_memory(monkeypatch):
    monkeypatch.setattr(hardware, "free_bytes", lambda _: 2**20)
    monkeypatch.setattr(hardware, "_last_level_cache_bytes", lambda _: 2**19)
    with pytest.raises(UnsupportedError, match="1 MiB are"):
        hardware.measure_read_bandwidth(CPU)


def test_provenance_is_json_and_names_nobody():
    facts = hardware.provenance(CPU, read_bytes_per_s=1e10)
    text = json.dumps(facts)
    assert facts["device"]["read_bytes_per_s"] == 1e10
    assert facts["device"]["datasheet_bytes_per_s"] is None
    assert facts["versions"]["torch"] == torch.__version__
    strings = set(json.loads(text)["host"].values())
    assert socket.gethostname() not in strings
    assert getpass.getuser() not in strings
    assert str(Path.home()) + "/" not in text


def test_provenance_measures_the_bandwidth_where_it_is_not_given(monkeypatch):
    monkeypatch.setattr(hardware, "measure_read_bandwidth", lambda _: 7.0)
    assert hardware.provenance(CPU)["device"]["read_bytes_per_s"] == 7.0


def test_git_state_knows_a_checkout_its_changes_and_an_installed_package(tmp_path):
    package = tmp_path / "src/hotloop"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1")

    def git(*args: str) -> str:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ["git", "-C", str(tmp_path), *who, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    nothing = {"git_commit": None, "git_dirty": None}
    assert hardware._git_state(package) == nothing
    git("init", "-q")
    assert hardware._git_state(package) == nothing
    git("add", "-A")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert hardware._git_state(package) == {"git_commit": commit, "git_dirty": False}
    (tmp_path / "results.txt").write_text("not code")
    assert hardware._git_state(package) == {"git_commit": commit, "git_dirty": False}
    (package / "b.py").write_text("2")
    assert hardware._git_state(package) == {"git_commit": commit, "git_dirty": True}
    # Installed into an environment that lies inside somebody else's repository.
    installed = tmp_path / "venv/lib/python3.11/site-packages/hotloop"
    installed.mkdir(parents=True)
    assert hardware._git_state(installed) == nothing


def test_gpu_state_leaves_out_what_the_driver_does_not_tell(monkeypatch):
    uuid = "4ec6b1e9-0000-0000-0000-000000000000"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    asked = []

    def answer(*command: str) -> str:
        asked.append(command)
        return "1980, 1980, 2619, 118.27, [N/A], 41"

    monkeypatch.setattr(hardware, "_output", answer)
    assert hardware.gpu_state(torch.device("cuda:0")) == {
        "sm_clock_mhz": 1980,
        "max_sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "power_w": 118.27,
        "temperature_c": 41,
    }
    assert f"--id=GPU-{uuid}" in asked[0]


def test_gpu_state_is_empty_without_a_gpu_or_without_nvidia_smi(monkeypatch):
    assert hardware.gpu_state(CPU) == {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="x"))
    monkeypatch.setattr(hardware, "_output", lambda *_: None)
    assert hardware.gpu_state(torch.device("cuda:0")) == {}


@pytest.mark.gpu
@needs_cuda
def test_a_known_gpu_reads_at_the_order_of_its_datasheet_and_no_faster():
    device = hardware.resolve_device("cuda")
    info, reserved = hardware.device_info(device), torch.cuda.memory_reserved(device)
    measured = hardware.measure_read_bandwidth(device)
    assert torch.cuda.memory_reserved(device) <= reserved, "the buffer was not given back"
    if info.datasheet_bytes_per_s is None:
        pytest.skip(f"no datasheet for {info.name}")
    # Others may use it too, so how slow it may be is a matter of units alone.
    assert 0.02 < measured / info.datasheet_bytes_per_s < 1.02


@pytest.mark.gpu
@needs_cuda
def test_provenance_of_a_gpu_holds_driver_and_clocks():
    facts = hardware.provenance(hardware.resolve_device("cuda"))
    json.dumps(facts)
    assert facts["versions"]["driver"]
    assert facts["device"]["state"]["sm_clock_mhz"] > 0


@pytest.mark.parametrize(
    ("error", "asked_for"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB."), 3 * 2**29),
        (RuntimeError("can't allocate memory: you tried to allocate 640 bytes. Error 12"), 640),
        (RuntimeError("not enough memory: you tried to allocate 8 bytes."), 8),
        (RuntimeError("std::bad_alloc"), None),
        (RuntimeError("CUDA error: out of memory"), None),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), None),
        (LaunchError("the CUDA driver failed: CUDA_ERROR_OUT_OF_MEMORY."), None),
        (MemoryError(), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_memory_that_was_short_is_recognized_however_it_is_put(error, asked_for):
    wrapped = ValueError("a compiler wraps it")
    wrapped.__cause__ = error
    assert find_out_of_memory(error) is find_out_of_memory(wrapped) is error
    assert requested_bytes(error) == asked_for


def test_other_errors_are_not_taken_for_a_want_of_memory():
    assert find_out_of_memory(RuntimeError("CUDA error: an illegal memory access")) is None


def test_circumstances_do_not_depend_on_what_a_process_has_imported(tmp_path, monkeypatch):
    before = hardware.circumstances()["packages"]
    (tmp_path / "vendored-1.0.dist-info").mkdir()
    (tmp_path / "vendored-1.0.dist-info" / "METADATA").write_text("Name: vendored\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert hardware.circumstances()["packages"] == before
