"""The all-reduce backend: the one asked for, or a reason why not."""

from types import SimpleNamespace

import pytest
import torch

from hotloop.errors import UnsupportedError
from hotloop.parallel import collectives
from hotloop.parallel.collectives import ProcessGroup


@pytest.fixture(params=["works", "does not"])
def symmetric_memory(request, monkeypatch) -> str:
    """A GPU's rank without a GPU, on which symmetric memory works or does not."""
    world = SimpleNamespace(group_name="0")
    stand_in = SimpleNamespace(
        init_process_group=lambda *_, **__: None, group=SimpleNamespace(WORLD=world)
    )
    found = (torch.empty(8), None) if request.param == "works" else (None, "no luck")
    monkeypatch.setattr(collectives, "dist", stand_in)
    monkeypatch.setattr(collectives, "_symmetric_buffer", lambda *_: found)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    return request.param


def group(all_reduce: str, device: str = "cuda:0") -> ProcessGroup:
    return ProcessGroup(None, 0, 2, torch.device(device), all_reduce=all_reduce)


def test_auto_uses_symmetric_memory_where_it_works_and_else_notes_why_not(symmetric_memory):
    made = group("auto")
    if symmetric_memory == "works":
        assert (made.kernel, made.notes) == ("symm_mem", ())
    else:
        assert (made.kernel, made.notes) == ("nccl", ("all_reduce/symm_mem not used: no luck",))


def test_symm_mem_is_used_or_refused(symmetric_memory):
    if symmetric_memory == "works":
        assert group("symm_mem").kernel == "symm_mem"
    else:
        with pytest.raises(UnsupportedError, match="'symm_mem' does not work here: no luck"):
            group("symm_mem")


@pytest.mark.usefixtures("symmetric_memory")
def test_nccl_is_used_without_a_note():
    assert (group("nccl").kernel, group("nccl").notes) == ("nccl", ())


@pytest.fixture(params=["works", "does not"])
def shared_memory(request, symmetric_memory, monkeypatch) -> str:  # noqa: ARG001
    """A rank on a CPU without others, on which shared memory works or does not."""
    found = (torch.empty(8), None) if request.param == "works" else (None, "no luck")
    monkeypatch.setattr(collectives, "_shared_memory", lambda *_: found)
    return request.param


def test_cpus_share_memory_where_that_works_and_else_note_why_not(shared_memory):
    made = group("auto", "cpu")
    if shared_memory == "works":
        assert (made.kernel, made.notes) == ("shm", ())
    else:
        assert (made.kernel, made.notes) == ("gloo", ("all_reduce/shm not used: no luck",))


def test_shm_is_used_or_refused(shared_memory):
    if shared_memory == "works":
        assert group("shm", "cpu").kernel == "shm"
    else:
        with pytest.raises(UnsupportedError, match=r"'shm' does not work here: no luck\."):
            group("shm", "cpu")


@pytest.mark.usefixtures("shared_memory")
def test_gloo_is_used_without_a_note():
    assert (group("gloo", "cpu").kernel, group("gloo", "cpu").notes) == ("gloo", ())
