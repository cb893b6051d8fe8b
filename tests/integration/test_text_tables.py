"""Texts in Parquet and JSON-lines files: the tokens of one text, whatever they are stored in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from tempering.attention.tuning import from_text
from tempering.chunks import chunks_digest, token_chunks
from tempering.cli import _run
from tempering.errors import DataError, OutputError
from tempering.text_tables import TextTable
from tests.tiny import TEXT, save_tiny_llama

DOCUMENTS = [TEXT[i : i + 331] for i in range(0, 4000, 331)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2))


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def as_parquet(path: Path, texts: list[str | None], kind: pa.DataType | None = None) -> Path:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, kind or pa.string())})
    parquet.write_table(table, path, row_group_size=3)
    return path


def as_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    return path


def joined(tokenizer, texts: list[str]) -> torch.Tensor:
    """Ids of the documents with the end of text between them, tokenised one by one."""
    ids: list[int] = []
    for text in texts:
        own = tokenizer(text, add_special_tokens=False).input_ids
        ids += [*([tokenizer.eos_token_id] if ids and own else []), *own]
    return torch.tensor(ids)


@pytest.mark.parametrize("kind", ["parquet", "large", "jsonl", "nested folders", "one file"])
def test_the_chunks_are_those_of_the_documents_one_after_the_other(tokenizer, tmp_path, kind):
    parts = [DOCUMENTS[:5], DOCUMENTS[5:6], DOCUMENTS[6:]]
    (tmp_path / "deep").mkdir()
    place = tmp_path
    for name, texts in zip(("a", "b", "deep/c"), parts):
        if kind == "jsonl":
            as_lines(tmp_path / f"{name}.jsonl", texts)
        elif kind == "nested folders":
            as_parquet(tmp_path / "deep" / f"{Path(name).name}.PARQUET", texts)
        elif kind == "one file":
            place = as_parquet(tmp_path / "all.parquet", DOCUMENTS)
        else:
            large = pa.large_string() if kind == "large" else None
            as_parquet(tmp_path / f"{name}.parquet", texts, large)
    if kind != "one file":
        (tmp_path / "readme.txt").write_text("what this is")
        (tmp_path / "_metadata.parquet").write_bytes(b"")
    expected = joined(tokenizer, DOCUMENTS)
    table = TextTable(place)
    found = token_chunks(tokenizer, table, 50)
    assert torch.equal(found.flatten(), expected[: len(expected) // 50 * 50])
    spread = token_chunks(tokenizer, TextTable(place), 50, 4)
    wanted = found[np.linspace(0, len(found) - 1, 4).round().astype(int)]
    assert torch.equal(spread, wanted) and chunks_digest(spread) == chunks_digest(wanted)
    # The tokens lie on disk: the memory is a map of a file that has no name any more.
    assert isinstance(np.asarray(table.ids(tokenizer)).base, np.memmap | torch.Tensor)
    assert table.ids(tokenizer) is table.ids(tokenizer)


def test_a_single_document_is_that_text(tokenizer, tmp_path):
    table = TextTable(as_parquet(tmp_path / "a.parquet", ["", TEXT, ""]))
    assert torch.equal(token_chunks(tokenizer, table, 32), token_chunks(tokenizer, TEXT, 32))
    one, other = from_text(tokenizer, table, chunk=32), from_text(tokenizer, TEXT, chunk=32)
    assert one.digest == other.digest


def test_what_is_no_table_of_texts_is_named(tokenizer, tmp_path, monkeypatch):
    def refused(words: str, path: Path = tmp_path) -> None:
        with pytest.raises(DataError, match=words):
            token_chunks(tokenizer, TextTable(path), 8)

    refused("holds files of neither .parquet nor .jsonl")
    good = as_parquet(tmp_path / "a.parquet", DOCUMENTS[:2])
    lines = as_lines(tmp_path / "b.jsonl", DOCUMENTS)
    refused("holds files of .jsonl and .parquet; give a folder of one kind")
    lines.unlink()
    parquet.write_table(pa.table({"content": ["a"], "id": [1]}), tmp_path / "b.parquet")
    refused("b.parquet has no column 'text' but content, id; rename the one with the texts")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    refused("b.parquet: the column 'text' holds int64, not texts")
    as_parquet(tmp_path / "b.parquet", ["a"] * 5 + [None])
    refused(r"b.parquet, row 5 \(from 0\): the column 'text' is empty; leave such rows out")
    (tmp_path / "b.parquet").write_bytes(good.read_bytes()[:-20])
    refused("b.parquet can't be read as .parquet .*it may be cut short")
    good.unlink()
    (tmp_path / "b.parquet").unlink()
    as_lines(tmp_path / "a.jsonl", ["hot"])
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": ')
    refused("b.jsonl can't be read as .jsonl")
    (tmp_path / "b.jsonl").unlink()
    refused("the text has 1 tokens?|less than one chunk")
    as_parquet(tmp_path / "none.parquet", ["", ""])
    refused("none.parquet: the texts have no tokens", tmp_path / "none.parquet")
    refused("missing.parquet can't be read", tmp_path / "missing.parquet")

    class Full:
        def __enter__(self):
            raise OSError(28, "No space left on device")

        def __exit__(self, *_):
            return None

    as_parquet(tmp_path / "none.parquet", DOCUMENTS)
    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with pytest.raises(OutputError, match="No space left on device; free some space.*TMPDIR"):
        TextTable(tmp_path / "none.parquet").ids(tokenizer)


def read(path: Path) -> list[str]:
    return [text for texts in TextTable(path).texts() for text in texts]


def test_each_document_below_a_folder_is_read_once(tmp_path):
    place = tmp_path / "corpus"
    # As Spark and Dask write them: a folder with the name of a file.
    (place / "data.parquet").mkdir(parents=True)
    as_parquet(place / "data.parquet" / "part-0.parquet", ["a", "b"])
    for hidden in (".ipynb_checkpoints", "_old"):
        (place / hidden).mkdir()
        as_parquet(place / hidden / "x.parquet", ["not read"])
    (tmp_path / "elsewhere").mkdir()
    as_parquet(tmp_path / "elsewhere" / "c.parquet", ["c"])
    (place / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(place)  # a loop
    assert read(place) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.ndjson", "b.json.zst", "b.parquet.bz2"])
def test_files_that_would_be_left_out_in_silence_are_named(tmp_path, name):
    as_lines(tmp_path / "a.jsonl", ["a"])
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name} is not read.*unpack it or name it .jsonl"):
        TextTable(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / "info.json").write_text("{}")
    assert read(tmp_path) == ["a"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("count", [1, 2, 300])
def test_lines_are_read_whatever_they_end_with(tmp_path, end, count):
    texts = [f"{i} é\u2028\n" for i in range(count)]
    lines = (end or "\n").join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines + end)
    assert read(tmp_path / "a.jsonl") == texts


def test_a_line_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempering.text_tables._BLOCK", 1 << 20)
    as_lines(tmp_path / "a.jsonl", ["x" * (2 << 20)])
    with pytest.raises(DataError, match="a.jsonl has a line of more than 1 MiB"):
        read(tmp_path)


def test_commands_take_folders(model, tmp_path, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    as_lines(folder / "a.jsonl", [TEXT])
    (tmp_path / "text.txt").write_text(TEXT)
    found = {}
    sources = {"folder": folder, "file": tmp_path / "text.txt", "lines": folder / "a.jsonl"}
    for name, text in sources.items():
        out = tmp_path / name
        options = ["--model", model, "--chunk", "32", "--chunks", "3", "--out", str(out)]
        assert _run(["measure", "--text", str(text), *options], False) == 0
        pattern = ["--pattern", "constant(1.2)"]
        assert _run(["compare", "--text", str(text), *pattern, *options], False) == 0
        (measured,), (compared,) = out.glob("measure-*.json"), out.glob("compare-*.json")
        found[name] = [json.loads(path.read_text())["results"] for path in (measured, compared)]
    assert found["folder"] == found["file"] == found["lines"]
    capsys.readouterr()
