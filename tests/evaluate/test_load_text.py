import hashlib
import json
import os
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


def test_topics_are_the_articles_of_the_default_text():
    text = load_text(None)
    assert text.starts[0] == 0
    assert len(text.starts) > 20
    assert all(text.content[start - 2 : start] == "\n\n" for start in text.starts[1:])


def test_titles_as_wikitext_has_them_begin_articles_and_titles_of_sections_do_not(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = One = \n \n Text a = b . \n = = Part = = \n more \n = Two = \n end\n")
    text = load_text(path)
    assert [text.content[start:].split("\n")[0] for start in text.starts] == [
        " = One = ",
        " = Two = ",
    ]


def test_each_line_of_a_jsonl_text_is_an_article(tmp_path):
    path = tmp_path / "articles.jsonl"
    articles = ["First.\nStill the first.", "Second", "Third"]
    path.write_text("\n".join(json.dumps({"text": each, "id": 7}) for each in articles) + "\n")
    text = load_text(path)
    assert text.content == "\n\n".join(articles)
    assert [text.content[i:][: len(a)] for i, a in zip(text.starts, articles, strict=True)] == (
        articles
    )
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text('{"text": "fine"}\n{"body": "no text"}\n')
    with pytest.raises(ConfigError, match=r"articles.jsonl, line 2.*\{\"text\": \"...\"\}"):
        load_text(path)


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"", "holds no text"), (b" \n\t", "holds no text"), (b"ab\xff", "byte 2 is 0xff.*iconv")],
)
def test_a_file_without_text_is_refused(tmp_path, data, problem):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=problem):
        load_text(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        load_text(tmp_path / "nothing.txt")
    with pytest.raises(ConfigError, match="is a folder, not a file"):
        load_text(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a pipe, not a file"):
        load_text(tmp_path / "pipe")
