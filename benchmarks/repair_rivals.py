"""Temperatures beside other small sets of numbers that could repair a compressed model.

    python benchmarks/repair_rivals.py [--form "round 3 bits"] [--chunks 36]

What `tempering repair` learns (one temperature a head and one output scale a value head), one
temperature a head alone, output temperature, biases of q, rank-1 LoRA on q, one scale for each
head's output, and the weights of the norms, alone and together with temperatures: learned from
the uncompressed model on the same chunks, by Adam, once through, each at a rate of its own (or at
every one of --rates, of which the best on held-out chunks counts). Share of the damage with its
interval, numbers, seconds of the fit, and whether they fold into the weights.
Writes benchmarks/results/repair_rivals.json; --which: rows to make anew, the others stay.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import _bench
import torch
from _compressed import FORMS, compressed
from _texts import as_objective
from repair import learned, show, tests_of

from tempering import load_model, tempered
from tempering.attention.tuning import tune
from tempering.attention.tuning.alternatives import (
    ALTERNATIVES,
    SCALES,
    T_RATE,
    WITH_TEMPERATURES,
    fit_alternatives,
)
from tempering.attention.tuning.teacher import teach
from tempering.evaluation.returned import returned, score

REPAIR = "temperatures and output scales of value heads"
ALONE = ("weights of norms", "output scale of heads", "biases of q", "LoRA rank 1 on q")
RATES = {
    "weights of norms": 1e-2,
    "output scale of heads": 5e-2,
    "biases of q": 1e-2,
    "LoRA rank 1 on q": 3e-3,
    "output temperature": 0.0,  # by Newton's method
}
FOLDS = {
    REPAIR: "into q and v, and into their scales where they are quantised",
    "temperatures": "into q, and into its scales where it is quantised",
    "output temperature": "into the head, where it isn't tied",
    "weights of norms": "they are weights that files keep in full precision",
    "output scale of heads": "into v or o",
    "biases of q": "where the format has biases",
    "LoRA rank 1 on q": "not into quantised weights",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", default="round 3 bits", choices=list(FORMS))
    parser.add_argument("--chunks", type=int, default=36)
    parser.add_argument("--test-chunks", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--which", nargs="+")
    parser.add_argument("--keep", type=Path, default=Path("runs/repair"))
    options = parser.parse_args()
    which = options.which or [
        REPAIR,
        "temperatures",
        *(name + end for name in ALONE for end in ("", WITH_TEMPERATURES)),
        "output temperature",
    ]
    assert set(FOLDS) <= {REPAIR, "temperatures", *ALTERNATIVES, *SCALES}
    reference, tokenizer = load_model("smollm2")
    goal = as_objective("text", learned(tokenizer, options.chunks, 0))
    goal = teach(reference, goal, options.keep / "lessons")
    (test,) = tests_of(tokenizer, options.test_chunks, 0).values()
    known = score(reference, [test], label="reference")[test.name]
    model = compressed(options.form, reference, torch.stack([p.source.ids[0] for p in goal.pieces]))
    before = score(model, [test], label="compressed")[test.name]
    path = _bench.RESULTS / "repair_rivals.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    same = (made.get("form"), made.get("chunks")) == (options.form, options.chunks)
    rows = [row for row in made["rows"] if row["label"] not in which] if same else []
    for label in which:
        start = time.monotonic()
        if label in (REPAIR, "temperatures"):
            steps = len(goal.pieces)
            tuned = tune(
                model, goal, method="adam", rate=T_RATE, steps=steps, held_out=0.12, patience=steps,
                output_scales=label == REPAIR,
            )  # fmt: skip
            active, numbers, rate = tempered(model, tuned.profile), len(tuned.theta), T_RATE
        else:
            rates = options.rates or [RATES[label.removesuffix(WITH_TEMPERATURES)]]
            (found,) = fit_alternatives(
                model, goal, which=[label], held_out=0.12, passes=1, rates=rates
            )
            active, numbers, rate = found.active(), found.numbers, found.rate
        seconds = time.monotonic() - start
        with active:
            row = returned(test, known, before, score(model, [test], label=label)[test.name]).row()
        row |= {
            "label": label,
            "numbers": numbers,
            "bytes": 4 * numbers,
            "rate": rate,
            "seconds": seconds,
            "folds": FOLDS[label.removesuffix(WITH_TEMPERATURES)],
        }
        show(f"{label}, {numbers} numbers, {seconds:.0f} s", row)
        rows.append(row)
        _bench.write(
            "repair_rivals", {"form": options.form, "chunks": options.chunks, "rows": rows}
        )


if __name__ == "__main__":
    main()
