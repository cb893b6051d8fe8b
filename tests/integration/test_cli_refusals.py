"""What the command line refuses: one line on stderr, an exit code, nothing half-written."""

from __future__ import annotations

import pytest

from tempering.cli import _run
from tests.tiny import save_tiny_llama

PATTERN = "throb(12,3,1,12)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def call(*arguments: object) -> int:
    return _run([str(item) for item in arguments], debug=False)


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert "Traceback" not in error[0]
    for word in words:
        assert word in error[0]


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
        (["--pattern", PATTERN, "--tokens", "ladder(0.5,2,n=2)"], 2, ["each of 2 samples"]),
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
