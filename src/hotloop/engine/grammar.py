"""Grammars that answers follow (structured output), with the library llguidance.

A grammar is compiled once for a vocabulary. Each answer has a ``Matcher``: it consumes the tokens
of the answer, and fills a bit mask of the tokens that may come next. That takes some 20 µs for a
token of JSON with a vocabulary of 50,000. ``constraints`` copies the masks to the device.

The library accepts some JSON schemas that it does not fully enforce. This module refuses those:
unknown keywords, everything that the library warns of, and ``patternProperties``, which the library
does not combine correctly with other keywords. The library's limits bound the time and memory that
a grammar takes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hotloop.errors import RequestError, UnsupportedError, shorten
from hotloop.types import Grammar, GrammarKind
from hotloop.untrusted import parse_json

if TYPE_CHECKING:
    from torch import Tensor

    from hotloop.text.tokenizer import Tokenizer

WHITESPACE = r" |\n[ \t]{0,40}"
"""Whitespace between two tokens of JSON: none, or what this matches. Otherwise small models can
generate spaces without end."""

MAX_COMPILED = 32
"""The most entries of the cache of compiled grammars. An entry of a refused grammar is the reason.
"""

MAX_ITEMS = 800
"""The most items of the parser at one position of an answer that follows a grammar in Lark. If the
answer can be parsed in many ways, the number of items grows with every character, and the time of a
mask grows with the cube of that number: 70 ms with 800 items, during which other requests wait. A
JSON schema takes a millisecond with the 2,000 items that the library allows, and a list of many
optional properties needs that many. The limit counts items, not time: a limit on time would refuse
some answers only on a busy machine."""

_ANY_OBJECT = '{"type": "object"}'

_NAMES: dict[GrammarKind, str] = {
    "json_object": "the JSON object",
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "lark": "the grammar",
}


class Grammars:
    """Compiles grammars for one vocabulary. Safe to share between threads.

    Args:
        tokenizer: Returns the model's tokenizer.
        n_tokens: Token ids below this can be selected.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], n_tokens: int) -> None:
        self._tokenizer, self.n_tokens = tokenizer, n_tokens
        self._outcome = functools.lru_cache(MAX_COMPILED)(self._compiled_or_refused)

    def check(self, grammar: Grammar) -> None:
        """Refuses what cannot be enforced.

        Raises:
            RequestError: The grammar is invalid, too costly, not supported, or matches nothing.
            UnsupportedError: llguidance is not installed, or the tokenizer has no end-of-sequence
                token.
        """
        self._compiled(grammar)

    def matcher(self, grammar: Grammar) -> Matcher:
        """Returns the matcher of an answer.

        Raises:
            HotloopError: As ``check``.
        """
        return Matcher(self._compiled(grammar).deep_copy(), self.n_tokens)

    def prepare(self) -> None:
        """Builds the tables that all grammars share, which takes tenths of a second.

        If grammars are not possible here, it does nothing: the first grammar then gets the error.
        """
        with suppress(UnsupportedError):
            _ = self._vocabulary

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """The vocabulary, as llguidance takes it."""
        library, tokenizer = _library(), self._tokenizer()
        ends = sorted(i for i in tokenizer.eos_ids if i < self.n_tokens)
        if not ends:
            raise UnsupportedError(
                "the model's tokenizer has no end-of-sequence token, so an answer could not end "
                "where its grammar does."
            )
        vocabulary = _Vocabulary(tokenizer, self.n_tokens, ends[0])
        wrapped = library.TokenizerWrapper(vocabulary)
        found = library.LLTokenizer(wrapped, n_vocab=self.n_tokens, eos_token=ends)
        if tokenizer.strips_leading_space:
            vocabulary.encode = found.greedy_tokenize
        return found

    def _compiled(self, grammar: Grammar) -> Any:
        """Returns the matcher of a grammar; remembers grammars that were refused.

        Raises:
            HotloopError: As ``check``.
        """
        outcome = self._outcome(grammar)
        if isinstance(outcome, str):
            raise RequestError(outcome)
        return outcome

    def _compiled_or_refused(self, grammar: Grammar) -> Any:
        """Compiles a grammar; returns the reason, as text, if it is refused."""
        try:
            return self._compile(grammar)
        except RequestError as error:
            return str(error)

    def _compile(self, grammar: Grammar) -> Any:
        library = _library()
        matcher = library.LLMatcher(
            self._vocabulary, _translated(grammar), log_level=0, limits=_limits(grammar.kind)
        )
        # The first mask builds tables that later masks share, or fails. It can also leave so many
        # items that the second mask fails after seconds, during which other answers of a server
        # would wait.
        for each in (matcher, matcher.deep_copy()):
            each.compute_bitmask()
            problems = [each.get_error()] if each.is_error() else each.get_grammar_warnings()
            _refuse_first(grammar, problems)
        return matcher


class _Vocabulary:
    """The attributes of a vocabulary that llguidance reads.

    Attributes:
        encode: Encodes text within an answer. A tokenizer that puts a space before every text needs
            another function here.
    """

    def __init__(self, tokenizer: Tokenizer, n_tokens: int, eos_id: int) -> None:
        self.encode: Callable[[str], list[int]] = functools.partial(
            tokenizer.encode, add_special=False
        )
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i, skip_special=False) for i in range(n_tokens)]
        self.special_token_ids = [i for i in sorted(tokenizer.backend.special_ids) if i < n_tokens]

    def __call__(self, text: str | bytes) -> list[int]:
        return self.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class Matcher:
    """Follows one answer through its grammar.

    The library's limits count computed tokens and masks. This matcher computes only those of the
    answer, and a copy computes those of drafts, so that drafts cannot change where an answer ends.

    Args:
        matcher: llguidance's matcher at the beginning of an answer.
        n_tokens: Token ids below this can be selected.

    Attributes:
        failure: The limit that the grammar has exceeded; None while it can be followed.
    """

    def __init__(self, matcher: Any, n_tokens: int) -> None:
        self._matcher, self._n_tokens = matcher, n_tokens
        self._is_lost = False  # the library cannot follow it further
        self.failure: str | None = None

    def consume(self, ids: Sequence[int]) -> None:
        """Consumes the next tokens of the answer; ignores tokens after its end.

        Masks count towards the limits. ``fill`` has computed the mask of the first token; the masks
        of the other tokens are computed here.
        """
        for i, token_id in enumerate(ids):
            if token_id < 0 or self._is_lost or self._matcher.is_stopped():
                return
            if i > 0:
                self._matcher.compute_bitmask()
                self._check()
            if not self._is_lost:
                self._matcher.consume_token(token_id)
                self._check()

    def jump_forward(self) -> list[int]:
        """Returns the jump-forward (forced) tokens: those of the text that must follow; often none.

        The tokenizer chooses them. The model may spell the same text with other tokens.
        """
        return [] if self._is_lost else self._matcher.deep_copy().compute_ff_tokens()

    def fill(self, mask_TW: Tensor, drafts: Sequence[int] = ()) -> int:
        """Fills bit masks of the tokens that may come next, and after each of the drafts.

        Args:
            mask_TW: int32, all ones, on the CPU; one bit for each token, 32 to a word. Masks after
                a draft that the grammar does not allow are not changed, and none is if the grammar
                has failed.
            drafts: Drafts, at most T - 1.

        Returns:
            The number of drafts that may be verified. If it is smaller than the number of drafts, a
            further mask exceeds a limit; that is a failure only if the answer gets there.
        """
        if self._is_lost:
            return 0
        row_bytes = mask_TW.stride(0) * mask_TW.itemsize
        self._matcher.unsafe_compute_mask_ptr(mask_TW.data_ptr(), row_bytes)
        self._check()
        if self._is_lost:
            mask_TW.fill_(-1)
            return 0
        if not drafts:
            return 0
        ahead = self._matcher.deep_copy()
        for i, token_id in enumerate(drafts):
            if not 0 <= token_id < self._n_tokens or ahead.is_stopped():
                break
            n_consumed = ahead.try_consume_tokens([token_id])
            if n_consumed and not ahead.is_error():
                ahead.unsafe_compute_mask_ptr(mask_TW[i + 1].data_ptr(), row_bytes)
            if ahead.is_error():
                mask_TW[i + 1 :].fill_(-1)
                return i
            if not n_consumed:  # the choice differs from it
                break
        return len(drafts)

    def _check(self) -> None:
        if self._matcher.is_error():
            self._is_lost = True
            self.failure = self.failure or f"{_reason(self._matcher.get_error())}."


def check_syntax(grammar: Grammar) -> None:
    """Refuses an invalid grammar before a model is loaded.

    ``Grammars.check`` is stricter: it knows the model's control tokens.

    Raises:
        RequestError: The grammar is invalid or not supported.
        UnsupportedError: llguidance is not installed.
    """
    check = _library().LLMatcher.validate_grammar_with_warnings
    failed, problems = check(_translated(grammar), limits=_limits(grammar.kind))
    _refuse_first(grammar, problems if failed else ())


def _translated(grammar: Grammar) -> str:
    """Returns a grammar in llguidance's notation.

    Raises:
        RequestError: It is not JSON, or has a keyword that is not enforced.
    """
    library, source = _library().LLMatcher, grammar.source
    if grammar.kind == "regex":
        return library.grammar_from_regex(source)
    if grammar.kind == "lark":
        if _UNENFORCED_IN_LARK.search(source):
            raise _unenforced(grammar)
        return library.grammar_from_lark(source)
    schema = parse_json(
        source or _ANY_OBJECT,
        _NAMES[grammar.kind],
        refuse=lambda name, problem: RequestError(f"{name} {problem}."),
    )
    if _uses_unenforced(schema):
        raise _unenforced(grammar)
    return library.grammar_from_json_schema(
        source or _ANY_OBJECT,
        defaults={"whitespace_pattern": WHITESPACE},
        overrides={"lenient": False},
    )


_UNENFORCED = "patternProperties"
_UNENFORCED_IN_LARK = re.compile(rf'"{_UNENFORCED}"\s*:')  # a key of JSON within it


def _unenforced(grammar: Grammar) -> RequestError:
    return RequestError(
        f"{_NAMES[grammar.kind]} uses {_UNENFORCED}, which cannot be enforced: list the "
        "properties, or leave it out."
    )


def _uses_unenforced(schema: Any) -> bool:
    """Returns whether a schema, or a schema within it, has the key ``patternProperties``."""
    if isinstance(schema, list):
        return any(map(_uses_unenforced, schema))
    if not isinstance(schema, dict):
        return False
    for keyword, value in schema.items():
        if keyword == _UNENFORCED:
            return True
        if keyword in ("enum", "const", "default", "examples"):  # values, not schemas
            continue
        named = keyword in ("properties", "$defs", "definitions", "dependentSchemas")
        if named and isinstance(value, dict):
            value = list(value.values())
        if _uses_unenforced(value):
            return True
    return False


def _refuse_first(grammar: Grammar, problems: Sequence[str]) -> None:
    """Raises RequestError for the first of the library's errors or warnings, if there is one."""
    for problem in problems:
        raise RequestError(f"{_NAMES[grammar.kind]} cannot be used: {_reason(problem)}.")


def _reason(error: str) -> str:
    """Returns the first part of an error of the library, without the dump of its state."""
    if error.startswith("NoExtension"):
        return "nothing matches it"
    parts = error.partition("<state>")[0].partition("<non-verbose/>")[0].strip()
    return shorten(" ".join(parts.split())).removesuffix(".")


def _library() -> Any:
    """Imports llguidance.

    Raises:
        UnsupportedError: It is not installed.
    """
    try:
        return import_module("llguidance")
    except ImportError as error:
        raise UnsupportedError(
            f"grammars need llguidance, which cannot be imported ({error}): "
            "pip install 'hotloop[serve]'."
        ) from error


def _limits(kind: GrammarKind) -> Any:
    """Returns the library's limits for a kind of grammar; its errors then quote no grammar."""
    of_kind = {"max_items_in_row": MAX_ITEMS} if kind == "lark" else {}
    return _library().LLParserLimits(verbose_errors=False, **of_kind)
