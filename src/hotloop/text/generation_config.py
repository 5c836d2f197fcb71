"""Reads the default sampling options that come with a model.

They are in ``generation_config.json``, or in the ``general.sampling.*`` keys of a GGUF file, and
become arguments of ``SamplingParams``. The user's own options take precedence. The end-of-sequence
tokens in the same file are read by the tokenizer (``Tokenizer.eos_ids``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationInfo

from hotloop.checked import range_of
from hotloop.errors import shorten_value
from hotloop.gguf_header import model_parts, read_gguf_header
from hotloop.text.config_files import GENERATION_CONFIG, read_optional_json
from hotloop.types import SamplingParams
from hotloop.untrusted import StrictModel, file_kind, validated
from hotloop.writing import write_json

_GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def _empty_as_none(value: Any) -> Any:
    """Converts empty values to None, and also -1, with which several tools disable an option."""
    return None if value in ("", [], {}) or (value == -1 and type(value) is int) else value


def _in_sampling_range(value: float | None, info: ValidationInfo) -> float | None:
    """Refuses values outside the range of the field of ``SamplingParams`` with the same name."""
    if value is not None and info.field_name is not None:
        bounds = range_of(SamplingParams, info.field_name)
        if value not in bounds:
            raise ValueError(f"must be {bounds.requirement(value)}, not {shorten_value(value)}")
    return value


_EmptyIsNone = BeforeValidator(_empty_as_none)
_InSamplingRange = AfterValidator(_in_sampling_range)
_Float = Annotated[float | None, _EmptyIsNone, _InSamplingRange]
_Int = Annotated[int | None, _EmptyIsNone, _InSamplingRange]


class _SuggestedSampling(StrictModel):
    model_config = ConfigDict(extra="ignore")

    temperature: _Float = None
    top_k: _Int = None
    top_p: _Float = None
    min_p: _Float = None
    repetition_penalty: _Float = None


class _Suggestions(_SuggestedSampling):
    do_sample: Annotated[bool | None, _EmptyIsNone] = None
    max_new_tokens: _Int = None


class _GGUFSuggestions(_SuggestedSampling):
    model_config = ConfigDict(alias_generator=lambda name: _GGUF_KEYS[name])


def generation_defaults(path: Path) -> dict[str, Any]:
    """Returns a model's default arguments for ``SamplingParams``.

    As in Hugging Face's transformers, a ``generation_config.json`` samples only if ``do_sample`` is
    true, by default at temperature 1; otherwise decoding is greedy, and its other sampling options
    are ignored.

    Args:
        path: A model folder or a ``.gguf`` file.

    Raises:
        CheckpointError: A file is not valid, or a value is out of range.
    """
    if file_kind(path) == "file":
        file = model_parts(path)[0]
        found = validated(_GGUFSuggestions, read_gguf_header(file).metadata, file).model_dump()
    else:
        file = path / GENERATION_CONFIG
        config = read_optional_json(file)
        found = validated(_Suggestions, config, file).model_dump()
        if found.pop("do_sample"):
            found["temperature"] = 1.0 if found["temperature"] is None else found["temperature"]
        elif config:
            found |= {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}
    return {field: value for field, value in found.items() if value is not None}


def write_generation_config(
    folder: Path,
    *,
    sampling: Mapping[str, Any] | None = None,
    eos_ids: Collection[int] | None = None,
) -> Path:
    """Writes ``generation_config.json``, or changes the given parts of an existing one.

    Args:
        folder: The model folder.
        sampling: The arguments that ``generation_defaults`` will return.
        eos_ids: The tokens that end an answer.
    """
    file = folder / GENERATION_CONFIG
    config = read_optional_json(file)
    if sampling is not None:
        config = {
            key: value for key, value in config.items() if key not in _Suggestions.model_fields
        }
        config |= {"do_sample": sampling.get("temperature", 0.0) > 0, **sampling}
    if eos_ids is not None:
        config["eos_token_id"] = sorted(eos_ids)
    return write_json(file, config)
