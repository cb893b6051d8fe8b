"""tempering calibrate, from files, from a model's next tokens and from its answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tempering.cli import calibrate as command
from tempering.errors import DataError, InputError, OutputError
from tempering.reports import Record
from tests.tiny import TEXT, save_tiny_llama

app = typer.Typer(pretty_exceptions_enable=False)
app.command(epilog=command.EPILOG)(command.calibrate)


def call(*arguments):
    """What the command printed; its exception is raised."""
    result = CliRunner().invoke(app, [str(item) for item in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    z = (3 * rng.standard_normal((1200, 5))).astype(np.float32)
    y = (z / 2 + rng.gumbel(size=z.shape)).argmax(1)
    np.savez(tmp_path / "logits.npz", logits=z)
    np.save(tmp_path / "labels.npy", y)
    np.save(tmp_path / "groups.npy", np.array(["north", "south"])[np.arange(1200) % 2])
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2)


def test_a_file_of_logits(files):
    result = call(
        files / "logits.npz", "--labels", files / "labels.npy", "--report", files / "out.html"
    )
    page = (files / "out.html").read_text()
    assert page.startswith("<!doctype html>") and "<svg" in page
    record = Record.load(files / "out.json")
    assert record.kind == "calibrate"
    (row,) = record.results["temperature"]
    assert row["temperature"] == pytest.approx(2.0, rel=0.1)
    assert row["converged"] is True
    assert record.settings["rows reported on"] == 600
    assert record.settings["reported on unseen rows"] is True
    nll = record.results["reliability"]["metrics"][0]
    assert nll["metric"] == "nll"
    assert nll["difference_high"] < 0
    assert "nll" in result.stdout and "out.html" in result.stderr


def test_json_on_stdout_and_runs_repeat(files):
    options = ("--labels", files / "labels.npy", "--out", files / "runs", "--json", "--seed", 3)
    records = [json.loads(call(files / "logits.npz", *options).stdout) for _ in range(2)]
    assert records[0]["results"] == records[1]["results"]
    assert records[0]["seed"] == 3
    assert len(list((files / "runs").glob("calibrate-*.html"))) == 2


def test_groups_by_fit_and_by_report(files):
    common = ("--labels", files / "labels.npy", "--groups", files / "groups.npy", "--report")
    call(files / "logits.npz", *common, files / "a.html", "--per", "group", "--prior", 0, 1)
    rows = Record.load(files / "a.json").results["temperature"]
    assert [row["group"] for row in rows] == ["north", "south"]
    call(files / "logits.npz", *common, files / "b.html")
    results = Record.load(files / "b.json").results
    assert len(results["temperature"]) == 1
    assert {row["group"] for row in results["groups"]} == {"north", "south"}


def test_probabilities_and_a_temperature_per_input(files):
    z = np.load(files / "logits.npz")["logits"].astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    np.save(files / "p.npy", p / p.sum(1, keepdims=True))
    options = ("--labels", files / "labels.npy", "--report", files / "out.html")
    call(files / "p.npy", "--probabilities", "--per", "input", *options)
    (row,) = Record.load(files / "out.json").results["temperature"]
    assert row["temperature"] == pytest.approx(2.0, rel=0.1)
    assert "log T per sd of entropy" in row
    with pytest.raises(DataError, match="add --probabilities"):
        call(files / "p.npy", *options)


def test_everything_may_be_fitted_and_reported_on(files):
    options = ("--labels", files / "labels.npy", "--report", files / "out.html", "--fraction", 1)
    call(files / "logits.npz", *options)
    settings = Record.load(files / "out.json").settings
    assert settings["rows reported on"] == 1200
    assert settings["reported on unseen rows"] is False


def test_what_can_t_be_known_is_told_and_recorded(files):
    z = np.load(files / "logits.npz")["logits"]
    np.save(files / "easy.npy", z.argmax(1))
    result = call(
        files / "logits.npz", "--labels", files / "easy.npy", "--report", files / "out.html"
    )
    assert "note: the data are separable" in result.stderr
    (told,) = Record.load(files / "out.json").results["warnings"]
    assert "T -> 0" in told["warning"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a file of logits, --text or --choices"),
        (("logits.npz", "--text", "t.txt"), "one of the three"),
        (("logits.npz",), "needs --labels FILE"),
        (("logits.npz", "--labels", "labels.npy", "--fraction", "0"), "--fraction is above 0"),
        (("logits.npz", "--labels", "labels.npy", "--report", "out.json"), "names an HTML file"),
        (("logits.npz", "--labels", "labels.npy", "--per", "row"), "per = 'row'"),
        (("logits.npz", "--labels", "labels.npy", "--per", "group"), "--per group needs --groups"),
        (("logits.npz", "--labels", "labels.npy", "--classes", "a,b"), "expected 5 different"),
        (("--text", "t.txt", "--classes", "a,b"), "--classes, --groups and --probabilities go"),
        (("--text", "t.txt", "--labels", "labels.npy"), "go with a file of logits"),
        (("logits.npz", "--labels", "labels.npy", "--fraction", "0.0001"), "none to fit on"),
    ],
)
def test_options_that_can_t_be(arguments, message, files, monkeypatch):
    monkeypatch.chdir(files)
    with pytest.raises(InputError, match=message):
        call(*arguments)


def test_files_that_don_t_match(files):
    np.save(files / "short.npy", np.zeros(7, int))
    with pytest.raises(DataError, match="labels has 7 values for 1200 rows"):
        call(files / "logits.npz", "--labels", files / "short.npy", "--out", files)
    (files / "file").write_text("in the way")
    options = ("--labels", files / "labels.npy", "--report", files / "file" / "out.html")
    with pytest.raises(OutputError):
        call(files / "logits.npz", *options)


@pytest.mark.parametrize("row", [100, 101, 102, 103])
def test_messages_name_the_row_of_the_file_not_of_the_share(files, row):
    z, y = np.load(files / "logits.npz")["logits"], np.load(files / "labels.npy")
    options = ("--labels", files / "labels.npy", "--out", files)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    z[row, 3] = np.nan
    np.save(files / "bad.npy", z)
    with pytest.raises(DataError, match=f"NaN at row {row}, column 3"):
        call(files / "bad.npy", *options)
    z[row] = 0
    z[row, y[row]] = -np.inf
    np.save(files / "bad.npy", z)
    with pytest.raises(DataError, match=f"row {row} rules out its own label"):
        call(files / "bad.npy", *options)
    p[row] = 7
    np.save(files / "bad.npy", p)
    with pytest.raises(DataError, match=rf"row {row} of .*bad\.npy is not a distribution"):
        call(files / "bad.npy", *options, "--probabilities")
    y[row] = -1
    np.save(files / "labels.npy", y)
    with pytest.raises(DataError, match=rf"y\[{row}\] = -1 is out of range"):
        call(files / "logits.npz", *options)


def test_labels_from_one_are_told_from_all_rows(files):
    """A share of the rows that lacks the last label alone would read 1..K-1 as columns."""
    z, y = np.load(files / "logits.npz")["logits"], np.load(files / "labels.npy")
    last = np.flatnonzero(y == 4)
    keep = np.r_[np.flatnonzero(y != 4), last[:1]]  # one row of the last class, in one share only
    np.save(files / "few.npy", z[keep])
    np.save(files / "few_y.npy", y[keep] + 1)
    for seed in range(4):
        options = ("--report", files / "out.html", "--seed", seed)
        result = call(files / "few.npy", "--labels", files / "few_y.npy", *options)
        assert "label k was read as column k-1" in result.stderr.replace("\n", " ")
        (row,) = Record.load(files / "out.json").results["temperature"]
        assert row["temperature"] == pytest.approx(2.0, rel=0.2)


def test_next_tokens_of_a_text(model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--text", tmp_path / "text.txt", "--report", tmp_path / "out.html")
    # Random weights know nothing, so only a prior holds the temperature.
    result = call("--model", model, *options, "--chunk", 40, "--chunks", 8, "--prior", 0, 0.5)
    record = Record.load(tmp_path / "out.json")
    (row,) = record.results["temperature"]
    assert row["temperature"] > 1
    kinds = {r["group"] for r in record.results["groups"]}
    assert kinds == {"word start", "word continuation", "punctuation", "whitespace"}
    assert record.settings["rows reported on"] == 4 * 39
    assert record.model is not None and record.model["layers"] == 2
    assert "warnings" not in record.results
    assert "fit, pass 1" in result.stderr
    with pytest.raises(InputError, match="of 1 windows of 40 tokens leaves none"):
        call("--model", model, *options, "--chunk", 40, "--chunks", 1)


@pytest.mark.filterwarnings("ignore:.*classes never occur")
def test_answers_to_choose_from(model, tmp_path):
    words = TEXT.split()[:20]
    lines = [
        {
            "prompt": words[i],
            "choices": [" layers", " explore", " alive"][: 2 + i % 2],
            "answer": i % 2,
        }
        for i in range(20)
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    options = ("--choices", path, "--report", tmp_path / "out.html", "--prior", 0, 0.5)
    call("--model", model, *options)
    record = Record.load(tmp_path / "out.json")
    assert record.settings["rows reported on"] == 10
    assert record.results["temperature"][0]["temperature"] > 0


# What only Python knows: none of it may stand in a message of the command.
PYTHON = (
    "inputs=",
    "classes=",
    "prior=",
    "per=",
    "max_iter",
    "bound,",
    "the bounds",
    "sample_weight",
)


def broken(files, kind):
    """Arguments of a call on data with this fault."""
    z, y = np.load(files / "logits.npz")["logits"].astype(float), np.load(files / "labels.npy")
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    table, labels, options = {
        "probabilities as logits": (p, y, ()),
        "logits as probabilities": (z, y, ("--probabilities",)),
        "labels out of range": (z, y + 7, ()),
        "labels that are names": (z, np.array(list("abcde"))[y], ()),
        "one name too few": (z, np.array(list("abcdd"))[y], ()),
        "constant": (np.ones_like(z), y, ()),
        "separable": (z, z.argmax(1), ()),
        "no better than chance": (z, z.argmin(1), ()),
        "tiny unit": (z * 1e-9, y, ()),
        "a class that is never predicted": (z - 50 * np.eye(5)[4], y % 4, ("--per", "class")),
        "inputs at a bound": (z, z.argmin(1), ("--per", "input")),
        "one constant group": (z * (np.arange(1200) % 2)[:, None], y, ("--per", "group")),
        "from one": (z, y + 1, ()),
    }[kind]
    np.save(files / "z.npy", table)
    np.save(files / "y.npy", labels)
    if "group" in options:
        options = (*options, "--groups", files / "groups.npy")
    return files / "z.npy", "--labels", files / "y.npy", "--out", files / "runs", *options


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("probabilities as logits", "add --probabilities"),
        ("logits as probabilities", "leave --probabilities out"),
        ("labels out of range", "add --classes, the labels of the columns in order"),
        ("labels that are names", "add --classes"),
        ("one name too few", "add --classes"),
        ("constant", "--prior 0 0.5"),
        ("separable", "--prior 0 0.5"),
        ("no better than chance", "check that labels and columns match"),
        ("tiny unit", "multiply the logits"),
        ("a class that is never predicted", "--prior 0 0.5"),
        ("inputs at a bound", "--prior 0 0.5"),
        ("one constant group", "--prior 0 0.5"),
        ("from one", "add --classes"),
    ],
)
def test_advice_names_options_that_the_command_has(kind, advice, files):
    arguments = [str(item) for item in broken(files, kind)]
    result = CliRunner().invoke(app, arguments)
    told = result.stderr + str(result.exception or "")
    told = " ".join(told.split())
    assert advice in told
    assert not [word for word in PYTHON if word in told]
    shown = " ".join(CliRunner().invoke(app, ["--help"]).stdout.split())
    for option in {word.strip(",;:") for word in told.split() if word.startswith("--")}:
        assert option in shown


def test_a_table_of_text_with_named_columns(files):
    """The header of a CSV file names the classes; without one, --classes does."""
    z, y = np.load(files / "logits.npz")["logits"], np.load(files / "labels.npy")
    names = np.array(["dog", "cat", "eel", "ant", "bee"])
    rows = [",".join(map(repr, map(float, row))) for row in z]
    (files / "named.csv").write_text("\n".join([",".join(names), *rows]) + "\n")
    (files / "bare.csv").write_text("\n".join(rows) + "\n")
    (files / "y.csv").write_text(
        "\n".join(["id,labels", *(f"{i},{names[k]}" for i, k in enumerate(y))])
    )
    (files / "names.txt").write_text("\n".join(names) + "\n")
    options = ("--labels", files / "y.csv", "--report", files / "out.html")

    def temperature(*arguments):
        call(*arguments)
        results = Record.load(files / "out.json").results
        assert "warnings" not in results
        return results["temperature"][0]["temperature"]

    call(files / "logits.npz", "--labels", files / "labels.npy", "--report", files / "out.html")
    expected = Record.load(files / "out.json").results["temperature"][0]["temperature"]
    for arguments in (
        (files / "named.csv", *options),
        (files / "bare.csv", *options, "--classes", "dog,cat, eel,ant,bee"),
        (files / "bare.csv", *options, "--classes", files / "names.txt"),
    ):
        assert temperature(*arguments) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(DataError, match=r"y\[\d+\] = ant is not among classes"):
        call(files / "bare.csv", *options, "--classes", "dog,cat,eel,ape,bee")
    with pytest.raises(DataError, match="and 5 labels for 5 columns.*add --classes"):
        call(files / "bare.csv", *options)  # their order is not known


def test_scores_in_one_column(files):
    rng = np.random.default_rng(0)
    s = 3 * rng.standard_normal(800)
    y = (s / 2 + rng.logistic(size=800) > 0).astype(int)
    np.save(files / "s.npy", s)
    np.save(files / "p.npy", 1 / (1 + np.exp(-s))[:, None])
    np.save(files / "sy.npy", y)
    found = []
    for arguments in ((files / "s.npy",), (files / "p.npy", "--probabilities")):
        call(*arguments, "--labels", files / "sy.npy", "--report", files / "out.html")
        found.append(Record.load(files / "out.json").results["temperature"][0]["temperature"])
    assert found[0] == pytest.approx(2.0, rel=0.15)
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    with pytest.raises(DataError, match="every score of .* lies between 0 and 1.*add --probabil"):
        call(files / "p.npy", "--labels", files / "sy.npy", "--out", files)
