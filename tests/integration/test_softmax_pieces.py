"""Attention logits that are tempered piece by piece give what all of them at once give."""

from __future__ import annotations

import pytest
import torch

from tempering.attention import axes
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.hooks import softmax_route
from tempering.attention.profiles.profile import Profile
from tests.integration.test_self_check import build

IDS = torch.randint(0, 30, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :9] = 0  # queries of padding see nothing but masked keys


def profile(model, seed: int = 1) -> Profile:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(layout(model).layers), max(layer.heads for layer in layout(model).layers))
    return Profile.from_matrix(torch.rand(shape, generator=generator).mul(2.4).sub(1.2).exp())


@pytest.fixture
def sizes(monkeypatch):
    """How many logits were divided at a time."""
    seen = []
    whole = softmax_route.divided

    def divided(logits, *more):
        seen.append(logits.numel())
        return whole(logits, *more)

    monkeypatch.setattr(softmax_route, "divided", divided)
    return seen


def run(model, given, piece, monkeypatch):
    monkeypatch.setattr(softmax_route, "_PIECE", piece)
    with torch.no_grad(), tempered(model, given, check=False):
        return model(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("name", ["bloom", "prophetnet"])
@pytest.mark.parametrize("piece", [1, 100, 1000])
@pytest.mark.parametrize("autocast", [False, True])
def test_pieces_are_the_whole(name, piece, autocast, sizes, monkeypatch):
    model = build(name)
    given = profile(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = run(model, given, 10**9, monkeypatch)
        at_once = max(sizes)
        sizes.clear()
        found = run(model, given, piece, monkeypatch)
    assert max(sizes) <= max(piece, IDS.shape[1] * 4) < at_once
    assert found.dtype == expected.dtype and torch.isfinite(found).all()
    assert torch.equal(found, expected)


def test_the_patterns_met_here_put_heads_on_different_axes():
    met = {
        p for name in ("bloom", "prophetnet") for x in layout(build(name)).layers for p in x.axes
    }
    assert {axes.STANDARD, axes.STREAMS} <= met


def test_pieces_with_a_profile_for_each_row(sizes, monkeypatch):
    model = build("bloom")
    given = [profile(model, 1), profile(model, 2)]
    expected = run(model, given, 10**9, monkeypatch)
    sizes.clear()
    assert torch.equal(run(model, given, 100, monkeypatch), expected)
    assert max(sizes) <= 100


def test_a_gradient_takes_all_logits_at_once(sizes, monkeypatch):
    monkeypatch.setattr(softmax_route, "_PIECE", 100)
    model = build("bloom")
    with tempered(model, profile(model), check=False):
        model(input_ids=IDS, attention_mask=MASK).logits.sum().backward()
    assert min(sizes) > 100
    assert all(p.grad is not None for p in model.parameters())
