"""The reference of quality, and the description of the measured model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hotloop.errors import ConfigError, ModelNotFoundError
from hotloop.evaluate.text import load_text
from hotloop.sweep import models as models_module
from hotloop.sweep.job import Job, make_jobs
from hotloop.sweep.models import KnownModel, check_length, resolve_schemes
from hotloop.sweep.recipe import QualityOptions, Workload
from hotloop.types import EngineConfig
from hotloop.weights.identity import Quantization, SourceModel, StoredForm, StoredType

SHA = {name: letter * 64 for name, letter in (("source", "a"), ("other", "b"), ("copy", "c"))}


def stored(dtype: str, quantization: Quantization | None = None) -> StoredForm:
    types = (StoredType(dtype=dtype, n_tensors=1, n_bytes=1),)
    return StoredForm(types=types, quantization=quantization)


def copy_of(source: str | None, *, head: str = "int8") -> StoredForm:
    named = source and SourceModel(name=source, sample=SHA["source"])
    return stored("I8", Quantization(scheme="int4-g64", head=head, source=named or None))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, StoredForm]:
    """The models on this machine, by name."""
    found = {"source": stored("BF16"), "other": stored("BF16"), "copy": copy_of("source")}

    def resolve(name: str) -> Path:
        if name not in found:
            raise ModelNotFoundError(f"there is no {name}")
        return Path(name)

    monkeypatch.setattr(models_module, "resolve_model", resolve)
    for name in ("identify_checkpoint", "sample_checkpoint"):
        monkeypatch.setattr(models_module, name, lambda path: SHA[path.name])
    monkeypatch.setattr(models_module, "read_stored_form", lambda path: found[path.name])
    monkeypatch.setattr("hotloop.sweep.job.check_length", lambda *_: None)
    return found


def job(model: str, reference: str | None = None) -> Job:
    quality = QualityOptions(window=8, n_windows=2, reference=reference)
    (made,) = make_jobs(
        [EngineConfig(model=model)], Workload(prompt_tokens=4, new_tokens=4), quality
    )
    return made


@pytest.mark.usefixtures("here")
def test_a_model_is_compared_with_itself_unquantized():
    made = job("source")
    scoring = made.reference_job(Path())
    assert (made.reference_model, made.no_reference_reason) == (None, None)
    assert (scoring.config.model, scoring.weights_sha256) == ("source", SHA["source"])
    assert made.provenance["stored"]["is_quantized"] is False


@pytest.mark.usefixtures("here")
def test_a_quantized_copy_is_called_by_its_scheme_and_compared_with_what_it_was_made_from():
    made = job("copy")
    assert made.cell == "int4-g64/auto"
    assert (made.reference_model, made.reference_sha256) == ("source", SHA["source"])
    scoring = made.reference_job(Path())
    assert (scoring.config.model, scoring.config.quant) == ("source", "none")
    assert scoring.weights_sha256 == made.compared_sha256 == SHA["source"]
    assert scoring.reference_model is None
    assert made.provenance["stored"]["is_quantized"] is True


def test_a_copy_of_version_1_which_does_not_identify_its_source_needs_to_be_told(here):
    source = SourceModel(name="source", sha256=SHA["source"])
    here["copy"] = stored(
        "I8", Quantization(version=1, scheme="int4-g64", head="int8", source=source)
    )
    assert "an earlier version of hotloop made the copy" in job("copy").no_reference_reason
    assert job("copy", reference="other").reference_model == "other"


def test_the_quality_of_a_copy_whose_source_is_gone_is_unknown(here):
    del here["source"]
    made = job("copy")
    assert made.reference_model is None
    assert made.no_reference_reason is not None
    for words in (
        "no unquantized reference",
        "int4-g64",
        "--reference",
        "source is not on this machine",
    ):
        assert words in made.no_reference_reason
    here["copy"] = copy_of(None)
    assert "no unquantized reference" in str(job("copy").no_reference_reason)
    here["copy"] = copy_of("other")  # a model of that name, which has another content
    assert "other on this machine has other content" in str(job("copy").no_reference_reason)


def test_a_reference_that_is_named_is_the_model_of_that_content_or_refused(here):
    assert job("copy", "source").reference_model == "source"
    with pytest.raises(
        ConfigError, match=r"'copy' was not made from the reference 'other' but from 'source'"
    ):
        job("copy", "other")
    with pytest.raises(ConfigError, match=r"'copy' is itself a quantized copy \(int4-g64\)"):
        job("copy", "copy")
    here["source"] = stored("Q4_1")
    assert job("source", "other").reference_model == "other"


@pytest.mark.usefixtures("here")
def test_another_reference_is_another_measurement():
    assert job("source").key != job("source", "other").key


def test_settling_keeps_what_was_asked_for_and_is_refused_by_the_engine():
    asked = EngineConfig(model="copy", quant="int8")
    assert resolve_schemes(asked, copy_of(None)) == asked
    auto = EngineConfig(model="copy", quant="auto")
    resolved = resolve_schemes(auto, copy_of(None, head="none"))
    assert (resolved.quant, resolved.head) == ("int4-g64", "none")
    assert resolve_schemes(auto, stored("BF16")).quant == "none"
    assert resolve_schemes(auto, None).quant == "none", "random weights have no file"
    assert resolve_schemes(auto, stored("Q4_1")).quant == "auto", "another tool quantized it"


def test_a_text_that_is_too_short_is_refused_before_any_process_starts(monkeypatch, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    tokenizer = SimpleNamespace(encode=lambda text, **_: list(range(len(text.split()))))
    monkeypatch.setattr("hotloop.text.tokenizer.load_tokenizer", lambda _: tokenizer)
    model = KnownModel(name="m", path=Path("m"))
    with pytest.raises(ConfigError, match="the text has 3 tokens, fewer than a window of 8"):
        check_length(model, load_text(text).content, 8)
