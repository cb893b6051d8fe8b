"""Runs of the tuner on a tiny model whose text has planted temperatures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tempering import Profile, tempered
from tempering.attention.tuning import (
    Constraint,
    ConstraintError,
    from_batches,
    from_functions,
    tune,
)
from tempering.attention.tuning.batches import text_batches
from tempering.attention.tuning.passes import gradient_pass
from tempering.errors import (
    CheckError,
    CollapseWarning,
    ConvergenceWarning,
    DataError,
    InputError,
    RefusedError,
)
from tests.integration.tuning_tiny import HEADS, LAYERS, sampled_text, tiny_llama

FAST = {"rows": 40, "damping": 0.3, "radius": 0.3}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def truth():
    generator = torch.Generator().manual_seed(1)
    return torch.exp(torch.randn(LAYERS, HEADS, generator=generator, dtype=torch.float64) * 0.5)


@pytest.fixture(scope="module")
def planted(model, truth):
    """Text of the planted temperatures, to learn from and to test on."""
    ids = sampled_text(model, Profile.from_matrix(truth, model), 240, 24, seed=3)
    return _objective("planted", ids[:200]), ids[200:]


@pytest.fixture(scope="module")
def plain(model):
    """Text of the model as it is."""
    return _objective("plain", sampled_text(model, None, 160, 24, seed=5))


@pytest.fixture(scope="module")
def turned(model, truth):
    """Text of the planted temperatures turned round: cold where they are hot."""
    return _objective(
        "turned", sampled_text(model, Profile.from_matrix(1 / truth, model), 100, 24, 6)
    )


def _objective(name, ids, weight=1.0):
    return from_batches(name, text_batches(ids, name), weight=weight)


def _loss(model, profile, ids):
    with torch.no_grad(), tempered(model, profile):
        logits = model(input_ids=ids).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.fixture(scope="module")
def tuned(model, planted):
    return tune(model, planted[0], **FAST)


def test_planted_temperatures_are_found(model, truth, planted, tuned):
    found, want = tuned.profile.temperature.log().flatten(), truth.log().flatten()
    assert float(torch.corrcoef(torch.stack([found, want]))[0, 1]) > 0.8
    test = planted[1]
    untempered = _loss(model, Profile.neutral(model), test)
    best = _loss(model, Profile.from_matrix(truth, model), test)
    assert untempered - _loss(model, tuned.profile, test) > 0.7 * (untempered - best) > 0.01


def test_the_outcome_says_what_happened(tuned):
    assert tuned.watched == "held out" and tuned.met and tuned.room == 1.0
    assert tuned.after == min(row.held_out for row in tuned.history) < tuned.before
    assert tuned.history[tuned.step].held_out == tuned.after
    assert [row.step for row in tuned.history] == list(range(len(tuned.history)))
    assert tuned.history[0].coldest == tuned.history[0].hottest == 1.0
    assert "layer" in tuned.history[1].moved and tuned.history[0].moved == ""
    assert tuned.targets == 160 * 23 and len(tuned.names) == LAYERS * HEADS
    (held,) = tuned.held_out
    assert len(held.counts) == 40 and float(held.counts.sum()) == 40 * 23
    mean = float((held.after * held.counts).sum() / held.counts.sum())
    assert mean == pytest.approx(tuned.after)
    losses = [row.loss for row in tuned.history[:-1]]
    assert losses == sorted(losses, reverse=True)
    assert tuned.profile.model["fingerprint"]


def test_the_same_seed_gives_the_same_profile(model, planted, tuned):
    again = tune(model, planted[0], **FAST)
    assert torch.equal(again.theta, tuned.theta)
    assert [tuple(row) for row in again.history] == [tuple(row) for row in tuned.history]


def test_one_number_a_layer_gives_one_temperature_a_layer(model, planted):
    found = tune(model, planted[0], per="layer", steps=2, **FAST)
    temperatures = found.profile.temperature
    assert torch.equal(temperatures, temperatures[:, :1].expand(-1, HEADS))


def test_adam_finds_them_too(model, truth, planted):
    found = tune(model, planted[0], method="adam", steps=30, rows=40, rate=0.05)
    want = truth.log().flatten()
    got = found.profile.temperature.log().flatten()
    assert float(torch.corrcoef(torch.stack([got, want]))[0, 1]) > 0.7
    assert [row.step for row in found.history[:6]] == [0, 3, 6, 9, 12, 15]


def test_python_objectives_are_learned_from(model, truth):
    """The loss is the divergence from the planted model's answers to a few texts."""
    profile = Profile.from_matrix(truth, model)
    texts = torch.randint(0, 48, (6, 4, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), tempered(model, profile):
        goals = [model(input_ids=ids).logits.softmax(-1) for ids in texts]

    def part(i):
        return lambda network: torch.nn.functional.cross_entropy(
            network(input_ids=texts[i]).logits.flatten(0, 1), goals[i].flatten(0, 1)
        )

    objective = from_functions("mimic", [part(i) for i in range(6)], counts=[64] * 6)
    found = tune(model, objective, method="adam", steps=60, rate=0.1, prior_sd=3)
    assert torch.allclose(found.profile.temperature, truth, rtol=0.35)
    with pytest.raises(DataError, match="'mimic' has 1 piece of its own"):
        tune(model, from_functions("mimic", [part(0)]))
    with pytest.raises(DataError, match="one piece to learn from.*method='adam'"):
        tune(model, from_functions("mimic", [part(0)]), held_out=0)


def test_weights_trade_one_objective_for_another(model, truth, planted, turned):
    """Two texts that ask for opposite temperatures: the heavier one is followed."""
    found = []
    for weight in (0.2, 5.0):
        goals = [replace(planted[0], weight=weight), turned]
        found.append(tune(model, goals, steps=3, **FAST).profile.temperature.log().flatten())
    want = truth.log().flatten()
    light, heavy = (float(torch.corrcoef(torch.stack([got, want]))[0, 1]) for got in found)
    assert light < 0 < heavy


@pytest.mark.parametrize("kind", ["cost", "divergence"])
def test_a_constraint_holds_on_watched_data(model, planted, plain, kind):
    free = tune(model, planted[0], constraint=Constraint(plain, 10.0, kind), steps=3, **FAST)
    assert free.cost > 0.012 and free.met
    assert all(row.multiplier == 0 for row in free.history)
    held = tune(model, planted[0], constraint=Constraint(plain, 0.01, kind), steps=4, **FAST)
    assert held.met and held.cost <= 0.01 and held.step > 0
    assert free.after < held.after < held.before
    assert max(row.multiplier for row in held.history) > 0
    (chosen,) = [point for point in held.trade_off if point.chosen]
    assert (chosen.objective, chosen.cost) == (held.after, held.cost)
    labels = [point.label for point in held.trade_off]
    assert labels[0] == "step 0" and "room" in labels[-1]
    within = [point for point in held.trade_off if point.cost <= 0.01]
    assert chosen.objective == min(point.objective for point in within)


def test_adam_raises_its_multiplier_while_the_constraint_is_broken(model, planted, plain):
    limit = Constraint(plain, 0.002, "divergence")
    found = tune(model, planted[0], constraint=limit, method="adam", steps=30, rows=40, rate=0.1)
    assert found.cost <= 0.002 and found.after < found.before
    multipliers = [row.multiplier for row in found.history]
    assert max(multipliers) > 4.0
    # It pulls the run back: the last points break the constraint less than the worst did.
    assert found.history[-1].cost < 0.7 * max(row.cost for row in found.history)


def test_a_constraint_that_cannot_be_met_prints_its_trade_off(model, planted, turned):
    """The constraint's text has the planted temperatures turned round: every gain is a loss."""
    with pytest.raises(ConstraintError, match="no temperatures within 1e-09 nats") as caught:
        tune(model, planted[0], constraint=Constraint(turned, 1e-9), steps=2, **FAST)
    message = str(caught.value)
    assert "The best point found has loss" in message and "step 0: loss" in message
    found = caught.value.tuned
    assert not found.met and found.cost > 1e-9 and found.after < found.before
    assert f"{found.after:.4f} at a cost of {found.cost:+.4f}" in message
    assert caught.value.exit_code == 1


def test_nothing_gained_leaves_t_at_1(model, plain):
    with pytest.warns(ConvergenceWarning, match=r"no step lowered the held out loss.*T is 1"):
        found = tune(model, plain, steps=2, radius=0.9, damping=0.01, rows=40, prior_sd=3)
    assert torch.equal(found.profile.temperature, torch.ones(LAYERS, HEADS).double())
    assert found.step == 0 and found.before == found.after


def test_patience_ends_a_run(model, plain):
    with pytest.warns(ConvergenceWarning):
        found = tune(model, plain, steps=9, radius=0.9, damping=0.01, rows=40, patience=2)
    assert found.stopped_because == "held out loss stopped falling" and len(found.history) == 3


def test_a_prior_of_nothing_moves_nothing(model, planted):
    with pytest.warns(ConvergenceWarning):
        found = tune(model, planted[0], prior_sd=1e-6, **FAST)
    assert found.stopped_because == "converged"


def test_nothing_held_out_is_said(model, planted):
    found = tune(model, planted[0], held_out=0, steps=1, **FAST)
    assert found.watched == "calibration"
    assert found.history[0].held_out == pytest.approx(found.history[0].loss, abs=1e-6)


def test_t_at_a_bound_is_collapse(model, planted):
    with pytest.warns(CollapseWarning, match=r"\[layer, head\] of 3 layers x 4 heads.*bound"):
        found = tune(model, planted[0], bounds=(0.95, 1.05), prior_sd=9, **FAST)
    named = {*found.collapse.cold, *found.collapse.hot}
    assert named and all(layer < LAYERS and head < HEADS for layer, head in named)


def test_support_under_its_floor_is_collapse(model):
    """A loss that asks for the coldest head drives its support to 1."""

    def cold(network):
        weights = network(input_ids=torch.arange(12)[None], output_attentions=True).attentions
        return -weights[1][0, 2].max(-1).values.mean() * 50

    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    ids = _objective("text", sampled_text(eager, None, 4, 12, seed=1), weight=1e-6)
    function = from_functions("cold", [cold, lambda m: cold(m) * 1.0, lambda m: cold(m) * 1.01])
    with pytest.warns(CollapseWarning, match=r"support under its floor at .*\[1, 2\]"):
        found = tune(
            eager, [function, ids], method="adam", steps=25, rate=0.5, bounds=(0.002, 5), prior_sd=9
        )
    assert (1, 2) in found.collapse.thin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sgd"}, "by newton or adam, not by 'sgd'"),
        ({"steps": 0}, "at least 1; got 0"),
        ({"rows": 0}, "at least 1"),
        ({"prior_sd": 0}, "prior_sd is a positive number, not 0"),
        ({"damping": float("nan")}, "damping is a positive number"),
        ({"held_out": 0.8}, "from above 0 to 0.5 can be held out"),
        ({"per": "row"}, "not per 'row'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, planted, options, message):
    with pytest.raises(InputError, match=message):
        tune(model, planted[0], **options)


def test_a_loss_that_is_not_a_number_names_the_step_and_the_head(model, planted):
    calls = []

    def loss(network):
        calls.append(1)
        value = network(input_ids=torch.arange(8)[None]).logits.square().mean()
        return value * float("nan") if len(calls) == 9 else value

    functions = from_functions("mine", [loss, lambda m: loss(m) * 1.1, lambda m: loss(m) * 1.2])
    with pytest.raises(
        RefusedError, match=r"step 2, mine, part \d: the loss is nan; .*layers\.\d.*, head \d"
    ):
        tune(model, functions, radius=0.2)


def test_a_broken_head_is_named(planted):
    broken = tiny_llama()
    with torch.no_grad():  # the values of kv head 1 overflow, which query heads 2 and 3 read
        broken.model.layers[1].self_attn.v_proj.weight[8:] = float("inf")
    with pytest.raises(
        CheckError, match=r"layers\.1\.self_attn, head 2: its attention is not finite.*weights"
    ):
        tune(broken, planted[0], **FAST)


@pytest.mark.filterwarnings("ignore:no step lowered")
@pytest.mark.parametrize(
    ("pieces", "limits", "drawn", "of_limit"),
    [
        (20, 30, 1, 1),
        (4, 24, 1, 1),
        (3, 23, 2, 2),
        (2, 8, 2, 3),
        (1, 2, 4, 8),
    ],
)
def test_few_pieces_are_drawn_more_often(
    model, plain, monkeypatch, pieces, limits, drawn, of_limit
):
    """At least 4 gradients of an objective, and 2 for each of 12 numbers of a constraint."""
    seen = []

    def counted(live, theta, given, **options):
        seen.append((len(given), options["draws"]))
        return gradient_pass(live, theta, given, **options)

    monkeypatch.setattr("tempering.attention.tuning.newton.gradient_pass", counted)
    goal = plain.having(plain.pieces[:pieces])
    constraint = Constraint(plain.having(plain.pieces[40 : 40 + limits]), within=1.0)
    tune(model, goal, constraint=constraint, held_out=0, steps=2, rows=8)
    assert seen == [(pieces, drawn), (limits, of_limit), (pieces, 0), (limits, 0)]
