"""Checkpoints on disk: streamed, verified, marked, undone; whole or not there at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tempering.attention import Profile, tempered
from tempering.attention.baking.bake import bake
from tempering.engines.checkpoints import bake as engine
from tempering.engines.checkpoints.bake import bake_checkpoint, undo_checkpoint
from tempering.engines.checkpoints.check import check_model
from tempering.errors import BakeError, CheckError, ModelError, OutputError, ProfileError
from tests.integration.bake_tiny import tiny, tokens
from tests.tiny import save_tiny_llama

LAYERS, HEADS = 4, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A llama in four shards and more."""
    directory = save_tiny_llama(tmp_path_factory.mktemp("source"), layers=LAYERS)
    return reshard(directory, torch.float32)


def reshard(directory: Path, dtype: torch.dtype) -> Path:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(directory, max_shard_size="150KB")
    return directory


def heads_apart(seed: int = 1) -> Profile:
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(LAYERS, HEADS, generator=generator, dtype=torch.float64)
    return Profile.from_matrix(torch.exp((share * 2 - 1) * 1.1))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def nothing_left(place: Path) -> bool:
    return not any(place.iterdir())


def test_shards_and_what_lies_beside_them(source, tmp_path):
    lines = []
    profile = heads_apart()
    result = bake_checkpoint(source, profile, tmp_path / "warm", say=lines.append)
    assert (result.verdict, result.tensors, result.dtype) == ("per head", LAYERS, "float32")
    assert result.deviation == result.stored <= 1e-4
    assert len(lines) == 5
    own, baked = tensors_of(source), tensors_of(tmp_path / "warm")
    assert own.keys() == baked.keys()
    changed = {name for name in own if not torch.equal(own[name], baked[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(LAYERS)}
    for index in range(LAYERS):
        name = f"model.layers.{index}.self_attn.q_proj.weight"
        beta = profile.temperature[index].reciprocal().repeat_interleave(16)[:, None]
        assert torch.allclose(baked[name].double(), own[name].double() * beta, rtol=2e-7, atol=0)
    names = {path.name for path in source.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) >= 4
    assert {path.name for path in (tmp_path / "warm").iterdir()} == names | {"README.md"}
    index = "model.safetensors.index.json"
    assert (source / index).read_bytes() == (tmp_path / "warm" / index).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(source)
    warm = AutoModelForCausalLM.from_pretrained(tmp_path / "warm")
    ids = tokens(7)
    with torch.no_grad(), tempered(model, profile):
        wanted = model(ids).logits
    with torch.no_grad():
        assert (warm(ids).logits - wanted).abs().max() <= 1e-4 * wanted.std()
    card = (tmp_path / "warm" / "README.md").read_text(encoding="utf-8")
    assert "model.layers.3.self_attn" in card
    assert f"{float(profile.temperature[2, 1]):.4g}" in card
    assert "--undo" in card
    assert str(source) not in card


def test_undo_gives_the_original_back(source, tmp_path):
    bake_checkpoint(source, heads_apart(), tmp_path / "warm")
    assert undo_checkpoint(tmp_path / "warm", tmp_path / "plain") == LAYERS
    own, undone = tensors_of(source), tensors_of(tmp_path / "plain")
    for name, tensor in own.items():
        exact = torch.equal(tensor, undone[name])
        assert exact or torch.allclose(tensor, undone[name], rtol=2e-7, atol=0)
        assert exact or "q_proj" in name
    config = json.loads((tmp_path / "plain" / "config.json").read_bytes())
    assert config == json.loads((source / "config.json").read_bytes())
    with pytest.raises(BakeError, match="plain carries no mark of a bake"):
        undo_checkpoint(tmp_path / "plain", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_half_precision_is_rounded_once(dtype, bits, tmp_path):
    directory = reshard(save_tiny_llama(tmp_path / "source", layers=LAYERS), dtype)
    profile = heads_apart()
    result = bake_checkpoint(directory, profile, tmp_path / "warm")
    assert result.dtype == str(dtype).removeprefix("torch.")
    assert result.deviation <= 1e-4 < result.stored
    own, baked = tensors_of(directory), tensors_of(tmp_path / "warm")
    name = "model.layers.1.self_attn.q_proj.weight"
    beta = profile.temperature[1].reciprocal().repeat_interleave(16)[:, None]
    exact = own[name].double() * beta
    assert baked[name].dtype == dtype
    half_ulp = 2.0**-bits * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert bool(((baked[name].double() - exact).abs() <= 1.001 * half_ulp).all())
    undo_checkpoint(tmp_path / "warm", tmp_path / "plain")
    again = tensors_of(tmp_path / "plain")[name].double()
    assert bool(((again - own[name].double()).abs() <= 6 * half_ulp / beta).all())


def test_a_temperature_that_half_precision_can_not_hold(tmp_path):
    """At T = 1000 most of float16's queries would fall below its normal numbers."""
    directory = save_tiny_llama(tmp_path / "source", layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(1e-2)
    model.save_pretrained(directory)
    reshard(directory, torch.float16)
    hot = Profile.from_matrix(torch.full((LAYERS, HEADS), 1e3))
    with pytest.raises(BakeError, match=r"q_proj.weight would lose .* float16 .* float32, then"):
        bake_checkpoint(directory, hot, tmp_path / "warm")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_norm_weights_that_add_1(tmp_path):
    model = tiny("gemma3_text")
    save_like_a_checkpoint(model, tmp_path / "source")
    profile = Profile.from_matrix(torch.tensor([[0.5] * 4, [2.5] * 4]))
    result = bake_checkpoint(tmp_path / "source", profile, tmp_path / "warm")
    assert result.verdict == "per layer"
    name = "model.layers.1.self_attn.q_norm.weight"
    own, baked = tensors_of(tmp_path / "source")[name], tensors_of(tmp_path / "warm")[name]
    assert torch.allclose(1 + baked, (1 + own) / 2.5, rtol=1e-6, atol=0)
    undo_checkpoint(tmp_path / "warm", tmp_path / "plain")
    assert torch.allclose(tensors_of(tmp_path / "plain")[name], own, rtol=0, atol=1e-6)


def save_like_a_checkpoint(model, directory: Path) -> None:
    """With a tokenizer whose ids the model knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w2").save_pretrained(directory)


def test_files_with_other_names_and_layouts(tmp_path):
    """GPT-2's published files lack the prefix; others keep q apart, fused, or transposed."""
    model = tiny("gpt2")
    profile = Profile.from_matrix(torch.tensor([[0.5, 1.5, 2.0, 0.8], [1.2, 0.9, 0.7, 3.0]]))
    save_like_a_checkpoint(model, tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    stored = {name.removeprefix("transformer."): item for name, item in load_file(path).items()}
    save_file(stored, path, metadata={"format": "pt"})
    bake_checkpoint(tmp_path / "source", profile, tmp_path / "warm")
    baked = load_file(tmp_path / "warm" / "model.safetensors")
    expected = bake(model, profile).state_dict()
    for name in ("h.1.attn.c_attn.weight", "h.0.attn.c_attn.bias"):
        assert not torch.equal(baked[name], stored[name])
        assert torch.equal(baked[name], expected["transformer." + name])


def test_a_wrong_result_gets_no_name(source, tmp_path, monkeypatch):
    profile = heads_apart()
    right = engine.Checkpoint.write

    def wrong(self, target, folds):
        right(self, target, dict(list(folds.items())[1:]))

    monkeypatch.setattr(engine.Checkpoint, "write", wrong)
    with pytest.raises(CheckError, match="loaded back disagrees"):
        bake_checkpoint(source, profile, tmp_path / "warm")
    assert nothing_left(tmp_path)


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    def full(self, target, folds):
        (target / "half").write_text("written")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine.Checkpoint, "write", full)
    with pytest.raises(OutputError, match=r"No space left on device; nothing was written"):
        bake_checkpoint(source, heads_apart(), tmp_path / "warm")
    assert nothing_left(tmp_path)


def test_bad_input(source, tmp_path):
    profile, out = heads_apart(), tmp_path / "warm"
    with pytest.raises(ProfileError, match="3 layers x 4 heads, the model has 4 layers x 4 heads"):
        bake_checkpoint(source, Profile.from_matrix(torch.ones(3, 4)), out)
    with pytest.raises(ModelError, match="no such directory"):
        bake_checkpoint(tmp_path / "nowhere", profile, out)
    assert nothing_left(tmp_path)
    bake_checkpoint(source, profile, out)
    with pytest.raises(OutputError, match="warm exists; name a place that doesn't"):
        bake_checkpoint(source, profile, out)
    with pytest.raises(BakeError, match=r"warm was baked .* --undo --out DIR"):
        bake_checkpoint(out, profile, tmp_path / "twice")
    with pytest.raises(OutputError, match="exists"):
        undo_checkpoint(out, source)


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_files_that_can_not_be_baked(source, tmp_path):
    profile, out = heads_apart(), tmp_path / "warm"
    missing = copied(source, tmp_path / "missing")
    next(iter(sorted(missing.glob("*-00002-*")))).unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of its \d+ weight files, .*-00002-"):
        bake_checkpoint(missing, profile, out)
    packed = copied(source, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(BakeError, match=r"packed are quantised \(bitsandbytes\).*then quantise it"):
        bake_checkpoint(packed, profile, out)
    assert check_model(packed).reason == "its weights are quantised (bitsandbytes)"
    torn = copied(source, tmp_path / "torn")
    shard = next(iter(sorted(torn.glob("*-00001-*"))))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match="can't load the model"):
        bake_checkpoint(torn, profile, out)
    old = tmp_path / "old"
    save_tiny_llama(old, layers=LAYERS)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    with pytest.raises(BakeError, match="another format than safetensors; load and save"):
        bake_checkpoint(old, profile, out)
    damaged = copied(source, tmp_path / "damaged")
    config = json.loads((source / "config.json").read_bytes())
    (damaged / "config.json").write_text(json.dumps({**config, "tempering": {"version": 1}}))
    with pytest.raises(BakeError, match="the mark of .*damaged is damaged"):
        undo_checkpoint(damaged, out)
    assert not out.exists()


def test_check_by_name_and_with_a_profile(source, tmp_path):
    assert check_model(source).verdict == "per head"
    save_like_a_checkpoint(tiny("qwen3"), tmp_path / "qwen3")
    found = check_model(tmp_path / "qwen3")
    assert found.verdict == "per layer"
    with pytest.raises(BakeError, match="q_norm.weight is shared by its heads"):
        check_model(
            tmp_path / "qwen3", Profile.from_matrix(torch.tensor([[1.0, 2, 1, 1], [1, 1, 1, 1]]))
        )
    check_model(tmp_path / "qwen3", Profile.from_matrix(torch.full((2, 4), 1.5)))


_MEASURE = """
import resource, sys, json
from pathlib import Path
import torch
from tempering.attention.baking.folds import Fold
from tempering.engines.checkpoints.files import Checkpoint

source, target = map(Path, sys.argv[1:])
checkpoint = Checkpoint(source)
fold = Fold("", 0, ((0, 256, 0), (256, 512, 1)))
folds = {f"a.{i}.q": [(fold, torch.tensor([2.0, 0.5], dtype=torch.float64))] for i in range(12)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint.write(target, folds)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_streaming_keeps_one_tensor_in_memory(tmp_path):
    """12 shards of 16 MB with 1 MB to fold in each: the peak rises by a few tensors at most."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text("{}")
    weights = {}
    for index in range(12):
        file = f"model-{index}.safetensors"
        parts = {f"a.{index}.q": torch.randn(512, 512), f"a.{index}.rest": torch.randn(3840, 1024)}
        save_file(parts, source / file)
        weights.update(dict.fromkeys(parts, file))
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(source), str(target)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) / 1024 < 8, run.stdout
    own, folded = tensors_of(source), tensors_of(target)
    assert torch.equal(folded["a.7.rest"], own["a.7.rest"])
    assert torch.equal(folded["a.7.q"][:256], own["a.7.q"][:256] * 2)
    assert torch.equal(folded["a.7.q"][256:], own["a.7.q"][256:] * 0.5)
