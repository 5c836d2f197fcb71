"""Measures ``hotloop serve`` on the wire: latency under load, beside long prompts, and alone.

    python benchmarks/serving.py --out benchmarks/results/h200-serving --docs docs/performance.md

It has these parts, each with a time limit; one engine runs all of them:

    equal  32 concurrent requests must get the tokens that each gets alone
    load   time to the first token (TTFT), time between events (ITL), and tok/s, of 1 to 32
           clients, with prompts of 512 token ids and 256 new tokens. Before each request a client
           pauses for a time drawn from an exponential distribution, so arrivals are a Poisson
           process whose rate is in proportion to the number of clients that wait for no answer
    pause  how long a stream pauses while prompts of four chunks are prefilled, and how long one
           chunk takes
    alone  TTFT, TPOT and ITL of a lone served request, and of ``LLM.stream`` of the same engine,
           alternately

The client (``wire.py``) is this process, on uvloop's event loop. The server is another process,
which runs what ``hotloop serve`` runs. For ``alone`` the client is a thread that blocks on the
socket. Prompts are random and new, so that no prefix of them is in the cache. Decoding is greedy;
weights are random, or those of ``--model``. A file under ``--out`` has the raw samples of a part:
a line that describes it, then a line for each request, in microseconds. Files of an earlier run
remain in the tables; ``--parts`` without a name makes the tables alone.
``--rehearse`` runs them with a tiny model on a CPU: what serving adds to the first token is mostly
the host's work, so that ``--rehearse --parts alone --rounds 20`` shows changes of it without a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import uvloop
from gpu import require_marks, table, write_between
from multi_gpu import write_tiny
from wire import BlockingConnection, Connection, Streamed, WireError, complete

from hotloop import LLM, EngineConfig, SamplingParams
from hotloop.engine.service import Service
from hotloop.engine.setup import served_prefill_chunk
from hotloop.hardware import provenance
from hotloop.serve.lifecycle import HttpServer
from hotloop.serve.settings import ServerSettings

SHAPES = ("llama-3.1-8b",)
SCHEMES = ("int4-g128", "none")
PARTS = ("equal", "load", "pause", "alone")
CLIENTS = (1, 4, 8, 16, 32)

STARTED_S, LIMIT_S = 120.0, 120.0
"""The time limits of an engine's start, and of a part by default."""

LONG_CHUNKS = 4
"""Chunks of the prompts of ``pause``."""

VOCABULARY = (3, 500)
"""Token ids of prompts, which every model has."""

Sample = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The parts of one engine.

    Attributes:
        model: A shape for random weights, else a model.
        engine: Options of ``LLM``.
        parts: The parts to run.
        clients: Numbers of clients at the same time.
        prompt_tokens: Tokens of a prompt.
        new_tokens: New tokens of a request.
        rounds: Requests of each client, or rounds of ``pause`` and ``alone``.
        pause_s: The mean of a client's pause before a request.
        limit_s: The time limit of a part.
    """

    model: str
    engine: dict[str, Any]
    parts: tuple[str, ...] = PARTS
    clients: tuple[int, ...] = CLIENTS
    prompt_tokens: int = 512
    new_tokens: int = 256
    rounds: int = 4
    pause_s: float = 0.25
    limit_s: float = LIMIT_S

    @property
    def name(self) -> str:
        """Suffix of its files' names."""
        return f"{Path(self.model).name}-{self.engine['quant']}"

    @property
    def chunk(self) -> int:
        """Tokens of a chunk of prefill."""
        return self.engine["prefill_chunk"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="a page with marks for the tables of this --out")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--model", help="a model with its own weights, instead of shapes")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--execution", default="auto")
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of a part")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.engine:
        run_engine_process(Job(**json.loads(args.engine)), sys.stdin, sys.stdout)
        return
    begin, end = (f"<!-- tables of {args.out.name}: {which} -->" for which in ("begin", "end"))
    require_marks(parser, args.docs, begin, end)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [rehearsal(args)] if args.rehearse else jobs_of(args) if args.parts else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = provenance(device) if jobs else {}
    # The client's own work should be small beside the server's.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        failed = [name for job in jobs for name in runner.run(run(job, machine, args.out))]
    tables = make_tables(args.out)
    print(tables)
    if args.docs:
        write_between(args.docs, begin, end, tables)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Returns the engines to measure."""
    models = [(args.model, "checkpoint")] if args.model else [(s, "random") for s in args.shapes]
    jobs = []
    for (model, weights), scheme in itertools.product(models, args.schemes):
        engine = {"weights": weights, "quant": scheme, "execution": args.execution}
        chunk = served_prefill_chunk(EngineConfig(model=model))
        engine |= {"prefix_cache": "chunks", "prefill_chunk": chunk}  # as hotloop serve has them
        engine |= {"max_batch_size": max(args.clients), "max_seq_len": 2560}
        common = {"parts": tuple(args.parts), "clients": tuple(args.clients)}
        common |= {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
        common |= {"rounds": args.rounds, "limit_s": args.limit_s}
        jobs.append(Job(model=model, engine=engine, **common))
    return jobs


def rehearsal(args: argparse.Namespace) -> Job:
    """Returns small measurements."""
    model = args.out / "rehearsal-model"
    write_tiny(model)
    engine = {"weights": "random", "quant": "int4-g64", "execution": "eager", "device": "cpu"}
    engine |= {"prefix_cache": "chunks", "prefill_chunk": 16}
    engine |= {"max_batch_size": 3, "max_seq_len": 128}
    sizes: dict[str, Any] = {"clients": (1, 3), "prompt_tokens": 20, "new_tokens": 24}
    sizes |= {"parts": tuple(args.parts), "rounds": args.rounds}
    return Job(model=str(model), engine=engine, pause_s=0.01, **sizes)


async def run(job: Job, machine: dict[str, Any], out: Path) -> list[str]:
    """Runs the parts of an engine, and writes a file of the samples of each.

    Returns:
        The names of those that failed. The part after one that failed has a new engine.
    """
    failed, parts = [], list(job.parts)
    while parts:
        async with Engine.started(job) as engine:
            while parts:
                part = parts.pop(0)
                name, started = f"{part}-{job.name}", time.perf_counter()
                try:
                    async with asyncio.timeout(job.limit_s):
                        samples = await RUNNERS[part](job, engine)
                except (WireError, OSError, EOFError, TimeoutError) as error:
                    print(name, "failed:", repr(error), file=sys.stderr, flush=True)
                    failed.append(name)
                    break
                described = dataclasses.asdict(job) | {"part": part}
                lines = [{"job": described, "provenance": machine}, *samples]
                text = "\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
                (out / f"{name}.jsonl").write_text(text + "\n")
                print(name, f"{time.perf_counter() - started:.0f} s", flush=True)
    return failed


# The process of the engine.


def run_engine_process(job: Job, commands: TextIO, answers: TextIO) -> None:
    """Loads an engine, then runs the commands that arrive, a line of JSON each.

    ``"serve"`` starts a server and answers with its URL; ``"stop"`` ends it. Any other command is a
    prompt, a list of token ids, which ``LLM.stream`` answers; the reply has its timing.
    """

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    with LLM(job.model, **job.engine) as llm:
        say("loaded")
        lines = iter(commands)
        for line in lines:
            command = json.loads(line)
            if command != "serve":
                params = SamplingParams(max_new_tokens=job.new_tokens, ignore_eos=True)
                pieces = [(time.perf_counter(), delta) for delta in llm.stream([command], params)]
                answer = pieces[-1][1].generation
                assert answer is not None, "the last piece has the generation"
                gaps = [us(b - a) for (a, _), (b, _) in itertools.pairwise(pieces)]
                timing = answer.timing
                say([timing.ttft_s, timing.tpot_s, list(answer.token_ids), gaps])
                continue
            with HttpServer(ServerSettings(port=0)) as server:
                with Service(llm, loop=server.loop) as service:
                    server.attach(service)
                    gc.freeze()  # as hotloop serve does
                    say(server.url)
                    next(lines)  # stop
                    server.close()
                captured = service.state().n_captured
            say({"captured": captured})


class Engine:
    """The process of an engine, seen from the benchmark's process.

    Attributes:
        url: The base URL of its server, while it serves.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.url = ""

    @classmethod
    @asynccontextmanager
    async def started(cls, job: Job) -> AsyncGenerator[Engine]:
        """Starts a process and waits until its engine has loaded; kills it after the block."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            *("--out", ".", "--engine", json.dumps(dataclasses.asdict(job))),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**24,
        )
        try:
            engine = cls(process)
            async with asyncio.timeout(STARTED_S):
                await engine._answer()
            yield engine
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def ask(self, command: Any) -> Any:
        """Sends a command; returns the reply."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()
        return await self._answer()

    async def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise EOFError("the engine's process has ended; its error is above")
        return json.loads(line)

    async def serve(self) -> None:
        """Starts its server."""
        self.url = f"{await self.ask('serve')}/v1"

    async def stop(self) -> None:
        """Ends its server.

        Raises:
            WireError: It captured programs while it served, which warm-up should have done.
        """
        captured = (await self.ask("stop"))["captured"]
        if captured:
            raise WireError(f"{captured} programs were captured while the engine served")


# The parts.


async def equal(job: Job, engine: Engine) -> list[Sample]:
    """Compares the tokens of concurrent requests with those of each request alone.

    Raises:
        WireError: They differ.
    """
    n, random_ = max(job.clients), random.Random("equal")
    prompts = [prompt(job.prompt_tokens + i % 7 * 5, random_) for i in range(n)]
    await engine.serve()
    connections = [await Connection.open(engine.url) for _ in range(n)]

    async def ask(i: int) -> tuple[int, ...]:
        answer = await complete(connections[i], engine.url, prompts[i], job.new_tokens // 4)
        return answer.token_ids

    alone = [await ask(i) for i in range(n)]
    together = await asyncio.gather(*(ask(i) for i in range(n)))
    await engine.stop()
    different = [i for i in range(n) if together[i] != alone[i]]
    if different:
        raise WireError(f"of {n} requests at once, {len(different)} got other tokens than alone")
    return [{"n": n, "equal": n}]


async def load(job: Job, engine: Engine) -> list[Sample]:
    """Measures requests for each number of concurrent clients."""
    await engine.serve()
    samples = []
    for n in job.clients:
        samples += await run_clients(job, engine, n)
        print(job.name, n, "clients", file=sys.stderr, flush=True)
    await engine.stop()
    return samples


async def run_clients(job: Job, engine: Engine, n: int) -> list[Sample]:
    """Runs ``n`` concurrent clients until enough requests have been made.

    Two requests before them warm up, and are in no sample.
    """
    tickets = iter(range(max(24, job.rounds * n) if job.rounds > 2 else job.rounds * n))
    found: list[tuple[int, Streamed]] = []

    async def client(i: int) -> None:
        random_ = random.Random(f"{n} {i}")
        connection = await Connection.open(engine.url)
        for ticket in tickets:
            await asyncio.sleep(random_.expovariate(1 / job.pause_s))
            ids = prompt(job.prompt_tokens, random_)
            found.append((ticket, await complete(connection, engine.url, ids, job.new_tokens)))
        connection.close()

    connection = await Connection.open(engine.url)
    for i in range(2):
        ids = prompt(job.prompt_tokens, random.Random(f"{n} {i} first"))
        await complete(connection, engine.url, ids, 8)
    connection.close()
    begin_s = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(n)))
    return [
        {"clients": n, "request": ticket} | as_sample(answer, begin_s)
        for ticket, answer in sorted(found, key=lambda one: one[0])
    ]


async def pause(job: Job, engine: Engine) -> list[Sample]:
    """Measures a stream while long prompts are prefilled, and the time of one chunk.

    In a round, a prompt of one chunk and one of several are answered alone. Then a stream begins,
    and prompts of several chunks arrive one after the other until it ends.
    """
    await engine.serve()
    random_ = random.Random("pause")
    stream, other = [await Connection.open(engine.url) for _ in range(2)]
    samples = []
    for i in range(job.rounds + 1):
        one, several = [
            await complete(other, engine.url, prompt(n * job.chunk, random_), 2)
            for n in (1, LONG_CHUNKS)
        ]
        ids = prompt(5, random_)
        decoding = asyncio.create_task(complete(stream, engine.url, ids, job.new_tokens))
        beside = []
        while not decoding.done():
            await asyncio.sleep(0.005)
            ids = prompt(LONG_CHUNKS * job.chunk, random_)
            beside.append(await complete(other, engine.url, ids, 2))
        answer = await decoding
        if i == 0:
            continue  # warms up
        samples.append(
            as_sample(answer, answer.sent_s)
            | {
                "one_us": us(one.ttft_s),
                "several_us": us(several.ttft_s),
                "beside_us": [us(each.ttft_s) for each in beside],
            }
        )
    await engine.stop()
    return samples


async def alone(job: Job, engine: Engine) -> list[Sample]:
    """Measures an engine that generates and serves prompts alternately.

    In the first round both get the same prompt, and must answer with the same tokens. This round is
    in no sample, since the second of them can find the prompt in the prefix cache.

    Raises:
        WireError: The tokens of that round differ.
    """
    samples = []
    for i in range(3 * job.rounds + 1):
        generated, first, served = (
            prompt(job.prompt_tokens, random.Random(f"alone {i} {each}")) for each in range(3)
        )
        if i == 0:
            served = generated
        sample: Sample = {}
        for way in ("generate", "serve") if i % 2 else ("serve", "generate"):
            if way == "generate":
                ttft_s, tpot_s, ids, gaps = await engine.ask(generated)
                sample |= {"generate_ttft_us": us(ttft_s), "generate_tpot_ns": round(1e9 * tpot_s)}
                sample["generate_gaps_us"] = gaps
                continue
            await engine.serve()
            answer = await asyncio.to_thread(served_alone, job, engine.url, first, served)
            await engine.stop()
            sample |= as_sample(answer, answer.sent_s)
            sample["serve_tpot_ns"] = round(1e9 * answer.tpot_s)
        if i == 0 and tuple(ids) != answer.token_ids:
            raise WireError("a served answer differs from that of generate")
        if i:
            samples.append(sample)
    return samples


def served_alone(job: Job, url: str, first: list[int], ids: list[int]) -> Streamed:
    """Sends a prompt over a new connection, after a short request that warms the connection up."""
    connection = BlockingConnection(url, job.limit_s)
    try:
        connection.complete(url, first, 2 * LONG_CHUNKS)
        return connection.complete(url, ids, job.new_tokens)
    finally:
        connection.close()


RUNNERS = {"equal": equal, "load": load, "pause": pause, "alone": alone}


def prompt(n: int, random_: random.Random) -> list[int]:
    return [random_.randrange(*VOCABULARY) for _ in range(n)]


def us(seconds: float) -> int:
    return round(1e6 * seconds)


def as_sample(answer: Streamed, begin_s: float) -> Sample:
    """Returns when a request was sent, its TTFT, and the gaps and tokens of its pieces."""
    tokens = [piece.n_tokens for piece in answer.pieces]
    return {
        "sent_us": us(answer.sent_s - begin_s),
        "ttft_us": us(answer.ttft_s),
        "gaps_us": [us(gap) for gap in answer.gaps_s],
        "tokens": 1 if set(tokens) == {1} else tokens,
    }


# The tables.


def make_tables(out: Path) -> str:
    """Makes a table of each part but ``equal``."""
    found = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.glob("*.jsonl"))
    ]
    makers = {"load": load_table, "pause": pause_table, "alone": alone_table}
    of = {
        part: sorted((f for f in found if f[0]["job"]["part"] == part), key=sort_key)
        for part in makers
    }
    return "\n".join(filter(None, (make(of[part]) for part, make in makers.items())))


def load_table(found: Iterable[Sequence[Sample]]) -> str:
    """Makes the table of ``load``: a row for each number of clients."""
    head = ("model", "scheme", "clients", "requests", "TTFT p50 (ms)", "TTFT p99 (ms)",
            "ITL p50 (ms)", "ITL p99 (ms)", "tokens per piece",
            "tok/s, pauses included")  # fmt: skip
    rows = []
    for header, *samples in found:
        for n in dict.fromkeys(sample["clients"] for sample in samples):
            of_clients = [sample for sample in samples if sample["clients"] == n]
            gaps = [gap for sample in of_clients for gap in sample["gaps_us"]]
            pieces = sum(1 + len(sample["gaps_us"]) for sample in of_clients)
            tokens = len(of_clients) * header["job"]["new_tokens"]
            rows.append(
                (
                    *names(header),
                    str(n),
                    str(len(of_clients)),
                    *quantiles_ms([sample["ttft_us"] for sample in of_clients]),
                    *quantiles_ms(gaps),
                    f"{tokens / pieces:.2f}",
                    f"{tok_s(of_clients):,.0f}",
                )
            )
    return table(head, rows, texts=2)


def tok_s(samples: Iterable[Sample]) -> float:
    """Returns tokens per second of all clients, between the sending of the first and last request.

    The clients' pauses are part of that time. Later some clients have no more requests to send.
    """
    arrivals, sent = [], []
    for sample in samples:
        times = sample["sent_us"] + np.cumsum([sample["ttft_us"], *sample["gaps_us"]])
        tokens = np.broadcast_to(sample["tokens"], times.shape)
        arrivals.append((times, tokens))
        sent.append(sample["sent_us"])
    begin, end = min(sent), max(sent)
    if end == begin:
        end = max(times[-1] for times, _ in arrivals)
    counted = sum(int(tokens[times <= end].sum()) for times, tokens in arrivals)
    return 1e6 * counted / (end - begin)


def pause_table(found: Iterable[Sequence[Sample]]) -> str:
    """Makes the table of ``pause``: medians, and the longest pause."""
    head = ("model", "scheme", "one chunk of prefill (ms)", "ITL p50 (ms)",
            "longest pause beside long prompts (ms)", "chunks beside a stream")  # fmt: skip
    rows = []
    for header, *samples in found:
        chunk = [(s["several_us"] - s["one_us"]) / (LONG_CHUNKS - 1) for s in samples]
        gaps = [gap for sample in samples for gap in sample["gaps_us"]]
        beside = LONG_CHUNKS * sum(len(sample["beside_us"]) for sample in samples)
        figures = (statistics.median(chunk), statistics.median(gaps), max(gaps))
        rows.append((*names(header), *(f"{figure / 1e3:.2f}" for figure in figures), str(beside)))
    return table(head, rows, texts=2)


def alone_table(found: Iterable[Sequence[Sample]]) -> str:
    """Makes the table of ``alone``: medians over rounds."""
    head = ("model", "scheme", "TPOT, generate (ms)", "TPOT, served (ms)", "ratio in a round",
            "TTFT, generate (ms)", "TTFT, served (ms)", "difference in a round (ms)",
            "ITL p99 / median, generate", "ITL p99 / median, served")  # fmt: skip
    rows = []
    for header, *samples in found:
        here, there = ([s[f"{way}_tpot_ns"] for s in samples] for way in ("generate", "serve"))
        first, served = ([s[field] for s in samples] for field in ("generate_ttft_us", "ttft_us"))
        ratio = statistics.median(b / a for a, b in zip(here, there, strict=True))
        later = statistics.median(b - a for a, b in zip(first, served, strict=True))
        rows.append(
            (
                *names(header),
                f"{statistics.median(here) / 1e6:.3f}",
                f"{statistics.median(there) / 1e6:.3f}",
                f"{ratio:.4f}",
                f"{statistics.median(first) / 1e3:.2f}",
                f"{statistics.median(served) / 1e3:.2f}",
                f"{later / 1e3:.2f}",
                *(tail(samples, field) for field in ("generate_gaps_us", "gaps_us")),
            )
        )
    return table(head, rows, texts=2)


def names(header: Sample) -> tuple[str, str]:
    return Path(header["job"]["model"]).name, header["job"]["engine"]["quant"]


def sort_key(found: Sequence[Sample]) -> tuple[str, int]:
    """Returns the sort key of a file: its model, then its scheme in the order of ``SCHEMES``."""
    model, scheme = names(found[0])
    return model, SCHEMES.index(scheme) if scheme in SCHEMES else len(SCHEMES)


def tail(samples: Iterable[Sample], field: str) -> str:
    """Returns the 99th percentile of gaps over their median; files of older versions lack gaps."""
    gaps = [gap for sample in samples for gap in sample.get(field, ())]
    if not gaps:
        return "–"
    middle, high = np.quantile(gaps, [0.5, 0.99])
    return f"{high / middle:.2f}" if middle else "–"


def quantiles_ms(values_us: Sequence[float]) -> tuple[str, str]:
    """Returns the median and the 99th percentile, in milliseconds."""
    middle, high = np.quantile(values_us, [0.5, 0.99]) / 1e3
    return f"{middle:.2f}", f"{high:.2f}"


if __name__ == "__main__":
    main()
