"""`tempering throb`: what is paid for is kept, what is wrong is named."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tempering import Profile, load_model
from tempering.agents.tasks import generate_tasks, write_tasks
from tempering.reports import Record, figure_stages, render_html
from tests.integration.agents_command import call, record_of, remote, workers_of
from tests.integration.agents_server import serving
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def test_a_throb_on_a_model_in_this_process(tiny, tmp_path, capsys):
    code = call("throb", "Hot layers", "--model", tiny, "--tokens", 6, "--out", tmp_path)
    assert code == 0
    shown = capsys.readouterr()
    assert "round 1, explore: 12 of 12 workers" in shown.err
    assert [f"round 1, {name}" in shown.err for name in ("consolidate", "execute")] == [True] * 2
    record = record_of(tmp_path)
    assert [len(stage["workers"]) for stage in record.results["stages"]] == [12, 3, 1]
    assert record.settings["complete"] and record.seed == 0
    hot, cold = workers_of(record)[0], workers_of(record)[-1]
    assert hot["temperature_asked"] == hot["temperature_sent"] == 1.2
    assert hot["attention"] == "throb(12,3,1,12)|amplitude(1.2)" and "Hot layers" in hot["prompt"]
    assert cold["temperature_asked"] == cold["temperature_sent"] == 0 and cold["attention"] is None
    for row in workers_of(record):
        assert row["output"] and row["tokens_in"] > 0 and 0 < row["tokens_out"] <= 6
    # Another run with the same seed says the same.
    assert call("throb", "Hot layers", "--model", tiny, "--tokens", 6, "--out", tmp_path / "b") == 0
    assert record_of(tmp_path / "b").results == record.results
    # The tree: a line for each of the 12 notes dealt to the three, and for their three.
    lines = figure_stages(record).axes[0].collections[0].get_segments()
    assert len(lines) == 12 + 3 and len({tuple(line[0]) for line in lines}) == 15
    html = next(tmp_path.glob("*.html")).read_text()
    assert html == render_html(record) and "<svg" in html and "12 of 12" in html


def test_a_plan_is_saved_edited_and_run(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    assert call("throb", "--save-plan", plan, "--pattern", "throb(4,2,1,4)") == 0
    data = yaml.safe_load(plan.read_text())
    data["stages"][0]["width"] = 5
    data["stages"][0]["prompt"] = "Say {task}"
    data["attention"] = None
    for stage in data["stages"]:
        stage["amplitude"] = 1
    plan.write_text(yaml.safe_dump(data))
    with serving() as (address, log):
        code = call("throb", "hello", "--plan", plan, "--rounds", 2, *remote(address, tmp_path))
    assert code == 0 and len(log.requests) == 2 * (5 + 2 + 1)
    first = log.bodies[:5]
    assert {body["messages"][0]["content"] for body in first} == {"Say hello"}
    assert len({body["temperature"] for body in first}) == 5, "explorers differ in temperature"
    assert len(workers_of(record_of(tmp_path))) == 16


@pytest.mark.parametrize("command", [["throb"], ["explore", "--generate", 2, "-k", 3]])
def test_profiles_are_written_for_a_server_that_tempers_attention(tiny, tmp_path, capsys, command):
    code = call(*command, "--save-profiles", tmp_path, "--model", tiny, "--amplitude", 1.5)
    assert code == 0
    served = {}
    for line in capsys.readouterr().out.splitlines():
        option, item = shlex.split(line)
        name, path = item.rsplit("=", 1)
        assert option == "--named" and name not in served
        served[name] = Profile.load(path)
    model, _ = load_model(tiny)
    for name, profile in served.items():
        expected = Profile.from_schedule(name, model).temperature
        assert torch.equal(profile.temperature, expected)
    assert len(served) == (15 if command == ["throb"] else 2)
    # The same command again finds what it wrote; another one would overwrite it, and may not.
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert call(*command, "--save-profiles", tmp_path, "--model", tiny, "--amplitude", 1.5) == 0
    capsys.readouterr()
    assert call(*command, "--save-profiles", tmp_path, "--model", tiny, "--amplitude", 1.4) == 2
    out, error = capsys.readouterr()
    assert "001.json is there already" in error and "not overwritten" in error and not out
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert call(*command, "--save-profiles", tmp_path, "--model", tiny, "--amplitude", 1) == 2
    assert "no worker tempers attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width: 4", "width: 0", "width: expected a whole number, 1 or more, got 0"),
        ("width: 4", "wdith: 4", "unknown key 'wdith'; did you mean 'width'"),
    ],
)
def test_a_broken_plan_costs_nothing(tmp_path, capsys, old, new, message):
    plan = tmp_path / "plan.yaml"
    assert call("throb", "--save-plan", plan, "--pattern", "throb(4,2,1,4)") == 0
    plan.write_text(plan.read_text().replace(old, new, 1))
    with serving() as (address, log):
        assert call("throb", "x", "--plan", plan, *remote(address, tmp_path / "o")) == 2
        assert not log.requests
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what is to be done"),
        (["x", "--pattern", "constant(3)"], "one width, 3"),
        (["x", "--resume", "r.json"], "--resume takes the task from the record"),
        (["x", "--amplitude", "1.2"], "set amplitude: 1 in the plan, give --amplitude 1"),
        (["x", "--budget-tokens", "9"], "a budget of 9 tokens is too small"),
        (["x", "--policy", "lax"], "a policy is strict, clamp, omit; got 'lax'"),
        (["x", "--engine", "carrier-pigeon"], "neither local, openai, anthropic, gemini nor an"),
        (["x", "--engine", "openai", "--model", "zorg-9"], "no row for openai model 'zorg-9'"),
        (["x", "--engine", "gemini", "--model", "gemini-2.5-pro"], "GEMINI_API_KEY"),
        (["x", "--model", "m", "--plan", "none.yaml"], "none.yaml"),
        (
            ["x", "--plan", "p.yaml", "--tokens", "9"],
            "--plan says it all; edit it: leave out --tok",
        ),
        (["--resume", "r.json", "--seed", "1"], "leave out --seed"),
        (["x", "--batch", "9", "--dtype", "float16"], "runs elsewhere: leave out --batch, --dtype"),
        (["x", "--engine", "local", "--retries", "9"], "sends no requests: leave out --retries"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_sent(
    tmp_path, capsys, monkeypatch, arguments, words
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as (address, log):
        where = [] if "--engine" in arguments else ["--engine", f"{address}/v1"]
        assert call("throb", *where, *arguments, "--out", tmp_path) == 2
        assert not log.requests
    error = capsys.readouterr().err
    assert words in error and error.startswith("tempering: ") and "Traceback" not in error


def test_ctrl_c_keeps_what_is_done_and_resume_goes_on(tmp_path, capsys):
    def fault(entry: dict[str, Any]) -> None:
        if entry["n"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with serving(fault) as (address, log):
        code = call("throb", "x", "--concurrency", 2, *remote(address, tmp_path))
        assert code == 130
        asked = len(log.requests)
    assert "--resume RECORD goes on" in capsys.readouterr().err
    (path,) = tmp_path.glob("throb-*.json")
    first = Record.load(path)
    assert first.settings["stopped"] == "interrupted" and not first.settings["complete"]
    assert 6 <= len(workers_of(first)) == asked < 12
    with serving() as (address, log):
        text = re.sub(r"http://127.0.0.1:\d+", address, path.read_text())
        path.write_text(text)
        assert call("throb", "--resume", path, "--out", tmp_path / "b", "--concurrency", 9) == 0
        assert len(log.requests) == 12 + 3 + 1 - asked, "nothing is paid for twice"
    whole = record_of(tmp_path / "b")
    assert whole.settings["run"]["concurrency"] == 9
    assert whole.settings["complete"] and len(workers_of(whole)) == 16
    assert workers_of(whole)[: len(workers_of(first))] == workers_of(first)
    assert call("throb", "--resume", path, "--out", tmp_path / "c", "--rounds", 0) == 2


def test_a_record_goes_on_with_its_own_model_only(tiny, tmp_path, capsys):
    own = ["--model", tiny, "--pattern", "throb(2,1)", "--amplitude", 1, "--tokens", 2]
    assert call("throb", "Hot", *own, "--out", tmp_path) == 0
    (path,) = tmp_path.glob("throb-*.json")
    data = json.loads(path.read_text())
    data["model"]["fingerprint"] = "of other weights"
    path.write_text(json.dumps(data))
    assert call("throb", "--resume", path, "--out", tmp_path / "b") == 2
    assert "not the one that the record began with" in capsys.readouterr().err
    del data["settings"]["run"]
    path.write_text(json.dumps(data))
    assert call("throb", "--resume", path, "--out", tmp_path / "b") == 2
    assert "no whole record of throb" in capsys.readouterr().err


def test_a_stage_that_fails_whole_is_kept_and_resumed(tmp_path, capsys):
    def fault(entry: dict[str, Any]) -> Any:
        text = entry["body"]["messages"][-1]["content"]
        return (400, {}, '{"error": {"message": "too long"}}') if "Proposals" in text else None

    with serving(fault) as (address, _):
        assert call("throb", "x", *remote(address, tmp_path)) == 1
    assert "all 3 workers of stage 'consolidate'" in capsys.readouterr().err
    (path,) = tmp_path.glob("throb-*.json")
    record = Record.load(path)
    assert [row["error"] is None for row in workers_of(record)] == [True] * 12 + [False] * 3
    assert "<svg" in render_html(record)
    with serving() as (address, log):
        path.write_text(re.sub(r"http://127.0.0.1:\d+", address, path.read_text()))
        assert call("throb", "--resume", path, "--out", tmp_path / "b") == 0
        assert len(log.requests) == 4


@pytest.mark.parametrize("command", ["throb", "explore"])
def test_a_disk_that_fills_in_the_middle_loses_nothing_paid_for(
    tmp_path, capsys, monkeypatch, command
):
    out, rescue = tmp_path / "out", tmp_path / "rescue"
    rescue.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(rescue))
    real, calls = os.fsync, []

    def fsync(number: int) -> None:
        if str(out) in str(Path(f"/proc/self/fd/{number}").readlink()):
            calls.append(number)
            if len(calls) > 8:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    given: list[object] = ["throb", "x"]
    if command == "explore":
        given = [
            "explore",
            "--tasks",
            write_tasks(tmp_path / "t.jsonl", generate_tasks(6)),
            "-k",
            2,
        ]
    with serving(lambda entry: None) as (address, log):
        code = call(*given, "--concurrency", 2, *remote(address, out))
        paid = len(log.requests)
    shown = capsys.readouterr()
    assert code == 1 and "No space left" in shown.err
    assert 7 <= paid < 16, "nothing more is asked for once the disk is full"
    (path,) = rescue.glob(f"{command}-*.json")
    assert str(path) in shown.err
    record = Record.load(path)
    if command == "explore":
        (samples,) = rescue.glob("*.samples.jsonl")
        assert len(samples.read_text().splitlines()) == paid
    else:
        assert sum(row["error"] is None for row in workers_of(record)) == paid
        monkeypatch.setattr(os, "fsync", real)
        with serving() as (address, log):
            path.write_text(re.sub(r"http://127.0.0.1:\d+", address, path.read_text()))
            assert call("throb", "--resume", path, "--out", tmp_path / "b") == 0
            assert len(log.requests) == 16 - paid
