"""Measures int8 grids whose high nibbles are an int4 of the same weights.

Prints the signal-to-quantization-noise ratio in dB of an int8 weight, and of its high nibbles
alone, beside that of int4 quantized directly in the same groups: see
docs/decisions/nested-weights.md. Weights are normal, of Student's t with five degrees of freedom,
and those of a model, if one is named. Deterministic.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hotloop.models import names
from hotloop.quant import parse_scheme
from hotloop.quant.none import NoScheme
from hotloop.weights.checkpoint import open_checkpoint, read_model
from hotloop.weights.hub import resolve_model
from hotloop.weights.source import CheckpointSource, Request, read_matrix

GROUPS = (None, 128, 64, 32)
"""Group sizes; None is a whole row."""


def main() -> None:
    """Prints a table for each kind of weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="also measures every matrix of some layers of this model")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 7, 15, 22, 29])
    args = parser.parse_args()
    torch.manual_seed(0)
    report("normal", [torch.randn(512, 4096)])
    report("Student's t, 5", [torch.distributions.StudentT(5.0).sample((512, 4096))])
    if args.model is not None:
        report(args.model, list(matrices(args.model, args.layers)))


def matrices(model: str, layers: list[int]) -> Iterator[Tensor]:
    """Yields the matrices of layers of a model, float32 [N, K]."""
    checkpoint = open_checkpoint(resolve_model(model))
    config, _ = read_model(checkpoint)
    source = CheckpointSource(checkpoint, torch.device("cpu"), model=config)
    for name, shape in names.linear_weights(config).items():
        if any(name.startswith(f"model.layers.{i}.") for i in layers):
            yield read_matrix(source, Request(name=name, shape=shape, scheme=NoScheme())).float()


def report(label: str, weights: list[Tensor]) -> None:
    """Prints a line for each grid that divides the weights."""
    print(f"{label}\n  group  grid          int8  high nibbles  int4")
    for group in GROUPS:
        if group is not None and any(weight.shape[1] % group for weight in weights):
            continue
        direct = "–"
        if group is not None:
            scheme = parse_scheme(f"int4-g{group}")
            direct = f"{sqnr(weights, [scheme.quantize(w).dequantize() for w in weights]):.2f}"
        for lowest, highest in (-127, 127), (-128, 119):
            found = [nested(weight, group, lowest, highest) for weight in weights]
            both, high = (sqnr(weights, list(each)) for each in zip(*found, strict=True))
            grid = f"{lowest}…{highest}"
            print(f"  {group or 'row':>5}  {grid:9}  {both:7.2f}  {high:12.2f}  {direct}")


def nested(weight: Tensor, group: int | None, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """Quantizes a weight [N, K] to integers of a range, and returns it and its high nibbles.

    In a range that is not symmetric the value of larger magnitude takes the lowest integer: scales
    are of either sign. Scales of groups are rounded to bfloat16, as those of int4 are.

    Returns:
        The dequantized weight, and 16 times its rounded high nibbles in the same scale.
    """
    x = weight.unflatten(1, (-1, group or weight.shape[1]))
    least, most = x.amin(dim=2), x.amax(dim=2)
    if lowest == -highest:
        scale = torch.maximum(most, -least) / highest
    else:
        plus = torch.maximum(least / lowest, most / highest)
        minus = torch.maximum(-most / lowest, -least / highest)
        scale = torch.where(minus < plus, -minus, plus)
    scale = scale.bfloat16().float() if group is not None else scale
    scale = torch.where(scale == 0, 1.0, scale)[..., None]
    integers = (x / scale).round().clamp(lowest, highest)
    high = ((integers + 8) / 16).floor().clamp(-8, 7)
    return (integers * scale).view_as(weight), (16 * high * scale).view_as(weight)


def sqnr(weights: list[Tensor], quantized: list[Tensor]) -> float:
    """Returns the signal-to-quantization-noise ratio of all weights together, in dB."""
    pairs = zip(weights, quantized, strict=True)
    noise = sum(float((w - q).square().sum()) for w, q in pairs)
    return 10 * math.log10(sum(float(w.square().sum()) for w in weights) / noise)


if __name__ == "__main__":
    main()
