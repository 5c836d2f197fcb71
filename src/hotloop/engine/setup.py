"""Resolves an ``EngineConfig`` for this machine, without reading weights.

``prepare`` fills in every value that the user left to hotloop, and refuses a configuration that
cannot run. ``resolve_auto`` does the part of it that needs no GPU, so that equal configurations can
be recognized.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch

from hotloop.checked import MAX_SEED
from hotloop.engine import fused
from hotloop.engine.core import padded_rows
from hotloop.engine.forward import compile_unavailable_reason
from hotloop.engine.prefill_workspace import prefill_chunk
from hotloop.errors import ConfigError, ModelNotFoundError, UnsupportedError, shorten_value
from hotloop.hardware import resolve_device
from hotloop.kernels.cuda import tuning
from hotloop.kernels.cuda.launch import unavailable_reason as fused_unavailable_reason
from hotloop.kernels.linear import LinearSpec
from hotloop.models import names
from hotloop.models.config import Matrix, ModelConfig, Part
from hotloop.models.families import read_config
from hotloop.models.shapes import SHAPES
from hotloop.parallel.plan import Shard
from hotloop.parallel.rendezvous import Torchrun
from hotloop.quant import Scheme, parse_head_scheme, parse_scheme
from hotloop.quant.auto import Auto
from hotloop.quant.int4 import GROUP_SIZES, GroupSizeError
from hotloop.quant.none import NoScheme
from hotloop.text.tokenizer import Tokenizer, load_tokenizer
from hotloop.types import (
    DEFAULT_CACHE_BYTES,
    EXACT_CPU_CHUNK,
    MIN_DEFAULT_SEQ_LEN,
    MIN_PREFILL_CHUNK,
    NESTED_DRAFTER,
    OWN_ENGINE,
    DType,
    EngineConfig,
    PrefixReuse,
    StepExecution,
    drafters,
    exit_layers,
    is_draft_model,
    self_scheme,
)
from hotloop.weights.checkpoint import Checkpoint, open_checkpoint, read_model
from hotloop.weights.hub import resolve_model
from hotloop.weights.identity import Quantization, read_quantization
from hotloop.weights.recognition import Recognized, recognize_matrices
from hotloop.weights.source import requantization_notes, schemes_by_name


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The drafters of a configuration, resolved.

    Attributes:
        names: The drafters, as ``types.drafters`` returns them.
        schemes: For a drafter that is the model under another scheme: the scheme of every matrix of
            which the drafter has a copy, by its name in a checkpoint. These are all projections,
            and the head if sharing the model's head would be slower. Empty for other drafters.
        nested: A drafter uses the high planes of the model's nested weights.
        setup: The setup of the draft model; None if no drafter needs one.
    """

    names: tuple[str, ...]
    schemes: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    nested: bool = False
    setup: Setup | None = None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """An engine's configuration, resolved.

    Attributes:
        config: The configuration as given, with the schemes' canonical names.
        model: The architecture of the model.
        path: The path of the checkpoint; None for a built-in shape.
        schemes: The scheme of every matrix, by its name in a checkpoint.
        head_scheme: The scheme of the head.
        device: The device of this rank.
        dtype: Element type of activations and unquantized weights.
        execution: How a step runs.
        n_positions: Tokens that a seat can hold.
        prefill_chunk: The most prompt tokens of one forward.
        shards: The part of the model that each rank holds.
        rank: The rank of this setup; rank 0 holds the largest shard.
        draft: The drafter; None without speculative decoding. Only rank 0 holds a draft model.
        notes: Notes on these choices for readers of results.
    """

    config: EngineConfig
    model: ModelConfig
    path: Path | None
    schemes: Mapping[str, Scheme]
    head_scheme: Scheme
    device: torch.device
    dtype: torch.dtype
    execution: StepExecution
    n_positions: int
    prefill_chunk: int
    shards: tuple[Shard, ...]
    rank: int = 0
    draft: Draft | None = None
    notes: tuple[str, ...] = ()

    @property
    def shard(self) -> Shard:
        """The part of the model that this rank holds."""
        return self.shards[self.rank]

    @property
    def fused(self) -> bool:
        """Whether steps are fused, and weights packed for that."""
        return self.execution == "fused"

    @property
    def asynchronous(self) -> bool:
        """See ``EngineCore``."""
        return self.device.type == "cuda"

    @property
    def captures(self) -> bool:
        """See ``EngineCore``."""
        return self.asynchronous and self.execution != "eager"

    @property
    def ends_on_host(self) -> bool:
        """Whether the host can end chains of drafts early, since it reads tensors at no cost."""
        return self.draft is not None and self.device.type == "cpu"

    @property
    def makes_programs(self) -> bool:
        """Whether each size of step is captured or compiled at its first use."""
        return self.captures or self.execution == "compile"

    @property
    def prefix_reuse(self) -> PrefixReuse:
        """The unit of prefix reuse."""
        chosen = self.config.prefix_cache
        return "none" if chosen == "auto" else chosen

    @property
    def n_seats(self) -> int:
        """Seats of the cache: one for each row, and a scratch seat if steps can be padded."""
        n = self.config.max_batch_size
        padded = self.captures and any(padded_rows(i, n) > i for i in range(1, n + 1))
        return n + padded

    @property
    def local(self) -> ModelConfig:
        """The architecture of this rank's part of the decoder."""
        return self.model.local(self.shard)

    def specs(self, schemes: Mapping[str, Scheme]) -> Iterator[tuple[str, list[LinearSpec]]]:
        """Yields this rank's matrices under ``schemes`` by name; see ``matrix_specs``."""
        n_logits, device = len(self.shard.vocabulary), self.device
        return matrix_specs(
            self.local, n_logits, schemes, self.dtype, device=device, fused=self.fused
        )

    @property
    def draft_specs(self) -> list[LinearSpec]:
        """The matrices of a drafter that is the model under another scheme."""
        if self.draft is None or not self.draft.schemes:
            return []
        return [spec for _, pieces in self.specs(self.draft.schemes) for spec in pieces]

    @property
    def resolved(self) -> EngineConfig:
        """The configuration, with every value that was left to hotloop filled in."""
        one_each = self.device.type == "cuda" and len(self.shards) > 1
        return dataclasses.replace(
            self.config,
            head=self.head_scheme.name,
            execution=self.execution,
            device="cuda" if one_each else str(self.device),
            dtype=cast(DType, str(self.dtype).removeprefix("torch.")),
            max_seq_len=self.n_positions,
            prefix_cache=self.prefix_reuse,
        )

    def on(self, rank: int, local_rank: int) -> Setup:
        """Returns the setup of another rank, the ``local_rank``-th on its machine."""
        cuda = self.device.type == "cuda" and len(self.shards) > 1
        device = torch.device("cuda", local_rank) if cuda else self.device
        draft = self.draft
        if draft and draft.setup:
            draft_setup = dataclasses.replace(draft.setup, device=device)
            draft = dataclasses.replace(draft, setup=draft_setup)
        return dataclasses.replace(self, rank=rank, device=device, draft=draft)

    @property
    def model_setups(self) -> tuple[Setup, ...]:
        """This setup and, on rank 0, the setup of the draft model, if there is one."""
        if self.rank > 0 or self.draft is None or self.draft.setup is None:
            return (self,)
        return (self, self.draft.setup)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model comes with a tokenizer: random weights have none."""
        return self.path is not None and self.config.weights == "checkpoint"

    def load_tokenizer(self) -> Tokenizer:
        """Reads the model's tokenizer."""
        assert self.path is not None, "a built-in shape has no tokenizer"
        return load_tokenizer(self.path)

    def open(self) -> Checkpoint:
        """Opens the checkpoint."""
        assert self.path is not None, "a built-in shape has no checkpoint"
        return open_checkpoint(self.path)


def prepare(config: EngineConfig) -> Setup:
    """Resolves a configuration, and refuses one that cannot run.

    Raises:
        ConfigError: Options contradict each other, the checkpoint or the model's architecture.
        UnsupportedError: The model or the device is not supported.
        ModelNotFoundError: There is no such model here.
        CheckpointError: The checkpoint's metadata is damaged.
    """
    if config.engine != OWN_ENGINE:
        raise ConfigError(
            f"engine {shorten_value(config.engine)} is not hotloop's own: only a sweep's cell can "
            "name another engine."
        )
    return _prepare(config, find_device(config))


def resolve_auto(config: EngineConfig) -> EngineConfig:
    """Resolves ``auto`` and resets options that have no effect, as far as that needs no GPU.

    Two configurations that resolve to the same value make the same engine. The reverse does not
    hold for GPUs, which must be queried to resolve ``auto``.
    """
    scheme = parse_scheme(config.quant)
    head = parse_head_scheme(config.head, scheme)
    known: dict[str, Any] = {"quant": scheme.name, "head": head.name}
    known["draft"] = _canonical_draft(config.draft)
    if config.weights == "checkpoint":
        known["seed"] = EngineConfig.seed
    if config.prefix_cache == "auto":
        known["prefix_cache"] = "none"
    if config.draft == "none":
        known |= {"draft_tokens": EngineConfig.draft_tokens}
        known |= {"draft_policy": EngineConfig.draft_policy}
        known |= {"assume_acceptance": EngineConfig.assume_acceptance}
    try:
        device = resolve_device(config.device)
    except (ConfigError, UnsupportedError):  # reported when the cell runs
        return dataclasses.replace(config, **known)
    if device.type == "cpu":
        dtype = str(_resolve_dtype(config, device)).removeprefix("torch.")
        known |= {"device": "cpu", "dtype": dtype}
        known["prefill_chunk"] = config.prefill_chunk or MIN_PREFILL_CHUNK
        if config.execution == "auto":
            known["execution"] = "eager"
    return dataclasses.replace(config, **known)


def _prepare(config: EngineConfig, device: torch.device) -> Setup:
    path, model, copy, stored, model_notes = _describe_model(config)
    config, scheme, head_scheme = _resolve_schemes(config, copy, stored)
    schemes = schemes_by_name(model, scheme, head_scheme, stored)
    config = dataclasses.replace(config, draft=_canonical_draft(config.draft))
    model_notes += _layout_notes(stored)
    if copy is None:  # a checkpoint that ``hotloop quantize`` wrote is never quantized again
        model_notes += requantization_notes(stored, schemes)
    _check_all_reduce(config, device)
    _check_assumed_acceptance(config)
    _check_permutations(config, model, schemes)
    dtype = _resolve_dtype(config, device)
    n_positions = _resolve_context(config, model, dtype)
    draft_schemes = _self_draft_schemes(config, model, schemes, dtype)
    shards, schemes = _plan_shards(config.tensor_parallel, model, schemes, draft_schemes)
    parts = [model.local(shard) for shard in shards]
    execution, notes = _resolve_execution(
        config,
        device,
        dtype,
        [
            (
                part,
                _fused_specs(part, len(shard.vocabulary), (schemes, draft_schemes), dtype, device),
            )
            for part, shard in zip(parts, shards, strict=True)
        ],
    )
    model_notes += tuple(
        f"rope scaling {rope.scaling!r}: sequences of every length use the frequencies of "
        f"{n_positions} tokens; with max_seq_len up to {model.default_positions} they use those of "
        "the model's original context."
        for _, rope in model.tables
        if rope.depends_on_length and n_positions > rope.original_max_position
    )
    chunk = config.prefill_chunk
    if chunk is None:
        local = model.local(shards[0])
        chunk = prefill_chunk(local, device) if execution == "fused" else MIN_PREFILL_CHUNK
    setup = Setup(
        config=config,
        model=model,
        path=path,
        schemes=schemes,
        head_scheme=head_scheme,
        device=device,
        dtype=dtype,
        execution=execution,
        n_positions=n_positions,
        prefill_chunk=chunk,
        shards=shards,
        notes=(*model_notes, *notes),
    )
    return _with_draft(setup, _prepare_draft(setup, draft_schemes))


def _plan_shards(
    n_ranks: int,
    model: ModelConfig,
    schemes: Mapping[str, Scheme],
    draft_schemes: Mapping[str, Scheme],
) -> tuple[tuple[Shard, ...], Mapping[str, Scheme]]:
    """Plans each rank's shard; super-blocks are cut only where no plan keeps them whole.

    Returns:
        The shards, and the schemes of the model for which they are planned.
    """

    def alignment(i: int, part: Part) -> int:
        name = names.layer(i, part.name)
        return math.lcm(*(each[name].alignment for each in (schemes, draft_schemes) if each))

    while True:
        try:
            return model.shards(n_ranks, alignment), schemes
        except UnsupportedError:
            finer = {
                name: scheme.with_smaller_super_blocks() if isinstance(scheme, Auto) else scheme
                for name, scheme in schemes.items()
            }
            if finer == schemes:
                raise
            schemes = finer


def served_prefill_chunk(config: EngineConfig) -> int:
    """Chooses the chunk size of a server, where other requests wait for one chunk at a time.

    With CPU kernels, prefixes of any length are reused with chunks of this size.
    """
    on_cpu = resolve_device(config.device).type == "cpu"
    return EXACT_CPU_CHUNK if on_cpu else MIN_PREFILL_CHUNK


def _check_assumed_acceptance(config: EngineConfig) -> None:
    """Refuses an assumed acceptance rate for real weights, whose answers it would change."""
    if config.assume_acceptance is None:
        return
    if config.draft == "none":
        raise ConfigError(
            f"assume_acceptance {config.assume_acceptance:g} without drafts has no effect: give a "
            "draft (--draft) too, or leave it out."
        )
    if config.weights != "random":
        raise ConfigError(
            f"assume_acceptance {config.assume_acceptance:g} accepts drafts that the model would "
            "reject, so answers would be wrong: use it only with random weights (--weights random)."
        )


def _with_draft(setup: Setup, draft: Draft | None) -> Setup:
    """Adds the drafter, and limits a default context to what a draft model supports."""
    if draft is None or draft.setup is None:
        return dataclasses.replace(setup, draft=draft)
    n_positions = min(setup.n_positions, draft.setup.model.max_position)
    draft_setup = dataclasses.replace(draft.setup, n_positions=n_positions)
    draft = dataclasses.replace(draft, setup=draft_setup)
    return dataclasses.replace(setup, n_positions=n_positions, draft=draft)


_HEAD_SAVINGS = 0.05
"""A drafter gets a head of its own if that reduces the bytes read per draft by this share."""


def _canonical_draft(draft: str) -> str:
    """Joins the drafters, with the canonical names of their schemes.

    Raises:
        ConfigError: There is no such scheme, or two drafters are the same or cannot be combined.
    """
    if draft == "none" or is_draft_model(draft):
        return draft
    canonical = []
    for name in drafters(draft):
        scheme = self_scheme(name)
        try:
            canonical.append(f"self-{parse_scheme(scheme).name}" if scheme else name)
        except ConfigError as error:
            raise ConfigError(f"draft {shorten_value(name)}: {error}") from error
    kinds = ["self" if self_scheme(name) is not None else name for name in canonical]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(
            f"draft {shorten_value(draft)} names a drafter twice: give each once, and at most one "
            "of self and self-SCHEME."
        )
    return "+".join(canonical)


def _self_draft_schemes(
    config: EngineConfig, model: ModelConfig, schemes: Mapping[str, Scheme], dtype: torch.dtype
) -> dict[str, Scheme]:
    """Returns ``Draft.schemes``.

    Raises:
        ConfigError: The scheme does not fit a matrix, or its drafts read no fewer bytes than the
            model.
    """
    copies = [name for name in drafters(config.draft) if self_scheme(name)]
    if not copies:
        return {}
    (of_draft,) = copies  # ``_canonical_draft`` refuses several
    scheme = parse_scheme(self_scheme(of_draft) or "")
    head_scheme, head = parse_head_scheme("auto", scheme), names.head(model)
    shapes = names.linear_weights(model)
    try:
        draft = schemes_by_name(model, scheme, head_scheme)
    except GroupSizeError as error:
        raise ConfigError(f"draft {of_draft!r}: {error.problem} {error.fix('self-')}") from error
    except ConfigError as error:
        raise ConfigError(f"draft {of_draft!r}: {error}") from error

    def n_bytes(of: Mapping[str, Scheme], name: str, n: int, k: int) -> int:
        spec = LinearSpec(format=of[name].format(k), n=n, k=k, dtype=dtype, device="cpu")
        return spec.stored_bytes

    draft_bytes, model_bytes = (
        sum(n_bytes(of, name, *shape) for name, shape in shapes.items()) for of in (draft, schemes)
    )
    if scheme.name == "auto" or draft_bytes >= model_bytes:
        raise ConfigError(
            f"draft {of_draft!r} reads {draft_bytes / 1e6:,.1f} MB of weights per token, and the "
            f"model itself, with quant {config.quant}, reads {model_bytes / 1e6:,.1f} MB: such "
            "drafts save no time. Choose a scheme with fewer bits, or one with more for the model "
            "(--quant)."
        )
    draft_head_bytes, model_head_bytes = (
        n_bytes(of, head, model.vocab_size, model.hidden_size) for of in (draft, schemes)
    )
    saved_bytes = model_head_bytes - draft_head_bytes
    if saved_bytes < _HEAD_SAVINGS * (draft_bytes + model_head_bytes):
        del draft[head]  # drafts use the model's head
    return draft


def _check_nested(
    config: EngineConfig, model: ModelConfig, schemes: Mapping[str, Scheme], dtype: torch.dtype
) -> None:
    """Refuses to draft with the high planes of weights if some weights are not nested."""
    kinds = {
        schemes[names.layer(i, part.name)].format(matrix.k).kind
        for i, layer in enumerate(model.layers)
        for matrix in layer.matrices
        for part in matrix.parts
    }
    if kinds == {"nested"}:
        return
    widths = [matrix.k for layer in model.kinds for matrix in layer.matrices]
    fits = [size for size in GROUP_SIZES if all(k % size == 0 for k in widths)]
    fixes = [f"--quant int8-g{max(fits)}"] if fits else []
    copy = f"self-int4-g{max(fits)}" if fits else "self-int8"
    with contextlib.suppress(ConfigError):  # with some schemes such drafts would save no time
        _self_draft_schemes(dataclasses.replace(config, draft=copy), model, schemes, dtype)
        fixes.append(f"a quantized copy of the model as the draft, such as --draft {copy}")
    raise ConfigError(
        f"draft {NESTED_DRAFTER!r} uses the high half of each int8 weight quantized in groups, but "
        f"quant is {config.quant!r}: "
        f"give {', or '.join(fixes) or 'another drafter, such as ngram'}."
    )


def _prepare_draft(target: Setup, self_schemes: Mapping[str, Scheme]) -> Draft | None:
    """Resolves the drafters of ``target``; returns None if it has none.

    Raises:
        ConfigError: A drafter does not fit the model, or draft options contradict each other.
        UnsupportedError: The draft model is not supported.
        ModelNotFoundError: There is no such draft model here.
    """
    config, name = target.config, target.config.draft
    if config.draft_quant not in ("auto", "none") and not is_draft_model(name):
        raise ConfigError(
            f"draft_quant {config.draft_quant!r} applies only to a draft model, and draft "
            f"{name!r} is not one: leave draft_quant out, or give a model as the draft."
        )
    if name == "none":
        return None
    if not is_draft_model(name):
        drafter_names, n_all = drafters(name), target.model.n_layers
        for each in drafter_names:
            n_layers = exit_layers(each)
            if n_layers is not None and not 1 <= n_layers < n_all:
                raise ConfigError(
                    f"draft {each!r} runs the first {n_layers} of the model's {n_all} layers: give "
                    f"a number from 1 to {n_all - 1}."
                )
        nested = NESTED_DRAFTER in drafter_names
        if nested:
            _check_nested(config, target.model, target.schemes, target.dtype)
        return Draft(names=drafter_names, schemes=self_schemes, nested=nested)
    try:
        draft_config = EngineConfig(
            model=name,
            weights=config.weights,
            quant=config.draft_quant,
            # The draft model uses the target's execution. Beside a fused target, ``auto`` is
            # resolved for the draft model itself, which may not support fused steps.
            execution=config.execution if target.fused else target.execution,
            device=config.device,
            dtype=config.dtype,
            max_batch_size=config.max_batch_size,
            max_seq_len=config.max_seq_len,
            prefill_chunk=config.prefill_chunk,
            cache_packed=config.cache_packed,
            # With random weights the two models must differ.
            seed=(config.seed + 1) % (MAX_SEED + 1),
        )
        setup = _prepare(draft_config, target.device)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"draft {shorten_value(name)} is neither 'ngram', nor 'exit-N', nor 'self', nor "
            f"'self-SCHEME', nor a model: {error}"
        ) from error
    except (ConfigError, UnsupportedError) as error:
        kind = UnsupportedError if isinstance(error, UnsupportedError) else ConfigError
        raise kind(f"draft {shorten_value(name)}: {error}") from error
    _check_vocabulary(target, setup)
    return Draft(names=(name,), setup=setup)


def _check_vocabulary(target: Setup, draft: Setup) -> None:
    """Refuses a draft model with another vocabulary; the error names the first difference."""

    def tokenizer(setup: Setup) -> Tokenizer | None:
        if setup.path is None or setup.config.weights == "random":
            return None
        return load_tokenizer(setup.path)

    ours, theirs = tokenizer(target), tokenizer(draft)
    if ours is None or theirs is None:
        sizes = target.model.vocab_size, draft.model.vocab_size
    else:
        sizes = ours.vocab_size, theirs.vocab_size
        for i in range(min(sizes)):
            pair = [t.token_bytes(i, skip_special=False) for t in (ours, theirs)]
            if pair[0] != pair[1]:
                raise ConfigError(
                    f"draft {draft.config.model!r} does not have the vocabulary of "
                    f"{target.config.model!r}: token {i} is {pair[1]!r}, not {pair[0]!r}. Use a "
                    "draft model of the same family."
                )
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"draft {draft.config.model!r} has a vocabulary of {sizes[1]} tokens, but "
            f"{target.config.model!r} has {sizes[0]}. Use a draft model of the same family."
        )


def ranks_here(config: EngineConfig) -> int:
    """Counts the ranks of a configuration that run on this machine.

    Raises:
        ConfigError: torchrun's number of processes is not the number of ranks.
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


def find_device(config: EngineConfig) -> torch.device:
    """Resolves the device of rank 0, and checks that every rank here has one. Uses no GPU.

    Raises:
        ConfigError: The device's name is invalid, or names one GPU where each rank needs its own.
        UnsupportedError: There is no such device, or there are fewer GPUs than ranks.
    """
    n_here = ranks_here(config)
    device = resolve_device(config.device)
    if config.tensor_parallel == 1 or device.type == "cpu":
        return device
    if ":" in config.device:
        raise ConfigError(
            f"device {config.device!r} is one GPU, but tensor_parallel {config.tensor_parallel} "
            "needs one for each rank: use cuda."
        )
    if (found := torch.cuda.device_count()) < n_here:
        raise UnsupportedError(f"needs {n_here} GPUs, found {found}")
    return torch.device("cuda", 0)


def _check_all_reduce(config: EngineConfig, device: torch.device) -> None:
    """Refuses a backend for another kind of device, or with one rank.

    The ranks find out whether the backend works on this machine.
    """
    backend = config.all_reduce
    if backend == "auto":
        return
    if config.tensor_parallel == 1:
        raise ConfigError(
            f"all_reduce {backend!r} chooses the all-reduce backend of several ranks, but "
            "tensor_parallel is 1: leave it out, or raise tensor_parallel (--tp)."
        )
    backends = ("nccl", "symm_mem") if device.type == "cuda" else ("gloo", "shm")
    if backend not in backends:
        kind, other = ("CPU", "GPUs") if device.type == "cuda" else ("GPU", "CPUs")
        raise UnsupportedError(
            f"all_reduce {backend!r} is a {kind} backend, and those of {other} are "
            f"{backends[0]} and {backends[1]}: leave it out, or choose one of them."
        )


def _check_permutations(
    config: EngineConfig, model: ModelConfig, schemes: Mapping[str, Scheme]
) -> None:
    """Refuses several ranks if they would split permuted input features (act-order)."""
    if config.tensor_parallel == 1:
        return
    for i, layer in enumerate(model.layers):
        for matrix in layer.matrices:
            for name in (names.layer(i, part.name) for part in matrix.parts):
                if matrix.summed and schemes[name].format(matrix.k).permuted:
                    raise UnsupportedError(
                        f"the input features of {name} are permuted (act-order), so "
                        f"tensor_parallel {config.tensor_parallel} cannot split them over ranks; "
                        "only 1 works."
                    )


def _describe_model(
    config: EngineConfig,
) -> tuple[Path | None, ModelConfig, Quantization | None, dict[str, Recognized], tuple[str, ...]]:
    """Finds a model.

    Returns:
        Its path (None for a built-in shape), its architecture, the description that ``hotloop
        quantize`` wrote (None if it did not), the matrices by name that are stored in another
        tool's encoding, and notes on reading it.
    """
    if config.weights == "random":
        if config.model in SHAPES:
            return None, read_config(SHAPES[config.model]), None, {}, ()
        path = resolve_model(config.model)
    else:
        if config.model in SHAPES and not Path(config.model).exists():
            raise ConfigError(
                f"{config.model!r} is a built-in shape without weights: use random weights "
                "(--weights random), or give the path of a checkpoint."
            )
        path = resolve_model(config.model)
    checkpoint = open_checkpoint(path)
    try:
        model, notes = read_model(checkpoint)
        copy = read_quantization(checkpoint.config, checkpoint.config_file)
        stored = {} if config.weights == "random" else recognize_matrices(checkpoint, model)
        return path, model, copy, stored, notes
    finally:
        checkpoint.close()


def _resolve_schemes(
    config: EngineConfig, copy: Quantization | None, stored: Mapping[str, Recognized]
) -> tuple[EngineConfig, Scheme, Scheme]:
    """Resolves the schemes of projections and head, and their canonical names in the config.

    ``auto`` remains where matrices are stored in the encodings of other tools.

    Args:
        config: The configuration.
        copy: The description of a checkpoint that ``hotloop quantize`` wrote, which determines the
            schemes.
        stored: The matrices that are stored in other tools' encodings.
    """
    scheme = parse_scheme(config.quant)
    head_scheme = parse_head_scheme(config.head, scheme)
    if copy is not None and config.weights == "checkpoint":
        same = scheme.name in ("auto", copy.scheme) and config.head in ("auto", copy.head)
        if not same:
            raise ConfigError(
                f"{config.model} is already quantized as {copy.scheme} with head {copy.head}; "
                f"it cannot be quantized again as {scheme.name} with head {head_scheme.name}. "
                "Leave quant and head out, or start from the unquantized checkpoint."
            )
        scheme, head_scheme = parse_scheme(copy.scheme), parse_scheme(copy.head)
    elif not stored:
        scheme, head_scheme = (
            NoScheme() if each.name == "auto" else each for each in (scheme, head_scheme)
        )
    by_default = head_scheme.name == parse_head_scheme("auto", scheme).name
    head = "auto" if by_default else head_scheme.name
    return dataclasses.replace(config, quant=scheme.name, head=head), scheme, head_scheme


def _layout_notes(stored: Mapping[str, Recognized]) -> tuple[str, ...]:
    """Returns notes on layouts that are assumed, where a checkpoint does not describe them."""
    counts = Counter(each.layout.assumption for each in stored.values() if each.layout.assumption)
    return tuple(
        f"{n} {'matrix is' if n == 1 else 'matrices are'} {assumption}."
        for assumption, n in counts.items()
    )


def linear_specs(
    model: ModelConfig,
    schemes: Mapping[str, Scheme],
    dtype: torch.dtype,
    device: torch.device,
    *,
    fused: bool,
) -> Iterator[tuple[int, Matrix, list[LinearSpec]]]:
    """Yields the matrices of layers by number, each with its pieces of one number format.

    Args:
        model: The architecture of a rank's part of the decoder.
        schemes: The scheme of every matrix, by its name in a checkpoint.
        dtype: Element type of activations.
        device: The device of the weights.
        fused: The matrices are for the fused step.
    """
    plain_rows = fused and tuning.reads_plain_rows(device)
    for i, layer in enumerate(model.layers):
        for matrix in layer.matrices:
            formats = [schemes[names.layer(i, p.name)].format(matrix.k) for p in matrix.parts]
            by_format = groupby(zip(formats, matrix.parts, strict=True), key=lambda pair: pair[0])
            pieces = [(form, sum(part.n for _, part in parts)) for form, parts in by_format]
            yield (
                i,
                matrix,
                [
                    LinearSpec(
                        format=format_,
                        n=n,
                        k=matrix.k,
                        dtype=dtype,
                        device=device.type,
                        fused=fused,
                        plain_rows=plain_rows,
                        paired=matrix.paired and len(pieces) == 1,
                    )
                    for format_, n in pieces
                ],
            )


def head_spec(
    model: ModelConfig,
    n_logits: int,
    schemes: Mapping[str, Scheme],
    dtype: torch.dtype,
    device: torch.device,
    *,
    fused: bool,
) -> LinearSpec:
    """Returns the head's ``LinearSpec`` with ``n_logits`` rows; see ``linear_specs``."""
    k = model.hidden_size
    format_ = schemes[names.head(model)].format(k)
    return LinearSpec(
        format=format_,
        n=n_logits,
        k=k,
        dtype=dtype,
        device=device.type,
        fused=fused,
        plain_rows=fused and tuning.reads_plain_rows(device),
    )


def matrix_specs(
    model: ModelConfig,
    n_logits: int,
    schemes: Mapping[str, Scheme],
    dtype: torch.dtype,
    *,
    device: torch.device,
    fused: bool,
) -> Iterator[tuple[str, list[LinearSpec]]]:
    """Yields all matrices by name, as ``linear_specs`` does; the head if it has a scheme."""
    for _, matrix, pieces in linear_specs(model, schemes, dtype, device, fused=fused):
        yield matrix.name, pieces
    if names.head(model) in schemes:
        yield "head", [head_spec(model, n_logits, schemes, dtype, device, fused=fused)]


def _fused_specs(
    model: ModelConfig,
    n_logits: int,
    schemes: Sequence[Mapping[str, Scheme]],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, list[LinearSpec]]]:
    """Yields the matrices that the fused step reads, by name: the model's and its drafter's."""
    for each in filter(None, schemes):
        yield from matrix_specs(model, n_logits, each, dtype, device=device, fused=True)


def _resolve_context(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """Resolves the tokens that a seat can hold, by default as ``EngineConfig`` documents."""
    if config.max_seq_len is None:
        bytes_per_token = config.max_batch_size * model.kv_bytes_per_token(dtype.itemsize)
        within = max(MIN_DEFAULT_SEQ_LEN, DEFAULT_CACHE_BYTES // bytes_per_token)
        return min(model.default_positions, within)
    if config.max_seq_len > model.max_position:
        raise ConfigError(
            f"max_seq_len (--max-seq-len) {config.max_seq_len} exceeds the model's context of "
            f"{model.max_position} tokens."
        )
    return config.max_seq_len


def _resolve_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """Resolves ``auto`` to bfloat16, or to float16 on GPUs before Ampere, which lack it."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def _resolve_execution(
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    parts: Sequence[tuple[ModelConfig, Iterable[tuple[str, list[LinearSpec]]]]],
) -> tuple[StepExecution, tuple[str, ...]]:
    """Resolves the execution mode, with notes: ``auto`` is fused, or else eager.

    Args:
        config: The configuration.
        device: The device of rank 0.
        dtype: Element type of activations.
        parts: The architecture of each rank's part of the decoder, and its matrices.

    Raises:
        UnsupportedError: An execution mode other than ``auto`` was requested and cannot run.
    """
    if config.execution == "eager":
        return "eager", ()
    wanted = "fused" if config.execution == "auto" else config.execution
    if wanted == "compile":
        reason = compile_unavailable_reason(device)
    else:
        tokens = 1 if config.draft == "none" else 1 + config.draft_tokens
        reasons = (fused.unsupported_reason(*part, dtype, tokens) for part in parts)
        reason = fused_unavailable_reason(device) or next(filter(None, reasons), None)
    if reason is None:
        return wanted, ()
    if config.execution != "auto":
        raise UnsupportedError(
            f"execution {wanted!r} cannot run here: {reason}. Choose 'auto', or 'eager', which "
            "always runs."
        )
    if device.type != "cuda":  # nobody expects fused steps there
        return "eager", ()
    return "eager", (f"execution/fused not used, but eager: {reason}",)
