"""Policies that answer to the text: loops, markers and budgets, as functions of token ids."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.errors import EnergyError, InputError, TemperatureError
from tempering.tokens import RequestSettings, TokenState, parse_policy, temper_logits
from tests.unit.test_tokens_phases import byte_level, metaspace

LOGITS = torch.tensor([[0.0, 1.0, 0.5, -0.3, 0.2, 0.9, 0.1, 0.4, 0.7, 0.6]])
IDS = "phases(a=between(1.2, ids(3), ids(4,5)), answer=0.2)"


def temperature_of(policy, generated, prompt=(1, 2), logits=LOGITS, **own):
    state = policy.state(prompt, generated, given=RequestSettings(**own))
    return temper_logits(policy, logits, [state])[1].item()


def forced(policy, generated, prompt=(1, 2)):
    """The token that has p = 1, or None."""
    result, T = temper_logits(policy, LOGITS, [policy.state(prompt, generated)])
    live = (result[0] > -math.inf).nonzero().squeeze(-1).tolist()
    assert len(live) > 1 or (T.item() == 1 and result[0, live[0]] == 0)
    return live[0] if len(live) == 1 else None


# -- loops


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 6), st.integers(2, 14))
@settings(deadline=None, max_examples=300)
def test_loops_by_brute_force(tokens, ngram, window):
    ngram = min(ngram, window - 1)
    policy = parse_policy(f"constant(0.5)|loops(heat=3, ngram={ngram}, window={window})")
    recent = tokens[-window:]
    places = range(len(recent) - ngram)
    again = any(recent[i : i + ngram] == recent[-ngram:] for i in places)
    assert temperature_of(policy, tokens) == pytest.approx(1.5 if again else 0.5)


def test_a_loop_warms_and_cools_again():
    policy = parse_policy("constant(0.5)|loops(heat=2, ngram=3, window=9)")
    text = [7, 8, 9, 7, 8, 9, 7, 1, 7, 8, 9]
    warm = [temperature_of(policy, text[:n]) == 1 for n in range(len(text) + 1)]
    assert warm == [False] * 6 + [True, True, False, False, False, True]
    # What the prompt repeats is no loop.
    assert temperature_of(policy, [7, 8, 9], prompt=(7, 8, 9)) == 0.5


def test_loops_inside_a_phase_see_the_tokens_of_that_phase():
    inside = "between(constant(0.5)|loops(heat=2, ngram=2, window=9), ids(3), ids(4))"
    policy = parse_policy(f"phases(a={inside}, answer=0.25)")
    assert temperature_of(policy, [7, 8, 3, 7, 8]) == 0.5  # the first 7 8 is the answer's
    assert temperature_of(policy, [3, 7, 8, 4, 9, 9, 3, 7, 8]) == 1  # both are of the phase
    assert temperature_of(policy, [3, 7, 8, 7, 8, 4]) == 0.25
    around = parse_policy("phases(a=between(0.5, ids(3), ids(4)), answer=0.25)|loops(ngram=2)")
    assert temperature_of(around, [7, 8, 3, 7, 8]) == pytest.approx(0.7)


def test_loops_compose():
    text = "constant(4)|loops(heat=2, ngram=1, window=4)|room(0.5)|clip(0.1,2.5)"
    assert temperature_of(parse_policy(text), [7]) == 2
    assert temperature_of(parse_policy(text), [7, 7]) == 2.5
    cut = parse_policy("sampler(top_k=2)|loops(heat=2, ngram=1, window=4)")
    state = cut.state([], [7, 7], given=RequestSettings(temperature=0.5))
    result, T = temper_logits(cut, LOGITS, [state])
    assert T.item() == 1 and int((result > -math.inf).sum()) == 2
    nested = parse_policy("constant(1)|loops(heat=2, ngram=1)|loops(heat=3, ngram=2)")
    assert [temperature_of(nested, [7] * n) for n in range(4)] == [1, 1, 2, 6]


# -- after


@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["bytes", "metaspace"])
@given(
    words=st.lists(st.sampled_from(["aha ", "ah", "a", "h", " ", "\n"]), max_size=12),
    n=st.integers(1, 4),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_markers_are_counted_in_the_text_however_it_is_cut(tokenizer, words, n, data):
    text = "".join(words)
    policy = parse_policy(f'constant(2)|after("aha", {n}, 0.5)', tokenizer)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
    written = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    wanted = 0.5 if written.count("aha") >= n else 2
    logits = torch.randn(1, len(tokenizer))
    assert temperature_of(policy, ids, tokenizer.encode("aha aha aha aha"), logits) == wanted


def test_a_marker_that_is_a_token_is_that_token():
    tokenizer = byte_level()
    policy = parse_policy('constant(2)|after("<|im_end|>", 1, 0.5)', tokenizer)
    tag = tokenizer.convert_tokens_to_ids("<|im_end|>")
    logits = torch.randn(1, len(tokenizer))
    assert temperature_of(policy, [tag], (), logits) == 0.5
    spelled = [i for c in "<|im_end|>" for i in tokenizer.encode(c)]
    assert temperature_of(policy, spelled, (), logits) == 2


def test_after_ids_and_what_is_active():
    policy = parse_policy("constant(1)|after(ids(7,8), 2, schedule(linear(2,0.5), length=9))")
    assert [temperature_of(policy, g) for g in ([7, 8], [7, 7, 8, 7], [7, 8, 7, 8])] == [1, 1, 1.25]
    assert temperature_of(policy, [7, 8] * 5) == 0.5
    # Without x, the request's own settings hold before, and those of y after.
    policy = parse_policy("after(ids(7), 1, sampler(T=0.4, top_k=2))")
    assert temperature_of(policy, [1], temperature=0.8) == pytest.approx(0.8)
    state = policy.state([], [7], given=RequestSettings(temperature=0.8, min_p=0.1))
    assert int((temper_logits(policy, LOGITS, [state])[0] > -math.inf).sum()) == 2
    # Phases on both sides follow the whole reply.
    both = parse_policy(
        f"{IDS}|after(ids(9), 1, phases(a=between(3, ids(3)), answer=2))|clip(0.3,2.5)"
    )
    assert [temperature_of(both, g) for g in ([], [3], [3, 9], [9])] == pytest.approx(
        [0.3, 1.2, 2.5, 2]
    )
    assert both.state([1], [3, 9]).phase == "a"


# -- budget


def test_a_budget_closes_its_phase():
    policy = parse_policy(f"{IDS}|budget(a=6)")
    assert policy.closing == (4, 5)
    spent = [3, 7, 7, 7]
    assert [forced(policy, [*spent, *more]) for more in ([], [7], [7, 4], [7, 4, 5])] == [
        *(None, 4, 5, None),
    ]
    # Opened again, it is closed at once; a closer of the model's own is as good.
    closed = [3, 7, 7, 7, 7, 4, 5, 8, 3]
    assert [forced(policy, [*closed, *more]) for more in ([], [4], [4, 5])] == [4, 5, None]
    assert forced(policy, [3, 7, 4, 5, 8, 8, 8, 8]) is None
    # A prompt's own thinking costs nothing, and one that it opens is limited.
    assert [forced(policy, [7] * n, (1, 3, 7, 7, 7)) for n in range(5)] == [None] * 4 + [4]
    # A token that the model wrote of the tag before the budget was spent is no part of it.
    assert forced(policy, [3, 7, 7, 7, 4]) == 4


def test_a_budget_cools_over_its_last_quarter():
    policy = parse_policy("phases(a=between(2, ids(3), ids(4)), answer=0.2)|budget(a=9)")
    found = [temperature_of(policy, [3, *[7] * n]) for n in range(9)]
    # free = 8: left = 8, ..., 1, then the tag is forced, at T = 1.
    assert found == pytest.approx([2] * 7 + [1, 1])
    assert temperature_of(policy, []) == pytest.approx(0.2)
    long = parse_policy("phases(a=between(2, ids(3), ids(4)), answer=0.2)|budget(a=101)")
    assert temperature_of(long, [3, *[7] * 90]) == pytest.approx(2 * 4 * 0.1)


def test_a_budget_smaller_than_the_longest_is_exact():
    for limit in (2, 3, 4, 7):
        policy = parse_policy(f"{IDS}|budget(a={limit})")
        written = [3]
        while policy.state([1], written).phase == "a":
            token = forced(policy, written)
            written.append(7 if token is None else token)
        assert len(written) == 1 + limit and written[-2:] == [4, 5]


def test_a_budget_of_thinking_on_a_tokenizer():
    tokenizer = byte_level()
    with pytest.warns(UserWarning, match="neither the vocabulary nor the chat template"):
        policy = parse_policy("constant(1)|budget(thinking=20)", tokenizer)
    tag = tokenizer.encode("</think>")
    assert policy.closing == tuple(tag)
    written = tokenizer.encode("<think>")
    logits = torch.zeros(1, len(tokenizer))
    letter = tokenizer.encode("x")[0]
    count = 0
    while policy.state([], written).phase == "thinking":
        result, _ = temper_logits(policy, logits, [policy.state([], written)])
        live = (result[0] == 0).nonzero().squeeze(-1).tolist()
        written.append(live[0] if len(live) == 1 else letter)
        count += 1
    assert count == 20 and tokenizer.decode(written).endswith("</think>")


def test_a_forced_token_that_is_masked_is_an_error():
    policy = parse_policy(f"{IDS}|budget(a=3)")
    masked = LOGITS.clone()
    masked[0, 4] = -math.inf
    with pytest.raises(EnergyError, match="row 0: .* has to write token 4, which the engine masks"):
        temper_logits(policy, masked, [policy.state([1], [3, 7])])
    with pytest.raises(EnergyError, match="has to write token 4"):
        temper_logits(policy, LOGITS[:, :4], [policy.state([1], [3, 7])])


def test_budgets_compose():
    text = "phases(a=between(sampler(T=2, top_k=2), ids(3), ids(4)), answer=sampler(T=1))"
    policy = parse_policy(f"{text}|budget(a=3)|loops(heat=2, ngram=1, window=4)|clip(0.1,3)")
    assert forced(policy, [3, 7, 7]) == 4
    assert temperature_of(policy, [3, 7]) == 2 and temperature_of(policy, [8, 8]) == 2
    two = parse_policy(
        "phases(a=between(1, ids(3), ids(4)), b=between(1, ids(5), ids(6)), answer=1)"
        "|budget(a=2)|budget(b=3)"
    )
    assert [forced(two, g) for g in ([3, 7], [5, 7], [5, 7, 7])] == [4, None, 6]
    # A phase inside the phase counts: here a code block, left open, while thinking.
    nested = parse_policy(
        "phases(a=between(1, ids(3), ids(4)), b=between(1, ids(5), ids(6)), answer=1)|budget(a=4)"
    )
    assert forced(nested, [3, 5, 7, 7]) == 4


# -- all of them


POLICIES = (
    "constant(1)|loops(heat=2, ngram=2, window=5)",
    "constant(1)|after(ids(7,8), 2, 0.5)",
    f"{IDS}|budget(a=4)",
    f"{IDS}|loops(ngram=1, window=3)|after(ids(7), 2, constant(2)|loops(ngram=2))|budget(a=5)",
    "phases(a=between(constant(1)|after(ids(7), 2, 0.5), ids(3), ids(4)), answer=0.3)",
)


@pytest.mark.parametrize("text", POLICIES)
@given(st.lists(st.integers(3, 8), max_size=25), st.integers(0, 25))
@settings(deadline=None, max_examples=40)
def test_states_are_functions_of_the_tokens(text, tokens, back):
    """Token by token, rebuilt, taken back and through JSON: the same state and text form."""
    policy = parse_policy(text)
    assert parse_policy(str(policy)) == policy
    state = policy.start([1, 3])
    along = [state]
    for token in tokens:
        state = policy.advance(state, token)
        along.append(state)
    assert state == policy.state([1, 3], tokens) and state.position == len(tokens)
    back = min(back, len(tokens))
    assert along[back] == policy.state([1, 3], tokens[:back])
    assert TokenState.from_json(state.to_json()) == state


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("constant(1)|loops(ngram=8, window=8)", "ngram from 1 to window - 1 = 7, got 8"),
        ("constant(1)|loops(ngram=0)", "ngram from 1"),
        ("constant(1)|loops(window=9999)", "window of 2 to 4096 tokens, got 9999"),
        ("constant(1)|loops(heat=0.5)", "heat >= 1, finite; got 0.5"),
        ("constant(1)|loops(heat=inf)", "heat >= 1, finite; got inf"),
        ("constant(0)|loops()", "0 stays 0"),
        ("constant(1)" + "|loops(window=4096)" * 5, "come to 16384 tokens at most"),
        (f"{IDS}" + "|budget(a=9)" * 8, "8 of phases and budget at most"),
        ("loops(0.7)", "column 7: .*takes a policy, such as constant"),
        ('constant(1)|after("Wait", 2, 0.5)', r"give the tokenizer: parse_policy\(text, tok"),
        ("constant(1)|after(ids(3), 0, 0.5)", "n = 1 or more, got 0"),
        ("constant(1)|after(ids(3), 1.5, 0.5)", "takes a whole number, got 1.5"),
        ("constant(1)|after(3, 1, 0.5)", "column 19: .*takes its marker as text in quotes"),
        ("constant(1)|after(ids(3), 1)", "takes its marker as text"),
        ("constant(1)|after(ids(3), n=1, 0.5)", "without names"),
        ("ladder(1,2,n=3)|after(ids(3), 1, ladder(1,2,n=4))", r"one n, got \[3, 4\]"),
        (
            f"{IDS}|budget(a=1)",
            r"smaller than the phase's closing tag, which has 2 tokens: \(4, 5\)",
        ),
        ("phases(a=between(1, ids(3)), answer=1)|budget(a=9)", "a has no closing tag"),
        (f"{IDS}|budget(answer=9)", "limit it with the engine's own max_tokens"),
        (f"{IDS}|budget(b=9)", "no known delimiters|give the tokenizer"),
        (f"{IDS}|budget(a=9999999)", "a budget is at most 1048576 tokens"),
        (f"{IDS}|budget(a=2, b=3)", "one policy and one phase"),
        ("constant(1)|budget(thinking=9)", "give the tokenizer"),
        (
            f"phases(b=between({IDS}|budget(a=9), ids(8)), answer=1)",
            "phases don't go inside phases",
        ),
    ],
)
def test_bad_texts_say_what_is_wrong(text, message):
    with pytest.raises((InputError, TemperatureError), match=message):
        parse_policy(text)


def test_a_marker_that_the_tokenizer_cannot_write_is_refused():
    with pytest.raises(InputError, match="can't produce the marker ids"):
        parse_policy("constant(1)|after(ids(99999), 1, 0.5)", byte_level())
    with pytest.raises(InputError, match="can't produce the marker 'Q'"):
        parse_policy('constant(1)|after("Q", 1, 0.5)', _without_capitals())


def _without_capitals():
    from tests.unit.test_tokens_request import Spelling

    class Lower(Spelling):
        def encode(self, text, add_special_tokens=True):
            return [ord(c) for c in text.lower()]

    return Lower()
