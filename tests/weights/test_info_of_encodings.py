"""``hotloop info FILE`` names what the file stores, and the kernels that the engine then uses."""

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from every_encoding import ENCODINGS

from hotloop import LLM
from hotloop.cli.app import main
from hotloop.weights.checkpoint import open_checkpoint

SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 1}
JOINED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "lm_head": "head"}
JOINED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
"""Matrices of a file that are parts of a projection of the engine."""


def info(model: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["info", str(model), "--device", "cpu", "--quant", "auto", *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_kernels_are_those_that_the_engine_uses_and_every_byte_has_a_format(
    encoding, tmp_path, capsys
):
    model = ENCODINGS[encoding](tmp_path, **SIZES)
    formats = info(model, capsys=capsys)["formats"]
    with LLM(str(model), device="cpu", max_seq_len=16) as llm:
        described = llm.describe()
    of_engine = {
        name: set(re.findall(r"\w+/\w+", kernels))
        for name, kernels in described.kernels.items()
        if name != "attention"
    }
    told: dict[str, set[str]] = {}
    for each in formats:
        for name in each["names"]:
            told.setdefault(JOINED.get(name, name), set()).add(each["kernel"])
    assert told == of_engine
    for reason in {reason for each in formats for reason in each["reasons"]}:
        assert any(reason in note for note in described.notes)
    with closing(open_checkpoint(model)) as checkpoint:
        stored = sum(
            tensor.n_bytes
            for name, tensor in checkpoint.tensors.items()
            if "norm" not in name and "embed_tokens" not in name
        )
    assert sum(each["n_bytes"] for each in formats) == stored


def test_a_format_that_ranks_cannot_cut_is_a_row_with_the_degrees_that_work(tmp_path, capsys):
    model = ENCODINGS["gptq, act-order"](tmp_path, **SIZES)
    about = info(model, "--tp", "2", capsys=capsys)
    (row,) = about["memory"]
    assert "permuted (act-order)" in row["unsupported"]
    assert "only 1 works" in row["unsupported"]
    assert about["formats"], "the file is described all the same"
