"""Runs plans: lists of benchmarks and tests for a limited time on a machine with GPUs.

    python benchmarks/plan.py benchmarks/plans/serving.yaml --out FOLDER --limit-s 560

A plan is a YAML file with a list of jobs:

    jobs:
      - name: alone
        run: $PYTHON benchmarks/serving.py --out $OUT/h200-serving --parts alone
        expected_s: 90    # how long it takes
        limit_s: 150      # when it is killed, with its process group
        gpus: [0]         # its CUDA_VISIBLE_DEVICES; without them it runs alone, and has all GPUs
        env: {HOTLOOP_CACHE: /tmp/cache}
        after: [equal]    # jobs of this plan that have to succeed before it
        rehearse: "{run} --rehearse"    # instead of run, with --rehearse; this is the default

A command is run by bash in the root of the repository. ``$PYTHON`` is the interpreter of this
script, and ``$OUT`` the folder for results. Jobs run in their order, one after the other, or side
by side where they name different GPUs. A failed job does not stop others, except those that come
after it. A job begins only if its expected seconds are left of ``--limit-s``. It is killed at its
own limit or at the end of ``--limit-s``.

``$OUT/logs`` has the output of each job. When a job ends, all files under ``$OUT`` are packed into
``--archive``, so that a run that is cut short loses at most the jobs that were running. Results are
in folders named as in ``benchmarks/results``: ``tar xzf results.tgz -C benchmarks/results`` puts
them there. ``--rehearse`` runs every command as far as a machine without a GPU can; ``$TINY_MODEL``
is then a tiny model without useful weights.

A fresh machine needs this repository, NVIDIA's driver, Python 3.11 or newer with torch built for
CUDA (and its triton, for ``compile``), and the other packages in ``dependencies`` of
``pyproject.toml``. Kernels need the extra ``cuda`` (cuda-bindings, nvidia-cuda-nvrtc), serving the
extra ``serve``, and tests the group ``dev``. Without a network, wheels can be brought along: most
are pure Python, but numpy, pydantic-core, pyyaml, psutil, safetensors, sentencepiece, tokenizers,
markupsafe, cuda-bindings, nvidia-cuda-nvrtc, uvloop and llguidance are built for a platform and a
version of Python. ``PYTHONPATH=src`` replaces an installation of hotloop.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hotloop.errors import ConfigError, UnknownNameError
from hotloop.sweep.bounded_yaml import parse_yaml
from hotloop.untrusted import StrictModel, config_error, read_text, validated

ROOT = Path(__file__).parent.parent

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""

REHEARSAL_S = 600.0
"""The time limit of a rehearsal."""

POLL_S = 0.05
TAIL_LINES = 25
"""Lines of a failed job's output that are printed."""

Seconds = Annotated[float, Field(gt=0)]


class Job(StrictModel):
    """A command of a plan; see the top of this file."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    run: str
    expected_s: Seconds
    limit_s: Seconds
    gpus: list[Annotated[int, Field(ge=0, le=1023)]] | None = None
    env: dict[str, str] = Field(default_factory=dict)
    after: list[str] = Field(default_factory=list)
    rehearse: str = "{run} --rehearse"

    def command(self, *, rehearse: bool) -> str:
        """Returns the command, or that of its rehearsal."""
        run = self.run.strip()
        return self.rehearse.replace("{run}", run) if rehearse else run

    def shares_gpus(self, other: Job) -> bool:
        """Returns whether it and another job use the same GPU, and so must not run side by side."""
        if self.gpus is None or other.gpus is None:
            return True
        return not set(self.gpus).isdisjoint(other.gpus)


class Plan(StrictModel):
    """A list of jobs; ``after`` can name only earlier ones."""

    jobs: Annotated[list[Job], Field(min_length=1)]


def load_plan(path: Path) -> list[Job]:
    """Reads a plan; names become ``PLAN/NAME``.

    Raises:
        ConfigError: It cannot be read, or is not a plan.
    """
    data = parse_yaml(read_text(path, refuse=config_error), path)
    jobs: dict[str, Job] = {}
    for job in validated(Plan, data, path, refuse=config_error).jobs:
        if job.name in jobs:
            raise config_error(path, f"two jobs have the name {job.name!r}: rename one.")
        if job.expected_s > job.limit_s:
            raise config_error(path, f"{job.name}: expected_s is above limit_s: raise limit_s.")
        if unknown := [name for name in job.after if name not in jobs]:
            raise config_error(path, f"{job.name}: no job {unknown[0]!r} is before it.")
        full = {"name": f"{path.stem}/{job.name}", "after": [f"{path.stem}/{n}" for n in job.after]}
        jobs[job.name] = job.model_copy(update=full)
    return list(jobs.values())


def chosen(jobs: Sequence[Job], names: Iterable[str]) -> list[Job]:
    """Returns the jobs with these names: ``PLAN/NAME``, ``PLAN`` or ``NAME``; all without names.

    Raises:
        UnknownNameError: No job has such a name.
    """
    aliases = {job.name: {job.name, *job.name.split("/")} for job in jobs}
    names = list(names)
    for name in names:
        if not any(name in some for some in aliases.values()):
            raise UnknownNameError("job", name, list(aliases))
    return [job for job in jobs if not names or aliases[job.name].intersection(names)]


@dataclasses.dataclass
class Running:
    """A running job, whose processes are a process group."""

    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    ends: float

    @classmethod
    def started(cls, job: Job, out: Path, limit_s: float, *, rehearse: bool) -> Running:
        """Starts a job, whose output goes to a file as it is written."""
        log, command = out / "logs" / f"{job.name}.log", job.command(rehearse=rehearse)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | job.env
        environment |= {"PYTHON": sys.executable, "OUT": str(out)}
        if rehearse or job.gpus is not None:
            gpus = () if rehearse else job.gpus
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus or ()))
        with log.open("ab", buffering=0) as file:
            file.write(f"$ {command}\n".encode())
            process = subprocess.Popen(
                ["bash", "-c", command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        print(f"-- {job.name} begins", flush=True)
        began = time.monotonic()
        return cls(job, process, log, began, began + limit_s)

    def ended(self) -> str | None:
        """Returns how it ended, or kills it at its limit; None while it runs."""
        if self.process.poll() is None:
            if time.monotonic() < self.ends:
                return None
            self.kill()
            return f"killed at its limit of {self.ends - self.began:.0f} s"
        self.kill()  # processes that it left running
        return f"exit status {self.process.returncode}" if self.process.returncode else "ok"

    def kill(self) -> None:
        """Ends its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_plan(
    jobs: Sequence[Job],
    out: Path,
    archive: Path,
    *,
    rehearse: bool = False,
    limit_s: float = float("inf"),
) -> dict[str, str]:
    """Runs jobs, and returns how each ended: ``ok``, or why not.

    Args:
        jobs: In their order.
        out: The folder for results, which exists.
        archive: Where they are packed after each job.
        rehearse: Runs their rehearsals.
        limit_s: For all of them.
    """
    ends = time.monotonic() + limit_s
    names, outcomes = {job.name for job in jobs}, dict[str, str]()
    waiting, running = list(jobs), list[Running]()

    def end(job: Job, outcome: str, seconds: float = 0.0, log: Path | None = None) -> None:
        outcomes[job.name] = outcome
        line = f"== {job.name}: {outcome}, {seconds:.0f} s ({job.expected_s:g} expected)"
        print(line, flush=True)
        if log is not None and outcome != "ok":
            print(*log.read_text(errors="replace").splitlines()[-TAIL_LINES:], sep="\n", flush=True)
        if log is not None:
            with log.open("a") as file:
                file.write(line + "\n")
        pack(out, archive)

    def begin() -> None:
        """Begins the jobs that can begin now, and drops those that never can."""
        before = [one.job for one in running]
        for job in list(waiting):
            left = ends - time.monotonic()
            not_ok = [name for name in job.after if outcomes.get(name, "ok") != "ok"]
            if not_ok or left < job.expected_s:
                waiting.remove(job)
                why = f"{not_ok[0]} is not ok" if not_ok else f"{left:.0f} s are left"
                end(job, f"not begun ({why})")
                continue
            awaited = names.intersection(job.after) - outcomes.keys()
            if not awaited and not any(job.shares_gpus(one) for one in before):
                waiting.remove(job)
                limit = REHEARSAL_S if rehearse else job.limit_s
                running.append(Running.started(job, out, min(limit, left), rehearse=rehearse))
            before.append(job)  # a later job must not take its GPUs first

    try:
        while waiting or running:
            begin()
            time.sleep(POLL_S)
            for one in list(running):
                if outcome := one.ended():
                    running.remove(one)
                    end(one.job, outcome, time.monotonic() - one.began, one.log)
    finally:
        for one in running:
            one.kill()
            end(one.job, "cut short", time.monotonic() - one.began, one.log)
    return outcomes


def pack(out: Path, archive: Path) -> None:
    """Packs all files of a folder into an archive, which replaces the one before."""
    archive = archive.resolve()
    partial = archive.with_name(archive.name + ".part")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(out.rglob("*")):
            if not path.is_file() or path.resolve() in (archive, partial):
                continue
            with suppress(FileNotFoundError):  # a temporary file of a job that runs
                data = path.read_bytes()  # at once: a job may still be writing
                entry = tarfile.TarInfo(str(path.relative_to(out)))
                entry.size, entry.mtime = len(data), path.stat().st_mtime
                tar.addfile(entry, io.BytesIO(data))
    partial.replace(archive)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN")
    parser.add_argument("--out", type=Path, help="the folder for results and logs")
    parser.add_argument("--archive", type=Path, help="default: results.tgz in --out")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="jobs, or plans")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="for all of it")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--list", action="store_true", help="print the jobs, and run none")
    args = parser.parse_args(arguments)
    try:
        jobs = chosen([job for path in args.plans for job in load_plan(path)], args.only)
    except ConfigError as error:
        parser.error(str(error))
    total = sum(job.expected_s for job in jobs)
    print(f"{len(jobs)} jobs, {total:g} s expected one after the other", flush=True)
    if args.list:
        for job in jobs:
            print(f"{job.name}: {job.expected_s:g} s\n    {job.command(rehearse=args.rehearse)}")
        return
    if args.out is None:
        parser.error("--out is missing: name the folder for results and logs.")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    archive = args.archive or out / "results.tgz"
    if args.rehearse:
        from multi_gpu import write_tiny  # imports torch

        os.environ["TINY_MODEL"] = str(out / "rehearsal-model")
        write_tiny(out / "rehearsal-model")
    # A job is ended, and packed, before this ends.
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        outcomes = run_plan(jobs, out, archive, rehearse=args.rehearse, limit_s=args.limit_s)
    finally:
        signal.signal(signal.SIGTERM, handler)
    failed = [name for name, outcome in outcomes.items() if outcome != "ok"]
    sys.exit(f"not ok: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
