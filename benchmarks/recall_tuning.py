"""Recall tuned over many wordings under a limit on text, and what it does on wordings never seen.

    python benchmarks/recall_tuning.py [--model gemma3-270m] [--keep DIR] [--measure PROFILE]
        [--contexts 6] [--single 6] [--way "sink bias of heads"]

Tunes one temperature a head on 34 wordings, six kinds of keys and nine of values (loss on the
answers), while text of five kinds may lose next to nothing (see _constrained), and measures at
about 1k tokens and 16 facts, with keys and filler never learned from: accuracy on 16 wordings held
back (sentences asked about in their own words, notations, and questions in other words), and on
"The secret code for K is V."; the cost on text of four kinds, one of them never learned from.
Beside it: negated, and shuffled over heads ten times.

--way WAY tunes other numbers of heads (see _rivals), which are measured and recorded: biases of the
sink, scales of outputs, each alone or with temperatures. "temperatures and output scales" has one
scale for each value head and makes a profile, written to --out.

--only WORDING tunes on that one, with values of four digits. --measure takes a profile instead of
tuning one. --keep DIR keeps the pass over the text and the fit there. Writes
benchmarks/results/recall_tuning.json (or recall_tuning_only.json), a record for each model, and the
profile with its evidence to --out (the package's gallery by default).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _bench
import torch
from _constrained import Settings, fit
from _measuring import (
    BASIC_KEYS,
    HELD,
    NAMED,
    SINGLE,
    measure,
    pooled,
    recall_tests,
    text_tests,
)
from _passes import text_pass
from _rivals import WAYS, ways
from _texts import LONG
from torch import Tensor

from tempering import Profile, load_model
from tempering.attention import layout
from tempering.attention.tuning import make_basis
from tempering.attention.tuning.basis import scale_basis
from tempering.attention.tuning.live_temperatures import LiveTemperatures, live_temperatures
from tempering.evaluation.evidence import Contender, contenders

GALLERY = Path(__file__).parents[1] / "src" / "tempering" / "data" / "gallery"
TEMPERATURES = "temperatures"
SCALED = "temperatures and output scales"
CHOICES = [SCALED, *(way for way in WAYS if way != "law of length")]
LEARNED = tuple(place for name, place in NAMED.items() if name not in sum(HELD.values(), ()))


def folder(keep: Path, model: str, way: str) -> Path:
    """Where a way's passes over a model are kept; it is made."""
    own = keep / model
    if way != TEMPERATURES:
        own /= way.replace(" ", "_")
    own.mkdir(parents=True, exist_ok=True)
    return own


def opened(model: Any, way: str) -> Any:
    """What opens the model with the numbers of a way."""
    if way != SCALED:
        return ways(model, 1)[way]
    plan = layout(model)
    return lambda: live_temperatures(
        model,
        make_basis(model, plan, "head"),
        (0.2, 5.0),
        checkpoint=False,
        scales=scale_basis(plan),
    )


def tuned(options: argparse.Namespace, settings: Settings):
    """theta, the rows of the fit, and the profile if the numbers make one."""
    model, tokenizer = load_model(options.model, dtype=getattr(torch, options.fit_dtype))
    keep = options.keep
    with opened(model, options.way)() as tunable:
        text = text_pass(tunable, tokenizer, keep, options.parts, options.long)
        file = f"recall_fit_{len(settings.wordings)}_{settings.steps}_{settings.multiplier:g}.pt"
        state = keep and keep / file
        theta, rows = fit(tunable, tokenizer, text, settings, state)
        profile = tunable.profile(theta) if isinstance(tunable, LiveTemperatures) else None
    return theta, rows, profile


def others(model: Any, way: str, theta: Tensor, shuffles: int) -> list[Contender]:
    """The model under the numbers of a way, and the controls: negated, and shuffled over heads."""

    def under(own: Tensor) -> Any:
        @contextlib.contextmanager
        def active() -> Iterator[None]:
            with opened(model, way)() as tunable:
                tunable.set(own)
                yield

        return active

    heads = sum(layout(model).heads)
    found = [
        Contender("tuned", "tuned", len(theta), under(theta)),
        Contender("negated", "control", len(theta), under(-theta)),
    ]
    for seed in range(shuffles):
        generator = torch.Generator().manual_seed(seed)
        parts = [own[torch.randperm(len(own), generator=generator)] for own in theta.split(heads)]
        found.append(
            Contender(f"shuffled, seed {seed}", "control", len(theta), under(torch.cat(parts)))
        )
    return found


def report(rows) -> dict:
    """The targets, printed and returned."""
    labels = list(dict.fromkeys(r.label for r in rows if r.family == "control"))
    found: dict = {}
    goals = {
        **dict.fromkeys((f"recall, {kind}" for kind in HELD), "a rise of .25"),
        SINGLE: "an accuracy of .90",
    }
    for start, goal in goals.items():
        own = [r for r in rows if r.metric == "accuracy" and r.test.startswith(start)]
        if not own:
            continue
        rise, low, high, reached = pooled(rows, "tuned", start, "accuracy")
        found[start] = {"untempered": reached - rise, "tuned": reached, "rise": [rise, low, high]}
        found[start] |= {label: pooled(rows, label, start, "accuracy")[0] for label in labels}
        print(
            f"\n{start}: {reached - rise:.3f} -> {reached:.3f}, {rise:+.3f} [{low:+.3f}, "
            f"{high:+.3f}]; the target is {goal}"
        )
        print("  controls: " + ", ".join(f"{x} {found[start][x]:+.3f}" for x in labels))
        for r in own:
            if r.label == "tuned":
                print(
                    f"  {r.test}: {r.untempered:.3f} -> {r.value:.3f} "
                    f"[{r.change.low:+.3f}, {r.change.high:+.3f}], {r.change.n} contexts"
                )
    cost = pooled(rows, "tuned", "text, ", "loss")
    print(
        f"cost on text: {cost[0]:+.4f} [{cost[1]:+.4f}, {cost[2]:+.4f}] nats per token; "
        "the target is at most .010"
    )
    for r in rows:
        if r.label == "tuned" and r.metric == "loss" and r.test.startswith("text"):
            print(f"  {r.test}: {r.change.value:+.4f} [{r.change.low:+.4f}, {r.change.high:+.4f}]")
    return found | {"cost on text": cost[:3]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--way", default=TEMPERATURES, choices=CHOICES)
    parser.add_argument("--keep", type=Path, help="one folder for all models")
    parser.add_argument("--parts", type=int, help="chunks of text in the fit; for a trial")
    parser.add_argument("--long", type=int, default=LONG, help="tokens of its long chunks")
    parser.add_argument("--measure")
    parser.add_argument("--contexts", type=int, default=6, help="of each wording held back")
    parser.add_argument("--single", type=int, default=6, help="contexts of the one wording")
    parser.add_argument("--chunks", type=int, default=10, help="of each kind of text")
    parser.add_argument("--few", type=int, help="contexts and chunks that controls run on")
    parser.add_argument("--shuffles", type=int, default=10)
    parser.add_argument("--fit-dtype", default="bfloat16")
    parser.add_argument("--dtype", default="float32", help="of the measurement")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--multiplier", type=float, default=Settings.multiplier)
    parser.add_argument("--limit", type=float, default=Settings.limit, help="of the measured cost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(NAMED), help="tune on one wording")
    parser.add_argument("--fit-only", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    plain = options.way == TEMPERATURES
    if not plain and options.measure:
        parser.error("--measure takes a profile; leave out --way")
    if options.fit_only and options.way == SCALED and not options.out:
        parser.error("--fit-only writes the profile: give --out")
    out = options.out or (GALLERY / options.model / "recall.json" if plain else None)
    if options.keep is not None:
        options.keep = folder(options.keep, options.model, options.way)
    settings = Settings(
        (NAMED[options.only],) if options.only else LEARNED,
        steps=options.steps,
        multiplier=options.multiplier,
        limit=options.limit,
        seed=options.seed,
        value="digits" if options.only else None,
        keys=BASIC_KEYS if options.only else None,
    )
    history: list = []
    if options.measure:
        profile = Profile.load(options.measure)
        history = profile.evidence.get("fit", []) + profile.evidence.get("limit", [])
    else:
        theta, history, profile = tuned(options, settings)
    model, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype))
    evidence = {
        "made by": "benchmarks/recall_tuning.py",
        "tuned for": "answers to questions about facts strewn over a text, "
        f"{len(settings.wordings)} wordings",
        "settings": {k: v for k, v in asdict(settings).items() if k != "wordings"},
        "seed": settings.seed,
        "fit": [row for row in history if "step" in row],
        "limit": [row for row in history if "room" in row],
    }
    if profile is not None:
        profile = replace(profile, evidence=evidence).adopt(model)
    if options.fit_only:
        if profile is not None and out is not None:
            profile.save(out)
        return
    if plain:
        rivals = contenders(model, profile, shuffles=options.shuffles)
    else:
        rivals = others(model, options.way, theta, options.shuffles)
    tests = recall_tests(tokenizer, options.contexts, options.single, seed=options.seed)
    tests |= text_tests(tokenizer, 512, options.chunks)
    rows = measure(model, tests, rivals, few=options.few)
    targets = report(rows)
    evidence |= {"targets": targets, "measured": [row.to_json() for row in rows]}
    if profile is not None and out is not None:
        replace(profile, evidence=evidence).save(out)
    _bench.write(
        "recall_tuning_only" if options.only else "recall_tuning",
        {
            "settings": vars(options) | {"keep": None, "out": None, "measure": None},
            "targets": targets,
            "measured": evidence["measured"],
        },
        options.model if plain else f"{options.model}, {options.way}",
    )


if __name__ == "__main__":
    main()
