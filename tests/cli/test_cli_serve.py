"""``hotloop serve``: what it takes, and what it refuses before a model is loaded."""

import sys

import pytest
from cli_fakes import record

from hotloop.cli.app import main
from hotloop.cli.options import DEFAULT_WEIGHTS, SERVED_DEFAULTS, ServedEngineOptions
from hotloop.cli.serve import ServerOptions, _config
from hotloop.errors import ConfigError
from hotloop.sweep import store
from hotloop.types import EngineConfig


def test_a_server_has_its_own_defaults():
    config = ServedEngineOptions().config("m")
    assert {name: getattr(config, name) for name in SERVED_DEFAULTS} == SERVED_DEFAULTS
    assert ServedEngineOptions(quant="int8").config("m").quant == "int8"


def test_options_change_a_measured_configuration_and_defaults_of_a_server_do_not():
    measured = EngineConfig(model="m", quant="int8", prefix_cache="tokens", execution="compile")
    over = ServedEngineOptions(execution="eager").overrides(measured)
    assert over == {"max_batch_size": 8, "execution": "eager"}


def test_the_configuration_of_results_is_served_as_it_was_measured(tmp_path):
    made = record(EngineConfig(model="m", quant="int8", draft="ngram", prefill_chunk=128))
    store.append(tmp_path / store.RECORDS, made)
    for results in (str(tmp_path), f"{tmp_path}:{made.cell}"):
        config = _config(None, results, ServedEngineOptions(), DEFAULT_WEIGHTS)
        assert (config.model, config.quant, config.draft) == ("m", "int8", "ngram")
        assert (config.prefill_chunk, config.max_batch_size) == (128, 8)
        changed = _config(None, results, ServedEngineOptions(draft="none"), DEFAULT_WEIGHTS)
        assert (changed.quant, changed.draft) == ("int8", "none")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give MODEL, --config RESULTS, or --shape NAME"),
        (["m", "--config", "r"], "Leave MODEL out"),
        (["--config", "r", "--shape", "llama-2-7b"], "and --shape"),
        (["--config", "nowhere"], "no such results"),
        (["m", "--port", "70000"], "--port must be between 0 and 65535"),
        (["m", "--port", "1.5"], "not a whole number"),
        (["m", "--drain-s", "-1"], "--drain-s"),
        (["m", "--max-queued", "-1"], "--max-queued"),
        (["m", "--tool-parser", "hermis"], "Did you mean 'hermes'?"),
        (["m", "--api-key-file", "nowhere"], "nowhere"),
        (["m", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
        (["nowhere", "--port", "0"], "nowhere"),
    ],
)
def test_an_unsupported_request_is_refused(words, said, capsys):
    assert main(["serve", *words]) == 2
    assert said in capsys.readouterr().err


def test_keys_come_from_a_file_and_from_the_environment(tmp_path, monkeypatch):
    from hotloop.cli.options import DEFAULT_TEMPLATE

    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    monkeypatch.setenv("HOTLOOP_API_KEY", "three")
    options = ServerOptions(api_key_file=file)
    assert options.settings("folder/model", DEFAULT_TEMPLATE).keys == ("three", "one", "two")
    assert options.settings("folder/model", DEFAULT_TEMPLATE).name == "model"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        options.settings("m", DEFAULT_TEMPLATE)


def test_without_its_packages_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "m"]) == 2
    assert "needs the package uvicorn: pip install 'hotloop[serve]'" in capsys.readouterr().err
