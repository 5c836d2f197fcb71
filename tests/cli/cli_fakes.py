"""An engine without a model: it answers every prompt with the same words."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hotloop.bench.record import MEASURED, Figure, Record, Status
from hotloop.types import (
    ChatPrompt,
    Delta,
    EngineConfig,
    EngineDescription,
    Generation,
    Prompt,
    SamplingParams,
    Speculation,
    Timing,
)

CONTEXT = 200


@dataclass(frozen=True)
class FakeTokenizer:
    """One token a character; ``<role>`` of the template is one, too."""

    chat_template: str = "<role>content"
    tool_template: str | None = None
    source: Path = Path("fake")
    bos_id: int = ord("^")
    notes: tuple[str, ...] = ()

    def chat_prompt(
        self,
        messages: Sequence[dict[str, str]],
        *,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> ChatPrompt:
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        shown = "".join(f"{{{name}={value!r}}}" for name, value in variables.items())
        end = "" if continue_final_message else "<assistant>"
        return ChatPrompt(
            token_ids=tuple(map(ord, shown + text + end)), starts_text=not continue_final_message
        )

    def control_tokens_in(self, text: str) -> list[str]:
        return re.findall("<end>", text)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        assert parse_special, "plain text is for the engine to encode"
        return [self.bos_id, *map(ord, text.replace("<end>", "$"))]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@dataclass(frozen=True)
class Asked:
    prompt: str
    params: SamplingParams


class FakeLLM:
    """Answers ``words``; after ``interrupt_after`` of them its user presses Ctrl-C."""

    made: list[FakeLLM]
    words: tuple[str, ...] = ("Hello", " wor", "ld", ".")
    default_sampling = SamplingParams(temperature=0.25)
    interrupt_after: int | None = None
    speculation: Speculation | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, config: EngineConfig, *, progress: Callable[[str, int, int], None]) -> None:
        progress("load", 1, 2)
        self.config = config
        self.tokenizer = FakeTokenizer()
        self.asked: list[Asked] = []
        self.closed = False
        self.n_cancelled = 0
        self.made.append(self)

    def text_of(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        return self.tokenizer.decode(getattr(prompt, "token_ids", prompt))

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams) -> Generator[Delta]:
        (prompt,) = prompts
        text = self.text_of(prompt)
        self.asked.append(Asked(text, params))
        words = self.words[: params.max_new_tokens]
        done = Generation(
            prompt_ids=tuple(map(ord, text)),
            token_ids=tuple(range(len(words))),
            text="".join(words),
            finish_reason="eos",
            timing=Timing(n_tokens=len(words), ttft_s=0.5, e2e_s=0.5 + 0.25 * (len(words) - 1)),
            speculation=self.speculation,
        )
        try:
            for i, word in enumerate(words):
                if i == self.interrupt_after:
                    os.kill(os.getpid(), signal.SIGINT)
                last = done if i == len(words) - 1 else None
                yield Delta(index=0, text=word, token_ids=(i,), generation=last)
        except GeneratorExit:
            self.n_cancelled += 1
            raise

    def describe(self) -> EngineDescription:
        return EngineDescription(
            config=replace(self.config),
            family="llama",
            device="cpu",
            device_name="Fake CPU",
            dtype="float32",
            vocab_size=128,
            max_seq_len=CONTEXT,
            execution="eager",
            n_params=1000,
            weight_bytes=4000,
            weight_bytes_per_step=4000,
            kv_bytes_per_token=8,
            notes=self.notes,
        )

    def close(self) -> None:
        self.closed = True


def figure(mean: float) -> Figure:
    return Figure(
        mean=mean, ci95=(0.9 * mean, 1.1 * mean), se=0.05 * mean, n=5, samples=(mean,) * 5
    )


def record(config: EngineConfig, status: Status = "ok", **fields: object) -> Record:
    """A record of ``config`` as ``status`` would leave it; if it ran, then as ``FakeLLM`` does."""
    if status in MEASURED and config.execution == "auto":
        fields["engine"] = {"execution": "eager"}
    speed = {name: figure(10.0) for name in ("decode_tok_s", "e2e_tok_s", "ttft_s", "tpot_s")}
    return Record(
        cell=(replace(config, execution="eager") if "engine" in fields else config).name,
        config=config.to_dict(),
        status=status,
        reason=None if status == "ok" else "because",
        started_at="2024-01-01T00:00:00+00:00",
        **(speed if status in MEASURED else {}),
        **fields,
    )
