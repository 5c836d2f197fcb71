"""``hotloop bench``: the speed of one configuration."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

from cyclopts import App

from hotloop.cli.engine import note_cache
from hotloop.cli.options import (
    DEFAULT_ENGINE,
    DEFAULT_WEIGHTS,
    DEFAULT_WORKLOAD,
    MODEL,
    SERVER,
    EngineOptions,
    Json,
    WeightOptions,
    WorkloadOptions,
    option,
)
from hotloop.cli.output import note, print_json, print_pairs, progress_bar, show_record
from hotloop.errors import ConfigError

if TYPE_CHECKING:
    from hotloop.baselines.server_behavior import AnswerDifferences, ServerBehavior
    from hotloop.bench.record import Figure

app = App(
    name="bench",
    help_epilogue="""\
Examples:
  hotloop bench smollm2-135m --quant int8 --execution compile
  hotloop bench --weights random --shape llama-2-13b --quant int4-g128
  hotloop bench smollm2-135m --prompt-tokens 5 --new-tokens 200 --json
  hotloop bench --endpoint http://localhost:8000/v1 --repeats 10""",
)


@app.default
def bench(
    model: Annotated[str | None, option(MODEL, "The model, unless --shape names one.")] = None,
    /,
    *,
    engine: EngineOptions = DEFAULT_ENGINE,
    weights: WeightOptions = DEFAULT_WEIGHTS,
    workload: WorkloadOptions = DEFAULT_WORKLOAD,
    endpoint: Annotated[
        str | None,
        option(
            SERVER,
            "Instead of MODEL: the URL of an OpenAI-compatible server, such as "
            "http://localhost:8000/v1; #NAME after it chooses one of several models. The "
            "environment variable HOTLOOP_ENDPOINT_KEY holds its API key.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        option(
            SERVER,
            "With --endpoint: another server of the same model, such as one without speculation, "
            "whose greedy answers are compared.",
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Time one configuration, or measure how a server behaves.

    --json prints the record, as a sweep writes it. hotloop eval measures quality,
    and hotloop sweep compares configurations. For a server, it measures the time to
    the first token of a new and of a repeated prompt, the intervals between the
    events of a stream, the share of words in repetition loops, and whether answers
    are reproducible. The exit code is 0 if figures were measured; 2 if the
    configuration is refused; and 1 if it failed or did not fit.
    """
    from hotloop.sweep.cell import refuse_cell, run_cell
    from hotloop.sweep.events import CellFinished, CellStarted
    from hotloop.sweep.job import make_jobs
    from hotloop.sweep.progress import SweepProgress
    from hotloop.sweep.recipe import expand, recipe_from_flags

    if endpoint is not None:
        others = [*engine.given(), *weights.given(), *["model"] * (model is not None)]
        if others:
            raise ConfigError(
                f"{others[0]} cannot be given with --endpoint, since the server decides it: "
                "leave it out."
            )
        return _measure_server(endpoint, against, workload, json=json)
    if against is not None:
        raise ConfigError(
            "--against names a second server to compare with: name the first one with --endpoint."
        )
    note_cache()
    recipe = recipe_from_flags(
        weights.model(model),
        weights=weights.weights,
        matrix={},
        defaults={**engine.given(), "seed": weights.weights_seed},
        workload=workload.fields(),
        quality=False,
    )
    (job,) = make_jobs(expand(recipe), recipe.workload, None)
    if (record := refuse_cell(job)) is None:
        with SweepProgress() as progress:
            progress(CellStarted(job.cell, 1, 1))
            record = run_cell(job, progress)
            progress(CellFinished(record))
    return show_record(record, json=json)


def _measure_server(url: str, against: str | None, options: WorkloadOptions, *, json: bool) -> int:
    """Measures how a server behaves, and prints it."""
    from hotloop.baselines.completions import CompletionsClient
    from hotloop.baselines.server_behavior import measure_server
    from hotloop.bench.record import Workload
    from hotloop.evaluate.text import load_text

    if options.batch != WorkloadOptions.batch:
        raise ConfigError(
            f"--batch {options.batch}: prompts are sent to --endpoint one at a time. "
            "Leave --batch out."
        )
    with ExitStack() as opened, progress_bar("measuring the server") as show:
        client = opened.enter_context(CompletionsClient(url))
        other = opened.enter_context(CompletionsClient(against)) if against else None
        behavior = measure_server(
            client,
            Workload(**options.fields()),
            load_text(None).content,
            against=other,
            on_prompt=show,
        )
    if json:
        print_json(behavior.to_dict())
        return 0
    print_pairs(_shown(behavior))
    if behavior.refused_fields:
        note(f"The server refuses these fields: {', '.join(behavior.refused_fields)}.")
    return 0


def _shown(behavior: ServerBehavior) -> list[tuple[str, str]]:
    from hotloop.report.numbers import half_width, percent, significant, uncertain

    def ms(figure: Figure) -> str:
        width = half_width(figure)
        return f"{uncertain(figure.mean * 1e3, width and width * 1e3)} ms"

    def counted(figure: Figure | None, digits: int = 4) -> str:
        return significant(figure.mean, digits) if figure else "not reported"

    def differences(found: AnswerDifferences) -> str:
        equal = f"{found.n_equal} of {found.n} answers are equal"
        if not found.first_difference:
            return equal
        earliest = min(found.first_difference)
        return f"{equal}; the earliest difference is after {earliest} characters"

    pairs = [
        ("model", behavior.model),
        ("server", behavior.server or "not reported"),
        ("prompt tokens", counted(behavior.n_prompt_tokens)),
        ("answer tokens", counted(behavior.n_tokens)),
        ("TTFT, new prompt", ms(behavior.cold_ttft_s)),
        ("TTFT, repeated prompt", ms(behavior.warm_ttft_s)),
    ]
    if behavior.tpot_s:
        pairs.append(("time per token", ms(behavior.tpot_s)))
        pairs.append(("decode tok/s", significant(1 / behavior.tpot_s.mean, 3)))
    if behavior.interval_s:
        shown = zip(("50%", "90%", "99%", "longest"), behavior.interval_s, strict=True)
        listed = ", ".join(f"{name} {significant(s * 1e3, 3)}" for name, s in shown)
        pairs.append(("interval between events, ms", listed))
    pairs += [
        ("tokens per event", counted(behavior.tokens_per_event, 3)),
        ("repetition loops", f"{percent(behavior.loop_share.mean)} of the words of an answer"),
        ("greedy answers to a repeated prompt", differences(behavior.repeated)),
    ]
    if behavior.against:
        pairs.append(("greedy answers of the other server", differences(behavior.against)))
    return pairs
