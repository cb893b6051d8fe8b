"""Repair on models that were harmed in a known way: what comes back is what was taken."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering import Profile, tempered
from tempering.attention.measuring.measure import measure_tokens
from tempering.attention.tuning import from_batches, from_functions
from tempering.attention.tuning.batches import text_batches
from tempering.attention.tuning.repair import learning, repair, repair_by_support
from tempering.attention.tuning.teacher import teach
from tempering.engines.loading.rounding import round_weights, rounded
from tempering.errors import InputError, ModelError, RefusedError
from tests.integration.tuning_tiny import HEADS, LAYERS, WORDS, sampled_text, tiny_llama

# The heads of the harmed model attend as if at these temperatures.
HARM = torch.linspace(0.7, 1.4, LAYERS * HEADS, dtype=torch.float64).view(LAYERS, HEADS)


def harmed(model: Any) -> Any:
    """A copy whose queries are divided by HARM, head by head: T = 1 / HARM mends it exactly."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, row in zip(other.model.layers, HARM, strict=True):
            weight = layer.self_attn.q_proj.weight
            size = weight.shape[0] // HEADS
            weight.div_(row.repeat_interleave(size)[:, None].to(weight.dtype))
    return other


def text(model: Any, rows: int = 32, length: int = 48, seed: int = 1) -> Any:
    ids = sampled_text(model, None, rows, length, seed)
    return from_batches("text", text_batches(ids))


# What 4 of 48 tokens tell leaves the last layer less certain than what all of them do.
@pytest.mark.parametrize(("top", "within"), [(4, 0.05), (None, 0.01)])
def test_learning_finds_the_temperatures_that_mend(
    tmp_path: Path, top: int | None, within: float
) -> None:
    reference = tiny_llama()
    tuned = repair(
        harmed(reference),
        reference,
        text(reference),
        lessons=tmp_path,
        top=top,
        passes=60,
        rows=16,
        prior_sd=50.0,
        output_scales=False,
    )
    found = tuned.profile.temperature
    assert tuned.after < 1e-3 * tuned.before
    torch.testing.assert_close(found.log(), HARM.reciprocal().log(), atol=within, rtol=0)


def test_the_rate_is_the_root_of_what_was_taken(tmp_path: Path) -> None:
    """Twice as far in log T is four times the divergence, near the reference."""
    reference, rates = tiny_llama(), []
    for share in (0.25, 0.5):
        model = copy.deepcopy(reference)
        with torch.no_grad():
            for layer, row in zip(model.model.layers, HARM**share, strict=True):
                weight = layer.self_attn.q_proj.weight
                weight.div_(row.repeat_interleave(len(weight) // HEADS)[:, None].to(weight.dtype))
        taught = teach(reference, text(reference, rows=4), tmp_path, top=None)
        with torch.no_grad():
            losses = [piece.losses(model) for piece in taught.pieces[:2]]
        asked = learning(model, [taught], 2, 3)
        assert asked["steps"] == 3  # twice through 4 pieces, 3 at a time
        exact = 0.09 * float(torch.cat(losses).mean()) ** 0.5
        assert asked["rate"] == pytest.approx(min(max(exact, 0.015), 0.12), rel=1e-5)
        rates.append(exact)
    assert rates[1] / rates[0] == pytest.approx(2.0, rel=0.15)
    plain = text(reference, rows=4)
    assert learning(reference, [plain], 1, 4)["rate"] == pytest.approx(0.09 * 0.1**0.5)
    taught = teach(reference, plain, tmp_path, top=None)
    assert learning(reference, [taught], 1, 4)["rate"] == 0.015
    with pytest.raises(InputError, match="passes and rows are at least 1; got 0 and 4"):
        learning(reference, [plain], 0, 4)


def test_a_loss_that_is_no_number_names_its_place(tmp_path: Path) -> None:
    reference = tiny_llama()
    broken = copy.deepcopy(reference)
    with torch.no_grad():
        broken.model.layers[-1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(RefusedError, match="the loss is nan"):
        repair(broken, reference, text(reference, rows=8), lessons=tmp_path, rows=4)


def test_the_reference_may_be_opened_when_it_is_needed(tmp_path: Path) -> None:
    reference, opened = tiny_llama(), []

    def open_it() -> Any:
        opened.append(1)
        return reference

    options: dict[str, Any] = {"passes": 1, "rows": 16}
    goal = text(reference, rows=8)
    first = repair(harmed(reference), open_it, goal, lessons=tmp_path / "a", **options)
    second = repair(harmed(reference), reference, goal, lessons=tmp_path / "b", **options)
    assert opened == [1]
    assert torch.equal(first.theta, second.theta)


def test_without_a_reference_the_next_tokens_are_learned(tmp_path: Path) -> None:
    reference = tiny_llama()
    tuned = repair(harmed(reference), None, text(reference), lessons=tmp_path, passes=4, rows=16)
    assert tuned.after < tuned.before
    assert list(tmp_path.iterdir()) == []


def test_support_is_restored_head_by_head() -> None:
    reference = tiny_llama()
    ids = sampled_text(reference, None, 4, 48, 1)
    wanted = measure_tokens(reference, ids).entropy
    model = harmed(reference)
    profile = repair_by_support(model, wanted, ids)
    # Queries divided by c and a temperature of 1 / c are the same attention.
    torch.testing.assert_close(profile.temperature, HARM.reciprocal(), atol=2e-4, rtol=0)
    after = measure_tokens(model, ids, profile=profile).entropy
    torch.testing.assert_close(after, wanted, atol=1e-4, rtol=0)


def test_a_support_out_of_reach_stops_at_the_bound() -> None:
    model = tiny_llama()
    ids = sampled_text(model, None, 4, 48, 1)
    own = measure_tokens(model, ids).entropy
    wanted = own.clone()
    wanted[0, 0], wanted[1, 2], wanted[2, 3] = 0.0, 99.0, torch.nan
    found = repair_by_support(model, wanted, ids).temperature
    assert found[0, 0].item() == pytest.approx(0.5, abs=1e-3)
    assert found[1, 2].item() == pytest.approx(2.0, abs=1e-3)
    assert found[0, 1].item() == pytest.approx(1.0, abs=1e-5)


def test_entropies_of_another_shape_are_refused() -> None:
    model = tiny_llama()
    ids = torch.randint(0, WORDS, (2, 16))
    with pytest.raises(InputError, match=r"\[layers, heads\] = \[3, 4\]; these have \[3, 5\]"):
        repair_by_support(model, torch.zeros(3, 5), ids)


def test_a_repair_leaves_weights_and_models_alone(tmp_path: Path) -> None:
    reference = tiny_llama()
    model = harmed(reference)
    before = {name: item.clone() for name, item in model.state_dict().items()}
    repair(model, reference, text(reference, 8), lessons=tmp_path, passes=1, rows=16)
    for name, item in model.state_dict().items():
        assert torch.equal(item, before[name])
    assert all(p.requires_grad for p in (*model.parameters(), *reference.parameters()))


def test_lessons_that_are_there_are_not_asked_for_again(tmp_path: Path) -> None:
    reference, calls = tiny_llama(), []
    reference.register_forward_pre_hook(lambda module, args: calls.append(1))
    goal = text(reference, rows=6)
    calls.clear()
    first = teach(reference, goal, tmp_path)
    assert len(calls) == 6
    again = teach(reference, goal, tmp_path)
    assert len(calls) == 6
    assert again.digest == first.digest != goal.digest
    next(iter(tmp_path.iterdir())).unlink()
    teach(reference, goal, tmp_path)
    assert len(calls) == 7


def test_other_teachers_texts_and_tops_have_other_lessons(tmp_path: Path) -> None:
    reference = tiny_llama()
    goal = text(reference, rows=2)
    digests = {
        teach(reference, goal, tmp_path, top=4).digest,
        teach(reference, goal, tmp_path, top=5).digest,
        teach(tiny_llama(seed=3), goal, tmp_path, top=4).digest,
        teach(reference, text(reference, rows=2, seed=9), tmp_path, top=4).digest,
    }
    assert len(digests) == 4
    assert len(list(tmp_path.iterdir())) == 8


def test_an_interrupted_lesson_leaves_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    reference = tiny_llama()
    goal = text(reference, rows=3)
    real, done = safetensors.torch.save_file, []

    def stopped(tensors: Any, path: Any, metadata: Any) -> None:
        if done:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(1)
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        teach(reference, goal, tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    taught = teach(reference, goal, tmp_path)
    for piece in taught.pieces:
        assert len(piece.source.lessons[0].read().top) == piece.count  # type: ignore[union-attr]


def test_a_reference_of_another_kind_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = tiny_llama()
    other = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match=r"another architecture \(gpt2\) than .*\(llama\)"):
        repair(model, other, text(model, 2), lessons=tmp_path)
    wider = copy.deepcopy(model)
    wider.config.vocab_size = 50
    with pytest.raises(ModelError, match=r"another vocabulary \(50 tokens\)"):
        repair(model, wider, text(model, 2), lessons=tmp_path)


def test_a_function_can_t_be_taught(tmp_path: Path) -> None:
    goal = from_functions("mine", [lambda model: torch.zeros(())])
    with pytest.raises(InputError, match="'mine' is a Python function, which a teacher can't"):
        teach(tiny_llama(), goal, tmp_path)
    with pytest.raises(InputError, match="at least 1 token"):
        teach(tiny_llama(), text(tiny_llama(), 2), tmp_path, top=0)


# -- the plainest compression


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_weights_are_rounded_to_the_nearest_level(bits: int) -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(0)).double()
    found = rounded(weight, bits, 32)
    for row in range(5):
        for start in (0, 32, 64):
            part, own = weight[row, start : start + 32], found[row, start : start + 32]
            levels = torch.linspace(part.min(), part.max(), 2**bits, dtype=torch.float64)
            near = levels[(part[:, None] - levels).abs().argmin(1)]
            torch.testing.assert_close(own, near, atol=1e-12, rtol=0)


def test_flat_groups_stay_and_rounding_twice_changes_nothing() -> None:
    flat = torch.full((2, 40), 0.3)
    assert torch.equal(rounded(flat, 2), flat)
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    once = rounded(weight, 3)
    torch.testing.assert_close(rounded(once, 3), once, atol=1e-6, rtol=0)


def test_every_linear_layer_but_the_head_is_rounded() -> None:
    model = tiny_llama()
    before = copy.deepcopy(model)
    count = round_weights(model, 3)
    changed = {
        name
        for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert changed == linear - {"lm_head.weight"}
    assert count == sum(model.get_parameter(name).numel() for name in changed)
    with pytest.raises(InputError, match="1 to 8 bits, not to 0"):
        round_weights(model, 0)


def test_a_rounded_model_is_repaired_a_little_and_its_controls_are_not(tmp_path: Path) -> None:
    reference = tiny_llama()
    model = copy.deepcopy(reference)
    round_weights(model, 3, group=8)
    tuned = repair(model, reference, text(reference), lessons=tmp_path, passes=6, rows=16)
    assert tuned.after < tuned.before
    assert not torch.equal(tuned.profile.temperature, torch.ones(LAYERS, HEADS).double())
    with tempered(model, tuned.profile), torch.no_grad():
        model(input_ids=torch.randint(0, WORDS, (1, 8)))
    assert Profile.from_json(tuned.profile.to_json()).temperature.shape == (LAYERS, HEADS)
