"""Tasks with known answers, their files, and the checkers that read answers."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempering.agents.checkers import checker
from tempering.agents.tasks import KINDS, generate_tasks, load_tasks, write_tasks
from tempering.errors import DataError, InputError


def test_the_same_seed_gives_the_same_tasks():
    assert generate_tasks(40, seed=3) == generate_tasks(40, seed=3)
    assert generate_tasks(40, seed=3) != generate_tasks(40, seed=4)


def test_kinds_and_levels_come_in_turn_and_nothing_twice():
    tasks = generate_tasks(330, seed=0)
    assert len({task["prompt"] for task in tasks}) == len({task["id"] for task in tasks}) == 330
    counts = Counter((task["kind"], task["level"]) for task in tasks)
    assert set(counts) == {(kind, lv) for kind, known in KINDS.items() for lv in known.levels}
    assert max(counts.values()) - min(counts.values()) <= 1
    first = [task["kind"] for task in tasks[:3]]
    assert first == ["arithmetic", "recall", "words"]


def test_any_number_of_levels_comes_in_turn():
    tasks = generate_tasks(4, kinds=["recall", "words"], levels=range(1, 100_001))
    assert [task["id"] for task in tasks] == ["recall-1-1", "words-1-2", "recall-2-3", "words-2-4"]


def test_arithmetic_answers_are_right():
    for task in generate_tasks(60, kinds=["arithmetic"], seed=1):
        lines = task["prompt"].split("\n")
        for line in lines[:-1]:
            left, right = line.split(" = ")
            assert eval(left) == int(right)
        assert eval(lines[-1].removesuffix(" =")) == int(task["answer"]) >= 0
        assert task["prompt"].count("\n") == 3


def test_recall_answers_are_in_the_list_once():
    for task in generate_tasks(40, kinds=["recall"], seed=1):
        name = re.search(r"The code of (\w+) is$", task["prompt"]).group(1)
        stated = re.findall(rf"The code of {name} is (\d+)\.", task["prompt"])
        assert stated == [task["answer"]]
        assert task["prompt"].count("The code of") == min(4 * task["level"], 32) + 1


def test_word_problems_follow_their_working():
    for task in generate_tasks(60, kinds=["words"], seed=1):
        *examples, asked = re.findall(r"Q: (.*)\nA:(.*)", task["prompt"])
        assert asked[1] == "" and len(examples) == 2
        for story, working in [*examples, (asked[0], f"= {task['answer']}")]:
            total = int(re.search(r"has (\d+)", story).group(1))
            name = story.split()[0]
            for sentence in story.split(". ")[1:]:
                number = re.search(r"(gives|loses) (\d+)", sentence)
                if number:
                    loses = sentence.startswith(name)
                    total += -int(number[2]) if loses else int(number[2])
            assert int(working.split("= ")[-1]) == total


def test_every_generated_task_is_judged_right_by_its_own_checker():
    for task in generate_tasks(60, seed=2):
        own = checker(task["checker"])
        assert own.correct(own.read(f" {task['answer']}.", task), task)
        assert not own.correct("-1", task)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 5, "kinds": ["sudoku"]}, "no kind of task 'sudoku'; there are arithmetic, recall"),
        ({"n": 0}, "at least one task"),
        ({"n": 3, "kinds": []}, "one kind"),
        ({"n": 3, "levels": [0]}, "a level is 1 or more, got 0"),
    ],
)
def test_what_can_not_be_generated(arguments, message):
    with pytest.raises(InputError, match=message):
        generate_tasks(**arguments)


def test_a_file_and_back(tmp_path):
    tasks = generate_tasks(12, seed=5)
    path = write_tasks(tmp_path / "t.jsonl", tasks)
    assert load_tasks(path) == (tasks, [])


def test_one_broken_line_is_named_and_the_rest_can_run(tmp_path):
    path = tmp_path / "t.jsonl"
    good = {"id": "x", "prompt": "p", "answer": 4}
    lines = [
        json.dumps(good),
        "{not json",
        "",
        json.dumps({**good, "id": "y", "answer": ["4"]}),
        json.dumps({"id": "z", "prompt": "p"}),
        json.dumps(good),
        "[1]",
        json.dumps({**good, "id": "w", "checker": 3}),
        json.dumps({**good, "id": "v", "raw": "yes"}),
        json.dumps({**good, "id": "u", "tokens": 0}),
        json.dumps({**good, "id": "t", "level": "hard"}),
        json.dumps({**good, "id": "s", "kind": 3}),
        json.dumps({**good, "id": "r", "prompt": "half \ud800"}),
        json.dumps({**good, "id": "last"}),
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"t.jsonl, line 2: not JSON .*column.*--keep-going"):
        load_tasks(path)
    tasks, broken = load_tasks(path, keep_going=True)
    assert [task["id"] for task in tasks] == ["x", "last"] and tasks[0]["answer"] == "4"
    numbers = [int(re.search(r"line (\d+):", line).group(1)) for line in broken]
    assert numbers == [2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert "'answer' is missing" in broken[2] and "the id 'x' is that of line 1" in broken[3]


def test_a_line_ends_only_where_json_lines_do(tmp_path):
    own = [{"id": "x", "prompt": "one\u2028two\x85three\x0cfour", "answer": "4"}]
    assert load_tasks(write_tasks(tmp_path / "t.jsonl", own)).tasks == own


def test_a_file_without_a_task(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("[]\n")
    with pytest.raises(DataError, match="has no task that can be read"):
        load_tasks(path, keep_going=True)
    with pytest.raises(DataError, match="can't read"):
        load_tasks(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("8", "8"),
        ("The answer is 12. There were 30 before.", "12"),
        ("6 + 3 = 9, 9 - 2 = 7", "7"),
        ("Answer: **1,234**", "1234"),
        ("total = 3.50 or so 9", "3.5"),
        ("it falls by -4", "-4"),
        ("x2 is not a number, 7 is", "7"),
        ("1000.0", "1000"),
        ("-0", "0"),
        ("-0.0", "0"),
        ("007", "7"),
        ("0.00000010", "0.0000001"),
        ("= 1234567890123456789012345678901234567890", "1234567890123456789012345678901234567890"),
        ("no number", None),
        ("", None),
    ],
)
def test_numbers_are_read(output, found):
    assert checker("number").read(output, {}) == found


@given(st.integers(-(10**12), 10**12))
def test_equal_numbers_are_one_answer(value):
    number = checker("number")
    assert number.read(f"= {value:,}", {}) == number.read(f"so {value}.0!", {}) == str(value)
    assert number.correct(str(value), {"answer": f"{value:,}"})


def test_choices_are_read():
    task = {"id": "t", "choices": ["red", "dark red", "blue"], "answer": "Dark Red"}
    choice = checker("choice")
    assert choice.read("I think Dark red. Not blue.", task) == "dark red"
    assert choice.correct("dark red", task)
    assert choice.read("reddish", task) is None
    assert choice.read("12 or so", {"choices": [1, 12]}) == "12"
    with pytest.raises(InputError, match="needs 'choices' in the task 't'"):
        choice.read("red", {"id": "t"})


def test_exact_and_regex():
    assert checker("exact").read("  Paris.\n", {}) == "paris"
    assert checker("exact").correct("PARIS", {"answer": "Paris"})
    found = checker("regex:Answer: (\\w+)")
    assert found.read("Answer: a\nAnswer: b", {}) == "b"
    assert found.read("none", {}) is None
    assert checker("regex:[0-9]+").read("12 and 34", {}) == "34"
    with pytest.raises(InputError, match="regex:"):
        checker("regex:(")
    with pytest.raises(InputError, match="no checker 'magic'; there are number"):
        checker("magic")


def test_a_checker_of_ones_own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def read(output, task):\n    return output.split()[-1] if output else None\n"
        "def correct(answer, task):\n    return len(answer) == task['length']\n"
    )
    own = checker(str(path))
    assert own.read("a bcd", {}) == "bcd" and own.read("", {}) is None
    assert own.correct("bcd", {"length": 3}) and not own.correct("b", {"length": 3})
    with pytest.raises(InputError, match=r"own.py: correct failed on task 't': KeyError"):
        own.correct("b", {"id": "t"})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", r"defines no read\(output, task\)"),
        ("def read(", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("def read(output, task): raise SystemExit", "read failed on task None: SystemExit"),
        ("def read(output, task): return 7", "read returned 7; expected a text or None"),
    ],
)
def test_a_broken_checker_of_ones_own(tmp_path, code, message):
    path = tmp_path / "own.py"
    path.write_text(code)
    with pytest.raises(InputError, match=message):
        checker(str(path)).read("a", {})


def test_an_answer_that_is_no_number_is_named():
    with pytest.raises(InputError, match="needs a number as the answer of task 't', not 'four'"):
        checker("number").correct("4", {"id": "t", "answer": "four"})


@pytest.mark.parametrize(
    ("answer", "text"),
    [("9" * 5000, "9" * 5000), ("0.10", "0.10"), ("1e400", "1e400"), ("-3", "-3"),
     ("0.12345678901234567890", "0.12345678901234567890")],
)  # fmt: skip
def test_numbers_of_a_file_stay_as_they_are_written(tmp_path, answer, text):
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"id": 1, "prompt": "p", "answer": {answer}}}')
    (task,) = load_tasks(path).tasks
    assert task["id"] == "1" and task["answer"] == text
    number = checker("number")
    assert number.correct(number.read(f"Answer: {text}", task), task)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"answer": NaN', 'NaN is no JSON; write a text, as in "NaN"'),
        ('"answer": -Infinity', "-Infinity is no JSON"),
        ('"answer": "1", "answer": "2"', "the field 'answer' is given twice"),
        (
            '"answer": 1, "tokens": ' + "9" * 5000,
            "'tokens' is to be a whole number above 0, got '9",
        ),
        ('"answer": 1, "mine": {"x": 1e400}', "'mine' holds a number beyond 1.8e308, 1e400"),
        ('"answer": 1, "choices": ["\\ud800"]', "the field 'choices' is not UTF-8"),
        ('"answer": 1, "mine": {"\\ud800": 1}', "the field 'mine' is not UTF-8"),
    ],
)
def test_a_line_that_json_would_read_otherwise_is_named(tmp_path, fields, message):
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"id": "x", "prompt": "p", {fields}}}')
    with pytest.raises(DataError, match="line 1: .*" + re.escape(message)):
        load_tasks(path)


def test_tasks_that_are_there_are_not_overwritten(tmp_path):
    tasks = generate_tasks(3)
    path = write_tasks(tmp_path / "t.jsonl", tasks)
    assert write_tasks(path, tasks) == path, "the same text is no loss"
    path.write_text("mine\n")
    with pytest.raises(InputError, match="t.jsonl is there already.*name another file"):
        write_tasks(path, tasks)
    assert path.read_text() == "mine\n" and [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]
