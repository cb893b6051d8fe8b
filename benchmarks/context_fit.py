"""Fitting to the context at hand, against nothing, the gallery's recall profile, and query weights.

    python benchmarks/context_fit.py [--contexts 12] [--lines 40] [--seconds 20] [--model smollm2]

Contexts of line retrieval as in LongEval ("line tidy-crab: REGISTER_CONTENT is <2417>"), made anew,
and questions for lines of each. Four ways, each context by itself:

    nothing    the model as it is
    recall     the gallery's profile for recall
    fit        `tune_context` for --seconds on the context
    queries    the query weights trained by Adam for as long on the same spans and excerpts (qTTT,
               arXiv 2512.13898), kept where the spans held out get better

Accuracy: the greedy answer is the number. Loss: nats per token of the number. Differences from
nothing are paired by context; 95% intervals by bootstrap over contexts. Every context is kept when
it is finished. Writes benchmarks/results/context_fit.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _bench import write

from tempering import Profile, load_model, tempered
from tempering.attention.tuning import context as fitting
from tempering.attention.tuning import tune_context
from tempering.chunks import start_ids, text_ids
from tempering.errors import ConvergenceWarning
from tempering.evaluation.paired import bootstrap_mean

NAMES = "crab bell lamp coin fern ship drum goat kite nest".split()
KINDS = "tidy loud calm wild pale soft grim keen bold damp".split()
WAYS = ("nothing", "recall", "fit", "queries")


def made(
    rng: random.Random,
    lines: int,
    kinds: Sequence[str] = KINDS,
    names: Sequence[str] = NAMES,
) -> tuple[str, list[tuple[str, str]]]:
    """A context, and each line's name with its number."""
    pairs = rng.sample([f"{kind}-{name}" for kind in kinds for name in names], lines)
    numbers = [str(rng.randrange(1000, 10000)) for _ in pairs]
    rows = list(zip(pairs, numbers, strict=True))
    return "\n".join(f"line {a}: REGISTER_CONTENT is <{n}>" for a, n in rows), rows


@torch.no_grad()
def asked(model: Any, tokenizer: Any, text: str, rows: list[tuple[str, str]]) -> dict[str, float]:
    """Accuracy and loss over the questions of one context."""
    right, losses = [], []
    for name, number in rows:
        prompt = f"{text}\n\nThe REGISTER_CONTENT in line {name} is <"
        first = text_ids(tokenizer, prompt)
        answer = tokenizer(number, add_special_tokens=False).input_ids
        ids = torch.tensor([first + answer])
        logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].double()
        goals = ids[0, -len(answer) :]
        right.append(float(bool((logits.argmax(-1) == goals).all())))
        losses.append(float(-logits.log_softmax(-1).gather(1, goals[:, None]).mean()))
    return {"accuracy": sum(right) / len(right), "loss": sum(losses) / len(losses)}


@contextlib.contextmanager
def trained_queries(
    model: Any, ids: torch.Tensor, start: list[int], seconds: float, seed: int, rate: float
):
    """The query weights trained on the context's spans and excerpts; as before at the end."""
    begun = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    size = 256
    spans = ids[: len(ids) // size * size].reshape(-1, size)
    pieces = fitting.context_objective(spans, generator, start).pieces
    held = max(1, len(spans) // 4)
    weights = [w for name, w in model.named_parameters() if name.endswith("q_proj.weight")]
    before = [w.detach().clone() for w in weights]

    def loss(places: range) -> torch.Tensor:
        return sum(pieces[i].losses(model).mean() for i in places)

    with torch.no_grad():
        untrained = float(loss(range(held)))
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, lr=rate)
    learned = list(range(held, len(spans)))
    steps = 0
    try:
        while time.perf_counter() - begun < seconds:
            place = learned[steps % len(learned)]
            optimizer.zero_grad()
            loss(range(place, place + 1)).backward()
            optimizer.step()
            steps += 1
        with torch.no_grad():
            kept = float(loss(range(held))) < untrained
        if not kept:
            _restore(weights, before)
        yield {"steps": steps, "kept": kept}
    finally:
        _restore(weights, before)
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


@torch.no_grad()
def _restore(weights: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    for weight, value in zip(weights, before, strict=True):
        weight.copy_(value)


def one(model: Any, tokenizer: Any, options: Any, number: int) -> dict[str, Any]:
    """What the four ways do on one context."""
    rng = random.Random(f"{options.seed} {number}")
    text, rows = made(rng, options.lines)
    rows = rng.sample(rows, options.questions)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    start = start_ids(tokenizer)
    found: dict[str, Any] = {"tokens": len(ids), "nothing": asked(model, tokenizer, text, rows)}
    recall = Profile.load(f"{options.model}/recall")
    with tempered(model, recall):
        found["recall"] = asked(model, tokenizer, text, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = tune_context(model, ids, seconds=options.seconds, start=start, seed=number)
    found["fitted"] = {"step": fit.tuned.step, "seconds": fit.seconds, "spans": fit.spans,
                       "before": fit.tuned.before, "after": fit.tuned.after}  # fmt: skip
    with tempered(model, fit.profile):
        found["fit"] = asked(model, tokenizer, text, rows)
    with trained_queries(model, ids, start, options.seconds, number, options.rate) as trained:
        found["trained"] = trained
        found["queries"] = asked(model, tokenizer, text, rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", type=int, default=12)
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rate", type=float, default=3e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/context_fit.jsonl"))
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    settings = {k: str(v) for k, v in vars(options).items() if k not in ("keep", "contexts")}
    options.keep.parent.mkdir(parents=True, exist_ok=True)
    lines = options.keep.read_text().splitlines() if options.keep.exists() else []
    kept = [row for line in lines if (row := json.loads(line))["settings"] == settings]
    for number in range(len(kept), options.contexts):
        kept.append({"settings": settings, **one(model, tokenizer, options, number)})
        with options.keep.open("a") as file:
            file.write(json.dumps(kept[-1]) + "\n")
        print({k: v for k, v in kept[-1].items() if k != "settings"}, flush=True)
    kept = kept[: options.contexts]
    table: dict[str, Any] = {}
    for way in WAYS:
        for what in ("accuracy", "loss"):
            own = torch.tensor([row[way][what] for row in kept]).double()
            base = torch.tensor([row["nothing"][what] for row in kept]).double()
            mean, gap = bootstrap_mean(own, seed=0), bootstrap_mean(own - base, seed=0)
            table.setdefault(way, {})[what] = {
                "value": mean.value, "low": mean.low, "high": mean.high, "n": mean.n,
                "difference": gap.value, "difference_low": gap.low, "difference_high": gap.high,
            }  # fmt: skip
            print(f"{way:10}{what:10}{mean.value:8.3f} [{mean.low:.3f}, {mean.high:.3f}]"
                  f"  {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]")  # fmt: skip
    print(write("context_fit", {"settings": settings, "table": table, "contexts": kept}))


if __name__ == "__main__":
    main()
