"""What speculative decoding gains on real text: acceptance and speed, on against off.

Three kinds of text, each with what it is known to be good or bad for: continuing code, summarizing
with quotations, telling a story. Two engines that differ in nothing but the draft answer the same
prompts in turn, so what the machine does to one it does to the other; the figure is the ratio of
their decode tok/s, pair by pair.

    python benchmarks/speculation.py --drafts ngram exit-10 --out benchmarks/results/NAME.json

The prompts are made of Python's own library and help topics, which every machine has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from hotloop import LLM, Generation, SamplingParams, Speculation
from hotloop.bench.statistics import mean_figure
from hotloop.cli.engine import chat_ids
from hotloop.hardware import provenance


def prompts(llm: LLM) -> dict[str, tuple[list[int], SamplingParams]]:
    """Token ids by kind of text, and how to sample: drawn where greedy text goes in circles."""
    code = Path(json.decoder.__file__).read_text()
    article = topics["assert"][:1500]
    quote = f"Summarize the text below. Quote its most important sentences.\n\n{article}"
    story = "Write a story about a lighthouse keeper who finds a letter from the sea."
    greedy = SamplingParams(temperature=0.0)
    return {
        "code": (llm.encode(code)[:400], greedy),
        "summary with quotations": (chat_ids(llm, [{"role": "user", "content": quote}]), greedy),
        "story": (
            chat_ids(llm, [{"role": "user", "content": story}]),
            SamplingParams(temperature=0.8, top_p=0.95, seed=0),
        ),
    }


def run(llm: LLM, ids: list[int], params: SamplingParams, n: int) -> Generation:
    return llm.generate([ids], params, max_new_tokens=n, ignore_eos=True)[0]


def measure(off: LLM, on: LLM, repeats: int, n: int) -> list[dict[str, Any]]:
    rows = []
    for kind, (ids, params) in prompts(off).items():
        speeds: dict[str, list[float]] = {"off": [], "on": []}
        seen, same = Speculation(), 0
        for repeat in range(repeats + 1):
            pair = {}
            for name, llm in (("off", off), ("on", on))[:: 1 if repeat % 2 else -1]:
                pair[name] = run(llm, ids, params, n)
            if repeat == 0:
                continue  # warms up
            for name, generation in pair.items():
                speeds[name].append(generation.timing.decode_tok_s)
            assert pair["on"].speculation is not None
            seen += pair["on"].speculation
            same += pair["on"].token_ids == pair["off"].token_ids
        ratios = [b / a for a, b in zip(speeds["off"], speeds["on"], strict=True)]
        rows.append(
            {
                "text": kind,
                "prompt_tokens": len(ids),
                "off_tok_s": mean_figure(speeds["off"]).model_dump(),
                "on_tok_s": mean_figure(speeds["on"]).model_dump(),
                "ratio": mean_figure(ratios).model_dump(),
                "acceptance": seen.acceptance,
                "tokens_per_step": seen.tokens_per_step,
                "off_share": seen.n_off / seen.n_steps,
                "draft_share": seen.draft_s / (seen.draft_s + seen.verify_s),
                "equal_answers": f"{same} of {repeats}",
            }
        )
        show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    ratio, (low, high) = row["ratio"]["mean"], row["ratio"]["ci95"]
    acceptance = " ".join(f"{share:.2f}" for share in row["acceptance"])
    print(
        f"{row['text']:24} off {row['off_tok_s']['mean']:7.1f}  on {row['on_tok_s']['mean']:7.1f}"
        f"  x{ratio:.3f} [{low:.3f}, {high:.3f}]  tokens/step {row['tokens_per_step']:.2f}"
        f"  off {row['off_share']:.0%}  drafts {row['draft_share']:.0%}  [{acceptance}]",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafts", nargs="+", default=["ngram", "exit-10"])
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--quant", default="none")
    parser.add_argument("--execution", default="compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)

    options = {
        "quant": args.quant,
        "execution": args.execution,
        "device": args.device,
        "max_seq_len": 1024,
    }
    off = LLM(args.model, **options)
    results = []
    for draft in args.drafts:
        on = LLM(args.model, draft=draft, draft_tokens=args.draft_tokens, **options)
        print(on.config.name, file=sys.stderr)
        rows = measure(off, on, args.repeats, args.new_tokens)
        results.append({"draft": draft, "config": on.config.to_dict(), "rows": rows})
        on.close()
    if args.out:
        device = torch.device(off.describe().device)
        result = {
            "what": "decode tok/s with speculative decoding over without, pair by pair",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "new_tokens": args.new_tokens,
            "results": results,
            "provenance": provenance(device),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
