"""Going on under other settings: for what is missing; what is kept stays, and says how it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempering.agents.tasks import generate_tasks, write_tasks
from tempering.cli import _run
from tempering.reports import Record
from tests.integration.agents_server import Fault, serving

ROWS = """models:
  - {provider: server, match: "*", range: [0.01, 5], scale: [0.01, 1.2], date: 2026-11-29,
     source: mine}
"""


def call(*arguments: object) -> int:
    return _run([str(item) for item in arguments], debug=False)


def record_of(out: Path, kind: str = "throb") -> tuple[Path, Record]:
    (path,) = out.glob(f"{kind}-*.json")
    return path, Record.load(path)


def workers_of(record: Record) -> list[dict[str, Any]]:
    return [row for stage in record.results["stages"] for row in stage["workers"]]


def strictly_positive(entry: dict[str, Any]) -> Fault | None:
    """As text-generation-inference: no temperature of 0."""
    if entry["body"].get("temperature", 1) > 0:
        return None
    return 422, {}, '{"error": "`temperature` must be strictly positive"}'


def broken_run(address: str, out: Path) -> tuple[Path, Record]:
    """A run whose explorers are there and whose executor is refused."""
    own = ["--engine", f"{address}/v1", "--model", "m", "--pattern", "throb(3,1)", "--out", out]
    assert call("throb", "x", *own) == 1
    return record_of(out)


def test_rules_that_mend_a_run(tmp_path, capsys):
    rows = tmp_path / "rows.yaml"
    rows.write_text(ROWS)
    with serving(strictly_positive) as (address, log):
        path, first = broken_run(address, tmp_path / "a")
        assert len(log.requests) == 4
        assert call("throb", "--resume", path, "--models", rows, "--out", tmp_path / "b") == 0
        assert len(log.requests) == 5, "what is kept is not paid for twice"
    again, whole = record_of(tmp_path / "b")
    *kept, mended = workers_of(whole)
    assert kept == workers_of(first)[:3] and [row["part"] for row in kept] == [1, 1, 1]
    assert (mended["part"], mended["temperature_sent"], mended["error"]) == (2, 0.01, None)
    before, after = whole.settings["parts"]
    assert before == first.settings["parts"][0]
    assert after["rule"] == "* (2026-11-29, mine)" and before["rule"] != after["rule"]
    assert whole.settings["complete"]
    # A third part, from the second record: more rounds with the settings of the second.
    with serving() as (other, _):
        asked = ["--rounds", 2, "--engine", f"{other}/v1", "--tokens", 99, "--timeout", 7]
        assert call("throb", "--resume", again, *asked, "--out", tmp_path / "c") == 0
    _, third = record_of(tmp_path / "c")
    assert [row["part"] for row in workers_of(third)] == [1, 1, 1, 2, 3, 3, 3, 3]
    last = third.settings["parts"][2]
    assert (last["engine"], last["timeout"]) == (f"{other}/v1", 7.0)
    assert last["tokens"] == {"explore": 99, "execute": 99}
    assert workers_of(third)[:4] == workers_of(whole)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["--policy", "omit"], "policy", "omit"),
        (["--tokens", "512"], "tokens", {"explore": 512, "execute": 512}),
        (["--model", "other"], "model", "other"),
        (["--timeout", "33"], "timeout", 33.0),
        (["--retries", "1"], "retries", 1),
    ],
)
def test_each_option_that_may_mend(tmp_path, options, field, value):
    with serving(lambda entry: (400, {}, '"no"') if entry["n"] == 3 else None) as (address, log):
        path, first = broken_run(address, tmp_path / "a")
        assert call("throb", "--resume", path, *options, "--out", tmp_path / "b") == 0
        body = log.bodies[-1]
        assert len(log.requests) == 5
    _, whole = record_of(tmp_path / "b")
    assert [row["part"] for row in workers_of(whole)] == [1, 1, 1, 2]
    before, after = whole.settings["parts"]
    assert after[field] == value != before[field]
    assert {**after, field: None} == {**before, field: None}
    assert workers_of(whole)[:3] == workers_of(first)[:3]
    assert body["max_tokens"] == (512 if field == "tokens" else 128)
    assert body["model"] == (value if field == "model" else "m")


def test_the_same_settings_are_the_same_part(tmp_path):
    with serving(lambda entry: (400, {}, '"no"') if entry["n"] == 3 else None) as (address, _):
        path, _ = broken_run(address, tmp_path / "a")
        assert call("throb", "--resume", path, "--out", tmp_path / "b") == 0
    _, whole = record_of(tmp_path / "b")
    assert [row["part"] for row in workers_of(whole)] == [1, 1, 1, 1]
    assert len(whole.settings["parts"]) == 1


def test_what_a_killed_attempt_paid_counts_for_the_next(tmp_path, monkeypatch):
    with serving(strictly_positive) as (address, log):
        path, _ = broken_run(address, tmp_path / "a")
        monkeypatch.setattr("tempering.cli.shared.keeping.finish", _killed)
        two = ["--rounds", 2, "--policy", "omit", "--models", tmp_path / "rows.yaml"]
        (tmp_path / "rows.yaml").write_text(ROWS)
        with pytest.raises(SystemExit):
            call("throb", "--resume", path, *two, "--out", tmp_path / "b")
        paid = len(log.requests)
        monkeypatch.undo()
        third = ["--rounds", 2, "--policy", "clamp", "--models", tmp_path / "rows.yaml"]
        assert call("throb", "--resume", path, *third, "--out", tmp_path / "b") == 0
        assert len(log.requests) == paid == 4 + 1 + 4
    _, whole = record_of(tmp_path / "b")
    assert [row["part"] for row in workers_of(whole)] == [1, 1, 1, 2, 2, 2, 2, 2]
    assert [part["policy"] for part in whole.settings["parts"]] == ["strict", "omit", "clamp"]


def _killed(*arguments: Any) -> None:
    raise SystemExit(9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "1"], "leave out --seed"),
        (["--pattern", "throb(2,1)"], "leave out --pattern"),
        (["--batch", "3"], "runs elsewhere: leave out --batch"),
        (["--policy", "lax"], "a policy is strict, clamp, omit"),
        (["--models", "none.yaml"], "none.yaml"),
        (["--engine", "openai"], "no row for openai model 'm'"),
    ],
)
def test_what_can_not_change(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    with serving(strictly_positive) as (address, log):
        path, _ = broken_run(address, tmp_path / "a")
        capsys.readouterr()
        assert call("throb", "--resume", path, *options, "--out", tmp_path / "b") == 2
        assert len(log.requests) == 4
    assert words in capsys.readouterr().err


def test_explore_goes_on_under_other_settings(tmp_path, capsys):
    tasks = write_tasks(tmp_path / "tasks.jsonl", generate_tasks(3, seed=1))
    own = ["explore", "--tasks", tasks, "-k", 2, "--model", "m", "--concurrency", 1]
    out = ["--out", tmp_path / "o"]

    def fault(entry: dict[str, Any]) -> Fault | None:
        return (400, {}, '{"error": "too short"}') if entry["n"] >= 8 else None

    with serving(fault) as (address, log):
        assert call(*own, "--engine", f"{address}/v1", "--tokens", 4, *out) == 0
        assert len(log.requests) == 12
    assert "4 samples failed" in capsys.readouterr().err
    for path in (tmp_path / "o").glob("explore-*T*"):
        path.unlink()
    with serving() as (address, log):
        more = ["--tokens", 64, "--policy", "clamp", "--timeout", 60]
        assert call(*own, "--engine", f"{address}/v1", *more, *out) == 0
        assert len(log.requests) == 4, "only what failed is paid for"
        assert all(body["max_tokens"] <= 64 for body in log.bodies)
    shown = capsys.readouterr().err
    assert "were made under other settings" in shown
    _, record = record_of(tmp_path / "o", "explore")
    assert [part["tokens"] for part in record.settings["parts"]] == [4, 64]
    (samples,) = (tmp_path / "o").glob("*.samples.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert sorted(row["part"] for row in rows) == [1] * 8 + [2] * 4


@pytest.mark.parametrize(
    ("model", "hottest"), [("claude-haiku-4-5", 1.0), ("claude-sonnet-4-6", 1.0)]
)
def test_explore_has_a_ladder_for_every_model(tmp_path, monkeypatch, model, hottest):
    tasks = write_tasks(tmp_path / "tasks.jsonl", generate_tasks(1, seed=1))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-0123456789")
    with serving() as (address, log):
        monkeypatch.setenv("ANTHROPIC_BASE_URL", address)
        own = ["--tasks", tasks, "-k", 3, "--engine", "anthropic", "--model", model]
        assert call("explore", *own, "--out", tmp_path / "o") == 0
        sent = sorted(body["temperature"] for body in log.bodies)
    assert sent == pytest.approx([0.4, (0.4 * hottest) ** 0.5, 0.7, 0.7, 0.7, hottest])
    _, record = record_of(tmp_path / "o", "explore")
    assert record.settings["ladder"] == "0.4,1"


@pytest.mark.parametrize("command", ["throb", "explore"])
def test_the_same_command_twice_at_once(tmp_path, capsys, command):
    tasks = write_tasks(tmp_path / "tasks.jsonl", generate_tasks(2, seed=1, kinds=["arithmetic"]))
    out, codes = tmp_path / "out", []

    def start_another(entry: dict[str, Any]) -> Fault | None:
        if not codes:
            codes.append(None)
            codes[0] = call(*arguments)
        return None

    with serving(start_another) as (address, log):
        arguments: list[object] = [command, "--engine", f"{address}/v1", "--model", "m"]
        arguments += ["--out", out, "--concurrency", 1]
        if command == "throb":
            arguments += ["x", "--pattern", "throb(3,1)"]
        else:
            arguments += ["--tasks", tasks, "-k", 2, "--checker", "exact"]
        call(*arguments)
        first = len(log.requests)
    assert codes == [2], "the second is refused before it asks for anything"
    error = capsys.readouterr().err
    assert f"another {command} is running already (process " in error and "--out" in error
    assert first == (4 if command == "throb" else 2 * 2 * 2)
    # The first one's journal wasn't taken from it, and no lock stays behind.
    assert record_of(out, command)[1].settings["complete"]
    assert not [path for path in out.iterdir() if path.suffix in (".lock", ".jsonl")
                and "samples" not in path.name]  # fmt: skip
