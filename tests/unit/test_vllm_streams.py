"""Policies of requests to vLLM: what is asked, what is refused, and rows tempered in a batch."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempering.attention.profiles.length_rules import Power
from tempering.attention.profiles.profile import Profile
from tempering.engines.vllm import admission, arguments
from tempering.engines.vllm.arguments import asked_by, sample_of
from tempering.engines.vllm.streams import LogitsRow, Stream, temper_rows
from tempering.errors import InputError, RefusedError
from tempering.tokens import (
    RequestSettings,
    TokenState,
    check_engine,
    parse_policy,
    temper_logits,
)
from tempering.tokens.policy import ConstantPolicy
from tempering.tokens.request import Asked


@dataclass
class Params:
    """What is read of vLLM's SamplingParams."""

    extra_args: dict[str, Any] | None = None
    temperature: float = 1.0
    n: int = 1
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


def asked(temperature=1.0, n=1, **extra):
    return Params(extra, temperature, n)


def policy_of(params, tokenizer):
    found = asked_by(params, tokenizer)
    return found and found.policy


# -- what a request asks for


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (asked(tempering="support(12)|clip(0.3,2)"), "support(12)|clip(0.3,2)"),
        (asked(0.8, dynatemp_range=0.5, dynatemp_exponent=2), "dynatemp(0.5, exponent=2, temperat"),
        (asked(other=1), "None"),
        (asked(session_id="s", temp=1, thinking_budget=3, tem="x"), "None"),
        (asked(temperature_thinking=1e39), "phases(thinking=1e+39, answer=1)"),
        (Params(), "None"),
    ],
)
def test_policies_of_requests(params, text):
    from tests.unit.test_tokens_request import TOKENIZER

    assert str(policy_of(params, TOKENIZER)).startswith(text)


def test_names_of_other_engines_take_the_requests_temperature():
    from tests.unit.test_tokens_request import TOKENIZER  # the tests' own small tokenizer

    given = policy_of(asked(0.3, temperature_thinking=1.2), TOKENIZER)
    assert str(given) == "phases(thinking=1.2, answer=0.3)"
    for after in ({"temperature": 0.2}, '{"temperature": 0.2}'):
        given = policy_of(asked(0.9, post_thinking=after), TOKENIZER)
        assert str(given) == "phases(thinking=0.9, answer=0.2)"
    # Requests that ask for the same share one policy, and only those.
    assert policy_of(asked(0.3, temperature_thinking=1.2), TOKENIZER) is policy_of(
        asked(0.3, temperature_thinking=1.2), TOKENIZER
    )
    other = policy_of(asked(0.4, temperature_thinking=1.2), TOKENIZER)
    assert str(other) == "phases(thinking=1.2, answer=0.4)"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (asked(0.0, tempering="support(3)"), "temperature=0 makes vLLM take the likeliest"),
        (asked(0.0, temperature_thinking=1.0), "temperature=0 makes"),
        (asked(0.6, tempering="support(3)"), "two temperatures: .*temperature=0.6.*send temper"),
        (asked(tempering="suport(3)"), "did you mean support"),
        (asked(tempering=["support(3)"]), "is the text of a policy"),
        (asked(temperings="support(3)"), "no argument 'temperings'"),
        (asked(tempering="support(3)", dynatemp_range=1), "can't be combined"),
        (asked(post_thinking="{temperature: 1}"), "post_thinking is JSON"),
        (asked(post_thinking="[" * 100_000), "post_thinking is JSON"),
        (asked(post_thinking='{"temperature": ' + "9" * 5000 + "}"), "post_thinking is JSON"),
        (asked(dynatemp_range=int("9" * 400)), "dynatemp_range is beyond the numbers"),
        (asked(temperature_thinking=int("9" * 400)), "beyond the numbers that float64 holds"),
        (asked(temperature_think=0.5), "'temperature_think'; did you mean temperature_thinking?"),
        (asked(dynatemp_rnge=0.5), "did you mean dynatemp_range?"),
        (asked(temperng="support(3)"), "did you mean tempering?"),
        (asked(Tempering="support(3)"), "did you mean tempering?"),
        (asked(**{"post-thinking": "{}"}), "did you mean post_thinking?"),
        (asked(tempering_polcy="support(3)"), "no argument 'tempering_polcy'"),
        (asked(dynatempo=1), "no argument 'dynatempo'"),
        (Params({"temperature": 0.5}), "send temperature beside vllm_xargs"),
        (asked(tempering="phases(thinking=1, answer=0)"), "give the tokenizer"),
        (asked(dynatemp_range=math.nan), "dynatemp_range is a number from 0"),
    ],
)
def test_requests_that_cannot_be(params, message):
    with pytest.raises(InputError, match=message):
        policy_of(params, None)


def test_kept_policies_are_counted_in_bytes():
    kept = arguments._PolicyCache(most=100_000)
    small, large = (
        Asked(parse_policy(text), RequestSettings())
        for text in ("constant(0.5)", "schedule(linear(2,1), length=9999)")
    )
    for number in range(1000):
        kept.add((f"{number}", 0), small, None, 20)
        assert kept.bytes <= 100_000
    assert kept.get(("999", 0)) is small and kept.get(("0", 0)) is None
    for number in range(100):
        kept.add((f"large {number}", 0), large, None, 20)
        assert kept.bytes <= 100_000
    assert kept.get(("large 99", 0)) is large and kept.get(("999", 0)) is None
    kept.add(("huge", 0), small, None, 10_000)
    assert kept.get(("huge", 0)) is None and kept.get(("large 99", 0)) is large
    assert kept.bytes == sum(size for _, _, size in kept._policies.values())


def test_samples_of_a_ladder():
    ladder = parse_policy("ladder(0.5,2, n=3)")
    assert sample_of(asked(n=3), ladder) == 0
    assert sample_of(asked(tempering_sample=2), ladder) == 2
    for params, message in (
        (asked(), "send n=3, or n=1 with tempering_sample from 0 to 2"),
        (asked(n=2), "each of 3 samples"),
        (asked(n=3, tempering_sample=1), "send n=1 with it"),
        (asked(tempering_sample=3), "from 0 to 2, got 3"),
        (asked(tempering_sample=True), "got True"),
        (asked(tempering_sample=1.0), "got 1.0"),
    ):
        with pytest.raises(InputError, match=message):
            sample_of(params, ladder)
    with pytest.raises(InputError, match="is for a ladder"):
        sample_of(asked(tempering_sample=0), parse_policy("constant(1)"))
    assert sample_of(asked(tempering_sample=1), parse_policy("constant(1)"), child=True) == 0


def test_children_of_one_request_are_numbered():
    shared = Params({"tempering": "ladder(0.5,2, n=3)"})
    children = [admission.child_params(lambda self, i: shared, None, i) for i in range(3)]
    assert [child.extra_args["tempering_sample"] for child in children] == [0, 1, 2]
    assert "tempering_sample" not in shared.extra_args
    plain = Params({"other": 1})
    assert admission.child_params(lambda self, i: plain, None, 1) is plain


# -- admission


@dataclass
class Frontend:
    """What is read of vLLM's InputProcessor."""

    tokenizer: Any = None
    vllm_config: Any = field(
        default_factory=lambda: SimpleNamespace(
            additional_config={"tempering": {"profiles": {"hot": "hot.json"}}},
            speculative_config=None,
            model_config=SimpleNamespace(is_diffusion=False),
        )
    )


def admit(params, prompt=None, frontend=None, **more):
    def original(self, request_id, prompt, params, *args, **kwargs):
        admission.check_request(params)
        return SimpleNamespace(cache_salt=None, sampling_params=params)

    prompt = {"type": "token", "prompt_token_ids": [1]} if prompt is None else prompt
    return admission.process_inputs(original, frontend or Frontend(), "id", prompt, params, **more)


def test_requests_are_admitted():
    assert admit(asked(tempering="support(12)")).cache_salt is None
    assert admit(Params()).cache_salt is None


def test_a_profile_s_strength_keeps_its_prefix_cache_apart_and_within_bounds(tmp_path):
    frontend = Frontend()
    path = Profile.from_matrix(torch.tensor([[1.0, 4.0], [0.5, 1.0]])).save(tmp_path / "hot.json")
    frontend.vllm_config.additional_config = {"tempering": {"profiles": {"hot": str(path)}}}

    def ask(room):
        return admit(asked(tempering_profile="hot", tempering_room=room), frontend=frontend)

    salts = [ask(room).cache_salt for room in (0, 0.5, -1, 1)]
    assert len(set(salts)) == 4 and ask(1).cache_salt == ask(1.0).cache_salt
    assert ask(1).cache_salt == admit(asked(tempering_profile="hot"), frontend=frontend).cache_salt
    with pytest.raises(ValueError, match=r"tempering_room=9 of the profile hot: .*temperature 262"):
        ask(9)
    for wrong in (11, -10.1, math.nan, math.inf, True, "0.5", [1], 10**400):
        with pytest.raises(ValueError, match="is a number from -10 to 10"):
            ask(wrong)
    with pytest.raises(ValueError, match="send tempering_profile with it"):
        admit(asked(tempering_room=0.5), frontend=frontend)


def test_a_law_s_strength_is_held_to_the_limits_within_the_longest_request(tmp_path):
    frontend = Frontend()
    law = Profile.from_matrix(torch.ones(2, 2)).with_rules([Power(-0.4, 2048.0)] * 2)
    path = law.save(tmp_path / "law.json")
    frontend.vllm_config.additional_config = {"tempering": {"profiles": {"law": str(path)}}}
    frontend.vllm_config.model_config.max_model_len = 32768

    def ask(room):
        return admit(asked(tempering_profile="law", tempering_room=room), frontend=frontend)

    assert ask(2).cache_salt
    with pytest.raises(ValueError, match=r"tempering_room=10 of the profile law: .* has T = 1\.7"):
        ask(10)


def test_no_two_requests_share_a_prefix_under_different_profiles():
    """Names and salts that look like what is put behind them, in all pairs."""
    names = [None, "hot", "hot^0.5", 'hot", 0.5]', 'a|tempering:["hot", 0.5]', "|tempering:", "é"]
    bare = {
        admission._salt(own, name, room)
        for own in (None, "s")
        for name in names[1:]
        for room in (1.0, 0.5)
    }
    salts = [None, "s", *sorted(bare), "|tempering:", "s|tempering:hot", "s|tempering:|tempering:"]
    seen = {}
    for own in salts:
        for name in names:
            for room in (1.0, 0.5) if name else (1.0,):
                who = (own or "", name, room)
                assert seen.setdefault(admission._salt(own, name, room) or "", who) == who
    assert admission._salt("s", None, 1.0) == "s" and admission._salt(None, None, 1.0) is None


def test_a_policy_that_truncates_takes_vllms_truncation_over():
    sent = asked(0.5, tempering="sampler(top_k=9)|order(top_k, top_p, temperature)")
    sent.top_p = 0.9
    taken = admit(sent).sampling_params
    assert (taken.top_p, taken.top_k, taken.min_p, taken.temperature) == (1, 0, 0, 0.5)
    assert sent.top_p == 0.9 and "_own_sampling" not in sent.extra_args  # the client's object
    policy, given = asked_by(taken, None)
    assert given == RequestSettings(temperature=0.5, top_p=0.9)
    assert admit(taken).sampling_params.top_p == 1  # sent again: what it carried is dropped
    # What doesn't truncate leaves vLLM's own as they are.
    plain = asked(tempering="constant(0.5)")
    plain.top_p = 0.9
    assert admit(plain).sampling_params is plain


def test_a_policy_is_admitted_where_drafts_are_accepted_by_their_probability():
    for method in ("standard", "block"):
        frontend = Frontend()
        drafts = SimpleNamespace(rejection_sample_method=method)
        frontend.vllm_config.speculative_config = drafts
        assert admit(asked(tempering="support(3)"), None, frontend).cache_salt is None


@pytest.mark.parametrize("value", [None, "1", "0"])
@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_a_policy_is_refused_on_vllms_older_ray_executor(monkeypatch, backend, value):
    """It samples around the worker's method that says which requests have failed."""
    name = "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    frontend = Frontend()
    frontend.vllm_config.parallel_config = SimpleNamespace(distributed_executor_backend=backend)
    assert admit(asked(0.5), None, frontend).cache_salt is None  # without a policy, as ever
    for extra in ({"tempering": "support(3)"}, {"tempering_trace": True}):
        if (backend, value) == ("ray", "0"):
            with pytest.raises(ValueError, match=f"{name}=0 starts vLLM's older Ray executor"):
                admit(asked(**extra), None, frontend)
        else:
            admit(asked(**extra), None, frontend)


def test_a_traced_request_has_a_policy_that_truncates_as_the_request_would():
    """So that the trace has the probability that the token is drawn with."""
    for value, given in ((True, 0.9), (1, 0.9), (1.0, 0.9), (False, None), (0, None)):
        sent = asked(0.7, tempering_trace=value)
        sent.top_p = 0.9
        admitted = admit(sent).sampling_params
        assert (admitted.top_p, admitted.temperature) == (1 if given else 0.9, 0.7)
        found = asked_by(admitted, None)
        assert (found is None) == (given is None)
        if found is not None:
            assert str(found.policy).startswith("constant(0.7)|order(temperature, min_p")
            assert found.given == RequestSettings(temperature=0.7, top_p=0.9)
    plain = asked_by(admit(asked(0.7, tempering_trace=True)).sampling_params, None)
    assert str(plain.policy) == "constant(0.7)"


def test_what_a_request_says_it_carried_is_not_believed():
    forged = asked(tempering="sampler(top_k=9)", _own_sampling={"top_p": 0.1})
    _, given = asked_by(admit(forged).sampling_params, None)
    assert given == RequestSettings()


def test_requests_are_refused_before_they_run():
    ids = "phases(thinking=between(1, ids(3)), answer=0)"
    embeds = {"type": "embeds", "prompt_embeds": torch.zeros(2, 4)}
    assert admit(asked(tempering="support(3)"), embeds).cache_salt is None
    twice = asked(tempering="sampler(top_p=0.5)")
    budgets = asked(tempering=f"{ids}|budget(thinking=9)".replace("ids(3)", "ids(3), ids(4)"))
    budgets.thinking_token_budget = 5
    unordered = asked(tempering="constant(1)|order(temperature)")
    twice.top_p = unordered.top_p = 0.9
    synthetic, sharded = Frontend(), Frontend()
    drafts = SimpleNamespace(rejection_sample_method="synthetic")
    synthetic.vllm_config.speculative_config = drafts
    sharded.vllm_config.parallel_config = SimpleNamespace(enable_batch_sharded_sampling=True)
    for message, call in {
        "given as embeddings": lambda: admit(asked(tempering=ids), embeds),
        "rejection_sample_method='synthetic'": lambda: admit(
            asked(tempering="support(3)"), None, synthetic
        ),
        "enable_batch_sharded_sampling": lambda: admit(asked(tempering_trace=1), None, sharded),
        "without streaming in": lambda: admit(asked(tempering="support(3)"), resumable=True),
        "tempering_trace is true or false, got 'yes'": lambda: admit(asked(tempering_trace="yes")),
        "true or false, got 2": lambda: admit(asked(tempering_trace=2)),
        "no policy and no trace sees": lambda: admit(asked(0.0, tempering_trace=True)),
        "did you mean tempering_trace": lambda: admit(asked(tempering_traces=True)),
        "has no profile 'cold'; it has hot": lambda: admit(asked(tempering_profile="cold")),
        "does nothing without a ladder": lambda: admit(asked(tempering_sample=1)),
        "let VLLM_PLUGINS": lambda: admission.check_request(asked(tempering="support(3)")),
        "two temperatures": lambda: admit(asked(0.5, tempering="support(3)")),
        "top_p is given twice": lambda: admit(twice),
        "two budgets: .*thinking_token_budget=5": lambda: admit(budgets),
        "leaves out top_p, which": lambda: admit(unordered),
        "send top_p beside vllm_xargs": lambda: admit(asked(tempering="support(3)", top_p=0.5)),
        "there is no argument 'top_p_think'": lambda: admit(asked(top_p_think=0.5)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# -- batches


def temper(logits, places, streams, states, *, divided):
    """The logits after `temper_rows`, no row of which may fail."""
    rows = [LogitsRow(*row, lambda s=s: s) for *row, s in zip(places, streams, states, strict=True)]
    assert temper_rows(logits, rows, divided=divided).failed == {}
    return logits


def test_streams_keep_the_contract():
    """The same temperatures as every engine's, from streams that live through all batches."""
    streams: dict[Any, Stream] = {}

    def run(policy, requests, logits):
        own, states = [], []
        for request in requests:
            key = (str(policy), request.prompt, request.sample)
            stream = streams.setdefault(key, Stream(policy, request.sample, given=request.given))
            own.append(stream)
            states.append(
                stream.at(
                    len(request.generated),
                    lambda r=request: r.prompt,
                    request.generated.__getitem__,
                )
            )
        rows = list(range(len(requests)))
        return temper(logits.clone(), rows, own, states, divided=False)

    assert check_engine(run) > 100


@pytest.mark.parametrize("divided", [True, False])
def test_rows_of_many_policies_in_one_batch(divided):
    texts = ["constant(0.7)", "support(3)", "constant(0)", "constant(inf)", "support(3)"]
    policies = [parse_policy(text) for text in texts]
    own = [1.0, 0.5, 1.0, 1.0, 2.0]
    draw = random.Random(0)
    logits = torch.tensor([[draw.gauss(0, 3) for _ in range(20)] for _ in range(7)])
    rows = [0, 2, 3, 5, 6]  # 1 and 4 ask for nothing
    given = logits.clone()
    streams = [Stream(p, temperature=t) for p, t in zip(policies, own)]
    if divided:
        given[rows] /= torch.tensor(own)[:, None]
    states = [stream.at(0, list, lambda index: 0) for stream in streams]
    result = temper(given, rows, streams, states, divided=divided)
    if not divided:
        result[rows] /= torch.tensor(own)[:, None]
    for row, policy in zip(rows, policies):
        wanted = temper(
            logits[row : row + 1].clone(), [0], [Stream(policy)], [policy.state(())], divided=False
        )
        torch.testing.assert_close(result[row].softmax(-1), wanted[0].softmax(-1))
    assert torch.equal(result[[1, 4]], logits[[1, 4]])


def test_rows_without_a_finite_maximum_stay_as_they_are():
    logits = torch.zeros(4, 5)
    logits[0, 2] = math.nan
    logits[1] = -math.inf
    logits[2, 1] = math.inf
    policy = parse_policy("constant(0)")
    before = logits.clone()
    streams = [Stream(policy)] * 4
    states = [policy.state(())] * 4
    result = temper(logits, [0, 1, 2, 3], streams, states, divided=True)
    torch.testing.assert_close(result, before, equal_nan=True, rtol=0, atol=0)


class Faulty(ConstantPolicy):
    """Raises for the requests of one sample, as a policy with a defect would."""

    def temperatures(self, energies, states):
        if any(state.sample == 1 for state in states):
            raise KeyError("injected")
        return super().temperatures(energies, states)


def test_a_row_that_cannot_be_tempered_is_named_and_the_others_are_right():
    logits = torch.tensor([[0.0, 1.0, 3.0]] * 5)
    faulty, sound = Faulty(0.5), parse_policy("support(2)")
    choices = [(faulty, 0), (sound, 0), (faulty, 1), (faulty, 0), (sound, 0)]

    def state(policy, sample, place):
        if place == 4:
            raise RecursionError("no state")
        return policy.state((), sample=sample)

    rows = [
        LogitsRow(place, Stream(policy, sample), partial(state, policy, sample, place))
        for place, (policy, sample) in enumerate(choices)
    ]
    result = logits.clone()
    failed = temper_rows(result, rows, divided=False).failed
    assert {place: type(error) for place, error in failed.items()} == {
        2: KeyError,
        4: RecursionError,
    }
    cold, _ = temper_logits(parse_policy("constant(0.5)"), logits[:1], [TokenState()])
    two, _ = temper_logits(sound, logits[:1], [TokenState()])
    for place, wanted in ((0, cold), (1, two), (2, logits), (3, cold), (4, logits)):
        assert torch.equal(result[place], wanted[0]), place


def test_tokens_taken_back_rebuild_the_state():
    policy = parse_policy("phases(thinking=between(1.5, ids(3), ids(4)), answer=0.2)")
    stream = Stream(policy)
    tokens = [3, 8, 4, 9]

    def at(count):
        return stream.at(count, lambda: [7], tokens.__getitem__)

    assert [at(count).phase for count in (0, 2, 4)] == ["answer", "thinking", "answer"]
    assert at(1) == policy.state([7], [3])
    tokens[1] = 4
    assert at(3) == policy.state([7], [3, 4, 4])


def test_a_token_that_is_held_back_is_no_token():
    policy = parse_policy("phases(thinking=between(1.5, ids(3)), answer=0.2)")
    with pytest.raises(RefusedError, match="doesn.t say which token 0 was"):
        Stream(policy).at(1, lambda: [7], lambda index: -1)
    # Policies that only count tokens don't look.
    counting = parse_policy("schedule(linear(2,1), length=4)")
    assert Stream(counting).at(2, lambda: [7], lambda index: -1).position == 2
