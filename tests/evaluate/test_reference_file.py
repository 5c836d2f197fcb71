import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file

from hotloop.errors import CheckpointError, ConfigError, HotloopError
from hotloop.evaluate.quality import kl_divergence, write_reference
from hotloop.evaluate.reference import HEADER_BYTES, Reference, ReferenceWriter
from hotloop.types import Score

V = 300


@pytest.fixture
def windows():
    ids = torch.randint(V, (4, 17), generator=torch.Generator().manual_seed(0))
    return ids.tolist()


@pytest.fixture
def engine(bigram):
    return bigram(3 * torch.randn(V, V, generator=torch.Generator().manual_seed(1)))


def test_answers_are_read_as_the_engine_gave_them(tmp_path, engine, windows, key_of):
    path, key = tmp_path / "ref.safetensors", key_of(windows, V)
    write_reference(engine, windows, path, key)
    reference = Reference(path, key)
    for i, score in enumerate(engine.score(windows, full=True)):
        assert torch.equal(reference.token_logprobs[i], score.token_logprobs)
        assert torch.equal(reference.top1[i], score.top1)
        read = torch.log_softmax(reference.log_probs(i, slice(None)), dim=-1)
        likely = score.log_probs > -8
        torch.testing.assert_close(read[likely], score.log_probs[likely], atol=5e-3, rtol=0)
        torch.testing.assert_close(
            reference.log_probs(i, slice(3, 5)), reference.log_probs(i, slice(None))[3:5]
        )


def test_the_file_is_ordinary_safetensors_with_float16_distributions(
    tmp_path, engine, windows, key_of
):
    path = tmp_path / "ref.safetensors"
    write_reference(engine, windows, path, key_of(windows, V))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"log_probs", "token_logprobs", "top1", "floor"}
        assert file.get_slice("log_probs").get_shape() == [4 * 16, V]
        assert file.get_slice("log_probs").get_dtype() == "F16"
    assert path.stat().st_size == HEADER_BYTES + 4 * 16 * (2 * V + 12) + 4 * 4


# Rows from nearly certain to nearly uniform, at a vocabulary of real size.
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_a_distribution_does_not_diverge_from_itself_through_the_file(tmp_path, key_of, scale):
    generator = torch.Generator().manual_seed(2)
    log_p = torch.log_softmax(scale * torch.randn(8, 32_000, generator=generator), dim=-1)
    assert _through_file(tmp_path, key_of, log_p, log_p).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
def test_tiny_divergences_survive_the_file(tmp_path, key_of, scale):
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(32, 32_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(32, 32_000, generator=generator, dtype=torch.float64)
    log_p = torch.log_softmax(logits, dim=-1)
    log_q = torch.log_softmax(logits + 0.0142 * noise, dim=-1)
    true = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    assert 0.5e-4 < true.mean() < 1.5e-4
    measured = _through_file(tmp_path, key_of, log_p.float(), log_q.float())
    assert measured.mean() == pytest.approx(true.mean().item(), rel=0.02)


def _through_file(tmp_path, key_of, log_p_TV, log_q_TV):
    T, vocab_size = log_p_TV.shape
    window = [0] * (T + 1)
    path, key = tmp_path / "ref", key_of([window], vocab_size)
    with ReferenceWriter(path, key, [window]).open() as writer:
        zeros = torch.zeros(T)
        writer.add(Score(token_logprobs=zeros, top1=zeros.long(), log_probs=log_p_TV))
        writer.floor.append(0.0)
    return kl_divergence(Reference(path, key).log_probs(0, slice(None)), log_q_TV)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"weights": "w1"}, "whose weights is 'w0', not 'w1'"),
        ({"text_sha256": "t1"}, "text_sha256"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"n_windows": 3}, "whose n_windows is 4, not 3"),
        ({"vocab_size": 301}, "whose vocab_size is 300, not 301"),
    ],
)
def test_a_reference_with_another_key_is_refused_with_the_difference(
    tmp_path, engine, windows, key_of, change, difference
):
    path = tmp_path / "ref"
    write_reference(engine, windows, path, key_of(windows, V))
    with pytest.raises(ConfigError, match=difference):
        Reference(path, key_of(windows, V).model_copy(update=change))


def test_progress_counts_the_windows_of_the_floor_too(tmp_path, engine, windows, key_of):
    told, key = [], key_of(windows, V)
    write_reference(engine, windows, tmp_path / "ref", key, lambda *progress: told.append(progress))
    total = len(windows) + key.n_floor
    assert told == [(done, total) for done in range(1, total + 1)]
    assert key.n_floor > 0


def test_a_half_written_reference_is_never_there(tmp_path, bigram, engine, windows, key_of):
    path, key = tmp_path / "ref", key_of(windows, V)

    class Dies(bigram):
        def score(self, windows, *, full=False):
            yield from super().score(windows[:2], full=full)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_reference(Dies(torch.zeros(V, V)), windows, path, key)
    assert list(tmp_path.iterdir()) == []
    write_reference(engine, windows, path, key)
    finished = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_reference(Dies(torch.zeros(V, V)), windows, path, key)
    assert path.read_bytes() == finished
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_damaged_or_foreign_file_is_refused(tmp_path, engine, windows, key_of):
    path, key = tmp_path / "ref", key_of(windows, V)
    with pytest.raises(CheckpointError, match="no reference here"):
        Reference(path, key)
    write_reference(engine, windows, path, key)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a complete reference"):
        Reference(path, key)
    save_file({"log_probs": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a reference of format"):
        Reference(path, key)


METADATA_DAMAGE = {
    "no key": {"key": None},
    "no hash": {"windows_sha256": None},
    "a hash that is none": {"windows_sha256": "w0"},
    "a surplus key": {"more": "x"},
    "a key that is no JSON": {"key": "{"},
    "a key that is a list": {"key": "[]"},
    "a deep key": {"key": '{"a":' * 100_000},
    "a key without fields": {"key": "{}"},
    "a window that is text": {"key": {"window": "17"}},
    "a window that is huge": {"key": {"window": 10**300}},
    "weights that are null": {"key": {"weights": None}},
    "a surplus field": {"key": {"more": 1}},
}
TENSOR_DAMAGE = {
    "token_logprobs that are no numbers": {"token_logprobs": lambda x: x * float("nan")},
} | {
    f"{name} {damage}": {name: change}
    for name in ("top1", "token_logprobs", "log_probs")
    for damage, change in {
        "left out": None,
        "of another type": lambda tensor: tensor.to(torch.bfloat16),
        "with a row less": lambda tensor: tensor[:-1].contiguous(),
        "of no dimension": lambda tensor: tensor.flatten()[0].clone(),
        "of one dimension more": lambda tensor: tensor[None].contiguous(),
    }.items()
}


@pytest.mark.parametrize("damage", [*METADATA_DAMAGE, *TENSOR_DAMAGE])
def test_whatever_a_damaged_file_holds_it_is_refused_as_no_whole_reference(
    tmp_path, engine, windows, key_of, damage
):
    path, key = tmp_path / "ref", key_of(windows, V)
    write_reference(engine, windows, path, key)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load(path.read_bytes())
    for name, value in METADATA_DAMAGE.get(damage, {}).items():
        if isinstance(value, dict):
            value = json.dumps(json.loads(metadata[name]) | value)
        metadata[name] = value
    for name, change in TENSOR_DAMAGE.get(damage, {}).items():
        tensors[name] = change and change(tensors[name])
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        path,
        metadata={name: value for name, value in metadata.items() if value is not None},
    )
    with pytest.raises(CheckpointError, match=f"^{path}: not a complete reference") as refused:
        Reference(path, key)
    assert len(str(refused.value)) < 1000


def test_a_disk_that_is_too_full_is_noticed_before_scoring(
    tmp_path, monkeypatch, engine, windows, key_of
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(HotloopError, match=r"64 predictions of 300 tokens.*Score fewer windows"):
        write_reference(engine, windows, tmp_path / "ref", key_of(windows, V))
    assert engine.alive == []


def test_windows_that_the_key_does_not_describe_are_refused(tmp_path, engine, windows, key_of):
    with pytest.raises(ConfigError, match=r"windows of shape \[3, 17\]"):
        write_reference(engine, windows[:3], tmp_path / "ref", key_of(windows, V))
    with pytest.raises(ConfigError, match="over 300 tokens cannot be compared with 299"):
        write_reference(engine, windows, tmp_path / "ref", key_of(windows, 299))


def test_a_reference_that_is_not_a_number_is_not_written(tmp_path, bigram, windows, key_of):
    broken = bigram(torch.full((V, V), float("nan")))
    with pytest.raises(HotloopError, match="16 of 16 log-probabilities in window 1"):
        write_reference(broken, windows, tmp_path / "ref", key_of(windows, V))
    assert list(tmp_path.iterdir()) == []
