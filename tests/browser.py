"""A headless browser for tests of pages, where this machine has one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

TIMEOUT_MS = 120_000  # for what hangs

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def started_browser() -> Iterator[Browser]:
    """Starts Chromium; skips the test where there is none.

    Playwright runs an event loop in this thread until the end of the block: do not call
    ``asyncio.run`` inside.
    """
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is on the path")
    with sync_playwright() as playwright:
        expect.set_options(timeout=TIMEOUT_MS)
        browser = playwright.chromium.launch(
            executable_path=path,
            timeout=TIMEOUT_MS,
            args=["--no-sandbox", "--disable-dev-shm-usage"],  # root, and small containers
        )
        yield browser
        browser.close()
