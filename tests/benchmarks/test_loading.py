"""``benchmarks/loading.py`` writes checkpoints that load as AWQ, and measures every start."""

import argparse
import json
from contextlib import closing

import loading
import pytest

from hotloop.cache import writable_cache_dir
from hotloop.models import linear
from hotloop.quant.packing_check import PackingCheck
from hotloop.weights.checkpoint import open_checkpoint, stored_form


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """A cache folder of its own, with the kernels that are built already."""
    kernels = writable_cache_dir() / "kernels"
    kernels.mkdir(exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/kernels").symlink_to(kernels)
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / "cache"))


def args_of(folder, **others):
    return argparse.Namespace(checkpoint=folder, device="cpu", pairs=2, **others)


def test_the_checkpoint_is_kept_as_it_is_stored(tmp_path):
    loading.write(tmp_path / "model", loading.TINY)
    found = loading.load(args_of(tmp_path / "model"))
    stored = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert found["read_bytes"] == pytest.approx(stored, rel=0.02), "but for the files' headers"
    assert found["weight_bytes"] == pytest.approx(stored, rel=0.1), "4 bits, not unpacked"
    with closing(open_checkpoint(tmp_path / "model")) as checkpoint:
        assert stored_form(checkpoint).summary.startswith("awq (")


def test_the_check_is_left_out_in_every_other_load_alone(tmp_path, monkeypatch):
    loading.write(tmp_path / "model", loading.TINY)
    checks = []
    load = loading.load

    def load_seen(args):
        checks.append(linear.PackingCheck)
        return load(args)

    monkeypatch.setattr(loading, "load", load_seen)
    found = loading.check(args_of(tmp_path / "model"))
    assert [len(samples) for samples in found.values()] == [2, 2]
    with_, without = PackingCheck, loading.Unchecked
    assert checks == [with_, with_, without, without, with_]
    assert linear.PackingCheck is PackingCheck


def test_a_rehearsal_makes_every_start_and_a_table(tmp_path, monkeypatch, capsys):
    def here(_args, folder, what, _cache):
        own = args_of(folder, load=what)
        return loading.check(own) if what == "check" else loading.start(own)

    monkeypatch.setattr(loading, "in_process", here)
    loading.main(["--out", str(tmp_path / "out"), "--rehearse"])
    said = capsys.readouterr().out
    assert [f"\n| {what} |" in said for what in loading.STARTS] == [True] * 4
    assert "\ncheck: " in said
    rows = json.loads((tmp_path / "out/loading-tiny.json").read_text())["rows"]
    assert rows["second"]["read_bytes"] > 0, "the packed entry"
    assert [rows[what]["gb_s"] > 0 for what in loading.STARTS] == [True] * 4
