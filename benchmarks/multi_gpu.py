"""Measures several GPUs: correctness, decode speed, and the cost of all-reduces.

    python benchmarks/multi_gpu.py --out benchmarks/results/multi-gpu --docs docs/performance.md

Each section runs in a process of its own, and consists of items that have time limits:

    correct  tests (pytest): greedy tokens of several ranks equal one rank's, in float32 and
             bfloat16, also of SmolLM2 if it is pulled; drafts with several ranks; collectives
    kill     tests (pytest): if a rank is killed while generating, all processes end
    speed    the cells without drafts of recipes/asclepius-13b.yaml and recipes/llama-2-70b.yaml,
             with random weights, in `fused` and `compile`, on symmetric memory and on NCCL
    share    the share of all-reduces in a step's time (rank_steps.py)
    drafts   the cells with a 13B draft model: whether they finish, and the parts of their time

Items that fail are named at the end. ``--limit-s`` stops between items, and ``--resume`` runs the
missing and failed ones in the same folder. ``--rehearse`` runs everything with a tiny model and two
ranks on a CPU, without `fused`.

A folder holds a JSON file for each section, and records (``hotloop report FOLDER``) in ``speed/``
and ``drafts/``. NVLink multicast is as the environment sets it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu import median, percent, require_marks, write_between
from gpu import speed as speed_of

from hotloop.bench.record import MEASURED, Record, Status
from hotloop.report.read import latest, read_records
from hotloop.sweep.events import CellPhase, Event
from hotloop.sweep.recipe import Recipe, expand, load_recipe, recipe_from_flags, replace_models
from hotloop.sweep.runner import run_sweep
from hotloop.sweep.store import RECORDS, append
from hotloop.types import OWN_ENGINE, EngineConfig

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- multi-gpu table: begin -->", "<!-- multi-gpu table: end -->"
RECIPES = ("asclepius-13b", "llama-2-70b")
SIZES = (1, 2, 4, 8)

TESTS_S = 400.0
"""The time limit of tests of one kind."""

ENOUGH_S = 45.0
"""The least time left, in seconds, with which an item is begun."""

GRACE_S = 20.0
"""Time for a section to end after its last item's limit."""

CUT_SHORT = 3
"""The exit status of a section that has items left."""

TESTS = {
    "float32": "float32_greedy",
    "bfloat16": "bfloat16_greedy",
    "trained": "trained_model",
    "samples": "samples",
    "drafts": "draft_beside",
}
"""Parts of the names of tests in ``test_engine_ranks_gpu.py``, which run one after the other."""

ANSWERED: tuple[Status, ...] = (*MEASURED, "oom", "predicted-oom")
"""Statuses of a successful cell; ``unsupported`` is a failure here."""

MULTICAST = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of measurements.

    Attributes:
        recipes: The recipes whose schemes, tensor-parallel degrees and drafts are measured.
        executions: Execution modes. This list and the others begin with what matters most.
        sizes: Numbers of ranks, 1 among them, of which there are devices.
        all_reduces: The all-reduce backends of several ranks.
        device: As in ``EngineConfig``.
        rounds: See ``rank_steps.Job``.
        steps: See ``rank_steps.Job``.
        cell_s: Seconds that a cell may take, loading and compiling included.
    """

    recipes: tuple[Recipe, ...]
    executions: tuple[str, ...]
    sizes: tuple[int, ...]
    all_reduces: tuple[str, ...]
    device: str
    rounds: int = 5
    steps: int = 60
    cell_s: float = 240.0


@dataclasses.dataclass(frozen=True)
class Item:
    """One measurement. Its result is stored under its key; if it is ``ok``, ``--resume`` skips it.

    Attributes:
        key: Its name.
        limit_s: Its time limit.
        run: Runs it within the given number of seconds; returns the result, with ``ok``.
    """

    key: str
    limit_s: float
    run: Callable[[float], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="a page with the table's marks in it")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--executions", nargs="+", help="instead of fused and compile")
    parser.add_argument("--sizes", nargs="+", type=int, help="numbers of ranks, 1 among them")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="for all of it")
    parser.add_argument("--resume", action="store_true", help="run only what is missing")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    require_marks(parser, args.docs, BEGIN, END)
    ends = time.monotonic() + args.limit_s
    plan = make_plan(args.rehearse, args.out, args.executions, args.sizes)
    if args.section:
        sys.exit(run_section(args.section, plan, args.out, ends))
    if not args.resume and any(args.out.glob("*.json")):
        sys.exit(f"{args.out} has results: use --resume, or choose another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")
    passed_on = ["--out", str(args.out), *["--rehearse"] * args.rehearse]
    for name in ("executions", "sizes"):
        if values := getattr(args, name):
            passed_on += [f"--{name}", *map(str, values)]
    ended = {name: start(name, passed_on, ends) for name in args.only}
    table = make_table(args.out)
    print(table)
    if args.docs:
        write_between(args.docs, BEGIN, END, table)
    for how in ("unfinished", "FAILED"):
        if names := [name for name, status in ended.items() if status == how]:
            print(f"{how}: {', '.join(names)}; again with --resume", flush=True)
    sys.exit(any(status != "ok" for status in ended.values()))


def make_plan(
    rehearse: bool, out: Path, executions: Sequence[str] | None, sizes: Sequence[int] | None
) -> Plan:
    if rehearse:
        return rehearsal(out)
    import torch

    found = torch.cuda.device_count()
    if found < 2:
        sys.exit(f"needs 2 GPUs or more, found {found}: --rehearse does all of it on a CPU")
    return Plan(
        recipes=tuple(load_recipe(ROOT / "recipes" / f"{name}.yaml") for name in RECIPES),
        executions=tuple(executions or ("fused", "compile")),
        sizes=tuple(n for n in sizes or SIZES if n <= found),
        all_reduces=("symm_mem", "nccl"),
        device="cuda",
    )


def rehearsal(out: Path) -> Plan:
    """Makes a small plan with the same kinds of items."""
    model = out / "rehearsal-model"
    write_tiny(model)
    recipe = recipe_from_flags(
        str(model),
        matrix={"quant": ["int4-g64"], "tensor_parallel": [1, 2], "draft": ["none", str(model)]},
        defaults={"draft_quant": "int8"},
        workload={"prompt_tokens": 5, "new_tokens": 16, "repeats": 3},
        quality=False,
        weights="random",
        name="rehearsal",
    )
    return Plan(
        recipes=(recipe,),
        executions=("eager", "compile"),
        sizes=(1, 2),
        all_reduces=("auto",),
        device="cpu",
        rounds=3,
        steps=8,
    )


def write_tiny(folder: Path) -> None:
    """Writes a tiny model of zeros; users of it read only the sizes of its weights."""
    import torch
    from safetensors.torch import save_file

    from hotloop.models import names
    from hotloop.models.families import read_config

    shape = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps(shape))
    sizes = names.tensors(read_config(shape, config))
    tensors = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in sizes.items()}
    save_file(tensors, folder / "model.safetensors")


def machine() -> dict[str, Any]:
    """Returns the provenance, and whether NVLink multicast was on."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__}
    found["environment"] = {name: os.environ.get(name) for name in MULTICAST}
    if torch.cuda.device_count():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        # torch would hold memory of the first GPU for as long as this process runs.
        for what, options in (
            ("devices", ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")),
            ("topology", ("topo", "-m")),
        ):
            command = ["nvidia-smi", *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found[what] = done.stdout.splitlines()
    return found


# Sections.


def start(section: str, passed_on: list[str], ends: float) -> str:
    """Runs a section in a process of its own; returns ``ok``, ``unfinished`` or ``FAILED``."""
    left = ends - time.monotonic()
    command = [sys.executable, __file__, "--section", section, *passed_on]
    command += [f"--limit-s={left}"]
    started = time.monotonic()
    try:
        limit = left + GRACE_S if left < float("inf") else None
        status = subprocess.run(command, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        status = CUT_SHORT
    outcome = {0: "ok", CUT_SHORT: "unfinished"}.get(status, "FAILED")
    print(f"== {section}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)
    return outcome


def run_section(name: str, plan: Plan, out: Path, ends: float) -> int:
    """Runs the items that are not done, while time is left; returns the exit status."""
    print(f"== {name}", flush=True)
    file = out / f"{name}.json"
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    failed = cut_short = False
    for item in SECTIONS[name](plan, out):
        if rows.get(item.key, {}).get("ok"):
            continue
        started = time.monotonic()
        if ends - started < ENOUGH_S:
            cut_short = True
            break
        limit_s = min(item.limit_s, ends - started)
        try:
            row = item.run(limit_s)
        except Exception as error:
            row = {"ok": False, "error": f"{type(error).__name__}: {error}"[-2000:]}
        seconds = time.monotonic() - started
        if not row["ok"] and limit_s < item.limit_s and seconds >= limit_s:
            cut_short = True  # not a failure: it was given less than its limit
            break
        rows[item.key] = {**row, "seconds": round(seconds, 1)}
        file.write_text(json.dumps(rows, indent=1) + "\n")
        failed = failed or not row["ok"]
        print(f"{item.key}: {'ok' if row['ok'] else f'FAILED {row}'}, {seconds:.0f} s", flush=True)
    if failed:
        return 1
    return CUT_SHORT if cut_short else 0


def correct(plan: Plan, out: Path) -> Iterator[Item]:
    """Yields the tests for each number of ranks, and those of collectives by themselves."""
    del out
    tests = "tests/engine/test_engine_ranks_gpu.py"
    for n in plan.sizes[1:]:
        for what, words in TESTS.items():
            yield pytest_item(plan, f"tp{n}/{what}", [tests, "-k", f"{words} and tp{n}"])
    if plan.device == "cuda":
        yield pytest_item(plan, "sums", ["tests/parallel/test_collectives_gpu.py"])


def kill(plan: Plan, out: Path) -> Iterator[Item]:
    del out
    tests = "tests/engine/test_engine_ranks_gpu.py"
    for n in plan.sizes[1:]:
        yield pytest_item(plan, f"tp{n}", [tests, "-k", f"killed and tp{n}"])


def pytest_item(plan: Plan, key: str, arguments: list[str]) -> Item:
    def run(limit_s: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", *arguments, f"--junitxml={report}"]
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "RANKS_ON": plan.device},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit_s,
                check=False,
            )
            if not report.exists():
                return {"ok": False, "error": done.stdout[-2000:]}
            return results_of(report.read_text())

    return Item(key, TESTS_S, run)


def results_of(junit: str) -> dict[str, Any]:
    """Counts results of tests in a JUnit report; no test at all is a failure."""
    passed, failed, skipped = 0, {}, {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = case.get("name", "")
        if (skip := case.find("skipped")) is not None:
            skipped[name] = skip.get("message", "")
        elif (bad := next((b for b in case if b.tag in ("failure", "error")), None)) is not None:
            failed[name] = f"{bad.get('message', '')}\n{(bad.text or '')[-1500:]}"
        else:
            passed += 1
    ok = not failed and passed > 0
    return {"ok": ok, "passed": passed, "failed": failed, "skipped": skipped}


def speed(plan: Plan, out: Path) -> Iterator[Item]:
    """Yields the cells without drafts."""
    for recipe, config in cells(plan, drafts=False):
        yield cell_item(plan, recipe, config, out / "speed")


def drafts(plan: Plan, out: Path) -> Iterator[Item]:
    """Yields the cells with drafts, by both policies: random weights draft only if ``always``."""
    for recipe, config in cells(plan, drafts=True):
        for policy in ("always", "adaptive"):
            drafted = dataclasses.replace(config, draft_policy=policy)
            yield cell_item(plan, recipe, drafted, out / "drafts")


def cells(plan: Plan, *, drafts: bool) -> list[tuple[Recipe, EngineConfig]]:
    """Returns the cells of the plan's recipes, in the plan's executions and all-reduce backends.

    Cells with drafts use only the first backend.
    """
    found: dict[EngineConfig, tuple[Any, Recipe]] = {}
    for recipe in plan.recipes:
        for given in expand(replace_models(recipe, weights="random")):
            if (given.draft != "none") != drafts or given.tensor_parallel not in plan.sizes:
                continue
            if given.engine != OWN_ENGINE:
                continue
            for i, execution in enumerate(plan.executions):
                backends = plan.all_reduces[: 1 if drafts else None]
                for j, backend in enumerate(backends if given.tensor_parallel > 1 else ("auto",)):
                    config = dataclasses.replace(
                        given,
                        execution=execution,
                        all_reduce=backend,
                        device=plan.device,
                    )
                    order = (i, j, given.quant == "int8", given.tensor_parallel)
                    found.setdefault(config, (order, recipe))
    in_order = sorted(found, key=lambda config: found[config][0])
    return [(found[config][1], config) for config in in_order]


def cell_item(plan: Plan, recipe: Recipe, config: EngineConfig, out: Path) -> Item:
    """Runs a cell as a sweep of its own, and appends its records to those of its recipe."""
    levers = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default and field.name not in ("model", "weights")
    }
    folder = out / recipe.name

    def say(event: Event) -> None:
        if isinstance(event, CellPhase) and not event.done:
            print(f"  {event.cell}: {event.phase}", file=sys.stderr, flush=True)

    def run(limit_s: float) -> dict[str, Any]:
        alone = recipe_from_flags(
            config.model,
            matrix={},
            defaults=levers,
            workload=recipe.workload.model_dump(),
            quality=False,
            weights="random",
            name=recipe.name,
            timeout_s=limit_s,
        )
        with tempfile.TemporaryDirectory() as scratch:  # a record has the end of its log
            (record,) = run_sweep(alone, Path(scratch), on_event=say)
        folder.mkdir(parents=True, exist_ok=True)
        append(folder / RECORDS, record)
        row: dict[str, Any] = {"ok": record.status in ANSWERED, "status": record.status}
        if record.decode_tok_s:
            row["decode_tok_s"] = record.decode_tok_s.mean
        if record.speculation:
            shares = ("draft_share", "verify_share", "off_share")
            row |= {name: getattr(record.speculation, name) for name in shares}
        return row if record.reason is None else row | {"reason": record.reason}

    return Item(f"{recipe.name}/{config.name}", plan.cell_s, run)


def share(plan: Plan, out: Path) -> Iterator[Item]:
    """Yields the measurements of all-reduces, for the int4 cells of several ranks."""
    del out
    for recipe, config in cells(plan, drafts=False):
        if config.tensor_parallel > 1 and config.quant.startswith("int4"):
            yield Item(f"{recipe.name}/{config.name}", plan.cell_s, steps_of(plan, config))


def steps_of(plan: Plan, config: EngineConfig) -> Callable[[float], dict[str, Any]]:
    fields = config.to_dict()
    del fields["max_seq_len"]  # rank_steps.Job computes it from the number of steps
    job = json.dumps({"config": fields, "rounds": plan.rounds, "steps": plan.steps})

    def run(limit_s: float) -> dict[str, Any]:
        from hotloop.parallel.rendezvous import serve_store

        _store, address = serve_store()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            program = [sys.executable, str(Path(__file__).with_name("rank_steps.py"))]
            ranks = [
                subprocess.Popen(
                    [*program, str(rank), str(address.port), job, str(out)],
                    env={"GLOO_SOCKET_IFNAME": "lo", **os.environ},
                    stdout=subprocess.DEVNULL,
                    stderr=(Path(folder) / f"rank{rank}.log").open("w"),
                )
                for rank in range(config.tensor_parallel)
            ]
            try:
                wait_for_all(ranks, limit_s)
                steps = json.loads(out.read_text())
            except Exception as error:
                logs = [
                    f"rank {r}: ...{(Path(folder) / f'rank{r}.log').read_text()[-600:]}"
                    for r in range(len(ranks))
                ]
                raise RuntimeError("\n".join([repr(error), *logs])) from error
            finally:
                for rank in ranks:
                    rank.kill()
                    rank.wait()
        whole, rest = (median(steps[way]) for way in ("step_ms", "without_sums_ms"))
        return {"ok": True, "share": 1 - rest / whole, **steps}

    return run


def wait_for_all(processes: Iterable[subprocess.Popen[Any]], limit_s: float) -> None:
    """Waits until all processes succeed.

    If one fails, the others could wait for it forever.

    Raises:
        RuntimeError: One failed.
        TimeoutError: They took longer than ``limit_s``.
    """
    waiting, ends = list(processes), time.monotonic() + limit_s
    while waiting:
        if time.monotonic() > ends:
            raise TimeoutError(f"ranks took longer than {limit_s:g} s")
        for process in waiting:
            if process.poll():
                raise RuntimeError(f"a rank ended with status {process.returncode}")
        waiting = [process for process in waiting if process.poll() is None]
        time.sleep(0.05)


SECTIONS: dict[str, Callable[[Plan, Path], Iterator[Item]]] = {
    "correct": correct,
    "kill": kill,
    "speed": speed,
    "share": share,
    "drafts": drafts,
}


# The table.


def make_table(out: Path) -> str:
    """Makes the table of all cells: speed, scaling, and share of all-reduces."""
    titles = (
        "shape, scheme, execution, GPUs, all-reduce backend, draft, decode tok/s, gain, "
        "efficiency, all-reduce share"
    )
    lines = [
        f"| {titles.replace(', ', ' | ')} |",
        "|---|---|---|---:|---|---|---:|---:|---:|---:|",
    ]
    file = out / "share.json"
    shares = json.loads(file.read_text()) if file.exists() else {}
    for section in ("speed", "drafts"):
        for records in sorted((out / section).glob(f"*/{RECORDS}")):
            lines += table_lines(records.parent.name, latest(read_records(records)), shares)
    return "\n".join(lines) + "\n"


def table_lines(
    recipe: str, records: Sequence[Record], shares: dict[str, dict[str, Any]]
) -> list[str]:
    """Makes the rows of one recipe, in order; ``shares`` are by recipe and configuration."""
    alone = {
        all_but_ranks(record): record.decode_tok_s.mean
        for record in records
        if ranks(record) == 1 and record.decode_tok_s
    }
    lines = []

    def order(record: Record) -> tuple[Any, ...]:
        return all_but_ranks(record), ranks(record), record.config["all_reduce"]

    for record in sorted(records, key=order):
        config = EngineConfig(**record.config)
        scheme, execution = config.quant, config.execution
        used = (record.engine or {}).get("kernels", {}).get("all_reduce", config.all_reduce)
        backend = used.removeprefix("all_reduce/") if ranks(record) > 1 else "–"
        draft = config.draft_name if config.draft != "none" else "–"
        shape = Path(config.model).name
        cells = [shape, scheme, execution, str(ranks(record)), backend, draft]
        if record.status not in MEASURED or record.decode_tok_s is None:
            lines.append(f"| {' | '.join([*cells, record.status, '', '', ''])} |")
            continue
        cells.append(speed_of(record))
        n, one = ranks(record), alone.get(all_but_ranks(record))
        if n > 1 and one is not None:
            gain = record.decode_tok_s.mean / one
            cells += [f"{gain:.2f}", percent(gain / n)]
        else:
            cells += ["–", "–"]
        measured = shares.get(f"{recipe}/{config.name}", {}).get("share")
        cells.append("–" if measured is None else percent(measured))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def all_but_ranks(record: Record) -> tuple[str, ...]:
    """Returns the levers that a cell on several GPUs shares with the cell on one."""
    names = ("quant", "execution", "draft", "draft_quant", "draft_policy")
    return tuple(record.config[name] for name in names)


def ranks(record: Record) -> int:
    return record.config["tensor_parallel"]


if __name__ == "__main__":
    main()
