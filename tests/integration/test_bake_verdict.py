"""The verdict on a model: what bakes into it, verified by folding random temperatures."""

from __future__ import annotations

import pytest
import torch

from tempering.attention import Profile
from tempering.attention.baking import verdict as module
from tempering.attention.baking.bake import bake
from tempering.attention.baking.verdict import bake_verdict
from tempering.errors import BakeError
from tests.integration.bake_tiny import FOLDS, LAYERS, REFUSED, temperatures, tiny


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3", "gemma3_text"])
def test_what_folds_is_verified(name):
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = bake_verdict(model)
    assert found.verdict == FOLDS[name][1]
    assert bool(found.reason) == (found.verdict == "per layer")
    assert (found.layers, found.of) == (LAYERS, LAYERS)
    assert 0 < found.deviation <= 1e-4
    assert all(torch.equal(before[key], item) for key, item in model.state_dict().items())


@pytest.mark.parametrize("name", ["gemma2", "mamba"])
def test_what_does_not_fold_says_why(name):
    found = bake_verdict(tiny(name))
    assert (found.verdict, found.layers, found.deviation) == ("no", 0, None)
    assert REFUSED[name][1] in found.reason


def test_the_layers_that_fold_are_verified_where_others_do_not():
    model = tiny("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.o_proj.weight = first.q_proj.weight
    found = bake_verdict(model)
    assert (found.verdict, found.layers, found.of) == ("no", 1, 2)
    assert "is tied to a weight of another module" in found.reason
    assert 0 < found.deviation <= 1e-4


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_fold_that_is_wrong_is_no_fold(monkeypatch, factor):
    right = module.betas
    monkeypatch.setattr(
        module, "betas", lambda *given: [(fold, beta * factor) for fold, beta in right(*given)]
    )
    found = bake_verdict(tiny("llama"))
    assert found.verdict == "no"
    assert "of their standard deviation when random temperatures are folded" in found.reason
    assert not found.deviation <= 1e-4


def test_a_baked_model_is_refused():
    baked = bake(tiny("llama"), Profile.from_matrix(temperatures("per head")))
    with pytest.raises(BakeError, match="baked with a temperature profile already"):
        bake_verdict(baked)
