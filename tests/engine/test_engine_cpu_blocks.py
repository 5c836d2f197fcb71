"""Eager steps on a CPU, whose blocks are two operators each, give what the decoder's own do."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from number_formats import random_weight
from tiny_models import write_random
from torch import Tensor

from hotloop import LLM
from hotloop.engine import cpu_blocks, forward
from hotloop.kernels import cpu
from hotloop.kernels.linear import KernelFormat
from hotloop.models.decoder import Run, call
from hotloop.quant import QTensor
from hotloop.weights.source import CheckpointSource, Request

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)

MODELS = {
    "grouped heads": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "norms of heads": {"model_type": "qwen3", "head_dim": 24},
    "a window": {"model_type": "mistral", "sliding_window": 7},
}
PROMPTS = [[5, 6, 7], [8, 9] * 20, [10]]


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("quant", ["none", "int8", "int4-g32", "int4-g32-asym"])
def test_tokens_and_probabilities_are_the_same_bits(keys, quant, tmp_path, monkeypatch):
    folder = str(write_random(tmp_path, **keys))
    runs: list[Run] = []

    def answers(**options: object) -> list[object]:
        with LLM(folder, device="cpu", dtype="bfloat16", quant=quant, **options) as llm:
            given = llm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True, logprobs=2)
            return [(g.token_ids, g.logprobs) for g in given]

    def noted(decoder: object) -> Run:
        runs.append(cpu_blocks.eager_run(decoder))
        return runs[-1]

    monkeypatch.setattr(forward, "eager_run", noted)
    ours = answers(max_batch_size=3)
    drafted = answers(max_batch_size=3, draft="ngram", draft_tokens=4, draft_policy="always")
    assert all(isinstance(run, cpu_blocks.CpuBlocks) for run in runs)
    monkeypatch.setattr(forward, "eager_run", lambda _: call)
    assert ours == answers(max_batch_size=3)
    assert drafted == ours


def test_layers_of_several_number_formats_give_the_same_bits(tmp_path, monkeypatch):
    formats = {"q_proj": "Q4_1", "k_proj": "Q8_0", "o_proj": "mxfp4", "gate_proj": "int4-row-zero"}
    formats |= {"up_proj": "Q4_0", "down_proj": "int8-row-act-order"}
    read, form_of = CheckpointSource.pieces, Request.format.fget

    def made(request: Request) -> QTensor | None:
        name = formats.get(request.name.split(".")[-1])
        if name is None:
            return None
        found = random_weight(name, *request.shape)
        return dataclasses.replace(found, scale=(found.scale.float() / 8).to(found.scale.dtype))

    def mixed(source: CheckpointSource, request: Request) -> Iterator[Tensor | QTensor]:
        stored, weight = read(source, request), made(request)
        if weight is None:
            yield from stored
        else:
            list(stored)
            yield weight

    def form(request: Request) -> KernelFormat:
        weight = made(request)
        return form_of(request) if weight is None else weight.format

    monkeypatch.setattr(CheckpointSource, "pieces", mixed)
    monkeypatch.setattr(Request, "format", property(form))
    keys = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}

    def answers() -> tuple[list[object], dict[str, str]]:
        folder = str(write_random(tmp_path, **keys))
        with LLM(folder, device="cpu", dtype="bfloat16") as llm:
            given = llm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True, logprobs=2)
            return [(g.token_ids, g.logprobs) for g in given], llm.describe().kernels

    runs: list[Run] = []
    choose = cpu_blocks.eager_run
    monkeypatch.setattr(forward, "eager_run", lambda d: runs.append(choose(d)) or runs[-1])
    ours, kernels = answers()
    assert isinstance(runs[0], cpu_blocks.CpuBlocks)
    assert kernels["qkv_proj"] == "stacked(uint4/cpu, int8/cpu, dense/cpu)"
    assert kernels["gate_up_proj"] == "stacked(int4/cpu, int4/cpu)"
    monkeypatch.setattr(forward, "eager_run", lambda _: call)
    assert ours == answers()[0]


def test_other_kernels_are_called_one_by_one(folder, monkeypatch):
    monkeypatch.setattr(cpu_blocks, "CpuBlocks", None)
    with LLM(str(folder), device="cpu", dtype="float32") as llm:
        assert llm.generate([[5]], max_new_tokens=2, ignore_eos=True)[0].token_ids


@torch.inference_mode()
def test_positions_and_seats_outside_the_cache_are_refused():
    E, K = 16, 32
    x, norm = torch.ones(1, 1, K, dtype=torch.bfloat16), torch.ones(K, dtype=torch.bfloat16)
    qkv, o = torch.ones(3 * E, K).bfloat16(), torch.ones(K, E).bfloat16()
    tables, caches = torch.ones(2, 1, 1, E), torch.zeros(2, 3, 1, 8, E, dtype=torch.bfloat16)
    attend = torch.ops.hotloop_cpu.attention_sublayer
    for seat, position, fits in ((2, 7, True), (3, 7, False), (2, 8, False), (-1, 0, False)):
        where = torch.tensor([seat]), torch.tensor([[position]])
        arguments = (
            *(x, norm, 1e-5, [qkv], None, None, None, *tables, *caches, *where),
            *(0, 1.0, [o], None),
        )
        if fits:
            assert attend(*arguments).shape == (1, K)
        else:
            with pytest.raises(RuntimeError, match="of the cache"):
                attend(*arguments)
