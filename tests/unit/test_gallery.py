"""Profiles that come with the package: found by name, never in place of a file."""

from __future__ import annotations

import json

import pytest

from tempering import Profile
from tempering.cli.shared.evidence import evidence_grids
from tempering.data.gallery import gallery, gallery_text, names_gallery
from tempering.errors import DataError

SHAPES = {"smollm2": (30, 9), "gemma3-270m": (18, 4)}
REPAIRS = [name for name in gallery() if name.endswith("/repair")]


@pytest.mark.parametrize("name", REPAIRS)
def test_every_repair_loads_with_its_evidence(name):
    profile = Profile.load(name)
    assert profile.temperature.shape == (30, 9)
    evidence = profile.evidence
    assert evidence["recipe"] and evidence["repairs"] == name.split("/")[0]
    repaired = [row for row in evidence["repair"] if row["label"] == "repaired"]
    assert {row["test"].split(",")[0] for row in repaired} >= {"text", "play", "reference"}
    for row in repaired:
        assert row["low"] <= row["share"] <= row["high"]
    first = repaired[0]
    assert first["low"] > 0
    for label in ("negated", "shuffled"):
        (control,) = (row for row in evidence["repair"] if row["label"] == label)
        assert control["share"] < first["low"]
    titles = [grid.heading for grid in evidence_grids(evidence)]
    assert titles == ["How it was found", "Repair, nats per token"]


@pytest.mark.parametrize("name", [name for name in gallery() if name not in REPAIRS])
def test_every_profile_loads_with_its_evidence(name):
    profile = Profile.load(name)
    assert profile.temperature.shape == SHAPES[name.split("/")[0]]
    assert ((profile.temperature > 0.2) & (profile.temperature < 5)).all()
    assert (profile.temperature != 1).any()
    evidence = profile.evidence
    rows = evidence["measured"]
    assert {row["family"] for row in rows} == {"tuned", "control"}
    kinds = {row["test"].split(", ")[-1] for row in rows if row["test"].startswith("text, ")}
    assert kinds == {"fiction", "play", "code", "reference"}
    for row in rows:
        if row["n"] > 1:
            assert row["low"] <= row["change"] <= row["high"]
    assert len(gallery_text(name)) < 1_000_000
    assert json.loads(gallery_text(name))["layers"]


def test_the_gallery_holds_text():
    assert "smollm2/text" in gallery()


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(DataError, match="did you mean 'smollm2/text'.* there are: .*smollm2/text"):
        Profile.load("smollm2/texts")


def test_a_file_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_gallery("smollm2/text")
    (tmp_path / "smollm2").mkdir()
    own = Profile.from_matrix([[1.0, 2.0]])
    own.save("smollm2/text")
    assert not names_gallery("smollm2/text")
    assert Profile.load("smollm2/text").rows[0].tolist() == [1.0, 2.0]


def test_other_paths_are_files():
    for path in ("text", "smollm2/text/deep", "other/text", "smollm2"):
        assert not names_gallery(path)
        with pytest.raises(DataError, match="can't read|cannot read|no such|No such"):
            Profile.load(path)


def test_controls_that_ran_on_less_are_told_apart():
    evidence = Profile.load("smollm2/recall").evidence
    own = [row for row in evidence["measured"] if row["test"] == "recall, sentence, means"]
    first, control = (next(row for row in own if row["label"] == x) for x in ("tuned", "negated"))
    assert control["targets"] < first["targets"]
    grids = {grid.heading: grid for grid in evidence_grids(evidence)}
    told = grids["Accuracy, recall, sentence, means"].remark
    assert f"controls on {control['targets']} of them" in told
    steps = next(row for row in grids["How it was found"].rows if row[0] == "fit")
    assert steps[1].startswith("130 steps; the first: step 0") and len(steps[1]) < 400
