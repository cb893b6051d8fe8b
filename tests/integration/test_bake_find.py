"""Which weights a temperature folds into: found by experiment, and the reasons where it doesn't."""

from __future__ import annotations

import pytest
import torch

from tempering.attention import Profile, tempered
from tempering.attention.baking.bake import bake, foldable
from tempering.attention.baking.fold_search import search
from tempering.attention.baking.isolated_layer import Isolated
from tempering.attention.baking.layer_calls import capture_calls
from tempering.attention.examining.layout_of import layout
from tempering.errors import BakeError, ModelError, ProfileError, RefusedError
from tempering.survey.families import task_of
from tempering.survey.models import small_model
from tests.integration.bake_tiny import FOLDS, HEADS, HYBRID, LAYERS, REFUSED, temperatures, tiny


@pytest.mark.parametrize("name", FOLDS)
def test_what_folds(name):
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = foldable(model)
    _, verdict, parameters = FOLDS[name]
    assert found.verdict == verdict
    assert len(found.plan) == LAYERS
    for index, layer in enumerate(found.plan):
        assert layer.verdict == verdict
        own = {
            fold.parameter.split(f".{index}.", 1)[1]: (fold.axis, fold.form) for fold in layer.folds
        }
        assert own == parameters
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fold_and_why(name):
    found = foldable(tiny(name))
    assert found.verdict == "no"
    assert REFUSED[name][1] in found.reason
    if found.plan:
        assert found.plan[0].name in found.reason


def test_rows_of_interleaved_layouts():
    """GPT-NeoX has q, k, v of head 0, then of head 1; Falcon has q q k v of group 0, ..."""
    (fold, _) = foldable(tiny("gpt_neox")).plan[0].folds
    assert fold.runs == ((0, 8, 0), (24, 32, 1), (48, 56, 2), (72, 80, 3))
    (fold,) = foldable(tiny("falcon")).plan[0].folds
    assert fold.runs == ((0, 8, 0), (8, 16, 1), (32, 40, 2), (40, 48, 3))
    (fold, bias) = foldable(tiny("gpt2")).plan[0].folds
    assert fold.runs == bias.runs == ((0, 8, 0), (8, 16, 1), (16, 24, 2), (24, 32, 3))


def test_gates_stay_as_they_are():
    """Qwen3-Next makes queries and an output gate in one projection."""
    model = tiny("qwen3_next", HYBRID)
    (layer,) = foldable(model).plan
    assert layer.verdict == "per layer"
    assert [fold.parameter.rsplit(".", 2)[1] for fold in layer.folds] == ["q_norm"]
    # without the norm, the rows of the queries alone
    attention = model.get_submodule(layer.name)
    attention.q_norm = torch.nn.Identity()
    plan = layout(model).layers[0]
    calls = capture_calls(model, [layer.name])[layer.name]
    found = search(Isolated(attention, plan, calls))
    assert found.verdict == "per head"
    (fold,) = found.folds
    assert fold.runs == ((0, 8, 0), (16, 24, 1), (32, 40, 2), (48, 56, 3))


def test_a_limit_that_few_tokens_never_reach_still_counts():
    assert foldable(tiny("olmo")).verdict == "no"
    assert foldable(tiny("olmo", {"clip_qkv": None})).verdict == "per head"


def test_weights_that_take_no_part():
    """What other inputs may bring in can't be folded unseen."""
    model = tiny("llama")
    model.model.layers[1].self_attn.extra = torch.nn.Parameter(torch.ones(HEADS))
    found = foldable(model)
    assert [layer.verdict for layer in found.plan] == ["per head", "no"]
    assert "extra takes no part in a short forward pass" in found.reason


def test_position_biases_that_other_layers_use():
    """T5's first layer computes the bias of all, LongT5's with a finite mask inside."""
    for name, kind in (
        ("t5", "T5ForConditionalGeneration"),
        ("longt5", "LongT5ForConditionalGeneration"),
    ):
        found = foldable(small_model(task_of(name, kind), "eager"))
        assert found.verdict == "no"
        assert "added part that it shares with other layers" in found.plan[0].reason
        crossing = [layer for layer in found.plan if "EncDecAttention" in layer.name]
        assert [layer.verdict for layer in crossing] == ["per head"] * 4


@pytest.mark.parametrize("masked", [False, True])
def test_queries_that_choose_keys(masked):
    """Queries that also rank keys can't be scaled, though few tokens let all keys through."""
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def choosing(hidden_states, **kwargs):
        scores = attention.q_proj(hidden_states).view(*hidden_states.shape[:2], HEADS, -1)
        scores = scores.sum(-1).sum(-1)
        if masked:
            hidden = torch.arange(scores.shape[1]) < 2
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        hidden_states = hidden_states + 0 * scores.topk(1, -1).values[..., None]
        return forward(hidden_states=hidden_states, **kwargs)

    calls = capture_calls(model, ["model.layers.0.self_attn"])["model.layers.0.self_attn"]
    isolated = Isolated(attention, layout(model).layers[0], calls)
    attention = isolated.module
    forward = attention.forward
    attention.forward = choosing
    found = search(isolated)
    # one factor for all heads leaves the ranking alone
    assert found.verdict == "per layer"


def test_weights_that_serve_two_layers():
    model = tiny("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    found = foldable(model)
    assert found.verdict == "no"
    assert "shares model.layers.0.self_attn.q_proj.weight with model.layers.1" in found.reason
    alike = temperatures("per head")[:1].expand(LAYERS, HEADS).contiguous()
    baked = bake(model, Profile.from_matrix(alike))
    assert baked.model.layers[0].self_attn.q_proj.weight is (
        baked.model.layers[1].self_attn.q_proj.weight
    )
    with pytest.raises(BakeError, match="different temperatures for them; give both the same"):
        bake(model, Profile.from_matrix(temperatures("per head")))


def test_weights_that_serve_another_module():
    model = tiny("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.o_proj.weight = first.q_proj.weight
    found = foldable(model)
    assert found.verdict == "no"
    assert found.plan[0].folds == ()
    assert "q_proj.weight is tied to a weight of another module" in found.plan[0].reason
    assert found.plan[1].verdict == "per head"


def test_keys_take_a_temperature_that_queries_can_not():
    """Where the weights of the queries do something else as well, keys scale all heads alike."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight = layer.self_attn.q_proj.weight
    found = foldable(model)
    assert found.verdict == "per layer"
    assert found.plan[0].folds[0].parameter == "model.layers.0.self_attn.k_proj.weight"


def test_refused_profiles_name_the_layer():
    model = tiny("qwen3")
    with pytest.raises(BakeError, match=r"layers\.0\.self_attn: q_norm.weight is shared by its h"):
        bake(model, Profile.from_matrix(temperatures("per head")))
    model = tiny("gemma2")
    with pytest.raises(BakeError, match=r"layers\.0\.self_attn: .*soft cap.*temperature 1"):
        bake(model, Profile.from_matrix(temperatures("per layer")))
    with pytest.raises(RefusedError, match="no softmax attention"):
        bake(tiny("mamba"), Profile.from_matrix(temperatures("per layer")))


def test_layers_at_temperature_1_ask_for_nothing():
    model = tiny("qwen3")
    T = temperatures("per layer")
    T[0] = 1.0
    baked = bake(model, Profile.from_matrix(T))
    own, other = model.state_dict(), baked.state_dict()
    changed = [key for key in own if not torch.equal(own[key], other[key])]
    assert changed == ["model.layers.1.self_attn.q_norm.weight"]


def test_bad_input():
    model = tiny("llama")
    profile = Profile.from_matrix(temperatures("per head"))
    with pytest.raises(ProfileError, match="3 layers x 4 heads, the model has 2 layers x 4 heads"):
        bake(model, Profile.from_matrix(torch.ones(3, 4)))
    with pytest.raises(ProfileError, match="made for another model|made for"):
        bake(model, Profile.neutral(tiny("qwen2")))
    with tempered(model, profile), pytest.raises(RefusedError, match="remove the handle"):
        foldable(model)
    with tempered(model, profile), pytest.raises(RefusedError, match="remove the handle"):
        bake(model, profile)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "quantised (bitsandbytes)" in foldable(model).reason
    with pytest.raises(BakeError, match="quantised"):
        bake(model, profile)
    del model.config.quantization_config
    with torch.device("meta"):
        empty = tiny_on_meta(model)
    with pytest.raises(ModelError, match="is on the meta device"):
        foldable(empty)


def tiny_on_meta(model):
    return type(model)(model.config)
