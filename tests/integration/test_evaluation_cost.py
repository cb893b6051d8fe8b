"""Cost and distance against loops in float64; what an interruption leaves; the budget."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy import stats

from tempering.attention.profiles.profile import Profile
from tempering.errors import DataError, InputError, OutputError
from tempering.evaluation.budget import largest_amplitude
from tempering.evaluation.cost import Variant, losses_and_divergence, measure_costs
from tempering.evaluation.journal import Journal
from tempering.evaluation.paired import (
    IntervalEstimate,
    bootstrap_mean,
    mean_estimate,
    paired_difference,
)
from tests.integration import attention_oracle as oracle

LAYERS, HEADS = oracle.LAYERS, oracle.HEADS
CHUNKS = oracle.tokens(1, 4, 12)


@pytest.fixture(scope="module")
def model():
    return oracle.tiny_llama()


def brute(model, ids, T=None, temperature=1.0):
    """(mean nll, mean KL from the untempered model) of one chunk, by loops."""
    base = oracle.forward(model, ids[None]).logits[0]
    logits = oracle.forward(model, ids[None], T).logits[0] / temperature
    nll = kl = 0.0
    for position in range(len(ids) - 1):
        q = [math.exp(float(x)) for x in logits[position]]
        p = [math.exp(float(x)) for x in base[position]]
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        nll -= math.log(q[ids[position + 1]])
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return nll / (len(ids) - 1), kl / (len(ids) - 1)


def variants(model):
    T = oracle.random_temperatures(1, LAYERS, HEADS, low=0.6, high=1.6)
    attention = Variant("attention", Profile.from_matrix(T))
    both = Variant("both", Profile.from_matrix(1 / T), 1.3)
    return {
        "attention": (attention, T, 1.0),
        "sampling": (Variant("sampling", None, 0.7), None, 0.7),
        "both": (both, 1 / T, 1.3),
        "neutral": (Variant("neutral", Profile.neutral(model)), None, 1.0),
    }


def close(ours, exact, tolerance=2e-6):
    for a, b in zip(ours, exact, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=tolerance)


def test_costs_equal_loops(model):
    given = variants(model)
    costs, complete = measure_costs(model, CHUNKS, [item[0] for item in given.values()])
    assert complete
    base = [brute(model, ids)[0] for ids in CHUNKS]
    for cost, (name, (_, T, temperature)) in zip(costs, given.items(), strict=True):
        rows = [brute(model, ids, T, temperature) for ids in CHUNKS]
        rise = [row[0] - own for row, own in zip(rows, base, strict=True)]
        kl = [row[1] for row in rows]
        assert cost.label == name
        assert cost.tokens == 4 * 11
        assert cost.nll == pytest.approx(sum(row[0] for row in rows) / 4, rel=1e-6)
        assert cost.untempered_nll == pytest.approx(sum(base) / 4, rel=1e-6)
        for ours, values in ((cost.cost, rise), (cost.kl, kl)):
            low, high = stats.t.interval(0.95, 3, sum(values) / 4, stats.sem(values) or 1e-30)
            close(ours[:4], (sum(values) / 4, stats.sem(values), low, high))
            assert ours.n == 4
    assert costs[0].kl.value > 0.01
    assert costs[3].cost == IntervalEstimate(0.0, 0.0, 0.0, 0.0, 4)
    assert costs[3].kl == IntervalEstimate(0.0, 0.0, 0.0, 0.0, 4)


def test_long_chunks_are_summed_in_parts():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(700, 50, generator=generator) * 3
    other = torch.randn(700, 50, generator=generator) * 3
    targets = torch.randint(50, (700,), generator=generator)
    nll, kl = losses_and_divergence(logits, other, targets, 0.8)
    q = (logits.double() / 0.8).log_softmax(-1)
    p = other.double().log_softmax(-1)
    torch.testing.assert_close(nll.double(), -q[range(700), targets], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-5)


def test_estimates_are_those_of_student():
    values = [0.3, -0.2, 0.9, 1.4, 0.05]
    before = [0.1, 0.1, 0.4, 0.6, 0.15]
    exact = stats.ttest_rel(values, before).confidence_interval(0.95)
    ours = paired_difference(values, before)
    close(ours[2:4], (exact.low, exact.high), 1e-12)
    assert ours.value == pytest.approx(sum(values) / 5 - sum(before) / 5)
    one = mean_estimate([2.0])
    assert one.value == 2.0
    assert all(map(math.isnan, one[1:4]))
    with pytest.raises(InputError, match="at least one value"):
        mean_estimate([])
    with pytest.raises(InputError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_bootstrap():
    values = torch.randn(200, generator=torch.Generator().manual_seed(3)).double()
    ours = bootstrap_mean(values, seed=0)
    assert ours == bootstrap_mean(values, seed=0)
    assert ours != bootstrap_mean(values, seed=1)
    assert ours.value == pytest.approx(values.mean().item())
    assert ours.se == pytest.approx(stats.sem(values.numpy()), rel=0.06)
    exact = stats.bootstrap((values.numpy(),), lambda x, axis: x.mean(axis), method="percentile")
    close(ours[2:4], exact.confidence_interval, 0.02)
    assert math.isnan(bootstrap_mean(torch.tensor([1.0]), seed=0).low)


def interrupt_after(count):
    def progress(done, total):
        if done == count:
            raise KeyboardInterrupt

    return progress


def forwards(model, function):
    """What `function` gives, and how many forward passes it took."""
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        return function(), len(calls)
    finally:
        handle.remove()


def test_an_interrupted_run_goes_on_where_it_stopped(model, tmp_path):
    given = [item[0] for item in variants(model).values()]
    (whole, _), all_calls = forwards(model, lambda: measure_costs(model, CHUNKS, given))

    def run(stop):
        progress = interrupt_after(stop)
        with Journal(tmp_path, "cost", {"text": "x"}) as journal:
            return measure_costs(model, CHUNKS, given, journal=journal, progress=progress)

    (part, complete), calls = forwards(model, lambda: run(2))
    assert not complete
    assert calls == all_calls // 2
    first, _ = measure_costs(model, CHUNKS[:2], given)
    assert part == first
    (again, complete), calls = forwards(model, lambda: run(None))
    assert complete
    assert calls == all_calls // 2
    assert again == whole
    (_, complete), calls = forwards(model, lambda: run(None))
    assert complete and calls == 0
    with Journal(tmp_path, "cost", {"text": "another"}) as journal:
        assert not journal.entries
    journal = Journal(tmp_path, "cost", {"text": "x"})
    journal.finish()
    assert not list(tmp_path.iterdir())


def test_an_interruption_before_anything_is_finished(model):
    hook = model.register_forward_pre_hook(lambda *_: interrupt_after(0)(0, 0))
    with pytest.raises(KeyboardInterrupt):
        measure_costs(model, CHUNKS, [Variant("a", None, 0.5)])
    hook.remove()


def test_a_line_cut_off_is_dropped(tmp_path):
    journal = Journal(tmp_path, "cost", {})
    for name in ("0:", "0:a", "1:"):
        journal.put(name, [1.5, float(len(name))])
    journal.close()
    text = journal.path.read_bytes()
    for end in range(len(text) - 12, len(text)):
        journal.path.write_bytes(text[:end] + b"\xe2\x82")
        cut = Journal(tmp_path, "cost", {})
        assert list(cut.entries) == ["0:", "0:a"]
        cut.put("1:", [2.0, 2.0])
        cut.close()
        assert Journal(tmp_path, "cost", {}).entries == {
            "0:": [1.5, 2.0],
            "0:a": [1.5, 3.0],
            "1:": [2.0, 2.0],
        }
    journal.path.write_text('5\n[1]\n"x"\nnull\n{"name": "a"}\n' + json.dumps({"value": 1}))
    assert Journal(tmp_path, "cost", {}).entries == {}


def test_an_unwritable_journal(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't write"):
        Journal(tmp_path / "file" / "deeper", "cost", {})
    journal = Journal(tmp_path, "cost", {})
    journal.path.mkdir()
    with pytest.raises(OutputError, match="can't write"):
        journal.put("a", 1)
    journal.close()
    with pytest.raises(InputError, match="is closed"):
        journal.put("a", 1)


def test_training_flags_are_kept(model):
    mine = oracle.tiny_llama()
    mine.train()
    mine.model.layers[1].eval()
    flags = [module.training for module in mine.modules()]
    measure_costs(mine, CHUNKS[:1], [Variant("a", None, 0.5)])
    assert [module.training for module in mine.modules()] == flags


def test_bad_input(model):
    same = Variant("same", None, 0.5)
    with pytest.raises(InputError, match="two variants are called 'same'"):
        measure_costs(model, CHUNKS, [same, same])
    with pytest.raises(InputError, match="label"):
        Variant("", None, 0.5)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="give one above 0"):
            Variant("wrong", None, wrong)
    with pytest.raises((InputError, DataError), match="at least one chunk"):
        measure_costs(model, CHUNKS[:0], [same])


# the budget


def quadratic(curvature, seen=None):
    def cost(amplitude):
        if seen is not None:
            seen.append(amplitude)
        value = curvature * math.log(amplitude) ** 2
        return IntervalEstimate(value, 0.0, value, value, 3)

    return cost


@pytest.mark.parametrize("curvature", [0.02, 0.35, 3.0, 40.0])
@pytest.mark.parametrize("budget", [0.003, 0.01, 0.05])
def test_budget_on_a_quadratic(curvature, budget):
    exact = math.sqrt(budget / curvature)
    found = largest_amplitude(quadratic(curvature), budget)
    if exact > math.log(8):
        assert found.amplitude == 8.0
        assert not found.bounded
        return
    assert found.bounded
    assert exact - 0.006 <= math.log(found.amplitude) <= exact + 1e-4
    assert found.cost == quadratic(curvature)(found.amplitude)
    assert found.cost.value <= budget < found.nats_per_token + 1e-15
    assert list(found.tried) == sorted(found.tried)


def shaped(function):
    def cost(amplitude):
        value = function(math.log(amplitude))
        return IntervalEstimate(value, 0.0, value, value, 3)

    return cost


@pytest.mark.parametrize(
    "function, exact",
    [
        (lambda x: 0.1 * x, 0.1),
        (lambda x: 4.0 * x**3, (0.01 / 4) ** (1 / 3)),
        (lambda x: 0.002 * (math.exp(3 * x) - 1), math.log(6) / 3),
        (lambda x: x**2 - 0.05 * x, 0.025 + math.sqrt(0.025**2 + 0.01)),
    ],
    ids=["linear", "cubic", "exponential", "a gain first"],
)
def test_budget_on_other_shapes(function, exact):
    found = largest_amplitude(shaped(function), 0.01, evaluations=20)
    assert exact - 0.006 <= math.log(found.amplitude) <= exact + 1e-4
    assert found.bounded


def test_a_cost_that_stays_within_the_budget():
    """A plateau just below the budget: nothing is claimed about amplitudes never tried."""
    found = largest_amplitude(shaped(lambda x: 0.0095 * min(1.0, 20 * x)), 0.01)
    assert found.amplitude == 8.0
    assert not found.bounded
    assert largest_amplitude(shaped(lambda x: -0.1 * x), 0.01).amplitude == 8.0


def test_no_amplitude_within_the_budget():
    found = largest_amplitude(shaped(lambda x: 1.0), 0.01)
    assert found.amplitude == 1.0
    assert found.cost is None
    assert found.bounded


def test_few_evaluations():
    seen = []
    largest_amplitude(quadratic(0.3, seen), 0.01, evaluations=8)
    assert len(seen) <= 8
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("wrong", [0.0, -0.01, math.inf, math.nan])
def test_wrong_budgets(wrong):
    with pytest.raises(InputError, match="positive number of nats"):
        largest_amplitude(quadratic(1.0), wrong)
