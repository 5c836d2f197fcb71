"""Compares all-reduce backends of several ranks on one CPU.

The engines take turns: every one is loaded once and waits, and in a round each decodes the same
tokens. So slow phases of the machine affect all alike. The load of the machine is recorded with
each round: the number of threads that run or wait for a processor, averaged by Linux over a
minute.

    python benchmarks/cpu_ranks.py --out benchmarks/results/cpu-ranks-2-core-x86_64.json

An engine is ``RANKS`` or ``RANKS-BACKEND``, such as ``2-gloo``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hotloop import LLM, SamplingParams
from hotloop.hardware import provenance

PROMPT = list(range(100, 228))


def main() -> None:
    """Prints a line for each round, and writes the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--execution", default="eager")
    parser.add_argument("--engines", nargs="+", default=["1", "2-gloo", "2-shm"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=97)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    engines = {
        name: LLM(args.model, quant=args.quant, execution=args.execution, **rank_options(name))
        for name in args.engines
    }
    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True)
    rounds: list[dict[str, Any]] = []
    tokens = set()
    try:
        for _ in range(1 + args.rounds):  # the first one warms up
            speeds = {}
            for name, llm in engines.items():
                speeds[name], ids = decode(llm, params)
                tokens.add(ids)
            rounds.append({"load": os.getloadavg()[0], "decode_tok_s": speeds})
            print("  ".join(f"{name} {speed:.1f}" for name, speed in speeds.items()), flush=True)
    finally:
        for llm in engines.values():
            llm.close()
    medians = {
        name: statistics.median(each["decode_tok_s"][name] for each in rounds[1:])
        for name in engines
    }
    print("medians", {name: round(speed, 1) for name, speed in medians.items()})
    if args.out is not None:
        about = provenance(torch.device("cpu"), read_bytes_per_s=0.0)  # no figure depends on it
        record = {
            "argv": sys.argv[1:],
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "machine": {name: about[name] for name in ("device", "versions")},
            "same_tokens": len(tokens) == 1,
            "medians": medians,
            "rounds": rounds[1:],
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def rank_options(name: str) -> dict[str, Any]:
    """Returns the options of ``LLM`` for an engine's name."""
    n, _, backend = name.partition("-")
    return {"tensor_parallel": int(n)} | ({"all_reduce": backend} if backend else {})


def decode(llm: LLM, params: SamplingParams) -> tuple[float, tuple[int, ...]]:
    """Returns decode tok/s of one request, and its tokens."""
    began, ids = 0.0, ()
    for piece in llm.stream([PROMPT], params):
        began = began or time.perf_counter()
        if piece.generation is not None:
            ids = piece.generation.token_ids
    return (len(ids) - 1) / (time.perf_counter() - began), ids


if __name__ == "__main__":
    main()
