"""Measuring by position, and temperatures that depend on the query, from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tempering.cli import _run
from tests.tiny import TEXT, save_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def call(*arguments: object) -> int:
    return _run([str(item) for item in arguments], debug=False)


def measured(tmp_path: Path) -> dict:
    return json.loads(next(tmp_path.glob("measure-*.json")).read_text())["results"]


def test_a_profile_can_not_take_the_name_of_the_untempered_model(model, text, tmp_path, capsys):
    base = ["measure", "--model", model, "--text", text, "--out", tmp_path]
    profile = tmp_path / "untempered.json"
    assert call("profile", "rule", "log_length(8)", "--model", model, "--out", profile) == 0
    data = json.loads(profile.read_text())
    data["pattern"] = None
    profile.write_text(json.dumps(data))
    assert call(*base, "--chunk", 32, "--chunks", 1, "--profile", profile) == 2
    assert "'untempered' is the name of the model as it is; rename" in capsys.readouterr().err


def test_parts_of_the_text(model, text, tmp_path, capsys):
    base = ["measure", "--model", model, "--text", text, "--out", tmp_path]
    table = tmp_path / "heads.csv"
    assert call(*base, "--chunk", 64, "--chunks", 2, "--parts", 3, "--table", table) == 0
    out = capsys.readouterr().out
    assert "Support by layer and position, keys" in out
    assert "0-21" in out and "43-63" in out
    found = measured(tmp_path)["support"]
    assert found["positions"]["edges"] == [[0, 21], [22, 42], [43, 63]]
    quantities = found["positions"]["quantities"]
    assert {"support", "mean_energy", "saturation", "distance"} <= set(quantities)
    for name, item in quantities.items():
        assert len(item["before"]) == 2 and len(item["before"][0]) == 4, name
        assert all(len(head) == 3 for layer in item["before"] for head in layer)
    # The average over all positions lies between those of the parts.
    for layer in range(2):
        for head in range(4):
            parts = quantities["entropy"]["before"][layer][head]
            whole = found["quantities"]["entropy"]["before"][layer][head]
            assert min(parts) <= whole <= max(parts)
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["positions"] for row in rows} == {"", "0-21", "22-42", "43-63"}
    page = next(tmp_path.glob("measure-*.html")).read_text()
    assert "Distance without sink by layer and position, tokens" in page


def test_longer_than_the_training_of_a_model_that_computes_its_positions(
    model, text, tmp_path, capsys
):
    base = ["measure", "--model", model, "--text", text, "--out", tmp_path]
    assert call(*base, "--chunk", 600, "--chunks", 1) == 0
    assert (
        "--chunk 600: the model was trained to read 512 tokens at once" in capsys.readouterr().err
    )


def test_a_rule_holds_support(model, text, tmp_path, capsys):
    base = ["measure", "--model", model, "--text", text, "--out", tmp_path]
    assert call(*base, "--chunk", 64, "--chunks", 2, "--pattern", "support(4)") == 0
    error = capsys.readouterr().err
    # Queries of 2, 3 and 4 keys out of 64.
    assert "support(4): T stands at its hottest for 4.7% of the queries" in error
    results = measured(tmp_path)
    assert results["rules"] == [
        {"rule": "support(4)", "layers": 2, "queries": 2 * 2 * 4 * 64, "coldest": 0.0,
         "hottest": 3 / 64}
    ]  # fmt: skip
    last = results["support"]["positions"]["quantities"]["support"]["after"]["support(4)"]
    assert all(abs(head[-1] - 4) < 1e-3 for layer in last for head in layer)


def test_a_profile_made_from_a_rule(model, text, tmp_path, capsys):
    path = tmp_path / "held.json"
    assert call("profile", "rule", "support(4,0.5,2)", "--layers", 1, "--model", model,
                "--out", path) == 0  # fmt: skip
    assert call("profile", "show", path) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "support" not in first and second.endswith("support(4,0.5,2)")
    assert call("compare", "--model", model, "--text", text, "--chunk", 64, "--chunks", 2,
                "--profile", path, "--pattern", "log_length(16)",
                "--out", tmp_path) == 0  # fmt: skip
    record = json.loads(next(tmp_path.glob("compare-*.json")).read_text())
    costs = {row["label"]: row["cost"] for row in record["results"]["cost"]}
    assert set(costs) == {"held", "log_length(16)"}
    assert all(cost != 0 for cost in costs.values())
    assert call("generate", "Hot", "--raw", "--model", model, "--profile", path,
                "--max-tokens", 3, "--out", tmp_path) == 0  # fmt: skip
    above = tmp_path / "above.json"
    assert call("profile", "rule", "log_length(16)", "--base", path, "--model", model,
                "--out", above) == 1  # fmt: skip
    assert (
        "can't stand on a profile that has rules itself (support(4,0.5,2))"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pattern", "support(0.2)"], "at least 1"),
        (["--pattern", "support(4)", "--amplitude", "2"], "only --layers and --stack go with it"),
        (["--pattern", "support(4)", "--heads", "1"], "only --layers and --stack go with it"),
        (["--pattern", "support(4)", "--layers", "7"], "layer 7: the model has layers 0 to 1"),
    ],
)
def test_bad_rules(model, text, tmp_path, capsys, arguments, words):
    base = ["measure", "--model", model, "--text", text, "--out", tmp_path, "--chunk", 64]
    assert call(*base, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("measure-*"))


def test_a_rule_has_no_budget(model, text, tmp_path, capsys):
    assert call("compare", "--pattern", "polynomial()", "--budget", "0.01", "--model", model,
                "--out", tmp_path) == 2  # fmt: skip
    assert "a rule has none" in capsys.readouterr().err
