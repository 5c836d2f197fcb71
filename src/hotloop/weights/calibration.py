"""Collects the activations by which calibrated schemes weight errors.

An error of a weight changes an output by that error times the activation, so an input feature is
weighted by its mean square. The checkpoint is run in float32, as it is stored, one layer at a time,
before the model itself is loaded: only the embedding, the head and one layer are in memory.

The tokens are drawn uniformly at random, unless ``hotloop quantize`` gets a text. Random tokens
need no text, the result depends only on the model, and quality is not measured on the calibration
text by mistake. Which features are large depends little on the tokens:
docs/decisions/calibrated-scales.md compares them with text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from hotloop.errors import CheckpointError
from hotloop.kernels.attention import torch_attention
from hotloop.models import names
from hotloop.models.cache import KVCache
from hotloop.models.config import ModelConfig
from hotloop.models.decoder import Block, Decoder
from hotloop.models.linear import Linear
from hotloop.printable import printable
from hotloop.quant import Scheme, parse_scheme
from hotloop.quant.none import NoScheme
from hotloop.text.tokenizer import Tokenizer
from hotloop.untrusted import config_error, decode, read_bytes
from hotloop.weights.checkpoint import Checkpoint
from hotloop.weights.identity import CalibrationText, Quantization, read_quantization
from hotloop.weights.load import OnLayer, load_weights
from hotloop.weights.recognition import recognize_matrices
from hotloop.weights.source import CheckpointSource, Importance, is_calibrated, schemes_by_name

N_SEQUENCES = 2
N_TOKENS = 256
"""Tokens of each sequence."""

MAX_TEXT_BYTES = 2**26
"""The largest text that is read; all of it is hashed."""

MAX_TEXT_LENGTH = 2**20
"""The most characters of a text that are tokenized: each takes 240 bytes of memory."""

_SEED = 0


def importance_for(
    schemes: Mapping[str, Scheme],
    checkpoint: Checkpoint,
    model: ModelConfig,
    device: torch.device,
    *,
    drafts: Mapping[str, Scheme] = MappingProxyType({}),
    ids_BT: Tensor | None = None,
    on_layer: OnLayer | None = None,
) -> Importance | None:
    """Returns ``importance`` if a calibrated scheme quantizes some matrix; otherwise None.

    Args:
        schemes: The scheme of every matrix of the model by its name.
        checkpoint: The open checkpoint. Matrices that ``hotloop quantize`` wrote, or that are
            stored in the format of their scheme, are not quantized again.
        model: The architecture.
        device: The device that computes.
        drafts: The schemes of a drafter's copies, which are always quantized.
        ids_BT: The tokens; None draws them at random.
        on_layer: Called with (layers run, layers in all).
    """
    calibrated = {name: scheme for name, scheme in schemes.items() if is_calibrated(scheme)}
    if _copy(checkpoint) is not None:
        calibrated.clear()
    elif calibrated:
        stored = recognize_matrices(checkpoint, model)
        for name, each in stored.items():
            if name in calibrated and calibrated[name].format(each.layout.k) == each.layout.format:
                del calibrated[name]
    if not calibrated and not any(map(is_calibrated, drafts.values())):
        return None
    return importance(checkpoint, model, device, ids_BT, on_layer)


def read_tokens(
    path: Path, tokenizer: Tokenizer, model: ModelConfig
) -> tuple[CalibrationText, Tensor]:
    """Reads a text for calibration: as many tokens as are otherwise drawn, spread over the text.

    Args:
        path: A UTF-8 file of at most ``MAX_TEXT_BYTES``.
        tokenizer: The model's tokenizer.
        model: Its architecture.

    Returns:
        The description of the text for the copy, and its tokens, int64 [B, T].

    Raises:
        ConfigError: The file cannot be read or is not UTF-8, or its text is too short.
    """
    data = read_bytes(path, limit=MAX_TEXT_BYTES, refuse=config_error)
    chars = decode(data, path, config_error)
    if len(chars) > MAX_TEXT_LENGTH:
        apart, kept = len(chars) // N_SEQUENCES, MAX_TEXT_LENGTH // N_SEQUENCES
        chars = "".join(chars[i * apart :][:kept] for i in range(N_SEQUENCES))
    ids = tokenizer.encode(chars, add_special=False)
    n_tokens = _length(model)
    if len(ids) < N_SEQUENCES * n_tokens:
        raise config_error(
            path,
            f"its {len(ids)} tokens are too few to calibrate with: give a text of at least "
            f"{N_SEQUENCES * n_tokens}, or none, for random tokens.",
        )
    step = len(ids) // N_SEQUENCES
    text = CalibrationText(name=printable(path.name), sha256=hashlib.sha256(data).hexdigest())
    return text, torch.tensor([ids[i * step :][:n_tokens] for i in range(N_SEQUENCES)])


def _length(model: ModelConfig) -> int:
    return min(N_TOKENS, model.max_position)


def importance(
    checkpoint: Checkpoint,
    model: ModelConfig,
    device: torch.device,
    ids_BT: Tensor | None = None,
    on_layer: OnLayer | None = None,
) -> dict[str, Tensor]:
    """Computes the mean square of every input feature of every matrix.

    Args:
        checkpoint: The open checkpoint.
        model: Its architecture.
        device: The device that computes.
        ids_BT: The tokens; None draws them at random.
        on_layer: Called with (layers run, layers in all).

    Returns:
        float32 [K] for each matrix, by name, on ``device``.

    Raises:
        CheckpointError: The checkpoint is damaged, or activations are not finite.
    """
    if ids_BT is None:
        shape = (N_SEQUENCES, _length(model))
        generator = torch.Generator().manual_seed(_SEED)
        ids_BT = torch.randint(model.vocab_size, shape, generator=generator)
    n_sequences, n_tokens = ids_BT.shape
    decoder = Decoder(model, n_positions=n_tokens, attention=torch_attention, device=device)
    positions_BT = torch.arange(n_tokens, device=device).expand(n_sequences, -1)
    copy = _copy(checkpoint)
    scheme: Scheme = NoScheme()
    head: Scheme = NoScheme()
    if copy is not None:
        scheme, head = parse_scheme(copy.scheme), parse_scheme(copy.head)
    runner = _LayerRunner(model, decoder, ids_BT.to(device), positions_BT, on_layer)
    load_weights(
        decoder,
        model,
        CheckpointSource(checkpoint, device, model=model),
        shard=model.shards(1, lambda _i, _part: 1)[0],
        adds_biases=True,
        schemes=schemes_by_name(model, scheme, head),
        dtype=torch.float32,
        device=device,
        on_layer=runner.layer,
    )
    found = runner.found
    for name, squares_K in found.items():
        if not squares_K.isfinite().all():
            raise CheckpointError(
                checkpoint.path,
                "its activations are not finite, so scales cannot be calibrated; give a scheme "
                "without -cal",
                tensor=name,
            )
    return found


def _copy(checkpoint: Checkpoint) -> Quantization | None:
    """Returns the description of a copy that ``hotloop quantize`` wrote."""
    return read_quantization(checkpoint.config, checkpoint.config_file)


class _LayerRunner:
    """Runs each layer when its weights have been loaded, and then releases the weights.

    Attributes:
        found: The mean square of each input feature, float32 [K], by name of the matrix.
    """

    def __init__(
        self,
        model: ModelConfig,
        decoder: Decoder,
        ids_BT: Tensor,
        positions_BT: Tensor,
        on_layer: OnLayer | None,
    ) -> None:
        self.found: dict[str, Tensor] = {}
        self._model, self._decoder = model, decoder
        self._ids_BT, self._positions_BT = ids_BT, positions_BT
        self._on_layer = on_layer
        self._x_BTD: Tensor | None = None

    @torch.no_grad()
    def layer(self, done: int, of: int) -> None:
        """Runs the newest loaded layer; after the last layer, also the norm before the head."""
        i, decoder = done - 1, self._decoder
        if self._x_BTD is None:
            self._x_BTD = decoder.embedding(self._ids_BT)
        block = decoder.blocks[i]
        for matrix in self._model.layers[i].matrices:
            parts = [names.layer(i, part.name) for part in matrix.parts]
            block.linears[matrix.name].register_forward_pre_hook(partial(self._record, parts))
        self._x_BTD = self._forward(block, i, self._x_BTD)
        block.to("meta")
        if done == of:
            self._record([names.head(self._model)], decoder.head, (decoder.norm(self._x_BTD),))
        if self._on_layer is not None:
            self._on_layer(done, of)

    def _forward(self, block: Block, i: int, x_BTD: Tensor) -> Tensor:
        n_seats, n_tokens = self._ids_BT.shape
        cache = KVCache(
            kv_heads=self._model.kv_heads[i : i + 1],
            n_seats=n_seats,
            n_positions=n_tokens,
            dtype=x_BTD.dtype,
            device=x_BTD.device,
        )
        cos, sin = (table[self._positions_BT] for table in self._decoder.rope(i))
        seats_B = torch.arange(n_seats, device=x_BTD.device)
        return block(x_BTD, cos, sin, self._positions_BT, *cache.layer(0), seats_B, 0, n_tokens)

    def _record(self, parts: Iterable[str], _linear: Linear, inputs: tuple[Tensor]) -> None:
        squares_K = inputs[0].square().flatten(end_dim=-2).mean(dim=0)
        self.found |= dict.fromkeys(parts, squares_K)
