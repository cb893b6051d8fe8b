"""What the profiles of the package do at 4,096 and 8,192 tokens, on text and on retrieval.

    python benchmarks/longer.py [--model gemma3-270m] [--lengths 4096 8192]

Text: the beginnings of addresses to the Congress of years that nothing was learned from, and a
chunk of a reference work, the same for every model; loss of all tokens, and of the last eighth.
Retrieval: "line tidy-crab: REGISTER_CONTENT is <2417>" in contexts that fill the length, questions
for six lines each; loss, and the share of answers with every token likeliest. Changes are paired
with the untempered model, with 95% intervals by a bootstrap over chunks or contexts. Profiles are
tuned at 512 and 2,048 tokens. Writes benchmarks/results/longer.json, a record for each model.
"""

from __future__ import annotations

import argparse
from typing import Any

import _bench
import torch
from _measuring import Contender, Measurer
from _texts import long_testing
from length_rivals import KINDS, NAMES, lines_of

from tempering import Profile, load_model, tempered

PROFILES = ("text", "recall")


def tests_of(tokenizer: Any, options: argparse.Namespace) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for length, contexts in zip(options.lengths, options.contexts, strict=True):
        for kind, chunks in long_testing(tokenizer, length, options.speakers).items():
            found[f"text, {length}, {kind}"] = chunks
        found[f"lines, {length}"] = [
            # A question with its answer takes some 40 tokens, which the length includes.
            lines_of(tokenizer, f"longer {length} {i}", length - 40, 6, KINDS, NAMES)
            for i in range(contexts)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--speakers", type=int, default=4, help="addresses of each length")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4, 2], help="of each length")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype))
    profiles = {name: Profile.load(f"{options.model}/{name}") for name in PROFILES}
    measurer = Measurer(model, tests_of(tokenizer, options))
    rows = measurer.rows(
        [
            Contender(
                name,
                "tuned",
                sum(map(len, profile.rows)),
                lambda profile=profile: tempered(model, profile),
            )
            for name, profile in profiles.items()
        ]
    )
    for row in rows:
        change = row.change
        print(
            f"{row.label:8s} {row.test:40s} {row.metric:9s} {row.untempered:.4f} "
            f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
        )
    payload = {"settings": vars(options), "rows": [row.to_json() for row in rows]}
    print(_bench.write("longer", payload, options.model))


if __name__ == "__main__":
    main()
