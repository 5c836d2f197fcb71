import hashlib
import platform

import pytest

from hotloop.errors import ConfigError
from hotloop.evaluate.text import load_text


def test_default_text_is_there_on_every_machine_and_names_its_version():
    text = load_text(None)
    assert text.name.startswith("pydoc_data.topics")
    assert platform.python_version() in text.name
    assert len(text.content) > 200_000
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()
    assert text == load_text(None)


def test_a_file_is_taken_byte_for_byte(tmp_path):
    path = tmp_path / "mine.txt"
    data = "Zeile eins\r\nZwei: ä 漢\n".encode()
    path.write_bytes(data)
    text = load_text(path)
    assert text.content.encode() == data
    assert text.sha256 == hashlib.sha256(data).hexdigest()
    assert text.name == "mine.txt", "a record must not hold the user's folders"


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"", "is empty"), (b" \n\t", "is empty"), (b"ab\xff", "not UTF-8.* 0xff at byte 2")],
)
def test_a_file_without_text_is_refused(tmp_path, data, problem):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=problem):
        load_text(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_text(tmp_path / "nothing.txt")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_text(tmp_path)
