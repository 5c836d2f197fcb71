"""Malformed tokenizers, configurations and vocabularies: refused by file and key, or accepted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from malformed import Case, check, parametrize
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tiny_tokenizers import sentencepiece_model, write, write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from hotloop.text.generation_config import generation_defaults
from hotloop.text.gguf_vocabulary import read_gguf_vocabulary
from hotloop.text.tokenizer import load_tokenizer

MEGABYTE = "x" * 2**20
TOKEN = {"content": "<x>", "special": True}

# --------------------------------------------------------------------- whole files, to be damaged


@cache
def whole_sentencepiece_model() -> bytes:
    return sentencepiece_model().SerializeToString()


def byte_level_folder(folder: Path, **config: Any) -> Path:
    """A folder with a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", 256)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **config})
    return folder


def sentencepiece_folder(folder: Path) -> Path:
    """A folder with a SentencePiece model."""
    (folder / "tokenizer.model").write_bytes(whole_sentencepiece_model())
    return folder


# -------------------------------------------------------------- keys times values of other kinds

NOT_BOOLEAN = ("false", "", 0, 1, 10**30, [], {}, [True])
NOT_TOKEN = (3, 2.5, True, [], ["<x>"], {}, {"content": 3}, {"content": None}, MEGABYTE)
NOT_TOKENS = ("the", 3, True, [3], [None], [[]], [{"content": 3}], {"a": 3}, [MEGABYTE])
NOT_TEXT = (3, 2.5, True, [], {})
NOT_ADDED = (
    "x",
    3,
    [],
    [TOKEN],
    {"x": TOKEN},
    {"-1": TOKEN},
    {"1.5": TOKEN},
    {"١": TOKEN},
    {"": TOKEN},
    {"9" * 5000: TOKEN},
    {str(2**31): TOKEN},
    {"1": "<x>"},
    {"1": 3},
    {"1": None},
    {"1": {"special": True}},
    {"1": TOKEN | {"special": "yes"}},
    {"1": TOKEN | {"lstrip": 1}},
    {"1": TOKEN | {"content": 3}},
)
NOT_TEMPLATE = (3, True, {"a": 1}, [1], [[]], [{"name": "default"}], [{"template": "x"}])

TOKENIZER_KEYS = {
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"), NOT_BOOLEAN),
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token", "mask_token"), NOT_TOKEN),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), NOT_TOKENS),
    "tokenizer_class": NOT_TEXT,
    "added_tokens_decoder": NOT_ADDED,
    "chat_template": NOT_TEMPLATE,
}

NOT_NUMBER = ("1", True, [1], {"a": 1}, 10**31, -7)
GENERATION_KEYS = {
    "do_sample": ("yes", 1, [1]),
    "temperature": NOT_NUMBER,
    "top_k": (*NOT_NUMBER, 2.5),
    "top_p": (*NOT_NUMBER, 0, 1.5),
    "min_p": (*NOT_NUMBER, 1.5),
    "repetition_penalty": (*NOT_NUMBER, 0, 5000),
    "max_new_tokens": (*NOT_NUMBER, 0, 2.5),
}
NOT_IDS = ("</s>", 2.5, True, -1, 10**30, 2**31, [-1], ["2"], [None], {"a": 1}, [[2]])

GGUF_KEYS = {
    "tokens": (None, "x", 3, [], [1, 2, 3, 4], [None] * 4),
    "token_type": ("text", 3, ["1"] * 4, [1], [1] * 9, [99] * 4, [-1] * 4, [True] * 4, [1.0] * 4),
    "scores": (None, "x", 0.0, [], [0.0], ["0"] * 4, [float("nan")] * 4, [float("inf")] * 4),
    "precompiled_charsmap": (2**40, "x", [300], [2**40], ["a"], [1.5]),
    "add_bos_token": NOT_BOOLEAN,
    "add_eos_token": NOT_BOOLEAN,
    "add_space_prefix": NOT_BOOLEAN,
    "remove_extra_whitespaces": NOT_BOOLEAN,
    "bos_token_id": ("1", 4, -1, 2**40, True, [1], 1.0),
    "eos_token_id": ("1", 4, -1, 2**40, True, [1], 1.0),
    "eot_token_id": (4, -1, "1"),
    "eom_token_id": (4, 2**32 - 1),
    "padding_token_id": ("1", True, [1]),
    "fim_pad_token_id": ("1", [1]),
    "model": (None, "bert", 3, True, [], MEGABYTE),
    "pre": (3, True, [], {}),
}
BYTE_LEVEL_KEYS = {
    "merges": (None, "x", 3, [1], ["ab"], [""], ["a z"], [MEGABYTE]),
    "pre": ("smolm", "", MEGABYTE),
    "tokens": (["a", "a", "ab", "b"], ["a"] * 4),
    "token_type": ([1], ["x"] * 4),
}


def shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 30 else f"{text[:24]}...{len(text)}"


def in_folder(
    build: Callable[[Path], Path],
    file: str,
    key: str,
    value: Any,
    read: Callable[[Path], object] = load_tokenizer,
) -> Case:
    """A key of a file in a folder, with a value of another kind."""

    def run(folder: Path) -> object:
        build(folder)
        at = folder / file
        held = json.loads(at.read_text()) if at.exists() else {}
        write(folder, file, held | {key: value})
        return read(folder)

    return Case(f"{file}:{key}={shown(value)}", run, (file, key))


def in_metadata(kind: str, key: str, value: Any) -> Case:
    """A key of a GGUF tokenizer, with a value of another kind."""

    def run(_folder: Path) -> object:
        values = {
            "model": kind,
            "tokens": ["<unk>", "<s>", "</s>", "a"],
            "token_type": [2, 3, 3, 1],
        }
        if kind == "gpt2":
            values |= {"tokens": ["a", "b", "ab", "<s>"], "token_type": [1, 1, 1, 3]}
            values |= {"merges": ["a b"], "pre": "gpt-2"}
        else:
            values |= {"scores": [0.0] * 4}
        values |= {key: value}
        given = {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}
        return read_gguf_vocabulary(Path("x.gguf"), given)

    named = "tokenizer.ggml.model" if key == "model" else key
    return Case(f"gguf:{kind}:{key}={shown(value)}", run, ("x.gguf", named))


def values_of_other_kinds() -> Iterator[Case]:
    for key, values in TOKENIZER_KEYS.items():
        for value in values:
            yield in_folder(byte_level_folder, "tokenizer_config.json", key, value)
    for key in ("bos_token", "additional_special_tokens"):
        for value in TOKENIZER_KEYS[key][:3]:
            yield in_folder(byte_level_folder, "special_tokens_map.json", key, value)
    for value in (-1, "1", 2.5, True, None, 2**31):
        yield in_folder(sentencepiece_folder, "added_tokens.json", "<x>", value)
    for key, values in GENERATION_KEYS.items():
        for value in values:
            yield in_folder(
                byte_level_folder, "generation_config.json", key, value, generation_defaults
            )
    for file in ("generation_config.json", "config.json"):
        for value in NOT_IDS:
            yield in_folder(byte_level_folder, file, "eos_token_id", value)
    for key, values in GGUF_KEYS.items():
        for value in values:
            yield in_metadata("llama", key, value)
    for key, values in BYTE_LEVEL_KEYS.items():
        for value in values:
            # Merges that name what is no token are told by the library, of tokens and merges.
            yield in_metadata("gpt2", key, value)


# ----------------------------------------------------------------------------- files that are none

NOT_JSON = {
    "text": b"hello",
    "cut short": b'{"a": [1, 2',
    "a list": b"[]",
    "a number": b"3",
    "NaN": b'{"a": NaN}',
    "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "too deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "unpaired surrogate": b'{"a": "\\ud800"}',
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "zeros": bytes(64),
}


def make_folder(file: Path) -> None:
    file.mkdir()


def make_pipe(file: Path) -> None:
    os.mkfifo(file)


def make_link_to_itself(file: Path) -> None:
    file.symlink_to(file)


def make_link_to_nothing(file: Path) -> None:
    file.symlink_to(file.with_name("nothing"))


def files_that_are_none() -> Iterator[Case]:
    def case(file: str, what: str, make: Callable[[Path], object], build: Any = None) -> Case:
        def run(folder: Path) -> object:
            (build or byte_level_folder)(folder)
            (folder / file).unlink(missing_ok=True)
            make(folder / file)
            read = generation_defaults if file == "generation_config.json" else load_tokenizer
            return read(folder)

        return Case(f"{file} is {what}", run, (file,))

    files = ("tokenizer_config.json", "generation_config.json", "tokenizer.json")
    for file in files:
        for what, data in NOT_JSON.items():
            # The library that reads vocabularies allows what means nothing to it.
            yield case(file, what, lambda at, data=data: at.write_bytes(data))
    makers = (make_folder, make_pipe, make_link_to_itself, make_link_to_nothing)
    for file in (*files, "special_tokens_map.json", "config.json", "chat_template.jinja"):
        for make in makers:
            yield case(file, make.__name__.removeprefix("make_"), make)
    for make in makers:
        yield case("tokenizer.model", make.__name__, make, sentencepiece_folder)
        yield case("added_tokens.json", make.__name__, make, sentencepiece_folder)
    yield case("chat_template.jinja", "latin-1", lambda at: at.write_bytes(b"\xe9"))


# ------------------------------------------------------------------------------------ vocabularies


def vocabularies() -> Iterator[Case]:
    def json_case(name: str, change: Callable[[dict], object], names: Any = ("tokenizer.json",)):
        def run(folder: Path) -> object:
            file = byte_level_folder(folder) / "tokenizer.json"
            spec = json.loads(file.read_text())
            change(spec)
            file.write_text(json.dumps(spec))
            tokenizer = load_tokenizer(folder)
            return tokenizer.encode("some text <|im_end|>", parse_special=True)

        return Case(f"tokenizer.json: {name}", run, names)

    for part in ("model", "decoder", "pre_tokenizer", "post_processor", "normalizer"):
        for value in ("x", 3, [], {"type": "Nonsense"}, {"type": 3}):
            yield json_case(f"{part}={shown(value)}", lambda s, p=part, v=value: s.update({p: v}))
    yield json_case("no model", lambda s: s.pop("model"))
    yield json_case("no decoder of a known kind", lambda s: s.update(decoder={"type": "WordPiece"}))
    for vocab in ("x", [1], {"a": "1"}, {"a": -1}, {"a": 2**40}, {"a": 1.5}):
        yield json_case(f"vocab={shown(vocab)}", lambda s, v=vocab: s["model"].update(vocab=v))
    for merges in ("x", [1], ["ab"], [["a"]], ["zzz yyy"], [["a", "b", "c"]]):
        yield json_case(f"merges={shown(merges)}", lambda s, m=merges: s["model"].update(merges=m))
    for tokens in ("x", [1], [{"id": "1"}], [{"id": 0}], [{"id": -1, "content": "a"}]):
        yield json_case(f"added={shown(tokens)}", lambda s, t=tokens: s.update(added_tokens=t))
    yield json_case(
        "a pattern that is none",
        lambda s: s.update(pre_tokenizer=split_by({"Regex": "("})),
    )
    for charsmap in ("AAAA", "x", "/////w==", ""):
        yield json_case(
            f"charsmap={charsmap}",
            lambda s, c=charsmap: s.update(
                normalizer={"type": "Precompiled", "precompiled_charsmap": c}
            ),
        )
    yield json_case(
        "a token around texts that there is not",
        lambda s: s["post_processor"].update(special_tokens={}),
    )

    def model_case(name: str, data: bytes) -> Case:
        def run(folder: Path) -> object:
            (sentencepiece_folder(folder) / "tokenizer.model").write_bytes(data)
            return load_tokenizer(folder).encode("some text")

        return Case(f"tokenizer.model: {name}", run, ("tokenizer.model",))

    data = whole_sentencepiece_model()
    whole = ModelProto.FromString(data)
    for n_bytes in (0, 1, 10, len(data) // 2, len(data) - 5):
        yield model_case(f"{n_bytes} bytes", data[:n_bytes])
    yield model_case("text", b"hello world\n" * 9)
    yield model_case("a piece twice", changed(whole, lambda m: m.pieces.append(m.pieces[300])))
    yield model_case("an empty piece", changed(whole, lambda m: setattr(m.pieces[9], "piece", "")))

    def header_case(name: str, fill: Callable[[Any], None], names: tuple[str, ...]) -> Case:
        def run(folder: Path) -> object:
            return load_tokenizer(write_gguf(folder / "m.gguf", fill))

        return Case(f"m.gguf: {name}", run, ("m.gguf", *names))

    yield header_case("no tokenizer", lambda w: w.add_name("x"), ("tokenizer.ggml.model",))
    yield header_case(
        "a template that is no text",
        lambda w: (tokens_of(w), w.add_uint32("tokenizer.chat_template", 3)),
        ("tokenizer.chat_template",),
    )
    yield header_case(
        "types that are texts",
        lambda w: (tokens_of(w), w.add_array("tokenizer.ggml.token_type", ["a"] * 4)),
        ("tokenizer.ggml.token_type",),
    )


def split_by(pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def changed(model: Any, change: Callable[[Any], object]) -> bytes:
    copy = type(model).FromString(model.SerializeToString())
    change(copy)
    return copy.SerializeToString()


def tokens_of(writer: Any) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_token_scores([0.0] * 4)


# --------------------------------------------------------------------- odd, and rightly accepted


def odd_but_right() -> Iterator[Case]:
    def case(name: str, keys: dict[str, Any]) -> Case:
        def run(folder: Path) -> object:
            tokenizer = load_tokenizer(byte_level_folder(folder, **keys))
            assert tokenizer.decode(tokenizer.encode("the text")) == "the text"
            return tokenizer

        return Case(name, run, None)

    nothing = dict.fromkeys(TOKENIZER_KEYS)
    yield case("every key null", nothing)
    yield case("empty lists", {"additional_special_tokens": [], "added_tokens_decoder": {}})
    yield case("an empty token", {"pad_token": "", "additional_special_tokens": [""]})
    yield case("keys of others", {"model_max_length": 1e30, "auto_map": {"x": [1]}, "init": None})
    yield case("one token named twice", {"pad_token": "<|im_end|>", "unk_token": "<|im_end|>"})
    for key in ("padding_token_id", "fim_pad_token_id", "unknown_token_id"):
        for token_id in (4, -1, 2**32 - 1):
            odd = in_metadata("llama", key, token_id)
            yield Case(odd.name, odd.run, None)


@parametrize([*values_of_other_kinds()])
def test_values_of_other_kinds_are_refused_by_file_and_key(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@parametrize([*files_that_are_none()])
def test_files_that_are_none_are_refused_by_name(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@parametrize([*vocabularies()])
def test_damaged_vocabularies_are_refused_by_name(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@parametrize([*odd_but_right()])
def test_unusual_but_valid_input_is_accepted(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
