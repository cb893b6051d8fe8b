"""Half precision: finite wherever the logits over T are, and as near as the dtype allows."""

from __future__ import annotations

import pytest
import torch

from tempering.attention.control.tempered import tempered
from tempering.attention.hooks.dividing import query_over_t
from tempering.attention.hooks.temperature_state import TemperatureState
from tempering.attention.layout import AttentionLayer
from tempering.attention.profiles.profile import Profile
from tests.integration import attention_oracle as oracle
from tests.integration.own_attention import OwnAttention, OwnProduct

LAYERS, HEADS = 2, 4
IDS = oracle.tokens(1, 2, 9)


def model_of(kind, dtype, factor, lean=1.0):
    """Logits within +-`factor` or so; lean: how much larger queries are, and keys smaller."""
    made = oracle.tiny_llama(attention="sdpa" if kind == "sdpa" else "eager", num_hidden_layers=2)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor * lean)
            layer.self_attn.k_proj.weight.div_(lean)
            if kind in ("softmax", "product"):
                layer.self_attn.__class__ = OwnAttention if kind == "softmax" else OwnProduct
    return made.to(dtype)


def exact_layer(model, hidden, row):
    """The attention of the first layer in float64, from what it is given."""
    seen = {}
    hook = model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(kwargs | {"out": output[0]}),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(hidden)
    hook.remove()
    attention, (cos, sin) = model.model.layers[0].self_attn, seen["position_embeddings"]
    x, cos, sin = (item.double() for item in (seen["hidden_states"], cos, sin))

    def project(part, heads):
        # The queries and keys that the model has, as it rounds them.
        own = part(seen["hidden_states"]).double()
        return own.view(*x.shape[:2], heads, 8).transpose(1, 2)

    def rotate(item):
        low, high = item.chunk(2, -1)
        turned = torch.cat([-high, low], -1)
        return (item * cos[:, None] + turned * sin[:, None]).to(model.dtype).double()

    q = rotate(project(attention.q_proj, 4))
    k = rotate(project(attention.k_proj, 2)).repeat_interleave(2, 1)
    v = project(attention.v_proj, 2).repeat_interleave(2, 1)
    l = q @ k.mT / 8**0.5
    hidden = torch.ones(9, 9).triu(1).bool()
    weights = (l / row.view(1, -1, 1, 1)).masked_fill(hidden, -torch.inf).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    return l, mixed @ attention.o_proj.weight.double().T, seen["out"]


# Large logits over small temperatures that float16 still holds (65504), and the other way.
CASES = [(40.0, 0.01), (2.0, 1e-3), (200.0, 0.05), (1.0, 1e3), (40.0, 1e3)]


@pytest.mark.parametrize("kind", ["eager", "sdpa", "product"])
def test_queries_that_do_not_fit_over_a_temperature(kind):
    model = model_of(kind, torch.float16, 40.0, lean=300.0)
    row = torch.tensor([0.01, 0.02, 1.0, 0.01], dtype=torch.float64)
    given = Profile.from_matrix(torch.stack([row, torch.ones(HEADS)]))
    with tempered(model, given, check=False):
        l, expected, found = exact_layer(model, IDS, row)
    assert l.abs().max() / 0.01 < 6e4
    assert found.isfinite().all()
    error = (found.double() - expected).abs().amax(-1)
    assert error.median() <= 8 * torch.finfo(torch.float16).eps * expected.abs().amax()


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("factor", "T"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["eager", "sdpa", "softmax", "product"])
def test_finite_and_near_wherever_the_logits_fit(kind, dtype, factor, T, uniform):
    model = model_of(kind, dtype, factor)
    table = torch.ones(LAYERS, HEADS, dtype=torch.float64)
    table[0] = T
    if not uniform:
        table[0, 2] = 1.0
    with tempered(model, Profile.from_matrix(table), check=False):
        l, expected, found = exact_layer(model, IDS, table[0])
    assert l.abs().max() / T < 6e4
    if T < 1:  # where a query times 1/T, or its product before it is scaled, does not fit
        assert l.abs().max() * 8**0.5 / T > 5e3
    assert found.isfinite().all()
    # Rounding of the logits is large where they are: the half of the queries that are clear.
    error = (found.double() - expected).abs().amax(-1)
    size = expected.abs().amax()
    assert error.median() <= 8 * torch.finfo(dtype).eps * size
    assert error.max() <= 2 * size


def test_a_profile_of_1_beside_a_cold_one_keeps_its_bits():
    """Powers of two alone move between the query and the scaling."""
    state = TemperatureState(AttentionLayer("a", "decoder", 0, 2, 2), torch.device("cpu"))
    state.set(1, torch.tensor([[1.0, 0.01]]))
    assert state.shift == 128
    query = torch.randn(1, 2, 5, 8).half()
    moved, shift = query_over_t(query, state.beta, state.shift)
    assert torch.equal(moved[:, 0] * shift, query[:, 0])
    assert moved.abs().max() <= query.abs().max()


@pytest.mark.parametrize("kind", ["eager", "sdpa", "product"])
def test_biases_whose_sum_fits_where_they_do_not(kind):
    """A logit of 300 products less 300 of bias: over T, each is 75,000, and their sum is not."""
    model = model_of(kind, torch.float16, 30.0)
    mask = torch.full((1, 1, 9, 9), 300.0).half()
    mask[..., 4:] = 297.0
    hidden = torch.ones(9, 9).triu(1).bool()
    mask = mask.masked_fill(hidden, torch.finfo(torch.float16).min)
    without = (mask - 300.0).masked_fill(hidden, torch.finfo(torch.float16).min)
    table = torch.full((LAYERS, HEADS), 0.004, dtype=torch.float64)
    with torch.no_grad(), tempered(model, Profile.from_matrix(table), check=False):
        found = model(IDS, attention_mask=mask).logits
        # The same logits but for a constant, which no softmax sees.
        expected = model(IDS, attention_mask=without).logits
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
