"""Tiny models with everything that belongs to one, as folders and as GGUF files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from weights_files import RANDOM_BLOCKS, llama_rows, weight_blocks, write_gguf

from hotloop.kernels.attention import torch_attention
from hotloop.models import names
from hotloop.models.config import ModelConfig
from hotloop.models.decoder import Decoder
from hotloop.models.families import read_config
from hotloop.parallel.collectives import Group
from hotloop.parallel.plan import Shard
from hotloop.quant import Scheme, parse_head_scheme, parse_scheme
from hotloop.weights.calibration import importance_for
from hotloop.weights.checkpoint import Checkpoint, open_checkpoint, read_model
from hotloop.weights.identity import read_quantization
from hotloop.weights.load import SelfDraft, load_weights
from hotloop.weights.recognition import recognize_matrices
from hotloop.weights.source import CheckpointSource, Source, schemes_by_name

CPU = torch.device("cpu")
ALONE = Group()
VOCABULARY = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<s>", "</s>"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 11, "max_new_tokens": 5}

Change = Callable[[dict[str, Tensor]], object]


def random_tensors(
    config: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """A tensor of every name that the model has; norms are near one."""
    noise = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in names.tensors(read_config(config)).items():
        std = 0.1 if len(shape) == 1 else shape[1] ** -0.5
        tensor = torch.empty(shape).normal_("norm" in name, std, generator=noise)
        tensors[name] = tensor.to(dtype)
    return tensors


def write_folder(
    folder: Path,
    change: Change | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    **keys: Any,
) -> Path:
    """A model as Hugging Face lays it out; ``change`` may damage its tensors first."""
    folder.mkdir(exist_ok=True)
    tensors = random_tensors(CONFIG | keys, dtype)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | keys))
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(VOCABULARY)}, merges=[("a", "b")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": "{{ messages[0].content }}!"})
    )
    settings = SAMPLING | {"eos_token_id": [VOCABULARY.index("</s>")]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def gguf_keys() -> dict[str, int]:
    """Metadata of the model's shape in a GGUF file."""
    return {
        "block_count": CONFIG["num_hidden_layers"],
        "context_length": CONFIG["max_position_embeddings"],
        "feed_forward_length": CONFIG["intermediate_size"],
    }


def write_gguf_model(
    path: Path,
    kind: str = "Q8_0",
    *,
    tied: bool,
    kinds: Mapping[str, str] | None = None,
    **keys: Any,
) -> Path:
    """The same model as one GGUF file with its tokenizer.

    Args:
        path: Where to.
        kind: The type of matrices.
        tied: The head is the embedding.
        kinds: Other types of some matrices, by their names in the file, without a layer; random
            blocks where the gguf package cannot quantize to a type.
        keys: Keys of ``config.json``.
    """
    config = CONFIG | {"tie_word_embeddings": tied} | keys
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    tensors = {}
    for name, tensor in random_tensors(config, torch.float32).items():
        name = name.removesuffix(".weight")
        if name not in whole:
            layer, part = name.removeprefix("model.layers.").split(".", 1)
            if n_heads := heads.get(part.split(".")[-1]):
                tensor = llama_rows(tensor, n_heads)
        stored = whole[name] if name in whole else f"blk.{layer}.{parts[part]}"
        own = (kinds or {}).get(stored.split(".")[-1], kind) if tensor.dim() == 2 else "F32"
        array = tensor.numpy()
        if own in RANDOM_BLOCKS:
            array = weight_blocks(*array.shape, own)
        tensors[f"{stored}.weight"] = (array, own)
    text = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": VOCABULARY,
        "tokenizer.ggml.token_type": [1] * (len(VOCABULARY) - 2) + [3, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": VOCABULARY.index("</s>"),
        "general.sampling.temp": 0.7,
    }
    sizes = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
    }
    if "head_dim" in config:
        sizes |= dict.fromkeys(
            ("attention.key_length", "attention.value_length"), config["head_dim"]
        )
        sizes["rope.dimension_count"] = config["head_dim"]
    return write_gguf(path, tensors, keys=gguf_keys() | sizes, general=text)


def plan(model: ModelConfig, n: int, schemes: str | Mapping[str, Scheme]) -> tuple[Shard, ...]:
    """The shard of each of n ranks; matrices of layers have one scheme, or each its own."""
    if isinstance(schemes, str):
        alignment = parse_scheme(schemes).alignment
        return model.shards(n, lambda _i, _part: alignment)
    return model.shards(n, lambda i, part: schemes[names.layer(i, part.name)].alignment)


def load_from(
    checkpoint: Checkpoint | None,
    source: Source,
    model: ModelConfig,
    *,
    quant: str = "none",
    head: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    group: Group = ALONE,
    fused: bool = False,
    draft: str | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Decoder:
    """``draft`` is the scheme of a drafter, which becomes the decoder's ``draft_decoder``."""
    scheme = parse_scheme(quant)
    stored = {} if checkpoint is None else recognize_matrices(checkpoint, model)
    schemes = schemes_by_name(model, scheme, parse_head_scheme(head, scheme), stored)
    shard = plan(model, group.size, schemes)[group.rank]
    decoder = Decoder(
        model.local(shard),
        n_positions=8,
        attention=torch_attention,
        device=CPU,
        n_head_rows=len(shard.vocabulary),
    )
    self_draft = None
    if draft is not None:
        decoder.draft_decoder = Decoder(
            model.local(shard),
            n_positions=8,
            attention=torch_attention,
            device=CPU,
            n_head_rows=len(shard.vocabulary),
            target=decoder,
        )
        drafts = schemes_by_name(model, parse_scheme(draft), parse_scheme("int8"))
        self_draft = SelfDraft(decoder=decoder.draft_decoder, schemes=drafts, reduce_max=group.max)
    try:
        load_weights(
            decoder,
            model,
            source,
            shard=shard,
            adds_biases=group.rank == 0,
            schemes=schemes,
            dtype=dtype,
            device=CPU,
            fused=fused,
            draft=self_draft,
            on_layer=on_layer,
        )
    finally:
        if checkpoint is not None:
            checkpoint.close()
    return decoder


def load(path: Path, *, group: Group = ALONE, **options: Any) -> Decoder:
    """A decoder with the weights at ``path``, as the engine loads them on a rank."""
    checkpoint = open_checkpoint(path)
    if stored := read_quantization(checkpoint.config, checkpoint.config_file):
        options = {"quant": stored.scheme, "head": stored.head} | options
    model, _ = read_model(checkpoint)
    dtype = options.get("dtype", torch.bfloat16)
    scheme = parse_scheme(options.get("quant", "none"))
    head = parse_head_scheme(options.get("head", "auto"), scheme)
    schemes = schemes_by_name(model, scheme, head)
    importance = importance_for(schemes, checkpoint, model, CPU)
    source = CheckpointSource(
        checkpoint, CPU, model=model, dtype=dtype, reduce_max=group.max, importance=importance
    )
    return load_from(checkpoint, source, model, group=group, **options)


def assert_same_weights(a: Decoder, b: Decoder) -> None:
    """Bit for bit, as packed, in the same order."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
