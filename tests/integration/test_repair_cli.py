"""`tempering repair` on a tiny pair of models: what it writes, says, resumes and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tempering import Profile
from tempering.cli import _run
from tempering.cli.shared.repairing import reference, run
from tests.tiny import save_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:no step lowered")
QUICK = ("--chunk", 32, "--chunks", 24, "--samples", 2, "--passes", 1, "--rows", 8, "--shuffles", 1)
QUICK = (*QUICK, "--elsewhere", 0)


def harm(directory: Path) -> None:
    """Divide the queries of the first layer, head by head, in the files of a model."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    weight = tensors["model.layers.0.self_attn.q_proj.weight"]
    weight /= torch.tensor([0.6, 0.8, 1.3, 1.6]).repeat_interleave(len(weight) // 4)[:, None]
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(compressed, reference)"""
    folders = [tmp_path_factory.mktemp(name) for name in ("compressed", "reference")]
    for folder in folders:
        save_tiny_llama(folder, layers=2, spread=0.35)
    harm(folders[0])
    return str(folders[0]), str(folders[1])


# Letters that the tokenizer's text lacks: no two of them ever merge into one token.
LETTERS = "0123456789BCDEFGJK"


def written_by(directory: str, chunks: int, seed: int) -> str:
    """Text drawn from a model, chunk by chunk of 32 letters, so that it is the likelier author."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    known = torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS)))
    generator = torch.Generator().manual_seed(seed)
    ids = known[torch.randint(len(known), (chunks, 1), generator=generator)]
    with torch.no_grad():
        for _ in range(31):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1, known]
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, known[drawn]], 1)
    return "".join(tokenizer.batch_decode(ids))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, pair: tuple[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text(written_by(pair[1], 24, 0))
    (folder / "test.txt").write_text(written_by(pair[1], 60, 1))
    return folder


def repair(pair: tuple[str, str], files: Path, out: Path, *more: object) -> int:
    arguments = ("repair", pair[0], "--reference", pair[1], "--data", files / "a.txt", "--test",
                 files / "test.txt", "--out", out, *QUICK, *more)  # fmt: skip
    return _run([str(item) for item in arguments], debug=False)


def test_it_says_what_was_taken_and_what_came_back(
    pair: tuple[str, str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    assert repair(pair, files, out, "--json") == 0
    told = capsys.readouterr()
    assert "test.txt: " in told.err and "nats per token, lost +" in told.err
    record = json.loads(told.out)
    rows = {row["label"]: row for row in record["results"]["repair"]}
    assert set(rows) == {"repaired", "negated", "shuffled, seed 0"}
    found = rows["repaired"]
    share = (found["compressed"] - found["repaired"]) / found["damage"]
    assert found["share"] == pytest.approx(share, rel=1e-9)
    assert found["damage"] == pytest.approx(found["compressed"] - found["reference"], rel=1e-9)
    assert found["share"] > 0.3 > rows["negated"]["share"]
    assert found["agreement_after"] >= found["agreement_before"]
    profile = Profile.load(out)
    assert profile.evidence["repair"] == record["results"]["repair"]
    left = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in left if "lessons" in name or "state" in name or "partial" in name]


def test_support_alone_finds_what_was_done_to_the_heads(
    pair: tuple[str, str], files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    assert repair(pair, files, out, "--by", "support") == 0
    # Queries divided by c attend as they did at T = 1/c; the second layer was not harmed.
    wanted = torch.tensor([0.6, 0.8, 1.3, 1.6]).reciprocal().clamp(0.5, 2.0).double()
    found = Profile.load(out).temperature
    torch.testing.assert_close(found[0], wanted, atol=2e-3, rtol=0)
    torch.testing.assert_close(found[1], torch.ones(4).double(), atol=2e-2, rtol=0)


def test_a_stopped_run_goes_on_to_the_same_result(
    pair: tuple[str, str],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, out = tmp_path / "whole" / "r.json", tmp_path / "stopped" / "r.json"
    assert repair(pair, files, whole) == 0
    real = run.after

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "after", stopped)
    assert repair(pair, files, out) == 130
    assert "Add --resume to go on" in capsys.readouterr().err
    monkeypatch.setattr(run, "after", real)

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("the reference had written its samples already")

    monkeypatch.setattr(reference, "write_samples", never)
    assert repair(pair, files, out, "--resume") == 0
    assert torch.equal(Profile.load(out).temperature, Profile.load(whole).temperature)
    assert Profile.load(out).evidence["repair"] == Profile.load(whole).evidence["repair"]


def test_scores_of_a_reference_that_was_changed_meanwhile_are_not_used(
    pair: tuple[str, str], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same name, after a stop before anything was learned."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "reference"
    shutil.copytree(pair[1], other)
    real, out = run.learn, tmp_path / "stopped" / "r.json"

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "learn", stopped)
    assert repair((pair[0], str(other)), files, out) == 130
    monkeypatch.setattr(run, "learn", real)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 1.05
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    found = []
    for place in (out, tmp_path / "fresh" / "r.json"):
        assert repair((pair[0], str(other)), files, place) == 0
        found.append(Profile.load(place).evidence["repair"][0]["reference"])
    assert found[0] == found[1]


def test_without_a_reference_the_text_is_learned(
    pair: tuple[str, str], files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    arguments = ("repair", pair[0], "--data", files / "a.txt", "--test", files / "test.txt",
                 "--out", out, *QUICK)  # fmt: skip
    assert _run([str(item) for item in arguments], debug=False) == 0
    (row,) = [row for row in Profile.load(out).evidence["repair"] if row["label"] == "repaired"]
    assert "share" not in row and row["returned"] == pytest.approx(
        row["compressed"] - row["repaired"]
    )


def test_a_pair_in_the_wrong_order_is_refused(
    pair: tuple[str, str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repair((pair[1], pair[1]), files, tmp_path / "r.json") == 1
    assert "there is nothing to repair; are the two in the right order?" in capsys.readouterr().err


def test_a_reference_with_another_tokenizer_is_refused(
    pair: tuple[str, str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    save_tiny_llama(other, layers=2, spread=0.35)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[40:42]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(content))
    assert repair((pair[0], str(other)), files, tmp_path / "r.json") == 1
    assert "the reference has another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--by", "magic"), "--by is learning or support, not 'magic'"),
        (("--out", "r.txt"), "--out takes a file that ends in .json"),
        (("--top", "-1"), "Invalid value for '--top'"),
        (("--passes", "0"), "Invalid value for '--passes'"),
    ],
)
def test_what_can_t_be(
    pair: tuple[str, str],
    files: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert repair(pair, files, tmp_path / "r.json", *more) == 2
    assert message in capsys.readouterr().err


def test_support_needs_a_reference(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["repair", pair[0], "--by", "support"], debug=False) == 2
    assert "--by support needs a --reference" in capsys.readouterr().err
