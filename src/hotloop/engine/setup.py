"""What an ``EngineConfig`` comes down to on this machine, before a weight is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotloop.engine.execution import compile_unavailable_reason
from hotloop.errors import ConfigError, UnsupportedError
from hotloop.hardware import resolve_device
from hotloop.models import names
from hotloop.models.config import ModelConfig
from hotloop.models.families import read_config
from hotloop.models.shapes import SHAPES
from hotloop.parallel.plan import Shard
from hotloop.parallel.rendezvous import Torchrun
from hotloop.quant import Scheme, parse_scheme
from hotloop.types import DEFAULT_MAX_SEQ_LEN, EngineConfig
from hotloop.weights.checkpoint import Checkpoint, open_checkpoint
from hotloop.weights.hub import resolve_model
from hotloop.weights.quantize import stored_schemes


@dataclass(frozen=True, kw_only=True)
class Setup:
    """An engine's configuration, resolved.

    Attributes:
        config: As asked for, with the schemes' canonical names.
        model: The shape of the model.
        path: The checkpoint; None for a built-in shape.
        scheme: Of the projections.
        head_scheme: Of the head.
        device: Where it runs.
        dtype: Element type of activations and unquantized weights.
        n_positions: Tokens a slot can hold.
        shards: What of the model each rank holds.
        rank: The rank that ``device`` and what follows is of; rank 0 holds the most.
    """

    config: EngineConfig
    model: ModelConfig
    path: Path | None
    scheme: Scheme
    head_scheme: Scheme
    device: torch.device
    dtype: torch.dtype
    n_positions: int
    shards: tuple[Shard, ...]
    rank: int = 0

    @property
    def shard(self) -> Shard:
        """What this rank holds."""
        return self.shards[self.rank]

    @property
    def local(self) -> ModelConfig:
        """The shape of this rank's decoder."""
        return self.model.local(self.shard)

    def on(self, rank: int, local_rank: int) -> Setup:
        """The same for another rank, the ``local_rank``-th on its machine."""
        cuda = self.device.type == "cuda" and len(self.shards) > 1
        device = torch.device("cuda", local_rank) if cuda else self.device
        return dataclasses.replace(self, rank=rank, device=device)

    def open(self) -> Checkpoint:
        """The checkpoint, opened anew."""
        assert self.path is not None, "a shape has no checkpoint"
        return open_checkpoint(self.path)


def prepare(config: EngineConfig) -> Setup:
    """Resolves a configuration, and refuses what cannot work.

    Raises:
        ConfigError: Options that contradict each other, the checkpoint or the model's shape.
        UnsupportedError: A model or a device that cannot be served.
        ModelNotFoundError: No such model here.
        CheckpointError: A checkpoint whose description is damaged.
    """
    device = _resolve_device(config)
    path, hf_config = _describe_model(config)
    model = read_config(hf_config)
    config, scheme, head_scheme = _settle_schemes(config, stored_schemes(hf_config))
    if config.execution == "compile" and (reason := compile_unavailable_reason(device)):
        raise UnsupportedError(f"execution 'compile' cannot run here: {reason}.")
    for name, (n, k) in names.linear_weights(model).items():
        scheme.check(name, n, k)
    head_scheme.check(names.head(model), model.vocab_size, model.hidden_size)
    n_positions = config.max_seq_len or min(model.max_position, DEFAULT_MAX_SEQ_LEN)
    if n_positions > model.max_position:
        raise ConfigError(
            f"max_seq_len {n_positions} is beyond the model's context of {model.max_position} "
            "tokens."
        )
    return Setup(
        config=config,
        model=model,
        path=path,
        scheme=scheme,
        head_scheme=head_scheme,
        device=device,
        dtype=_resolve_dtype(config, device),
        n_positions=n_positions,
        shards=model.shards(config.tensor_parallel, alignment=scheme.alignment),
    )


def ranks_here(config: EngineConfig) -> int:
    """How many of a configuration's ranks run on this machine.

    Raises:
        ConfigError: torchrun started another number of processes than there are to be ranks.
    """
    launched = Torchrun.environment()
    if launched is None:
        return config.tensor_parallel
    if launched.world_size != config.tensor_parallel:
        raise ConfigError(
            f"torchrun started {launched.world_size} processes, but tensor_parallel is "
            f"{config.tensor_parallel}: give --tp {launched.world_size}, or start it without "
            "torchrun, which one machine does not need."
        )
    return launched.local_world_size


def _resolve_device(config: EngineConfig) -> torch.device:
    """The device of rank 0, once it is clear that there is one for every rank."""
    n_here = ranks_here(config)
    device = resolve_device(config.device)
    if config.tensor_parallel == 1 or device.type == "cpu":
        return device
    if ":" in config.device:
        raise ConfigError(
            f"device {config.device!r} is one GPU, and tensor_parallel {config.tensor_parallel} "
            "takes one for each rank: use cuda."
        )
    if (found := torch.cuda.device_count()) < n_here:
        raise UnsupportedError(f"needs {n_here} GPUs, found {found}")
    return torch.device("cuda", 0)


def _describe_model(config: EngineConfig) -> tuple[Path | None, dict[str, Any]]:
    """Where the model is, and its ``config.json``; both from the name alone."""
    if config.weights == "random":
        if config.model in SHAPES:
            return None, SHAPES[config.model]
        path = resolve_model(config.model)
    else:
        if config.model in SHAPES and not Path(config.model).exists():
            raise ConfigError(
                f"{config.model!r} is a built-in shape without weights: ask for random weights "
                "(--weights random), or give the path of a checkpoint."
            )
        path = resolve_model(config.model)
    checkpoint = open_checkpoint(path)
    try:
        return path, checkpoint.config
    finally:
        checkpoint.close()


def _settle_schemes(
    config: EngineConfig, stored: tuple[str, str] | None
) -> tuple[EngineConfig, Scheme, Scheme]:
    """Canonical names, the scheme of projections, and that of the head.

    A quantized checkpoint has its own; ``stored`` names them.
    """
    scheme = parse_scheme(config.quant)
    head_scheme = _head_scheme(scheme, config.head)
    if stored is not None and config.weights == "checkpoint":
        same = scheme.name in ("none", stored[0]) and config.head in ("auto", stored[1])
        if not same:
            raise ConfigError(
                f"{config.model} is already quantized as {stored[0]} with head {stored[1]}; it "
                f"cannot be quantized again as {scheme.name} with head {head_scheme.name}. Leave "
                "quant and head out, or start from the unquantized checkpoint."
            )
        scheme, head_scheme = parse_scheme(stored[0]), parse_scheme(stored[1])
    by_default = head_scheme.name == _head_scheme(scheme, "auto").name
    head = "auto" if by_default else head_scheme.name
    return dataclasses.replace(config, quant=scheme.name, head=head), scheme, head_scheme


def _head_scheme(scheme: Scheme, head: str) -> Scheme:
    """``auto`` is int8 under any quantization: four bits cost the head more than they save."""
    if head == "auto":
        head = "none" if scheme.name == "none" else "int8"
    return parse_scheme(head)


def _resolve_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16, except on GPUs before Ampere, which lack it."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16
