"""Every command's function on what a processor gives, against float64 sums by hand."""

from __future__ import annotations

import json
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
from tempering.cli import main
from tempering.errors import ArchitectureError, DataError, InputError, ProfileError, RefusedError
from tempering.evaluation.compare import compare
from tempering.evaluation.cost import Variant, measure_costs
from tempering.evaluation.depth import depth_cases, study_depth
from tempering.inputs import NO_GOAL, as_inputs, read_inputs
from tempering.inputs.pairs import read_pairs
from tempering.inputs.sound import read_sound
from tests.integration import media_tiny as tiny

# The models are so shallow that a pattern has few layers a stage, and learn from two rows.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::tempering.errors.{name}")
    for name in ("DepthWarning", "ConvergenceWarning", "CollapseWarning")
]
ROWS = 2
SIDE = tiny.SIZE // tiny.PATCH
IMAGE, FIRST = tiny.WORDS, 2  # llava's token for an image, and where its patches begin


def given(name: str) -> dict[str, Tensor]:
    """What a processor would give, with labels where the model answers."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> Tensor:
        return torch.randint(5, 290, (ROWS, length), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=generator)

    if name == "llava":
        read = ids(FIRST + SIDE**2 + 9)
        read[:, FIRST : FIRST + SIDE**2] = IMAGE
        labels = read.clone()
        labels[:, : FIRST + SIDE**2 + 3] = NO_GOAL
        return {
            "input_ids": read,
            "pixel_values": noise(3, tiny.SIZE, tiny.SIZE),
            "labels": labels,
        }
    return {
        "vit": lambda: {
            "pixel_values": noise(3, tiny.SIZE, tiny.SIZE),
            "labels": torch.tensor([2, 0]),
        },
        "dinov2": lambda: {"pixel_values": noise(3, tiny.SIZE, tiny.SIZE)},
        "clip": lambda: {"input_ids": ids(9), "pixel_values": noise(3, tiny.SIZE, tiny.SIZE)},
        "whisper": lambda: {"input_features": noise(8, 100), "labels": ids(7)},
        "bart": lambda: {"input_ids": ids(11), "labels": ids(6)},
        "t5": lambda: {"input_ids": ids(11), "labels": ids(6)},
        "bert": lambda: {"input_ids": ids(12), "labels": torch.tensor([1, 0])},
        "wav2vec2": lambda: {"input_values": noise(2000)},
    }[name]()


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
    """Each tiny model, made once."""
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in made:
            made[name] = tiny.MAKERS[name]()
        return made[name]

    return model


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
    model, batch = models(name), given(name)
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
    grid = torch.tensor([[i // SIDE, i % SIDE] for i in range(SIDE**2)], dtype=torch.float64)
    own = weights[:, 1:, 1:]
    own = own / own.sum(-1, keepdim=True)
    return (own * torch.cdist(grid, grid)).sum(-1).mean(-1)


def own_loss(model: Any, row: dict[str, Tensor]) -> float:
    """The loss that transformers computes itself of a row with its labels."""
    with torch.no_grad():
        return float(model(**row).loss)


@pytest.mark.parametrize("name", ANSWERING)
def test_costs_are_the_models_own_losses(models: Any, name: str) -> None:
    model, batch = models(name), given(name)
    measure_tokens(model, batch)
    profile = Profile.from_schedule("linear(1.6,0.7)", model)
    (cost,), complete = measure_costs(model, batch, [Variant("hot", profile)])
    rows = [{key: item[i : i + 1] for key, item in batch.items()} for i in range(ROWS)]
    before = [own_loss(model, row) for row in rows]
    with tempered(model, profile):
        after = [own_loss(model, row) for row in rows]
    assert complete and cost.unit == ("nats/answer" if name in ("vit", "bert") else "nats/token")
    assert cost.untempered_nll == pytest.approx(sum(before) / ROWS, abs=2e-5)
    assert cost.cost.value == pytest.approx((sum(after) - sum(before)) / ROWS, abs=2e-5)
    assert abs(cost.cost.value) > 1e-4 and cost.kl.value > 1e-5
    # The loss that is learned from is the same number.
    goal = from_inputs(name, batch, model)
    with torch.no_grad():
        losses = [float(piece.losses(model)) for piece in goal.pieces]
    assert losses == pytest.approx(before, abs=2e-5)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_features_cost_one_less_cosine(models: Any, name: str) -> None:
    model, batch = models(name), given(name)
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
    model, batch = models(name), given(name)
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
    ids = given("bert")["input_ids"]
    with torch.no_grad():
        plain = wrapper(ids)
        with tempered(inner, Profile.from_schedule("constant(2)", inner)):
            hot = wrapper(ids)
            assert torch.equal(hot, inner(input_ids=ids).last_hidden_state.mean(1))
    assert not torch.allclose(plain, hot)
    with pytest.raises(ArchitectureError, match=r"get_submodule\('0.auto_model'\)"):
        measure(wrapper, None, {"input_ids": ids})


def test_learning_lowers_the_loss_and_says_what_it_learned_from(models: Any) -> None:
    model, batch = models("whisper"), given("whisper")
    goal = from_inputs("speech", batch, model)
    tuned = tune(model, goal, per="layer", steps=2, held_out=0)
    assert tuned.after < tuned.before and goal.kind == "answers" and goal.count == ROWS * 7
    assert any("cross" in name for name in tuned.names)
    other = dict(batch, input_features=batch["input_features"] + 1)
    assert from_inputs("speech", other, model).digest != goal.digest


@pytest.mark.parametrize("name", ["vit", "clip", "llava", "bart"])
def test_compare_and_depth(models: Any, name: str) -> None:
    model, batch = models(name), given(name)
    found = compare(model, None, batch, ["linear(1.5,0.7)"])
    profile = Profile.from_schedule("linear(1.5,0.7)", model)
    (wanted,), _ = measure_costs(model, batch, [Variant("x", profile)])
    assert found.costs[0].cost == wanted.cost
    part, layers = next(iter(PARTS[name].items()))
    (case, *_) = depth_cases("linear(1.5,0.7)", model, cycles=1, stack=part)
    rows = zip(layout(model).layers, case.profile.rows, strict=True)
    assert {layer.part for layer, row in rows if bool((row != 1).any())} == {part}
    study = study_depth(model, batch, [case])
    assert case.layers == layers and study.costs[0].cost.n == ROWS
    with pytest.raises(InputError, match="continuations of text"):
        compare(model, None, batch, ["linear(1.5,0.7)"], samples=2)


@pytest.mark.parametrize("name", ["vit", "whisper", "clip", "llava"])
def test_bake(models: Any, name: str) -> None:
    model, batch = models(name), given(name)
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


# -- files


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sound_of_any_depth(tmp_path: Any, width: int) -> None:
    tone = tiny.write_wave(tmp_path / "a.wav", width=width)
    said: list[str] = []
    found = read_sound(tmp_path / "a.wav", tiny.RATE, said.append)
    assert not said and np.abs(found - tone).max() < 2.0 ** (1 - 8 * width) + 1e-6


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_sound_at_another_rate_is_resampled_and_said(tmp_path: Any, rate: int) -> None:
    tiny.write_wave(tmp_path / "a.wav", rate=rate, channels=2)
    said: list[str] = []
    found = read_sound(tmp_path / "a.wav", tiny.RATE, said.append)
    at = np.arange(len(found)) / tiny.RATE
    wanted = 0.5 * np.sin(2 * np.pi * (300 + 200 * at) * at)
    inner = slice(200, -200)  # the filter rings at both ends
    assert np.abs(found - wanted)[inner].max() < 0.01
    assert said == [
        "note: a.wav: 2 channels, their mean is taken; "
        f"{rate} samples a second, resampled to {tiny.RATE}"
    ]


def test_a_file_cut_off_is_said(tmp_path: Any) -> None:
    tiny.write_wave(tmp_path / "a.wav")
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[: len(content) // 2])
    said: list[str] = []
    assert len(read_sound(tmp_path / "a.wav", tiny.RATE, said.append)) > 1000
    assert "ends before its header says" in said[0]


def test_images_in_folders_named_by_labels(models: Any, tmp_path: Any) -> None:
    from PIL import Image

    model, processor = models("vit"), tiny.image_processor()
    folder = tiny.draw_images(tmp_path / "named", 4, ["cat", "fish"])
    found = read_inputs("images", folder, model, processor)
    assert [int(e.goals) for e in found] == [0, 0, 2, 2] and not found.own  # type: ignore[arg-type]
    image = Image.open(folder / "cat" / "0.png")
    wanted = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(found.examples[0].arguments["pixel_values"], wanted)
    some = read_inputs("images", folder, model, processor, limit=2)
    assert [e.origin for e in some] == [found.examples[0].origin, found.examples[3].origin]
    said: list[str] = []
    plain = tiny.draw_images(tmp_path / "plain", 2)
    bare = read_inputs("images", plain, model, processor, say=said.append)
    assert bare.own and "2 of 2 images come without the right answer" in said[0]
    (cost,), _ = measure_costs(
        model, bare, [Variant("hot", Profile.from_schedule("constant(2)", model))]
    )
    with torch.no_grad():
        p = torch.cat([model(**e.arguments).logits for e in bare]).double().log_softmax(-1)
        with tempered(model, Profile.from_schedule("constant(2)", model)):
            q = torch.cat([model(**e.arguments).logits for e in bare]).double().log_softmax(-1)
    likeliest = p.argmax(-1, keepdim=True)
    wanted = (p.gather(1, likeliest) - q.gather(1, likeliest)).mean()
    assert cost.cost.value == pytest.approx(float(wanted), abs=1e-6)
    with pytest.raises(DataError, match="nothing says what is right"):
        from_inputs("images", bare, model)


def test_speech_with_transcripts_and_without(models: Any, tmp_path: Any) -> None:
    model, tokenizer = models("whisper"), tiny.tokenizer()
    processor = tiny.Processor(tiny.whisper_extractor(), tokenizer)
    tiny.write_wave(tmp_path / "a.wav")
    (tmp_path / "a.txt").write_text("hot layers explore\n")
    (example,) = read_inputs("audio", tmp_path, model, processor)
    ids = tokenizer("hot layers explore").input_ids
    assert example.goals is not None and example.goals.tolist() == ids
    start = model.generation_config.decoder_start_token_id
    assert example.arguments["decoder_input_ids"].tolist() == [[start, *ids[:-1]]]
    (tmp_path / "a.txt").unlink()
    said: list[str] = []
    (own,) = read_inputs("audio", tmp_path, model, processor, say=said.append)
    assert own.goals is not None and "model's own takes its place" in said[-1]


def test_pairs_for_every_kind_of_model(models: Any, tmp_path: Any) -> None:
    tokenizer = tiny.tokenizer()
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "hot layers", "answer": "yes"}) + "\n\n")
    (pair,) = read_inputs("pairs", path, models("bart"), tokenizer)
    assert pair.goals is not None
    assert pair.goals.tolist() == tokenizer("yes").input_ids
    assert pair.arguments["input_ids"].tolist() == [tokenizer("hot layers").input_ids]
    (label,) = read_inputs("pairs", path, models("bert"), tokenizer)
    assert label.goals is not None and label.goals.tolist() == [1]
    tiny.draw_images(tmp_path, 1)
    path.write_text(json.dumps({"image": "0.png", "answer": "dog"}))
    (shown,) = read_inputs("pairs", path, models("vit"), tiny.image_processor())
    assert shown.goals is not None and shown.goals.tolist() == [1]
    with pytest.raises(DataError, match="line 1: names .*0.png, and a text is expected"):
        read_pairs(path)


def test_a_vision_language_model_reads_images_with_questions(models: Any, tmp_path: Any) -> None:
    model, processor = models("llava"), tiny.llava_processor()
    tiny.draw_images(tmp_path, 2)
    said = processor.tokenizer(" cold layers", add_special_tokens=False).input_ids
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"image": "0.png", "prompt": "Why?", "answer": " cold layers"}))
    (asked,) = read_inputs("pairs", path, model, processor)
    ids, goals = asked.arguments["input_ids"][0], asked.goals
    assert goals is not None and len(goals) == len(ids) - 1
    assert goals[goals != NO_GOAL].tolist() == said == ids[-len(said) :].tolist()
    assert int((ids == IMAGE).sum()) == SIDE**2
    notes: list[str] = []
    own = read_inputs("images", tmp_path, model, processor, say=notes.append)
    assert own.own and "2 of 2 images" in notes[0]
    first = own.examples[0]
    asked_of = first.goals == NO_GOAL  # type: ignore[union-attr]
    start = int((~asked_of).nonzero()[0]) + 1
    with torch.no_grad():
        logits = model(**first.arguments).logits[0]
    # Its own answer is what it says greedily, token after token.
    read = first.arguments["input_ids"][0]
    assert logits[start - 1 : -1].argmax(-1).tolist() == read[start:].tolist()
    assert measure_tokens(model, own).parts()["vision encoder"].unit == "patches"
    hot = Profile.from_schedule("constant(1.5)", model, stack="vision")
    (cost,), _ = measure_costs(model, own, [Variant("hot", hot)])
    assert cost.cost.n == 2 and cost.kl.value > 0


def refusal(kind: str, path: Any, model: Any, processor: Any) -> str:
    with pytest.raises((InputError, DataError)) as caught:
        read_inputs(kind, path, model, processor)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_folders_and_files_are_one_line_each(models: Any, tmp_path: Any) -> None:
    vit, images = models("vit"), tiny.image_processor()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no images in it: no file ends in .png" in refusal("images", empty, vit, images)
    assert "there is no folder" in refusal("images", tmp_path / "none", vit, images)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_text("no image")
    assert "a.png can't be read as an image" in refusal("images", bad, vit, images)
    assert "is a file; give the folder" in refusal("images", bad / "a.png", vit, images)
    half = tiny.draw_images(tmp_path / "half", 1) / "0.png"
    half.write_bytes(half.read_bytes()[:200])
    assert "0.png can't be read as an image" in refusal("images", half.parent, vit, images)
    wrong = tiny.draw_images(tmp_path / "wrong", 2, ["cat", "house"])
    assert "is named like no label of the model; its labels are cat, dog, fish" in refusal(
        "images", wrong, vit, images
    )
    sounds = tmp_path / "sounds"
    tiny.write_wave(sounds / "a.wav")
    extractor = tiny.whisper_extractor()
    assert "reads no sound: it takes pixel_values" in refusal("audio", sounds, vit, extractor)
    whisper = models("whisper")
    assert "makes nothing of sound" in refusal("audio", sounds, whisper, images)
    assert "reads no images" in refusal("images", wrong, whisper, extractor)
    (sounds / "a.wav").write_bytes(b"RIFF....WAVEnothing")
    assert "a.wav can't be read as sound" in refusal("audio", sounds, whisper, extractor)
    empty_text = tiny.draw_images(tmp_path / "said", 1)
    (empty_text / "0.txt").write_text(" \n")
    assert "0.txt is empty" in refusal("images", empty_text, vit, images)
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("\n")
    assert "is empty" in refusal("pairs", lines, models("bart"), tiny.tokenizer())
    lines.write_text(json.dumps({"prompt": "a", "answer": "maybe"}))
    assert "'maybe' is no label of the model; its labels are no, yes" in refusal(
        "pairs", lines, models("bert"), tiny.tokenizer()
    )


def test_bad_batches_are_one_line_each(models: Any) -> None:
    vit, bart = models("vit"), models("bart")
    pixels = given("vit")["pixel_values"]
    for model, batch, match in (
        (vit, given("whisper"), "the processor doesn't fit the model: it makes input_features"),
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


# -- the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any, models: Any) -> Any:
    """Models with processors, images in folders of labels, speech with transcripts."""
    root = tmp_path_factory.mktemp("media")
    models("vit").save_pretrained(root / "vit")
    tiny.image_processor().save_pretrained(root / "vit")
    models("bart").save_pretrained(root / "bart")
    tiny.tokenizer().save_pretrained(root / "bart")
    tiny.draw_images(root / "named", 3, ["cat", "dog", "fish"])
    lines = [{"prompt": f"hot layers {i}", "answer": f"cold layers {i}"} for i in range(3)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def command(saved: Any, out: Any, text: str) -> int:
    try:
        main([part.replace("@", f"{saved}/") for part in text.split()] + ["--out", str(out)])
    except SystemExit as ending:
        return int(ending.code or 0)
    return 0


def test_measure_by_command(saved: Any, models: Any, tmp_path: Any, capsys: Any) -> None:
    line = "measure --model @vit --images @named --pattern linear(1.5,0.7) --stack encoder --json"
    assert command(saved, tmp_path, line) == 0
    record = json.loads(capsys.readouterr().out)
    inputs = read_inputs("images", saved / "named", models("vit"), tiny.image_processor())
    found = measure_tokens(models("vit"), inputs)
    plain, hot = record["results"]["parts"]
    assert plain["support"] == pytest.approx(found.parts()["encoder"].support, rel=1e-4)
    assert plain["unit"] == "patches" and hot["support"] != plain["support"]
    distance = record["results"]["support"]["quantities"]["distance"]
    assert distance["unit"] == "patches"
    assert distance["before"][0] == pytest.approx(found.distance[0].tolist(), rel=1e-3)
    assert record["settings"]["images"] == 3 or record["settings"]["images"] == "named"


def test_compare_by_command_goes_on_after_an_interruption(
    saved: Any, tmp_path: Any, capsys: Any, monkeypatch: Any
) -> None:
    from tempering.evaluation import cost

    plain, calls = cost.answers_under, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*arguments)

    line = "compare --model @bart --pairs @pairs.jsonl --pattern constant(1.4) --stack cross --json"
    monkeypatch.setattr(cost, "answers_under", interrupted)
    assert command(saved, tmp_path, line) == 130
    assert json.loads(capsys.readouterr().out)["results"]["cost"][0]["n"] == 1
    calls.clear()
    monkeypatch.setattr(cost, "answers_under", lambda *a: calls.append(a) or plain(*a))
    assert command(saved, tmp_path, line) == 0
    first = json.loads(capsys.readouterr().out)["results"]["cost"][0]
    assert len(calls) == 4 and first["n"] == 3 and first["unit"] == "nats/token"
    assert command(saved, tmp_path, line) == 0
    assert json.loads(capsys.readouterr().out)["results"]["cost"][0] == first


def test_other_commands_take_images_too(saved: Any, tmp_path: Any, capsys: Any) -> None:
    line = "depth --model @vit --images @named --pattern linear(1.5,0.7) --cycles 1 --json"
    assert command(saved, tmp_path, line) == 0
    assert json.loads(capsys.readouterr().out)["results"]["depth"][0]["unit"] == "nats/answer"
    line = "tune --model @vit --images @named --per layer --steps 1 --shuffles 0 --held-out 0"
    assert command(saved, tmp_path / "t.json", line) == 0
    profile = Profile.load(tmp_path / "t.json")
    assert profile.evidence["tuned for"][0]["targets"] == 3
    with pytest.raises(SystemExit, match="0"):
        main(["bake", f"{saved}/vit", "--check"])
    assert "folds per head" in capsys.readouterr().out
    made = tmp_path / "baked"
    line = f"bake @vit --profile {tmp_path}/t.json"
    assert command(saved, made, line) == 0
    from tempering import load_model

    baked, processor = load_model(made)
    assert type(baked).__name__ == "ViTForImageClassification" and processor is not None


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("measure --model @vit", "reads no text by itself: give --images"),
        ("measure --model @vit --images @named --audio @named", "--images and --audio, not both"),
        ("tune --model @vit", "give --data, or one of --images"),
        ("generate --model @vit hello", "takes a causal language model"),
        ("compare --model @bart --pattern constant(2) --chunk 8 --chunks 2", "give pairs"),
        ("depth --model @bart --pairs @pairs.jsonl --pattern linear(2,1)", "on the command line"),
        ("compare --model @vit --images @named --pattern constant(2) --samples 2", "are of text"),
    ],
)
def test_lines_that_can_not_be(
    saved: Any, tmp_path: Any, capsys: Any, line: str, match: str
) -> None:
    out = tmp_path / "x.json" if line.startswith("tune") else tmp_path
    assert command(saved, out, line) != 0
    said = capsys.readouterr().err.strip()
    assert match in said
