"""A tempered model equals softmax(l / T), computed from its weights by another program."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

from tempering.attention.control.tempered import tempered
from tempering.attention.profiles.profile import Profile
from tempering.errors import ProfileError
from tests.integration import attention_oracle as oracle

IMPLEMENTATIONS = ("eager", "sdpa")
LAYERS, HEADS = oracle.LAYERS, oracle.HEADS


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def agree(actual, exact, rounding, effect=None):
    """Equal to rounding; and where `effect` is given, far apart from it."""
    assert actual.shape == exact.shape
    assert (actual - exact).abs().max() <= rounding
    if effect is not None:
        assert (actual - effect).abs().max() > 1e3 * rounding


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_per_head(implementation):
    model = oracle.tiny_llama(attention=implementation)
    ids = oracle.tokens(1, 3, 17)
    plain = logits(model, ids)
    T = oracle.random_temperatures(1, LAYERS, HEADS)
    with tempered(model, Profile.from_matrix(T)):
        agree(logits(model, ids), oracle.forward(model, ids, T).logits, 2e-5, plain)
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("value", [0.02, 0.5, 1.3, 50.0])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_layer_to_1e_10(layer, value):
    model = oracle.in_double(oracle.tiny_llama())
    ids = oracle.tokens(2, 2, 11)
    T = torch.ones(LAYERS, HEADS, dtype=torch.float64)
    T[layer] = value
    plain = logits(model, ids)
    with tempered(model, Profile.from_matrix(T)):
        agree(logits(model, ids), oracle.forward(model, ids, T).logits, 1e-10, plain)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("head", range(HEADS))
def test_one_head_to_1e_10(layer, head):
    model = oracle.in_double(oracle.tiny_llama())
    ids = oracle.tokens(3, 2, 11)
    T = torch.ones(LAYERS, HEADS, dtype=torch.float64)
    T[layer, head] = 0.4
    plain = logits(model, ids)
    with tempered(model, Profile.from_matrix(T)):
        agree(logits(model, ids), oracle.forward(model, ids, T).logits, 1e-10, plain)


def test_per_head_and_row_to_1e_10():
    model = oracle.in_double(oracle.tiny_llama())
    ids = oracle.tokens(4, 5, 13)
    T = oracle.random_temperatures(4, 5, LAYERS, HEADS)
    plain = logits(model, ids)
    with tempered(model, [Profile.from_matrix(row) for row in T]):
        agree(logits(model, ids), oracle.forward(model, ids, T).logits, 1e-10, plain)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_per_row_of_one_batch(implementation):
    model = oracle.tiny_llama(attention=implementation)
    ids = oracle.tokens(5, 1, 13).expand(12, -1)
    T = oracle.random_temperatures(5, 12, LAYERS, HEADS)
    T[3] = 1.0
    plain = logits(model, ids)
    with tempered(model, [Profile.from_matrix(row) for row in T]):
        actual = logits(model, ids)
    agree(actual, oracle.forward(model, ids, T).logits, 2e-5, plain)
    assert torch.equal(actual[3], plain[3])


def test_rows_alike_within_heads():
    """One temperature a row and layer is the case that most invites a shortcut."""
    model = oracle.in_double(oracle.tiny_llama())
    ids = oracle.tokens(6, 3, 9)
    T = oracle.random_temperatures(6, 3, LAYERS, 1).expand(-1, -1, HEADS)
    with tempered(model, [Profile.from_matrix(row) for row in T]):
        agree(logits(model, ids), oracle.forward(model, ids, T).logits, 1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ["one profile", "one each"])
def test_padding(implementation, side, rows):
    model = oracle.tiny_llama(attention=implementation)
    ids = oracle.tokens(7, 3, 14)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((5, 0, 9)):
        place = slice(0, pads) if side == "left" else slice(14 - pads, 14)
        mask[row, place] = 0
        ids[row, place] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    shape = (LAYERS, HEADS) if rows == "one profile" else (3, LAYERS, HEADS)
    T = oracle.random_temperatures(7, *shape)
    given = Profile.from_matrix(T) if T.ndim == 2 else [Profile.from_matrix(row) for row in T]
    exact = oracle.forward(model, ids, T, mask=mask, positions=positions).logits
    with tempered(model, given):
        actual = logits(model, ids, attention_mask=mask, position_ids=positions)
    real = mask.bool()
    agree(actual[real], exact[real], 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("prefix", [1, 6])
def test_decoding_with_a_cache(implementation, cache, prefix):
    model = oracle.tiny_llama(attention=implementation)
    ids = oracle.tokens(8, 2, 12)
    T = oracle.random_temperatures(8, 2, LAYERS, HEADS)
    if cache == "dynamic":
        memory = DynamicCache(config=model.config)
    else:
        memory = StaticCache(config=model.config, max_cache_len=20)
    parts = [ids[:, :prefix], *ids[:, prefix:].split(1, dim=1)]
    with tempered(model, [Profile.from_matrix(row) for row in T]), torch.no_grad():
        steps = [model(part, past_key_values=memory, use_cache=True).logits for part in parts]
    agree(torch.cat(steps, 1), oracle.forward(model, ids, T).logits, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sliding_window(implementation):
    kind = (MistralConfig, MistralForCausalLM)
    model = oracle.tiny_llama(attention=implementation, kind=kind, sliding_window=4)
    ids = oracle.tokens(9, 2, 15)
    T = oracle.random_temperatures(9, LAYERS, HEADS)
    plain = logits(model, ids)
    with tempered(model, Profile.from_matrix(T)):
        agree(logits(model, ids), oracle.forward(model, ids, T, window=4).logits, 2e-5, plain)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("profiles", ["one", "rows"])
def test_temperature_1_changes_no_bit(implementation, dtype, profiles):
    model = oracle.tiny_llama(attention=implementation, dtype=dtype)
    ids, mask = oracle.tokens(10, 3, 16), torch.ones(3, 16, dtype=torch.long)
    # eager attention of float64 models gives NaN for a query that sees nothing but padding
    mask[1, slice(1, 7) if dtype == torch.float64 else slice(6)] = 0
    plain = logits(model, ids), logits(model, ids, attention_mask=mask)
    neutral = Profile.neutral(model)
    with tempered(model, neutral if profiles == "one" else [neutral] * 3):
        same = logits(model, ids), logits(model, ids, attention_mask=mask)
    assert torch.equal(plain[0], same[0])
    assert torch.equal(plain[1], same[1])


def test_heads_at_1_keep_every_bit():
    """A head at T = 1 beside a tempered one, in the first layer tempered, keeps its bits."""
    model = oracle.tiny_llama()
    ids = oracle.tokens(11, 2, 10)
    taken = {}

    def keep(key):
        def hook(module, args):
            taken[key] = args[0].detach().clone()

        return hook

    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(keep("plain"))
    logits(model, ids)
    handle.remove()
    T = torch.ones(LAYERS, HEADS, dtype=torch.float64)
    T[0, 2] = 1.7
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(keep("tempered"))
    with tempered(model, Profile.from_matrix(T)):
        logits(model, ids)
    handle.remove()
    plain, changed = (taken[key].unflatten(-1, (HEADS, -1)) for key in ("plain", "tempered"))
    others = [0, 1, 3]
    assert torch.equal(plain[:, :, others], changed[:, :, others])
    assert (plain[:, :, 2] - changed[:, :, 2]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_rounds_no_worse_than_untempered(implementation, dtype):
    model = oracle.tiny_llama(attention=implementation, dtype=dtype)
    ids = oracle.tokens(12, 4, 24)
    T = oracle.random_temperatures(12, LAYERS, HEADS)
    untempered = logits(model, ids).double() - oracle.forward(model, ids).logits
    with tempered(model, Profile.from_matrix(T)):
        controlled = logits(model, ids).double() - oracle.forward(model, ids, T).logits
    # T to 1/3 sharpens logits by 3, and so their rounding
    assert controlled.pow(2).mean().sqrt() < 3 * untempered.pow(2).mean().sqrt()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_of_temperatures(implementation, rows):
    """d loss / dT through `set_rows`, against central differences of the float64 oracle."""
    model = oracle.in_double(oracle.tiny_llama(attention=implementation))
    ids = oracle.tokens(13, 2, 9)
    T = oracle.random_temperatures(13, LAYERS, HEADS, low=0.7, high=1.5)
    leaf = T.expand(rows, -1, -1).clone().requires_grad_()

    def loss(values):
        return torch.nn.functional.cross_entropy(values[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    with tempered(model, Profile.neutral(model)) as handle:
        handle.set_rows(list(leaf.unbind(1)))
        loss(model(ids, use_cache=False).logits.double()).backward()
    step, expected = 1e-5, torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    for place in ((0, 0), (1, 3), (2, 1), (3, 2)):
        shift = torch.zeros_like(T)
        shift[place] = step
        rise = loss(oracle.forward(model, ids, T + shift).logits)
        fall = loss(oracle.forward(model, ids, T - shift).logits)
        expected[place] = (rise - fall) / (2 * step)
        tolerance = 1e-7 if implementation == "sdpa" else 1e-5
        assert abs(leaf.grad.sum(0)[place] - expected[place]) < tolerance
        assert abs(expected[place]) > 1e-4


@pytest.mark.parametrize("given, batch", [(2, 3), (3, 2), (3, 1), (2, 4)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_profiles_for_another_batch_are_refused(implementation, given, batch):
    model = oracle.tiny_llama(attention=implementation)
    profiles = [
        Profile.from_matrix(oracle.random_temperatures(i, LAYERS, HEADS)) for i in range(given)
    ]
    with tempered(model, profiles):
        with pytest.raises(ProfileError, match=rf"{given}.*{batch}|{batch}.*{given}"):
            logits(model, oracle.tokens(14, batch, 7))
        # and the handle still serves the batch that it was made for
        logits(model, oracle.tokens(14, given, 7))
