"""Compares decode speed, and the tokens, with and without a patch.

    python benchmarks/patched.py PATCH --out FOLDER --cells llama-2-13b/int4-g128 --rows 1 8

A patch is the output of ``git diff``. Its changes to ``src/`` and ``tests/`` are applied to a copy
of the repository. First ``--check`` runs some of the copy's tests. Then each cell is run by the
repository's code and by the copy's, each time in a process of its own, alternately on the same
device: without, with, without, with. Weights are random; decoding is greedy, with prompts of 5
tokens and 200 new tokens. The result is written after every process as JSON. ``--rehearse`` runs
everything with a tiny model on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu import median, run, table
from multi_gpu import write_tiny

ROOT = Path(__file__).parent.parent
COPIED = ("src", "tests", "pyproject.toml")

LIMIT_S, TESTS_LIMIT_S = 150.0, 350.0
"""The time limits of a process that measures, and of the tests."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("patch", type=Path, help="as git diff makes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", default=["llama-3.1-8b/int4-g128"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="sequences at once")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--check", default="", help="arguments of pytest, in the patched copy")
    parser.add_argument("--pairs", type=int, default=2, help="processes of each kind")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of a process")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--limit-s", type=float, default=1e9, help="after that no pair is begun")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker:
        args.out.joinpath("worker.json").write_text(json.dumps(measure(**json.loads(args.worker))))
        return
    if args.rehearse:
        write_tiny(args.out / "rehearsal-model")
        args.cells = [f"{args.out / 'rehearsal-model'}/int4-g64"]
    began = time.perf_counter()
    found: list[dict[str, Any]] = []
    failed = False
    path = args.out / f"{args.patch.stem}-tp{args.tp}.json"
    with tempfile.TemporaryDirectory() as folder:
        patched = copy_with(args.patch, Path(folder))
        if args.check:
            pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            where = ["env", "--chdir", str(patched), importing_from(patched / "src")]
            if not run([*where, *pytest, *shlex.split(args.check)], TESTS_LIMIT_S):
                sys.exit(f"tests of {args.patch.name} failed: {args.check}")
        for pair in range(args.pairs):
            for cell in args.cells:
                if time.perf_counter() - began > args.limit_s:
                    continue
                for name, root in (("without", ROOT), ("with", patched)):
                    result = in_process(args, cell, root / "src")
                    failed |= result is None
                    found += [{"cell": cell, "patch": name, "pair": pair, **(result or {})}]
                    path.write_text(json.dumps(found, indent=1) + "\n")
    print(make_table(found))
    sys.exit("a process failed" if failed else 0)


def copy_with(patch: Path, folder: Path) -> Path:
    """Copies sources and tests, and applies what a patch changes there; returns the copy.

    Raises:
        subprocess.CalledProcessError: It does not apply.
    """
    copy = folder / "copy"
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    included = [f"--include={name}" for name in ("src/*", "tests/*")]
    command = ["git", "apply", *included, "--whitespace=nowarn", str(patch.resolve())]
    # Within a repository, git apply would take paths relative to that repository.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder)}
    subprocess.run(command, cwd=copy, check=True, env=environment)
    return copy


class Imported:
    """A version of hotloop, imported from a folder, of which one process can have several.

    Args:
        source: The folder that has the package.
    """

    def __init__(self, source: Path) -> None:
        self._source, self._modules = str(source), dict[str, Any]()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes imports find this version within the block, those in its functions included."""
        others = _taken_out()
        sys.modules.update(self._modules)
        sys.path.insert(0, self._source)
        try:
            yield
        finally:
            sys.path.remove(self._source)
            self._modules = _taken_out()
            sys.modules.update(others)


def _taken_out() -> dict[str, Any]:
    """Takes hotloop's modules out of those that are imported, and returns them."""
    ours = [name for name in sys.modules if name.partition(".")[0] == "hotloop"]
    return {name: sys.modules.pop(name) for name in ours}


def importing_from(source: Path) -> str:
    """Returns an assignment for ``env``: hotloop of ``source``, before what is imported now."""
    return f"PYTHONPATH={os.pathsep.join([str(source), *sys.path[1:]])}"


def in_process(args: argparse.Namespace, cell: str, source: Path) -> dict[str, Any] | None:
    """Measures a cell in a process of its own that imports from ``source``; None if it fails."""
    shape, _, scheme = cell.rpartition("/")
    job = {"shape": shape, "scheme": scheme, "rows": args.rows, "tp": args.tp}
    job |= {"repeats": args.repeats, "new_tokens": args.new_tokens}
    job |= {"device": "cpu" if args.rehearse else "cuda"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, str(args.patch), "--out", folder]
        if not run(["env", importing_from(source), *command, "--worker", json.dumps(job)], LIMIT_S):
            return None
        return json.loads(Path(folder, "worker.json").read_text())


def measure(
    shape: str,
    scheme: str,
    rows: Sequence[int],
    tp: int,
    repeats: int,
    new_tokens: int,
    device: str,
) -> dict[str, Any]:
    """Measures total decode tok/s for each number of rows, and hashes the tokens."""
    from hotloop import LLM, SamplingParams

    llm = LLM(
        shape,
        weights="random",
        quant=scheme,
        execution="auto" if device == "cpu" else "fused",
        device=device,
        tensor_parallel=tp,
        max_batch_size=max(rows),
        max_seq_len=5 + new_tokens,
    )
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    samples, tokens = {}, {}
    for n in rows:
        prompts = [[1, 2, 3, 4, 5 + i] for i in range(n)]
        answers = [llm.generate(prompts, params) for _ in range(1 + repeats)]
        samples[str(n)] = [sum(one.timing.decode_tok_s for one in each) for each in answers[1:]]
        ids = [one.token_ids for one in answers[0]]
        tokens[str(n)] = hashlib.sha256(repr(ids).encode()).hexdigest()[:10]
    all_reduce = llm.describe().kernels.get("all_reduce")
    llm.close()
    return {"samples": samples, "tokens": tokens, "all_reduce": all_reduce}


def make_table(found: Sequence[dict[str, Any]]) -> str:
    """Makes a table of medians: a row for each cell and number of rows."""
    rows = []
    for cell in dict.fromkeys(one["cell"] for one in found):
        here = [one for one in found if one["cell"] == cell and "samples" in one]
        for n in dict.fromkeys(n for one in here for n in one["samples"]):
            of = {
                name: [one for one in here if one["patch"] == name] for name in ("without", "with")
            }
            if not all(of.values()):
                continue
            medians = {
                name: [median(one["samples"][n]) for one in some] for name, some in of.items()
            }
            ratio = median(medians["with"]) / median(medians["without"])
            tokens = {one["tokens"][n] for one in here}
            texts = [" ".join(f"{value:,.1f}" for value in medians[name]) for name in of]
            same = "equal" if len(tokens) == 1 else "differ"
            rows.append((cell, n, *texts, f"{ratio:.3f}", same))
    head = ("cell", "rows", "without (tok/s)", "with (tok/s)", "ratio", "tokens")
    return table(head, rows, texts=1)


if __name__ == "__main__":
    main()
