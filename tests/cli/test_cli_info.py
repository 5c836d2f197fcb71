"""``hotloop info`` and ``hotloop quantize``: what is said of machines, models and files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from hotloop import hardware
from hotloop.cli.app import main
from hotloop.weights import hub
from hotloop.weights import quantize as weights_quantize


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(hardware, "measure_read_bandwidth", lambda _device: 12.5e9)


@pytest.mark.usefixtures("measured")
def test_a_machine_is_its_devices_with_memory_bandwidth_and_ways_of_execution(capsys):
    assert main(["info", "--json"]) == 0
    cpu = json.loads(capsys.readouterr().out)["devices"][0]
    assert (cpu["device"], cpu["read_bytes_per_s"]) == ("cpu", 12.5e9)
    assert 0 < cpu["free_bytes"] <= cpu["total_bytes"]
    assert cpu["execution"]["eager"] == {"available": True, "reason": None}
    assert "compile" in cpu["execution"]
    assert cpu["execution"]["fused"] == {"available": False, "reason": "it is for NVIDIA GPUs"}

    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "12.5 GB/s measured" in out
    assert cpu["name"] in out


@pytest.mark.usefixtures("measured")
def test_what_cannot_run_says_why(monkeypatch, capsys):
    from hotloop.kernels import cpu

    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "no C++ compiler found")
    assert main(["info"]) == 0
    assert "no: no C++ compiler found" in capsys.readouterr().out


def test_a_shape_needs_no_checkpoint_to_be_described(capsys):
    argv = ["--device", "cpu", "--max-seq-len", "1000", "--max-batch-size", "2", "--json"]
    assert main(["info", "llama-2-13b", *argv]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["n_layers"], said["n_params"]) == (40, 13_015_864_320)
    assert said["kv_bytes_per_token"] == 2 * 40 * 5120 * 2
    by_scheme = {each["quant"]: each for each in said["memory"]}
    assert by_scheme["none"]["cache_bytes"] == 2 * 1000 * said["kv_bytes_per_token"]
    bytes_ = [by_scheme[scheme]["weights_bytes"] for scheme in ("none", "int8", "int4-g128")]
    assert bytes_ == sorted(bytes_, reverse=True)
    assert by_scheme["none"]["fits"] == (
        by_scheme["none"]["total_bytes"] <= by_scheme["none"]["free_bytes"]
    )


def test_a_drafter_is_counted_and_shown_beside_the_schemes_that_allow_it(
    tiny_llama, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "120")
    argv = ["info", str(tiny_llama), "--device", "cpu", "--quant", "none,int8,int4-g32"]
    bytes_of = []
    for draft in ("none", "self-int4-g32"):
        assert main([*argv, "--draft", draft, "--json"]) == 0
        memory = json.loads(capsys.readouterr().out)["memory"]
        bytes_of.append({each["quant"]: each for each in memory})
    plain, drafted = bytes_of
    for quant in ("none", "int8"):
        assert plain[quant]["draft_bytes"] == 0
        grown = drafted[quant]["weights_bytes"] - plain[quant]["weights_bytes"]
        assert grown == drafted[quant]["draft_bytes"] > 0
    assert "save no time" in drafted["int4-g32"]["unsupported"]
    for draft, shows in (("none", False), ("self-int4-g32", True)):
        assert main([*argv, "--draft", draft]) == 0
        (heading,) = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("quant ")
        ]
        assert ("draft" in heading.split()) == shows


def test_the_schemes_whose_high_halves_draft_are_shown_where_they_are_to(tiny_llama, capsys):
    assert main(["info", str(tiny_llama), "--device", "cpu", "--draft", "self", "--json"]) == 0
    memory = {each["quant"]: each for each in json.loads(capsys.readouterr().out)["memory"]}
    assert {"int8-g128", "int8-g64", "int8-g32"} <= memory.keys()
    assert memory["int8-g32"]["draft_bytes"] == 0, "no copy"


def test_a_scheme_that_a_model_does_not_allow_has_its_reason_under_the_table(
    tiny_llama, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "80")
    schemes = "int8,int4-g128"
    assert main(["info", str(tiny_llama), "--quant", schemes, "--device", "cpu"]) == 0
    int8, int4, empty, reason = capsys.readouterr().out.splitlines()[-4:]
    assert int8.startswith("int8 ")
    assert int8.endswith(" yes")
    assert int4.split() == ["int4-g128", "unsupported"]
    assert not empty
    assert reason.startswith("int4-g128: ")
    assert "do not divide" in reason


def test_with_several_ranks_it_says_what_each_holds_and_which_schemes_cannot_be_split(
    tiny_gguf, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "140")
    argv = ["info", str(tiny_gguf), "--device", "cpu", "--quant", "int8,int4-g64"]
    about = {}
    for n in (1, 2):
        assert main([*argv, "--tp", str(n), "--json"]) == 0
        about[n] = json.loads(capsys.readouterr().out)
    assert [rank["n_logits"] for rank in about[2]["ranks"]] == [160, 99]
    heads = [rank["layers"][0]["attention"]["n_heads"] for rank in about[2]["ranks"]]
    assert (heads, len(about[1]["ranks"])) == ([2, 2], 1)
    assert 2 * about[2]["kv_bytes_per_token"] == about[1]["kv_bytes_per_token"]
    whole, part = ({each["quant"]: each for each in about[n]["memory"]} for n in (1, 2))
    assert part["int8"]["weights_bytes"] < whole["int8"]["weights_bytes"]
    assert "unsupported" not in whole["int4-g64"]
    assert "only 1 works" in part["int4-g64"]["unsupported"]

    assert main([*argv, "--tp", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 + 2" in out
    assert "160 + 99" in out
    assert "Memory of rank 0, the largest, on cpu" in out

    # A degree that no scheme allows is a row with its reason, and everything else is shown.
    assert main([*argv, "--tp", "5"]) == 0
    out = capsys.readouterr().out
    assert "of which each holds" not in out
    assert out.count("unsupported") == 3
    assert "tensor_parallel 5 cannot split 4 query heads" in out


def test_a_scheme_that_does_not_exist_is_a_usage_error(tiny_llama, capsys):
    assert main(["info", str(tiny_llama), "--quant", "int8,nonsense", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "unknown quantization scheme 'nonsense'" in err


def test_a_quantized_file_is_shown_with_the_kernels_that_read_it(tiny_gguf, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["info", str(tiny_gguf), "--device", "cpu", "--quant", "int8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [each["quant"] for each in said["memory"]] == ["auto", "int8"]
    formats = {each["encoding"]: each for each in said["formats"]}
    n_matrices = Counter()
    for each in said["formats"]:  # the head has a kernel of its own
        n_matrices[each["encoding"]] += each["n_matrices"]
    assert n_matrices == {"gguf-q8_0": 13, "gguf-q4_1": 2}
    assert formats["gguf-q8_0"]["format"] == "int8, float16 scale per group of 32"
    assert formats["gguf-q4_1"]["format"] == "uint4, float16 scale per group of 32, offsets"
    assert formats["gguf-q4_1"]["n_bytes"] == 2 * (64 * 192 // 32 * 20)
    assert all(each["kernel"] for each in formats.values())
    assert formats["gguf-q4_1"]["names"] == ["down_proj"]
    (head,) = [each for each in said["formats"] if "lm_head" in each["names"]]

    assert main(["info", str(tiny_gguf), "--device", "cpu", "--quant", "int8"]) == 0
    out = capsys.readouterr().out
    n_bytes = sum(each["n_bytes"] for each in said["formats"])
    (line,) = [line for line in out.splitlines() if line.startswith("gguf-q4_1")]
    assert f"{100 * formats['gguf-q4_1']['n_bytes'] / n_bytes:.0f} %" in line
    assert "2 down_proj" in line
    stored, kernel, read = line.split()[-3:]
    assert (stored, kernel) == ("5.00", formats["gguf-q4_1"]["kernel"])
    assert float(read) >= 5
    assert ("1 lm_head" in out) == (head["names"] == ["lm_head"])
    reasons = {reason for each in said["formats"] for reason in each["reasons"]}
    for reason in reasons:
        users = [each["names"] for each in said["formats"] if reason in each["reasons"]]
        (said_of,) = [line for line in out.splitlines() if line.endswith(f": {reason}")]
        assert all(name in said_of for names in users for name in names)


def test_an_unquantized_file_has_matrices_of_one_kind(tiny_llama, capsys):
    assert main(["info", str(tiny_llama), "--device", "cpu", "--quant", "none", "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["formats"]
    assert (only["encoding"], only["format"]) == ("F32", "floating point")


@pytest.fixture
def tiny_gguf(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "weights")
    from whole_models import write_gguf_model

    kinds = {"ffn_down": "Q4_1"}
    return write_gguf_model(tmp_path / "m.gguf", "Q8_0", tied=False, kinds=kinds)


@pytest.fixture
def tiny_llama(tmp_path):
    """A tiny model without a tokenizer: nothing of it is loaded."""
    import torch
    from safetensors.torch import save_file

    from hotloop.models import names
    from hotloop.models.families import read_config
    from hotloop.models.families.llama import FAMILY

    (tmp_path / "config.json").write_text(json.dumps(dict(FAMILY.tiny)))
    shapes = names.tensors(read_config(FAMILY.tiny))
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_model_that_is_not_there_is_a_usage_error(capsys):
    assert main(["info", "./nowhere"]) == 2
    assert "./nowhere" in capsys.readouterr().err


def test_quantize_says_what_became_of_the_bytes(monkeypatch, tmp_path, capsys):
    source, out = tmp_path / "model.gguf", tmp_path / "out"
    source.write_bytes(bytes(3000))
    asked = {}

    def quantize_checkpoint(src, dst, *, progress, on_note, **options):
        progress(1, 2)
        on_note("14 matrices stored as awq are dequantized.")
        asked.update(options, src=src)
        dst.mkdir()
        (dst / "model.safetensors").write_bytes(bytes(1000))

    monkeypatch.setattr(hub, "resolve_model", lambda _name: source)
    monkeypatch.setattr(weights_quantize, "quantize_checkpoint", quantize_checkpoint)
    assert main(["quantize", "m", str(out), "--quant", "int4-g64", "--json"]) == 0
    shown, err = capsys.readouterr()
    said = json.loads(shown)
    assert (said["src_bytes"], said["out_bytes"]) == (3000, 1000)
    assert "14 matrices stored as awq are dequantized." in err
    options = {
        "quant": "int4-g64",
        "head": "auto",
        "copy_format": "hotloop",
        "calibration": None,
    }
    assert asked == {"src": source, "source_name": "m", **options}


def test_quantize_needs_a_scheme(capsys):
    assert main(["quantize", "m", "out"]) == 2
    assert "--quant" in capsys.readouterr().err


def test_what_takes_long_is_said_on_stderr(tiny_llama, capsys):
    argv = ["info", str(tiny_llama), "--device", "cpu", "--json"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "forecasting its memory (the first time, this builds the CPU kernels)" in err
    json.loads(out)
