"""The fingerprint: the same for the same model, another for any other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tempering.attention.profiles.fingerprint import fingerprint
from tempering.errors import ModelError
from tempering.survey.families import task_of
from tempering.survey.models import small_model

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llama(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SMALL | fields)))


def test_the_same_model_built_twice_has_one_fingerprint() -> None:
    assert fingerprint(llama()) == fingerprint(llama())
    assert len(fingerprint(llama())) == 16


def test_a_fixed_model_keeps_its_fingerprint_for_ever() -> None:
    model = nn.Sequential(nn.Linear(300, 3), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 1024)
    assert fingerprint(model) == "f8f31ca1c4d6886b"


def test_another_seed_is_another_model() -> None:
    assert len({fingerprint(llama(seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 8, "head_dim": 4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
        {"hidden_act": "gelu"},
        {"num_hidden_layers": 3},
    ],
)
def test_another_architecture_is_another_model(fields: dict[str, Any]) -> None:
    model, other = llama(), llama(**fields)
    with torch.no_grad():
        for parameter in [*model.parameters(), *other.parameters()]:
            parameter.fill_(0.5)
    assert fingerprint(model) != fingerprint(other)


def test_one_small_training_step_is_another_model() -> None:
    model = llama()
    before = fingerprint(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.arange(16)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimiser.step()
    assert fingerprint(model) != before


def test_one_changed_tensor_is_another_model() -> None:
    model = llama()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    assert fingerprint(model) != before


def test_mode_copies_and_buffers_do_not_matter() -> None:
    model = llama()
    before = fingerprint(model)
    model.train()
    model.requires_grad_(False)
    model.register_buffer("scratch", torch.ones(3))
    assert fingerprint(copy.deepcopy(model)) == before


def test_bfloat16_agrees_and_float16_agrees_where_nothing_is_lost() -> None:
    model = llama()
    exact = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).bfloat16()) == exact
    published = copy.deepcopy(model).bfloat16()
    assert fingerprint(copy.deepcopy(published).half()) == exact
    assert fingerprint(copy.deepcopy(published).float()) == exact


def test_other_families_and_frozen_parts_work() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    assert fingerprint(gpt2) == fingerprint(copy.deepcopy(gpt2))
    changed = copy.deepcopy(gpt2)
    changed.config.scale_attn_by_inverse_layer_idx = True
    assert fingerprint(changed) != fingerprint(gpt2)


def test_layers_with_configurations_of_their_own() -> None:
    """Gemma 4 has other head dimensions in some layers, and refuses to name one for all."""
    task = task_of("gemma4_text", "Gemma4ForCausalLM")
    first, again = small_model(task, "eager"), small_model(task, "sdpa")
    assert first.config.is_heterogeneous
    assert fingerprint(first) == fingerprint(again)
    with torch.no_grad():
        again.model.layers[3].self_attn.q_proj.weight.mul_(2)
    assert fingerprint(first) != fingerprint(again)


def test_a_model_without_data_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="weight is on the meta device"):
        fingerprint(model)
