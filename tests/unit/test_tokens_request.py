"""Requests in the words of vLLM, llama.cpp and s1: what they mean and what is refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.errors import InputError
from tempering.tokens import Policy, RequestSettings, parse_policy, policy_from_request
from tempering.tokens.phases import Phases, Span
from tempering.tokens.policy import ConstantPolicy
from tempering.tokens.request import asked_of


class Spelling:
    """The least that a tokenizer of transformers' interface has: a token is a character."""

    chat_template = "{# <think> and </think> #}"  # names them, and can't be rendered
    eos_token, bos_token = "\x03", None

    def __len__(self):
        return 128

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, ids, **settings):
        return "".join(map(chr, ids))

    def convert_ids_to_tokens(self, token):
        return chr(token)

    def convert_tokens_to_ids(self, text):
        return ord(text) if len(text) == 1 else None


TOKENIZER = Spelling()


def phases(thinking, answer):
    spans = (("thinking", Span(ConstantPolicy(thinking))), ("answer", Span(ConstantPolicy(answer))))
    return Phases(spans, TOKENIZER)


@pytest.mark.parametrize(
    ("request_", "policy"),
    [
        ({"temperature": 0.7}, "constant(0.7)"),
        ({"temperature": 0}, "constant(0)"),
        ({"temperature": math.inf}, "constant(inf)"),
        ({"tempering": "support(12)|clip(0.2,2)"}, "support(12)|clip(0.2,2)"),
        ({"dynatemp_range": 0.5}, "dynatemp(0.5, exponent=1, temperature=1)"),
        (
            {"temperature": 0.8, "dynatemp_range": 0.5, "dynatemp_exponent": 2},
            "dynatemp(0.5, exponent=2, temperature=0.8)",
        ),
    ],
)
def test_what_requests_mean(request_, policy):
    assert policy_from_request(request_) == parse_policy(policy)


@pytest.mark.parametrize(
    ("request_", "thinking", "answer"),
    [
        ({"temperature": 0.9, "post_thinking": {"temperature": 0.2}}, 0.9, 0.2),
        ({"post_thinking": {"temperature": 0.2}}, 1, 0.2),
        ({"temperature": 0.9, "post_thinking": {}}, 0.9, 0.9),
        ({"temperature": 0.3, "temperature_thinking": 1.1}, 1.1, 0.3),
        ({"tempering": "phases(thinking=1, answer=0.2)"}, 1, 0.2),
    ],
)
def test_thinking_in_the_words_of_others(request_, thinking, answer):
    policy = policy_from_request(request_, TOKENIZER)
    assert policy == phases(thinking, answer)
    assert policy.state(TOKENIZER.encode("<think>")).phase == "thinking"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([], r"a request is a mapping of tempering, .*; got \[\]"),
        ({}, "the request is empty"),
        ({"temprature": 1}, "unknown key 'temprature'"),
        ({3: 1}, "unknown key 3"),
        ({"temperature": "0.7"}, "temperature is a number, got '0.7'"),
        ({"temperature": True}, "temperature is a number, got True"),
        ({"temperature": None}, "temperature is a number, got None"),
        ({"temperature": -0.1}, "temperature is a number from 0 to inf, got -0.1"),
        ({"temperature": math.nan}, "temperature is a number from 0 to inf, got nan"),
        ({"temperature_thinking": -1}, "temperature_thinking is a number from 0"),
        ({"post_thinking": 0.2}, "post_thinking is a mapping such as .* got 0.2"),
        ({"post_thinking": {"temperature": "x"}}, "post_thinking.temperature is a number"),
        ({"post_thinking": {"top_n": 0.9}}, r"post_thinking.top_n can't be changed by phase"),
        ({"post_thinking": {"top_p": 0}}, r"post_thinking.top_p lies in \(0, 1\], got 0"),
        ({"post_thinking": {"top_k": 2.5}}, r"post_thinking.top_k is a whole number.*got 2.5"),
        ({"post_thinking": {"top_k": -2}}, r"post_thinking.top_k is a number from -1"),
        ({"post_thinking": {"min_p": 1.5}}, r"post_thinking.min_p lies in \[0, 1\], got 1.5"),
        ({"post_thinking": '{"top_p": "0.9"}'}, r"post_thinking.top_p is a number, got '0.9'"),
        ({"top_p_thinking": True}, "top_p_thinking is a number, got True"),
        ({"top_k_thinking": math.inf}, "top_k_thinking is a whole number"),
        ({"min_p_thinking": -0.5}, r"min_p_thinking lies in \[0, 1\], got -0.5"),
        ({"top_p": math.nan}, "top_p is a number from -1 to inf, got nan"),
        (
            {"top_p_thinking": 0.9, "post_thinking": {}},
            "top_p_thinking can't be combined with post",
        ),
        ({"top_k_thinking": 3, "dynatemp_range": 1}, "can't be combined with dynatemp_range"),
        ({"tempering": "constant(1)", "top_p": 1}, "tempering can't be combined with top_p"),
        ({"post_thinking": {}, "temperature_thinking": 1}, "can't be combined"),
        (
            {"post_thinking": {}, "dynatemp_range": 1},
            "post_thinking can't be combined with dynatemp_range",
        ),
        (
            {"tempering": "constant(1)", "temperature": 1},
            "tempering can't be combined with temperature",
        ),
        ({"tempering": 3}, "tempering is the text of a policy, got 3"),
        ({"tempering": "x" * 20_000}, "at most 10000 characters"),
        ({"dynatemp_exponent": 1}, "dynatemp_exponent does nothing without dynatemp_range"),
        ({"dynatemp_range": math.inf}, "dynatemp_range is a number from 0 to 1000000, got inf"),
        ({"dynatemp_range": 1, "dynatemp_exponent": -1}, "dynatemp_exponent is a number from 0"),
        ({"temperature": math.inf, "dynatemp_range": 1}, "inf has no range"),
    ],
)
def test_bad_requests_name_the_key(request_, message):
    with pytest.raises(InputError, match=message):
        policy_from_request(request_, TOKENIZER)


@pytest.mark.parametrize(
    ("request_", "thinking", "answer"),
    [
        (
            {
                "temperature": 0.9,
                "top_p": 0.95,
                "post_thinking": {"temperature": 0.2, "top_p": 0.8},
            },
            "sampler(T=0.9, top_p=0.95)",
            "sampler(T=0.2, top_p=0.8)",
        ),
        (
            {"temperature": 0.9, "min_p": 0.1, "post_thinking": '{"top_k": 20}'},
            "sampler(T=0.9, top_k=0, min_p=0.1)",
            "sampler(T=0.9, top_k=20, min_p=0.1)",
        ),
        (
            {"temperature": 0.3, "temperature_thinking": 1, "top_k_thinking": 20, "top_p": 0.9},
            "sampler(T=1, top_p=0.9, top_k=20)",
            "sampler(T=0.3, top_p=0.9, top_k=0)",
        ),
        (
            {"min_p_thinking": 0.2, "top_p_thinking": 1},
            "sampler(T=1, top_p=1, min_p=0.2)",
            "sampler(T=1, top_p=1, min_p=0)",
        ),
    ],
)
def test_whole_samplers_by_phase_in_the_words_of_others(request_, thinking, answer):
    spans = (("thinking", Span(parse_policy(thinking))), ("answer", Span(parse_policy(answer))))
    assert policy_from_request(request_, TOKENIZER) == Phases(spans, TOKENIZER)


@pytest.mark.parametrize(
    ("request_", "policy"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, "sampler(T=0.7, top_p=0.9)"),
        ({"top_k": -1}, "sampler(T=1, top_k=0)"),
        ({"dynatemp_range": 0.5, "min_p": 0.1}, "sampler(T=dynatemp(0.5), min_p=0.1)"),
    ],
)
def test_a_request_without_phases_is_a_sampler(request_, policy):
    assert policy_from_request(request_) == parse_policy(policy)


def test_what_an_engine_hands_over():
    """The policy truncates where a phase does; otherwise the engine does, as ever."""
    own = RequestSettings(temperature=0.6, top_p=0.9, top_k=40)
    policy, given = asked_of({"temperature_thinking": 1.0}, own, TOKENIZER)
    assert str(policy) == "phases(thinking=1, answer=0.6)" and not policy.truncates
    policy, given = asked_of({"post_thinking": {"top_p": 0.5}}, own, TOKENIZER)
    assert given == RequestSettings()
    assert str(policy) == (
        "phases(thinking=sampler(T=0.6, top_p=0.9, top_k=40), "
        "answer=sampler(T=0.6, top_p=0.5, top_k=40))"
    )
    policy, given = asked_of({"tempering": "sampler(min_p=0.1)"}, own)
    assert given == own and policy == parse_policy("sampler(min_p=0.1)")
    for text, message in (
        (
            "sampler(top_p=0.5)",
            r"top_p is given twice: by sampler\(top_p=0.5\) and as top_p=0.9 of",
        ),
        (
            "sampler(T=0.5)",
            "two temperatures: .*temperature=0.6 of the request; send temperature=1",
        ),
        ("phases(thinking=sampler(top_k=3), answer=sampler())", "top_k is given twice"),
        ("sampler()|order(top_k, temperature)", "leaves out top_p, which the request gives"),
    ):
        with pytest.raises(InputError, match=message):
            asked_of({"tempering": text}, own, TOKENIZER)


def test_phases_need_a_tokenizer():
    with pytest.raises(InputError, match=r"give the tokenizer"):
        policy_from_request({"temperature_thinking": 1})


junk = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
keys = st.sampled_from(
    [
        *("tempering", "temperature", "temperature_thinking", "post_thinking", "dynatemp_range"),
        *("top_p", "top_k", "min_p", "top_p_thinking", "top_k_thinking", "min_p_thinking", "top_n"),
    ]
)


@given(junk | st.dictionaries(keys, junk, max_size=3))
@settings(deadline=None, max_examples=1000)
def test_any_request_is_a_policy_or_an_error_of_ours(request_):
    try:
        policy = policy_from_request(request_, TOKENIZER)
    except InputError as error:
        assert str(error)
    else:
        assert isinstance(policy, Policy)
