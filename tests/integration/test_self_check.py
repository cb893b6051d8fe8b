"""The self-check on attach: it passes on exact control alone, and says where control is not."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTModel

from tempering.attention.control.self_check import _PASSED as PASSED
from tempering.attention.control.self_check import self_check, verdict_key
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.hooks import interface_route, softmax_route
from tempering.attention.hooks.ownership import STATE
from tempering.attention.hooks.temperature_state import TemperatureState
from tempering.attention.profiles.profile import Profile
from tempering.errors import ArchitectureError, CheckError
from tempering.survey.families import task_of
from tempering.survey.models import small_model

TASKS = {
    "llama": task_of("llama", "LlamaForCausalLM"),
    "gpt_oss": task_of("gpt_oss", "GptOssForCausalLM"),
    "granite_swa": task_of("granite_swa", "GraniteSWAForCausalLM"),
    "gemma2": task_of("gemma2", "Gemma2ForCausalLM"),
    "doge": task_of("doge", "DogeForCausalLM"),
    "inkling": task_of("inkling_text", "InklingForCausalLM"),
    "bloom": task_of("bloom", "BloomForCausalLM"),
    "falcon": task_of("falcon", "FalconForCausalLM"),
    "gpt2": task_of("gpt2", "GPT2LMHeadModel"),
    "prophetnet": task_of("prophetnet", "ProphetNetForCausalLM"),
    "zamba2": task_of("zamba2", "Zamba2ForCausalLM"),
    "qwen3_next": task_of("qwen3_next", "Qwen3NextForCausalLM"),
    "reformer": task_of("reformer", "ReformerModelWithLMHead"),
    "t5": task_of("t5", "T5ForConditionalGeneration"),
}


def build(name, dtype=torch.float32, implementation="eager", **changes):
    model = small_model(TASKS[name], implementation)
    if changes:
        config = model.config
        for key, value in changes.items():
            setattr(config, key, value)
        strong = model.state_dict()
        model = type(model)._from_config(config, attn_implementation=implementation).eval()
        model.load_state_dict(strong)
    return model.to(dtype)


def forget(model):
    sys.modules["tempering.attention.examining.layout_of"]._KNOWN.pop(model)


# -- each of these is a way in which control could be almost right


def keep(name):
    """A part of the logits that is left undivided."""
    before = interface_route._scaled_extra

    def mutant(part, value, *rest):
        return value if part == name else before(part, value, *rest)

    return interface_route, "_scaled_extra", mutant


def beta_changed(change):
    """Temperatures that reach the logits otherwise than they were given."""
    before = TemperatureState._apply

    def mutant(self):
        before(self)
        if self.beta.shape[0] > 1:
            self.beta, self.uniform = change(self.beta.clone()), None

    return TemperatureState, "_apply", mutant


def first_head_untempered(beta):
    beta[:, 0] = 1
    return beta


def one_logit_in_five(logits, beta, *masking):
    floor = -1e30
    divided = torch.where(logits > floor, (logits * beta).to(logits.dtype), logits)
    return torch.where(torch.arange(logits.shape[-1]) % 5 == 3, logits, divided)


MUTATIONS = {
    "bias in the mask": (
        "doge",
        lambda: (interface_route, "scaled_mask", lambda mask, *rest: mask),
    ),
    "position bias": ("inkling", lambda: keep("position_bias")),
    "position bias of an encoder": ("t5", lambda: keep("position_bias")),
    "sinks": ("gpt_oss", lambda: (interface_route, "_scaled_sinks", lambda sinks, beta: sinks)),
    "sinks outside": (
        "granite_swa",
        lambda: (interface_route, "_scaled_sinks", lambda sinks, beta: sinks),
    ),
    "cap before": ("gemma2", lambda: keep("softcap")),
    "heads rolled": ("llama", lambda: beta_changed(lambda beta: beta.roll(1, 1))),
    "heads by key head": (
        "llama",
        lambda: beta_changed(lambda b: b.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)),
    ),
    "a head untempered": ("llama", lambda: beta_changed(first_head_untempered)),
    "rows mixed up": ("llama", lambda: beta_changed(lambda beta: beta.flip(0))),
    "T for 1/T": ("llama", lambda: beta_changed(lambda beta: 1 / beta)),
    "T a little off": ("llama", lambda: beta_changed(lambda b: torch.where(b == 1, b, b * 1.02))),
    "own softmax, heads rolled": ("bloom", lambda: beta_changed(lambda beta: beta.roll(1, 1))),
    "own softmax, some keys": ("bloom", lambda: (softmax_route, "divided", one_logit_in_five)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(mutation, dtype, monkeypatch):
    name, make = MUTATIONS[mutation]
    model = build(name, dtype)
    assert self_check(model).share < 0.01
    forget(model)
    monkeypatch.setattr(*make())
    first = layout(model).names[0]
    with pytest.raises(CheckError, match=f"{first}.* disagrees with the reference") as caught:
        self_check(model)
    assert "can't be controlled exactly" in str(caught.value)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_of_a_long_call_without_a_mask_few_queries_are_tried(implementation, monkeypatch):
    from tempering.attention.examining import interface_trial

    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=112, patch_size=8, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTModel._from_config(config, attn_implementation=implementation).eval()
    sizes = []

    class Spy(interface_trial.ReferenceCall):
        def __init__(self, eager, module, arguments, kwargs, floor):
            sizes.append((arguments[0].shape[2], arguments[1].shape[2]))
            super().__init__(eager, module, arguments, kwargs, floor)

    monkeypatch.setattr(interface_trial, "ReferenceCall", Spy)
    assert self_check(model).share < 0.01
    assert set(sizes) == {(66, 197)}  # every third query, over all keys
    forget(model)
    monkeypatch.setattr(*beta_changed(first_head_untempered))
    first = layout(model).names[0]
    with pytest.raises(CheckError, match=f"{first}.* disagrees with the reference"):
        self_check(model)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_bit_at_temperature_1_is_caught(name, monkeypatch):
    before = TemperatureState._apply

    def mutant(self):
        before(self)
        self.beta, self.uniform = self.beta * (1 + 2**-22), None

    monkeypatch.setattr(TemperatureState, "_apply", mutant)
    with pytest.raises(CheckError, match="T = 1 does not reproduce the original bit for bit"):
        self_check(build(name))


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_first_layer_that_disagrees_is_named(name, monkeypatch):
    model = build(name)
    last = layout(model).names[-1]
    forget(model)
    before = TemperatureState._apply

    def mutant(self):
        before(self)
        if self.layer.name >= last and self.beta.shape[0] > 1:
            self.beta, self.uniform = self.beta.roll(1, 1), None

    monkeypatch.setattr(TemperatureState, "_apply", mutant)
    with pytest.raises(CheckError, match=last.replace(".", r"\.")):
        self_check(model)


def test_a_layer_that_is_not_reached_is_named(monkeypatch):
    model = build("bloom")
    monkeypatch.setattr(softmax_route, "acquire", lambda: None)
    monkeypatch.setattr(softmax_route, "release", lambda: None)
    with pytest.raises(ArchitectureError, match=r"h\.0\..* ran without meeting its temperature"):
        self_check(model)


def test_one_temperature_for_all_is_tried_too(monkeypatch):
    """It reaches the logits through the scaling factor, which a function may ignore."""
    from transformers.models.llama import modeling_llama

    before = modeling_llama.eager_attention_forward

    def deaf(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        return before(module, query, key, value, attention_mask, module.scaling, dropout, **kwargs)

    deaf.__module__ = before.__module__
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", deaf)
    with pytest.raises(CheckError, match="layers.0.self_attn disagrees with the reference"):
        self_check(build("llama"))


def test_a_model_without_a_cache_is_tried_under_a_handle_as_well(monkeypatch):
    model = build("bloom")
    forward = type(model).forward

    def without_cache(self, *args, use_cache=None, **kwargs):
        if use_cache:
            raise ValueError("no cache here")
        return forward(self, *args, use_cache=use_cache, **kwargs)

    monkeypatch.setattr(type(model), "forward", without_cache)
    assert self_check(model).share < 1e-4
    forget(model)
    layout(model)
    monkeypatch.setattr(*beta_changed(lambda beta: beta.roll(1, 1)))
    with pytest.raises(CheckError, match="disagrees with the reference: a logit"):
        self_check(model)


def test_a_second_softmax_that_is_not_reached_is_told():
    by_name = torch.softmax  # a function written in C, kept under another name
    model = build("bloom")
    attention = model.transformer.h[0].self_attention
    original = type(attention).forward

    def forward(self, hidden_states, *args, **kwargs):
        output = original(self, hidden_states, *args, **kwargs)
        rows, length = hidden_states.shape[:2]
        logits = torch.zeros(rows, 4, length, 12).index_fill(-1, torch.tensor([3]), -torch.inf)
        by_name(logits, -1)
        return output

    attention.forward = forward.__get__(attention)
    with pytest.raises(CheckError, match=r"h\.0\..* temperature in 1 of 2 softmaxes"):
        self_check(model)


def test_nothing_is_proven_where_nothing_moves():
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    with pytest.raises(CheckError, match="did not move the attention of LlamaForCausalLM"):
        self_check(model)


# -- what it costs, and what it leaves


def test_it_costs_two_forwards_and_later_none():
    model = build("llama")
    PASSED.discard(verdict_key(model))
    forget(model)
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    profile = Profile.from_schedule("linear(0.8,1.2)", model)
    with tempered(model, profile):
        pass
    assert lengths == [11, 1]
    with tempered(model, profile):
        pass
    twin = build("llama")
    with tempered(twin, profile):
        assert verdict_key(twin) in PASSED
    assert lengths == [11, 1]


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_it_leaves_the_model_as_it_was(name):
    model = build(name)
    model.train()
    softmax, state = F.softmax, {key: value.clone() for key, value in model.state_dict().items()}
    self_check(model)
    assert F.softmax is softmax
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for module in model.modules():
        assert not hasattr(module, STATE)
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_weights_may_change_between_its_forwards():
    model = build("llama")
    layout(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert self_check(model).share < 1e-4


# -- what a short prefill alone would not show


def test_streams_of_a_second_shape_are_tempered():
    plan = layout(build("prophetnet"))
    assert {layer.axes for layer in plan.layers} == {("b h q k", "b n h q k")}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("upcast", [False, True])
def test_gpt2_in_all_its_ways(upcast, implementation):
    changes = {"reorder_and_upcast_attn": upcast, "scale_attn_by_inverse_layer_idx": True}
    model = build("gpt2", implementation=implementation, **changes)
    bypass = upcast and implementation == "eager"
    assert {layer.route for layer in layout(model).layers} == {"softmax" if bypass else "interface"}
    assert self_check(model).share < 1e-4


def test_falcon_with_its_own_scaled_dot_products():
    model = build("falcon", implementation="sdpa")
    assert {layer.route for layer in layout(model).layers} == {"softmax"}
    assert self_check(model).share < 1e-4


def test_layers_that_share_a_module_share_a_row():
    model = build("zamba2")
    plan = layout(model)
    assert len(set(plan.names)) == len(plan.layers)
    assert self_check(model).share < 1e-4


def test_layers_without_softmax_are_named():
    plan = layout(build("qwen3_next"))
    assert plan.names == ("model.layers.3.self_attn",)
    assert plan.untempered == tuple(f"model.layers.{index}" for index in range(3))
    assert plan.depths == {"decoder": 4}
    profile = Profile.from_schedule("linear(1,4)", plan)
    assert profile.untempered == plan.untempered
    assert profile.temperature.tolist() == [[4.0] * 4]


def test_attention_without_a_softmax_is_refused_by_name():
    with pytest.raises(ArchitectureError, match=r"self_attention \(LocalSelfAttention\) attends"):
        layout(build("reformer"))


def test_block_sparse_attention_is_refused_by_name():
    model = small_model(task_of("big_bird", "BigBirdForMaskedLM"), "eager")
    model.bert.set_attention_type("block_sparse")
    with pytest.raises(ArchitectureError, match="attention_type='original_full'"):
        layout(model)
    assert model.bert.attention_type == "block_sparse"


def test_a_softmax_not_seen_before_is_an_error():
    model = build("bloom")
    block = model.transformer.h[0]
    attention = block.self_attention
    original = type(attention).forward

    def forward(self, hidden_states, *args, **kwargs):
        output = original(self, hidden_states, *args, **kwargs)
        if hidden_states.shape[1] > 16:
            F.softmax(hidden_states[:, None, None], dim=-1)
        return output

    attention.forward = forward.__get__(attention)
    ids = torch.arange(40).reshape(2, 20) + 5
    with tempered(model, Profile.from_matrix([[0.5] * 4] * 2)), torch.no_grad():
        model(ids[:, :12])
        with pytest.raises(ArchitectureError, match="did not when it was examined"):
            model(ids)
    model(ids)


def test_a_softmax_like_attention_that_masks_nothing_is_not_guessed_at():
    model = build("bloom")
    attention = model.transformer.h[1].self_attention
    original = type(attention).forward

    def forward(self, hidden_states, *args, **kwargs):
        F.softmax(hidden_states.unflatten(-1, (4, -1)).transpose(1, 2), dim=-1)
        return original(self, hidden_states, *args, **kwargs)

    attention.forward = forward.__get__(attention)
    with pytest.raises(ArchitectureError, match=r"h\.1\.self_attention calls .*masks nothing"):
        layout(model)


def test_a_sample_that_the_model_fails_on_is_told():
    model = build("llama")
    with pytest.raises(ArchitectureError, match="LlamaForCausalLM fails on the sample "):
        layout(model, {"input_ids": torch.full((2, 5), 10**6)})


def test_arguments_that_may_change_the_logits_are_refused():
    def own(module, query, key, value, attention_mask, **kwargs):
        raise AssertionError

    with pytest.raises(ArchitectureError, match="layer 3 passes 'tilt' to its attention function"):
        interface_route.check_arguments(own, "layer 3", ["scaling", "tilt"])
    from transformers.models.llama.modeling_llama import eager_attention_forward

    # It ignores what it doesn't name; what it names must be known.
    interface_route.check_arguments(eager_attention_forward, "layer 3", ["scaling", "tilt"])
    with pytest.raises(ArchitectureError, match="passes 'query'"):
        interface_route.check_arguments(eager_attention_forward, "layer 3", ["query"])


def test_a_model_without_token_ids_needs_a_sample():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ViTModel(ViTConfig(image_size=12, patch_size=4, intermediate_size=48, **sizes)).eval()
    model.main_input_name = "crops"  # one that no sample is made of
    with pytest.raises(ArchitectureError, match="takes 'crops', not token ids"):
        layout(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    sample = {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}
    assert {layer.stack for layer in layout(model, sample).layers} == {"encoder"}
    assert self_check(model, sample).share < 1e-4
