"""Hostile use of the command line: options unread, odd numbers, two runs at once, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tempering.cli import _run
from tempering.cli.shared import common, profiles
from tempering.errors import InputError, OutputError
from tempering.reports import Record
from tests.tiny import TEXT, save_tiny_llama

PATTERN = ("--pattern", "throb(12,3,1,12)", "--amplitude", "1.3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def call(*arguments: object) -> int:
    return _run([str(item) for item in arguments], debug=False)


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    for word in words:
        assert word in error[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", ""], ["--layers", "0-5,12"]),
        (["--layers", "5-2"], ["--layers", "backwards", "2-5"]),
        (["--layers", "0-99999999999"], ["--layers"]),
        (["--heads", "²"], ["--heads", "²"]),
        (["--heads", "99"], ["head 99", "0 to 3"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", "99999999999999999999999"], ["--seed"]),
        (["--device", "meta"], ["meta", "can't be used"]),
        (["--amplitude", "nan"], ["amplitude", "nan"]),
        (["--temperature", "nan"], ["--temperature", "nan"]),
        (["--max-tokens", "600"], ["600 new ones", "at most 512 tokens"]),
        (["--trace", "x.csv"], ["--trace", ".parquet"]),
    ],
)
def test_odd_numbers_are_refused(model, tmp_path, capsys, arguments, words):
    code = call("generate", "x", "--raw", "--model", model, "--out", tmp_path, *PATTERN, *arguments)
    assert code == 2
    one_line(capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["measure", "--amplitude", "2"], ["--amplitude needs a --pattern"]),
        (["measure", "--layers", "1"], ["--layers needs a --pattern"]),
        (["measure", "--read-as", "support"], ["--read-as needs a --pattern"]),
        (["measure", "--table", "x.xlsx"], ["--table", ".parquet or .csv"]),
        (["measure", "--heatmap", "x.gif"], ["--heatmap", ".png"]),
        (["compare", *PATTERN[:2], "--chunk", "513"], ["--chunk 513", "at most 512 tokens"]),
        (["measure", "--chunk", "1000000"], ["less than one chunk of 1000000"]),
        (["measure", "--chunk", "64", "--parts", "65"], ["--parts", "1 to 64 parts, not 65"]),
        (["measure", "--parts", "0"], ["--parts", "not 0"]),
        (["measure", "--chunk", "1"], ["at least 2 tokens"]),
        (["measure", "--chunks", "0"], ["at least one chunk"]),
        (["compare", "--profile", "p.json", "--amplitude", "2"], ["--amplitude needs a --pattern"]),
        (["compare", "--profile", "p.json", "--budget", "0.1"], ["--budget", "--pattern"]),
        (["compare", *PATTERN[:2], "--budget", "nan"], ["--budget", "nan"]),
        (["compare", *PATTERN, "--samples", "1"], ["--samples 1", "2 or more"]),
        (["patterns", PATTERN[1], "--points", "100000000000"], ["--points"]),
    ],
)
def test_options_that_would_be_unread_or_can_not_be_met(
    model, text, tmp_path, capsys, arguments, words
):
    command, *options = arguments
    own = [] if command == "patterns" else ["--model", model, "--text", text, "--out", tmp_path]
    assert call(command, *own, *options) == 2
    one_line(capsys, *words)
    assert list(tmp_path.iterdir()) == [text]


def test_options_of_patterns_are_refused_beside_a_profile() -> None:
    with pytest.raises(InputError, match="--amplitude, --read-as needs a --pattern"):
        profiles.only_patterns(amplitude=0.0, reading="support")
    profiles.only_patterns(reading="temperature")


def test_a_pattern_in_an_error_is_set_off_from_the_message(capsys):
    assert call("patterns", "throb(12;3)") == 2
    one_line(capsys, "column 9: a pattern has no place for ';': throb(12;3)")


def test_a_profile_nested_without_end(tmp_path, capsys):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    assert call("profile", "show", path) == 2
    one_line(capsys, str(path), "nested")


def test_a_prompt_that_is_not_utf8(model, tmp_path, capsys):
    prompt = os.fsdecode(b"caf\xe9")
    assert call("generate", prompt, "--model", model, "--out", tmp_path, *PATTERN) == 2
    one_line(capsys, "not UTF-8")


def test_a_nul_byte_far_into_a_text(model, tmp_path, capsys):
    path = tmp_path / "late.txt"
    path.write_bytes(TEXT.encode() * 20 + b"\x00")
    assert path.stat().st_size > 65_536
    assert call("measure", "--model", model, "--text", path, "--out", tmp_path) == 2
    one_line(capsys, "binary")


def test_runs_that_end_in_one_second_keep_their_records(tmp_path):
    found: list[Path] = []
    start = threading.Barrier(8)
    record = Record.new("measure", settings={}, results={}, seed=0)

    def reserve() -> None:
        start.wait()
        found.append(common.reserve(record, tmp_path / "new"))

    threads = [threading.Thread(target=reserve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8 and all(path.exists() for path in found)


def test_what_was_found_is_shown_where_it_can_not_be_written(
    model, text, tmp_path, capsys, monkeypatch
):

    def full(record: Record, path: Path) -> Path:
        raise OutputError(f"can't write {path}: No space left on device")

    monkeypatch.setattr(Record, "save", full)
    out = tmp_path / "out"
    own = ["--model", model, "--text", text, "--chunk", 32, "--chunks", 1, "--out", out]
    assert call("measure", *own, "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["kind"] == "measure"
    assert shown.err.strip().splitlines()[-1].endswith("No space left on device")
    assert not list(out.iterdir())


@pytest.mark.parametrize(("when", "words"), [(1, []), (5, ["what was finished is kept"])])
def test_ctrl_c_while_a_budget_is_searched(model, text, tmp_path, capsys, monkeypatch, when, words):
    from tempering.evaluation import cost

    own = ["--model", model, "--text", text, "--chunk", 32, "--chunks", 2, "--json"]
    own += ["--pattern", "linear(2,0.5)", "--budget", 0.05]
    assert call("compare", *own, "--out", tmp_path / "whole") == 0
    whole = json.loads(capsys.readouterr().out)["results"]
    plain, calls = cost.answers_under, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == when:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(cost, "answers_under", interrupted)
    assert call("compare", *own, "--out", tmp_path) == 130
    shown = capsys.readouterr()
    *before, last = shown.err.strip().splitlines()
    assert (shown.out, last) == ("", "tempering: interrupted")
    assert all(any(word in line for line in before) for word in words)
    assert call("compare", *own, "--out", tmp_path) == 0
    assert json.loads(capsys.readouterr().out)["results"] == whole
    assert not list(tmp_path.glob("*.partial.jsonl"))


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    code = "from tempering.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})},
        **options,
    )


def test_a_full_stdout_is_one_line():
    with Path("/dev/full").open("w") as full:
        process = start("models", stdout=full)
        error = process.communicate()[1]
    assert process.returncode == 1
    assert error.strip().splitlines() == [error.strip()] and "No space left" in error


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    process = start("patterns", stdout=write)
    os.close(write)
    assert process.communicate()[1] == ""
    assert process.returncode == 1


def test_a_terminal_without_the_signs_of_a_bar():
    process = start(
        "patterns", PATTERN[1], stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"}
    )
    out, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert out.startswith("throb(12,3,1,12)  ???")


@pytest.mark.slow
def test_a_killed_compare_goes_on_to_the_same_numbers(model, text, tmp_path, capsys):
    own = ["--model", model, "--text", text, "--chunk", 64, "--json", "--pattern", "linear(2,0.5)"]
    assert call("compare", *own, "--out", tmp_path / "whole") == 0
    whole = json.loads(capsys.readouterr().out)["results"]["cost"]
    out = tmp_path / "out"
    process = start("compare", *own, "--out", out, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.partial.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(out.glob("compare-*[0-9].json"))
    assert call("compare", *own, "--out", out) == 0
    shown = capsys.readouterr()
    assert "resuming" in shown.err
    assert json.loads(shown.out)["results"]["cost"] == whole
