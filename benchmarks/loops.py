"""Whether `loops` ends repetition at low temperature, and what it costs: replies and tasks.

    python benchmarks/loops.py [--model smollm2] [--temperatures 0.2 0.5] [--heat 1.4 2]

Open prompts are answered in up to `--tokens` tokens at each constant temperature, alone and with
loops(heat). Of each reply: the share of tokens that end an 8-gram written before, and whether it
loops (half or more of its last 64 tokens do so); its mean log probability under the untempered
model, of all tokens and of those outside repeated 8-grams (repetition is likely: all tokens
flatter a loop). Tasks with known answers, as `explore` has them: the share that is right.
Differences are paired by prompt; 95% intervals by bootstrap over prompts.
Results: benchmarks/results/loops.json, one entry a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from _bench import write

from tempering import load_model
from tempering.agents.checkers import checker
from tempering.agents.tasks import KINDS, generate_tasks
from tempering.chunks import start_ids
from tempering.evaluation.paired import bootstrap_mean
from tempering.tokens import TemperingLogitsProcessor

NGRAM, TAIL = 8, 64
ASKED = (
    "Tell me a story about {}.", "Explain {} to a child, step by step.",
    "Write a letter to a friend about {}.", "List everything that you know about {}.",
    "Write a speech in praise of {}.", "Describe a day in the life of somebody who loves {}.",
    "Argue for and against {}.", "Write a song about {}.",
)  # fmt: skip
SUBJECTS = (
    "rivers", "bread", "the moon", "trains", "old libraries", "bees", "chess", "winter",
    "small towns", "volcanoes", "music", "clocks",
)  # fmt: skip


def repeated(tokens: Sequence[int], ngram: int = NGRAM) -> list[bool]:
    """For each token, whether it ends an n-gram that the reply has had before."""
    seen: set[tuple[int, ...]] = set()
    marks = []
    for end in range(1, len(tokens) + 1):
        last = tuple(tokens[max(0, end - ngram) : end])
        marks.append(len(last) == ngram and last in seen)
        seen.add(last)
    return marks


def answered(model: Any, tokenizer: Any, prompts: Sequence[str], policy: str, options: Any):
    """The new token ids of a reply to each prompt, its end of text included."""
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    replies = []
    for start in range(0, len(prompts), options.batch):
        inputs = tokenizer(list(prompts[start : start + options.batch]), return_tensors="pt",
                           padding=True, add_special_tokens=False)  # fmt: skip
        torch.manual_seed(options.seed + start)
        out = model.generate(
            **inputs, do_sample=True, top_k=0, max_new_tokens=options.new,
            logits_processor=[TemperingLogitsProcessor(policy, tokenizer)],
        )[:, inputs.input_ids.shape[1] :]  # fmt: skip
        for row in out.tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            replies.append(row[:end])
    return replies


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: Any, prompt: str, reply: list[int]) -> torch.Tensor:
    """log p of each token of the reply under the untempered model."""
    given = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = torch.tensor([given + reply])
    logits = model(ids).logits[0, len(given) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, ids[0, len(given) :, None])[:, 0]


def chat(tokenizer: Any, text: str) -> str:
    """A turn, as the model's template writes it; without one the text, with a line to follow."""
    if not tokenizer.chat_template:
        return tokenizer.decode(start_ids(tokenizer)) + text + "\n"
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def measured(model: Any, tokenizer: Any, prompts: list[str], replies: list[list[int]]):
    """One number a reply for each measure; NaN where a reply has no token of the kind."""
    found: dict[str, list[float]] = {
        key: [] for key in ("loops", "repeated tokens", "log p", "log p of new tokens", "tokens")
    }
    for prompt, reply in zip(prompts, replies, strict=True):
        marks = torch.tensor(repeated(reply), dtype=torch.float64)
        each = log_likelihoods(model, tokenizer, prompt, reply)
        found["loops"].append(float(marks[-TAIL:].mean() >= 0.5))
        found["repeated tokens"].append(float(marks.mean()))
        found["log p"].append(float(each.mean()))
        found["log p of new tokens"].append(float(each[marks == 0].mean()))
        found["tokens"].append(float(len(reply)))
    return found


def right(tokenizer: Any, tasks: list[dict], replies: list[list[int]]) -> list[float]:
    checks = {kind: checker(KINDS[kind].checker) for kind in KINDS}
    marks = []
    for task, reply in zip(tasks, replies, strict=True):
        own = checks[task["kind"]]
        answer = own.read(tokenizer.decode(reply, skip_special_tokens=True), task)
        marks.append(float(answer is not None and own.correct(answer, task)))
    return marks


def estimates(with_: dict[str, list[float]], without: dict[str, list[float]]) -> dict[str, Any]:
    table = {}
    for what, values in with_.items():
        own, base = torch.tensor(values).double(), torch.tensor(without[what]).double()
        both = ~(own.isnan() | base.isnan())
        mean = bootstrap_mean(own[both], seed=0)
        gap = bootstrap_mean((own - base)[both], seed=0)
        table[what] = {"value": mean.value, "low": mean.low, "high": mean.high, "n": mean.n,
                       "difference": gap.value, "difference_low": gap.low,
                       "difference_high": gap.high}  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--heat", type=float, nargs="+", default=[1.4, 2.0, 4.0])
    parser.add_argument("--tokens", dest="new", type=int, default=256)
    parser.add_argument("--tasks", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=len(ASKED) * len(SUBJECTS))
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    prompts = [chat(tokenizer, ask.format(x)) for x in SUBJECTS for ask in ASKED][: options.prompts]
    tasks = generate_tasks(options.tasks, seed=options.seed)
    turns = [chat(tokenizer, task["prompt"]) for task in tasks]
    results: dict[str, Any] = {"settings": vars(options), "rows": {}}
    start = time.perf_counter()
    for temperature in options.temperatures:
        base = None
        for heat in (None, *options.heat):
            policy = f"constant({temperature:g})"
            policy += "" if heat is None else f"|loops(heat={heat:g}, ngram={NGRAM}, window=256)"
            replies = answered(model, tokenizer, prompts, policy, options)
            found = measured(model, tokenizer, prompts, replies)
            own = right(tokenizer, tasks, answered(model, tokenizer, turns, policy, options))
            found["tasks right"] = own
            base = base or found
            results["rows"][policy] = estimates(found, base)
            print(f"\n{policy}, after {time.perf_counter() - start:.0f} s", flush=True)
            for what, row in results["rows"][policy].items():
                print(f"  {what:22}{row['value']:9.3f} [{row['low']:.3f}, {row['high']:.3f}]"
                      f"   {row['difference']:+.3f} [{row['difference_low']:+.3f}, "
                      f"{row['difference_high']:+.3f}]", flush=True)  # fmt: skip
    print(f"\nwritten: {write('loops', results, options.model)}")


if __name__ == "__main__":
    main()
