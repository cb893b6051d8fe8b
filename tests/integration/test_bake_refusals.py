"""Bad input to baking: an error that names the place, nothing written, the model as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tempering.attention import Profile, tempered
from tempering.attention.baking.bake import bake, foldable
from tempering.attention.examining.layout_of import layout
from tempering.cli import _run
from tempering.engines.checkpoints.bake import bake_checkpoint
from tempering.engines.checkpoints.check import check_model
from tempering.errors import BakeError, ModelError, OutputError, ProfileError, RefusedError
from tests.integration.bake_tiny import HEADS, HYBRID, LAYERS, temperatures, tiny
from tests.integration.test_bake_checkpoint import copied, save_like_a_checkpoint

PER_HEAD = Profile.from_matrix(temperatures("per head"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A llama of two layers in several shards."""
    directory = tmp_path_factory.mktemp("source")
    save_like_a_checkpoint(tiny("llama"), directory)
    (directory / "model.safetensors").unlink()
    tiny("llama").save_pretrained(directory, max_shard_size="20KB")
    return directory


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Path:
    """Layer 0 has linear attention, so no temperature."""
    directory = tmp_path_factory.mktemp("hybrid")
    save_like_a_checkpoint(tiny("qwen3_next", HYBRID), directory)
    return directory


def state(model):
    config = model.config.to_dict()
    return config, {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before) -> bool:
    config, weights = before
    now = model.state_dict()
    return (
        model.config.to_dict() == config
        and now.keys() == weights.keys()
        and all(torch.equal(weights[name], now[name]) for name in weights)
        and not any("_tempering" in vars(module) for module in model.modules())
    )


def refused(directory: Path, profile: Profile, tmp_path: Path, error: type, match: str) -> None:
    """By the function and by the command, with the directory as it was and nothing beside it."""
    own = {path.name: path.read_bytes() for path in directory.iterdir()}
    file = profile.save(tmp_path / "profile.json")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        bake_checkpoint(directory, profile, tmp_path / "out")
    arguments = [directory, "--profile", file, "--out", tmp_path / "out"]
    assert _run(["bake", *map(str, arguments)], debug=False) == error.exit_code
    assert sorted(tmp_path.iterdir()) == before
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == own


SHAPES = [
    (Profile.from_matrix(torch.full((3, HEADS), 1.5)), "3 layers x 4 heads, the model has 2 lay"),
    (
        Profile.from_matrix(torch.full((LAYERS, 3), 1.5)),
        "2 layers x 3 heads, the model has 2 layers x 4",
    ),
    (Profile.by_module({"model.layers.1.self_attn": [1.0, 2.0]}), "4 heads, the profile has 2"),
    (Profile.by_module({"model.layers.7.self_attn": 2.0}), "no attention module 'model.layers.7"),
]


@pytest.mark.parametrize(("profile", "match"), SHAPES)
def test_the_wrong_number_of_layers_or_heads(source, profile, match, tmp_path):
    refused(source, profile, tmp_path, ProfileError, match)
    model = tiny("llama")
    before = state(model)
    with pytest.raises(ProfileError, match=match):
        bake(model, profile)
    assert unchanged(model, before)


def test_a_temperature_for_a_layer_that_has_none(hybrid, tmp_path, capsys):
    model = tiny("qwen3_next", HYBRID)
    before = state(model)
    assert layout(model).untempered == ("model.layers.0",)
    named = Profile.by_module({"model.layers.0.linear_attn": 2.0})
    match = r"model\.layers\.0\.linear_attn has no temperature: it has no softmax"
    refused(hybrid, named, tmp_path, ProfileError, match)
    assert "linear_attn has no temperature" in capsys.readouterr().err
    with pytest.raises(ProfileError, match=match):
        bake(model, named)
    with pytest.raises(ProfileError, match="layer 0 of the decoder has no softmax"):
        Profile.from_matrix(torch.full((LAYERS, HEADS), 2.0), model)
    assert unchanged(model, before)


def test_a_temperature_that_does_not_fold(hybrid, tmp_path):
    """Per head, where the heads share what scales their queries."""
    profile = Profile.by_module({"model.layers.1.self_attn": [1.0, 2.0, 1.0, 1.0]})
    match = r"layers\.1\.self_attn: q_norm.weight is shared by its heads, so it takes one"
    refused(hybrid, profile, tmp_path, BakeError, match)
    with pytest.raises(BakeError, match=match):
        check_model(hybrid, profile)
    check_model(hybrid, Profile.by_module({"model.layers.1.self_attn": 2.0}))


def test_four_bits(source, tmp_path, capsys):
    packed = copied(source, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config))
    refused(packed, PER_HEAD, tmp_path, BakeError, r"quantised \(bitsandbytes\), which can't be")
    with pytest.raises(BakeError, match=r"packed: its weights are quantised \(bitsandbytes\)"):
        check_model(packed, PER_HEAD)
    capsys.readouterr()
    assert _run(["bake", str(packed), "--check"], debug=False) == 0
    assert "does not fold: its weights are quantised (bitsandbytes)" in capsys.readouterr().out


def test_a_model_tempered_already():
    model = tiny("llama")
    before = state(model)
    match = "tempered at the moment; remove the handle"
    with tempered(model, PER_HEAD), pytest.raises(RefusedError, match=match):
        bake(model, PER_HEAD)
    assert unchanged(model, before)


def test_a_model_baked_already(source, tmp_path, capsys):
    warm = tmp_path / "warm"
    bake_checkpoint(source, PER_HEAD, warm)
    refused(warm, PER_HEAD, tmp_path, BakeError, r"baked with a temperature profile already; bake")
    assert "baked with a temperature profile already" in check_model(warm).reason
    with pytest.raises(BakeError, match="baked with a temperature profile already"):
        check_model(warm, PER_HEAD)
    model = bake(tiny("llama"), PER_HEAD)
    before = state(model)
    for act in (lambda: bake(model, PER_HEAD), lambda: tempered(model, PER_HEAD)):
        with pytest.raises(RefusedError, match="baked with a temperature profile already"):
            act()
    assert foldable(model).verdict == "no"
    assert unchanged(model, before)


def test_a_missing_shard(source, tmp_path):
    missing = copied(source, tmp_path / "missing")
    shards = sorted(missing.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    match = rf"lacks 1 of its {len(shards)} weight files, the first being {shards[1].name}"
    refused(missing, PER_HEAD, tmp_path, ModelError, match)
    with pytest.raises(ModelError, match=match):
        check_model(missing)


@pytest.mark.parametrize("kind", ["directory", "file", "link to nowhere"])
def test_an_output_that_exists(source, kind, tmp_path):
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("kept")
    else:
        out.symlink_to(tmp_path / "nowhere")
    refused(source, PER_HEAD, tmp_path, OutputError, "out exists; name a place that doesn't")
    assert kind != "file" or out.read_text() == "kept"
    assert kind != "directory" or not any(out.iterdir())


def test_a_tokenizer_that_makes_nothing_of_text(source, tmp_path, monkeypatch):
    monkeypatch.setattr("tempering.data.sample_text", lambda name: "")
    refused(source, PER_HEAD, tmp_path, ModelError, "makes no tokens of English text")
