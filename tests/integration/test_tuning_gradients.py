"""Gradients in log T against differences, with every weight frozen and given back."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tempering import Profile, layout, tempered
from tempering.attention.tuning import from_batches, from_functions, make_basis, passes
from tempering.attention.tuning.batches import (
    Batch,
    answer_batches,
    divergences,
    target_logits,
    target_losses,
    text_batches,
)
from tempering.attention.tuning.lessons import Lesson, distributions
from tempering.attention.tuning.live_temperatures import live_temperatures
from tempering.attention.tuning.objectives import Piece
from tempering.attention.tuning.passes import gradient_pass, grouped, loss_pass
from tempering.attention.tuning.steps import quadratic
from tempering.errors import InputError, RefusedError, TemperatureError
from tests.integration.tuning_tiny import HEADS, LAYERS, WORDS, tiny_llama

BOUNDS = (0.2, 5.0)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(dtype=torch.float64)


def _pieces(rows=3, length=10, seed=0):
    ids = torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
    return from_batches("text", text_batches(ids)).pieces


def _theta(seed=1, size=LAYERS * HEADS, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator) * scale


def _loss_by_hand(model, profile, ids):
    """Mean -log q over the predicted tokens, under a profile, in float64."""
    with torch.no_grad(), tempered(model, profile):
        logits = model(input_ids=ids[None]).logits[0].double()
    values = [
        float(torch.logsumexp(logits[t], 0) - logits[t, ids[t + 1]]) for t in range(len(ids) - 1)
    ]
    return sum(values) / len(values)


def test_losses_are_those_of_the_profile(model):
    pieces, theta = _pieces(), _theta()
    basis = make_basis(model, layout(model), "head")
    with live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering:
        found = loss_pass(tempering, theta, pieces)
        profile = tempering.profile(theta)
        plain = loss_pass(tempering, None, pieces)
    for piece, loss, untouched in zip(pieces, found.losses, plain.losses):
        ids = piece.source.ids[0]
        assert float(loss) == pytest.approx(_loss_by_hand(model, profile, ids), abs=1e-6)
        neutral = Profile.neutral(model)
        assert float(untouched) == pytest.approx(_loss_by_hand(model, neutral, ids), abs=1e-6)


@pytest.mark.parametrize("per", ["head", "kv", "spline"])
@pytest.mark.parametrize("kind", ["loss", "divergence"])
def test_gradients_agree_with_differences(model, per, kind):
    pieces = _pieces(2)
    basis = make_basis(model, layout(model), per)
    size = basis.matrix.shape[1]
    theta = _theta(size=size)
    with live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering:
        found = gradient_pass(tempering, theta, pieces, kind=kind)
        step = 1e-3
        for i in range(size):
            ends = []
            for sign in (1, -1):
                moved = theta.clone()
                moved[i] += sign * step
                ends.append(loss_pass(tempering, moved, pieces, kind=kind).losses)
            slope = (ends[0] - ends[1]) / (2 * step)
            # Cross entropy is float32, so a difference carries some 1e-7 / 1e-3 of rounding.
            assert torch.allclose(found.gradients[:, i], slope, atol=1e-3, rtol=1e-2)


def test_rows_side_by_side_keep_gradients_of_their_own(model):
    pieces, theta = _pieces(5), _theta()
    basis = make_basis(model, layout(model), "head")
    with live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering:
        one = gradient_pass(tempering, theta, pieces)
        many = gradient_pass(tempering, theta, pieces, rows=3)
    assert torch.allclose(one.losses, many.losses, atol=1e-6)
    assert torch.allclose(one.gradients, many.gradients, atol=1e-6)
    assert one.gradients.shape == (5, LAYERS * HEADS)


def _fisher_by_hand(model, theta, pieces):
    """sum_v p_v (d log p_v)(d log p_v)^T, mean over the targets of all pieces, by differences."""
    basis, size, step = make_basis(model, layout(model), "head"), len(theta), 1e-4
    fisher, count = torch.zeros(size, size, dtype=torch.float64), 0

    def log_p(tempering, theta, piece):
        tempering.set(theta)
        with torch.no_grad():
            return target_logits(tempering.model, piece.source)[0].double().log_softmax(-1)

    with live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering:
        for piece in pieces:
            p = log_p(tempering, theta, piece).exp()
            slopes = []
            for i in range(size):
                ahead, behind = theta.clone(), theta.clone()
                ahead[i] += step
                behind[i] -= step
                ends = [log_p(tempering, moved, piece) for moved in (ahead, behind)]
                slopes.append((ends[0] - ends[1]) / (2 * step))
            fisher += torch.einsum("tv,itv,jtv->ij", p, torch.stack(slopes), torch.stack(slopes))
            count += len(p)
    return fisher / count


def test_drawn_targets_give_the_fisher_matrix(model):
    pieces, theta, draws = _pieces(2, length=12), _theta(), 500
    basis = make_basis(model, layout(model), "head")
    with live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering:
        plain = gradient_pass(tempering, theta, pieces)
        found = gradient_pass(tempering, theta, pieces, draws=draws, seed=3)
        again = gradient_pass(tempering, theta, pieces, draws=3, seed=3)
        other = gradient_pass(tempering, theta, pieces, rows=2, draws=draws, seed=4)
    assert torch.allclose(found.losses, plain.losses, atol=1e-6)
    assert torch.allclose(found.gradients, plain.gradients, atol=1e-6)
    assert found.drawn.shape == other.drawn.shape == (draws, 2, LAYERS * HEADS)
    assert torch.allclose(again.drawn[:, 0], found.drawn[:3, 0], atol=1e-6)
    assert not torch.allclose(other.drawn, found.drawn, atol=1e-3)
    wanted = _fisher_by_hand(model, theta, pieces)
    for run in (found, other):
        got = quadratic(run.losses, run.gradients, run.counts, run.drawn).curvature
        # The relative error of a mean over 1000 squares is some sqrt(2/1000) in each direction.
        assert float((got - wanted).norm() / wanted.norm()) < 0.15
        assert float(got.trace() / wanted.trace()) == pytest.approx(1, abs=0.12)
    empirical = quadratic(plain.losses, plain.gradients, plain.counts).curvature
    assert float((empirical - wanted).norm() / wanted.norm()) > 0.5


def _answers_of_two_lengths():
    """Two rows side by side, of which the second has three times the targets."""
    ids = torch.randint(0, WORDS, (2, 12), generator=torch.Generator().manual_seed(7))
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[0, [4, 9]] = True
    targets[1, 3:9] = True
    return ids, targets


def test_drawn_gradients_are_those_of_losses_with_the_drawn_targets(model, monkeypatch):
    """One forward serves all draws; each gradient is that of another text of the same inputs."""
    ids, targets = _answers_of_two_lengths()
    pieces = from_batches("qa", [Batch(ids, targets)], kind="answers").pieces
    theta, draws = _theta(), 3
    generator = torch.Generator().manual_seed(8)
    chosen = torch.randint(0, WORDS, (draws, 8, 1), generator=generator)
    forwards = []
    basis = make_basis(model, layout(model), "head")
    with live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering:
        plain = gradient_pass(tempering, theta, pieces, rows=2)
        monkeypatch.setattr(passes, "_draw", lambda q, draws, seed: list(chosen))
        with model.lm_head.register_forward_hook(lambda *call: forwards.append(call)):
            found = gradient_pass(tempering, theta, pieces, rows=2, draws=draws)
        want = torch.zeros(draws, 2, len(theta), dtype=torch.float64)
        for draw, row in itertools.product(range(draws), range(2)):
            leaf = theta.clone().requires_grad_()
            tempering.set(leaf)
            log_q = model(input_ids=ids[row : row + 1]).logits[0, :-1].log_softmax(-1)
            goals = chosen[draw, :2] if row == 0 else chosen[draw, 2:]
            loss = -log_q[targets[row, 1:]].gather(1, goals).mean()
            want[draw, row] = torch.autograd.grad(loss, leaf)[0]
    assert len(forwards) == 1
    assert torch.allclose(found.losses, plain.losses, atol=1e-7)
    assert torch.allclose(found.gradients, plain.gradients, atol=1e-7)
    assert torch.allclose(found.drawn, want, atol=1e-6)
    assert float(want.abs().max()) > 1e-2


def test_a_pass_that_draws_learns_from_lessons_all_the_same(model, tmp_path):
    ids = torch.randint(0, WORDS, (1, 9), generator=torch.Generator().manual_seed(9))
    teacher = torch.randn(8, WORDS, generator=torch.Generator().manual_seed(10)) * 2
    lesson = Lesson(tmp_path / "lesson", "teacher")
    lesson.write(distributions(teacher, None))
    everything = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(ids, everything, "text", (lesson,))
    pieces = [Piece(batch, batch.count, "text")]
    basis = make_basis(model, layout(model), "head")
    with live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering:
        plain = gradient_pass(tempering, _theta(), pieces)
        found = gradient_pass(tempering, _theta(), pieces, draws=2)
        text = gradient_pass(tempering, _theta(), _pieces_of(ids), draws=2)
    assert torch.allclose(found.gradients, plain.gradients, atol=1e-7)
    assert not torch.allclose(found.gradients, text.gradients, atol=1e-3)
    assert torch.allclose(found.drawn, text.drawn, atol=1e-7)  # both are drawn from the student


def _pieces_of(ids):
    return from_batches("text", text_batches(ids)).pieces


def test_tokens_are_drawn_by_their_probabilities():
    q = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2 - 1e-4, 1e-4, 0.0])
    drawn = passes._draw(q.expand(200_000, -1), 2, seed=5)
    for tokens in drawn:
        share = torch.bincount(tokens[:, 0], minlength=len(q)) / len(tokens)
        spread = (q * (1 - q) / len(tokens)).sqrt()
        assert bool(((share - q).abs() <= 5 * spread).all())
    assert not torch.equal(*drawn)


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.4999, 1), (0.5001, 3), (1.0, 5)])
def test_no_number_draws_a_token_without_probability(monkeypatch, number, token):
    """1 is no number of torch.rand, but what rounding may make of one near it."""
    q = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.0, 0.2, 0.0, 0.0]])
    monkeypatch.setattr(passes.torch, "rand", lambda shape, **_: torch.full(shape, number))
    assert passes._draw(q, 1, seed=0)[0].tolist() == [[token]]


def test_a_pass_that_draws_names_a_loss_that_is_no_number():
    model = tiny_llama()
    basis = make_basis(model, layout(model), "head")
    with live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering:
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
        with pytest.raises(RefusedError, match=r"step 0, text, chunk 0: the loss is nan; .*ers\.1"):
            gradient_pass(tempering, _theta(), _pieces(2), draws=2)


def test_a_function_has_no_targets_to_draw(model):
    objective = from_functions("f", [lambda network: network(torch.tensor([[1, 2]])).logits.mean()])
    basis = make_basis(model, layout(model), "head")
    with (
        live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering,
        pytest.raises(RefusedError, match="f, part 0 is a function: it has no targets to draw"),
    ):
        gradient_pass(tempering, _theta(), objective.pieces, draws=2)


def test_only_neighbours_of_one_length_are_grouped():
    short, long = _pieces(3, 6), _pieces(2, 9)
    sizes = [group.rows for group in grouped([*short, *long], 2)]
    assert sizes == [2, 1, 2]
    assert [group.rows for group in grouped(from_functions("f", [abs, abs]).pieces, 4)] == [1, 1]


def test_a_divergence_is_the_mean_kl_from_the_untempered_model(model):
    piece = _pieces(1)[0]
    basis = make_basis(model, layout(model), "head")
    theta = _theta()
    with live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering:
        found = loss_pass(tempering, theta, [piece], kind="divergence").mean
        nothing = loss_pass(tempering, torch.zeros_like(theta), [piece], kind="divergence").mean
        profile = tempering.profile(theta)
    ids = piece.source.ids
    with torch.no_grad():
        p = model(input_ids=ids).logits[0, :-1].double().softmax(-1)
        with tempered(model, profile):
            q = model(input_ids=ids).logits[0, :-1].double().softmax(-1)
    assert found == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-4)
    assert nothing == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("length", [5, 40])
def test_answers_are_scored_at_their_own_tokens(model, length):
    """The head is run where targets are (the longer row), or everywhere (the shorter)."""
    ids = torch.randint(0, WORDS, (2, length), generator=torch.Generator().manual_seed(4))
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[0, -2:] = True
    targets[1, -3:] = True
    batch = Batch(ids, targets)
    logits = model(input_ids=ids).logits
    want = [
        torch.logsumexp(logits[r, t - 1].double(), 0) - logits[r, t - 1, ids[r, t]].double()
        for r in range(2)
        for t in range(length)
        if targets[r, t]
    ]
    assert torch.allclose(target_losses(model, batch).double(), torch.stack(want), atol=1e-6)
    assert target_logits(model, batch)[1].tolist() == ids[targets].tolist()
    kl, loss = divergences(model, batch, target_logits(model, batch)[0])
    assert torch.allclose(kl, torch.zeros(5), atol=1e-6)
    assert torch.allclose(loss, target_losses(model, batch), atol=1e-6)


def test_no_weight_takes_a_gradient_and_everything_is_given_back():
    model = tiny_llama()
    model.model.layers[1].train()
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    asked = [weight.requires_grad for weight in model.parameters()]
    seen = []

    def loss(network):
        seen.append([weight.requires_grad for weight in network.parameters()])
        assert not any(module.training for module in network.modules())
        return network(input_ids=torch.arange(8)[None]).logits.float().square().mean()

    basis = make_basis(model, layout(model), "head")
    with (
        pytest.raises(KeyError),
        live_temperatures(model, basis, BOUNDS, checkpoint=True) as tempering,
    ):
        gradient_pass(tempering, _theta(), from_functions("f", [loss]).pieces)
        raise KeyError
    assert seen and not any(map(any, seen))
    assert all(weight.grad is None for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == asked
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(hasattr(module, "_tempering") for module in model.modules())


def _saved_bytes(model, checkpoint):
    """What autograd keeps of a pass for its backward pass, beside what was there anyway."""
    basis = make_basis(model, layout(model), "head")
    there = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    with live_temperatures(model, basis, BOUNDS, checkpoint=checkpoint) as tempering:
        tempering.set(_theta()[None].clone().requires_grad_())
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            held.append(model(input_ids=torch.zeros(1, 64, dtype=torch.long)).logits)
    return sum(kept.values())


def test_checkpointing_changes_nothing_but_memory():
    model = tiny_llama()
    basis = make_basis(model, layout(model), "head")
    found = {}
    for checkpoint in (False, True):
        with live_temperatures(model, basis, BOUNDS, checkpoint=checkpoint) as tempering:
            found[checkpoint] = gradient_pass(tempering, _theta(), _pieces(3), rows=3)
    assert torch.equal(found[False].losses, found[True].losses)
    assert torch.allclose(found[False].gradients, found[True].gradients, atol=1e-7)
    plain, checkpointed = _saved_bytes(model, False), _saved_bytes(model, True)
    # Of each layer its input is kept: 32 floats a token of the hundreds that it computes.
    assert checkpointed < plain / 5


def test_an_inference_mode_around_it_does_no_harm():
    model = tiny_llama()
    basis = make_basis(model, layout(model), "layer")
    with torch.no_grad(), live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering:
        found = gradient_pass(tempering, _theta(size=LAYERS), _pieces(1))
    assert bool(found.gradients.any())


def test_t_stays_within_its_bounds_and_is_1_at_the_start(model):
    basis = make_basis(model, layout(model), "head")
    with live_temperatures(model, basis, (0.5, 3.0), checkpoint=False) as tempering:
        far = torch.cat(tempering.temperatures(torch.linspace(-50, 50, 12).double()))
        assert float(far.min()) == pytest.approx(0.5, rel=1e-14)
        assert float(far.max()) == pytest.approx(3.0, rel=1e-14)
        start = torch.cat(tempering.temperatures(torch.zeros(12).double()))
        assert torch.equal(start, torch.ones(12).double())
        near = torch.cat(tempering.temperatures(torch.full((12,), 0.01).double()))
        assert torch.allclose(near.log(), torch.full((12,), 0.01).double(), rtol=1e-3)


@pytest.mark.parametrize("bounds", [(0.0, 2.0), (1.0, 2.0), (0.5, 1.0), (0.5, float("inf"))])
def test_bounds_hold_the_start(model, bounds):
    basis = make_basis(model, layout(model), "head")
    with (
        pytest.raises(TemperatureError, match="bounds on T are 0 < lowest < 1 < highest"),
        live_temperatures(model, basis, bounds, checkpoint=False),
    ):
        pass


def test_a_tempered_model_is_refused():
    model = tiny_llama()
    basis = make_basis(model, layout(model), "head")
    with (
        tempered(model, Profile.neutral(model)),
        pytest.raises(RefusedError, match=r"tempered by a handle already.*\.remove\(\)"),
        live_temperatures(model, basis, BOUNDS, checkpoint=False),
    ):
        pass


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m: 1.5, r"gave 1\.5; an objective returns one number as a tensor"),
        (lambda m: m(input_ids=torch.zeros(1, 4).long()).logits, r"gave shape \[1, 4, 48\]"),
        (lambda m: torch.tensor(1.0), "a loss without a gradient"),
    ],
)
def test_what_is_no_loss_is_refused(model, function, message):
    basis = make_basis(model, layout(model), "head")
    pieces = from_functions("mine", [function]).pieces
    with (
        live_temperatures(model, basis, BOUNDS, checkpoint=False) as tempering,
        pytest.raises(InputError, match=f"mine, part 0 .*{message}|mine, part 0 {message}"),
    ):
        gradient_pass(tempering, _theta(), pieces)


def test_a_model_of_two_sides_needs_an_objective_of_its_own():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(RefusedError, match="an encoder and a decoder"):
        target_losses(model, _pieces(1)[0].source)


def test_answers_of_a_batch_are_named_in_order():
    class Words:
        def __call__(self, text, add_special_tokens=False, verbose=False):
            return type("Encoding", (), {"input_ids": [ord(c) % 40 for c in text]})()

    batches = answer_batches(Words(), [("abc", "de"), ("a", "b")], "qa")
    assert [batch.origin for batch in batches] == ["qa, pair 0", "qa, pair 1"]
    assert [batch.count for batch in batches] == [2, 1]
