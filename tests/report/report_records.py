"""Makes records for tests of reports."""

from __future__ import annotations

from hotloop.bench.record import QualityProtocol, Record, SpeculationFigures, Workload
from hotloop.bench.statistics import mean_figure

NOISE = (-1.0, -0.5, 0.0, 0.5, 1.0)


def record(
    cell: str,
    tok_s: float | None = None,
    *,
    spread: float = 0.1,
    loss: float | None = None,
    loss_spread: float = 0.001,
    **fields,
) -> Record:
    """A record with figures of these means, and samples that spread evenly about them."""
    quant, _, execution = cell.partition("/")
    made = {
        "cell": cell,
        "config": {"model": "m", "weights": "checkpoint", "quant": quant, "execution": execution},
        "status": "ok",
        "started_at": "2025-01-02T03:04:05+00:00",
        "workload": Workload(prompt_tokens=32, new_tokens=64),
        "provenance": {
            "hotloop": {"version": "0.1.0", "git_commit": "c" * 40, "git_dirty": False},
            "versions": {"torch": "2.13.0", "cuda": None},
            "device": {"name": "A Processor", "n_threads": 2, "read_bytes_per_s": 28.04e9},
        },
    }
    if tok_s is not None:
        speeds = mean_figure([tok_s + spread * x for x in NOISE])
        made |= {
            "decode_tok_s": speeds,
            "e2e_tok_s": speeds,
            "ttft_s": mean_figure([0.0123] * 5),
            "mbu": mean_figure([0.618] * 5),
            "peak_bytes": 600 * 2**20,
        }
    if loss is not None:
        made |= {
            "quality_protocol": QualityProtocol(
                text="a text", text_sha256="x", window=256, n_windows=5, reference="none/eager bf16"
            ),
            "perplexity": mean_figure([20.5 + x for x in NOISE]),
            "delta_ln_ppl": mean_figure([loss + loss_spread * x for x in NOISE]),
            "kl_mean": mean_figure([0.0123] * 5),
            "kl_p99": 0.2,
            "same_top1": mean_figure([0.9712] * 5),
        }
    return Record(**(made | fields))


def drafting(**fields) -> SpeculationFigures:
    """Makes counts of drafting: 2.5 tokens a step, three in four first drafts accepted."""
    made = {
        "draft": "ngram-2",
        "proposed": (8, 4),
        "accepted": (6, 1),
        "acceptance": (0.75, 0.25),
        "tokens_per_step": mean_figure([2.5 + 0.1 * x for x in NOISE]),
        "draft_share": 0.1,
        "verify_share": 0.9,
        "off_share": 0.2,
    }
    return SpeculationFigures(**(made | fields))
