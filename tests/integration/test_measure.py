"""Support and its kin, head by head, against loops over the attention weights in float64."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tempering.attention import axes
from tempering.attention.control.tempered import tempered
from tempering.attention.measuring.measure import measure, measure_tokens
from tempering.attention.profiles.profile import Profile
from tempering.errors import DataError, InputError, ProfileError
from tempering.survey.families import task_of
from tempering.survey.models import small_model
from tests.integration import attention_oracle as oracle

LAYERS, HEADS = oracle.LAYERS, oracle.HEADS
CHUNKS = oracle.tokens(1, 3, 15)


def agree(found, inputs, relative):
    """Every quantity of every layer and head; `inputs` are what each layer's softmax saw."""
    for layer, logits in enumerate(inputs):
        exact = oracle.statistics(logits)
        exact["support"] = exact["entropy"].exp()
        exact["support_without_sink"] = exact.pop("entropy_without_sink").exp()
        for name, values in exact.items():
            ours = getattr(found, name)[layer]
            assert ours.dtype == torch.float64
            error = ((ours - values) / values).abs().max()
            assert error < relative, (name, layer, ours, values)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_the_oracle(implementation):
    model = oracle.tiny_llama(attention=implementation)
    agree(measure_tokens(model, CHUNKS), oracle.forward(model, CHUNKS).inputs, 5e-6)


def test_float64_models_are_measured_in_float64():
    model = oracle.in_double(oracle.tiny_llama())
    agree(measure_tokens(model, CHUNKS), oracle.forward(model, CHUNKS).inputs, 1e-11)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_under_a_profile(implementation):
    model = oracle.tiny_llama(attention=implementation)
    T = oracle.random_temperatures(2, LAYERS, HEADS)
    inputs = oracle.forward(model, CHUNKS, T).inputs
    agree(measure_tokens(model, CHUNKS, profile=Profile.from_matrix(T)), inputs, 1e-5)
    with tempered(model, Profile.from_matrix(T)):
        agree(measure_tokens(model, CHUNKS), inputs, 1e-5)


def test_temperatures_in_force_count_as_well():
    model = oracle.tiny_llama()
    T, U = (oracle.random_temperatures(seed, LAYERS, HEADS) for seed in (3, 4))
    with tempered(model, Profile.from_matrix(T)):
        found = measure_tokens(model, CHUNKS, profile=Profile.from_matrix(U))
    agree(found, oracle.forward(model, CHUNKS, T * U).inputs, 1e-5)


def test_very_cold_and_very_hot():
    model = oracle.in_double(oracle.tiny_llama())
    T = torch.full((LAYERS, HEADS), 0.05, dtype=torch.float64)
    T[2:] = 50.0
    inputs = oracle.forward(model, CHUNKS, T).inputs
    agree(measure_tokens(model, CHUNKS, profile=Profile.from_matrix(T)), inputs, 1e-8)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_sliding_window(implementation):
    kind = (MistralConfig, MistralForCausalLM)
    model = oracle.tiny_llama(attention=implementation, kind=kind, sliding_window=4)
    agree_windowed(measure_tokens(model, CHUNKS), oracle.forward(model, CHUNKS, window=4).inputs)


def agree_windowed(found, inputs):
    """Queries beyond the window don't see the first key: their sink share is 0."""
    for layer, logits in enumerate(inputs):
        exact = oracle.statistics(logits)
        for name in ("entropy", "peak", "sink_share", "heat_capacity"):
            torch.testing.assert_close(
                getattr(found, name)[layer], exact[name], rtol=5e-6, atol=1e-9
            )
        torch.testing.assert_close(
            found.support_without_sink[layer],
            exact["entropy_without_sink"].exp(),
            rtol=5e-6,
            atol=0,
        )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_encoder(implementation):
    model = oracle.tiny_bert()
    with oracle.softmax_divided([torch.ones(4)]) as inputs, torch.no_grad():
        model(CHUNKS)
    model.set_attn_implementation(implementation)
    agree(measure_tokens(model, CHUNKS), inputs, 1e-4)


def test_attention_code_of_its_own():
    """Bloom calls no attention interface, and its ALiBi stands before the softmax."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    model = BloomForCausalLM(config).eval()
    T = oracle.random_temperatures(5, 2, 4)
    with oracle.softmax_divided(list(T)) as inputs, torch.no_grad():
        model(CHUNKS)
    inputs = [x.masked_fill(x < -1e30, float("-inf")) for x in inputs]
    agree(measure_tokens(model, CHUNKS, profile=Profile.from_matrix(T)), inputs, 1e-4)


@pytest.mark.parametrize(
    ("task", "layer"),
    [
        (task_of("longformer", "LongformerForMaskedLM"), 0),  # keys of a window
        (task_of("prophetnet", "ProphetNetForCausalLM"), 0),  # keys of two streams
        (task_of("deepseek_v4", "DeepseekV4ForCausalLM"), 3),  # compressed keys as well
    ],
)
def test_what_depends_on_the_place_of_keys_is_not_guessed(task, layer):
    model = small_model(task, "eager")
    found = measure_tokens(model, CHUNKS + 5)
    assert found.distance[layer].isnan().all()
    assert found.distance_without_sink[layer].isnan().all()
    learned = (
        task.model_type == "deepseek_v4"
    )  # the logit of a learned sink is known wherever keys are
    assert found.sink_share[layer].isnan().all() == (not learned)
    assert found.support_without_sink[layer].isnan().all() == (not learned)
    assert not found.entropy.isnan().any()
    if learned:
        assert not found.distance[:layer].isnan().any()


def test_streams_of_one_token_count_at_its_position():
    logits = torch.randn(2, 3, 4, 5, 7)  # b n h q k
    found = axes.standard(logits, axes.STREAMS, 4)
    for stream, query in ((0, 0), (2, 1), (1, 4)):
        torch.testing.assert_close(found[:, :, query * 3 + stream], logits[:, stream, :, query])


def test_chunks_layers_and_intervals():
    model = oracle.tiny_llama()
    found = measure_tokens(model, CHUNKS)
    inputs = oracle.forward(model, CHUNKS).inputs
    by_chunk = torch.stack(
        [
            torch.stack([oracle.statistics(x[i : i + 1])["entropy"] for x in inputs])
            for i in range(3)
        ]
    )
    torch.testing.assert_close(found.entropy_by_chunk, by_chunk, rtol=5e-6, atol=0)
    means = by_chunk.mean(2)
    torch.testing.assert_close(found.layer_support, means.mean(0).exp(), rtol=5e-6, atol=0)
    for layer in range(LAYERS):
        values = means[:, layer].numpy()
        low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
        exact = torch.tensor([low, high]).exp()
        torch.testing.assert_close(found.layer_interval[layer], exact, rtol=1e-5, atol=0)
    assert measure_tokens(model, CHUNKS[:1]).layer_interval.isnan().all()
    assert found.chunk_length == 15


def test_support_is_at_least_one_and_at_most_the_keys():
    model = oracle.tiny_llama()
    found = measure_tokens(model, CHUNKS)
    most = torch.lgamma(torch.tensor(16.0)).div(15).exp()  # geometric mean of 1..15 keys
    assert (found.support >= 1).all()
    assert (found.support <= most * (1 + 1e-6)).all()
    assert (found.peak <= 1).all()
    assert (found.heat_capacity >= 0).all()


def test_text_is_cut_into_chunks_and_progress_is_told():
    model = oracle.tiny_llama(vocab_size=259)
    tokenizer = oracle.byte_tokenizer()
    text = "A support is the effective number of live hypotheses, and so is this."
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    told = []
    found = measure(
        model, tokenizer, text, chunk=16, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    agree(found, oracle.forward(model, ids[:64].view(4, 16)).inputs, 5e-6)
    two = measure(model, tokenizer, text, chunk=16, limit=2)
    ends = ids[:64].view(4, 16)[[0, 3]]
    agree(two, oracle.forward(model, ends).inputs, 5e-6)


def test_bad_input():
    model = oracle.tiny_llama(vocab_size=259)
    tokenizer = oracle.byte_tokenizer()
    with pytest.raises(DataError, match="9 tokens.*one chunk of 16"):
        measure(model, tokenizer, "too short", chunk=16)
    with pytest.raises(InputError, match="at least 2 tokens, not 1"):
        measure(model, tokenizer, "some text", chunk=1)
    with pytest.raises(InputError, match="at least one chunk.*not 0"):
        measure(model, tokenizer, "some text", chunk=4, limit=0)
    with pytest.raises(ProfileError, match="2 layers x 2 heads.*4 layers x 4 heads"):
        measure_tokens(model, CHUNKS, profile=Profile.from_matrix([[1.0, 2.0], [1.0, 1.0]]))
    with pytest.raises(InputError):
        measure_tokens(model, CHUNKS[:0])


def test_the_model_is_left_as_it_was():
    model = oracle.tiny_llama()
    Profile.neutral(model)
    model.train()
    model.model.layers[1].eval()  # frozen parts of a model in training stay frozen
    flags = [module.training for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    measure_tokens(model, CHUNKS)
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(ZeroDivisionError):
        measure_tokens(model, CHUNKS, progress=lambda done, total: 1 / 0)
    assert [module.training for module in model.modules()] == flags
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    with torch.no_grad():
        model.eval()
        same = oracle.tiny_llama()(CHUNKS, use_cache=False).logits
        assert torch.equal(model(CHUNKS, use_cache=False).logits, same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    """Logits are formed in float32 from the model's own queries and keys."""
    model = oracle.tiny_llama(dtype=dtype)
    found = measure_tokens(model, CHUNKS)
    exact = [oracle.statistics(x)["entropy"] for x in oracle.forward(model, CHUNKS).inputs]
    assert (found.entropy - torch.stack(exact)).abs().max() < 0.1
