"""Collectives on CUDA devices, captured in graphs while another thread uses the device."""

import subprocess
import sys

import pytest
import torch
from waiting import HANG_S

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RANK = """
import sys, threading
import torch
from hotloop.kernels.cuda.launch import Device
from hotloop.kernels.cuda.linear import NormEpilogue, PrescaledInput
from hotloop.kernels.cuda.step import Exchange, inbox_bytes, all_reduce_kernel, all_reduce
from hotloop.parallel.collectives import MAX_SYMMETRIC_BYTES, ProcessGroup
from hotloop.parallel.rendezvous import Address

rank, size, port = map(int, sys.argv[1:4])
device = torch.device("cuda", rank)
store = Address(host="127.0.0.1", port=port).connect()
group = ProcessGroup(store, rank, size, device, all_reduce=sys.argv[4])
total = sum(range(1, size + 1))
stop = threading.Event()

def wait_for_events():
    while not stop.is_set():
        event = torch.cuda.Event()
        event.record()
        event.synchronize()

for dtype in (torch.bfloat16, torch.float32, torch.float16):
    for n in (8, 4096, MAX_SYMMETRIC_BYTES):
        x = torch.full((1, 1, n), float(rank + 1), device=device, dtype=dtype)
        assert (group.sum(x) == total).all(), (dtype, n)
        assert (x == rank + 1).all(), "the input is unchanged"
        stop.clear()
        thread = threading.Thread(target=wait_for_events)
        thread.start()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = group.sum(group.sum(x))
            best = group.max(torch.full((2, 1), rank, device=device))
        stop.set()
        thread.join()
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        assert (y == total * size).all(), (dtype, n)
        assert (best == size - 1).all()
if (inboxes := group.inboxes(inbox_bytes(size, 4, 5120), "all_reduce")) is not None:
    exchange = Exchange.over(
        rank, inboxes.addresses, capacity=4, k=5120, device=device, kept=inboxes
    )
    ones = torch.ones(4, 5120, device=device, dtype=torch.bfloat16)
    rows, launcher = ones * (rank + 1), Device(device)
    launcher.load([all_reduce_kernel(size)])
    prescaled = PrescaledInput.empty(4, 5120, 1e-6, device)
    norm_epilogue = NormEpilogue(weight=ones[0], prescaled=prescaled)
    call = all_reduce(rows, ones, rows, norm_epilogue, exchange)
    launcher.prepare(call, dependent=False)()
    torch.cuda.synchronize()
    assert (rows == 1 + total).all(), "the residual stream and all ranks' parts"
    rows.fill_(rank + 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(3):
            rows.fill_(rank + 1)
            launcher.prepare(call, dependent=False)()
    for _ in range(200):
        graph.replay()
        assert (prescaled.x == 1 + total).all()
gathered = group.all_gather(torch.full((2, 3), rank, device=device))
assert (gathered == torch.arange(size, device=device)[:, None, None]).all()
print(group.kernel, *group.notes)
"""


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("all_reduce", ["auto", "nccl"])
def test_sums_and_maxima_are_exact_in_and_out_of_graphs(size, all_reduce):
    if (found := torch.cuda.device_count()) < size:
        pytest.skip(f"needs {size} GPUs, found {found}")
    from hotloop.parallel.rendezvous import serve_store

    _store, address = serve_store()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(str, (rank, size, address.port)), all_reduce],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [rank.communicate(timeout=HANG_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, outputs
    kernels = {out.split()[0] for out, _ in outputs}
    assert len(kernels) == 1, "all ranks use one backend"
    assert kernels <= ({"nccl"} if all_reduce == "nccl" else {"nccl", "symm_mem"})
