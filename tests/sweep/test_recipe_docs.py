"""docs/recipes.md names every key of a recipe, and its example is one."""

import re
from pathlib import Path

import pytest

from hotloop.bench.record import Workload
from hotloop.sweep.recipe import EngineSettings, QualityOptions, Recipe, expand, load_recipe
from hotloop.types import levers

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


@pytest.mark.parametrize("model", [Recipe, Workload, QualityOptions, EngineSettings])
def test_every_key_is_documented(model):
    documented = set(re.findall(r"^\|? ?`(\w+)` ", PAGE.read_text(), flags=re.MULTILINE))
    assert set(model.model_fields) <= documented


def test_levers_are_documented_with_their_help():
    rows = [f"| `{name}` | {lever.help} |" for name, lever in levers().items() if name != "weights"]
    section = PAGE.read_text().partition("## Levers")[2]
    assert re.findall(r"^\| `.*$", section, flags=re.MULTILINE) == rows


def test_the_example_is_a_recipe(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(example)
    (tmp_path / "arc.jsonl").write_text("")
    assert len(expand(load_recipe(path))) == 8
