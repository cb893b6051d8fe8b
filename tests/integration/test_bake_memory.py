"""Weights stay on disk while a checkpoint is baked: the memory it takes is near one shard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tempering.attention.baking.folds import Fold
from tempering.attention.baking.widened import widened
from tests.integration.bake_tiny import tiny, tokens
from tests.tiny import save_tiny_llama

LAYERS, HEADS = 12, 8

# Pages of the files are counted apart from a process's own memory, and given up under pressure.
_MEASURE = """
import re, sys, threading, time
from pathlib import Path
import torch
from tempering.attention import Profile
from tempering.engines.checkpoints.bake import bake_checkpoint

torch.set_num_threads(1)
warm_up, source, target = map(Path, sys.argv[1:])

def own():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status).group(1)) / 1024

def bake(source, target, layers, heads):
    T = torch.linspace(0.7, 1.5, layers * heads).view(layers, heads)
    return bake_checkpoint(source, Profile.from_matrix(T), target)

bake(warm_up, target / "small", 1, 4)  # imports
before, peak, going = own(), [0.0], True

def watch():
    while going:
        peak[0] = max(peak[0], own() - before)
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
result = bake(source, target / "large", 12, 8)
going = False
print(peak[0], result.tensors)
"""


LINUX = pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="reads Linux's accounts")


@pytest.mark.slow
@LINUX
def test_peak_memory(tmp_path):
    small = save_tiny_llama(tmp_path / "small", layers=1)
    config = LlamaConfig.from_pretrained(
        small,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        head_dim=64,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    source = tmp_path / "source"
    LlamaForCausalLM(config).bfloat16().save_pretrained(source, max_shard_size="12MB")
    for path in small.glob("tokenizer*"):
        (source / path.name).write_bytes(path.read_bytes())
    (tmp_path / "out").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small), str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, tensors = run.stdout.split()
    shards = [path.stat().st_size / 2**20 for path in source.glob("*.safetensors")]
    assert int(tensors) == LAYERS
    assert len(shards) >= 6
    # A layer in float32, twice for a moment, is what is held; in bfloat16 that is one shard here.
    assert float(peak) < 3.5 * max(shards) < sum(shards) / 1.5


def halved(name):
    """A model with weights in bfloat16, as one that was loaded so; its rotary table is not."""
    model = tiny(name)
    for weights in model.parameters():
        weights.data = weights.data.bfloat16()
    return model


def test_widened_runs_in_float32_and_leaves_the_weights():
    model = halved("qwen2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = tokens()
    with torch.no_grad(), widened(model):
        got = model(ids, use_cache=False).logits
        wanted = tiny("qwen2")
        wanted.load_state_dict({name: value.float() for name, value in before.items()})
        exact = wanted(ids, use_cache=False).logits
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() <= 1e-5 * exact.std()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.dtype == torch.bfloat16 for value in after.values())


@pytest.mark.parametrize("rounded", [False, True])
def test_widened_folds_copies(rounded):
    model = halved("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    fold, beta = Fold(name, 0, ((0, 8, 0),)), torch.tensor([0.3], dtype=torch.float64)
    plain = halved("llama").float()
    fold.apply_(plain.get_parameter(name), beta)
    if rounded:
        plain.get_parameter(name).data = plain.get_parameter(name).data.bfloat16().float()
    with torch.no_grad(), widened(model, [(fold, beta)], rounded):
        got = model(tokens(), use_cache=False).logits
    with torch.no_grad():
        exact = plain(tokens(), use_cache=False).logits
    assert (got - exact).abs().max() <= 1e-5 * exact.std()


def test_widened_gives_the_weights_back_after_an_error():
    model = halved("llama")

    def fail(module, args):
        raise RuntimeError("stopped")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    own = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(RuntimeError, match="stopped"), widened(model):
        model(tokens())
    handle.remove()
    assert {name: id(value) for name, value in model.named_parameters()} == own
    assert not any(module._forward_pre_hooks for module in model.modules())


@LINUX
def test_weights_of_a_checkpoint_are_pages_of_its_file(tmp_path):
    """What the memory rests on: loaded in the dtype of its file, a weight is mapped from it."""
    tiny("llama").bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("model.safetensors")
    ]
    for weights in model.parameters():
        assert any(start <= weights.data_ptr() < stop for start, stop in mapped)
