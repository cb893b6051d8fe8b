"""Temperatures tuned on text alone: what they gain on text that was not learned from.

    python benchmarks/text_tuning.py [--model gemma3-270m] [--keep DIR] [--measure PROFILE]

Tunes one temperature a head by a damped Newton step on seven texts of six kinds, in chunks of 512,
and half of it in chunks of 2048 too, with a weak prior, and measures on text of four kinds, one of
them never learned from, at both lengths: nats per token, the last eighth of the context by itself,
and the same temperatures negated and shuffled over heads.

--way "temperatures and output scales" learns a scale for each value head as well, for --out.
--for KIND tunes for one kind: --weight times its loss is added. --keep DIR keeps the pass over the
text. Writes benchmarks/results/text_tuning.json, a record for each model, and the profile with its
evidence to --out (the package's gallery by default).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import _bench
import torch
from _measuring import measure, pooled, recall_tests, text_tests
from _passes import DAMPING, PRIOR_SD, RADIUS, best_for_text, text_pass
from _texts import LONG, SHORT
from recall_tuning import GALLERY, SCALED, TEMPERATURES, folder, opened

from tempering import Profile, load_model
from tempering.attention.tuning.steps import weighted_sum
from tempering.evaluation.evidence import contenders


def tuned(options) -> tuple[Profile, list]:
    """The profile after one Newton step, and what was to be expected of it."""
    model, tokenizer = load_model(options.model, dtype=getattr(torch, options.fit_dtype))
    with opened(model, options.way)() as tempering:
        text = text_pass(tempering, tokenizer, options.keep, options.parts, options.long)
        here = text.near()
        if options.kind:
            # A kind's own draws are too few for a Fisher matrix; that of all is close to it.
            own = text.near(options.kind)._replace(curvature=here.curvature)
            here = weighted_sum([(1.0, here), (options.weight, own)])
        theta = best_for_text(here, text.tokens)
        row = {
            "loss before": here.value,
            "predicted change": here.at(theta) - here.value,
            "coldest": float(theta.min().exp()),
            "hottest": float(theta.max().exp()),
        }
        print(row, flush=True)
        profile = tempering.profile(theta)
    return profile, [row]


def report(rows, long: int) -> dict:
    """The targets, printed and returned."""
    found = {}
    for length in (SHORT, long):
        for start in (f"text, {length}", f"last eighth of text, {length}"):
            mean, low, high, _ = pooled(rows, "tuned", start, "loss")
            found[start] = [mean, low, high]
            print(f"{start}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]; the target is -.015")
            own = [row for row in rows if row.test.startswith(start)]
            for row in own:
                if row.label == "tuned":
                    span = f"[{row.change.low:+.4f}, {row.change.high:+.4f}]"
                    print(f"  {row.test}: {row.change.value:+.4f} {span}, {row.change.n} chunks")
            for label in dict.fromkeys(row.label for row in own if row.family == "control"):
                print(f"  {label}: {pooled(rows, label, start, 'loss')[0]:+.4f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--way", default=TEMPERATURES, choices=(TEMPERATURES, SCALED))
    parser.add_argument("--keep", type=Path, help="one folder for all models")
    parser.add_argument("--parts", type=int, help="chunks of the fit, of each length; for a trial")
    parser.add_argument("--long", type=int, default=LONG, help="tokens of long chunks")
    parser.add_argument("--measure")
    parser.add_argument("--for", dest="kind")
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--chunks", type=int, help="of each kind of text and length; all without")
    parser.add_argument("--few", type=int, default=3, help="chunks that controls run on")
    parser.add_argument("--shuffles", type=int, default=3)
    parser.add_argument("--contexts", type=int, default=1, help="of recall, of each wording")
    parser.add_argument("--fit-dtype", default="bfloat16")
    parser.add_argument("--dtype", default="float32", help="of the measurement")
    parser.add_argument("--fit-only", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    plain = options.way == TEMPERATURES
    if options.keep is not None:
        options.keep = folder(options.keep, options.model, options.way)
    name = options.kind or "text"
    if options.out is None and not plain:
        parser.error("--way wants --out; the gallery's own place is for temperatures alone")
    out = options.out or GALLERY / options.model / f"{name}.json"
    if options.measure:
        profile = Profile.load(options.measure)
        history = profile.evidence.get("fit", [])
    else:
        profile, history = tuned(options)
    model, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype))
    evidence = {
        "made by": "benchmarks/text_tuning.py",
        "tuned for": "the next token of six kinds of text"
        + (f", and {options.weight:g} times that of {options.kind}" if options.kind else ""),
        "settings": {"prior_sd": PRIOR_SD, "damping": DAMPING, "radius": RADIUS},
        "fit": history,
    }
    profile = replace(profile, evidence=evidence).adopt(model)
    if options.fit_only:
        profile.save(out)
        return
    rivals = contenders(model, profile, shuffles=options.shuffles)
    tests = text_tests(tokenizer, SHORT, options.chunks)
    tests |= text_tests(tokenizer, options.long, options.chunks)
    tests |= recall_tests(tokenizer, options.contexts, 0)
    rows = measure(model, tests, rivals, few=options.few)
    targets = report(rows, options.long)
    evidence |= {"targets": targets, "measured": [row.to_json() for row in rows]}
    replace(profile, evidence=evidence).save(out)
    settings = {**vars(options), "keep": None, "out": None, "measure": None}
    _bench.write(
        f"{name}_tuning",
        {"settings": settings, "targets": targets, "measured": evidence["measured"]},
        options.model if plain else f"{options.model}, {options.way}",
    )


if __name__ == "__main__":
    main()
