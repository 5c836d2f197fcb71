"""``hotloop generate``: streams the answer to one prompt."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import App

from hotloop.checked import MAX_SEED
from hotloop.cli.engine import ConversationFormat, early_tokenizer, loaded, raw_prompt
from hotloop.cli.options import (
    DEFAULT_ENGINE,
    DEFAULT_SAMPLING,
    DEFAULT_TEMPLATE,
    PROMPT,
    EngineOptions,
    Json,
    Model,
    SamplingOptions,
    TemplateOptions,
    option,
)
from hotloop.cli.output import note, print_json
from hotloop.cli.stream import SILENT, relay, writer_for
from hotloop.errors import ConfigError, RequestError, shorten

app = App(
    name="generate",
    help_epilogue="""\
Examples:
  hotloop generate smollm2-135m "The capital of France is"
  hotloop generate smollm2-135m --chat --quant int8 "Why is the sky blue?"
  git diff | hotloop generate ./my-model - --chat --json""",
)


MAX_PROMPT_CHARS = 2**26
"""The longest prompt that is read, in characters: longer than any context, and small in memory."""


@app.default
def generate(
    model: Model,
    prompt: Annotated[
        str | None, option(PROMPT, "The prompt; - reads it from standard input.")
    ] = None,
    /,
    *,
    stdin: Annotated[bool, option(PROMPT, "Read the prompt from standard input, as - does.")] = (
        False
    ),
    hyphen: Annotated[bool, option(PROMPT, "The same as --stdin.", name="-", show=False)] = False,
    prompt_file: Annotated[Path | None, option(PROMPT, "Read the prompt from a file.")] = None,
    chat: Annotated[
        bool, option(PROMPT, "Wrap the prompt in the model's chat template, as a user's message.")
    ] = False,
    answer_start: Annotated[
        str | None,
        option(
            PROMPT,
            "With --chat: the beginning of the answer, which the model continues. It is printed "
            "before the rest; --json has only the rest.",
        ),
    ] = None,
    special: Annotated[
        bool, option(PROMPT, "Parse control tokens in the prompt, such as <|im_start|>.")
    ] = False,
    template: TemplateOptions = DEFAULT_TEMPLATE,
    engine: EngineOptions = DEFAULT_ENGINE,
    sampling: SamplingOptions = DEFAULT_SAMPLING,
    json: Json = False,
) -> int:
    """Continue a prompt.

    The text streams to standard output; its figures follow on standard error.
    Without --max-new-tokens, the answer ends after as many tokens as the model's
    generation config suggests, or after 256, or when the context is full.
    With --n, answers are printed one after another; with --json, one object per line.
    """
    sampling.check(json=json)
    if chat and special:
        raise ConfigError("--special is for a prompt without --chat: a message is always text.")
    if not chat and (answer_start is not None or template.given()):
        raise ConfigError("--answer-start, --chat-template and --template-arg need --chat.")
    conversation = ConversationFormat(template)
    text = read_prompt(prompt, prompt_file, stdin or hyphen)
    config = engine.config(model)
    messages = [{"role": "user", "content": text}]
    if answer_start is not None:
        messages.append({"role": "assistant", "content": answer_start})
    if chat:
        conversation.check(model, messages)
    elif not text and not early_tokenizer(model).encode(""):
        raise RequestError("the prompt is empty: give some text.")
    with loaded(config) as llm:
        params = sampling.params(llm.default_sampling)
        if chat:
            asked = conversation.encoder(llm.tokenizer)(messages)
        else:
            asked = raw_prompt(llm, text, special=special)
        writer = SILENT if json else writer_for(sys.stdout)
        for i in range(params.n):
            seed = None if params.seed is None else (params.seed + i) % (MAX_SEED + 1)
            one = replace(params, n=1, seed=seed)
            answer = relay(llm.stream([asked], one), writer, start=answer_start or "")
            if json:
                cell = llm.describe().name
                print_json({"model": model, "cell": cell, "prompt": text, **answer.to_dict()})
            note(answer.summary())
            if answer.finish_reason == "interrupted":
                return 130
    return 0


def read_prompt(prompt: str | None, file: Path | None, stdin: bool) -> str:
    """Reads the prompt from the given source, or from standard input if it is a pipe.

    The last newline of a file or a pipe is removed, since it only ends the text.

    Raises:
        ConfigError: No source or several were given, or the text cannot be read.
    """
    named = (prompt is not None) + (file is not None) + stdin
    if named > 1:
        raise ConfigError("give the prompt once: as PROMPT, with --prompt-file, or on stdin (-).")
    if prompt is not None:
        return prompt
    if not named and sys.stdin.isatty():
        raise ConfigError("there is no prompt: give PROMPT, --prompt-file FILE, or - for stdin.")
    where = shorten(str(file)) if file else "stdin"
    try:
        with file.open(encoding="utf-8") if file else nullcontext(sys.stdin) as source:
            text = source.read(MAX_PROMPT_CHARS + 1)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        why = getattr(error, "strerror", None) or shorten(str(error))
        raise ConfigError(f"the prompt cannot be read from {where}: {why}.") from error
    if len(text) > MAX_PROMPT_CHARS:
        raise ConfigError(f"the prompt from {where} has more than {MAX_PROMPT_CHARS:,} characters.")
    return text.removesuffix("\n")
