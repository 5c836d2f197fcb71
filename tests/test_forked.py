"""A process that is forked is what ``subprocess`` starts, with torch imported."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import forked
import pytest
from waiting import HANG_S, alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")

BOTH = pytest.mark.parametrize("start", [subprocess.Popen, forked.Popen])

TELLS = """
import faulthandler, json, os, signal, sys, threading
print(json.dumps({
    "arguments": sys.argv, "path": sys.path, "cwd": os.getcwd(), "environment": dict(os.environ),
    "parent": os.getppid(), "leads": [get(0) == os.getpid() for get in (os.getsid, os.getpgid)],
    "files": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
    "read": sys.stdin.read(), "passed": os.read(int(sys.argv[1]), 9).decode(),
    "stacks": faulthandler.is_enabled(), "ctrl_c": str(signal.getsignal(signal.SIGINT)),
    "threads": threading.active_count(), "main": "json" in vars(sys.modules["__main__"]),
    "streams": [
        (f.encoding, f.errors, f.line_buffering, f.fileno(), f.isatty(), f is default)
        for f, default in zip((sys.stdin, sys.stdout, sys.stderr),
                              (sys.__stdin__, sys.__stdout__, sys.__stderr__))
    ],
}))
"""


def told(start: Callable, tmp_path, options: list[str], new_session: bool) -> dict:
    reader, writer = os.pipe()
    os.write(writer, b"passed on")
    with start(
        [sys.executable, *options, "-c", TELLS, str(reader), "ä", ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"GIVEN": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{sys.path[-1]}"},
        pass_fds=(reader,),
        start_new_session=new_session,
    ) as process:
        out, _ = process.communicate("read\n", timeout=HANG_S)
    os.close(reader)
    os.close(writer)
    assert process.returncode == 0
    return json.loads(out)


@pytest.mark.parametrize("new_session", [False, True])
@pytest.mark.parametrize("options", [[], ["-X", "faulthandler"]], ids=["", "faulthandler"])
def test_it_finds_what_another_would(tmp_path, options, new_session):
    expected, found = (
        told(start, tmp_path, options, new_session) for start in (subprocess.Popen, forked.Popen)
    )
    assert found["parent"] == os.getpid()
    assert found == expected


@pytest.mark.parametrize(
    ("code", "ended", "out"),
    [
        ("print('unflushed', end='')", 0, "unflushed"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('why')", 1, ""),
        ("raise ValueError('why')", 1, ""),
        ("import os; os._exit(4)", 4, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'last'); 1 / 0", 1, "last\n"),
        ("import threading as t; t.Timer(0.01, print, ['thread']).start()", 0, "thread\n"),
        ("import os; os.fork() or os._exit(0); os.wait(); print('forks')", 0, "forks\n"),
    ],
)
@BOTH
def test_it_ends_as_another_does(start, code, ended, out):
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with start(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        said, errors = process.communicate(timeout=HANG_S)
    assert (process.returncode, said) == (ended, out)
    assert ("why" in errors) == ("why" in code)


@BOTH
def test_ctrl_c_ends_it_by_its_signal(start):
    code = "import time; print(flush=True); time.sleep(9999)"
    with start([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as one:
        one.stdout.readline()
        one.send_signal(signal.SIGINT)
        _, errors = one.communicate(timeout=HANG_S)
    assert one.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in errors


@BOTH
def test_its_group_can_be_killed_as_soon_as_it_is_started(start):
    command = [sys.executable, "-c", "import time; time.sleep(9999)"]
    with start(command, start_new_session=True) as process:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(HANG_S) == -signal.SIGKILL


@BOTH
def test_it_runs_a_module(start, tmp_path):
    (tmp_path / "given.py").write_text("import sys; print(__name__, *sys.argv, sys.path[0])")
    with start(
        [sys.executable, "-m", "given", "1"], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        out, _ = process.communicate(timeout=HANG_S)
    assert out == f"__main__ {tmp_path / 'given.py'} 1 {tmp_path}\n"


HAS_TORCH = [sys.executable, "-c", "import sys; print('torch' in sys.modules)"]


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize("given", [{}, {"TORCHINDUCTOR_CACHE_DIR": "/elsewhere"}])
def test_torch_is_imported_in_the_processes_that_a_test_file_starts(given):
    environment = forked.server().environment | given  # earlier tests may have changed this one's
    found = subprocess.check_output(HAS_TORCH, env=environment, timeout=HANG_S)
    assert found == b"True\n"


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize("given", [{"OMP_NUM_THREADS": "3"}, {"PYTHONIOENCODING": "latin-1"}])
def test_a_variable_that_is_read_at_the_start_takes_a_process_that_starts(given):
    found = subprocess.check_output(HAS_TORCH, env=os.environ | given, timeout=HANG_S)
    assert found == b"False\n"


def test_it_ends_with_the_tests_however_they_end_and_so_does_the_server():
    code = """
import forked, os, signal, sys
sleep = "import time; print(flush=True); time.sleep(9999)"
one = forked.Popen([sys.executable, "-c", sleep], stdout=forked.subprocess.PIPE)
one.stdout.readline()
print(one.pid, forked.server()._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == -signal.SIGKILL
    processes = [int(pid) for pid in done.stdout.split()]
    assert len(processes) == 2
    wait_until(lambda: not any(map(alive, processes)), "both end")
