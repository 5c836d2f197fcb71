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
from hotloop.quant.encodings import Layout, StoredMatrix, load_encodings
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
        """The encoding with its variant, for people."""
        return ", ".join(filter(None, (self.encoding, self.layout.detail)))


def recognize_matrices(checkpoint: Checkpoint, model: ModelConfig) -> dict[str, Recognized]:
    """Returns the matrices of a model that are stored in an encoding, by name.

    Those that ``hotloop quantize`` wrote are not among them: a description says what they are.

    Raises:
        CheckpointError: Tensors contradict each other or the configuration.
        UnsupportedError: A matrix is stored in no known encoding.
        ConfigError: A damaged configuration.
    """
    stored = StoredMatrices(checkpoint)
    matrices = names.linear_weights(model)
    matrices[names.head(model)] = (model.vocab_size, model.hidden_size)
    found = ((name, stored.recognize(name, shape)) for name, shape in matrices.items())
    return {name: recognized for name, recognized in found if recognized is not None}


class StoredMatrices:
    """Tells how the matrices of a checkpoint are stored.

    Raises:
        UnsupportedError: The configuration names a method that is not read.
        ConfigError: A damaged configuration.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = sorted(checkpoint.tensors)
        self._encodings = load_encodings()
        said = checkpoint.quantization_config
        self._claims = no_claims if said is None else read_claims(*said)

    def recognize(
        self, name: str, shape: tuple[int, int], wanted: KernelFormat | None = None
    ) -> Recognized | None:
        """Returns how a matrix is stored; None if it is not quantized, or not there.

        Args:
            name: Its name, without ``.weight``.
            shape: [N, K].
            wanted: The number format that hotloop's own description gives it, if there is one.

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
        if claim.encodings == () and (suffix := _told_by(tensors)):
            raise UnsupportedError(
                f"{tensors[suffix].file}, tensor {name}{suffix}: the checkpoint's configuration "
                f"says {claim.label}, which is not supported."
            )
        for encoding, recognizer in self._encodings.items():
            if (layout := recognizer.recognize(stored)) is not None:
                _check_claim(stored, encoding, layout)
                return Recognized(encoding=encoding, layout=layout)
        plain = tensors.get(".weight")
        if plain is not None and plain.dtype in FLOATS:
            if claim.quantized:
                raise CheckpointError(
                    plain.file,
                    f"holds {plain.dtype}, though the checkpoint's configuration says that it is "
                    f"quantized ({claim.label})",
                    tensor=plain.name,
                )
            return None
        if tensors.keys() - {".weight", ".bias"}:
            _refuse(stored, tensors)
        return None

    def _tensors(self, name: str) -> Mapping[str, TensorInfo]:
        prefix = f"{name}."
        first = bisect_left(self._names, prefix)
        here = takewhile(lambda tensor: tensor.startswith(prefix), self._names[first:])
        return {tensor.removeprefix(name): self._checkpoint.tensors[tensor] for tensor in here}


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
"""Methods by a tensor that only they have."""


def _told_by(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Returns what follows the name of the matrix in a tensor that only some methods have."""
    return next((suffix for suffix in _METHODS if suffix in tensors), None)


def _refuse(matrix: StoredMatrix, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuses a matrix that is stored in no known encoding, by the tensors that it has."""
    if (suffix := _told_by(tensors)) is None:
        return  # a tensor of another kind, or one missing: named where it is read
    listed = ", ".join(
        f"{suffix} {list(info.shape)} of {info.dtype}" for suffix, info in tensors.items()
    )
    raise UnsupportedError(
        f"{tensors[suffix].file}, tensor {matrix.name}{suffix}: it is {_METHODS[suffix]} in a "
        f"layout that is not supported ({matrix.claim.label}): a matrix of {list(matrix.shape)} "
        f"as {listed}."
    )
