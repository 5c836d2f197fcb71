"""How a model's makers suggest sampling from it.

Read from ``generation_config.json``, or from the ``general.sampling.*`` keys of a GGUF file, and
put into the words of ``SamplingParams``. Suggestions only: whatever the user says goes before them.
The end-of-sequence tokens in the same file are the tokenizer's business (``Tokenizer.eos_ids``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hotloop.errors import CheckpointError, RequestError
from hotloop.gguf_header import model_parts, read_gguf_header
from hotloop.outside import file_kind
from hotloop.text.config_files import GENERATION_CONFIG, read_json, write_json
from hotloop.types import SamplingParams

_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
_GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def generation_defaults(path: Path) -> dict[str, Any]:
    """What a model suggests, as arguments for ``SamplingParams``; only what it does suggest.

    As in Hugging Face's transformers, a ``generation_config.json`` samples only where
    ``do_sample`` is true, at temperature 1 unless it gives another; otherwise it is greedy, and
    the options of sampling beside it mean nothing.

    Args:
        path: A model folder or a ``.gguf`` file.

    Raises:
        CheckpointError: A file that is not valid, or a value that no sampling could use.
    """
    if file_kind(path) == "file":
        file = model_parts(path)[0]
        metadata = read_gguf_header(file).metadata
        found = {field: metadata.get(key) for field, key in _GGUF_KEYS.items()}
    else:
        file = path / GENERATION_CONFIG
        config = read_json(file)
        found = {field: config.get(field) for field in _FIELDS}
        if config.get("do_sample", False):
            found["temperature"] = 1.0 if found["temperature"] is None else found["temperature"]
        elif config:
            found |= {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}
    defaults = {field: value for field, value in found.items() if value is not None}
    try:
        SamplingParams(**defaults)
    except (RequestError, TypeError) as error:
        problem = f"suggests sampling that is not possible: {defaults}: {error}"
        raise CheckpointError(file, problem) from error
    return defaults


def write_generation_config(
    folder: Path,
    *,
    sampling: Mapping[str, Any] | None = None,
    eos_ids: Collection[int] | None = None,
) -> Path:
    """Writes ``generation_config.json``, or changes what is given in one that is there.

    Args:
        folder: The model folder.
        sampling: What ``generation_defaults`` is to return.
        eos_ids: The tokens that end an answer.
    """
    file = folder / GENERATION_CONFIG
    config = read_json(file)
    if sampling is not None:
        config = {key: value for key, value in config.items() if key not in _FIELDS}
        config |= {"do_sample": sampling.get("temperature", 0.0) > 0, **sampling}
    if eos_ids is not None:
        config["eos_token_id"] = sorted(eos_ids)
    return write_json(file, config)
