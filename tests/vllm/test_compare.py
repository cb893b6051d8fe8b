"""`tempering compare --engine vllm`: the costs of the transformers engine, without the KL."""

from __future__ import annotations

import json
import math

import pytest

from tempering.cli import main
from tempering.engines.vllm.client import active_profile
from tests.tiny import TEXT
from tests.vllm.serving import KEY, serving


def compared(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as left:
        main(["compare", *arguments, "--json"])
    out = capsys.readouterr()
    assert left.value.code == 0, out.err
    return json.loads(out.out[out.out.index("{\n") :])


def test_costs_equal_those_in_process(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(TEXT)
    arguments = [
        *("--model", str(tiny[0]), "--text", "notes.txt", "--chunk", "64", "--chunks", "3"),
        *("--pattern", "linear(1.4,0.7)", "--controls"),
    ]
    own = compared(capsys, *arguments, "--engine", "vllm")
    theirs = compared(capsys, *arguments)
    assert own["model"]["fingerprint"] == theirs["model"]["fingerprint"]
    assert own["settings"]["engine"] == "vllm"
    rows = {row["label"]: row for row in theirs["results"]["cost"]}
    assert len(rows) > 4 and any(abs(row["cost"]) > 0.01 for row in rows.values())
    for row in own["results"]["cost"]:
        assert math.isclose(row["cost"], rows[row["label"]]["cost"], abs_tol=1e-4)
        assert "kl" not in row


def test_costs_of_a_running_server_equal_those_in_process(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEMPERING_SERVER_KEY", KEY)
    (tmp_path / "notes.txt").write_text(TEXT)
    arguments = [
        *("--model", str(tiny[0]), "--text", str(tmp_path / "notes.txt"), "--chunk", "64"),
        *("--chunks", "3", "--pattern", "linear(1.4,0.7)", "--out", str(tmp_path / "runs")),
    ]
    with serving(tiny[0], tmp_path) as server:
        own = compared(capsys, *arguments, "--engine", f"vllm:{server.url}/v1")
        assert active_profile(server.url, KEY) == "untempered"
    theirs = compared(capsys, *arguments)
    rows = {row["label"]: row for row in theirs["results"]["cost"]}
    assert any(abs(row["cost"]) > 0.01 for row in rows.values())
    for row in own["results"]["cost"]:
        assert math.isclose(row["cost"], rows[row["label"]]["cost"], abs_tol=1e-4)
    (replica,) = own["results"]["replicas"]
    assert replica["scored"] == 3 * 2 and replica["left because"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "4"], "--samples samples with an engine in process"),
        (["--budget", "0.1"], "--budget searches"),
        (["--read-as", "support"], "which it doesn't show"),
        (["--device", "cuda"], "--device is the engine's to choose"),
        (["--engine", "llama"], "--engine is transformers, vllm, vllm:ADDRESS or llamacpp, not"),
    ],
)
def test_what_an_engine_can_not_give(more, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["compare", "--engine", "vllm", "--pattern", "linear(1.4,0.7)", *more])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
