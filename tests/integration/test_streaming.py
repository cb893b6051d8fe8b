"""The streamed statistics of a softmax against loops over its weights in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tempering.attention.logits import AttentionCall
from tempering.attention.measuring import streaming
from tempering.attention.measuring.measure import QUANTITIES, measure_tokens, posteriors
from tempering.attention.profiles.profile import Profile
from tempering.errors import EnergyError, InputError
from tests.integration import attention_oracle as oracle


@pytest.fixture
def small_tiles(monkeypatch):
    """Many blocks even for short texts."""
    monkeypatch.setattr(streaming, "_ENTRIES_CPU", 64)
    monkeypatch.setattr(streaming, "_FEWEST_QUERIES", 3)
    monkeypatch.setattr(streaming, "_MOST_QUERIES", 7)


def row_statistics(x, places, query, sink, learned=False):
    """One query's posterior by its definition; x: visible logits, places: their positions."""
    x = x.double()
    r = torch.softmax(x, 0)
    distances = torch.tensor([abs(query - j) for j in places]).double()
    others = torch.tensor([place != sink for place in places])
    out = {
        "entropy": float(torch.special.entr(r).sum()),
        "mean_energy": -float((r * x).sum()),
        "heat_capacity": float((r * (x - (r * x).sum()) ** 2).sum()),
        "peak": float(r.max()),
        "sink_share": float(r[~others].sum()),
        "log_simpson": -math.log(float((r * r).sum())),
        "saturation": 1 - float((r * r).sum()),
    }
    if not learned:
        out["distance"] = float((r * distances).sum())
    if bool(others.any()):
        p = torch.softmax(x[others], 0)
        out["entropy_without_sink"] = float(torch.special.entr(p).sum())
        out["distance_without_sink"] = float((p * distances[others]).sum())
        if learned:
            out["distance"] = out["distance_without_sink"]
    return out


def finished(call):
    """All logits of a call in float64, -inf where hidden; the learned sink in the last column."""
    query, key = call.query.double(), call.key.double()
    groups = query.shape[1] // key.shape[1]
    x = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * call.scaling
    if call.cap is not None:
        x = torch.tanh(x / call.cap) * call.cap
    if call.bias is not None:
        x = x + call.bias
    q_seq, kv_seq = x.shape[2:]
    seen = torch.ones(1, 1, q_seq, kv_seq, dtype=torch.bool)
    at, place = torch.arange(q_seq)[:, None], torch.arange(kv_seq)
    if call.causal:
        seen = seen & (place <= at)
        if call.window is not None:
            seen = seen & (place > at - call.window)
    if call.mask is not None and call.mask.dtype == torch.bool:
        seen = seen & call.mask
    elif call.mask is not None:
        seen = seen & (call.mask > -1e30)
        x = x + call.mask
    x = x.masked_fill(~seen, -math.inf)
    if call.sinks is not None:
        sinks = call.sinks.double()
        sinks = sinks.view(1, -1, 1, 1) if sinks.ndim == 1 else sinks
        x = torch.cat([x, sinks.expand(*x.shape[:3], 1)], -1)
    return x


def agree(call, relative):
    """Every statistic of every query of a call."""
    found, exact = posteriors(call), finished(call)
    keys, offset = call.key.shape[2], call.key.shape[2] - call.query.shape[2]
    sink = keys if call.sinks is not None else 0
    compared = 0
    for row, head, query in torch.cartesian_prod(*(torch.arange(n) for n in exact.shape[:3])):
        x = exact[row, head, query]
        places = (x > -math.inf).nonzero().flatten().tolist()
        assert found.seen[row, head, query] == bool(places)
        assert found.others[row, head, query] == any(place != sink for place in places)
        if not places:
            assert all(value[row, head, query] == 0 for value in found)
            continue
        at = int(query) + (0 if call.causal else offset)
        wanted = row_statistics(x[places], places, at, sink, call.sinks is not None)
        for name, value in wanted.items():
            ours = float(getattr(found, name)[row, head, query])
            assert ours == pytest.approx(value, rel=relative, abs=relative), (name, int(query))
            compared += 1
    assert compared > 100


def random_call(*, batch=2, heads=4, kv_heads=2, q_seq=17, kv_seq=17, dtype=torch.float32, **more):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    # As models make them: heads are a view into the tokens' states.
    query = (draw(batch, q_seq, heads, 8) * 2).transpose(1, 2)
    return AttentionCall(query, draw(batch, kv_seq, kv_heads, 8).transpose(1, 2), 0.4, **more)


def hiding(kind, dtype=torch.bool):
    """Causal masks [batch, 1, q, k]; "padded" hides the first keys of row 1."""
    seen = torch.ones(2, 1, 17, 17, dtype=torch.bool).tril()
    if kind == "padded":
        seen[1, :, :, :5] = False
    if kind == "window":
        seen = seen.triu(-3)
    if dtype == torch.bool:
        return seen
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(2, 1, 17, 17, generator=generator, dtype=dtype)
    return torch.where(seen, bias, torch.finfo(dtype).min)


CALLS = {
    "causal": {"causal": True},
    "one key-value head": {"causal": True, "kv_heads": 1},
    "a key-value head each": {"causal": True, "kv_heads": 4},
    "window": {"causal": True, "window": 4},
    "everything seen": {},
    "more keys than queries": {"kv_seq": 23},
    "one key": {"kv_seq": 1},
    "padded": {"mask": hiding("padded")},
    "padded, additive": {"mask": hiding("padded", torch.float32)},
    "window as a mask": {"mask": hiding("window")},
    "window as a mask, one for all rows": {"mask": hiding("window")[:1]},
    "real keys": {"causal": True, "mask": hiding("padded")[:, :, -1:]},
    "capped": {"causal": True, "cap": 3.0},
    "capped by head": {"causal": True, "cap": torch.tensor([2.0, 3.0, 4.0, 9.0]).view(1, 4, 1, 1)},
    "bias": {"bias": torch.linspace(-2, 2, 4 * 17 * 17).view(1, 4, 17, 17), "causal": True},
    "capped, padded": {"mask": hiding("padded"), "cap": 3.0},
    "learned sinks": {"causal": True, "sinks": torch.tensor([-1.0, 0.0, 2.0, 9.0])},
    "learned sinks by query": {
        "mask": hiding("padded"),
        "sinks": torch.linspace(-3, 3, 2 * 4 * 17).view(2, 4, 17, 1),
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_every_statistic_of_every_query(name, small_tiles):
    agree(random_call(**CALLS[name]), 4e-6)


@pytest.mark.parametrize("name", ["causal", "window", "padded", "learned sinks"])
def test_in_float64(name, small_tiles):
    agree(random_call(**CALLS[name], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(dtype):
    """Products are formed in float32 from what the model holds."""
    agree(random_call(causal=True, dtype=dtype), 4e-6)


@given(
    entries=st.integers(1, 4000),
    fewest=st.integers(1, 20),
    most=st.integers(1, 40),
    name=st.sampled_from(["causal", "window", "padded", "window as a mask"]),
)
@settings(max_examples=40, deadline=None)
def test_the_cut_into_tiles_changes_nothing(entries, fewest, most, name):
    call = random_call(**CALLS[name], dtype=torch.float64)
    whole = posteriors(call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_ENTRIES_CPU", entries)
        patch.setattr(streaming, "_FEWEST_QUERIES", fewest)
        patch.setattr(streaming, "_MOST_QUERIES", most)
        for cut, value in zip(posteriors(call), whole, strict=True):
            torch.testing.assert_close(cut, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strength", [0.5, 3.0, 10.0])
def test_a_sink_that_holds_nearly_all(strength):
    """What is left beside it is measured as well as if it were not there."""
    call = random_call(causal=True, heads=2, kv_heads=2)
    call.query.abs_()
    call.key[:, :, 0] = strength
    found, exact = posteriors(call), finished(call)
    assert strength < 10 or found.sink_share.median() > 1 - 1e-9
    for head in range(2):
        for query in range(2, 17):
            p = torch.softmax(exact[0, head, query, 1 : query + 1], 0)
            ours = float(found.entropy_without_sink[0, head, query])
            assert ours == pytest.approx(float(torch.special.entr(p).sum()), rel=1e-5)
            x = exact[0, head, query, : query + 1]
            gap = x[0] - x[1:]
            odds = (-gap).exp()
            entropy = float(odds.sum().log1p() + (odds * gap).sum() / (1 + odds.sum()))
            # Entropies of 1e-9 nats keep their digits, up to what the logits are rounded to.
            rounding = 2e-7 * float(x.abs().max())
            ours = float(found.entropy[0, head, query])
            assert ours == pytest.approx(entropy, rel=5 * rounding, abs=1e-30)


def test_limits():
    """Equal logits share; one far above the others holds all."""
    call = random_call(causal=True, heads=1, kv_heads=1)
    call.query.zero_()
    found = posteriors(call)
    keys = torch.arange(1, 18).double()
    torch.testing.assert_close(found.entropy[0, 0], keys.log(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.log_simpson[0, 0], keys.log(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.peak[0, 0], 1 / keys, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.distance[0, 0], (keys - 1) / 2, rtol=1e-6, atol=1e-5)
    call.query.fill_(1.0)
    call.key.fill_(-100.0)
    call.key[:, :, 3] = 100.0
    found = posteriors(call)
    assert (found.entropy[..., 3:] < 1e-30).all()
    assert (found.saturation[..., 3:] < 1e-30).all()
    assert (found.peak[..., 3:] == 1).all()


def by_hand(inputs, low, high):
    """Means over the queries of positions low..high, for each head; inputs [b, heads, q, k]."""
    out = {}
    for head in range(inputs.shape[1]):
        rows = []
        for text in inputs[:, head]:
            for query in range(low, high + 1):
                places = (text[query] > -math.inf).nonzero().flatten().tolist()
                rows.append(row_statistics(text[query][places], places, query, 0))
        names = {name for row in rows for name in row}
        for name in names:
            values = [row[name] for row in rows if name in row]
            out.setdefault(name, []).append(sum(values) / len(values))
    exact = {name: torch.tensor(values, dtype=torch.float64) for name, values in out.items()}
    exact["support"] = exact["entropy"].exp()
    exact["support_simpson"] = exact.pop("log_simpson").exp()
    if "entropy_without_sink" in exact:
        exact["support_without_sink"] = exact.pop("entropy_without_sink").exp()
    return exact


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_measured_quantities_and_buckets(precision):
    model, relative = oracle.tiny_llama(), 1e-5
    if precision == "float64":
        model, relative = oracle.in_double(model), 1e-10
    chunks = oracle.tokens(1, 2, 14)
    T = oracle.random_temperatures(2, oracle.LAYERS, oracle.HEADS)
    found = measure_tokens(model, chunks, profile=Profile.from_matrix(T), buckets=3)
    inputs = oracle.forward(model, chunks, T).inputs
    assert found.positions == ((0, 4), (5, 9), (10, 13))
    for layer in range(oracle.LAYERS):
        whole = by_hand(inputs[layer], 0, 13)
        assert set(whole) == set(QUANTITIES)
        for name, values in whole.items():
            ours = getattr(found, name)[layer]
            torch.testing.assert_close(ours, values, rtol=relative, atol=relative)
        for bucket, (low, high) in enumerate(found.positions):
            for name, values in by_hand(inputs[layer], low, high).items():
                ours = found.by_position[name][layer, :, bucket]
                torch.testing.assert_close(ours, values, rtol=relative, atol=relative)


def test_support_without_the_sink_of_queries_that_see_nothing_else():
    found = measure_tokens(oracle.tiny_llama(), oracle.tokens(1, 1, 4), buckets=4)
    assert found.by_position["support_without_sink"][..., 0].isnan().all()
    assert (found.by_position["support"][..., 0] == 1).all()
    assert not found.support_without_sink.isnan().any()


def test_agrees_with_float64_at_two_thousand_tokens():
    call = random_call(batch=1, heads=2, kv_heads=1, q_seq=2048, kv_seq=2048, causal=True)
    exact = finished(call)
    entropy = torch.special.entr(torch.softmax(exact, -1)).sum(-1)
    found = posteriors(call).entropy
    assert ((found - entropy) / entropy)[..., 1:].abs().max() < 1e-5
    assert (found.mean(2) / entropy.mean(2) - 1).abs().max() < 2e-7


class Largest(TorchDispatchMode):
    """The most entries that any one tensor had."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.entries = max(self.entries, output.numel())
        return output


def test_memory_is_linear_in_the_length():
    largest = []
    for length in (1024, 4096):
        call = random_call(batch=1, heads=2, kv_heads=1, q_seq=length, kv_seq=length, causal=True)
        with Largest() as seen:
            posteriors(call)
        largest.append(seen.entries)
    assert largest[1] <= max(4 * largest[0], 1 << 18)
    assert largest[1] < 4096 * 4096 / 16


def test_logits_that_are_no_numbers():
    model = oracle.tiny_llama()
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] = math.nan
    with pytest.raises(EnergyError, match=r"layers\.2\.self_attn, head 0, query 0.*NaN"):
        measure_tokens(model, oracle.tokens(1, 1, 6))


@pytest.mark.parametrize("buckets", [0, 15])
def test_too_many_buckets(buckets):
    with pytest.raises(InputError, match=f"1 to 14 parts.*not {buckets}"):
        measure_tokens(oracle.tiny_llama(), oracle.tokens(1, 1, 14), buckets=buckets)
