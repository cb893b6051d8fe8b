"""Profiles in files: round trips, and every way a file can be wrong."""

from __future__ import annotations

import json

import pytest
import torch

from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import DataError, ProfileError, TemperatureError, TemperingError

PLAN = Layout(
    tuple(AttentionLayer(f"layers.{i}.attn", "decoder", i, 2, 1) for i in range(3)),
    ("layers.3",),
    {"decoder": 4},
)
FIELDS = ("layers", "named", "partial", "untempered", "model", "evidence", "pattern")


def saved(tmp_path):
    profile = Profile.from_schedule("linear(1.3,0.7)", PLAN)
    return profile, profile.save(tmp_path / "profile.json")


@pytest.mark.parametrize(
    "profile",
    [
        Profile.from_matrix([[1.0, 1 / 3], [0.001, 1000.0]]),
        Profile.from_schedule("linear(1.3,0.7)", PLAN),
        Profile.by_module({"a.b": [0.1, 0.2], "c": 3.0}),
        Profile.neutral(PLAN),
    ],
    ids=["matrix", "schedule", "by module", "neutral"],
)
def test_round_trip_to_the_last_bit(profile, tmp_path):
    path = profile.save(tmp_path / "deeper" / "profile.json")
    again = Profile.load(path)
    assert len(again.rows) == len(profile.rows)
    for mine, its in zip(profile.rows, again.rows, strict=True):
        assert torch.equal(mine, its)
    for name in ("names", "partial", "untempered", "model", "pattern"):
        assert getattr(again, name) == getattr(profile, name)
    assert again.to_json() == profile.to_json()
    assert json.loads(path.read_text())["version"] == 1


def test_the_pattern_and_the_evidence_come_back(tmp_path):
    profile, path = saved(tmp_path)
    assert profile.pattern
    assert Profile.load(path).pattern == profile.pattern
    data = profile.to_json() | {"evidence": {"cost": [0.1, 0.2]}}
    path.write_text(json.dumps(data))
    assert Profile.load(path).evidence == {"cost": [0.1, 0.2]}


@pytest.mark.parametrize(
    "content, error, said",
    [
        (b"", DataError, "empty"),
        (b"  \n", DataError, None),
        (b"not json", DataError, r"is not JSON \(line 1, column 1"),
        (b'{"format": ', DataError, "is not JSON"),
        (b"\xff\xfe\x00binary", DataError, None),
        (b"[1, 2]", ProfileError, "is not a profile"),
        (b"null", ProfileError, "is not a profile"),
        (b'{"format": "else"}', ProfileError, "is not a profile"),
    ],
    ids=["empty", "blank", "text", "cut off", "binary", "list", "null", "other format"],
)
def test_files_that_are_no_profiles(content, error, said, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    with pytest.raises(error, match=said) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(TemperingError, match="nothing.json"):
        Profile.load(tmp_path / "nothing.json")
    with pytest.raises(TemperingError):
        Profile.load(tmp_path)


def changed(tmp_path, **fields):
    profile, path = saved(tmp_path)
    path.write_text(json.dumps(profile.to_json() | fields))
    return path


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_another_version(version, tmp_path):
    with pytest.raises(ProfileError, match="version .*; this tempering reads 1, 2, 3"):
        Profile.load(changed(tmp_path, version=version))


LAYER = {"name": "layers.0.attn", "temperature": [1.0, 2.0]}


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": []},
        {"layers": None},
        {"layers": 5},
        {"layers": [1, 2]},
        {"layers": [{"name": "a"}]},
        {"layers": [{"temperature": [1.0]}]},
        {"layers": [{"name": "a", "temperature": None}]},
        {"layers": [{"name": "a", "temperature": "hot"}]},
        {"layers": [{"name": "a", "temperature": []}]},
        {"layers": [{"name": "a", "temperature": [[1.0]]}]},
        {"layers": [{"name": "a", "temperature": 1.0}]},
        {"layers": [{"name": "a", "temperature": [1.0, "x"]}]},
        {"layers": [{"name": "a", "temperature": [True, None]}]},
        {"layers": [LAYER, LAYER]},
        {"model": 5},
        {"model": "llama"},
        {"pattern": 5},
        {"untempered": 5},
        {"evidence": None},
        {"evidence": [1]},
        {"named": "yes"},
        {"partial": None},
    ],
    ids=str,
)
def test_damaged(fields, tmp_path):
    path = changed(tmp_path, **fields)
    with pytest.raises(ProfileError) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field(name, tmp_path):
    profile, path = saved(tmp_path)
    data = profile.to_json()
    del data[name]
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=f"damaged.*{name}"):
        Profile.load(path)


@pytest.mark.parametrize("value", ["NaN", "0.0", "-1.0", "Infinity", "1e5"])
def test_temperatures_out_of_range(value, tmp_path):
    profile, path = saved(tmp_path)
    text = json.dumps(profile.to_json())
    assert text.count("[1.3,") == 1
    path.write_text(text.replace("[1.3,", f"[{value},"))
    with pytest.raises(TemperatureError, match=r"profile\.json: layers\.0\.attn, head 0"):
        Profile.load(path)


def test_saving_over_a_profile_is_whole_or_not_at_all(tmp_path):
    profile, path = saved(tmp_path)
    before = path.read_bytes()
    with pytest.raises(TemperingError):
        profile.save(tmp_path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["profile.json"]
