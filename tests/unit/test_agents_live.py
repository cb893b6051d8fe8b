"""The live view of stages: plain lines off a terminal, a mark for each worker on one."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from tempering.agents.plan import Plan
from tempering.agents.run import run_plan
from tempering.cli.shared.live import LiveStages
from tests.unit.agents_fake import FakeEngine

PLAN = Plan.from_pattern("throb(4,2,1,4)", tokens=8)


def shown(live: LiveStages) -> str:
    page = io.StringIO()
    Console(file=page, width=100, force_terminal=False).print(live._table())
    return page.getvalue()


def test_off_a_terminal_a_line_for_each_stage(capsys):
    flaky = FakeEngine(lambda call: ValueError("no") if call.key == "1/explore/2" else "a b c")
    with LiveStages(PLAN, 2) as live:
        run_plan(PLAN, "x", flaky, rounds=2, watch=live.watch)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("round 1, explore: 3 of 4 workers, 1 failed, 9 tokens written, ")
    assert lines[5].startswith("round 2, execute: 1 of 1 workers, 3 tokens written, ")


def test_a_stage_that_was_cut_off_has_its_line_too(capsys):
    with LiveStages(PLAN, 1) as live:
        for event in (("running", 3), ("done", 8)):
            live.watch(1, PLAN.stages[0], 2, *event)
        live.watch(1, PLAN.stages[0], 3, "retrying", 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("round 1, explore: 1 of 4 workers, 8 tokens written, ")


def test_each_worker_has_a_mark_that_grows_with_its_tokens():
    live = LiveStages(PLAN, 1)
    rows = shown(live).splitlines()
    assert [row.split()[1:4] for row in rows[1:]] == [
        ["explore", "····", "0/4"],
        ["consolidate", "··", "0/2"],
        ["execute", "·", "0/1"],
    ]
    stage = PLAN.stages[0]
    for worker, (state, count) in enumerate(
        [("running", 4), ("retrying", 2), ("failed", 0), ("done", 8)]
    ):
        live.watch(1, stage, worker, state, count)
    assert shown(live).splitlines()[1].split() == ["1", "explore", "▅~x●", "1/4", "12"]


def test_a_wide_stage_shows_forty_and_counts_the_rest():
    wide = Plan.from_pattern("steps(100,1)", tokens=8)
    live = LiveStages(wide, 1)
    for worker in range(100):
        live.watch(1, wide.stages[0], worker, "kept", 0)
    assert "●" * 40 + " +60" in shown(live) and "100/100" in shown(live)


def test_on_a_terminal_the_table_is_drawn_and_left_standing(
    monkeypatch: pytest.MonkeyPatch,
):
    page = io.StringIO()
    real = Console

    def terminal(**options: Any) -> Console:
        return real(file=page, force_terminal=True, width=100, legacy_windows=False)

    monkeypatch.setattr("rich.console.Console", terminal)
    with LiveStages(PLAN, 1) as live:
        run_plan(PLAN, "x", FakeEngine(), watch=live.watch)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", page.getvalue())
    assert re.search(r"explore +●●●● +4/4 +8\n", text) and live.display is not None
