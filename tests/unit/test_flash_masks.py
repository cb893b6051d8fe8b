"""What flash kernels hide by themselves, read off their arguments: against a loop over pairs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tempering.attention.logits import AttentionCall, sliced_logits
from tempering.attention.measuring.streaming import moments
from tempering.errors import ArchitectureError

KEYS = 9


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [1, 3, KEYS])
def test_the_last_query_stands_at_the_last_key(queries, causal, window, padded):
    """As when a prompt is read in pieces, or goes on from a cache."""
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    module = SimpleNamespace(config=config, is_causal=causal)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 8, generator=generator).double() for n in (queries, KEYS))
    mask = torch.ones(2, KEYS, dtype=torch.long)
    mask[1, :2] = 0
    mask = mask if padded else None
    given = {"sliding_window": window}
    seen = torch.zeros(2, 3, queries, KEYS, dtype=torch.bool)
    for row in range(2):
        for i in range(queries):
            place = KEYS - queries + i
            for j in range(KEYS):
                near = window is None or abs(place - j) < window
                real = mask is None or bool(mask[row, j])
                seen[row, :, i, j] = near and real and (j <= place or not causal)
    found = torch.cat(list(sliced_logits(module, query, key, mask, given)), 2)
    assert torch.equal(found > -torch.inf, seen)
    call = AttentionCall.of(module, query, key, mask, given)
    torch.testing.assert_close(
        moments(call).partition,
        (found - found.amax(-1, keepdim=True)).exp().nan_to_num().sum(-1).double(),
    )


@pytest.mark.parametrize(
    "given",
    [
        {"cu_seq_lens_q": torch.tensor([0, 4, 9])},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
    ],
    ids=["lengths", "positions"],
)
def test_texts_packed_in_one_row_are_refused(given):
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    module = SimpleNamespace(config=config, is_causal=True)
    query = key = torch.zeros(1, 3, KEYS, 8)
    with pytest.raises(ArchitectureError, match="a row of its own"):
        AttentionCall.of(module, query, key, None, given)
    AttentionCall.of(module, query, key, None, {"position_ids": torch.arange(KEYS)[None]})
    config._attn_implementation = "eager"
    AttentionCall.of(module, query, key, None, given)
