"""Folders of images and sound, files of pairs, and the commands that read them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from tempering.attention.control.tempered import tempered
from tempering.attention.measuring.measure import measure_tokens
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning import from_inputs
from tempering.cli import main
from tempering.errors import DataError, InputError
from tempering.evaluation.cost import Variant, measure_costs
from tempering.inputs import NO_GOAL, read_inputs
from tempering.inputs.pairs import read_pairs
from tempering.inputs.sound import read_sound
from tests.integration import media_tiny as tiny

# The models are so shallow that a pattern has few layers a stage, and learn from two rows.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::tempering.errors.{name}")
    for name in ("DepthWarning", "ConvergenceWarning", "CollapseWarning")
]


@pytest.fixture(scope="module")
def models() -> Any:
    return tiny.Made()


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
    assert int((ids == tiny.IMAGE).sum()) == tiny.SIDE**2
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
    from PIL import Image

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
    tiny.write_wave(sounds / "a.wav", seconds=1.5)
    assert "a.wav: it lasts 1.5 s, and WhisperForConditionalGeneration hears 1 s" in refusal(
        "audio", sounds, whisper, extractor
    )
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.fromarray(np.full((40, 40), 40000, dtype=np.uint16)).save(deep / "a.png")
    assert "of the kind 'I;16', not of 8 bits" in refusal("images", deep, vit, images)
    empty_text = tiny.draw_images(tmp_path / "said", 1)
    (empty_text / "0.txt").write_text(" \n")
    assert "0.txt is empty" in refusal("images", empty_text, vit, images)
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("\n")
    assert "is empty" in refusal("pairs", lines, models("bart"), tiny.tokenizer())
    lines.write_text(json.dumps({"image": "a.png", "audio": "a.wav", "answer": "no"}))
    assert "of which a line names one" in refusal("pairs", lines, vit, images)
    lines.write_text(json.dumps({"image": "none.png", "answer": "cat"}))
    assert "none.png can't be read as an image" in refusal("pairs", lines, vit, images)
    lines.write_text(json.dumps({"prompt": "a", "answer": "maybe"}))
    assert "'maybe' is no label of the model; its labels are no, yes" in refusal(
        "pairs", lines, models("bert"), tiny.tokenizer()
    )


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
