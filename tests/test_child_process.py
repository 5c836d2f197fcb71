import os
import signal

import pytest
from waiting import HANG_S, alive, wait_until

from hotloop.child_process import ChildProcess, signal_name

STARTS_ANOTHER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(9999)"])
print(child.pid, flush=True)
time.sleep(9999)
"""


@pytest.mark.parametrize("how", ["killed", "asked and then killed"])
def test_a_child_is_ended_with_what_it_started(tmp_path, how):
    with (tmp_path / "log").open("w+b") as log:
        child = ChildProcess(["-c", STARTS_ANOTHER], output=log)
        wait_until(lambda: (tmp_path / "log").read_text().endswith("\n"), "it started another")
        other = int((tmp_path / "log").read_text())
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
        assert child.wait(0) is None
        if how == "killed":
            child.kill()
        else:
            child.end(0.1)
        assert child.wait(HANG_S) == -signal.SIGKILL
        wait_until(lambda: not alive(other), "the other ended")


@pytest.mark.parametrize(
    ("sent", "counted", "lacked"),
    [(signal.SIGKILL, 1, True), (signal.SIGKILL, 0, False), (signal.SIGTERM, 1, False)],
)
def test_a_kill_that_the_kernel_counted_is_for_lack_of_memory(
    tmp_path, monkeypatch, sent, counted, lacked
):
    n_kills = 5
    monkeypatch.setattr("hotloop.child_process._kernel_oom_kills", lambda: n_kills)
    with (tmp_path / "log").open("w+b") as log:
        child = ChildProcess(["-c", "import time; time.sleep(9999)"], output=log)
    n_kills += counted
    assert not child.oom_killed(), "it still runs"
    os.kill(child.pid, sent)
    assert child.wait() == -sent
    assert child.oom_killed() == lacked


def test_every_signal_has_a_name():
    assert signal_name(-signal.SIGSEGV) == "SIGSEGV"
    assert signal_name(-40) == "signal 40"
