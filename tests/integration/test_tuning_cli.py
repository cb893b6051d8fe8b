"""`tempering tune` on a tiny model: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tempering.attention.tuning as tuning
from tempering import Profile, sample_text
from tempering.attention.tuning import ConstraintError
from tempering.cli import _run
from tempering.cli.shared import tuning_runs
from tempering.evaluation.run_lock import RunLock
from tests.tiny import save_tiny_llama

# A random model has little to gain, and says so when it gains nothing.
pytestmark = pytest.mark.filterwarnings("ignore:no step lowered")

# Two Newton steps on 8 chunks of 32 tokens, as small as it gets.
QUICK = ("--chunk", 32, "--chunks", 8, "--steps", 2, "--rows", 8, "--shuffles", 1, "--elsewhere", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=3))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = sample_text("fiction")
    (folder / "a.txt").write_text(text[:4000])
    (folder / "test.txt").write_text(text[10000:12000])
    (folder / "other.txt").write_text(sample_text("code")[:4000])
    for name, start in (("qa.jsonl", 0), ("held.jsonl", 20)):
        rows = [
            {"prompt": f"The number of item {i} is", "answer": f" {i * 37 % 100}"}
            for i in range(start, start + 10)
        ]
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder


def call(*arguments: object) -> int:
    return _run([str(item) for item in arguments], debug=False)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def test_a_run_writes_profile_record_and_report(model, files, tmp_path, capsys):
    out = tmp_path / "out" / "tuned.json"
    code = call(
        *("tune", "--model", model, "--data", files / "a.txt", "--data", files / "qa.jsonl"),
        *("--weight", 1, "--weight", 2, "--constraint", files / "other.txt", "--within", 0.5),
        *("--test", files / "test.txt", "--test", files / "held.jsonl", "--out", out, *QUICK),
    )
    assert code == 0
    captured = capsys.readouterr()
    for heading in ("Cost, nats/token", "Training", "Trade-off"):
        assert heading in captured.out
    assert "step 1: loss" in captured.err and "moved: layer" in captured.err
    assert sorted(path.suffix for path in out.parent.iterdir()) == [".html", ".json", ".json"]
    profile = Profile.load(out)
    evidence = profile.evidence
    assert [goal["weight"] for goal in evidence["tuned for"]] == [1.0, 2.0]
    assert evidence["constraint"]["within"] == 0.5
    tests = {row["test"] for row in evidence["measured"]}
    assert {"test.txt", "held.jsonl", "a.txt (held out; chose the step)"} <= tests
    moved = evidence["step"] > 0
    assert ("negated" in {row["label"] for row in evidence["measured"]}) == moved
    record = json.loads(next(out.parent.glob("tune-*.json")).read_text())
    assert record["kind"] == "tune" and record["seed"] == 0
    assert record["settings"]["complete"] is True
    history = record["results"]["training"]["history"]
    assert history[0]["change"] == 0.0 and history[0]["cost"] == 0.0
    assert record["results"]["pattern"][1]["temperature"] == [r.tolist() for r in profile.rows]
    assert record["results"]["benefit"][0]["metric"] == "gain in accuracy, held.jsonl"
    assert next(out.parent.glob("*.html")).read_text().startswith("<!doctype html>")


def test_profile_show_prints_the_evidence(model, files, tmp_path, capsys):
    out = tmp_path / "tuned.json"
    quick = [x for x in QUICK if x not in ("--elsewhere", 0)]
    code = call(
        *("tune", "--model", model, "--data", files / "qa.jsonl", "--out", out, *quick),
        *("--elsewhere", 2, "--per", "layer", "--json"),
    )
    assert code == 0
    record = json.loads(capsys.readouterr().out)
    assert record["settings"]["per"] == "layer"
    assert call("profile", "show", out) == 0
    shown = capsys.readouterr().out
    for text in ("How it was found", "Loss, qa.jsonl", "Loss, play (package text)", "nats/token"):
        assert text in shown


def test_alternatives_stand_beside_it(model, files, tmp_path, capsys):
    out = tmp_path / "tuned.json"
    code = call(
        *("tune", "--model", model, "--data", files / "a.txt", "--test", files / "test.txt"),
        *("--out", out, *QUICK, "--alternatives"),
    )
    assert code == 0
    rows = [row for row in Profile.load(out).evidence["measured"] if row["test"] == "test.txt"]
    numbers = {row["label"]: row["numbers"] for row in rows if row["family"] == "alternative"}
    assert numbers == {
        "output temperature": 1,
        "uniform temperature": 1,
        "biases of q": 3 * 64,
        "LoRA rank 1 on q": 3 * 128,
    }


def _stopped_at(monkeypatch, step):
    """Ctrl-C when a step is reported."""
    say = tuning_runs.say_step

    def stop(row):
        say(row)
        if row.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning_runs, "say_step", stop)
    return say


def test_ctrl_c_keeps_the_best_and_resume_goes_on(model, files, tmp_path, capsys, monkeypatch):
    command = ("tune", "--model", model, "--data", files / "a.txt", *QUICK)
    whole, out = tmp_path / "whole" / "p.json", tmp_path / "p.json"
    assert call(*command, "--out", whole) == 0
    say = _stopped_at(monkeypatch, 1)
    assert call(*command, "--out", out) == 130
    assert "Add --resume to go on" in capsys.readouterr().err
    assert Profile.load(out).evidence["stopped because"] == "interrupted"
    assert (tmp_path / "p.json.state").exists()
    monkeypatch.setattr(tuning_runs, "say_step", say)
    assert call(*command, "--out", out, "--resume") == 0
    assert torch.equal(Profile.load(out).temperature, Profile.load(whole).temperature)
    assert not (tmp_path / "p.json.state").exists()
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_a_stopped_run_is_dropped_unless_resumed(model, files, tmp_path, capsys, monkeypatch):
    command = ("tune", "--model", model, "--data", files / "a.txt", *QUICK)
    out = tmp_path / "p.json"
    say = _stopped_at(monkeypatch, 0)
    assert call(*command, "--out", out) == 130
    monkeypatch.setattr(tuning_runs, "say_step", say)
    assert call(*command, "--out", out, "--resume", "--prior-sd", 0.1) == 2
    assert "keeps another run (another prior_sd)" in error_of(capsys)
    assert call(*command, "--out", out, "--prior-sd", 0.1) == 0
    assert "--resume goes on" in capsys.readouterr().err
    assert call(*command, "--out", tmp_path / "new.json", "--resume") == 0
    assert "starting from the beginning" in capsys.readouterr().err


def test_a_second_run_to_the_same_file_is_refused(model, files, tmp_path, capsys):
    out, state = tmp_path / "p.json", tmp_path / "p.json.state"
    state.write_bytes(b"of the other run")
    command = ("tune", "--model", model, "--data", files / "a.txt", *QUICK, "--out", out)
    with RunLock(out, "tune"):
        assert call(*command) == 2
    assert "another tune is running already (process" in error_of(capsys)
    assert state.read_bytes() == b"of the other run" and not out.exists()


def test_ctrl_c_while_measuring_keeps_the_tuned_profile(
    model, files, tmp_path, capsys, monkeypatch
):
    from tempering.cli.shared import tune_results as after

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    measure = after.measure_evidence
    monkeypatch.setattr(after, "measure_evidence", stop)
    out = tmp_path / "p.json"
    command = ("tune", "--model", model, "--data", files / "a.txt", "--out", out, *QUICK)
    command += ("--test", files / "test.txt")
    assert call(*command) == 130
    first = Profile.load(out)
    assert first.evidence["measured"] == []
    monkeypatch.setattr(after, "measure_evidence", measure)
    assert call(*command, "--resume") == 0
    second = Profile.load(out)
    assert torch.equal(first.temperature, second.temperature)
    assert any(row["test"] == "test.txt" for row in second.evidence["measured"])


def test_a_constraint_that_cannot_be_met_prints_the_trade_off(
    model, files, tmp_path, capsys, monkeypatch
):
    """The error of `tune` (tested where it arises) with a record and exit code 1."""
    run = tuning.tune

    def unmet(network, goals, *, constraint, **options):
        raise ConstraintError(run(network, goals, constraint=constraint, **options), 1e-9)

    monkeypatch.setattr(tuning, "tune", unmet)
    out = tmp_path / "p.json"
    code = call(
        *("tune", "--model", model, "--data", files / "a.txt", "--out", out, *QUICK),
        *("--constraint", files / "other.txt", "--within", 0.5),
    )
    assert code == 1 and not out.exists()
    captured = capsys.readouterr()
    assert "Trade-off" in captured.out
    assert "no temperatures within 1e-09 nats per token" in captured.err.splitlines()[-1]
    record = json.loads(next(tmp_path.glob("tune-*.json")).read_text())
    assert record["results"]["pattern"][1]["label"] == "closest, outside the constraint"


def test_refusals_are_one_line_and_come_before_the_work(model, files, tmp_path, capsys):
    short, empty = tmp_path / "short.txt", tmp_path / "empty.jsonl"
    short.write_text("Too short.")
    empty.write_text('{"prompt": "a", "answer": ""}')
    overlap = tmp_path / "overlap.txt"
    overlap.write_text((files / "a.txt").read_text()[500:2500])
    data = ("--data", files / "a.txt")
    cases = [
        (("--data", short), "short.txt: the text has", "less than one chunk of 32"),
        (("--data", empty), "line 1: the answer '' has no tokens"),
        (("--data", tmp_path / "none.txt"), "can't read"),
        ((*data, "--test", overlap), "calibration and test overlap", "overlap.txt, chunk"),
        ((*data, "--weight", 1, "--weight", 2), "1 --data and 2 --weight"),
        ((*data, "--weight", -1), "the weight of 'a.txt' is a positive number"),
        ((*data, "--bounds", "hot"), "--bounds are two numbers"),
        ((*data, "--bounds", "2,5"), "bounds on T are 0 < lowest < 1 < highest"),
        ((*data, "--per", "token"), "not per 'token'"),
        ((*data, "--method", "sgd"), "not by 'sgd'"),
        ((*data, "--held-out", 0.9), "from above 0 to 0.5 can be held out"),
        ((*data, "--constraint", files / "other.txt", "--within", 0), "positive number of nats"),
        ((*data, "--constraint", files / "other.txt", "--on", "x"), "'cost' or 'divergence'"),
        ((*data, *data), "two files of one name"),
        ((), "give --data, or one of --images"),
    ]
    for arguments, *words in cases:
        out = tmp_path / "out" / "p.json"
        assert call("tune", "--model", model, *arguments, "--out", out, *QUICK) == 2, arguments
        line = error_of(capsys)
        for word in words:
            assert word in line, (word, line)
        assert not out.exists() and not list(out.parent.glob("*"))


def test_the_profile_takes_the_place_of_no_text(tmp_path, capsys):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert call("tune", "--data", notes, "--out", notes) == 2
    assert "--out takes a file that ends in .json" in error_of(capsys)
    assert notes.read_text() == "mine"


def test_help_ends_with_examples(capsys):
    assert call("tune", "--help") == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown and "--constraint prose.txt --within 0.01" in shown
