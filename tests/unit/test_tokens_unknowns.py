"""`?` in a policy's text: where it may stand, what it then is, and what is said elsewhere."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempering.errors import InputError, ScheduleError
from tempering.schedules import PATTERNS
from tempering.tokens import POLICIES, parse_policy
from tempering.tokens.unknowns import MOST_NUMBERS, PLACES, read_open_policy

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")
MARKS = "ids(3), ids(4)"


def numbers_of(text: str) -> list[tuple[float, float, float, bool]]:
    return [(n.low, n.high, n.start, n.whole) for n in read_open_policy(text).numbers]


def test_a_phase_has_a_temperature_and_numbers_have_names():
    found = read_open_policy(
        f"phases(a=between(sampler(T=?, top_p=?), {MARKS}), answer=entropy(T0=?, theta=0.1))"
        "|clip(0.1, ?)"
    )
    assert [n.label for n in found.numbers] == ["a T", "a top_p", "answer T0", "hi"]
    assert found.filled((0.5, 0.9, 1.25, 2)) == (
        f"phases(a=between(sampler(T=0.5, top_p=0.9), {MARKS}), answer=entropy(T0=1.25, theta=0.1))"
        "|clip(0.1, 2)"
    )
    assert found.start == (1, 1, 1, 3)


def test_two_numbers_of_one_name_are_told_apart():
    found = read_open_policy("schedule(linear(?, ?), length=8)|clip(?, 2)|clip(?, 3)")
    assert [n.label for n in found.numbers] == ["linear 1", "linear 2", "lo (1)", "lo (2)"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant(?)", (0.1, 2, 1, False)),
        ("sampler(T=?)", (0.1, 2, 1, False)),
        ("sampler(top_k=?)", (1, 200, 200, True)),
        ("sampler(min_p=?)", (0, 0.5, 0, False)),
        ("schedule(?, length=9)", (0.1, 2, 1, False)),
        ("schedule(linear(1,0.5), length=?)", (16, 1024, 128, True)),
        ("schedule(linear(1, ?)|amplitude(1.2), length=9)", (0.1, 2, 1, False)),
        ("schedule(linear(1,2)|amplitude(?), length=9)", (1, 2, 1, False)),
        ("support(?)", (1, 100, 10, False)),
        ("support(throb(12, ?, 1, 12), length=9)", (1, 100, 10, False)),
        ("support(throb(12,3,1,12)|clip(?, 20), length=9)", (1, 100, 10, False)),
        ("constant(1)|clip(?, 2)", (0.1, 1, 0.1, False)),
        ("constant(1)|room(?)", (0, 2, 1, False)),
        ('constant(1)|after("b", ?, 0.5)', (1, 8, 3, True)),
        ('constant(1)|after("b", 2, ?)', (0.1, 2, 1, False)),
        ('constant(1)|after("?[1, ?)", ?, 0.5)', (1, 8, 3, True)),
        ('after(?, "b", 2, 0.5)', (0.1, 2, 1, False)),
        ("constant(1)|loops(ngram=?)", (3, 16, 8, True)),
        ("constant(?[0.2,1.5])", (0.2, 1.5, 1, False)),
        ("constant(?[ 0.2 , 0.5 ])", (0.2, 0.5, 0.5, False)),
        ("constant(?[0,1])", (0, 1, 1, False)),
        ("support(?[4,16])", (4, 16, 8, False)),
        ("sampler(top_k=?[10,40])", (10, 40, 40, True)),
    ],
)
def test_the_place_says_what_a_number_is(text, expected):
    assert numbers_of(text) == [pytest.approx(expected)]


def test_a_range_is_in_logs_where_it_is_wide_and_above_0():
    texts = ("constant(?)", "constant(?[0,2])", "sampler(top_p=?)", "constant(?[0.5,1.5])")
    assert [read_open_policy(text).numbers[0].log for text in texts] == [True, False, False, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("constant(0.7)", "has no . in it, so there is nothing to learn"),
        ("phases(thinking=1, answer=0.5)", "no . in it"),
        ("schedule(throb(?,?,?,?,?,?,?,?,?), length=9)", "at most 8 numbers .* has 9"),
        ("?", "column 1: expected the name of a policy, found '?'"),
        ("?(1)", "expected the name of a policy"),
        ("constant(1)|?", "column 13: expected the name of a policy"),
        ("phases(?=1)", "column 9: expected '.' or '.', found '='"),
        (
            'phases(a=between(0.5, ?, "x"))',
            "column 23: \\? stands for a number that can be learned",
        ),
        ("phases(a=between(0.5, ids(?), ids(4)))", "ids has none here"),
        ("constant(1)|after(?, 2, 0.5)", "after has none here"),
        ("constant(1)|order(?, temperature)", "expected a word, found '?'"),
        ("ladder(?, 1, n=4)", "ladder has none here; write what belongs here"),
        ("ladder(0.5, 1, n=?)", "ladder has none here"),
        ("schedule(shuffle(linear(1,2), seed=?), length=9)", "shuffle has none here"),
        ("constant(T=?, x=2)", "constant\\(T\\) has no argument 'x'"),
        ("sampler(heat=?)", "sampler has none here"),
        ("suport(?)", "no policy is called 'suport'; did you mean support"),
        ("schedule(liner(?, 1), length=9)", "no pattern is called 'liner'"),
        ("constant(?[2,1])", "column 10: a range goes from a lower to a higher number.* 2 to 1"),
        ("constant(?[1,1])", "a lower to a higher"),
        ("constant(?[1,inf])", "both finite"),
        ("constant(?[1])", "expected ',', found ']'"),
        ("constant(?[1,2,3])", "expected ']', found ','"),
        ("constant(?[a,2])", "a number: a range is written"),
        ("constant(?[1,2)", "expected ']'"),
        ("sampler(top_k=?[1.5,3])", "top_k is a whole number"),
        ("constant(??)", "expected ',' or '.', found '.'"),
        ("constant(?0.5)", "expected ',' or '.', found '0.5'"),
    ],
)
def test_what_is_no_open_policy_is_said_with_its_column(text, words):
    with pytest.raises(InputError, match=words):
        open_policy = read_open_policy(text)
        open_policy.check(parse_policy)


@pytest.mark.parametrize("text", ["constant(?)", "constant([1])", "constant(1]"])
def test_other_readers_have_no_place_for_it(text):
    with pytest.raises(ScheduleError, match="a policy has no place for '"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("constant(1)|clip(?[0.1,1.5], ?[1,2])", "narrow a range.*clip takes 0 <= lo <= hi"),
        ("sampler(top_p=?[0,1])", "narrow a range.*top_p lies in .0, 1"),
        ("constant(?[-1,1])", "narrow a range.*constant takes T in 0..inf, got -1"),
        ("constant(1)|loops(ngram=?[8,64], window=?[32,256])", "ngram from 1 to window - 1"),
        ("support(?[0.5,9])", "narrow a range.*1 or more"),
        ("schedule(hot_to_cold(?, ?), length=9)", "starts hotter than it ends"),
    ],
)
def test_a_range_in_which_a_policy_cannot_be_made_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        read_open_policy(text).check(parse_policy)


EXAMPLES = [
    *(example for name, (_, _, example) in POLICIES.items() if name not in ("phases", "budget")),
    *(f"schedule({example}, length=64)" for _, _, example in PATTERNS.values()),
    f"phases(a=between(0.5, {MARKS}), answer=0.2)",
    f"phases(a=between(0.5, {MARKS}), answer=0.2)|budget(a=64)",
]


@pytest.mark.filterwarnings("ignore::tempering.errors.DepthWarning")
@pytest.mark.parametrize("text", EXAMPLES)
def test_each_number_of_every_example_is_learned_or_refused(text):
    """A kind of number that nobody thought of would be taken for nothing, or crash."""
    learned = 0
    for match in NUMBER.finditer(text):
        open_text = f"{text[: match.start()]}?{text[match.end() :]}"
        try:
            found = read_open_policy(open_text)
        except ScheduleError as error:
            assert "has none here" in str(error)
            continue
        learned += 1
        (number,) = found.numbers
        assert open_text[number.begin : number.end] == "?"
        # The text is the same as with the number written, at both ends or not at all.
        assert found.filled([float(match.group())]) == text
        for value in (number.low, number.high, number.start):
            try:
                made = parse_policy(found.filled([value]))
            except InputError:
                continue
            assert parse_policy(str(made)) == made
    refused = ("ladder", "order(", "shuffle", "clip(2,8)")
    assert learned or any(word in text for word in refused) or not NUMBER.search(text)


def test_every_place_belongs_to_an_argument_that_exists():
    known = set(POLICIES) | set(PATTERNS) | {"between"}
    assert {call for call, _ in PLACES} <= known
    for place in PLACES.values():
        assert place.low < place.high
        assert place.start is None or place.low <= place.start <= place.high


@given(
    st.lists(st.floats(0.1, 2.0), min_size=1, max_size=MOST_NUMBERS),
    st.sampled_from(["schedule(throb({}), length=16)", "schedule(steps({}), length=16)"]),
)
def test_what_is_filled_in_reads_back_as_these_numbers(values, form):
    if form.startswith("schedule(throb") and len(values) < 2:
        values = [*values, 1.0]
    found = read_open_policy(form.format(",".join("?" * len(values))))
    written = [number.rounded(value) for number, value in zip(found.numbers, values, strict=True)]
    assert all(abs(w / v - 1) < 0.006 for w, v in zip(written, values, strict=True))
    made = parse_policy(found.filled(written))
    assert made == parse_policy(form.format(",".join(map(repr, written))))


@given(st.floats(0, 1), st.sampled_from([(0.12345, 0.6789), (1.2345, 9.8765), (3, 200)]))
def test_rounding_stays_in_the_range(share, ends):
    low, high = ends
    (number,) = read_open_policy(f"constant(?[{low},{high}])").numbers
    assert low <= number.rounded(low + share * (high - low)) <= high


def test_all_corners_are_tried():
    found, made = read_open_policy("constant(?)|clip(?[0.1,0.2], ?)"), []
    found.check(made.append)
    corners = itertools.product((0.1, 2.0), (0.1, 0.2), (1.0, 3.0))
    assert made == [found.filled(found.start), *map(found.filled, corners)]
