"""Questions packed on one context have the logits of each prompt alone, in windowed layers too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tempering import Profile, tempered
from tempering.evaluation.recall import recall

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
packing = pytest.importorskip("_recall")

SHARED = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 4096,
}
KINDS = ["sliding_attention", "full_attention"] * 2


class Letters:
    """A tokenizer of one token a letter."""

    all_special_ids = ()

    def __call__(self, text, **_):
        return type("Encoded", (), {"input_ids": [ord(c) % 128 for c in text]})()


def model_of(window):
    torch.manual_seed(0)
    if window is None:
        return LlamaForCausalLM(LlamaConfig(**SHARED)).eval()
    config = Gemma3TextConfig(**SHARED, sliding_window=window, layer_types=KINDS)
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("window", [None, 16, 150, 10_000])
def test_packed_questions_are_prompts_by_themselves(window, monkeypatch):
    monkeypatch.setattr(packing, "text_ids", lambda tokenizer, text: tokenizer(text).input_ids)
    model = model_of(window)
    item = recall(3, wording=0, value="digits", facts=3, questions=3, words=40)
    packed = packing.pack(Letters(), item)
    profile = Profile.from_schedule("linear(0.7,1.4)", model)
    with torch.no_grad(), tempered(model, profile):
        found = packing.answer_logits(model, packed).split([len(a) for _, a in item.pairs()])
        for (prompt, answer), own in zip(item.pairs(), found, strict=True):
            ids = torch.tensor([Letters()(prompt + answer[:-1]).input_ids])
            alone = model(ids, use_cache=False).logits[0, -len(answer) :]
            torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-4)


def test_layers_of_other_kinds_are_refused():
    model = model_of(16)
    model.config.layer_types = ["chunked_attention"] * 4
    item = packing.Packed(
        torch.zeros(1, 2, dtype=torch.long), torch.arange(2)[None], torch.ones(1, 1, 2, 2).bool(),
        torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), 1, "w",
    )  # fmt: skip
    with pytest.raises(SystemExit, match="chunked_attention"):
        packing.answer_logits(model, item)
