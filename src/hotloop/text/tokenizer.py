"""A model's tokenizer: converts text to token ids and back, and messages to a prompt.

It is read from ``tokenizer.json``, ``tokenizer.model`` (SentencePiece) or the vocabulary of a GGUF
file; other kinds are refused by name. Nothing is unpickled. The only code of a model that runs is
its chat template, in a sandbox.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hotloop.errors import CheckpointError, RequestError, UnsupportedError
from hotloop.gguf_header import model_parts, read_gguf_header
from hotloop.text.backends import (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    Backend,
    SentencePieceBackend,
    load_json_backend,
    read_sentencepiece_model,
    sentencepiece_names,
)
from hotloop.text.chat import ChatTemplate, as_messages
from hotloop.text.config_files import (
    DEFAULT_TEMPLATE,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    TOKENIZER_CONFIG,
    TOOL_TEMPLATE,
    TokenizerConfig,
    named_templates,
    path_exists,
    read_added_tokens,
    read_end_ids,
    read_tokenizer_config,
)
from hotloop.text.control_tokens import ControlTokens, unused_mark
from hotloop.text.end_markers import end_ids_by_spelling
from hotloop.text.generation_config import write_generation_config
from hotloop.text.gguf_vocabulary import read_gguf_vocabulary
from hotloop.types import ChatPrompt
from hotloop.untrusted import file_kind, read_text, validated
from hotloop.writing import write_json

_CHAT_TEMPLATE_FILE = "chat_template.jinja"
_OTHER_TOKENIZERS = ("tekken.json", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """One model's tokenizer. Make one with ``load_tokenizer``; safe to share between threads.

    Attributes:
        source: The folder or file from which it was read.
        backend: The vocabulary.
        config: Its ``tokenizer_config.json``, or the equivalent.
        eos_ids: The tokens that end an answer.
        chat_template: The model's chat template, if it has one.
        tool_template: Its template for conversations with tools, if it has a separate one.
        notes: Remarks for the user.
    """

    source: Path
    backend: Backend
    config: Mapping[str, Any]
    eos_ids: frozenset[int]
    chat_template: str | None
    tool_template: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """The number of token ids. The model's vocabulary can be larger, because of padding."""
        return self.backend.vocab_size

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, whether or not ``encode`` adds it."""
        token = self.names.get("bos_token")
        return None if token is None else self.backend.token_id(token)

    @cached_property
    def adds_bos(self) -> bool:
        """True if ``encode`` puts ``bos_id`` before a text by default."""
        return self.bos_id is not None and self.encode("a")[:1] == [self.bos_id]

    @property
    def ordered_eos_ids(self) -> tuple[int, ...]:
        """``eos_ids``, the tokenizer's own end-of-sequence token first."""
        token = self.names.get("eos_token")
        own = None if token is None else self.backend.token_id(token)
        return tuple(sorted(self.eos_ids, key=lambda i: (i != own, i)))

    @property
    def strips_leading_space(self) -> bool:
        """True if decoding removes one leading space, which encoding adds."""
        return self.backend.strips_leading_space

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Encodes ``text``.

        Args:
            text: Any text.
            add_special: Add the tokens that the model expects around a text, such as BOS.
            parse_special: Parse control tokens that are spelled in the text, such as
                ``<|im_end|>``. This allows text from elsewhere to imitate the model's own turns.
                Tokens that were added to the vocabulary as plain text are parsed in either case.

        Raises:
            RequestError: The text has half a surrogate pair, which cannot be encoded.
        """
        _check_unicode(text)
        return self.backend.encode(text, add_special=add_special, parse_special=parse_special)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """Returns the bytes of a token: UTF-8 that can begin or end within a character.

        Raises:
            RequestError: The token is outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(
                f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens."
            )
        if skip_special and token_id in self.backend.special_ids:
            return b""
        return self.backend.token_bytes(token_id)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decodes ``ids``; invalid UTF-8 becomes U+FFFD.

        Raises:
            RequestError: A token is outside the vocabulary.
        """
        data = b"".join(self.token_bytes(i, skip_special=skip_special) for i in ids)
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def control_tokens_in(self, text: str) -> list[str]:
        """Returns the control tokens that ``text`` spells, each once."""
        return self._control_tokens.spelled_in(text)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Renders a conversation to a prompt as text, for display.

        Use ``chat_prompt`` for an engine: in text, a control token that a message spells cannot be
        distinguished from one that the template writes.

        Args:
            messages: Each with ``role`` and ``content``.
            add_generation_prompt: End with the beginning of the assistant's answer.
            variables: Further variables of the model's template, such as ``tools`` or
                ``enable_thinking``.

        Raises:
            UnsupportedError: The model has no chat template.
            CheckpointError: The template is not valid.
            RequestError: The template refuses the messages, fails on them or exceeds a limit.
        """
        return self._template(variables).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            variables={**self.names, **variables},
        )

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> ChatPrompt:
        """Renders a conversation to a prompt, up to the beginning of the model's answer.

        Only the template can write control tokens: control tokens that messages and variables spell
        are text.

        Args:
            messages: Each with ``role`` and ``content``.
            add_generation_prompt: End with the beginning of the assistant's answer, unless it
                continues the last message.
            continue_final_message: The answer continues the last message instead of beginning a
                new one.
            variables: Further variables of the model's template, such as ``tools`` or
                ``enable_thinking``.

        Raises:
            UnsupportedError: The model has no chat template.
            CheckpointError: The template is not valid.
            RequestError: The template refuses the messages, fails on them or exceeds a limit; or
                there is no last message to continue.
        """
        listed = as_messages(messages)
        mark = unused_mark((listed, variables))
        marked = self._control_tokens.marked(listed, mark)
        if continue_final_message:
            marked = _with_ending(marked, mark)
        text = self._template(variables).render(
            marked,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            variables={
                **self.names,
                **self._control_tokens.marked(variables, mark),
            },
            mark=mark,
        )
        if continue_final_message:
            text = _before_ending(text, mark)
        _check_unicode(text)
        if mark in text:
            ids = self.backend.encode_marked(text, mark)
        else:
            ids = self.backend.encode(text, add_special=False, parse_special=True)
        return ChatPrompt(token_ids=tuple(ids), starts_text=not continue_final_message)

    @cached_property
    def names(self) -> dict[str, str]:
        """The texts of its special tokens by their roles, such as ``eos_token``."""
        return validated(TokenizerConfig, dict(self.config), self.source).names

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self.backend.token_bytes(i).decode() for i in self.backend.special_ids)

    def _template(self, variables: Mapping[str, Any]) -> ChatTemplate:
        if variables.get("tools") and self.tool_template is not None:
            return self._with_tools
        return self._default

    @cached_property
    def _default(self) -> ChatTemplate:
        if self.chat_template is None:
            raise UnsupportedError(
                f"{self.source} has no chat template (none named {DEFAULT_TEMPLATE!r}, where there "
                "are several). It is probably not a chat model: generate from plain text instead."
            )
        return ChatTemplate(self.chat_template, self.source)

    @cached_property
    def _with_tools(self) -> ChatTemplate:
        assert self.tool_template is not None, "the caller has checked that there is one"
        return ChatTemplate(self.tool_template, self.source)

    def save(self, folder: Path) -> list[Path]:
        """Writes files that ``load_tokenizer`` reads as the same tokenizer.

        Args:
            folder: An existing folder. The end-of-sequence tokens of a ``generation_config.json``
                in it are replaced.

        Returns:
            The files written.
        """
        config = {k: v for k, v in self.config.items() if k != "chat_template"}
        templates = {DEFAULT_TEMPLATE: self.chat_template, TOOL_TEMPLATE: self.tool_template}
        if any(templates.values()):
            config["chat_template"] = named_templates(templates)
        files = [self.backend.save(folder), write_json(folder / TOKENIZER_CONFIG, config)]
        if self.eos_ids:
            files.append(write_generation_config(folder, eos_ids=self.eos_ids))
        return files


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = ascii(text[error.start])
        raise RequestError(
            f"the text is not valid Unicode: it contains {bad}, half a surrogate pair. Remove it."
        ) from error


def _with_ending(messages: Sequence[Mapping[str, Any]], mark: str) -> list[Mapping[str, Any]]:
    """Appends two marks and a space to the last message, by which its end is found in the prompt.

    The space shows whether the template trims messages.
    """
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        raise RequestError("there is no last message with a text to continue.")
    return [*messages[:-1], {**messages[-1], "content": f"{content}{2 * mark} "}]


def _before_ending(text: str, mark: str) -> str:
    """Returns a prompt up to the end of the last message, which ``_with_ending`` has marked."""
    before, sign, after = text.rpartition(2 * mark)
    if not sign:
        raise RequestError("the chat template leaves out the last message: it cannot be continued.")
    return before if after.startswith(" ") else before.rstrip()


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a model's tokenizer.

    Args:
        path: A model folder in Hugging Face's layout, or a ``.gguf`` file.

    Raises:
        CheckpointError: There is no tokenizer, or it is damaged.
        UnsupportedError: The kind of tokenizer is not supported.
    """
    if file_kind(path) == "folder":
        return _load_folder(path)
    path = model_parts(path)[0]
    read = read_gguf_vocabulary(path, read_gguf_header(path).metadata)
    config = validated(TokenizerConfig, read.config, path)
    return Tokenizer(
        source=path,
        backend=read.backend,
        config=read.config,
        eos_ids=read.end_ids,
        chat_template=config.template(DEFAULT_TEMPLATE),
        tool_template=config.template(TOOL_TEMPLATE),
        notes=read.notes,
    )


def _load_folder(folder: Path) -> Tokenizer:
    raw = read_tokenizer_config(folder)
    if path_exists(json_file := folder / TOKENIZER_JSON):
        backend: Backend = load_json_backend(json_file, _parsed(folder, raw))
    elif path_exists(model_file := folder / TOKENIZER_MODEL):
        proto = read_sentencepiece_model(model_file)
        raw = {**sentencepiece_names(proto), **_with_added_tokens(folder, raw)}
        backend = SentencePieceBackend(proto, model_file, _parsed(folder, raw))
    else:
        raise _no_tokenizer(folder)
    class_names = _parsed(folder, raw).kind.names
    raw = {k: v for k, v in class_names.items() if backend.token_id(v) is not None} | raw
    config = _parsed(folder, raw)
    if path_exists(template_file := folder / _CHAT_TEMPLATE_FILE):
        chat_template, tool_template = read_text(template_file), None
    else:
        chat_template = config.template(DEFAULT_TEMPLATE)
        tool_template = config.template(TOOL_TEMPLATE)
    return Tokenizer(
        source=folder,
        backend=backend,
        config=raw,
        eos_ids=_eos_ids(folder, config, backend),
        chat_template=chat_template,
        tool_template=tool_template,
    )


def _parsed(folder: Path, config: dict[str, Any]) -> TokenizerConfig:
    return validated(TokenizerConfig, config, folder / TOKENIZER_CONFIG)


def _with_added_tokens(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Adds the tokens of an ``added_tokens.json`` that ``config`` does not list."""
    special = _parsed(folder, config).special
    older = {
        str(token_id): {"content": text, "special": text in special}
        for text, token_id in read_added_tokens(folder).items()
    }
    return {**config, "added_tokens_decoder": older | (config.get("added_tokens_decoder") or {})}


def _eos_ids(folder: Path, config: TokenizerConfig, backend: Backend) -> frozenset[int]:
    """Returns the tokens that end an answer, by their ids and by their spelling.

    The ids come from ``generation_config.json``, or if it has none, from the other two files.
    """
    spelled = end_ids_by_spelling(backend.added_ids, backend.special_ids)
    if ids := read_end_ids(folder / GENERATION_CONFIG):
        return ids | spelled
    token_id = backend.token_id(config.names["eos_token"]) if "eos_token" in config.names else None
    own = frozenset() if token_id is None else frozenset({token_id})
    return own | read_end_ids(folder / MODEL_CONFIG) | spelled


def _no_tokenizer(folder: Path) -> Exception:
    for pattern in _OTHER_TOKENIZERS:
        for file in sorted(folder.glob(pattern)):
            return UnsupportedError(
                f"{file}: tokenizers of this kind are not supported. Convert it to a "
                f"{TOKENIZER_JSON}: "
                "load it with transformers and call save_pretrained."
            )
    return CheckpointError(
        folder, f"no tokenizer: looked for {TOKENIZER_JSON} and {TOKENIZER_MODEL}"
    )
