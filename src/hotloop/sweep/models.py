"""The models that an experiment reads: their content, how they are stored, and their references.

Quality is measured against an unquantized model. A copy that ``hotloop quantize`` wrote is none, so
it is compared with the model that it was made from, which its description names and identifies by
content, or with nothing.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from hotloop.errors import ConfigError, ModelNotFoundError, shorten_value
from hotloop.evaluate.windows import take_windows
from hotloop.types import EngineConfig, is_draft_model
from hotloop.weights.hub import resolve_model
from hotloop.weights.identity import Quantization, StoredForm, hash_checkpoint


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A checkpoint on this machine.

    Attributes:
        name: What the user calls it.
        path: Where it is.
        sha256: The hash of its content.
        stored: The types of its tensors and its description, where they could be read.
    """

    name: str
    path: Path
    sha256: str
    stored: StoredForm | None = None

    @property
    def quantization(self) -> Quantization | None:
        """What ``hotloop quantize`` says of it, if it is a copy that this wrote."""
        return self.stored.quantization if self.stored else None


class Models:
    """Checkpoints by name, each read once.

    Args:
        readable: Whether hotloop's own engine reads them; others have formats of their own.
    """

    def __init__(self, *, readable: bool) -> None:
        self._readable = readable
        self._known: dict[str, KnownModel] = {}

    def __getitem__(self, name: str) -> KnownModel:
        if name not in self._known:
            path = resolve_model(name)
            self._known[name] = KnownModel(
                name=name,
                path=path,
                sha256=hash_checkpoint(path),
                stored=read_stored_form(path) if self._readable else None,
            )
        return self._known[name]

    def reference_of(self, model: KnownModel, asked: str | None) -> KnownModel:
        """The unquantized model to compare with.

        Args:
            model: What is measured.
            asked: The reference that the user names.

        Raises:
            ConfigError: ``asked`` is a quantized copy, or not what ``model`` was made from.
            NoReferenceError: ``model`` is a quantized copy and its source is not to be found.
        """
        copy = model.quantization
        if asked is not None:
            reference = self[asked]
            if reference.quantization is not None:
                raise ConfigError(
                    f"the reference {shorten_value(asked)} is a quantized copy itself "
                    f"({reference.quantization.scheme}): give the model it was made from."
                )
            if copy and copy.source and copy.source.sha256 != reference.sha256:
                raise ConfigError(
                    f"the reference {shorten_value(asked)} is not what {shorten_value(model.name)} "
                    f"was made from, {shorten_value(copy.source.name)}: its content has the hash "
                    f"{reference.sha256[:12]}, not {copy.source.sha256[:12]}."
                )
            return reference
        if copy is None:
            return model
        lacks = (
            f"no unquantized reference: {model.name} is a copy quantized as {copy.scheme}. Name "
            "the model it was made from with --reference"
        )
        if copy.source is None:
            raise NoReferenceError(f"{lacks}.")
        try:
            reference = self[copy.source.name]
        except ModelNotFoundError:
            raise NoReferenceError(f"{lacks}; {copy.source.name} is not found here.") from None
        if reference.sha256 != copy.source.sha256:
            raise NoReferenceError(f"{lacks}; {copy.source.name} here has another content.")
        return reference

    def check_length(self, model: KnownModel, text: str, window: int) -> None:
        """Refuses a text that is too short, before processes are started that would find it so.

        Raises:
            ConfigError: The text has fewer tokens than a window.
        """
        if not self._readable:
            return
        from hotloop.text.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(model.path)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special=False)

        take_windows(encode, text, window, 1)


class NoReferenceError(ConfigError):
    """A model's quality cannot be known, since there is nothing to compare it with."""


def read_stored_form(path: Path) -> StoredForm:
    """How a checkpoint is stored; see ``weights.checkpoint.stored_form``."""
    from hotloop.weights.checkpoint import open_checkpoint, stored_form  # these import torch

    with closing(open_checkpoint(path)) as checkpoint:
        return stored_form(checkpoint)


def settle_schemes(config: EngineConfig, stored: StoredForm | None) -> EngineConfig:
    """The configuration with the schemes that a quantized copy has, where it names none."""
    from hotloop.quant import parse_head_scheme, parse_scheme  # imports torch

    copy = stored.quantization if stored else None
    if copy is None or config.quant != "none" or config.head not in ("auto", copy.head):
        return config
    by_default = parse_head_scheme("auto", parse_scheme(copy.scheme)).name == copy.head
    return replace(config, quant=copy.scheme, head="auto" if by_default else copy.head)


def checkpoints(config: EngineConfig) -> tuple[str | None, str | None]:
    """The names of the checkpoints that a configuration reads: the model's, and its draft's."""
    if config.weights == "random":
        return None, None
    return config.model, config.draft if is_draft_model(config.draft) else None
