"""The record: what one attempt at one cell gave, as one JSON object a line.

A record is complete in itself: what was run, on what, with which inputs, every raw sample, and
how it ended. Tables, plots and recommendations are computed from records alone.

Fields only ever get added; a change of meaning raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

Status = Literal[
    "ok", "oom", "predicted-oom", "unsupported", "failed", "timeout", "unstable", "interrupted"
]
"""How a cell ended. ``unstable`` has its figures, with the spread and the likely cause in
``reason``; the others after ``ok`` have none. ``interrupted`` was stopped by its user."""

MEASURED: tuple[Status, ...] = ("ok", "unstable")
"""The statuses of records that carry figures."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Strict):
    """A measured figure: its mean, how sure we are of it, and the samples it was computed from.

    Attributes:
        mean: The estimate.
        ci95: Low and high end of the 95 % confidence interval of the mean.
        se: Standard error of the mean.
        n: Independent samples: runs for speed, text windows for quality.
        samples: The samples themselves, in the order they were taken.
    """

    mean: float
    ci95: tuple[float, float] | None = None
    se: float | None = None
    n: Annotated[int, Field(ge=1)]
    samples: tuple[float, ...]


class Workload(_Strict):
    """What was timed: ``batch`` prompts of ``prompt_tokens`` each, ``new_tokens`` decoded."""

    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    repeats: int = 5
    seed: int = 0


class SpeculationFigures(_Strict):
    """What drafting did in the timed repeats. See ``types.Speculation`` for the words.

    Attributes:
        draft: Who made drafts: the configuration's ``draft_name``.
        proposed: How often a draft stood at each place, the first one first.
        accepted: How often it was kept there.
        acceptance: The share that was kept there.
        tokens_per_step: Tokens that a step gave a request.
        draft_share: Share of the device's time in steps that went into making drafts; None where
            no step was timed.
        verify_share: The rest of it: the model, with drafts or without.
        off_share: Share of steps without drafts.
    """

    draft: str
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    acceptance: tuple[float, ...]
    tokens_per_step: Figure
    draft_share: float | None
    verify_share: float | None
    off_share: float


class QualityProtocol(_Strict):
    """On what quality was computed: enough to do it again and get the same numbers.

    Attributes:
        text: Where the text came from.
        text_sha256: Hash of its UTF-8 bytes.
        window: Tokens in a window; windows do not overlap, and no token is added in front.
        n_windows: Windows scored, from the beginning of the text.
        reference: What the differences are against, such as ``none/eager float32``.
    """

    text: str
    text_sha256: str
    window: int
    n_windows: int
    reference: str | None = None


class Record(_Strict):
    """One attempt at one cell. See the fields of ``EngineDescription`` for ``engine``.

    The four speeds are means over the requests of a repeat; ``aggregate_tok_s`` alone is of the
    whole batch: all its tokens over the time to the last.

    ``mbu`` is against the measured read bandwidth and ``mbu_datasheet`` against the vendor's
    figure, where one is known; both bandwidths stand in ``provenance["device"]``. With
    ``speculation`` there is neither.

    ``baseline`` names the engine that was measured, where it is not hotloop's own.
    """

    schema_version: int = SCHEMA_VERSION
    cell: str
    baseline: str | None = None
    attempt: int = 1
    config: dict[str, Any]
    status: Status
    reason: str | None = None
    started_at: str

    workload: Workload | None = None
    decode_tok_s: Figure | None = None
    e2e_tok_s: Figure | None = None
    aggregate_tok_s: Figure | None = None
    ttft_s: Figure | None = None
    tpot_s: Figure | None = None
    mbu: Figure | None = None
    mbu_datasheet: Figure | None = None
    speculation: SpeculationFigures | None = None
    load_s: float | None = None
    warmup_s: float | None = None
    peak_bytes: int | None = None
    predicted_bytes: dict[str, int] | None = None

    quality_protocol: QualityProtocol | None = None
    quality_reason: str | None = None
    perplexity: Figure | None = None
    delta_ln_ppl: Figure | None = None
    kl_mean: Figure | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    same_top1: Figure | None = None

    engine: dict[str, Any] | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)
