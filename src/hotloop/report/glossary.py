"""Explains the parts of the names of configurations.

Only the parts that occur are explained. Their speed and quality are in the records.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hotloop.bench.record import Record

_SCHEMES = {
    "none": "weights in the element type, not quantized by hotloop",
    "auto": "weights as they are stored",
    "int8": "weights in 8-bit integers",
    "int4": "weights in 4-bit integers",
    "fp8": "weights in 8-bit floating point",
}

_OPTIONS = {
    "asym": "asymmetric: each scale has an offset",
    "zp": "asymmetric: each scale has an integer zero point",
    "cal": "calibrated: scales are searched for, weighted by activations",
}

_EXECUTIONS = {
    "eager": "plain PyTorch, one operation at a time",
    "compile": "torch.compile compiles a decode step; prefill is eager",
    "fused": "a decode step is one CUDA graph of hotloop's own kernels",
}


def explain_names(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Yields the parts that occur in the names of records' cells, each with its meaning."""
    yield "a/b/…", "the quantization, the execution mode, then options that differ from the default"
    ours = [record for record in records if record.baseline is None]
    schemes = {record.config.get("quant", "auto") for record in records}
    if all(record.config.get("quant") != "auto" for record in ours):
        schemes.discard("auto")  # is not part of the names of other engines' cells
    options = {part for scheme in schemes for part in scheme.split("-")}
    yield from ((name, meaning) for name, meaning in _SCHEMES.items() if name in options)
    sizes = sorted(int(part[1:]) for part in options if re.fullmatch(r"g\d+", part))
    if sizes:
        yield (
            ", ".join(f"g{size}" for size in sizes),
            "group size: the number of consecutive weights that share a scale",
        )
    yield from ((name, meaning) for name, meaning in _OPTIONS.items() if name in options)
    executions = {(record.engine or {}).get("execution") for record in records}
    yield from ((name, meaning) for name, meaning in _EXECUTIONS.items() if name in executions)
    degrees = sorted({record.config.get("tensor_parallel", 1) for record in records} - {1})
    if degrees:
        ranks = ", ".join(f"tp{degree}" for degree in degrees)
        yield ranks, "tensor parallelism: every layer is split over this many ranks"
    if any(record.config.get("draft", "none") != "none" for record in records):
        yield "draft=…", "speculative decoding: the drafter, and the most tokens that it drafts"
    for engine in dict.fromkeys(record.baseline for record in records if record.baseline):
        yield engine, "another engine, measured for comparison"
