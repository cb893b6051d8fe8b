"""Every command's function on what a processor gives, against float64 sums by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tempering.attention.baking.bake import bake, foldable
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.subject import check_subject
from tempering.attention.measuring.measure import measure, measure_tokens
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning import from_inputs, tune
from tempering.errors import ArchitectureError, InputError, ProfileError, RefusedError
from tempering.evaluation.compare import compare
from tempering.evaluation.cost import Variant, measure_costs
from tempering.evaluation.depth import depth_cases, study_depth
from tempering.inputs import NO_GOAL, as_inputs
from tests.integration import media_tiny as tiny

# The models are so shallow that a pattern has few layers a stage, and learn from two rows.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::tempering.errors.{name}")
    for name in ("DepthWarning", "ConvergenceWarning", "CollapseWarning")
]


ANSWERING = ("vit", "whisper", "bart", "t5", "bert", "llava")
PARTS = {
    "vit": {"encoder": 3},
    "dinov2": {"encoder": 3},
    "bert": {"encoder": 3},
    "wav2vec2": {"encoder": 3},
    "t5": {"encoder": 2, "decoder": 2, "cross": 2},
    "bart": {"encoder": 2, "decoder": 3, "cross": 3},
    "whisper": {"encoder": 2, "decoder": 3, "cross": 3},
    "clip": {"vision encoder": 3, "text decoder": 2},
    "llava": {"vision encoder": 3, "text decoder": 2},
}
UNITS = {"vision encoder": "patches", "vit": "patches", "dinov2": "patches", "wav2vec2": "frames"}


@pytest.fixture(scope="module")
def models() -> Any:
    return tiny.Made()


def attention_weights(model: Any, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float64 weights [heads, queries, keys] of every layer, at the model's own eager softmax."""
    found: dict[str, Tensor] = {}
    plain = torch.nn.functional.softmax
    names = [layer.name for layer in layout(model).layers]
    running: list[str] = []

    def watched(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if running:
            found[running[-1]] = plain(logits.double(), dim=-1)[0]
        return plain(logits, *args, **kwargs)

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, n=name: running.append(n)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    torch.nn.functional.softmax = watched
    try:
        with torch.no_grad():
            model(**row)
    finally:
        torch.nn.functional.softmax = plain
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("name", PARTS)
def test_parts_entropies_and_distances(models: Any, name: str) -> None:
    model, batch = models(name), tiny.given(name)
    found = measure_tokens(model, batch, buckets=2)
    assert layout(model).depths == PARTS[name]
    assert {part: row.layers for part, row in found.parts().items()} == PARTS[name]
    entropy = torch.zeros(len(found.layers), tiny.HEADS, dtype=torch.float64)
    distance = torch.full_like(entropy, math.nan)
    rows = [example.arguments for example in as_inputs(batch, model)]
    weights = [attention_weights(model, dict(row)) for row in rows]
    for place, layer in enumerate(found.layers):
        each = [own[layer.name] for own in weights]
        entropy[place] = torch.stack([-(w * w.clamp(min=1e-300).log()).sum(-1) for w in each]).mean(
            (0, 2)
        )
        if layer.stack == "cross":
            continue
        unit = found.units[place]
        if layer.stack == "encoder":
            frames = "frames" if name == "whisper" else "tokens"
            assert unit == UNITS.get(layer.part, UNITS.get(name, frames))
        distances = [_distance(w, unit) for w in each]
        distance[place] = torch.stack(distances).mean(0)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.distance, distance, rtol=1e-4, atol=1e-4, equal_nan=True)


def _distance(weights: Tensor, unit: str) -> Tensor:
    """Mean distance of each head: of patches over their grid, the class token left out."""
    if unit != "patches":
        at = torch.arange(weights.shape[-1], dtype=torch.float64)
        return (weights * (at - at[:, None]).abs()).sum(-1).mean(-1)
    grid = torch.tensor(
        [[i // tiny.SIDE, i % tiny.SIDE] for i in range(tiny.SIDE**2)], dtype=torch.float64
    )
    own = weights[:, 1:, 1:]
    own = own / own.sum(-1, keepdim=True)
    return (own * torch.cdist(grid, grid)).sum(-1).mean(-1)


def own_loss(model: Any, row: dict[str, Tensor]) -> float:
    """The loss that transformers computes itself of a row with its labels."""
    with torch.no_grad():
        return float(model(**row).loss)


@pytest.mark.parametrize("name", ANSWERING)
def test_costs_are_the_models_own_losses(models: Any, name: str) -> None:
    model, batch = models(name), tiny.given(name)
    measure_tokens(model, batch)
    profile = Profile.from_schedule("linear(1.6,0.7)", model)
    (cost,), complete = measure_costs(model, batch, [Variant("hot", profile)])
    rows = [{key: item[i : i + 1] for key, item in batch.items()} for i in range(tiny.ROWS)]
    before = [own_loss(model, row) for row in rows]
    with tempered(model, profile):
        after = [own_loss(model, row) for row in rows]
    assert complete and cost.unit == ("nats/answer" if name in ("vit", "bert") else "nats/token")
    assert cost.untempered_nll == pytest.approx(sum(before) / tiny.ROWS, abs=2e-5)
    assert cost.cost.value == pytest.approx((sum(after) - sum(before)) / tiny.ROWS, abs=2e-5)
    assert abs(cost.cost.value) > 1e-4 and cost.kl.value > 1e-5
    # The loss that is learned from is the same number.
    goal = from_inputs(name, batch, model)
    with torch.no_grad():
        losses = [float(piece.losses(model)) for piece in goal.pieces]
    assert losses == pytest.approx(before, abs=2e-5)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_features_cost_one_less_cosine(models: Any, name: str) -> None:
    model, batch = models(name), tiny.given(name)
    measure_tokens(model, batch)
    profile = Profile.from_schedule("linear(1.6,0.7)", model)
    (cost,), _ = measure_costs(model, batch, [Variant("hot", profile)])

    def vectors() -> Tensor:
        with torch.no_grad():
            out = model(**batch)
        if name == "dinov2":
            return out.last_hidden_state.double()
        return torch.stack([out.image_embeds, out.text_embeds], 1).double()

    before = vectors()
    with tempered(model, profile):
        after = vectors()
    wanted = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)
    assert cost.unit == "1 - cosine" and math.isnan(cost.kl.value)
    assert cost.cost.value == pytest.approx(float(wanted.mean()), rel=1e-3) and cost.cost.value > 0


def test_rows_of_different_lengths_weigh_by_their_targets(models: Any) -> None:
    model = models("bart")
    rows = [
        {"input_ids": torch.tensor([[5, 9, 7, 30]]), "labels": torch.tensor([[8, 4]])},
        {"input_ids": torch.tensor([[5, 9]]), "labels": torch.tensor([[8, 4, 11, 60, 7, 9]])},
        {"input_ids": torch.tensor([[6, 8, 9]]), "labels": torch.tensor([[8, 90, 14]])},
    ]
    profile = Profile.from_schedule("constant(1.5)", model)
    (cost,), _ = measure_costs(model, rows, [Variant("hot", profile)])
    before = [own_loss(model, row) for row in rows]
    with tempered(model, profile):
        change = np.array([own_loss(model, row) for row in rows]) - before
    counts = np.array([2, 6, 3])
    mean = (counts * change).sum() / counts.sum()
    residual = counts / counts.mean() * (change - mean)
    assert cost.tokens == 11
    assert cost.cost.value == pytest.approx(mean, abs=2e-5)
    assert cost.cost.se == pytest.approx(residual.std(ddof=1) / 3**0.5, rel=1e-2)


@pytest.mark.parametrize("name", ["bart", "bert"])
def test_padding_changes_nothing(models: Any, name: str) -> None:
    model = models(name)
    whole = [torch.tensor([[5, 9, 7, 30, 8]]), torch.tensor([[6, 8, 9]])]
    padded = {
        "input_ids": torch.tensor([[5, 9, 7, 30, 8], [6, 8, 9, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "labels": torch.tensor([[8, 4], [7, NO_GOAL]]) if name == "bart" else torch.tensor([1, 0]),
    }
    labels = [torch.tensor([[8, 4]]), torch.tensor([[7]])]
    if name == "bert":
        labels = [torch.tensor([1]), torch.tensor([0])]
    alone = [{"input_ids": ids, "labels": own} for ids, own in zip(whole, labels, strict=True)]
    one, two = measure_tokens(model, padded), measure_tokens(model, alone)
    torch.testing.assert_close(one.entropy, two.entropy)
    variants = [Variant("hot", Profile.from_schedule("constant(1.5)", model))]
    (first,), _ = measure_costs(model, padded, variants)
    (second,), _ = measure_costs(model, alone, variants)
    assert first.cost.value == pytest.approx(second.cost.value, abs=1e-6)


@pytest.mark.parametrize("name", ["clip", "llava"])
def test_towers_are_tempered_apart(models: Any, name: str) -> None:
    model, batch = models(name), tiny.given(name)
    batch.pop("labels", None)
    measure_tokens(model, batch)
    plan = layout(model)
    vision = Profile.from_schedule("linear(1.6,0.7)", model, stack="vision")
    text = Profile.from_schedule("linear(1.6,0.7)", model, stack="text")
    for layer, row, other in zip(plan.layers, vision.rows, text.rows, strict=True):
        moved = bool((row != 1).any()), bool((other != 1).any())
        expected = layer.tower == "vision", layer.tower == "text"
        assert moved == expected or (row == 1).all() != (other == 1).all()
    both = Profile.from_schedule("linear(1.6,0.7)", model)
    assert all(
        torch.equal(b, v if layer.tower == "vision" else t)
        for layer, b, v, t in zip(plan.layers, both.rows, vision.rows, text.rows, strict=True)
    )

    def image() -> Tensor:
        with torch.no_grad():
            found = model.get_image_features(pixel_values=batch["pixel_values"])
        return found if isinstance(found, Tensor) else found.pooler_output

    plain = image() if name == "clip" else None
    with tempered(model, text):
        under_text = image() if name == "clip" else None
    with tempered(model, vision):
        under_vision = image() if name == "clip" else None
    if plain is not None:
        assert torch.equal(plain, under_text) and not torch.allclose(plain, under_vision)
    with pytest.raises(ProfileError, match="no stack 'audio'; it has vision encoder, text decoder"):
        Profile.from_schedule("constant(2)", model, stack="audio")


def test_a_wrapper_runs_what_is_tempered_inside(models: Any) -> None:
    """As SentenceTransformer does: modules in a row, the first around a transformers model."""
    inner = tiny.bert("BertModel")

    class Embeds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = inner

        def forward(self, ids: Tensor) -> Tensor:
            return self.auto_model(input_ids=ids).last_hidden_state.mean(1)

    wrapper = torch.nn.Sequential(Embeds(), torch.nn.Identity())
    ids = tiny.given("bert")["input_ids"]
    with torch.no_grad():
        plain = wrapper(ids)
        with tempered(inner, Profile.from_schedule("constant(2)", inner)):
            hot = wrapper(ids)
            assert torch.equal(hot, inner(input_ids=ids).last_hidden_state.mean(1))
    assert not torch.allclose(plain, hot)
    with pytest.raises(ArchitectureError, match=r"get_submodule\('0.auto_model'\)"):
        measure(wrapper, None, {"input_ids": ids})


def test_learning_lowers_the_loss_and_says_what_it_learned_from(models: Any) -> None:
    model, batch = models("whisper"), tiny.given("whisper")
    goal = from_inputs("speech", batch, model)
    tuned = tune(model, goal, per="layer", steps=2, held_out=0)
    assert tuned.after < tuned.before and goal.kind == "answers" and goal.count == tiny.ROWS * 7
    assert any("cross" in name for name in tuned.names)
    other = dict(batch, input_features=batch["input_features"] + 1)
    assert from_inputs("speech", other, model).digest != goal.digest


@pytest.mark.parametrize("name", ["vit", "clip", "llava", "bart"])
def test_compare_and_depth(models: Any, name: str) -> None:
    model, batch = models(name), tiny.given(name)
    found = compare(model, None, batch, ["linear(1.5,0.7)"])
    profile = Profile.from_schedule("linear(1.5,0.7)", model)
    (wanted,), _ = measure_costs(model, batch, [Variant("x", profile)])
    assert found.costs[0].cost == wanted.cost
    part, layers = next(iter(PARTS[name].items()))
    (case, *_) = depth_cases("linear(1.5,0.7)", model, cycles=1, stack=part)
    rows = zip(layout(model).layers, case.profile.rows, strict=True)
    assert {layer.part for layer, row in rows if bool((row != 1).any())} == {part}
    study = study_depth(model, batch, [case])
    assert case.layers == layers and study.costs[0].cost.n == tiny.ROWS
    with pytest.raises(InputError, match="continuations of text"):
        compare(model, None, batch, ["linear(1.5,0.7)"], samples=2)


@pytest.mark.parametrize("name", ["vit", "whisper", "clip", "llava"])
def test_bake(models: Any, name: str) -> None:
    model, batch = models(name), tiny.given(name)
    batch.pop("labels", None)
    if name == "whisper":
        batch["decoder_input_ids"] = torch.tensor([[1, 7, 9], [1, 8, 4]])
    measure_tokens(model, batch)
    assert foldable(model).verdict == "per head"
    profile = Profile.from_schedule("linear(1.5,0.7)", model)
    baked = bake(model, profile)
    with torch.no_grad():
        after = baked(**batch)
        with tempered(model, profile):
            wanted = model(**batch)
    for one, two in zip(_floats(after), _floats(wanted), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def _floats(output: Any) -> list[Tensor]:
    names = ("logits", "image_embeds", "text_embeds")
    return [output[name] for name in names if isinstance(output.get(name), Tensor)]


def test_bad_batches_are_one_line_each(models: Any) -> None:
    vit, bart = models("vit"), models("bart")
    pixels = tiny.given("vit")["pixel_values"]
    for model, batch, match in (
        (
            vit,
            tiny.given("whisper"),
            "the processor doesn't fit the model: it makes input_features",
        ),
        (vit, {"pixel_values": pixels[..., :16]}, "fails on"),
        (vit, {"pixel_values": pixels, "labels": torch.tensor([1])}, "1 labels were given for 2"),
        (vit, [], "a model is run on token ids"),
        (vit, {"pixel_values": pixels, "labels": torch.tensor([7, 0])}, "the answer 7 is none of"),
        (vit, {"pixel_values": pixels, "labels": torch.rand(2, 3)}, "labels name a class"),
        (vit, {"pixel_values": pixels, "labels": torch.ones(2, 3).long()}, "3 answers are given"),
        (vit, {"pixel_values": torch.tensor(1.0)}, "tensors with a row or more"),
        (bart, {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(3, 3)}, "apart"),
        (bart, torch.tensor([[5, 6, 7]]), "has an encoder and a decoder"),
    ):
        with pytest.raises((InputError, ArchitectureError), match=match) as caught:
            measure_costs(model, batch, [Variant("x", Profile.from_schedule("constant(2)", model))])
        assert "\n" not in str(caught.value)
    config = tiny.bert("BertForSequenceClassification").config
    config.num_labels = 1
    reward = type(models("bert"))(config).eval()
    with pytest.raises(RefusedError, match="one number and no distribution"):
        measure_costs(reward, {"input_ids": torch.tensor([[5, 6]])}, [Variant("x", None, 0.9)])


def test_a_pipeline_names_the_model_inside(models: Any) -> None:
    from transformers import pipeline

    pipe = pipeline(
        "image-classification", model=models("vit"), image_processor=tiny.image_processor()
    )
    with pytest.raises(ArchitectureError, match=r"holds a model and is none; give .*\.model"):
        check_subject(pipe)
