"""Predicts the memory of a configuration from shapes alone, before anything is loaded."""

from __future__ import annotations

from hotloop.engine.prefill_workspace import bytes_per_row
from hotloop.engine.programs import serving_steps
from hotloop.engine.prompt import PASS_TOKENS, pass_prompts
from hotloop.engine.setup import Setup, head_spec, linear_specs, prepare, ranks_here
from hotloop.errors import OutOfMemoryError
from hotloop.hardware import device_info, free_bytes
from hotloop.kernels.linear import DENSE, Fused, LinearSpec, choose_linear
from hotloop.types import EngineConfig, MemoryPlan

_FLOAT32 = 4
_GRAPH_BYTES = 4 * 2**20
"""Bytes of one captured program, without the tensors that all programs share."""

_SAMPLER_BYTES = 10
"""Bytes of the sampler's state per row and token id: two masks, a count and a bias."""


def predict_memory(config: EngineConfig, *, served: bool = False) -> MemoryPlan:
    """Predicts the memory that ``LLM(config)`` takes.

    Args:
        config: The configuration.
        served: Include the programs that a ``Service`` captures.

    Raises:
        HotloopError: The errors that ``LLM(config)`` raises before it reads a weight.
    """
    setup = prepare(config)
    free = [free_bytes(setup.on(0, i).device) for i in range(ranks_here(config))]
    # Ranks on a CPU share its memory evenly; on GPUs each has its own.
    return MemoryPlan(
        weights_bytes=weights_bytes(setup),
        draft_bytes=weights_bytes(setup) - _model_bytes(setup),
        cache_bytes=_cache_bytes(setup),
        workspace_bytes=_workspace_bytes(setup) + (_served_bytes(setup) if served else 0),
        device=str(setup.device),
        free_bytes=min(free) // (len(free) if setup.device.type == "cpu" else 1),
    )


def _served_bytes(setup: Setup) -> int:
    """Bounds the bytes of the programs of a service, and of the logits that they keep."""
    if not setup.captures:
        return 0
    steps = serving_steps(setup, 2)
    # Drafting is a program of its own, and so is the choice of a token with a grammar.
    n_programs = sum(1 + (step.k > 0) + step.features.constrain for step in steps)
    drafts = setup.config.draft_tokens if setup.draft else 0
    kept = setup.config.max_batch_size * (1 + drafts) * len(setup.shard.vocabulary) * _FLOAT32
    return n_programs * _GRAPH_BYTES + kept


def check_fits(setup: Setup) -> None:
    """Refuses a configuration that a device of this size cannot hold, before anything is built.

    Raises:
        OutOfMemoryError: Weights, caches and rows alone exceed the device's total memory.
    """
    total, shared_by = device_info(setup.device).total_bytes, 1
    if setup.device.type == "cpu":  # its ranks share its memory
        shared_by = ranks_here(setup.config)
    needed = weights_bytes(setup) + _cache_bytes(setup) + _rows_bytes(setup)
    if needed > total // shared_by:
        raise OutOfMemoryError("load", needed, free_bytes(setup.device) // shared_by)


def weights_bytes(setup: Setup) -> int:
    """Counts the exact bytes of a rank's resident weights, with rope tables and a drafter."""
    drafts = sum(choose_linear(spec)[0].nbytes for spec in setup.draft_specs)
    return sum(map(_model_bytes, setup.model_setups)) + drafts


def _cache_bytes(setup: Setup) -> int:
    """Counts the exact bytes of a rank's caches; a draft model's cache has the same seats."""
    per_token = sum(
        each.local.kv_bytes_per_token(each.dtype.itemsize) for each in setup.model_setups
    )
    return setup.n_seats * setup.n_positions * per_token


def _model_bytes(setup: Setup) -> int:
    """Counts the exact bytes of a rank's weights and rope tables of one model."""
    model, itemsize = setup.local, setup.dtype.itemsize

    def packed(spec: LinearSpec) -> int:
        return choose_linear(spec)[0].nbytes

    layers = itemsize * sum(norm.n for layer in model.layers for norm in layer.norms)
    specs = linear_specs(model, setup.schemes, setup.dtype, setup.device, fused=setup.fused)
    for _, matrix, pieces in specs:
        layers += sum(map(packed, pieces))
        # The bias of a matrix whose outputs are summed over ranks is added by rank 0 alone.
        if matrix.bias and not (matrix.summed and setup.rank > 0):
            layers += itemsize * matrix.n

    def head(n: int) -> LinearSpec:
        """Returns the spec of ``n`` rows of the head."""
        return head_spec(model, n, setup.schemes, setup.dtype, setup.device, fused=setup.fused)

    # The embedding is whole on every rank, and the head a part.
    whole, part = head(model.vocab_size), head(len(setup.shard.vocabulary))
    kernel, tied = choose_linear(part)[0], model.tie_embeddings
    channelwise = whole.kind == "int8" and whole.format.is_per_channel(whole.k)
    same_rows = tied and (channelwise or whole.format == DENSE)
    row_bytes = whole.k + _FLOAT32 if same_rows and channelwise else whole.k * itemsize
    if tied and kernel.embeds and part == whole:
        embeddings = packed(whole)  # the head is the embedding
    else:
        embeddings = whole.n * row_bytes
        if not (same_rows and kernel.keeps_rows):  # or else the head is a slice of it
            embeddings += kernel.nbytes
    norm = itemsize * model.hidden_size
    rope = 2 * _FLOAT32 * setup.n_positions * sum(head_dim for head_dim, _ in model.tables)
    return layers + embeddings + norm + rope


def _rows_bytes(setup: Setup) -> int:
    """Counts the bytes of all rows' state: their tokens, and the sampler's tensors of tokens."""
    drafts = setup.config.draft_tokens if setup.draft else 0
    history = 8 * (setup.n_positions + drafts + 1)
    of_tokens = _SAMPLER_BYTES * setup.model.vocab_size
    return setup.config.max_batch_size * (history + of_tokens)


def _workspace_bytes(setup: Setup) -> int:
    """Bounds the bytes besides weights and caches: rows, activations, a dequantized matrix."""
    dequantized = [_dequantized_bytes(each) for each in setup.model_setups]
    # With fused steps, every model keeps a buffer for its largest dequantized matrix.
    return (
        _rows_bytes(setup)
        + max(map(_transient_bytes, setup.model_setups))
        + (sum(dequantized) if setup.fused else max(dequantized))
    )


def _transient_bytes(setup: Setup) -> int:
    """Bounds the bytes of one forward, without weights, cache and a dequantized matrix."""
    model, n_logits = setup.local, len(setup.shard.vocabulary)
    rows = min(setup.prefill_chunk, setup.n_positions)
    runtime = 768 * 2**20 if setup.device.type == "cuda" else 0  # context, cuBLAS, graphs
    if setup.fused:  # no attention scores are stored, and only a step's rows have logits
        drafts = setup.config.draft_tokens if setup.draft else 0
        n_rows = setup.config.max_batch_size
        step = max(PASS_TOKENS * pass_prompts(n_rows), n_rows * (1 + drafts))
        return rows * bytes_per_row(model) + 2 * step * n_logits * _FLOAT32 + runtime
    widest = 4 * model.hidden_size + max(
        layer.feed_forward.intermediate_size + sum(m.n for m in layer.matrices if not m.summed)
        for layer in model.kinds
    )
    activations = rows * widest * _FLOAT32
    n_heads = max(layer.attention.n_heads for layer in model.kinds)
    attention = rows * n_heads * setup.n_positions * (1 + setup.dtype.itemsize)
    logits = 2 * rows * n_logits * _FLOAT32
    return activations + attention + logits + runtime


def _dequantized_bytes(setup: Setup) -> int:
    """Counts the bytes of the largest dequantized matrix.

    Matrices in plain rows are not dequantized in fused prefill.
    """
    model = setup.local
    if setup.fused:
        specs = linear_specs(model, setup.schemes, setup.dtype, setup.device, fused=True)
        sizes = [
            matrix.n * matrix.k
            for _, matrix, pieces in specs
            if [Fused(piece).form.plain_rows for piece in pieces] != [True]
        ]
        return max(sizes, default=0) * setup.dtype.itemsize
    sizes = [matrix.n * matrix.k for layer in model.kinds for matrix in layer.matrices]
    itemsize = _FLOAT32 if setup.device.type == "cpu" else setup.dtype.itemsize
    return max(*sizes, len(setup.shard.vocabulary) * model.hidden_size) * itemsize
