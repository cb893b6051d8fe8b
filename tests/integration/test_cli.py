"""The command line on a tiny model: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempering.cli import _run
from tests.tiny import TEXT, save_tiny_llama

PATTERN = "throb(12,3,1,12)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def call(command: str) -> int:
    return _run(command.split(), debug=False)


def done(command: str) -> None:
    assert call(command) == 0


def test_generate_shows_both_rows_and_writes_a_record(model, tmp_path, capsys):
    done(
        f"generate Hot --raw --model {model} --pattern {PATTERN} --amplitude 3 --max-tokens "
        f"12 --out {tmp_path}"
    )
    out = capsys.readouterr().out
    assert "--- untempered" in out and "--- throb(12,3,1,12)|amplitude(3)" in out
    record = json.loads(next(tmp_path.glob("generate-*.json")).read_text())
    samples = record["results"]["generations"]["samples"]
    assert [sample["tokens"] for sample in samples] == [12, 12]
    assert samples[0]["text"] != samples[1]["text"]
    assert next(tmp_path.glob("generate-*.html")).read_text().startswith("<!doctype html>")


def test_generate_with_a_policy_of_tokens_and_a_trace(model, tmp_path, capsys):
    from pyarrow import parquet

    trace = tmp_path / "trace.parquet"
    done(
        f"generate Hot --raw --model {model} --pattern linear(1.4,0.8) --tokens "
        f"schedule(linear(2,0),length=8) --max-tokens 8 --trace {trace} --out {tmp_path} "
        "--json"
    )
    record = json.loads(capsys.readouterr().out)
    samples = record["results"]["generations"]["samples"]
    assert [round(row["temperature"], 6) for row in samples[0]["trace"]] == pytest.approx(
        [2 * (1 - i / 7) for i in range(8)], abs=1e-6
    )
    last = samples[1]["trace"][-1]
    assert last["support"] == pytest.approx(1) and last["log_probability"] == pytest.approx(0)
    assert record["settings"]["token policy"] == "schedule(linear(2,0), length=8)"
    assert parquet.read_table(trace).num_rows == 16


def test_a_policy_alone_leaves_the_attention_untouched(model, tmp_path, capsys):
    done(
        f"generate Hot --raw --model {model} --tokens support(3) --max-tokens 4 --out "
        f"{tmp_path} --json"
    )
    (sample,) = json.loads(capsys.readouterr().out)["results"]["generations"]["samples"]
    assert [row["support"] for row in sample["trace"]] == pytest.approx([3] * 4, rel=1e-4)


def test_generate_is_reproducible_and_json_is_the_record(model, tmp_path, capsys):
    texts = []
    for _ in range(2):
        done(
            f"generate Cold --raw --model {model} --pattern linear(1.5,0.7) --max-tokens 8 "
            f"--out {tmp_path} --seed 5 --json"
        )
        record = json.loads(capsys.readouterr().out)
        texts.append([sample["text"] for sample in record["results"]["generations"]["samples"]])
    assert texts[0] == texts[1]
    assert record["seed"] == 5 and record["kind"] == "generate"


def test_measure_writes_table_and_heatmap(model, text, tmp_path, capsys):
    table, heatmap = tmp_path / "heads.csv", tmp_path / "map.svg"
    done(
        f"measure --model {model} --text {text} --chunk 64 --chunks 2 --pattern {PATTERN} "
        f"--amplitude 2 --table {table} --heatmap {heatmap} --out {tmp_path}"
    )
    assert "Support by layer" in capsys.readouterr().out
    lines = table.read_text().splitlines()
    assert any("sink_share" in line for line in lines) and len(lines) > 8 * 4 * 5
    assert "<svg" in heatmap.read_text()


def test_measure_reads_a_pattern_as_support(model, text, tmp_path, capsys):
    done(
        f"measure --model {model} --text {text} --chunk 64 --chunks 2 --pattern "
        f"throb(12,6,4,12) --read-as support --out {tmp_path} --json"
    )
    support = json.loads(capsys.readouterr().out)["results"]["support"]
    (after,) = support["after"].values()
    first, coldest = after[0], after[5]
    product = 1.0
    for value in first:
        product *= value
    assert product ** (1 / len(first)) == pytest.approx(12, rel=1e-4)
    assert sum(coldest) < sum(first)


def test_compare_prices_patterns_and_controls(model, text, tmp_path, capsys):
    done(
        f"compare --model {model} --text {text} --chunk 64 --chunks 3 --pattern "
        f"{PATTERN}|amplitude(2) --controls --samples 2 --prompts 2 --max-tokens 4 --out "
        f"{tmp_path} --json"
    )
    results = json.loads(capsys.readouterr().out)["results"]
    labels = [row["label"] for row in results["cost"]]
    assert labels[0] == "throb(12,3,1,12)|amplitude(2)"
    assert any(label.startswith("uniform") for label in labels)
    assert any(label.startswith("sampling temperature") for label in labels)
    assert all(row["n"] == 3 for row in results["cost"])
    assert {row["metric"] for row in results["benefit"]} >= {"distinct-2", "spread"}
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_compare_within_a_budget(model, text, tmp_path, capsys):
    done(
        f"compare --model {model} --text {text} --chunk 64 --chunks 2 --pattern {PATTERN} "
        f"--budget 0.05 --out {tmp_path} --json"
    )
    (row,) = json.loads(capsys.readouterr().out)["results"]["budget"]
    assert row["amplitude"] >= 1
    assert row["cost"] is None or row["cost"] <= 0.05


def test_an_interrupted_compare_goes_on(model, text, tmp_path, capsys, monkeypatch):
    from tempering.evaluation import cost

    plain = cost.answers_under
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(*arguments)

    arguments = (
        f"compare --model {model} --text {text} --chunk 64 --chunks 4 --pattern "
        f"linear(2,0.5) --out {tmp_path} --json"
    )
    monkeypatch.setattr(cost, "answers_under", interrupted)
    assert call(arguments) == 130
    partial = json.loads(capsys.readouterr().out)
    assert partial["settings"]["complete"] is False
    assert partial["results"]["cost"][0]["n"] == 2
    assert list(tmp_path.glob("compare-*.partial.jsonl"))
    calls.clear()
    monkeypatch.setattr(cost, "answers_under", lambda *a: calls.append(a) or plain(*a))
    done(arguments)
    resumed = capsys.readouterr()
    assert "resuming: 5 finished pieces" in resumed.err
    assert len(calls) == 4  # chunks 2 (its tempered run) and 3, each with its reference
    whole = json.loads(resumed.out)["results"]["cost"][0]
    done(arguments)
    assert json.loads(capsys.readouterr().out)["results"]["cost"][0] == whole
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_profile_show_and_diff(model, tmp_path, capsys):
    from tempering import Profile, load_model

    network, _ = load_model(model)
    one = Profile.from_schedule("linear(1.2,0.8)", network).save(tmp_path / "one.json")
    two = Profile.from_schedule("linear(1.2,0.9)", network).save(tmp_path / "two.json")
    done(f"profile show {one}")
    shown = capsys.readouterr().out
    assert "8 layers x 4 heads, T 0.8 to 1.2, linear(1.2,0.8)" in shown
    done(f"profile diff {one} {two}")
    assert "7 of 8 layers differ" in capsys.readouterr().out
    done(f"generate x --raw --model {model} --profile {one} --max-tokens 2 --out {tmp_path}")


def test_models_and_patterns(capsys):
    done("models")
    assert "smollm2" in capsys.readouterr().out
    done("patterns")
    assert "throb" in capsys.readouterr().out
    done(f"patterns {PATTERN} --points 10 --json")
    values = json.loads(capsys.readouterr().out)["values"]
    assert values[::3] == pytest.approx([12, 3, 1, 12])
