from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_tokenizers import (
    CORPUS,
    TEXTS,
    byte_level_folder,
    llama_json_folder,
    sentencepiece_folder,
)

from hotloop.errors import RequestError
from hotloop.text.detokenize import Detokenizer, StopFilter
from hotloop.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(
    scope="module",
    params=[byte_level_folder, llama_json_folder, sentencepiece_folder],
    ids=["byte-level", "llama-json", "sentencepiece"],
)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    build: Callable[[Path], Path] = request.param
    return load_tokenizer(build(tmp_path_factory.mktemp("tokenizer")))


def pieces(text: str, rng: random.Random) -> Iterator[str]:
    at = 0
    while at < len(text):
        n = rng.randint(1, 6)
        yield text[at : at + n]
        at += n


@pytest.mark.parametrize("skip_special", [True, False])
def test_pieces_of_any_tokens_join_to_the_whole(tokenizer: Tokenizer, skip_special: bool) -> None:
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 30))]
        detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
        text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert text == tokenizer.decode(ids, skip_special=skip_special), ids


def test_characters_come_whole_and_at_once(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        detokenizer = Detokenizer(tokenizer)
        shown = ""
        for token_id in tokenizer.encode(text):
            shown += detokenizer.push(token_id)
            assert "\ufffd" not in shown
            assert text.startswith(shown)
        assert shown == text
        assert detokenizer.flush() == ""


def test_half_a_character_at_the_end_is_shown_as_damaged(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂", add_special=False)
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, ids[:-1])) == "a"
    assert detokenizer.flush() == "\ufffd"


def test_only_the_very_first_space_is_taken_off(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path))
    space = tokenizer.backend.token_id("▁")
    detokenizer = Detokenizer(tokenizer)
    # BOS is no text, so the space after it is still the first.
    assert [detokenizer.push(i) for i in (1, space, space, space)] == ["", "", " ", " "]


@pytest.mark.parametrize("n_before", [1, 2, 7, 40])
def test_text_before_and_after_join_to_the_whole(tokenizer: Tokenizer, n_before: int) -> None:
    text = "The capital of France is Paris and that of Italy is Rome"
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer, preceding=ids[:n_before])
    after = "".join(map(detokenizer.push, ids[n_before:])) + detokenizer.flush()
    assert tokenizer.decode(ids[:n_before]) + after == text


def test_text_goes_on_with_its_space_after_a_prompt_and_without_one_after_control_tokens(
    tmp_path: Path,
) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path))
    (of, _), (after, *_) = (tokenizer.encode(t, add_special=False) for t in ("of f", "the"))
    assert Detokenizer(tokenizer, preceding=[1, of]).push(after).startswith(" ")
    assert not Detokenizer(tokenizer, preceding=[1]).push(after).startswith(" ")
    beyond = tokenizer.vocab_size  # a row of the embedding that pads it
    assert not Detokenizer(tokenizer, preceding=[1, beyond]).push(after).startswith(" ")


def test_control_tokens_that_are_visible_are_shown_and_no_others(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder(tmp_path))
    ids = tokenizer.encode("<|im_start|>a<|im_end|>", add_special=False, parse_special=True)
    visible = ["<|im_start|>", "<|no such token|>"]
    shown = "".join(map(Detokenizer(tokenizer, visible=visible).push, ids))
    assert shown == "<|im_start|>a"


def test_token_outside_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary"):
        Detokenizer(tokenizer).push(tokenizer.vocab_size)


def test_no_token_is_decoded_twice(tokenizer: Tokenizer, monkeypatch) -> None:
    decoded: list[int] = []
    token_bytes = Tokenizer.token_bytes

    def counted(self: Tokenizer, token_id: int, **options: bool) -> bytes:
        decoded.append(token_id)
        return token_bytes(self, token_id, **options)

    monkeypatch.setattr(Tokenizer, "token_bytes", counted)
    monkeypatch.setattr(Tokenizer, "decode", None)
    ids = tokenizer.encode(CORPUS)[:1000]
    detokenizer = Detokenizer(tokenizer)
    for token_id in ids:
        detokenizer.push(token_id)
    assert decoded == ids


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Up to the stop string that is complete first, taking text one character at a time."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_stop_string_is_found_wherever_the_pieces_end() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        text = "".join(rng.choices("abc", k=rng.randint(0, 20)))
        expected, stop = reference(text, stops)
        found, shown = StopFilter(stops), ""
        for piece in pieces(text, rng):
            shown += found.push(piece)
            # What is shown is never taken back: no part of a stop string is ever emitted.
            assert expected.startswith(shown)
        assert shown + found.flush() == expected, (text, stops)
        assert found.matched == stop


def test_text_is_held_back_only_while_it_can_become_a_stop_string() -> None:
    found = StopFilter(["</s>", "###"])
    assert [found.push(piece) for piece in ("a<", "/", "b", "##", "x", "#")] == [
        "a", "", "</b", "", "##x", "",
    ]  # fmt: skip
    assert found.flush() == "#"
    assert found.matched is None


def test_nothing_follows_a_stop_string() -> None:
    found = StopFilter(["stop"])
    assert found.push("go stop go") == "go "
    assert found.matched == "stop"
    assert found.push("more") + found.flush() == ""


def test_without_stop_strings_all_text_passes_at_once() -> None:
    found = StopFilter([])
    assert found.push("all") == "all"
    assert found.flush() == ""


def test_stop_string_across_tokens_never_shows(tokenizer: Tokenizer) -> None:
    detokenizer, found = Detokenizer(tokenizer), StopFilter(["🙂 end"])
    shown = [found.push(detokenizer.push(i)) for i in tokenizer.encode("some text 🙂 end, more")]
    assert "".join(shown) == "some text "
    assert found.matched == "🙂 end"
