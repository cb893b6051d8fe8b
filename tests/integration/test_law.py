"""The gap-counting function, and laws that are measured, against sorting and bisection."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tempering.attention import adaptive_profile, layout, measure_tokens
from tempering.attention.measuring.gaps import BINS, TEMPERATURES, GapSums, binned
from tempering.attention.measuring.law import _held, _slope, critical, measure_law
from tempering.errors import ArchitectureError, DataError, InputError
from tests.integration import attention_oracle as oracle


def test_bins_are_counts_of_gaps():
    logits = torch.randn(2, 3, 50, dtype=torch.float64, generator=torch.manual_seed(0)) * 9
    logits[0, 0, 30:] = -1e30  # hidden
    counts = binned(logits).cumsum(-1)
    for head in range(2):
        for query in range(3):
            row = logits[head, query]
            for bin_, edge in ((0, 0.0), (9, 40 * 81 / 320**2), (150, 8.7890625), (BINS, 40.0)):
                wanted = int((row >= row.max() - edge).sum())
                assert int(counts[head, query, bin_]) == wanted


def attention_of(logits):
    """An attention call whose products are these logits: one-dimensional keys."""
    from tempering.attention.logits import AttentionCall

    q_seq = logits.shape[0]
    query = torch.ones(1, 1, q_seq, 1, dtype=torch.float64)
    return AttentionCall(query, logits[-1][None, None, :, None], 1.0, causal=True)


def test_entropy_and_peak_at_every_temperature():
    """From counted gaps, against softmaxes in float64."""
    n = 600
    keys = torch.randn(n, dtype=torch.float64, generator=torch.manual_seed(1)) * 2
    sums = GapSums(1)
    sums.add(attention_of(keys.expand(n, n)))
    place = int((sums.queries > 0).nonzero()[-1])
    members = [i for i in range(n) if 16 * 2 ** (place / 2) <= i + 1 < 16 * 2 ** ((place + 1) / 2)]
    assert int(sums.queries[place]) == len(members)
    for k, T in enumerate(TEMPERATURES.tolist()):
        rows = [torch.softmax(keys[: i + 1] / T, 0) for i in members]
        entropy = sum(float(torch.special.entr(r).sum()) for r in rows) / len(rows)
        peak = sum(math.log(float(r.max())) for r in rows) / len(rows)
        assert float(sums.entropy[0, place, k]) / len(rows) == pytest.approx(entropy, abs=0.01)
        assert float(sums.log_peak[0, place, k]) / len(rows) == pytest.approx(peak, abs=0.01)
    mean = sums.counted[0, place].cumsum(-1) / len(members)
    for bin_ in (8, 32, 80):
        gap = 40 * (bin_ / 320) ** 2
        wanted = sum(int((keys[: i + 1] >= keys[: i + 1].max() - gap).sum()) for i in members)
        assert float(mean[bin_]) == pytest.approx(wanted / len(members))


@pytest.mark.parametrize("family", ["exponential", "normal"])
def test_critical_temperatures_of_known_families(family):
    """Against sorting, for logits whose gaps are exponential, and for normal ones."""
    n = 1200
    draw = torch.Generator().manual_seed(3)
    keys = torch.randn(n, dtype=torch.float64, generator=draw) * 3
    if family == "exponential":
        keys = -torch.rand(n, dtype=torch.float64, generator=draw).log()
    sums = GapSums(1)
    sums.add(attention_of(keys.expand(n, n)))
    there = (sums.queries > 0).nonzero()[:, 0]
    weight = sums.queries[there]
    found = critical(sums.log_counted[0, there] / weight[:, None])
    edges = torch.tensor([40 * (k / 320) ** 2 for k in range(321)], dtype=torch.float64)
    edges = edges[edges >= 0.25]
    for place, beta in zip(there.tolist(), found.tolist(), strict=True):
        low, high = (16 * 2 ** ((place + step) / 2) for step in (0, 1))
        members = [i for i in range(n) if low <= i + 1 < high]
        logs = torch.zeros_like(edges)
        for i in members:
            seen = keys[: i + 1].sort().values
            within = i + 1 - torch.searchsorted(seen, seen[-1] - edges)
            logs += within.double().log()
        assert beta == pytest.approx(float((logs / len(members) / edges).max()), abs=1e-9)
    log_n = sums.log_n[there] / weight
    entropy = sums.entropy[0, there] / weight[:, None]
    log_t = _held(entropy, log_n, torch.tensor(300.0).double().log())
    # Entropy grows with n at T = 1, so it is held by cooling.
    assert _slope(log_n, log_t, weight) < -0.05
    assert float(log_t[torch.isfinite(log_t)][-1]) < 0


def test_the_temperature_that_holds_a_level_is_the_one_measured_under_it():
    """What `measure_law` solves for the support holds it when it acts."""
    model = oracle.tiny_llama(max_position_embeddings=512)
    ids = oracle.tokens(1, 2, 256)
    law = measure_law(model, ids, length=90)
    assert law.length == 90 and law.slopes["support"].shape == (4, 4)
    assert law.counted.shape[:2] == (4, 4) and law.counted.shape[3] == BINS + 1
    assert torch.allclose(law.counted[..., -1], law.lengths.expand(4, 4, -1), rtol=0.02)
    # The first layer's logits don't depend on temperatures: there the law acts as measured.
    profile = law.profile(model)
    plain = measure_tokens(model, ids, buckets=16).by_position["entropy"][0]
    held = measure_tokens(model, ids, profile=profile, buckets=16).by_position["entropy"][0]
    log_n = torch.tensor([math.log(16 * i + 8.5) for i in range(16)], dtype=torch.float64)
    ones = torch.ones_like(log_n)
    before = sum(_slope(log_n, row, ones) for row in plain) / 4
    after = sum(_slope(log_n, row, ones) for row in held) / 4
    assert before > 0.3 and abs(after) < 0.3 * before


def test_bad_input():
    model = oracle.tiny_llama(max_position_embeddings=512)
    with pytest.raises(DataError, match="a chunk has 40; give longer chunks"):
        measure_law(model, oracle.tokens(0, 1, 40))
    with pytest.raises(InputError, match="n0 lies in 16 to 128"):
        measure_law(model, oracle.tokens(0, 1, 128), length=2)
    with pytest.raises(InputError, match="at least one chunk"):
        measure_law(model, torch.zeros(0, 128, dtype=torch.long))
    law = measure_law(model, oracle.tokens(0, 1, 128))
    with pytest.raises(InputError, match="a law holds support, peak, critical; not 'heat'"):
        law.profile(model, "heat")
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(ArchitectureError, match="attention code of its own"):
        measure_law(bloom, oracle.tokens(0, 1, 128))


def test_a_layer_with_a_narrow_window_has_no_law():
    model = oracle.tiny_llama(
        kind=(MistralConfig, MistralForCausalLM), sliding_window=20, max_position_embeddings=512
    )
    law = measure_law(model, oracle.tokens(0, 1, 128))
    assert bool(law.slopes["support"].isnan().all())
    profile = law.profile(model)
    assert all(slope == 0 for item in profile.rules for slope in item.slope)
    assert layout(model).names == profile.names
    assert adaptive_profile("power(0,47)", model).rules[0].slope == 0


def test_a_window_that_ends_before_n0_is_where_its_layer_keeps_its_temperature():
    model = oracle.tiny_llama(
        kind=(MistralConfig, MistralForCausalLM), sliding_window=64, max_position_embeddings=512
    )
    law = measure_law(model, oracle.tokens(0, 1, 512))
    assert law.length == 188 and law.lengths_kept == pytest.approx((64,) * len(law.layers))
    for item in law.profile(model).rules:
        assert any(item.slope)
        beta = item.of_counts(torch.tensor([[[64]]]))
        torch.testing.assert_close(beta, torch.ones_like(beta), rtol=1e-9, atol=0)
    full = measure_law(oracle.tiny_llama(max_position_embeddings=512), oracle.tokens(0, 1, 128))
    assert set(full.lengths_kept) == {47.0}
