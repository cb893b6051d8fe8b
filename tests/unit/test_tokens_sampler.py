"""Whole samplers: what top_p, top_k and min_p keep, in which order, and from whose settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.errors import InputError
from tempering.tokens import RequestSettings, TokenState, parse_policy, temper_logits
from tempering.tokens.engine_check import reference_kept, reference_posterior
from tempering.tokens.truncation import ORDER, smallest

INF = math.inf
# Apart by enough that no float32 rounding decides what is kept.
ROW = [3.0, 1.5, 2.2, -0.4, 3.7, 0.9, -INF, 2.9]


def kept(text, row=ROW, **own):
    """Which tokens a policy leaves, and T."""
    policy = parse_policy(text)
    state = policy.state([], given=RequestSettings(**own))
    result, temperature = temper_logits(policy, torch.tensor([row]), [state])
    return (result[0] > -INF).nonzero().squeeze(-1).tolist(), temperature.item()


def wanted(order, cuts, T, row=ROW):
    """The same in plain Python, from the definitions."""
    seen = None
    for name in order:
        if name == "temperature":
            seen = T
        elif name in cuts:
            row = reference_kept(name, cuts[name], row, seen)
    return row


@given(
    st.permutations(ORDER),
    st.fixed_dictionaries(
        {},
        optional={
            "top_p": st.floats(0.05, 1),
            "top_k": st.integers(1, 9),
            "min_p": st.floats(0, 1),
        },
    ),
    st.sampled_from([0.0, 0.3, 1.0, 2.5, INF]),
    st.lists(st.integers(-6, 6), min_size=1, max_size=12),
)
@settings(deadline=None, max_examples=300)
def test_every_order_keeps_what_its_definition_keeps(order, cuts, T, row):
    """Logits of whole numbers, many of them tied; the oracle's margins decide what is compared."""
    row = [float(value) for value in row]
    own = "".join(f", {name}={value!r}" for name, value in cuts.items())
    policy = parse_policy(f"sampler(T={T!r}{own})|order({', '.join(order)})")
    result, temperature = temper_logits(policy, torch.tensor([row]), [policy.state([])])
    live = wanted(order, cuts, T, row)
    close = any(
        live != wanted(order, {**cuts, name: cuts[name] * shift}, T, row)
        for name in cuts
        if name != "top_k" and cuts[name] < 1  # no tie is cut at 1, where no rounding decides
        for shift in (1 - 1e-5, 1 + 1e-5)
    )
    # At T = inf all weights tie for the oracle; the limit that is kept is that of finite T.
    close = close or (T == INF and cuts.get("min_p") == 1)
    if close:
        return
    certain = sum(value >= max(live) - 104 for value in live) == 1
    expected = reference_posterior(live, 1.0 if certain else T)
    assert result[0].softmax(-1).tolist() == pytest.approx(expected, abs=1e-6)
    if not certain and len(set(row)) > 1 and ORDER[0] == order[0]:
        assert temperature.item() == pytest.approx(T, rel=1e-6)


def test_the_default_order_is_vllms():
    text = "sampler(T=2, top_p=0.6, top_k=5, min_p=0.3)"
    assert kept(text) == kept(f"{text}|order({', '.join(ORDER)})")
    assert ORDER == ("temperature", "min_p", "top_k", "top_p")
    # Last, the temperature truncates nothing that is tempered.
    cold, hot = ("sampler(T=0.1, top_p=0.9)", "sampler(T=3, top_p=0.9)")
    assert len(kept(cold)[0]) < len(kept(hot)[0])
    last = "|order(top_p, temperature)"
    assert kept(cold + last)[0] == kept(hot + last)[0] == kept("sampler(T=1, top_p=0.9)")[0]


def test_a_policy_reads_what_truncation_left():
    """support(3) among the two that top_k leaves has no solution but the limit."""
    assert kept("sampler(T=support(3), top_k=2)|order(top_k, temperature)") == ([0, 4], INF)
    assert kept("sampler(T=support(3), top_k=2)")[0] == [0, 4]
    assert kept("sampler(T=support(3), top_k=2)")[1] < INF
    # One token that is left is certain: T is reported as 1.
    assert kept("sampler(T=inf, top_k=1)|order(top_k, temperature)") == ([4], 1)


def test_limits_of_temperature_are_limits_of_what_is_kept():
    for own in ("top_k=3", "top_p=0.5", "min_p=0.2", "min_p=1"):
        for T, near in (("0", "1e-4"), ("inf", "1e6")):
            limit, close = (
                temper_logits(
                    parse_policy(f"sampler(T={value}, {own})"), torch.tensor([ROW]), [TokenState()]
                ).logits.softmax(-1)
                for value in (T, near)
            )
            torch.testing.assert_close(limit, close, atol=1e-5, rtol=0, msg=own)
    assert kept("sampler(T=inf, top_p=0.5)")[0] == [0, 2, 4, 7]  # seven live, ranked by logit
    assert kept("sampler(T=0, top_k=3)", [1.0, 1.0, 1.0, 1.0])[0] == [0, 1, 2, 3]


def test_tokens_that_tie_share_their_fate():
    row = [2.0, 1.0, 1.0, 1.0, 0.0]
    assert kept("sampler(top_k=2)", row)[0] == [0, 1, 2, 3]
    assert kept("sampler(top_p=0.5)", row)[0] == [0, 1, 2, 3]
    assert kept("sampler(top_p=0.4)", row)[0] == [0]


def test_a_nucleus_wider_than_the_head_that_is_sorted_first():
    row = (torch.arange(6000) * -1e-3).tolist()
    weights = torch.tensor(row, dtype=torch.float64).softmax(-1).cumsum(-1)
    for p in (0.2, 0.9, 0.999):
        found = kept(f"sampler(top_p={p})", row)[0]
        assert found == list(range(int((weights < p).sum()) + 1))


@given(
    st.lists(st.integers(-20, 20), min_size=1, max_size=200),
    st.integers(1, 30),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=100)
def test_the_smallest_energies_are_exact(values, k, draw):
    row = [float(value) for value in values] + [INF] * draw.randrange(3)
    other = draw.sample(row, len(row))
    k = min(k, len(row))
    found = smallest(torch.tensor([row, other]), k)
    assert found.tolist() == [sorted(row)[:k]] * 2


def test_what_is_left_out_is_the_requests_own():
    own = {"temperature": 0.5, "top_p": 0.8, "min_p": 0.05}
    assert kept("sampler(top_k=3)", **own) == kept("sampler(T=0.5, top_p=0.8, top_k=3, min_p=0.05)")
    text = "phases(a=between(sampler(top_k=2), ids(3)), answer=sampler(top_k=4))"
    policy = parse_policy(text)
    request = RequestSettings(temperature=0.5)
    for generated, count in (([], 4), ([3], 2)):
        state = policy.state([1], generated, given=request)
        result, temperature = temper_logits(policy, torch.tensor([ROW]), [state])
        assert int((result > -INF).sum()) == count and temperature.item() == 0.5
    # A number in a phase of a policy that truncates is cut by the request's settings, too.
    policy = parse_policy("phases(a=between(sampler(top_k=2), ids(3)), answer=0.5)")
    state = policy.state([1], given=RequestSettings(min_p=0.9))
    assert int((temper_logits(policy, torch.tensor([ROW]), [state])[0] > -INF).sum()) == 1


def test_rows_of_different_cuts_in_one_batch():
    policy = parse_policy("phases(a=between(sampler(T=1, top_k=2), ids(3)), answer=sampler(T=2))")
    states = [policy.state([1], [3]), policy.state([1]), policy.state([3])]
    rows = torch.tensor([ROW, ROW, ROW])
    result, temperature = temper_logits(policy, rows, states)
    assert temperature.tolist() == [1, 2, 1]
    assert (result > -INF).sum(-1).tolist() == [2, 7, 2]
    assert torch.equal(result[0][result[0] > -INF], rows[0][[0, 4]])  # T = 1: bit for bit
    assert torch.equal(rows, torch.tensor([ROW] * 3))


def test_operations_on_samplers_change_their_temperature_alone():
    assert kept("sampler(T=4, top_k=2)|room(0.5)|clip(0.1,1.5)") == ([0, 4], 1.5)
    nested = parse_policy("sampler(T=ladder(0.5,2, n=3), top_k=2)")
    assert nested.samples == 3
    state = nested.state([], sample=2)
    assert temper_logits(nested, torch.tensor([ROW]), [state])[1].item() == pytest.approx(2)


def test_settings_are_checked():
    assert RequestSettings(top_k=-1) == RequestSettings()
    assert RequestSettings(temperature=0.5, top_k=7).active() == {"temperature": 0.5, "top_k": 7}
    for own, message in (
        ({"top_p": 0}, r"top_p lies in \(0, 1\], got 0"),
        ({"top_k": -2}, "top_k is a number from -1"),
        ({"min_p": 1.1}, "min_p lies in"),
        ({"temperature": -1}, "temperature is a number from 0"),
        ({"temperature": math.nan}, "got nan"),
    ):
        with pytest.raises(InputError, match=message):
            RequestSettings(**own)


def test_an_order_that_leaves_out_a_setting_of_the_request_is_refused():
    policy = parse_policy("constant(1)|order(min_p, temperature)")
    state = policy.state([], given=RequestSettings(top_k=5))
    with pytest.raises(InputError, match=r"order\(min_p, temperature\) leaves out top_k"):
        temper_logits(policy, torch.tensor([ROW]), [state])
