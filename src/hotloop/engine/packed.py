"""Loads the weights of a rank: packed ones from the cache, or from their source."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from hotloop.engine.setup import Setup, head_spec, linear_specs
from hotloop.kernels.linear import choose_linear
from hotloop.models.decoder import Decoder
from hotloop.parallel.collectives import Group
from hotloop.weights.load import OnLayer, load_weights
from hotloop.weights.packed_cache import entry_key, load_packed, store_packed
from hotloop.weights.source import CheckpointSource, RandomSource, Source


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Weights that are in place.

    Attributes:
        read_bytes: Bytes that were read from files; None for random weights.
        read_s: Seconds that it took; what is kept for the next start is not a part of them.
        notes: Notes for readers of results.
    """

    read_bytes: int | None
    read_s: float
    notes: tuple[str, ...] = ()


def load(setup: Setup, decoder: Decoder, group: Group, on_layer: OnLayer | None = None) -> Loaded:
    """Assigns every weight of ``decoder``.

    Args:
        setup: The rank's setup.
        decoder: The rank's part of the model, without weights.
        group: The ranks, which load at the same time.
        on_layer: Called with (layers done, layers in all).
    """
    started = time.perf_counter()

    def loaded(read_bytes: int | None) -> Loaded:
        return Loaded(read_bytes=read_bytes, read_s=time.perf_counter() - started)

    if not setup.config.cache_packed or setup.path is None or setup.config.weights == "random":
        return loaded(_load_from_source(setup, decoder, group, on_layer))
    key = entry_key(setup.path, _facts(setup))
    without_weights = dict(decoder.named_buffers(remove_duplicate=False))
    read_bytes = load_packed(key, decoder, setup.device)
    # Ranks combine statistics while they quantize: all of them read the source, or none.
    is_missing = torch.tensor([read_bytes is None], dtype=torch.int32, device=setup.device)
    if not int(group.max(is_missing)):
        return loaded(read_bytes)
    made = loaded(_load_from_source(setup, decoder, group, on_layer))
    note = store_packed(key, decoder, without_weights)
    return made if note is None else replace(made, notes=(note,))


def _load_from_source(
    setup: Setup, decoder: Decoder, group: Group, on_layer: OnLayer | None
) -> int | None:
    """Returns the bytes that were read; None for random weights."""
    checkpoint = None
    source: Source
    if setup.config.weights == "random":
        source = RandomSource(setup.config.seed, setup.dtype, setup.device)
    else:
        checkpoint = setup.open()
        source = CheckpointSource(
            checkpoint, setup.device, model=setup.model, dtype=setup.dtype, combine=group.max
        )
    try:
        load_weights(
            decoder,
            setup.model,
            source,
            shard=setup.shard,
            adds_biases=setup.rank == 0,
            schemes=setup.schemes,
            dtype=setup.dtype,
            device=setup.device,
            fused=setup.fused,
            on_layer=on_layer,
        )
    finally:
        if checkpoint is not None:
            checkpoint.close()
    return source.read_bytes if isinstance(source, CheckpointSource) else None


def _facts(setup: Setup) -> dict[str, Any]:
    """Returns what decides the packed bytes, besides the checkpoint and the code."""
    device, n_logits = setup.device.type, len(setup.shard.vocabulary)
    options = (setup.schemes, setup.dtype, device)
    specs = [
        spec
        for _, _, pieces in linear_specs(setup.local, *options, fused=setup.fused)
        for spec in pieces
    ]
    specs.append(head_spec(setup.local, n_logits, *options, fused=setup.fused))
    return {
        "model": repr(setup.model),
        "schemes": {name: repr(scheme) for name, scheme in setup.schemes.items()},
        "shards": repr(setup.shards),
        "rank": setup.rank,
        "dtype": str(setup.dtype),
        "device": device,
        "fused": setup.fused,
        # On a CPU without a compiler it is other kernels that pack.
        "kernels": [choose_linear(spec)[0].name for spec in specs],
    }
