"""Loss by position within and beyond the trained length, under constants and laws of length.

    python benchmarks/length_tuning.py [--quick] [--keep DIR]
    python benchmarks/length_tuning.py --beyond 16384,32768 --learn-beyond

On the embedded SmolLM2 (8192 tokens): texts that were not learned from, at 512, 2048 and 8192
tokens as the model is, and at --beyond without scaling and with YaRN, dynamic NTK and linear
scaling of positions (transformers' rope_parameters). Beside the plain model, all on the same code
path:

    YaRN's factor         every logit times (0.1 ln s + 1)^2; with YaRN that is the plain model
    without a factor      with YaRN: its factor undone
    log-length            1/T = max(1, log n / log 8192)
    SSMax                 1/T = s log n, s = 1 / mean log n up to 8192
    affine                1/T = a log n + b, two numbers for the model: the tangent of the one
                          law log T = a' + b' log n that was learned
    T per head            one number a head, learned
    a + b log n per head  two numbers a head, learned
    smollm2/text-scaled   the package's: one number a head and output scales, learned from three
                          times the text; not under dynamic and linear scaling

What is learned here is learned without scaling, from chunks of mixed lengths; the two numbers of
the one law from a quarter of the text. Recall by depth: five facts ("The secret code for K is V.")
stand at a tenth, three tenths, ... of a text of each of --needle-lengths, beyond 8192 tokens with
YaRN, and each is asked for at its end. Each head's slope is also told as its own number in YaRN's
0.1 ln s + 1; --learn-beyond also learns those: T per head under YaRN at the first length beyond.

Writes results/length_tuning.json, a record for each --learn-lengths and --prior-sd, with 95%
intervals (bootstrap over chunks), and docs/images/length.svg, loss against position (where --beyond
is given). --keep DIR keeps learned profiles and every finished cell; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import _bench
import torch
from _length_figure import figure
from _lengths import (
    TRAINED,
    Cells,
    chunks_of,
    each_place,
    learned,
    objective,
    opened,
    parts,
    position_edges,
    spread,
    testing_texts,
    with_scaling,
)
from _needles import recall_by_depth
from _texts import calibration, token_losses

from tempering import Profile, layout, tempered
from tempering.attention import adaptive_profile
from tempering.attention.profiles.length_rules import Power
from tempering.attention.tuning import uniform_basis
from tempering.files import write_atomic

FIGURE = Path(__file__).parents[1] / "docs/images/length.svg"
GALLERY = "smollm2/text-scaled"
FAR = ("plain", "T per head", GALLERY)  # recall of these beyond the trained length
SEGMENTS = ("all", "first 511", "second half", "last eighth")


def yarn_factor(scale: float) -> float:
    """What YaRN multiplies queries and keys by, each."""
    return 0.1 * math.log(scale) + 1 if scale > 1 else 1.0


def profiles(options: Any, model: Any, tokenizer: Any) -> dict[str, Profile]:
    """The learned profiles, kept."""
    plan = layout(model)
    texts = calibration(tokenizer, spoken=False)
    if options.quick:
        texts = {name: ids[:700] for name, ids in texts.items() if name in ("fiction", "code")}
    goal = objective(texts, options.learn_lengths, options.rounds)
    print(f"learning from {len(goal.pieces)} chunks, {goal.count} targets", flush=True)
    shared = {"rows": options.rows, "steps": options.steps, "prior_sd": options.prior_sd}
    keep = options.keep
    few = objective(texts, options.learn_lengths, max(1, options.rounds // 4))
    found = {
        "one law": learned(
            keep, "one_law", model, few, per=uniform_basis(plan), rule="power", **shared
        ),
        "T per head": learned(keep, "constants", model, goal, **shared),
        "a + b log n per head": learned(keep, "power", model, goal, rule="power", **shared),
    }
    return found if options.quick else found | {GALLERY: Profile.load(GALLERY)}


def contenders(
    model: Any, found: Mapping[str, Profile], scaling: str, scale: float, trained: int
) -> dict[str, Profile | None]:
    """label -> profile, in the order of the table."""
    mean_log = sum(math.log(n) for n in range(1, trained + 1)) / trained
    one = found["one law"].rules[0]
    assert isinstance(one, Power) and isinstance(one.slope, tuple)
    at, slope = 1 / float(found["one law"].rows[0][0]), one.slope[0]
    a, b = -slope * at, at * (1 + slope * math.log(float(one.length)))  # type: ignore[arg-type]
    everywhere = torch.ones(len(layout(model).layers), max(layout(model).heads))
    chosen: dict[str, Profile | None] = {"plain": None}
    factor = yarn_factor(scale) ** 2
    if scaling == "yarn":
        chosen["without a factor"] = Profile.from_matrix(everywhere * factor, model)
    elif scale > 1:
        chosen["YaRN's factor"] = Profile.from_matrix(everywhere / factor, model)
    chosen["log-length"] = adaptive_profile(f"log_length({trained})", model)
    chosen["SSMax"] = adaptive_profile(f"ssmax({1 / mean_log!r},0.05,20)", model)
    chosen["affine"] = adaptive_profile(f"affine({a!r},{b!r},0.05,20)", model)
    left = {"one law"} if scaling in ("none", "yarn") else {"one law", GALLERY}
    return {**chosen, **{label: found[label] for label in found if label not in left}}


def measure(
    cells: Cells,
    model: Any,
    found: Mapping[str, Profile],
    texts: Mapping[str, Any],
    scaling: str,
    length: int,
    most: int,
    trained: int,
    only: Collection[str] = (),
) -> dict[str, Any]:
    """Loss of every contender on the same chunks, with paired intervals against some of them.

    only: labels, where not all contenders are to run.
    """
    scale = max(1.0, length / trained)
    other = with_scaling(model, scaling, scale, trained)
    if other is not model:  # the weights are the same, the positions are not
        found = {label: profile.adopt(other) for label, profile in found.items()}
    chosen = contenders(other, found, scaling, scale, trained)
    chosen = {label: own for label, own in chosen.items() if not only or label in only}
    chunks = chunks_of(texts, length, most)
    rows: dict[str, list[dict[str, Any]]] = {}
    for label, profile in chosen.items():
        for name, place, ids in chunks:
            key = f"{scaling} {length} | {label} | {name} {place}"

            def run(profile: Profile | None = profile, ids: Any = ids) -> dict[str, Any]:
                with nullcontext() if profile is None else tempered(other, profile):
                    return parts(token_losses(other, ids), length)

            rows.setdefault(label, []).append(cells.get(key, run))
    clusters = list(each_place([(name, place) for name, place, _ in chunks]))
    table = []
    for label, own in rows.items():
        for segment in SEGMENTS:
            line: dict[str, Any] = {"label": label, "segment": segment, "n": len(own)}
            line["loss"] = sum(row[segment] for row in own) / len(own)
            for base in ("plain", "T per head", "YaRN's factor", "log-length", "SSMax"):
                if base in rows and base != label:
                    pairs = zip(own, rows[base], strict=True)
                    line[f"against {base}"] = spread(
                        [x[segment] - y[segment] for x, y in pairs], clusters
                    )
            table.append(line)
    curves = {
        label: [sum(column) / len(own) for column in zip(*(r["by position"] for r in own))]
        for label, own in rows.items()
    }
    return {
        "scaling": scaling,
        "length": length,
        "texts": sorted({name for name, _, _ in chunks}),
        "edges": position_edges(length),
        "table": table,
        "by position": curves,
    }


def own_numbers(options: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """T per head learned under YaRN, as each head's own number in 0.1 ln s + 1."""
    length = options.beyond[0]
    scale = length / options.trained
    other = with_scaling(model, "yarn", scale, options.trained)
    texts = {
        name: ids
        for name, ids in calibration(tokenizer, spoken=False).items()
        if len(ids) >= length
    }
    goal = objective(texts, [length], options.rounds)
    profile = learned(
        options.keep,
        f"yarn_{length}",
        other,
        goal,
        rows=1,
        steps=options.steps,
        prior_sd=options.prior_sd,
    )
    factor = yarn_factor(scale)
    numbers = [
        [(factor / math.sqrt(T) - 1) / math.log(scale) for T in row.tolist()]
        for row in profile.rows
    ]
    return {"length": length, "YaRN": 0.1, "own": numbers}


def numbers_of_law(profile: Profile, scale: float) -> dict[str, Any]:
    """Each head's slope b as its number in 0.1 ln s + 1: both give T(s n) / T(n)."""
    slopes = torch.tensor([list(rule.slope) for rule in profile.rules], dtype=torch.float64)
    own = (scale ** (-slopes / 2) - 1) / math.log(scale)
    marks = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    found = own.flatten().quantile(marks).tolist()
    print(f"each head's number in 0.1 ln s + 1 by its law, at 5, 25, 50, 75, 95%: {found}")
    return {"scale": scale, "own": own.tolist(), "quantiles": found}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small enough to see that it runs")
    parser.add_argument("--keep", type=Path, default=Path("runs/length"))
    parser.add_argument("--lengths", type=numbers, default=[512, 2048, 8192])
    parser.add_argument("--beyond", type=numbers, default=[16384])
    parser.add_argument("--scalings", default="none,yarn,dynamic,linear")
    parser.add_argument(
        "--chunks", type=numbers, default=[4] * 4, help="of each text, for each length in turn"
    )
    parser.add_argument("--needles", type=int, default=4, help="texts with facts at five depths")
    parser.add_argument("--needle-lengths", type=numbers, default=[2048, 8192, 16384])
    parser.add_argument("--learn-lengths", type=numbers, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=4, help="of chunks of each text, to learn")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prior-sd", type=float, default=0.5, help="of log T; tune's default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--learn-beyond", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of results; the benchmarks' by default")
    options = parser.parse_args()
    options.trained = TRAINED
    if options.quick:
        options.lengths, options.beyond, options.trained = [64, 128], [256], 128
        options.learn_lengths, options.rounds, options.steps = [32, 128], 1, 1
        options.scalings, options.chunks = "none,yarn", [1] * 3
        options.needles, options.needle_lengths = 2, [256]
    options.keep.mkdir(parents=True, exist_ok=True)
    model, tokenizer = opened(options.quick, options.dtype)
    found = profiles(options, model, tokenizer)
    texts = testing_texts(tokenizer)
    if options.quick:
        texts = {name: texts[name] for name in ("fiction", "reference")}
    settings = {
        name: value
        for name, value in vars(options).items()
        if name in ("quick", "learn_lengths", "rounds", "steps", "dtype", "prior_sd")
    }
    cells = Cells(options.keep / "cells.json", settings)
    results = []
    cases = [("none", length) for length in options.lengths]
    cases += [(s, length) for length in options.beyond for s in options.scalings.split(",")]
    most = dict(zip(options.lengths + options.beyond, options.chunks, strict=True))
    for scaling, length in cases:
        item = measure(cells, model, found, texts, scaling, length, most[length], options.trained)
        results.append(item)
        for line in item["table"]:
            if line["segment"] in ("second half", "first 511"):
                against = line.get("against plain", [float("nan")] * 3)
                print(
                    f"{scaling:8s} {length:6d} {line['segment']:12s} {line['label']:22s} "
                    f"{line['loss']:.4f} {against[0]:+.4f} [{against[1]:+.4f}, {against[2]:+.4f}]"
                )
    recalled = []
    for length in options.needle_lengths:
        scaling = "none" if length <= options.trained else "yarn"
        scale = max(1.0, length / options.trained)
        other = with_scaling(model, scaling, scale, options.trained)
        own = {label: profile.adopt(other) for label, profile in found.items()}
        chosen = contenders(other, own, scaling, scale, options.trained)
        if scale > 1:  # where one context takes three minutes
            chosen = {label: chosen[label] for label in chosen if label in FAR}
        chunks = chunks_of(texts, length, 1)[: options.needles]
        prefix = f"{scaling} {length}"
        table = recall_by_depth(cells, prefix, other, tokenizer, chosen, chunks)
        recalled.append({"scaling": scaling, "length": length, "table": table})
    numbers_under_yarn = own_numbers(options, model, tokenizer) if options.learn_beyond else None
    folder = options.out or (options.keep if options.quick else _bench.RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    by_law = numbers_of_law(found["a + b log n per head"], 2.0)
    laws = {label: own.to_json() for label, own in found.items() if label != GALLERY}
    payload = {
        "settings": {**settings, "chunks": most},
        "results": results,
        "recall": recalled,
        "yarn": numbers_under_yarn,
        "yarn by the law": by_law,
        "profiles": laws,
    }
    if folder == _bench.RESULTS:
        learn = ", ".join(map(str, options.learn_lengths))
        key = f"learned at {learn}, prior {options.prior_sd:g}"
        print(_bench.write("length_tuning", payload, key))
        if options.beyond:
            figure(results, options.trained, FIGURE)
    else:
        write_atomic(folder / "length_tuning.json", json.dumps(payload, indent=1) + "\n")
        figure(results, options.trained, folder / "length.svg")


if __name__ == "__main__":
    main()
