"""Policies against plain Python: formulas, both limits, masks, dtypes, what is refused."""

import math
import tracemalloc

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.errors import EnergyError, InputError, SupportError, TemperatureError
from tempering.schedules import schedule
from tempering.tokens import TokenState, check_engine, parse_policy, temper_logits
from tempering.tokens.clock import Clock
from tempering.tokens.engine_check import (
    reference_entropy,
    reference_posterior,
    reference_support,
)
from tempering.tokens.temper import logits_at_temperature

INF = math.inf
ROWS = hnp.arrays(np.float64, st.integers(2, 40), elements=st.floats(-30, 30, width=32))


def temper(text: str, row, *, position: int = 0, sample: int = 0):
    """(posterior, T) of one row under a policy."""
    state = TokenState(position=position, sample=sample)
    logits = torch.as_tensor(row).unsqueeze(0)
    result, temperature = temper_logits(parse_policy(text), logits, [state])
    return result.double().softmax(-1)[0].tolist(), temperature.item()


def test_the_contract_holds_for_the_core():
    def run(policy, requests, logits):
        states = [
            policy.state(r.prompt, r.generated, sample=r.sample, given=r.given) for r in requests
        ]
        return temper_logits(policy, logits, states)[0]

    assert check_engine(run) > 200


@given(ROWS, st.floats(0.05, 20))
@settings(deadline=None)
def test_constant_is_the_tempered_posterior(row, temperature):
    got, T = temper(f"constant({temperature!r})", row)
    assert temperature == T
    assert got == pytest.approx(reference_posterior(row.tolist(), temperature), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_limits_are_exact_in_every_dtype(dtype):
    row = torch.tensor([3.0, 1.0, -INF, 3.0, -2.0], dtype=dtype)
    logits = torch.stack([row] * 4)
    results = {}
    for text in ("constant(0)", "constant(1e-30)", "constant(inf)"):
        results[text], _ = temper_logits(parse_policy(text), logits, [TokenState()] * 4)
        assert results[text].dtype == torch.promote_types(dtype, torch.float32)
    cold, tiny, hot = results.values()
    assert cold[0].tolist() == [0, -INF, -INF, 0, -INF]
    assert tiny.softmax(-1)[0].tolist() == [0.5, 0, 0, 0.5, 0]
    assert hot[0].tolist() == [0, 0, -INF, 0, 0]


def test_a_temperature_of_zero_can_be_sampled():
    logits = torch.randn(64, 50)
    cold, _ = temper_logits(parse_policy("constant(0)"), logits, [TokenState()] * 64)
    drawn = torch.multinomial(cold.softmax(-1), 1).squeeze(-1)
    assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_temperature_of_one_changes_nothing_bit_for_bit(dtype):
    logits = torch.randn(3, 50).to(dtype)
    result, _ = temper_logits(parse_policy("constant(1)"), logits, [TokenState()] * 3)
    assert torch.equal(result, logits.float())
    policy = parse_policy("ladder(0.5,2, n=3)")  # its second rung is 1
    states = [TokenState(sample=i) for i in range(3)]
    mixed, temperature = temper_logits(policy, logits, states)
    assert temperature.tolist() == pytest.approx([0.5, 1, 2])
    assert torch.equal(mixed[1], logits[1].float())


def test_float16_stays_finite_where_division_overflows():
    logits = torch.tensor([[20000.0, -20000.0, 19984.0]], dtype=torch.float16)
    result, _ = temper_logits(parse_policy("constant(1e-4)"), logits, [TokenState()])
    assert result[0, 0] == 0 and not result.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_lowest_number_of_the_dtype_is_a_mask(dtype):
    row = torch.tensor([1.0, torch.finfo(dtype).min, 2.0], dtype=dtype)
    assert temper("constant(inf)", row)[0] == [0.5, 0, 0.5]
    kept = torch.tensor([1.0, -1e4, 2.0], dtype=dtype)
    assert temper("constant(inf)", kept)[0] == pytest.approx([1 / 3] * 3)


@given(ROWS, st.floats(1.2, 8))
@settings(deadline=None)
def test_support_keeps_n_tokens_alive_or_the_limit(row, target):
    logits = row.tolist()
    _, T = temper(f"support({target!r})", row)
    ties, unmasked = sum(v == max(logits) for v in logits), len(logits)
    if ties == unmasked:
        assert T == 1
    elif target <= ties:
        assert T == 0
    elif target >= unmasked:
        assert T == INF
    else:
        assert math.exp(reference_entropy(logits, T)) == pytest.approx(target, rel=2e-5)


@pytest.mark.parametrize("target", [1.5, 12.0, 300.0, 20000.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 50.0])
def test_support_on_a_vocabulary_in_float32(target, spread):
    logits = (torch.randn(3, 30000, generator=torch.Generator().manual_seed(1)) * spread).float()
    _, T = temper_logits(parse_policy(f"support({target})"), logits, [TokenState()] * 3)
    for row, temperature in zip(logits.double(), T.tolist()):
        posterior = (row / temperature).softmax(-1)
        entropy = torch.special.entr(posterior).sum().item()
        assert math.exp(entropy) == pytest.approx(target, rel=1e-4)


def test_support_agrees_with_bisection_where_tokens_are_masked():
    row = [0.0, 1.0, -INF, 2.5, -1.0, -INF, 0.3]
    assert temper("support(3)", row)[1] == pytest.approx(reference_support(row, 3), rel=1e-4)
    assert temper("support(6)", row)[1] == INF  # five are unmasked
    assert temper("support(3)", [-INF, 1.0, -INF])[1] == 1  # one is left: every T is the same


@given(ROWS, st.floats(0, 3), st.floats(0, 3))
@settings(deadline=None)
def test_edt(row, T0, theta):
    entropy = reference_entropy(row.tolist())
    wanted = 0.0 if entropy == 0 and theta > 0 else T0 * 0.8 ** (theta / max(entropy, 1e-300))
    got = temper(f"entropy(T0={T0!r}, theta={theta!r})", row)[1]
    assert got == pytest.approx(wanted if theta else T0, rel=1e-6, abs=1e-9)


@given(ROWS, st.floats(0, 2), st.floats(0.1, 3), st.floats(0, 2))
@settings(deadline=None)
def test_dynatemp_as_llama_cpp(row, width, exponent, temperature):
    text = f"dynatemp({width!r}, exponent={exponent!r}, temperature={temperature!r})"
    share = reference_entropy(row.tolist()) / math.log(len(row))
    lo, hi = max(0.0, temperature - width), temperature + width
    wanted = lo + (hi - lo) * max(share, 0) ** exponent
    assert temper(text, row)[1] == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "text", ["entropy(T0=1.2, theta=0.4)", "dynatemp(0.5)", "support(2)", "support(2)|clip(0.1,3)"]
)
def test_masked_tokens_are_left_out_of_every_entropy(text):
    row = torch.tensor([1.0, 0.5, -0.3, 2.0])
    wide = torch.cat([row, torch.full((1000,), -INF)])
    assert temper(text, wide)[1] == pytest.approx(temper(text, row)[1], rel=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "constant(0.7)",
            "support(3)",
            "entropy(T0=1, theta=0.5)",
            "dynatemp(0.5)",
            "ladder(1,2, n=3)",
        ),
        *("constant(0.6)|loops()", "constant(1)|after(ids(3), 2, 0.5)", "sampler(T=1, top_p=0.9)"),
        "phases(a=between(1, ids(3), ids(4)), answer=0.2)|budget(a=64)",
        "sampler(T=1.5, min_p=0.1)|order(min_p, temperature)",
    ],
)
def test_no_rows_give_no_rows(text):
    applied = temper_logits(parse_policy(text), torch.empty(0, 10), [])
    assert applied.logits.shape == (0, 10) and applied.temperature.shape == (0,)


EVERY = [
    *("constant(0)", "constant(0.7)", "constant(inf)", "constant(1e39)", "support(3)"),
    *("support(throb(12,3), length=9)", "entropy(T0=1e39, theta=0.5)", "entropy(T0=1, theta=0)"),
    *("dynatemp(1e39)", "dynatemp(0.5, temperature=0.8)", "schedule(steps(inf,0), length=9)"),
    *("ladder(0.5,2, n=3)", "constant(2)|room(1e300)", "constant(2)|clip(1e39,inf)"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("text", EVERY)
def test_what_is_certain_stays_certain(text, dtype):
    """p = 1 stays p = 1: one survivor, or a token that the engine forces; T is reported as 1."""
    lone = torch.full((10,), -INF, dtype=dtype).index_fill(0, torch.tensor(4), 1.5)
    forced = torch.linspace(-3, 3, 10).to(dtype).index_fill(0, torch.tensor(4), 6e4)
    for row in (lone, forced):
        posterior, T = temper(text, row)
        assert (posterior[4], T) == (1, 1)


def test_what_is_all_but_certain_is_tempered():
    """104 nats is where exp is 0 in float32; a gap of 103 is a posterior like any other."""
    row = [0.0, -103.0, -103.0]
    assert temper("support(3)", row)[1] == INF
    assert temper("support(2)", row)[1] == pytest.approx(reference_support(row, 2), rel=1e-4)
    assert temper("support(2)", [0.0, -104.5, -INF])[1] == 1
    mixed = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1e9, 2.0], [5.0, 4.0, 4.0]])
    result, T = temper_logits(parse_policy("support(2)"), mixed, [TokenState()] * 3)
    wanted = [reference_support(row, 2) for row in mixed[[0, 2]].tolist()]
    assert T[[0, 2]].tolist() == pytest.approx(wanted, rel=1e-4)
    assert T[1] == 1 and torch.equal(result[1], mixed[1])


@pytest.mark.parametrize(
    ("text", "T"),
    [
        ("constant(1e39)", INF),
        ("constant(1e300)|room(0.01)", 1e3),  # within float64 nothing is lost on the way
        ("constant(2)|clip(1e39,inf)", INF),
        ("constant(2)|room(1e300)", INF),
        ("constant(0.5)|room(1e300)", 0),
        ("entropy(T0=1e39, theta=1e-9)", INF),
        ("dynatemp(1e39)", INF),
        ("dynatemp(1.7e308, temperature=1.7e308)", INF),
        ("dynatemp(1e39, exponent=1e308)", 0),
        ("schedule(linear(1e39,1), length=9)", INF),
        ("ladder(1e39,1e300, n=3)", INF),
        ("constant(1e-39)", 0),
        ("constant(1e-300)", 0),
        ("constant(1e-38)|room(-0)", 1),
    ],
)
def test_what_float32_cannot_hold_is_the_limit(text, T):
    row = torch.tensor([0.5, -INF, 1.0, 0.0])
    posterior, found = temper(text, row)
    assert found == pytest.approx(T, rel=1e-6)
    assert posterior == pytest.approx(reference_posterior(row.tolist(), T), abs=1e-7)


def test_support_beyond_float32_is_the_limit():
    row = torch.tensor([0.0, -1.0, -3e38])
    assert temper("support(2.9999999)", row)[1] == INF


def test_a_schedule_counts_generated_tokens_and_holds_its_end():
    text = "schedule(linear(2,1), length=5)"
    got = [temper(text, [0.0, 1.0], position=i)[1] for i in range(8)]
    assert got == pytest.approx([2, 1.75, 1.5, 1.25, 1, 1, 1, 1])


def test_a_pattern_that_exists_only_on_a_clock_works():
    text = "schedule(shuffle(linear(2,1), seed=3), length=5)"
    got = sorted(temper(text, [0.0, 1.0], position=i)[1] for i in range(5))
    assert got == pytest.approx([1, 1.25, 1.5, 1.75, 2])


def test_a_clock_is_read_where_it_is_asked():
    """The values of the whole clock, without it: 61 of the longest take no memory."""
    for pattern in ("linear(2,1)|room(0.5)", "reverse(throb(12,3,1,12))", "repeat(throb(2,1), 9)"):
        clock = Clock(schedule(pattern), 1000)
        wanted = schedule(pattern).sample(1000).tolist()
        got = [clock.at(position) for position in range(1000)]
        assert got == pytest.approx(wanted, rel=1e-14)
        assert clock.at(5000) == got[-1]
    controls = ("shuffle(linear(2,1), seed=3)", "uniform(linear(2,1))", "invert(linear(2,1))")
    for pattern in controls:
        clock = Clock(schedule(pattern), 1000)
        wanted = schedule(pattern).sample(1000).tolist()
        for position in (0, 999, 1, 500, 127, 128):
            assert clock.at(position) == pytest.approx(wanted[position], rel=1e-14)
    tracemalloc.start()
    spans = ", ".join(
        f"p{i}=between(schedule(linear(2,0.{i + 1}), length=1048576), ids({i},{i}), ids({i},9))"
        for i in range(60)
    )
    policy = parse_policy(f"phases(answer=schedule(linear(2,1), length=1048576), {spans})")
    state = policy.state([1, 2], [3] * 5)
    _, T = temper_logits(policy, torch.randn(1, 40), [state])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert T.item() == pytest.approx(2 - 5 / 1048575, rel=1e-6)
    assert most < 8e6  # 61 tables took 500 MB
    assert policy.most_bytes < 4e6


@pytest.mark.parametrize(
    "text",
    [
        "schedule(shuffle(linear(2,1), seed=1), length=131073)",
        "support(uniform(linear(2,1)), length=1048576)",
        "schedule(" + "invert(" * 20 + "linear(2,1)" + ")" * 20 + ", length=5000)",
        "phases(answer=1, "
        + ", ".join(
            f"p{i}=between(schedule(shuffle(linear(2,1), seed=1), length=4000), ids({i}))"
            for i in range(40)
        )
        + ")",
    ],
)
def test_a_policy_that_costs_too_much_is_refused(text):
    with pytest.raises(InputError, match="at most 131072 are allowed"):
        parse_policy(text)


def test_ladder_is_geometric_and_knows_its_samples():
    got = [temper("ladder(0.25,4, n=5)", [0.0, 1.0], sample=i)[1] for i in range(5)]
    assert got == pytest.approx([0.25, 0.5, 1, 2, 4])
    with pytest.raises(InputError, match=r"samples 0\.\.4, got sample 5"):
        temper("ladder(0.25,4, n=5)", [0.0, 1.0], sample=5)


def test_room_and_clip():
    assert temper("constant(4)|room(0.5)", [0.0, 1.0])[1] == 2
    assert temper("constant(0)|room(0)", [0.0, 1.0])[1] == 1
    assert temper("constant(inf)|room(0.5)|clip(0,3)", [0.0, 1.0])[1] == 3
    assert temper("constant(0.1)|clip(0.3,2)", [0.0, 1.0])[1] == pytest.approx(0.3)
    policy = parse_policy("support(3)").room(0.5).clip(0.2, 2)
    assert policy == parse_policy("support(3)|room(0.5)|clip(0.2,2)")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0, math.nan], r"row 1: the logit of token 1 is nan"),
        ([INF, 0.0], r"row 1: the logit of token 0 is inf"),
        ([-INF, -INF], r"row 1: all 2 tokens are masked"),
        ([torch.finfo(torch.float32).min] * 2, r"row 1: all 2 tokens are masked"),
    ],
)
def test_rows_that_have_no_posterior_are_named(row, message):
    with pytest.raises(EnergyError, match=message):
        temper_logits(
            parse_policy("constant(0.5)"), torch.tensor([[0.0, 1.0], row]), [TokenState()] * 2
        )


def test_other_bad_input_is_refused():
    policy = parse_policy("constant(0.5)")
    with pytest.raises(EnergyError, match="floating point"):
        temper_logits(policy, torch.ones(1, 3, dtype=torch.int64), [TokenState()])
    with pytest.raises(InputError, match="2 rows of logits but 1 states"):
        temper_logits(policy, torch.ones(2, 3), [TokenState()])
    with pytest.raises(TemperatureError, match=r"row 1: the temperature is -1"):
        logits_at_temperature(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0.5, -1.0]))
    with pytest.raises(SupportError, match="1 or more"):
        parse_policy("support(linear(3,0.5), length=10)")


def test_the_state_survives_json():
    state = TokenState(3, 1, "code", ("thinking", "code"), (("code", 2),), b"\xe2``", (7, 9))
    assert TokenState.from_json(state.to_json()) == state
    with pytest.raises(InputError, match="not a token state"):
        TokenState.from_json({"position": 1})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_contract_holds_on_a_gpu():
    def run(policy, requests, logits):
        states = [
            policy.state(r.prompt, r.generated, sample=r.sample, given=r.given) for r in requests
        ]
        return temper_logits(policy, logits.cuda(), states)[0].cpu()

    assert check_engine(run) > 200
