"""The sample texts: there, readable, of the promised size, and told about in SOURCES.md."""

from __future__ import annotations

from importlib import resources

import pytest

from tempering.data import sample_text, texts
from tempering.errors import DataError


@pytest.mark.parametrize("name", list(texts()))
def test_a_text_is_plain_and_of_the_promised_size(name: str) -> None:
    text = sample_text(name)
    assert 50_000 <= len(text.encode()) < 100_000
    assert text.endswith("\n")
    assert not set(text) & set("\r\t\x00\ufeff")


def test_the_texts_differ_and_cover_four_kinds() -> None:
    assert len({sample_text(name) for name in texts()}) == len(texts())
    assert {text.kind for text in texts().values()} == {"fiction", "reference", "play", "code"}


def test_every_text_has_its_source_told() -> None:
    sources = resources.files("tempering.data").joinpath("SOURCES.md").read_text("utf-8")
    for name, text in texts().items():
        line = next(line for line in sources.splitlines() if f"`{name}.txt`" in line)
        assert text.licence in line


def test_an_unknown_text_names_the_closest_and_all() -> None:
    with pytest.raises(DataError, match=r"no sample text 'fictoin'; did you mean 'fiction'\?"):
        sample_text("fictoin")
    with pytest.raises(DataError, match="there are: demo, fiction, reference, play, code"):
        sample_text("../../errors")
