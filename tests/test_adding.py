"""docs/adding.md is followed to the letter, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hotloop

pytestmark = pytest.mark.usefixtures("forked_processes")

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(
    r"```python\n# (src/hotloop/\S+)\n(.*?)```", (ROOT / "docs/adding.md").read_text(), re.DOTALL
)

FAMILY = """
import torch
from twins import load, reference_logits, save_random

from hotloop import LLM
from hotloop.engine.memory import predict_memory
from hotloop.models.families.example import FAMILY

folder = sys_folder()
model = save_random(folder, FAMILY.tiny)
ids = torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(1))
expected = reference_logits(model, ids)
twin, zero = load(folder), torch.zeros(2, dtype=torch.int64)
assert len(twin.config.kinds) == 2, "the layers are of two kinds"
torch.testing.assert_close(twin.logits(ids, zero), expected)
cached = load(folder)
cached.logits(ids[:, :23], zero)
for at in range(23, 40):
    logits = cached.logits(ids[:, at : at + 1], torch.full((2,), at))
    torch.testing.assert_close(logits[:, 0], expected[:, at])

with LLM(str(folder), weights="random", quant="int4-g32", device="cpu", max_seq_len=64) as llm:
    plan, described = predict_memory(llm.config), llm.describe()
    assert described.weight_bytes == plan.weights_bytes
    assert described.kv_bytes_per_token * 64 == plan.cache_bytes
"""

SCHEME = """
import torch
from thread_group import ThreadRanks
from whole_models import load, write_folder

from hotloop import LLM
from hotloop.engine.memory import predict_memory
from hotloop.quant import parse_scheme
from hotloop.weights.quantize import quantize_checkpoint

folder = sys_folder()
write_folder(folder / "plain")
quantize_checkpoint(folder / "plain", folder / "copy", quant="example")

def states(name, n):
    run = ThreadRanks(n).run(lambda group: load(folder / name, quant="example", group=group))
    return [decoder.state_dict() for decoder in run]

for n in (1, 2):
    for ours, theirs in zip(states("copy", n), states("plain", n)):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), n

scheme, noise = parse_scheme("example"), torch.Generator().manual_seed(1)
grid = scheme.random(64, 256, std=0.02, dtype=torch.float32, generator=noise).dequantize()
assert abs(grid.std() / 0.02 - 1) < 0.05
weight = torch.randn(8, 256, generator=noise)
left, right = (scheme.quantize(part).dequantize() for part in weight.split(128, dim=1))
assert torch.equal(torch.cat((left, right), dim=1), scheme.quantize(weight).dequantize())

options = {"weights": "random", "device": "cpu", "max_seq_len": 64}
with LLM(str(folder / "plain"), quant="example", **options) as llm:
    assert llm.describe().weight_bytes == predict_memory(llm.config).weights_bytes
"""

ENCODING = """
import torch
from safetensors.torch import save_file
from thread_group import ThreadRanks
from whole_models import CONFIG, load, random_tensors, write_folder

from hotloop.models import names
from hotloop.models.families import read_config
from hotloop.quant.encodings.example import Example

folder = sys_folder()
noise = torch.Generator().manual_seed(0)
plain, encoded = (random_tensors(CONFIG, torch.float32) for _ in range(2))
for name, (n, k) in names.linear_weights(read_config(CONFIG)).items():
    stored = {
        ".codes": torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=noise),
        ".scales": (torch.rand(n, k // 32, generator=noise) / 1000).half(),
        ".zeros": torch.randint(0, 256, (n, k // 32), dtype=torch.uint8, generator=noise),
    }
    groups = stored[".codes"].view(n, -1, 32).float() - stored[".zeros"].float()[..., None]
    plain[f"{name}.weight"] = (groups * stored[".scales"].float()[..., None]).view(n, k)
    assert torch.equal(Example.decode(stored, (n, k)).dequantize(), plain[f"{name}.weight"])
    del encoded[f"{name}.weight"]
    encoded |= {f"{name}{part}": tensor for part, tensor in stored.items()}
for name, tensors in (("plain", plain), ("encoded", encoded)):
    write_folder(folder / name)
    save_file(tensors, folder / name / "model.safetensors")

def states(name, quant, n):
    run = ThreadRanks(n).run(lambda group: load(folder / name, quant=quant, group=group))
    return [decoder.state_dict() for decoder in run]

for quant in ("none", "int8", "int4-g32"):
    for n in (1, 2):
        for ours, theirs in zip(states("encoded", quant, n), states("plain", quant, n)):
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), (quant, n)
"""


ENGINE = """
from hotloop.sweep.recipe import load_recipe
from hotloop.sweep.runner import run_sweep

folder = sys_folder()
recipe = folder / "recipe.yaml"
recipe.write_text(
    "model: llama-2-7b\\nweights: random\\nmatrix: {engine: [example]}\\n"
    "workload: {prompt_tokens: 4, new_tokens: 8}\\n"
)
(record,) = run_sweep(load_recipe(recipe), folder / "out")
assert record.decode_tok_s is not None, record.reason
assert (record.cell, record.baseline) == ("example", "example")
"""

TASK = """
from whole_models import write_folder

from hotloop import LLM
from hotloop.evaluate.tasks import answer_tasks, compare_tasks, load_tasks

folder = sys_folder()
write_folder(folder)
tasks = load_tasks(["example"], 12)
with LLM(str(folder), device="cpu", dtype="float32", max_seq_len=64) as llm:
    answers = answer_tasks(llm, tasks, lambda *_: None)
(figures,), verdict = compare_tasks(tasks, answers, [[True] * 12])
assert (figures.task, figures.accuracy.n, figures.chance) == ("sums", 12, 0.0)
assert verdict.tasks == ("sums",)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package in which the examples of the page are followed, and nothing else."""
    source = Path(hotloop.__file__).parent
    shutil.copytree(source, tmp_path / "src/hotloop", ignore=shutil.ignore_patterns("*.pyc"))
    for name, code in EXAMPLES:
        file = tmp_path / name
        registry = re.match(r"(\w+ = \{\n) +\.\.\.\n(.*)\}\n", code, re.DOTALL)
        if registry is None:
            assert not file.exists(), f"{name} is there already"
            file.write_text(code)
            continue
        text = file.read_text()
        assert text.count(registry[1]) == 1, f"{name} has no {registry[1]}"
        file.write_text(text.replace(registry[1], registry[1] + registry[2]))
    return tmp_path


@pytest.mark.parametrize(
    "program",
    [FAMILY, SCHEME, ENCODING, ENGINE, TASK],
    ids=["family", "scheme", "encoding", "engine", "task"],
)
def test_what_the_page_adds_runs_with_the_files_that_it_names(program, package):
    helpers = [ROOT / "tests", ROOT / "tests/models", ROOT / "tests/weights"]
    paths = os.pathsep.join(map(str, [package / "src", *helpers]))
    model = package / "model"
    model.mkdir()
    begin = f"from pathlib import Path\ndef sys_folder(): return Path({str(model)!r})\n"
    ended = subprocess.run(
        [sys.executable, "-c", begin + program],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_the_page_has_an_example_of_each_registry_that_it_shows():
    places = [name for name, _ in EXAMPLES]
    assert places == [
        "src/hotloop/models/families/example.py",
        "src/hotloop/models/families/__init__.py",
        "src/hotloop/quant/example.py",
        "src/hotloop/quant/__init__.py",
        "src/hotloop/quant/encodings/example.py",
        "src/hotloop/quant/encodings/__init__.py",
        "src/hotloop/baselines/example.py",
        "src/hotloop/baselines/__init__.py",
        "src/hotloop/evaluate/example.py",
        "src/hotloop/evaluate/tasks.py",
    ]
