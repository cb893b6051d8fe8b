"""Answers drawn to break a reader, against both commands over HTTP.

TEMPERING_FUZZ says how many; 64 without it.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempering.agents.tasks import generate_tasks, write_tasks
from tempering.cli import _run
from tempering.reports import Record
from tests.integration.agents_fuzz import Drawn, draw
from tests.integration.agents_server import Fault, serving

WIDTH = 32
RUNS = max(1, int(os.environ.get("TEMPERING_FUZZ", "64")) // WIDTH)
PROVIDERS = {"server": "m", "anthropic": "claude-haiku-4-5", "gemini": "gemini-3-flash"}


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-0123456789-abcdef")
    monkeypatch.setenv("GEMINI_API_KEY", "sk-0123456789-abcdef")
    for name in ("GOOGLE_API_KEY", "TEMPERING_SERVER_KEY"):
        monkeypatch.delenv(name, raising=False)


class Answers:
    """The same answer for every try of one call, by what tells calls apart."""

    def __init__(self, run: int, provider: str) -> None:
        self.run, self.provider = run, provider
        self.asked: Counter[str] = Counter()
        self.drawn: dict[str, tuple[str, Drawn]] = {}

    def __call__(self, entry: dict[str, Any]) -> Fault | None:
        body = entry["body"]
        if "finish" in json.dumps(body):
            return None
        own = body.get("generationConfig", body)
        key = f"{own.get('seed')}/{own['temperature']:.6f}"
        self.asked[key] += 1
        if key not in self.drawn:
            marker = f"mark{len(self.drawn)}x{self.run}"
            rng = random.Random(f"{self.run}/{self.provider}/{key}")
            self.drawn[key] = marker, draw(rng, self.provider, marker)
        found = self.drawn[key][1]
        return found.status, found.headers, found.body

    def check(self, row: dict[str, Any], temperature: float, seed: int | None) -> None:
        """A row has all that was paid for, once, or the server's reason."""
        key = f"{seed}/{temperature:.6f}"
        marker, drawn = self.drawn[key]
        where = (self.run, self.provider, drawn, row["output"], row["error"])
        if drawn.kind == "text":
            assert row["output"] is not None and marker in row["output"], where
            assert row["error"] is None and self.asked[key] == 1, where
            assert row["tokens_in"] >= 0 and row["tokens_out"] >= 0, where
        elif drawn.kind == "reason":
            assert row["output"] is None and marker in row["error"], where
        else:
            # Nothing to keep; where the row has an error, it says something.
            assert not row["output"] and row["error"] != "", where


def settle(out: Path, capsys: Any, code: int, kind: str) -> Record:
    shown = capsys.readouterr()
    # A comparison without one answer that can be read ends with an error, after all is kept.
    assert code == 0 or (code == 1 and kind == "explore"), shown.err
    assert "Traceback" not in shown.err and "defect" not in shown.err
    (path,) = out.glob(f"{kind}-*.json")
    assert next(out.glob("*.html")).read_text()
    return Record.load(path)


def call(*arguments: object) -> int:
    return _run([str(item) for item in arguments], debug=False)


@pytest.mark.parametrize("run", range(RUNS))
def test_throb(tmp_path, capsys, monkeypatch, run):
    provider = tuple(PROVIDERS)[run % 3]
    both = {"amplitude": 1.0, "tokens": 32}
    stages = [
        {"name": "explore", "width": WIDTH, "temperature": [1.0, 0.1], "prompt": "{task}", **both},
        {"name": "execute", "width": 1, "temperature": 0.0, "prompt": "finish {notes}", **both},
    ]
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"version": 1, "attention": None, "stages": stages}))
    answers = Answers(run, provider)
    with serving(answers) as (address, _):
        monkeypatch.setenv("ANTHROPIC_BASE_URL", address)
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", address)
        spec = f"{address}/v1" if provider == "server" else provider
        own = ["--engine", spec, "--model", PROVIDERS[provider], "--plan", plan, "--retries", 1]
        code = call("throb", "go", *own, "--concurrency", WIDTH, "--out", tmp_path / "o")
    record = settle(tmp_path / "o", capsys, code, "throb")
    rows = record.results["stages"][0]["workers"]
    assert len(rows) == WIDTH
    for row in rows:
        seed = None if provider == "anthropic" else row["seed"]
        answers.check(row, row["temperature_sent"], seed)


@pytest.mark.parametrize("run", range(RUNS))
def test_explore(tmp_path, capsys, run):
    tasks = write_tasks(tmp_path / "tasks.jsonl", generate_tasks(2, seed=run))
    answers = Answers(run + 10_000, "server")
    with serving(answers) as (address, _):
        own = ["--engine", f"{address}/v1", "--model", "m", "-k", 8, "--retries", 1]
        code = call(
            "explore", "--tasks", tasks, *own, "--concurrency", WIDTH, "--out", tmp_path / "o"
        )
    settle(tmp_path / "o", capsys, code, "explore")
    (samples,) = (tmp_path / "o").glob("*.samples.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == WIDTH
    for row in rows:
        # A stop text ends the output, and so may the marker; the reply is kept all the same.
        if row["output"] is not None and "mark" not in row["output"]:
            row = {**row, "output": row["output"] + answers_marker(answers, row)}
        answers.check(row, row["temperature_asked"], row["seed"])


def answers_marker(answers: Answers, row: dict[str, Any]) -> str:
    marker, drawn = answers.drawn[f"{row['seed']}/{row['temperature_asked']:.6f}"]
    text = drawn.body.decode(errors="replace")
    cut = drawn.kind == "text" and "\\n" in text.split(marker)[0]
    return marker if cut else ""
