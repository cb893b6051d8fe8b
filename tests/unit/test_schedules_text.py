"""The text form: exact round trips, errors with a column, and nothing but ScheduleError."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tempering.errors import ScheduleError
from tempering.schedules import PATTERNS, schedule
from tempering.schedules.operations import (
    Amplitude,
    Clip,
    Invert,
    Nest,
    Repeat,
    Reverse,
    Room,
    Shuffle,
    Uniform,
)
from tempering.schedules.patterns import (
    ColdToHot,
    Constant,
    Cosine,
    Geometric,
    HotToCold,
    Linear,
    Steps,
    Throb,
)

# every float64 that a pattern takes, tiny and huge ones too
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False)
LIMITS = st.floats(0, allow_nan=False)
PAIR = st.tuples(POSITIVE, POSITIVE)
RISING = PAIR.filter(lambda pair: pair[0] != pair[1]).map(lambda pair: tuple(sorted(pair)))
LEAVES = st.one_of(
    st.tuples(st.just(Throb), st.lists(POSITIVE, min_size=2, max_size=5).map(tuple)),
    st.tuples(st.just(Steps), st.lists(LIMITS, min_size=1, max_size=5).map(tuple)),
    st.tuples(st.just(Constant), st.tuples(LIMITS)),
    st.tuples(st.sampled_from([Linear, Cosine, Geometric]), PAIR),
    st.tuples(st.just(ColdToHot), RISING),
    st.tuples(st.just(HotToCold), RISING.map(lambda pair: pair[::-1])),
)
SHARE = st.floats(0, allow_nan=False, allow_infinity=False)
CLIPS = st.tuples(LIMITS, LIMITS).map(sorted)


def grow(trees):
    anywhere = trees.filter(lambda tree: not holds_control(tree))
    return st.one_of(
        st.tuples(st.just(Amplitude), trees, SHARE.map(lambda x: max(x, 1.0))),
        st.tuples(st.just(Room), trees, SHARE),
        st.builds(lambda tree, pair: (Clip, tree, *pair), trees, CLIPS),
        st.tuples(st.just(Repeat), anywhere, st.integers(1, 9)),
        st.tuples(st.just(Nest), trees, anywhere),
        st.tuples(st.just(Shuffle), trees, st.integers(0, 2**53 - 1)),
        st.tuples(st.sampled_from([Reverse, Uniform, Invert]), trees),
    )


def holds_control(tree):
    kind, *arguments = tree
    trees = [x for x in arguments if isinstance(x, tuple) and isinstance(x[0], type)]
    return kind in (Shuffle, Uniform, Invert) or any(map(holds_control, trees))


def build(tree):
    """(class, arguments) as a schedule; built in the test, not while hypothesis draws."""
    kind, *arguments = tree
    is_tree = [isinstance(x, tuple) and isinstance(x[0], type) for x in arguments]
    return kind(*(build(x) if inner else x for x, inner in zip(arguments, is_tree)))


TREES = st.recursive(LEAVES, grow, max_leaves=5)


@given(TREES)
def test_round_trip(tree):
    pattern = build(tree)
    assert schedule(str(pattern)) == pattern
    assert str(schedule(str(pattern))) == str(pattern)


WORDS = st.sampled_from(
    [
        *PATTERNS,
        *"(),|= ",
        "seed",
        "inf",
        "nan",
        "-",
        "1",
        "0.5",
        "1e-3",
        "1e999",
        "2",
        "é",
        "\n",
        "(",
    ]
)


@given(st.one_of(st.text(), st.lists(WORDS, max_size=25).map("".join)))
def test_any_text_is_a_pattern_or_a_schedule_error(text):
    try:
        tree = schedule(text)
    except ScheduleError as error:
        first, shown, caret = str(error).split("\n")
        column = int(first.removeprefix("column ").split(":")[0])
        assert 1 <= column <= len(text) + 1
        assert caret.strip() == "^" and len(caret) <= len(shown) + 1
    else:
        assert schedule(str(tree)) == tree


@given(TREES, st.data())
def test_a_text_that_is_cut_off_says_where(tree, data):
    text = str(build(tree))
    cut = data.draw(st.integers(0, len(text) - 1))
    try:
        schedule(text[:cut])
    except ScheduleError as error:
        assert str(error).startswith("column ")
    else:  # what stands before a pipe is a pattern of its own
        assert text[cut:].lstrip().startswith("|") or text[:cut].count("(") == text[:cut].count(")")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("throb( 12, 3 ,1,\t12 )", "throb(12,3,1,12)"),
        ("linear(1.20,.8)", "linear(1.2,0.8)"),
        ("constant(1E2)", "constant(100)"),
        ("constant(+1e-3)", "constant(0.001)"),
        ("constant(+inf)", "constant(inf)"),
        ("amplitude(throb(2,1), 1.5)", "throb(2,1)|amplitude(1.5)"),
        ("throb(2,1)|reverse()", "reverse(throb(2,1))"),
        ("throb(2,1)|shuffle(7)", "shuffle(throb(2,1), seed=7)"),
        ("clip(throb(2,1), hi=3, lo=1)", "throb(2,1)|clip(1,3)"),
        ("throb(2,1)|repeat(2)|room(0.5)", "repeat(throb(2,1), 2)|room(0.5)"),
        ("throb(2,1)|shuffle(seed = 7)", "shuffle(throb(2,1), seed=7)"),
        ("throb(2,1)|nest(throb(3,1)|room(0))", "nest(throb(2,1), throb(3,1)|room(0))"),
        ("repeat(throb(2,1),2.0)", "repeat(throb(2,1), 2)"),
    ],
)
def test_one_canonical_form(text, canonical):
    assert str(schedule(text)) == canonical
    assert schedule(text) == schedule(canonical)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "expected the name of a pattern, found the end"),
        ("   ", 4, "expected the name of a pattern, found the end"),
        ("throb", 6, r"expected '\(', found the end"),
        ("throb(12,3", 11, r"expected ',' or '\)', found the end"),
        ("throb(12,3,)", 12, r"expected a number or a pattern, found '\)'"),
        ("throb(12 3)", 10, r"expected ',' or '\)', found '3'"),
        ("throb(12,3))", 12, r"expected '\|' or the end, found '\)'"),
        ("throb(2,1)|", 12, "expected the name of a pattern, found the end"),
        ("throb(2,1)|0.5", 12, r"expected a pattern, such as constant\(0.5\), found '0.5'"),
        ("1.5", 1, r"expected a pattern, such as constant\(1.5\), found '1.5'"),
        ("throb(12;3)", 9, "a pattern has no place for ';'"),
        ("throb(12→3)", 9, "a pattern has no place for '→'"),
        ("trhob(12,3)", 1, "no pattern is called 'trhob'; did you mean throb"),
        ("linear(1,2)|amplitud(2)", 13, "no pattern is called 'amplitud'; did you mean amplitude"),
        ("zzz(1)", 1, "no pattern is called 'zzz'; known are throb, geometric,.*, invert"),
        ("throb(nan,1)", 7 + 3, r"expected '\(', found ','"),
        ("throb(1e999,1)", 7, r"float64 holds \(write inf for the limit\), found '1e999'"),
        ("steps(1e-999,1)", 7, r"float64 holds \(write 0 for the limit\), found '1e-999'"),
        ("room(0.5)", 6, r"x\|room\(f\): x takes a pattern, such as constant\(0.5\)"),
        ("throb(2,1)|room()", 12, r"x\|room\(f\) needs f"),
        ("throb(2,1)|clip(1)", 12, r"x\|clip\(lo, hi\) needs hi"),
        ("throb(2,1)|room(1,2)", 19, r"x\|room\(f\) takes 2 arguments at most"),
        ("room(2,0.5)", 6, r"takes a pattern, such as constant\(2\)"),
        ("throb(linear(1,2),1)", 7, "takes a number, not a pattern"),
        ("repeat(throb(2,1),1.5)", 19, "takes a whole number, got 1.5"),
        ("repeat(throb(2,1),inf)", 19, "takes a whole number, got inf"),
        ("shuffle(throb(2,1), seed=9007199254740992)", 21, "takes a whole number"),
        ("shuffle(throb(2,1), sed=3)", 21, "has no argument 'sed'; it has x, seed"),
        ("shuffle(throb(2,1), 3, seed=3)", 24, "seed is given twice"),
        ("shuffle(throb(2,1), seed=throb(2,1))", 21, "takes a number, not a pattern"),
        ("throb(a=1,2)", 7, r"throb\(a, b, \.\.\.\) has no argument 'a'"),
        ('throb("a")', 7, "a pattern has no place for '\"'"),
        ("throb(12,0)|room(2)", 1, "takes values > 0, finite; got 0 as its number 2"),
        ("throb(12,1)|room(-2)", 13, "room takes f >= 0"),
    ],
)
def test_a_wrong_text_says_where_and_what(text, column, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        schedule(text)
    first, shown, caret = str(caught.value).split("\n")
    assert first.startswith(f"column {column}: ")
    assert shown == "  " + text
    assert caret == " " * (column + 1) + "^"


def test_a_long_text_is_shown_around_the_column():
    text = f"throb({','.join(['1.25'] * 300)},oops)"
    with pytest.raises(ScheduleError) as caught:
        schedule(text)
    first, shown, caret = str(caught.value).split("\n")
    assert first.startswith(f"column {text.index('oops') + 5}: ")
    assert len(shown) <= 80 and shown[caret.index("^") - 4 :].startswith("oops)")


def test_control_characters_do_not_break_the_caret():
    with pytest.raises(ScheduleError) as caught:
        schedule("throb(2,\n\t\x1b[31m1)")
    assert str(caught.value).split("\n")[1:] == ["  throb(2,   [31m1)", " " * 12 + "^"]


@pytest.mark.parametrize("opening", ["reverse(", "throb(2,1)|room(", "reverse(\n"])
def test_deep_nesting_is_an_error_and_not_a_crash(opening):
    with pytest.raises(ScheduleError, match="a pattern of more than 50 parts"):
        schedule(opening * 5000)


def test_a_long_chain_is_an_error_and_not_a_crash():
    assert schedule("throb(2,1)" + "|room(1)" * 49)(0) == 2
    for more in (50, 100_000):
        with pytest.raises(ScheduleError, match="column 404: a pattern of more than 50 parts"):
            schedule("throb(2,1)" + "|room(1)" * more)


def test_many_stages_are_read():
    values = [1 + i / 1000 for i in range(20_000)]
    assert schedule(f"steps({','.join(map(repr, values))})").values == tuple(values)
