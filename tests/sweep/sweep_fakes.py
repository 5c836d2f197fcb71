"""Engines that end in every way an engine can, without torch, so that processes start fast.

``EngineConfig.seed`` picks the way.
"""

import os
import signal
import subprocess
import sys
import time
from enum import IntEnum
from pathlib import Path

from hotloop.errors import OutOfMemoryError, UnsupportedError
from hotloop.memory_meter import MemoryMeter
from hotloop.types import EngineConfig, EngineDescription, Generation, MemoryPlan, Timing


class End(IntEnum):
    OK = 0
    RAISES = 1
    SEGFAULTS = 2
    HANGS = 3
    OOM = 4
    UNSUPPORTED = 5
    PREDICTED_OOM = 6
    EXITS = 7
    KILLED = 8
    WRAPPED_OOM = 9
    OOM_IN_QUALITY = 10
    HANGS_ONCE = 11
    STOPS_AFTER_WINDOWS = 12


def predict(config: EngineConfig) -> MemoryPlan:
    total = 2**32 if config.seed == End.PREDICTED_OOM else 2**30
    return planned(total, 2**31)


def planned(total_bytes: int, free_bytes: int) -> MemoryPlan:
    return MemoryPlan(
        weights_bytes=total_bytes,
        cache_bytes=0,
        workspace_bytes=0,
        device="fake",
        free_bytes=free_bytes,
    )


def create(config: EngineConfig) -> "FakeEngine":
    match config.seed:
        case End.RAISES:
            raise KeyError("no such layer")
        case End.SEGFAULTS:
            print("about to fall over", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        case End.HANGS:
            sleep = [sys.executable, "-c", "import time; time.sleep(9999)"]
            pids = [os.getpid(), subprocess.Popen(sleep).pid]
            # As ranks are: in a session of its own, which ending this one's group does not reach.
            pids.append(subprocess.Popen(sleep, start_new_session=True).pid)
            written = Path(os.environ["PIDS"]).with_suffix(".new")
            written.write_text(" ".join(map(str, pids)))
            written.rename(os.environ["PIDS"])  # whole, when it is there
            time.sleep(9999)
        case End.HANGS_ONCE:
            if not (hanging := Path(os.environ["HANGING"])).exists():
                hanging.with_suffix(".new").write_text(os.environ.get("RAY_RAYLET_PID", ""))
                hanging.with_suffix(".new").rename(hanging)  # whole, when it is there
                time.sleep(9999)
        case End.OOM:
            raise OutOfMemoryError("load", 2**33, 2**30)
        case End.UNSUPPORTED:
            raise UnsupportedError("no such kernel here")
        case End.EXITS:
            os._exit(3)
        case End.KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        case End.WRAPPED_OOM:
            raise RuntimeError("compiling failed") from MemoryError()
    return FakeEngine(config)


class FakeEngine:
    """Makes tokens at 100 a second, by its own clock."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    def generate(self, prompts, params):
        n = params.max_new_tokens
        timing = Timing(n_tokens=n, ttft_s=0.05, e2e_s=0.05 + (n - 1) * 0.01)
        return [
            Generation(
                prompt_ids=tuple(prompt),
                token_ids=(0,) * n,
                text="",
                finish_reason="length",
                timing=timing,
            )
            for prompt in prompts
        ]

    def encode(self, text):
        return [ord(character) % 7 for character in text]

    def describe(self) -> EngineDescription:
        return EngineDescription(
            config=self.config,
            family="fake",
            device="cpu",
            device_name="fake",
            dtype="float32",
            vocab_size=7,
            max_seq_len=64,
            execution="eager",
            n_params=7,
            weight_bytes=28,
            weight_bytes_per_step=28,
            kv_bytes_per_token=2,
            load_s=0.5,
            warmup_s=0.25,
        )

    def meter(self):
        return MemoryMeter("cpu")

    def close(self) -> None:
        pass
