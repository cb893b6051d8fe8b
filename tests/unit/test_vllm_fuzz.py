"""Random policies of requests: refused when they come in, or carried out; no engine dies.

An exception while an engine samples ends it for everybody, so whatever passes admission has to
work on every kind of logits.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from tempering.engines.vllm.arguments import asked_by
from tempering.engines.vllm.streams import LogitsRow, Stream, temper_rows
from tests.unit.test_tokens_request import TOKENIZER
from tests.unit.test_vllm_streams import Frontend, Params, admit

TEXTS = (
    "phases(thinking=1, answer=0.2)|clip(0.1,2)",
    "support(throb(12,3,1,12), length=256)",
    "schedule(linear(1,2)|room(0.5), length=9)",
    "entropy(T0=1.2, theta=0.5)",
    "dynatemp(0.5, exponent=2, temperature=0.8)",
    "ladder(0.5,2, n=3)",
    'phases(x=between(1.3, "a", "b"), y=between(2, ids(3)), answer=0)',
    "constant(inf)|room(2)",
    "phases(thinking=sampler(T=1, top_p=0.95, top_k=20), answer=sampler(T=0.3, min_p=0.05))",
    "sampler(T=support(9), top_p=0.5)|order(min_p, top_k, top_p, temperature)",
    "sampler()|clip(0.1, 2)",
    "constant(1)|loops(heat=2, ngram=1, window=3)|budget(thinking=20)",
    'phases(thinking=1, answer=0.2)|after("ab", 1, support(3))',
)
CHARACTERS = "()|,=\"'.0123456789einfa -x\\\x00é"


def mutated(draw: random.Random) -> str:
    text = draw.choice(TEXTS)
    for _ in range(draw.randrange(4)):
        place = draw.randrange(len(text) + 1)
        kind = draw.randrange(3)
        if kind == 0:
            text = text[:place] + draw.choice(CHARACTERS) + text[place:]
        elif kind == 1:
            text = text[:place] + text[place + 1 :]
        else:
            text = text[:place] + text[draw.randrange(len(text) + 1) :]
    return text


def arguments(draw: random.Random) -> dict[str, Any]:
    text = mutated(draw)
    if draw.random() < 0.9:
        return {"tempering": text}
    return draw.choice(
        (
            {"dynatemp_range": draw.choice((text, 1, -1, math.nan, 1e9, True))},
            {"post_thinking": draw.choice((text, '{"temperature": 1}', "[1]", '{"a": 1e999}'))},
            {"temperature_thinking": draw.choice((text, 1, -1, None))},
            {"top_p_thinking": draw.choice((text, 0.9, 0, 2, None))},
            {"top_k_thinking": draw.choice((text, 9, 0, -1, 1e9)), "min_p_thinking": 0.1},
            {"post_thinking": draw.choice(('{"top_p": 0.5}', '{"top_k": 3, "min_p": 2}'))},
            {"tempering": draw.choice((None, 3, [text], {}))},
            {"tempering": text, "tempering_sample": draw.choice((0, 2, text, -1, None))},
            {"tempering_profile": draw.choice(("hot", text, 0, None, ["hot"]))},
            {"tempering_profile": "hot", "tempering_room": draw.choice((text, 1, 11, None))},
        )
    )


def logits_of(draw: random.Random, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(1, 128, generator=generator) * draw.choice((0, 1, 30, 1e4, 1e30))
    if draw.random() < 0.5:
        row[0, draw.randrange(128) :] = -math.inf
    return row


def test_random_policies_are_refused_or_carried_out():
    draw = random.Random(0)
    carried = refused = 0
    for number in range(800):
        own = draw.choice((1.0, 1.0, 1.0, 0.0, 0.5))
        params = Params(arguments(draw), own, draw.choice((1, 1, 3)))
        if draw.random() < 0.3:
            params.top_k, params.min_p = draw.choice((0, 5)), draw.choice((0.0, 0.1))
        try:
            admit(params, None, Frontend(TOKENIZER))
        except ValueError as error:
            assert len(str(error)) > 15
            refused += 1
            continue
        carried += 1
        asked = asked_by(params, TOKENIZER)
        if asked is None:
            continue
        sample = draw.randrange(asked.policy.samples or 1)
        stream = Stream(asked.policy, sample, params.temperature, asked.given)
        tokens = [ord(draw.choice("ab<think>/")) for _ in range(3)]
        for count in range(4):
            logits = logits_of(draw, number)
            state = stream.at(count, lambda: [97], tokens.__getitem__)
            result = logits.clone()
            row = LogitsRow(0, stream, lambda state=state: state)
            assert temper_rows(result, [row], divided=True).failed == {}, params
            if bool(torch.isfinite(logits.max())):
                total = float(result.softmax(-1).sum())
                assert total == pytest.approx(1, abs=1e-4), params
            else:
                assert torch.equal(result, logits)
    assert carried > 60 and refused > 300
