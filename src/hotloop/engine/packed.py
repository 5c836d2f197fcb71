"""Loads the weights of a rank: packed weights from the cache, or else from the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from hotloop.engine.setup import Setup
from hotloop.kernels.cpu.huge_pages import move_to_huge_pages
from hotloop.kernels.cuda import tuning
from hotloop.kernels.linear import choose_linear
from hotloop.models.decoder import Decoder
from hotloop.parallel.collectives import Group
from hotloop.quant import Scheme
from hotloop.weights.calibration import importance_for
from hotloop.weights.load import OnLayer, SelfDraft, load_weights
from hotloop.weights.packed_cache import entry_key, load_packed, store_packed
from hotloop.weights.source import CheckpointSource, RandomSource, Source


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The result of loading weights.

    Attributes:
        read_bytes: Bytes that were read from files; None for random weights.
        read_s: Seconds that loading took, quantizing and packing included, without writing to the
            cache.
        notes: Notes for readers of results.
    """

    read_bytes: int | None
    read_s: float
    notes: tuple[str, ...] = ()


def load(
    setup: Setup,
    decoder: Decoder,
    group: Group,
    on_layer: OnLayer | None = None,
    *,
    draft_decoder: Decoder | None = None,
) -> Loaded:
    """Assigns every weight of ``decoder``, and of ``draft_decoder`` if there is one.

    Args:
        setup: The rank's setup.
        decoder: The rank's part of the model, without weights.
        group: The ranks, which load at the same time.
        on_layer: Called with (layers done, layers in all).
        draft_decoder: The decoder of a drafter that is the model under another scheme, or consists
            of the high planes of its weights; None without such a drafter.
    """
    nested = setup.draft is not None and setup.draft.nested
    loaded = _load(setup, decoder, group, on_layer, None if nested else draft_decoder)
    if draft_decoder is not None:
        if nested:
            draft_decoder.share_high_planes(decoder)
        draft_decoder.share_biases(decoder)
    if setup.device.type != "cpu":
        return loaded
    modules = [decoder] if draft_decoder is None else [decoder, draft_decoder]
    reason = move_to_huge_pages(chain.from_iterable(module.buffers() for module in modules))
    if reason is None:
        return loaded
    note = f"weights are not in huge pages, which makes decoding slower: {reason}"
    return replace(loaded, notes=(*loaded.notes, note))


def _load(
    setup: Setup,
    decoder: Decoder,
    group: Group,
    on_layer: OnLayer | None,
    draft_decoder: Decoder | None,
) -> Loaded:
    started = time.perf_counter()

    def loaded(read_bytes: int | None) -> Loaded:
        return Loaded(read_bytes=read_bytes, read_s=time.perf_counter() - started)

    if not setup.config.cache_packed or setup.path is None or setup.config.weights == "random":
        return loaded(_load_from_source(setup, decoder, group, on_layer, draft_decoder))
    facts = _facts(setup)
    parts: list[tuple[str, nn.Module]] = [(entry_key(setup.path, facts), decoder)]
    if draft_decoder is not None:  # has its own entry: the model's is the same with any drafter
        facts |= {"draft": _draft_facts(setup)}
        parts.append((entry_key(setup.path, facts), _own_matrices(draft_decoder, decoder)))
    before = [dict(module.named_buffers(remove_duplicate=False)) for _, module in parts]
    read_bytes: int | None = 0
    for key, module in reversed(parts):  # the drafter's is more often missing
        found = None if read_bytes is None else load_packed(key, module, setup.device)
        read_bytes = None if found is None or read_bytes is None else read_bytes + found
    # Ranks combine statistics while they quantize: all of them read the source, or none.
    is_missing = torch.tensor([read_bytes is None], dtype=torch.int32, device=setup.device)
    if not int(group.max(is_missing)):
        return loaded(read_bytes)
    made = loaded(_load_from_source(setup, decoder, group, on_layer, draft_decoder))
    notes = [
        store_packed(key, module, without_weights)
        for (key, module), without_weights in zip(parts, before, strict=True)
    ]
    return replace(made, notes=tuple(dict.fromkeys(note for note in notes if note is not None)))


def _load_from_source(
    setup: Setup,
    decoder: Decoder,
    group: Group,
    on_layer: OnLayer | None,
    draft_decoder: Decoder | None,
) -> int | None:
    """Assigns the weights from the checkpoint, or random ones.

    Returns:
        Bytes that were read from files; None for random weights.
    """
    drafts = {} if draft_decoder is None or setup.draft is None else setup.draft.schemes
    checkpoint, importance = None, None
    source: Source
    try:
        if setup.config.weights == "random":
            source = RandomSource(setup.config.seed, setup.dtype, setup.device)
        else:
            checkpoint = setup.open()
            importance = importance_for(
                setup.schemes,
                checkpoint,
                setup.model,
                setup.device,
                drafts=drafts,
                on_layer=_progress_of_half(on_layer, 0),
            )
            if importance is not None:
                on_layer = _progress_of_half(on_layer, 1)
            source = CheckpointSource(
                checkpoint,
                setup.device,
                model=setup.model,
                dtype=setup.dtype,
                reduce_max=group.max,
                importance=importance,
            )
        draft = None
        if draft_decoder is not None:
            draft = SelfDraft(
                decoder=draft_decoder,
                schemes=drafts,
                reduce_max=group.max,
                importance=importance,
            )
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
            draft=draft,
            on_layer=on_layer,
        )
    finally:
        if checkpoint is not None:
            checkpoint.close()
    return source.read_bytes if isinstance(source, CheckpointSource) else None


def _progress_of_half(on_layer: OnLayer | None, half: int) -> OnLayer | None:
    """Reports the progress of a half of the work (0 is calibration, 1 loading) as that of both."""
    if on_layer is None:
        return None
    return lambda done, of: on_layer(half * of + done, 2 * of)


def _facts(setup: Setup) -> dict[str, Any]:
    """Returns everything that the packed bytes depend on, besides the checkpoint and the code."""
    return {
        "model": repr(setup.model),
        **_of_schemes(setup, setup.schemes),
        "shards": repr(setup.shards),
        "rank": setup.rank,
        "dtype": str(setup.dtype),
        "device": setup.device.type,
        "fused": setup.fused,
        "plain_rows": setup.fused and tuning.reads_plain_rows(setup.device),
    }


def _draft_facts(setup: Setup) -> dict[str, Any]:
    """Returns everything that a drafter's packed bytes depend on, besides the model's facts."""
    assert setup.draft is not None, "there is no drafter"
    return _of_schemes(setup, setup.draft.schemes)


def _of_schemes(setup: Setup, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    specs = setup.specs(schemes)
    return {
        "schemes": {name: repr(scheme) for name, scheme in schemes.items()},
        # On a CPU without a compiler other kernels pack the weights.
        "kernels": [choose_linear(spec)[0].name for _, pieces in specs for spec in pieces],
    }


def _own_matrices(draft_decoder: Decoder, decoder: Decoder) -> nn.ModuleDict:
    """Returns the matrices that a drafter does not share with the model, by unique names."""
    matrices = {
        f"{i} {name}": linear
        for i, block in enumerate(draft_decoder.blocks)
        for name, linear in block.linears.items()
    }
    return nn.ModuleDict(
        matrices if draft_decoder.head is decoder.head else matrices | {"head": draft_decoder.head}
    )
