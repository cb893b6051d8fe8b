"""Terminal tables and progress: whole on every width, plain in a pipe, safe with any text."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tempering.agents.plan import Plan
from tempering.agents.run import run_plan
from tempering.reports import Record, print_record, progress, render_html, sparkline
from tests.unit.agents_fake import FakeEngine

SAMPLE = Path(__file__).with_name("test_reports_sample.json")
THROB = "throb(12,3,1,12)|amplitude(1.15)"


def printed(record: Record, **console) -> str:
    out = io.StringIO()
    print_record(record, Console(file=out, **console))
    return out.getvalue()


def terminal(record: Record, width: int) -> str:
    return printed(record, force_terminal=True, width=width, color_system=None)


def new(**results):
    return Record.new("compare", settings={}, results=results)


@pytest.fixture(scope="module")
def sample() -> Record:
    return Record.load(SAMPLE)


def test_a_pipe_gets_whole_lines_and_no_escape_codes(sample):
    text = printed(sample)
    assert "\x1b" not in text
    row = next(line for line in text.splitlines() if line.startswith(THROB) and "costs" in line)
    assert row.split() == [
        THROB, "+0.0121", "0.0042", "+0.0038", "to", "+0.0204", "costs", "0.0152", "0.0009", "24",
    ]  # fmt: skip
    layers = [line.split() for line in text.splitlines() if line.startswith(" ")]
    assert ["29", "11", "13.3", "9.6"] in layers
    assert "95% intervals" in text
    assert "failed" not in text
    assert "timed out after 30 s" in text
    assert "12 of 60 steps" in text


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_no_number_is_cut_on_any_width(sample, width):
    text = terminal(sample, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    if width >= 80:  # narrower than that, numbers are folded as well
        for number in ("+0.0038 to +0.0204", "0.0152", "36.3", "0.56 to 0.66", "0.0042"):
            assert number in text


def test_letters_stand_for_patterns_only_where_names_do_not_fit(sample):
    narrow, wide = terminal(sample, 80), terminal(sample, 300)
    assert f"A  {THROB}" in narrow
    assert any(line.startswith("A ") and "costs" in line for line in narrow.splitlines())
    assert "Patterns" not in wide
    assert any(line.startswith(THROB) and "costs" in line for line in wide.splitlines())


def test_generations_stand_side_by_side_on_a_wide_terminal(sample):
    rows = terminal(sample, 120).splitlines()
    assert any("untempered" in row and THROB in row for row in rows[:5])
    rows = terminal(sample, 50).splitlines()
    assert not any("untempered" in row and THROB in row for row in rows)


def test_text_can_neither_steer_the_terminal_nor_be_markup():
    hostile = "[red]x[/red] \x1b[2J\x07 \r\x9b31m {0} [/nonsense]"
    samples = [{"label": hostile, "seed": 0, "text": hostile, "tokens": 1}]
    cost = [{"label": hostile, "cost": 0.1, "unit": hostile}]
    text = printed(new(generations={"prompt": hostile, "samples": samples}, cost=cost))
    assert not {"\x1b", "\x07", "\r", "\x9b"} & set(text)
    assert text.count("[red]x[/red] \\x1b[2J\\x07 \\x0d\\x9b31m {0} [/nonsense]") == 5


def test_an_ascii_terminal_gets_ascii(sample):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_record(sample, Console(file=out))
    out.flush()
    text = out.buffer.getvalue().decode("ascii")
    assert "-0.0149" in text
    assert "\\u" not in text


def test_sparklines():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 2.0, 4.0, 8.0], log=True) == "▁▃▆█"
    assert sparkline([1.0, None, math.nan, math.inf, 2.0]) == "▁   █"
    assert sparkline([3.0, 3.0]) == "▄▄"
    assert sparkline([None, None]) == "  "
    assert sparkline([0.0, 1.0, 2.0], log=True) == " ▁█"
    assert sparkline([1, 2], utf=False) == "_#"


def test_an_empty_record_prints_nothing():
    assert printed(new()) == ""
    assert (
        printed(new(generations={"prompt": "p", "samples": []}, training={"history": []}))
        == "prompt p\n\n"
    )


def test_a_stage_tree_ends_with_its_answers(sample):
    stages = new(stages=sample.results["stages"])
    assert "The sea is salt because of rivers." in printed(stages)


def test_the_answer_comes_first_and_the_workers_fit_a_narrow_terminal():
    def fail_second(call):
        return ValueError("HTTP 429: slow down") if call.key.endswith("/2") else "It is salt."

    plan = Plan.from_pattern("throb(12,3,1,12)", tokens=8)
    stages = run_plan(plan, "Why is the sea salt?", FakeEngine(fail_second)).stages
    for stage in stages:
        for worker in stage["workers"]:
            worker.update(part=1, tokens_discarded=123_456, attempts=3, note="a remark " * 30)
    text = terminal(new(stages=stages), 80)
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[:2] == ["It is salt.", ""]
    assert lines[3].split() == ["stage", "round", "worker", "T", "error"]
    rows = lines[4:20]
    assert rows[0].split() == ["explore", "1", "1", "2", "–"]
    assert rows[1].split() == ["explore", "1", "2", "1.91", "HTTP", "429:", "slow", "down"]
    assert rows[15].split() == ["execute", "1", "1", "0", "–"]
    assert max(map(len, lines)) <= 80 and "123456" not in text and "remark" not in text
    # The whole of it is in the HTML report.
    html = render_html(new(stages=stages))
    assert "123456" in html and "a remark" in html


numbers = st.none() | st.floats() | st.integers()
rows = st.lists(
    st.fixed_dictionaries(
        {"label": st.text(max_size=12), "cost": numbers, "unit": st.just("nats/token")},
        optional={
            "se": numbers,
            "low": numbers,
            "high": numbers,
            "kl": numbers,
            "extra": st.text(),
        },
    ),
    min_size=1,
    max_size=4,
)


@given(rows, st.integers(10, 200), st.booleans())
def test_any_costs_can_be_printed(cost, width, tty):
    out = io.StringIO()
    print_record(
        new(cost=cost), Console(file=out, force_terminal=tty, width=width, color_system=None)
    )
    assert set(map(ord, out.getvalue())) & {*range(9), *range(11, 32), 127} == set()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(total, steps, seconds):
    out, clock = io.StringIO(), Clock()
    with progress("compare", total, unit="chunks", console=Console(file=out), clock=clock) as bar:
        for _ in range(steps):
            clock.now += seconds
            bar.advance(note="loss 3.18")
    return out.getvalue().splitlines()


def test_progress_in_a_pipe_is_a_line_each_tenth():
    lines = lines_of(1000, 1000, 0.1)
    assert lines[0] == "compare: 100 of 1000 chunks, 10 s, loss 3.18"
    assert lines[-1] == "compare: 1000 of 1000 chunks, 100 s, done"
    assert len(lines) == 10


def test_progress_is_never_chatty_and_never_silent_for_long():
    assert lines_of(1000, 1000, 0.0001) == ["compare: 1000 of 1000 chunks, 0 s, done"]
    assert len(lines_of(1000, 20, 20.0)) == 11  # every second step of 20 s, and the end
    assert lines_of(None, 2, 31.0)[0] == "compare: 1 chunks, 31 s, loss 3.18"


def test_progress_says_where_an_interrupted_run_stopped():
    out = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        progress("tune", 5, console=Console(file=out), clock=Clock()) as bar,
    ):
        bar.advance(2)
        raise KeyboardInterrupt
    assert out.getvalue() == "tune: 2 of 5 steps, 0 s, stopped\n"


def test_progress_goes_to_standard_error(capsys):
    with progress("measure", 1) as bar:
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "measure: 1 of 1 steps, 0 s, done\n"


def test_progress_on_a_terminal_is_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with progress("compare", 4, console=console) as bar:
        bar.advance(3, note="loss [3.18]")
    assert "3/4" in out.getvalue()
    assert "loss [3.18]" in out.getvalue()
