from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny_tokenizers import (
    CORPUS,
    TEXTS,
    byte_level,
    byte_level_folder,
    gguf_byte_level,
    gguf_sentencepiece,
    llama_json_folder,
    sentencepiece_folder,
    sentencepiece_model,
    write,
)

from hotloop.errors import CheckpointError, RequestError, UnsupportedError
from hotloop.text.tokenizer import Tokenizer, load_tokenizer

Build = Callable[[Path], Path]

BUILDS: dict[str, Build] = {
    "byte-level": byte_level_folder,
    "llama-json": llama_json_folder,
    "sentencepiece": sentencepiece_folder,
    "sentencepiece-not-legacy": lambda folder: sentencepiece_folder(folder, legacy=False),
    "gguf-byte-level": lambda folder: gguf_byte_level(folder / "a.gguf", byte_level(), "llama-bpe"),
    "gguf-sentencepiece": lambda folder: gguf_sentencepiece(
        folder / "a.gguf", sentencepiece_model()
    ),
}


@pytest.fixture(params=BUILDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(BUILDS[request.param](tmp_path))


@pytest.fixture
def chatty(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(byte_level_folder(tmp_path))


def in_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "build",
    [
        byte_level_folder,
        llama_json_folder,
        lambda folder: sentencepiece_folder(folder, legacy=True),
        lambda folder: sentencepiece_folder(folder, legacy=False),
    ],
    ids=["byte-level", "llama-json", "sentencepiece", "sentencepiece-not-legacy"],
)
def test_ids_and_text_are_those_of_transformers(build: Build, tmp_path: Path) -> None:
    ours, theirs = load_tokenizer(build(tmp_path)), in_transformers(tmp_path)
    controls = [ours.backend.token_bytes(i).decode() for i in sorted(ours.backend.special_ids)]
    assert len(controls) >= 3
    marked = "x".join(f"{text}{mark}" for text, mark in zip(TEXTS, controls * 4, strict=False))
    for text in (*TEXTS, marked, f"{controls[1]}Hello{controls[2]}hi <think>"):
        ids = ours.encode(text, parse_special=True)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special=False, parse_special=True) == theirs.encode(
            text, add_special_tokens=False
        )
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_ids
    assert ours.vocab_size == len(theirs)


def test_plain_text_comes_back_as_it_was(tokenizer: Tokenizer) -> None:
    for text in (*TEXTS, " a", "   a", "\n a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saved_tokenizer_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    files = tokenizer.save(folder)
    assert sorted(files) == sorted(folder.iterdir())
    again = load_tokenizer(folder)
    for name in ("vocab_size", "bos_id", "eos_ids", "chat_template", "strips_leading_space"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    ids = range(tokenizer.vocab_size)
    for skip in (False, True):
        assert [again.token_bytes(i, skip_special=skip) for i in ids] == [
            tokenizer.token_bytes(i, skip_special=skip) for i in ids
        ]
    for text in (*TEXTS, "<s>a</s> b<|im_end|>c<|endoftext|><think>d"):
        for options in ({}, {"add_special": False}, {"parse_special": True}):
            assert again.encode(text, **options) == tokenizer.encode(text, **options)


@pytest.mark.parametrize("nested", [False, True])
def test_tokens_that_the_models_configuration_names_end_answers(nested, tmp_path):
    folder, said = byte_level_folder(tmp_path), {"eos_token_id": [7, 9]}
    before = load_tokenizer(folder).eos_ids
    write(folder, "config.json", {"text_config": said} if nested else said)
    assert load_tokenizer(folder).eos_ids == before | {7, 9}


def test_saving_keeps_the_sampling_beside_it(chatty: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": 0, "temperature": 0.5})
    chatty.save(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved == {"eos_token_id": [0, 2], "temperature": 0.5}


def test_control_tokens_in_text_are_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    controls = [tokenizer.backend.token_bytes(i).decode() for i in tokenizer.backend.special_ids]
    text = "a " + " ".join(controls)
    ids = tokenizer.encode(text, add_special=False)
    assert not tokenizer.backend.special_ids & set(ids)
    assert tokenizer.decode(ids) == text
    parsed = tokenizer.encode(text, add_special=False, parse_special=True)
    assert tokenizer.backend.special_ids <= set(parsed)


def test_tokens_added_as_text_are_always_taken(chatty: Tokenizer) -> None:
    think = chatty.backend.token_id("<think>")
    assert think in chatty.encode("so <think>hm")
    assert chatty.decode([think]) == "<think>"


def test_threads_do_not_disturb_each_other(chatty: Tokenizer) -> None:
    text = "a<|im_end|>b" * 20
    expected = {parse: chatty.encode(text, parse_special=parse) for parse in (False, True)}

    def right(parse: bool) -> bool:
        return all(chatty.encode(text, parse_special=parse) == expected[parse] for _ in range(200))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(right, (False, True) * 2))


def test_sentencepiece_alone_and_through_hotloop_agree_on_leading_spaces(tmp_path: Path) -> None:
    import sentencepiece

    ours = load_tokenizer(sentencepiece_folder(tmp_path))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (*TEXTS, " a", "   a"):
        ids = theirs.encode(text)
        assert ours.encode(text, add_special=False) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_whitespace_around_an_added_token_goes_where_the_token_says(tmp_path: Path) -> None:
    added = {
        "700": {"content": "<sep>", "special": True, "lstrip": True, "rstrip": True},
        "701": {"content": "<sep><sep>", "special": True},
    }
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, added_tokens_decoder=added))
    ids = tokenizer.encode("a \n<sep>  b <sep><sep> c", add_special=False, parse_special=True)
    text = tokenizer.decode(ids, skip_special=False)
    assert text == "a<sep> b <sep><sep>  c"  # SentencePiece puts a space before each stretch
    assert [i for i in ids if i >= 700] == [700, 701]
    assert tokenizer.vocab_size == 702
    assert tokenizer.decode([650]) == ""  # an id between the two vocabularies


def test_tokens_of_an_older_folder_are_read(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, added_tokens_decoder=None, pad_token="[PAD]")
    write(folder, "added_tokens.json", {"[PAD]": 600, "<tool>": 601})
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("<tool>[PAD]", add_special=False, parse_special=True)
    assert ids == [601, 600]
    assert tokenizer.decode(ids) == "<tool>"


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_applied(tmp_path: Path) -> None:
    byte_level_folder(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_truncation(5)
    saved.enable_padding(length=9)
    saved.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"
    assert len(tokenizer.encode("Hi")) < 5
    assert tokenizer.decode(tokenizer.encode(CORPUS[:500])) == CORPUS[:500]


LATE = {"content": "<late>", "special": False, "normalized": False}
LATE |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
LATER = LATE | {"content": "<later>", "special": True, "lstrip": True}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_eos_token": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True},
        {"tokenizer_class": "TokenizersBackend", "add_eos_token": True},
        {"tokenizer_class": "GPT2Tokenizer", "add_eos_token": True},
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False},
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": False},
        {"tokenizer_class": "Qwen2Tokenizer", "add_eos_token": True},
        {"tokenizer_class": "Qwen2TokenizerFast", "add_bos_token": True},
        {"added_tokens_decoder": {"701": LATE}},
        {"added_tokens_decoder": {"701": LATE, "702": LATER}, "pad_token": "<later>"},
        {"added_tokens_decoder": {"900": LATER}},
        {"added_tokens_decoder": {"700": LATE | {"content": "<think>", "special": True}}},
        {"pad_token": "<late>"},
        {"additional_special_tokens": ["<late>", {"__type": "AddedToken", **LATER}]},
        {"extra_special_tokens": ["<late>"]},
        {"extra_special_tokens": {"image_token": "<late>"}},
        {"image_token": "<late>", "unk_token": None},
    ],
    ids=str,
)
def test_configuration_means_what_transformers_makes_of_it(keys: dict, tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, **keys)
    ours, theirs = load_tokenizer(folder), in_transformers(folder)
    text = "Hi <|im_end|>there <late>a <later>b<think>c<|endoftext|>"
    assert ours.encode(text, parse_special=True) == theirs.encode(text)
    assert ours.encode("Hi") == theirs.encode("Hi")
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    ids = theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"add_bos_token": False, "add_eos_token": True},
        {"add_eos_token": True},
        {"add_prefix_space": True},
    ],
    ids=str,
)
def test_configuration_of_a_sentencepiece_model_means_what_transformers_makes_of_it(
    keys: dict, legacy: bool, tmp_path: Path
) -> None:
    folder = sentencepiece_folder(tmp_path, legacy=legacy, **keys)
    ours, theirs = load_tokenizer(folder), in_transformers(folder)
    for text in ("Hi", "Hi <|im_end|>there <s>a"):
        assert ours.encode(text, parse_special=True) == theirs.encode(text)


def test_sentencepiece_model_can_do_without_its_first_space(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, add_prefix_space=False)
    ours, theirs = load_tokenizer(folder), in_transformers(folder)
    for text in ("Hi", " Hi", "Hi<s>there"):
        ids = ours.encode(text, parse_special=True)
        assert ids == theirs.encode(text)
        assert ours.decode(ids, skip_special=False) == f"<s>{text}"


@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer"])
def test_classes_that_frame_a_text_do_so_whatever_its_file_says(
    name: str, bos: bool | None, eos: bool | None, tmp_path: Path
) -> None:
    keys = {"add_bos_token": bos, "add_eos_token": eos, "tokenizer_class": name}
    tokenizer = load_tokenizer(byte_level_folder(tmp_path, **keys))
    plain = tokenizer.encode("Hi", add_special=False)
    expected = [*[0] * (bos is not False), *plain, *[2] * (eos is True)]
    assert tokenizer.encode("Hi") == expected


def test_class_is_that_of_the_model_where_none_is_named(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, tokenizer_class=None, add_eos_token=True)
    assert load_tokenizer(folder).encode("Hi")[-1] != 2
    write(folder, "config.json", {"model_type": "llama"})
    assert load_tokenizer(folder).encode("Hi")[-1] == 2
    write(folder, "config.json", {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"})
    assert load_tokenizer(folder).encode("Hi")[-1] != 2


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("form", ["prepended", "metaspace"])
def test_llama_puts_a_space_in_front_where_the_configuration_says_so(
    form: str, wanted: bool, tmp_path: Path
) -> None:
    folder = llama_json_folder(tmp_path)
    if form == "metaspace":
        saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        saved.normalizer = None
        saved.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            prepend_scheme="never" if wanted else "first", split=False
        )
        saved.save(str(folder / "tokenizer.json"))
    keys = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": wanted}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder, "tokenizer_config.json", keys | names)
    ours, theirs = load_tokenizer(folder), in_transformers(folder)
    assert ours.encode("Hi there") == theirs.encode("Hi there")


def test_names_of_its_class_count_where_the_configuration_names_none(tmp_path: Path) -> None:
    folder = llama_json_folder(tmp_path)
    write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {2}
    write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "bos_token": None})
    assert load_tokenizer(folder).bos_id is None


def test_tokens_named_in_the_configuration_are_special(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder(tmp_path, extra_special_tokens=["<think>"]))
    think = tokenizer.backend.token_id("<think>")
    assert tokenizer.decode([think]) == ""
    assert think not in tokenizer.encode("<think>")
    assert tokenizer.encode("<think>", add_special=False, parse_special=True) == [think]


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": [5, 2]}, {"eos_token_id": 9}, {2, 5}),
        ({"eos_token_id": 5}, {}, {5}),
        ({"temperature": 1.0}, {"eos_token_id": 9}, {2, 9}),
        (None, {"eos_token_id": [8, 9]}, {2, 8, 9}),
        (None, None, {2}),
    ],
)
def test_end_tokens_come_from_the_file_that_governs(
    generation: dict | None, model: dict | None, expected: set[int], tmp_path: Path
) -> None:
    for name, value in (("generation_config.json", generation), ("config.json", model)):
        if value is not None:
            write(tmp_path, name, value)
    tokenizer = load_tokenizer(byte_level_folder(tmp_path))
    assert tokenizer.eos_ids == expected | SPELLED_ENDS


SPELLED_ENDS = {0, 2}
"""``<|endoftext|>`` and ``<|im_end|>``, which end an answer whatever the files say."""


def test_end_marker_that_is_plain_text_ends_nothing(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.add_tokens(["<|eot_id|>", "<|file_sep|>"])
    saved.add_special_tokens(["<end_of_turn>"])
    saved.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    text, code, turn = map(
        tokenizer.backend.token_id, ("<|eot_id|>", "<|file_sep|>", "<end_of_turn>")
    )
    assert tokenizer.eos_ids == SPELLED_ENDS | {code, turn}
    assert text not in tokenizer.eos_ids


@pytest.mark.parametrize("token_id", [-1, 100_000])
def test_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(RequestError, match=rf"{token_id} is outside the vocabulary of \d+ tokens"):
        tokenizer.decode([token_id])


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_empty_folder_is_named_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    for word in (str(tmp_path), "tokenizer.json", "tokenizer.model"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["tekken.json", "vocab.json", "qwen.tiktoken"])
def test_other_tokenizers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedError, match=name):
        load_tokenizer(tmp_path)


def test_tiktoken_file_that_calls_itself_a_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(UnsupportedError, match="tiktoken"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "\xff"),
        ("generation_config.json", '{"eos_token_id": "</s>"}'),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
    ],
)
def test_damaged_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    byte_level_folder(tmp_path)
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.file == tmp_path / name


@pytest.mark.parametrize(
    "content", [b"", b"garbage", sentencepiece_model().SerializeToString()[:999]]
)
def test_damaged_sentencepiece_model_is_named(content: bytes, tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_unknown_decoder_is_refused_by_name(tmp_path: Path) -> None:
    byte_level_folder(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.decoder = tokenizers.decoders.WordPiece()
    saved.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match="WordPiece"):
        load_tokenizer(tmp_path)


def test_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "model.bin").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        load_tokenizer(tmp_path / "model.bin")
