"""Measures how many items of a task an engine scores in a second of processor time.

The items are answered with one seat, and with several, whose windows are scored together; ``hotloop
eval`` has eight. Processor time depends less on other processes than elapsed time does.

    python benchmarks/scoring.py --task recipes/facts.jsonl --items 100 --out FILE
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hotloop import LLM
from hotloop.evaluate.tasks import load_task
from hotloop.hardware import provenance

REPEATS = 3


def measure(args: argparse.Namespace, quant: str, rows: int) -> dict[str, Any]:
    task, seconds, right = load_task(str(args.task), args.items), [], 0
    with LLM(args.model, quant=quant, max_seq_len=512, max_batch_size=rows, device="cpu") as llm:
        load_task(str(args.task), 2 * rows).answer(llm, lambda *_: None)
        for _ in range(REPEATS):
            began_s = time.process_time()
            right = sum(task.answer(llm, lambda *_: None))
            seconds.append(time.process_time() - began_s)
        kernels = sorted(set(llm.describe().kernels.values()))
    return {
        "quant": quant,
        "seats": rows,
        "items": len(task),
        "right": right,
        "processor_s": seconds,
        "items_per_processor_s": len(task) / min(seconds),
        "kernels": kernels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--seats", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--quant", nargs="+", default=["none", "int8"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for quant in args.quant:
        for seats in args.seats:
            rows.append(measure(args, quant, seats))
            print("{quant:5} seats {seats}: {items_per_processor_s:.1f} items/s".format(**rows[-1]))
    result = {
        "what": "items of a task that are scored in a second of processor time",
        "model": args.model,
        "task": args.task.name,
        "rows": rows,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": provenance(torch.device("cpu")),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
