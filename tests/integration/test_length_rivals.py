"""Rivals of temperatures that only benchmarks have: each equals its formula in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

from tempering.attention import layout
from tempering.attention.tuning import from_batches, make_basis
from tempering.attention.tuning.adapted_scales import together
from tempering.attention.tuning.batches import text_batches
from tempering.attention.tuning.live_temperatures import live_temperatures
from tempering.attention.tuning.passes import gradient_pass, loss_pass
from tests.integration.tuning_tiny import HEADS, LAYERS, tiny_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
_rivals = pytest.importorskip("_rivals")

ALL = LAYERS * HEADS


@pytest.fixture
def model():
    return tiny_llama(dtype=torch.float64)


def expected(model, ids, temperature, bias, scale):
    """Logits of eager attention: softmax((l + b e_0) / T), outputs times s, of every head."""

    def oracle(module, query, key, value, mask, scaling=None, **kwargs):
        layer = module.layer_idx
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        logits = query @ key.mT * scaling
        logits[..., 0] += bias[layer][:, None]
        n = logits.shape[-1]
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        logits = (logits / temperature[layer][:, None, None]).masked_fill(hidden, -torch.inf)
        mixed = logits.softmax(-1) @ value * scale[layer][:, None]
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register("oracle_of_rivals", oracle)
    before = model.config._attn_implementation
    model.config._attn_implementation = "oracle_of_rivals"
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits
    finally:
        model.config._attn_implementation = before


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parts(model, sink, channels):
    """T, b, s as the oracle takes them: none of T, and those that are 0."""
    wide = model.config.head_dim
    bias = torch.zeros(ALL) if sink is None else sink
    theta = torch.zeros(ALL * wide) if channels is None else channels
    shape = (LAYERS, HEADS)
    return torch.ones(shape), bias.view(shape), theta.exp().view(*shape, wide)


def test_each_equals_its_formula(model):
    ids = torch.arange(24)[None] % 16
    sink, scales = numbers(ALL) * 2, numbers(ALL * model.config.head_dim, seed=1) * 0.3
    for opened, theta, own in (
        (_rivals.sink_bias, sink, parts(model, sink, None)),
        (_rivals.channel_scales, scales, parts(model, None, scales)),
    ):
        with torch.no_grad():
            plain = model(input_ids=ids).logits
        with opened(model) as tunable, torch.no_grad():
            assert tunable.size == len(theta)
            assert torch.equal(model(input_ids=ids).logits, plain)
            tunable.set(theta)
            found = model(input_ids=ids).logits
        wanted = expected(model, ids, *own)
        assert (wanted - plain).abs().max() > 1e-2
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_a_temperature_divides_the_bias_too(model):
    ids = torch.arange(24)[None] % 16
    log_t, sink = numbers(ALL, seed=2) * 0.3, numbers(ALL) * 2
    basis = make_basis(model, layout(model), "head")
    with (
        together(
            live_temperatures(model, basis, (0.01, 100.0), checkpoint=False),
            _rivals.sink_bias(model),
        ) as both,
        torch.no_grad(),
    ):
        both.set(torch.cat([log_t, sink]))
        temperature = torch.stack(both.parts[0].temperatures(log_t))
        found = model(input_ids=ids).logits
    _, bias, scale = parts(model, sink, None)
    wanted = expected(model, ids, temperature, bias, scale)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["sink_bias", "channel_scales"])
def test_gradients_agree_with_differences(model, name):
    ids = (torch.arange(40) * 7 % 16).view(2, 20)
    pieces = from_batches("t", text_batches(ids)).pieces
    with getattr(_rivals, name)(model) as tunable, torch.enable_grad():
        theta, way = numbers(tunable.size) * 0.1, numbers(tunable.size, seed=1)
        found = gradient_pass(tunable, theta, pieces).gradients @ way
        ends = [loss_pass(tunable, theta + s * 1e-3 * way, pieces).losses for s in (1, -1)]
    # Losses are float32: their difference has some 1e-7 / 2e-3.
    assert torch.allclose(found, (ends[0] - ends[1]) / 2e-3, rtol=1e-2, atol=1e-3)


def test_many_questions_see_the_bias_of_the_first_key_alone(model):
    """Packed questions stand under a mask of their own; each answer is as by itself."""
    ids = torch.arange(12)[None] % 16
    segment = torch.tensor([-1] * 6 + [0] * 3 + [1] * 3)
    index = torch.arange(12)
    mask = (index[:, None] >= index) & ((segment == -1) | (segment[:, None] == segment))
    places = torch.tensor([*range(9), 6, 7, 8])
    with _rivals.sink_bias(model) as tunable, torch.no_grad():
        tunable.set(numbers(ALL) * 2)
        packed = model(
            input_ids=ids, position_ids=places[None], attention_mask=mask[None, None]
        ).logits[0, 9:]
        alone = model(input_ids=torch.cat([ids[:, :6], ids[:, 9:]], 1)).logits[0, 6:]
    assert torch.allclose(packed, alone, rtol=0, atol=1e-12)
