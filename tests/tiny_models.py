"""Tiny models, made on the spot: one that is random, and one whose logits are written down."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

END, BEGIN = 0, 1
"""Ids of the special tokens of every tokenizer made here."""

N_TOKENS = 300

_CORPUS = """The engine decodes one token after the other; the tokenizer learns from these lines
that the letters of "the", "token" and "there" belong together, and that other letters do not.
"""


@cache
def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE: two special tokens, 256 bytes and some merges."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS,
        special_tokens=["<end>", "<begin>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([_CORPUS], trainer)
    return made


def encode(text: str) -> list[int]:
    return tokenizer().encode(text).ids


def write_text_files(folder: Path, eos: Iterable[int] = (END,), **generation: object) -> None:
    """The tokenizer, and a generation_config.json."""
    tokenizer().save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<end>", "bos_token": "<begin>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    settings = {"eos_token_id": sorted(eos), **generation}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def write_random(
    folder: Path,
    *,
    eos: Iterable[int] = (END,),
    model_type: str = "llama",
    n_layers: int = 2,
    embedding_std: float = 1.0,
    **keys: object,
) -> Path:
    """A random model with logits far enough apart that rounding does not decide."""
    shape = {
        "vocab_size": N_TOKENS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 320,
    }
    config = AutoConfig.for_model(model_type, **shape | keys)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                middle = 0.0 if name.endswith("bias") else 1.0
                parameter.normal_(middle, 0.1, generator=noise)
            else:
                std = embedding_std if "embed" in name else 1.5 * parameter.shape[1] ** -0.5
                parameter.normal_(0, std, generator=noise)
    model.save_pretrained(folder)
    write_text_files(folder, eos)
    return folder


def write_markov(
    folder: Path,
    logits_VV: Tensor,
    *,
    eos: Iterable[int] = (END,),
    max_position: int = 64,
    n_layers: int = 1,
) -> Path:
    """A Llama whose next-token logits are row ``t`` of ``logits_VV`` after token ``t``, exactly.

    Attention and feed-forward add nothing, the embedding is the identity and the final norm
    stretches it to the square root of V, which the head takes back.
    """
    V = logits_VV.shape[0]
    keys = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": V,
        "hidden_size": V,
        "intermediate_size": 2,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 1,
        "max_position_embeddings": max_position,
        "rms_norm_eps": 0.0,
        "tie_word_embeddings": False,
    }
    zero = torch.zeros(V, V)
    layer = {
        **{f"self_attn.{x}_proj": zero.clone() for x in "qkvo"},
        "mlp.gate_proj": torch.zeros(2, V),
        "mlp.up_proj": torch.zeros(2, V),
        "mlp.down_proj": torch.zeros(V, 2),
        "input_layernorm": torch.ones(V),
        "post_attention_layernorm": torch.ones(V),
    }
    tensors = {
        f"model.layers.{i}.{name}.weight": tensor.clone()
        for i in range(n_layers)
        for name, tensor in layer.items()
    }
    tensors |= {
        "model.embed_tokens.weight": torch.eye(V),
        "model.norm.weight": torch.ones(V),
        "lm_head.weight": (logits_VV.T / V**0.5).contiguous(),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(keys))
    write_text_files(folder, eos)
    return folder


def write_script(folder: Path, ids: Sequence[int], **options: object) -> Path:
    """A model that answers the first of ``ids`` with the others, in order, and goes round."""
    assert len(set(ids)) == len(ids), "a token is followed by one other"
    logits_VV = torch.zeros(N_TOKENS, N_TOKENS)
    for here, following in zip(ids, [*ids[1:], ids[0]], strict=True):
        logits_VV[here, following] = 20.0
    return write_markov(folder, logits_VV, **options)
