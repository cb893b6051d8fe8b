"""What is tuned: log T of every head from a few numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.tuning import make_basis, pattern_basis, uniform_basis
from tempering.errors import InputError, ScheduleError
from tempering.schedules import schedule


def _plan(heads=(4, 4, 4, 2), stacks=None):
    stacks = stacks or ["decoder"] * len(heads)
    index: dict[str, int] = {}
    layers = []
    for stack, count in zip(stacks, heads):
        place = index.setdefault(stack, 0)
        index[stack] += 1
        layers.append(AttentionLayer(f"{stack}.{place}.attn", stack, place, count, count // 2))
    return Layout(tuple(layers), (), index)


class _Model(nn.Module):
    def __init__(self, kinds=None):
        super().__init__()
        inner = SimpleNamespace(layer_types=kinds)
        self.config = SimpleNamespace(get_text_config=lambda: inner)


def _by_hand(basis, theta):
    """log T of every head, one product at a time."""
    rows = []
    for row in basis.matrix.tolist():
        rows.append(sum(b * t for b, t in zip(row, theta.tolist())))
    return rows


@pytest.mark.parametrize(
    ("per", "numbers"), [("head", 14), ("layer", 4), ("kv", 7), ("type", 1), ("spline", 4)]
)
def test_every_choice_gives_log_t_of_every_head(per, numbers):
    plan = _plan()
    basis = make_basis(_Model(), plan, per)
    assert basis.matrix.shape == (14, numbers) and len(basis.names) == numbers
    assert len(set(basis.names)) == numbers
    theta = torch.randn(numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = basis.rows(theta)
    assert [len(row) for row in rows] == [4, 4, 4, 2]
    assert torch.allclose(torch.cat(rows), torch.tensor(_by_hand(basis, theta)).double())
    both = basis.rows(torch.stack([theta, 2 * theta]))
    assert torch.allclose(torch.cat(both, 1)[1], 2 * torch.cat(rows))


def test_heads_that_share_keys_and_values_share_a_number():
    basis = make_basis(_Model(), _plan(heads=(4,)), "kv")
    assert basis.matrix.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert basis.names == ("layer 0 key-value head 0", "layer 0 key-value head 1")


def test_layers_of_one_kind_share_a_number():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    basis = make_basis(_Model(kinds), _plan(), "type")
    assert basis.names == ("sliding_attention", "full_attention")
    assert [row.index(1.0) for row in basis.matrix.tolist()] == [0] * 4 + [1] * 4 + [0] * 4 + [1, 1]


def test_names_tell_the_stacks_of_a_model_apart():
    basis = make_basis(_Model(), _plan((2, 2), ["encoder", "decoder"]), "layer")
    assert basis.names == ("encoder layer 0", "decoder layer 0")


def test_a_spline_goes_through_its_knots_and_is_linear_in_between_for_a_line():
    plan = _plan(heads=(2,) * 11)
    basis = make_basis(_Model(), plan, "spline")
    assert basis.names[0] == "spline at 0.00" and basis.names[-1] == "spline at 1.00"
    theta = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)
    got = torch.stack(basis.rows(theta))[:, 0]
    assert torch.allclose(got, torch.linspace(-0.5, 0.5, 11, dtype=torch.float64), atol=1e-12)


def test_a_pattern_has_one_number_its_log_amplitude():
    plan = _plan(heads=(3,) * 8)
    basis = pattern_basis(plan, ["throb(12,3,1,12)"])
    theta = torch.tensor([math.log(1.3)]).double()
    want = schedule("throb(12,3,1,12)").amplitude(1.3).sample(8)
    assert torch.allclose(torch.stack(basis.rows(theta))[:, 1].exp(), want, rtol=1e-12)
    assert basis.names == ("log amplitude of throb(12,3,1,12)",)


def test_one_number_for_the_whole_model():
    rows = uniform_basis(_plan()).rows(torch.tensor([0.25]).double())
    assert torch.cat(rows).tolist() == [0.25] * 14


def test_what_cannot_be_tuned_is_refused():
    plan = _plan()
    with pytest.raises(InputError, match="per head, layer, kv, type, spline; not per 'token'"):
        make_basis(_Model(), plan, "token")
    with pytest.raises(InputError, match="a spline over 4 layers has 2 to 4 knots, not 9"):
        make_basis(_Model(), plan, "spline", knots=9)
    with pytest.raises(InputError, match="is flat, so it has no amplitude"):
        pattern_basis(plan, ["constant(2)"])
    with pytest.raises(InputError, match="at least one pattern"):
        pattern_basis(plan, [])
    with pytest.raises(ScheduleError):
        pattern_basis(plan, ["wobble(1)"])
