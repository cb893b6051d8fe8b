"""The law of short texts under a policy, and how well counted texts fit it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import chi2

from tempering.tokens import parse_policy, temper_logits
from tempering.tokens.settings import RequestSettings
from tempering.tokens.token_state import NOTHING_GIVEN

WORDS, LENGTH = 12, 4
# Every word stands in it, so that n-grams are always found; some of them repeat.
PROMPT = [3, 5, 1, 3, 5, 2, 0, 4, 6, 7, 3, 8, 9, 10, 11, 3, 5]
# A policy, the request's own settings, and another policy whose law the counts must contradict.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "schedule": ("schedule(linear(2,0.4), length=4)", {}, "schedule(linear(2,0.8), length=4)"),
    "phases": (
        "phases(thinking=between(1.8, ids(3), ids(5)), answer=0.5)",
        {},
        "phases(thinking=between(1.8, ids(3), ids(6)), answer=0.5)",
    ),
    "sampler": (
        "phases(thinking=between(sampler(T=1.5, top_k=6), ids(3), ids(5)), "
        "answer=sampler(T=0.8, min_p=0.1))|order(min_p, top_k, top_p, temperature)",
        {"top_p": 0.9},
        "phases(thinking=between(sampler(T=1.5, top_k=6), ids(3), ids(5)), "
        "answer=sampler(T=0.8, min_p=0.1))|order(temperature, min_p, top_k, top_p)",
    ),
}
Text = tuple[int, ...]


def law(
    logits: Callable[[list[list[int]]], torch.Tensor],
    policy: str,
    given: RequestSettings = NOTHING_GIVEN,
    length: int = LENGTH,
) -> dict[Text, float]:
    """The probability of every text of so many tokens, in float64.

    logits: of the next token, for rows of tokens of one length.
    """
    made = parse_policy(policy)
    found: dict[Text, float] = {(): 1.0}
    for _ in range(length):
        texts = [text for text, p in found.items() if p > 0]
        raw = logits([[*PROMPT, *text] for text in texts]).double()
        states = [made.state(PROMPT, list(text), given=given) for text in texts]
        after = temper_logits(made, raw, states)[0].softmax(-1).tolist()
        found = {
            (*text, word): found[text] * after[row][word]
            for (row, text), word in itertools.product(enumerate(texts), range(WORDS))
        }
    return found


def fit(counts: Counter[Text], expected: dict[Text, float]) -> dict[str, float]:
    """Pearson's chi-square of counts against a law, and its p; rare texts are one cell."""
    runs = counts.total()
    cells, rest, rest_seen = [], 0.0, 0
    for text, p in expected.items():
        if runs * p >= 5:
            cells.append((counts[text], runs * p))
        else:
            rest, rest_seen = rest + runs * p, rest_seen + counts[text]
    if any(not expected.get(text) for text in counts):  # a text that can't be
        return {"chi2": math.inf, "cells": 0, "p": 0.0}
    if rest >= 5:
        cells.append((rest_seen, rest))
    statistic = sum((seen - due) ** 2 / due for seen, due in cells)
    p = float(chi2.sf(statistic, len(cells) - 1))
    return {"chi2": statistic, "cells": len(cells), "p": p}


def save_network(directory: Path, seed: int, layers: int) -> Path:
    """A random llama of a few words, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=128, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.15, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def save_early_copy(target: Path, directory: Path, layers: int) -> Path:
    """The first layers of a saved network, whose drafts are often right."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(target)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(directory)
    return directory


def network_logits(directory: Path) -> Callable[[list[list[int]]], torch.Tensor]:
    """The logits of a saved network, by transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory).eval()

    def logits(rows: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(part).logits[:, -1] for part in torch.tensor(rows).split(2000)])

    return logits


# Kinds of speculation that vLLM runs on a CPU.
SPECULATION: dict[str, dict[str, Any]] = {
    "none": {},
    "n-grams": {
        "method": "ngram", "num_speculative_tokens": 3,
        "prompt_lookup_min": 1, "prompt_lookup_max": 2,
    },
    "a draft model": {"method": "draft_model", "num_speculative_tokens": 3},
    "a draft model that draws": {
        "method": "draft_model", "num_speculative_tokens": 2, "draft_sample_method": "probabilistic"
    },
}  # fmt: skip


def speculating(kind: str, target: Path, draft: Path) -> Any:
    """An engine for a saved network that speculates so."""
    from vllm import LLM

    config = dict(SPECULATION[kind])
    if "a draft" in kind:
        config["model"] = str(draft)
    return LLM(
        str(target), dtype="float32", skip_tokenizer_init=True, max_model_len=64, max_num_seqs=64,
        seed=0, enforce_eager=True, disable_log_stats=False, speculative_config=config or None,
    )  # fmt: skip


def written(llm: Any, policy: str, own: dict[str, Any], runs: int) -> tuple[Counter[Text], float]:
    """The texts of so many requests to an engine, and how many tokens its steps gave on average."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=1.0, max_tokens=LENGTH, ignore_eos=True, detokenize=False,
        extra_args={"tempering": policy}, **own,
    )  # fmt: skip
    prompts: Sequence[Any] = [{"prompt_token_ids": PROMPT}] * runs
    replies = llm.generate(prompts, params, use_tqdm=False)
    found = Counter(tuple(reply.outputs[0].token_ids) for reply in replies)
    return found, accepted(llm)


def accepted(llm: Any) -> float:
    """The share of the drafted tokens that the engine has accepted so far."""
    values = {each.name: getattr(each, "value", 0) for each in llm.get_metrics()}
    drafted = values.get("vllm:spec_decode_num_draft_tokens", 0)
    return values.get("vllm:spec_decode_num_accepted_tokens", 0) / drafted if drafted else 0.0
