"""The benefit of tempering: how far apart k samples of one prompt lie.

    distinct-n = distinct n-grams / n-grams, over the k samples of a prompt    (Li et al. 2016)
    spread     = mean over pairs of samples of 1 - cosine(embeddings)
    nll        = mean -log p of the sampled tokens under the untempered model   nats per token

The embedding of a sample is the mean over its tokens of the untempered model's last hidden
states. More diversity comes with more nll: compare variants at equal nll.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.control.tempered import tempered
from tempering.attention.examining.stored import input_device
from tempering.attention.modes import evaluation_mode
from tempering.errors import InputError
from tempering.evaluation.cost import Variant, check_labels, losses_and_divergence
from tempering.evaluation.journal import Journal
from tempering.evaluation.paired import IntervalEstimate, bootstrap_mean
from tempering.evaluation.shared_ledger import SharedLedger
from tempering.tokens.end_tokens import end_tokens

METRICS = ("distinct-1", "distinct-2", "spread", "nll")


@dataclass(frozen=True)
class Benefit:
    """One measure of diversity of a variant's samples; interval over prompts."""

    label: str
    metric: str
    estimate: IntervalEstimate
    k: int
    tokens: int
    seed: int


def distinct(samples: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the samples, 0..1."""
    grams = [
        tuple(sample[i : i + n]) for sample in samples for i in range(max(0, len(sample) - n + 1))
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def semantic_spread(embeddings: Float[Tensor, "samples width"]) -> float:
    """Mean of 1 - cosine over pairs of samples, 0..2."""
    k = len(embeddings)
    if k < 2:
        raise InputError("spread needs at least 2 samples")
    unit = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    cosine = unit @ unit.T
    return float(1 - (cosine.sum() - cosine.trace()) / (k * (k - 1)))


def sample(
    model: Any,
    prompt: Int[Tensor, "length"],
    variant: Variant,
    *,
    k: int,
    tokens: int,
    seed: int,
) -> list[list[int]]:
    """k continuations by plain sampling, each up to its end token."""
    device = input_device(model)
    context = (
        contextlib.nullcontext() if variant.profile is None else tempered(model, variant.profile)
    )
    devices = [device.index] if device.type == "cuda" else []
    ids = prompt[None].to(device)
    rng = torch.random.fork_rng(devices=devices)
    with context, _unguided(model), evaluation_mode(model), torch.no_grad(), rng:
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=variant.temperature,
            top_k=0,
            num_return_sequences=k,
            max_new_tokens=tokens,
        )
    ends = end_tokens(model.generation_config)
    results = []
    for row in out[:, len(prompt) :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        results.append(row[:stop])
    return results


def check_samples(k: int, prompts: int, tokens: int) -> None:
    """InputError for numbers of samples, prompts or tokens that show no diversity."""
    if k < 2:
        raise InputError(f"diversity needs at least 2 samples a prompt, not {k}")
    if prompts < 1:
        raise InputError(f"diversity needs at least one prompt, not {prompts}")
    if tokens < 1:
        raise InputError(f"a sample has at least one new token, not {tokens}")


def check_prompts(chunks: Any) -> None:
    """InputError for inputs that prompts can't be cut from."""
    if not isinstance(chunks, str | Tensor):
        raise InputError(
            "samples are continuations of text, which images, sound and pairs have none of; give "
            "a text, or leave the samples out"
        )


@contextlib.contextmanager
def _unguided(model: Any) -> Iterator[None]:
    """The model without its own defaults for generation: penalties, cut-offs, lengths."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id,
        pad_token_id=_pad(model),
        cache_implementation=own.cache_implementation,
    )
    try:
        yield
    finally:
        model.generation_config = own


def cut_prompts(
    chunks: Int[Tensor, "chunks length"], prompts: int, tokens: int
) -> Int[Tensor, "prompts tokens"]:
    """The first `tokens` of `prompts` evenly spaced chunks; of all where there are fewer."""
    places = torch.linspace(0, len(chunks) - 1, min(prompts, len(chunks))).round().long()
    return chunks[places, :tokens]


def measure_benefits(
    model: Any,
    prompts: Int[Tensor, "prompts length"],
    variants: Sequence[Variant],
    *,
    k: int = 8,
    tokens: int = 32,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Benefit], bool]:
    """Diversity of k samples a prompt under each variant, the same seeds for all.

    Intervals are a bootstrap over prompts. Ctrl-C returns the benefits over the prompts that were
    finished for every variant; the second value says whether those are all prompts.
    """
    check_labels(variants)
    check_samples(k, len(prompts), tokens)
    ledger = SharedLedger(journal)

    def one(index: int) -> dict[str, list[float]]:
        row = {}
        for variant in variants:
            name = f"samples:{index}:{variant.label}"
            if name not in ledger:
                own = sample(model, prompts[index], variant, k=k, tokens=tokens, seed=seed + index)
                ledger.put(name, _metrics(model, prompts[index], own))
            row[variant.label] = ledger[name]
        return row

    rows: list[dict[str, list[float]]] = []
    try:
        with evaluation_mode(model):
            for found in ledger.rounds(len(prompts), one):
                rows += found
                if progress is not None:
                    progress(len(rows), len(prompts))
    except KeyboardInterrupt:
        if not rows:
            return [], False
    benefits = [
        Benefit(
            label=variant.label,
            metric=metric,
            estimate=bootstrap_mean(
                torch.tensor([row[variant.label][i] for row in rows], dtype=torch.float64),
                seed=seed,
            ),
            k=k,
            tokens=tokens,
            seed=seed,
        )
        for variant in variants
        for i, metric in enumerate(METRICS)
    ]
    return benefits, len(rows) == len(prompts)


def _metrics(model: Any, prompt: Tensor, samples: list[list[int]]) -> list[float]:
    """`METRICS` of one prompt's samples, in one batch.

    Padding is on the right, where a causal mask hides it from every token.
    """
    device = input_device(model)
    longest = max(map(len, samples))
    start = len(prompt)
    ids = torch.zeros(len(samples), start + longest, dtype=torch.long)
    mask = torch.ones_like(ids)
    ids[:, :start] = prompt
    for row, tokens in enumerate(samples):
        ids[row, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[row, start + len(tokens) :] = 0
    with torch.no_grad():
        out = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            output_hidden_states=True,
            use_cache=False,
        )
    hidden = out.hidden_states[-1]
    embeddings, losses = [], []
    for row, tokens in enumerate(samples):
        end = start + len(tokens)
        # A sample that ended at once is embedded by the last token of its prompt.
        own = hidden[row, start:end] if tokens else hidden[row, start - 1 : start]
        embeddings.append(own.double().mean(0).cpu())
        if tokens:
            logits = out.logits[row, start - 1 : end - 1]
            losses.append(losses_and_divergence(logits, None, ids[row, start:end])[0])
    return [
        distinct(samples, 1),
        distinct(samples, 2),
        semantic_spread(torch.stack(embeddings)),
        float(torch.cat(losses).mean()) if losses else 0.0,
    ]


def _pad(model: Any) -> int:
    pad = model.generation_config.pad_token_id
    return pad if pad is not None else min(end_tokens(model.generation_config), default=0)
