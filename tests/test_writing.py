"""Files of which a part is read, and files that are being written."""

from __future__ import annotations

import io

from hotloop.writing import TAIL_BYTES, remove_unfinished, replacing, tail


def test_the_last_lines_of_a_log_are_those_that_are_not_blank():
    assert tail(io.BytesIO(b"one\n\ntwo\n \nthree\n"), 2) == ["two", "three"]
    assert tail(io.BytesIO(b""), 2) == []


def test_what_stands_before_the_start_is_left_out():
    assert tail(io.BytesIO(b"earlier\nnow\n"), 5, start=8) == ["now"]


def test_of_a_long_log_only_the_end_is_read():
    class Log(io.BytesIO):
        n_read = 0

        def read(self, size=-1, /):
            data = super().read(size)
            self.n_read += len(data)
            return data

    log = Log(b"x" * (5 * TAIL_BYTES) + b"\nlast\n")
    assert tail(log, 1) == ["last"]
    assert log.n_read == TAIL_BYTES


def test_a_file_that_is_being_written_is_not_taken_for_one_that_was_left(tmp_path):
    left = tmp_path / ".0123.partial"
    left.write_bytes(b"of a process that was killed")
    with replacing(tmp_path / "whole") as file:
        file.write(b"whole")
        file.flush()
        remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert (tmp_path / "whole").read_bytes() == b"whole"
