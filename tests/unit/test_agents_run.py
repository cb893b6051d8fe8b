"""Runs of a plan with an engine that says what it is told: rounds, budgets, failures."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.agents.contract import Call, Memory, StageError
from tempering.agents.plan import Plan, Stage
from tempering.agents.run import collect, rows_of, run_plan, spent, worker_seed
from tempering.errors import InputError
from tempering.reports import Record
from tests.unit.agents_fake import FakeEngine

PLAN = Plan.from_pattern("throb(4,2,1,4)", amplitude=1.2, tokens=10)


def test_twelve_three_one_and_again():
    engine = FakeEngine()
    outcome = run_plan(Plan.from_pattern("throb(12,3,1,12)"), "do it", engine, rounds=2)
    assert [len(stage["workers"]) for stage in outcome.stages] == [12, 3, 1, 12, 3, 1]
    assert [stage["round"] for stage in outcome.stages] == [1, 1, 1, 2, 2, 2]
    assert outcome.answer == "said 2/execute/1" and outcome.stopped is None
    # Each synthesiser reads its share of the explorers, hot and cold.
    second = next(call for call in engine.asked if call.key == "1/consolidate/2")
    read = [i for i in range(1, 13) if f"said 1/explore/{i}" in second.prompt.split("\n\n")[2:][0]
            or f"] said 1/explore/{i}\n" in second.prompt + "\n"]  # fmt: skip
    assert set(read) >= {2, 5, 8, 11}
    # The next round starts from the answer.
    again = next(call for call in engine.asked if call.key == "2/explore/7")
    assert "said 1/execute/1" in again.prompt and "do it" in again.prompt


def test_a_task_of_broken_text_is_refused():
    with pytest.raises(InputError, match="the task is not UTF-8"):
        run_plan(PLAN, "half \udcff", FakeEngine())


def test_workers_differ_in_temperature_attention_and_seed():
    engine = FakeEngine()
    run_plan(PLAN, "do it", engine)
    hot = [call for call in engine.asked if "/explore/" in call.key]
    assert len({call.temperature for call in hot}) == len({call.seed for call in hot}) == 4
    assert len({call.attention for call in hot}) == 4
    assert hot[0].temperature == 2.0 and hot[0].attention == "throb(4,2,1,4)|amplitude(1.2)"
    cold = engine.asked[-1]
    assert cold.temperature == 0.0 and cold.attention is None


def test_the_record_holds_every_call(tmp_path):
    engine = FakeEngine(lambda call: ValueError("no luck") if call.key == "1/explore/2" else "ok")
    outcome = run_plan(PLAN, "do it", engine, seed=7)
    record = Record.new("throb", settings={}, results={"stages": outcome.stages})
    record.save(tmp_path / "r.json")
    rows = dict(rows_of(Record.load(tmp_path / "r.json").results["stages"]))
    assert list(rows) == [call.key for call in engine.asked]
    for call in engine.asked:
        row = rows[call.key]
        assert (row["prompt"], row["seed"], row["attention"]) == (
            call.prompt,
            call.seed,
            call.attention,
        )
        assert row["temperature_asked"] == row["temperature_sent"] == call.temperature
    assert rows["1/explore/2"]["error"] == "no luck" and rows["1/explore/2"]["output"] is None
    assert outcome.tokens == spent(outcome.stages) > 0


def test_seeds_are_the_same_on_every_machine():
    assert worker_seed(0, 1, "explore", 0) == 718_676_145
    found = {worker_seed(s, r, n, w) for s in range(5) for r in (1, 2) for n in "ab"
             for w in range(20)}  # fmt: skip
    assert len(found) == 5 * 2 * 2 * 20 and max(found) < 2**31


def test_one_failed_worker_does_not_lose_the_others():
    engine = FakeEngine(lambda call: ValueError("no") if call.key.endswith("explore/3") else "ok")
    outcome = run_plan(PLAN, "do it", engine)
    assert outcome.answer == "ok"
    explore = outcome.stages[0]["workers"]
    assert [row["error"] for row in explore] == [None, None, "no", None]


def test_a_stage_that_fails_whole_keeps_the_stages_before():
    ledger = Memory()
    engine = FakeEngine(lambda call: ValueError("down") if "consolidate" in call.key else "ok")
    with pytest.raises(StageError, match=r"all 2 workers of stage 'consolidate' \(round 1\).*down"):
        run_plan(PLAN, "do it", engine, ledger=ledger)
    assert [stage["stage"] for stage in collect(PLAN, ledger, 1)] == ["explore", "consolidate"]
    # Resumed, the failed workers are tried again and the explorers are not.
    healed = FakeEngine(lambda call: "ok")
    assert run_plan(PLAN, "do it", healed, ledger=ledger).answer == "ok"
    assert [call.key for call in healed.asked] == [
        "1/consolidate/1",
        "1/consolidate/2",
        "1/execute/1",
    ]


@settings(deadline=None)
@given(cut=st.integers(0, 14))
def test_an_interrupted_run_goes_on_to_the_same_end(cut):
    whole = run_plan(PLAN, "do it", FakeEngine(), rounds=2)
    ledger, first = Memory(), FakeEngine()
    part = run_plan(PLAN, "do it", first, rounds=2, ledger=ledger,
                    stop=lambda: len(first.asked) >= cut)  # fmt: skip
    assert part.stopped == ("interrupted" if cut < 14 else None)
    assert len(first.asked) == min(cut, 14)
    second = FakeEngine()
    resumed = run_plan(PLAN, "do it", second, rounds=2, ledger=ledger)
    assert resumed == whole
    assert len(second.asked) == 14 - len(first.asked), "nothing is paid for twice"


def test_a_failed_worker_stays_failed_once_it_was_read_around():
    ledger = Memory()
    flaky = FakeEngine(lambda call: ValueError("no") if call.key == "1/explore/1" else "ok")
    run_plan(PLAN, "do it", flaky, ledger=ledger)
    again = FakeEngine()
    outcome = run_plan(PLAN, "do it", again, rounds=2, ledger=ledger)
    assert not any(call.key.startswith("1/") for call in again.asked)
    assert outcome.stages[0]["workers"][0]["error"] == "no"


def words(n: int) -> str:
    return " ".join(["w"] * n)


@settings(deadline=None, max_examples=60)
@given(budget=st.integers(0, 400))
def test_a_budget_is_never_exceeded_and_a_started_round_ends(budget):
    engine = FakeEngine(lambda call: words(call.tokens))
    try:
        outcome = run_plan(PLAN, "do it", engine, rounds=3, budget=budget)
    except InputError as error:
        assert "too small" in str(error) and not engine.asked
        return
    assert outcome.tokens <= budget
    stages = [stage["stage"] for stage in outcome.stages]
    assert outcome.answer is not None and stages[-1] == "execute"
    if outcome.stopped is None:
        assert len(stages) == 9
    for stage in outcome.stages:
        assert 1 <= len(stage["workers"]) <= stage["width"]


def test_a_budget_that_stops_can_be_raised():
    ledger = Memory()
    engine = FakeEngine(lambda call: words(call.tokens))
    small = run_plan(PLAN, "do it", engine, rounds=2, budget=200, ledger=ledger)
    assert small.stopped == "budget"
    more = run_plan(PLAN, "do it", engine, rounds=2, budget=2000, ledger=ledger)
    assert more.stopped is None and more.stages[: len(small.stages)] == small.stages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": " "}, "the task is empty"),
        ({"task": "x", "rounds": 0}, "rounds = 0; expected a whole number, 1 or more"),
        ({"task": "x", "budget": 5}, "too small: one worker in each stage may take"),
    ],
)
def test_what_can_not_run(arguments, message):
    engine = FakeEngine()
    task = arguments.pop("task")
    with pytest.raises(InputError, match=message):
        run_plan(PLAN, task, engine, **arguments)
    assert not engine.asked


def test_attention_that_the_engine_lacks_is_refused_not_dropped():
    engine = FakeEngine(attention=False)
    with pytest.raises(InputError, match=r"stage 'explore' tempers attention \(amplitude 1.2\)"):
        run_plan(PLAN, "do it", engine)
    assert not engine.asked
    run_plan(Plan.from_pattern("throb(4,2,1,4)"), "do it", engine)


def test_every_change_is_told():
    seen = []
    engine = FakeEngine(lambda call: ValueError("no") if call.key == "1/explore/2" else "ok")
    run_plan(PLAN, "x", engine, watch=lambda turn, stage, worker, state, count: seen.append(
        (turn, stage.name, worker, state)))  # fmt: skip
    assert seen[:4] == [
        (1, "explore", 0, "running"),
        (1, "explore", 0, "done"),
        (1, "explore", 1, "running"),
        (1, "explore", 1, "failed"),
    ]


def test_a_stage_reads_notes_and_answers_with_braces():
    plan = Plan((Stage("a", 2, (1.0, 0.0), "{task}"), Stage("b", 1, (0.0, 0.0), "{notes}")))
    engine = FakeEngine(lambda call: "{task} {x}")
    run_plan(plan, "{answer}", engine)
    assert [call.prompt for call in engine.asked] == [
        "{answer}",
        "{answer}",
        "[1] {task} {x}\n\n[2] {task} {x}",
    ]


def test_calls_are_plain_values():
    call = Call("k", "p", None, 1, 0)
    assert hash(call) == hash(Call("k", "p", None, 1, 0))
