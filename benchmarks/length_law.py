"""Whether slopes of temperature in log n, measured without a gradient, predict those learned.

    python benchmarks/length_law.py [--quick] [--keep DIR]

`measure_law` counts how many keys compete with the best one (the gap-counting function N_n of
arXiv 2605.12697), and solves for T(n) that keeps the support, or the peak, or follows the critical
temperature. `tune(rule="power")` learns the slopes by the loss. Reported, over all heads of the
embedded model: Pearson's and Spearman's correlation with 95% intervals by a bootstrap over layers,
and the loss on held-out text under the measured slopes at rooms 1/4, 1/2 and 1, against the plain
model. Measured and learned on different texts.

Writes results/length_law.json. --keep DIR keeps the learned profile (shared with
length_tuning.py) and every finished cell.
"""

from __future__ import annotations

import argparse
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import _bench
import torch
from _lengths import (
    Cells,
    chunks_of,
    each_place,
    learned,
    objective,
    opened,
    parts,
    spread,
    testing_texts,
)
from _texts import calibration, token_losses
from length_tuning import numbers

from tempering import Profile, tempered
from tempering.attention.measuring.law import HOLDS, measure_law

ROOMS = (0.25, 0.5, 1.0)
DRAWS = 2000


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, ties in the order of their places."""
    return values.argsort(stable=True).argsort(stable=True).double()


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def correlations(one: torch.Tensor, other: torch.Tensor, seed: int = 0) -> dict[str, Any]:
    """Of two tables [layers, heads] over known heads, with intervals over layers."""
    known = one.isfinite() & other.isfinite()
    layer = torch.arange(len(one))[:, None].expand_as(one)[known]
    x, y = one[known], other[known]
    generator = torch.Generator().manual_seed(seed)
    members = [(layer == i).nonzero()[:, 0] for i in layer.unique()]
    found: dict[str, Any] = {"heads": len(x), "layers": len(members)}
    for name, change in (("pearson", lambda v: v), ("spearman", ranks)):
        drawn = []
        for _ in range(DRAWS):
            picks = torch.randint(len(members), (len(members),), generator=generator)
            index = torch.cat([members[i] for i in picks.tolist()])
            drawn.append(correlation(change(x[index]), change(y[index])))
        low, high = (
            torch.tensor(drawn)
            .double()
            .nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
            .tolist()
        )
        found[name] = [correlation(change(x), change(y)), low, high]
    weight = float((x * y).sum() / (x * x).sum()) if bool((x != 0).any()) else math.nan
    found["learned over measured"] = weight
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small enough to see that it runs")
    parser.add_argument("--keep", type=Path, default=Path("runs/length"))
    parser.add_argument("--chunk", type=int, default=2048, help="that the law is measured on")
    parser.add_argument("--chunks", type=int, default=2, help="of each text, to measure and test")
    parser.add_argument("--learn-lengths", type=numbers, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    if options.quick:
        options.chunk, options.chunks = 256, 1
        options.learn_lengths, options.rounds, options.steps = [32, 128], 1, 1
    options.keep.mkdir(parents=True, exist_ok=True)
    model, tokenizer = opened(options.quick, options.dtype)
    texts = calibration(tokenizer, spoken=False)
    if options.quick:
        texts = {name: ids[:700] for name, ids in texts.items() if name in ("fiction", "code")}
    goal = objective(texts, options.learn_lengths, options.rounds)
    power = learned(
        options.keep, "power", model, goal, rule="power", rows=options.rows, steps=options.steps
    )
    slopes = torch.tensor([list(item.slope) for item in power.rules], dtype=torch.float64)
    tests = testing_texts(tokenizer)
    if options.quick:
        tests = {name: tests[name] for name in ("fiction", "reference")}
    chunks = chunks_of(tests, options.chunk, options.chunks)
    # Every other chunk is measured, the rest is tested on.
    measured_on, tested_on = chunks[::2], chunks[1::2] or chunks
    law = measure_law(
        model,
        torch.stack([ids for _, _, ids in measured_on]),
        progress=lambda done, total: print(f"law: {done} of {total}", flush=True),
    )
    result: dict[str, Any] = {
        "chunk": options.chunk,
        "chunks": len(measured_on),
        "learned slopes": slopes.tolist(),
        "measured slopes": {name: law.slopes[name].tolist() for name in HOLDS},
        "exponent": law.exponent.tolist(),
        "correlations": {name: correlations(law.slopes[name], slopes) for name in HOLDS},
    }
    for name, row in result["correlations"].items():
        print(name, row, flush=True)
    settings = {
        name: value
        for name, value in vars(options).items()
        if name in ("quick", "learn_lengths", "rounds", "steps", "dtype", "chunk", "chunks")
    }
    cells = Cells(options.keep / "law_cells.json", settings)
    rivals: dict[str, Profile | None] = {"plain": None, "learned, both numbers": power}
    only = Profile.neutral(model).with_rules(power.rules)
    rivals["learned slopes alone"] = only
    for name in HOLDS:
        for room in ROOMS:
            rivals[f"{name}, room {room:g}"] = law.profile(model, name).scaled(room)
    rows: dict[str, list[dict[str, Any]]] = {}
    for label, profile in rivals.items():
        for name, place, ids in tested_on:

            def run(profile: Profile | None = profile, ids: Any = ids) -> dict[str, Any]:
                with nullcontext() if profile is None else tempered(model, profile):
                    return parts(token_losses(model, ids), options.chunk)

            rows.setdefault(label, []).append(cells.get(f"{label} | {name} {place}", run))
    clusters = list(each_place([(name, place) for name, place, _ in tested_on]))
    result["losses"] = [
        {
            "label": label,
            "segment": segment,
            "against plain": spread(
                [x[segment] - y[segment] for x, y in zip(own, rows["plain"], strict=True)],
                clusters,
            ),
            "n": len(own),
        }
        for label, own in rows.items()
        if label != "plain"
        for segment in ("all", "second half")
    ]
    for line in result["losses"]:
        print(line, flush=True)
    if options.quick:
        (options.keep / "length_law.json").write_text(json.dumps(result) + "\n")
    else:
        _bench.write("length_law", {"settings": settings, **result})


if __name__ == "__main__":
    main()
