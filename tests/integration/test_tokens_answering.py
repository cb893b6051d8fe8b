"""Loops, markers and budgets inside generate(): beams, drafts that are taken back, batches."""

import pytest
import torch

from tempering.errors import RefusedError
from tempering.tokens import TemperingLogitsProcessor, parse_policy
from tests.integration import tokens_tiny as tiny

OPEN, CLOSE = tiny.OPEN, tiny.CLOSE
PHASES = f"phases(thinking=between(1.5, ids({OPEN}), ids({CLOSE})), answer=0.9)"
POLICIES = (
    "constant(0.8)|loops(heat=2, ngram=1, window=6)",
    "constant(1.5)|after(ids(7), 1, 0.7)",
    f"{PHASES}|loops(ngram=2, window=9)|budget(thinking=3)",
)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.mark.parametrize("text", POLICIES)
@pytest.mark.parametrize("how", ["batch", "beams", "assistant", "lookup"])
def test_every_step_is_that_of_its_own_tokens(model, text, how):
    policy = parse_policy(text)
    calls = []

    class Watched(TemperingLogitsProcessor):
        def __call__(self, input_ids, scores):
            result = super().__call__(input_ids, scores)
            expected = tiny.wanted(policy, scores, input_ids, 4)
            torch.testing.assert_close(result.log_softmax(-1), expected, atol=2e-6, rtol=1e-5)
            calls.append(input_ids.shape[1])
            return result

    settings = {
        "batch": {"num_return_sequences": 3},
        "beams": {"num_beams": 3, "do_sample": False},
        "assistant": {"assistant_model": tiny.tiny_model()},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[how]
    rows = 2 if how in ("batch", "beams") else 1
    torch.manual_seed(3)
    out = model.generate(
        tiny.PROMPT[:rows],
        attention_mask=tiny.MASK[:rows],
        logits_processor=[Watched(policy)],
        max_new_tokens=14,
        eos_token_id=None,
        **({"do_sample": True, "top_k": 0} | settings),
    )
    assert max(calls) >= 17  # drafts may go further
    if "budget" in text:
        for row in out.tolist():
            inside, run = OPEN in row[:4], 0
            for token in row[4:]:
                run = run + 1 if inside else 0
                inside = (inside or token == OPEN) and token != CLOSE
                assert not (inside and run >= 3)  # the third token in the phase closed it


def test_a_budget_in_sampled_beams_is_refused(model):
    with pytest.raises(RefusedError, match="beam sampling needs two"):
        tiny.generate(model, POLICIES[2], num_beams=2)
