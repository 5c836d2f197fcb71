"""Reads the JSON files beside a tokenizer, in particular their special tokens.

Hugging Face's names are used everywhere in ``text``: the keys of a GGUF file are translated to them
on reading, so that there is one meaning and one way to save it. As in transformers, the effect of a
key can depend on ``tokenizer_class``: some classes add BOS whatever the vocabulary file says, and
others ignore the key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from hotloop import untrusted
from hotloop.checked import MAX_COUNT
from hotloop.errors import shorten_value
from hotloop.untrusted import StrictModel, TokenId, validated

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)

MAX_TOKEN_CHARS = 10_000
"""The most characters of an added token."""


def read_optional_json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; empty if the file is missing or empty.

    Raises:
        CheckpointError: The file is not JSON, or holds something other than an object.
    """
    text = untrusted.read_text(file) if path_exists(file) else ""
    return untrusted.parse_json(text, file) if text.strip() else {}


def path_exists(file: Path) -> bool:
    """Returns whether a path exists; a broken link does, unlike a missing file."""
    return os.path.lexists(file)


# ----------------------------------------------------------------------------------- special tokens


class Token(StrictModel):
    """A token of a configuration: its text, and how it is matched."""

    model_config = ConfigDict(extra="ignore")

    content: Annotated[str, Field(max_length=MAX_TOKEN_CHARS)]
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    special: bool = False


def _as_token(value: Any) -> Any:
    return {"content": value, "special": True} if isinstance(value, str) else value


def _values(value: Any) -> Any:
    return list(value.values()) if isinstance(value, dict) else value


def _as_token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal()) or len(key) > 10 or int(key) > MAX_COUNT:
        raise ValueError(f"{shorten_value(key)} is not a token id")
    return int(key)


_Token = Annotated[Token, BeforeValidator(_as_token)]
_TokenKey = Annotated[str, BeforeValidator(lambda key: str(_as_token_id(key)))]


class _NamedTemplate(StrictModel):
    name: str
    template: str


DEFAULT_TEMPLATE, TOOL_TEMPLATE = "default", "tool_use"
"""Names of chat templates: for all conversations, and for those with tools."""


def named_templates(templates: Mapping[str, str | None]) -> str | list[dict[str, str]]:
    """Returns the value of ``chat_template`` in a ``tokenizer_config.json``.

    Args:
        templates: The templates by name; None for a name without one.
    """
    given = {name: template for name, template in templates.items() if template is not None}
    if given.keys() == {DEFAULT_TEMPLATE}:
        return given[DEFAULT_TEMPLATE]
    return [{"name": name, "template": template} for name, template in given.items()]


def _as_templates(value: Any) -> Any:
    return [{"name": DEFAULT_TEMPLATE, "template": value}] if isinstance(value, str) else value


class TokenizerConfig(StrictModel):
    """The keys of a ``tokenizer_config.json`` that hotloop reads; it ignores others."""

    model_config = ConfigDict(extra="ignore")

    tokenizer_class: str | None = None
    bos_token: _Token | None = None
    eos_token: _Token | None = None
    unk_token: _Token | None = None
    pad_token: _Token | None = None
    sep_token: _Token | None = None
    cls_token: _Token | None = None
    mask_token: _Token | None = None
    additional_special_tokens: list[_Token] | None = None
    extra_special_tokens: Annotated[list[_Token] | None, BeforeValidator(_values)] = None
    own_special_tokens: tuple[_Token, ...] = ()
    added_tokens_decoder: dict[_TokenKey, Token] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    chat_template: Annotated[list[_NamedTemplate] | None, BeforeValidator(_as_templates)] = None

    @model_validator(mode="before")
    @classmethod
    def _collect_own_names(cls, value: Any) -> Any:
        """Collects special tokens with model-specific names, such as ``image_token``."""
        if not isinstance(value, dict):
            return value
        own = [
            token
            for key, token in value.items()
            if key.endswith("_token") and key not in cls.model_fields and isinstance(token, str)
        ]
        return {**value, "own_special_tokens": tuple(own)}

    @property
    def names(self) -> dict[str, str]:
        """The texts of named special tokens, by name, such as ``bos_token``."""
        named = {name: getattr(self, name) for name in SPECIAL_TOKEN_NAMES}
        return {name: token.content for name, token in named.items() if token and token.content}

    @property
    def special(self) -> dict[str, Token]:
        """All special tokens, with or without a name, by their text."""
        tokens = [
            *(getattr(self, name) for name in SPECIAL_TOKEN_NAMES),
            *(self.additional_special_tokens or ()),
            *(self.extra_special_tokens or ()),
            *self.own_special_tokens,
        ]
        return {token.content: token for token in tokens if token and token.content}

    @property
    def added(self) -> dict[int, Token]:
        """The tokens added to the vocabulary, by id, in the order of ids."""
        tokens = {int(i): token for i, token in (self.added_tokens_decoder or {}).items()}
        return dict(sorted(tokens.items()))

    def template(self, name: str) -> str | None:
        """Returns the chat template named ``name``; a template without a name is ``default``."""
        named = {entry.name: entry.template for entry in self.chat_template or ()}
        return named.get(name)

    @property
    def kind(self) -> TokenizerClass:
        """The behavior of the tokenizer class."""
        return _CLASSES.get((self.tokenizer_class or "").removesuffix("Fast"), TokenizerClass())


@dataclass(frozen=True, kw_only=True)
class TokenizerClass:
    """Behavior of a tokenizer class of transformers beyond its ``tokenizer.json``.

    Attributes:
        applies_bos_eos: It follows ``add_bos_token`` and ``add_eos_token``, whatever tokens
            the file adds around a text. Other classes follow the file. (This is the behavior of
            transformers 4, with which models of these classes were made; transformers 5 follows
            the keys if there is no ``tokenizer.json``.)
        adds_bos: It adds BOS by default, without ``add_bos_token``.
        applies_prefix_space: It follows ``add_prefix_space``.
        names: Its special tokens, if the configuration names none.
    """

    applies_bos_eos: bool = False
    adds_bos: bool = False
    applies_prefix_space: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


_TEXT_END = "<|endoftext|>"
_LLAMA = TokenizerClass(
    applies_bos_eos=True,
    adds_bos=True,
    applies_prefix_space=True,
    names={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
)
_CLASSES = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GemmaTokenizer": TokenizerClass(
        applies_bos_eos=True,
        adds_bos=True,
        names={
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
    ),
    "CohereTokenizer": TokenizerClass(
        applies_bos_eos=True,
        adds_bos=True,
        names={"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
    ),
    "GPTNeoXTokenizer": TokenizerClass(
        applies_bos_eos=True,
        names=dict.fromkeys(("bos_token", "eos_token", "unk_token"), _TEXT_END),
    ),
    "GPT2Tokenizer": TokenizerClass(
        applies_prefix_space=True,
        names=dict.fromkeys(("bos_token", "eos_token", "unk_token"), _TEXT_END),
    ),
    "Qwen2Tokenizer": TokenizerClass(
        applies_prefix_space=True,
        names=dict.fromkeys(("eos_token", "unk_token", "pad_token"), _TEXT_END),
    ),
}

_CLASS_OF_MODEL = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
"""Tokenizer classes of folders that name none, by model type."""


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Reads the files beside a vocabulary, and merges them into one ``tokenizer_config.json``.

    Raises:
        CheckpointError: A file is not JSON, or a value that hotloop reads is of the wrong kind.
    """
    file, older_file = folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS_MAP
    config = read_optional_json(file)
    validated(TokenizerConfig, config, file)
    if "added_tokens_decoder" not in config:  # an old format, with special_tokens_map.json
        older = read_optional_json(older_file)
        validated(TokenizerConfig, older, older_file)
        config = {**config, **older}
    if config.get("tokenizer_class") is None:
        file = folder / MODEL_CONFIG
        model = untrusted.unnest(read_optional_json(file), file)
        for name in (model.get("tokenizer_class"), _class_of_model(model.get("model_type"))):
            if isinstance(name, str):
                config["tokenizer_class"] = name
                break
    return config


def _class_of_model(model_type: Any) -> str | None:
    return _CLASS_OF_MODEL.get(model_type) if isinstance(model_type, str) else None


class _AddedIds(StrictModel):
    ids: dict[
        Annotated[str, Field(max_length=MAX_TOKEN_CHARS)],
        TokenId,
    ]


def read_added_tokens(folder: Path) -> dict[str, int]:
    """Reads the tokens and ids of an ``added_tokens.json``; empty if there is none.

    Raises:
        CheckpointError: It is not JSON, or has values that are not ids.
    """
    file = folder / ADDED_TOKENS
    return validated(_AddedIds, {"ids": read_optional_json(file)}, file).ids


def _as_list(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else [value]


class _EndIds(StrictModel):
    model_config = ConfigDict(extra="ignore")

    eos_token_id: Annotated[list[TokenId] | None, BeforeValidator(_as_list)] = None


def read_end_ids(file: Path) -> frozenset[int]:
    """Reads the ids of ``eos_token_id``, which is one id, a list of them, or nothing.

    Raises:
        HotloopError: The file is not JSON, the key holds something else, or ``text_config`` holds
            another value than the object around it.
    """
    keys = untrusted.unnest(read_optional_json(file), file)
    return frozenset(validated(_EndIds, keys, file).eos_token_id or ())
