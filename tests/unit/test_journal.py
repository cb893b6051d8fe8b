"""The journal of a run: one run at a time writes it, and the next one finds what was finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tempering.errors import InputError, OutputError
from tempering.evaluation.journal import Journal
from tempering.evaluation.run_lock import RunLock

HOLD = """
import sys, time
from tempering.evaluation.journal import Journal
journal = Journal(sys.argv[1], "cost", {})
journal.put("a", 1)
print("held", flush=True)
time.sleep(60)
"""


def test_another_run_is_refused_and_loses_nothing(tmp_path):
    first = Journal(tmp_path, "cost", {"seed": 0})
    first.put("a", [0.5])
    for _ in range(3):
        with pytest.raises(InputError) as refused:
            Journal(tmp_path, "cost", {"seed": 0})
        assert str(refused.value).startswith(
            f"another cost is running already (process {os.getpid()} on "
        )
        assert str(first.path) in str(refused.value) and "--out" in str(refused.value)
    first.put("b", [1.5])
    # Another run, with other settings, is no hindrance.
    with Journal(tmp_path, "cost", {"seed": 1}) as other:
        assert not other.entries
    first.close()
    with Journal(tmp_path, "cost", {"seed": 0}) as again:
        assert again.entries == {"a": [0.5], "b": [1.5]}
        again.finish()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout is not None and run.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"running already \(process {run.pid} on "):
            Journal(tmp_path, "cost", {})
        run.send_signal(signal.SIGKILL)
        run.wait(timeout=20)
        with Journal(tmp_path, "cost", {}) as journal:
            assert journal.entries == {"a": 1}
    finally:
        run.kill()
        run.communicate()


@pytest.mark.parametrize("text", ["", "[]", '{"process": 1}', "\xff", "null"])
def test_a_lock_that_describes_nobody_still_holds(tmp_path, text):
    kept = tmp_path / "x.jsonl"
    with RunLock(kept, "tune") as lock:
        lock.path.write_text(text, encoding="latin-1")
        with pytest.raises(InputError, match="another tune is running already, and both"):
            RunLock(kept, "tune")
    assert not lock.held and not lock.path.exists()
    lock.release()


def test_a_left_lock_file_holds_nothing(tmp_path):
    kept = tmp_path / "x.jsonl"
    kept.with_name("x.jsonl.lock").write_text('{"process": 1, "machine": "m", "since": "s"}')
    with RunLock(kept, "tune") as lock:
        assert lock.held


def test_a_place_that_takes_no_lock(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't write .*; free some space or name another place"):
        RunLock(tmp_path / "file" / "x.jsonl", "tune")


def test_two_journals_of_one_run_never_both_hold_it(tmp_path):
    """A run that opens, writes and finishes over and over meets one that does the same."""
    loop = """
import sys
from tempering.errors import InputError
from tempering.evaluation.journal import Journal
refused = 0
for turn in range(30):
    try:
        with Journal(sys.argv[1], "cost", {}) as journal:
            assert not journal.entries, journal.entries
            journal.put("a", turn)
            assert len(journal.path.read_text().splitlines()) == 1
            journal.finish()
    except InputError:
        refused += 1
print(refused)
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", loop, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for run in runs:
        _, error = run.communicate(timeout=120)
        assert run.returncode == 0, error
    assert not [path for path in Path(tmp_path).iterdir() if path.suffix != ".lock"]
