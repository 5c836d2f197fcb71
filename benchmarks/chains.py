"""Records chains of drafts on real text: each draft's probability, and how many are accepted.

From the records it computes the effect of ending chains early. The cost d of a draft, and the cost
v(k) of verifying k drafts, are arguments, in units of a plain step (``docs/speculation.md``). For
each text it prints the best speed with a fixed k, and the best speed with chains of up to
``--draft-tokens`` drafts that end when their probability falls below a threshold. Neither depends
on the load of the machine. Texts are those of ``speculation.py``.

    python benchmarks/chains.py --draft self-int4-g64 --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from speculation import TEXTS, prompt, run
from torch import Tensor

from hotloop import LLM
from hotloop.engine.rows import Rows
from hotloop.engine.sampling import Sampler
from hotloop.hardware import provenance

Chain = tuple[list[float], int]
"""The probability of each draft of a step but the last, and the number of accepted drafts."""

NEVER = 1e-30
"""A threshold so low that no chain ends early."""

THRESHOLDS = [i / 40 for i in range(40)]


class Recorder:
    """Records the chains of an engine of one row."""

    def __init__(self) -> None:
        self.chains: list[Chain] = []
        self._newest: list[float] = []

    def start(self) -> None:
        probability, accept = Sampler.probability, Rows.accept

        def recorded_probability(sampler: Sampler, logits: Tensor, ids: Tensor) -> Tensor:
            found = probability(sampler, logits, ids)
            self._newest.append(float(found[0, 0]))
            return found

        def recorded_accept(rows: Rows, ids: Tensor, drafts: Tensor | None) -> Any:
            found = accept(rows, ids, drafts)
            if found[0] is not None:
                self.chains.append((self._newest, int(found[0][0]) - 1))
            self._newest = []
            return found

        Sampler.probability, Rows.accept = recorded_probability, recorded_accept


def speed_with(chains: Sequence[Chain], k: int, d: float, per_draft: float) -> float:
    """Returns the speed of steps with k drafts, relative to plain steps."""
    tokens = sum(1 + min(accepted, k) for _, accepted in chains)
    return tokens / (len(chains) * (k * d + 1 + k * per_draft))


def speed_below(chains: Sequence[Chain], threshold: float, d: float, per_draft: float) -> float:
    """Returns the speed of steps whose chains end below a threshold, relative to plain steps."""
    tokens = cost = 0.0
    for probabilities, accepted in chains:
        survival, k = 1.0, 1
        for each in probabilities:
            survival *= each
            if survival < threshold:
                break
            k += 1
        tokens += 1 + min(accepted, k)
        cost += k * d + 1 + k * per_draft
    return tokens / cost


def main() -> None:
    """Records the chains of each text, prints speeds, and writes the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--draft", default="self-int4-g64")
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    parser.add_argument("--costs", nargs="+", type=float, default=[0.26, 0.36, 0.66])
    parser.add_argument("--per-draft", type=float, default=0.015, help="(v(k) - 1) / k")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = {
        "quant": args.quant,
        "draft": args.draft,
        "draft_tokens": args.draft_tokens,
        "draft_policy": "always",
    }
    recorder, texts = Recorder(), {}
    with LLM(args.model, **config) as llm:
        controller = llm._scheduler.controller
        assert controller is not None, "there is a drafter"
        controller._min_probability = lambda *_: NEVER
        recorder.start()
        for text in args.texts:
            ids, params = prompt(llm, text)
            recorder.chains = []
            run(llm, ids, dataclasses.replace(params, seed=args.seed), args.new_tokens)
            texts[text] = recorder.chains
            for d in args.costs:
                costs = d, args.per_draft
                speeds = {
                    k: speed_with(recorder.chains, k, *costs) for k in range(args.draft_tokens + 1)
                }
                speeds_below = {p: speed_below(recorder.chains, p, *costs) for p in THRESHOLDS}
                k = max(speeds, key=speeds.__getitem__)
                threshold = max(speeds_below, key=speeds_below.__getitem__)
                print(
                    f"{text}, d {d}: {speeds[k]:.2f} with {k}, "
                    f"{speeds_below[threshold]:.2f} below {threshold}"
                )
    if args.out is not None:
        date = datetime.now(UTC).date().isoformat()
        about = provenance(torch.device("cpu"), read_bytes_per_s=0.0)  # no figure depends on it
        record = {"date": date, "argv": sys.argv[1:], "versions": about["versions"]}
        record |= {"chains": texts}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
