"""The file that keeps a run: it goes on, or says why not."""

from __future__ import annotations

import pytest
import torch

from tempering.attention.tuning.saved_run import SavedRun
from tempering.errors import DataError, InputError, OutputError


def test_what_was_saved_comes_back(tmp_path):
    kept = SavedRun(tmp_path / "run", {"seed": 1})
    assert kept.load() is None
    state = {"theta": torch.tensor([0.1, 1 / 3]).double(), "history": [(0, None, 1.5)], "step": 3}
    kept.save(state)
    found = SavedRun(tmp_path / "run", {"seed": 1}).load()
    assert torch.equal(found["theta"], state["theta"])
    assert found["history"] == state["history"] and found["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_another_run_is_refused_and_what_differs_is_named(tmp_path):
    SavedRun(tmp_path / "run", {"seed": 1, "steps": 3}).save({"step": 1})
    with pytest.raises(InputError, match=r"keeps another run \(another seed\)"):
        SavedRun(tmp_path / "run", {"seed": 2, "steps": 3}).load()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(DataError, match="does not hold a run that can go on"):
        SavedRun(tmp_path / "run", {}).load()


def test_a_file_cut_short_is_refused(tmp_path):
    SavedRun(tmp_path / "run", {}).save({"theta": torch.zeros(1000)})
    whole = (tmp_path / "run").read_bytes()
    (tmp_path / "run").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="delete it to start anew"):
        SavedRun(tmp_path / "run", {}).load()


def test_a_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"version": 1, "key": "", "state": torch.nn.Linear(1, 1)}, tmp_path / "run")
    with pytest.raises(DataError, match="does not hold a run"):
        SavedRun(tmp_path / "run", {}).load()


def test_nowhere_to_write_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        SavedRun(tmp_path / "file" / "run", {}).save({})


def test_without_a_path_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = SavedRun(None, {})
    kept.save({"step": 1})
    assert kept.load() is None and list(tmp_path.iterdir()) == []
