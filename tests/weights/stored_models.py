"""Checkpoints in the encodings of other tools, each beside the same model dequantized."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from thread_group import ThreadRanks
from torch import Tensor
from whole_models import CONFIG, load, random_tensors, write_folder

from hotloop import LLM
from hotloop.errors import HotloopError
from hotloop.models import names
from hotloop.models.families import read_config

Stored = tuple[Mapping[str, Tensor], Tensor]
"""The tensors of a matrix by what follows its name, and what it is worth in float32 [N, K]."""

Encode = Callable[[str, Tensor], Stored | None]
"""Stores the matrix of a name; None leaves it as it is."""

RAGGED = {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16}
RAGGED |= {"intermediate_size": 200}
"""Sizes that groups of 32, 64 and 128 do not divide."""


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    """Random integers 0 to 2^bits - 1."""
    return torch.randint(0, 1 << bits, shape, generator=noise(seed))


def scales(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 1) -> Tensor:
    """Scales of either sign."""
    sign = torch.where(torch.rand(shape, generator=noise(seed)) < 0.3, -1.0, 1.0)
    return ((0.5 + torch.rand(shape, generator=noise(seed + 1))) / 100 * sign).to(dtype)


def spread(per_group_NG: Tensor, group_size: int, k: int) -> Tensor:
    """Repeats numbers of groups for each of K input features, in float32: [N, K]."""
    return per_group_NG.float()[:, torch.arange(k) // group_size]


def pack(codes_AB: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Packs codes along the last dimension into int32, lowest bits first, zeros at the end.

    Args:
        codes_AB: Codes.
        bits: Bits of one.
        order: Which code of a word comes at each place; as they are by default.
    """
    each = 32 // bits
    padding = -codes_AB.shape[1] % each
    words = torch.nn.functional.pad(codes_AB, (0, padding)).unflatten(1, (-1, each))
    if order is not None:
        words = words[:, :, list(order)]
    packed = sum(words[:, :, i].long() << bits * i for i in range(each))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()


def write_stored(
    folder: Path,
    encode: Encode,
    description: Mapping[str, Any] | None,
    *,
    file: str = "config.json",
    extra: Mapping[str, Tensor] | None = None,
    **keys: Any,
) -> tuple[Path, Path]:
    """Writes a checkpoint whose matrices ``encode`` stores, and one of what they are worth.

    Args:
        folder: Where to.
        encode: Stores a matrix.
        description: What the quantizer says; None for nothing.
        file: The file that says so.
        extra: Surplus tensors.
        keys: Keys of ``config.json``.
    """
    folder.mkdir(exist_ok=True)
    config = CONFIG | keys
    plain = random_tensors(config, torch.float32)
    stored = {name: tensor.bfloat16() for name, tensor in plain.items()}
    plain = {name: tensor.float() for name, tensor in stored.items()}
    matrices = [*names.linear_weights(read_config(config)), "lm_head"]
    for name in matrices:
        if f"{name}.weight" in plain and (made := encode(name, plain[f"{name}.weight"])):
            del stored[f"{name}.weight"]
            stored |= {
                f"{name}{suffix}": t.clone(memory_format=torch.contiguous_format)
                for suffix, t in made[0].items()
            }
            plain[f"{name}.weight"] = made[1].contiguous()
    described = {} if description is None else {"quantization_config": dict(description)}
    beside = {} if file == "config.json" else described.pop("quantization_config")
    quantized, dense = (
        write_folder(folder / name, **keys) for name in ("quantized", "dequantized")
    )
    (quantized / "config.json").write_text(json.dumps(config | described))
    if beside:
        (quantized / file).write_text(json.dumps(beside))
    save_file(stored | dict(extra or {}), quantized / "model.safetensors")
    save_file(plain, dense / "model.safetensors")
    return quantized, dense


def distribution(model: Path, **options: Any) -> Tensor:
    """Log-probabilities [T, V] of every token of a window, in float32 arithmetic."""
    fixed = {"device": "cpu", "dtype": "float32", "max_seq_len": 32, "quant": "auto"}
    options = fixed | options
    with LLM(str(model), **options) as llm:
        (score,) = llm.score([list(range(5, 29))], full=True)
    assert score.log_probs is not None
    return score.log_probs


def assert_same_model(quantized: Path, dequantized: Path, **options: Any) -> None:
    """A checkpoint as it is stored computes what it computes dequantized."""
    torch.testing.assert_close(
        distribution(quantized, **options), distribution(dequantized, quant="none")
    )


def assert_ranks_hold_slices(model: Path, **options: Any) -> None:
    """Each of two ranks computes with its input features of the whole matrices."""
    options = {"quant": "auto", "dtype": torch.float32} | options
    whole = load(model, **options)
    shards = ThreadRanks(2).run(lambda group: load(model, group=group, **options))
    for i, layer in enumerate(whole.layers):
        theirs, first = layer.feed_forward.down_proj, 0
        for shard in shards:
            ours = shard.layers[i].feed_forward.down_proj
            x = torch.randn(3, ours.k, generator=noise(i)).to(options["dtype"])
            wide = torch.zeros(3, theirs.k, dtype=x.dtype)
            wide[:, first : first + ours.k] = x
            torch.testing.assert_close(ours(x), theirs(wide))
            first += ours.k
        assert first == theirs.k


def refusal(model: Path, **options: Any) -> str:
    """The error with which a checkpoint is refused."""
    with pytest.raises(HotloopError) as caught:
        distribution(model, **options)
    return str(caught.value)
