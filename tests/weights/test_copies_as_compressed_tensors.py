"""``hotloop quantize --format compressed-tensors``: other tools load the copy, as hotloop does."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from stored_models import distribution
from whole_models import (
    CONFIG,
    VOCABULARY,
    assert_same_weights,
    load,
    write_folder,
    write_gguf_model,
)

from hotloop.engine.llm import LLM
from hotloop.errors import ConfigError
from hotloop.models import names
from hotloop.models.families import read_config
from hotloop.quant import QTensor, parse_scheme
from hotloop.quant.auto import Auto
from hotloop.quant.int8 import Int8
from hotloop.text.generation_config import generation_defaults
from hotloop.text.tokenizer import load_tokenizer
from hotloop.weights.checkpoint import open_checkpoint, read_model
from hotloop.weights.identity import read_quantization, sample_checkpoint
from hotloop.weights.quantize import quantize_checkpoint
from hotloop.weights.recognition import recognize_matrices
from hotloop.weights.source import CheckpointSource, Request, read_matrix

FORMATS = {
    "int4-g32": "pack-quantized",
    "int4-g64": "pack-quantized",
    "int4-g32-zp": "pack-quantized",
    "int8": "pack-quantized",
    "int8-g32": "pack-quantized",
    "fp8": "float-quantized",
}
CPU = torch.device("cpu")


def copy(source: Path, folder: Path, quant: str) -> Path:
    return quantize_checkpoint(source, folder, quant=quant, copy_format="compressed-tensors")


def logits_in_transformers(folder: Path) -> torch.Tensor:
    """Log-probabilities [T - 1, V] of ``distribution``'s window by transformers, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return log_probabilities(model)


def log_probabilities(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(5, 29)[None]).logits[0, :-1].log_softmax(-1)


def logits_of_decompressed(folder: Path) -> torch.Tensor:
    """The same with matrices that compressed-tensors decompresses in float32.

    compressed-tensors 0.20.1 allocates packed zero points unpacked when transformers 5.24 loads
    them, which so refuses every such file, its own included.
    """
    config = json.loads((folder / "config.json").read_text())
    described = QuantizationConfig.model_validate(config.pop("quantization_config"))
    (scheme,) = described.config_groups.values()
    decompressor = BaseCompressor.get_value_from_registry(described.format)
    tensors = load_file(folder / "model.safetensors")
    for name in names.linear_weights(read_config(config)):
        found = [each for each in tensors if each.startswith(f"{name}.")]
        stored = {each.removeprefix(f"{name}."): tensors.pop(each) for each in found}
        stored["weight_scale"] = stored["weight_scale"].float()
        tensors[f"{name}.weight"] = decompressor.decompress(stored, scheme)["weight"]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32
    )
    tied = config["tie_word_embeddings"]
    missing, surplus = model.load_state_dict(tensors, strict=False)
    assert (missing, surplus) == (["lm_head.weight"] if tied else [], [])
    return log_probabilities(model)


@pytest.mark.parametrize("quant", FORMATS)
def test_integers_and_scales_are_read_back_as_they_were_made(quant, tmp_path):
    source = write_folder(tmp_path / "m")
    folder = copy(source, tmp_path / "q", quant)
    scheme, matrices = parse_scheme(quant), names.linear_weights(read_config(CONFIG))
    made = load_file(source / "model.safetensors")
    with closing(open_checkpoint(folder)) as checkpoint:
        model, _ = read_model(checkpoint)
        stored = recognize_matrices(checkpoint, model)
        assert {each.encoding for each in stored.values()} == {FORMATS[quant]}
        assert stored.keys() == matrices.keys()
        reader = CheckpointSource(checkpoint, CPU, model=model)
        for name, (n, k) in matrices.items():
            expected = scheme.quantize(made[f"{name}.weight"])
            kept = Auto(stored=stored[name].layout.format, k=k)
            read = read_matrix(reader, Request(name=name, shape=(n, k), scheme=kept))
            assert isinstance(expected, QTensor)
            assert isinstance(read, QTensor)
            # The file does not say that its integers are in a part of the range.
            if isinstance(scheme, Int8) and scheme.group_size:
                assert read.format == replace(expected.format, kind="int8")
                read = scheme.nest(read)
            assert read.format == expected.format
            for ours, theirs in zip(read.tensors, expected.tensors, strict=True):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quant", FORMATS)
def test_transformers_computes_from_it_what_hotloop_does(quant, tied, tmp_path):
    folder = copy(write_folder(tmp_path / "m", tie_word_embeddings=tied), tmp_path / "q", quant)
    computed = logits_of_decompressed if quant.endswith("zp") else logits_in_transformers
    torch.testing.assert_close(distribution(folder), computed(folder))


@pytest.mark.parametrize("quant", ["int4-g64", "int4-g32-zp", "int8", "int8-g32"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_loads_bit_for_bit_as_quantizing_on_load(quant, tied, tmp_path):
    for source in (
        write_folder(tmp_path / "m", tie_word_embeddings=tied),
        write_gguf_model(tmp_path / "m.gguf", "Q8_0", tied=tied),
    ):
        folder = copy(source, tmp_path / f"{source.name}-copy", quant)
        assert_same_weights(load(folder), load(source, quant=quant, head="none"))
        with LLM(str(folder), device="cpu", max_seq_len=16) as llm:
            assert (llm.config.quant, llm.config.head) == (quant, "none")
            assert not any("quantized again" in note for note in llm.describe().notes)


def test_a_copy_of_a_gguf_file_loads_in_transformers(tmp_path):
    folder = copy(write_gguf_model(tmp_path / "m.gguf", "Q8_0", tied=True), tmp_path / "q", "int8")
    torch.testing.assert_close(distribution(folder), logits_in_transformers(folder))


@pytest.mark.parametrize("quant", FORMATS)
def test_the_library_reads_the_description(quant, tmp_path):
    source = write_folder(tmp_path / "m")
    folder = copy(source, tmp_path / "q", quant)
    config = json.loads((folder / "config.json").read_text())
    read = QuantizationConfig.model_validate(config["quantization_config"])
    (group,) = read.config_groups.values()
    weights = group.weights
    assert (read.format, group.format) == (FORMATS[quant], FORMATS[quant])
    assert (group.targets, read.ignore) == (["Linear"], ["lm_head"])
    assert group.input_activations is None
    per_channel = quant in ("int8", "fp8")
    assert weights.num_bits == (4 if quant.startswith("int4") else 8)
    assert weights.symmetric is not quant.endswith("zp")
    assert weights.strategy == ("channel" if per_channel else "group")
    size = None if per_channel else parse_scheme(quant).alignment
    assert weights.group_size == size
    ours = read_quantization(config, folder)
    assert ours is not None
    assert (ours.scheme, ours.head) == (quant, "none")
    assert ours.source is not None
    assert ours.source.sample == sample_checkpoint(source)


def test_the_head_and_the_embedding_stay_as_they_are(tmp_path):
    source = write_folder(tmp_path / "m")
    stored = load_file(copy(source, tmp_path / "q", "int4-g64") / "model.safetensors")
    made = load_file(source / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(stored[name], made[name])


def test_tokenizer_template_and_sampling_come_along(tmp_path):
    source = write_folder(tmp_path / "m")
    folder = copy(source, tmp_path / "q", "int8")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode("ab c") == theirs("ab c", add_special_tokens=False)["input_ids"]
    messages = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "hi!"
    assert generation_defaults(folder) == generation_defaults(source)
    suggested = transformers.GenerationConfig.from_pretrained(folder)
    assert suggested.top_k == 11
    assert suggested.eos_token_id == [VOCABULARY.index("</s>")]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quant": "int4-g64-asym"}, "no floating-point offsets: give int4-g64-zp, or format"),
        ({"quant": "int8", "head": "int8"}, "head 'int8' cannot be written as compressed-tensors"),
        ({"quant": "none", "head": "int8"}, "Leave head out, or give none."),
        ({"quant": "none"}, "quantizes nothing"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_way_out(options, says, tmp_path):
    source = write_folder(tmp_path / "m")
    with pytest.raises(ConfigError) as caught:
        quantize_checkpoint(source, tmp_path / "q", copy_format="compressed-tensors", **options)
    assert says in str(caught.value)
    assert not (tmp_path / "q").exists()
