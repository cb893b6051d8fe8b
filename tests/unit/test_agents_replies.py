"""What becomes of replies in a comparison: none counts as wrong without a word."""

from __future__ import annotations

import os
import random
from collections import Counter
from fractions import Fraction

import pytest

from tempering.agents.checkers import checker
from tempering.agents.contract import Call, Reply
from tempering.agents.ladder import strategies
from tempering.evaluation.explore import Exploration, explore
from tempering.evaluation.fates import FATES, read_reply
from tests.unit import answers_drawn as drawn
from tests.unit.agents_fake import FakeEngine

TASKS = [
    {"id": f"t{i}", "prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(1, 5)
]
NUMBER = checker("number")
REPLIES = int(os.environ.get("TEMPERING_FUZZ_REPLIES", "120"))


def run(answer, tasks=TASKS, k: int = 3, **options) -> Exploration:
    chosen = strategies(k, temperature=0.7, ladder=(0.4, 1.2))
    return explore(FakeEngine(answer), tasks, [NUMBER] * len(tasks), chosen, **options)


def said(text: str | None, finish: str = "end", sent: float | None = 0.7) -> Reply:
    return Reply(text, temperature_sent=sent, finish=finish, tokens_out=3)


@pytest.mark.parametrize(
    ("reply", "answer", "fate"),
    [
        (said("Answer: 8"), "8", "answered"),
        (said(""), None, "empty"),
        (said(" \n"), None, "empty"),
        (said("", "length"), None, "cut"),
        (said("", "MAX_TOKENS"), None, "cut"),
        (said("Let me think about", "max_tokens"), None, "cut"),
        (said("<think>It may be 8", "length"), None, "cut"),
        (said("Answer: 12", "length"), None, "cut"),  # or 125
        (said("Answer: 3.", "length"), None, "cut"),  # or 3.5
        (said(r"\boxed{8}", "length"), "8", "answered"),
        (said("Answer: 8. This is because the", "length"), "8", "answered"),
        (said("", "content_filter"), None, "refused"),
        (said(None, "SAFETY"), None, "refused"),
        (said("I'm sorry.", "refusal"), None, "refused"),
        (said(None), None, "failed"),
        (said("no idea"), None, "unreadable"),
        (said("5 or 6"), None, "unreadable"),
    ],
)
def test_every_reply_has_one_fate(reply, answer, fate):
    row = {"output": reply.output, "finish": reply.finish}
    assert read_reply(row, NUMBER, TASKS[0]) == (answer, fate)


def test_a_row_of_an_older_run_knows_no_finish():
    assert read_reply({"output": "8"}, NUMBER, TASKS[0]) == ("8", "answered")


def test_a_text_that_was_cut_is_not_compared_whole():
    row = {"output": "Par", "finish": "length"}
    for name in ("exact", "regex:(.*)"):
        assert read_reply(row, checker(name), {}) == (None, "cut")
    row = {"output": "Answer: Par", "finish": "length"}
    assert read_reply(row, checker("regex:Answer: (.)"), {}) == ("P", "answered")


def test_replies_that_are_cut_are_told_and_say_nothing_of_the_model():
    found = run(lambda call: said("", "length"), tokens=32)
    assert [row["cut"] for row in found.replies] == [12, 12]
    assert found.unanswered == ["single T 0.7", "ladder T 0.4 to 1.2"]
    assert found.failed == 0
    assert (
        "'single T 0.7': 12 of 12 replies have no answer and count as wrong: 12 cut; raise "
        "--tokens (32 now), which include what a reasoning model thinks"
    ) in found.warnings
    assert all(row["tasks without answer"] == 4 for row in found.replies)


def test_some_that_are_lost_are_told_and_the_rest_counts():
    fates = {"0": said(""), "1": said(None, "content_filter"), "2": said("Answer: 2")}
    found = run(lambda call: fates[call.key[-1]])
    (single, _) = found.replies
    assert {fate: single[fate] for fate in FATES if single[fate]} == {
        "answered": 4,
        "refused": 4,
        "empty": 4,
    }
    assert single["samples"] == 12 and single["tasks without answer"] == 0
    assert found.unanswered == []
    assert "8 of 12 replies have no answer and count as wrong: 4 refused, 4 empty" in str(
        found.warnings
    )
    table = {(row.metric, row.label): row.estimate.value for row in found.compared}
    assert table["pass@1", "single T 0.7"] == pytest.approx(1 / 12)  # of t1, whose answer is 2


def test_answers_that_are_all_there_bring_no_warning():
    found = run(lambda call: "Answer: 4", k=2)
    assert found.unanswered == []
    assert not [text for text in found.warnings if "no answer" in text]


def test_a_checker_that_reads_nothing_is_told():
    found = run(lambda call: "no idea")
    assert found.unanswered == [], "the model said something; the checker may not fit"
    assert "12 unreadable; see whether the checker fits how the model answers" in str(
        found.warnings
    )


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (lambda asked: 1.0, "every sample was sent with temperature 1, so it is no ladder: its 3"),
        (lambda asked: None, "sent with no temperature, which is the model's own, so it is no lad"),
        (
            lambda asked: min(asked, 0.5),
            "its temperatures were sent as 2 instead of 3, from 0.4 to",
        ),
    ],
)
def test_a_ladder_that_was_sent_as_less_is_no_ladder(sent, words):
    found = run(lambda call: said("Answer: 4", sent=sent(call.temperature)))
    (warning,) = (text for text in found.warnings if text.startswith("'ladder"))
    assert words in warning
    assert {row["temperature_sent"] for row in found.rows} == {sent(t) for t in (0.4, 0.7, 1.2)}
    assert any(text.startswith("'single T 0.7': every sample") for text in found.warnings)


def test_a_ladder_that_was_sent_as_asked_is_one():
    assert run(lambda call: "Answer: 4").warnings == []


def test_spellings_of_one_answer_win_a_vote_in_a_comparison():
    spelled = ["Answer: 1,000", "Answer: 1000.0", r"\boxed{1{,}000}", "Answer: 7", "Answer: 7"]
    task = {"id": "t", "prompt": "p", "answer": "1000"}
    found = run(lambda call: spelled[int(call.key[-1])], [task], k=5)
    table = {row.metric: row.estimate.value for row in found.compared}
    assert table["accuracy, majority"] == 1.0


def test_a_synthesis_without_an_answer_is_told():
    def answer(call: Call) -> str | Reply:
        return said("", "length") if "Several attempts" in call.prompt else "Answer: 4"

    found = run(answer, synthesise=True)
    assert "of 4 syntheses some have no answer and count as wrong: 4 cut" in str(found.warnings)


def test_drawn_replies_are_all_accounted_for():
    """A thousand ways to answer: no exception, no wrong value, every abstention counted."""
    rng = random.Random(13)
    k = 4
    tasks, replies = [], {}
    for i in range(max(1, REPLIES // k)):
        one = [drawn.reply(rng) for _ in range(k)]
        tasks.append({"id": f"t{i}", "prompt": f"p{i}", "answer": "123456789/7"})
        for place, reply in enumerate(one):
            replies[f"p{i}", place] = reply
    odd = {key: drawn.odd(rng) for key in replies if rng.random() < 0.2}

    def answer(call: Call) -> Reply:
        key = call.prompt, int(call.key[-1])
        text = odd.get(key, replies[key].text)
        return said(text, "length" if key in odd else "end", call.temperature)

    found = run(answer, tasks, k)
    prompts = {task["id"]: task["prompt"] for task in tasks}
    for row in found.rows:
        key = prompts[row["task"]], row["sample"]
        if key not in odd and row["answer"] is not None:
            assert Fraction(row["answer"]) == replies[key].value
        assert (row["answer"] is None) == (row["fate"] != "answered")
    for tally in found.replies:
        own = Counter(row["fate"] for row in found.rows if row["strategy"] == tally["strategy"])
        assert {fate: tally[fate] for fate in FATES if tally[fate]} == dict(own)
        assert sum(tally[fate] for fate in FATES) == tally["samples"] == k * len(tasks)
