"""Decoding with a cache equals the full forward pass under a profile, on every kind of attention.

The reference is eager attention on the untempered model with every softmax input divided by T,
over the whole sequence at once.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.profiles.profile import Profile
from tempering.survey.families import tasks
from tempering.survey.models import small_model
from tests.integration import attention_oracle as oracle

LENGTH, PARTS = 14, (5, 3, 1, 1, 1, 1, 1, 1)
# The windows of these models span 4 tokens, so a sliding cache forgets.
INTERFACE = {
    "llama": "grouped heads",
    "gemma3_text": "sliding windows, normalised queries",
    "gpt_oss": "sinks, sliding windows and full attention in turn",
    "gemma2": "soft cap, sliding windows and full attention in turn",
    "deepseek_v3": "latent attention",
    "gpt_bigcode": "one key-value head",
}
OWN = {"bloom": "ALiBi in attention code of its own", "codegen": "fused qkv, softmax of its own"}
# transformers keeps no quantised cache for sliding windows.
QUANTISED = ["llama", "deepseek_v3", "gpt_bigcode", "bloom", "codegen"]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about configurations this small
        yield


def built(name, implementation="eager"):
    return small_model(tasks([name])[0], implementation)


def sequence(seed=0, rows=2):
    return oracle.tokens(seed, rows, LENGTH)


def profile(model, seed=1):
    plan = layout(model)
    T = [oracle.random_temperatures(seed + i, heads) for i, heads in enumerate(plan.heads)]
    return Profile.from_rows(T, plan), T


@torch.no_grad()
def full(model, ids):
    return model(ids, use_cache=False).logits


@torch.no_grad()
def decoded(model, ids, memory):
    parts = ids.split(list(PARTS), dim=1)
    return torch.cat(
        [model(part, past_key_values=memory, use_cache=True).logits for part in parts], 1
    )


def share(got, wanted):
    """The largest difference, in standard deviations of the logits."""
    return float((got - wanted).abs().max() / wanted.std())


class EightBits(QuantizedLayer):
    """Keys and values as codes of 8 bits and a scale for each row and head."""

    def __init__(self):
        super().__init__(nbits=8, residual_length=4)

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(dim=(-2, -1), keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, pair):
        return pair[0] * pair[1]


def cache_of(kind, model):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=LENGTH + 2)
    return Cache(layers=[EightBits() for _ in layout(model).layers])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*INTERFACE, *OWN])
def test_dynamic_and_static(name, kind):
    model, ids = built(name), sequence()
    given, T = profile(model)
    with oracle.softmax_divided(T):
        exact = full(model, ids)
    plain = full(model, ids)
    with tempered(model, given):
        got = decoded(model, ids, cache_of(kind, model))
    assert share(got, exact) <= 1e-4
    assert share(plain, exact) > 0.05
    assert share(decoded(model, ids, cache_of(kind, model)), plain) <= 1e-4


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3"])
def test_sdpa_with_a_profile_a_row(name, kind):
    model, ids = built(name, "sdpa"), sequence(rows=3)
    chosen = [profile(model, seed) for seed in (1, 20, 40)]
    with tempered(model, [given for given, _ in chosen]):
        got = decoded(model, ids, cache_of(kind, model))
    eager = built(name)
    for row, (_, T) in enumerate(chosen):
        with oracle.softmax_divided(T):
            exact = full(eager, ids)[row]
        assert share(got[row], exact) <= 1e-4


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "gemma2"])
def test_sliding_layers_forget(name):
    """The caches above did keep a window, and no more."""
    model, ids = built(name), sequence()
    memory = cache_of("dynamic", model)
    given, _ = profile(model)
    with tempered(model, given):
        decoded(model, ids, memory)
    kept = [layer.keys.shape[-2] for layer in memory.layers]
    # The window less the query's own key, which is the next one kept.
    assert set(kept) == ({3} if name == "gemma3_text" else {3, LENGTH})


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised(name):
    """Exactly what divided softmaxes make of the same codes, and near the full forward pass."""
    model, ids = built(name), sequence()
    given, T = profile(model)
    with oracle.softmax_divided(T):
        same_codes = decoded(model, ids, cache_of("quantised", model))
    with oracle.softmax_divided(T):
        exact = full(model, ids)
    memory = cache_of("quantised", model)
    with tempered(model, given):
        got = decoded(model, ids, memory)
    assert memory.layers[0]._quantized_keys[0].dtype == torch.int8
    assert share(got, same_codes) <= 1e-4
    # 8 bits lose 1/254 of the largest entry of a head, in four layers.
    rounding = share(same_codes, exact)
    assert 1e-4 < rounding < 0.3
    assert share(full(model, ids), exact) > 3 * rounding


def test_fp8():
    transformers = pytest.importorskip("transformers", minversion="5.23")
    model, ids = built("llama"), sequence()
    given, T = profile(model)
    with oracle.softmax_divided(T):
        same_codes = decoded(model, ids, transformers.QuantizedCache("fp8", model.config))
    with tempered(model, given):
        got = decoded(model, ids, transformers.QuantizedCache("fp8", model.config))
    assert share(got, same_codes) <= 1e-4


def test_encoder_decoder():
    """T5: biases of its own for position, and keys of the source that are cached once."""
    model, source, target = built("t5"), sequence(1), sequence(2)
    plan = layout(model)
    given, T = profile(model)
    stacks = {
        stack: [t for t, layer in zip(T, plan.layers) if layer.stack == stack]
        for stack in ("encoder", "decoder", "cross")
    }
    in_order = [*stacks["encoder"]]
    for own, cross in zip(stacks["decoder"], stacks["cross"], strict=True):
        in_order += [own, cross]
    with torch.no_grad():
        with oracle.softmax_divided(in_order):
            exact = model(source, decoder_input_ids=target, use_cache=False).logits
        with tempered(model, given):
            encoded = model.get_encoder()(source)
            memory = EncoderDecoderCache(
                DynamicCache(config=model.config), DynamicCache(config=model.config)
            )
            parts = target.split(list(PARTS), dim=1)
            steps = [
                model(
                    encoder_outputs=encoded, decoder_input_ids=part, past_key_values=memory
                ).logits
                for part in parts
            ]
    assert share(torch.cat(steps, 1), exact) <= 1e-4
