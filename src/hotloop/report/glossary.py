"""Explains the parts of configurations' names to a new reader.

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
    "asym": "scales have an offset beside them",
    "zp": "scales have an integer zero point beside them",
}

_EXECUTIONS = {
    "eager": "PyTorch starts one operation after the other",
    "compile": "torch.compile makes the kernels of a decode step; prompts are computed as by eager",
    "fused": "a decode step is one CUDA graph of hotloop's own kernels",
}


def names_explained(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Yields the parts that occur in the names of records' cells, each with its meaning."""
    yield "a/b/…", "the quantization, the execution, then what differs from the default"
    ours = [record for record in records if record.baseline is None]
    schemes = {record.config.get("quant", "auto") for record in records}
    if all(record.config.get("quant") != "auto" for record in ours):
        schemes.discard("auto")  # is not part of the names of other engines' cells
    options = {part for scheme in schemes for part in scheme.split("-")}
    yield from ((name, said) for name, said in _SCHEMES.items() if name in options)
    sizes = sorted(int(part[1:]) for part in options if re.fullmatch(r"g\d+", part))
    if sizes:
        yield ", ".join(f"g{size}" for size in sizes), "so many weights of a row share a scale"
    yield from ((name, said) for name, said in _OPTIONS.items() if name in options)
    executions = {(record.engine or {}).get("execution") for record in records}
    yield from ((name, said) for name, said in _EXECUTIONS.items() if name in executions)
    degrees = sorted({record.config.get("tensor_parallel", 1) for record in records} - {1})
    if degrees:
        ranks = ", ".join(f"tp{degree}" for degree in degrees)
        yield ranks, "tensor parallel: every layer is split over so many GPUs, or processes on CPUs"
    if any(record.config.get("draft", "none") != "none" for record in records):
        yield "draft=…", "speculative decoding: what drafts, and how many tokens at most"
    for engine in dict.fromkeys(record.baseline for record in records if record.baseline):
        yield engine, "another engine, measured for comparison"
