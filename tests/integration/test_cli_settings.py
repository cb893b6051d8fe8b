"""Options from variables and a file, quiet, closed streams, texts from files and standard input."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tempering.cli import _run, main

# (content of the file, variables, arguments) -> points shown
PATTERN = "constant(1)"


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TEMPERING_")]:
        if name != "TEMPERING_CACHE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("TEMPERING_CONFIG", str(tmp_path / "config.toml"))


def points(capsys: pytest.CaptureFixture[str], *more: str) -> int:
    assert _run(["patterns", PATTERN, *more], debug=False) == 0
    return len(capsys.readouterr().out.strip().splitlines()) - 1


@pytest.mark.parametrize(
    ("file", "variables", "arguments", "wanted"),
    [
        ("", {}, [], 30),
        ("[defaults]\npoints = 3", {}, [], 3),
        ("[defaults]\npoints = 3\n[patterns]\npoints = 4", {}, [], 4),
        ("[patterns]\npoints = 4", {"TEMPERING_POINTS": "5"}, [], 5),
        ("", {"TEMPERING_POINTS": "5", "TEMPERING_PATTERNS_POINTS": "6"}, [], 6),
        ("[patterns]\npoints = 4", {"TEMPERING_PATTERNS_POINTS": "6"}, ["--points", "7"], 7),
        ("[generate]\nmodel = 'x'", {"TEMPERING_MODEL": "y"}, [], 30),
    ],
)
def test_the_nearest_place_counts(
    file: str,
    variables: dict[str, str],
    arguments: list[str],
    wanted: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if file:
        (tmp_path / "config.toml").write_text(file, encoding="utf-8")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert points(capsys, *arguments) == wanted


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("points = 3", "'points' stands outside of a section; put it under [defaults]"),
        ("[patterns]\npoint = 3", "[patterns] has no option 'point'; did you mean 'points'?"),
        ("[defaults]\nmodle = 'x'", "[defaults] has no option 'modle'; did you mean 'model'?"),
        ("[patern]\npoints = 3", "there is no command 'patern'; did you mean 'patterns'?"),
        ("[profile.shw]\nlayers = 1", "there is no command 'profile shw'; did you mean"),
        ("[profile]\nshow = 1", "[profile show] holds options, not 1"),
        ("points: 3", "is not TOML"),
        ("[patterns]\npoints = 'many'", "(from [patterns] in "),
    ],
)
def test_a_file_that_no_command_would_read_is_refused(
    file: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text(file, encoding="utf-8")
    assert _run(["patterns", PATTERN], debug=False) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.strip().splitlines()) == 1


def test_a_bad_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEMPERING_POINTS", "many")
    assert _run(["patterns", PATTERN], debug=False) == 2
    assert "(from the variable TEMPERING_POINTS)" in capsys.readouterr().err
    assert points(capsys, "--points", "3") == 3


def test_a_repeated_option_takes_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEMPERING_TUNE_DATA", "a.txt 'b c.txt'")
    assert _run(["tune", "--weight", "1"], debug=False) == 2
    assert "2 --data and 1 --weight" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], ["generate"], ["profile", "show"]])
def test_help_has_two_names(
    option: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run([*command, option], debug=False) == 0
    assert "Usage: tempering" in capsys.readouterr().out


def test_summaries_are_whole_sentences_that_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert _run(["--help"], debug=False) == 0
    listed = capsys.readouterr().out.split("Commands:")[1].split("Examples:")[0]
    commands = listed.strip().splitlines()
    assert len(commands) > 15
    for line in commands:
        assert line.endswith(".") and not line.endswith("...") and len(line) <= 80, line


@pytest.mark.parametrize("text", ["-5 degrees is", "-3"])
def test_a_text_that_begins_with_a_minus_is_explained(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["generate", text], debug=False) == 2
    assert "goes behind two of them: -- '-5 degrees'" in capsys.readouterr().err


def test_a_misspelt_option_is_not_taken_for_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["patterns", "--point", "3"], debug=False) == 2
    assert "two of them" not in capsys.readouterr().err


def command(*arguments: str, shell: str = "", stdin: str | None = None) -> tuple[int, str, str]:
    """Run the command in a process of its own; shell: redirections."""
    quoted = " ".join(f"'{item}'" for item in (sys.executable, "-m", "tempering", *arguments))
    done = subprocess.run(
        f"{quoted} {shell}", shell=True, capture_output=True, text=True, input=stdin, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def test_notes_never_go_to_stdout_or_into_a_file(tmp_path: Path) -> None:
    assert command("patterns", "nonsense(1)", shell="2>&-") == (2, "", "")
    plan = tmp_path / "plan.yaml"
    assert command("throb", "--save-plan", str(plan), shell="2>&-") == (0, "", "")
    assert "plan: " not in plan.read_text(encoding="utf-8")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_defect(closed: str) -> None:
    code, _, err = command("patterns", PATTERN, "--points", "3", shell=closed)
    assert code == 0 and err == ""


def test_quiet_leaves_results_and_errors(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    assert command("throb", "--save-plan", str(plan), "--quiet") == (0, "", "")
    assert plan.exists()
    code, out, err = command("--quiet", "patterns", "nonsense(1)")
    assert code == 2 and out == "" and err.startswith("tempering: column 1")


def test_behind_two_minuses_everything_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["patterns", "--", "--quiet"])
    assert left.value.code == 2 and "column 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], 'give a prompt: tempering generate "Why is the sky blue?"'),
        (["generate", "a", "--file", "x.txt"], "give the prompt on the command line or by --file"),
        (["throb", "a", "--file", "-"], "give the task on the command line or by --file, not"),
        (["generate", "--file", "missing.txt"], "can't read missing.txt"),
    ],
)
def test_texts_that_can_t_be_had(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(arguments, debug=False) in (1, 2)
    assert message in capsys.readouterr().err


def test_an_empty_standard_input_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Empty:
        buffer = io.BytesIO(b"")

    monkeypatch.setattr(sys, "stdin", Empty)
    assert _run(["generate", "-"], debug=False) in (1, 2)
    assert "standard input is empty" in capsys.readouterr().err


def test_a_text_argument_is_read_from_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tempering.cli.shared.common import text_argument

    path = tmp_path / "task.txt"
    path.write_bytes(b"Plan a day.\r\nBy train.\r\n")
    assert text_argument(None, path, "task") == "Plan a day.\nBy train."
    assert text_argument("as it is", None, "task") == "as it is"
    assert text_argument(None, None, "task") is None

    class Piped:
        buffer = io.BytesIO("Piped, é.\n".encode())

    monkeypatch.setattr(sys, "stdin", Piped)
    assert text_argument("-", None, "task") == "Piped, é."


def test_a_shell_can_complete_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the script that --install-completion writes calls at each press of the tabulator.
    monkeypatch.setenv("_TEMPERING_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "tempering ge")
    monkeypatch.setenv("COMP_CWORD", "1")
    _, out, _ = command()
    assert out.split() == ["generate"]


def test_main_leaves_with_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as left:
        main(["patterns", "nonsense(1)"])
    assert left.value.code == 2
