from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFWriter
from tiny_tokenizers import (
    CHATML,
    CORPUS,
    TEXTS,
    byte_level,
    gguf_byte_level,
    gguf_sentencepiece,
    sentencepiece_folder,
    sentencepiece_model,
    write_gguf,
)
from tokenizers import pre_tokenizers

from hotloop.errors import CheckpointError, UnsupportedError
from hotloop.text.backends import JsonBackend, byte_level_alphabet
from hotloop.text.gguf_vocabulary import read_gguf_vocabulary
from hotloop.text.tokenizer import load_tokenizer

CASES = (
    "It'S we'LL",
    "A1b22ccc333",
    "x!\n\n\n  y",
    "HTTPServer fooBar",
    "½ ² Ⅳ 12345 1,000",
    "a/\n//b",
)


def metadata(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary of four tokens that is whole, but for ``changes``."""
    values = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "a"],
        "token_type": [2, 3, 3, 1],
        "scores": [0.0, 0.0, 0.0, -1.0],
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken"])
def test_text_is_split_as_transformers_splits_it(pre: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(gguf_byte_level(tmp_path / "a.gguf", byte_level(), pre))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    ours.save(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*TEXTS, *CASES):
        expected = theirs.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert saved.pre_tokenizer.pre_tokenize_str(text) == expected
    for text in (*TEXTS, "<think>a<|im_end|>b"):
        ids = ours.encode(text, add_special=False, parse_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


SPLIT = {
    "default": "It|'|S| don|'|t| |123|45|!|\n\n | x|=|1|,|2| |½|Éa日本|,| |_|c| ՠ|\t|.",
    "gpt-2": "It|'|S| don|'t| 12345|!|\n\n | x|=|1|,|2| ½|Éa日本|,| _|c| ՠ|\t|.",
    "smollm": "It|'|S| don|'t| |1|2|3|4|5|!|\n\n | x|=|1|,|2| |½|Éa日本|,| _|c| ՠ|\t|.",
    "llama-bpe": "It|'S| don|'t| |123|45|!\n\n| | x|=|1|,|2| |½|Éa日本|,| _|c| ՠ|\t|.",
    "falcon3": "It|'S| don|'t| |123|45|!\n\n| | x|=|1|,|2| |½|Éa日本|,| _|c| ՠ|\t|.",
    "smaug-bpe": "It|'S| don|'t| |123|45|!\n\n| | x|=|1|,|2| |½|Éa日本|,| _|c| ՠ|\t|.",
    "qwen2": "It|'S| don|'t| |1|2|3|4|5|!\n\n| | x|=|1|,|2| |½|Éa日本|,| _|c| ՠ|\t|.",
    "megrez": "It|'S| don|'t| |1|2|3|4|5|!\n\n| | x|=|1|,|2| |½|Éa日本|,| _|c| ՠ|\t|.",
    "tekken": "It|'S| don|'t| |1|2|3|4|5|!\n\n| | x|=|1|,|2| |½|Éa日本|,| _|c| ՠ|\t|.",
    "deepseek-llm": "It|'|S| don|'|t| |12345|!|\n|\n| | x|=|1|,|2| |½|É|a|日本|,| _|c| ՠ|\t.",
    "deepseek-coder": "It|'|S| don|'|t| |1|2|3|4|5|!|\n|\n| | x|=|1|,|2| |½|Éa|日本|,| _|c| ՠ|\t.",
}
"""How llama.cpp splits a text before it merges (0.3.36 of its Python package)."""


@pytest.mark.parametrize("pre", SPLIT)
def test_text_is_split_as_llama_cpp_splits_it(pre: str) -> None:
    letters = {letter: i for i, letter in enumerate(byte_level_alphabet())}
    spelled = metadata(
        model="gpt2", pre=pre, tokens=[*letters], merges=[], token_type=[1] * len(letters)
    )
    backend = read_gguf_vocabulary(Path("x.gguf"), spelled).backend
    assert isinstance(backend, JsonBackend)
    pieces = backend._tokenizer.pre_tokenizer.pre_tokenize_str(SPLIT[pre].replace("|", ""))
    alphabet = byte_level_alphabet()
    shown = [bytes(alphabet[letter] for letter in piece).decode() for piece, _ in pieces]
    assert "|".join(shown) == SPLIT[pre]


@pytest.mark.parametrize(
    ("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False)]
)
def test_word_that_is_a_token_is_taken_whole_where_the_name_says_so(pre: str, whole: bool) -> None:
    # No merge leads to the token, so only looking it up finds it.
    spelled = metadata(model="gpt2", pre=pre, tokens=[*"abc", "abc"], merges=[], token_type=[1] * 4)
    backend, *_ = read_gguf_vocabulary(Path("x.gguf"), spelled)
    ids = backend.encode("abc", add_special=False, parse_special=False)
    assert ids == ([3] if whole else [0, 1, 2])


def test_vocabulary_is_the_one_it_was_written_from(tmp_path: Path) -> None:
    original = byte_level(pre_tokenizers.Digits(individual_digits=True))
    ours = load_tokenizer(gguf_byte_level(tmp_path / "a.gguf", original, "smollm"))
    assert ours.vocab_size == original.get_vocab_size()
    assert ours.bos_id == 0
    assert ours.eos_ids == {0, 2}  # end of turn, and end of text
    assert ours.chat_template == CHATML
    assert ours.encode("Hi")[0] != ours.bos_id


def gguf_of(tokens: dict[str, int], **keys: Any) -> Any:
    """The tokenizer of ``tokens`` with their types, beside the 26 letters."""
    letters = [chr(ord("a") + i) for i in range(26)]
    spelled = metadata(
        model="gpt2",
        pre="gpt-2",
        tokens=[*letters, *tokens],
        merges=[],
        token_type=[1] * 26 + list(tokens.values()),
        **keys,
    )
    return read_gguf_vocabulary(Path("x.gguf"), spelled)


CHATML_TOKENS = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3}
LLAMA3_TOKENS = {"<|end_of_text|>": 3, "<|eom_id|>": 3, "<|eot_id|>": 3, "<|start_header_id|>": 3}
CODE_TOKENS = {"<|fim_prefix|>": 4, "<|fim_pad|>": 4, "<|repo_name|>": 4, "<|file_sep|>": 4}


@pytest.mark.parametrize(
    ("tokens", "keys", "ends"),
    [
        (CHATML_TOKENS, {"eos_token_id": 26}, ["<|endoftext|>", "<|im_end|>"]),
        (CHATML_TOKENS, {}, ["<|endoftext|>", "<|im_end|>"]),
        (LLAMA3_TOKENS, {"eos_token_id": 28}, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]),
        (CODE_TOKENS, {}, ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]),
        ({"<x>": 4, "<y>": 4}, {"fim_pad_token_id": 26, "eot_token_id": 27}, ["<x>", "<y>"]),
        ({"<end_of_turn>": 1, "<|end|>": 4}, {}, ["<end_of_turn>", "<|end|>"]),
        ({"<x>": 3}, {"eos_token_id": 0, "eom_token_id": 26}, ["a", "<x>"]),
    ],
)
def test_answers_end_at_what_the_file_names_and_at_ends_by_their_spelling(
    tokens: dict[str, int], keys: dict[str, int], ends: list[str]
) -> None:
    read = gguf_of(tokens, **keys)
    assert [read.backend.token_bytes(i).decode() for i in sorted(read.end_ids)] == ends


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_markers_are_control_tokens_whatever_their_type_says(kind: int) -> None:
    markers = ["<|im_end|>", "<|fim_prefix|>", "<|file_sep|>", "<end_of_turn>", "</s>"]
    backend = gguf_of(dict.fromkeys(markers, kind)).backend
    ids = set(range(26, 31))
    assert backend.special_ids == ids
    text = "a" + "b".join(markers)
    assert not ids & set(backend.encode(text, add_special=False, parse_special=False))
    assert ids <= set(backend.encode(text, add_special=False, parse_special=True))


def test_tokens_that_users_defined_are_matched_before_text_is_split() -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "▁", "▁a", "<tool>", "  ", "b"]
    types = [2, 3, 3, 1, 1, 1, 4, 4, 1]
    scores = [0.0, 0.0, 0.0, -3.0, -2.0, -1.0, 0.0, 0.0, -3.0]
    for prefix, expected in (
        (True, [5, 6, 5, 7, 4, 8]),  # a space before the text after each of them, as llama.cpp
        (False, [3, 6, 3, 7, 8]),
    ):
        keys = metadata(tokens=tokens, token_type=types, scores=scores, add_space_prefix=prefix)
        backend = read_gguf_vocabulary(Path("x.gguf"), keys).backend
        assert backend.encode("a<tool>a  b", add_special=False, parse_special=False) == expected
        assert backend.token_bytes(7) == b"  "
        assert 6 not in backend.special_ids


@pytest.mark.parametrize("pre", ["default", None])
def test_file_without_rules_of_its_own_is_split_by_the_default_ones_with_a_note(
    pre: str | None, tmp_path: Path
) -> None:
    ours = load_tokenizer(gguf_byte_level(tmp_path / "a.gguf", byte_level(), pre))
    assert any("tokenizer.ggml.pre" in note for note in ours.notes)
    named = load_tokenizer(gguf_byte_level(tmp_path / "b.gguf", byte_level(), "gpt-2"))
    assert named.notes == ()
    assert len(ours.encode("1000")) == len(named.encode("1000"))


@pytest.mark.parametrize("key", ["padding_token_id", "unknown_token_id", "fim_pad_token_id"])
@pytest.mark.parametrize("token_id", [4, 2**32 - 1, -1])
def test_ids_that_nothing_depends_on_can_be_of_another_vocabulary(key: str, token_id: int) -> None:
    read = read_gguf_vocabulary(Path("x.gguf"), metadata(**{key: token_id}))
    assert "pad_token" not in read.config
    assert read.end_ids == {2}


@pytest.mark.parametrize(("pre", "whole"), [("smollm", False), ("gpt-2", True)])
def test_digits_stand_alone_where_the_name_says_so(pre: str, whole: bool, tmp_path: Path) -> None:
    tokenizer = byte_level()
    assert tokenizer.encode(" 10").tokens == ["Ġ10"]
    ours = load_tokenizer(gguf_byte_level(tmp_path / "a.gguf", tokenizer, pre))
    assert len(ours.encode(" 10")) == (1 if whole else 3)


def test_qwen_text_is_normalized(tmp_path: Path) -> None:
    ours = load_tokenizer(gguf_byte_level(tmp_path / "a.gguf", byte_level(), "qwen2"))
    assert ours.encode("e\u0301") == ours.encode("é")


@pytest.mark.parametrize(("pre", "adds"), [("llama-bpe", True), ("qwen2", False)])
def test_bos_goes_in_front_where_the_file_or_the_name_says_so(
    pre: str, adds: bool, tmp_path: Path
) -> None:
    ours = load_tokenizer(gguf_byte_level(tmp_path / "a.gguf", byte_level(), pre))
    assert (ours.encode("Hi")[0] == ours.bos_id) is adds
    said = metadata(add_bos_token=not adds)
    backend, *_ = read_gguf_vocabulary(Path("x.gguf"), said)
    assert (1 in backend.encode("a", add_special=True, parse_special=False)) is not adds


def test_sentencepiece_in_gguf_is_the_same_sentencepiece(tmp_path: Path) -> None:
    model = sentencepiece_model()
    ours = load_tokenizer(gguf_sentencepiece(tmp_path / "a.gguf", model))
    folder = sentencepiece_folder(tmp_path, added_tokens_decoder=None)
    theirs = load_tokenizer(folder)
    for text in (*TEXTS, " a", "   a", "a<think>", CORPUS[:5000]):
        for parse in (False, True):
            ids = ours.encode(text, parse_special=parse)
            assert ids == theirs.encode(text, parse_special=parse)
            assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.bos_id == ours.encode("")[0] == 1
    assert ours.eos_ids == {2}


def test_no_space_is_put_in_front_where_the_file_says_so() -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "▁", "▁a"]
    whole = {"tokens": tokens, "token_type": [2, 3, 3, 1, 1, 1], "scores": [0.0] * 5 + [1.0]}
    ids = {
        prefix: read_gguf_vocabulary(Path("x.gguf"), metadata(**whole, add_space_prefix=prefix))[
            0
        ].encode("a", add_special=False, parse_special=False)
        for prefix in (True, False)
    }
    assert ids == {True: [5], False: [3]}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "bert"}, "'bert' is not supported"),
        ({"model": "rwkv"}, "'rwkv' is not supported"),
        ({"model": "gpt2", "pre": "smolm", "merges": []}, "'smolm'. Did you mean 'smollm'"),
    ],
)
def test_unknown_kinds_are_refused_by_name(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedError, match=problem):
        read_gguf_vocabulary(Path("x.gguf"), metadata(**changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": None}, "holds no tokenizer"),
        ({"tokens": None}, "tokens: is missing"),
        ({"scores": None}, "scores is missing"),
        ({"scores": [0.0]}, "4 tokens but 1 scores"),
        ({"token_type": [1]}, "4 tokens but 1 token types"),
        ({"token_type": [1, 1, 1, 1]}, "SentencePiece refuses"),
        ({"token_type": [2, 3, 3, 99]}, r"token_type\[3\]: must be .* not 99"),
        ({"tokens": [1, 2, 3, 4]}, r"tokens\[0\]: must be text, not 1"),
        ({"bos_token_id": "1"}, "bos_token_id: must be an integer, not '1'"),
        ({"bos_token_id": 4}, "bos_token_id 4 is not among the 4 tokens"),
        ({"model": "gpt2", "pre": "gpt-2"}, "merges is missing"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a b"]}, "tokens and merges"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": [], "tokens": ["a"] * 4}, "a token twice"),
    ],
)
def test_metadata_that_contradict_themselves_are_refused(
    changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_gguf_vocabulary(Path("x.gguf"), metadata(**changes))
    assert caught.value.file == Path("x.gguf")


def test_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", lambda writer: GGUFWriter.add_name(writer, "bare"))
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(file)


def test_template_for_tools_of_a_gguf_file_is_read(tmp_path: Path) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "a"])
        writer.add_token_types([2, 1])
        writer.add_token_scores([0.0, 0.0])
        named = {"default": "d", "tool_use": "t"}
        writer.add_chat_template([{"name": n, "template": t} for n, t in named.items()])

    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", fill))
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("d", "t")
