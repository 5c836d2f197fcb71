"""Python processes that are forked from one which has imported torch already.

To start Python and import torch takes more than a second of a core. ``Popen`` forks the process
from a server that has done it. Each process of the tests has one server, started when it is first
needed and ended with it. The fixture ``forked_processes`` gives a file of tests this ``Popen``.

A forked process has what was asked for: arguments, standard files, folder, environment, session.
The interpreter ends it as any other: at-exit functions, exit code, Ctrl-C. The server forks twice,
and a subreaper inherits what the first fork leaves behind, so its parent is the tests' process,
with which it ends. multiprocessing's fork server has none of that: it runs a function, and exits.

``Popen`` starts a process, as ``subprocess`` does, where a fork would be another: with another
interpreter or option, another value of a variable that is read at the start, or no Linux. But it
cannot know what a test is about. A fork has packages imported, and has the command line of the
server and its environment in /proc; so tests of imports, of the start and of memory do without.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import fcntl
import functools
import gc
import inspect
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch.distributed",
    "cyclopts",
    "gguf",
    "pydantic",
    "sentencepiece",
    "tokenizers",
    "yaml",
)
"""Other people's packages that hotloop imports; a fork imports hotloop from where it is told to.

None of them starts a thread or initializes CUDA when it is imported: a fork could use neither.
"""

READ_AT_START = re.compile(
    "(PYTHON(?!PATH$)|LC_|LANG|LD_|OMP_|GOMP_|KMP_|MKL_|OPENBLAS_|TORCH(?!INDUCTOR_CACHE_DIR$)|CUDA)"
)
"""Variables that the interpreter or a library reads before it runs a program.

torch reads its cache folder whenever it compiles, and hotloop sets it.
"""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    """Sets an attribute of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option} failed")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The properties of a process that is asked for.

    Attributes:
        arguments: The interpreter's: ``-c CODE`` or ``-m MODULE``, and its own.
        files: The numbers that the file descriptors which come with the request are to have.
    """

    arguments: list[str]
    files: list[int]
    cwd: str
    environment: dict[str, str]
    new_session: bool
    faulthandler: bool


class Popen(subprocess.Popen):
    """``subprocess.Popen`` of ``python -c CODE`` or ``python -m MODULE``, forked if possible."""

    def _execute_child(self, *given: Any) -> None:
        asked = inspect.signature(super()._execute_child).bind(*given).arguments
        request = _request(asked)
        if request is None:
            super()._execute_child(*given)
            return
        pipes = [
            asked[f"{name}{end}"] for name in ("p2c", "c2p", "err") for end in ("read", "write")
        ]
        child_ends = pipes[0], pipes[3], pipes[5]
        standard = [number if end == -1 else end for number, end in enumerate(child_ends)]
        self.pid = server().fork(request, [*standard, *asked["pass_fds"]])
        self._child_created = True
        self._close_pipe_fds(*pipes)


def _request(asked: Mapping[str, Any]) -> Request | None:
    """Returns the request for a process; None for one that is not forked."""
    arguments = [os.fspath(argument) for argument in asked["args"]]
    python, *arguments = arguments
    if crash_stacks := arguments[:2] == ["-X", "faulthandler"]:
        del arguments[:2]
    environment = dict(os.environ if asked["env"] is None else asked["env"])
    if (
        sys.platform != "linux"
        or (python, asked["executable"]) != (sys.executable, None)
        or arguments[:1] not in (["-c"], ["-m"])
        or _read_at_start(environment) != _read_at_start(server().environment)
    ):
        return None
    return Request(
        arguments=arguments,
        files=[0, 1, 2, *asked["pass_fds"]],
        cwd=os.fspath(asked["cwd"] or Path.cwd()),
        environment=environment,
        new_session=asked["start_new_session"],
        faulthandler=crash_stacks,
    )


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if READ_AT_START.match(name)}


class Server:
    """The server, as the tests' process sees it."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self._lock = threading.Lock()
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=self.environment | {"OPENBLAS_NUM_THREADS": "1"},  # NumPy's start on import
            )
        atexit.register(self.end)

    def fork(self, request: Request, files: Sequence[int]) -> int:
        """Returns the id of a new child of this process."""
        with self._lock:
            prctl(PR_SET_CHILD_SUBREAPER, True)  # which gets the orphan of a first fork
            try:
                _send(self._connection, asdict(request), files)
                pid, _ = _receive(self._connection)
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, False)
        return pid

    def end(self) -> None:
        self._connection.close()
        self._process.wait()


server = functools.cache(Server)


def _send(connection: socket.socket, message: object, files: Sequence[int] = ()) -> None:
    body = json.dumps(message).encode()
    socket.send_fds(connection, [len(body).to_bytes(8, "little")], files)
    connection.sendall(body)


def _receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """Returns the next message and its file descriptors; raises EOFError if there is none."""
    header, files, _, _ = socket.recv_fds(connection, 8, 250)
    body = connection.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL)
    if not body:
        raise EOFError("the process at the other end is gone")
    return json.loads(body), files


# What follows runs in the server, and in what it forks.


def serve(connection: socket.socket) -> Callable[[], object]:
    """Forks until the tests' process is gone; returns what the process that was forked runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests and what they start
    for name in PRELOADED:
        import_module(name)
    gc.collect()
    gc.freeze()  # a collection would write to every object, and so copy what forks share
    while True:
        try:
            request, files = _receive(connection)
        except EOFError:
            return lambda: None
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, "a fork would have one thread, and the locks of all others"
        if (pid := _fork(request["new_session"])) is None:
            connection.detach()
            return _become(Request(**request), files)
        for file in files:
            os.close(file)
        _send(connection, pid)


def _fork(new_session: bool) -> int | None:
    """Forks a process whose parent is that of this one; returns its id, and in itself None.

    By then the process can be sent a signal, alone or with its group.
    """
    ours, theirs = socket.socketpair()
    if (first := os.fork()) == 0:
        if os.fork():
            os._exit(0)
        if new_session:
            os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ours.close()
        with theirs:
            theirs.sendall(os.getpid().to_bytes(8, "little"))
            theirs.recv(1)  # comes once its parent is the one that it keeps
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return None
    with ours, theirs:
        pid = int.from_bytes(ours.recv(8), "little")
        os.waitpid(first, 0)
        ours.sendall(b"!")
    return pid


def _become(request: Request, files: Sequence[int]) -> Callable[[], object]:
    """Makes this process what was asked for; returns what it runs."""
    _place(files, request.files)
    os.chdir(request.cwd)
    ours = _python_path()
    os.environ.clear()
    os.environ.update(request.environment)
    others = [path for path in sys.path[1:] if path not in ours]
    sys.path[:] = dict.fromkeys([*_python_path(), *others])
    for number, (name, mode) in enumerate((("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb"))):
        stream = _stream(number, mode, getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if request.faulthandler:
        faulthandler.enable()
    # After the interpreter's own end, libtorch would take what it holds apart, for 0.2 seconds.
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)
    return _program(*request.arguments)


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _stream(number: int, mode: str, like: io.TextIOWrapper) -> io.TextIOWrapper:
    """Opens a standard stream as the interpreter does; ``like`` is the server's."""
    unbuffered = like.write_through  # PYTHONUNBUFFERED
    file = open(number, mode, buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(
        file,
        encoding=like.encoding,
        errors=like.errors,
        line_buffering=not unbuffered and (file.isatty() or number == 2),
        write_through=unbuffered,
    )


def _place(files: Sequence[int], numbers: Sequence[int]) -> None:
    """Gives open files these numbers, and closes all others."""
    above = max(numbers) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in files]
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number)
    for file in {int(name) for name in os.listdir("/proc/self/fd")} - set(numbers):
        os.closerange(file, file + 1)


def _program(kind: str, what: str, *arguments: str) -> Callable[[], object]:
    """Returns what ``python -c CODE`` or ``python -m MODULE`` runs."""
    sys.argv = [kind, *arguments]
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        return lambda: runpy.run_module(what, run_name="__main__", alter_sys=True)
    sys.path.insert(0, "")
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    return lambda: exec(compile(what, "<string>", "exec"), vars(module))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))()
