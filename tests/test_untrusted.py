"""Files from outside are bounded and validated, or refused in one line that names them."""

import json
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Annotated, Literal

import pytest
from malformed import Case, check, parametrize
from pydantic import Field
from waiting import HANG_S

from hotloop import untrusted
from hotloop.checked import Count
from hotloop.errors import CheckpointError, ConfigError, UnknownNameError, shorten_value
from hotloop.untrusted import StrictModel, read_json, validated


class Shape(StrictModel):
    width: Count
    kind: Literal["wide", "narrow"] = "wide"


class Sheet(StrictModel):
    size: Count
    ratio: Annotated[float, Field(gt=0, le=1e18)] = 1.0
    on: bool = False
    name: str = ""
    shapes: tuple[Shape, ...] = Field(default=(), strict=False)
    offset: Annotated[float, Field(ge=-1, le=1)] = 0.0


GOOD = {"size": 3}


def validate(folder: Path, **keys: object) -> Sheet:
    return validated(Sheet, GOOD | keys, folder / "sheet.json")


def written(folder: Path, data: bytes) -> Path:
    file = folder / "sheet.json"
    file.write_bytes(data)
    return file


WRONG = {
    "text": "12",
    "empty": "",
    "boolean": True,
    "list": [1],
    "object": {"a": 1},
    "nan": float("nan"),
    "infinity": float("inf"),
    "huge": 10**30,
    "beyond-float": 10**400,
    "digits": 10**5000,
    "negative": -1,
    "null": None,
    "megabyte": "x" * 2**20,
}


def wrong_values() -> list[Case]:
    """Each field with each value that is not of its kind."""
    right = {"name": {"text", "empty", "megabyte"}, "on": {"boolean"}, "offset": {"negative"}}

    def case(key: str, label: str, value: object) -> Case:
        names = None if label in right.get(key, ()) else ("sheet.json", key)
        return Case(f"{key}-{label}", lambda folder: validate(folder, **{key: value}), names)

    keys = ("size", "ratio", "on", "name", "shapes", "offset")
    return [case(key, label, value) for key in keys for label, value in WRONG.items()]


def bad_json() -> list[Case]:
    texts = {
        "empty": b"",
        "list": b"[1]",
        "text": b'"a"',
        "null": b"null",
        "half": b'{"size": 3',
        "twice": b'{"size": 3, "size": 4}',
        "nan": b'{"size": NaN}',
        "infinity": b'{"size": -Infinity}',
        "too-large": b'{"size": 1e999}',
        "digits": b'{"size": ' + b"9" * 5000 + b"}",
        "decimals": b'{"size": 0.' + b"9" * 5000 + b"}",
        "deep-lists": b'{"size": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deeper-than-allowed": b'{"size": ' + b"[" * 80 + b"]" * 80 + b"}",
        "deep-objects": b'{"a":' * 50_000,
        "latin-1": '{"size": "é"}'.encode("latin-1"),
        "surrogate": b'{"size": "\\ud800"}',
        "zeros": bytes(100),
        "large": b'{"size": "' + b"x" * untrusted.DEFAULT_LIMIT_BYTES + b'"}',
    }
    return [
        Case(
            f"json-{label}",
            lambda folder, data=data: read_json(written(folder, data)),
            ("sheet.json",),
        )
        for label, data in texts.items()
    ]


def not_files() -> list[Case]:
    def pipe(folder: Path) -> Path:
        os.mkfifo(folder / "pipe")
        return folder / "pipe"

    def loop(folder: Path) -> Path:
        (folder / "loop").symlink_to(folder / "loop")
        return folder / "loop"

    def listening(folder: Path) -> Path:
        here = os.getcwd()
        os.chdir(folder)  # a socket's name is at most 108 characters
        try:
            socket.socket(socket.AF_UNIX).bind("socket")
        finally:
            os.chdir(here)
        return folder / "socket"

    makers = {
        "missing": (lambda folder: folder / "none", "no such file"),
        "folder": (lambda folder: folder, "is a folder"),
        "pipe": (pipe, "is a pipe"),
        "socket": (listening, "is a socket"),
        "device": (lambda _: Path("/dev/zero"), "is a device"),
        "loop": (loop, "loop"),
        "long-name": (lambda folder: folder / ("n" * 5000), "nnn"),
        "under-a-file": (lambda folder: written(folder, b"{}") / "x", "sheet.json/x"),
        "null-character": (lambda folder: folder / "a\0b", "null"),
        "lone-surrogate": (lambda folder: folder / "a\ud800", "surrogate"),
    }
    return [
        Case(f"{reader.__name__}-{label}", lambda folder, r=reader, m=make: r(m(folder)), (said,))
        for label, (make, said) in makers.items()
        for reader in (read_json, untrusted.read_text)
    ]


@parametrize(wrong_values() + bad_json() + not_files())
def test_malformed_files_are_refused_by_name(case, tmp_path):
    check(case, tmp_path)


def test_a_link_to_a_file_and_a_byte_order_mark_are_read(tmp_path):
    file = written(tmp_path, b"\xef\xbb\xbf" + json.dumps({"name": "😀"}).encode())
    (tmp_path / "link.json").symlink_to(file)
    assert read_json(tmp_path / "link.json") == {"name": "😀"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path):
    file = written(tmp_path, b"{}")
    file.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        read_json(file)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"size": "12"}, "f.json: size: must be an integer, not '12'"),
        ({"ratio": 0}, "f.json: ratio: must be above 0, not 0"),
        ({"sise": 1}, "f.json: sise: there is no such key. Did you mean 'size'? Choose from: "),
        ({"shapes": [{"widht": 1}]}, "f.json: shapes[0].width: is missing; shapes[0].widht: there"),
        ({"shapes": [{"width": 1, "kind": "wid"}]}, "'wid' is not a choice. Did you mean 'wide'?"),
    ],
)
def test_an_error_names_file_key_value_and_what_is_right(keys, said):
    with pytest.raises(ConfigError) as raised:
        validated(Sheet, GOOD | keys, "f.json", refuse=untrusted.config_error)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_values_that_contain_each_other_over_and_over_cost_nothing():
    value: object = "x"
    for _ in range(40):
        value = [value] * 10
    with pytest.raises(CheckpointError) as raised:
        validated(Sheet, {"size": value}, "f.json")
    assert len(str(raised.value)) < 300


def test_unknown_keys_are_named_together_and_what_is_right_once():
    with pytest.raises(CheckpointError) as raised:
        validated(Sheet, GOOD | {f"key{i}": 1 for i in range(7)}, "f.json", prefix="sheet.")
    message = str(raised.value)
    assert "sheet.key0, sheet.key1" in message
    assert "sheet.key4 and 2 more: there are no such keys. Choose from: " in message
    assert message.count("Choose from") == 1


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_of_large_binary_values_only_what_is_shown_is_looked_at(kind):
    value = kind(b"head" + bytes(2**24) + b"tail")
    tracemalloc.start()
    try:
        shown, nested = shorten_value(value), shorten_value([value])
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**20
    assert "b'head" in shown
    assert shown.rstrip(")").endswith("tail'")
    assert max(len(shown), len(nested)) <= 80
    assert shorten_value(kind(b"a'b")) == repr(kind(b"a'b"))


def test_a_name_of_a_megabyte_is_shortened_in_errors():
    name = "x" * 2**20
    assert len(str(CheckpointError(name, "is broken", tensor=name))) < 1000
    assert len(str(UnknownNameError("scheme", name, ["a"]))) < 1000


def test_importing_hotloop_and_its_cli_leaves_pydantic_alone():
    program = "import hotloop, hotloop.cli.app, sys; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=HANG_S).returncode == 0


def test_a_text_of_the_wrong_form_is_told_what_it_must_be(tmp_path):
    class Hash(StrictModel):
        sha256: Annotated[str, Field(pattern="^[0-9a-f]{4}$")]

    with pytest.raises(CheckpointError, match=r"sha256: must match pattern .*, not 'xyz'"):
        validated(Hash, {"sha256": "xyz"}, tmp_path / "f")
