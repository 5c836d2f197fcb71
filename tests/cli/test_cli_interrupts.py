"""Ctrl-C is neither lost nor an abort where modules are imported."""

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable

import pytest

from hotloop.cli.interrupts import ctrl_c_after_imports, handled_after_imports

SWALLOWS = """
# The bare except swallows KeyboardInterrupt, as modules of torch do while they are imported.
import os, signal
try:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    sum(range(1000))
except:
    raise SystemExit("it was interrupted")
whole = True
"""


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(work: Callable[[], object]) -> None:
    """Works with Ctrl-C as commands have it, and waits to be interrupted."""
    with ctrl_c_after_imports():
        work()
        time.sleep(60)


def test_ctrl_c_waits_for_an_import_that_would_swallow_it(tmp_path, monkeypatch):
    (tmp_path / "swallows_ctrl_c.py").write_text(SWALLOWS)
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: importlib.import_module("swallows_ctrl_c"))
    assert sys.modules.pop("swallows_ctrl_c").whole
    assert signal.getsignal(signal.SIGINT) is before


def test_another_signal_waits_for_an_import_too(tmp_path, monkeypatch):
    module = SWALLOWS.replace("SIGINT", "SIGTERM")
    (tmp_path / "swallows_sigterm.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def end() -> None:
        raise SystemExit(0)

    def terminated() -> None:
        with handled_after_imports(signal.SIGTERM, end):
            importlib.import_module("swallows_sigterm")
            time.sleep(60)

    with pytest.raises(SystemExit):
        terminated()
    assert sys.modules.pop("swallows_sigterm").whole
    assert signal.getsignal(signal.SIGTERM) is before


def test_elsewhere_ctrl_c_acts_at_once():
    with pytest.raises(KeyboardInterrupt):
        interrupted(press)


def test_a_ctrl_c_that_is_ignored_or_handled_stays_so():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        with ctrl_c_after_imports():
            press()
        assert pressed == [1]
    finally:
        signal.signal(signal.SIGINT, before)
