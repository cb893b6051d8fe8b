"""The one grammar: all done with a tree within its limits is safe; it reads what it prints."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import time

import pytest
import torch

from tempering.attention.profiles.rules import rule
from tempering.calls import DEEPEST, Grammar, written
from tempering.errors import InputError, ProfileError, ScheduleError, TemperingError
from tempering.schedules import schedule
from tempering.tokens import TokenState, parse_policy, temper_logits

ANY = Grammar("thing", InputError, strings=True, calls=500, characters=10_000)


@pytest.fixture
def little_stack():
    """As little of Python's stack as a request leaves where a server reads it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 700)
    yield
    sys.setrecursionlimit(before)


def nested(opening: str, inside: str, closing: str, depth: int) -> str:
    return opening * depth + inside + closing * depth


DEEP_POLICIES = [
    "constant(4)" + "|room(1)" * (DEEPEST - 1),
    nested("room(", "constant(4)", ", 1)", DEEPEST - 1),
    f"schedule({'throb(2,1)' + '|room(1)' * (DEEPEST - 2)}, length=9)",
    f"schedule({nested('reverse(', 'throb(2,1)', ')', DEEPEST - 2)}, length=9)",
    f"support({nested('nest(', 'throb(2,3)', ', constant(1))', 23)}, length=9)",
    f"support({nested('nest(constant(3), ', 'throb(2,3)', ')', 23)}, length=9)",
    f"schedule({'throb(2,1)' + '|amplitude(2)' * (DEEPEST - 2)}, length=1048576)",
    f"schedule({nested('uniform(', 'throb(2,1)', ')', 40)}, length=150)",
]


@pytest.mark.parametrize("text", DEEP_POLICIES)
def test_all_that_the_grammar_admits_is_safe(text, little_stack):
    """Read, evaluated, printed, hashed, compared, pickled and copied at the depth's limit."""
    start = time.perf_counter()
    policy = parse_policy(text)
    again = parse_policy(str(policy))
    assert again == policy and hash(again) == hash(policy)
    assert pickle.loads(pickle.dumps(policy)) == policy == copy.deepcopy(policy)
    logits = torch.tensor([[0.0, 1.0, 2.0, 5.0]] * 2)
    states = [TokenState(), TokenState(position=3)]
    result, _ = temper_logits(policy, logits, states)
    assert torch.isfinite(result).all()
    assert time.perf_counter() - start < 5  # operations inside each other took 2^depth


@pytest.mark.parametrize(
    "text",
    [
        "constant(1)" + "|room(1)" * 330,
        "constant(1)" + "|room(1)" * DEEPEST,
        nested("room(", "constant(1)", ",1)", DEEPEST),
        nested("phases(a=", "1", ")", 900),
        "phases(answer=" + nested("room(", "constant(1)", ",1)", DEEPEST) + ")",
        "(" * 9999,
        "x(" * 4999,
        "constant(1)" + "|" * 5000,
        "constant(" + "1," * 4000 + "1)",
        "x" * 10_001,
    ],
)
def test_what_is_too_deep_or_long_is_an_error_of_ours(text, little_stack):
    with pytest.raises(ScheduleError):
        parse_policy(text)


def test_policies_made_by_hand_have_the_same_limit():
    policy = parse_policy("constant(2)")
    for _ in range(DEEPEST - 1):
        policy = policy.room(1)
    assert parse_policy(str(policy)) == policy
    with pytest.raises(InputError, match="more than 50 policies inside each other"):
        policy.clip(0, 9)


@pytest.mark.parametrize(("kind", "read"), [(ScheduleError, parse_policy), (ProfileError, rule)])
def test_errors_are_of_their_room_and_point_at_their_column(kind, read):
    for text, column in (("", 1), ("suport(3)", 1), ("support(3", 10), ("support(3) 3", 12)):
        with pytest.raises(kind) as caught:
            read(text)
        first, _, caret = str(caught.value).split("\n")
        assert first.startswith(f"column {column}: ")
        assert caret == " " * (column + 1) + "^"


def test_one_printer():
    assert written("f") == "f()"
    assert written("f", 1.0, 2, 0.5) == "f(1,2,0.5)"
    assert written("f", 1, schedule("linear(2,1)"), 3) == "f(1, linear(2,1), 3)"
    assert written("f", 1, "</a>", n=3, t=0.5) == 'f(1, "</a>", n=3, t=0.5)'
    assert written("f", n=1) == "f(n=1)"
    call = ANY.read(written("f", 1e-300, 'a"\\\n\u2603', n=1e22))
    assert [argument.value for argument in call.arguments] == [1e-300, 'a"\\\n\u2603', 1e22]


@pytest.mark.parametrize("seed", range(3))
def test_any_text_is_a_tree_or_an_error_of_ours(seed):
    import random

    draw = random.Random(seed)
    words = [
        *'()|,="\\ \n\ud800',
        *("a", "b(", "x=", '"é"', "1", "-2.5e-3", "inf", "1e999"),
    ]
    for _ in range(2000):
        text = "".join(draw.choice(words) for _ in range(draw.randrange(30)))
        try:
            ANY.read(text)
        except TemperingError as error:
            assert str(error).startswith("column ")
