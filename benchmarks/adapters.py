"""Temperatures beside other small sets of numbers, learned from the same tokens.

    python benchmarks/adapters.py [--chunks 40] [--passes 4] [--rates 1e-3 3e-3]

One temperature a head (270 numbers), biases of q (17,280), LoRA of rank 1 on q (34,560), output
and uniform temperature (1 each), in the frozen embedded model: fitted to the same chunks of five
kinds of text, judged by the same held-out fifth, as many passes each; biases and LoRA at every
rate, of which the best counts. Measured on text of four kinds (one never learned from) and on
recall: gain, gain per thousand numbers, cost elsewhere, seconds of the fit.
Writes benchmarks/results/adapters.json.
"""

from __future__ import annotations

import argparse
import random
import time

import _bench
import torch
from _measuring import measure, pooled, recall_tests, text_tests
from _texts import SHORT, as_objective, calibration, cut

from tempering import load_model
from tempering.attention.tuning import tune
from tempering.attention.tuning.alternatives import ALTERNATIVES, fit_alternatives
from tempering.evaluation.evidence import contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=40, help="of 512 tokens to learn from")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--which", nargs="+", default=list(ALTERNATIVES))
    parser.add_argument("--test-chunks", type=int, default=8, help="of each kind")
    parser.add_argument("--contexts", type=int, default=1, help="of recall, of each wording")
    options = parser.parse_args()
    model, tokenizer = load_model("smollm2")
    chunks = [ids for text in calibration(tokenizer).values() for ids in cut(text, SHORT)]
    random.Random(0).shuffle(chunks)
    goal = as_objective("text", chunks[: options.chunks])
    # Fits and measurements multiply in bfloat16, all of them alike.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    start = time.monotonic()
    tuned = tune(model, goal, steps=options.passes)
    seconds = {"tuned": time.monotonic() - start}
    fitted = fit_alternatives(
        model, goal, which=options.which, passes=options.passes, rates=options.rates
    )
    seconds |= {item.label: item.seconds for item in fitted}
    rivals = contenders(model, tuned.profile, shuffles=0, alternatives=fitted)
    rivals = [rival for rival in rivals if rival.family != "control"]
    tests = text_tests(tokenizer, SHORT, options.test_chunks)
    tests |= recall_tests(tokenizer, options.contexts, 0)
    rows = measure(model, tests, rivals)
    table = []
    print(
        f"\n{'':22s} {'numbers':>8s} {'text':>9s} {'interval':>20s} {'per 1000':>9s} "
        f"{'new kind':>9s} {'recall':>8s} {'s':>6s}"
    )
    for rival in rivals:
        gain = pooled(rows, rival.label, "text, ", "loss")
        fresh = pooled(rows, rival.label, f"text, {SHORT}, reference", "loss")
        recall = pooled(rows, rival.label, "recall, ", "accuracy")
        row = {
            "label": rival.label,
            "numbers": rival.numbers,
            "change on text": gain[:3],
            "change per thousand numbers": gain[0] / rival.numbers * 1000,
            "change on a kind not learned from": fresh[:3],
            "change of recall": recall[:3],
            "seconds": seconds[rival.label],
            "rate": next((f.rate for f in fitted if f.label == rival.label), None),
        }
        table.append(row)
        print(
            f"{rival.label:22s} {rival.numbers:8d} {gain[0]:+9.4f} "
            f"[{gain[1]:+.4f}, {gain[2]:+.4f}] {row['change per thousand numbers']:+9.4f} "
            f"{fresh[0]:+9.4f} {recall[0]:+8.3f} {seconds[rival.label]:6.0f}"
        )
    _bench.write(
        "adapters",
        {
            "settings": vars(options),
            "tokens learned from": tuned.targets,
            "table": table,
            "measured": [row.to_json() for row in rows],
        },
    )


if __name__ == "__main__":
    main()
