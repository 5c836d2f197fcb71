"""The tokenizer inside a GGUF file.

A GGUF file holds a vocabulary and the *name* of the rules that split text before it is merged into
tokens; the rules themselves belong to llama.cpp's table and are restated here for the models that
hotloop runs. A name that is not here is refused: the wrong rules still give tokens, only not the
ones the model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyrefly: ignore[missing-module-attribute]  (protobuf makes it at import)
)
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from hotloop.errors import CheckpointError, UnknownNameError, UnsupportedError
from hotloop.text.backends import (
    Backend,
    JsonBackend,
    SentencePieceBackend,
    frame_with,
    sentencepiece_names,
)

_PREFIX = "tokenizer.ggml."

_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")

# Token types; SentencePiece numbers its own alike.
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True)
class _Splitting:
    """How text is split before merging, and what else hangs on the name.

    Attributes:
        pattern: What is split off; None for GPT-2's own pattern.
        digits: Every digit on its own, before anything else.
        nfc: Text is normalized to NFC first.
        ignore_merges: A piece that is a token as a whole is taken as such.
        add_bos: Whether BOS is put in front where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = _Splitting()
_DIGITS = _Splitting(digits=True)
_LLAMA3 = _Splitting(
    pattern=rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, add_bos=True
)
_QWEN2_PATTERN = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = _Splitting(
    pattern=(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    ignore_merges=True,
    add_bos=True,
)

_SPLITTINGS = {
    "default": _GPT2,  # what converters write where the model's own rules are GPT-2's
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _Splitting(pattern=_QWEN2_PATTERN, nfc=True),
    "deepseek-r1-qwen": _Splitting(pattern=_QWEN2_PATTERN),
    "tekken": _TEKKEN,
}


def read_gguf_vocabulary(
    file: Path, metadata: Mapping[str, Any]
) -> tuple[Backend, dict[str, Any], frozenset[int]]:
    """Builds the tokenizer that a GGUF file's metadata describe.

    Args:
        file: The file, for error messages.
        metadata: Its keys and values.

    Returns:
        The backend, what a ``tokenizer_config.json`` would say, and the token ids that end an
        answer.

    Raises:
        CheckpointError: The metadata are incomplete or contradict themselves.
        UnsupportedError: A kind of tokenizer, or of splitting, that is not known here.
    """
    kind = metadata.get(f"{_PREFIX}model")
    if kind is None:
        raise CheckpointError(file, "holds no tokenizer: tokenizer.ggml.model is missing")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{file}: tokenizer.ggml.model {kind!r} is not supported. "
            "'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE) are."
        )
    tokens = _required(file, metadata, "tokens", str)
    types = metadata.get(f"{_PREFIX}token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(file, f"{len(tokens)} tokens but {len(types)} token types")

    def id_of(key: str) -> int | None:
        token_id = metadata.get(_PREFIX + key)
        if token_id is not None and token_id not in range(len(tokens)):
            raise CheckpointError(file, f"{_PREFIX}{key} {token_id!r} is not among the tokens")
        return token_id

    config: dict[str, Any] = {
        name: tokens[token_id]
        for name, key in _SPECIAL_IDS.items()
        if (token_id := id_of(key)) is not None
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    end_ids = frozenset(i for key in _END_IDS if (i := id_of(key)) is not None)
    build = _byte_level_backend if kind == "gpt2" else _sentencepiece_backend
    backend, config = build(file, metadata, tokens, types, config)
    return backend, config, end_ids


def _byte_level_backend(
    file: Path,
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    config: dict[str, Any],
) -> tuple[JsonBackend, dict[str, Any]]:
    splitting = _splitting(file, metadata)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(file, "tokenizer.ggml.tokens holds a token twice")
    merges = [
        (a, b) for a, _, b in (m.partition(" ") for m in _required(file, metadata, "merges", str))
    ]
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=splitting.ignore_merges)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(file, f"tokens and merges do not fit together: {error}") from error

    tokenizer = tokenizers.Tokenizer(model)
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=splitting.pattern is None
    )
    first: list[pre_tokenizers.PreTokenizer] = []
    if splitting.digits:
        first.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern is not None:
        first.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token_type, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                AddedToken(t, normalized=False)
                for t, k in zip(tokens, types, strict=True)
                if k == token_type
            ]
        )

    config = {
        **config,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": metadata.get(f"{_PREFIX}add_bos_token", splitting.add_bos),
        "add_eos_token": metadata.get(f"{_PREFIX}add_eos_token", False),
    }
    frame_with(
        tokenizer,
        config.get("bos_token") if config["add_bos_token"] else None,
        config.get("eos_token") if config["add_eos_token"] else None,
    )
    return JsonBackend(tokenizer, file), config


def _splitting(file: Path, metadata: Mapping[str, Any]) -> _Splitting:
    name = metadata.get(f"{_PREFIX}pre")
    if name is None:
        raise UnsupportedError(
            f"{file} does not say how its tokenizer splits text: tokenizer.ggml.pre is missing. "
            "It was made before llama.cpp recorded that; convert the model again."
        )
    if name not in _SPLITTINGS:
        raise UnsupportedError(
            f"{file}: {UnknownNameError('tokenizer.ggml.pre', name, _SPLITTINGS)}"
        )
    return _SPLITTINGS[name]


def _sentencepiece_backend(
    file: Path,
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    config: dict[str, Any],
) -> tuple[SentencePieceBackend, dict[str, Any]]:
    scores = _required(file, metadata, "scores", float)
    if len(scores) != len(tokens):
        raise CheckpointError(file, f"{len(tokens)} tokens but {len(scores)} scores")
    proto = ModelProto()
    for token, score, token_type in zip(tokens, scores, types, strict=True):
        # Converters write the spaces of tokens that users defined as such.
        piece = token.replace(" ", "▁") if token_type == _USER_DEFINED else token
        try:
            proto.pieces.add(piece=piece, score=score, type=token_type)
        except ValueError as error:
            raise CheckpointError(file, f"token {token!r}: {error}") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = _BYTE in types
    for name in ("bos", "eos", "unk"):
        if piece := config.get(f"{name}_token"):
            setattr(trainer, f"{name}_piece", piece)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = metadata.get(f"{_PREFIX}add_space_prefix", True)
    normalizer.remove_extra_whitespaces = metadata.get(f"{_PREFIX}remove_extra_whitespaces", False)
    normalizer.precompiled_charsmap = bytes(metadata.get(f"{_PREFIX}precompiled_charsmap", ()))

    config = {
        **sentencepiece_names(proto),
        **config,
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,  # a space after every special token, as llama.cpp has it
        "add_bos_token": metadata.get(f"{_PREFIX}add_bos_token", True),
        "add_eos_token": metadata.get(f"{_PREFIX}add_eos_token", False),
    }
    return SentencePieceBackend(proto, file, config), config


def _required(file: Path, metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(_PREFIX + key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise CheckpointError(file, f"{_PREFIX}{key} is missing or is no list of {kind.__name__}")
    return values
