"""Softmaxes whose results a module throws away: proven to change nothing, or left refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam2HieraDetConfig, Sam2HieraDetModel
from transformers.models.sam2 import modeling_sam2

from tempering import Profile, layout, tempered
from tempering.attention.examining.unused import results_unused
from tempering.errors import ArchitectureError


class _Attention(nn.Module):
    def __init__(self, weigh) -> None:
        super().__init__()
        self.weigh = weigh

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.weigh(x)


class _Model(nn.Module):
    def __init__(self, *weighs) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Attention(weigh) for weigh in weighs)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        extra = []
        for layer in self.layers:
            x, more = layer(x)
            extra.append(more)
        return (x * self.scale, *extra)


def _thrown_away(x):
    F.softmax(x @ x.transpose(1, 2), -1)
    return x, x


def _method_thrown_away(x):
    (x @ x.transpose(1, 2)).softmax(-1)
    return x, x


def _used(x):
    return F.softmax(x @ x.transpose(1, 2), -1) @ x, x


def _returned(x):
    return x, torch.softmax(x @ x.transpose(1, 2), -1)


def _hardly_used(x):
    return x + 1e-30 * F.softmax(x @ x.transpose(1, 2), -1).sum(), x


@pytest.mark.parametrize(
    ("weighs", "names", "unused"),
    [
        ([_thrown_away], ["layers.0"], True),
        ([_method_thrown_away], ["layers.0"], True),
        ([_thrown_away, _thrown_away], ["layers.0", "layers.1"], True),
        ([_used], ["layers.0"], False),
        ([_returned], ["layers.0"], False),
        ([_hardly_used], ["layers.0"], False),
        ([_thrown_away, _used], ["layers.0", "layers.1"], False),
        ([_thrown_away, _used], ["layers.0"], True),  # another module's are left as they are
    ],
)
def test_nan_in_their_place_tells_whether_results_are_used(weighs, names, unused):
    inputs = {"x": torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))}
    assert results_unused(_Model(*weighs), inputs, False, names) is unused


def _sam2() -> Sam2HieraDetModel:
    config = Sam2HieraDetConfig(
        hidden_size=16,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 4, 2],
        window_positional_embedding_background_size=[4, 4],
        global_attention_blocks=[3],
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return Sam2HieraDetModel(config).eval()


def _images() -> dict[str, Tensor]:
    row = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": row.expand(2, -1, -1, -1).contiguous()}


def test_sam2_is_tempered_by_its_other_softmax():
    """Against the model with queries over T, which is softmax(q k / T)."""
    model, images = _sam2(), _images()
    plan = layout(model, images)
    assert [layer.heads for layer in plan.layers] == [1, 2, 4, 4, 8]
    assert {layer.route for layer in plan.layers} == {"interface"}
    plain = model(**images).last_hidden_state
    hot_rows = [torch.full((layer.heads,), 2.0).double() for layer in plan.layers]
    with tempered(model, Profile.from_rows(hot_rows, plan), sample=images):
        hot = model(**images).last_hidden_state
    assert torch.equal(model(**images).last_hidden_state, plain)
    for name in plan.names:
        model.get_submodule(name).scale /= 2.0
    expected = model(**images).last_hidden_state
    assert (expected - plain).abs().max() > 1e-4
    torch.testing.assert_close(hot, expected, rtol=1e-5, atol=1e-6)


def test_sam2_that_used_its_other_softmax_is_refused(monkeypatch):
    attend = modeling_sam2.Sam2MultiScaleAttention.forward

    def forward(self, hidden_states, **kwargs):
        query = self.qkv(hidden_states)
        query = query.reshape(*hidden_states.shape[:1], -1, self.num_attention_heads, 3, 1)[..., 0]
        weights = F.softmax(query @ query.transpose(-2, -1), dim=-1)
        return attend(self, hidden_states, **kwargs) + weights.mean()

    monkeypatch.setattr(modeling_sam2.Sam2MultiScaleAttention, "forward", forward)
    with pytest.raises(ArchitectureError, match="attn"):
        layout(_sam2(), _images())
