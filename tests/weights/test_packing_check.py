"""A packed weight that holds other numbers than it was packed from is noticed by every kernel."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import number_formats
import pytest
import torch
from torch import Tensor
from whole_models import load, write_folder

from hotloop import LLM
from hotloop.errors import PackingError
from hotloop.kernels import cpu
from hotloop.kernels.linear import (
    DENSE,
    KERNELS,
    Dequantizing,
    Fused,
    GroupedCpu,
    Int4TinyGemm,
    LinearKernel,
    LinearSpec,
    NestedTinyGemm,
    Permuted,
)
from hotloop.kernels.pack import pack_in_chunks
from hotloop.quant import QTensor
from hotloop.quant.packing_check import PackingCheck
from hotloop.quant.rows import paired_chunks, row_chunks_of

FORMATS = ("dense", *number_formats.NAMES)
BF16, F32 = torch.bfloat16, torch.float32


def made(name: str, n: int, k: int) -> Tensor | QTensor:
    if name == "dense":
        return torch.randn(n, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    return number_formats.random_weight(name, n, k)


def spec_of(weight: Tensor | QTensor, dtype: torch.dtype = BF16, **more: object) -> LinearSpec:
    n, k = weight.shape
    form = weight.format if isinstance(weight, QTensor) else DENSE
    return LinearSpec(
        **({"format": form, "n": n, "k": k, "dtype": dtype, "device": "cpu"} | more)  # pyrefly: ignore
    )


def kernels_of(weight: Tensor | QTensor) -> Iterator[tuple[LinearKernel, bool]]:
    """Every kernel that holds a weight and packs it on a CPU, and whether by pairs."""
    permuted = isinstance(weight, QTensor) and weight.permutation is not None
    for dtype in (BF16, F32) if isinstance(weight, QTensor) else (weight.dtype,):
        spec = spec_of(weight, dtype)
        for make in KERNELS:
            if make.unsupported(spec) is None:
                kernel = make(spec)
                yield (
                    Permuted(kernel, spec.k) if permuted and not kernel.permutes else kernel,
                    False,
                )
    for paired, plain_rows in ((False, False), (True, False), (False, True)):
        fused = spec_of(weight, device="cuda", fused=True, paired=paired, plain_rows=plain_rows)
        if Fused.unsupported(fused) is None:
            yield Fused(fused), paired


def float32(weight: Tensor | QTensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, QTensor) else weight.float()


def holds(
    kernel: LinearKernel,
    weight: Tensor | QTensor,
    rows: int,
    *,
    paired: bool,
    fault: Callable[[Tensor | QTensor], Tensor | QTensor] = lambda chunk: chunk,
) -> bool:
    """Packs a weight some rows at a time, with a fault between the check and the packer."""
    n = weight.shape[0]
    check = PackingCheck(kernel, n, paired=paired)
    chunks = (paired_chunks if paired else row_chunks_of)(weight, rows)
    packing = pack_in_chunks(kernel, (fault(check.record(c)) for c in chunks), n, paired=paired)
    while True:
        try:
            next(packing)
        except StopIteration as end:
            return bool(check.compare(end.value))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n", [96, 50])
def test_every_kernel_dequantizes_what_it_packed_to_the_same_float32_numbers(name, n):
    weight = made(name, n, 512)
    kernels = list(kernels_of(weight))
    assert len(kernels) >= 2, [kernel.name for kernel, _ in kernels]
    for kernel, paired in kernels:
        again = kernel.dequantize(kernel.pack(weight), n)
        assert again.dtype == F32
        assert torch.equal(again, float32(weight)), kernel.name
        for rows in (16, 48, 96):  # of the whole and of its ends
            assert holds(kernel, weight, rows, paired=paired), (kernel.name, rows)


def swapped_columns(weight: Tensor | QTensor) -> Tensor | QTensor:
    """The halves of a byte, or of whatever two adjacent values are packed into."""
    values = weight.values if isinstance(weight, QTensor) else weight
    swapped = values[:, torch.arange(values.shape[1]) ^ 1]
    return dataclasses.replace(weight, values=swapped) if isinstance(weight, QTensor) else swapped


def swapped_rows(weight: Tensor | QTensor) -> Tensor | QTensor:
    def swap(rows: Tensor) -> Tensor:
        return torch.cat((rows[1:2], rows[:1], rows[2:]))

    return weight.map_rows(swap) if isinstance(weight, QTensor) else swap(weight)


def one_zero_moved(weight: Tensor | QTensor) -> Tensor | QTensor | None:
    if not isinstance(weight, QTensor) or weight.offset is None:
        return None
    offset = weight.offset.clone()
    offset[1, -1] += 1
    return dataclasses.replace(weight, offset=offset)


def one_scale_rounded(weight: Tensor | QTensor) -> Tensor | QTensor | None:
    if not isinstance(weight, QTensor) or weight.scale.dtype not in (torch.float16, F32):
        return None
    scale = weight.scale.clone()
    scale[1, -1] = scale[1, -1].bfloat16()
    return None if torch.equal(scale, weight.scale) else dataclasses.replace(weight, scale=scale)


FAULTS = [swapped_columns, swapped_rows, one_zero_moved, one_scale_rounded]
CASES = [(f, name) for f in FAULTS for name in FORMATS if f(made(name, 2, 512)) is not None]


@pytest.mark.parametrize(("plant", "name"), CASES)
@pytest.mark.parametrize("at", ["first", "last"])
def test_a_fault_in_the_first_or_the_last_rows_is_noticed_by_every_kernel(plant, name, at):
    weight, rows = made(name, 96, 512), 48
    for kernel, paired in kernels_of(weight):
        chunks = 0

        def fault(chunk: Tensor | QTensor) -> Tensor | QTensor:
            nonlocal chunks
            chunks += 1
            if chunks != (1 if at == "first" else 2):
                return chunk
            return plant(chunk) if at == "first" else upside_down(plant(upside_down(chunk)))

        assert not holds(kernel, weight, rows, paired=paired, fault=fault), kernel.name
        assert chunks == 2


def upside_down(weight: Tensor | QTensor) -> Tensor | QTensor:
    if isinstance(weight, QTensor):
        return weight.map_rows(lambda rows: rows.view(torch.uint8).flip(0).view(rows.dtype))
    return weight.flip(0)


def test_rows_that_are_put_in_a_wrong_place_are_noticed():
    weight = made("awq", 96, 512)
    kernel = Fused(spec_of(weight, device="cuda", fused=True))
    check = PackingCheck(kernel, 96)
    (packed,) = kernel.pack(check.record(weight))
    assert check.compare([packed])
    assert not check.compare([packed.flip(0)]), "tiles in another order"
    packed[-1, -1, -1] ^= 1
    assert not check.compare([packed]), "a bit of the last byte"


def tinygemm_words(bytes_NK: Tensor, inner_k_tiles: int) -> Tensor:
    """What PyTorch's CUDA operator packs, lane by lane, written from its documentation of layout.

    bytes_NK holds an even feature in the high half of a byte and the next one in the low half.
    """
    n, k = bytes_NK.shape[0], 2 * bytes_NK.shape[1]
    words = torch.zeros(
        n // 8, k // (16 * inner_k_tiles), 32, inner_k_tiles // 2, dtype=torch.int64
    )
    for tile, outer, lane, pair in torch.cartesian_prod(*map(torch.arange, words.shape)).tolist():
        row, first = 8 * tile + lane // 4, (outer * inner_k_tiles + 2 * pair) * 16
        features = [first + 16 * s + 8 * half + 2 * (lane % 4) for s in (0, 1) for half in (0, 1)]
        bytes_ = [int(bytes_NK[row, feature // 2]) for feature in features]
        nibbles = [b >> 4 for b in bytes_] + [b & 15 for b in bytes_]
        words[tile, outer, lane, pair] = sum(nibble << 4 * i for i, nibble in enumerate(nibbles))
    return words.to(torch.int32)


@pytest.mark.parametrize("name", ["int4-g128", "int4-g32-offset", "nested-g32"])
@pytest.mark.parametrize("k", [128, 192, 32])
def test_tinygemms_words_are_dequantized_too(name, k, monkeypatch):
    class Operators:
        _convert_weight_to_int4pack = staticmethod(tinygemm_words)

    group = min(int(re.findall(r"g(\d+)", name)[0]), k & -k)
    weight = number_formats.weight(
        "nested" if name.startswith("nested") else "int4",
        24,
        k,
        group=group,
        scale=BF16,
        zero="offset" if name.endswith("offset") else "none",
    )
    make = NestedTinyGemm if weight.kind == "nested" else Int4TinyGemm
    kernel = make(spec_of(weight, device="cuda"))
    monkeypatch.setattr(torch.ops, "aten", Operators)
    assert torch.equal(kernel.dequantize(kernel.pack(weight), 24), weight.dequantize())
    for rows in (8, 16, 24):
        assert holds(kernel, weight, rows, paired=False)
        assert not holds(kernel, weight, rows, paired=False, fault=swapped_columns)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("k", [512, 576, 1056])
@pytest.mark.parametrize("kind", ["int4", "nested"])
def test_tinygemms_words_on_a_gpu_are_those_that_it_packs(kind, k):
    weight = number_formats.weight(kind, 80, k, group=32, scale=BF16).to("cuda")
    kernel = (NestedTinyGemm if kind == "nested" else Int4TinyGemm)(spec_of(weight, device="cuda"))
    assert torch.equal(kernel.dequantize(kernel.pack(weight), 80), weight.dequantize())
    assert holds(kernel, weight, 24, paired=False)


def with_faulty_packer(monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> None:
    """Has the kernel that dequantizes pack faultily, from some call on."""
    pack, calls = Dequantizing.pack, 0

    def faulty(kernel: Dequantizing, weight: Tensor | QTensor) -> list[Tensor]:
        nonlocal calls
        calls += 1
        return pack(kernel, swapped_rows(weight) if calls > after else weight)

    monkeypatch.setattr(Dequantizing, "pack", faulty)


def test_loading_names_the_tensors_the_kernel_and_the_format(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m")
    load(folder, quant="int4-g32", dtype=F32)
    with_faulty_packer(monkeypatch, after=1)  # layer 0: q, k and v as one, then o
    with pytest.raises(PackingError) as failed:
        load(folder, quant="int4-g32", dtype=F32)
    expected = "model.layers.0.self_attn.o_proj: packing the weight (int4, bfloat16 scale per"
    assert str(failed.value).startswith(expected)
    assert "group of 32) for the kernel int4/dequantized changed its values" in str(failed.value)
    assert "The weight was not used." in str(failed.value)
    assert "please report it" in str(failed.value)


def test_an_engine_with_a_faulty_packer_does_not_start_and_keeps_nothing(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("HOTLOOP_CACHE", str(cache))
    with_faulty_packer(monkeypatch)
    folder = write_folder(tmp_path / "m")
    options = {"quant": "int4-g32", "device": "cpu", "dtype": "float32", "max_seq_len": 16}
    with pytest.raises(PackingError, match=r"model\.layers\.0\.self_attn\.q_proj, model"):
        LLM(str(folder), cache_packed=True, **options)
    assert not list(cache.rglob("*.packed"))
    monkeypatch.undo()
    LLM(str(folder), **options).close()


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="no C++ compiler")
def test_the_drafters_copy_is_checked_too(tmp_path: Path, monkeypatch):
    pack = GroupedCpu.pack
    monkeypatch.setattr(GroupedCpu, "pack", lambda self, w: pack(self, swapped_rows(w)))
    folder = write_folder(tmp_path / "m")
    with pytest.raises(PackingError, match="of the drafter"):
        load(folder, quant="none", draft="int4-g32", dtype=BF16)
