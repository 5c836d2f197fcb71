"""``hotloop quantize``: writes a quantized copy of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App

from hotloop.cli.options import MODEL, OUTPUT, Json, Model, lever_option, option
from hotloop.cli.output import note, print_json, print_pairs, progress_bar
from hotloop.types import CopyFormat, EngineConfig

app = App(
    name="quantize",
    help_epilogue="""\
Examples:
  hotloop quantize smollm2-135m ./smollm2-int8 --quant int8
  hotloop quantize ./my-model ./my-model-int4 --quant int4-g64-cal --head none
  hotloop quantize ./my-model ./copy --quant int8 --format compressed-tensors""",
)

_SCHEMES = (
    "Weight quantization: int8, int8-gN (N 32, 64 or 128), fp8, int4 (that is int4-g128), int4-gN, "
    "int4-gN-asym (with offsets), or int4-gN-zp (with zero points); -cal after an int4 scheme, "
    "such as int4-g64-cal, fits its scales to the activations of the model. none quantizes only "
    "the head."
)

_HEADS = (
    "Quantization of the output head, and of an embedding tied to it. auto is int8, or none in "
    "compressed-tensors, which supports no other."
)
_CALIBRATION = (
    "A UTF-8 text whose activations a -cal scheme uses: similar to texts that the model will read, "
    "but not the text on which its quality is measured."
)
_FORMATS = (
    "hotloop's own format, or compressed-tensors, which vLLM and transformers also load and which "
    "holds int8, int8-gN, fp8, int4-gN and int4-gN-zp."
)


@app.default
def quantize(
    model: Model,
    out: Annotated[Path, option(OUTPUT, "The folder to create.")],
    /,
    *,
    quant: Annotated[str, lever_option("quant", _SCHEMES)],
    head: Annotated[str, lever_option("head", _HEADS)] = EngineConfig.head,
    calibration: Annotated[Path | None, option(MODEL, _CALIBRATION, "random tokens")] = None,
    format: Annotated[CopyFormat, option(OUTPUT, _FORMATS)] = "hotloop",  # noqa: A002
    json: Json = False,
) -> int:
    """Write a quantized copy of a model.

    Loading the copy gives the same bits as quantizing on load, and is faster. One
    tensor is in memory at a time, or while scales are calibrated one layer in float32.
    """
    from hotloop.weights.hub import resolve_model
    from hotloop.weights.quantize import quantize_checkpoint

    src = resolve_model(model)
    notes: list[str] = []
    with progress_bar(f"Quantizing {model}") as progress:
        quantize_checkpoint(
            src,
            out,
            quant=quant,
            head=head,
            copy_format=format,
            source_name=model,
            calibration=calibration,
            progress=progress,
            on_note=notes.append,
        )
    for text in notes:
        note(text)
    before, after = n_bytes(src), n_bytes(out)
    if json:
        sizes = {"src_bytes": before, "out_bytes": after}
        print_json(
            {
                "src": str(src),
                "out": str(out),
                "quant": quant,
                "head": head,
                "format": format,
                "calibration": calibration and str(calibration),
                **sizes,
            }
        )
    else:
        print_pairs(
            [("from", f"{src}, {before / 1e6:,.1f} MB"), ("to", f"{out}, {after / 1e6:,.1f} MB")]
        )
    return 0


def n_bytes(path: Path) -> int:
    """Counts the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
