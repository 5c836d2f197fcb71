"""Tiny tokenizers of every kind that is read, trained here on text that every Python has."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import sentencepiece
import tokenizers
from gguf import GGUFWriter
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

CORPUS = "\n".join(topics.values())[:60_000] + " 10" * 500

CHATML = (
    "{% for message in messages %}\n"
    "    {%- if message.role not in ['system', 'user', 'assistant'] %}\n"
    "        {{- raise_exception('no role ' + message.role) }}\n"
    "    {%- endif %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TEXTS = (
    "Hello, world! It's 2024, 12345 apples; don't panic.",
    "def f(x):\n\treturn {'a': [x**2, 1.5e-3]}  # done\r\n\n\n",
    "🙂 👩‍👩‍👧‍👦 and 🇩🇪",
    "日本語のテキスト、中文 한국어 ไทย हिन्दी مرحبا",
    "trailing and   inner \n \n\t\t runs   ",
    "naïve Ünïcödé ½ ² Ⅳ a\u00a0b\u2003c\u200bd",
    "",
    CORPUS[10_000:14_000],
)
"""English, code, digits, emoji, scripts, whitespace. None begins with a space: SentencePiece puts
one before it, where transformers' imitation of it does not."""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def byte_level(pre_tokenizer: Any = None, n_tokens: int = 700) -> tokenizers.Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it; ``<think>`` is added as plain text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_tokenizer is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*([pre_tokenizer] * bool(pre_tokenizer)), byte]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def byte_level_folder(folder: Path, **config: Any) -> Path:
    """A folder with a byte-level ``tokenizer.json`` that puts ``<|endoftext|>`` in front."""
    tokenizer = byte_level()
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
            "chat_template": CHATML,
            **config,
        },
    )
    return folder


def llama_json_folder(folder: Path) -> Path:
    """A folder with a ``tokenizer.json`` as Llama 2 has it: SentencePiece in ``tokenizers``."""
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("▁+[^▁]*"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    # The trainer made all of these special; in the model only the first three are.
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    spec["pre_tokenizer"] = None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(
        folder,
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **names},
    )
    return folder


def sentencepiece_model() -> ModelProto:
    """A SentencePiece BPE model as Llama 2 has it."""
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=data,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["<think>"],
        num_threads=1,
        minloglevel=2,
    )
    return ModelProto.FromString(data.getvalue())


def sentencepiece_folder(folder: Path, **config: Any) -> Path:
    """A folder with a ``tokenizer.model`` and, beside it, ``<|im_start|>`` and ``<|im_end|>``."""
    model = sentencepiece_model()
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    n_pieces = len(model.pieces)
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        str(n_pieces + i): {"content": text, "special": True, **plain}
        for i, text in enumerate(SPECIAL[1:])
    }
    write(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": added,
            "chat_template": CHATML,
            **config,
        },
    )
    return folder


def write_gguf(file: Path, fill: Callable[[GGUFWriter], None]) -> Path:
    writer = GGUFWriter(file, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def gguf_byte_level(file: Path, tokenizer: tokenizers.Tokenizer, pre: str | None) -> Path:
    """A GGUF file that holds ``tokenizer`` and names its splitting ``pre``."""

    def fill(writer: GGUFWriter) -> None:
        vocabulary = tokenizer.get_vocab()
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        added = {t.content: t for t in tokenizer.get_added_tokens_decoder().values()}
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(
            [1 if t not in added else 3 if added[t].special else 4 for t in tokens]
        )
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(0)
        writer.add_chat_template(CHATML)

    return write_gguf(file, fill)


def gguf_sentencepiece(file: Path, model: ModelProto) -> Path:
    """A GGUF file that holds a SentencePiece model."""

    def fill(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([piece.piece for piece in model.pieces])
        writer.add_token_scores([piece.score for piece in model.pieces])
        writer.add_token_types([piece.type for piece in model.pieces])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    return write_gguf(file, fill)
