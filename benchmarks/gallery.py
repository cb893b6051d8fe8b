"""What the profiles of the package do, measured alike and in one go: the evidence that they carry.

    python benchmarks/gallery.py [NAME ...] [--model gemma3-270m] [--contexts 4] [--chunks 8]
        [--long 3] [--longer 4096 8192]

For each profile: recall (16 wordings held back, and "The secret code for K is V."), text of
four kinds at 512 and 2048 tokens (one never learned from), all of it data that no profile was tuned
on, with intervals from a bootstrap over contexts and chunks; the same temperatures negated and
shuffled over heads. --longer adds text at greater lengths: the beginnings of --speakers addresses
to the Congress, of years that nothing was learned from. Tune them first: recall_tuning.py,
text_tuning.py, text_tuning.py --for KIND. Writes each profile with its evidence, and
benchmarks/results/gallery.json, a record for each model.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import _bench
import torch
from _measuring import HELD, SINGLE, Measurer, pooled, recall_tests, text_tests
from _texts import LONG, SHORT, long_testing
from recall_tuning import GALLERY

from tempering import Profile, load_model
from tempering.evaluation.evidence import contenders

TABLE = (
    *((f"recall, {kind}", f"recall, {kind}", "accuracy") for kind in HELD),
    ("recall, secret code", SINGLE, "accuracy"),
    ("text, 512 tokens", "text, 512", "loss"),
    ("text, 2048 tokens", "text, 2048", "loss"),
    ("last eighth of 2048", "last eighth of text, 2048", "loss"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--longer", type=int, nargs="*", default=[], help="tokens of a chunk")
    parser.add_argument("--speakers", type=int, default=6, help="chunks of those lengths")
    parser.add_argument("--contexts", type=int, default=4, help="of each wording held back")
    parser.add_argument("--single", type=int, default=6, help="of the one wording")
    parser.add_argument("--chunks", type=int, default=8, help="of 512 tokens, of each kind")
    parser.add_argument("--long", type=int, default=3, help="of 2048 tokens, of each kind")
    parser.add_argument("--few", type=int, default=2, help="of each test, for the controls")
    parser.add_argument("--shuffles", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    files = sorted((GALLERY / options.model).glob("*.json"))
    files = [path for path in files if not options.names or path.stem in options.names]
    model, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype))
    tests = recall_tests(tokenizer, options.contexts, options.single)
    tests |= text_tests(tokenizer, SHORT, options.chunks)
    tests |= text_tests(tokenizer, LONG, options.long)
    table_rows = list(TABLE)
    for length in options.longer:
        for kind, chunks in long_testing(tokenizer, length, options.speakers).items():
            tests[f"text, {length}, {kind}"] = chunks
        table_rows.append((f"text, {length} tokens", f"text, {length}, speeches", "loss"))
        name = f"last eighth of {length}"
        table_rows.append((name, f"last eighth of text, {length}, speeches", "loss"))
    measurer = Measurer(model, tests, few=options.few)
    table = {}
    for path in files:
        profile = Profile.load(path)
        rows = measurer.rows(contenders(model, profile, shuffles=options.shuffles))
        evidence = {key: value for key, value in profile.evidence.items() if key != "measured"}
        evidence["measured by"] = f"benchmarks/gallery.py, {options.dtype}"
        evidence["measured"] = [row.to_json() for row in rows]
        replace(profile, evidence=evidence).save(path)
        table[path.stem] = {}
        print(path.stem)
        for heading, start, metric in table_rows:
            if not any(name.startswith(start.split(" of ")[-1]) for name in tests):
                continue
            mean, low, high, _ = pooled(rows, "tuned", start, metric)
            table[path.stem][heading] = [mean, low, high]
            labels = dict.fromkeys(row.label for row in rows if row.family == "control")
            beside = [pooled(rows, label, start, metric)[0] for label in labels]
            print(
                f"  {heading:22s} {mean:+.4f} [{low:+.4f}, {high:+.4f}]   controls: "
                + " ".join(f"{value:+.3f}" for value in beside),
                flush=True,
            )
    _bench.write("gallery", {"settings": vars(options), "change": table}, options.model)


if __name__ == "__main__":
    main()
