"""Questions about a context, answered side by side."""

from __future__ import annotations

import pytest
import torch

from tempering import Profile
from tempering.attention import layout
from tempering.cli.shared.answers import FACTS, WORDING, answers
from tempering.engines.loading.hub import load_model
from tempering.evaluation.recall import recall
from tempering.evaluation.recall_pools import WORDINGS
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_model(str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2)))


def test_answers_are_the_likeliest_tokens_under_each_profile(tiny):
    model, tokenizer = tiny
    plain = Profile.neutral(layout(model))
    hot = Profile.from_matrix([[3.0] * len(row) for row in plain.rows]).adopt(model)
    seen = []
    found = answers(
        *(model, tokenizer, hot, "hot"),
        seed=4,
        questions=2,
        words=30,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]
    place = [w[0] for w in WORDINGS].index(WORDING)
    item = recall(4, wording=place, value="digits", facts=FACTS, questions=2, words=30)
    for row, (prompt, answer) in zip(found["answers"], item.pairs(), strict=True):
        assert row["stated"] == answer.strip()
        assert prompt.endswith(row["question"].removesuffix(" ..."))
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        length = len(tokenizer(answer, add_special_tokens=False).input_ids)
        for _ in range(length):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        # A last byte that is half a character is told by neither, or by one of them.
        whole = tokenizer.decode(ids[0, -length:]).strip().rstrip("\ufffd")
        assert whole and row["untempered"].rstrip("\ufffd") == whole
    right = found["answered"]
    assert right["questions"] == 2 and right["right, untempered"] in (0, 1, 2)
    assert right["right, hot"] == sum(r["hot"].startswith(r["stated"]) for r in found["answers"])


def test_a_check_before_every_token_ends_the_asking_and_gives_the_model_back(tiny):
    model, tokenizer = tiny
    plain = Profile.neutral(layout(model))
    hot = Profile.from_matrix([[3.0] * len(row) for row in plain.rows]).adopt(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(ids).logits
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        answers(model, tokenizer, hot, "hot", questions=2, words=30, check=check)
    assert len(calls) == 2  # within the first question
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
