"""A weight that is packed some rows at a time is packed as the whole of it is."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import number_formats
import pytest
import torch
from torch import Tensor

from hotloop.kernels.linear import DENSE, Fused, KernelFormat, LinearSpec, choose_linear
from hotloop.kernels.pack import pack_in_chunks
from hotloop.quant import QTensor
from hotloop.quant.rows import RowStream, interleave, paired_chunks, row_chunks_of, unzip

FORMATS = ("dense", *number_formats.NAMES)


def made(name: str, n: int, k: int) -> Tensor | QTensor:
    if name == "dense":
        return torch.randn(n, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    return number_formats.random_weight(name, n, k)


def format_of(weight: Tensor | QTensor) -> KernelFormat:
    return weight.format if isinstance(weight, QTensor) else DENSE


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.is_contiguous()
        assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


def packed(*args: Any, **options: Any) -> list[Tensor]:
    """Returns the result of ``pack_in_chunks``."""
    packing = pack_in_chunks(*args, **options)
    while True:
        try:
            next(packing)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_kernel_of_a_cpu_packs_rows_as_it_packs_the_whole(name, dtype):
    n, k = 80, 256
    weight = made(name, n, k)
    weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
    kernel, _ = choose_linear(
        LinearSpec(format=format_of(weight), n=n, k=k, dtype=dtype, device="cpu")
    )
    whole = kernel.pack(weight)
    for rows in (16, 48, 80):
        assert_same(packed(kernel, row_chunks_of(weight, rows), n), whole)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "paired"), [(80, False), (76, False), (96, True), (88, True)])
def test_the_fused_step_packs_rows_and_pairs_of_rows_as_the_whole(name, n, paired):
    k = 256
    weight = made(name, n, k)
    spec = LinearSpec(
        format=format_of(weight),
        n=n,
        k=k,
        dtype=torch.bfloat16,
        device="cuda",
        fused=True,
        paired=paired,
    )
    if reason := Fused.unsupported(spec):
        pytest.skip(f"the fused step {reason}")
    kernel = Fused(spec)
    whole = kernel.pack(weight)
    chunks = paired_chunks if paired else row_chunks_of
    for rows in (16, 32):
        assert_same(packed(kernel, chunks(weight, rows), n, paired=paired), whole)


def test_plain_rows_are_collected_as_they_come():
    n, k = 80, 256
    weight = made("dense", n, k)
    kernel = Fused(
        LinearSpec(
            format=DENSE, n=n, k=k, dtype=torch.bfloat16, device="cuda", fused=True, plain_rows=True
        )
    )
    assert_same(packed(kernel, row_chunks_of(weight, 32), n), [weight])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("group", [32, 64, 128])
def test_tinygemm_packs_rows_as_the_whole(group):
    weight = number_formats.weight("int4", 80, 512, group=group, scale=torch.bfloat16).to("cuda")
    kernel, _ = choose_linear(
        LinearSpec(format=weight.format, n=80, k=512, dtype=torch.bfloat16, device="cuda")
    )
    assert kernel.name == "int4/tinygemm"
    assert_same(packed(kernel, row_chunks_of(weight, 24), 80), kernel.pack(weight))


def test_a_stream_cuts_and_joins_pieces_of_any_size():
    weight = number_formats.random_weight("awq", 40, 128)
    ends = (0, 3, 20, 21, 40)
    pieces = [weight.rows(a, b) for a, b in pairwise(ends)]
    chunks = list(RowStream(pieces, 40, weight.format).chunks(16))
    assert [chunk.shape[0] for chunk in chunks] == [16, 16, 8]
    for i, chunk in enumerate(chunks):
        assert_same(list(chunk.tensors), list(weight.rows(16 * i, 16 * i + 16).tensors))


def test_streams_of_the_same_rows_are_packed_in_step():
    made, taken = [], ([], [])

    def pairs() -> Iterator[tuple[int, int]]:
        for i in range(12):
            made.append(i)
            yield i, -i

    def run(values: Iterator[int], into: list[int], step: int) -> Iterator[int]:
        for _ in range(12 // step):
            into += [next(values) for _ in range(step)]
            assert len(made) <= min(map(len, taken)) + 4, "no more is held than a few pieces"
            yield step

    first, second = unzip(pairs())
    interleave(run(first, taken[0], 1), run(second, taken[1], 4))
    assert taken == (list(range(12)), [-i for i in range(12)])
    assert made == list(range(12)), "each once"
