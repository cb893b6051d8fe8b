"""Texts and JSON of a user's: what is read, and what is said of what can't be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tempering.errors import DataError
from tempering.files import decoded, read_json, read_text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"one\r\ntwo\r\n", "one\ntwo\n"),
        (b"one\rtwo\r", "one\ntwo\n"),
        (b"one\r\n\r\ntwo\n", "one\n\ntwo\n"),
        (b"\xef\xbb\xbfone", "one"),
        ("é\r\n".encode(), "é\n"),
    ],
)
def test_lines_end_in_a_newline_alone(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert read_text(path) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("Straße, fünf".encode()[:-3], "it ends in the middle of a character"),
        ("Grüße".encode()[:3], "it ends in the middle of a character"),
        ("Straße".encode() + b"\xff" + "fünf".encode(), "it was damaged there.*iconv -c -f utf-8"),
        ("Straße und Grüße".encode("latin1"), "convert it, e.g. with: iconv -f latin1"),
        (b"\xff\xfe", "convert it"),
        (b"", "is empty"),
        (b"a\x00b", "is binary"),
    ],
)
def test_the_advice_mends_and_never_garbles(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decoded(data, "notes.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "9" * 5000 + "}", "a number of too many digits"),
        ('{"a": -' + "1" * 5000 + "}", "a number of too many digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": }', r"not JSON \(line 1, column 7"),
        ("", "not JSON"),
        (b"\xff{}", "is not JSON: it is not UTF-8 text"),
    ],
)
def test_json_that_can_t_be_read_is_one_error(text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_json(text, "file.json", "give another")


def test_json_that_can_be_read_is_read() -> None:
    assert read_json('{"a": [1, 2.5, null]}', "file.json") == {"a": [1, 2.5, None]}
