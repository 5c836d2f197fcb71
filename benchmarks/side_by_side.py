"""Compares hotloop and llama.cpp, which decode a small model on one CPU in alternation.

Each engine is loaded in a process of its own and waits; in a round each decodes the same number of
tokens. So slow phases of the machine affect all engines equally. A round in which other processes
were busy is repeated.

``--busy N`` simulates a machine with other work: N processes of lower priority compute throughout,
and every round counts. Linux may group processes by session (autogroup), so that priorities count
only within a session: with ``--busy-apart`` each is in a session of its own, whose share of the
processors is as large as ours.

    pip install llama-cpp-python==0.3.36
    python benchmarks/side_by_side.py --out benchmarks/results/cpu-side-by-side.json
    python benchmarks/side_by_side.py --files --out benchmarks/results/cpu-gguf-side-by-side.json

llama.cpp's own quantizer makes its files in other formats, from the model that ``hotloop pull
smollm2-135m`` fetches. The engines ``auto:FORMAT`` decode the very file that llama.cpp does, as it
is; so does ``auto``, the file as fetched, or that of ``--model``. ``--llama-python`` names the
interpreter of another environment that has llama-cpp-python; without one, hotloop runs alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from bystanders import Bystanders

PROMPT = [1, 504, 2365, 253, 655]  # five tokens, as they come
LLAMA_TYPES = {  # of llama_ftype
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
}
AS_FETCHED = "as fetched"
QUANTIZING = {  # hotloop's configuration: llama.cpp's format at about equal bits
    "none/eager": "F16",
    "none/compile": "F16",
    "int8/compile": "Q8_0",
    "int4-g32-asym/compile": "Q4_1",
    "int4-g64/compile": "Q4_0",
}
SAME_FILE = {"auto/compile": AS_FETCHED} | {
    f"auto:{kind}/compile": kind for kind in LLAMA_TYPES if kind != "F16"
}
PAIRS = QUANTIZING | SAME_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=int, default=0, metavar="N")
    parser.add_argument("--busy-apart", action="store_true")
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or GGUF file")
    engines = parser.add_mutually_exclusive_group()
    engines.add_argument("--engines", nargs="+", choices=PAIRS, default=list(QUANTIZING))
    engines.add_argument("--files", action="store_true", help="the engines that begin with auto")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(*args.worker, args.threads, args.new_tokens)
        return

    from hotloop import hardware
    from hotloop.bench.statistics import mean_figure
    from hotloop.weights.hub import resolve_model

    source = resolve_model(args.model)
    version = llama_version(args.llama_python)
    if version is None:
        print(f"hotloop alone: {args.llama_python} has no llama-cpp-python", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        pairs = {name: PAIRS[name] for name in (SAME_FILE if args.files else args.engines)}
        if version is None and any(
            PAIRS[name] in LLAMA_TYPES for name in SAME_FILE if name in pairs
        ):
            parser.error(f"llama.cpp makes these files, and {args.llama_python} does not have it")
        formats = {AS_FETCHED: source} if AS_FETCHED in pairs.values() and version else {}
        made = [kind for kind in LLAMA_TYPES if kind in pairs.values()] if version else []
        f16 = Path(folder) / "F16.gguf"
        for kind in dict.fromkeys(["F16", *made] if made else []):
            path, origin = Path(folder) / f"{kind}.gguf", f16 if f16.exists() else source
            run([args.llama_python, __file__, "--worker", "requantize", f"{origin},{path},{kind}"])
            if kind in made:
                formats[kind] = path
        sizes = {kind: Path(path).stat().st_size for kind, path in formats.items()}
        common = ["--threads", str(args.threads), "--new-tokens", str(args.new_tokens)]
        workers = {
            name: start(
                [
                    *(sys.executable, __file__, *common, "--worker", "hotloop"),
                    f"{name},{formats.get(kind, source) if name in SAME_FILE else source}",
                ]
            )
            for name, kind in pairs.items()
        } | {
            kind: start([args.llama_python, __file__, *common, "--worker", "llama", str(path)])
            for kind, path in formats.items()
        }
        for name, worker in workers.items():
            print(f"{name}: {worker.stdout.readline().strip()}", file=sys.stderr)
        others = [busy(apart=args.busy_apart) for _ in range(args.busy)]
        try:
            samples, disturbed = measure(workers, args.rounds, undisturbed=not others)
        finally:
            for process in others:
                process.kill()
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()

    figures = {name: mean_figure(values).model_dump() for name, values in samples.items()}
    ratios = {
        name: mean_figure([a / b for a, b in zip(samples[name], samples[kind], strict=True)])
        for name, kind in pairs.items()
        if kind in samples
    }
    result = {
        "what": "decode tok/s, batch 1, greedy; both at the same context",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": args.model,
        "file_bytes": sizes,
        "prompt_tokens": len(PROMPT),
        "new_tokens": args.new_tokens,
        "threads": args.threads,
        "busy_processes": args.busy,
        "busy_apart": args.busy_apart,
        "disturbed_rounds": disturbed,
        "llama_cpp_python": version,
        "decode_tok_s": figures,
        "ratio_in_a_round": {name: ratio.model_dump() for name, ratio in ratios.items()},
        "provenance": hardware.provenance(hardware.resolve_device("cpu")),
    }
    for name, kind in pairs.items():
        line = f"{name:22} {figures[name]['mean']:6.1f}"
        if name in ratios:
            line += f"   {kind:10} {figures[kind]['mean']:6.1f}   ×{ratios[name].mean:.2f}"
        print(line)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(
    workers: dict[str, subprocess.Popen[str]], rounds: int, *, undisturbed: bool
) -> tuple[dict[str, list[float]], int]:
    """Measures decode tok/s by worker and round; returns also the number of repeated rounds.

    Args:
        workers: The engines, which take turns.
        rounds: The number of rounds that count; one warm-up round comes before them.
        undisturbed: Whether only rounds count in which other processes did nothing.
    """
    samples: dict[str, list[float]] = {name: [] for name in workers}
    number = disturbed = 0
    while number <= rounds:
        bystanders = Bystanders()
        turns = {name: turn(worker) for name, worker in workers.items()}
        if undisturbed and bystanders.disturbed(sum(cpu_s for _, cpu_s in turns.values())):
            disturbed += 1
            assert disturbed <= 3 * rounds, "other processes are busy: measure later"
            continue
        print(f"round {number} of {rounds}", file=sys.stderr)
        number += 1
        if number > 1:
            for name, (speed, _) in turns.items():
                samples[name].append(speed)
    return samples, disturbed


def busy(*, apart: bool) -> subprocess.Popen[bytes]:
    """Starts a process of lower priority that computes until it is killed, or this one ends."""
    program = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    command = ["nice", "-n", "10", sys.executable, "-c", program]
    return subprocess.Popen(command, start_new_session=apart)


def llama_version(python: str) -> str | None:
    """Returns the version of llama-cpp-python of an interpreter, if it has one."""
    command = [python, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turn(worker: subprocess.Popen[str]) -> tuple[float, float]:
    """Runs a round of a worker; returns decode tok/s and seconds of processor time."""
    worker.stdin.write("go\n")
    worker.stdin.flush()
    speed, cpu_s = map(float, worker.stdout.readline().split())
    return speed, cpu_s


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def serve(engine: str, what: str, threads: int, new_tokens: int) -> None:
    """Runs a worker: loads, then answers each line with decode tok/s and processor seconds."""
    if engine == "requantize":
        requantize(*what.split(","))
        return
    timed = {"hotloop": hotloop, "llama": llama}[engine](what, threads, new_tokens)
    print("ready", flush=True)
    for _ in sys.stdin:
        began_s = time.process_time()
        speed = timed()
        print(speed, time.process_time() - began_s, flush=True)


def hotloop(what: str, threads: int, new_tokens: int):
    import torch

    from hotloop import LLM, SamplingParams

    torch.set_num_threads(threads)
    name, model = what.split(",", 1)
    quant, execution = name.split("/")
    llm = LLM(model, quant=quant.split(":")[0], execution=execution, max_seq_len=512)
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return lambda: llm.generate([PROMPT], params)[0].timing.decode_tok_s


def llama(path: str, threads: int, new_tokens: int):
    """Steps by llama.cpp's C interface, without the overhead of its Python wrapper."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    token = (llama_cpp.llama_token * 1)()

    def choose() -> None:
        logits = llama_cpp.llama_get_logits(model.ctx)
        token[0] = np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax()

    def timed() -> float:
        model.reset()
        model.eval(PROMPT)
        choose()
        started = time.perf_counter()
        for _ in range(new_tokens - 1):
            failed = llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(token, 1))
            assert not failed, "llama.cpp could not decode"
            choose()
        return (new_tokens - 1) / (time.perf_counter() - started)

    return timed


def requantize(source: str, target: str, kind: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = LLAMA_TYPES[kind], True
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    assert not failed, f"llama.cpp could not make {target}"


if __name__ == "__main__":
    main()
