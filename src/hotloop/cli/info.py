"""``hotloop info``: describes this machine, or a model and whether it fits on this machine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App

from hotloop.cache import writable_cache_dir
from hotloop.cli.engine import note_cache
from hotloop.cli.options import DEFAULT_FIT, MODEL, FitOptions, Json, listed, option
from hotloop.cli.output import (
    announce,
    long_step,
    print_json,
    print_memory,
    print_pairs,
    print_rich,
    print_text,
    spinner,
)
from hotloop.errors import ConfigError, UnsupportedError
from hotloop.types import NESTED_DRAFTER, EngineConfig, drafters

if TYPE_CHECKING:
    import torch

    from hotloop.engine.setup import Setup
    from hotloop.kernels.linear import LinearSpec
    from hotloop.models.config import ModelConfig
    from hotloop.weights.checkpoint import Checkpoint

app = App(
    name="info",
    help_epilogue="""\
Examples:
  hotloop info
  hotloop info smollm2-135m
  hotloop info smollm2-135m --tp 2
  hotloop info llama-2-70b --max-seq-len 4096 --device cuda --json""",
)

SCHEMES = "none,int8,fp8,int4-g128,int4-g64,int4-g32,int4-g32-asym"

NESTED_SCHEMES = "int8-g128,int8-g64,int8-g32"
"""The schemes with which ``--draft self`` can draft, by their high halves."""


@app.default
def info(
    model: Annotated[
        str | None,
        option(MODEL, "A folder, a .gguf file, the name of a pulled model, or a built-in shape."),
    ] = None,
    /,
    *,
    quant: Annotated[
        str | None,
        option(
            MODEL,
            "The schemes to show, separated by commas.",
            f"{SCHEMES}; with --draft self {NESTED_SCHEMES}",
        ),
    ] = None,
    fit: FitOptions = DEFAULT_FIT,
    json: Json = False,
) -> int:
    """Describe this machine, or show whether MODEL fits on it.

    For the machine, it shows devices, memory, read bandwidth as measured now, and
    the execution modes that run here. For a model, it shows its shape, its
    parameters, the types that its file stores, the kernel that reads each of them
    here, and the memory that it takes under each scheme. With --tp, that is the
    memory of the largest rank; for a scheme that cannot be split over that many
    ranks, the numbers of ranks that work are listed. Nothing is loaded.
    """
    if model is None:
        note_cache()
        about = describe_machine()
        print_json(about) if json else _show_machine(about)
    else:
        with spinner(_forecasting(model)):
            from hotloop.models.shapes import SHAPES
            from hotloop.quant import parse_scheme

            weights = "random" if model in SHAPES else "checkpoint"
            config = EngineConfig(model=model, weights=weights, **fit.given())
            nested = NESTED_DRAFTER in drafters(config.draft)
            schemes = listed(quant or (NESTED_SCHEMES if nested else SCHEMES))
            for scheme in schemes:
                parse_scheme(scheme)
            about = describe_model(config, schemes)
        print_json(about) if json else _show_model(about)
    return 0


_MAY_BUILD = " (the first time, this builds the CPU kernels)"


def _forecasting(model: str) -> str:
    return f"{model}: forecasting its memory{_MAY_BUILD}"


def describe_machine() -> dict[str, Any]:
    """Returns the host, and each device with its memory, bandwidth and execution modes."""
    with long_step("Finding the devices of this machine"):
        import torch

        from hotloop import hardware
        from hotloop.models.shapes import SHAPES

        devices = [torch.device("cpu")]
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    provenances = []
    for device in devices:
        with long_step(f"Measuring the read bandwidth of {device}"):
            provenances.append(hardware.provenance(device))
    first, *_ = provenances
    with long_step(f"Finding the execution modes that run here{_MAY_BUILD}"):
        found = [
            {
                "device": str(device),
                **provenance["device"],
                "free_bytes": hardware.free_bytes(device),
                "execution": execution_modes(device),
            }
            for device, provenance in zip(devices, provenances, strict=True)
        ]
    about = {name: first[name] for name in ("hotloop", "versions", "host")}
    return about | {
        "cache": str(writable_cache_dir()),
        "shapes": list(SHAPES),
        "devices": found,
    }


def execution_modes(device: torch.device) -> dict[str, dict[str, Any]]:
    """Returns for each execution mode whether it runs on ``device``, and why not."""
    from hotloop.engine.forward import compile_unavailable_reason
    from hotloop.kernels import cpu
    from hotloop.kernels.cuda import launch

    reasons: dict[str, str | None] = {"eager": None}
    if device.type == "cpu":
        reasons["eager with CPU kernels"] = cpu.unavailable_reason()
    reasons["compile"] = compile_unavailable_reason(device)
    reasons["fused"] = launch.unavailable_reason(device)
    return {name: {"available": not why, "reason": why} for name, why in reasons.items()}


def describe_model(config: EngineConfig, schemes: Sequence[str]) -> dict[str, Any]:
    """Returns a model's shape, and the memory of a rank of ``config`` under each scheme.

    For a scheme that the model does not support, or that cannot be split over the ranks, the entry
    has the reason in place of bytes.
    """
    from hotloop.engine.memory import predict_memory
    from hotloop.engine.setup import prepare
    from hotloop.weights.checkpoint import stored_form

    as_stored = replace(config, quant="auto", draft="none")
    try:
        setup = prepare(as_stored)
    except UnsupportedError:  # the reason is in its row of the table
        if config.tensor_parallel == 1:
            raise
        setup = prepare(replace(as_stored, tensor_parallel=1))
    announce(_forecasting(config.model))
    stored, formats = None, []
    if setup.path is not None:
        with closing(setup.open()) as checkpoint:
            stored = stored_form(checkpoint)
            if config.weights == "checkpoint":
                formats = _formats(setup, checkpoint)
    if stored is not None and stored.quantization is not None:
        schemes = [setup.config.quant]  # a copy has its own scheme and can have no other
    elif setup.config.quant not in schemes:
        schemes = [setup.config.quant, *schemes]
    under: list[dict[str, Any]] = []
    free: int | None = None
    for scheme in schemes:
        try:
            plan = predict_memory(replace(config, quant=scheme))
        except (ConfigError, UnsupportedError) as error:
            under.append({"quant": scheme, "unsupported": str(error)})
        else:
            free = free or plan.free_bytes  # read once, so that all rows are compared with it
            plan = replace(plan, free_bytes=free)
            fits = plan.total_bytes <= plan.free_bytes
            under.append({"quant": scheme, **plan.to_dict(), "fits": fits})
    return {
        "model": config.model,
        "path": str(setup.path) if setup.path else None,
        "stored": stored and stored.to_dict(),
        "formats": formats,
        "tensor_parallel": config.tensor_parallel,
        "ranks": [
            {"layers": _layers(setup.on(rank, rank).local), "n_logits": len(shard.vocabulary)}
            for rank, shard in enumerate(setup.shards)
        ],
        "family": setup.model.family,
        "vocab_size": setup.model.vocab_size,
        "hidden_size": setup.model.hidden_size,
        "max_position": setup.model.max_position,
        "tie_embeddings": setup.model.tie_embeddings,
        "n_layers": setup.model.n_layers,
        "layers": _layers(setup.model),
        "n_params": setup.model.n_params,
        "device": str(setup.device),
        "activation_dtype": str(setup.dtype).removeprefix("torch."),
        "kv_bytes_per_token": setup.local.kv_bytes_per_token(setup.dtype.itemsize),
        "max_seq_len": setup.n_positions,
        "max_batch_size": config.max_batch_size,
        "memory": under,
    }


def _layers(model: ModelConfig) -> list[dict[str, Any]]:
    """Returns the distinct layers of a model, or of a rank's shard, and the count of each."""
    return [{"count": n} | asdict(kind) for kind, n in model.kinds.items()]


def _formats(setup: Setup, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Returns the encodings of a checkpoint's matrices, and the kernels for those of rank 0.

    Matrices that differ in any of these are listed separately, those with the most bytes first.
    Packed bytes are for the whole matrices, in the layout of the kernels.
    """
    from hotloop.engine.setup import head_spec, linear_specs
    from hotloop.kernels.linear import choose_linear
    from hotloop.models import names
    from hotloop.weights.recognition import recognize_matrices

    recognized = recognize_matrices(checkpoint, setup.model)
    weights = names.linear_weights(setup.model)
    weights[names.head(setup.model)] = (setup.model.vocab_size, setup.model.hidden_size)
    read_by: dict[str, LinearSpec] = {}
    each_layer = linear_specs(
        setup.local, setup.schemes, setup.dtype, setup.device, fused=setup.fused
    )
    for i, matrix, pieces in each_layer:
        by_format = {spec.format: spec for spec in pieces}
        for part in matrix.parts:
            name = names.layer(i, part.name)
            read_by[name] = by_format[setup.schemes[name].format(matrix.k)]
    read_by[names.head(setup.model)] = head_spec(
        setup.local,
        len(setup.shard.vocabulary),
        setup.schemes,
        setup.dtype,
        setup.device,
        fused=setup.fused,
    )
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, spec in read_by.items():
        tensors = {
            tensor.removeprefix(name): info
            for tensor, info in checkpoint.tensors.items()
            if tensor.startswith(f"{name}.") and not tensor.endswith(".bias")
        }
        if name in recognized:
            encoding = recognized[name].label
        else:
            encoding = tensors[".weight"].dtype if ".weight" in tensors else "hotloop"
        kernel, reasons = choose_linear(spec)
        format_ = spec.format.describe(spec.k)
        entry = found.setdefault(
            (encoding, format_, kernel.name),
            {"encoding": encoding, "format": format_, "kernel": kernel.name, "names": []}
            | {"n_matrices": 0, "n_weights": 0, "n_bytes": 0, "packed_bytes": 0}
            | {"reasons": reasons},
        )
        if (kind := name.rpartition(".")[2]) not in entry["names"]:
            entry["names"].append(kind)
        n_weights = math.prod(weights[name])
        entry["n_matrices"] += 1
        entry["n_weights"] += n_weights
        entry["n_bytes"] += sum(info.n_bytes for info in tensors.values())
        # The spec's matrix may be several of the checkpoint's, and one rank's part.
        entry["packed_bytes"] += round(kernel.nbytes * n_weights / (spec.n * spec.k))
    return sorted(found.values(), key=lambda entry: -entry["n_bytes"])


def _show_machine(about: dict[str, Any]) -> None:
    from hotloop.report.numbers import memory

    host, versions = about["host"], about["versions"]
    pairs = [
        ("hotloop", about["hotloop"]["version"]),
        ("torch", f"{versions['torch']}, Python {versions['python']}"),
        ("host", f"{host['system']} {host['kernel']}, {host['machine']}"),
        ("cache", about["cache"]),
        ("built-in shapes", ", ".join(about["shapes"])),
    ]
    for device in about["devices"]:
        measured, quoted = device["read_bytes_per_s"], device["datasheet_bytes_per_s"]
        pairs += [
            ("", ""),
            (device["device"], device["name"]),
            *((name, str(device[name])) for name in ("n_threads", "isa", "n_sms") if device[name]),
            ("memory", f"{memory(device['total_bytes'])}, {memory(device['free_bytes'])} free"),
            ("read bandwidth", f"{measured / 1e9:,.1f} GB/s measured"),
        ]
        if quoted:
            pairs.append(("", f"{quoted / 1e9:,.0f} GB/s per datasheet"))
        for name, how in device["execution"].items():
            pairs.append((name, "yes" if how["available"] else f"no: {how['reason']}"))
    print_pairs(pairs)


def _heads(attention: dict[str, Any]) -> str:
    query, pairs, head_dim = (attention[key] for key in ("n_heads", "n_kv_heads", "head_dim"))
    return f"{query} query, {pairs} key/value, head_dim {head_dim}"


def _by_kind(values: Iterable[tuple[int, object]]) -> str:
    """Returns the value that all layers have, or else each value with its number of layers."""
    counts = Counter[str]()
    for n, value in values:
        counts[str(value)] += n
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} in {n} layers" for value, n in counts.items())


def _rank_pairs(ranks: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns headings and texts for the shards of ranks, in the order of ranks."""
    if len(ranks) < 2:
        return []

    def shares(module: str, key: str) -> str:
        by_kind = [
            (layers[0]["count"], " + ".join(f"{layer[module][key]:,}" for layer in layers))
            for layers in zip(*(rank["layers"] for rank in ranks), strict=True)
        ]
        return _by_kind(by_kind)

    return [
        ("ranks", f"{len(ranks)}, of which each holds"),
        ("  query heads", shares("attention", "n_heads")),
        ("  key/value heads", shares("attention", "n_kv_heads")),
        ("  feed-forward", shares("feed_forward", "intermediate_size")),
        ("  vocabulary", " + ".join(f"{rank['n_logits']:,}" for rank in ranks)),
    ]


def _show_model(about: dict[str, Any]) -> None:
    kinds = [(n["count"], n["attention"], n["feed_forward"]) for n in about["layers"]]
    cache = about["kv_bytes_per_token"]
    shared = len(about["ranks"]) > 1
    of_rank, each = (" of rank 0, the largest,", " on rank 0") if shared else ("", "")
    print_pairs(
        [
            ("model", about["model"]),
            *([("path", about["path"])] if about["path"] else []),
            *([("stored as", about["stored"]["summary"])] if about["stored"] else []),
            ("family", about["family"]),
            ("parameters", f"{about['n_params']:,}"),
            ("layers", f"{about['n_layers']}, hidden size {about['hidden_size']}"),
            ("heads", _by_kind((n, _heads(attention)) for n, attention, _ in kinds)),
            ("feed-forward", _by_kind((n, f["intermediate_size"]) for n, _, f in kinds)),
            ("vocabulary", f"{about['vocab_size']:,}, tied: {_yes(about['tie_embeddings'])}"),
            ("context", f"{about['max_position']:,} tokens"),
            ("sliding window", _by_kind((n, a["window"] or "none") for n, a, _ in kinds)),
            *_rank_pairs(about["ranks"]),
            ("cache", f"{cache / 2**10:,.1f} KiB per token{each}, {about['activation_dtype']}"),
        ]
    )
    _show_formats(about["formats"], about["device"])
    room = f"{about['max_batch_size']} × {about['max_seq_len']:,} tokens of cache"
    where = f"{of_rank} on {about['device']}"
    print_text(f"\nMemory{where} with {room}; weights include rotary tables for these tokens:\n")
    rows = about["memory"]
    print_memory("quant", ((r["quant"], r, r.get("fits"), r.get("unsupported")) for r in rows))


_FEW_KINDS = 3
"""The most kinds of matrices that a row of the table of formats names."""


def _show_formats(formats: list[dict[str, Any]], device: str) -> None:
    """Prints the encodings and kernels of matrices, with the reasons for slower kernels.

    Bits are per weight, with its share of the scales: in the file, and in the kernel's layout.
    """
    from rich.table import Table

    if not formats:
        return
    print_text(f"\nMatrices as they are stored, and the kernels that read them on {device}:\n")
    whole = sum(entry["n_bytes"] for entry in formats) or 1
    headings = ("stored as", "number format", "matrices", "share of bytes")
    table = Table(*headings, "bits", "kernel", "bits read", box=None, pad_edge=False)
    for at in (3, 4, 6):
        table.columns[at].justify = "right"
    reasons: dict[str, list[str]] = {}
    for entry in formats:
        share = f"{entry['n_bytes'] / whole:.0%}".replace("%", " %")
        names, n_weights = entry["names"], entry["n_weights"]
        which = f" {', '.join(names)}" if len(names) <= _FEW_KINDS else ""
        bits, read = (f"{8 * entry[key] / n_weights:.2f}" for key in ("n_bytes", "packed_bytes"))
        count = f"{entry['n_matrices']}{which}"
        table.add_row(entry["encoding"], entry["format"], count, share, bits, entry["kernel"], read)
        for reason in entry["reasons"]:
            reasons.setdefault(reason, []).extend(names)
    print_rich(table)
    for reason, names in reasons.items():
        print_text(f"\n{', '.join(dict.fromkeys(names))}: {reason}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
