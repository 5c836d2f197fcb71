"""Measures the quality of a model under several schemes, and writes the table of docs/quality.md.

    python benchmarks/quality.py MODEL --out benchmarks/results/quality-NAME --docs docs/quality.md

Each scheme is one ``hotloop eval``: windows of the default text, and the task recipes/facts.jsonl.
Its record is stored under ``--out`` as soon as it is complete, and a scheme that has one is not
measured again. Figures do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu import require_marks, table, write_between

from hotloop.bench.record import Record
from hotloop.report.numbers import divergence, significant, uncertain
from hotloop.report.quality import format_outcome
from hotloop.report.read import read_records
from hotloop.sweep.store import RECORDS, append

SCHEMES = (
    "none",
    "int8",
    "fp8",
    "int4-g32-asym",
    "int4-g32",
    "int4-g32-cal",
    "int4-g64",
    "int4-g64-cal",
    "int4-g128",
)

FACTS = Path(__file__).parents[1] / "recipes/facts.jsonl"

HEAD = ("scheme", "ppl", "Δ ln ppl ± SE", "mean KL", "KL, 99 % quantile", "same top-1",
        "facts", "worse / better", "verdict")  # fmt: skip


def command(model: str, scheme: str, *, window: int, windows: int, items: int) -> list[str]:
    """Returns the command that measures a scheme; with 0 ``items`` it answers all."""
    sizes = ("--window", str(window), "--n-windows", str(windows), "--items", str(items))
    tasks = ("--tasks", str(FACTS), "--json")
    return [sys.executable, "-m", "hotloop", "eval", model, "--quant", scheme, *sizes, *tasks]


def quality_table(records: Sequence[Record]) -> str:
    """Makes the table, and below it the floor of KL."""
    by_scheme = {record.config["quant"]: record for record in records}
    rows = [line(scheme, by_scheme[scheme]) for scheme in SCHEMES if scheme in by_scheme]
    floors = [record.kl_floor.mean for record in records if record.kl_floor is not None]
    floor = f"\nThe floor of KL is {divergence(max(floors))}.\n" if floors else ""
    return table(HEAD, rows, texts=1) + floor


def line(scheme: str, record: Record) -> tuple[str, ...]:
    """Returns a scheme's row; one that could not be measured has its status."""
    if record.perplexity is None:
        return (scheme, record.status, *[""] * (len(HEAD) - 2))
    figures = [f"{record.perplexity.mean:.2f}"]
    if record.delta_ln_ppl is None or record.kl_mean is None or record.same_top1 is None:
        figures += ["–"] * 4
    else:
        low, high = (100 * end for end in record.same_top1.ci95 or (0, 0))
        figures += [
            uncertain(record.delta_ln_ppl.mean, record.delta_ln_ppl.se, signed=True),
            significant(record.kl_mean.mean, 3),
            significant(record.kl_p99 or 0, 2),
            f"{100 * record.same_top1.mean:.1f} % ({low:.0f} to {high:.0f})",
        ]
    verdict, tasks = record.verdict, record.tasks
    figures.append(f"{100 * tasks[0].accuracy.mean:.1f} %" if tasks else "–")
    if verdict is None:
        return (scheme, *figures, "–", "–")
    return (scheme, *figures, f"{verdict.worse} / {verdict.better}", format_outcome(verdict))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="a page with marks for the table of this --out")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--items", type=int, default=0, help="0: all")
    args = parser.parse_args()
    begin, end = (f"<!-- {args.out.name}: {word} -->" for word in ("begin", "end"))
    require_marks(parser, args.docs, begin, end)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / RECORDS
    found = read_records(path) if path.exists() else []
    for scheme in args.schemes.split(","):
        if scheme in {record.config["quant"] for record in found}:
            continue
        sizes = {"window": args.window, "windows": args.windows, "items": args.items}
        done = subprocess.run(
            command(args.model, scheme, **sizes), stdout=subprocess.PIPE, text=True, check=False
        )
        record = Record.model_validate_json(done.stdout)
        append(path, record)
        found.append(record)
        print(" | ".join(line(scheme, record)), flush=True)
    if args.docs:
        write_between(args.docs, begin, end, quality_table(found))


if __name__ == "__main__":
    main()
