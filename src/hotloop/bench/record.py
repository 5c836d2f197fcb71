"""The record: the result of one attempt at one cell, as one line of JSON.

A record is self-contained: it has the configuration, the machine, the inputs, every raw sample, and
the outcome. Tables, plots and recommendations are computed from records alone.

Fields are only added, never renamed or removed; a change of meaning raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from hotloop.checked import MAX_COUNT, Count
from hotloop.untrusted import StrictModel

SCHEMA_VERSION = 1

Status = Literal[
    "ok", "oom", "predicted-oom", "unsupported", "failed", "timeout", "unstable", "interrupted"
]
"""The status of a cell. A cell that is ``unstable`` has figures, with the spread and the likely
cause in ``reason``. The other statuses after ``ok`` are of cells that did not finish; such a record
has the figures that were measured before. The user stopped an ``interrupted`` cell."""

MEASURED: tuple[Status, ...] = ("ok", "unstable")
"""The statuses of cells that were measured to the end."""


Name = Annotated[str, Field(max_length=4096)]
"""A name, such as that of a cell, a model or a device."""

Reason = Annotated[str, Field(max_length=65_536)]
"""A reason, sometimes with the last lines of a log."""

MAX_NUMBER = 1e30

Number = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
"""A measured number, in a range that tables have room for."""

Share = Annotated[float, Field(ge=-1, le=1)]
"""A share of a whole, or the difference of two."""

Probability = Annotated[float, Field(ge=0, le=1)]

Bytes = Annotated[int, Field(ge=0, le=2**62)]

Numbers = Annotated[tuple[Number, ...], Field(strict=False)]
Counts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]


class Figure(StrictModel):
    """A measured figure: its mean, its uncertainty, and its samples.

    Attributes:
        mean: The estimate.
        ci95: Low and high end of the 95 % confidence interval of the mean.
        se: Standard error of the mean.
        n: Independent samples: runs for speed, text windows for quality.
        samples: The samples, in the order of measurement.
    """

    mean: Number
    ci95: Annotated[tuple[Number, Number], Field(strict=False)] | None = None
    se: Annotated[float, Field(ge=0, le=MAX_NUMBER)] | None = None
    n: Count
    samples: Numbers

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.ci95 is not None and self.ci95[0] > self.ci95[1]:
            raise ValueError(f"ci95 must not be reversed: {list(self.ci95)}")
        if len(self.samples) != self.n:
            raise ValueError(f"n is {self.n}, and there are {len(self.samples)} samples")
        return self


class Workload(StrictModel):
    """A timed workload: ``batch`` prompts of ``prompt_tokens`` each, ``new_tokens`` decoded."""

    prompt_tokens: Count
    new_tokens: Annotated[int, Field(ge=2, le=MAX_COUNT)]
    batch: Count = 1
    repeats: Count = 5
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0


class StepCost(StrictModel):
    """The device's time of a step with k drafts; see ``types.StepCost``."""

    k: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    n_steps: Count
    draft_s: Annotated[float, Field(ge=0, le=MAX_NUMBER)]
    verify_s: Annotated[float, Field(gt=0, le=MAX_NUMBER)]


class SpeculationFigures(StrictModel):
    """Drafting statistics of the timed repeats; see ``types.Speculation``.

    Attributes:
        draft: The source of drafts: the configuration's ``draft_name``.
        proposed: Drafts made at each draft position.
        accepted: Drafts accepted at each draft position.
        acceptance: The acceptance rate at each draft position; None for positions without drafts.
        tokens_per_step: Tokens per step and request.
        draft_share: The share of the device's time in steps that it spent on making drafts; None if
            no step was timed.
        verify_share: Share of that time that the model took, with drafts or without.
        off_share: Plain-step share: the share of steps without drafts.
        costs: Times of a step for each number of drafts that was timed; 0 drafts first.
        assumed_acceptance: See ``EngineConfig.assume_acceptance``; None if drafts were verified.
    """

    draft: Name
    proposed: Counts
    accepted: Counts
    acceptance: Annotated[tuple[Number | None, ...], Field(strict=False)]
    tokens_per_step: Figure
    draft_share: float | None
    verify_share: float | None
    off_share: float
    costs: Annotated[tuple[StepCost, ...], Field(strict=False)] = ()
    assumed_acceptance: Probability | None = None


class NonInferiority(StrictModel):
    """A paired comparison of accuracy with the reference's; see ``bench.paired``.

    Attributes:
        outcome: ``pass``: a loss of ``margin`` or more is ruled out; ``fail``: the loss is shown
            to exceed ``margin``; ``underpowered``: there are too few items to tell.
        n: Items that both answered.
        worse: Items right by the reference and wrong here.
        better: Items wrong by the reference and right here.
        loss: Accuracy lost, ``(worse - better) / n``; negative if accuracy rose.
        limits: Lower and upper one-sided 95 % limit of the loss.
        margin: The loss that would matter: by default 1 % of the reference's accuracy.
        p: The p-value of the hypothesis that the loss is ``margin`` or more. If one configuration
            is chosen from several, ``bench.paired.holm`` adjusts it.
        mcnemar_p: The two-sided p-value of the hypothesis that nothing changed.
        needed: The items that a pass would take, if ``underpowered``; None if more items can hardly
            help.
    """

    outcome: Literal["pass", "fail", "underpowered"]
    n: Count
    worse: Annotated[int, Field(ge=0)]
    better: Annotated[int, Field(ge=0)]
    loss: Share
    limits: Annotated[tuple[Share, Share], Field(strict=False)]
    margin: Share
    p: Probability
    mcnemar_p: Probability
    needed: Annotated[int, Field(ge=1)] | None = None


class Verdict(NonInferiority):
    """The comparison over all tasks together, stratified by task.

    Attributes:
        tasks: The included tasks: those in which the reference is shown to be better than
            guessing.
    """

    tasks: Annotated[tuple[Name, ...], Field(strict=False)]


class TaskFigures(StrictModel):
    """The answers to one task.

    Attributes:
        task: Its name.
        sha256: Hash of its items.
        metric: The criterion of a right answer, such as ``acc`` or ``exact_match``.
        chance: The accuracy of guessing; None if it is not known.
        accuracy: The share of right answers with Wilson's interval. Its samples are the items in
            the task's order: 1 if right, 0 if wrong.
        reference_accuracy: The accuracy of the reference.
        at_chance: The reference is not shown to be better than guessing, so no loss could be seen:
            the task is not part of the verdict.
        compared: The paired comparison with the reference for this task alone. The verdict is over
            all tasks.
    """

    task: Name
    sha256: Name
    metric: Name
    chance: Share | None = None
    accuracy: Figure
    reference_accuracy: Share | None = None
    at_chance: bool = False
    compared: NonInferiority | None = None


class DepthFigures(StrictModel):
    """Figures of the predictions in one part of every window. Samples are windows.

    Attributes:
        start: The first token's position in its window; the first predicted token has position 1.
        end: The position after the last token.
        perplexity: See ``evaluate.quality.Quality``, also for the other figures.
    """

    start: Count
    end: Count
    perplexity: Figure
    delta_ln_ppl: Figure | None = None
    kl_mean: Figure | None = None
    kl_at_least: Figure | None = None
    same_top1: Figure | None = None


class GreedyFigures(StrictModel):
    """Greedy answers of the engine as it is timed, drafts included, compared with its own scores.

    The generated tokens should be the most likely tokens when scored. A bug in speculation would
    lower the agreement.

    Attributes:
        draft: The source of drafts: the configuration's ``draft_name``.
        agreement: The share of generated tokens that are the most likely ones by scoring. Samples
            are answers.
        gap_max: The largest difference between the log-probabilities of the most likely token and
            of the generated one, in nats. Rounding alone gives small differences.
    """

    draft: Name
    agreement: Figure
    gap_max: Number


class QualityProtocol(StrictModel):
    """The protocol of a quality measurement, with which it can be repeated.

    Attributes:
        text: The source of the text.
        text_sha256: Hash of its UTF-8 bytes.
        window: Tokens in a window. Windows do not overlap, and no token is added before them.
        n_windows: Windows scored, from the beginning of the text.
        articles: The number of windows in each article of the text, if standard errors are
            clustered by article; None if they are clustered by window.
        reference: The reference of the comparison, such as ``none/eager float32``.
        tasks: The tasks, as they were requested; of a file only the name, without its folder.
    """

    text: Name
    text_sha256: Name
    window: Count
    n_windows: Count
    articles: Annotated[tuple[Count, ...], Field(strict=False)] | None = None
    reference: Name | None = None
    tasks: Annotated[tuple[Name, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _every_window_is_of_an_article(self) -> Self:
        if self.articles is not None and sum(self.articles) != self.n_windows:
            raise ValueError(
                f"articles have {sum(self.articles)} windows, and there are {self.n_windows}"
            )
        return self


class _Keys(TypedDict, total=False):
    """Keys that readers of records use; other keys are allowed, with any JSON value."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]


class RecordedConfig(_Keys, total=False):
    """``EngineConfig`` in a record."""

    model: Name
    weights: Name
    quant: Name
    head: Name
    execution: Name
    tensor_parallel: Count
    draft: Name
    draft_quant: Name
    draft_tokens: Count
    draft_policy: Name
    assume_acceptance: Annotated[float, Field(ge=0, le=1)] | None


class RecordedEngine(_Keys, total=False):
    """``EngineDescription`` in a record."""

    dtype: Name
    execution: Name | None
    weight_bytes_per_step: Bytes | None
    kv_bytes_per_token: Bytes | None
    notes: Annotated[tuple[Reason, ...], Field(strict=False)]
    version: Name | None


class RecordedHotloop(_Keys, total=False):
    """The version of hotloop that measured, and a hash of its code."""

    version: Name | None
    code: Name | None
    git_commit: Name | None
    git_dirty: bool | None


class RecordedDevice(_Keys, total=False):
    """The device of the measurement; bandwidths are in bytes per second, a cache in bytes."""

    kind: Name
    name: Name
    n_threads: Count | None
    read_bytes_per_s: Annotated[float, Field(gt=0, le=MAX_NUMBER)] | None
    datasheet_bytes_per_s: Annotated[float, Field(gt=0, le=MAX_NUMBER)] | None
    last_level_cache_bytes: Bytes | None


class RecordedHost(_Keys, total=False):
    """The host's processors in a record."""

    cpu: Name | None
    n_cpus_allowed: Count


class RecordedStorage(_Keys, total=False):
    """``weights.identity.StoredForm`` in a record."""

    summary: Name
    is_quantized: bool


class Circumstances(_Keys, total=False):
    """``hardware.circumstances`` in a record."""

    code: Name | None
    packages: Name
    driver: Name | None
    gpus: list[Name]
    free_bytes: dict[str, Bytes | None]


class Provenance(_Keys, total=False):
    """Device, versions and hashes of inputs: see ``hardware.provenance``.

    ``key`` is the job's key, ``stored`` the form in which the model's checkpoint is stored,
    ``reference`` the stem of the reference's file, if there is one, and ``reference_model`` the
    reference's model, if it differs from the measured model.
    """

    hotloop: RecordedHotloop
    versions: dict[str, Name | None]
    device: RecordedDevice
    host: RecordedHost
    key: Name
    circumstances: Circumstances
    stored: RecordedStorage
    reference: Name
    reference_model: Name
    weights_sha256: Name | None
    draft_sha256: Name | None


class Record(StrictModel):
    """One attempt at one cell. See the fields of ``EngineDescription`` for ``engine``.

    The speeds are means over the requests of a repeat. Only ``aggregate_tok_s`` is for the whole
    batch: all its tokens over the time to the last token.

    ``mbu`` is relative to the measured read bandwidth, and ``mbu_datasheet`` to the vendor's
    figure, if it is known; ``provenance["device"]`` has both bandwidths. With ``speculation`` there
    is neither.

    ``baseline`` names the measured engine, if it is not hotloop's own.

    Quality: see ``evaluate.quality.Quality`` for the figures over windows of the text.
    ``perplexity`` is by the protocol ``gptq``, and ``other_perplexities`` by the protocols that its
    keys name. ``kl_floor`` is the reference's divergence from itself, scored again in windows of
    another length: the effect of rounding alone. ``by_depth`` has the same figures by position, if
    windows are long.
    """

    schema_version: int = SCHEMA_VERSION
    cell: Name
    baseline: Name | None = None
    attempt: Count = 1
    config: RecordedConfig
    status: Status
    reason: Reason | None = None
    started_at: Name

    workload: Workload | None = None
    decode_tok_s: Figure | None = None
    e2e_tok_s: Figure | None = None
    aggregate_tok_s: Figure | None = None
    ttft_s: Figure | None = None
    tpot_s: Figure | None = None
    mbu: Figure | None = None
    mbu_datasheet: Figure | None = None
    speculation: SpeculationFigures | None = None
    load_s: Number | None = None
    load_gb_s: Number | None = None
    warmup_s: Number | None = None
    peak_bytes: Bytes | None = None
    predicted_bytes: dict[str, int] | None = None

    quality_protocol: QualityProtocol | None = None
    quality_reason: Reason | None = None
    verdict: Verdict | None = None
    tasks: Annotated[tuple[TaskFigures, ...], Field(strict=False)] = ()
    perplexity: Figure | None = None
    other_perplexities: dict[Name, Figure] = Field(default_factory=dict)
    delta_ln_ppl: Figure | None = None
    kl_mean: Figure | None = None
    kl_median: Number | None = None
    kl_p90: Number | None = None
    kl_p95: Number | None = None
    kl_p99: Number | None = None
    kl_p99_9: Number | None = None
    kl_max: Number | None = None
    kl_at_least: Figure | None = None
    delta_p: Figure | None = None
    delta_p_rms: Number | None = None
    same_top1: Figure | None = None
    kl_floor: Figure | None = None
    by_depth: Annotated[tuple[DepthFigures, ...], Field(strict=False)] = ()
    greedy: GreedyFigures | None = None

    engine: RecordedEngine | None = None
    provenance: Provenance = Field(default_factory=Provenance)

    @model_validator(mode="after")
    def _has_figures(self) -> Self:
        if self.decode_tok_s is not None and self.decode_tok_s.mean <= 0:
            raise ValueError(f"decode_tok_s must be above 0, not {self.decode_tok_s.mean}")
        return self
