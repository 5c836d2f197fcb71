"""The models that an experiment reads: their content, their stored forms, and their references.

Quality is measured against an unquantized model. A copy that ``hotloop quantize`` wrote is compared
with the model from which it was made, or with none; its description names that model and identifies
it by content.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hotloop.errors import ConfigError, ModelNotFoundError, shorten_value
from hotloop.evaluate.windows import take_windows
from hotloop.types import EngineConfig, is_draft_model
from hotloop.weights.hub import resolve_model
from hotloop.weights.identity import (
    Quantization,
    StoredForm,
    identify_checkpoint,
    sample_checkpoint,
)


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A checkpoint on this machine. Its files are read when they are first needed.

    Attributes:
        name: The name or path that the user gave.
        path: Its path.
    """

    name: str
    path: Path

    @cached_property
    def sha256(self) -> str:
        """The hash that identifies it; see ``weights.identity``."""
        return identify_checkpoint(self.path)

    @cached_property
    def sample(self) -> str:
        """The hash of samples of its content."""
        return sample_checkpoint(self.path)

    @cached_property
    def stored(self) -> StoredForm:
        """The types of its tensors and its description."""
        return read_stored_form(self.path)

    @property
    def quantization(self) -> Quantization | None:
        """The description that ``hotloop quantize`` wrote; None if it is not a quantized copy."""
        return self.stored.quantization


class Models:
    """Checkpoints by name, each read once."""

    def __init__(self) -> None:
        self._known: dict[str, KnownModel] = {}

    def __getitem__(self, name: str) -> KnownModel:
        if name not in self._known:
            self._known[name] = KnownModel(name=name, path=resolve_model(name))
        return self._known[name]

    def reference_of(
        self, model: KnownModel, requested: str | None, copy: Quantization | None
    ) -> KnownModel:
        """Finds the unquantized model to compare with.

        Args:
            model: The model that is measured.
            requested: The reference that the user names; None for the default.
            copy: The description of ``model``, if it is a copy that ``hotloop quantize`` wrote.

        Raises:
            ConfigError: ``requested`` is a quantized copy, or ``model`` was not made from it.
            NoReferenceError: ``model`` is a quantized copy, and its source cannot be found.
        """
        if requested is not None:
            reference = self[requested]
            if reference.quantization is not None:
                raise ConfigError(
                    f"the reference {shorten_value(requested)} is itself a quantized copy "
                    f"({reference.quantization.scheme}): give the model that it was made from."
                )
            expected = copy.source.sample if copy and copy.source else None
            if copy and copy.source and expected and expected != reference.sample:
                raise ConfigError(
                    f"{shorten_value(model.name)} was not made from the reference "
                    f"{shorten_value(requested)} but from {shorten_value(copy.source.name)}: the "
                    f"reference has the hash {reference.sample[:12]}, not {expected[:12]}."
                )
            return reference
        if copy is None:
            return model
        message = (
            f"no unquantized reference: {model.name} is a copy quantized as {copy.scheme}. Name "
            "the model it was made from with --reference"
        )
        if copy.source is None:
            raise NoReferenceError(f"{message}.")
        try:
            reference = self[copy.source.name]
        except ModelNotFoundError:
            raise NoReferenceError(
                f"{message}; {copy.source.name} is not on this machine."
            ) from None
        if copy.source.sample is None:
            raise NoReferenceError(
                f"{message}; an earlier version of hotloop made the copy, and did not record the "
                "hash of that model."
            )
        if reference.sample != copy.source.sample:
            raise NoReferenceError(
                f"{message}; {copy.source.name} on this machine has other content."
            )
        return reference


def check_length(model: KnownModel, text: str, window: int) -> None:
    """Refuses a text that is shorter than a window, before any process starts.

    Raises:
        ConfigError: The text has fewer tokens than a window.
    """
    from hotloop.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model.path)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False)

    take_windows(encode, text, window, 1)


class NoReferenceError(ConfigError):
    """A model has no unquantized reference, so its quality is unknown."""


def read_stored_form(path: Path) -> StoredForm:
    """Reads the stored form of a checkpoint; see ``weights.checkpoint.stored_form``."""
    from hotloop.weights.checkpoint import open_checkpoint, stored_form  # these import torch

    with closing(open_checkpoint(path)) as checkpoint:
        return stored_form(checkpoint)


def is_quantized_copy(name: str) -> bool:
    """Returns whether ``hotloop quantize`` wrote a model.

    Raises:
        ModelNotFoundError: There is no such model on this machine.
        CheckpointError: Its description is damaged.
    """
    return KnownModel(name=name, path=resolve_model(name)).quantization is not None


def resolve_schemes(config: EngineConfig, stored: StoredForm | None) -> EngineConfig:
    """Replaces ``auto`` by the stored schemes, if the checkpoint is a copy or not quantized.

    Args:
        config: The configuration.
        stored: The stored form of its checkpoint; None for random weights.
    """
    copy = None if stored is None else stored.quantization
    if copy is None:
        is_plain = stored is None or not stored.is_quantized
        return replace(config, quant="none") if is_plain and config.quant == "auto" else config
    if config.quant not in ("auto", copy.scheme) or config.head not in ("auto", copy.head):
        return config
    from hotloop.quant import parse_head_scheme, parse_scheme  # imports torch

    by_default = parse_head_scheme("auto", parse_scheme(copy.scheme)).name == copy.head
    return replace(config, quant=copy.scheme, head="auto" if by_default else copy.head)


def checkpoints(config: EngineConfig) -> tuple[str | None, str | None]:
    """Returns the checkpoints that a configuration reads: the model's and the draft model's."""
    if config.weights == "random":
        return None, None
    return config.source, config.draft if is_draft_model(config.draft) else None
