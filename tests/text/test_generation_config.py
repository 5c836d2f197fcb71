from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tiny_tokenizers import write, write_gguf

from hotloop.checked import range_of
from hotloop.errors import CheckpointError, RequestError
from hotloop.text.generation_config import generation_defaults, write_generation_config
from hotloop.types import SamplingParams


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 2},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
        ),
        ({"do_sample": True, "top_p": None}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 50}, {"temperature": 0.0}),
        ({"temperature": 0.6}, {"temperature": 0.0}),
        (
            {"repetition_penalty": 1.1, "max_new_tokens": 64, "max_length": 20},
            {"temperature": 0.0, "repetition_penalty": 1.1, "max_new_tokens": 64},
        ),
        ({}, {}),
    ],
)
def test_suggestions_mean_what_transformers_makes_of_them(
    config: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, "generation_config.json", config)
    assert generation_defaults(tmp_path) == expected
    SamplingParams(**expected)


def test_folder_that_suggests_nothing_gives_nothing(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}


def test_gguf_gives_its_sampling_keys(tmp_path: Path) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_float32("general.sampling.temp", 0.5)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_float32("general.sampling.penalty_repeat", 1.25)

    assert generation_defaults(write_gguf(tmp_path / "a.gguf", fill)) == {
        "temperature": 0.5,
        "top_k": 20,
        "repetition_penalty": 1.25,
    }
    bare = write_gguf(tmp_path / "b.gguf", lambda writer: writer.add_name("bare"))
    assert generation_defaults(bare) == {}


@pytest.mark.parametrize("nothing", [None, -1, "", []])
@pytest.mark.parametrize("key", ["top_k", "top_p", "temperature", "max_new_tokens", "min_p"])
def test_value_that_turns_something_off_suggests_nothing(
    key: str, nothing: Any, tmp_path: Path
) -> None:
    write(tmp_path, "generation_config.json", {"do_sample": True, key: nothing})
    assert generation_defaults(tmp_path) == {"temperature": 1.0}


@pytest.mark.parametrize("text", ["", " \n", "{}"])
def test_empty_file_suggests_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert generation_defaults(tmp_path) == {}


def test_gguf_can_turn_top_k_off(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", lambda w: w.add_int32("general.sampling.top_k", -1))
    assert generation_defaults(file) == {}


@pytest.mark.parametrize("value", [{"top_p": 3.0}, {"temperature": "hot"}, {"top_k": -2}])
def test_sampling_that_is_not_possible_is_refused(value: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"do_sample": True, **value})
    with pytest.raises(CheckpointError, match=next(iter(value))) as caught:
        generation_defaults(tmp_path)
    assert caught.value.file == tmp_path / "generation_config.json"


DECIMALS = ("temperature", "top_p", "min_p", "repetition_penalty")


def values_at_the_edges() -> Iterator[tuple[str, float]]:
    for name in (*DECIMALS, "top_k", "max_new_tokens"):
        bounds = range_of(SamplingParams, name)
        for edge in (bounds.least, bounds.most):
            if name in DECIMALS:
                edge = float(edge)
                values = (math.nextafter(edge, -math.inf), edge, math.nextafter(edge, math.inf))
            else:
                values = (int(edge) - 1, int(edge), int(edge) + 1)
            yield from ((name, value) for value in values if value != -1)  # which turns it off
        yield name, 5000.0 if name in DECIMALS else 5000


@pytest.mark.parametrize(("name", "value"), [*values_at_the_edges()])
def test_a_suggestion_is_refused_by_name_exactly_where_sampling_would_refuse_it(
    name: str, value: float, tmp_path: Path
) -> None:
    write(tmp_path, "generation_config.json", {"do_sample": True, name: value})
    try:
        SamplingParams(**{name: value})
    except RequestError as error:
        with pytest.raises(CheckpointError) as caught:
            generation_defaults(tmp_path)
        required = str(error).removeprefix(f"{name} ").removesuffix(".")
        assert str(caught.value) == f"{tmp_path / 'generation_config.json'}: {name}: {required}"
    else:
        assert generation_defaults(tmp_path)[name] == value


def test_a_suggestion_of_a_gguf_file_that_sampling_would_refuse_is_refused_by_its_key(
    tmp_path: Path,
) -> None:
    key = "general.sampling.penalty_repeat"
    file = write_gguf(tmp_path / "a.gguf", lambda writer: writer.add_float32(key, 5000))
    with pytest.raises(CheckpointError, match=rf"a\.gguf: {key}: must be .* not 5000"):
        generation_defaults(file)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_k": 20, "max_new_tokens": 9}]
)
def test_written_suggestions_are_read_back(sampling: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"top_p": 0.5, "eos_token_id": 7})
    write_generation_config(tmp_path, sampling=sampling)
    assert generation_defaults(tmp_path) == {"temperature": 0.0, **sampling}
    write_generation_config(tmp_path, eos_ids={3, 1})
    assert generation_defaults(tmp_path) == {"temperature": 0.0, **sampling}
