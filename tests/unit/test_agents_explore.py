"""Ladders, the unbiased pass@k, and a comparison of strategies with an engine made up for it."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempering.agents.checkers import checker
from tempering.agents.contract import Call, EngineError, Memory, Reply
from tempering.agents.ladder import (
    Rung,
    Strategy,
    attention_rungs,
    pairing_order,
    spread_order,
    strategies,
)
from tempering.agents.tasks import generate_tasks
from tempering.errors import InputError, ScheduleError, TemperatureError
from tempering.evaluation.explore import explore
from tempering.evaluation.passk import compared, pass_at_k
from tempering.evaluation.policy_strategy import policy_strategy
from tempering.evaluation.sampling import HOPELESS
from tests.unit.agents_fake import FakeEngine


@given(
    st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case):
    n, c, k = case
    subsets = list(itertools.combinations(range(n), k))
    hits = sum(any(i < c for i in subset) for subset in subsets)
    assert pass_at_k(n, c, k) == pytest.approx(hits / len(subsets), abs=1e-12)


def test_pass_at_k_does_not_overflow():
    exact = 1 - math.comb(9_000, 500) / math.comb(10_000, 500)
    assert pass_at_k(10_000, 1_000, 500) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("case", [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_of_nonsense(case):
    expected = "c = -1; expected a whole number" if case[1] < 0 else "1 <= k <= n and 0 <= c <= n"
    with pytest.raises(InputError, match=expected):
        pass_at_k(*case)


def test_differences_are_paired():
    rng = random.Random(0)
    base = [rng.random() for _ in range(200)]
    shifted = [value + 0.1 for value in base]
    first, second = compared({"a": base, "b": shifted}, "m", seed=0)
    assert first.difference is None
    assert second.difference is not None
    assert second.difference.value == pytest.approx(0.1)
    # All tasks differ by the same, so the paired interval has no width; the means' do.
    assert second.difference.high - second.difference.low < 1e-9
    assert second.estimate.high - second.estimate.low > 0.02
    with pytest.raises(InputError, match="other numbers of tasks"):
        compared({"a": base, "b": base[:-1]}, "m", seed=0)


@given(st.integers(2, 40))
def test_orders_are_permutations_whose_beginnings_are_spread(k):
    order, other = spread_order(k), pairing_order(k)
    assert sorted(order) == sorted(other) == list(range(k))
    if k >= 6:
        start = sorted(order[: k // 2])
        assert max(b - a for a, b in itertools.pairwise([-1, *start, k])) <= k / 2
    if k >= 5:
        middle = (k - 1) / 2
        covariance = sum((s - middle) * (t - middle) for s, t in enumerate(other))
        assert abs(covariance) < 0.7 * sum((s - middle) ** 2 for s in range(k))


def test_strategies_spend_the_same():
    single, ladder, attention, both = strategies(
        12, temperature=0.7, ladder=(0.4, 1.2), amplitude=1.25
    )
    assert {len(s.rungs) for s in (single, ladder, attention, both)} == {12}
    assert {rung.temperature for rung in single.rungs} == {0.7}
    steps = sorted(rung.temperature for rung in ladder.rungs)
    assert steps == pytest.approx([0.4 * 3 ** (s / 11) for s in range(12)])
    heats = sorted(rung.heat for rung in attention.rungs)
    assert heats == pytest.approx([1.25 ** (2 * s / 11 - 1) for s in range(12)])
    assert sorted(r.temperature for r in both.rungs) == pytest.approx(steps)
    assert sorted(r.heat for r in both.rungs) == pytest.approx(heats)
    assert len(strategies(12, temperature=0.7, ladder=(0.4, 1.2))) == 2


def test_a_pattern_as_attention_ladder_starts_at_the_models_own():
    rungs = attention_rungs(3, "throb(12,3,1,12)", 1.21)
    assert rungs[0] == (None, 1.0)
    assert rungs[1] == ("throb(12,3,1,12)|amplitude(1.1)", pytest.approx(1.1))
    middle = attention_rungs(3, "uniform", 1.21)[1]
    assert middle == (None, 1.0), "the middle of a uniform ladder is the untouched model"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 1}, InputError, "at least 2 samples"),
        ({"temperature": 0.0}, TemperatureError, "above 0 and finite, got 0"),
        ({"ladder": (1.0, 0.5)}, InputError, "from cold to hot"),
        ({"ladder": (0.5, math.inf)}, TemperatureError, "finite, got inf"),
        ({"amplitude": 0.5}, InputError, "an amplitude above 1"),
        ({"amplitude": 1.2, "attention": "throb("}, ScheduleError, "expected"),
    ],
)
def test_ladders_that_are_none(change, error, message):
    arguments = {"k": 4, "temperature": 0.7, "ladder": (0.4, 1.2), **change}
    with pytest.raises(error, match=message):
        strategies(arguments.pop("k"), **arguments)


TASKS = generate_tasks(30, seed=0, kinds=["arithmetic"])
CHECKERS = [checker("number")] * len(TASKS)


def hot_is_right(call: Call) -> str:
    """Right where the temperature of the call is near that of the task, by its level."""
    task = next(task for task in TASKS if task["prompt"] == call.prompt)
    wanted = 0.3 + 0.3 * task["level"]
    right = abs((call.temperature or 0) - wanted) < 0.1
    return task["answer"] if right else str(int(task["answer"]) + 1 + call.seed % 3)


def chosen(k: int = 12, **options: float) -> list:
    return strategies(k, temperature=0.6, ladder=(0.3, 1.5), **options)


def test_a_ladder_wins_where_temperatures_solve_different_tasks():
    engine = FakeEngine(hot_is_right)
    found = explore(engine, TASKS, CHECKERS, chosen())
    assert found.complete and found.failed == 0 and len(found.rows) == 2 * 12 * len(TASKS)
    table = {(row.metric, row.label): row for row in found.compared}
    single, ladder = (s.name for s in chosen())
    at_level_one = sum(task["level"] == 1 for task in TASKS) / len(TASKS)
    assert table["pass@12", single].estimate.value == pytest.approx(at_level_one)
    assert table["pass@12", ladder].estimate.value == 1.0
    difference = table["pass@12", ladder].difference
    assert difference is not None and difference.low > 0.5 and difference.n == 30
    # Equal samples, and the tokens that they took are told.
    spent = table["tokens written a task", single].estimate.value
    assert spent == table["tokens written a task", ladder].estimate.value == 12
    assert {"accuracy, majority", "accuracy, tempered vote", "accuracy, best of n",
            "accuracy, difficulty-aware", "pass@1", "pass@4", "pass@12",
            "share of unreadable answers"} <= {row.metric for row in found.compared}  # fmt: skip
    assert found.by_kind[0][ladder].endswith("/ 1.00")


def test_a_policy_by_token_is_one_more_strategy_and_met_at_equal_tokens():
    """Hot samples are right a little more often, and write four times as much."""

    def answer(call: Call) -> str:
        task = next(task for task in TASKS if task["prompt"] == call.prompt)
        hot = call.token_policy == "support(8)"
        right = call.seed % 8 < (4 if hot else 3)
        number = int(task["answer"]) + (not right)
        return f"so it is {number}" if hot else str(number)

    k = 8
    own = [Strategy("single", (Rung(0.6),) * k), policy_strategy("support(8)", k)]
    engine = FakeEngine(answer)
    found = explore(engine, TASKS, CHECKERS, own)
    assert {call.token_policy for call in engine.asked} == {None, "support(8)"}
    table = {(row.metric, row.label): row for row in found.compared}
    counts = {"single": [], "support(8)": []}
    for strategy, rights in counts.items():
        for task in TASKS:
            rows = [r for r in found.rows if (r["strategy"], r["task"]) == (strategy, task["id"])]
            rights.append(sum(row["correct"] for row in rows))
            assert {row["token_policy"] for row in rows} == {
                own[strategy != "single"].rungs[0].token_policy
            }
    at = {"single": 8, "support(8)": 2}  # samples in the tokens that single writes
    for label, rights in counts.items():
        mean = sum(pass_at_k(8, c, at[label]) for c in rights) / len(rights)
        row = table["pass@8 at equal tokens", label]
        assert row.estimate.value == pytest.approx(mean)
    assert table["pass@1", "support(8)"].difference.value > 0
    assert table["pass@8", "support(8)"].difference.value >= 0
    assert table["pass@8 at equal tokens", "support(8)"].difference.value < 0


def test_equal_tokens_say_nothing_where_all_write_equally_many():
    found = explore(FakeEngine(hot_is_right), TASKS, CHECKERS, chosen())
    assert not [row for row in found.compared if "equal tokens" in row.metric]


def test_samples_have_the_same_seeds_under_every_strategy_and_others_in_every_task():
    engine = FakeEngine(hot_is_right)
    explore(engine, TASKS[:4], CHECKERS[:4], chosen(4))
    first, second = ([call for call in engine.asked if call.key.startswith(s.name)]
                     for s in chosen(4))  # fmt: skip
    assert [call.seed for call in first] == [call.seed for call in second]
    assert len({call.seed for call in first}) == len(first)


def test_stopping_early_saves_samples_on_easy_tasks():
    engine = FakeEngine(lambda call: "5" if call.prompt == TASKS[0]["prompt"] else str(call.seed))
    found = explore(engine, TASKS[:2], CHECKERS[:2], chosen(), stop_support=1.76)
    counts = {}
    for row in found.rows:
        counts[row["strategy"], row["task"]] = counts.get((row["strategy"], row["task"]), 0) + 1
    for strategy in chosen():
        assert counts[strategy.name, TASKS[0]["id"]] == 3
        assert counts[strategy.name, TASKS[1]["id"]] == 12
    assert found.complete and not any(row.metric.startswith("pass@") for row in found.compared)


def test_an_interrupted_comparison_goes_on():
    ledger, first = Memory(), FakeEngine(hot_is_right)
    part = explore(first, TASKS, CHECKERS, chosen(), ledger=ledger,
                   stop=lambda: len(first.asked) >= 500)  # fmt: skip
    assert not part.complete and 0 < len(part.tasks) < len(TASKS)
    second = FakeEngine(hot_is_right)
    whole = explore(second, TASKS, CHECKERS, chosen(), ledger=ledger)
    assert len(first.asked) + len(second.asked) == 2 * 12 * len(TASKS)
    assert whole == explore(FakeEngine(hot_is_right), TASKS, CHECKERS, chosen())


def test_failed_samples_count_as_wrong_and_are_tried_again():
    ledger = Memory()

    def flaky(call: Call) -> str | Exception:
        return ValueError("lost") if call.key.endswith("/3") else hot_is_right(call)

    found = explore(FakeEngine(flaky), TASKS[:4], CHECKERS[:4], chosen(), ledger=ledger)
    assert found.failed == 2 * 4 and found.complete
    healed = FakeEngine(hot_is_right)
    assert explore(healed, TASKS[:4], CHECKERS[:4], chosen(), ledger=ledger).failed == 0
    assert len(healed.asked) == 8
    with pytest.raises(EngineError, match="all 24 samples of 'single T 0.6' failed: down"):
        explore(FakeEngine(lambda call: ValueError("down")), TASKS[:4], CHECKERS[:4], chosen())


def test_one_failed_sample_leaves_the_votes_by_likelihood():
    def flaky(call: Call) -> str | Exception:
        return ValueError("lost") if call.key.endswith("/3") else hot_is_right(call)

    found = explore(FakeEngine(flaky), TASKS[:4], CHECKERS[:4], chosen())
    assert {"accuracy, tempered vote", "accuracy, best of n"} <= {r.metric for r in found.compared}


def test_an_engine_that_goes_down_leaves_tasks_unfinished():
    """Nothing settles the tasks, and every sample after the first wave fails."""
    engine = FakeEngine(
        lambda call: str(call.seed) if int(call.key[-1]) < 3 else ValueError("down")
    )
    found = explore(engine, TASKS, CHECKERS, chosen(6), stop_support=1.5)
    assert len(engine.asked) == 2 * 3 * len(TASKS) + HOPELESS
    assert not found.complete and found.failed == HOPELESS and len(found.tasks) < len(TASKS)


def test_a_synthesis_that_failed_is_counted_and_asked_again():
    ledger = Memory()

    def flaky(call: Call) -> str | Exception:
        return ValueError("lost") if "Several" in call.prompt else hot_is_right(call)

    first = explore(FakeEngine(flaky), TASKS[:3], CHECKERS[:3], chosen(4), synthesise=True,
                    ledger=ledger)  # fmt: skip
    assert first.failed == 2 * 3
    engine = FakeEngine(lambda call: "5")
    second = explore(engine, TASKS[:3], CHECKERS[:3], chosen(4), synthesise=True, ledger=ledger)
    assert second.failed == 0 and len(engine.asked) == 2 * 3


def test_answers_that_no_checker_can_read_are_wrong_and_counted():
    engine = FakeEngine(lambda call: "no idea")
    found = explore(engine, TASKS[:3], CHECKERS[:3], chosen(4))
    table = {(row.metric, row.label): row.estimate.value for row in found.compared}
    single = chosen(4)[0].name
    assert table["share of unreadable answers", single] == 1.0
    assert table["pass@4", single] == table["accuracy, majority", single] == 0.0


def test_synthesis_asks_the_engine_once_a_task():
    def answer(call: Call) -> str:
        if "Several attempts" in call.prompt:
            return next(t["answer"] for t in TASKS if call.prompt.startswith(t["prompt"] + "\n\n"))
        return hot_is_right(call)

    engine = FakeEngine(answer)
    found = explore(engine, TASKS[:5], CHECKERS[:5], chosen(4), synthesise=True)
    assert len(engine.asked) == 2 * (4 + 1) * 5
    accuracies = [r.estimate.value for r in found.compared if r.metric == "accuracy, synthesis"]
    assert accuracies == [1.0, 1.0]


def test_a_task_that_its_own_checker_calls_wrong_is_named():
    odd = {"id": "odd", "prompt": "p", "answer": "4"}
    never = replace(checker("number"), correct=lambda answer, task: False)
    with pytest.raises(
        InputError, match="task 'odd': the checker number doesn't take.*'4' for right"
    ):
        explore(FakeEngine(), [odd], [never], chosen(4))


def test_strategies_of_different_sizes_are_not_compared():
    uneven = [chosen(4)[0], chosen(6)[1]]
    with pytest.raises(InputError, match="equal number of samples"):
        explore(FakeEngine(), TASKS[:2], CHECKERS[:2], uneven)


def test_a_refused_reply_keeps_the_servers_words_and_what_was_thrown_away():
    said = "the prompt was blocked: SAFETY (violent)"

    def refusing(call: Call) -> str | Reply:
        if not call.key.endswith("/3"):
            return hot_is_right_or_merged(call)
        return Reply("", error=said, finish="SAFETY", tokens_in=7, tokens_out=0, tokens_discarded=5)

    engine = FakeEngine(refusing)
    ledger = Memory()
    found = explore(engine, TASKS[:4], CHECKERS[:4], chosen(), ledger=ledger, synthesise=True)
    refused = [row for row in found.rows if row["sample"] == 3]
    assert [row["error"] for row in refused] == [said] * 8
    assert {row["fate"] for row in refused} == {"refused"}
    assert {row["error"] for row in found.rows if row["sample"] != 3} == {None}
    assert [row["tokens_discarded"] for row in refused] == [5] * 8
    thrown = [r for r in found.compared if r.metric == "tokens of replies thrown away, a task"]
    assert [row.estimate.value for row in thrown] == [5.0, 5.0]
    # A refusal was answered: the same command doesn't ask for it again.
    asked = len(engine.asked)
    assert found.failed == 0
    again = explore(engine, TASKS[:4], CHECKERS[:4], chosen(), ledger=ledger, synthesise=True)
    assert len(engine.asked) == asked and again == found


def test_what_a_failed_sample_or_synthesis_cost_stays_on_the_account():
    ledger = Memory()
    lost = Reply(None, error="can't be read", tokens_discarded=40)

    def flaky(call: Call) -> str | Reply:
        return lost if call.key.endswith(("/3", "/synthesis")) else hot_is_right(call)

    run = partial(
        explore, tasks=TASKS[:2], checkers=CHECKERS[:2], chosen=chosen(), ledger=ledger,
        synthesise=True,
    )  # fmt: skip
    first = run(FakeEngine(flaky))
    assert first.failed == 2 * 2 + 2 * 2
    healed = run(FakeEngine(hot_is_right_or_merged))
    assert healed.failed == 0
    assert sum(row["tokens_discarded"] for row in healed.rows) == 40 * 4
    merged = [ledger[key] for key in ledger if key.endswith("/synthesis")]
    assert [row["tokens_discarded"] for row in merged] == [40] * 4
    assert all(row["error"] is None and row["output"] for row in merged)


def hot_is_right_or_merged(call: Call) -> str:
    return "7" if call.key.endswith("/synthesis") else hot_is_right(call)


def test_a_record_without_thrown_away_tokens_has_no_row_for_them():
    found = explore(FakeEngine(hot_is_right), TASKS[:2], CHECKERS[:2], chosen())
    assert not [row for row in found.compared if "thrown away" in row.metric]
    assert {row["tokens_discarded"] for row in found.rows} == {0}
