"""Samplers by phase inside generate(): they take over transformers' own truncation."""

import math

import pytest
import torch
from transformers import GenerationConfig, TopKLogitsWarper

from tempering.errors import InputError, RefusedError
from tempering.tokens import (
    RequestSettings,
    TemperingLogitsProcessor,
    effective_order,
    parse_policy,
    temper_logits,
)
from tests.integration import tokens_tiny as tiny

PHASES = "phases(thinking=between(sampler(T=1.5, top_k=9), ids(3), ids(4)), answer=sampler(T=0.6))"


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


def check(out, policy, given):
    """The scores of every step are those of the policy, with the states of these tokens."""
    cut = 0
    for step, (raw, scores) in enumerate(zip(out.logits, out.scores)):
        rows = out.sequences[:, : 4 + step].tolist()
        states = [policy.state(row[:4], row[4:], given=given) for row in rows]
        expected = temper_logits(policy, raw, states)[0].log_softmax(-1)
        torch.testing.assert_close(scores.log_softmax(-1), expected, atol=2e-6, rtol=1e-5)
        cut += int((expected == -math.inf).sum())
    assert cut > 0


@pytest.mark.parametrize(
    ("text", "config", "given"),
    [
        (PHASES, {}, {}),
        # A nucleus of what is left after min_p, as the policy orders it, not as generate() does.
        (PHASES, {"top_p": 0.8, "min_p": 0.05}, {"top_p": 0.8, "min_p": 0.05}),
        (
            "sampler(top_p=0.7)",
            {"temperature": 0.5, "top_k": 12},
            {"temperature": 0.5, "top_k": 12},
        ),
        (
            "constant(2)|order(min_p, top_k, top_p, temperature)",
            {"top_p": 0.8, "top_k": 20},
            {"top_p": 0.8, "top_k": 20},
        ),
        # generate()'s own top_k = 50 is more than the vocabulary; it gives way to that of a phase.
        (PHASES, {"top_k": 50, "top_p": 0.9}, {"top_k": 50, "top_p": 0.9}),
    ],
)
def test_generate_samples_from_the_whole_sampler(model, text, config, given):
    policy = parse_policy(text)
    out = tiny.generate(model, policy, eos_token_id=None, **config)
    check(out, policy, RequestSettings(**given))


@pytest.mark.parametrize("lookup", [False, True])
def test_assisted_decoding_verifies_with_the_whole_sampler(model, lookup):
    """The scores that drafts are verified by, in a run that takes some of them back."""
    policy = parse_policy(PHASES)
    how = {"prompt_lookup_num_tokens": 3} if lookup else {"assistant_model": tiny.tiny_model()}
    out = tiny.generate(
        model,
        policy,
        tiny.PROMPT[:1],
        tiny.MASK[:1],
        eos_token_id=None,
        top_p=0.8,
        max_new_tokens=12,
        **how,
    )
    assert len(out.scores) == 12
    for step, scores in enumerate(out.scores):
        with torch.no_grad():
            raw = model(out.sequences[:, : 4 + step]).logits[:, -1]
        row = out.sequences[0, : 4 + step].tolist()
        state = policy.state(row[:4], row[4:], given=RequestSettings(top_p=0.8))
        expected = temper_logits(policy, raw, [state])[0].softmax(-1)
        torch.testing.assert_close(scores.softmax(-1), expected, atol=1e-4, rtol=1e-3)


def test_settings_given_twice_are_refused(model):
    for config, message in (
        ({"top_k": 7}, r"top_k is given twice: by sampler\(T=1.5, top_k=9\).*top_k=7 of the gener"),
        ({"temperature": 0.7}, "two temperatures"),
    ):
        with pytest.raises((InputError, RefusedError), match=message):
            tiny.generate(model, PHASES, **config)
    with pytest.raises(InputError, match="leaves out top_p, which the generation config gives"):
        tiny.generate(model, "constant(2)|order(top_k, temperature)", top_p=0.5)
    with pytest.raises(RefusedError, match="beam sampling needs two.*num_beams=1"):
        tiny.generate(model, PHASES, num_beams=2)
    given = RequestSettings(top_p=0.9)
    with pytest.raises(InputError, match="top_p is given twice"):
        TemperingLogitsProcessor("sampler(top_p=0.5)", given=given)
    inside = TemperingLogitsProcessor("sampler(top_k=5)", given=given)
    with pytest.raises(InputError, match="inside generate"):
        model.generate(tiny.PROMPT, do_sample=True, max_new_tokens=2, logits_processor=[inside])


def test_a_users_own_warper_stays(model):
    """Only what generate() made itself gives way; a processor that the user gave still acts."""
    out = model.generate(
        tiny.PROMPT,
        attention_mask=tiny.MASK,
        do_sample=True,
        top_k=0,
        top_p=0.9,
        max_new_tokens=3,
        eos_token_id=None,
        logits_processor=[TemperingLogitsProcessor("sampler(T=1.5)"), TopKLogitsWarper(2)],
        return_dict_in_generate=True,
        output_scores=True,
    )
    for scores in out.scores:
        assert (scores > -math.inf).sum(-1).max() <= 2


def test_beam_search_keeps_log_probabilities(model):
    policy = parse_policy("sampler(T=1, top_k=6)")
    seen = []

    class Watched(TemperingLogitsProcessor):
        def __call__(self, input_ids, scores):
            result = super().__call__(input_ids, scores)
            torch.testing.assert_close(
                result.logsumexp(-1), torch.zeros(len(result)), atol=1e-5, rtol=0
            )
            seen.append(int((result > -math.inf).sum(-1).max()))
            return result

    model.generate(
        tiny.PROMPT,
        attention_mask=tiny.MASK,
        logits_processor=[Watched(policy)],
        num_beams=3,
        do_sample=False,
        max_new_tokens=5,
        eos_token_id=None,
    )
    assert set(seen) == {6}


def test_the_effective_order_is_reported():
    def order(text, **config):
        return effective_order(GenerationConfig(do_sample=True, **config), parse_policy(text))

    assert order("sampler(T=0.7, top_p=0.9)", repetition_penalty=1.1, min_p=0.1) == (
        "repetition_penalty=1.1",
        "sampler(T=0.7, top_p=0.9)",
        "min_p=0.1",
        "top_k=50",
        "top_p of the policy",
        "sample",
    )
    text = "constant(0.7)|order(top_k, top_p, temperature)"
    assert order(text, top_p=0.9) == ("top_k=50", "top_p=0.9", text, "sample")
    assert order("sampler(top_k=9)", temperature=0.5, typical_p=0.9) == (
        "sampler(top_k=9) at 0.5",
        "top_k of the policy",
        "typical_p=0.9",
        "sample",
    )
    both = "phases(a=between(sampler(top_k=3)|order(top_k, temperature), ids(3)), answer=sampler())"
    assert order(both, top_k=0) == (both, "sample")
    with pytest.raises(InputError, match="given twice"):
        order("sampler(top_k=9)", top_k=8)
