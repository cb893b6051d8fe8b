"""The tempered model in lm-eval: against the real package where it is installed."""

from __future__ import annotations

import builtins
import importlib
from typing import Any

import pytest
import torch

from tempering.engines.generating import lm_eval_model
from tempering.errors import InputError, MissingExtraError
from tests.tiny import save_tiny_llama


def test_without_lm_eval_the_pip_command_is_named(monkeypatch):
    real = builtins.__import__

    def none(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(MissingExtraError, match=r"'lm_eval'.*pip install 'tempering\[lm-eval\]'"):
        lm_eval_model.register()


@pytest.fixture(scope="module")
def kind() -> type:
    pytest.importorskip("lm_eval")
    importlib.import_module("lm_eval.models.huggingface")
    return lm_eval_model.register()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def scores(model: Any) -> list[float]:
    from lm_eval.api.instance import Instance

    pairs = [("Hot layers", " explore"), ("cold layers", " commit.")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]


def test_scores_are_those_of_the_tempered_model(kind, directory):
    from lm_eval.api.registry import get_model

    from tempering import Profile, load_model, tempered

    assert get_model("tempering") is kind
    pattern = "throb(12,3,1,12)|amplitude(1.5)"
    made = kind(directory, pattern=pattern.replace(",", ";"), device="cpu", dtype="float32")
    model, tokenizer = load_model(directory)
    with tempered(model, Profile.from_schedule(pattern, model)):
        expected = [own_score(model, tokenizer, "Hot layers", " explore"),
                    own_score(model, tokenizer, "cold layers", " commit.")]  # fmt: skip
    untempered = own_score(model, tokenizer, "Hot layers", " explore")
    assert scores(made) == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - untempered) > 1e-3, "the test tells the two apart"


def own_score(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    whole = tokenizer(context + continuation, return_tensors="pt").input_ids
    start = len(tokenizer(context).input_ids)
    with torch.no_grad():
        logs = model(input_ids=whole).logits.log_softmax(-1)
    places = range(start, whole.shape[1])
    return sum(float(logs[0, i - 1, whole[0, i]]) for i in places)


def test_a_profile_file(kind, directory, tmp_path):
    from tempering import Profile, load_model

    model, _ = load_model(directory)
    path = Profile.from_schedule(1.3, model).save(tmp_path / "p.json")
    made = kind(directory, profile=str(path), device="cpu", dtype="float32")
    same = kind(directory, pattern="constant(1.3)", device="cpu", dtype="float32")
    assert scores(made) == pytest.approx(scores(same), abs=1e-6)


@pytest.mark.model
def test_the_embedded_model_by_its_name(kind):
    made = kind("smollm2", pattern="constant(1.3)", device="cpu", dtype="bfloat16")
    assert made.model.dtype == torch.bfloat16 and made.tempering.calls()
    with pytest.raises(InputError, match="dtype is float32, bfloat16, float16; got 'int4'"):
        kind("smollm2", pattern="constant(1.3)", device="cpu", dtype="int4")


def test_one_of_profile_and_pattern(kind, directory):
    for arguments in ({}, {"profile": "a", "pattern": "b"}):
        with pytest.raises(InputError, match="one of the two; the untempered model"):
            kind(directory, **arguments)
