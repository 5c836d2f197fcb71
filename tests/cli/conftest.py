from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from cli_fakes import FakeLLM, FakeTokenizer

import hotloop
from hotloop.cli import engine, generate


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """``hotloop.LLM`` without a model; the class keeps what was built and asked."""

    fresh = type("FakeLLM", (FakeLLM,), {"made": []})
    monkeypatch.setitem(vars(hotloop), "LLM", fresh)
    for module in (engine, generate):
        monkeypatch.setattr(module, "early_tokenizer", lambda _: FakeTokenizer())
    return fresh


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a text on standard input, as a pipe would."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))
