import itertools
import re

import pytest

from hotloop.errors import ConfigError
from hotloop.evaluate.windows import make_windows, take_windows, windows_per_article


def test_windows_follow_each_other_and_the_ragged_tail_is_dropped():
    assert make_windows(range(11), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert make_windows(range(12), 3)[-1] == [9, 10, 11]


def test_limit_takes_the_first_windows_and_no_more_than_there_are():
    assert make_windows(range(11), 3, 2) == [[0, 1, 2], [3, 4, 5]]
    assert len(make_windows(range(11), 3, 99)) == 3


@pytest.mark.parametrize(
    ("n_tokens", "size", "limit", "problem"),
    [
        (10, 11, None, "10 tokens, fewer than a window of 11"),
        (0, 2, None, "0 tokens"),
        (10, 1, None, "at least 2 tokens, not 1"),
        (10, 5, 0, "at least 1, not 0"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused_with_the_numbers(n_tokens, size, limit, problem):
    with pytest.raises(ConfigError, match=problem):
        make_windows(range(n_tokens), size, limit)


@pytest.mark.parametrize("limit", [None, 1, 3, 10**9])
@pytest.mark.parametrize("n_words", [50, 400, 30_000])
def test_no_more_of_a_text_is_tokenized_than_its_windows_need(n_words, limit):
    words = [f"word{i}" for i in range(n_words)]
    text, seen = " ".join(words), []

    def encode(part: str) -> list[int]:
        seen.append(len(part))
        return [len(word) for word in part.split()]

    size = 16
    assert take_windows(encode, text, size, limit) == make_windows(encode(text), size, limit)
    if n_words == 30_000 and limit in (1, 3):
        assert sum(seen[:-1]) < len(text) / 10


def articles(lengths: list[int]) -> tuple[str, list[int]]:
    """A text of articles of so many characters, each a token, and where they begin."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return "".join(chr(97 + i % 26) * n for i, n in enumerate(lengths)), starts


def test_a_window_is_of_the_article_in_which_its_middle_lies():
    lengths = [10, 3, 25, *[10] * 22]
    text, starts = articles(lengths)
    counts = windows_per_article(list, text, starts, 10, 23)
    assert counts == (1, 3, *[1] * 19), "the middle of no window lies in the article of 3"
    middles = [text[i * 10 + 5] for i in range(23)]
    assert sum(counts) == 23
    assert [middles.count(each) for each in dict.fromkeys(middles)] == list(counts)


def test_windows_of_few_articles_are_not_clustered_by_article():
    text, starts = articles([100] * 30)
    assert windows_per_article(list, text, starts, 10, 190) is None
    assert windows_per_article(list, text, starts, 10, 200) == (10,) * 20
    assert windows_per_article(list, text, [], 10, 200) is None


def words_and_spaces(text: str) -> list[str]:
    """Tokens as byte-level BPE makes them: white space is one token where nothing follows it."""
    return re.findall(r"\s+(?!\S)| ?\S+|\s", text)


def test_articles_end_within_a_token_of_where_they_do_in_the_text_however_many_come_before():
    names = [f"article{i}" for i in range(400)]
    text = "".join(f"{name} {'word ' * (i % 3)}end\n\n" for i, name in enumerate(names))
    starts = [text.index(f"{name} ") for name in names]
    tokens = words_and_spaces(text)
    assert sum(len(words_and_spaces(part)) for part in re.split("(?=article)", text)) != len(tokens)
    size = 2
    middles = [i * size + size // 2 for i in range(len(tokens) // size)]
    # The article of each token is the last whose name has come.
    of_token, seen = [], 0
    for token in tokens:
        seen += "article" in token
        of_token.append(seen)
    inside = [of_token[middle] for middle in middles]
    expected = [inside.count(each) for each in dict.fromkeys(inside)]
    counts = windows_per_article(words_and_spaces, text, starts, size, len(middles))
    assert len(counts) == len(expected) == len(names)
    ends = zip(itertools.accumulate(counts), itertools.accumulate(expected), strict=True)
    assert all(abs(end - other) <= 1 for end, other in ends)


def test_a_last_window_beyond_the_ends_that_were_counted_is_of_the_last_article():
    text, starts = articles([10] * 20)

    def depends_on_length(part: str) -> list[str]:
        """A tokenizer that makes more of a whole text than of its parts."""
        return list(part) + ["more"] * 10 * (part == text)

    n = len(take_windows(depends_on_length, text, 10))
    assert n == 21
    assert windows_per_article(depends_on_length, text, starts, 10, n) == (*[1] * 19, 2)
