"""Measures speculative decoding on real text: acceptance, and speed on against off.

There are four kinds of text, for which drafts are known to be good or bad: continuing code,
summarizing with quotations, telling a story, answering a question. One engine answers the same
prompt four times: off, on, on, off, and in the next round on, off, off, on, so that drifts of the
machine's speed cancel out. Off is the same engine without its draft controller, so that it takes
only plain steps. A second engine would not do: of two equal engines one can be 5 % faster than the
other, depending on where in a CPU's memory its weights are. Each round gives one ratio of decode
tok/s; the figure is the geometric mean of the ratios, with an interval over rounds. Sampled
texts differ between rounds. A round in which other processes were busy is repeated, or with
``--disturbed`` kept and counted, since acceptance does not depend on them. Also recorded are the
times of steps with each number of drafts (``LLM.step_costs``); the number of programs that were
captured or compiled during the timed rounds, which should be 0; and on a CPU the processor time of
a forward pass of the drafter and of the model, which depends less on other processes.

    python benchmarks/speculation.py --drafts ngram exit-10 --out benchmarks/results/NAME.json

Random weights, as of the shape ``llama-2-70b``, have no text. ``--weights random --texts random``
with ``--assume-acceptance`` measures what drafts would give at that acceptance, both ways in one
engine. Its answers with and without drafts differ, since it accepts drafts that are wrong.

The prompts are made of Python's own library and help topics, which every machine has. Rows of other
drafts and texts remain in the file, so that parts can be measured at different times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from bystanders import Bystanders

from hotloop import LLM, Generation, SamplingParams, Speculation
from hotloop.bench.statistics import mean_figure
from hotloop.hardware import provenance
from hotloop.types import drafters

TEXTS = ("code", "quotations", "story", "chat")
RANDOM = "random"


def prompt(llm: LLM, text: str) -> tuple[list[int], SamplingParams]:
    """Returns token ids and options; story and chat are sampled, since greedy text loops."""
    greedy = SamplingParams(temperature=0.0)
    if text == RANDOM:
        return [100 + i % 1000 for i in range(128)], greedy
    if text == "code":
        return llm.encode(Path(json.decoder.__file__).read_text())[:400], greedy
    if text == "quotations":
        article = topics["assert"][:1500]
        request = f"Summarize the text below. Quote its most important sentences.\n\n{article}"
        return conversation(llm, request), greedy
    request = "Write a story about a lighthouse keeper who finds a letter from the sea."
    if text == "chat":
        request = "Why is the sky blue, and why is it red in the evening? Explain it to a child."
    sampled = SamplingParams(temperature=0.8, top_p=0.95)
    return conversation(llm, request), sampled


def conversation(llm: LLM, request: str) -> list[int]:
    assert llm.tokenizer is not None
    return list(llm.tokenizer.chat_prompt([{"role": "user", "content": request}]).token_ids)


def run(llm: LLM, ids: list[int], params: SamplingParams, n: int) -> Generation:
    return llm.generate([ids], params, max_new_tokens=n, ignore_eos=True)[0]


def run_without_drafts(llm: LLM, ids: list[int], params: SamplingParams, n: int) -> Generation:
    scheduler = llm._scheduler
    controller, scheduler.controller = scheduler.controller, None
    try:
        return run(llm, ids, params, n)
    finally:
        scheduler.controller = controller


def measure(
    llm: LLM,
    ids: list[int],
    params: SamplingParams,
    *,
    rounds: int,
    warm_up: int,
    n: int,
    keeps_disturbed: bool,
) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {"off": [], "on": []}
    total, same, number, disturbed = Speculation(), 0, 0, 0
    n_programs = llm._scheduler.n_programs
    while number < warm_up + rounds:
        seeded = dataclasses.replace(params, seed=number)
        bystanders, began_s = Bystanders(), time.process_time()
        ways = (run_without_drafts, run, run, run_without_drafts)
        order = (0, 1, 2, 3) if number % 2 else (1, 0, 3, 2)
        answers = {i: ways[i](llm, ids, seeded, n) for i in order}
        turns = [answers[i] for i in range(4)]
        if bystanders.disturbed(time.process_time() - began_s):
            disturbed += 1
            if not keeps_disturbed:
                assert disturbed <= 3 * rounds, "other processes are busy: use a quiet machine"
                continue
        number += 1
        if number <= warm_up:
            n_programs = llm._scheduler.n_programs
            continue
        for name, (one, other) in {"off": (turns[0], turns[3]), "on": (turns[1], turns[2])}.items():
            pair = (one.timing.decode_tok_s, other.timing.decode_tok_s)
            speeds[name].append(statistics.harmonic_mean(pair))  # of both answers together
        for generation in turns[1:3]:
            assert generation.speculation is not None
            total += generation.speculation
            same += generation.token_ids == turns[0].token_ids
    n_made = llm._scheduler.n_programs - n_programs
    return {
        "prompt_tokens": len(ids),
        "new_tokens": n,
        "off_tok_s": mean_figure(speeds["off"]).model_dump(),
        "on_tok_s": mean_figure(speeds["on"]).model_dump(),
        "ratio": ratio(speeds["on"], speeds["off"]),
        "acceptance": total.acceptance,
        "tokens_per_step": total.tokens_per_step,
        "off_share": total.n_plain_steps / total.n_steps,
        "draft_share": total.draft_s / (total.draft_s + total.verify_s),
        "costs": [dataclasses.asdict(cost) for cost in llm.step_costs([ids], max_new_tokens=n)],
        "equal_answers": None if llm.config.assume_acceptance else f"{same} of {2 * rounds}",
        "disturbed_rounds": disturbed,
        "programs_made": n_made,
    }


def processor_s(llm: LLM, *, rounds: int = 15) -> dict[str, list[float]]:
    """Measures the processor time of forward passes, in turn: of 1 to 5 tokens, of each drafter."""
    stepper = llm._runner._stepper
    forwards = {str(n): (stepper.forward, n) for n in (1, 2, 3, 5)}
    for name, drafter in zip(drafters(llm.config.draft), stepper.drafters, strict=True):
        if hasattr(drafter, "forward"):
            forwards[name] = (drafter.forward, 1)
    samples: dict[str, list[float]] = {name: [] for name in forwards}
    seats, length = torch.zeros(1, dtype=torch.int64), stepper.length(64)
    with torch.inference_mode():
        for _ in range(rounds):
            for name, (forward, n) in forwards.items():
                ids, positions = torch.full((1, n), 5), torch.arange(32, 32 + n)[None]
                began_s = time.process_time()
                forward(ids, positions, seats, first_seat=0, length=length)
                samples[name].append(time.process_time() - began_s)
    return samples


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Returns the geometric mean of ratios, with its 95 % interval."""
    logs = mean_figure([math.log(a / b) for a, b in zip(above, below, strict=True)])
    ci95 = None if logs.ci95 is None else [math.exp(end) for end in logs.ci95]
    samples = [math.exp(log) for log in logs.samples]
    return {"mean": math.exp(logs.mean), "ci95": ci95, "n": logs.n, "samples": samples}


def show(row: dict[str, Any]) -> None:
    mean, (low, high) = row["ratio"]["mean"], row["ratio"]["ci95"] or (math.nan, math.nan)
    acceptance = " ".join(f"{share:.2f}" for share in row["acceptance"])
    equal = row["equal_answers"] or "not compared"
    print(
        f"{row['draft']:8} {row['text']:24} off {row['off_tok_s']['mean']:7.1f}"
        f"  on {row['on_tok_s']['mean']:7.1f}  x{mean:.3f} [{low:.3f}, {high:.3f}]"
        f"  tokens/step {row['tokens_per_step']:.2f}  plain steps {row['off_share']:.0%}"
        f"  drafts {row['draft_share']:.1%}  [{acceptance}]  equal {equal}"
        f"  programs made {row['programs_made']}  "
        + ", ".join(f"{c['k']}: {c['draft_s']:.4f} + {c['verify_s']:.4f}" for c in row["costs"]),
        flush=True,
    )


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Writes a row to a file, replacing that of the same configuration and text."""
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    by_name = {(one["draft"], one["text"], one["config"]["quant"]): one for one in (*known, row)}
    result = {
        "what": "decode tok/s with speculative decoding over without, round by round",
        "rows": list(by_name.values()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafts", nargs="+", default=["ngram", "exit-10"])
    parser.add_argument("--texts", nargs="+", choices=(*TEXTS, RANDOM), default=TEXTS)
    parser.add_argument("--weights", default="checkpoint")
    parser.add_argument("--assume-acceptance", type=float, help="see ``EngineConfig``")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--draft-policy", default="adaptive")
    parser.add_argument("--disturbed", action="store_true", help="keep disturbed rounds")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--execution", default="compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before the timed ones")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)

    options = {
        "quant": args.quant,
        "execution": args.execution,
        "device": args.device,
        "max_seq_len": 1024,
        "weights": args.weights,
        "assume_acceptance": args.assume_acceptance,
    }
    for draft in args.drafts:
        drafting = {"draft_tokens": args.draft_tokens, "draft_policy": args.draft_policy}
        llm = LLM(args.model, draft=draft, **drafting, **options)
        device = torch.device(llm.describe().device)
        print(llm.config.name, file=sys.stderr)
        for text in args.texts:
            ids, params = prompt(llm, text)
            measured = measure(
                llm,
                ids,
                params,
                rounds=args.rounds,
                warm_up=args.warm_up,
                n=args.new_tokens,
                keeps_disturbed=args.disturbed,
            )
            if device.type == "cpu":
                measured["processor_s"] = processor_s(llm)
            row = {
                "draft": draft,
                "text": text,
                **measured,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "config": llm.config.to_dict(),
                "provenance": provenance(device),
            }
            show(row)
            if args.out:
                write_row(args.out, row)
        llm.close()


if __name__ == "__main__":
    main()
