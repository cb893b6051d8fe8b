"""Evidence about a tuned profile, and the alternatives that it is compared with."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch

from tempering import Profile, tempered
from tempering.attention import layout
from tempering.attention.tuning import Constraint, from_batches, make_basis, tune
from tempering.attention.tuning.adapted import query_biases, query_lora
from tempering.attention.tuning.adapted_scales import head_scales, norm_weights, together
from tempering.attention.tuning.alternatives import (
    ALTERNATIVES,
    WITH_TEMPERATURES,
    fit_alternatives,
)
from tempering.attention.tuning.batches import Batch, text_batches
from tempering.attention.tuning.live_temperatures import live_temperatures
from tempering.attention.tuning.passes import gradient_pass, loss_pass
from tempering.errors import DataError, InputError, MissingExtraError, RefusedError
from tempering.evaluation.evidence import contenders, measure_evidence, with_evidence
from tempering.evaluation.journal import Journal
from tests.integration.tuning_tiny import HEADS, LAYERS, sampled_text, tiny_llama

# One worker for all: what they share takes as long as they do.
pytestmark = pytest.mark.xdist_group("evidence")

SIZES = {
    "output temperature": 1,
    "uniform temperature": 1,
    "biases of q": LAYERS * 32,
    "LoRA rank 1 on q": LAYERS * 64,
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def truth(model):
    generator = torch.Generator().manual_seed(1)
    rows = torch.exp(torch.randn(LAYERS, HEADS, generator=generator, dtype=torch.float64) * 0.5)
    return Profile.from_matrix(rows, model)


@pytest.fixture(scope="module")
def ids(model, truth):
    return sampled_text(model, truth, 150, 20, seed=3)


def _text(ids, name):
    return from_batches(name, text_batches(ids, name))


def _answers(ids, name="questions"):
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[:, -2:] = True
    batches = [
        Batch(a[None], b[None], f"{name}, {i}") for i, (a, b) in enumerate(zip(ids, targets))
    ]
    return from_batches(name, batches, kind="answers")


@pytest.fixture(scope="module")
def fitted(model, ids):
    return fit_alternatives(model, _text(ids[:100], "planted"), passes=2, rates=(1e-3, 3e-3))


def test_every_alternative_is_fitted_and_the_model_is_given_back(model, ids):
    before, order = copy.deepcopy(model.state_dict()), list(model.state_dict())
    modules = {name: id(module) for name, module in model.named_modules()}
    found = fit_alternatives(model, _text(ids[:20], "planted"), passes=1, rates=(1e-2,))
    assert {item.label: item.numbers for item in found} == SIZES
    assert list(model.state_dict()) == order
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert all(weight.requires_grad for weight in model.parameters())
    assert not hasattr(model, "peft_config") and not model._forward_hooks


def test_alternatives_lower_the_held_out_loss_that_they_report(model, ids, fitted):
    for item in fitted:
        assert item.after <= item.before and item.passes <= 3 and item.seconds > 0
        with item.active() as network, torch.no_grad():
            changed = network(input_ids=ids[:2]).logits
        with torch.no_grad():
            plain = model(input_ids=ids[:2]).logits
        assert torch.equal(changed, plain) == (item.passes == 0)
    by_label = {item.label: item for item in fitted}
    for label in ("uniform temperature", "LoRA rank 1 on q"):
        assert by_label[label].after < by_label[label].before
    assert by_label["LoRA rank 1 on q"].rate in (1e-3, 3e-3)


def everything(model):
    """Temperatures, output scales and norms at once."""
    basis = make_basis(model, layout(model), "head")
    T = live_temperatures(model, basis, (0.2, 5.0), checkpoint=False)
    return together(T, head_scales(model), norm_weights(model))


@pytest.mark.parametrize(
    "opened", [query_biases, query_lora, head_scales, norm_weights, everything]
)
def test_gradients_of_the_alternatives_agree_with_differences(opened, ids):
    model = tiny_llama(dtype=torch.float64)
    pieces = _text(ids[:2], "t").pieces
    with opened(model) as tunable, torch.enable_grad():
        zero = torch.zeros(tunable.size, dtype=torch.float64)
        plain = loss_pass(tunable, None, pieces)
        assert torch.equal(loss_pass(tunable, zero, pieces).losses, plain.losses)
        generator = torch.Generator().manual_seed(0)
        theta = torch.randn(tunable.size, dtype=torch.float64, generator=generator) * 0.1
        found = gradient_pass(tunable, theta, pieces)
        way = torch.randn(tunable.size, dtype=torch.float64, generator=generator)
        steps = (1, -1, 2, -2)  # a difference of fourth order; norms compute in float32
        ends = [loss_pass(tunable, theta + s * 5e-4 * way, pieces).losses for s in steps]
    slope = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / 6e-3
    assert torch.allclose(found.gradients @ way, slope, rtol=1e-2, atol=1e-3)


def test_rivals_learn_beside_temperatures(model, ids):
    """A temperature in a unit of r moves r times as far as the numbers beside it."""
    (both,) = fit_alternatives(
        model,
        _text(ids[:10], "planted"),
        which=[f"weights of norms{WITH_TEMPERATURES}"],
        passes=1,
        rates=(3e-3,),
    )
    norms = sum(len(m.weight) for m in model.modules() if type(m).__name__ == "LlamaRMSNorm")
    assert both.numbers == LAYERS * HEADS + norms
    theta = torch.linspace(-0.3, 0.3, LAYERS * HEADS, dtype=torch.float64)
    basis = make_basis(model, layout(model), "head")
    logits = []
    for unit, ends in ((1.0, (theta * 2,)), (2.0, (theta, torch.zeros(norms).double()))):
        T = live_temperatures(model, basis, (0.2, 5.0), checkpoint=False)
        parts = (T, norm_weights(model))[: len(ends)]
        with together(*parts, units=(unit, 1.0)[: len(ends)]) as some, torch.no_grad():
            some.set(torch.cat(ends))
            logits.append(model(input_ids=ids[:2]).logits)
    assert torch.equal(*logits)


def test_scales_are_those_of_the_weights(ids):
    """Output scales equal columns of o_proj multiplied by hand; factors of norms, their weights."""
    model = tiny_llama(dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    by_hand = copy.deepcopy(model)
    with together(head_scales(model), norm_weights(model)) as both, torch.no_grad():
        theta = torch.randn(both.size, dtype=torch.float64, generator=generator) * 0.2
        both.set(theta)
        found = model(input_ids=ids[:2]).logits
        heads = theta[: LAYERS * HEADS].exp().view(LAYERS, HEADS)
        for layer, scales in zip(by_hand.model.layers, heads, strict=True):
            weight = layer.self_attn.o_proj.weight
            weight.mul_(scales.repeat_interleave(weight.shape[1] // HEADS))
        norms = [m for m in by_hand.modules() if type(m).__name__ == "LlamaRMSNorm"]
        factors = (1 + theta[LAYERS * HEADS :]).split([len(m.weight) for m in norms])
        for norm, factor in zip(norms, factors, strict=True):
            norm.weight.mul_(factor)
    assert both.size == LAYERS * HEADS + sum(len(m.weight) for m in norms)
    with torch.no_grad():
        exact = by_hand(input_ids=ids[:2]).logits
        assert (found - exact).abs().max() < 1e-10
        plain = model(input_ids=ids[:2]).logits
    assert (plain - exact).abs().max() > 0.1
    assert torch.equal(plain, tiny_llama(dtype=torch.float64)(input_ids=ids[:2]).logits)


def test_a_model_without_norms_is_refused():
    with pytest.raises(RefusedError, match="no norm"), norm_weights(torch.nn.Linear(2, 2)):
        pass


def test_a_constraint_binds_the_alternatives_too(model, ids):
    plain = _text(sampled_text(model, None, 40, 20, seed=8), "plain")
    limit = Constraint(plain, 0.002)
    (item,) = fit_alternatives(
        model,
        _text(ids[:60], "planted"),
        which=["output temperature"],
        constraint=limit,
        passes=3,
    )
    assert item.cost is not None and item.cost <= 0.002


def test_alternatives_say_what_they_need(model, ids, monkeypatch):
    with pytest.raises(InputError, match="alternatives are .*; not magic"):
        fit_alternatives(model, _text(ids[:8], "t"), which=["magic"])
    with pytest.raises(RefusedError, match=r"no linear layer 'c_attn' to adapt; it has q_proj"):
        fit_alternatives(model, _text(ids[:8], "t"), which=ALTERNATIVES[2:3], target="c_attn")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"'peft'.*pip install 'tempering\[tune\]'"):
        fit_alternatives(model, _text(ids[:8], "t"), which=ALTERNATIVES[3:])
    model.peft_config = {}
    try:
        with pytest.raises((RefusedError, MissingExtraError)), query_lora(model):
            pass
    finally:
        del model.peft_config


def test_evidence_is_the_paired_difference_of_every_contender(model, truth, ids, fitted):
    rivals = contenders(model, truth, shuffles=2, alternatives=fitted)
    assert [rival.label for rival in rivals][:4] == [
        "tuned",
        "negated",
        "shuffled, seed 0",
        "shuffled, seed 1",
    ]
    test = _text(ids[100:], "test")
    rows = measure_evidence(model, [test], rivals, seed=1, draws=200)
    assert [row.label for row in rows] == [rival.label for rival in rivals]
    assert {row.numbers for row in rows[:4]} == {LAYERS * HEADS}
    for row, profile in ((rows[0], truth), (rows[1], truth.scaled(-1.0))):
        with torch.no_grad():
            plain = _losses(model, ids[100:])
            with tempered(model, profile):
                changed = _losses(model, ids[100:])
        assert row.change.value == pytest.approx(float((changed - plain).mean()), abs=1e-6)
        assert row.untempered == pytest.approx(float(plain.mean()), abs=1e-5)
        assert row.change.n == 50 and row.targets == 50 * 19
    tuned, negated, *shuffled = rows[:4]
    assert tuned.change.high < 0 < negated.change.low
    assert all(row.change.value > tuned.change.value for row in shuffled)
    assert not any(hasattr(module, "_tempering") for module in model.modules())


def _losses(model, ids):
    logits = model(input_ids=ids).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return loss.view(len(ids), -1)


def test_accuracy_is_every_token_of_the_answer(model, truth, ids):
    sure = ids[:30].clone()
    with torch.no_grad():  # the likeliest continuation, of which a third is spoilt
        for place in (18, 19):
            sure[:, place] = model(input_ids=sure[:, :place]).logits[:, -1].argmax(-1)
    sure[:10, 19] = (sure[:10, 19] + 1) % 48
    rows = measure_evidence(model, [_answers(sure)], contenders(model, truth, shuffles=0), draws=99)
    by_metric = {(row.label, row.metric): row for row in rows}
    right = by_metric["tuned", "accuracy"]
    assert right.untempered == pytest.approx(2 / 3) and right.targets == 30
    with torch.no_grad(), tempered(model, truth):
        guess = model(input_ids=sure).logits.argmax(-1)
    share = float((guess[:, 17:19] == sure[:, 18:20]).all(1).double().mean())
    assert right.value == pytest.approx(share)
    assert right.change.value == pytest.approx(share - 2 / 3)
    assert by_metric["tuned", "loss"].targets == 60


def test_clusters_are_resampled_whole(model, truth, ids):
    test = _text(ids[100:120], "test")
    rival = contenders(model, truth, shuffles=0)[:1]
    (alone,) = measure_evidence(model, [test], rival)
    (grouped,) = measure_evidence(
        model, [test], rival, clusters={"test": [i // 5 for i in range(20)]}
    )
    assert alone.change.value == grouped.change.value
    assert (alone.change.n, grouped.change.n) == (20, 4)
    with pytest.raises(InputError, match="'test' has 20 pieces and 2 clusters"):
        measure_evidence(model, [test], rival, clusters={"test": [0, 1]})


def test_what_was_learned_from_can_not_test(model, truth, ids):
    rivals = contenders(model, truth, shuffles=0)
    learned = _text(ids[:20], "learned")
    with pytest.raises(DataError, match="calibration and test overlap: test, chunk 0 and learned"):
        measure_evidence(model, [_text(ids[10:30], "test")], rivals, learned=[learned])
    with pytest.raises(InputError, match="two tests have one name"):
        measure_evidence(model, [_text(ids[20:30], "a"), _text(ids[30:40], "a")], rivals)


def test_finished_parts_are_not_measured_again(model, truth, ids, tmp_path):
    rivals = contenders(model, truth, shuffles=1)
    tests = [_text(ids[100:110], "a"), _answers(ids[110:120])]
    whole = measure_evidence(model, tests, rivals)
    calls = []

    def stop(stage, done, total):
        calls.append((stage, done, total))
        if len(calls) == 6:
            raise KeyboardInterrupt

    journal = Journal(tmp_path, "tune", {})
    with pytest.raises(KeyboardInterrupt):
        measure_evidence(model, tests, rivals, journal=journal, progress=stop)
    journal.close()
    again = Journal(tmp_path, "tune", {})
    assert len(again.entries) == 6
    assert measure_evidence(model, tests, rivals, journal=again) == whole
    again.close()


def test_a_profile_carries_its_evidence(model, ids, tmp_path):
    goal = _text(ids[:60], "planted")
    tuned = tune(model, goal, rows=30, steps=2, damping=0.3, radius=0.3)
    rows = measure_evidence(
        model, [_text(ids[100:], "test")], contenders(model, tuned.profile, shuffles=1)
    )
    profile = with_evidence(tuned, [goal], rows, settings={"chunk": 20})
    profile.save(tmp_path / "p.json")
    evidence = Profile.load(tmp_path / "p.json").evidence
    assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence
    assert evidence["tuned for"][0]["name"] == "planted"
    assert evidence["numbers"] == LAYERS * HEADS and evidence["settings"] == {"chunk": 20}
    assert evidence["held out"] == {"untempered": tuned.before, "tuned": tuned.after}
    (first, *_) = evidence["measured"]
    assert first["label"] == "tuned" and first["low"] <= first["change"] <= first["high"]
