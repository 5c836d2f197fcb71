from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from weights_files import EMBEDDING, llama_rows, random_blocks, write_gguf

from hotloop.errors import CheckpointError, UnsupportedError
from hotloop.gguf_header import read_gguf_header
from hotloop.models.config import RopeConfig
from hotloop.models.families import read_config
from hotloop.models.rope import inverse_frequencies
from hotloop.weights.checkpoint import open_checkpoint

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZABLE = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
Q_PROJ, K_PROJ, UP_PROJ = (
    f"model.layers.0.{name}.weight"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def refusal(path: Path) -> Exception:
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        open_checkpoint(path)
    return caught.value


# Tensors.


@pytest.mark.parametrize("type_name", FLOATS)
def test_plain_types_are_read_as_they_are_stored(tmp_path, type_name):
    array = noise(6, 40)
    path = write_gguf(tmp_path / "m.gguf", EMBEDDING | {"blk.0.ffn_up.weight": (array, type_name)})
    checkpoint = open_checkpoint(path)
    info = checkpoint.tensors[UP_PROJ]
    assert (info.shape, info.dtype, info.file) == ((6, 40), type_name, path)
    expected = torch.from_numpy(array).to(FLOATS[type_name])
    torch.testing.assert_close(checkpoint.read(UP_PROJ), expected, rtol=0, atol=0)
    for index in [(slice(1, 4),), (slice(None), slice(3, 11)), (slice(2, 2),)]:
        read = checkpoint.read(UP_PROJ, index)
        torch.testing.assert_close(read, expected[index], rtol=0, atol=0)


@pytest.mark.parametrize("type_name", [*QUANTIZABLE, *K_QUANTS])
def test_blocks_are_dequantized_exactly_whole_and_in_slices(tmp_path, monkeypatch, type_name):
    # Chunks of three rows, so that what is read spans several.
    monkeypatch.setattr("hotloop.weights.tensor_file.CHUNK_BYTES", 3 * 512 * 4)
    kind = GGMLQuantizationType[type_name]
    if type_name in K_QUANTS:
        blocks = random_blocks(10, 512, type_name)
    else:
        blocks = quantize(noise(10, 512), kind)
    path = write_gguf(tmp_path / "m.gguf", EMBEDDING | {"blk.0.ffn_up.weight": (blocks, type_name)})
    checkpoint = open_checkpoint(path)
    expected = torch.from_numpy(dequantize(blocks, kind))
    assert expected.isfinite().all()
    assert checkpoint.tensors[UP_PROJ].dtype == type_name
    whole, on_blocks, within = slice(None), slice(256, 512), slice(37, 300)
    for index in [(), (slice(4, 9),), (whole, on_blocks), (slice(1, 8), within), (whole, slice(0))]:
        read = checkpoint.read(UP_PROJ, index)
        torch.testing.assert_close(read, expected[index], rtol=0, atol=0)


@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
def test_query_and_key_rows_of_llama_files_come_in_hugging_face_order(tmp_path, type_name):
    q, k, bias = (torch.from_numpy(noise(*s)) for s in ((64, 64), (32, 64), (64,)))
    tensors = EMBEDDING | {
        "blk.0.attn_q.weight": (llama_rows(q, 4).numpy(), type_name),
        "blk.0.attn_k.weight": (llama_rows(k, 2).numpy(), type_name),
        "blk.0.attn_q.bias": (llama_rows(bias, 4).numpy(), "F32"),
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    tolerance = 0 if type_name == "F32" else 0.03
    for name, expected in ((Q_PROJ, q), (K_PROJ, k)):
        torch.testing.assert_close(checkpoint.read(name), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(checkpoint.read(Q_PROJ.replace("weight", "bias")), bias)
    whole = checkpoint.read(Q_PROJ)
    # A head, parts of two, a single row, and a block of columns.
    for index in [(slice(16, 32),), (slice(21, 47), slice(5, 50)), (slice(40, 41),)]:
        torch.testing.assert_close(checkpoint.read(Q_PROJ, index), whole[index], rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_query_rows_of_qwen_files_are_left_in_their_order(tmp_path, arch):
    q = noise(64, 64)
    path = write_gguf(
        tmp_path / "m.gguf", EMBEDDING | {"blk.0.attn_q.weight": (q, "F32")}, arch=arch
    )
    assert np.array_equal(open_checkpoint(path).read(Q_PROJ).numpy(), q)


def test_transformers_reads_the_same_model_from_the_same_file(tmp_path):
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    original = model.state_dict()
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(2):
        names |= {f"blk.{layer}.{g}": f"model.layers.{layer}.{h}" for g, h in parts.items()}
    tensors = {}
    for gguf_name, name in names.items():
        weight = original[f"{name}.weight"]
        heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
        stored = llama_rows(weight, heads) if heads else weight
        tensors[f"{gguf_name}.weight"] = (stored.numpy(), "Q8_0" if weight.dim() == 2 else "F32")
    path = write_gguf(
        tmp_path / "m.gguf",
        tensors,
        keys={"block_count": 2, "vocab_size": 32, "rope.dimension_count": 16},
    )

    checkpoint = open_checkpoint(path)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"):
        assert theirs["config"][key] == pytest.approx(checkpoint.config[key], rel=1e-6)
    assert theirs["tensors"].keys() == checkpoint.tensors.keys() == original.keys()
    for name, expected in theirs["tensors"].items():
        torch.testing.assert_close(checkpoint.read(name), expected, rtol=0, atol=0)


# The configuration.


def test_metadata_becomes_a_hugging_face_configuration(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        {"token_embd.weight": (noise(8, 64), "F16"), "output.weight": (noise(8, 64), "F16")},
        keys={"attention.key_length": 32, "attention.value_length": 32, "tensor_data_layout": "x"},
        general={
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.ggml.tokens": ["a", "b"],
        },
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
    }
    assert checkpoint.metadata["tokenizer.ggml.tokens"] == ["a", "b"]


@pytest.mark.parametrize(
    ("arch", "keys", "expected"),
    [
        (
            "llama",
            {"attention.head_count_kv": None, "rope.freq_base": None},
            {"num_key_value_heads": 4, "rope_theta": 10000.0, "tie_word_embeddings": True},
        ),
        (
            "llama",
            {"attention.sliding_window": 32},
            {"architectures": ["MistralForCausalLM"], "sliding_window": 32},
        ),
        ("qwen2", {}, {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}),
        (
            "qwen3",
            {"attention.key_length": 128},
            {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
        ),
        (
            "llama",
            {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
            {"rope_scaling": None},
        ),
        (
            "llama",
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        (
            "qwen2",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
            },
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
)
def test_every_spelling_of_a_key_is_honoured(tmp_path, arch, keys, expected):
    config = open_checkpoint(
        write_gguf(tmp_path / "m.gguf", EMBEDDING, arch=arch, keys=keys)
    ).config
    assert {key: config[key] for key in expected} == expected


def test_rope_factors_are_part_of_the_configuration(tmp_path):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", EMBEDDING | {"rope_freqs.weight": (factors, "F32")})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "longrope",
        "original_max_position_embeddings": 128,
        "attention_factor": 1.0,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
    }
    assert "rope_freqs.weight" not in checkpoint.tensors
    rope = read_config(checkpoint.config).layers[0].attention.rope
    assert not rope.depends_on_length
    ratio = inverse_frequencies(16, RopeConfig()) / inverse_frequencies(16, rope, 128)
    torch.testing.assert_close(ratio, torch.from_numpy(factors))


def test_short_and_long_rope_factors_are_those_of_longrope(tmp_path):
    short, long = np.linspace(1, 2, 8, dtype=np.float32), np.linspace(1, 8, 8, dtype=np.float32)
    tensors = EMBEDDING | {"rope_factors_short.weight": (short, "F32")}
    keys = {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": 1.25,
    }
    missing = refusal(write_gguf(tmp_path / "missing.gguf", tensors, keys=keys))
    assert missing.tensor == "rope_factors_long.weight"
    tensors |= {"rope_factors_long.weight": (long, "F32")}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m", tensors, keys=keys))
    rope = read_config(checkpoint.config).layers[0].attention.rope
    assert (rope.scaling, rope.original_max_position, rope.attention_factor) == (
        "longrope",
        64,
        1.25,
    )
    assert (rope.short_factors, rope.long_factors) == (tuple(short.tolist()), tuple(long.tolist()))


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_heads_that_are_rotated_in_part_are_read_as_hugging_face_stores_them(arch, tmp_path):
    """``llama`` files keep a pair side by side, the other ones half of what is rotated apart."""
    weight = torch.arange(64.0)[:, None].expand(64, 32).contiguous()  # 4 heads of 16, 8 rotated
    stored = weight
    if arch == "llama":
        rotated = weight.unflatten(0, (4, 16))[:, :8]
        pairs = rotated.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        stored = torch.cat((pairs, weight.unflatten(0, (4, 16))[:, 8:]), dim=1).flatten(0, 1)
        assert not torch.equal(stored, weight)
    tensors = EMBEDDING | {"blk.0.attn_q.weight": (stored.numpy(), "F32")}
    path = write_gguf(tmp_path / "m.gguf", tensors, arch=arch, keys={"rope.dimension_count": 8})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["partial_rotary_factor"] == 0.5
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(checkpoint.read(q_proj), weight)
    assert torch.equal(checkpoint.read(q_proj, (slice(17, 23),)), weight[17:23])


# What would change the arithmetic and is not implemented.


@pytest.mark.parametrize(
    ("arch", "keys", "says"),
    [
        ("gemma", {}, "architecture 'gemma' is not supported"),
        ("llama", {"expert_count": 8}, "llama.expert_count (here 8)"),
        ("qwen2", {"attention.sliding_window": 32}, "qwen2.attention.sliding_window"),
        ("llama", {"attention.head_count": [4, 4]}, "attention.head_count: must be an integer"),
        ("llama", {"rope.dimension_count": 32}, "rope.dimension_count is 32; it must be even"),
        ("llama", {"rope.dimension_count": 7}, "rope.dimension_count is 7; it must be even"),
        ("llama", {"attention.value_length": 8}, "attention.value_length is 8"),
        ("llama", {"rope.scaling.type": "longrope"}, "needs rope.scaling.original_context_length"),
        ("llama", {"block_count": None}, "llama.block_count: is missing"),
    ],
)
def test_metadata_that_is_not_understood_is_refused_by_name(tmp_path, arch, keys, says):
    error = refusal(write_gguf(tmp_path / "m.gguf", EMBEDDING, arch=arch, keys=keys))
    assert says in str(error)
    assert str(tmp_path / "m.gguf") in str(error)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        (
            "blk.0.ffn_up.weight",
            (random_blocks(4, 256, "IQ3_S"), "IQ3_S"),
            "IQ3_S is not supported",
        ),
        ("blk.0.ffn_up_exps.weight", (noise(2, 4), "F32"), "'blk.0.ffn_up_exps.weight'"),
        ("blk.0.ffn_up.scale", (noise(4), "F32"), "'blk.0.ffn_up.scale'"),
        ("rope_factors_long.weight", (np.ones(8, np.float32), "F32"), "rope_factors_long.weight"),
        ("blk.0.ffn_up.weight", (noise(2, 3, 4), "F32"), "has the shape (2, 3, 4)"),
        ("blk.0.attn_q.weight", (noise(48, 64), "F32"), "has 48 rows, not 4 heads of 16"),
        ("rope_freqs.weight", (noise(4), "F32"), "but 8 frequencies need a divisor each"),
    ],
)
def test_tensors_that_are_not_understood_are_refused_by_name(tmp_path, name, tensor, says):
    error = refusal(write_gguf(tmp_path / "m.gguf", EMBEDDING | {name: tensor}))
    assert says in str(error)
    assert name in str(error)


@pytest.mark.parametrize("key", ["rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"])
@pytest.mark.parametrize("scaling", ["none", "linear", None])
def test_a_factor_of_attention_is_refused_where_the_scaling_would_ignore_it(tmp_path, scaling, key):
    keys = {"rope.scaling.type": scaling, "rope.scaling.factor": 2.0}
    path = write_gguf(tmp_path / "m.gguf", EMBEDDING, keys=keys | {key: 1.5})
    assert f"metadata key llama.{key} is 1.5" in str(refusal(path))
    path = write_gguf(tmp_path / "m.gguf", EMBEDDING, keys=keys | {key: 1.0})
    assert open_checkpoint(path).config


def test_rope_factors_beside_another_scaling_are_refused(tmp_path):
    tensors = EMBEDDING | {"rope_freqs.weight": (np.ones(8, np.float32), "F32")}
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    assert "together with" in str(refusal(write_gguf(tmp_path / "m.gguf", tensors, keys=keys)))


# Damage.


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    whole = write_gguf(
        tmp_path / "m.gguf",
        EMBEDDING | {"blk.0.ffn_up.weight": (noise(64, 64), "Q8_0")},
        general={"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.5, 1.5]},
    ).read_bytes()
    assert open_checkpoint(tmp_path / "m.gguf").tensors.keys() >= {UP_PROJ}
    short = tmp_path / "short.gguf"
    for length in [0, 3, 6, *range(20, 900, 13)]:
        short.write_bytes(whole[:length])
        assert refusal(short).file == short
    short.write_bytes(whole[:-40])
    error = refusal(short)
    assert error.tensor == "blk.0.ffn_up.weight"
    assert "truncated" in str(error)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PK\3\4" + bytes(20), "not a GGUF file"),
        (b"GGUF\1\0\0\0" + bytes(16), "GGUF version 1 is not supported"),
        (b"GGUF\0\0\0\3" + bytes(16), "big-endian"),
        (b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\xff" * 8, "more than its size"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path, data, says):
    (tmp_path / "m.gguf").write_bytes(data)
    assert says in str(refusal(tmp_path / "m.gguf"))


def test_a_header_of_more_than_64_mib_is_not_called_truncated(tmp_path):
    with (tmp_path / "m.gguf").open("wb") as file:
        file.write(b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + (2**26).to_bytes(8, "little"))
        file.truncate(2**27)
    assert "its header is larger than 64 MiB" in str(refusal(tmp_path / "m.gguf"))


def test_tensors_that_overlap_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", EMBEDDING | {"output_norm.weight": (noise(64), "F32")})
    first, second = read_gguf_header(path).tensors
    data = path.read_bytes()
    # The second tensor's offset within the data is the last number of the header.
    offset = (second.offset - first.offset).to_bytes(8, "little")
    at = data.rindex(offset, 0, first.offset)
    path.write_bytes(data[:at] + bytes(8) + data[at + 8 :])
    error = refusal(path)
    assert "within another" in str(error)
    assert error.tensor is not None


def test_a_file_without_an_embedding_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"output_norm.weight": (noise(64), "F32")})
    assert refusal(path).tensor == "token_embd.weight"


# Parts.


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    contents = [EMBEDDING, {"output_norm.weight": (noise(64), "F32")}]
    return [
        write_gguf(tmp_path / f"m-0000{number}-of-00002.gguf", tensors, split=(number - 1, 2, 2))
        for number, tensors in enumerate(contents, start=1)
    ]


def test_a_model_in_parts_is_read_as_one_whichever_part_is_named(parts):
    for part in parts:
        checkpoint = open_checkpoint(part)
        assert checkpoint.path == parts[0]
        assert {n: i.file for n, i in checkpoint.tensors.items()} == {
            "model.embed_tokens.weight": parts[0],
            "model.norm.weight": parts[1],
        }
        assert np.array_equal(checkpoint.read("model.norm.weight").numpy(), noise(64))
        checkpoint.close()


def test_parts_that_are_missing_renamed_or_mixed_up_are_refused(parts):
    alone = parts[0].rename(parts[0].with_name("alone.gguf"))
    assert "split.no 0 (the first is 0) and split.count 2" in str(refusal(alone))
    assert f"{parts[0].name} is missing" in str(refusal(parts[1]))
    parts[0].write_bytes(parts[1].read_bytes())
    assert "split.no 1 (the first is 0) and split.count 2" in str(refusal(parts[1]))


def test_parts_that_hold_a_tensor_twice_or_too_few_are_refused(parts):
    write_gguf(parts[1], EMBEDDING, split=(1, 2, 2))
    error = refusal(parts[0])
    assert (error.file, error.tensor) == (parts[1], "model.embed_tokens.weight")
    write_gguf(parts[0], EMBEDDING, split=(0, 2, 3))
    assert "hold 2 tensors, not 3" in str(refusal(parts[0]))
