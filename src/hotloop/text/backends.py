"""Tokenizer backends: two libraries that encode text, behind one protocol.

``JsonBackend`` reads a ``tokenizer.json`` with Hugging Face's ``tokenizers``;
``SentencePieceBackend`` reads a ``tokenizer.model`` with ``sentencepiece``.

The libraries encode, but do not decode: each backend returns the *bytes* of a token, and text is
the concatenation of these bytes. So incremental decoding is exact and takes linear time, since no
token's bytes depend on its neighbors. It differs from the libraries' own decoding in two ways:
invalid UTF-8 becomes U+FFFD by Unicode's rule (one per maximal subpart) with either backend, and
``clean_up_tokenization_spaces``, which loses spaces, is not applied.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyrefly: ignore[missing-module-attribute]  (protobuf makes it at import)
)
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from hotloop.errors import (
    CheckpointError,
    HotloopError,
    UnsupportedError,
    shorten,
    shorten_value,
)
from hotloop.text.config_files import Token, TokenizerConfig
from hotloop.text.control_tokens import any_of
from hotloop.untrusted import read_bytes

if TYPE_CHECKING:
    from tokenizers.decoders import Decoder

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"

VOCABULARY_LIMIT_BYTES = 256 * 2**20
"""The largest vocabulary file that is read: ten times the largest in use."""

_SPACE = "▁"
_WHITESPACE = re.compile(r"\s+")
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


@contextmanager
def library_errors(file: Path, problem: str) -> Generator[None]:
    """Turns any exception of a tokenizer library into an error that names ``file``.

    ``tokenizers`` raises plain Exception, and a BaseException if its Rust code panics.

    Raises:
        CheckpointError: With ``problem`` and the library's message.
    """
    try:
        yield
    except HotloopError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # a Ctrl-C, an exit
        raise CheckpointError(file, f"{problem}: {shorten(str(error))}") from error


class Backend(Protocol):
    """A vocabulary, and the encoding of text with it.

    Attributes:
        vocab_size: The number of token ids, some of which may have no token.
        special_ids: Control tokens, which decoded text leaves out by default.
        added_ids: The ids, by their text, of tokens that are matched as a whole before the rest of
            the text is split. They include the control tokens.
        strips_leading_space: Decoding removes one leading space, which encoding adds.
    """

    vocab_size: int
    special_ids: frozenset[int]
    added_ids: Mapping[str, int]
    strips_leading_space: bool

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Encodes ``text``.

        Args:
            text: Any text.
            add_special: Add the tokens that the model expects around a text, such as BOS.
            parse_special: Parse control tokens that are spelled in the text.
        """
        ...

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Encodes ``text``, and parses control tokens except those after a ``mark``.

        No tokens are added around the text. The marks are dropped.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token id below ``vocab_size``; empty for an id without a token."""
        ...

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its spelling in the vocabulary."""
        ...

    def save(self, folder: Path) -> Path:
        """Writes the vocabulary into ``folder`` and returns the file."""
        ...


# ---------------------------------------------------------------------------------- tokenizer.json


class JsonBackend:
    """A ``tokenizers.Tokenizer``. Safe to share between threads.

    Args:
        tokenizer: The tokenizer. Truncation and padding are switched off.
        file: Its file, for error messages.

    Raises:
        UnsupportedError: Its kind of decoder is not supported.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, file: Path) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._file = tokenizer, file
        self._lock = threading.Lock()  # encode_special_tokens is an attribute, not an argument
        self._piece_bytes, self.strips_leading_space = _read_decoder(tokenizer.decoder, file)
        added = tokenizer.get_added_tokens_decoder()
        # The bytes of added tokens, and of other tokens after their first look-up. A look-up in the
        # library misses the processor's caches between two steps: about twenty microseconds.
        self._bytes = {i: token.content.encode() for i, token in added.items()}
        self.added_ids: Mapping[str, int] = {token.content: i for i, token in added.items()}
        self._special = {token.content: (i, token) for i, token in added.items() if token.special}
        self.special_ids = frozenset(i for i, _ in self._special.values())
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Encodes ``text``; the post-processor adds tokens around it."""
        with self._lock, library_errors(self._file, "its tokenizer fails on this text"):
            self._tokenizer.encode_special_tokens = not parse_special
            return self._tokenizer.encode(text, add_special_tokens=add_special).ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Encodes ``text``, and parses control tokens except those after a ``mark``."""
        ids: list[int] = []
        for part in _split(text, _splitter(self._special, unless_after=mark), self._special):
            if isinstance(part, int):
                ids.append(part)
            elif stretch := part.replace(mark, ""):
                with self._lock, library_errors(self._file, "its tokenizer fails on this text"):
                    tokenizer = self._continuation if ids else self._tokenizer
                    tokenizer.encode_special_tokens = True
                    ids += tokenizer.encode(stretch, add_special_tokens=False).ids
        return ids

    @cached_property
    def _continuation(self) -> tokenizers.Tokenizer:
        """The tokenizer for text after a control token, which adds no leading space."""
        spec = json.loads(self._tokenizer.to_str())
        if not _disable_prefix_space(spec["pre_tokenizer"]):
            return self._tokenizer
        return tokenizers.Tokenizer.from_str(json.dumps(spec))

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token; for an added token, its text."""
        data = self._bytes.get(token_id)
        if data is None:
            piece = self._tokenizer.id_to_token(token_id)
            data = self._bytes[token_id] = b"" if piece is None else self._piece_bytes(piece)
        return data

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its spelling in the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def save(self, folder: Path) -> Path:
        """Writes ``tokenizer.json``."""
        file = folder / TOKENIZER_JSON  # written here: the library's own save needs a UTF-8 name
        file.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        return file


def load_json_backend(file: Path, config: TokenizerConfig) -> JsonBackend:
    """Reads a ``tokenizer.json``.

    Args:
        file: The file.
        config: The ``tokenizer_config.json`` beside it. Tokens that it adds or names as special are
            added or special even if the file does not list them; its other effects depend on its
            ``tokenizer_class``.

    Raises:
        CheckpointError: The file is damaged.
        UnsupportedError: Its kind of decoder is not supported.
    """
    data = read_bytes(file, limit=VOCABULARY_LIMIT_BYTES)
    with library_errors(file, "not a tokenizer.json that can be read"):
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
        if config.kind.applies_prefix_space and config.add_prefix_space is not None:
            tokenizer = _with_prefix_space(tokenizer, config.add_prefix_space)
        _add_tokens(tokenizer, config)
        if config.kind.applies_bos_eos and (config.add_bos_token, config.add_eos_token) != (
            None,
            None,
        ):
            bos = config.kind.adds_bos if config.add_bos_token is None else config.add_bos_token
            names = {**config.kind.names, **config.names}
            set_bos_eos(
                tokenizer,
                names.get("bos_token") if bos else None,
                names.get("eos_token") if config.add_eos_token else None,
            )
        return JsonBackend(tokenizer, file)


def _add_tokens(tokenizer: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Adds a configuration's tokens to those of the file, in the order of transformers."""
    in_file = {t.content: t for t in tokenizer.get_added_tokens_decoder().values()}
    wanted = {
        token.content: _added_token(token, special=token.special or token.content in config.special)
        for token in config.added.values()
        if token.content
    }
    for text, token in config.special.items():
        if text not in wanted:
            wanted[text] = in_file.get(text, _added_token(token, special=True))
            wanted[text].special = True
    tokenizer.add_tokens(list(wanted.values()))


def _added_token(token: Token, *, special: bool) -> AddedToken:
    return AddedToken(
        token.content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=not special if token.normalized is None else token.normalized,
        special=special,
    )


def _with_prefix_space(tokenizer: tokenizers.Tokenizer, wanted: bool) -> tokenizers.Tokenizer:
    """Returns ``tokenizer`` with or without the space that it adds before a text."""
    parts = {"normalizer": tokenizer.normalizer, "pre_tokenizer": tokenizer.pre_tokenizer}
    specs = {
        name: None if part is None else json.loads(part.__getstate__())
        for name, part in parts.items()
    }
    decoder = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    changed = {name: _prefix_changed(spec, wanted) for name, spec in specs.items()}
    changed["decoder"] = _prefix_changed(decoder, wanted)
    if changed == {**specs, "decoder": decoder}:
        return tokenizer
    spec = json.loads(tokenizer.to_str())
    return tokenizers.Tokenizer.from_str(json.dumps(spec | changed))


def _prefix_changed(part: Any, wanted: bool) -> Any:
    """Changes a part of a ``tokenizer.json`` to add a space before a text, or none."""
    match part:
        case {"type": "Sequence", **rest}:
            (key,) = {"normalizers", "pretokenizers", "decoders"} & rest.keys()
            changed = [_prefix_changed(one, wanted) for one in rest[key]]
            return {"type": "Sequence", key: [one for one in changed if one is not None]}
        case {"type": "ByteLevel"}:
            return part | {"add_prefix_space": wanted}
        case {"type": "Metaspace", "prepend_scheme": "never"} if wanted:
            return part | {"prepend_scheme": "first"}
        case {"type": "Metaspace"} if not wanted:
            return part | {"prepend_scheme": "never"}
        case {"type": "Prepend"} | {"type": "Strip"} if not wanted:
            return None
        case _:
            return part


def set_bos_eos(tokenizer: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes ``tokenizer`` add these tokens, if given, before and after every text."""
    framing = [
        (token, token_id)
        for token in (bos, eos)
        if token is not None and (token_id := tokenizer.token_to_id(token)) is not None
    ]
    known = {token for token, _ in framing}
    tokenizer.post_processor = TemplateProcessing(
        single=[token for token in (bos, "$A", eos) if token == "$A" or token in known],
        special_tokens=framing,
    )


def _read_decoder(decoder: Decoder | None, file: Path) -> tuple[Callable[[str], bytes], bool]:
    """Returns the function from a piece to its bytes, and whether decoding strips a space."""
    spec = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
    byte_level = spaces = byte_pieces = strips = False
    for part in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        match part:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_pieces = True
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                spaces = True
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                strips = start == 1
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                spaces, strips = True, scheme != "never"
            case {"type": "Fuse"}:
                pass
            case _:
                raise UnsupportedError(
                    f"{file}: a decoder of type {part['type']!r} with these options is not "
                    "supported. "
                    "Byte-level (GPT-2, Llama 3, Qwen) and SentencePiece-like (Llama 2, Mistral) "
                    "decoders are."
                )
    if byte_level:
        return _byte_level_bytes, strips
    return lambda piece: _sentencepiece_bytes(piece, spaces, byte_pieces), strips


def _disable_prefix_space(pre_tokenizer: Any) -> bool:
    """Changes a pre-tokenizer that adds a space only at a text's beginning to add none."""
    if not isinstance(pre_tokenizer, dict):
        return False
    if pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"
        return True
    parts = pre_tokenizer.get("pretokenizers", ())
    return sum(map(_disable_prefix_space, parts)) > 0  # any() would stop at the first


@cache
def byte_level_alphabet() -> dict[str, int]:
    """Returns GPT-2's spelling of bytes in visible characters, from character to byte.

    Bytes that are visible in Latin-1 are spelled as themselves; the other bytes are spelled, in
    order, as the characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + i): byte for i, byte in enumerate(hidden)
    }


def _byte_level_bytes(piece: str) -> bytes:
    alphabet = byte_level_alphabet()
    try:
        return bytes([alphabet[character] for character in piece])
    except KeyError:  # not spelled in bytes: a token that was added as plain text
        return piece.encode()


def _sentencepiece_bytes(piece: str, spaces: bool = True, byte_pieces: bool = True) -> bytes:
    if byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
        return bytes.fromhex(match[1])
    return (piece.replace(_SPACE, " ") if spaces else piece).encode()


# --------------------------------------------------------------------------------- tokenizer.model


class SentencePieceBackend:
    """A SentencePiece model, with added tokens that are not part of the model.

    Args:
        proto: The model.
        file: Its file, for error messages.
        config: The ``tokenizer_config.json`` beside it. ``added_tokens_decoder`` adds tokens,
            ``add_bos_token`` (true by default) and ``add_eos_token`` add the tokens that it names
            before and after a text. SentencePiece puts a space before a text, unless
            ``add_prefix_space`` is false; with ``legacy: false`` it adds no further space after
            special tokens within the text.

    Raises:
        CheckpointError: The model is inconsistent.
        UnsupportedError: It normalizes text in a way that cannot be undone here.
    """

    def __init__(self, proto: ModelProto, file: Path, config: TokenizerConfig) -> None:
        if (
            proto.trainer_spec.treat_whitespace_as_suffix
            or proto.denormalizer_spec.precompiled_charsmap
        ):
            raise UnsupportedError(
                f"{file}: SentencePiece models with whitespace as a suffix or with a denormalizer "
                "are not supported."
            )
        if config.add_prefix_space is False and config.kind.applies_prefix_space:
            proto.normalizer_spec.add_dummy_prefix = False
        kinds = ModelProto.SentencePiece
        self._proto = proto
        self._model = _processor(proto, file)
        self._n_pieces = len(proto.pieces)
        self._added = {
            i: AddedToken(piece.piece, special=True)
            for i, piece in enumerate(proto.pieces)
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
        } | _added_tokens(file, config)
        self.added_ids: Mapping[str, int] = {token.content: i for i, token in self._added.items()}
        self._by_text = {token.content: (i, token) for i, token in self._added.items()}
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.vocab_size = max(self._n_pieces, 1 + max(self._added, default=-1))
        self.strips_leading_space = proto.normalizer_spec.add_dummy_prefix

        self._special = {t.content for t in self._added.values() if t.special}
        self._splits = {
            True: _splitter(self._by_text),
            False: _splitter(self._by_text.keys() - self._special),
        }
        self._continuation = self._model
        if config.legacy is False and self.strips_leading_space:
            unprefixed = ModelProto.FromString(proto.SerializeToString())
            unprefixed.normalizer_spec.add_dummy_prefix = False
            self._continuation = _processor(unprefixed, file)

        bos, eos = (
            self.added_ids.get(config.names.get(name, "")) for name in ("bos_token", "eos_token")
        )
        adds_bos = config.add_bos_token is not False
        self._prefix = [bos] if bos is not None and adds_bos else []
        self._suffix = [eos] if eos is not None and config.add_eos_token else []

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Encodes ``text``: each part between added tokens separately."""
        ids = self._encode(text, self._splits[parse_special], first=True)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Encodes ``text``, and parses control tokens except those after a ``mark``."""
        ids: list[int] = []
        for part in _split(text, _splitter(self._special, unless_after=mark), self._by_text):
            if isinstance(part, int):
                ids.append(part)
            elif stretch := part.replace(mark, ""):
                ids += self._encode(stretch, self._splits[False], first=not ids)
        return ids

    def _encode(self, text: str, splitter: re.Pattern[str], first: bool) -> list[int]:
        ids: list[int] = []
        for part in _split(text, splitter, self._by_text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_stretch(part, first)
            first = False
        return ids

    def _encode_stretch(self, text: str, first: bool) -> list[int]:
        return (self._model if first else self._continuation).encode(text) if text else []

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token; an added token's are its own text."""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        if token_id >= self._n_pieces:
            return b""
        return _sentencepiece_bytes(
            self._model.id_to_piece(token_id), byte_pieces=self._model.is_byte(token_id)
        )

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its spelling in the vocabulary."""
        if token in self.added_ids:
            return self.added_ids[token]
        token_id = self._model.piece_to_id(token)  # the unknown token's id for unknown pieces
        return token_id if self._model.id_to_piece(token_id) == token else None

    def save(self, folder: Path) -> Path:
        """Writes ``tokenizer.model``; added tokens are part of the configuration instead."""
        file = folder / TOKENIZER_MODEL
        file.write_bytes(self._proto.SerializeToString(deterministic=True))
        return file


def read_sentencepiece_model(file: Path) -> ModelProto:
    """Reads a ``tokenizer.model``.

    Raises:
        CheckpointError: The file is damaged.
        UnsupportedError: It is a tiktoken file by the same name.
    """
    data = read_bytes(file, limit=VOCABULARY_LIMIT_BYTES)
    try:
        return ModelProto.FromString(data)
    except DecodeError as error:
        if _is_tiktoken(data):
            raise UnsupportedError(
                f"{file} is a tiktoken vocabulary, not a SentencePiece model. Use the model's "
                f"Hugging Face form, which has a {TOKENIZER_JSON}."
            ) from error
        raise CheckpointError(file, f"not a SentencePiece model: {error}") from error


def sentencepiece_names(proto: ModelProto) -> dict[str, str]:
    """Returns the special tokens that a SentencePiece model names."""
    spec = proto.trainer_spec
    control = {p.piece for p in proto.pieces if p.type != ModelProto.SentencePiece.NORMAL}
    named = {"bos_token": spec.bos_piece, "eos_token": spec.eos_piece, "unk_token": spec.unk_piece}
    return {name: piece for name, piece in named.items() if piece in control}


def _processor(proto: ModelProto, file: Path) -> sentencepiece.SentencePieceProcessor:
    if not proto.pieces:
        raise CheckpointError(file, "not a SentencePiece model: it holds no vocabulary")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except RuntimeError as error:
        raise CheckpointError(file, f"SentencePiece refuses this vocabulary: {error}") from error


def _added_tokens(file: Path, config: TokenizerConfig) -> dict[int, AddedToken]:
    added = {
        i: _added_token(token, special=token.special or token.content in config.special)
        for i, token in config.added.items()
    }
    for token in added.values():
        if token.single_word:
            raise UnsupportedError(
                f"{file}: the added token {shorten_value(token.content)} matches whole words only, "
                "which is not supported beside a SentencePiece model."
            )
    return added


def _splitter(texts: Iterable[str], *, unless_after: str = "") -> re.Pattern[str]:
    """Makes a pattern of added tokens, longest first, except right after ``unless_after``."""
    no_mark = f"(?<!{re.escape(unless_after)})" if unless_after else ""
    return re.compile(f"{no_mark}(?:{any_of(texts)})")


def _split(
    text: str, splitter: re.Pattern[str], tokens: Mapping[str, tuple[int, AddedToken]]
) -> Iterator[str | int]:
    """Yields the ids of the tokens that ``splitter`` finds, and the text between them."""
    start = 0
    for match in splitter.finditer(text):
        token_id, token = tokens[match[0]]
        before = text[start : match.start()]
        if before := before.rstrip() if token.lstrip else before:
            yield before
        yield token_id
        start = match.end()
        if token.rstrip and (space := _WHITESPACE.match(text, start)):
            start = space.end()
    if start < len(text):
        yield text[start:]


def _is_tiktoken(data: bytes) -> bool:
    """Returns whether the first line is a token in base64 and its rank."""
    token, _, rank = data.split(b"\n", 1)[0].partition(b" ")
    try:
        return bool(base64.b64decode(token, validate=True)) and rank.strip().isdigit()
    except binascii.Error:
        return False
