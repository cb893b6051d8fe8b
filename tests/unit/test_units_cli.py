"""tempering activation: what it prints, draws and refuses."""

from __future__ import annotations

import json
import math

import pytest
import typer
from typer.testing import CliRunner

from tempering.cli.activation import EPILOG, activation
from tempering.errors import DataError, InputError, RefusedError, TemperatureError

app = typer.Typer()
app.command(epilog=EPILOG)(activation)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_table_of_tanh():
    out = run("gaussian", "mean", "-T", "0.5")
    assert "Gaussian x mean at T = 0.5" in out and "closed form: Tanh" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["1.0000"])
    assert row == ["1.0000", f"{math.tanh(2):.4f}", "0.0180", "0.9820"]
    assert "Information kept" in out and "robustness" in out


def test_json_holds_the_curve_and_the_report():
    found = json.loads(run("laplace", "full", "--centres=-1,0,2", "--prior", "1,2,1", "--json"))
    assert found["closed_form"] is None and found["statistic"] == "full"
    assert len(found["z"]) == len(found["responsibilities"]) == 401
    middle = found["responsibilities"][200]
    weights = [math.exp(-1), 2.0, math.exp(-2)]
    assert found["z"][200] == 0.0
    assert middle == pytest.approx([w / sum(weights) for w in weights])
    assert 0 < found["information"]["mode"] < found["information"]["full"]


def test_json_of_the_infinite_limit_is_json():
    found = json.loads(
        run("gaussian", "--temperature", "inf", "--json"), parse_constant=pytest.fail
    )
    assert found["temperature"] == "inf" and set(found["activation"]) == {0.0}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("words", [("gaussian", "mean"), ("huber", "full", "-T", "0")])
def test_plot_writes_a_file(tmp_path, suffix, words):
    path = tmp_path / f"figure{suffix}"
    run(*words, "--plot", str(path))
    head = path.read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in head
    assert list(tmp_path.iterdir()) == [path]


def test_options_of_every_kernel():
    for words in (
        ("gaussian", "--sigma", "2"),
        ("laplace", "--b", "2"),
        ("student-t", "--sigma", "2", "--nu", "1"),
        ("huber", "--delta", "0.5"),
        ("pseudo-huber", "--delta", "0.5"),
        ("logistic", "--b", "0.5"),
        ("angular", "--kappa", "3", "--m", "1.5"),
    ):
        assert f"{words[0].replace('-', '')} x mean" in run(*words).lower()


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("linear",), RefusedError, "linear is not an activation of this family"),
        (("sigmoid",), InputError, "no kernel 'sigmoid'; expected a Kernel or one of: gaussian"),
        (("gaussian", "median"), InputError, "no statistic 'median'"),
        (("mahalanobis",), InputError, "draws kernels on the line"),
        (("gaussian", "--nu", "2"), InputError, "gaussian takes no --nu; it takes --sigma"),
        (("student-t", "--b", "2"), InputError, "it takes --sigma and --nu"),
        (("gaussian", "--centres", "1,x"), InputError, "--centres 1,x: item 2 is 'x'"),
        (("gaussian", "--prior", "1,2,3"), InputError, r"the prior has shape \[3\]"),
        (
            ("gaussian", "--m", "1", "--centres", "0,1"),
            InputError,
            "--centres any number; give one",
        ),
        (("gaussian", "--span", "0"), InputError, "--span is 0; expected a positive"),
        (("gaussian", "--temperature=-1"), TemperatureError, "temperature is -1"),
        (("gaussian", "--sigma", "0"), InputError, "sigma of Gaussian must be positive"),
        (("gaussian", "--plot", "figure.doc"), DataError, "can't draw to figure.doc"),
    ],
)
def test_refusals(words, error, message):
    with pytest.raises(error, match=message):
        run(*words)


def test_help_ends_with_examples():
    out = run("--help")
    assert "tempering activation gaussian mean" in out[out.index("Examples:") :]
    assert out.index("Examples:") > out.index("--json")
