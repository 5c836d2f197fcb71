"""Calibrated scales: whose activations weight the errors, and when the model is run for them."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from whole_models import CONFIG, CPU, random_tensors, write_folder, write_gguf_model

from hotloop.engine.llm import LLM
from hotloop.errors import CheckpointError, ConfigError
from hotloop.models import names
from hotloop.models.families import read_config
from hotloop.quant import parse_scheme
from hotloop.weights import calibration
from hotloop.weights.checkpoint import open_checkpoint, read_model, stored_form
from hotloop.weights.quantize import quantize_checkpoint

OPTIONS = {"device": "cpu", "dtype": "float32", "max_seq_len": 64}
MODEL = read_config(CONFIG)
DOWN = "model.layers.1.mlp.down_proj"


def importance_of(path: Path) -> dict[str, Tensor]:
    with closing(open_checkpoint(path)) as checkpoint:
        model, _ = read_model(checkpoint)
        return calibration.importance(checkpoint, model, CPU)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows by one each time that a model is run for its activations."""
    found, importance = [], calibration.importance

    def counted(*args, **options):
        found.append("run")
        return importance(*args, **options)

    monkeypatch.setattr(calibration, "importance", counted)
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_importance_is_the_mean_square_of_what_the_engines_matrices_multiply_with(tied, tmp_path):
    path = write_folder(
        tmp_path / "m", tie_word_embeddings=tied, attention_bias=True, mlp_bias=True
    )
    found = importance_of(path)
    llm = LLM(str(path), quant="none", **OPTIONS)
    decoder, squares = llm._runner._model.decoder, {}

    def keep(name):
        def hook(_linear, inputs):
            (x,) = inputs
            squares.setdefault(name, []).extend(x.flatten(end_dim=-2).square().unbind())

        return hook

    for i, block in enumerate(decoder.blocks):
        for matrix in MODEL.layers[i].matrices:
            for part in matrix.parts:
                hook = keep(names.layer(i, part.name))
                block.linears[matrix.name].register_forward_pre_hook(hook)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(MODEL.vocab_size, (calibration.N_SEQUENCES, 64), generator=generator)
    model = llm._runner._model
    for row in ids:  # one sequence at a time, through the engine's cache
        with torch.inference_mode():
            hidden = decoder(
                row[None], torch.arange(64)[None], model.cache, seats_B=torch.tensor([0]), length=64
            )
            keep("head")(None, (decoder.norm(hidden),))
    squares["model.embed_tokens" if tied else "lm_head"] = squares.pop("head")
    assert found.keys() == squares.keys()
    for name, expected in squares.items():
        torch.testing.assert_close(found[name], torch.stack(expected).mean(dim=0))


def test_scales_are_fitted_to_the_activations_of_the_model(tmp_path):
    path = write_folder(tmp_path / "m", dtype=torch.float32)
    importance = importance_of(path)
    dense, plain, fitted = (
        LLM(str(path), quant=quant, head="none", **OPTIONS)._runner._model.decoder
        for quant in ("none", "int4-g32", "int4-g32-cal")
    )

    def error(decoder, i, matrix):
        linear = decoder.blocks[i].linears[matrix.name]
        weight = dense.blocks[i].linears[matrix.name].packed[0]
        off = linear.kernel._dequantize(*linear.packed) - weight
        return float((off.square() * importance[names.layer(i, matrix.parts[0].name)]).sum())

    for i, layer in enumerate(MODEL.layers):
        for matrix in layer.matrices:
            assert error(fitted, i, matrix) < 0.95 * error(plain, i, matrix), (i, matrix.name)


def test_a_drafters_copies_are_calibrated_for_the_weights_that_the_model_has(tmp_path, runs):
    path = write_folder(tmp_path / "m", dtype=torch.float32)
    llm = LLM(str(path), quant="none", draft="self-int4-g32-cal", **OPTIONS)
    assert llm.config.draft == "self-int4-g32-cal"
    assert runs == ["run"]
    importance = importance_of(path)[DOWN]
    decoder, draft = llm._runner._model.decoder, llm._runner._model.draft_decoder
    weight = decoder.blocks[1].linears["down_proj"].packed[0]
    drafts = draft.blocks[1].linears["down_proj"]
    expected = parse_scheme("int4-g32-cal").quantize(weight, importance=importance)
    assert torch.equal(drafts.kernel._dequantize(*drafts.packed), expected.dequantize())


def test_a_model_is_run_only_where_a_calibrated_scheme_quantizes_something(tmp_path, runs):
    source = write_folder(tmp_path / "m")
    LLM(str(source), quant="int4-g32", draft="none", **OPTIONS)
    LLM(str(source), quant="int4-g32-cal", weights="random", **OPTIONS)
    LLM(str(source), quant="none", draft="self-int4-g32-cal", weights="random", **OPTIONS)
    assert not runs
    copy = quantize_checkpoint(source, tmp_path / "q", quant="int4-g32-cal")
    assert runs == ["run"]
    LLM(str(copy), **OPTIONS)
    assert runs == ["run"], "a copy has its scales"
    LLM(str(copy), draft="none", quant="int4-g32-cal", **OPTIONS)
    assert runs == ["run"]


def test_a_copy_is_run_with_the_weights_that_it_has_for_a_drafter(tmp_path, runs):
    copy = quantize_checkpoint(write_folder(tmp_path / "m"), tmp_path / "q", quant="int8")
    llm = LLM(str(copy), draft="self-int4-g32-cal", **OPTIONS)
    assert runs == ["run"]
    assert importance_of(copy).keys() >= names.linear_weights(MODEL).keys()
    (answer,) = llm.generate([[5, 6, 7]], max_new_tokens=4, ignore_eos=True)
    assert len(answer.token_ids) == 4


def test_a_text_to_calibrate_with_is_named_in_the_copy_and_decides_its_scales(tmp_path):
    source = write_folder(tmp_path / "m", dtype=torch.float32)
    texts = {"a.txt": "ab " * 900, "z.txt": "the end " * 300}
    scales = {}
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
        copy = quantize_checkpoint(
            source,
            tmp_path / f"{name}.q",
            quant="int4-g32-cal",
            calibration=tmp_path / name,
        )
        said = json.loads((copy / "config.json").read_text())["hotloop_quantization"]
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        assert said["calibration"] == {"name": name, "sha256": sha256}
        assert stored_calibration(copy) == said["calibration"], "a record says it"
        scales[name] = load_file(copy / "model.safetensors")[f"{DOWN}.weight.scale"]
    assert not torch.equal(scales["a.txt"], scales["z.txt"])


def stored_calibration(path: Path) -> dict[str, str]:
    with closing(open_checkpoint(path)) as checkpoint:
        return stored_form(checkpoint).to_dict()["quantization"]["calibration"]


def test_names_that_are_not_utf_8_are_kept_as_text(tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    (odd / odd.name).write_text("the end " * 300)
    source = write_folder(tmp_path / "m").rename(odd / "m")
    copy = quantize_checkpoint(source, odd / "q", quant="int4-g32-cal", calibration=odd / odd.name)
    assert stored_calibration(copy)["name"] == r"caf\udce9"
    with closing(open_checkpoint(copy)) as checkpoint:
        made_from = stored_form(checkpoint).to_dict()["quantization"]["source"]["name"]
    assert made_from.endswith(r"caf\udce9/m")
    assert len(LLM(str(copy), **OPTIONS).generate("ab", max_new_tokens=1).token_ids) == 1


def test_of_a_long_text_only_parts_are_tokenized(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "MAX_TEXT_LENGTH", 2000)
    lengths = []

    class Characters:
        def encode(self, text: str, **_: object) -> list[int]:
            lengths.append(len(text))
            return list(map(ord, text))

    text = tmp_path / "text.txt"
    text.write_text("a" * 5000 + "b" * 5000)
    _, ids_BT = calibration.read_tokens(text, Characters(), MODEL)
    assert lengths == [2000]
    first, second = ids_BT.tolist()
    assert (set(first), set(second)) == ({ord("a")}, {ord("b")}), "its beginning and its middle"


@pytest.mark.parametrize(
    ("quant", "content", "problem"),
    [
        ("int4-g32", "ab " * 900, r"'int4-g32' is not fitted to activations.* int4-g64-cal"),
        ("int4-g32-cal", "ab", r"text\.txt: its 1 tokens are too few .* at least \d+"),
        ("int4-g32-cal", b"\xff" * 900, r"text\.txt: .*UTF-8"),
        ("int4-g32-cal", None, r"text\.txt: "),
    ],
)
def test_a_text_that_nothing_can_be_calibrated_with_is_refused(quant, content, problem, tmp_path):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = write_folder(tmp_path / "m")
    with pytest.raises(ConfigError, match=problem):
        quantize_checkpoint(source, tmp_path / "q", quant=quant, calibration=text)
    assert not (tmp_path / "q").exists()


def test_progress_counts_the_layers_that_are_run_to_calibrate(tmp_path):
    source, n_layers = write_folder(tmp_path / "m"), len(MODEL.layers)
    seen = []
    quantize_checkpoint(
        source, tmp_path / "q", quant="int4-g32-cal", progress=lambda *at: seen.append(at)
    )
    total = n_layers + len(names.tensors(MODEL))
    assert seen == [(done, total) for done in range(1, total + 1)]

    seen.clear()
    LLM(
        str(source),
        quant="int4-g32-cal",
        progress=lambda phase, *at: seen.append(at) if phase == "load" else None,
        **OPTIONS,
    )
    assert seen == [(done, 2 * n_layers) for done in range(1, 2 * n_layers + 1)]


def test_copies_as_compressed_tensors_keep_calibrated_scales(tmp_path, runs):
    source = write_folder(tmp_path / "m")
    ours, theirs = (
        quantize_checkpoint(
            source, tmp_path / form, quant="int4-g32-cal", head="none", copy_format=form
        )
        for form in ("hotloop", "compressed-tensors")
    )
    assert runs == ["run", "run"]
    a, b = (LLM(str(path), **OPTIONS)._runner._model.decoder for path in (ours, theirs))
    assert len(runs) == 2
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def test_gguf_files_are_calibrated_as_they_are_stored(tmp_path):
    path = write_gguf_model(tmp_path / "m.gguf", "Q8_0", tied=True)
    found = importance_of(path)
    assert found.keys() == {*names.linear_weights(MODEL), "model.embed_tokens"}
    assert all(squares.isfinite().all() for squares in found.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_activations_and_fits_scales_that_are_as_good(tmp_path):
    path, cuda = write_folder(tmp_path / "m", dtype=torch.float32), torch.device("cuda")
    here = importance_of(path)
    with closing(open_checkpoint(path)) as checkpoint:
        there = calibration.importance(checkpoint, MODEL, cuda)
    scheme, weight = parse_scheme("int4-g32-cal"), random_tensors(CONFIG)[f"{DOWN}.weight"].float()
    errors = []
    for squares, device in ((here, CPU), (there, cuda)):
        torch.testing.assert_close(squares[DOWN].cpu(), here[DOWN], rtol=1e-3, atol=0)
        quantized = scheme.quantize(weight.to(device), importance=squares[DOWN]).dequantize().cpu()
        errors.append(float(((quantized - weight).square() * here[DOWN]).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_activations_beyond_float32_are_refused_by_name(tmp_path):
    def overflow(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] *= 1e25
        tensors["model.layers.0.mlp.gate_proj.weight"] *= 1e25

    path = write_folder(tmp_path / "m", overflow)
    with pytest.raises(CheckpointError, match="give a scheme without -cal") as caught:
        importance_of(path)
    assert "down_proj" in str(caught.value)
