"""Files are written to the results folder or nowhere."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from collections.abc import Iterator

import pytest

from hotloop.errors import ConfigError, HotloopError
from hotloop.writing import (
    MAX_NAME_BYTES,
    append_line,
    check_component,
    file_name,
    make_folder,
    make_subfolder,
    opened_to_append,
    replacing,
    write_whole,
)


@contextlib.contextmanager
def size_limit(n_bytes: int) -> Iterator[None]:
    """Limits the bytes of a file, in place of a disk that is full, for the test's own code alone.

    Between a test and the end of its fixtures, pytest writes to a file of its own.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    link = tmp_path / "published.md"
    link.symlink_to(outside)
    write_whole(link, "theirs")
    assert outside.read_text() == "mine"
    assert not link.is_symlink()
    assert link.read_text() == "theirs"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("before")
    with contextlib.suppress(KeyError), replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no text", "t.txt"), ConfigError("c")])
def test_an_error_of_the_block_itself_is_not_said_to_be_one_of_writing(tmp_path, error):
    def write():
        with replacing(tmp_path / "table.md") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)) as raised:
        write()
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 2**20], ids=["on leaving the block", "within the block"])
def test_a_file_that_cannot_be_written_to_its_end_is_named(tmp_path, size):
    path = tmp_path / "table.md"
    refused = pytest.raises(HotloopError, match=f"^cannot write {path}: File too large")
    with refused, size_limit(10):
        write_whole(path, "x" * size)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_as_readable_as_other_files(tmp_path):
    (tmp_path / "other").write_text("")
    write_whole(tmp_path / "table.md", "text")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "table.md")}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["records.jsonl", ".lock"])
def test_links_pipes_and_folders_are_not_appended_to(tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    path = tmp_path / name
    for make in (lambda: path.symlink_to(outside), lambda: os.mkfifo(path)):
        make()
        with pytest.raises(ConfigError, match=f"{name} is"):
            append_line(path, b"theirs")
        path.unlink()
    path.mkdir()
    with pytest.raises(HotloopError, match=f"cannot write .*{name}: Is a directory"):
        append_line(path, b"theirs")
    assert outside.read_text() == "mine\n"


def test_a_folder_of_results_is_not_a_link_to_elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "logs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="logs is a link"):
        make_subfolder(tmp_path, "logs")


@pytest.mark.parametrize(
    "path", ["file/results", "x" * 5000, "a\0b", "\ud800"], ids=["under a file", "long", "0", "?"]
)
def test_a_place_where_nothing_can_be_written_is_named_in_one_line(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HotloopError, match=r"^cannot write ") as error:
        make_folder(tmp_path / path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["", ".", "..", "../mine", "/abs", "a\\b", "a\nb", "\x1b[2J"])
def test_a_name_is_one_component_of_a_path(name):
    with pytest.raises(ConfigError, match="name of one folder"):
        check_component(name)


def test_a_name_is_no_longer_than_file_systems_allow():
    assert check_component("ä" * (MAX_NAME_BYTES // 2)) == "ä" * (MAX_NAME_BYTES // 2)
    with pytest.raises(ConfigError, match="at most 200 bytes, not of 202"):
        check_component("ä" * (MAX_NAME_BYTES // 2 + 1))


def test_every_text_has_a_file_name_and_different_long_ones_have_different_names(tmp_path):
    texts = ["int8/compile", "..", "../../mine", "", "\ud800", "x" * 9999, "x" * 9998, "\x1b[31m"]
    names = [file_name(text) for text in texts]
    assert names[0] == "int8_compile"
    assert names[5] != names[6]
    for name in names:
        (tmp_path / f"reference-{name}.log").write_text("")
        assert check_component(name) == name


def test_a_torn_line_stays_by_itself(tmp_path):
    path = tmp_path / "lines"
    append_line(path, b"one")
    with opened_to_append(path) as file:
        file.write(b"tor")
    append_line(path, b"two")
    assert path.read_bytes() == b"one\ntor\ntwo\n"
