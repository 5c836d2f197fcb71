"""Times a workload on an engine.

The definitions (docs/measuring.md has them for users):

- TTFT: submit to the first token on the host. TPOT: (end-to-end - TTFT) / (n - 1). Decode tok/s: 1
  / TPOT. End-to-end tok/s: n / end-to-end. Each is a value of one request; with a batch, the value
  of a repeat is the mean over its requests. Only ``aggregate_tok_s`` is for the whole batch.
- A repeat is the independent sample: a figure's mean, interval and ``n`` are over repeats.
- MBU: bytes that one decode step must read, over the time of a step, over the bandwidth. With
  speculation a step is not a token, and MBU is undefined.

The engine counts tokens and reads the clock itself (:class:`~hotloop.types.Timing`), so that work
between submission and the first forward pass counts too. Loading and compiling are not included:
engines report them separately.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hotloop.bench.record import Figure, SpeculationFigures, StepCost, Workload
from hotloop.bench.stability import cpu_times, explain_instability
from hotloop.bench.statistics import mean_figure
from hotloop.errors import ConfigError, HotloopError
from hotloop.hardware import gpu_state
from hotloop.types import (
    DraftingEngine,
    Engine,
    EngineConfig,
    EngineDescription,
    Generation,
    SamplingParams,
    Speculation,
    Timing,
)

COST_TOKENS = 64
"""The most tokens that are generated to time the steps with each number of drafts."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of an engine on a workload. Every figure's samples are its repeats.

    Attributes:
        decode_tok_s: 1 / TPOT, tokens per second of one request after its first.
        e2e_tok_s: Tokens of one request per second of its whole time, prefill included.
        ttft_s: Seconds from submit to the first token.
        tpot_s: Seconds per token after the first.
        aggregate_tok_s: Tokens of the whole batch per second until its last token, prefill
            included; at batch 1 the same as ``e2e_tok_s``.
        mbu: Memory bandwidth utilization against the measured read bandwidth, if that was given.
        mbu_datasheet: Memory bandwidth utilization against the vendor's figure, if that was given.
        speculation: Drafting statistics, if the engine drafts.
        peak_bytes: Peak memory of the largest rank while the workload ran, loading excluded. See
            ``MemoryMeter``. None if another engine's memory cannot be measured.
        instability: Why the repeats disagree; None if they agree.
    """

    decode_tok_s: Figure
    e2e_tok_s: Figure
    ttft_s: Figure
    tpot_s: Figure
    aggregate_tok_s: Figure
    mbu: Figure | None
    mbu_datasheet: Figure | None
    speculation: SpeculationFigures | None
    peak_bytes: int | None
    instability: str | None


def measure_speed(
    engine: Engine,
    workload: Workload,
    *,
    read_bytes_per_s: float | None,
    datasheet_bytes_per_s: float | None,
    on_repeat: Callable[[int, int, float], None] | None = None,
) -> Speed:
    """Times ``engine`` on ``workload``: one untimed warm-up, then the repeats.

    Prompts are random tokens, new in every repeat, so that nothing can be cached. Decoding is
    greedy and does not stop at end-of-sequence.

    Args:
        engine: The engine to measure.
        workload: The workload to run.
        read_bytes_per_s: Measured read bandwidth of one rank, for ``mbu``.
        datasheet_bytes_per_s: The vendor's figure for one rank, for ``mbu_datasheet``.
        on_repeat: Called after each repeat with the number of finished repeats, the number of all
            repeats, and the decode tok/s of this one.

    Raises:
        ConfigError: The workload cannot be timed on this engine.
        HotloopError: The engine generated another number of tokens than requested, or they
            arrived all together.
    """
    description = engine.describe()
    _check(workload, description)
    repeats: list[list[Timing]] = []
    drafting: list[Speculation | None] = []
    others_cpu: list[float | None] = []
    sm_clock_mhz: list[float | None] = []
    with engine.meter() as memory:
        _run(engine, workload, description.vocab_size, 0)
        for repeat in range(1, workload.repeats + 1):
            before = cpu_times()
            generations = _run(engine, workload, description.vocab_size, repeat)
            others_cpu.append(cpu_times().others_since(before))
            sm_clock_mhz.append(_sm_clock_mhz(description.device))
            timings = [generation.timing for generation in generations]
            repeats.append(timings)
            drafting.append(_sum_speculation(generations))
            if on_repeat:
                on_repeat(repeat, workload.repeats, _mean(timings, lambda t: t.decode_tok_s))

    def figure(of_one_request: Callable[[Timing], float]) -> Figure:
        return mean_figure([_mean(timings, of_one_request) for timings in repeats])

    speculation = _speculation_figures(description.config, drafting)
    if speculation is not None and isinstance(engine, DraftingEngine):
        costs = engine.step_costs(
            _prompts(workload, description.vocab_size, 0),
            max_new_tokens=min(workload.new_tokens, COST_TOKENS),
        )
        recorded = tuple(StepCost(**vars(cost)) for cost in costs)
        speculation = speculation.model_copy(update={"costs": recorded})

    def mbu(bytes_per_s: float | None) -> Figure | None:
        read = bytes_read_per_step(description, workload)
        if bytes_per_s is None or speculation is not None or read is None:
            return None
        return mean_figure([read / seconds / bytes_per_s for seconds in tpot_s.samples])

    tpot_s = figure(lambda t: t.tpot_s)
    return Speed(
        decode_tok_s=figure(lambda t: t.decode_tok_s),
        e2e_tok_s=figure(lambda t: t.e2e_tok_s),
        ttft_s=figure(lambda t: t.ttft_s),
        tpot_s=tpot_s,
        aggregate_tok_s=mean_figure([_aggregate_tok_s(timings) for timings in repeats]),
        mbu=mbu(read_bytes_per_s),
        mbu_datasheet=mbu(datasheet_bytes_per_s),
        speculation=speculation,
        peak_bytes=memory.peak_bytes,
        instability=explain_instability(
            tpot_s.samples,
            others_cpu=others_cpu,
            sm_clock_mhz=sm_clock_mhz,
            tokens_per_step=speculation.tokens_per_step.samples if speculation else (),
            acceptance_assumed=description.config.assume_acceptance is not None,
        ),
    )


def bytes_read_per_step(description: EngineDescription, workload: Workload) -> float | None:
    """Computes the mean bytes that a timed decode step reads on one rank: weights and KV cache.

    The timed steps generate tokens 2 to n. The step that generates token i + 1 attends to the
    prompt and i answer tokens, so the average is prompt + n / 2.

    Returns:
        The bytes; None if the engine does not report them.
    """
    if description.weight_bytes_per_step is None or description.kv_bytes_per_token is None:
        return None
    cached_tokens = workload.prompt_tokens + workload.new_tokens / 2
    cache = workload.batch * cached_tokens * description.kv_bytes_per_token
    return description.weight_bytes_per_step + cache


def _check(workload: Workload, description: EngineDescription) -> None:
    max_batch_size = description.config.max_batch_size
    if workload.batch > max_batch_size:
        raise ConfigError(
            f"a batch of {workload.batch} does not fit an engine with "
            f"max_batch_size={max_batch_size}. Raise max_batch_size or lower the batch."
        )
    tokens = workload.prompt_tokens + workload.new_tokens
    if tokens > description.max_seq_len:
        raise ConfigError(
            f"{workload.prompt_tokens} prompt tokens and {workload.new_tokens} new ones do not "
            f"fit in max_seq_len={description.max_seq_len}. Raise it or shorten the workload."
        )


def _prompts(workload: Workload, vocab_size: int, repeat: int) -> list[list[int]]:
    import numpy as np

    random = np.random.default_rng((workload.seed, repeat))
    return random.integers(vocab_size, size=(workload.batch, workload.prompt_tokens)).tolist()


def _run(engine: Engine, workload: Workload, vocab_size: int, repeat: int) -> list[Generation]:
    prompts = _prompts(workload, vocab_size, repeat)
    params = SamplingParams(max_new_tokens=workload.new_tokens, temperature=0, ignore_eos=True)
    generations = engine.generate(prompts, params)
    produced = [generation.timing.n_tokens for generation in generations]
    asked = [workload.new_tokens] * workload.batch
    if produced != asked:
        raise HotloopError(
            f"the engine generated {produced} tokens instead of {asked}, although "
            "end-of-sequence is "
            "ignored. Its speed is not that of this workload."
        )
    if any(math.isnan(generation.timing.tpot_s) for generation in generations):
        raise HotloopError(
            f"all {workload.new_tokens} tokens of an answer arrived together, so the time per "
            "token is unknown. Let the server, and any proxy before it, stream; if it does, ask "
            "for more tokens."
        )
    return generations


def _sum_speculation(generations: Sequence[Generation]) -> Speculation | None:
    """Sums the drafting statistics of a repeat's requests; None without drafts."""
    each = [g.speculation for g in generations if g.speculation is not None]
    return sum(each, Speculation()) if each else None


def _speculation_figures(
    config: EngineConfig, repeats: Sequence[Speculation | None]
) -> SpeculationFigures | None:
    """Makes the drafting figures of all repeats."""
    each = [repeat for repeat in repeats if repeat is not None]
    if not each:
        return None
    total = sum(each, Speculation())
    step_s = total.draft_s + total.verify_s
    return SpeculationFigures(
        draft=config.draft_name,
        proposed=total.proposed,
        accepted=total.accepted,
        acceptance=tuple(share if math.isfinite(share) else None for share in total.acceptance),
        tokens_per_step=mean_figure([repeat.tokens_per_step for repeat in each]),
        draft_share=total.draft_s / step_s if step_s else None,
        verify_share=total.verify_s / step_s if step_s else None,
        off_share=total.n_plain_steps / total.n_steps,
        assumed_acceptance=config.assume_acceptance,
    )


def _mean(timings: Sequence[Timing], of_one_request: Callable[[Timing], float]) -> float:
    return statistics.fmean(of_one_request(timing) for timing in timings)


def _aggregate_tok_s(timings: Sequence[Timing]) -> float:
    return sum(t.n_tokens for t in timings) / max(t.e2e_s for t in timings)


def _sm_clock_mhz(device: str) -> float | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return gpu_state(torch.device(device)).get("sm_clock_mhz")
