"""Random policies: same logits, same random numbers, same tokens, whichever engine applies them.

TEMPERING_POLICIES says how many policies; a thousand take a minute or two.
"""

import math
import os
import random

import pytest
import torch

from tempering.engines.generating.drawing import draw_tokens
from tempering.engines.llamacpp.writing import SampledToken, WritingRows
from tempering.engines.vllm.streams import LogitsRow, Stream, temper_rows
from tempering.errors import InputError
from tempering.tokens import (
    RequestSettings,
    TemperingLogitsProcessor,
    parse_policy,
    temper_logits,
)
from tempering.tokens.sampler import check_given

POLICIES = int(os.environ.get("TEMPERING_POLICIES", "60"))
VOCABULARY, PROMPT = 24, [1, 3, 9]


def number(draw, low=0.2, high=3.0):
    return f"{draw.uniform(low, high):.4g}"


def leaf(draw):
    return draw.choice(
        (
            lambda: f"constant({draw.choice(('0', 'inf', '1', number(draw), number(draw)))})",
            lambda: f"schedule(linear({number(draw)},{number(draw)}), length={draw.randint(4, 9)})",
            lambda: f"support({number(draw, 1, 12)})",
            lambda: f"entropy(T0={number(draw)}, theta={number(draw, 0, 1)})",
            lambda: f"dynatemp({number(draw)}, exponent={number(draw)})",
        )
    )()


def sampler(draw):
    values = {
        "T": lambda: leaf(draw),
        "top_p": lambda: number(draw, 0.2, 1),
        "top_k": lambda: str(draw.randint(1, 12)),
        "min_p": lambda: number(draw, 0.001, 0.4),
    }
    chosen = [name for name in values if draw.random() < 0.6]
    text = f"sampler({', '.join(f'{name}={values[name]()}' for name in chosen)})"
    if draw.random() < 0.4:
        names = draw.sample(["temperature", "top_p", "top_k", "min_p"], 4)
        text += f"|order({', '.join(names)})"
    return text


def wrapped(draw, text):
    for _ in range(draw.randrange(3)):
        text += draw.choice(
            (
                lambda: f"|room({number(draw, 0, 2)})",
                lambda: f"|clip({number(draw, 0.1, 0.5)},{number(draw, 0.6, 2)})",
                lambda: f"|loops(heat={number(draw, 1, 3)}, ngram={draw.randint(1, 2)}, window=5)",
                lambda: f"|after(ids({draw.randint(3, 6)}), {draw.randint(1, 2)}, {leaf(draw)})",
            )
        )()
    return text


def policy_text(draw):
    kind = draw.random()
    if kind < 0.3:
        return wrapped(draw, leaf(draw))
    if kind < 0.5:
        return wrapped(draw, sampler(draw))
    thinking, answer = (wrapped(draw, draw.choice((leaf, sampler))(draw)) for _ in range(2))
    text = f"phases(a=between({thinking}, ids(3), ids(4)), answer={answer})"
    text = wrapped(draw, text)
    return f"{text}|budget(a={draw.randint(1, 5)})" if draw.random() < 0.4 else text


def request(draw):
    """A policy, and settings of a request that it may stand beside."""
    while True:
        own = {
            # Powers of two, so that an engine's division and its undoing are exact.
            "temperature": draw.choice((0.5, 1.0, 1.0, 2.0)),
            "top_p": draw.choice((1.0, 1.0, 0.8)),
            "top_k": draw.choice((0, 0, 7)),
            "min_p": draw.choice((0.0, 0.0, 0.05)),
        }
        try:
            policy = parse_policy(policy_text(draw))
            given = RequestSettings(**own) if policy.truncates else RequestSettings()
            check_given(policy, given, "the request")
        except InputError:  # a T of 0 in loops, a setting given twice
            continue
        return policy, given


def transformers(policy, given, histories, logits):
    processor = TemperingLogitsProcessor(policy, prompt_length=len(PROMPT), given=given)
    return processor(torch.tensor([PROMPT + history for history in histories]), logits)


def vllm(divided):
    def run(policy, given, histories, logits):
        own = given.temperature
        result = logits / own if divided else logits.clone()
        rows = []
        for row, history in enumerate(histories):
            stream = Stream(policy, temperature=own, given=given)
            state = stream.at(len(history), lambda: PROMPT, history.__getitem__)
            rows.append(LogitsRow(row, stream, lambda state=state: state))
        assert temper_rows(result, rows, divided=divided).failed == {}
        return result if divided else result / own

    return run


def llamacpp(policy, given, histories, logits):
    rows = WritingRows(PROMPT, [SampledToken(policy, 0, 0, given)] * len(histories))
    for row, history in enumerate(histories):
        for token in history:
            rows.took(row, token)
    return rows.temper(range(len(histories)), logits)[0]


ENGINES = {
    "transformers": transformers,
    "vLLM, older runner": vllm(True),
    "vLLM, newer runner": vllm(False),
    "llama.cpp": llamacpp,
}


@pytest.mark.parametrize("name", ENGINES)
def test_engines_draw_the_same_tokens(name):
    draw = random.Random(19)
    generator = torch.Generator().manual_seed(19)
    followed = 0
    for _ in range(POLICIES):
        policy, given = request(draw)
        histories = [[], []]
        for _ in range(7):
            logits = 3 * torch.randn(2, VOCABULARY, generator=generator)
            logits[:, 20] = -math.inf
            numbers = torch.rand(2, generator=generator, dtype=torch.float64)
            states = [policy.state(PROMPT, history, given=given) for history in histories]
            wanted = temper_logits(policy, logits, states).logits
            got = ENGINES[name](policy, given, histories, logits)
            torch.testing.assert_close(
                got.softmax(-1), wanted.softmax(-1), atol=1e-6, rtol=1e-5, msg=f"{policy} {given}"
            )
            tokens = draw_tokens(wanted, numbers).tokens.tolist()
            # The same numbers draw the same tokens from log probabilities, which round elsewhere.
            assert draw_tokens(got, numbers).tokens.tolist() == tokens, f"{policy} {given}"
            followed += 1
            for history, token in zip(histories, tokens):
                history.append(draw.choice((3, 4, 5, token)))
            if draw.random() < 0.2:  # an engine takes tokens back
                histories = [history[: len(history) // 2] for history in histories]
    assert followed == 7 * POLICIES
