"""tempering bake: what it prints and writes, and one line for each refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tempering.attention import Profile, tempered
from tempering.cli import _run
from tests.tiny import save_tiny_llama

LAYERS, HEADS = 8, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def profile(tmp_path: Path) -> str:
    T = torch.linspace(0.7, 1.6, LAYERS * HEADS, dtype=torch.float64).view(LAYERS, HEADS)
    return str(Profile.from_matrix(T).save(tmp_path / "tuned.json"))


def call(*arguments: object) -> int:
    return _run([str(item) for item in arguments], debug=False)


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tempering")]
    assert len(error) == 1, error
    for word in words:
        assert word in error[0]


def test_bake_then_undo(model, profile, tmp_path, capsys):
    from tempering.engines.loading.hub import load_model

    out = tmp_path / "warm"
    assert call("bake", model, "--profile", profile, "--out", out) == 0
    text = capsys.readouterr().out
    assert f"wrote {out}: 8 layers x 4 heads folded (per head)" in text
    assert "tensors changed: 8 (float32)" in text
    own, tokenizer = load_model(model)
    warm, _ = load_model(out)
    ids = tokenizer("Hot layers explore, cold layers commit.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        with tempered(own, Profile.load(profile)):
            wanted = own(ids).logits
        assert (warm(ids).logits - wanted).abs().max() <= 1e-4 * wanted.std()
    asked = ("--raw", "--model", out, "--profile", profile, "--max-tokens", 2, "--out", tmp_path)
    assert call("generate", "Hot", *asked) == 1
    one_line(capsys, "were baked with a temperature profile already")
    assert call("bake", out, "--undo", "--out", tmp_path / "plain", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "plain"), "tensors": 8}


def test_check(model, profile, capsys):
    assert call("bake", model, "--check") == 0
    assert capsys.readouterr().out == f"{model}: folds per head\n"
    assert call("bake", model, "--check", "--profile", profile, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["reason"]) == ("per head", "")
    assert found["layers"][7] == {
        "name": "model.layers.7.self_attn",
        "verdict": "per head",
        "reason": "",
    }


def test_check_says_why_not(tmp_path, capsys):
    from tests.integration.bake_tiny import tiny
    from tests.integration.test_bake_checkpoint import save_like_a_checkpoint

    save_like_a_checkpoint(tiny("qwen3"), tmp_path / "qwen3")
    assert call("bake", tmp_path / "qwen3", "--check") == 0
    out = capsys.readouterr().out
    assert "folds per layer only: model.layers.0.self_attn: q_norm.weight is shared by its" in out
    assert "(2 layers: 2 per layer)" in out
    save_like_a_checkpoint(tiny("gemma2"), tmp_path / "gemma2")
    assert call("bake", tmp_path / "gemma2", "--check") == 0
    assert "does not fold: model.layers.0.self_attn: its logits pass a s" in capsys.readouterr().out


def test_refusals_are_one_line_and_write_nothing(model, profile, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "warm"
    assert call("bake", model) == 2
    one_line(capsys, "give tempering bake MODEL --profile FILE --out DIR")
    assert call("bake", model, "--profile", profile) == 2
    one_line(capsys, "--out DIR")
    assert call("bake", model, "--undo", "--profile", profile, "--out", out) == 2
    one_line(capsys, "--undo --out DIR")
    assert call("bake", model, "--check", "--undo") == 2
    one_line(capsys, "exclude each other")
    assert call("bake", model, "--check", "--out", out) == 2
    one_line(capsys, "--check writes nothing")
    assert call("bake", model, "--profile", profile, "--out", tmp_path / "warm.gguf") == 2
    one_line(capsys, "warm.gguf is a GGUF file")
    assert call("bake", "cold.gguf", "--profile", profile, "--out", out) == 2
    one_line(capsys, "cold.gguf is a GGUF file, so --out is a .gguf file too")
    assert call("bake", model, "--profile", profile, "--out", tmp_path) == 1
    one_line(capsys, "exists; name a place that doesn't")
    assert call("bake", model, "--undo", "--out", out) == 1
    one_line(capsys, "carries no mark of a bake")
    assert call("bake", model, "--profile", tmp_path / "none.json", "--out", out) == 2
    one_line(capsys, "none.json")
    wrong = Profile.from_matrix(torch.ones(3, 4)).save(tmp_path / "wrong.json")
    assert call("bake", model, "--profile", wrong, "--out", out) == 2
    one_line(capsys, "3 layers x 4 heads, the model has 8 layers x 4 heads")
    wrong.unlink()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.model
@pytest.mark.slow
def test_the_embedded_model(smollm2, tmp_path, capsys):
    own = smollm2[0]
    chosen = Profile.from_schedule("throb(12,3,1,12)|amplitude(1.3)", own)
    profile = chosen.save(tmp_path / "throb.json")
    assert call("bake", "smollm2", "--profile", profile, "--out", tmp_path / "warm", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tensors"] == 30 and result["verdict"] == "per head"
    assert result["deviation"] <= 1e-4


def test_the_scales_of_a_quantised_checkpoint(tmp_path, capsys):
    from tests.integration.test_bake_scales import LAYOUTS, PROFILE, quantise

    plain = save_tiny_llama(tmp_path / "plain", 2, width=128, spread=0.1)
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    quantise(plain, cold, *LAYOUTS["awq"][:2])
    tuned = str(PROFILE.save(tmp_path / "two.json"))
    asked = ("--profile", tuned, "--in-place-scales")
    assert call("bake", cold, *asked, "--out", warm) == 0
    text = capsys.readouterr().out
    assert f"wrote {warm}: 2 layers x 4 heads folded (per head)" in text
    assert "tensors changed: 2 (F16)\nrounding: at most 0.000" in text
    assert call("bake", warm, *asked, "--out", tmp_path / "twice") == 1
    one_line(capsys, "was baked with a temperature profile already")
    assert call("bake", plain, *asked, "--out", tmp_path / "none") == 1
    one_line(capsys, "isn't quantised, so it has no scales")
    assert call("bake", cold, *asked) == 2
    one_line(capsys, "give tempering bake MODEL --profile FILE --out DIR")
    assert call("bake", cold, "--profile", tuned, "--out", tmp_path / "none") == 1
    one_line(capsys, "quantised (awq)", "change their scales: --in-place-scales")
    assert call("bake", warm, "--undo", "--out", tmp_path / "back", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 2
