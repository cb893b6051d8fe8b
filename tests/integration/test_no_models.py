"""What is no model, or wraps one: refused in a sentence that says what to give."""

from __future__ import annotations

import re
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tempering.attention.baking.bake import foldable
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.subject import check_subject
from tempering.attention.profiles.profile import Profile
from tempering.errors import ArchitectureError
from tests.integration import attention_oracle as oracle

IDS = oracle.tokens(1, 2, 9)


class Pipeline:
    """As transformers' pipelines and diffusers' are: an object that holds models."""

    def __init__(self, model):
        self.model, self.kind = model, "text"


class Configured(nn.Module):
    """As diffusers' models are: a module with a configuration of another library's."""

    def __init__(self):
        super().__init__()
        self.config = types.MappingProxyType({"heads": 4})


NO_MODELS = {
    "None": (lambda: None, "this is None; load one: model, tokenizer = tempering.load_model"),
    "a name": (lambda: "smollm2", "not by its name 'smollm2'; load it: model, tokenizer ="),
    "a number": (lambda: 3, "this is of the type int; load one"),
    "a class": (lambda: LlamaForCausalLM, "is a class; give a model of it: LlamaForCausalLM.from"),
    "model and tokenizer": (lambda: (oracle.tiny_llama(), None), "tuple with a model in it; give"),
    "a pipeline": (lambda: Pipeline(oracle.tiny_llama()), r"holds a model .*\.model \(LlamaForC"),
    "another library's": (Configured, "is configured by mappingproxy, so it is no transformers"),
    "a module": (lambda: nn.Linear(2, 2), "Linear has no configuration, so it is no transformers"),
    "a layer": (lambda: oracle.tiny_llama().model.layers[0], "LlamaDecoderLayer is a part of a"),
    "attention": (
        lambda: oracle.tiny_llama().model.layers[0].self_attn,
        "LlamaAttention is a part of a transformers model; give the model",
    ),
    "in a sequence": (
        lambda: nn.Sequential(oracle.tiny_llama(), nn.Linear(2, 2)),
        r"Sequential is a wrapper around LlamaForCausalLM; give .*model.get_submodule\('0'\)",
    ),
    "data parallel": (
        lambda: nn.DataParallel(oracle.tiny_llama()),
        r"wrapper around LlamaForCausalLM; give .*get_submodule\('module'\)",
    ),
}


@pytest.mark.parametrize("what", NO_MODELS)
def test_what_is_no_model_is_refused(what):
    make, said = NO_MODELS[what]
    given = make()
    with pytest.raises(ArchitectureError, match=said):
        check_subject(given)
    if isinstance(given, nn.Module):
        with pytest.raises(ArchitectureError, match=said):
            layout(given)
        with pytest.raises(ArchitectureError, match=said):
            tempered(given, Profile.from_matrix(torch.ones(4, 4)))
        assert re.search(said, foldable(given).reason)


def test_no_function_meets_what_is_no_model_with_an_error_of_its_own():
    """In a process of its own, without the checks of types that only the tests have."""
    script = """
import torch, tempering
from tempering import Profile
from tempering.attention.baking.bake import bake, foldable
profile = Profile.from_matrix(torch.ones(2, 4))
uses = dict(
    layout=tempering.layout, fingerprint=tempering.fingerprint, neutral=Profile.neutral,
    schedule=lambda m: Profile.from_schedule("linear(1,2)", m),
    matrix=lambda m: Profile.from_matrix(torch.ones(2, 4), m),
    adopt=profile.adopt, tempered=lambda m: tempering.tempered(m, profile),
    measure=lambda m: tempering.measure(m, None, "text"), foldable=foldable,
    bake=lambda m: bake(m, profile),
    compare=lambda m: tempering.compare(m, None, "text", ["linear(1,2)"]),
)
for given in (None, "smollm2"):
    for name, use in uses.items():
        if given is None and name == "matrix":
            continue  # None is no model there
        try:
            use(given)
        except tempering.ArchitectureError as error:
            assert "tempering.load_model" in str(error), (name, error)
        else:
            raise SystemExit(name)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "done", done.stderr


def test_the_advice_about_a_wrapper_works():
    inner = oracle.tiny_llama()
    wrapper = nn.Sequential(inner)
    profile = Profile.from_schedule("linear(2,0.5)", inner)
    with tempered(wrapper.get_submodule("0"), profile):
        found = wrapper(IDS).logits
    assert (found - oracle.forward(inner, IDS, profile.temperature).logits).abs().max() < 2e-5
