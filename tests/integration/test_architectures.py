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
from tempering.survey.families import CAUSAL, tasks
from tempering.survey.judge import EXACT, NO_SOFTMAX, NOT_BUILT, REFUSED, WRONG, Verdict, judge
from tempering.survey.table import row, summary

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
LINES = [line for line in PAGE.splitlines() if re.match(r"\| [a-z0-9]", line)]
# One of each kind: the interface, sinks, a soft cap, latent attention with an indexer, a hybrid,
# softmaxes of their own (in two layouts), an encoder, an encoder-decoder, none, refused.
SAMPLE = "llama gpt_oss gemma2 deepseek_v32 qwen3_next bloom xglm bert t5 mamba reformer".split()


@pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in PAGE,
    reason="the page was made with another transformers",
)
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_made_again_is_what_the_page_says(model_type):
    for task in tasks([model_type]):
        made = row(judge(task))
        # Differences of the untempered model's own, in their rounding.
        assert made in LINES, f"made again: {made}"


def test_every_architecture_has_its_row():
    told = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in LINES]
    expected = sorted((task.model_type, task.model_class) for task in tasks())
    assert sorted(told) == expected


def test_what_the_page_promises():
    counts = re.search(r"^(\d+) architectures: (\d+) exact in eager.*? (\d+) wrong", PAGE, re.M)
    assert counts is not None, "the causal language models come first"
    total, exact, wrong = map(int, counts.groups())
    assert total == len([task for task in tasks() if task.family == CAUSAL])
    assert exact >= 180
    assert wrong == 0


def test_verdicts_that_are_no_success():
    mamba, reformer = (judge(tasks([name])[0]) for name in ("mamba", "reformer"))
    assert mamba.eager == mamba.sdpa == NO_SOFTMAX
    assert reformer.eager == REFUSED
    assert "LocalSelfAttention" in reformer.reason
    text = summary([mamba, reformer])
    assert text.startswith("2 architectures: 0 exact in eager attention, 1 refused, 0 wrong, 1 wi")


def test_a_wrong_model_is_told(monkeypatch):
    monkeypatch.setattr(judging, "self_check", lambda model: None)
    monkeypatch.setattr(judging, "tempered", lambda model, profile, check: torch.no_grad())
    found = judge(tasks(["llama"])[0])
    assert found.eager == WRONG
    assert "rows with different profiles give the same output" in found.reason


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [(NoSoftmaxError, NO_SOFTMAX), (ArchitectureError, REFUSED), (CheckError, REFUSED)],
)
def test_a_verdict_is_of_the_type_of_an_error_and_not_of_its_text(monkeypatch, kind, verdict):
    def refuse(model):
        raise kind("LlamaAttention shows no softmax attention in a forward pass")

    monkeypatch.setattr(judging, "self_check", refuse)
    assert judge(tasks(["llama"])[0]).eager == verdict


def test_a_process_that_hangs_loses_one_verdict():
    hung = workers.survey(tasks(["mamba"]), workers=1, limit=0.0)
    assert [item.eager for item in hung] == [NOT_BUILT]
    assert hung[0].reason == "it took more than 0 s"


def test_an_unknown_name_is_refused_with_a_near_one():
    with pytest.raises(InputError, match="'lama' is no model type .*near it: llama"):
        tasks(["lama"])


def test_the_command(capsys):
    command = ["architectures", "--jobs", "1", "--only", "llama"]
    assert _run([*command, "--json"], debug=False) == 0
    done = capsys.readouterr()
    (found,) = json.loads(done.out)
    assert (found["model_type"], found["eager"], found["sdpa"]) == ("llama", EXACT, EXACT)
    assert "[1/1] llama (causal): exact" in done.err
    assert _run([*command, "--write", "x.md"], debug=False) == 2
    assert "leave out --only" in capsys.readouterr().err


def test_what_is_wrong_in_either_attention_fails_the_command(monkeypatch, capsys):
    task = tasks(["llama"])[0]
    found = [Verdict(*task, eager=EXACT, sdpa=WRONG, reason="off")]
    monkeypatch.setattr(workers, "survey", lambda chosen, **options: found)
    assert _run(["architectures", "--only", "llama"], debug=False) == CheckError.exit_code
    assert "wrong without a refusal: llama" in capsys.readouterr().err


def test_a_place_that_takes_no_page_is_refused_before_the_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(workers, "survey", None)
    assert _run(["architectures", "--write", str(tmp_path / "page.txt")], False) == 2
    assert "--write takes a file that ends in .md" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert _run(["architectures", "--write", str(tmp_path / "file" / "page.md")], False) != 0
    assert "can't write into" in capsys.readouterr().err
