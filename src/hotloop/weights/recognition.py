"""Recognizes how each matrix of a checkpoint is stored, and checks it against the configuration."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from hotloop.errors import CheckpointError, UnsupportedError
from hotloop.kernels.linear import KernelFormat
from hotloop.models import names
from hotloop.models.config import ModelConfig
from hotloop.quant.claims import no_claims, read_claims
from hotloop.quant.encodings import Layout, StoredMatrix, StoredTensor, load_encodings
from hotloop.weights.checkpoint import Checkpoint
from hotloop.weights.tensor_file import TensorInfo

FLOATS = frozenset({"F32", "F16", "BF16"})
"""Element types of tensors that are weights by themselves."""


@dataclass(frozen=True, kw_only=True)
class Recognized:
    """A matrix that is stored in an encoding.

    Attributes:
        encoding: The name of the encoding.
        layout: Its tensors.
    """

    encoding: str
    layout: Layout

    @property
    def label(self) -> str:
        """The encoding with its variant, for messages."""
        return ", ".join(filter(None, (self.encoding, self.layout.detail)))


def recognize_matrices(checkpoint: Checkpoint, model: ModelConfig) -> dict[str, Recognized]:
    """Returns the matrices of a model that are stored in an encoding, by name.

    Matrices that ``hotloop quantize`` wrote are not among them: the description lists them.

    Raises:
        CheckpointError: Tensors contradict each other or the configuration.
        UnsupportedError: A matrix is stored in no known encoding.
        ConfigError: The configuration is damaged.
    """
    stored = StoredMatrices(checkpoint)
    matrices = names.linear_weights(model)
    matrices[names.head(model)] = (model.vocab_size, model.hidden_size)
    found = ((name, stored.recognize(name, shape)) for name, shape in matrices.items())
    return {name: recognized for name, recognized in found if recognized is not None}


class StoredMatrices:
    """Recognizes the encodings of a checkpoint's matrices.

    Raises:
        UnsupportedError: The configuration names a method that is not supported.
        ConfigError: A damaged configuration.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = sorted(checkpoint.tensors)
        self._encodings = load_encodings()
        described = checkpoint.quantization_config
        self._claims = no_claims if described is None else read_claims(*described)

    def recognize(
        self, name: str, shape: tuple[int, int], wanted: KernelFormat | None = None
    ) -> Recognized | None:
        """Returns the encoding of a matrix; None if it is not quantized, or missing.

        Args:
            name: Its name, without ``.weight``.
            shape: [N, K].
            wanted: See ``StoredMatrix``.

        Raises:
            CheckpointError: Its tensors contradict each other or the configuration.
            UnsupportedError: It is stored in no known encoding.
        """
        tensors = self._tensors(name)
        claim = self._claims(name)
        stored = StoredMatrix(
            name=name,
            shape=shape,
            tensors=tensors,
            read=lambda suffix: self._checkpoint.read(f"{name}{suffix}"),
            claim=claim,
            wanted=wanted,
        )
        if claim.encodings == () and (suffix := _method_suffix(tensors)):
            raise UnsupportedError(
                f"{tensors[suffix].file}, tensor {name}{suffix}: the checkpoint's configuration "
                f"says {claim.label}, which is not supported."
            )
        found = [
            Recognized(encoding=encoding, layout=layout)
            for encoding, recognizer in self._encodings.items()
            if (layout := recognizer.recognize(stored)) is not None
        ]
        plain = tensors.get(".weight")
        if plain is not None and plain.dtype not in FLOATS:
            plain = None
        _check_once(stored, found, is_plain=plain is not None)
        if found:
            _check_claim(stored, found[0].encoding, found[0].layout)
            return found[0]
        if plain is None:
            self._refuse(stored)
        elif claim.quantized:
            raise CheckpointError(
                plain.file,
                f"holds {plain.dtype}, though the checkpoint's configuration says that it is "
                f"quantized ({claim.label})",
                tensor=plain.name,
            )
        return None

    def _tensors(self, name: str) -> Mapping[str, TensorInfo]:
        prefix = f"{name}."
        first = bisect_left(self._names, prefix)
        here = takewhile(lambda tensor: tensor.startswith(prefix), self._names[first:])
        return {tensor.removeprefix(name): self._checkpoint.tensors[tensor] for tensor in here}

    def _refuse(self, matrix: StoredMatrix) -> None:
        """Refuses a matrix that is stored in no known encoding, by the tensors that it has.

        It names a tensor that is missing or has a wrong shape, if some of the tensors that an
        encoding needs are there. It returns if no tensor identifies a method: an error names the
        missing tensor when it is read.
        """
        stored, claimed = matrix.tensors, matrix.claim.encodings
        partial = []  # the expected tensors of encodings of which some are there
        for name, encoding in self._encodings.items():
            expected = encoding.expected(matrix)
            first = next(iter(expected), None)
            is_claimed = claimed is not None and name in claimed and expected.keys() & stored.keys()
            is_found = claimed is None and first in stored and expected[first].fits(stored[first])
            if is_claimed or is_found:
                partial.append(expected)
        suffix = _method_suffix(stored)
        if suffix is None or any(suffix in expected for expected in partial):
            absent = [next((part for part in each if part not in stored), "") for each in partial]
            if absent and all(absent):
                there = [part for part in stored if any(part in each for each in partial)]
                missing = " or ".join(dict.fromkeys(absent))
                raise matrix.error(
                    there[0],
                    f"is {_described(stored[there[0]])}, and {missing} is missing beside it",
                )
        if suffix is None:
            return
        wrong = [
            f"{part} is {_described(stored[part])}, and should be {wanted}"
            for expected in (partial if len(partial) == 1 else [])
            for part, wanted in expected.items()
            if part in stored and not wanted.fits(stored[part])
        ]
        listed = ", ".join(f"{part} {_described(entry)}" for part, entry in stored.items())
        raise UnsupportedError(
            f"{stored[suffix].file}, tensor {matrix.name}{suffix}: it is {_METHODS[suffix]} in a "
            f"layout that is not supported ({matrix.claim.label}): "
            + (f"{wrong[0]}." if wrong else f"a matrix of {list(matrix.shape)} as {listed}.")
        )


def _described(entry: StoredTensor) -> str:
    return f"{list(entry.shape)} of {entry.dtype}"


def _check_once(matrix: StoredMatrix, found: list[Recognized], *, is_plain: bool) -> None:
    """Refuses a matrix that is stored more than once."""
    known = {part for each in found for part in (*each.layout.parts, *each.layout.surplus)}
    forms = []
    for each in found:
        others = {part for other in found if other is not each for part in other.layout.parts}
        own = next((part for part in each.layout.parts if part not in others), ".weight")
        forms.append((own, f"{each.encoding} ({own})"))
    rest = (suffix for suffix in _METHODS if suffix in matrix.tensors and suffix not in known)
    forms += [(suffix, f"{_METHODS[suffix]} ({suffix})") for suffix in rest]
    forms += [(".weight", ".weight")] if is_plain else []
    if len(forms) > 1:
        raise CheckpointError(
            matrix.tensors[forms[0][0]].file,
            f"is there more than once: as {' and as '.join(form for _, form in forms)}",
            tensor=matrix.name,
        )


def _check_claim(matrix: StoredMatrix, encoding: str, layout: Layout) -> None:
    """Refuses a configuration that contradicts the tensors of a matrix."""
    claim = matrix.claim
    first = next(iter(layout.parts))
    stored = f"is stored as {encoding}"
    if claim.quantized is False:
        raise matrix.error(
            first,
            f"{stored}, though the checkpoint's configuration says that it is not quantized "
            f"({claim.label})",
        )
    if claim.encodings is not None and encoding not in claim.encodings:
        raise matrix.error(
            first, f"{stored}, though the checkpoint's configuration says {claim.label}"
        )
    if claim.bits not in (None, layout.bits):
        raise matrix.error(
            first,
            f"{stored} of {layout.bits} bits, though the checkpoint's configuration says "
            f"{claim.bits}",
        )
    if claim.symmetric and layout.format.zero != "none":
        raise matrix.error(
            first,
            f"{stored} with zero points, though the checkpoint's configuration says that it is "
            "symmetric",
        )


_METHODS: Mapping[str, str] = {
    ".SCB": "bitsandbytes int8",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP#",
    ".q_weight": "EXL2",
    ".trellis": "EXL3",
    ".B": "Marlin",
    ".qweight": "AWQ or GPTQ",
    ".weight_packed": "compressed-tensors",
}
"""Quantization methods, by a tensor that only they have."""


def _method_suffix(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Returns the suffix of a tensor that identifies a method (``_METHODS``), or None."""
    return next((suffix for suffix in _METHODS if suffix in tensors), None)
