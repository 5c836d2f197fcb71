"""``hotloop quantize``: what it writes loads as quantizing on load would, and stands alone."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor
from weights_files import write_gguf
from whole_models import (
    CONFIG,
    VOCABULARY,
    assert_same_weights,
    gguf_keys,
    load,
    write_folder,
    write_gguf_model,
)

from hotloop.engine.llm import LLM
from hotloop.errors import CheckpointError, ConfigError, HotloopError, UnsupportedError
from hotloop.models import names
from hotloop.models.families import read_config
from hotloop.quant import parse_scheme
from hotloop.text.generation_config import generation_defaults
from hotloop.text.tokenizer import load_tokenizer
from hotloop.weights.checkpoint import open_checkpoint, stored_form
from hotloop.weights.identity import read_quantization, sample_checkpoint
from hotloop.weights.quantize import quantize_checkpoint
from hotloop.weights.writer import SafetensorsWriter

QUANTS = ["int8", "int8-g32", "fp8", "int4-g32-asym", "int4-g32-zp", "int4-g64", "int4-g32-cal"]
HEADS = ["none", "int8", "fp8", "int4-g64"]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_folder_loads_bit_for_bit_as_quantizing_on_load(quant, head, tied, tmp_path):
    source = write_folder(tmp_path / "m", tie_word_embeddings=tied)
    folder = quantize_checkpoint(source, tmp_path / "q", quant=quant, head=head)
    assert_same_weights(load(folder), load(source, quant=quant, head=head))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_quantized_gguf_does_too(quant, tied, kind, tmp_path):
    source = write_gguf_model(tmp_path / "m.gguf", kind, tied=tied)
    folder = quantize_checkpoint(source, tmp_path / "q", quant=quant)
    assert_same_weights(load(folder), load(source, quant=quant))


def test_head_is_int8_beside_quantized_projections_and_left_alone_beside_others(tmp_path):
    source = write_folder(tmp_path / "m")
    for quant, head in (("int4-g64", "int8"), ("int8", "int8")):
        folder = quantize_checkpoint(source, tmp_path / quant, quant=quant)
        config = json.loads((folder / "config.json").read_text())
        stored = read_quantization(config, folder)
        assert (stored.scheme, stored.head) == (quant, head)
    folder = quantize_checkpoint(source, tmp_path / "head-only", quant="none", head="int8")
    assert_same_weights(load(folder), load(source, quant="none", head="int8"))
    with pytest.raises(ConfigError, match="quantizes nothing"):
        quantize_checkpoint(source, tmp_path / "nothing", quant="none")


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_result_stands_alone(form, tmp_path):
    if form == "folder":
        source = write_folder(tmp_path / "m")
    else:
        source = write_gguf_model(tmp_path / "m.gguf", tied=False)
    options = {"device": "cpu", "dtype": "float32", "max_seq_len": 32}
    direct = LLM(str(source), quant="int4-g32", **options)
    text = "Hello, wörld"
    expected = direct.generate([text], temperature=0, max_new_tokens=9, logprobs=2)
    tokenizer, suggested = load_tokenizer(source), generation_defaults(source)

    folder = quantize_checkpoint(source, tmp_path / "q", quant="int4-g32")
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    alone = LLM(str(folder), **options)
    assert (alone.config.quant, alone.config.head) == ("int4-g32", "int8")
    again = alone.generate([text], temperature=0, max_new_tokens=9, logprobs=2)
    assert again[0].token_ids == expected[0].token_ids
    assert again[0].logprobs == expected[0].logprobs

    copy = load_tokenizer(folder)
    assert copy.encode(text) == tokenizer.encode(text)
    assert copy.eos_ids == tokenizer.eos_ids == {VOCABULARY.index("</s>")}
    assert copy.chat_template == tokenizer.chat_template
    assert generation_defaults(folder) == suggested
    assert suggested["temperature"] == pytest.approx(0.7)


def test_stored_form_is_the_one_that_its_version_says(tmp_path):
    """Version 3: what is written today must be readable for good, so a change needs version 4."""

    def change(tensors: dict[str, Tensor]) -> None:
        row = torch.tensor([*range(-8, 8), *range(-8, 8)] * 2).float()
        tensors[Q_PROJ] = row.mul(0.5).repeat(64, 1)

    source = write_folder(tmp_path / "m", change)
    folder = quantize_checkpoint(
        source, tmp_path / "q", quant="int4-g32-asym", source_name="a/model"
    )
    config = json.loads((folder / "config.json").read_text())
    description = {
        "version": 3,
        "scheme": "int4-g32-asym",
        "head": "int8",
        "source": {"name": "a/model", "sample": sample_checkpoint(source)},
    }
    assert config["hotloop_quantization"] == description
    stored = load_file(folder / "model.safetensors")
    assert Q_PROJ not in stored
    values = stored[f"{Q_PROJ}.values"]
    assert (values.dtype, values.shape) == (torch.uint8, (64, 32))
    # -8 and -7 are 0 and 1: the even column in the low nibble.
    assert values[0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    for part, value in (("scale", 0.5), ("offset", 0.0)):
        tensor = stored[f"{Q_PROJ}.{part}"]
        assert (tensor.dtype, tensor.shape) == (torch.bfloat16, (64, 2))
        assert (tensor == value).all()
    head = stored["lm_head.weight.values"], stored["lm_head.weight.scale"]
    assert [t.dtype for t in head] == [torch.int8, torch.float32]
    assert head[1].shape == (len(VOCABULARY), 1)
    weight = load_file(tmp_path / "m" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head[0], parse_scheme("int8").quantize(weight).values)


def test_redundant_head_of_a_tied_model_is_dropped(tmp_path):
    source = write_folder(
        tmp_path / "m",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        tie_word_embeddings=True,
    )
    folder = quantize_checkpoint(source, tmp_path / "q", quant="int8")
    assert not any(name.startswith("lm_head") for name in load_file(folder / "model.safetensors"))
    assert_same_weights(load(folder), load(source, quant="int8"))


def test_progress_ends_with_everything_done(tmp_path):
    seen: list[tuple[int, int]] = []
    quantize_checkpoint(
        write_folder(tmp_path / "m"),
        tmp_path / "q",
        quant="int8",
        progress=lambda *at: seen.append(at),
    )
    n = len(load_file(tmp_path / "m" / "model.safetensors"))
    assert seen == [(i, n) for i in range(1, n + 1)]


# Refusals: nothing is left.


def assert_nothing_made(parent: Path, *, but: set[str]) -> None:
    assert {path.name for path in parent.iterdir()} == but


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_quantizing_leaves_nothing(error, tmp_path):
    source = write_folder(tmp_path / "m")

    def interrupt(done: int, total: int) -> None:
        if done == total - 1:
            raise error

    with pytest.raises(error):
        quantize_checkpoint(source, tmp_path / "q", quant="int8", progress=interrupt)
    assert_nothing_made(tmp_path, but={"m"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(Q_PROJ), "missing"),
        (lambda t: t.pop("model.norm.weight"), "missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), "has shape [63]"),
        (lambda t: t.update({"model.layers.1.extra": torch.ones(1)}), "not a part of the model"),
        (lambda t: t[Q_PROJ].fill_(torch.nan), "NaN"),
    ],
)
def test_damaged_and_incomplete_sources_are_refused_whole(change, says, tmp_path):
    source = write_folder(tmp_path / "m", change)
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(source, tmp_path / "q", quant="int8")
    assert says in str(caught.value)
    assert_nothing_made(tmp_path, but={"m"})


def test_group_that_does_not_divide_is_refused_before_anything_is_read(tmp_path):
    source = write_folder(tmp_path / "m", lambda t: t[Q_PROJ].fill_(torch.nan))
    with pytest.raises(ConfigError, match="q_proj has 64 input features"):
        quantize_checkpoint(source, tmp_path / "q", quant="int4-g128")
    with pytest.raises(ConfigError, match="lm_head has 64 input features"):
        quantize_checkpoint(source, tmp_path / "q", quant="int8", head="int4-g128")
    assert_nothing_made(tmp_path, but={"m"})


def test_quantized_source_is_refused(tmp_path):
    folder = quantize_checkpoint(write_folder(tmp_path / "m"), tmp_path / "q", quant="int4-g64")
    with pytest.raises(ConfigError, match="already quantized as int4-g64 with head int8"):
        quantize_checkpoint(folder, tmp_path / "again", quant="int8")


def test_destination_in_use_is_refused_and_left_alone(tmp_path):
    source = write_folder(tmp_path / "m")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine.txt").write_text("mine")
    for occupied in (tmp_path / "q", source):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            quantize_checkpoint(source, occupied, quant="int8")
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["mine.txt"]
    (tmp_path / "q" / "mine.txt").unlink()
    quantize_checkpoint(source, tmp_path / "q", quant="int8")
    load(tmp_path / "q")


def rewrite_description(folder: Path, description: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["hotloop_quantization"] = description
    (folder / "config.json").write_text(json.dumps(config))


def test_destination_in_use_is_refused_before_the_source_is_opened(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        quantize_checkpoint(tmp_path / "no model", tmp_path / "file", quant="int8")


def test_destination_under_a_file_is_refused_by_its_own_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HotloopError, match=r"cannot write \S+/file/x: Not a directory"):
        SafetensorsWriter(tmp_path / "file" / "x").__enter__()


def test_integers_without_a_high_nibble_are_refused(tmp_path):
    folder = quantize_checkpoint(write_folder(tmp_path / "m"), tmp_path / "q", quant="int8-g32")
    load(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.v_proj.weight.values"
    tensors[name][3, 5] = 120
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"at most 119, and one here is 120"):
        load(folder)


def test_format_of_a_later_version_is_refused_with_the_fix(tmp_path):
    folder = quantize_checkpoint(write_folder(tmp_path / "m"), tmp_path / "q", quant="int8")
    rewrite_description(folder, {"version": 4, "scheme": "int3", "layout": "new"})
    for act in (
        lambda: load(folder),
        lambda: LLM(str(folder)),
        lambda: quantize_checkpoint(folder, tmp_path / "again", quant="int8"),
    ):
        with pytest.raises(UnsupportedError, match=r"in format 4; .* format 3\. Update hotloop"):
            act()


@pytest.mark.parametrize(
    "description",
    [
        {"version": 1, "scheme": "int8"},
        {"version": "1", "scheme": "int8", "head": "int8"},
        {"version": 2, "scheme": "int8", "head": "int8", "source": {"name": "m", "sample": "x"}},
        "int8",
        {},
    ],
)
def test_damaged_description_is_refused(description, tmp_path):
    folder = quantize_checkpoint(write_folder(tmp_path / "m"), tmp_path / "q", quant="int8")
    rewrite_description(folder, description)
    with pytest.raises(ConfigError, match=r"config\.json, hotloop_quantization: "):
        load(folder)


def test_a_checkpoint_says_which_types_it_stores_and_what_it_was_made_from(tmp_path):
    source = write_gguf_model(tmp_path / "m.gguf", "Q4_1", tied=True)
    copy = quantize_checkpoint(source, tmp_path / "q", quant="int8", source_name="m")
    plain = write_folder(tmp_path / "m")
    forms = []
    for path in (source, copy, plain):
        with closing(open_checkpoint(path)) as checkpoint:
            forms.append(stored_form(checkpoint))
    gguf, quantized, folder = forms
    assert [form.is_quantized for form in forms] == [True, True, False]
    assert gguf.summary.startswith("Q4_1 for 15 of 20 tensors, 9")
    assert gguf.types[0].n_bytes == sum(20 * n * k // 32 for n, k in matrix_shapes(tied=True))
    assert quantized.summary.startswith("int8, head int8, made from m (I8 for 15 of 35 tensors")
    assert quantized.quantization.source.sample == sample_checkpoint(source)
    assert json.loads(json.dumps(quantized.to_dict()))["quantization"]["source"]["name"] == "m"
    assert folder.summary == "BF16 for 21 of 21 tensors, 100 % of bytes"


def matrix_shapes(*, tied: bool) -> list[tuple[int, ...]]:
    shapes = names.tensors(read_config(CONFIG | {"tie_word_embeddings": tied})).values()
    return [shape for shape in shapes if len(shape) == 2]


def test_any_part_of_a_gguf_model_loads_the_whole_one(tmp_path):
    """Each part by its own path, and a file without the suffix."""
    whole = write_gguf_model(tmp_path / "m.gguf", "F16", tied=True)
    reader = GGUFReader(whole)
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    tensors = {
        t.name: (torch.from_numpy(t.data.copy()).float().numpy(), t.tensor_type.name)
        for t in reader.tensors
    }
    general = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.") or key == "general.sampling.temp"
    }
    half = dict(list(tensors.items())[:7])
    keys = gguf_keys()
    write_gguf(parts[0], half, keys=keys, general=general, split=(0, 2, len(tensors)))
    rest = {name: tensor for name, tensor in tensors.items() if name not in half}
    write_gguf(parts[1], rest, keys=keys, split=(1, 2, len(tensors)))
    bare = tmp_path / "blob"
    bare.write_bytes(whole.read_bytes())
    expected = load(whole)
    for path in (*parts, bare):
        assert_same_weights(load(path), expected)
        assert load_tokenizer(path).encode("ab") == load_tokenizer(whole).encode("ab")
        assert generation_defaults(path) == generation_defaults(whole)
    assert sample_checkpoint(parts[1]) == sample_checkpoint(parts[0])
    LLM(str(parts[1]), device="cpu", max_seq_len=16).close()
