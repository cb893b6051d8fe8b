"""What the transformers engine says, and vLLM's answers in the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tempering.attention import Profile, tempered
from tempering.attention.examining.layout_of import layout

TEXTS = (
    "Temperature decides how many hypotheses stay alive. Early layers explore while the later "
    "ones commit; between them the model consolidates what it has found so far.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3]))\n",
    "The river rose in the night, and by the morning nobody could say where the road had been. "
    "The miller's daughter took the boat across the flooded field to see who was left.",
)
EXTENSION = "tempering.engines.vllm.worker.Worker"


def per_layer(model: Any) -> Profile:
    """A pattern over depth, strong enough to move log probabilities by tenths."""
    return Profile.from_schedule("throb(1.5,1,0.7,1.4)", model)


def per_head(model: Any, seed: int = 0) -> Profile:
    """Another temperature for every head of every layer."""
    plan = layout(model)
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.empty(heads).uniform_(0.6, 1.6, generator=draw) for heads in plan.heads]
    return Profile.from_rows(rows, plan).adopt(model)


def log_probabilities(model: Any, ids: Sequence[int], profile: Profile | None) -> torch.Tensor:
    """log p of each token after the first, by transformers."""
    inputs = torch.tensor([list(ids)])
    with torch.no_grad():
        if profile is None:
            logits = model(inputs).logits
        else:
            with tempered(model, profile):
                logits = model(inputs).logits
    scores = logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, inputs[0, 1:, None])[:, 0]


def greedy(model: Any, ids: Sequence[int], profile: Profile | None, tokens: int) -> list[int]:
    """The likeliest continuation, by transformers."""
    from contextlib import nullcontext

    context = nullcontext() if profile is None else tempered(model, profile)
    inputs = torch.tensor([list(ids)])
    with context, torch.no_grad():
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
    return out[0, len(ids) :].tolist()


def ask(llm: Any, prompts: Sequence[Sequence[int]], tokens: int = 1, **settings: Any) -> list[Any]:
    """Greedy requests to vLLM by token ids."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=tokens, min_tokens=tokens, **{"temperature": 0.0, **settings}
    )
    return llm.generate(
        [{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False
    )


def prompt_scores(output: Any) -> torch.Tensor:
    """log p of each prompt token after the first, as vLLM answered it."""
    ids = output.prompt_token_ids
    rows = output.prompt_logprobs[1:]
    return torch.tensor([row[token].logprob for row, token in zip(rows, ids[1:], strict=True)])


def worst(llm: Any, model: Any, prompts: Sequence[Sequence[int]], profile: Profile | None) -> float:
    """The largest difference of a prompt token's log probability between the engines."""
    outputs = ask(llm, prompts, prompt_logprobs=0)
    gaps = [
        (prompt_scores(output) - log_probabilities(model, ids, profile)).abs().max()
        for output, ids in zip(outputs, prompts, strict=True)
    ]
    return float(torch.stack(gaps).max())
