"""The same random model twice: in Hugging Face transformers, and here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hotloop.kernels.attention import Attention, choose_attention
from hotloop.models.cache import KVCache
from hotloop.models.config import ModelConfig
from hotloop.models.decoder import Decoder
from hotloop.models.families import read_config
from hotloop.quant import parse_scheme
from hotloop.weights.checkpoint import open_checkpoint
from hotloop.weights.load import load_weights
from hotloop.weights.source import CheckpointSource, schemes_by_name

CPU = torch.device("cpu")


def save_random(folder: Path, keys: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """A transformers model of a ``config.json`` in which every parameter matters, saved too."""
    settings = {k: v for k, v in keys.items() if k != "model_type"}
    config = AutoConfig.for_model(keys["model_type"], **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            std = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.normal_(mean, std, generator=noise)
    model.save_pretrained(folder)
    return model


def reference_logits(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Float32 logits [B, T, V] of whole sequences."""
    with torch.inference_mode():
        return model(input_ids=ids_BT).logits


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A loaded decoder and a cache for it."""

    config: ModelConfig
    decoder: Decoder
    cache: KVCache

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor, positions_B: Tensor, *, first_seat: int = 0) -> Tensor:
        """Logits [B, T, V] of tokens that follow what the seats hold."""
        positions_BT = positions_B[:, None] + torch.arange(ids_BT.shape[1])
        hidden = self.decoder(
            ids_BT,
            positions_BT,
            self.cache,
            seats_B=torch.arange(first_seat, first_seat + len(ids_BT)),
            first_seat=first_seat,
            length=int(positions_BT.max()) + 1,
        )
        return self.decoder.logits(hidden)


def load(
    folder: Path,
    *,
    n_seats: int = 2,
    n_positions: int = 128,
    quant: str = "none",
    dtype: torch.dtype = torch.float32,
    attention: Attention | None = None,
) -> Twin:
    """Loads a folder as hotloop does."""
    config = read_config(json.loads((folder / "config.json").read_text()))
    chosen = choose_attention(CPU, dtype)[1] if attention is None else attention
    decoder = Decoder(config, n_positions=n_positions, attention=chosen, device=CPU)
    scheme = parse_scheme(quant)
    load_weights(
        decoder,
        config,
        CheckpointSource(open_checkpoint(folder), CPU),
        shard=config.shards(1)[0],
        adds_biases=True,
        schemes=schemes_by_name(config, scheme, scheme),
        dtype=dtype,
        device=CPU,
    )
    cache = KVCache(
        kv_heads=config.kv_heads,
        n_seats=n_seats,
        n_positions=n_positions,
        dtype=dtype,
        device=CPU,
    )
    return Twin(config=config, decoder=decoder, cache=cache)
