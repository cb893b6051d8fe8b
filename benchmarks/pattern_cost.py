"""What hand-drawn patterns cost in likelihood, with their controls, on four kinds of text.

    python benchmarks/pattern_cost.py [--model gemma3-270m] [--chunks 6]
        [--length 512] [--device cuda]

Prints cost in nats per token (paired over chunks of --length tokens) of the throb at several
amplitudes, of its controls, of plain uniform temperatures, and of supports; writes
benchmarks/results/pattern_cost.json (pattern_cost_4096.json for --length 4096), a record for each
model.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict

import _bench
import torch

from tempering import (
    Profile,
    layout,
    load_model,
    profile_for_support,
    sample_text,
    token_chunks,
)
from tempering.evaluation.cost import Variant, measure_costs
from tempering.schedules import controls, schedule

KINDS = ("fiction", "reference", "play", "code")
AMPLITUDES = (1.1, 1.2, 1.5)
CONTROLLED = 1.2  # the amplitude whose controls are run
UNIFORM = (0.85, 0.93, 1.07, 1.15)
PATTERN = "throb(12,3,1,12)"


def variants(model, sample):
    """The patterns under test and what an honest comparison runs beside them."""
    found = []
    for amplitude in AMPLITUDES:
        pattern = schedule(PATTERN).amplitude(amplitude)
        found.append(Variant(str(pattern), Profile.from_schedule(pattern, model)))
        if amplitude == CONTROLLED:
            for name, control in controls(pattern, len(layout(model).layers), (0, 1)).items():
                profile = Profile.from_schedule(control, model)
                label = f"{name}, amplitude {amplitude:g}"
                found.append(Variant(label, profile, 1.0, "control"))
    for name in ("hot_to_cold(1.5,0.6666667)", "cold_to_hot(0.6666667,1.5)"):
        found.append(Variant(name, Profile.from_schedule(name, model)))
    for t in UNIFORM:
        found.append(Variant(f"uniform T {t:g}", Profile.from_schedule(t, model), 1.0, "uniform"))
    for reading, pattern, amplitude in (
        ("absolute", "throb(12,3,1.2,12)", 1.0),
        ("relative", PATTERN, 0.2),
    ):
        solved = profile_for_support(
            model, sample, pattern, reading=reading, amplitude=amplitude
        ).profile
        found.append(Variant(solved.pattern or "", solved, 1.0, "support"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--length", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--chunks", type=int, default=3, help="of each kind of text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, device=options.device)
    texts = [token_chunks(tokenizer, sample_text(k), options.length, options.chunks) for k in KINDS]
    sample = token_chunks(tokenizer, sample_text("demo"), 512, 4)
    costs, _ = measure_costs(
        model,
        torch.cat(texts),
        tested := variants(model, sample),
        progress=lambda done, total: print(f"chunk {done} of {total}", file=sys.stderr),
    )
    print(f"{'pattern':60} {'nats/token':>10} {'s.e.':>7} {'KL':>7}")
    for item in costs:
        print(
            f"{item.label[:60]:60} {item.cost.value:+10.4f} {item.cost.se:7.4f} "
            f"{item.kl.value:7.4f}"
        )
    throbs = [(a, c.cost.value) for a, c in zip(AMPLITUDES, _throbs(costs), strict=True)]
    for amplitude, cost in throbs:
        print(f"cost / (log {amplitude:g})^2 = {cost / math.log(amplitude) ** 2:.3f}")
    _bench.write(
        "pattern_cost" if options.length == 512 else f"pattern_cost_{options.length}",
        {
            "length": options.length,
            "device": options.device,
            "chunks": len(costs) and costs[0].cost.n,
            "kinds": KINDS,
            "costs": [
                {**asdict(item), "family": variant.family}
                for item, variant in zip(costs, tested, strict=True)
            ],
        },
        options.model,
    )


def _throbs(costs):
    labels = {f"{PATTERN}|amplitude({a:g})" for a in AMPLITUDES}
    return [item for item in costs if item.label in labels]


if __name__ == "__main__":
    main()
