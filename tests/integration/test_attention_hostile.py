"""What might break attention control, and must not."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tempering.attention.control.tempered import tempered
from tempering.attention.profiles.profile import Profile
from tempering.errors import ProfileError
from tests.integration import attention_oracle as oracle

LAYERS, HEADS = oracle.LAYERS, oracle.HEADS
IDS = oracle.tokens(1, 3, 10)
T = oracle.random_temperatures(1, LAYERS, HEADS)
PER_ROW = oracle.random_temperatures(2, 3, LAYERS, HEADS)


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    return oracle.tiny_llama(attention=request.param)


def given(temperature):
    if temperature.ndim == 2:
        return Profile.from_matrix(temperature)
    return [Profile.from_matrix(row) for row in temperature]


def exact(model, ids=IDS, temperature=T, **kwargs):
    return oracle.forward(model, ids, temperature, **kwargs).logits


def near(actual, expected, tolerance=2e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < tolerance


# shapes


def test_one_token(model):
    """A single key leaves temperature nothing to do."""
    one = IDS[:, :1]
    with torch.no_grad():
        plain = model(one, use_cache=False).logits
        with tempered(model, given(PER_ROW)):
            near(model(one, use_cache=False).logits, plain)


def test_embeddings_in_place_of_tokens(model):
    embeddings = model.get_input_embeddings()(IDS)
    with tempered(model, given(PER_ROW)), torch.no_grad():
        near(model(inputs_embeds=embeddings).logits, exact(model, temperature=PER_ROW))


def test_parts_of_the_model_obey_too(model):
    """The body alone, and one attention module alone."""
    with tempered(model, given(T)), torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        near(model.lm_head(hidden), exact(model))


def test_the_body_takes_a_profile_of_its_own(model):
    body = model.model
    profile = Profile.from_schedule("linear(1.3,0.7)", body)
    assert profile.names[0] == "layers.0.self_attn"
    with tempered(body, profile), torch.no_grad():
        near(model(IDS).logits, exact(model, temperature=profile.temperature))
    with pytest.raises(ProfileError):
        tempered(model, profile)


def test_body_and_whole_nest(model):
    with tempered(model, given(T)), tempered(model.model, given(PER_ROW)), torch.no_grad():
        near(model(IDS).logits, exact(model, temperature=(T * PER_ROW)))


# masks


def additive(bias_seed):
    generator = torch.Generator().manual_seed(bias_seed)
    bias = torch.randn(3, 1, 10, 10, generator=generator)
    return bias.masked_fill(torch.ones(10, 10).triu(1).bool(), torch.finfo(torch.float32).min)


@pytest.mark.parametrize("temperature", [T, T[:1].expand(LAYERS, HEADS), PER_ROW], ids=list("hlr"))
def test_finite_biases_in_a_mask_are_part_of_the_logits(model, temperature):
    mask = additive(1)
    model.set_attn_implementation("eager")
    rows = temperature if temperature.ndim == 3 else temperature.expand(3, -1, -1)
    with oracle.softmax_divided(list(rows.unbind(1))), torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
    plain = oracle.tiny_llama(attention="eager")
    with torch.no_grad():
        assert (plain(IDS, attention_mask=mask).logits - plain(IDS).logits).abs().max() > 0.1
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with tempered(model, given(temperature)), torch.no_grad():
            near(model(IDS, attention_mask=mask).logits, expected)
            mask.add_(0.0)
            near(model(IDS, attention_mask=mask).logits, expected)


def test_a_mask_changed_in_place_is_looked_at_again(model):
    mask = additive(1)
    hidden = mask < -1e30
    bias = mask.masked_fill(hidden, 0.0)
    with tempered(model, given(T)), torch.no_grad():
        mask.masked_fill_(~hidden, 0.0)
        near(model(IDS, attention_mask=mask).logits, exact(model))
        mask.add_(bias)
        changed = model(IDS, attention_mask=mask).logits
        near(changed, model(IDS, attention_mask=mask.clone()).logits)
        assert (changed - exact(model)).abs().max() > 0.1


def test_boolean_masks(model):
    seen = torch.ones(10, 10).tril().bool().expand(3, 1, 10, 10).clone()
    seen[1, :, :, 2:4] = False
    seen[1, :, range(10), range(10)] = True
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), tempered(model, given(PER_ROW)):
        actual = model(IDS, attention_mask=seen).logits
    near(actual[[0, 2]], exact(model, temperature=PER_ROW)[[0, 2]])


def test_inference_mode(model):
    """Tensors made in inference mode neither leak into training nor upset what comes after."""
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, 4:6] = 0
    with torch.inference_mode():
        handle = tempered(model, given(T))
        near(model(IDS, attention_mask=mask).logits, exact(model, mask=mask))
        handle.update(given(PER_ROW))
        near(model(IDS).logits, exact(model, temperature=PER_ROW))
    model(IDS).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    handle.update(given(T))
    near(model(IDS).logits.detach(), exact(model))
    with torch.inference_mode():
        handle.update(given(T.flip(0)))
    near(model(IDS).logits.detach(), exact(model, temperature=T.flip(0)))
    handle.remove()


# what the model hands out


def test_attention_weights(model):
    model.set_attn_implementation("eager")
    with tempered(model, given(PER_ROW)), torch.no_grad():
        out = model(IDS, output_attentions=True, output_hidden_states=True)
    for ours, theirs in zip(
        out.attentions, oracle.forward(model, IDS, PER_ROW).weights, strict=True
    ):
        near(ours, theirs, 1e-5)
    assert len(out.hidden_states) == LAYERS + 1


# training


def weight_gradients(model, run):
    model.zero_grad()
    run().logits.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing(model):
    model.train()
    with tempered(model, given(T)):
        plain = weight_gradients(model, lambda: model(IDS, use_cache=False))
    for reentrant in (False, True):
        settings = {"use_reentrant": reentrant}
        # the older name is deprecated since transformers 5.23, the newer is missing before
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)(settings)
        model.enable_input_require_grads()
        with tempered(model, given(T)):
            again = weight_gradients(model, lambda: model(IDS, use_cache=False))
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        assert again.keys() == plain.keys()
        for name, grad in plain.items():
            torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-6)


def test_weight_gradients_against_the_oracle():
    model = oracle.in_double(oracle.tiny_llama())
    loss = lambda: exact(model, temperature=PER_ROW).square().mean()  # noqa: E731
    weight = model.model.layers[1].self_attn.k_proj.weight
    with tempered(model, given(PER_ROW)):
        ours = weight_gradients(model, lambda: model(IDS, use_cache=False))
    step = 1e-5
    for place in ((0, 0), (3, 7), (15, 30)):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
                sides.append(loss())
                weight[place] -= sign * step
        slope = (sides[0] - sides[1]) / (2 * step)
        grad = ours["model.layers.1.self_attn.k_proj.weight"][place]
        assert abs(grad - slope) < 1e-6 + 1e-4 * abs(slope)


def test_temperatures_trained_with_the_weights_frozen(model):
    model.requires_grad_(False)
    leaf = T.clone().requires_grad_()
    optimiser = torch.optim.SGD([leaf], lr=0.05)
    losses = []
    with tempered(model, Profile.neutral(model)) as handle:
        for _ in range(4):
            handle.set_rows([row[None] for row in leaf])
            out = model(IDS, labels=IDS, use_cache=False)
            losses.append(out.loss.item())
            optimiser.zero_grad()
            out.loss.backward()
            optimiser.step()
        handle.set_rows([row[None] for row in leaf.detach()])
        near(model(IDS).logits, exact(model, temperature=leaf.detach()))
    assert losses[-1] < losses[0]


def test_dropout_in_training():
    """The same dropout as untempered: T = 1 keeps every bit of a training step."""
    model = oracle.tiny_llama(attention="eager", attention_dropout=0.3)
    model.train()
    with torch.no_grad():
        torch.manual_seed(0)
        plain = model(IDS).logits
        with tempered(model, Profile.neutral(model)):
            torch.manual_seed(0)
            assert torch.equal(model(IDS).logits, plain)
    assert model.training


# precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.05, 20.0])
def test_far_temperatures_in_half_precision(model, dtype, value):
    """As close to the formula as the same weights computed in float32, up to half's rounding."""
    model = model.to(dtype)
    far = torch.full((LAYERS, HEADS), value, dtype=torch.float64)
    far[:, 1] = 1 / value
    with tempered(model, given(far)), torch.no_grad():
        actual = model(IDS).logits
    assert actual.isfinite().all()
    error = (actual.double() - exact(model, temperature=far)).abs()
    assert error.median() < (0.02 if dtype == torch.float16 else 0.2)


@pytest.mark.parametrize("value", [1e-3, 1e3])
def test_the_ends_of_the_range(value):
    model = oracle.in_double(oracle.tiny_llama())
    ends = torch.full((LAYERS, HEADS), value, dtype=torch.float64)
    with tempered(model, given(ends)), torch.no_grad():
        near(model(IDS).logits, exact(model, temperature=ends), 1e-9)


# changed while tempered


def test_another_implementation_while_tempered(model):
    with tempered(model, given(PER_ROW)), torch.no_grad():
        for implementation in ("eager", "sdpa", "eager"):
            model.set_attn_implementation(implementation)
            near(model(IDS).logits, exact(model, temperature=PER_ROW))
    with torch.no_grad():
        near(model(IDS).logits, exact(model, temperature=None))


def test_another_dtype_while_tempered(model):
    with tempered(model, given(T)) as handle, torch.no_grad():
        model.double()
        near(model(IDS).logits, exact(model), 5e-6)
        model.bfloat16()
        assert model(IDS).logits.isfinite().all()
        model.float()
        handle.update(Profile.neutral(model).adopt(model))
        plain = model(IDS).logits
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain)


def test_weights_changed_while_tempered(model):
    with tempered(model, given(T)), torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        near(model(IDS).logits, exact(model))


def test_a_cache_filled_untempered(model):
    """Temperatures act on queries as they come: earlier layers' keys stay as they were made."""
    T_first = torch.ones(LAYERS, HEADS, dtype=torch.float64)
    T_first[-1] = T[-1]  # only the last layer, so nothing that is cached depends on it
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :6], past_key_values=memory, use_cache=True)
        with tempered(model, given(T_first)):
            out = model(IDS[:, 6:], past_key_values=memory, use_cache=True).logits
    near(out, exact(model, temperature=T_first)[:, 6:])


def test_many_turns_leave_nothing_behind(model):
    with torch.no_grad():
        plain = model(IDS).logits
        for turn in range(30):
            temperature = PER_ROW if turn % 2 else T
            with tempered(model, given(temperature)):
                near(model(IDS).logits, exact(model, temperature=temperature))
            assert torch.equal(model(IDS).logits, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_moved_while_tempered(model):
    expected = exact(model, temperature=PER_ROW)
    with tempered(model, given(PER_ROW)) as handle, torch.no_grad():
        model.cuda()
        near(model(IDS.cuda()).logits.cpu(), expected, 1e-3)
        handle.set_rows([row.cuda() for row in PER_ROW.unbind(1)])
        near(model(IDS.cuda()).logits.cpu(), expected, 1e-3)
        model.cpu()
        near(model(IDS).logits, expected)
