"""The small JSON files that lie beside a tokenizer, and what they say about special tokens.

Hugging Face's names are the vocabulary used everywhere in ``text``: a GGUF file's keys are turned
into them on reading, so that there is one meaning and one way to save it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hotloop.errors import CheckpointError

TOKENIZER_CONFIG = "tokenizer_config.json"
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


def read_text(file: Path) -> str:
    """The text in a UTF-8 file.

    Raises:
        CheckpointError: The file is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(file, f"not UTF-8 text: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        CheckpointError: The file is not JSON, or holds something other than an object.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise CheckpointError(file, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(file, f"must hold a JSON object, not a {type(value).__name__}")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> Path:
    """Writes an object as indented JSON and returns where."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens of a ``tokenizer_config.json``, such as ``bos_token``, as text."""
    named = {name: token_text(config.get(name)) for name in SPECIAL_TOKEN_NAMES}
    return {name: text for name, text in named.items() if text is not None}


def all_special_texts(config: Mapping[str, Any]) -> list[str]:
    """The named special tokens and those without a name."""
    extra = [
        token
        for key in ("additional_special_tokens", "extra_special_tokens")
        for token in config.get(key) or ()
    ]
    texts = [*special_tokens(config).values(), *map(token_text, extra)]
    return [text for text in dict.fromkeys(texts) if text]


def token_text(token: Any) -> str | None:
    """A token as configurations spell it, plainly or as an object, as text."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def token_ids(file: Path, config: Mapping[str, Any], key: str) -> frozenset[int]:
    """The token ids under a key that holds one, a list of them, or nothing.

    Raises:
        CheckpointError: The key holds something else.
    """
    value = config.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(v) is int and v >= 0 for v in values):
        raise CheckpointError(file, f"{key} must be a token id or a list of them, not {value!r}")
    return frozenset(values)
