"""Whether speculation keeps the law of a policy: transformers' assisted decoding, by chi-square.

python benchmarks/speculation.py [--runs 7000]

A model with random weights and 12 words writes 3 tokens after one prompt, `--runs` times for each
kind of speculation (draft model, prompt lookup, early exit) and policy, and without speculation.
The law of the 3 tokens together is known: every text's probability is the product of
softmax(policy's logits) over its tokens, in float64 from the model's own logits. Texts that are
expected fewer than 5 times are one cell. As a control the same counts are held against the law
of another temperature, which they must contradict.

Written to results/speculation.json: chi-square, degrees of freedom, p for each.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _bench
import torch
from scipy.stats import chi2
from transformers import LlamaConfig, LlamaForCausalLM

from tempering.tokens import TemperingLogitsProcessor, parse_policy
from tempering.tokens.applying import temper_logits
from tempering.tokens.policy import Policy

WORDS, LENGTH = 12, 3
KINDS = ("plain", "draft model", "prompt lookup", "early exit")
PROMPT = [3, 5, 3, 5, 3]
POLICIES = {
    "schedule": ("schedule(linear(2,0.4), length=4)", "schedule(linear(2.4,0.5), length=4)"),
    "sampler": (
        "sampler(T=1.5, top_k=6, min_p=0.05)|order(min_p, top_k, temperature)",
        "sampler(T=1.8, top_k=6, min_p=0.05)|order(min_p, top_k, temperature)",
    ),
}


def network(seed: int, layers: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.4, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def law(model: Any, policy: Policy) -> dict[tuple[int, ...], float]:
    """The probability of every text of 3 tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        texts = list(found)
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *text] for text in texts])).logits[:, -1]
        states = [policy.state(PROMPT, list(text)) for text in texts]
        tempered = temper_logits(policy, logits.double(), states)[0].softmax(-1)
        found = {
            (*text, word): found[text] * float(tempered[row, word])
            for (row, text), word in itertools.product(enumerate(texts), range(WORDS))
        }
    return found


def written(model: Any, policy: Policy, how: dict[str, Any], runs: int) -> Counter[tuple[int, ...]]:
    """The texts of so many runs."""
    prompt = torch.tensor([PROMPT])
    batch = 1 if how else 500  # speculation takes one row
    found: Counter[tuple[int, ...]] = Counter()
    torch.manual_seed(1)
    for _ in range(-(-runs // batch)):
        ids = prompt.expand(batch, -1)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=[TemperingLogitsProcessor(policy)],
            do_sample=True,
            top_k=0,
            max_new_tokens=LENGTH,
            **how,
        )
        found.update(tuple(row) for row in out[:, len(PROMPT) :].tolist())
    return found


def fit(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> dict[str, Any]:
    """Pearson's chi-square of the counts against a law."""
    runs = counts.total()
    cells, rest, rest_seen = [], 0.0, 0
    for text, p in expected.items():
        if p == 0 and counts[text]:
            return {"chi2": float("inf"), "cells": 0, "p": 0.0}
        if runs * p >= 5:
            cells.append((counts[text], runs * p))
        else:
            rest, rest_seen = rest + runs * p, rest_seen + counts[text]
    if rest >= 5:
        cells.append((rest_seen, rest))
    statistic = sum((seen - due) ** 2 / due for seen, due in cells)
    return {
        "chi2": statistic,
        "cells": len(cells),
        "p": float(chi2.sf(statistic, len(cells) - 1)),
    }


def measured(task: tuple[str, str, int]) -> dict[str, Any]:
    """One policy under one kind of speculation."""
    name, kind, runs = task
    torch.set_num_threads(1)
    model, draft = network(0, 3), network(1, 1)
    for each in (model, draft):
        each.generation_config.num_assistant_tokens = 3
        each.generation_config.num_assistant_tokens_schedule = "constant"
        each.generation_config.assistant_confidence_threshold = 0.0
    how = {
        "plain": {},
        "draft model": {"assistant_model": draft},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "early exit": {"assistant_early_exit": 1},
    }[kind]
    text, other = POLICIES[name]
    policy = parse_policy(text)
    counts = written(model, policy, how, runs)
    return {
        "policy": text, "speculation": kind, "tokens": LENGTH * counts.total(),
        **fit(counts, law(model, policy)),
        "control": other, "control p": fit(counts, law(model, parse_policy(other)))["p"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7000)
    options = parser.parse_args()
    tasks = list(itertools.product(POLICIES, KINDS, [options.runs]))
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for (name, kind, _), row in zip(tasks, pool.map(measured, tasks), strict=True):
            rows.append(row)
            print(
                f"{name:9} {kind:14} {row['tokens']:6} tokens  chi2 {row['chi2']:7.1f} over "
                f"{row['cells']:3} cells  p {row['p']:.3f}  control p {row['control p']:.1e}",
                flush=True,
            )
            _bench.write("speculation", {"rows": rows})


if __name__ == "__main__":
    main()
