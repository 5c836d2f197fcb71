"""``benchmarks/small_batches.py`` runs on a CPU, and its tables have vLLM's figures on an H200."""

import argparse
import json
from pathlib import Path

import pytest
import small_batches

ROOT = Path(__file__).parent.parent.parent


def write(out: Path, kind: str, scheme: str, gpu: str, samples: dict[str, list[float]]) -> None:
    job = {"kind": kind, "shape": "llama-3.1-8b", "scheme": scheme, "gpus": 1}
    found = {"job": job, "samples": samples, "provenance": {"device": {"name": gpu}}}
    (out / f"{kind}-{scheme}.json").write_text(json.dumps(found))


def test_a_rehearsal_measures_both_kinds_and_writes_the_page(tmp_path, monkeypatch):
    out, page = tmp_path / "tiny", tmp_path / "page.md"
    page.write_text("before\n<!-- tables of tiny: begin -->\n<!-- tables of tiny: end -->\nafter\n")
    commands = []

    def run_here(command: list[str], _limit_s: float) -> bool:
        commands.append(command)
        small_batches.main(command[2:])
        return True

    monkeypatch.setattr(small_batches, "run", run_here)
    with pytest.raises(SystemExit) as ended:
        small_batches.main(["--out", str(out), "--docs", str(page), "--rehearse"])
    assert not ended.value.code
    assert len(commands) == 2
    before, sequences, prompts, at_once, after = page.read_text().split("\n\n")
    assert (before.split()[0], after.split()[-1]) == ("before", "after")
    assert "| 1 sequence | 3 sequences |" in sequences
    assert "| 5 tokens | 40 tokens |" in prompts
    assert "| 1 prompt at once | 3 prompts at once |" in at_once
    for path in out.glob("*.json"):
        samples = json.loads(path.read_text())["samples"]
        assert [len(of_size) for of_size in samples.values()] == [2, 2]


def test_tables_have_medians_and_the_peers_figures_on_an_h200_alone(tmp_path):
    write(tmp_path, "sequences", "int4-g128", "NVIDIA H200", {"1": [650, 700, 699], "64": [9e3]})
    write(tmp_path, "prompts", "none", "NVIDIA H100", {"512": [17.25, 18, 19]})
    sequences, prompts = small_batches.make_tables(tmp_path).split("\n\n")
    assert sequences.splitlines() == [
        "| shape | scheme | GPUs | engine | 1 sequence | 64 sequences |",
        "| --- | --- | --- | --- | ---: | ---: |",
        "| llama-3.1-8b | int4-g128 | 1 | hotloop | 699 | 9,000 |",
        "| llama-3.1-8b | int4-g128 | 1 | vLLM | 307 | 10,714 |",
    ]
    assert [line.count("vLLM") for line in prompts.splitlines()] == [0, 0, 0]
    assert prompts.splitlines()[2].endswith("| hotloop | 18.0 |")


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_the_page_has_a_place_for_the_tables_that_the_makefile_makes(gpu):
    page = (ROOT / "docs/performance.md").read_text()
    assert all(
        f"<!-- tables of {gpu}-small-batches: {mark} -->" in page for mark in ("begin", "end")
    )
    assert (
        "small_batches.py --out benchmarks/results/$(GPU)-small-batches"
        in (ROOT / "Makefile").read_text()
    )


def test_prompts_fit_the_context_of_their_shape():
    args = argparse.Namespace(prompts=[512, 2048, 8192], sequences=[1, 64])
    assert small_batches.sizes("prompts", "llama-2-13b", args) == (512, 2048)
    assert small_batches.sizes("prompts", "llama-3.1-8b", args) == (512, 2048, 8192)
    assert small_batches.sizes("sequences", "llama-2-13b", args) == (1, 64)
