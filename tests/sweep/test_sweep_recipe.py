from __future__ import annotations

from pathlib import Path

import pytest

from hotloop.bench.paired import Flips, compare_answers
from hotloop.checked import MAX_SEED
from hotloop.errors import ConfigError
from hotloop.evaluate.tasks import load_tasks
from hotloop.sweep.recipe import (
    QualityOptions,
    Recipe,
    cell_names,
    expand,
    fit_to_experiment,
    load_recipe,
    recipe_from_flags,
    replace_models,
)
from hotloop.types import MAX_ACCURACY_LOSS, MAX_DRAFT_TOKENS, EngineConfig

BATCH_OF_4 = "workload: {prompt_tokens: 1, new_tokens: 2, batch: 4}"
RECIPES = Path(__file__).parents[2] / "recipes"


def load(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml")


def refused(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(folder, text)
    return str(error.value)


def test_the_demo_is_the_baseline_then_schemes_times_executions():
    assert cell_names(expand(load_recipe(RECIPES / "demo.yaml"))) == [
        "transformers",
        "none/auto",
        "none/compile",
        "int8/auto",
        "int8/compile",
        "int4-g64/auto",
        "int4-g64/compile",
    ]


def test_the_demos_questions_are_enough_for_equal_answers_to_pass():
    quality = load_recipe(RECIPES / "demo.yaml").quality_options
    (task,) = load_tasks(quality.tasks, quality.n_items)
    assert len({item.context for item in task.items}) == len(task) == quality.n_items
    equal = Flips(worse=0, better=0, n=len(task))
    accuracy = 0.6  # of the demo's model, roughly
    assert compare_answers([equal], MAX_ACCURACY_LOSS * accuracy).outcome == "pass"


def test_defaults_hold_for_the_matrix_and_for_explicit_cells(tmp_path):
    recipe = load(
        tmp_path,
        """
        model: m
        defaults: {dtype: float32, max_seq_len: 1024}
        matrix: {execution: [compile, eager]}
        cells: [{quant: int8, dtype: bfloat16}]
        """,
    )
    compiled, eager, explicit = expand(recipe)
    common = {"model": "m", "max_seq_len": 1024}
    assert compiled == EngineConfig(execution="compile", dtype="float32", **common)
    assert eager == EngineConfig(execution="eager", dtype="float32", **common)
    assert explicit == EngineConfig(quant="int8", dtype="bfloat16", **common)


def test_other_engines_are_measured_before_the_cells_that_are_compared_with_them(tmp_path):
    recipe = load(
        tmp_path, "model: m\nmatrix: {quant: [int8]}\ncells: [{quant: none}, {engine: vllm}]"
    )
    assert [config.engine for config in expand(recipe)] == ["vllm", "hotloop", "hotloop"]


def test_explicit_cells_alone_need_no_matrix(tmp_path):
    assert cell_names(expand(load(tmp_path, "model: m\ncells: [{quant: int8}]"))) == ["int8/auto"]
    assert cell_names(expand(load(tmp_path, "model: m"))) == ["auto/auto"]


@pytest.mark.parametrize(
    ("recipe", "place", "rest"),
    [
        ("defaults: {draft_quant: int9}", "defaults.draft_quant", "Did you mean 'int8'?"),
        ("matrix: {tensor_parallel: [two]}", "matrix.tensor_parallel[0]", "must be an integer"),
        ("matrix: {quant: [none, int44]}", "matrix.quant[1]", "'int44'. Did you mean 'int4'?"),
        ("matrix: {quant: [int4-g65]}", "matrix.quant[0]", "g32, g64, g128"),
        ("defaults: {head: int9}", "defaults.head", "'int9'. Did you mean 'int8'?"),
        (
            "cells: [{execution: eagre}]",
            "cells[0].execution",
            "Did you mean 'eager'? Choose from: auto, eager, compile, fused.",
        ),
        ("matrix: {dtpye: [float32]}", "matrix.dtpye", "Did you mean 'dtype'?"),
        ("qualty: false", "qualty", "Did you mean 'quality'?"),
        ("quality: {windw: 3}", "quality.windw", "Did you mean 'window'?"),
        ("workload: {prompt_tokens: 8}", "workload.new_tokens", "is missing"),
        (
            "workload: {prompt_tokens: 8, new_tokens: 1}",
            "workload.new_tokens",
            "must be 2 or more, not 1",
        ),
        ("matrix: {quant: 8}", "matrix.quant", "must be a list, not 8"),
        ("matrix: {quant: []}", "matrix.quant", "must have at least one value"),
        ("quality: [1]", "quality", "must be an object"),
        ("timeout_s: 0", "timeout_s", "must be above 0"),
        ("weights: randm", "weights", "Did you mean 'random'?"),
    ],
)
def test_a_wrong_recipe_is_refused_by_place_value_nearest_and_choices(
    tmp_path, recipe, place, rest
):
    message = refused(tmp_path, f"model: m\n{recipe}\n")
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: {place}: ")
    assert rest in message


def test_all_problems_are_named_at_once(tmp_path):
    message = refused(tmp_path, "model: 3\nmatrix: {quant: [x], exectuion: [eager]}")
    assert len(message.splitlines()) == 1
    for place in ("model: must be text", "; matrix.quant[0]: ", "; matrix.exectuion: "):
        assert place in message


def test_an_axis_is_a_list_or_a_text_with_commas_and_spaces_mean_nothing(tmp_path):
    for quant in ('"none, int8"', '[" none", "int8 "]', "[none, int8]"):
        configs = expand(load(tmp_path, f"model: m\nmatrix: {{quant: {quant}}}"))
        assert [config.quant for config in configs] == ["none", "int8"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: m\nmodel: n", "the key 'model' is given 2 times"),
        ("model: [", "not valid YAML"),
        ("- model", "a recipe is a mapping"),
        ("matrix: {quant: [int8]}", "model: is missing"),
        ("model: m\ncells: [{quant: int8}, {quant: int8}]", "the cell 'int8/auto' 2 times"),
        ("model: m\nmatrix: {quant: [int4, int4-g128]}", "the cell 'int4-g128/auto' 2 times"),
        ("model: m\nmatrix: {max_seq_len: [16]}", "cannot hold the"),
        (
            "model: m\nmatrix: {tensor_parallel: [0]}",
            "tensor_parallel[0]: must be 1 or more",
        ),
        (f"model: m\nmatrix: {{max_batch_size: [2]}}\n{BATCH_OF_4}", "the workload's batch of 4"),
    ],
)
def test_a_recipe_that_cannot_be_run_as_written_is_refused(tmp_path, text, says):
    assert says in refused(tmp_path, text)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")


def test_memory_is_sized_for_the_experiment():
    recipe = recipe_from_flags(
        "m",
        matrix={},
        workload={"prompt_tokens": 30, "new_tokens": 20, "batch": 3},
        quality={"window": 64},
    )
    (config,) = expand(recipe)
    assert (config.max_seq_len, config.max_batch_size) == (64, 3)
    workload = recipe.workload
    assert fit_to_experiment(EngineConfig(model="m", max_batch_size=3), workload, None) == (
        EngineConfig(model="m", max_batch_size=3, max_seq_len=50)
    )


def test_random_weights_are_not_scored():
    recipe = recipe_from_flags("m", weights="random", matrix={}, quality={"window": 4096})
    assert recipe.quality_options is None
    (config,) = expand(recipe)
    assert config.max_seq_len == 256


def test_quality_can_be_left_out_and_its_text_lies_beside_the_recipe(tmp_path):
    assert load(tmp_path, "model: m\nquality: false").quality_options is None
    recipe = load(tmp_path, "model: m\nquality: {text: my.txt}")
    assert recipe.quality_options == QualityOptions(text=tmp_path / "my.txt")


def test_flags_are_checked_like_a_file_and_empty_ones_left_out():
    recipe = recipe_from_flags(
        "m",
        matrix={"quant": ["int8"], "execution": []},
        defaults={"dtype": None},
        timeout_s=None,
        quality=False,
    )
    assert recipe == Recipe(model="m", matrix={"quant": ["int8"]}, quality=False)
    with pytest.raises(ConfigError, match=r"^--quant: .*Did you mean"):
        recipe_from_flags("m", matrix={"quant": ["itn8"]})


@pytest.mark.parametrize("seed", [0, 2**40, MAX_SEED])
def test_whatever_value_an_engine_takes_a_recipe_takes_too(seed):
    config = EngineConfig(model="m", seed=seed, draft_tokens=MAX_DRAFT_TOKENS)
    options = {"seed": config.seed, "draft_tokens": config.draft_tokens}
    of_defaults = recipe_from_flags("m", matrix={}, defaults=options)
    of_matrix = recipe_from_flags("m", matrix={name: [value] for name, value in options.items()})
    for recipe in (of_defaults, of_matrix):
        (cell,) = expand(recipe)
        assert (cell.seed, cell.draft_tokens) == (seed, MAX_DRAFT_TOKENS)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("seed", MAX_SEED + 1, f"must be between 0 and {MAX_SEED}, not {MAX_SEED + 1}"),
        ("seed", -1, f"must be between 0 and {MAX_SEED}, not -1"),
        ("draft_tokens", MAX_DRAFT_TOKENS + 1, f"must be between 1 and {MAX_DRAFT_TOKENS}, not"),
        ("max_seq_len", 0, "must be 1 or more, not 0"),
        ("max_seq_len", 2**31, f"must be at most {2**31 - 1}, not {2**31}"),
    ],
)
def test_a_value_that_no_engine_takes_is_refused_by_its_place_in_the_recipe(name, value, says):
    with pytest.raises(ConfigError) as refused:
        recipe_from_flags("m", matrix={name: [1, value]})
    assert f"--{name.replace('_', '-')}: {says}" in str(refused.value)


DRAFTED = """
model: big
defaults: {draft_quant: int4, draft_tokens: 2}
matrix: {draft: [none, ngram, exit-2, small]}
cells: [{draft: small, draft_quant: int8}, {quant: int8}]
"""


def test_a_draft_models_scheme_is_for_the_cells_that_have_a_draft_model(tmp_path):
    configs = expand(load(tmp_path, DRAFTED))
    assert [(c.draft, c.draft_quant, c.draft_tokens) for c in configs] == [
        ("none", "auto", 4),
        ("ngram", "auto", 2),
        ("exit-2", "auto", 2),
        ("small", "int4-g128", 2),
        ("small", "int8", 2),
        ("none", "auto", 4),
    ]
    assert cell_names(configs)[3:5] == [
        "auto/auto/draft=small:int4-g128-2",
        "auto/auto/draft=small:int8-2",
    ]


def test_a_draft_models_scheme_that_no_cell_has_a_use_for_is_left_for_the_engine_to_refuse():
    recipe = recipe_from_flags("m", matrix={}, defaults={"draft_quant": "int8"})
    assert expand(recipe)[0].draft_quant == "int8"


def test_cells_of_the_matrix_that_a_lever_does_not_tell_apart_are_one(tmp_path):
    axes = "matrix: {draft: [none, ngram], draft_tokens: [2, 4]}"
    configs = expand(load(tmp_path, f"model: m\n{axes}"))
    assert [(c.draft, c.draft_tokens) for c in configs] == [
        ("none", 4),
        ("ngram", 2),
        ("ngram", 4),
    ]


def test_a_choice_of_all_reduce_is_for_the_cells_of_several_ranks(tmp_path):
    configs = expand(
        load(tmp_path, "model: m\ndefaults: {all_reduce: nccl}\nmatrix: {tensor_parallel: [1, 2]}")
    )
    assert [c.name for c in configs] == ["auto/auto", "auto/auto/tp2/nccl"]


def test_draft_models_of_one_name_are_told_apart_by_their_folders(tmp_path):
    recipe = load(tmp_path, "model: m\nmatrix: {draft: [a/small, b/small]}")
    assert cell_names(expand(recipe)) == [
        "auto/auto/draft=small-4/draft=a/small",
        "auto/auto/draft=small-4/draft=b/small",
    ]


def test_models_of_a_recipe_can_be_replaced_and_all_else_stays(tmp_path):
    (tmp_path / "my.txt").write_text("words")
    recipe = load(tmp_path, f"{DRAFTED}\nname: mine\nquality: {{text: my.txt}}")
    assert replace_models(recipe) == recipe
    replaced = replace_models(recipe, weights="random", model="bigger", draft_model="smaller")
    assert (replaced.name, replaced.model, replaced.weights) == ("mine", "bigger", "random")
    before, after = expand(recipe), expand(replaced)
    drafts = [c.draft for c in after]
    assert drafts == ["none", "ngram", "exit-2", "smaller", "smaller", "none"]
    assert [c.draft_quant for c in after] == [c.draft_quant for c in before]
    assert replaced.sha256 != recipe.sha256
    text = replace_models(recipe, model="bigger").quality_options.text
    assert text == tmp_path / "my.txt"


def test_a_default_draft_model_is_replaced_too_and_one_that_is_not_there_is_not(tmp_path):
    recipe = load(tmp_path, "model: m\ndefaults: {draft: small}")
    assert expand(replace_models(recipe, draft_model="other"))[0].draft == "other"
    recipe = load(tmp_path, "model: m\nmatrix: {draft: [none, ngram, exit-2]}")
    with pytest.raises(ConfigError, match="no cell with a draft model that 'other'"):
        replace_models(recipe, draft_model="other")


def test_a_draft_model_does_not_take_a_place_that_it_has_already(tmp_path):
    recipe = load(tmp_path, "name: r\nmodel: m\nmatrix: {draft: [small, smaller]}")
    with pytest.raises(ConfigError, match=r"recipe 'r': .*2 times"):
        replace_models(recipe, draft_model="other")


def test_the_hash_is_of_what_a_recipe_says_and_not_of_how(tmp_path):
    first = load(tmp_path, "model: m\nmatrix: {quant: [none, int8]}")
    same = load(tmp_path, "# a comment\nmatrix:\n  quant:\n  - none\n  - int8\nmodel: m")
    other = load(tmp_path, "model: m\nmatrix: {quant: [int8, none]}")
    assert first.sha256 == same.sha256 != other.sha256


def test_cells_of_one_name_are_told_apart_by_what_varies():
    configs = [EngineConfig(model="m", prefill_chunk=n) for n in (64, 128)]
    assert cell_names([*configs, EngineConfig(model="m", quant="int8")]) == [
        "auto/auto/prefill_chunk=64",
        "auto/auto/prefill_chunk=128",
        "int8/auto",
    ]
