"""Encoders, encoder-decoders and windows: every layer's softmax sees its logits over T.

The reference divides what reaches `torch.nn.functional.softmax` in eager attention, call by call.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import ArchitectureError, ProfileError
from tests.integration import attention_oracle as oracle

HEADS = 4
IDS = oracle.tokens(1, 3, 11)
TARGETS = oracle.tokens(2, 3, 6)
MASK = torch.ones(3, 11, dtype=torch.long)
MASK[1, 8:] = 0


def bert():
    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        intermediate_size=48,
        initializer_range=0.2,
    )
    return config, BertForMaskedLM


def t5():
    config = T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=HEADS)
    config.initializer_factor = 1.5
    config.decoder_start_token_id = 0
    return config, T5ForConditionalGeneration


def bart():
    config = BartConfig(
        vocab_size=61,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        init_std=0.2,
    )
    return config, BartForConditionalGeneration


def gemma3():
    config = Gemma3TextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return config, Gemma3ForCausalLM


MAKERS = {"bert": bert, "t5": t5, "bart": bart, "gemma3": gemma3}


def make(name, implementation="eager"):
    torch.manual_seed(0)
    config, model_class = MAKERS[name]()
    config._attn_implementation = implementation
    return model_class(config).eval()


def logits(model, **more):
    inputs = {"input_ids": IDS, **more}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TARGETS
    with torch.no_grad():
        return model(**inputs).logits


def in_order_of_calls(model, plan, temperature):
    """[rows, layers, heads] of a layout -> one [rows, heads] for each softmax, as they come.

    A decoder with an encoder runs its own attention, then the cross attention, layer by layer.
    """
    place = {(layer.stack, layer.index): i for i, layer in enumerate(plan.layers)}
    order = sorted(place, key=lambda at: (at[0] != "encoder", at[1], at[0] == "cross"))
    return [temperature[:, place[at]] for at in order]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [1, 3], ids=["one profile", "rows"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_every_layer_obeys(name, implementation, rows, padded):
    try:
        model = make(name, implementation)
    except ValueError as error:
        assert "does not support" in str(error)  # no such attention in this architecture
        return
    more = {"attention_mask": MASK} if padded else {}
    plan = layout(model)
    T = oracle.random_temperatures(3, rows, len(plan.layers), HEADS)
    reference = make(name)
    with oracle.softmax_divided(in_order_of_calls(model, plan, T)) as seen:
        exact = logits(reference, **more)
    assert len(seen) == len(plan.layers)
    plain = logits(model, **more)
    with tempered(model, [Profile.from_matrix(row) for row in T]):
        actual = logits(model, **more)
    real = MASK.bool() if padded and not model.config.is_encoder_decoder else slice(None)
    scale = exact[real].abs().max()
    assert (actual[real] - exact[real]).abs().max() < 1e-5 * scale
    assert (actual[real] - plain[real]).abs().max() > 1e-2 * scale
    assert torch.equal(logits(model, **more)[real], plain[real])


@pytest.mark.parametrize("name", MAKERS)
def test_layouts(name):
    plan = layout(make(name))
    expected = {
        "bert": {"encoder": 3},
        "t5": {"encoder": 2, "decoder": 2, "cross": 2},
        "bart": {"encoder": 2, "decoder": 3, "cross": 3},
        "gemma3": {"decoder": 4},
    }[name]
    assert plan.depths == expected
    assert plan.heads == (HEADS,) * sum(expected.values())
    assert plan.untempered == ()
    assert len(set(plan.names)) == len(plan.names)


@pytest.mark.filterwarnings("ignore::tempering.errors.DepthWarning")
@pytest.mark.parametrize("stack", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_one_stack_alone(name, stack):
    model = make(name)
    plan = layout(model)
    profile = Profile.from_schedule("linear(2,0.5)", model, stack=stack)
    with oracle.softmax_divided(in_order_of_calls(model, plan, profile.temperature[None])):
        exact = logits(model)
    with tempered(model, profile):
        actual = logits(model)
    scale = exact.abs().max()
    assert (actual - exact).abs().max() < 1e-5 * scale
    assert (actual - logits(model)).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_an_encoder(name, settings):
    model = make(name)
    plan = layout(model)
    T = oracle.random_temperatures(4, 1, len(plan.layers), HEADS)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **settings}
    order = in_order_of_calls(model, plan, T)
    encoder, decoder = order[: plan.depths["encoder"]], order[plan.depths["encoder"] :]
    steps = 8 + 1
    with oracle.softmax_divided(encoder + decoder * steps):
        exact = model.generate(IDS, attention_mask=MASK, **settings)
    with tempered(model, Profile.from_matrix(T[0])):
        actual = model.generate(IDS, attention_mask=MASK, **settings)
    assert torch.equal(actual, exact)
    assert not torch.equal(actual, model.generate(IDS, attention_mask=MASK, **settings))


def test_profiles_for_rows_meet_the_batch_in_every_stack():
    model = make("bart")
    T = oracle.random_temperatures(5, 2, 8, HEADS)
    with (
        tempered(model, [Profile.from_matrix(row) for row in T]),
        pytest.raises(ProfileError, match="2 profiles.*batch of 3"),
    ):
        logits(model)


def test_windows_and_whole_layers_share_a_cache():
    """Token by token with a sliding cache equals the whole text at once."""
    model = make("gemma3")
    T = oracle.random_temperatures(6, 3, 4, HEADS)
    with oracle.softmax_divided(list(T.unbind(1))):
        exact = logits(model)
    memory, steps = None, []
    with tempered(model, [Profile.from_matrix(row) for row in T]), torch.no_grad():
        for part in IDS.split([4, *[1] * 7], dim=1):
            out = model(part, past_key_values=memory, use_cache=True)
            memory = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, 1) - exact).abs().max() < 2e-5 * exact.abs().max()


def test_what_is_no_attention_is_refused():
    with pytest.raises(ArchitectureError, match="Linear has no configuration, so it is no tr"):
        layout(torch.nn.Linear(3, 3))
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    with pytest.raises(ArchitectureError, match="no softmax attention"):
        layout(mamba)
