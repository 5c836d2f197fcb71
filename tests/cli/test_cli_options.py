"""The options stand for the values they make, completely and with the same defaults."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from hotloop.bench.record import Workload
from hotloop.cli.options import (
    EngineOptions,
    MatrixOptions,
    QualityOptions,
    SamplingOptions,
    WeightOptions,
    WorkloadOptions,
)
from hotloop.errors import ConfigError
from hotloop.sweep.recipe import Matrix, Recipe
from hotloop.sweep.recipe import QualityOptions as RecipeQuality
from hotloop.types import EngineConfig, SamplingParams, levers


def names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def test_every_field_of_a_configuration_has_an_option():
    elsewhere = {"model", "weights", "seed", "engine", "checkpoint", "url"}
    assert names(EngineOptions) | elsewhere == names(EngineConfig)
    in_python = {"visible_tokens", "speculate"}  # without --draft nothing speculates
    assert names(SamplingOptions) - {"json_schema"} == names(SamplingParams) - in_python
    assert WorkloadOptions().fields().keys() == Workload.model_fields.keys()
    assert QualityOptions().fields().keys() == RecipeQuality.model_fields.keys()


def test_no_option_given_is_the_default_configuration():
    assert EngineOptions().config("m") == EngineConfig(model="m")
    assert EngineOptions().given() == {}
    assert WeightOptions().model("m") == "m"
    assert Workload(**WorkloadOptions().fields()) == Recipe(model="m").workload
    assert RecipeQuality(**QualityOptions().fields()) == Recipe(model="m").quality


def test_a_lever_is_the_option_the_axis_and_the_key_of_its_field():
    taken = names(EngineOptions)
    assert taken == names(MatrixOptions)
    assert taken | {"seed", "engine", "checkpoint", "url"} == set(Matrix.model_fields)
    assert set(Matrix.model_fields) | {"weights"} == set(levers())


def test_of_a_sweeps_levers_several_values_are_an_axis_and_one_is_for_all_cells():
    options = MatrixOptions(quant="int8", draft_tokens="2,4", max_batch_size="8")
    assert options.matrix() == {"execution": ["auto", "compile"], "draft_tokens": [2, 4]}
    assert options.defaults() == {"quant": "int8", "max_batch_size": 8}


def test_degrees_of_tensor_parallelism_are_numbers():
    assert MatrixOptions(tensor_parallel="1,2,4").matrix()["tensor_parallel"] == [1, 2, 4]


def test_no_sampling_option_given_is_the_models_own_sampling():
    own = SamplingParams(temperature=0.3, top_k=7, stop=("x",), ignore_eos=True, seed=3)
    assert SamplingOptions().params(own) == own
    assert SamplingOptions(temperature=0.0).params(own) == replace(own, temperature=0.0)


def test_a_shape_is_the_model_of_random_weights():
    assert WeightOptions(weights="random", shape="llama-2-13b").model(None) == "llama-2-13b"


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (None, WeightOptions(), "either MODEL or --shape"),
        ("m", WeightOptions(weights="random", shape="s"), "either MODEL or --shape"),
        (None, WeightOptions(shape="llama-2-7b"), "--weights random"),
        (None, WeightOptions(shape="lama-2-7b"), "Did you mean 'llama-2-7b'"),
        ("llama-2-13b", WeightOptions(), "--weights random"),
    ],
)
def test_a_model_that_is_not_clear_is_refused(model, options, said):
    with pytest.raises(ConfigError, match=said):
        options.model(model)


def test_spaces_around_the_values_of_a_list_mean_nothing():
    assert MatrixOptions(quant="none, int8 ,fp8").matrix()["quant"] == ["none", "int8", "fp8"]
    assert MatrixOptions(tensor_parallel="1, 2").matrix()["tensor_parallel"] == [1, 2]
