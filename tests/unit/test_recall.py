"""Contexts of facts and questions: drawn by the seed, nothing shared by learning and testing."""

from __future__ import annotations

import pytest

from tempering.errors import InputError
from tempering.evaluation.recall import PARTS, _keys, _sentences, recall
from tempering.evaluation.recall_pools import KEYS, VALUES, WORDINGS


def test_a_seed_gives_one_context():
    assert recall(3) == recall(3)
    assert len({recall(seed).context for seed in range(5)}) == 5


@pytest.mark.parametrize("wording", range(len(WORDINGS)))
def test_each_answer_is_stated_once_beside_its_key(wording):
    name, fact, _ = WORDINGS[wording]
    item = recall(wording, wording=wording, value="code", facts=6, questions=6, words=80)
    assert item.wording == name and len(item.questions) == 6
    assert len({answer for _, answer in item.questions}) == 6
    for question, answer in item.questions:
        assert item.context.count(answer.strip()) == 1
        assert answer.strip() not in question
    before, after = fact.index("{k}"), fact.index("{v}")
    assert before != after


@pytest.mark.parametrize("kind", sorted(KEYS))
def test_parts_share_no_key(kind):
    learn, test = (set(_keys(kind, part)) for part in PARTS)
    assert learn and test and not learn & test and learn | test == set(KEYS[kind])


def test_parts_share_no_sentence():
    learn, test = (_sentences("fiction", part) for part in PARTS)
    long = [{line for line in lines if len(line) > 40} for lines in (learn, test)]
    assert not long[0] & long[1]


@pytest.mark.parametrize("kind", sorted(VALUES))
def test_layout_length_and_pairs(kind):
    item = recall(1, wording=0, value=kind, words=200, facts=4, questions=2, layout="block")
    assert 200 <= len(item.context.split()) < 330
    prompt, answer = item.pairs()[0]
    assert prompt.startswith(item.context + "\n\nThe secret code for ")
    assert prompt.endswith(" is") and answer.startswith(" ")


def test_no_space_after_an_open_quote():
    python = next(i for i, wording in enumerate(WORDINGS) if wording[0] == "json")
    assert not recall(0, wording=python, words=50).questions[0][1].startswith(" ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "train"}, "part is one of learn, test; not 'train'"),
        ({"value": "colour"}, "value is one of digits"),
        ({"keys": "cats"}, "keys is one of names"),
        ({"layout": "heap"}, "layout is one of strewn, block"),
        ({"wording": 99}, f"wording is one of 0 to {len(WORDINGS) - 1}; not 99"),
        ({"facts": 0}, "got 0 facts"),
        ({"facts": 2, "questions": 3}, "questions for some of the facts"),
        (
            {"facts": 60, "value": "word", "keys": "people"},
            "50 different values of the kind 'word'",
        ),
        ({"words": 100_000}, "the test part of the text 'fiction' has no 100000 words"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        recall(0, **options)
