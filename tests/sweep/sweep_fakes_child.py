"""The fakes as a cell's own process imports them: with a machine that is made up as well.

The real provenance takes torch and seconds, and the real scoring too.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from sweep_fakes import End, create, predict

from hotloop import hardware
from hotloop.baselines import EngineKind
from hotloop.bench.statistics import mean_figure
from hotloop.cache import code_hash
from hotloop.errors import HotloopError, UnsupportedError
from hotloop.sweep.descendants import CELL_ID

FAKE = EngineKind(create=create, predict=predict)


def one_gpu(config):
    if config.tensor_parallel > 1:
        raise UnsupportedError(f"needs {config.tensor_parallel} GPUs, found 1")


ON_ONE_GPU = EngineKind(create=create, predict=predict, check_device=one_gpu)


def write_reference(_engine, windows, path, key, on_window):
    if "NO_REFERENCE" in os.environ:
        raise HotloopError("made to fail")
    on_window(len(windows), len(windows))
    Path(path).write_text(repr(key))


def open_reference(path, key):
    assert Path(path).read_text() == repr(key)
    return SimpleNamespace(key=key)


def measure_quality(engine, windows, *, reference, on_window, **_):
    if engine.config.seed == End.OOM_IN_QUALITY:
        raise MemoryError("no room for the logits")
    on_window(len(windows), len(windows))
    paired = mean_figure([0.01, 0.02]) if reference else None
    return SimpleNamespace(
        perplexity=mean_figure([20.0, 21.0]),
        delta_ln_ppl=paired,
        kl_mean=paired,
        kl_p99=0.1 if reference else None,
        kl_max=0.2 if reference else None,
        same_top1=mean_figure([0.9, 0.95]) if reference else None,
    )


def greedy_agreement(engine, *_):
    if engine.config.seed == End.STOPS_AFTER_WINDOWS:
        match os.environ["STOP"]:
            case "hang":
                time.sleep(9999)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)


if CELL_ID in os.environ:  # in a cell's own process, and not where its sweep runs
    hardware.resolve_device = lambda name: name
    hardware.provenance = lambda device: {
        "device": {
            "kind": "cpu",
            "name": device,
            "read_bytes_per_s": 1e9,
            "datasheet_bytes_per_s": None,
        },
        "hotloop": {"version": "1", "code": code_hash(), "git_commit": None, "git_dirty": None},
    }
    sys.modules["hotloop.evaluate.quality"] = SimpleNamespace(
        write_reference=write_reference, measure_quality=measure_quality
    )
    sys.modules["hotloop.evaluate.greedy"] = SimpleNamespace(greedy_agreement=greedy_agreement)
    sys.modules["hotloop.evaluate.reference"] = SimpleNamespace(
        Reference=open_reference, ReferenceKey=SimpleNamespace
    )
