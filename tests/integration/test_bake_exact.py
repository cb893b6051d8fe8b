"""A baked model equals softmax(l / T) as another program computes it, and says that it is baked."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tempering.attention import Profile, tempered
from tempering.attention.baking import comparison, profile_folds
from tempering.attention.baking.bake import bake
from tempering.attention.baking.bake_mark import read_mark
from tempering.errors import BakeError, CheckError, RefusedError
from tests.integration import attention_oracle as oracle
from tests.integration.bake_tiny import FOLDS, temperatures, tiny, tokens


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_llama_against_the_oracle():
    model = oracle.tiny_llama()
    T = oracle.random_temperatures(1, oracle.LAYERS, oracle.HEADS)
    ids = oracle.tokens(2, 3, 17)
    exact = oracle.forward(model, ids, T).logits
    baked = bake(model, Profile.from_matrix(T))
    assert (logits(baked, ids) - exact).abs().max() <= 2e-5
    assert (logits(model, ids) - exact).abs().max() > 1e-2
    # the oracle on the baked weights alone, at temperature 1
    assert (oracle.forward(baked, ids).logits - exact).abs().max() <= 2e-5


@pytest.mark.parametrize("name", FOLDS)
def test_every_layout_against_divided_softmaxes(name):
    """Eager attention with each softmax input divided by T, on the untouched model."""
    model = tiny(name)
    T = temperatures(FOLDS[name][1])
    ids = tokens()
    plain = logits(model, ids)
    with oracle.softmax_divided(list(T)):
        exact = logits(model, ids)
    baked = bake(model, Profile.from_matrix(T))
    spread = exact.std()
    assert (logits(baked, ids) - exact).abs().max() <= 1e-4 * spread
    assert (plain - exact).abs().max() > 2e-3 * spread
    assert torch.equal(logits(model, ids), plain)


def test_weights_that_only_types_of_tokens_bring_in():
    """XLNet adds (q + r_s_bias) . seg_embed where two tokens have different types."""
    settings = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    model = tiny("xlnet", settings)
    T = temperatures("per head")
    ids = tokens()
    types = (torch.arange(20) >= 8).long().expand(2, -1)
    baked = bake(model, Profile.from_matrix(T))
    for arguments in ({}, {"token_type_ids": types}):
        with torch.no_grad():
            plain = model(ids, **arguments).logits
            with oracle.softmax_divided(list(T)):
                exact = model(ids, **arguments).logits
            got = baked(ids, **arguments).logits
        assert (got - exact).abs().max() <= 1e-4 * exact.std()
        assert (plain - exact).abs().max() > 2e-3 * exact.std()


def test_generation_is_that_of_the_controlled_model():
    model = tiny("gpt_neox")
    profile = Profile.from_matrix(temperatures("per head"))
    ids = tokens(rows=1, length=6)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with tempered(model, profile):
        wanted = model.generate(ids, **settings)
    assert torch.equal(bake(model, profile).generate(ids, **settings), wanted)
    assert not torch.equal(model.generate(ids, **settings), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_folded_once(dtype):
    model = tiny("qwen2").to(dtype)
    T = temperatures("per head")
    baked = bake(model, Profile.from_matrix(T))
    for index, layer in enumerate(baked.model.layers):
        for part in ("weight", "bias"):
            own = getattr(model.model.layers[index].self_attn.q_proj, part)
            got = getattr(layer.self_attn.q_proj, part)
            beta = T[index].reciprocal().repeat_interleave(8)
            exact = (own.double().movedim(0, -1) * beta).movedim(-1, 0)
            assert got.dtype == dtype
            # half an ulp, plus what double rounding through float32 may add
            ulp = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
            assert bool(((got.double() - exact).abs() <= 0.5001 * ulp).all())
    assert baked.model.layers[0].self_attn.k_proj.weight.dtype == dtype


def test_a_baked_model_carries_its_mark(tmp_path):
    model = tiny("llama")
    T = temperatures("per head")
    profile = Profile.from_matrix(T)
    bake(model, profile).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    kept, folds = read_mark(again.config.tempering, "it")
    assert torch.equal(kept.temperature, T)
    assert set(folds) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    with pytest.raises(RefusedError, match="baked with a temperature profile already"):
        tempered(again, profile)
    with pytest.raises(BakeError, match="baked with a temperature profile already"):
        bake(again, profile)
    with tempered(again, profile, again=True):
        twice = logits(again, tokens())
    squared = oracle.forward(model, tokens(), T.square()).logits
    assert (twice - squared).abs().max() <= 1e-4 * squared.std()
    assert not hasattr(model.config, "tempering")


@pytest.mark.parametrize("mark", [None, 3, {"version": 2}, {"version": 1}])
def test_a_mark_that_can_not_be_read(mark):
    with pytest.raises(BakeError, match=r"carries no mark|is damaged"):
        read_mark(mark, "warm")


def test_a_wrong_fold_is_not_handed_out(monkeypatch):
    """The comparison with the controlled model stands between a defect and its result."""
    model = tiny("llama")
    right = profile_folds.betas

    def wrong(*arguments):
        return [(fold, beta * 1.001) for fold, beta in right(*arguments)]

    monkeypatch.setattr("tempering.attention.baking.profile_folds.betas", wrong)
    before = model.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    with pytest.raises(CheckError, match=r"disagrees with the controlled model: .*allowed 0.0001"):
        bake(model, Profile.from_matrix(temperatures("per head")))
    assert torch.equal(before, model.model.layers[0].self_attn.q_proj.weight)


def test_nan_never_passes():
    with pytest.raises(CheckError, match="nan"):
        comparison.check_deviation(float("nan"), "it")
