"""Tokens drawn by numbers in [0, 1): the first whose cumulative probability exceeds the number."""

from __future__ import annotations

import math

import pytest
import torch

from tempering.engines.generating.drawing import draw_tokens
from tempering.posterior import responsibilities


def by_hand(row: torch.Tensor, number: float) -> int:
    weights = row.double().softmax(-1).tolist()
    total, live = 0.0, 0
    for token, weight in enumerate(weights):
        total += weight
        live = token if weight > 0 else live
        if total > number:
            return token
    return live


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_is_the_rule_by_hand(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(40, 30, generator=generator, dtype=torch.float64)
    logits[torch.rand(40, 30, generator=generator) < 0.3] = -math.inf
    logits[:, 7] = 0.0
    numbers = torch.rand(40, generator=generator, dtype=torch.float64)
    found = draw_tokens(logits, numbers)
    wanted = [by_hand(row, float(u)) for row, u in zip(logits, numbers, strict=True)]
    assert found.tokens.tolist() == wanted
    chosen = logits.log_softmax(-1).gather(1, found.tokens[:, None])[:, 0]
    assert torch.allclose(found.logprobs, chosen)


def test_a_number_above_the_last_sum_draws_the_last_live_token():
    """float32 weights of 20,000 tokens don't add up to 1; masked ones come after."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 20_000, generator=generator)
    logits[:, 19_000:] = -math.inf
    short = responsibilities(-logits).double().sum(-1) < 1 - 2**-53
    assert 0 < int(short.sum()) < 16
    numbers = torch.full((16,), 1 - 2**-53, dtype=torch.float64)
    found = draw_tokens(logits, numbers)
    assert found.tokens.max() < 19_000 and found.logprobs.isfinite().all()
    assert (found.tokens[short] == 18_999).all()
    alone = [draw_tokens(row[None], numbers[:1]).tokens for row in logits]
    assert torch.equal(found.tokens, torch.cat(alone))
