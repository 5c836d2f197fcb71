import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator

import forked
import pytest

# A shell without job control has what it starts in the background ignore Ctrl-C, and what that
# starts in turn. Several tests are about Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each of several workers gets its share of the cores, and so do the processes that its tests start.
# OpenMP reads this when torch is imported, which is later than here. With one thread Inductor
# compiles in the process itself, instead of starting others that import torch for it.
n_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if n_workers > 1:
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, str(max(1, (n_cpus or 1) // n_workers)))

LONGEST = (
    "test_engine_fused.py",
    "test_cuda_emulated.py",
    "test_readme.py",
    "test_cuda_compile.py",
    "test_engine_speculation.py",
    "test_engine_shards.py",
    "test_engine_ranks.py",
    "test_page_browser.py",
    "test_engine_greedy.py",
)
"""Files that take most of the time; they begin first, so that no worker is left with one alone.

The order is that of a run that finds no kernels compiled. The summary of a run has their seconds.
"""

SHOWN_S = 10.0
"""Files that take less are not in the summary."""


@pytest.fixture(autouse=True)
def signal_handlers_stay() -> Iterator[None]:
    """A test that leaves a signal handler behind fails, instead of a later one in its process."""
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients take in few bytes at a time, so that no two events have the same time of arrival.

    A busy machine may keep a client waiting until a short answer has arrived whole.
    """
    import httpx2

    iter_bytes = httpx2.Response.iter_bytes

    def in_pieces(response: httpx2.Response) -> Iterator[bytes]:
        for chunk in iter_bytes(response):
            yield from (chunk[i : i + 64] for i in range(0, len(chunk), 64))

    monkeypatch.setattr(httpx2.Response, "iter_bytes", in_pieces)


@pytest.fixture(scope="module")
def forked_processes() -> Iterator[None]:
    """Python processes that tests of this file start, or hotloop in them, are forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", forked.Popen)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    shown = [(path, total) for path, total in seconds.most_common(20) if total >= SHOWN_S]
    if shown:
        terminalreporter.section("slowest files")
        for path, total in shown:
            terminalreporter.line(f"{total:7.0f} s  {path}")
