from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from serving import TEMPLATE, serving
from tiny_models import write_random

from hotloop import LLM
from hotloop.serve.lifecycle import HttpServer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template."""
    folder = write_random(tmp_path_factory.mktemp("served"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def llm(folder: Path) -> Iterator[LLM]:
    """It, in float32, of three rows, with short chunks so that short prompts have several."""
    options = {"max_batch_size": 3, "prefix_cache": "chunks", "prefill_chunk": 32}
    with LLM(str(folder), dtype="float32", **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[HttpServer]:
    """It, served."""
    with serving(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: HttpServer) -> Iterator[httpx2.Client]:
    """A client of that server."""
    with httpx2.Client(base_url=server.url, timeout=600) as client:
        yield client
