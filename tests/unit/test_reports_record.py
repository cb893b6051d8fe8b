"""The record: what goes in comes back, and what is broken is refused by name."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempering.errors import DataError, OutputError
from tempering.reports import Record
from tempering.reports.values import decode, dumps, encode, plain_value

SAMPLE = Path(__file__).with_name("test_reports_sample.json")


def new(**changes):
    return Record.new("compare", **{"settings": {}, "results": {}, **changes})


def broken(change) -> str:
    """The sample's JSON after `change` has had its way with it."""
    body = json.loads(SAMPLE.read_text())
    change(body)
    return json.dumps(body)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(values)
def test_every_value_survives_json(value):
    text = dumps(encode(value))
    back = decode(json.loads(text), "value")
    assert repr(back) == repr(value)  # repr, because nan != nan


@pytest.mark.parametrize("value", [{"$float": "nan"}, {"$$x": 1}, {"$float": math.inf}, {"$": []}])
def test_a_users_dollar_key_is_not_taken_for_ours(value):
    assert decode(json.loads(dumps(encode(value))), "value") == value


def test_a_save_can_be_loaded(tmp_path):
    results = {
        "numbers": [math.nan, math.inf, -math.inf, 0.1, -0.0, 1e-320],
        "text": "a\u2028\x00 é",
    }
    record = new(settings={"text": "demo.txt"}, results=results, model={"name": "tiny"}, seed=7)
    loaded = Record.load(record.save(tmp_path / "run.json"))
    assert repr(loaded) == repr(record)
    assert loaded.version == 1
    assert loaded.created.endswith("+00:00")


def test_the_sample_of_version_1_stays_readable():
    record = Record.load(SAMPLE)
    assert record.to_json() == SAMPLE.read_text()
    assert record.results["cost"][0]["cost"] == 0.0121


class Pair(NamedTuple):
    support: torch.Tensor
    n: int


@dataclass
class Point:
    value: np.float32


def test_tensors_and_arrays_become_lists():
    given_values = {
        "pair": Pair(torch.tensor([[1.5, math.nan]], requires_grad=True), 3),
        "half": torch.tensor(0.25, dtype=torch.bfloat16),
        "array": np.arange(3),
        "point": Point(np.float32(0.5)),
        "scalar": np.float64(0.1),
        "flag": np.bool_(True),
    }
    found = plain_value(given_values)
    assert repr(found) == repr(
        {
            "pair": {"support": [[1.5, math.nan]], "n": 3},
            "half": 0.25,
            "array": [0, 1, 2],
            "point": {"value": 0.5},
            "scalar": 0.1,
            "flag": True,
        }
    )
    assert type(found["scalar"]) is float


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"file": Path("x")}, r"settings\.file is a .*Path.*of a path: its name"),
        ({"dtype": [torch.float32]}, r"settings\.dtype\[0\] is a dtype"),
        ({"layers": {3: 1.0}}, r"settings\.layers has the key 3; keys of a record are text"),
        ({"prompt": "\udc80"}, r"settings\.prompt is not valid Unicode \(character 0"),
    ],
)
def test_what_a_record_cannot_hold_is_named(settings, match):
    with pytest.raises(DataError, match=match):
        new(settings=settings)


def test_the_record_tells_versions_and_machine_and_no_names():
    record = new()
    assert {"python", "tempering", "torch", "numpy"} <= record.versions.keys()
    assert record.machine.keys() == {"cpu", "cores", "system", "device"}
    import getpass
    import socket

    told = json.dumps([record.machine, record.versions])
    assert socket.gethostname() not in told
    assert str(Path.home()) not in told
    assert f'"{getpass.getuser()}"' not in told


SHAPES = [
    (
        {"cost": [{"label": "a", "cost": "0.1", "unit": "nats/token"}]},
        r"results\.cost\[0\]\.cost: "
        r"expected a number, got the text '0.1'",
    ),
    (
        {"cost": [{"cost": 0.1, "unit": "nats/token"}]},
        r"results\.cost\[0\]: the field 'label' is missing",
    ),
    ({"cost": {"label": "a"}}, r"results\.cost: expected a list, got an object with label"),
    (
        {"cost": [{"label": "a", "cost": 1.0, "unit": "x", "note": [1]}]},
        r"cost\[0\]\.note: expected a single",
    ),
    (
        {"pattern": [{"label": "a", "text": "", "temperature": [1.0, -2.0]}]},
        r"pattern\[0\]\.temperature\[1\]: expected a temperature of 0 or more, or null, got -2.0",
    ),
    (
        {"pattern": [{"label": "a", "text": "", "temperature": []}]},
        r"temperature: expected a list over layers",
    ),
    (
        {"pattern": [{"label": "a", "text": "", "temperature": [1.0], "base": True}]},
        r"the field 'base' is unknown; known are baseline, label",
    ),
    (
        {"support": {"layers": ["0"], "before": [[1.0, 2.0]], "after": {"a": [[1.0]]}}},
        r"support\.after\.a\[0\]: expected 2 heads, as in 'before', got 1",
    ),
    ({"support": {"layers": ["0"], "before": [[1.0]], "after": {"a": []}}}, r"expected 1 layers"),
    (
        {"support": {"layers": ["0", "1"], "before": [[1.0]], "after": {}}},
        r"2 names in 'layers' for 1 rows",
    ),
    (
        {"support": {"layers": ["0"], "before": [[1.0]], "after": {"untempered": [[1.0]]}}},
        r"support\.after: 'untempered' is what 'before' holds",
    ),
    (
        {"support": {"layers": [], "before": [], "after": {}}},
        r"before: expected at least one layer",
    ),
    (
        {
            "support": {
                "layers": ["0"],
                "before": [[1.0]],
                "after": {},
                "quantities": {"peak": {"before": [], "after": {}}},
            }
        },
        r"quantities\.peak\.before: expected 1",
    ),
    (
        {
            "generations": {
                "prompt": "",
                "samples": [{"label": "a", "seed": 0, "text": "", "tokens": -1}],
            }
        },
        r"samples\[0\]\.tokens: expected a whole number, 0 or more, got -1",
    ),
    (
        {"training": {"history": [{"step": 1.5, "loss": 0.1}]}},
        r"history\[0\]\.step: expected a whole",
    ),
    (
        {"stages": [{"stage": "x", "width": True, "workers": []}]},
        r"width: expected a whole .* got the flag True",
    ),
    (
        {"reliability": {"before": [3]}},
        r"before\[0\]: expected an object with confidence, accuracy, n, got 3",
    ),
]


@pytest.mark.parametrize(("results", "match"), SHAPES)
def test_a_section_of_the_wrong_shape_is_named(results, match):
    with pytest.raises(DataError, match=match):
        new(results=results)


def test_what_was_not_measured_is_null_and_sections_may_be_new():
    row = {
        "label": "a",
        "cost": None,
        "unit": "nats/token",
        "se": None,
        "low": None,
        "domain": "code",
    }
    results = {
        "cost": [row],
        "support": {
            "layers": ["0", "1"],
            "before": [[2.0], None],
            "after": {"a": [[None], [1.0, 2.0]]},
        },
        "depths": {"any": ["thing", {"goes": None}]},
    }
    assert new(results=results).results == results


@pytest.mark.parametrize("kind", ["", "Two words", "../up"])
def test_a_kind_is_a_word(kind):
    with pytest.raises(DataError, match="kind: expected a lower-case word"):
        Record.new(kind, settings={}, results={})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"ends in the middle \(line 1\)"),
        ("{ not }", r"not JSON: .* line 1 column 3; give a record"),
        ("[1, 2]", r"not a record of tempering: expected .* got a list of 2"),
        (
            '{"version": 1, "layers": 3}',
            r"not a record of tempering: .* got an object with layers, version",
        ),
        ("[" * 100_000, r"not the JSON of a record"),
        (
            broken(lambda b: b.update(version=9)),
            r"version 9, this tempering reads version 1.*tempering 0\.1",
        ),
        (broken(lambda b: b.pop("seed")), r"record: the field 'seed' is missing"),
        (broken(lambda b: b.update(more=1)), r"record: the field 'more' is unknown"),
        (
            broken(lambda b: b["versions"].update(torch=2)),
            r"record\.versions\.torch: expected a text, got 2",
        ),
        (broken(lambda b: b.update(kind=None)), r"record\.kind: expected a text, got null"),
        (
            broken(lambda b: b["settings"].update({"$x": 1})),
            r"record\.settings: the key '\$x' is unknown",
        ),
        (
            broken(lambda b: b["settings"].update(x={"$float": "big"})),
            r"settings\.x: \$float is 'big'",
        ),
        (broken(lambda b: b["settings"].update(x=math.nan)), r"NaN is not JSON"),
        (
            broken(lambda b: b["results"]["cost"][1].update(se="no")),
            r"run: results\.cost\[1\]\.se: expected",
        ),
    ],
)
def test_a_broken_record_says_what_and_where(text, match):
    with pytest.raises(DataError, match=match):
        Record.from_json(text, "run")


@pytest.mark.parametrize("length", range(1, 26_000, 997))
def test_a_record_cut_short_says_so(length):
    with pytest.raises(DataError, match=r"run: the record ends in the middle \(line \d+\)"):
        Record.from_json(SAMPLE.read_text()[:length], "run")


def test_files_that_are_no_records(tmp_path):
    with pytest.raises(DataError, match=r"can't read .*none\.json: No such file"):
        Record.load(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"can't read .*: Is a directory"):
        Record.load(tmp_path)
    path = tmp_path / "run.json"
    path.write_bytes(b"\x89PNG\r\n\xff")
    with pytest.raises(
        DataError, match=r"run\.json: not a record: it is not UTF-8 text \(byte 0\)"
    ):
        Record.load(path)


def test_a_save_that_fails_leaves_the_old_record(tmp_path):
    with pytest.raises(OutputError, match="nothing was written"):
        new().save("/proc/run.json")
    path = new().save(tmp_path / "run.json")
    before = path.read_text()
    bad = copy.copy(new())
    bad.settings["x"] = object()
    with pytest.raises(TypeError):
        bad.save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
