"""Rules that are refused, badly written, or kept in files."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

from tempering.attention import adaptive_profile, tempered
from tempering.attention.profiles.profile import Profile
from tempering.attention.profiles.rules import rule
from tempering.errors import ArchitectureError, ProfileError, RefusedError
from tests.integration import rule_oracle
from tests.integration.rule_oracle import IDS, oracle


def test_what_cannot_be_exact_is_refused():
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32}
    bloom = BloomForCausalLM(BloomConfig(**shape, n_layer=2, n_head=4)).eval()
    with pytest.raises(ArchitectureError, match="attention code of its own"):
        adaptive_profile("support(3)", bloom)
    shape |= {
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    sinks = GptOssForCausalLM(
        GptOssConfig(**shape, num_local_experts=2, num_experts_per_tok=1)
    ).eval()
    with pytest.raises(ArchitectureError, match="sink logits shared by all queries"):
        adaptive_profile("support(3)", sinks)
    config = Gemma2Config(**shape, attn_logit_softcapping=2.0, sliding_window=64)
    config._attn_implementation = "eager"
    capped = Gemma2ForCausalLM(config).eval()
    with tempered(capped, adaptive_profile("support(3)", capped)), torch.no_grad():
        ours = capped(IDS, use_cache=False).logits
    with rule_oracle.softmax_with(rule_oracle.held(math.log(3))), torch.no_grad():
        rule_oracle.close(ours, capped(IDS, use_cache=False).logits, 2e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("support", r"column 8: expected '\(', found the end"),
        ("warmth(3)", "column 1: no rule is called 'warmth'; known are affine, entropy, inst"),
        ("entropi(3)", "no rule is called 'entropi'; did you mean entropy"),
        ("support(keys)", r"column 13: expected '\(', found '\)'"),
        ("support()", r"support\(level, coldest, hottest\) needs level"),
        ("support(3,1)", "column 11: .*takes a level, or a level and two bounds"),
        ("support(3, warmest=1)", "column 12: .*no argument 'warmest'; it has level, coldest, ho"),
        ("support(0.5)", "at least 1"),
        ("support(inf)", "finite and at least 1"),
        ("entropy(-1)", "at least 0"),
        ("support(nan)", r"expected '\('"),
        ("support(3,2,1)", "the colder one first; not 2, 1"),
        ("support(3,0,1)", "0.001 to 1000"),
        ("support(wave(1))", "column 9: no pattern is called 'wave'"),
        ("support(linear(1,x))", r"column 19: expected '\('"),
        ("support(linear(1))", r"column 9: linear\(a, b\) takes 2 numbers, got 1"),
        ("support(3)(", r"column 11: expected '\|' or the end"),
        ("support(throb(12,3,1,12)", r"column 25: expected ',' or '\)'"),
        ('support("3")', "a rule has no place for"),
        ("log_length(1)", "at least 2"),
        ("log_length(3.5)", "whole number, got 3.5"),
        ("polynomial(x)", r"expected '\('"),
        ("polynomial(inf)", "finite coefficients"),
        ("polynomial(1e39,-1e39,0)", r"none beyond 1e\+30"),
        ("reverse(" * 5000, "more than 50 parts"),
    ],
)
def test_bad_texts(text, words):
    with pytest.raises(ProfileError, match=words):
        adaptive_profile(text, oracle.tiny_llama())


def test_a_rule_is_an_object_and_its_text_is_read_back_exactly():
    for text in ("support(3)", "entropy(0.5,0.1,1e1)", "polynomial(1,-2)", "log_length(2048)"):
        item = rule(text)
        assert rule(str(item)) == item and hash(rule(str(item))) == hash(item)
    assert rule("support(3)") != rule("entropy(3)")
    assert str(rule("support(3, hottest=2)")) == "support(3,0.001,2)"


def test_bad_places():
    model = oracle.tiny_llama()
    with pytest.raises(ProfileError, match="layer 4: the model has layers 0 to 3"):
        adaptive_profile("support(3)", model, layers=[0, 4])
    with pytest.raises(ProfileError, match=r"layer \(none\)"):
        adaptive_profile("support(3)", model, layers=[])
    with pytest.raises(ProfileError, match="no stack 'encoder'"):
        adaptive_profile("support(3)", model, stack="encoder")
    with pytest.raises(RefusedError, match="has rules itself .support.2."):
        adaptive_profile("support(3)", model, base=adaptive_profile("support(2)", model))


def test_files(tmp_path):
    """A profile with rules is another version, so that no reader drops them in silence."""
    model = oracle.tiny_llama()
    profile = adaptive_profile("support(linear(5,2),0.1,10)", model, layers=[1, 2])
    path = profile.save(tmp_path / "p.json")
    found = Profile.load(path)
    assert found.rules == profile.rules
    assert profile.to_json()["version"] == 2
    assert Profile.neutral(model).to_json()["version"] == 1
    with torch.no_grad(), tempered(model, found):
        ours = model(IDS, use_cache=False).logits
    with torch.no_grad(), tempered(model, profile):
        assert torch.equal(ours, model(IDS, use_cache=False).logits)
    other = oracle.tiny_llama(seed=1)
    assert found.adopt(other).rules == profile.rules
    damaged = profile.to_json()
    damaged["layers"][1]["rule"] = "warmth(3)"
    with pytest.raises(ProfileError, match="p.json: the rule of layer 1: column 1: no rule"):
        Profile.from_json(damaged, "p.json")
    damaged["layers"][1]["rule"] = 3
    with pytest.raises(ProfileError, match="'rule' of layer 1 is 3"):
        Profile.from_json(damaged, "p.json")


def test_what_takes_matrices_alone_refuses_rules():
    from types import SimpleNamespace

    from tempering.attention.baking.bake import bake
    from tempering.engines.vllm.layers import prepared_betas

    model = oracle.tiny_llama()
    profile = adaptive_profile("support(3)", model)
    vllm = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=1))
    for attempt in (
        lambda: bake(model, profile),
        lambda: profile.scaled(0.5),
        lambda: profile.shuffled(0),
        lambda: prepared_betas(vllm, [], profile),
    ):
        with pytest.raises(RefusedError, match=r"has rules \(support\(3\)\)"):
            attempt()
