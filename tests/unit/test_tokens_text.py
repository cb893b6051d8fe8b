"""The text form of policies: round trips, columns in errors, and no other exception ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.errors import InputError, ScheduleError, TemperingError
from tempering.tokens import POLICIES, parse_policy

positive = st.floats(1e-3, 1e3)
patterns = st.one_of(
    st.lists(st.floats(1, 50), min_size=2, max_size=5).map(
        lambda v: f"throb({','.join(map(repr, v))})"
    ),
    st.tuples(positive, st.floats(1, 2)).map(lambda v: f"constant({v[0] + 1!r})|room({v[1]!r})"),
)
leaves = st.one_of(
    positive.map(lambda T: f"constant({T!r})"),
    patterns.map(lambda p: f"schedule({p}, length=64)"),
    patterns.map(lambda p: f"support({p}, length=64)"),
    st.floats(1, 1e4).map(lambda n: f"support({n!r})"),
    st.tuples(positive, positive).map(lambda v: f"entropy(T0={v[0]!r}, theta={v[1]!r})"),
    st.tuples(positive, positive).map(lambda v: f"dynatemp({v[0]!r}, {v[1]!r})"),
    st.tuples(positive, positive).map(lambda v: f"ladder({v[0]!r}, {v[1]!r}, n=7)"),
)
samplers = st.fixed_dictionaries(
    {},
    optional={
        "T": positive.map(repr) | leaves,
        "top_p": st.floats(0.01, 1).map(repr),
        "top_k": st.integers(-1, 99).map(str),
        "min_p": st.floats(0, 1).map(repr),
    },
).map(lambda values: f"sampler({', '.join(f'{k}={v}' for k, v in values.items())})")
orders = st.permutations(["temperature", "top_p", "top_k", "min_p"]).map(
    lambda names: f"order({', '.join(names)})"
)
ordered = st.tuples(samplers | leaves, orders).map("|".join)
marks = st.one_of(
    st.lists(st.integers(0, 99), min_size=1, max_size=3).map(
        lambda v: f"ids({','.join(map(str, v))})"
    ),
)
phases = (
    st.tuples(leaves | samplers | ordered, leaves | samplers, marks, marks)
    .filter(lambda v: v[2] != v[3])
    .map(lambda v: f"phases(plan=between({v[0]}, {v[2]}, {v[3]}), answer={v[1]})")
)
piped = st.tuples(
    leaves | samplers | ordered | phases, st.lists(st.sampled_from(["room(0.5)", "clip(0.1,2)"]))
).map(lambda v: "|".join([v[0], *v[1]]))


@given(piped)
@settings(deadline=None)
def test_the_text_form_round_trips(text):
    policy = parse_policy(text)
    again = parse_policy(str(policy))
    assert again == policy
    assert str(again) == str(policy)
    assert hash(again) == hash(policy)


@given(
    st.text('samplertopkminphasetinkgwru0123456789.,=()|" -constclidyef', max_size=60)
    | st.text(max_size=40)
)
@settings(deadline=None, max_examples=500)
def test_any_text_is_a_policy_or_an_error_of_ours(text):
    try:
        parse_policy(text)
    except TemperingError as error:
        assert str(error)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "phases"])
def test_every_policy_has_an_example_that_parses(name):
    signature, summary, example = POLICIES[name]
    assert name in signature and summary
    assert str(parse_policy(example)) == example


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 1: expected the name of a policy, found the end"),
        ("0.7", r"expected a policy, such as constant\(0.7\)"),
        ("suport(3)", "column 1: no policy is called 'suport'; did you mean support"),
        ("throb(12,3,1,12)", r"schedule\(throb\(12,3,1,12\), length=256\)"),
        ("constant(0.7", r"column 13: expected ',' or '\)', found the end"),
        ("constant(0.7) x", "column 15: expected '|' or the end, found 'x'"),
        ("constant(T=1, T=2)", "column 15: .*T is given twice"),
        ("constant(U=1)", "column 10: .*no argument 'U'"),
        ("constant()", r"column 1: constant\(T\) needs T"),
        ("constant(1,2)", "column 12: .*takes 1 argument at most"),
        ("constant(support(2))", "column 10: .*takes a number"),
        ("constant(-1)", r"constant takes T in 0\.\.inf, got -1"),
        ("constant(1e999)", "column 10: .*write inf for the limit"),
        ("constant(1e-999)", "column 10: .*write 0 for the limit"),
        ("support(0.5)", "1 or more"),
        ("support(throb(1,2,3))", r"needs the number of tokens it spans.*length=N"),
        ('support("a")', "takes a number or a pattern"),
        ("schedule(linear(1,2), length=2.5)", "column 23: .*whole number, got 2.5"),
        ("schedule(linear(1,2), length=0)", "length is the expected number of tokens"),
        ("schedule(throb(1,2,x), length=9)", "column 21: .*found '\\)'"),
        ("schedule(throb(1,2,-3), length=9)", "column 10: .*takes values > 0"),
        ("schedule(linear(1,2))", r"needs length"),
        ("ladder(1,2,n=1)", "n = 2 samples or more, got 1"),
        ("ladder(0,2,n=3)", "ladder takes a > 0, finite; got 0"),
        ("dynatemp(-1)", "dynatemp takes range >= 0"),
        ("entropy(T0=inf, theta=1)", "T0 >= 0, finite"),
        ("entropy(T0=1, theta=-1)", "theta >= 0, finite"),
        ("constant(1)|clip(2,1)", "column 13: clip takes 0 <= lo <= hi, got lo = 2 and hi = 1"),
        ("constant(1)|room(-1)", "room takes f >= 0, finite; got -1"),
        ("1|room(2)", "expected a policy"),
        ("room(1, 2)", "column 6: .*takes a policy"),
        ("phases(0.7)", "name the phase, as answer=0.7"),
        ("phases(answer=1, answer=2)", "column 18: phases: answer is given twice"),
        ("phases(thinking=1)", "needs answer="),
        ("phases(answer=-1)", r"column 8: phases: answer takes T in 0\.\.inf, got -1"),
        ('phases(answer="1")', "answer takes a number or a policy"),
        ("phases(plan=1, answer=1)", r'plan=between\(0.7, "<plan>", "</plan>"\)'),
        ("phases(thinking=1, answer=1)", r"parse_policy\(text, tokenizer\)"),
        ("phases(a=between(1), answer=1)", "takes 2 or 3 arguments"),
        ("phases(a=between(1, 3), answer=1)", r"text in quotes, or as ids\(7,12\)"),
        ("phases(a=between(1, ids(-3)), answer=1)", "0 or more"),
        ("phases(answer=between(1, ids(3)))", "give it no delimiters"),
        ("phases(a=between(1, ids(3)), b=between(2, ids(3)), answer=1)", "opens both a and b"),
        ("phases(a=between(phases(answer=1), ids(3)), answer=1)", "phases don't go inside phases"),
        (
            "phases(a=between(ladder(1,2,n=3), ids(3)), answer=ladder(1,2,n=4))",
            r"ladders of one policy have one n, got \[3, 4\]",
        ),
        ("sampler(top_p=2)", r"column 1: sampler: top_p lies in \(0, 1\], got 2"),
        ("sampler(top_p=0)", r"top_p lies in \(0, 1\], got 0"),
        ("sampler(min_p=1.5)", r"min_p lies in \[0, 1\], got 1.5"),
        ("sampler(top_k=2.5)", "column 9: .*top_k takes a whole number, got 2.5"),
        ("sampler(top_k=-2)", "top_k is a number from -1"),
        ("sampler(topp=0.5)", "column 9: .*has no argument 'topp'; it has T, top_p, top_k, min_p"),
        ("sampler(T=-1)", r"column 9: .*T takes T in 0\.\.inf, got -1"),
        ('sampler(T="hot")', "column 9: .*takes a number or a policy"),
        ("sampler(T=sampler(top_p=0.5))", "put samplers side by side, in phases"),
        ("sampler(T=constant(1)|order(temperature))", "not constant.1.|order"),
        ("phases(answer=sampler(T=phases(answer=1)))", "phases don't go inside phases"),
        (
            "constant(1)|order(top_k)",
            r"column 13: order leaves temperature out.*order\(top_k, temp",
        ),
        ("constant(1)|order()", "order leaves temperature out"),
        ("constant(1)|order(top_k, top_k, temperature)", "order names top_k twice"),
        ("constant(1)|order(topk, temperature)", "order has no 'topk'; it has temperature, top_p"),
        ("constant(1)|order(0.5)", "column 19: expected a word, found '0.5'"),
        ('constant(1)|order("top_k", temperature)', "column 19: expected a word"),
        ("constant(1)|order(temperature=1)", r"column 30: expected ',' or '\)', found '='"),
        ("constant(1)|order(temperature, support(2))", "takes one policy, then words"),
        ("order(temperature)", r"such as constant\(0.7\)|order\(temperature\)"),
        ("sampler(top_p=0.9)|order(temperature)", "leaves out top_p, which sampler.* gives"),
        (
            "constant(1)|order(temperature)|order(temperature)",
            "two orders of one policy",
        ),
        ('phases(a=between(1, ""), answer=1)', "one character or more"),
        ('phases(a=between(1, "\\x"), answer=1)', "no JSON string"),
        ("constant(#)", "column 10: a policy has no place for '#'"),
        ("room(" * 60 + "constant(1)" + ", 1)" * 60, "more than 50 calls inside each other"),
        ("constant(" + "1" * 10_000 + ")", "at most 10000 characters"),
    ],
)
def test_errors_say_what_where_and_how_to_mend(text, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        parse_policy(text)


def test_the_caret_stands_under_the_column():
    with pytest.raises(ScheduleError) as caught:
        parse_policy("support(12)|clop(1,2)")
    first, text, caret = str(caught.value).splitlines()
    assert first.startswith("column 13: no policy is called 'clop'; did you mean clip")
    assert text[caret.index("^") :] == "clop(1,2)"


def test_a_pattern_inside_keeps_the_columns_of_the_whole_text():
    with pytest.raises(ScheduleError) as caught:
        parse_policy("schedule(throb(1,2)|rom(2), length=9)")
    assert str(caught.value).startswith("column 21: no pattern is called 'rom'")
