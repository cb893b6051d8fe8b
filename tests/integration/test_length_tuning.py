"""Two numbers a head: live slopes against differences, planted laws found, data cut by length."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tempering import Profile, layout, tempered
from tempering.attention.profiles.length_rules import Power
from tempering.attention.profiles.rules import PerHead
from tempering.attention.tuning import (
    from_batches,
    from_functions,
    from_lengths,
    from_text,
    make_basis,
    tune,
)
from tempering.attention.tuning.batches import text_batches
from tempering.attention.tuning.live_law import SLOPE_UNIT, LawRange
from tempering.attention.tuning.live_temperatures import live_temperatures
from tempering.attention.tuning.passes import gradient_pass, loss_pass
from tempering.chunks import mixed_chunks
from tempering.errors import DataError, InputError
from tests.integration.attention_oracle import byte_tokenizer, in_double
from tests.integration.tuning_tiny import HEADS, LAYERS, WORDS, sampled_text, tiny_llama

BOUNDS = (0.2, 5.0)
SIZE = LAYERS * HEADS


def theta_of(seed=0, scale=0.4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 * SIZE, dtype=torch.float64, generator=generator) * scale


def law_by_hand(theta, head, n, law):
    """log T(n) of one head from the formula at the head of `live_law`."""

    def squash(x):
        c = math.log(BOUNDS[1]) if x > 0 else -math.log(BOUNDS[0])
        return c * math.tanh(x / c)

    a, b = float(theta[head]), SLOPE_UNIT * float(theta[SIZE + head])
    first = squash(a - b * math.log(law.length))
    last = squash(a + b * math.log(law.longest / law.length))
    return first + (last - first) * math.log(n) / math.log(law.longest)


def test_a_live_law_is_that_of_its_profile_and_stays_within_bounds():
    model = tiny_llama(dtype=torch.float64)
    law = LawRange(7, 23)
    pieces = from_batches(
        "text", text_batches(torch.randint(0, WORDS, (2, 24), generator=torch.manual_seed(0)))
    ).pieces
    basis = make_basis(model, layout(model), "head")
    for scale in (0.4, 30.0):
        theta = theta_of(1, scale)
        with live_temperatures(model, basis, BOUNDS, checkpoint=False, law=law) as live:
            assert live.size == 2 * SIZE and live.names[SIZE] == "slope of layer 0 head 0"
            found = loss_pass(live, theta, pieces)
            profile = live.profile(theta)
            assert loss_pass(live, None, pieces).losses.tolist() != found.losses.tolist()
            coldest, hottest = live.extent(theta)
        logs = []
        for place in range(SIZE):
            layer, head = divmod(place, HEADS)
            item = profile.rules[layer]
            for n in (1, 4, 7, 23):
                ours = math.log(float(profile.rows[layer][head])) + item.slope[head] * math.log(
                    n / item.length
                )
                assert ours == pytest.approx(law_by_hand(theta, place, n, law), abs=1e-9)
                logs.append(ours)
        assert math.log(BOUNDS[0]) - 1e-9 <= min(logs) and max(logs) <= math.log(BOUNDS[1]) + 1e-9
        assert (math.log(coldest), math.log(hottest)) == pytest.approx((min(logs), max(logs)))
        with tempered(model, profile), torch.no_grad():
            under = [float(piece.losses(model).mean()) for piece in pieces]
        assert under == pytest.approx(found.losses.tolist(), abs=1e-9)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_of_both_numbers_by_rows(checkpoint):
    """Every row of a batch has its own gradient in a and in b, as differences give it."""
    model = in_double(tiny_llama())
    ids = torch.randint(0, WORDS, (3, 20), generator=torch.manual_seed(1))
    pieces = from_batches("text", text_batches(ids)).pieces
    basis = make_basis(model, layout(model), "head")
    theta, law = theta_of(2), LawRange(6, 19)
    with live_temperatures(model, basis, BOUNDS, checkpoint=checkpoint, law=law) as live:
        run = gradient_pass(live, theta, pieces, rows=3, draws=2)
        assert run.gradients.shape == (3, 2 * SIZE) and run.drawn.shape == (2, 3, 2 * SIZE)
        moved = {}
        for number in (0, 5, SIZE, SIZE + 7):
            for sign in (1, -1):
                point = theta.clone()
                point[number] += sign * 1e-5
                moved[number, sign] = live.profile(point)
    for number in (0, 5, SIZE, SIZE + 7):
        ends = [_losses_in_double(model, moved[number, sign], ids) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-5
        assert torch.allclose(run.gradients[:, number], slope, rtol=1e-4, atol=1e-7)
    assert all(weight.grad is None for weight in model.parameters())


def _losses_in_double(model, profile, ids):
    """Mean -log q of each row, in float64."""
    with tempered(model, profile), torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
    return -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].mean(1)


def test_newton_finds_planted_slopes():
    """Text written under two numbers a head: slopes come back, and beat constants."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(4)
    slopes = torch.randn(LAYERS, HEADS, generator=generator, dtype=torch.float64) * 0.25
    rules = tuple(Power(PerHead(row.tolist()), 8.0) for row in slopes)
    truth = replace(Profile.neutral(model), rules=rules)
    ids = sampled_text(model, truth, 360, 40, seed=3)
    learned = from_batches("planted", text_batches(ids[:300]))
    test = from_batches("test", text_batches(ids[300:]))
    fast = {"rows": 60, "damping": 0.3, "radius": 0.5, "steps": 4, "prior_sd": 1.0, "held_out": 0.2}
    found = tune(model, learned, rule="power", **fast)
    assert found.names[:1] == ("layer 0 head 0",) and len(found.names) == 2 * SIZE
    own = torch.tensor([item.slope for item in found.profile.rules], dtype=torch.float64)
    correlation = float(torch.corrcoef(torch.stack([own.flatten(), slopes.flatten()]))[0, 1])
    assert correlation > 0.6
    constant = tune(model, learned, **fast)
    assert not any(constant.profile.rules)

    def loss(profile):
        with tempered(model, profile), torch.no_grad():
            return float(torch.cat([p.losses(model) for p in test.pieces]).mean())

    assert loss(found.profile) < loss(constant.profile) < loss(Profile.neutral(model))


def test_a_run_with_a_rule_goes_on_from_its_state(tmp_path):
    model = tiny_llama()
    ids = sampled_text(model, None, 20, 24, seed=1)
    learned = from_batches("text", text_batches(ids))
    options = {"rows": 20, "held_out": 0, "steps": 2, "state": tmp_path / "run"}
    once = tune(model, learned, rule="power", **options)
    again = tune(model, learned, rule="power", **options)
    assert torch.equal(once.theta, again.theta)
    with pytest.raises(InputError, match="keeps another run"):
        tune(model, learned, **options)


def test_the_range_of_a_law_is_that_of_the_data():
    lengths = from_lengths(byte_tokenizer(), "abcdefgh" * 40, [20, 60])[0]
    law = LawRange.of([lengths], [])
    logs = [math.log(t) for piece in lengths.pieces for t in range(1, piece.source.ids.shape[1])]
    assert law == (LawRange(round(math.exp(sum(logs) / len(logs))), 59))


def test_chunks_of_mixed_lengths_share_no_token():
    ids = torch.arange(1000)
    chunks = mixed_chunks(ids, [16, 64, 32])
    assert [len(chunk) for chunk in chunks[:7]] == [16] * 4 + [32] * 2 + [64]
    assert torch.equal(torch.cat(chunks), ids[: 5 * 192])
    few = mixed_chunks(ids, [16, 64, 32], limit=2)
    assert len(few) == 14 and int(few[7][0]) == 4 * 192
    text = "".join(chr(97 + i % 26) for i in range(1000))
    learned, held = from_lengths(byte_tokenizer(), text, [16, 32], held_length=100)
    assert [piece.count for piece in held.pieces] == [99, 99]
    assert sum(piece.count + 1 for piece in learned.pieces) == 800 // 64 * 64
    assert held.name == "text, 100 tokens"


@pytest.mark.parametrize(
    ("lengths", "held", "words"),
    [
        ([16, 900], None, "has 1000 tokens, and one round of chunks of 16, 900 tokens takes 1796"),
        ([16, 400], 300, "before those held out for 300: the text has 700 tokens, and one round"),
        ([16], 2000, "less than one chunk of the held-out length 2000"),
    ],
)
def test_text_shorter_than_the_lengths_asked_for(lengths, held, words):
    with pytest.raises(DataError, match=words):
        from_lengths(byte_tokenizer(), "x" * 1000, lengths, held_length=held)


def test_what_cannot_be_learned_is_refused():
    model = tiny_llama()
    text = from_text(byte_tokenizer(), "x" * 200, chunk=20)
    with pytest.raises(InputError, match="rules that can be learned are power; not 'ssmax'"):
        tune(model, text, rule="ssmax", held_out=0)
    functions = from_functions("f", [lambda m: torch.zeros(1)] * 4)
    with pytest.raises(InputError, match="'f' is a Python function: a rule of length is learned"):
        tune(model, functions, rule="power", held_out=0)
    for lengths in ([1, 16], []):
        with pytest.raises(InputError, match="at least 2 tokens each"):
            from_lengths(byte_tokenizer(), "x" * 200, lengths)
