"""Reads the tokenizer of a GGUF file, as llama.cpp does.

A GGUF file has a vocabulary and the *name* of the pre-tokenizer: the rules that split text before
it is merged into tokens. llama.cpp has a table of these rules; this module has the rules of the
models that hotloop runs. Other names are refused: wrong rules would give tokens with which the
model was not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tokenizers
from pydantic import ConfigDict, FailFast, Field
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyrefly: ignore[missing-module-attribute]  (protobuf makes it at import)
)
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from hotloop.errors import CheckpointError, UnknownNameError, UnsupportedError, shorten_value
from hotloop.text.backends import (
    Backend,
    JsonBackend,
    SentencePieceBackend,
    library_errors,
    sentencepiece_names,
    set_bos_eos,
)
from hotloop.text.config_files import (
    DEFAULT_TEMPLATE,
    TOOL_TEMPLATE,
    TokenizerConfig,
    named_templates,
)
from hotloop.text.end_markers import (
    CODE_END_MARKERS,
    CODE_PART_MARKERS,
    END_MARKERS,
    end_ids_by_spelling,
)
from hotloop.untrusted import StrictModel, validated

_PREFIX = "tokenizer.ggml."

# Token types, with the numbers of SentencePiece.
_UNDEFINED, _NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(7)

_CONTROL_SPELLINGS = END_MARKERS | CODE_END_MARKERS | CODE_PART_MARKERS
"""Spellings of tokens that are control tokens whatever their type: some converters wrote them as
text."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

# Letters with a case, except those of the ranges that are missing from DeepSeek's list.
_DEEPSEEK_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8a\u2d00-\u2d2d\ua790-\ua7fa"
    r"\uab30-\uab68\x{10570}-\x{105bc}\x{10d50}-\x{10d85}\x{16e40}-\x{16e7f}"
    r"\x{1d400}-\x{1d7cb}\x{1df00}-\x{1df2a}]]"
)
_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True, kw_only=True)
class _PreTokenizer:
    """What the name of a pre-tokenizer stands for: how text is split before merging, and settings.

    Attributes:
        patterns: Regular expressions. Each splits the pieces of the previous one into matches and
            the text between.
        nfc: Text is normalized to NFC first.
        ignore_merges: A piece that is a token is encoded as that token, without merges.
        add_bos: The default of ``add_bos_token``.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_DEFAULT = _PreTokenizer(
    patterns=(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
)
"""llama.cpp's rules for files without a name. No model was trained with them."""

_DEFAULT_NOTE = (
    f"{_PREFIX}pre is missing: text is split by llama.cpp's default rules, which may differ from "
    "the "
    "model's. Convert the model again with a current converter."
)

_PRE_TOKENIZERS = {
    name: pre_tokenizer
    for names, pre_tokenizer in (
        ("default", _DEFAULT),
        ("gpt-2 phi-2 olmo mpt jais exaone4 trillion", _PreTokenizer(patterns=(_GPT2,))),
        (
            "smollm starcoder refact command-r codeshell exaone minerva-7b",
            _PreTokenizer(patterns=(r"\p{N}", _GPT2)),
        ),
        (
            "llama-bpe llama-v3 llama3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
            _PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True),
        ),
        ("smaug-bpe dbrx", _PreTokenizer(patterns=(_LLAMA3,))),
        ("qwen2", _PreTokenizer(patterns=(_QWEN2,), nfc=True)),
        ("deepseek-r1-qwen megrez stablelm2 hunyuan", _PreTokenizer(patterns=(_QWEN2,))),
        ("tekken", _PreTokenizer(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True)),
        (
            "deepseek-llm",
            _PreTokenizer(
                patterns=(
                    r"[\r\n]",
                    rf"\s?{_DEEPSEEK_LETTERS}+",
                    r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                    r"\s+$",
                    _CJK,
                    r"\p{N}+",
                )
            ),
        ),
        (
            "deepseek-coder",
            _PreTokenizer(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
        ),
    )
    for name in names.split()
}


class _Keys(StrictModel):
    """The keys of a tokenizer, by their names without the prefix."""

    model_config = ConfigDict(alias_generator=lambda name: _PREFIX + name)

    model: str
    pre: str | None = None
    tokens: Annotated[list[str], FailFast(), Field(min_length=1)]
    token_type: Annotated[
        list[Annotated[int, Field(ge=_UNDEFINED, le=_BYTE)]] | None, FailFast()
    ] = None
    scores: Annotated[list[float] | None, FailFast()] = None
    merges: Annotated[list[str] | None, FailFast()] = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False
    precompiled_charsmap: Annotated[
        list[Annotated[int, Field(ge=-128, le=255)]] | None, FailFast()
    ] = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    eom_token_id: int | None = None
    unknown_token_id: int | None = None
    padding_token_id: int | None = None
    fim_pad_token_id: int | None = None
    fim_rep_token_id: int | None = None
    fim_sep_token_id: int | None = None
    chat_template: Annotated[str | None, Field(alias="tokenizer.chat_template")] = None
    tool_template: Annotated[str | None, Field(alias="tokenizer.chat_template.tool_use")] = None


_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_CODE_END_IDS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_MAY_BE_OUT_OF_RANGE = ("unknown_token_id", "padding_token_id", *_CODE_END_IDS)
"""Keys whose ids are ignored if they are outside the vocabulary, as they are in some files."""


class GGUFVocabulary(NamedTuple):
    """The tokenizer of a GGUF file.

    Attributes:
        backend: The vocabulary.
        config: The equivalent ``tokenizer_config.json``.
        end_ids: The tokens that end an answer.
        notes: Remarks for the user.
    """

    backend: Backend
    config: dict[str, Any]
    end_ids: frozenset[int]
    notes: tuple[str, ...]


def read_gguf_vocabulary(file: Path, metadata: Mapping[str, Any]) -> GGUFVocabulary:
    """Builds the tokenizer that a GGUF file's metadata describe.

    Args:
        file: The file, for error messages.
        metadata: Its keys and values.

    Raises:
        CheckpointError: The metadata are incomplete or inconsistent.
        UnsupportedError: The kind of tokenizer, or its pre-tokenizer, is not supported.
    """
    kind = metadata.get(f"{_PREFIX}model")
    if kind is None:
        raise CheckpointError(file, f"holds no tokenizer: {_PREFIX}model is missing")
    if isinstance(kind, str) and kind not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{file}: {_PREFIX}model {shorten_value(kind)} is not supported. "
            "'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE) are."
        )
    known = {field.alias for field in _Keys.model_fields.values()}
    keys = validated(_Keys, {k: v for k, v in metadata.items() if k in known}, file)
    # An empty text would match everywhere. llama.cpp renames it in the same way.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(keys.tokens)]
    types = [_NORMAL] * len(tokens) if keys.token_type is None else keys.token_type
    if len(types) != len(tokens):
        raise CheckpointError(
            file, f"{_PREFIX}token_type: {len(tokens)} tokens but {len(types)} token types"
        )
    types = [
        _CONTROL if token in _CONTROL_SPELLINGS else kind
        for token, kind in zip(tokens, types, strict=True)
    ]

    ids: dict[str, int] = {}
    for key in (*_NAMES.values(), *_END_IDS, *_CODE_END_IDS):
        token_id = getattr(keys, key)
        if token_id is None or (key in _MAY_BE_OUT_OF_RANGE and token_id not in range(len(tokens))):
            continue
        if token_id not in range(len(tokens)):
            raise CheckpointError(
                file,
                f"{_PREFIX}{key} {shorten_value(token_id)} is not among the {len(tokens)} tokens",
            )
        ids[key] = token_id
    config: dict[str, Any] = {name: tokens[ids[key]] for name, key in _NAMES.items() if key in ids}
    templates = {DEFAULT_TEMPLATE: keys.chat_template, TOOL_TEMPLATE: keys.tool_template}
    if any(templates.values()):
        config["chat_template"] = named_templates(templates)

    notes: tuple[str, ...] = ()
    if kind == "gpt2":
        pre_tokenizer = _pre_tokenizer(file, keys.pre)
        backend, config = _byte_level_backend(file, keys, pre_tokenizer, tokens, types, config)
        if pre_tokenizer is _DEFAULT:
            notes = (_DEFAULT_NOTE,)
    else:
        backend, config = _sentencepiece_backend(file, keys, tokens, types, config)
    named = {ids[key] for key in (*_END_IDS, *_CODE_END_IDS) if key in ids}
    ends = named | end_ids_by_spelling(backend.added_ids, backend.special_ids)
    return GGUFVocabulary(backend, config, frozenset(ends), notes)


def _byte_level_backend(
    file: Path,
    keys: _Keys,
    pre_tokenizer: _PreTokenizer,
    tokens: list[str],
    types: list[int],
    config: dict[str, Any],
) -> tuple[JsonBackend, dict[str, Any]]:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(file, f"{_PREFIX}tokens holds a token twice")
    if keys.merges is None:
        raise CheckpointError(file, f"{_PREFIX}merges is missing")
    merges: list[tuple[str, str]] = []
    for merge in keys.merges:
        at = merge.find(" ", 1)  # the first half can begin with a space, as in llama.cpp
        if at < 0:
            raise CheckpointError(file, f"{_PREFIX}merges: {shorten_value(merge)} is not a pair")
        merges.append((merge[:at], merge[at + 1 :]))
    with library_errors(file, "tokens and merges do not fit together"):
        model = models.BPE(vocabulary, merges, ignore_merges=pre_tokenizer.ignore_merges)
        tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), behavior="isolated") for p in pre_tokenizer.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(tokens, types, _CONTROL, _UNKNOWN))
    tokenizer.add_tokens(_added(tokens, types, _USER_DEFINED))

    config = {
        **config,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _or_default(keys.add_bos_token, pre_tokenizer.add_bos),
        "add_eos_token": _or_default(keys.add_eos_token, False),
    }
    set_bos_eos(
        tokenizer,
        config.get("bos_token") if config["add_bos_token"] else None,
        config.get("eos_token") if config["add_eos_token"] else None,
    )
    return JsonBackend(tokenizer, file), config


def _added(tokens: list[str], types: list[int], *kinds: int) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in kinds
    ]


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _pre_tokenizer(file: Path, name: str | None) -> _PreTokenizer:
    if name is None:
        return _DEFAULT
    if name not in _PRE_TOKENIZERS:
        unknown = UnknownNameError(f"{_PREFIX}pre", name, _PRE_TOKENIZERS)
        raise UnsupportedError(f"{file}: {unknown}")
    return _PRE_TOKENIZERS[name]


def _sentencepiece_backend(
    file: Path,
    keys: _Keys,
    tokens: list[str],
    types: list[int],
    config: dict[str, Any],
) -> tuple[SentencePieceBackend, dict[str, Any]]:
    if keys.scores is None:
        raise CheckpointError(file, f"{_PREFIX}scores is missing")
    if len(keys.scores) != len(tokens):
        raise CheckpointError(
            file, f"{_PREFIX}scores: {len(tokens)} tokens but {len(keys.scores)} scores"
        )
    # User-defined tokens are matched in the raw text, before SentencePiece encodes the rest.
    in_model = {_USER_DEFINED: _NORMAL, _UNDEFINED: _UNUSED}
    proto = ModelProto()
    for token, score, kind in zip(tokens, keys.scores, types, strict=True):
        proto.pieces.add(piece=token, score=score, type=in_model.get(kind, kind))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = _BYTE in types
    for name in ("bos", "eos", "unk"):
        if piece := config.get(f"{name}_token"):
            setattr(trainer, f"{name}_piece", piece)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = keys.add_space_prefix
    normalizer.remove_extra_whitespaces = keys.remove_extra_whitespaces
    charsmap = bytes(byte & 0xFF for byte in keys.precompiled_charsmap or ())
    normalizer.precompiled_charsmap = charsmap

    config = {
        **sentencepiece_names(proto),
        **config,
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,  # a space after every added token, as in llama.cpp
        "add_bos_token": _or_default(keys.add_bos_token, True),
        "add_eos_token": _or_default(keys.add_eos_token, False),
        "added_tokens_decoder": {
            str(i): {"content": token, "special": False, "normalized": False}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == _USER_DEFINED
        },
    }
    return SentencePieceBackend(proto, file, validated(TokenizerConfig, config, file)), config
