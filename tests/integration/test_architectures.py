"""The table of architectures: a sample of its rows is made again, and all are accounted for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from tempering.cli import _run
from tempering.errors import ArchitectureError, CheckError, InputError, NoSoftmaxError
from tempering.survey import judge as judging
from tempering.survey import workers
from tempering.survey.configs import small_config
from tempering.survey.families import task_of, tasks
from tempering.survey.judge import (
    EXACT,
    NO_SOFTMAX,
    NOT_BUILT,
    REFUSED,
    WRONG,
    Verdict,
    judge,
)
from tempering.survey.table import grouped, row, summary

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
LINES = [line for line in PAGE.splitlines() if re.match(r"\| [a-z0-9]", line)]
# One of each kind: the interface, sinks, a soft cap, latent attention with an indexer, a hybrid,
# softmaxes of their own (in two layouts), an encoder, an encoder-decoder, none, refused; images,
# windows, packed patches beside text, sound into text, frames; one head that nothing states,
# patches of films, streams of sound.
SAMPLE = (
    "llama gpt_oss gemma2 deepseek_v32 qwen3_next bloom xglm bert t5 mamba reformer "
    "vit swinv2 llava whisper timesformer mobilevitv2 muse_glimmer_vision "
    "nemotron_asr_streaming_encoder"
).split()


@pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in PAGE,
    reason="the page was made with another transformers",
)
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_made_again_is_what_the_page_says(model_type):
    main = [task for task in tasks([model_type]) if task.whole]
    for task in main:
        made = row(judge(task)).split("|")
        line = next(
            (line for line in LINES if line.startswith(f"| {model_type} | {task.model_class} ")),
            "no line",
        ).split("|")
        # Differences of the untempered model's own, in their rounding. Heads share the line.
        assert made[3:] == line[3:], f"made again: {'|'.join(made)}"


@pytest.mark.parametrize(
    ("model_type", "model_class"),
    [
        ("t5", "T5ForSequenceClassification"),  # looks for the end of its inputs
        ("t5", "T5ForQuestionAnswering"),  # gives a cache, and takes none
        ("xlm", "XLMForSequenceClassification"),  # reads the first token, which padding would hide
        ("unispeech-sat", "UniSpeechSatForPreTraining"),  # its logits come from before attention
        ("dpt", "DPTForDepthEstimation"),  # a neck over four layers
    ],
)
def test_heads_that_want_a_sample_of_their_own_are_exact(model_type, model_class):
    assert judge(task_of(model_type, model_class)).eager == EXACT


def test_a_configuration_is_the_same_whatever_was_built_before():
    before = small_config("qwen2_vl_text").to_dict()
    small_config("glm4v_text")  # rotates half of each head, so its sections are other ones
    assert small_config("qwen2_vl_text").to_dict() == before


def test_every_class_has_its_row():
    told: dict[str, str] = {}
    for line in LINES:
        name, classes = (cell.strip() for cell in line.split("|")[1:3])
        told[name] = f"{told.get(name, '')}, {classes}"
    for task in tasks():
        names = re.split(r"[,+ ]+", told.get(task.model_type, ""))
        assert any(name and task.model_class.endswith(name) for name in names), task.name


def test_what_the_page_promises():
    counts = re.findall(
        r"^(\d+) classes: (\d+) exact in eager.*? (\d+) wrong.*?; (\d+) exact in sdpa", PAGE, re.M
    )
    assert len(counts) == PAGE.count("\n## ")
    assert sum(int(total) for total, *_ in counts) == len(tasks())
    assert [int(wrong) for _, _, wrong, _ in counts] == [0] * len(counts)


def test_a_head_stands_in_the_row_of_its_main_class_where_it_agrees():
    def verdict(name, whole, **more):
        return Verdict("bert", name, ("AutoModel",), whole, "encoder", EXACT, EXACT, **more)

    main = verdict("BertForMaskedLM", True, route="interface", bake="per head")
    head = verdict("BertForTokenClassification", False, route="interface")
    other = verdict("BertForMultipleChoice", False, route="interface", rows=False)
    groups = grouped([main, head, other])
    assert groups == [[main, head], [other]]
    assert row(*groups[0]).startswith("| bert | BertForMaskedLM + ForTokenClassification | exact |")
    assert "interface, one profile" in row(other)


def test_the_main_class_of_a_type_comes_first_and_is_tried_in_all_ways():
    assert tasks(["whisper"])[0].model_class == "WhisperForCausalLM"
    llama = tasks(["llama"])
    assert [task.model_class for task in llama if task.whole] == ["LlamaForCausalLM"]
    assert {"LlamaModel", "LlamaForTokenClassification"} <= {task.model_class for task in llama}
    assert [task.model_class for task in tasks(["vit"]) if task.whole] == ["ViTModel"]
    assert {task.model_type for task in tasks(causal=True)} >= {"llama", "bert", "whisper"}
    assert "ViTModel" not in {task.model_class for task in tasks(causal=True)}


def test_verdicts_that_are_no_success():
    mamba, reformer = (judge(tasks([name])[0]) for name in ("mamba", "reformer"))
    assert mamba.eager == mamba.sdpa == NO_SOFTMAX
    assert reformer.eager == REFUSED
    assert "LocalSelfAttention" in reformer.reason
    text = summary([mamba, reformer])
    assert text.startswith("2 classes: 0 exact in eager attention, 1 refused, 0 wrong, 1 wi")


def test_a_wrong_model_is_told(monkeypatch):
    monkeypatch.setattr(judging, "self_check", lambda model, sample: None)
    monkeypatch.setattr(judging, "tempered", lambda model, profile, check: torch.no_grad())
    found = judge(tasks(["llama"])[0])
    assert found.eager == WRONG
    assert "rows with different profiles give the same output" in found.reason


class Scattering(torch.nn.Module):
    """Puts the parts of all rows' images, one after the other, on the places that tokens leave."""

    def __init__(self, places: tuple[int, int]) -> None:
        super().__init__()
        self.places = places

    def forward(self, pixel_values, **_):
        parts, found = pixel_values.flatten(0, 1), torch.zeros(2, 4)
        first = 0
        for place, count in enumerate(self.places):
            found[place, :count] = parts[first : first + count]
            first += count
        return {"logits": found}


@pytest.mark.parametrize(("places", "mix"), [((2, 2), False), ((3, 1), True), ((1, 3), True)])
def test_rows_whose_images_mix_are_noticed(places, mix):
    inputs = {"pixel_values": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "input_ids": torch.ones(2, 4)}
    inputs["input_ids"] = inputs["input_ids"].long()
    assert judging._rows_mix(Scattering(places), inputs) is mix


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [(NoSoftmaxError, NO_SOFTMAX), (ArchitectureError, REFUSED), (CheckError, REFUSED)],
)
def test_a_verdict_is_of_the_type_of_an_error_and_not_of_its_text(monkeypatch, kind, verdict):
    def refuse(model, sample):
        raise kind("LlamaAttention shows no softmax attention in a forward pass")

    monkeypatch.setattr(judging, "self_check", refuse)
    assert judge(tasks(["llama"])[0]).eager == verdict


def test_a_process_that_hangs_loses_one_verdict():
    hung = workers.survey(tasks(["mamba"], causal=True), workers=1, limit=0.0)
    assert [item.eager for item in hung] == [NOT_BUILT]
    assert hung[0].reason == "it took more than 0 s"


def test_an_unknown_name_is_refused_with_a_near_one():
    with pytest.raises(InputError, match="'lama' is no model type .*near it: llama"):
        tasks(["lama"])


def test_the_command(capsys, tmp_path):
    command = ["architectures", "--jobs", "1", "--out", str(tmp_path), "--only", "llama"]
    assert _run([*command, "--causal", "--json"], debug=False) == 0
    done = capsys.readouterr()
    (found,) = json.loads(done.out)
    assert (found["model_type"], found["eager"], found["sdpa"]) == ("llama", EXACT, EXACT)
    assert "[1/1] llama LlamaForCausalLM (causal): exact" in done.err
    assert list(tmp_path.glob("*.jsonl")) == []
    assert _run([*command, "--write", "x.md"], debug=False) == 2
    assert "leave out --only, --causal" in capsys.readouterr().err


def test_a_stopped_run_goes_on_where_it_was(monkeypatch, capsys, tmp_path):
    chosen = tasks(["llama"])
    asked: list[list[str]] = []

    def stopped(waiting, workers, progress):
        asked.append([task.model_class for task in waiting])
        found = [Verdict(*task, family="causal", eager=EXACT, sdpa=EXACT) for task in waiting]
        for place, verdict in enumerate(found):
            if len(asked) == 1 and place == 2:
                raise KeyboardInterrupt
            progress(place + 1, len(waiting), verdict)
        return found

    monkeypatch.setattr(workers, "survey", stopped)
    command = ["architectures", "--out", str(tmp_path), "--only", "llama", "--json"]
    assert _run(command, debug=False) == 130
    assert "run it again to go on" in capsys.readouterr().err
    assert _run(command, debug=False) == 0
    names = [task.model_class for task in chosen]
    assert asked == [names, names[2:]]
    assert [one["model_class"] for one in json.loads(capsys.readouterr().out)] == names


def test_what_is_wrong_in_either_attention_fails_the_command(monkeypatch, capsys, tmp_path):
    task = tasks(["llama"])[0]
    found = Verdict(*task, family="causal", eager=EXACT, sdpa=WRONG, reason="off")
    monkeypatch.setattr(workers, "survey", lambda waiting, **_: [found] * len(waiting))
    command = ["architectures", "--only", "llama", "--causal", "--out", str(tmp_path)]
    assert _run(command, debug=False) == CheckError.exit_code
    assert "wrong without a refusal: LlamaForCausalLM" in capsys.readouterr().err


def test_a_place_that_takes_no_page_is_refused_before_the_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(workers, "survey", None)
    assert _run(["architectures", "--write", str(tmp_path / "page.txt")], False) == 2
    assert "--write takes a file that ends in .md" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert _run(["architectures", "--write", str(tmp_path / "file" / "page.md")], False) != 0
    assert "can't write into" in capsys.readouterr().err
