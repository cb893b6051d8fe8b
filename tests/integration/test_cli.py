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


def call(*arguments: object) -> int:
    return _run([str(item) for item in arguments], debug=False)


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert "Traceback" not in error[0]
    for word in words:
        assert word in error[0]


def test_generate_shows_both_rows_and_writes_a_record(model, tmp_path, capsys):
    code = call(
        "generate",
        "Hot layers",
        "--raw",
        "--model",
        model,
        "--pattern",
        PATTERN,
        "--amplitude",
        3,
        "--max-tokens",
        12,
        "--out",
        tmp_path,
    )
    assert code == 0
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
    code = call(
        "generate",
        "Hot",
        "--raw",
        "--model",
        model,
        "--pattern",
        "linear(1.4,0.8)",
        "--tokens",
        "schedule(linear(2,0),length=8)",
        "--max-tokens",
        8,
        "--trace",
        trace,
        "--out",
        tmp_path,
        "--json",
    )
    assert code == 0
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
    code = call(
        "generate",
        "Hot",
        "--raw",
        "--model",
        model,
        "--tokens",
        "support(3)",
        "--max-tokens",
        4,
        "--out",
        tmp_path,
        "--json",
    )
    assert code == 0
    (sample,) = json.loads(capsys.readouterr().out)["results"]["generations"]["samples"]
    assert [row["support"] for row in sample["trace"]] == pytest.approx([3] * 4, rel=1e-4)


def test_generate_is_reproducible_and_json_is_the_record(model, tmp_path, capsys):
    texts = []
    for _ in range(2):
        call(
            "generate",
            "Cold",
            "--raw",
            "--model",
            model,
            "--pattern",
            "linear(1.5,0.7)",
            "--max-tokens",
            8,
            "--out",
            tmp_path,
            "--seed",
            5,
            "--json",
        )
        record = json.loads(capsys.readouterr().out)
        texts.append([sample["text"] for sample in record["results"]["generations"]["samples"]])
    assert texts[0] == texts[1]
    assert record["seed"] == 5 and record["kind"] == "generate"


def test_measure_writes_table_and_heatmap(model, text, tmp_path, capsys):
    table, heatmap = tmp_path / "heads.csv", tmp_path / "map.svg"
    code = call(
        "measure",
        "--model",
        model,
        "--text",
        text,
        "--chunk",
        64,
        "--chunks",
        2,
        "--pattern",
        PATTERN,
        "--amplitude",
        2,
        "--table",
        table,
        "--heatmap",
        heatmap,
        "--out",
        tmp_path,
    )
    assert code == 0
    assert "Support by layer" in capsys.readouterr().out
    lines = table.read_text().splitlines()
    assert any("sink_share" in line for line in lines) and len(lines) > 8 * 4 * 5
    assert "<svg" in heatmap.read_text()


def test_measure_reads_a_pattern_as_support(model, text, tmp_path, capsys):
    code = call(
        "measure",
        "--model",
        model,
        "--text",
        text,
        "--chunk",
        64,
        "--chunks",
        2,
        "--pattern",
        "throb(12,6,4,12)",
        "--read-as",
        "support",
        "--out",
        tmp_path,
        "--json",
    )
    assert code == 0
    support = json.loads(capsys.readouterr().out)["results"]["support"]
    (after,) = support["after"].values()
    first, coldest = after[0], after[5]
    product = 1.0
    for value in first:
        product *= value
    assert product ** (1 / len(first)) == pytest.approx(12, rel=1e-4)
    assert sum(coldest) < sum(first)


def test_compare_prices_patterns_and_controls(model, text, tmp_path, capsys):
    code = call(
        "compare",
        "--model",
        model,
        "--text",
        text,
        "--chunk",
        64,
        "--chunks",
        3,
        "--pattern",
        f"{PATTERN}|amplitude(2)",
        "--controls",
        "--samples",
        2,
        "--prompts",
        2,
        "--max-tokens",
        4,
        "--out",
        tmp_path,
        "--json",
    )
    assert code == 0
    results = json.loads(capsys.readouterr().out)["results"]
    labels = [row["label"] for row in results["cost"]]
    assert labels[0] == "throb(12,3,1,12)|amplitude(2)"
    assert any(label.startswith("uniform") for label in labels)
    assert any(label.startswith("sampling temperature") for label in labels)
    assert all(row["n"] == 3 for row in results["cost"])
    assert {row["metric"] for row in results["benefit"]} >= {"distinct-2", "spread"}
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_compare_within_a_budget(model, text, tmp_path, capsys):
    code = call(
        "compare",
        "--model",
        model,
        "--text",
        text,
        "--chunk",
        64,
        "--chunks",
        2,
        "--pattern",
        PATTERN,
        "--budget",
        0.05,
        "--out",
        tmp_path,
        "--json",
    )
    assert code == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]["budget"]
    assert row["amplitude"] >= 1
    assert row["cost"] is None or row["cost"] <= 0.05


def test_an_interrupted_compare_goes_on(model, text, tmp_path, capsys, monkeypatch):
    from tempering.evaluation import cost

    plain = cost.next_token_logits
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(*arguments)

    arguments = (
        "compare",
        "--model",
        model,
        "--text",
        text,
        "--chunk",
        64,
        "--chunks",
        4,
        "--pattern",
        "linear(2,0.5)",
        "--out",
        tmp_path,
        "--json",
    )
    monkeypatch.setattr(cost, "next_token_logits", interrupted)
    assert call(*arguments) == 130
    partial = json.loads(capsys.readouterr().out)
    assert partial["settings"]["complete"] is False
    assert partial["results"]["cost"][0]["n"] == 2
    assert list(tmp_path.glob("compare-*.partial.jsonl"))
    calls.clear()
    monkeypatch.setattr(cost, "next_token_logits", lambda *a: calls.append(a) or plain(*a))
    assert call(*arguments) == 0
    resumed = capsys.readouterr()
    assert "resuming: 5 finished pieces" in resumed.err
    assert len(calls) == 4  # chunks 2 (its tempered run) and 3, each with its reference
    whole = json.loads(resumed.out)["results"]["cost"][0]
    assert call(*arguments) == 0
    assert json.loads(capsys.readouterr().out)["results"]["cost"][0] == whole
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_profile_show_and_diff(model, tmp_path, capsys):
    from tempering import Profile, load_model

    network, _ = load_model(model)
    one = Profile.from_schedule("linear(1.2,0.8)", network).save(tmp_path / "one.json")
    two = Profile.from_schedule("linear(1.2,0.9)", network).save(tmp_path / "two.json")
    assert call("profile", "show", one) == 0
    shown = capsys.readouterr().out
    assert "8 layers x 4 heads, T 0.8 to 1.2, linear(1.2,0.8)" in shown
    assert call("profile", "diff", one, two) == 0
    assert "7 of 8 layers differ" in capsys.readouterr().out
    code = call(
        "generate",
        "x",
        "--raw",
        "--model",
        model,
        "--profile",
        one,
        "--max-tokens",
        2,
        "--out",
        tmp_path,
    )
    assert code == 0


def test_models_and_patterns(capsys):
    assert call("models") == 0
    assert "smollm2" in capsys.readouterr().out
    assert call("patterns") == 0
    assert "throb" in capsys.readouterr().out
    assert call("patterns", PATTERN, "--points", 10, "--json") == 0
    values = json.loads(capsys.readouterr().out)["values"]
    assert values[::3] == pytest.approx([12, 3, 1, 12])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--pattern", "throob(12,3)"], 2, ["throob", "did you mean throb", "column 1"]),
        (["--pattern", "throb(12,3"], 2, ["column"]),
        (["--pattern", "constant(0)"], 2, ["temperature 0", "limits", "layer"]),
        (["--pattern", "constant(-1)"], 2, ["-1"]),
        (["--pattern", "linear(1,inf)"], 2, ["inf"]),
        (["--pattern", "throb(1,2,3,4,5,6,7,8,9)"], 2, ["9 stages", "8 points"]),
        (["--pattern", PATTERN, "--amplitude", "0.5"], 2, ["amplitude", "0.5"]),
        (["--pattern", PATTERN, "--layers", "0-99"], 2, ["layer", "0 to 7"]),
        (["--pattern", PATTERN, "--layers", "x"], 2, ["--layers", "0-5,12"]),
        (["--pattern", PATTERN, "--read-as", "keys"], 2, ["--read-as"]),
        (["--pattern", PATTERN, "--profile", "p.json"], 2, ["one of the two"]),
        ([], 2, ["--pattern or --profile"]),
        (["--profile", "missing.json"], 2, ["missing.json", "can't read"]),
        (["--pattern", PATTERN, "--max-tokens", "0"], 2, ["--max-tokens", "--help"]),
        (["--pattern", PATTERN, "--temperature", "-1"], 2, ["temperature", "-1"]),
        (["--pattern", PATTERN, "--dtype", "int3"], 2, ["--dtype"]),
        (["--pattern", PATTERN, "--tokens", "support("], 2, ["column"]),
        (["--tokens", "support(3)", "--temperature", "1"], 2, ["--temperature"]),
        (["--nonsense"], 2, ["--nonsense", "--help"]),
    ],
)
def test_bad_options_of_generate(model, tmp_path, capsys, arguments, code, words):
    assert call("generate", "x", "--raw", "--model", model, "--out", tmp_path, *arguments) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for word in words:
        assert word in error, error
    assert not list(tmp_path.iterdir())


def test_a_prompt_of_nothing(model, tmp_path, capsys):
    assert call("generate", " ", "--model", model, "--pattern", PATTERN, "--out", tmp_path) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_an_unknown_model(tmp_path, capsys):
    code = call("generate", "x", "--model", "smollm3", "--pattern", PATTERN, "--out", tmp_path)
    assert code == 1
    one_line(capsys, "smollm3", "smollm2")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"\x00\x01\x02", ["binary"]),
        ("caf\xe9".encode("latin1"), ["not UTF-8", "iconv"]),
        (b"too short", ["less than one chunk"]),
    ],
)
def test_bad_texts(model, tmp_path, capsys, content, words):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    out = tmp_path / "out"
    for command in ("measure", "compare"):
        extra = ["--pattern", PATTERN] if command == "compare" else []
        assert call(command, "--model", model, "--text", path, "--out", out, *extra) == 2
        one_line(capsys, *words)
    assert not list(out.iterdir())


def test_an_unwritable_output(model, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    code = call("generate", "x", "--model", model, "--pattern", PATTERN, "--out", blocked)
    assert code == 1
    one_line(capsys, "can't write")
    assert blocked.read_text() == "in the way"


def test_a_profile_of_another_model(model, tmp_path, capsys):
    from tempering import Profile, load_model

    other = save_tiny_llama(tmp_path / "other", layers=8, seed=1)
    shallow = save_tiny_llama(tmp_path / "shallow", layers=4)
    for directory, words in (
        (other, ["made for", "adopt"]),
        (shallow, ["4 layers x 4 heads", "8 layers x 4 heads"]),
    ):
        network, _ = load_model(directory)
        path = Profile.from_schedule("linear(1.2,0.8)", network).save(tmp_path / "p.json")
        out = tmp_path / "out"
        capsys.readouterr()
        code = call("generate", "x", "--model", model, "--profile", path, "--out", out)
        assert code == 2
        one_line(capsys, *words)
        assert not list(out.iterdir())


def test_debug_shows_the_traceback(tmp_path, capsys):
    arguments = ["generate", "x", "--model", "no-such", "--pattern", PATTERN, "--out", tmp_path]
    _run([str(item) for item in arguments], debug=True)
    assert "Traceback" in capsys.readouterr().err
