"""`tempering tune --tokens`: what it writes, keeps, goes on with, and refuses in one line."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tempering.agents.tasks import generate_tasks, write_tasks
from tempering.reports import Record
from tests.integration.agents_command import call
from tests.integration.agents_server import serving
from tests.tiny import save_tiny_llama

# Half of what a random model writes is right: the first character's code is even or odd, as asked.
CHECKER = """
def read(output, task):
    return str(ord(output[0]) % 2)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Tasks that a random model solves now and then."""
    own = tmp_path / "even.py"
    own.write_text(CHECKER)
    rows = [
        {"id": f"t{i}", "prompt": f"{i}: layers", "answer": str(i % 2), "checker": str(own)}
        for i in range(12)
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quick(tasks: Path, out: Path, *more: object) -> list[object]:
    return ["tune", "--tasks", tasks, "--trials", 3, "-k", 3, "--max-tokens", 2, "--out", out,
            *more]  # fmt: skip


def record_of(folder: Path) -> Record:
    (path,) = folder.glob("tune-*T*.json")
    return Record.load(path)


def test_a_policy_its_record_its_report_and_its_samples_are_written(tiny, tasks, tmp_path, capsys):
    out = tmp_path / "o" / "policy.txt"
    marks = 'between(?, "layers", "Hot")'
    text = f"phases(a={marks}, answer=sampler(T=?, top_p=?))"
    assert call(*quick(tasks, out, "--tokens", text, "--model", tiny)) == 0
    shown = capsys.readouterr()
    record = record_of(out.parent)
    written = out.read_text()
    assert written.endswith("\n") and written.count("\n") == 1
    answer = record.results["learned_policy"]
    assert answer["policy"] == written.strip() and answer["against"] == "constant(1)"
    trials = record.results["trials"]
    assert [row["trial"] for row in trials] == [0, 1, 2, 3]
    # The search starts from what changes nothing.
    assert trials[1]["policy"] == text.replace("?", "1")
    assert trials[1]["score"] == trials[0]["score"], "the same numbers, the same samples"
    assert {"a T", "answer T", "answer top_p"} < set(trials[1])
    assert [row["number"] for row in record.results["numbers"]] == [
        "a T",
        "answer T",
        "answer top_p",
    ]
    assert record.settings["open policy"] == text and record.settings["complete"] is True
    assert record.versions["optuna"]
    (samples,) = out.parent.glob("*.samples.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == record.results["spent"]["samples"]
    assert {row["strategy"] for row in rows} >= {row["policy"] for row in trials}
    assert "trial 3: " in shown.err and f"policy: {out}" in shown.err
    assert "Trials" in shown.out and "searched from" in shown.out
    html = next(out.parent.glob("tune-*.html")).read_text()
    assert 'aria-label="Trials' in html
    assert not list(out.parent.glob("*.partial.jsonl"))
    # And it is of use where a policy is taken.
    code = call("explore", "--tasks", tasks, "--model", tiny, "-k", 2, "--tokens", 2, "--amplitude",
                1, "--token-policy", written.strip(), "--out", tmp_path / "e")  # fmt: skip
    assert code == 0
    (path,) = (tmp_path / "e").glob("explore-*.json")
    labels = {row["label"] for row in Record.load(path).results["benefit"]}
    assert written.strip() in labels


def test_json_is_the_record(tiny, tasks, tmp_path, capsys):
    own = quick(tasks, tmp_path / "p.txt", "--tokens", "constant(?)", "--model", tiny, "--json")
    assert call(*own) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed["results"]["learned_policy"]["policy"] == (tmp_path / "p.txt").read_text().strip()
    )


def near_half(entry: dict[str, Any]) -> None:
    """Says the answer where the temperature is near 0.5, else something else."""
    body = entry["body"]
    turn = body["messages"][-1]
    number = int(turn["content"].split(":")[0])
    near = abs(body["temperature"] - 0.5) < 0.3 or body["seed"] % 5 == 0
    turn["content"] = str(number % 2) if near else "no"


def on_server(address: str) -> list[object]:
    # The server's echo begins with "echo: ".
    return ["--engine", f"{address}/v1", "--model", "m", "--checker", r"regex:echo: (\d)$"]


def test_a_temperature_is_learned_on_a_server(tasks, tmp_path):
    out = tmp_path / "o" / "policy.txt"
    with serving(near_half) as (address, log):
        own = quick(tasks, out, "--tokens", "constant(?)", *on_server(address), "--trials", 12)
        assert call(*own) == 0
    T = float(re.fullmatch(r"constant\((.+)\)\n", out.read_text())[1])
    assert 0.2 < T < 0.8
    assert not any("vllm_xargs" in body for body in log.bodies)
    record = record_of(out.parent)
    gain = record.results["paired_differences"][-1]
    assert gain["on"] == "5 held-out tasks" and gain["low"] > 0


def test_an_interrupted_search_goes_on_with_the_same_command(tasks, tmp_path, capsys):
    def fault(entry: dict[str, Any]) -> None:
        near_half(entry)
        if entry["n"] == 40 and not resumed:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "o" / "policy.txt"
    with serving(fault) as (address, log):
        own = quick(tasks, out, "--tokens", "constant(?)", *on_server(address),
                    "--concurrency", 2, "--trials", 5)  # fmt: skip
        resumed = False
        assert call(*own) == 130
        asked = len(log.requests)
        assert "Run it again to go on" in capsys.readouterr().err
        assert not out.exists() and 40 < asked < 60
        assert record_of(out.parent).settings["complete"] is False
        for path in out.parent.glob("tune-*T*"):  # with a time: not the hash of the journal
            path.unlink()
        resumed = True
        assert call(*own, "--timeout", 9) == 0
        total = len(log.requests)
        for path in out.parent.glob("tune-*T*"):  # with a time: not the hash of the journal
            path.rename(path.with_name("first-" + path.name))
        policy = out.read_text()
        assert call(*own) == 0
        assert out.read_text() == policy, "as a search in one piece"
        assert len(log.requests) - total == total
    assert f"resuming: {asked} finished samples" in capsys.readouterr().err


def test_a_server_that_refuses_a_policy_costs_nothing(tasks, tmp_path, capsys):
    def fault(entry: dict[str, Any]) -> Any:
        said = '{"error": {"message": "the tokenizer can not write <b>"}}'
        return (400, {}, said) if "vllm_xargs" in entry["body"] else None

    with serving(fault) as (address, log):
        own = quick(tasks, tmp_path / "p.txt", *on_server(address),
                    "--tokens", 'phases(a=between(?, "<b>", "</b>"), answer=?)')  # fmt: skip
        assert call(*own) == 1
        assert len(log.requests) == 2, "whether it takes policies, and whether it takes this one"
    assert "the tokenizer can not write <b>" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "phases(thinking=1, answer=1)"], "has no ? in it"),
        (["--tokens", "constant(hot)"], "column 13"),
        (["--tokens", "suport(?)"], "did you mean support"),
        (["--tokens", "constant(1)|after(?, 2, 0.5)"], "after has none here"),
        (["--tokens", "constant(?[2,1])"], "a lower to a higher"),
        (["--tokens", "constant(1)|clip(?[0,2], ?[1,3])"], "narrow a range"),
        (["--tokens", "ladder(?, 2, n=3)"], "ladder has none here"),
        (["--tokens", "constant(?)", "--against", "ladder(1, 2, n=3)"], "without ladder"),
        (["--tokens", "constant(?)", "--against", "constant("], "column 10"),
        (["--tokens", "constant(?)", "--held-out", "0.05"], "11 to search on and 1 held out"),
        (["--tokens", "constant(?)", "--held-out", "1"], "between 0 and 1, got 1"),
        (["--tokens", "constant(?)", "--data", "x.txt"], "leave out --data"),
        (["--tokens", "constant(?)", "--chunks", "3"], "leave out --chunks"),
        (["--tokens", "constant(?)", "--resume", "--per", "head"], "leave out --per, --resume"),
        (["--tokens", "constant(?)", "--concurrency", "3"], "leave out --concurrency"),
        (["--tokens", "constant(?)", "--out", "p.json"], "a file that ends in .txt"),
        (["--tokens", "constant(?)", "--checker", "magic"], "no checker 'magic'"),
        (["--tokens", "constant(?)", "--tasks", "none.jsonl"], "none.jsonl"),
        (["--tokens", "phases(a=between(?, ids(9999), ids(3)), answer=1)"], "can't produce"),
        (["--tokens", "constant(?)", "--max-tokens", "9999"], "positions"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sampled(
    tiny, tasks, tmp_path, capsys, monkeypatch, arguments, words
):
    from tempering.engines.generating import local

    def sampled(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was sampled")

    monkeypatch.setattr(local, "generate_rows", sampled)
    monkeypatch.chdir(tmp_path)
    own = quick(tasks, tmp_path / "p.txt", "--model", tiny)
    assert call(*own, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and "Traceback" not in "".join(error)
    assert not (tmp_path / "p.txt").exists() and not list(tmp_path.glob("*.partial.jsonl"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; give a file with some text"),
        ('{"id": "a", "prompt": "b"}\n', "line 1: the field 'answer' is missing"),
        ('{"id": "a", "prompt": "b", "answer": "c"}\n', "names no checker"),
        (
            '{"id": "a", "prompt": "b", "answer": "3", "checker": "number"}\n',
            "1 to search on and 0",
        ),
    ],
)
def test_files_without_enough_tasks_are_refused(tmp_path, capsys, text, words):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    assert call("tune", "--tokens", "constant(?)", "--tasks", path, "--model", "none") == 2
    assert words in capsys.readouterr().err


def test_each_kind_of_tuning_needs_its_own_data(capsys, tmp_path):
    assert call("tune") == 2
    assert "or --tokens POLICY with --tasks FILE" in capsys.readouterr().err
    assert call("tune", "--tokens", "constant(?)") == 2
    assert "give --tasks FILE" in capsys.readouterr().err
    assert call("tune", "--data", "x.txt", "--trials", 3, "--against", "constant(1)") == 2
    assert "--data tunes attention: leave out --against, --trials" in capsys.readouterr().err


def test_the_embedded_model_learns_on_sums(tmp_path):
    """A few tokens, but the whole way: at T = 2 small sums come out wrong, and cold ones right."""
    rows = generate_tasks(6, kinds=["arithmetic"], levels=[1], seed=2)
    path, out = write_tasks(tmp_path / "sums.jsonl", rows), tmp_path / "o" / "policy.txt"
    code = call("tune", "--tokens", "constant(?)", "--tasks", path, "--against", "constant(2)",
                "--trials", 2, "-k", 2, "--max-tokens", 3, "--out", out)  # fmt: skip
    assert code == 0
    record = record_of(out.parent)
    T = float(re.fullmatch(r"constant\((.+)\)\n", out.read_text())[1])
    assert T < 2
    (gain,) = [row for row in record.results["paired_differences"] if "held" in row["on"]]
    assert gain["gain"] > 0
