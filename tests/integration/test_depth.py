"""Studies of depth: what the cases are, what they cost, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tempering.attention import layout
from tempering.cli import _run
from tempering.errors import InputError, ScheduleError
from tempering.evaluation.depth import depth_cases, study_depth
from tests.integration import attention_oracle as oracle
from tests.tiny import TEXT, save_tiny_llama

LAYERS = 8
CHUNKS = oracle.tokens(1, 3, 12)


@pytest.fixture(scope="module")
def llama():
    return oracle.tiny_llama(num_hidden_layers=LAYERS)


def test_the_cases_of_a_pattern(llama):
    cases = depth_cases("linear(2,0.5)", llama, cycles=9, seed=3)
    labels = [case.label for case in cases]
    assert labels == [
        "1 cycle", "2 cycles", "3 cycles", "4 cycles",
        "4 layers, lower", "4 layers, middle", "4 layers, upper",
        "2 layers, lower", "2 layers, middle", "2 layers, upper",
    ]  # fmt: skip
    once, twice = cases[0], cases[1]
    exact = 2 + (0.5 - 2) * torch.arange(8).double() / 7
    torch.testing.assert_close(once.profile.temperature[:, 0], exact)
    assert (once.first, once.last, once.layers_a_stage) == (0, 7, 4.0)
    assert twice.layers_a_stage == 2.0
    assert float(twice.profile.temperature[3, 0]) < 1 < float(twice.profile.temperature[4, 0])
    middle = cases[5].profile.temperature[:, 0]
    torch.testing.assert_close(middle, torch.tensor([1, 1, 2, 1.5, 1, 0.5, 1, 1]).double())
    for case in cases:
        values = case.profile.temperature[:, 0]
        for control in case.controls:
            other = control.temperature[:, 0]
            assert torch.equal(values.sort().values, other.sort().values)
            outside = torch.ones(LAYERS, dtype=torch.bool)
            outside[case.first : case.last + 1] = False
            assert (other[outside] == 1).all() and (values[outside] == 1).all()
    assert any(
        not torch.equal(case.controls[0].temperature, case.profile.temperature) for case in cases
    )


def test_costs_against_the_oracle(llama):
    cases = depth_cases("linear(3,0.4)", llama, cycles=2, shuffles=2)
    study = study_depth(llama, CHUNKS, cases)

    def nll(profile):
        T = profile.temperature
        logits = oracle.forward(llama, CHUNKS, T).logits[:, :-1]
        losses = -torch.log_softmax(logits, -1).gather(2, CHUNKS[:, 1:, None])[..., 0]
        return losses.mean(1)

    base = nll(type(cases[0].profile).neutral(layout(llama)))
    for case, cost, shuffled, difference in zip(
        study.cases, study.costs, study.shuffled, study.difference, strict=True
    ):
        own, others = nll(case.profile), sum(nll(item) for item in case.controls) / 2
        assert cost.cost.value == pytest.approx(float((own - base).mean()), abs=2e-5)
        assert shuffled.value == pytest.approx(float((others - base).mean()), abs=2e-5)
        assert difference.value == pytest.approx(float((own - others).mean()), abs=2e-5)
        spread = float((own - others).std() / math.sqrt(3))
        assert difference.se == pytest.approx(spread, abs=2e-5)
    assert study.complete and study.benefits == ()


def test_equal_values_differ_by_nothing(llama):
    (case,) = depth_cases("linear(3,0.4)", llama, cycles=1)[:1]
    study = study_depth(llama, CHUNKS, [replace(case, controls=(case.profile,) * 3)])
    assert (study.difference[0].value, study.difference[0].se) == (0, 0)
    assert study.shuffled[0] == study.costs[0].cost


def test_bad_studies(llama):
    with pytest.raises(ScheduleError, match="9 stages, the model 8 layers"):
        depth_cases("steps(1,2,3,4,5,6,7,8,9)", llama)
    with pytest.raises(InputError, match="not 0 and 1"):
        depth_cases("linear(2,1)", llama, cycles=0)
    with pytest.raises(InputError, match="not 1 and 0"):
        depth_cases("linear(2,1)", llama, cycles=1, shuffles=0)
    with pytest.raises(InputError, match="at least one case"):
        study_depth(llama, CHUNKS, [])
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    with pytest.raises(InputError, match="one stack; this model has encoder, decoder, cross"):
        depth_cases("linear(2,1)", T5ForConditionalGeneration(config).eval())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def command(directory: str, tmp_path: Path, *more: object) -> int:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    arguments = ["depth", "--model", directory, "--text", path, "--out", tmp_path / "runs"]
    arguments += ["--chunk", 32, "--chunks", 3, *more]
    return _run([str(item) for item in arguments], debug=False)


def test_the_command(directory, tmp_path, capsys):
    drawn = tmp_path / "depth.svg"
    assert command(directory, tmp_path, "--cycles", 2, "--samples", 2, "--prompts", 2,
                   "--max-tokens", 3, "--figure", drawn) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "Depth, nats/token" in out and "4 layers, upper" in out
    assert "cases that differ from their shuffled values" in out
    record = json.loads(next((tmp_path / "runs").glob("depth-*.json")).read_text())
    rows = record["results"]["depth"]
    assert [row["label"] for row in rows][:2] == ["1 cycle", "2 cycles"]
    assert all(0 <= row["spread"] <= 2 for row in rows)
    assert "cycles over the whole depth" in drawn.read_text()
    page = next((tmp_path / "runs").glob("depth-*.html")).read_text()
    assert "layers that the pattern runs over" in page
    assert not list((tmp_path / "runs").glob("*.partial.jsonl"))


def test_an_interrupted_study_goes_on(directory, tmp_path, capsys, monkeypatch):
    from tempering.evaluation import cost

    plain, calls = cost.answers_under, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(cost, "answers_under", interrupted)
    assert command(directory, tmp_path, "--cycles", 1) == 130
    assert "go on" in capsys.readouterr().err
    partial = list((tmp_path / "runs").glob("*.partial.jsonl"))
    assert len(partial) == 1
    assert command(directory, tmp_path, "--cycles", 1) == 0
    assert "resuming: 13 finished pieces" in capsys.readouterr().err
    # 4 cases, as many controls and the untempered model on 3 chunks: only the missing ones,
    # and the untempered model once more where a chunk was half done.
    assert len(calls) <= 3 * 9 + 2
    # Two records of one second are told apart by a suffix, so names say nothing of their order.
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("depth-*.json")]
    (ours,) = [record["results"] for record in records if record["settings"]["complete"]]
    monkeypatch.undo()
    (tmp_path / "again").mkdir()
    assert command(directory, tmp_path / "again", "--cycles", 1) == 0
    fresh = next((tmp_path / "again" / "runs").glob("depth-*.json"))
    assert ours == json.loads(fresh.read_text())["results"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--pattern", "wave(3)"], "wave"),
        (["--pattern", "throb(9,8,7,6,5,4,3,2,1)"], "9 stages, the model 8 layers"),
        (["--amplitude", "0.5"], "amplitude"),
        (["--samples", "1"], "--samples 1"),
        (["--figure", "depth.txt"], "--figure"),
        (["--cycles", "0"], "--cycles"),
        (["--chunk", "100000"], "less than one chunk"),
    ],
)
def test_bad_options(directory, tmp_path, capsys, more, words):
    assert command(directory, tmp_path, *more) == 2
    assert words in capsys.readouterr().err
