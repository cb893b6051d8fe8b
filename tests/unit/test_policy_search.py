"""A policy learned from tasks, with a sampler whose best temperatures are known."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tempering.agents.checkers import Checker, checker
from tempering.agents.contract import Call, EngineError, Memory, Reply
from tempering.errors import DataError, InputError, MissingExtraError, ScheduleError
from tempering.evaluation.policy_search import learn_policy, split_tasks
from tempering.tokens import parse_policy
from tests.unit.agents_fake import FakeEngine

MARKS = 'between({}, "<think>", "</think>")'
PHASES = f"phases(thinking={MARKS.format('?')}, answer=?)"
BEST = (0.8, 0.3)  # thinking, answer
SEARCHES = int(os.environ.get("POLICY_SEARCHES", "12"))  # of which the intervals are counted


def make_tasks(count: int) -> list[dict[str, Any]]:
    return [{"id": f"t{i}", "prompt": f"task {i}", "answer": str(i)} for i in range(count)]


TASKS = make_tasks(60)


# As quick as can be: searches read thousands of replies.
PLAIN = Checker("plain", lambda text, task: text, lambda answer, task: answer == task["answer"])


def checkers_of(tasks: list[dict[str, Any]]) -> list[Any]:
    return [PLAIN] * len(tasks)


def temperatures(call: Call) -> tuple[float, float]:
    """Of thinking and of the answer, as the call asks for them."""
    if call.token_policy is None:
        assert call.temperature is not None
        return call.temperature, call.temperature
    numbers = re.findall(r"(?<==|\()[\d.]+", call.token_policy)
    assert call.temperature == 1 and call.top_p is None
    return float(numbers[0]), float(numbers[-1])


def answering(right: Callable[[Call], float]) -> Callable[[Call], str]:
    """Right with a probability that the call decides, by the random number of its seed."""

    def answer(call: Call) -> str:
        number = call.prompt.removeprefix("task ")
        return number if call.seed / 2**31 < right(call) else "-1"

    return answer


def near_the_best(call: Call) -> float:
    distance = sum(
        math.log(T / best) ** 2 for T, best in zip(temperatures(call), BEST, strict=True)
    )
    return 0.9 * math.exp(-distance)


def whatever_the_temperature(call: Call) -> float:
    """The law doesn't depend on the policy, and each policy meets luck of its own."""
    text = f"{call.token_policy}/{call.temperature}/{call.seed}"
    luck = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return 1.0 if luck < 0.5 else 0.0


def learn(
    answer: Callable[[Call], Any], tasks: list[dict[str, Any]] = TASKS, **options: Any
) -> Any:
    text = options.pop("text", PHASES)
    engine = options.pop("engine", None) or FakeEngine(answer)
    return learn_policy(engine, text, tasks, checkers_of(tasks), **options)


@pytest.fixture(scope="module")
def found() -> Any:
    engine = FakeEngine(answering(near_the_best))
    result = learn(None, engine=engine, trials=25)
    return result, engine


def test_the_best_temperatures_are_found_and_the_gain_is_told_from_0(found):
    result, _ = found
    assert result.complete and result.policy != result.against == "constant(1)"
    thinking, answer = result.numbers
    assert (thinking.label, answer.label) == ("thinking T", "answer T")
    for number, best in zip(result.numbers, BEST, strict=True):
        assert abs(math.log(number.value / best)) < 0.45
        assert number.range[0] <= number.low <= number.value <= number.high <= number.range[1]
        assert number.low <= best <= number.high
    # The law at constant(1): 0.9 exp(-(log 0.8)^2 - (log 0.3)^2) = 0.201; at the best, 0.9.
    gain = result.held_out.gain
    assert gain.low > 0 and gain.n == 24
    assert gain.low < 0.7 < gain.high
    untuned, learned = result.held_out.untuned, result.held_out.learned
    assert untuned.low < 0.201 < untuned.high and learned.low < 0.9
    assert gain.value == pytest.approx(learned.value - untuned.value)


def test_all_policies_meet_the_same_tasks_and_seeds_and_none_of_the_held_out(found):
    result, engine = found
    seen, unseen = split_tasks(TASKS, 0.4, 0)
    by_policy: dict[Any, dict[str, Counter[int]]] = {}
    for call in engine.asked:
        own = by_policy.setdefault((call.token_policy, call.temperature), {})
        own.setdefault(call.prompt, Counter())[call.seed] += 1
    untuned = by_policy[None, 1.0]
    assert len(untuned) == len(TASKS)
    for (text, _), own in by_policy.items():
        for prompt, seeds in own.items():
            assert seeds == untuned[prompt] and set(seeds.values()) == {1} and len(seeds) == 4
        if text not in (None, result.policy):
            assert set(own) <= {TASKS[i]["prompt"] for i in seen}
    assert {TASKS[i]["prompt"] for i in unseen} <= set(by_policy[result.policy, 1.0])


def test_bad_trials_are_left_early_and_the_account_is_right(found):
    result, engine = found
    left = [trial for trial in result.trials if trial.left]
    assert len(result.trials) == 25 and len(left) > 5
    assert all(len(trial.scores) < 36 for trial in left)
    whole = [trial for trial in result.trials if not trial.left]
    best = max(whole, key=lambda trial: trial.score)
    assert best.text == result.policy
    # An estimate of a trial that was left never passes for the best.
    assert all(trial.score < best.score for trial in left)
    assert result.samples == len(engine.asked) == len(result.rows)
    assert result.samples < 4 * (26 * 36 + 2 * 24) * 0.8
    assert result.tokens_out == sum(row["tokens_out"] for row in result.rows) > 0


def test_a_sampler_that_ignores_the_temperature_has_a_gain_of_0_in_its_interval():
    """Each search picks the luckiest trial; the held-out tasks are not fooled.

    A 95% interval misses 0 once in 20; so the limit is three standard deviations above that.
    """
    missed = flattered = 0
    for seed in range(SEARCHES):
        result = learn(whatever_answer, make_tasks(20), trials=5, samples=2, seed=seed)
        if result.held_out is None:
            continue
        gain = result.held_out.gain
        missed += not gain.low <= 0 <= gain.high
        flattered += result.searched.value - gain.value
    assert missed <= 0.05 * SEARCHES + 3 * math.sqrt(0.0475 * SEARCHES)
    assert flattered > 0, "the gain on the tasks of the search is flattered by the choice"


whatever_answer = answering(whatever_the_temperature)


def test_where_the_untuned_policy_is_best_it_stays():
    def cold_is_wrong(call: Call) -> float:
        first, last = temperatures(call)
        return 0.8 if first == last == 1 else 0.1

    result = learn(answering(cold_is_wrong), trials=8)
    assert result.policy == "constant(1)" and result.held_out is None and result.complete
    assert "no trial scored above constant(1) on the 36 tasks of the search" in result.warnings[0]


def test_another_policy_may_be_the_one_to_beat():
    cold = f"phases(thinking={MARKS.format('0.8')}, answer=0.3)"
    result = learn(answering(near_the_best), trials=5, against=cold)
    assert result.against == result.policy == cold and result.untuned > 0.8


def test_an_interrupted_search_goes_on_to_the_same_result():
    few, trials = make_tasks(24), 8
    result = learn(answering(near_the_best), few, trials=trials)
    ledger, asked, parts = Memory(), 0, 0
    while True:
        engine = FakeEngine(answering(near_the_best))
        part = learn(None, few, engine=engine, trials=trials, ledger=ledger,
                     stop=lambda engine=engine: len(engine.asked) >= 120)  # fmt: skip
        asked, parts = asked + len(engine.asked), parts + 1
        if part.complete:
            break
        assert part.held_out is None
    assert parts > 3 and asked == result.samples
    assert part == result


def test_failed_samples_count_as_wrong_and_are_tried_again():
    ledger = Memory()

    def flaky(call: Call) -> Any:
        good = answering(near_the_best)(call)
        return ValueError("lost") if call.seed % 50 == 0 else good

    first = learn(flaky, trials=4, ledger=ledger)
    assert first.failed > 0 and first.complete
    engine = FakeEngine(answering(near_the_best))
    second = learn(None, engine=engine, trials=4, ledger=ledger)
    assert second.failed == 0 and len(engine.asked) >= first.failed


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (0.0, "no sample of constant.1. and 8 other policies was right.* checker fits the answers"),
        (1.0, "every sample of constant.1. and 8 other policies was right.*harder tasks"),
        (0.5, "8 other policies have the same score on every task.*don't depend on these numbers"),
    ],
)
def test_a_score_that_never_varies_has_nothing_to_teach(right, words):
    engine = FakeEngine(answering(lambda call: right))
    with pytest.raises(DataError, match=words):
        learn(None, engine=engine, trials=40)
    assert len(engine.asked) == 9 * 36 * 4, "it ends long before the 40th trial"


def test_replies_that_are_cut_are_named_where_nothing_was_right():
    def cut(call: Call) -> Reply:
        return Reply("thinking about", finish="length", tokens_out=7)

    with pytest.raises(DataError, match="144 cut; raise --max-tokens .256 now"):
        learn(cut, trials=8)


def test_an_engine_that_is_down_or_refuses_the_policy_says_so_at_once():
    engine = FakeEngine(lambda call: ValueError("HTTP 400: no delimiter"))
    with pytest.raises(EngineError, match="all 1 samples of 'phases.*failed: HTTP 400"):
        learn(None, engine=engine)
    assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"text": "phases(thinking=1, answer=0.5)"}, InputError, "has no ? in it"),
        ({"text": "constant(1)|after(?, 1, 0.5)"}, ScheduleError, "after has none here"),
        ({"tasks": make_tasks(1)}, InputError, "1 tasks.* 1 to search on and 0 held out"),
        ({"tasks": make_tasks(3)}, InputError, "3 tasks.* 2 to search on and 1 held out"),
        ({"held_out": 0.02}, InputError, "59 to search on and 1 held out"),
        ({"held_out": 0.98}, InputError, "1 to search on and 59 held out"),
        ({"held_out": 0}, InputError, "between 0 and 1, got 0"),
        ({"held_out": math.nan}, InputError, "between 0 and 1, got nan"),
        ({"trials": 0}, InputError, "trials = 0"),
        ({"samples": 0}, InputError, "samples = 0"),
        ({"against": "constant(hot)"}, ScheduleError, "column"),
        ({"against": "hot"}, ScheduleError, "column"),
        (
            {"tasks": [*make_tasks(9), {**TASKS[3], "id": "again"}]},
            InputError,
            "tasks 't3' and 'again' have one prompt",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_sampled(options, error, words):
    engine = FakeEngine(answering(near_the_best))
    with pytest.raises(error, match=re.escape(words) if ".*" not in words else words):
        learn(None, engine=engine, **options)
    assert not engine.asked


def test_a_checker_that_calls_its_own_answer_wrong_is_named():
    odd = replace(checker("number"), correct=lambda answer, task: False)
    engine = FakeEngine()
    with pytest.raises(InputError, match="task 't0': the checker number doesn't take"):
        learn_policy(engine, PHASES, TASKS, [odd] * len(TASKS))
    assert not engine.asked


def test_a_policy_that_the_engine_refuses_at_an_end_of_its_range_is_refused_first():
    class Strict(FakeEngine):
        def check(self, calls: Any) -> None:
            if any((call.temperature or 0) > 1.5 for call in calls):
                raise InputError("it takes 0 to 1.5")

    engine = Strict(answering(near_the_best))
    with pytest.raises(InputError, match="narrow a range.*it takes 0 to 1.5"):
        learn(None, engine=engine, text="constant(?)")
    assert not engine.asked
    result = learn(None, engine=engine, text="constant(?[0.2,1.5])", trials=6)
    assert len(result.trials) == 6


def test_optuna_is_an_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    engine = FakeEngine(answering(near_the_best))
    with pytest.raises(MissingExtraError, match=r"pip install 'tempering\[tune\]'"):
        learn(None, engine=engine)
    assert not engine.asked


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sampler(T=1, top_k=?[3,4])", "top_k is 4, an end of its range.*: .\\[3,8\\]"),
        ("sampler(T=1, top_k=?[4,5])", "top_k is 4, an end of its range.*: .\\[2,5\\]"),
        ("sampler(T=1, top_k=?[1,4], top_p=?[0.99,1])", "top_k is 4"),
        ("sampler(T=1, top_p=?[0.999,1])", None),
    ],
)
def test_a_number_at_an_end_of_its_range_is_told_unless_nothing_lies_beyond(text, words):
    class Parsing(FakeEngine):
        def check(self, calls: Any) -> None:
            for call in calls:
                parse_policy(call.token_policy or "constant(1)")

    def four_and_1(call: Call) -> float:
        policy = call.token_policy or ""
        return (
            0.9 if "top_k=4" in policy or ("top_p=1" in policy and "top_k" not in policy) else 0.2
        )

    engine = Parsing(answering(four_and_1))
    result = learn(None, engine=engine, text=text, trials=4)
    found = [warning for warning in result.warnings if "an end of its range" in warning]
    assert len(found) == (words is not None)
    assert all(re.match(words, warning) for warning in found)


def test_whole_numbers_are_searched_as_such():
    def few(call: Call) -> float:
        top_k = int(re.findall(r"top_k=(\d+)", call.token_policy or "top_k=200")[0])
        return 0.9 * math.exp(-abs(math.log(top_k / 12)))

    result = learn(answering(few), text="sampler(T=1, top_k=?)", trials=20)
    (number,) = result.numbers
    assert number.value.is_integer() and 6 <= number.value <= 24
    assert re.search(r"top_k=\d+\)", result.policy)


def test_the_split_is_drawn_by_the_seed_and_keeps_every_task():
    for seed in range(5):
        seen, unseen = split_tasks(TASKS, 0.3, seed)
        assert sorted(seen + unseen) == list(range(60)) and len(unseen) == 18
    assert split_tasks(TASKS, 0.3, 1) == split_tasks(TASKS, 0.3, 1) != split_tasks(TASKS, 0.3, 2)
