"""`tempering explore`: every strategy is reported, what is paid for is kept."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tempering.agents.run import worker_seed
from tempering.agents.tasks import generate_tasks, write_tasks
from tempering.reports import Record
from tests.integration.agents_command import call, record_of, remote
from tests.integration.agents_server import serving
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks.jsonl", generate_tasks(5, seed=1))


def solving(entry: dict[str, Any]) -> None:
    """Puts the answer to arithmetic into the prompt that the server repeats."""
    turn = entry["body"]["messages"][-1]
    last = turn["content"].splitlines()[-1]
    if re.fullmatch(r"[\d +-]+=", last):
        turn["content"] = f"answer is {eval(last[:-1])}"
    else:
        turn["content"] = "I don't know"


def test_explore_reports_every_strategy_with_its_interval(tasks, tmp_path, capsys):
    with serving(solving) as (address, log):
        code = call("explore", "--tasks", tasks, "-k", 12, *remote(address, tmp_path / "o"))
    assert code == 0 and len(log.requests) == 5 * 12 * 2
    record = record_of(tmp_path / "o", "explore")
    rows = [row for row in record.results["benefit"] if row["metric"] == "pass@12"]
    assert [row["label"] for row in rows] == ["single T 0.7", "ladder T 0.4 to 1.2"]
    for row in rows:
        assert row["value"] == pytest.approx(2 / 5) and row["n"] == 5
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
    (difference,) = [
        row for row in record.results["paired_differences"] if row["metric"] == "pass@12"
    ]
    assert (difference["difference"], difference["low"], difference["high"]) == (0, 0, 0)
    html = next((tmp_path / "o").glob("*.html")).read_text()
    assert "pass@12" in html and "ladder T 0.4 to 1.2" in html
    shown = capsys.readouterr().out
    assert "pass@12" in shown
    (samples,) = (tmp_path / "o").glob("*.samples.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    counts = Counter((line["strategy"], line["task"]) for line in lines)
    assert len(counts) == 10 and set(counts.values()) == {12}


def test_explore_on_a_model_in_this_process_has_all_four_strategies(tiny, tmp_path, tasks):
    code = call("explore", "--tasks", tasks, "-k", 3, "--model", tiny, "--tokens", 3,
                "--checker", r"regex:^\s*(\S)", "--synthesis", "--out", tmp_path / "o")  # fmt: skip
    assert code == 0
    rows = record_of(tmp_path / "o", "explore").results["benefit"]
    labels = {row["label"] for row in rows if row["metric"] == "pass@3"}
    assert labels == {"single T 0.7", "ladder T 0.4 to 1.2", "attention uniform to 1.2", "both"}
    assert {f"accuracy, {name}" for name in ("majority", "tempered vote", "difficulty-aware",
            "best of n", "synthesis")} < {row["metric"] for row in rows}  # fmt: skip


def test_an_interrupted_explore_goes_on_with_the_same_command(tasks, tmp_path, capsys):
    def fault(entry: dict[str, Any]) -> None:
        solving(entry)
        if entry["n"] == 20:
            os.kill(os.getpid(), signal.SIGINT)

    own = ["explore", "--tasks", tasks, "-k", 3, "--concurrency", 2, "--retries", 0]
    with serving(lambda entry: (fault if not resumed else solving)(entry)) as (address, log):
        resumed = False
        assert call(*own, *remote(address, tmp_path / "o")) == 130
        asked = len(log.requests)
        assert "Run it again to go on" in capsys.readouterr().err and 20 < asked < 30
        resumed = True
        assert call(*own, "--timeout", 9, *remote(address, tmp_path / "o")) == 0
        assert len(log.requests) == 30
    assert f"resuming: {asked} finished samples" in capsys.readouterr().err


def test_failed_samples_are_tried_again_by_the_same_command(tasks, tmp_path, capsys):
    def fault(entry: dict[str, Any]) -> tuple[int, dict[str, str], str] | None:
        solving(entry)
        return (400, {}, "{}") if entry["n"] == 4 else None

    own = ["explore", "--tasks", tasks, "-k", 2]
    with serving(fault) as (address, log):
        assert call(*own, *remote(address, tmp_path / "o")) == 0
        assert "1 samples failed and count as wrong" in capsys.readouterr().err
        assert call(*own, *remote(address, tmp_path / "o")) == 0
        assert len(log.requests) == 5 * 2 * 2 + 1
    assert not list((tmp_path / "o").glob("*.partial.jsonl"))


def test_a_broken_line_is_named_and_the_rest_runs_when_asked(tasks, tmp_path, capsys):
    tasks.write_text(tasks.read_text() + '{"id": "half", "prompt": \n')
    with serving(solving) as (address, log):
        own = ["explore", "--tasks", tasks, "-k", 2, *remote(address, tmp_path / "o")]
        assert call(*own) == 2
        assert "tasks.jsonl, line 6: not JSON" in capsys.readouterr().err and not log.requests
        assert call(*own, "--keep-going") == 0
        assert len(log.requests) == 5 * 2 * 2
    assert "left out: " in capsys.readouterr().err
    assert record_of(tmp_path / "o", "explore").settings["broken lines"] == 1


def test_answers_that_no_checker_reads_are_counted(tasks, tmp_path):
    with serving(solving) as (address, _):
        assert call("explore", "--tasks", tasks, "-k", 2, *remote(address, tmp_path / "o")) == 0
    rows = record_of(tmp_path / "o", "explore").results["benefit"]
    unread = [row["value"] for row in rows if row["metric"] == "share of unreadable answers"]
    assert unread == [pytest.approx(3 / 5)] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --tasks FILE or --generate N, one of the two"),
        (["--generate", "3", "--kinds", "sudoku"], "no kind of task 'sudoku'"),
        (["--generate", "3", "--levels", "0"], "a level is 1 or more, got 0"),
        (["--generate", "3", "--checker", "magic"], "no checker 'magic'; there are number"),
        (["--generate", "3", "--checker", "none.py"], "none.py"),
        (["--generate", "3", "--checker", "regex:("], "regex:("),
        (["--generate", "3", "--checker", "choice"], "needs 'choices' in the task"),
        (["--generate", "3", "--ladder", "warm"], "--ladder takes two temperatures"),
        (["--generate", "3", "--ladder", "1.2,0.4"], "from cold to hot"),
        (["--generate", "3", "--temperature", "0"], "above 0 and finite, got 0"),
        (["--generate", "3", "--stop-support", "1"], "above 1, got 1"),
        (["--generate", "3", "--amplitude", "1.2"], "can't temper attention; use the engine local"),
        (["--tasks", "none.jsonl"], "none.jsonl"),
        (["--tasks", "none.jsonl", "--levels", "2"], "a file of tasks: leave out --levels"),
        (["--generate", "2", "--batch", "2"], "runs elsewhere: leave out --batch"),
    ],
)
def test_what_can_not_be_explored_is_one_line(tmp_path, capsys, arguments, words):
    with serving() as (address, log):
        assert call("explore", *arguments, *remote(address, tmp_path)) == 2
        assert not log.requests
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def completion(text: str | None, finish: str) -> str:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "m",
                       "choices": [choice], "usage": usage})  # fmt: skip


def test_replies_that_are_cut_are_told_and_the_exit_says_so(tasks, tmp_path, capsys):
    def fault(entry: dict[str, Any]) -> Any:
        return 200, {"content-type": "application/json"}, completion("", "length")

    with serving(fault) as (address, _):
        code = call("explore", "--tasks", tasks, "-k", 2, *remote(address, tmp_path / "o"))
    shown = capsys.readouterr()
    assert code == 1
    assert "10 of 10 replies have no answer and count as wrong: 10 cut; raise --tok" in shown.err
    assert "had an answer, so the comparison says nothing of the model" in shown.err
    record = record_of(tmp_path / "o", "explore")
    assert [row["cut"] for row in record.results["replies"]] == [10, 10]
    assert "raise --tokens" in record.results["warnings"][0]["warning"]
    html = next((tmp_path / "o").glob("*.html")).read_text()
    assert "10 of 10 replies have no answer" in html
    (samples,) = (tmp_path / "o").glob("*.samples.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert {(row["fate"], row["finish"]) for row in rows} == {("cut", "length")}


def test_a_ladder_under_clamp_is_told_to_be_none(tasks, tmp_path, capsys, monkeypatch):
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "models:\n- {provider: server, match: 'm', range: [0, 2], fixed: 1, date: 2026-11-29, "
        "source: 'http://x'}\n"
    )
    own = ["explore", "--tasks", tasks, "-k", 3, "--policy", "clamp", "--models", rules]
    with serving(solving) as (address, log):
        assert call(*own, *remote(address, tmp_path / "o")) == 0
    assert {body["temperature"] for body in log.bodies} == {1.0}
    words = "'ladder T 0.4 to 1.2': every sample was sent with temperature 1, so it is no ladder"
    assert words in capsys.readouterr().err
    record = record_of(tmp_path / "o", "explore")
    assert any(words in row["warning"] for row in record.results["warnings"])


def test_runs_that_end_in_one_second_keep_their_samples(tasks, tmp_path, capsys, monkeypatch):
    real = Record.new

    def held(*arguments: Any, **options: Any) -> Record:
        return replace(real(*arguments, **options), created="2026-11-29T16:00:00+00:00")

    monkeypatch.setattr(Record, "new", held)
    out = tmp_path / "o"
    with serving(solving) as (address, _):
        for seed in (1, 2, 3):
            own = ["explore", "--tasks", tasks, "-k", 2, "--seed", seed]
            assert call(*own, *remote(address, out)) == 0
    for stem, seed in [("", 1), ("-2", 2), ("-3", 3)]:
        path = out / f"explore-20261129T160000{stem}.json"
        assert Record.load(path).seed == seed
        assert path.with_suffix(".html").exists()
        rows = path.with_suffix(".samples.jsonl").read_text().splitlines()
        assert len(rows) == 5 * 2 * 2
        seeds = {json.loads(row)["seed"] for row in rows}
        assert worker_seed(seed, json.loads(rows[0])["task"], 0) in seeds


def test_what_a_user_edited_is_not_overwritten(tmp_path, capsys):
    plan, tasks = tmp_path / "plan.yaml", tmp_path / "tasks.jsonl"
    for command in (
        ["throb", "--save-plan", plan],
        ["explore", "--generate", 3, "--save-tasks", tasks],
    ):
        path = command[-1]
        assert call(*command) == 0
        assert call(*command) == 0, "the same again is no loss"
        path.write_text(path.read_text() + "\n")
        assert call(*command) == 2
        error = capsys.readouterr().err
        assert f"{path} is there already, with other contents, and is not overwritten" in error
        assert path.read_text().endswith("\n\n")
