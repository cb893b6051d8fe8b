"""Plans: one pattern gives widths, temperatures, amplitudes and prompts; YAML is read strictly."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.agents import strict_yaml
from tempering.agents.plan import Plan
from tempering.agents.prompts import check_template, deal, fill
from tempering.errors import DataError, InputError, OutputError, ScheduleError


def test_the_throb_is_twelve_three_one():
    plan = Plan.from_pattern("throb(12,3,1,12)", amplitude=1.3)
    assert [(stage.name, stage.width) for stage in plan.stages] == [
        ("explore", 12),
        ("consolidate", 3),
        ("execute", 1),
    ]
    assert plan.attention == "throb(12,3,1,12)"
    # t(v) = log v / log 12 at each stage's start; workers go on to the next stage's.
    middle = math.log(3) / math.log(12)
    explore = [t for t, _ in plan.stages[0].rungs()]
    assert explore == pytest.approx([1 + i / 12 * (middle - 1) for i in range(12)], abs=1e-3)
    consolidate = [t for t, _ in plan.stages[1].rungs()]
    assert consolidate == pytest.approx([middle * (1 - i / 3) for i in range(3)], abs=1e-3)
    assert plan.stages[2].rungs() == [(0.0, 1.0)]
    # The amplitude follows as A^t.
    for stage in plan.stages:
        for t, a in stage.rungs():
            assert a == pytest.approx(1.3**t, abs=2e-4)


def test_without_an_amplitude_attention_is_left_alone():
    plan = Plan.from_pattern("throb(12,3,1,12)")
    assert plan.attention is None
    assert all(stage.amplitude == (1.0, 1.0) for stage in plan.stages)


def test_a_pattern_that_does_not_return_is_a_round_as_it_is():
    plan = Plan.from_pattern("steps(8,4,2)")
    assert [stage.width for stage in plan.stages] == [8, 4, 2]
    assert plan.stages[-1].temperature == (0.0, 0.0)


def test_a_nested_pattern_explores_twice():
    plan = Plan.from_pattern("throb(12,3,1,12,3,1)")
    assert [stage.name for stage in plan.stages] == [
        "explore",
        "consolidate",
        "consolidate 2",
        "explore 2",
        "consolidate 3",
        "execute",
    ]
    assert "{notes}" in plan.stages[3].prompt and "{answer}" not in plan.stages[3].prompt


@settings(deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=6).filter(lambda w: len(set(w)) > 1)
)
def test_any_widths_make_a_plan_that_its_yaml_gives_back(widths):
    plan = Plan.from_pattern(f"steps({','.join(map(str, widths))})", amplitude=1.2)
    assert Plan.from_data(strict_yaml.load(plan.to_yaml(), "x")) == plan
    for stage in plan.stages:
        assert all(0 <= t <= 1 and 1 <= a <= 1.2 for t, a in stage.rungs())


def test_a_saved_plan_is_loaded(tmp_path):
    plan = Plan.from_pattern("throb(4,2,1,4)", amplitude=1.1, tokens=9)
    assert Plan.load(plan.save(tmp_path / "p.yaml")) == plan
    with pytest.raises(OutputError):
        plan.save(tmp_path / "p.yaml" / "deeper.yaml")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("constant(5)", "one width, 5"),
        ("steps(3,3)", "one width, 3"),
        ("throb(12,3,0.5,12)", "0.5 workers; widths are whole numbers"),
        ("steps(4,0)", "0 workers"),
        ("steps(4,2.5)", "2.5 workers"),
        ("steps(100000,2)", "100000 workers"),
        ("throb(12", "expected"),
    ],
)
def test_patterns_that_are_no_widths(pattern, message):
    with pytest.raises(ScheduleError, match=message):
        Plan.from_pattern(pattern)


@pytest.mark.parametrize("amplitude", [0.5, 0.0, -1.0, math.inf, math.nan])
def test_amplitudes_that_are_none(amplitude):
    with pytest.raises(InputError, match="an amplitude is 1 or more"):
        Plan.from_pattern("throb(12,3,1,12)", amplitude=amplitude)


GOOD = """
version: 1
attention: throb(12,3,1,12)
stages:
- name: explore
  width: 3
  temperature: [1, 0.5]
  amplitude: 1.2
  prompt: "{task}"
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width: 3", "widht: 3", r"stages\[0\]: unknown key 'widht'; did you mean 'width'"),
        ("width: 3", "width: 0", r"stages\[0\].width: expected a whole number, 1 or more, got 0"),
        ("width: 3", "width: 2.5", "whole number"),
        ("width: 3", "width: true", "whole number"),
        ("width: 3", "width: 99999", "at most 10000 workers"),
        ("  width: 3\n", "", r"stages\[0\]: the key 'width' is missing"),
        ("[1, 0.5]", "[1, 1.5]", r"temperature: expected a number from 0 to 1, got 1.5"),
        ("[1, 0.5]", "[1, 0.5, 0]", "a number or .first, last."),
        ("[1, 0.5]", "hot", "expected a number"),
        ("[1, 0.5]", ".nan", "expected a number"),
        ("amplitude: 1.2", "amplitude: 0.9", "amplitude: expected a number from 1"),
        ('"{task}"', '"{tsk}"', "unknown field {tsk}; known are {task}, {notes}, {answer}"),
        ('"{task}"', '"{task.__class__}"', "unknown field"),
        ('"{task}"', '"{task!r}"', "unknown field"),
        ('"{task}"', '"{task"', "prompt: .*write {{ and }}"),
        ('"{task}"', '""', "prompt: expected a text"),
        ("throb(12,3,1,12)", "throb(12", "expected"),
        ("attention: throb(12,3,1,12)\n", "", "has an amplitude, but the plan has no attention"),
        ("version: 1", "version: 2", "version 2; this tempering reads version 1"),
        ("version: 1", "version: 1\nversion: 1", "line 3: the key 'version' is given twice"),
        ("version: 1", "version: 1\nrounds: 2", "unknown key 'rounds'"),
        ("- name", "- nm: [\n- name", "line .* not YAML"),
        ("prompt:", "top_p: 0\n  prompt:", "top_p: expected more than 0"),
        ("prompt:", "tokens: 0\n  prompt:", "tokens: expected a whole number"),
        ("version: 1", "version: 1\nday: 2026-13-45", "a value that can't be read: month"),
        ("version: 1", "version: " + "[" * 5000, "a value that can't be read: .*recursion"),
        ('"{task}"', '"{task} \\ud800"', "prompt is not UTF-8"),
        ("name: explore", "name: 7", "name: expected a text, got 7"),
    ],
)
def test_broken_plans_name_what_is_wrong(tmp_path, old, new, message):
    assert old in GOOD
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        Plan.load(path)


def test_other_shapes_than_a_plan():
    with pytest.raises(InputError, match="two stages are called 'explore'"):
        Plan.from_data({"version": 1, "stages": [_row(), _row()]})
    with pytest.raises(InputError, match="stages is a list of at least one stage"):
        Plan.from_data({"version": 1, "stages": []})
    with pytest.raises(InputError, match="expected a mapping with version, stages, got .'a'"):
        Plan.from_data(["a"])
    with pytest.raises(DataError, match="can't read"):
        Plan.load("/no/such/plan.yaml")


def _row() -> dict[str, object]:
    return {"name": "explore", "width": 1, "temperature": 0.0, "prompt": "{task}"}


def test_notes_are_dealt_like_cards():
    assert deal(["a", "b", "c", "d", "e"], 2) == [["a", "c", "e"], ["b", "d"]]
    assert deal(["a"], 3) == [["a"]] * 3
    assert deal(["a", "b"], 2) == [["a", "b"], ["a", "b"]]


@given(st.integers(1, 30), st.integers(1, 30))
def test_every_note_is_read(notes, width):
    texts = [str(i) for i in range(notes)]
    hands = deal(texts, width)
    read = [note for hand in hands for note in hand]
    assert len(hands) == width and set(read) == set(texts)
    if width < notes:
        assert sorted(read) == sorted(texts), "each is paid for once"


def test_braces_in_a_task_are_text():
    assert fill("{task}: {notes} {{x}}", "{a}", ["{b}"], "") == "{a}: {b} {x}"
    assert fill("{notes}", "", ["p", "q"], "") == "[1] p\n\n[2] q"
    check_template("{task} {{braces}}", "here")


BASE = "- &base\n  name: one\n  width: 3\n  temperature: [1, 0.5]\n  prompt: '{task}'\n"


def plan_of(tmp_path, stages):
    path = tmp_path / "p.yaml"
    path.write_text("version: 1\nstages:\n" + stages)
    return Plan.load(path)


def test_merge_keys_share_what_stages_have_in_common(tmp_path):
    stages = BASE + "- <<: *base\n  name: two\n  width: 1\n- <<: *base\n  name: three\n"
    plan = plan_of(tmp_path, stages)
    assert [(s.name, s.width) for s in plan.stages] == [("one", 3), ("two", 1), ("three", 3)]
    assert {s.prompt for s in plan.stages} == {"{task}"}
    assert {s.temperature for s in plan.stages} == {(1.0, 0.5)}
    # Of several merged mappings the first one says; an own key comes before them.
    found = strict_yaml.load("a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*b, *a], z: 3}", "f")
    assert found["c"] == {"x": 1, "y": 2, "z": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}", "line 1: the key 'x' is given twice"),
        ("b: {<<: {x: 1}, y: 1, y: 2}", "line 1: the key 'y' is given twice"),
        ("b:\n  <<: {x: 1}\n  <<: {y: 1}", "line 3: the key '<<' is given twice; write <<: .*one"),
        ("b: {<<: 3}", "line 1, column .*expected a mapping"),
        ("\nw: 010", "line 2: YAML reads 010 as 8; write the number that you mean"),
        ("w: 1:30", "line 1: YAML reads 1:30 as 90"),
        ("w: " + "9" * 5000, "line 1: a whole number of 5000 digits"),
        ("w: 0x" + "f" * 5000, "line 1: a whole number of 5002 digits"),
        ("\n\nday: 2026-13-45", "line 3: a value that can't be read: month"),
        (
            "a0: &a0 {" + ",".join(f"k{i}: 1" for i in range(9)) + "}\n"
            + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n"
                      for i in range(1, 12)),
            "merges more than 10000 keys",
        ),
    ],
)  # fmt: skip
def test_yaml_that_is_not_what_it_looks_like(text, message):
    with pytest.raises(DataError, match=message):
        strict_yaml.load(text, "f")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width: 3", "width: " + "1" + "0" * 300, "expected at most 1000000000"),
        ("width: 3", "width: 3\n  tokens: 99999999999", "tokens: expected at most 1000000000"),
        ("[1, 0.5]", "1e-3", "got '1e-3' .a text to YAML; write the point, as in 1.0e-3."),
        ("[1, 0.5]", "1" + "0" * 350, "351 digits.*expected a number from 0 to 1"),
    ],
)
def test_numbers_that_are_slips(tmp_path, old, new, message):
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, BASE.replace(old, new))


def test_a_range_without_end_takes_no_number_beyond_floats():
    with pytest.raises(InputError, match="a number of 401 digits is beyond what a float holds"):
        strict_yaml.number(10**400, "range", 0.0, math.inf)


def test_a_plan_that_was_edited_is_not_overwritten(tmp_path):
    plan = Plan.from_pattern("throb(4,2,1,4)")
    path = plan.save(tmp_path / "p.yaml")
    assert plan.save(path) == path
    path.write_text(path.read_text() + "# mine\n")
    with pytest.raises(InputError, match="p.yaml is there already.*name another file"):
        plan.save(path)
    assert path.read_text().endswith("# mine\n")
