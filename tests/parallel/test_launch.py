"""When a rank or the caller fails, nothing waits forever and no process remains."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest
from waiting import HANG_S, alive, wait_until

from hotloop.errors import CheckpointError, RankError, RequestError
from hotloop.parallel.launch import Rank, Ranks, Reply, start_rank

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    # On a busy machine the rank with the cause may report later than its peers.
    monkeypatch.setattr("hotloop.parallel.launch.PEER_GRACE_S", HANG_S)


def start(n: int) -> Ranks:
    return Ranks([start_rank("parallel_program", rank) for rank in range(n)])


def tell(ranks: Ranks, *command: object) -> Reply:
    return ranks.send_to_all(command, phase=f"phase {command[0]}")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    started = start(3)
    yield started
    started.end()


def pids(ranks: Ranks) -> list[int]:
    return [rank.process.pid for rank in ranks._ranks]


def failure_of(ranks: Ranks, command: str, *arguments: object) -> Exception:
    """Returns the error of a command, after which no rank remains."""
    processes = pids(ranks)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which one is the question)
        tell(ranks, command, *arguments).wait()
    wait_until(lambda: not any(map(alive, processes)), "every rank is ended")
    with pytest.raises(type(caught.value)):  # and it stays so
        tell(ranks, "pid")
    return caught.value


def test_rank_0_answers_and_replies_can_be_awaited_in_any_order(ranks):
    assert tell(ranks, "pid").wait() == pids(ranks)[0]
    first, second = tell(ranks, "add", 1, 2), tell(ranks, "add", 3, 4)
    assert (second.wait(), first.wait()) == (7, 3)


def test_progress_reaches_the_waiting_reply(ranks):
    seen = []
    assert tell(ranks, "report").wait(lambda *what: seen.append(what)) == "reported"
    assert seen == [("phase", 0), ("phase", 1), ("phase", 2)]


@pytest.mark.parametrize("who", [0, 2])
def test_errors_of_hotloop_are_passed_on_unchanged(ranks, who):
    error = failure_of(ranks, "raise_known", who)
    assert type(error) is CheckpointError
    assert (error.file, error.tensor) == (Path("some/file"), "some.tensor")
    assert str(error) == "some/file, tensor 'some.tensor': is damaged"


def test_other_exceptions_become_errors_that_name_rank_command_and_log(ranks):
    error = failure_of(ranks, "raise_unknown", 1)
    assert type(error) is RankError
    assert (error.rank, error.n_ranks) == (1, 3)
    assert "rank 1 of 3 failed in phase raise_unknown: KeyError: 'no such thing'" in str(error)
    assert "parallel_program.py" in error.log, "the traceback"


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_killed_is_named_with_its_signal(ranks, who):
    error = failure_of(ranks, "die", who)
    assert type(error) is RankError
    assert str(error).startswith(f"rank {who} of 3 was killed by SIGKILL in phase die")


def test_a_rank_that_exits_is_named_with_its_exit_code_and_log(ranks):
    error = failure_of(ranks, "exit", 2)
    assert str(error).startswith("rank 2 of 3 ended with exit code 3 in phase exit")
    assert "these are my last words" in str(error)


def test_a_rank_killed_from_outside_ends_the_wait_for_its_reply(ranks):
    reply = tell(ranks, "hang")
    os.kill(pids(ranks)[1], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 of 3 was killed by SIGKILL in phase hang"):
        reply.wait()


def test_the_first_failure_is_reported_rather_than_those_it_causes(ranks):
    error = failure_of(ranks, "raise_after_peers", 2)
    assert type(error) is CheckpointError


def test_ranks_that_lose_each_other_without_a_cause_report_that(ranks, monkeypatch):
    monkeypatch.setattr("hotloop.parallel.launch.PEER_GRACE_S", 0.1)
    error = failure_of(ranks, "lose_peers")
    assert "PeerError: connection reset" in str(error)


def test_the_end_of_a_rank_is_noticed_though_its_child_holds_the_connection(ranks):
    error = failure_of(ranks, "die_leaving_a_child", 0)
    assert str(error).startswith("rank 0 of 3 ended with exit code 5")


def test_a_program_that_cannot_start_is_an_error_with_its_reason():
    ranks = Ranks([start_rank("no_such_program", rank) for rank in range(2)])
    with pytest.raises(RankError, match=r"ended with exit code 1.*(\n.*)*no_such_program"):
        tell(ranks, "pid").wait()


@pytest.mark.parametrize("reached", ["before", "after"])
def test_an_interrupt_while_the_watch_starts_ends_the_ranks_and_then_the_watch(
    monkeypatch, reached
):
    threads, really_start = [], threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        threads.append(thread)
        if reached == "after":
            really_start(thread)
        raise KeyboardInterrupt

    ranks = [start_rank("parallel_program", rank) for rank in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Ranks(ranks)
    (thread,) = threads
    if reached == "after":
        assert not thread.is_alive()
    else:
        thread.run()  # as the system does once it finds the time: nothing is left to watch
    assert not any(alive(rank.process.pid) for rank in ranks)
    assert all(rank.log.closed and rank.connection.closed for rank in ranks)


@pytest.mark.parametrize(
    ("stopped", "who"),
    [
        ([], "rank 0 of 3 may be busy"),
        ([1], "rank 1 of 3 is stopped"),
        ([1, 2], "ranks 1 and 2 of 3 are stopped"),
    ],
)
def test_waiting_for_a_silent_rank_is_reported_and_continues(
    ranks, monkeypatch, tmp_path, stopped, who
):
    tell(ranks, "pid").wait()
    monkeypatch.setattr("hotloop.parallel.launch.SILENCE_S", 0.2)
    for rank in stopped:
        os.kill(pids(ranks)[rank], signal.SIGSTOP)
    reply = tell(ranks, "wait_for_file", tmp_path / "go")
    threading.Timer(1.0, (tmp_path / "go").touch).start()
    with pytest.warns(UserWarning, match=f"no answer for 0 s in phase wait_for_file: {who}"):
        assert reply.wait() == "waited"


def test_ending_leaves_no_process_and_can_be_repeated(ranks):
    processes = pids(ranks)
    tell(ranks, "hang")
    ranks.end()
    assert not any(map(alive, processes))
    ranks.end()


def test_commands_to_ended_ranks_raise(ranks):
    reply = tell(ranks, "hang")
    ranks.end()
    with pytest.raises(RequestError, match="is closed"):
        reply.wait()
    with pytest.raises(RequestError, match="is closed"):
        tell(ranks, "pid")


def test_ranks_end_with_the_last_reference_to_them():
    ranks = start(2)
    processes = pids(ranks)
    tell(ranks, "hang")
    del ranks
    gc.collect()
    assert not any(map(alive, processes))


def test_an_abandoned_reply_is_not_mistaken_for_another(ranks, tmp_path):
    def interrupt(*_: object) -> None:
        (tmp_path / "go").touch()
        raise KeyboardInterrupt

    tell(ranks, "pid").wait()
    before = signal.signal(signal.SIGALRM, interrupt)
    reply = tell(ranks, "wait_for_file", tmp_path / "go")
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            reply.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert tell(ranks, "add", 20, 22).wait() == 42


CALLER = """
import sys, time
from hotloop.parallel.launch import Rank, Ranks, start_rank
ranks = Ranks([start_rank("parallel_program", rank) for rank in range(2)])
reply = ranks.send_to_all(("hang",), phase="a test")
print(*(rank.process.pid for rank in ranks._ranks), flush=True)
{then}
"""


def caller(then: str, code: str = CALLER) -> tuple[subprocess.Popen, list[int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code.format(then=then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_when_their_caller_is_killed_while_they_wait_for_each_other(sent):
    process, ranks = caller("reply.wait()")
    assert all(map(alive, ranks))
    process.send_signal(sent)
    process.wait()
    wait_until(lambda: not any(map(alive, ranks)), "the ranks end by themselves")


@pytest.mark.parametrize(
    ("module", "first"),
    [("slow_program", ""), ("parallel_program", "os.fork() or time.sleep(9999)")],
)
def test_ranks_end_with_their_caller_even_before_they_read_commands(module, first):
    code = CALLER.replace("parallel_program", module).replace("import sys", "import os, sys")
    process, ranks = caller(f"{first}\nreply.wait()", code)
    assert all(map(alive, ranks))
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, ranks)), "the ranks end by themselves")
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the fork


def test_ranks_end_with_a_caller_that_is_stopped_at_the_terminal():
    process, ranks = caller("reply.wait()")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the whole group
    process.wait(HANG_S)
    wait_until(lambda: not any(map(alive, ranks)), "the caller ends its ranks")


@pytest.mark.parametrize("then", ["", "sys.exit(4)", "raise ValueError"])
def test_ranks_end_with_the_interpreter(then):
    process, ranks = caller(then)
    process.wait(HANG_S)
    wait_until(lambda: not any(map(alive, ranks)), "the caller ends its ranks")


def test_a_rank_started_elsewhere_ends_in_good_order_when_released():
    ours, theirs = Pipe()
    code = (
        "import sys, time; from multiprocessing.connection import Connection\n"
        "from hotloop.parallel.link import Caller\n"
        "list(Caller(Connection(int(sys.argv[1]))).commands())\n"
        "time.sleep(1); sys.exit(7)  # as if it took a while to let go of a GPU\n"
    )
    file = theirs.fileno()
    command = [sys.executable, "-c", code, str(file)]
    process = subprocess.Popen(command, pass_fds=(file,), start_new_session=True)
    theirs.close()
    Ranks([Rank(0, ours)]).end()  # which closes the connection
    assert process.wait(HANG_S) == 7


def test_a_fork_of_the_caller_leaves_the_ranks_alone():
    then = "import os\nif os.fork() == 0: sys.exit(0)\nos.wait(); print('waited', flush=True)\n"
    process, ranks = caller(then + "time.sleep(9999)")
    assert process.stdout.readline() == "waited\n"
    assert all(map(alive, ranks))
    process.kill()
    process.wait()
