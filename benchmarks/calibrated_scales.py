"""Compares ways to weight the squared errors that the calibration of int4 scales minimizes.

The errors of input features are weighted equally, by the mean squares of activations on random
tokens, as the scheme suffix ``-cal`` does, or by those on text. Every matrix of a model's layers
is quantized and dequantized in float32; the head is not quantized. The predictions are compared
with those of the unquantized model: mean KL divergence, and the share of positions with the same
most likely token. The text that is scored is the default one of ``hotloop eval``; the text to
calibrate with is CPython's ``argparse``, or a file. With ``--by-matrix`` the scales of one matrix
of each layer are calibrated, or of all but one. The results are deterministic.

    python benchmarks/calibrated_scales.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hotloop import LLM
from hotloop.evaluate.text import load_text
from hotloop.evaluate.windows import take_windows
from hotloop.hardware import provenance
from hotloop.models import names
from hotloop.quant.int4 import Int4
from hotloop.weights.calibration import importance
from hotloop.weights.checkpoint import open_checkpoint
from hotloop.weights.hub import resolve_model

WINDOW = 256
CPU = torch.device("cpu")


class Trial:
    """A model in float32 whose matrices are quantized and dequantized in place."""

    def __init__(self, model: str, n_windows: int) -> None:
        options = {"quant": "none", "execution": "eager", "dtype": "float32", "device": "cpu"}
        self.llm = LLM(model, max_seq_len=2 * WINDOW, **options)
        runner = self.llm._runner
        self.config, self.model = runner._setup.model, runner._model
        self.decoder = self.model.decoder
        self.parts = {
            (i, matrix.name): [names.layer(i, part.name) for part in matrix.parts]
            for i, layer in enumerate(self.config.layers)
            for matrix in layer.matrices
        }
        self.weights = {key: self.packed(key).clone() for key in self.parts}
        self.windows = take_windows(self.llm.encode, load_text(None).content, WINDOW, n_windows)
        self.expected = [self.predict(window) for window in self.windows]

    def packed(self, key: tuple[int, str]) -> Tensor:
        """Returns the weight that a matrix product reads, [N, K]."""
        i, name = key
        (weight,) = self.decoder.blocks[i].linears[name].packed
        return weight

    def predict(self, ids: list[int]) -> Tensor:
        """Returns log-probabilities [T, V]."""
        n = len(ids)
        hidden = self.decoder(
            torch.tensor([ids]),
            torch.arange(n)[None],
            self.model.cache,
            seats_B=torch.tensor([0]),
            first_seat=0,
            length=n,
        )
        return self.decoder.logits(hidden)[0].log_softmax(dim=-1)

    def activations(self, model: str, ids_BT: Tensor | None) -> Mapping[str, Tensor]:
        """Returns the mean squares of activations, by the name of a matrix."""
        with closing(open_checkpoint(resolve_model(model))) as checkpoint:
            return importance(checkpoint, self.config, CPU, ids_BT)

    def select(self, matrices: set[str], squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Selects the mean squares of these matrices of each layer."""
        parts = (parts for (_, name), parts in self.parts.items() if name in matrices)
        return {part: squares[part] for each in parts for part in each}

    def measure(self, group_size: int, squares: Mapping[str, Tensor]) -> dict[str, Any]:
        """Quantizes all matrices, calibrating those in ``squares``, and compares predictions."""
        began_s, scheme = time.process_time(), Int4(group_size=group_size, calibrated=True)
        for key, (part, *_) in self.parts.items():
            quantized = scheme.quantize(self.weights[key], importance=squares.get(part))
            self.packed(key).copy_(quantized.dequantize())
        quantize_s = time.process_time() - began_s
        divergences, same, losses, increases = [], [], [], []
        for ids, expected in zip(self.windows, self.expected, strict=True):
            found = self.predict(ids)
            divergences.append((expected.exp() * (expected - found)).sum(dim=-1).mean())
            same.append((expected.argmax(dim=-1) == found.argmax(dim=-1)).float().mean())
            labels = torch.tensor(ids[1:])[:, None]
            losses.append(-found[:-1].gather(1, labels).mean())
            increases.append(losses[-1] + expected[:-1].gather(1, labels).mean())
        kl, top1, loss, increase = (
            float(torch.stack(each).mean()) for each in (divergences, same, losses, increases)
        )
        return {
            "kl": kl,
            "same_top1": top1,
            "ppl": math.exp(loss),
            "delta_ln_ppl": increase,
            "quantize_processor_s": quantize_s,
            "kl_of_windows": [float(each) for each in divergences],
            "delta_ln_ppl_of_windows": [float(each) for each in increases],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__))
    parser.add_argument("--text-windows", type=int, default=2)
    parser.add_argument("--by-matrix", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with torch.inference_mode():
        rows = list(measure(args))
    result = {
        "what": "int4 by the weights of squared errors: none (no search), ones, activations",
        "model": args.model,
        "window": WINDOW,
        "windows": args.windows,
        "text": args.text.name,
        "text_tokens": args.text_windows * WINDOW,
        "rows": rows,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": provenance(CPU),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    trial = Trial(args.model, args.windows)
    by_random = trial.activations(args.model, None)
    weights: dict[str, Mapping[str, Tensor]] = {"none": {}}
    if args.by_matrix:
        weights["all"] = by_random
        every = {name for _, name in trial.parts}
        for name in sorted(every):
            weights[f"only {name}"] = trial.select({name}, by_random)
            weights[f"all but {name}"] = trial.select(every - {name}, by_random)
    else:
        text = take_windows(trial.llm.encode, args.text.read_text(), WINDOW, args.text_windows)
        weights |= {
            "ones": {name: torch.ones_like(squares) for name, squares in by_random.items()},
            "random tokens": by_random,
            "text": trial.activations(args.model, torch.tensor(text)),
        }
    rows = []
    for group_size in args.groups:
        for label, squares in weights.items():
            row = {"group_size": group_size, "weights": label}
            rows.append(row | trial.measure(group_size, squares))
            line = "KL {kl:.4f}  same top-1 {same_top1:.1%}  ppl {ppl:.2f}".format(**rows[-1])
            print(f"g{group_size:<4} {label:20} {line}", flush=True)
    return rows


if __name__ == "__main__":
    main()
