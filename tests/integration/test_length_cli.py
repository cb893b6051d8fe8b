"""Laws of length from the command line: learned, measured, made constant, refused."""

from __future__ import annotations

import json

import pytest

from tempering import Profile, sample_text
from tempering.attention.profiles.length_rules import Power
from tempering.cli import _run
from tests.tiny import save_tiny_llama

# A random model has little to gain, and says so when it gains nothing.
pytestmark = pytest.mark.filterwarnings("ignore:no step lowered")
TUNE = ("--steps", 1, "--rows", 8, "--shuffles", 1, "--elsewhere", 0, "--rule", "power")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.txt"
    path.write_text(sample_text("fiction")[:2500])
    return path


def call(*arguments):
    return _run([str(item) for item in arguments], debug=False)


def test_a_law_is_learned_from_mixed_lengths_and_tested_on_another(model, text, tmp_path, capsys):
    out = tmp_path / "law.json"
    arguments = ("--model", model, "--lengths", "16,48", "--held-length", 96, "--out", out)
    assert call("tune", "--data", text, *TUNE, *arguments) == 0
    profile = Profile.load(out)
    assert all(isinstance(item, Power) and len(item.slope) == 4 for item in profile.rules)
    assert profile.evidence["numbers"] == 16
    settings = profile.evidence["settings"]
    assert (settings["rule"], settings["lengths"], settings["held length"]) == (
        "power",
        [16, 48],
        96,
    )
    tests = {row["test"] for row in profile.evidence["measured"] if row["label"] == "tuned"}
    assert "a.txt, 96 tokens" in tests
    capsys.readouterr()
    assert call("profile", "show", out) == 0
    assert "power(heads(" in capsys.readouterr().out
    constant = tmp_path / "constant.json"
    assert call("profile", "constant", out, "--length", 96, "--out", constant) == 0
    assert not any(Profile.load(constant).rules)
    assert call("bake", model, "--profile", constant, "--out", tmp_path / "baked") == 0
    capsys.readouterr()
    assert call("bake", model, "--profile", out, "--out", tmp_path / "baked2") != 0
    assert "tempering profile constant FILE --length N" in " ".join(capsys.readouterr().err.split())


def test_a_law_is_measured(model, text, tmp_path, capsys):
    out = tmp_path / "law.json"
    options = ("--model", model, "--chunk", 128, "--chunks", 2, "--law", out, "--out", tmp_path)
    assert call("measure", "--text", text, *options, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    rows = record["results"]["law"]
    assert [row["layer"] for row in rows] == list(Profile.load(out).names)
    assert all(
        row["length"] == 47 and row["least"] <= row["support"] <= row["most"] for row in rows
    )
    pattern = ("--profile", out, "--model", model, "--chunk", 64, "--chunks", 1)
    assert call("measure", "--text", text, *pattern, "--out", tmp_path) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lengths", "16,x"), "--lengths are numbers of tokens"),
        (("--lengths", "16,48", "--held-length", 48), "is one of --lengths 16,48"),
        (("--lengths", "16,4000"), "one round of chunks of 16, 4000 tokens takes 8000"),
        (("--lengths", "16,48", "--held-length", 9000), "less than one chunk of the held-out"),
        (("--rule", "ssmax"), "the rules that can be learned are power; not 'ssmax'"),
    ],
)
def test_bad_lengths(model, text, tmp_path, capsys, options, words):
    out = tmp_path / "law.json"
    assert call("tune", "--data", text, *TUNE, "--model", model, *options, "--out", out) != 0
    assert words in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_questions_have_lengths_of_their_own(model, tmp_path, capsys):
    data = tmp_path / "qa.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n' * 4)
    out = tmp_path / "law.json"
    arguments = ("--model", model, "--lengths", "16,48", "--out", out)
    assert call("tune", "--data", data, *TUNE, *arguments) != 0
    assert "have lengths of their own" in " ".join(capsys.readouterr().err.split())
